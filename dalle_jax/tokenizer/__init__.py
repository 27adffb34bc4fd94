"""Image tokenizers: pictures to grids of discrete codes and back."""
