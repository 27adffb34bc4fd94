"""Two-dimensional convolution with a bias."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from dalle_jax.nn.products import Padding, add_bias, conv2d


class Conv(nn.Module):
    """Convolution of (B, H, W, C) to (B, H', W', width); the parameters are those of flax.linen.Conv.

    Attributes:
      width: output channels.
      size: rows and columns of the kernel.
      strides: positions between windows.
      padding: zeros above and below, left and right; None is half of the kernel on each side.
      dtype: compute dtype.
      kernel_init: initializer of the kernel, (size, size, C, width).
    """

    width: int
    size: int
    strides: int = 1
    padding: Padding | None = None
    dtype: Any = None
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x_BHWC.shape[-1], self.width)
        kernel = self.param("kernel", self.kernel_init, shape)
        dtype = x_BHWC.dtype if self.dtype is None else self.dtype
        half = self.size // 2
        padding = ((half, half), (half, half)) if self.padding is None else self.padding
        y = conv2d(x_BHWC.astype(dtype), kernel.astype(dtype), strides=self.strides, padding=padding)
        return add_bias(y, self.param("bias", nn.initializers.zeros, (self.width,)))
