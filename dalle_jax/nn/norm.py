"""Group norm (Wu and He 2018, 1803.08494), in float32 whatever comes in. B batch, H W places, C channels."""

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
        x = x_BHWC.astype(jnp.float32).reshape(*x_BHWC.shape[:3], groups, -1)
        x = x - jnp.mean(x, axis=(1, 2, 4), keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=(1, 2, 4), keepdims=True) + 1e-6)
        return x.reshape(x_BHWC.shape) * scale[None, None, None] + bias[None, None, None]
