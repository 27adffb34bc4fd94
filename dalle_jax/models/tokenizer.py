"""Image tokenizers: images to grids of discrete codes and back, for every kind of tokenizer (models/registry.py).

Training differs between kinds (`dvae.loss`, `adversarial.adversarial_gradients`). B batch, H W image, N codes.
"""

from __future__ import annotations

import jax

from dalle_jax.config import TokenizerConfig
from dalle_jax.models.registry import TokenizerFunctions, model_spec
from dalle_jax.typing import Params


def _functions(cfg: TokenizerConfig) -> TokenizerFunctions:
    functions = model_spec(cfg).tokenizer
    if functions is None:
        raise ValueError(f"Expected the configuration of an image tokenizer, got {type(cfg).__name__}.")
    return functions


def init(cfg: TokenizerConfig, key: jax.Array) -> Params:
    """Initialize the parameters, float32."""
    return _functions(cfg).init(cfg, key)


def encode(cfg: TokenizerConfig, params: Params, images_BHWC: jax.Array) -> jax.Array:
    """Encode images as codes, deterministically.

    Args:
      images_BHWC: float (B, image_size, image_size, 3) in [0, 1].

    Returns:
      int32 (B, N) in [0, cfg.vocab), in raster order.

    Raises:
      ValueError: another shape or dtype.
    """
    return _functions(cfg).encode(cfg, params, images_BHWC)


def decode(cfg: TokenizerConfig, params: Params, codes_BN: jax.Array) -> jax.Array:
    """Decode codes to images.

    Args:
      codes_BN: int32 (B, N) in [0, cfg.vocab), in raster order.

    Returns:
      float32 (B, image_size, image_size, 3) in [0, 1].

    Raises:
      ValueError: another shape or dtype.
    """
    return _functions(cfg).decode(cfg, params, codes_BN)
