"""Laws of linear layers prepared for sampling: fused, transposed or tiled they change no result; quantized they round
as
documented and change logits little."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FAMILIES, family_batch, family_params

from dalle_jax.models import autoregressive
from dalle_jax.nn import linear
from dalle_jax.nn.linear import (
    fuse_qkv,
    fused_linear,
    matmul,
    quantize_kernels,
    tile_kernels,
    transpose_kernels,
)
from dalle_jax.sampling.generate import generate, row_keys

QUANTIZATIONS = ("int8", "fp8", "w8a8")
rng = np.random.default_rng(0)
MATRIX = jnp.asarray(rng.normal(size=(24, 10)) * 10.0 ** rng.integers(-3, 3, 10), jnp.float32)


def test_int8_by_hand():
    """The scale of a column maps its largest number to 127; a column of zeros stays zero."""
    p = {"up": {"kernel": jnp.array([[1.27, -4.0, 0.0], [-0.5, 1.0, 0.0]]), "bias": jnp.ones(3)}}
    got = quantize_kernels(p, "int8")["up"]
    assert got["kernel"].dtype == jnp.int8 and set(got) == {"kernel", "bias", "scale"}
    np.testing.assert_array_equal(got["kernel"], [[127, -127, 0], [-50, 32, 0]])
    np.testing.assert_allclose(got["scale"], [0.01, 4 / 127, 0], rtol=1e-6)
    x = jnp.array([[1.0, 2.0]])
    want = [[127 * 0.01 - 100 * 0.01, (-127 + 64) * 4 / 127, 0]]
    np.testing.assert_allclose(matmul(got, x, jnp.float32), want, rtol=1e-6)


def test_fp8_by_hand():
    """448 is the largest float8_e4m3fn; from 256 to 448 its numbers are 32 apart."""
    got = quantize_kernels({"kernel": jnp.array([[448.0], [300.0], [-0.5]])}, "fp8")
    assert got["kernel"].dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(got["kernel"].astype(jnp.float32), [[448.0], [288.0], [-0.5]])
    np.testing.assert_allclose(got["scale"], [1.0])


def test_w8a8_by_hand():
    """Rows are rounded too: 1 and 0.3 of a row with maximum 1 become 127 and 38 of 127."""
    p = quantize_kernels({"kernel": jnp.array([[127.0], [-127.0]])}, "w8a8")
    assert set(p) == {"kernel", "scale_w8a8"}
    for rows in (1, 3):
        x = jnp.tile(jnp.array([[1.0, 0.3]]), (rows, 1))
        np.testing.assert_allclose(matmul(p, x, jnp.float32), [[127 - 38]] * rows, rtol=1e-6)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("rows", [1, 5])
def test_product_equals_that_of_the_rounded_matrix(quantization, rows):
    """For one row, which is computed twice on a CPU, and for many, in every compute dtype."""
    p = quantize_kernels({"kernel": MATRIX}, quantization)
    scale = p["scale_w8a8" if quantization == "w8a8" else "scale"]
    rounded = np.asarray(p["kernel"].astype(jnp.float32)) * np.asarray(scale)
    x = np.asarray(rng.normal(size=(rows, 24)), np.float32)
    if quantization == "w8a8":
        own = np.abs(x).max(axis=1, keepdims=True) / 127
        near = np.round(x / own) * own
    else:
        near = x
    size = np.abs(near) @ np.abs(rounded)
    got = jax.jit(matmul, static_argnums=2)(p, jnp.asarray(x), jnp.float32)
    assert (np.abs(got - near @ rounded) <= 1e-5 * size).all()
    half = jax.jit(matmul, static_argnums=2)(p, jnp.asarray(x), jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert (np.abs(half.astype(jnp.float32) - near @ rounded) <= 0.03 * size).all()
    step = (
        0.5 / 127 if quantization != "fp8" else 2.0**-4
    )  # largest rounding error, relative to the largest number
    assert (np.abs(rounded - MATRIX) <= 1.01 * step * np.abs(MATRIX).max(axis=0)).all()


def test_fuse_qkv_by_hand():
    """Columns, biases and scales keep their order; layers without partners are unchanged."""
    one = {"kernel": jnp.array([[1.0], [2.0]]), "bias": jnp.array([10.0])}
    two = {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.array([20.0])}
    three = {"kernel": jnp.array([[5.0], [6.0]]), "bias": jnp.array([30.0])}
    block = {"attn": {"q": one, "k": two, "v": three, "out": one}, "cross": {"q": one, "k": two, "v": three}}
    got = fuse_qkv(block)
    assert set(got["attn"]) == {"q_k_v", "out"} and got["cross"] is block["cross"]
    np.testing.assert_array_equal(got["attn"]["q_k_v"]["kernel"], [[[1], [3], [5]], [[2], [4], [6]]])
    x = jnp.array([[1.0, 1.0]])
    for p in (block["attn"], got["attn"], transpose_kernels(got)["attn"]):
        np.testing.assert_array_equal(
            jnp.stack(fused_linear(p, ("q", "k", "v"), x, jnp.float32)), [[[13]], [[27]], [[41]]]
        )
    np.testing.assert_array_equal(fused_linear(got["cross"], ("q",), x, jnp.float32), [[[13]]])


@pytest.mark.parametrize("quantization", [None, *QUANTIZATIONS])
@pytest.mark.parametrize("name", ["llamagen", "dalle_mini", "malevich_v2"])
def test_the_layouts_of_all_platforms_give_the_same_logits(name, quantization, monkeypatch):
    """Logits after two codes with plain, transposed and tiled kernels; quantized kernels are not tiled."""
    monkeypatch.setattr(linear, "_TILE", 8)
    laid = {"tpu": "kernel", "gpu": "kernel_t", "cpu": "kernel" if quantization else "kernel_tiles"}
    cfg = FAMILIES[name]
    params = family_params(cfg)
    text, codes = family_batch(cfg, 2)
    found = []
    for platform, want in laid.items():
        ready = autoregressive.prepare_for_decode(cfg, params, quantization, platform=platform)
        kernels = {path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(ready["blocks"])[0]}
        assert want in kernels and not kernels & ({*laid.values()} - {want, "kernel"})
        _, cache = autoregressive.prefill(cfg, ready, text, codes[:, :1])
        found.append(autoregressive.decode_step(cfg, ready, cache, codes[:, 1], 1)[0])
    for got in found[1:]:
        np.testing.assert_allclose(got, found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (3, 2), (700, 1)])
def test_tiled_kernels_give_the_same_product(lead, dtype, tolerance):
    """Single and fused kernels, few rows and many; other widths and 8-bit kernels are not tiled."""
    alone, joined, x = (
        np.asarray(jnp.asarray(rng.normal(size=shape), dtype), np.float64)
        for shape in ((24, 192), (24, 3, 128), (*lead, 24))
    )
    p = {
        "up": {"kernel": jnp.asarray(alone, dtype)},
        "attn": {"q_k_v": {"kernel": jnp.asarray(joined, dtype)}},
    }
    tiled = tile_kernels(p)
    assert tiled["up"]["kernel_tiles"].shape == (3, 24, 64)
    assert tiled["attn"]["q_k_v"]["kernel_tiles"].shape == (3, 2, 24, 64)
    times = jax.jit(matmul, static_argnums=2)
    got = np.asarray(times(tiled["up"], jnp.asarray(x, dtype), dtype), np.float64)
    np.testing.assert_allclose(got, x @ alone, rtol=tolerance, atol=1e-4)
    got = np.asarray(times(tiled["attn"]["q_k_v"], jnp.asarray(x, dtype), dtype), np.float64)
    np.testing.assert_allclose(got, np.tensordot(x, joined, 1), rtol=tolerance, atol=1e-4)
    for kept in ({"kernel": MATRIX}, quantize_kernels(p["up"], "int8")):
        assert tile_kernels(kept) == kept


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("llamagen", "int8"),
        ("llamagen", "fp8"),
        ("dalle_mini", "int8"),
        ("dalle_mini", "w8a8"),
        ("mindalle", "w8a8"),
    ],
)
def test_quantization_changes_logits_little(name, quantization):
    """The logits of the first code differ from those in float32, and by little."""
    cfg = FAMILIES[name]
    params = family_params(cfg)
    text = family_batch(cfg, 2)[0]
    ready = autoregressive.prepare_for_decode(cfg, params, quantization)
    prefill = jax.jit(autoregressive.prefill, static_argnums=0)
    want, got = (prefill(cfg, p, text)[0] for p in (autoregressive.prepare_for_decode(cfg, params), ready))
    error = float(jnp.sqrt(jnp.mean((got - want) ** 2)) / jnp.std(want))
    assert 1e-5 < error < (0.2 if quantization == "fp8" else 0.1)


def test_quantized_sampling():
    """Speculative decoding samples the same codes as sequential decoding."""
    cfg = FAMILIES["mindalle"]
    ready = autoregressive.prepare_for_decode(cfg, family_params(cfg), "int8")
    text = family_batch(cfg, 1)[0]
    codes = generate(cfg, ready, text, row_keys([0]), temperature=0.5)
    assert codes.shape == (1, cfg.num_codes) and int(codes.max()) < cfg.image_vocab
    again = generate(cfg, ready, text, row_keys([0]), temperature=0.5, draft_len=16)
    np.testing.assert_array_equal(again, codes)


def test_quantized_kernels_have_a_quarter_of_the_bytes():
    cfg = dataclasses.replace(FAMILIES["malevich_v3"], dim=64)
    shapes = jax.eval_shape(lambda key: autoregressive.init(cfg, key), jax.random.key(0))

    def held(quantization):
        ready = jax.eval_shape(lambda p: autoregressive.prepare_for_decode(cfg, p, quantization), shapes)
        kernels = [
            x
            for path, x in jax.tree_util.tree_flatten_with_path((ready["blocks"], ready["image_head"]))[0]
            if path[-1].key.startswith("kernel")
        ]
        return sum(x.size * x.dtype.itemsize for x in kernels)

    whole = held(None)
    assert all(held(quantization) * 4 == whole for quantization in QUANTIZATIONS)


def test_invalid_quantization():
    cfg = FAMILIES["llamagen"]
    params = family_params(cfg)
    with pytest.raises(ValueError, match="Expected quantization to be one of int8, fp8, w8a8, got 'int4'"):
        autoregressive.prepare_for_decode(cfg, params, "int4")
    with pytest.raises(ValueError, match=r"got converted ones\. Quantize the originals"):
        autoregressive.prepare_for_decode(cfg, autoregressive.prepare_for_decode(cfg, params), "int8")
