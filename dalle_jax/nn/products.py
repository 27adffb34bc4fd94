"""Products and convolutions of bfloat16 and float16 arrays with sums in float32, in the forward and the backward pass.

The matrix units of TPUs and GPUs sum products of 16-bit inputs in float32 whatever the dtype of the result. On a CPU
the compiler uses the 16-bit units (AVX512-BF16, AMX) only for products whose result is float32; with a 16-bit result it
converts the inputs and multiplies in float32. So on a CPU these functions ask for float32 and round the sums after. The
gradients follow the same rule: the gradient of the result is rounded to the dtype of the inputs before it is
multiplied, as mixed-precision training does (Micikevicius et al. 2018, 1710.03740).

These functions are `jax.custom_vjp` for 16-bit inputs: they have no forward-mode derivative. In float32 they are the
functions of `jax.lax`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# ((contracted axes of lhs, of rhs), (batch axes of lhs, of rhs)), as jax.lax.dot_general takes them.
DotDimensions = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]

DOT = "dot"  # the name of products without batch axes, which a remat policy can save


def dot_general(
    lhs: jax.Array, rhs: jax.Array, dimensions: DotDimensions, *, out_dtype: Any = None
) -> jax.Array:
    """Contract two arrays, with sums in float32.

    Args:
      lhs: float array.
      rhs: array of the same dtype.
      dimensions: contracted and batch axes, as `jax.lax.dot_general` takes them.
      out_dtype: dtype of the result; None is the dtype of the inputs.

    Returns:
      The batch axes, then the other axes of `lhs`, then those of `rhs`.
    """
    out_dtype = jnp.dtype(lhs.dtype if out_dtype is None else out_dtype)
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimensions
    axes = (tuple(lhs_contract), tuple(rhs_contract), tuple(lhs_batch), tuple(rhs_batch))
    if lhs.dtype.itemsize == 2 and lhs.dtype == rhs.dtype:
        out = _dot_16bit(axes, out_dtype, lhs, rhs)
    else:
        out = jax.lax.dot_general(lhs, rhs, dimensions, preferred_element_type=out_dtype)
    return out if lhs_batch else checkpoint_name(out, DOT)


def einsum(subscripts: str, x: jax.Array, y: jax.Array, *, out_dtype: Any = None) -> jax.Array:
    """Compute an einsum of two arrays of the same dtype as `dot_general` does.

    Args:
      subscripts: such as "btd,df->btf"; each letter stands in two of the three terms at least.
      x: float array.
      y: array of the same dtype.
      out_dtype: dtype of the result; None is the dtype of the inputs.
    """
    inputs, out_axes = subscripts.split("->")
    x_axes, y_axes = inputs.split(",")
    shared = [axis for axis in x_axes if axis in y_axes]
    batch = [axis for axis in shared if axis in out_axes]
    contract = [axis for axis in shared if axis not in out_axes]

    def positions(axes: list[str]) -> tuple[list[int], list[int]]:
        return [x_axes.index(axis) for axis in axes], [y_axes.index(axis) for axis in axes]

    dimensions = positions(contract), positions(batch)
    product_axes = [*batch, *(a for a in x_axes if a not in shared), *(a for a in y_axes if a not in shared)]
    out = dot_general(x, y, dimensions, out_dtype=out_dtype)
    return jnp.transpose(out, [product_axes.index(axis) for axis in out_axes])


def multiply_as_two_rows(
    product: Callable[[jax.Array], jax.Array], x: jax.Array, axis: int, out_axis: int
) -> jax.Array:
    """Compute `product` of one row as that of two equal rows.

    On a CPU XLA computes the product of a single row with a matrix of 16 bits, or with one converted from 8 bits, one
    number at a time, which takes 10 times as long as the product of two rows (benchmarks/RESULTS.md), and it reads
    float32 tiles faster for two.

    Args:
      product: linear in `x`.
      x: array with one entry along `axis`.
      axis: of the row in `x`.
      out_axis: of the row in the result.
    """
    rows = jax.lax.optimization_barrier(jnp.concatenate([x, x], axis))  # hides from XLA that they are equal
    return jax.lax.slice_in_dim(jax.lax.optimization_barrier(product(rows)), 0, 1, axis=out_axis)


def _sum_in_float32(axes: tuple, out_dtype: Any, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    def dot(lhs, rhs, dtype=out_dtype):
        return jax.lax.dot_general(lhs, rhs, (axes[:2], axes[2:]), preferred_element_type=dtype)

    def cpu_dot(lhs, rhs):
        return dot(lhs, rhs, jnp.float32).astype(out_dtype)

    lhs_contract, _, lhs_batch, _ = axes
    free = _other_axes(lhs.ndim, (*lhs_contract, *lhs_batch))

    def cpu_dot_twice(lhs, rhs):
        return multiply_as_two_rows(
            lambda lhs: cpu_dot(lhs, rhs), lhs, free[-1], len(lhs_batch) + len(free) - 1
        )

    is_single_row = free and all(lhs.shape[axis] == 1 for axis in free)
    return jax.lax.platform_dependent(lhs, rhs, cpu=cpu_dot_twice if is_single_row else cpu_dot, default=dot)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dot_16bit(axes: tuple, out_dtype: Any, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return _sum_in_float32(axes, out_dtype, lhs, rhs)


def _dot_forward(axes, out_dtype, lhs, rhs):
    return _sum_in_float32(axes, out_dtype, lhs, rhs), (lhs, rhs)


def _dot_backward(axes, out_dtype, residuals, grad):
    lhs, rhs = residuals
    grad = grad.astype(lhs.dtype)
    lhs_contract, rhs_contract, lhs_batch, rhs_batch = axes
    lhs_free = _other_axes(lhs.ndim, (*lhs_contract, *lhs_batch))
    rhs_free = _other_axes(rhs.ndim, (*rhs_contract, *rhs_batch))
    batch = tuple(range(len(lhs_batch)))
    grad_lhs_free = tuple(range(len(batch), len(batch) + len(lhs_free)))
    grad_rhs_free = tuple(range(len(batch) + len(lhs_free), grad.ndim))

    # Axes of the result: batch, free axes of lhs, contracted axes of rhs in their order in rhs.
    lhs_grad = _dot_16bit((grad_rhs_free, rhs_free, batch, rhs_batch), lhs.dtype, grad, rhs)
    contract = tuple(lhs_contract[i] for i in _argsort(rhs_contract))
    lhs_grad = jnp.transpose(lhs_grad, _argsort((*lhs_batch, *lhs_free, *contract)))
    # Batch, contracted axes of lhs in their order in lhs, free axes of rhs.
    rhs_grad = _dot_16bit((lhs_free, grad_lhs_free, lhs_batch, batch), rhs.dtype, lhs, grad)
    contract = tuple(rhs_contract[i] for i in _argsort(lhs_contract))
    rhs_grad = jnp.transpose(rhs_grad, _argsort((*rhs_batch, *contract, *rhs_free)))
    return lhs_grad, rhs_grad


_dot_16bit.defvjp(_dot_forward, _dot_backward)


def _argsort(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(axes)), key=axes.__getitem__))


def _other_axes(ndim: int, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in axes)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Add a bias to the last axes, in the dtype of `x`; the gradient of the bias is summed in float32.

    Args:
      x: float (..., F).
      bias: (F,), or as many last axes of `x` as it has; any float dtype.
    """
    return _add_bias_16bit(x, bias) if x.dtype.itemsize == 2 else x + _like(bias, x)


def _like(bias: jax.Array, x: jax.Array) -> jax.Array:
    return bias.astype(x.dtype).reshape((1,) * (x.ndim - bias.ndim) + bias.shape)


@jax.custom_vjp
def _add_bias_16bit(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + _like(bias, x)


def _add_bias_backward(bias, grad):
    axes = tuple(range(grad.ndim - bias.ndim))
    return grad, jnp.sum(grad, axes, dtype=jnp.float32).astype(bias.dtype)


_add_bias_16bit.defvjp(lambda x, bias: (x + _like(bias, x), bias), _add_bias_backward)


# A convolution of fewer channels is bound by the copies of its windows and not by its products.
_MIN_PRODUCT_CHANNELS = 128
_MAX_GATHERED_CHANNELS = 4
_NHWC = ("NHWC", "HWIO", "NHWC")

Padding = tuple[tuple[int, int], tuple[int, int]]


def conv2d(x_BHWC: jax.Array, kernel_IJCF: jax.Array, *, strides: int = 1, padding: Padding) -> jax.Array:
    """Convolve images, with sums in float32.

    Two cases have a form that is faster on a CPU, with the same result: a 1x1 kernel is a matrix product, and few input
    channels are first gathered along the rows of the kernel.

    Args:
      x_BHWC: float images.
      kernel_IJCF: of the same dtype; I rows, J columns, C input channels, F output channels.
      strides: positions between windows, along both axes.
      padding: zeros above and below, left and right.

    Returns:
      (B, H', W', F) in the dtype of the inputs.
    """
    rows, columns = kernel_IJCF.shape[:2]
    if rows == columns == strides == 1 and padding == ((0, 0), (0, 0)):
        return dot_general(x_BHWC, kernel_IJCF[0, 0], (((3,), (0,)), ((), ())))
    if x_BHWC.dtype.itemsize == 2 and x_BHWC.dtype == kernel_IJCF.dtype:
        return _conv_16bit(strides, padding, x_BHWC, kernel_IJCF)
    return _conv(strides, padding, x_BHWC, kernel_IJCF)


def _gather_columns(x_BHWC: jax.Array, columns: int, padding: tuple[int, int]) -> jax.Array:
    """Pad rows and gather `columns` neighbors at each position, (B, H, W', J C)."""
    x_BHWC = jnp.pad(x_BHWC, ((0, 0), (0, 0), padding, (0, 0)))
    width = x_BHWC.shape[2] - columns + 1
    return jnp.concatenate([x_BHWC[:, :, j : j + width] for j in range(columns)], axis=-1)


def _conv(strides: int, padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    rows, columns, channels, width = kernel.shape
    if channels <= _MAX_GATHERED_CHANNELS and columns > 1 and strides == 1:
        x, padding = _gather_columns(x, columns, padding[1]), (padding[0], (0, 0))
        kernel = kernel.reshape(rows, 1, columns * channels, width)
    return jax.lax.conv_general_dilated(x, kernel, (strides, strides), padding, dimension_numbers=_NHWC)


def _conv_in_float32(strides: int, padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    y = _conv(strides, padding, x.astype(jnp.float32), kernel.astype(jnp.float32))
    return y.astype(x.dtype)


def _is_product(strides: int, padding: Padding, kernel_IJCF: jax.Array) -> bool:
    """Whether a CPU computes a convolution of 16-bit inputs faster as products of shifted copies."""
    rows, columns, *channels = kernel_IJCF.shape
    is_same = padding == ((rows // 2,) * 2, (columns // 2,) * 2) and rows % 2 == columns % 2 == 1
    return strides == 1 and is_same and min(channels) >= _MIN_PRODUCT_CHANNELS


def _shifted_rows(x_BHWC: jax.Array, rows: int, columns: int) -> list[jax.Array]:
    """Return the neighbors of each position that meet each row of a kernel, (B, H, W, J C) each."""
    height, above, left = x_BHWC.shape[1], rows // 2, columns // 2
    x = jnp.pad(x_BHWC, ((0, 0), (above, above), (0, 0), (0, 0)))
    x = _gather_columns(x, columns, (left, left))
    return [x[:, i : i + height] for i in range(rows)]


def _conv_by_rows(x_BHWC: jax.Array, kernel_IJCF: jax.Array) -> jax.Array:
    """Convolve as one product for each row of the kernel, summed in float32."""
    rows, columns, channels, width = kernel_IJCF.shape
    kernels = kernel_IJCF.reshape(rows, columns * channels, width)
    dims = (((3,), (0,)), ((), ()))
    shifted = _shifted_rows(x_BHWC, rows, columns)
    y = sum(
        jax.lax.dot_general(x, kernel, dims, preferred_element_type=jnp.float32)
        for x, kernel in zip(shifted, kernels, strict=True)
    )
    return jnp.asarray(y, x_BHWC.dtype)


def _kernel_grad_by_rows(x_BHWC: jax.Array, grad_BHWF: jax.Array, rows: int, columns: int) -> jax.Array:
    """Compute the gradient of a kernel as one product for each of its rows, in the dtype of the inputs."""
    dims = (((0, 1, 2), (0, 1, 2)), ((), ()))
    grads = [
        jax.lax.dot_general(x, grad_BHWF, dims, preferred_element_type=jnp.float32)
        for x in _shifted_rows(x_BHWC, rows, columns)
    ]
    shape = (rows, columns, x_BHWC.shape[3], grad_BHWF.shape[3])
    return jnp.stack(grads).reshape(shape).astype(x_BHWC.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv_16bit(strides: int, padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    cpu = functools.partial(_conv_in_float32, strides, padding)
    if _is_product(strides, padding, kernel):
        cpu = _conv_by_rows
    return jax.lax.platform_dependent(x, kernel, cpu=cpu, default=functools.partial(_conv, strides, padding))


def _conv_forward(strides, padding, x, kernel):
    return _conv_16bit(strides, padding, x, kernel), (x, kernel)


def _conv_backward(strides, padding, residuals, grad):
    x, kernel = residuals

    def backward(conv):
        def fn(x, kernel, grad):
            return jax.vjp(functools.partial(conv, strides, padding), x, kernel)[1](grad)

        return fn

    def by_rows(x, kernel, grad):
        flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
        return _conv_by_rows(grad, flipped), _kernel_grad_by_rows(x, grad, *kernel.shape[:2])

    cpu = by_rows if _is_product(strides, padding, kernel) else backward(_conv_in_float32)
    return jax.lax.platform_dependent(x, kernel, grad, cpu=cpu, default=backward(_conv))


_conv_16bit.defvjp(_conv_forward, _conv_backward)
