"""Measures of trained models: reconstruction, codebook use, and captions verified in the picture."""
