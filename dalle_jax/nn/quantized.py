"""Matrices in 8 bits for sampling, with a scale for each output column, and the products with them.

`int8` and `fp8` (float8_e4m3fn) store weights alone: a step reads a quarter of the bytes of float32, and the products
run in the compute dtype. `w8a8` rounds what comes in to int8 as well, with a scale for each row found on the way
(LLM.int8(), Dettmers et al. 2022, 2208.07339, without its outliers), so that the products are of integers.
A matrix is a dict {"kernel": (D, F), "bias"?: (F,)}; a quantised one has int8 or float8 in `kernel` and float32 (F,)
beside it, `scale` for weights alone, `scale_w8a8` for both.
D channels in, F channels out.
"""

from __future__ import annotations

import math
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.config import Weights

Params = dict[str, Any]

_SCALES = ("scale", "scale_w8a8")


def quantize(params: Params, weights: Weights) -> Params:
    """Every `kernel` in nested dicts, (..., D, F), in 8 bits, each column with the scale at which it just fits.

    Raises ValueError for an unknown kind.
    """
    if weights not in typing.get_args(Weights):
        raise ValueError(
            f"weights is {weights!r}; want one of {', '.join(typing.get_args(Weights))}, or None for the compute dtype"
        )
    found = {k: quantize(v, weights) if isinstance(v, dict) else v for k, v in params.items()}
    if (kernel := params.get("kernel")) is not None and not isinstance(kernel, dict):
        dtype = jnp.float8_e4m3fn if weights == "fp8" else jnp.int8
        values, scale = _rounded(kernel.astype(jnp.float32), dtype, axis=-2)
        found |= {"kernel": values, "scale_w8a8" if weights == "w8a8" else "scale": scale.squeeze(-2)}
    return found


def _rounded(x: jax.Array, dtype: Any, axis: int) -> tuple[jax.Array, jax.Array]:
    """`x` in 8 bits and its float32 scales along `axis`: values times scales are `x`, nearly."""
    integers = jnp.issubdtype(dtype, jnp.integer)
    most = float(jnp.iinfo(dtype).max if integers else jnp.finfo(dtype).max)
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / most
    values = x / jnp.where(scale > 0, scale, 1)
    return (jnp.round(values) if integers else values).astype(dtype), scale


def product(p: Params, x: jax.Array, dtype: Any, *, out: Any = None) -> jax.Array:
    """x (..., D) times the matrix, in the compute dtype `dtype`, without the bias. Returns (..., F) in `out`, which
    is `dtype` where it is not given."""
    kernel_DF, out = p["kernel"], dtype if out is None else out
    x = x.astype(dtype)
    if not any(name in p for name in _SCALES):
        return _dot(x, kernel_DF.astype(dtype), out)
    if "scale" in p:
        scale_F, y = p["scale"], _product(x, kernel_DF, dtype, jnp.float32)
    else:
        rounded, own = _rounded(x.astype(jnp.float32), jnp.int8, axis=-1)
        scale_F, y = p["scale_w8a8"], _product(rounded, kernel_DF, jnp.int8, jnp.int32) * own
    return (y.astype(jnp.float32) * _lead(scale_F, y.ndim)).astype(out)


def _product(x: jax.Array, kernel_DF: jax.Array, dtype: Any, sums: Any) -> jax.Array:
    """x times kernel, in `dtype` and summed in `sums`."""

    def dot(x, kernel_DF):
        return _dot(x, kernel_DF.astype(dtype), sums)

    def twice(x, kernel_DF):
        both = jax.lax.optimization_barrier(jnp.concatenate([x, x]))  # or XLA sees that they are equal
        return jax.lax.optimization_barrier(dot(both, kernel_DF))[: len(x)]

    # XLA takes one number after another for the product of a single row with a converted matrix on a CPU, 14 times as
    # long as the one of two rows (benchmarks/RESULTS.md).
    single = x.ndim > 1 and math.prod(x.shape[:-1]) == 1
    return jax.lax.platform_dependent(x, kernel_DF, cpu=twice if single else dot, default=dot)


def _dot(x: jax.Array, kernel_DF: jax.Array, out: Any) -> jax.Array:
    return jax.lax.dot_general(x, kernel_DF, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=out)


def _lead(x: jax.Array, ndim: int) -> jax.Array:
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


class Dense(nn.Module):
    """flax's Dense, whose kernel may be quantised."""

    width: int
    use_bias: bool
    dtype: Any
    kernel_init: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        p = {"kernel": self.param("kernel", self.kernel_init, (x.shape[-1], self.width))}
        p |= {
            name: self.get_variable("params", name) for name in _SCALES if self.has_variable("params", name)
        }
        y = product(p, x, self.dtype)
        if self.use_bias:
            bias_F = self.param("bias", nn.initializers.zeros, (self.width,))
            y = y + _lead(bias_F.astype(self.dtype), y.ndim)
        return y
