"""Layers shared by the models, their attention masks, and how arrays are laid over devices."""
