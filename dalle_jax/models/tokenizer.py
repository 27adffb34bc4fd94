"""Image tokenizers: pictures to grids of discrete codes and back.

Every kind has `init`, `encode` and `decode` of one form; these three pick the kind by the type of its configuration,
so that the Transformer, the sampler and the command line never ask which it is. Training differs from kind to kind
and is the kind's own (dvae.loss, adversarial.gradients).
"""

from __future__ import annotations

from typing import Any

import jax

from dalle_jax.config import DVAEConfig, TokenizerConfig, VQGANConfig
from dalle_jax.models import dvae
from dalle_jax.models.vqgan import autoencoder
from dalle_jax.typing import Params


def _module(cfg: TokenizerConfig) -> Any:
    match cfg:
        case DVAEConfig():
            return dvae
        case VQGANConfig():
            return autoencoder
    raise ValueError(f"{type(cfg).__name__} is not the configuration of an image tokenizer")


def init(cfg: TokenizerConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters."""
    return _module(cfg).init(cfg, key)


def encode(cfg: TokenizerConfig, params: Params, images_BHWC: jax.Array) -> jax.Array:
    """Codes of pictures, int32 (B, N), without noise.

    images_BHWC: float in [0, 1], (B, image_size, image_size, 3). Raises ValueError for another shape or dtype.
    """
    return _module(cfg).encode(cfg, params, images_BHWC)


def decode(cfg: TokenizerConfig, params: Params, codes_BN: jax.Array) -> jax.Array:
    """Pictures of codes, float32 (B, image_size, image_size, 3) in [0, 1].

    codes_BN: int32 in [0, cfg.vocab). Raises ValueError for another shape or dtype.
    """
    return _module(cfg).decode(cfg, params, codes_BN)
