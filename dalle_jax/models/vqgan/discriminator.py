"""Patch discriminator (PatchGAN; Isola et al. 2016, 1611.07004): a logit for every patch of an image.

Group norm replaces the batch norm of the published network. With batch norm the logits of an image depend on the rest
of the batch: real and generated images can be distinguished by their statistics, sharding and gradient accumulation
change the result, and the gradient penalty, which is defined per image, is undefined.
B batch, H W image, h w patches, C channels.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.config import AdversarialConfig
from dalle_jax.nn.module import apply_module
from dalle_jax.nn.norm import GroupNorm
from dalle_jax.typing import Params


class Discriminator(nn.Module):
    """Strided convolutions with leaky ReLU and group norm."""

    cfg: AdversarialConfig

    @nn.compact
    def __call__(self, x_BHWC):
        cfg = self.cfg
        for i in range(cfg.layers + 1):
            strides = 2 if i < cfg.layers else 1
            conv = nn.Conv(
                cfg.width * min(2**i, 8), (4, 4), strides, padding=1, use_bias=i == 0,
                kernel_init=nn.initializers.normal(0.02), name=f"conv_{i}",
            )  # fmt: skip
            x_BHWC = conv(x_BHWC)
            if i > 0:
                x_BHWC = GroupNorm(name=f"norm_{i}")(x_BHWC)
            x_BHWC = nn.leaky_relu(x_BHWC, 0.2)
        init = nn.initializers.normal(0.02)
        return nn.Conv(1, (4, 4), padding=1, kernel_init=init, name="score")(x_BHWC)[..., 0]


def init(cfg: AdversarialConfig, image_size: int, key: jax.Array) -> Params:
    """Initialize the parameters, float32.

    Raises:
      ValueError: images too small for `cfg.layers`.
    """
    if image_size // 2**cfg.layers < 3:
        raise ValueError(
            f"Expected images of at least {3 * 2**cfg.layers} pixels for adversarial.layers {cfg.layers}, got "
            f"{image_size}. Use fewer layers."
        )
    return Discriminator(cfg).init(key, jnp.zeros((1, image_size, image_size, 3)))["params"]


def patch_logits(cfg: AdversarialConfig, params: Params, x_BHWC: jax.Array) -> jax.Array:
    """Compute the log-odds that each patch is real, float32 (B, h, w), of images in the tokenizer's pixel range."""
    return apply_module(Discriminator(cfg), params, x_BHWC)
