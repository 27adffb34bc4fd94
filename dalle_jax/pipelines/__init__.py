"""Trained models at work: captions to pictures, pictures to codes and back, each from a run directory.

    model = load_text_to_image("runs/scenes_dalle")
    images = decode_codes(model.tokenizer, sample_code_rows(model, ["a red circle"], seeds=[0]))

Rows are computed in batches of one size, the last one padded, so that every call compiles once. A picture
follows from its caption and seed alone; batches of another size only round otherwise.
Diffusion models: `dalle_jax.pipelines.diffusion`.
"""

from dalle_jax.pipelines.batching import ProgressFn, ProgressPrinter, in_batches
from dalle_jax.pipelines.image_codes import IMAGE_BATCH, decode_codes, encode_images, encode_source
from dalle_jax.pipelines.loading import ImageTokenizer, TextToImage, load_image_tokenizer, load_text_to_image
from dalle_jax.pipelines.text_to_image import (
    SAMPLE_BATCH,
    SamplingConfig,
    batch_shape,
    check_null,
    make_batcher,
    sample_code_rows,
    sample_images,
    tokenize_captions,
)

__all__ = [
    "IMAGE_BATCH",
    "SAMPLE_BATCH",
    "ImageTokenizer",
    "ProgressFn",
    "ProgressPrinter",
    "SamplingConfig",
    "TextToImage",
    "batch_shape",
    "check_null",
    "decode_codes",
    "encode_images",
    "encode_source",
    "in_batches",
    "load_image_tokenizer",
    "load_text_to_image",
    "make_batcher",
    "sample_code_rows",
    "sample_images",
    "tokenize_captions",
]
