"""Layer norm, RMS norm and group norm (Wu and He 2018, 1803.08494), computed in float32.

B batch, H W spatial positions, C channels, G groups.
"""

from __future__ import annotations

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Norm = Literal["layer", "rms"]
NORM_EPSILON = 1e-5


def make_norm(kind: Norm, name: str | None = None, epsilon: float = NORM_EPSILON) -> nn.Module:
    """Return a Linen norm over the last axis that computes in float32."""
    norm = nn.LayerNorm if kind == "layer" else nn.RMSNorm
    return norm(epsilon=epsilon, dtype=jnp.float32, name=name)


class GroupNorm(nn.Module):
    """Group norm with epsilon 1e-6; maps (B, H, W, C) to float32 (B, H, W, C).

    Attributes:
      groups: number of groups; where it does not divide the channels, their greatest common divisor.
    """

    groups: int = 32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        groups = math.gcd(self.groups, x_BHWC.shape[-1])
        shape = (x_BHWC.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        x = x_BHWC.astype(jnp.float32)
        x = x - _group_means(x, groups)
        gain = jax.lax.rsqrt(_group_means(jnp.square(x), groups) + 1e-6) * scale[None, None, None]
        return x * gain + bias[None, None, None]


def _group_means(x_BHWC: jax.Array, groups: int) -> jax.Array:
    """Return the mean of each group, repeated for its channels: (B, 1, 1, C).

    The spatial axes are reduced first: with the few channels of a group innermost, sums on a CPU take two to three
    times as long.
    """
    mean_BC = jnp.mean(x_BHWC, axis=(1, 2))
    mean_BG1 = jnp.mean(mean_BC.reshape(len(mean_BC), groups, -1), axis=-1, keepdims=True)
    mean_BGX = jnp.broadcast_to(mean_BG1, (len(mean_BC), groups, mean_BC.shape[1] // groups))
    return mean_BGX.reshape(len(mean_BC), 1, 1, -1)
