"""Sampling of image codes from a trained Transformer."""
