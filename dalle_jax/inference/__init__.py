"""Trained models at work: captions to pictures, pictures to codes and back, each from a run directory.

    model = load_text_to_image("runs/scenes_dalle")
    images = decode_codes(model.tokenizer, draw_codes(model, ["a red circle"], seeds=[0]))

Rows are computed in batches of one size, the last one padded, so that every call compiles once. A picture
follows from its caption and seed alone; batches of another size only round otherwise.
Diffusion models: `dalle_jax.inference.diffusion`.
"""

from dalle_jax.inference.batches import Counter, Progress, in_batches
from dalle_jax.inference.drawing import (
    DRAW_BATCH,
    Sampling,
    batch_shape,
    check_null,
    draw_codes,
    draw_pictures,
    queue_of,
    text_rows,
)
from dalle_jax.inference.loading import TextToImage, Tokenizer, load_text_to_image, load_tokenizer
from dalle_jax.inference.pixels import PIXEL_BATCH, decode_codes, encode_images, encode_source

__all__ = [
    "DRAW_BATCH",
    "PIXEL_BATCH",
    "Counter",
    "Progress",
    "Sampling",
    "TextToImage",
    "Tokenizer",
    "batch_shape",
    "check_null",
    "decode_codes",
    "draw_codes",
    "draw_pictures",
    "encode_images",
    "encode_source",
    "in_batches",
    "load_text_to_image",
    "load_tokenizer",
    "queue_of",
    "text_rows",
]
