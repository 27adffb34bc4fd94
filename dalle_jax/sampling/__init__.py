"""Drawing pictures from a trained Transformer."""
