"""Linear layers whose kernels are in the layout of training or prepared for sampling.

A layer is a dict {"kernel": (D, F), "bias"?: (F,)}. For sampling:

- Kernels with the same input are fused to one, (D, M, F), because a step at a small batch consists of many short
  products.
- On a GPU kernels are transposed, (F, D) or (M, F, D), as `kernel_t`. XLA computes the product of one row with a matrix
  there by multiplication and reduction, and writes all products to memory unless the reduced axis is contiguous.
- On a CPU kernels are tiled by 64 columns, (N, D, 64) or (M, N, D, 64), as `kernel_tiles`. A product of 2 to 16 rows
  with a whole float32 matrix first packs it into such tiles, each time, which takes as long as the product itself
  (benchmarks/RESULTS.md).
- Kernels may be quantized to 8 bits, with a scale per output column. `int8` and `fp8` (float8_e4m3fn) quantize weights
  alone: a step reads a quarter of the bytes of float32, and products run in the compute dtype. `w8a8` also rounds the
  input to int8, with a scale per row computed on the fly (LLM.int8(), Dettmers et al. 2022, 2208.07339, without its
  outliers), so that products are of integers. A quantized layer has int8 or float8 in `kernel` and a float32 scale
  (F,): `scale` for weights alone, `scale_w8a8` for both.

D input channels, F output channels, M fused kernels, N tiles.
"""

from __future__ import annotations

import math
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.config import Quantization
from dalle_jax.nn.products import add_bias, dot_general, multiply_as_two_rows
from dalle_jax.typing import Params

_SCALES = ("scale", "scale_w8a8")
_LAYOUTS = ("kernel_t", "kernel_tiles")
_TILE = 64  # columns; tiles of 128 columns are packed again by XLA
_FUSED = {"attn": (("q", "k", "v"),), "mlp": (("gate", "up"),)}  # by the part of a block that has them


def quantize_kernels(params: Params, quantization: Quantization) -> Params:
    """Quantize every `kernel` in nested dicts to 8 bits.

    Args:
      params: nested dicts with kernels (..., D, F).
      quantization: int8, fp8 or w8a8. The scale of a column maps its largest absolute value to the largest 8-bit value.

    Returns:
      The parameters with quantized kernels and their scales.

    Raises:
      ValueError: the quantization is unknown.
    """
    if quantization not in typing.get_args(Quantization):
        raise ValueError(
            f"Expected quantization to be one of {', '.join(typing.get_args(Quantization))}, got {quantization!r}. "
            "Use None for the compute dtype."
        )
    out = {k: quantize_kernels(v, quantization) if isinstance(v, dict) else v for k, v in params.items()}
    if (kernel := _kernel(params)) is not None:
        dtype = jnp.float8_e4m3fn if quantization == "fp8" else jnp.int8
        values, scale = _quantize(kernel.astype(jnp.float32), dtype, axis=-2)
        out |= {"kernel": values, "scale_w8a8" if quantization == "w8a8" else "scale": scale.squeeze(-2)}
    return out


def _kernel(params: Params) -> jax.Array | None:
    """Return the kernel if `params` is a linear layer; a part of a model that is called `kernel` is none."""
    kernel = params.get("kernel")
    return None if isinstance(kernel, dict) else kernel


def _quantize(x: jax.Array, dtype: Any, axis: int) -> tuple[jax.Array, jax.Array]:
    """Return 8-bit values and float32 scales along `axis`; values times scales approximate `x`."""
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    max_value = float(jnp.iinfo(dtype).max if is_integer else jnp.finfo(dtype).max)
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / max_value
    values = x / jnp.where(scale > 0, scale, 1)
    return (jnp.round(values) if is_integer else values).astype(dtype), scale


def fuse_qkv(block: Params) -> Params:
    """Fuse the kernels of queries, keys and values of a Transformer block, and those of a gate and its input."""
    out = dict(block)
    for part, groups in _FUSED.items():
        for names in groups:
            if part in block and set(names) <= set(block[part]):
                rest = {k: v for k, v in block[part].items() if k not in names}
                layers = [block[part][name] for name in names]
                fused = {k: jnp.stack([layer[k] for layer in layers], axis=-2) for k in layers[0]}
                out[part] = rest | {"_".join(names): fused}
    return out


def transpose_kernels(params: Params) -> Params:
    """Replace every `kernel` in nested dicts by `kernel_t`, whose input axis is contiguous."""
    out = {k: transpose_kernels(v) if isinstance(v, dict) else v for k, v in params.items()}
    if (kernel := _kernel(params)) is not None:
        del out["kernel"]
        out |= {"kernel_t": jnp.moveaxis(kernel, 0, -1)}
    return out


def tile_kernels(params: Params) -> Params:
    """Replace every float `kernel` in nested dicts by `kernel_tiles` if its columns divide into tiles."""
    out = {k: tile_kernels(v) if isinstance(v, dict) else v for k, v in params.items()}
    kernel = _kernel(params)
    if kernel is None or any(name in params for name in _SCALES) or kernel.shape[-1] % _TILE:
        return out
    del out["kernel"]
    tiles = kernel.reshape(*kernel.shape[:-1], -1, _TILE)
    return out | {"kernel_tiles": jnp.moveaxis(tiles, 0, -2)}


def fused_linear(p: Params, names: tuple[str, ...], x: jax.Array, dtype: Any) -> list[jax.Array]:
    """Apply `linear` with each of the layers `names` of `p`, in one product if they are fused."""
    if (fused := "_".join(names)) in names or fused not in p:
        return [linear(p[name], x, dtype) for name in names]
    y = linear(p[fused], x, dtype)
    return [y[..., i, :] for i in range(len(names))]


def linear(p: Params, x: jax.Array, dtype: Any) -> jax.Array:
    """Apply a linear layer.

    Args:
      p: the layer, in any of the layouts.
      x: (..., D).
      dtype: compute dtype.

    Returns:
      (..., F), or (..., M, F) of a fused layer, in `dtype`.
    """
    y = matmul(p, x, dtype)
    return add_bias(y, p["bias"]) if "bias" in p else y


def matmul(p: Params, x: jax.Array, dtype: Any, *, out_dtype: Any = None) -> jax.Array:
    """Apply a linear layer without its bias.

    Args:
      p: the layer, in any of the layouts.
      x: (..., D).
      dtype: compute dtype.
      out_dtype: dtype of the result; None is `dtype`.

    Returns:
      (..., F), or (..., M, F) of a fused layer.
    """
    out_dtype = dtype if out_dtype is None else out_dtype
    if "kernel_tiles" in p:
        return _matmul_tiles(x.astype(dtype), p["kernel_tiles"].astype(dtype), out_dtype)
    kernel, axis = (p["kernel"], 0) if "kernel" in p else (p["kernel_t"], p["kernel_t"].ndim - 1)
    x = x.astype(dtype)
    if not any(name in p for name in _SCALES):
        # Products of single rows on a GPU accumulate in the dtype of the result: float32, as its matrix units do.
        y = _dot(x, kernel.astype(dtype), axis, out_dtype if axis == 0 else jnp.float32)
        return y.astype(out_dtype)
    if "scale" in p:
        scale_F, y = p["scale"], _dot_quantized(x, kernel, axis, dtype, jnp.float32)
    else:
        values, row_scale = _quantize(x.astype(jnp.float32), jnp.int8, axis=-1)
        row_scale = row_scale.reshape(row_scale.shape + (1,) * (kernel.ndim - 2))
        scale_F, y = p["scale_w8a8"], _dot_quantized(values, kernel, axis, jnp.int8, jnp.int32) * row_scale
    return (y.astype(jnp.float32) * _add_leading_axes(scale_F, y.ndim)).astype(out_dtype)


def _dot_quantized(x: jax.Array, kernel: jax.Array, axis: int, dtype: Any, sum_dtype: Any) -> jax.Array:
    """Multiply by a quantized kernel in `dtype`, with sums in `sum_dtype`."""

    def dot(x, kernel):
        return _dot(x, kernel.astype(dtype), axis, sum_dtype)

    def dot_twice(x, kernel):
        return multiply_as_two_rows(lambda rows: dot(rows, kernel), x, 0, 0)

    is_single_row = x.ndim > 1 and math.prod(x.shape[:-1]) == 1
    return jax.lax.platform_dependent(x, kernel, cpu=dot_twice if is_single_row else dot, default=dot)


def _matmul_tiles(x: jax.Array, tiles: jax.Array, out_dtype: Any) -> jax.Array:
    """Multiply x (..., D) by a tiled kernel, (N, D, 64) or (M, N, D, 64)."""
    *fused, count, depth, width = tiles.shape
    rows = math.prod(x.shape[:-1])
    if rows > 512:  # packing hardly counts here, and one large product is faster
        return _dot(x, jnp.moveaxis(tiles, -2, 0).reshape(depth, *fused, -1), 0, out_dtype)
    x_XRD = x.reshape(1, rows, depth)
    tiles_XDC = tiles.reshape(-1, depth, width)

    def dot(x_XRD):
        x_XRD = jnp.broadcast_to(x_XRD, (len(tiles_XDC), *x_XRD.shape[1:]))
        return dot_general(x_XRD, tiles_XDC, (((2,), (1,)), ((0,), (0,))), out_dtype=out_dtype)

    y_XRC = multiply_as_two_rows(dot, x_XRD, 1, 1) if rows == 1 else dot(x_XRD)
    return jnp.moveaxis(y_XRC, 0, 1).reshape(*x.shape[:-1], *fused, count * width)


def _dot(x: jax.Array, kernel: jax.Array, axis: int, out_dtype: Any) -> jax.Array:
    """Contract the last axis of `x` with `axis` of the kernel."""
    return dot_general(x, kernel, (((x.ndim - 1,), (axis,)), ((), ())), out_dtype=out_dtype)


def _add_leading_axes(x: jax.Array, ndim: int) -> jax.Array:
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


class Dense(nn.Module):
    """Flax's Dense, whose kernel may be prepared for sampling; maps (..., D) to (..., F)."""

    width: int
    use_bias: bool
    dtype: Any
    kernel_init: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        prepared = (name for name in (*_LAYOUTS, *_SCALES) if self.has_variable("params", name))
        p = {name: self.get_variable("params", name) for name in prepared}
        if not any(name in p for name in _LAYOUTS):
            p["kernel"] = self.param("kernel", self.kernel_init, (x.shape[-1], self.width))
        if self.use_bias:
            p["bias"] = self.param("bias", nn.initializers.zeros, (self.width,))
        return linear(p, x, self.dtype)
