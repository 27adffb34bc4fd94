"""Files: atomic writes, and bounded reads of zip and npz archives."""
