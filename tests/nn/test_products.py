"""Products of 16-bit inputs: sums in float32, in both passes, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.nn.products import add_bias, conv2d, dot_general, einsum

EINSUMS = {  # subscripts: shapes
    "td,df->tf": ((40, 300), (300, 24)),
    "btd,dmf->btmf": ((3, 20, 200), (200, 3, 16)),
    "td,fd->tf": ((40, 300), (24, 300)),
    "bthk,bshk->bhts": ((2, 30, 3, 16), (2, 25, 3, 16)),
    "bhts,bshk->bthk": ((2, 3, 30, 25), (2, 25, 3, 16)),
    "cnqhk,cshk->cnhqs": ((2, 3, 5, 2, 16), (2, 30, 2, 16)),
    "abc,dbac->da": ((3, 4, 50), (6, 4, 3, 50)),
}


def rounded(rng: np.random.Generator, shape: tuple[int, ...], dtype) -> np.ndarray:
    """Return random float64 values that `dtype` represents exactly."""
    return np.asarray(jnp.asarray(rng.normal(size=shape), dtype), np.float64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("subscripts", EINSUMS)
def test_products_and_gradients_are_correctly_rounded_sums(subscripts, dtype):
    """A result is rounded once; the rest is the error of n sums in float32, n eps times the absolute terms."""
    rng = np.random.default_rng(0)
    x, y = (rounded(rng, shape, dtype) for shape in EINSUMS[subscripts])
    inputs, out = subscripts.split("->")
    a, b = inputs.split(",")
    grad = rounded(rng, np.einsum(subscripts, x, y).shape, dtype)
    got, backward = jax.vjp(
        lambda x, y: einsum(subscripts, x, y), jnp.asarray(x, dtype), jnp.asarray(y, dtype)
    )
    x_grad, y_grad = backward(jnp.asarray(grad, dtype))
    for value, terms, p, q in (
        (got, subscripts, x, y),
        (x_grad, f"{out},{b}->{a}", grad, y),
        (y_grad, f"{a},{out}->{b}", x, grad),
    ):
        want, size = np.einsum(terms, p, q), np.einsum(terms, np.abs(p), np.abs(q))
        count = np.abs(p).size * np.abs(q).size / want.size  # at least the number of terms of a sum
        bound = (
            float(jnp.finfo(dtype).eps) / 2 * np.abs(want) + count * float(jnp.finfo(jnp.float32).eps) * size
        )
        assert value.dtype == dtype and value.shape == want.shape
        assert np.all(np.abs(np.asarray(value, np.float64) - want) <= bound)


def test_out_dtype_of_16_bit_inputs():
    """Scores and logits are float32, and their gradient is rounded to the inputs before it is multiplied."""
    rng = np.random.default_rng(1)
    x, y = (
        jnp.asarray(rng.normal(size=(8, 64)), jnp.bfloat16),
        jnp.asarray(rng.normal(size=(64, 8)), jnp.bfloat16),
    )
    got, backward = jax.vjp(lambda x, y: einsum("td,df->tf", x, y, out_dtype=jnp.float32), x, y)
    want = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=64 * 2**-23 * 64)
    grad = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
    x_grad, _ = backward(grad)
    rounded_grad = np.asarray(grad.astype(jnp.bfloat16), np.float64)
    want = rounded_grad @ np.asarray(y, np.float64).T
    assert x_grad.dtype == jnp.bfloat16
    assert np.all(np.abs(np.asarray(x_grad, np.float64) - want) <= 2**-8 * np.abs(want) + 1e-5)


def test_a_cpu_multiplies_16_bit_inputs_with_a_float32_result():
    """Only then its compiler uses the 16-bit units; forward and backward pass."""
    x, w = jnp.zeros((4, 8), jnp.bfloat16), jnp.zeros((8, 16), jnp.bfloat16)

    def loss(x, w):
        return dot_general(x, w, (((1,), (0,)), ((), ()))).sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).as_text()
    products = [line.rsplit(":", 1)[1].split("->") for line in text.splitlines() if ".dot_general" in line]
    assert len(products) >= 2  # of both gradients
    assert all(inputs.count("xbf16>") == 2 and "xf32>" in result for inputs, result in products)


def test_second_derivatives():
    """The gradient of a gradient exists, as a penalty on gradients needs it."""
    x = jnp.asarray([[1.0, 2.0]], jnp.bfloat16)
    w = jnp.asarray([[3.0], [4.0]], jnp.bfloat16)

    def penalty(w):
        grad = jax.grad(lambda x: (dot_general(x, w, (((1,), (0,)), ((), ()))) ** 2).sum())(x)
        return (grad.astype(jnp.float32) ** 2).sum()

    # f = (x w)^2 with x w = 11, f' = 2 * 11 * w; |f'|^2 = 484 * 25, whose gradient by w is
    # 8 (x w) x |w|^2 + 8 (x w)^2 w = 8 * 11 * 25 * x + 8 * 121 * w.
    want = 8 * 11 * 25 * np.array([1.0, 2.0]) + 8 * 121 * np.array([3.0, 4.0])
    np.testing.assert_allclose(np.asarray(jax.grad(penalty)(w), np.float64)[:, 0], want, rtol=2**-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bias_gradient_is_summed_in_float32(dtype):
    """4,096 ones sum to 4,096; in bfloat16 their sum would stop at 256."""
    x = jnp.zeros((8, 512, 3), dtype)
    bias = jnp.asarray([1.0, -2.0, 0.5])
    y, backward = jax.vjp(add_bias, x, bias)
    x_grad, bias_grad = backward(jnp.ones_like(y))
    np.testing.assert_array_equal(np.asarray(y[3, 7], np.float32), bias)
    np.testing.assert_array_equal(bias_grad, [4096.0] * 3)
    assert y.dtype == x_grad.dtype == dtype and bias_grad.dtype == jnp.float32


def convolve(x: np.ndarray, kernel: np.ndarray, strides: int, padding) -> np.ndarray:
    """Compute a convolution by its definition, in float64."""
    rows, columns = kernel.shape[:2]
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = ((n - k) // strides + 1 for n, k in zip(x.shape[1:3], (rows, columns), strict=True))
    out = np.zeros((len(x), height, width, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            part = x[:, i : i + strides * height : strides, j : j + strides * width : strides]
            out += part[:, :height, :width] @ kernel[i, j]
    return out


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("channels", "width", "size", "strides", "padding"),
    [
        (128, 130, 3, 1, ((1, 1), (1, 1))),  # as products of rows
        (128, 128, 5, 1, ((2, 2), (2, 2))),
        (128, 128, 3, 1, ((0, 2), (1, 1))),
        (128, 128, 3, 2, ((0, 1), (0, 1))),
        (6, 8, 3, 1, ((1, 1), (1, 1))),
        (3, 8, 7, 1, ((3, 3), (3, 3))),  # gathered columns
        (3, 8, 4, 1, ((1, 2), (0, 0))),
        (3, 8, 3, 2, ((1, 1), (1, 1))),
        (16, 8, 1, 1, ((0, 0), (0, 0))),
        (16, 8, 1, 2, ((0, 0), (0, 0))),
    ],
)
def test_convolutions_equal_their_definition(channels, width, size, strides, padding, dtype):
    """Value and gradients; the gradients by the linearity of a convolution in both of its inputs."""
    rng = np.random.default_rng(2)
    x = rounded(rng, (2, 6, 7, channels), dtype)
    kernel = rounded(rng, (size, size, channels, width), dtype)
    conv = functools.partial(conv2d, strides=strides, padding=padding)
    got, backward = jax.vjp(conv, jnp.asarray(x, dtype), jnp.asarray(kernel, dtype))
    want = convolve(x, kernel, strides, padding)
    eps = float(jnp.finfo(dtype).eps)

    def bound(value, terms):  # of a sum of n unit terms, rounded once
        return eps / 2 * np.abs(value) + terms * float(jnp.finfo(jnp.float32).eps) * np.sqrt(terms) * 4

    assert got.dtype == dtype and got.shape == want.shape
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= bound(want, size * size * channels))
    grad = rounded(rng, want.shape, dtype)
    x_grad, kernel_grad = (np.asarray(g, np.float64) for g in backward(jnp.asarray(grad, dtype)))
    for value, of_direction in (
        (x_grad, lambda d: convolve(d, kernel, strides, padding)),
        (kernel_grad, lambda d: convolve(x, d, strides, padding)),
    ):
        for _ in range(
            3
        ):  # the entry of a gradient is the product of `grad` with the change by a unit of the input
            at = tuple(rng.integers(n) for n in value.shape)
            unit = np.zeros(value.shape)
            unit[at] = 1
            expected = np.sum(grad * of_direction(unit))
            assert abs(value[at] - expected) <= bound(expected, grad.size / width * size)
