"""Discriminator of patches (PatchGAN; Isola et al. 2016, 1611.07004): a score for every patch of a picture.

Group norm stands where the published network has batch norm. With batch norm the score of a picture depends on what
else is in the batch, so real and generated pictures are told apart by their statistics, sharding and gradient
accumulation change the result, and the gradient penalty, which is defined per picture, has no meaning.
B batch, H W image, h w patches, C channels.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.config import AdversarialConfig
from dalle_jax.nn.norm import GroupNorm
from dalle_jax.typing import Params


class Discriminator(nn.Module):
    cfg: AdversarialConfig

    @nn.compact
    def __call__(self, x_BHWC):
        cfg = self.cfg
        for i in range(cfg.layers + 1):
            halves = i < cfg.layers
            conv = nn.Conv(
                cfg.width * min(2**i, 8), (4, 4), 2 if halves else 1, padding=1, use_bias=i == 0,
                kernel_init=nn.initializers.normal(0.02), name=f"conv_{i}",
            )  # fmt: skip
            x_BHWC = conv(x_BHWC)
            if i > 0:
                x_BHWC = GroupNorm(name=f"norm_{i}")(x_BHWC)
            x_BHWC = nn.leaky_relu(x_BHWC, 0.2)
        init = nn.initializers.normal(0.02)
        return nn.Conv(1, (4, 4), padding=1, kernel_init=init, name="score")(x_BHWC)[..., 0]


def init(cfg: AdversarialConfig, image_size: int, key: jax.Array) -> Params:
    """Fresh float32 parameters. Raises ValueError for pictures too small for `cfg.layers`."""
    if image_size // 2**cfg.layers < 3:
        raise ValueError(
            f"adversarial.layers {cfg.layers} halvings leave less than 3 x 3 of {image_size} pixels; "
            "lower adversarial.layers"
        )
    return Discriminator(cfg).init(key, jnp.zeros((1, image_size, image_size, 3)))["params"]


def patch_logits(cfg: AdversarialConfig, params: Params, x_BHWC: jax.Array) -> jax.Array:
    """Log-odds that each patch is real, float32 (B, h, w), of pictures in the tokenizer's own range."""
    return Discriminator(cfg).apply({"params": params}, x_BHWC)
