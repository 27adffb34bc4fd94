"""Models: image tokenizers, autoregressive Transformers, CLIP and diffusion; registry.py is the table of all kinds."""
