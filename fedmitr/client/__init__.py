"""Method step 1, the client: a shard of images becomes one upload, or FuseFL's stages."""
