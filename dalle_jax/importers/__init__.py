"""Weights in the formats of others, read and written with NumPy alone."""
