"""Group norm (Wu and He 2018, 1803.08494), in float32 whatever comes in. B batch, H W places, C channels,
G groups."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp


class GroupNorm(nn.Module):
    """`groups` groups, fewer where the channels do not divide; epsilon 1e-6. float32 (B, H, W, C)."""

    groups: int = 32

    @nn.compact
    def __call__(self, x_BHWC):
        groups = math.gcd(self.groups, x_BHWC.shape[-1])
        shape = (x_BHWC.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        x = x_BHWC.astype(jnp.float32)
        x = x - _group_means(x, groups)
        gain = jax.lax.rsqrt(_group_means(jnp.square(x), groups) + 1e-6) * scale[None, None, None]
        return x * gain + bias[None, None, None]


def _group_means(x_BHWC: jax.Array, groups: int) -> jax.Array:
    """Mean of each group, for each of its channels: (B, 1, 1, C). Over the places first: with the few channels of a
    group innermost, the CPU's sums take two to three times as long."""
    mean_BC = jnp.mean(x_BHWC, axis=(1, 2))
    mean_BG1 = jnp.mean(mean_BC.reshape(len(mean_BC), groups, -1), axis=-1, keepdims=True)
    each = jnp.broadcast_to(mean_BG1, (len(mean_BC), groups, mean_BC.shape[1] // groups))
    return each.reshape(len(mean_BC), 1, 1, -1)
