"""Step 1: a shard of images becomes one upload."""
