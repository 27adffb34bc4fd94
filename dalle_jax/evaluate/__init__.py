"""Metrics of trained models: reconstruction, likelihood, accuracy on captions, FID, retrieval, re-ranking."""
