"""Layers that the models share: attention and its masks, KV caches, linear layers, norms, losses."""
