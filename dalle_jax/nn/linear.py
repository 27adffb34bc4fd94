"""Products with the matrices of a layer, as training has them and as sampling prepares them.

A matrix is a dict {"kernel": (D, F), "bias"?: (F,)}. For sampling those that meet the same input are joined to one,
(D, M, F), since a step at a small batch is made of many short products; and on a GPU matrices lie by output, (F, D) or
(M, F, D) as `kernel_t`: XLA computes the product of one row with a matrix there by multiplying and summing, and writes
all of the products to memory unless what it sums lies together. On a CPU float32 matrices lie in tiles of 64 columns,
(N, D, 64) or (M, N, D, 64) as `kernel_tiles`: the product of 2 to 16 rows with a whole matrix first packs it into
such tiles, each time, which takes as long as the product itself (benchmarks/RESULTS.md).

Weights of 8 bits have a scale for each output column.

`int8` and `fp8` (float8_e4m3fn) store weights alone: a step reads a quarter of the bytes of float32, and the products
run in the compute dtype. `w8a8` rounds what comes in to int8 as well, with a scale for each row found on the way
(LLM.int8(), Dettmers et al. 2022, 2208.07339, without its outliers), so that the products are of integers.
A quantised matrix has int8 or float8 in `kernel` and float32 (F,) beside it, `scale` for weights alone, `scale_w8a8`
for both.
D channels in, F channels out, M matrices joined, N tiles.
"""

from __future__ import annotations

import math
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.config import Quantization
from dalle_jax.typing import Params

_SCALES = ("scale", "scale_w8a8")
_LAID = ("kernel_t", "kernel_tiles")
_TILE = 64  # columns; of 128 XLA packs each tile again
_JOINED = {"attn": (("q", "k", "v"),), "mlp": (("gate", "up"),)}  # by the part of a block that has them


def quantize_kernels(params: Params, quantization: Quantization) -> Params:
    """Every `kernel` in nested dicts, (..., D, F), in 8 bits, each column with the scale at which it just fits.

    Raises ValueError for an unknown kind.
    """
    if quantization not in typing.get_args(Quantization):
        raise ValueError(
            f"weights is {quantization!r}; want one of {', '.join(typing.get_args(Quantization))}, or None for the compute dtype"
        )
    found = {k: quantize_kernels(v, quantization) if isinstance(v, dict) else v for k, v in params.items()}
    if (kernel := params.get("kernel")) is not None and not isinstance(kernel, dict):
        dtype = jnp.float8_e4m3fn if quantization == "fp8" else jnp.int8
        values, scale = _rounded(kernel.astype(jnp.float32), dtype, axis=-2)
        found |= {"kernel": values, "scale_w8a8" if quantization == "w8a8" else "scale": scale.squeeze(-2)}
    return found


def _rounded(x: jax.Array, dtype: Any, axis: int) -> tuple[jax.Array, jax.Array]:
    """`x` in 8 bits and its float32 scales along `axis`: values times scales are `x`, nearly."""
    integers = jnp.issubdtype(dtype, jnp.integer)
    most = float(jnp.iinfo(dtype).max if integers else jnp.finfo(dtype).max)
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / most
    values = x / jnp.where(scale > 0, scale, 1)
    return (jnp.round(values) if integers else values).astype(dtype), scale


def fuse_qkv(block: Params) -> Params:
    """A block of a Transformer with one matrix for queries, keys and values, and one for a gate and what it gates."""
    found = dict(block)
    for part, groups in _JOINED.items():
        for names in groups:
            if part in block and set(names) <= set(block[part]):
                rest = {k: v for k, v in block[part].items() if k not in names}
                members = [block[part][name] for name in names]
                one = {k: jnp.stack([m[k] for m in members], axis=-2) for k in members[0]}
                found[part] = rest | {"_".join(names): one}
    return found


def transpose_kernels(params: Params) -> Params:
    """Every `kernel` in nested dicts as `kernel_t`, what makes one output side by side."""
    found = {k: transpose_kernels(v) if isinstance(v, dict) else v for k, v in params.items()}
    if (kernel := params.get("kernel")) is not None and not isinstance(kernel, dict):
        found |= {"kernel_t": jnp.moveaxis(found.pop("kernel"), 0, -1)}
    return found


def tile_kernels(params: Params) -> Params:
    """Every float32 `kernel` in nested dicts whose columns fill tiles as `kernel_tiles`."""
    found = {k: tile_kernels(v) if isinstance(v, dict) else v for k, v in params.items()}
    kernel = params.get("kernel")
    if kernel is None or isinstance(kernel, dict) or kernel.dtype != jnp.float32 or kernel.shape[-1] % _TILE:
        return found
    tiles = found.pop("kernel").reshape(*kernel.shape[:-1], -1, _TILE)
    return found | {"kernel_tiles": jnp.moveaxis(tiles, 0, -2)}


def fused_linear(p: Params, names: tuple[str, ...], x: jax.Array, dtype: Any) -> list[jax.Array]:
    """`affine` of each of the matrices `names` of `p`: one product where they are joined."""
    if (joined := "_".join(names)) in names or joined not in p:
        return [linear(p[name], x, dtype) for name in names]
    y = linear(p[joined], x, dtype)
    return [y[..., i, :] for i in range(len(names))]


def linear(p: Params, x: jax.Array, dtype: Any) -> jax.Array:
    """x (..., D) times the matrix, plus its bias if it has one: (..., F), or (..., M, F), in `dtype`."""
    y = matmul(p, x, dtype)
    return y + _lead(p["bias"].astype(dtype), y.ndim) if "bias" in p else y


def matmul(p: Params, x: jax.Array, dtype: Any, *, out_dtype: Any = None) -> jax.Array:
    """x (..., D) times the matrix, in the compute dtype `dtype`, without the bias. Returns (..., F) in `out`, which
    is `dtype` where it is not given."""
    out_dtype = dtype if out_dtype is None else out_dtype
    if "kernel_tiles" in p:
        return _times_tiles(x.astype(dtype), p["kernel_tiles"].astype(dtype), out_dtype)
    kernel, axis = (p["kernel"], 0) if "kernel" in p else (p["kernel_t"], p["kernel_t"].ndim - 1)
    x = x.astype(dtype)
    if not any(name in p for name in _SCALES):
        # Sums of single rows on a GPU are taken in the dtype of the result: float32, as its matrix units have it.
        y = _dot(x, kernel.astype(dtype), axis, out_dtype if axis == 0 else jnp.float32)
        return y.astype(out_dtype)
    if "scale" in p:
        scale_F, y = p["scale"], _product(x, kernel, axis, dtype, jnp.float32)
    else:
        rounded, own = _rounded(x.astype(jnp.float32), jnp.int8, axis=-1)
        own = own.reshape(own.shape + (1,) * (kernel.ndim - 2))
        scale_F, y = p["scale_w8a8"], _product(rounded, kernel, axis, jnp.int8, jnp.int32) * own
    return (y.astype(jnp.float32) * _lead(scale_F, y.ndim)).astype(out_dtype)


def _product(x: jax.Array, kernel: jax.Array, axis: int, dtype: Any, sums: Any) -> jax.Array:
    """x times kernel, in `dtype` and summed in `sums`."""

    def dot(x, kernel):
        return _dot(x, kernel.astype(dtype), axis, sums)

    def twice(x, kernel):
        both = jax.lax.optimization_barrier(jnp.concatenate([x, x]))  # or XLA sees that they are equal
        return jax.lax.optimization_barrier(dot(both, kernel))[: len(x)]

    # XLA takes one number after another for the product of a single row with a converted matrix on a CPU, 14 times as
    # long as the one of two rows (benchmarks/RESULTS.md).
    single = x.ndim > 1 and math.prod(x.shape[:-1]) == 1
    return jax.lax.platform_dependent(x, kernel, cpu=twice if single else dot, default=dot)


def _times_tiles(x: jax.Array, tiles: jax.Array, out: Any) -> jax.Array:
    """x (..., D) times the matrix whose tiles these are, (N, D, 64) or (M, N, D, 64)."""
    *joined, count, depth, width = tiles.shape
    rows = math.prod(x.shape[:-1])
    if rows > 512:  # here packing hardly counts, and one large product is the faster one
        return _dot(x, jnp.moveaxis(tiles, -2, 0).reshape(depth, *joined, -1), 0, out)
    x_XRD = x.reshape(1, rows, depth)
    if rows == 1:  # XLA reads a matrix faster for two rows; the barrier hides that they are equal
        x_XRD = jax.lax.optimization_barrier(jnp.concatenate([x_XRD, x_XRD], axis=1))
    tiles_XDC = tiles.reshape(-1, depth, width)
    x_XRD = jnp.broadcast_to(x_XRD, (len(tiles_XDC), *x_XRD.shape[1:]))
    y_XRC = jax.lax.dot_general(x_XRD, tiles_XDC, (((2,), (1,)), ((0,), (0,))), preferred_element_type=out)
    if rows == 1:
        y_XRC = jax.lax.optimization_barrier(y_XRC)[:, :1]
    return jnp.moveaxis(y_XRC, 0, 1).reshape(*x.shape[:-1], *joined, count * width)


def _dot(x: jax.Array, kernel: jax.Array, axis: int, out: Any) -> jax.Array:
    """Over the last axis of `x` and `axis` of the kernel."""
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=out)


def _lead(x: jax.Array, ndim: int) -> jax.Array:
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


class Dense(nn.Module):
    """flax's Dense, whose matrix may be one that sampling has prepared."""

    width: int
    use_bias: bool
    dtype: Any
    kernel_init: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        prepared = (name for name in (*_LAID, *_SCALES) if self.has_variable("params", name))
        p = {name: self.get_variable("params", name) for name in prepared}
        if not any(name in p for name in _LAID):
            p["kernel"] = self.param("kernel", self.kernel_init, (x.shape[-1], self.width))
        if self.use_bias:
            p["bias"] = self.param("bias", nn.initializers.zeros, (self.width,))
        return linear(p, x, self.dtype)
