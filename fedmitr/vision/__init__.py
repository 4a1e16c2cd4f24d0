"""The Vision Transformer, patch by patch: how it is built, run, cut into patches and into stages."""
