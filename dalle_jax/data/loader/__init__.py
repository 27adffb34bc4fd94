"""The input pipeline: rows of a source to batches, built ahead by threads or processes."""
