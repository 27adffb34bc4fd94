"""Training: one loop for every stage, exact resume, run directories that describe themselves."""
