"""Attention kernels, remat policies and the chunked loss equal the dense path: they change no number, only what is
stored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.config import DalleConfig, MeshConfig
from dalle_jax.models import dalle
from dalle_jax.nn import flash
from dalle_jax.nn.attention import dense_attention
from dalle_jax.nn.masks import attention_mask
from dalle_jax.parallel.mesh import make_mesh

KINDS = ("full", "row", "column", "conv")
TEXT, GRID = 5, 12  # 149 positions: two blocks of 128, the second mostly padding
MASKS = np.stack([attention_mask(kind, TEXT, GRID, 5) for kind in KINDS])


def qkv(rows=1, heads=1, width=8):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (rows, TEXT + GRID**2, heads, width)) for k in keys]


EPS = np.finfo(np.float32).eps


def output_and_gradients(attention_fn):
    """Attention output and gradients of queries, keys and values, all of the shape of `qkv()`."""
    weights = jax.random.normal(jax.random.key(1), qkv()[0].shape)

    def weighted_sum(x):
        y = attention_fn(*x)
        return (y * weights).sum(), y

    gradients, y = jax.jit(jax.grad(weighted_sum, has_aux=True))(tuple(qkv()))
    return y, *gradients


def assert_same_attention(got, want):
    """Each number to n * EPS of the largest of its array, n = 149 positions.

    Each is a sum over at most n positions. In any order its rounding is at most n * EPS / 2 times the sum of the
    absolute summands, which is of the size of the largest number: softmax weights of one query sum to 1.
    """
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=b.shape[1] * EPS * np.abs(b).max())


@pytest.mark.parametrize("number", range(4), ids=KINDS)
def test_splash_equals_dense_attention(number):
    """Output and the gradients of queries, keys and values; the kernel is interpreted on a CPU."""
    got = output_and_gradients(lambda q, k, v: flash.splash_attention(q, k, v, MASKS[number : number + 1], 0))
    want = output_and_gradients(lambda q, k, v: dense_attention(q, k, v, jnp.asarray(MASKS[number])))
    assert_same_attention(got, want)


def test_one_wrong_pair_of_the_mask_exceeds_the_attention_bounds():
    """In the output and in each gradient on its own."""
    wrong = MASKS[0].copy()
    wrong[100, 50] = False
    got = output_and_gradients(lambda q, k, v: flash.splash_attention(q, k, v, wrong[None], 0))
    want = output_and_gradients(lambda q, k, v: dense_attention(q, k, v, jnp.asarray(MASKS[0])))
    for pair in zip(got, want, strict=True):
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            assert_same_attention(*([x] for x in pair))


MODEL = DalleConfig(
    text_vocab=20, text_len=6, image_vocab=37, grid=4, dim=16, layers=3, heads=2, mlp_ratio=2, conv_kernel=3,
    attention=("row", "column"), dtype="float32", cond_drop_prob=0.0, loss_vocab_chunk=0, attention_kernel="dense",
    remat="none",
)  # fmt: skip


ROWS = 4


def loss_and_gradients(cfg, mesh=None):
    params = jax.tree.map(lambda a: 8 * a, dalle.init(MODEL, jax.random.key(0)))
    text = jax.random.randint(jax.random.key(1), (ROWS, MODEL.text_len), 0, MODEL.text_vocab)
    codes = jax.random.randint(jax.random.key(2), (ROWS, MODEL.num_codes), 0, MODEL.image_vocab)
    run = jax.jit(jax.value_and_grad(lambda p: dalle.loss(cfg, p, text, codes, jax.random.key(3))[0]))
    if mesh is None:
        return jax.device_get(run(params))
    with jax.set_mesh(mesh):
        return jax.device_get(run(params))


@pytest.fixture(scope="module")
def plain():
    return loss_and_gradients(MODEL)


def assert_same(got, want, rtol=2e-5):
    """The loss to 1e-6 of it, gradients to `rtol` of the largest of their array: sums run in another order.

    A gradient may cancel: that of a key bias is zero, as softmax ignores a constant added to all scores. Its rounding
    is still that of its summands, hence n * EPS * m on top. Each gradient is a sum over n = rows * length tokens; in
    any order its rounding is at most n * EPS / 2 times the sum of the absolute summands c. m, the largest gradient in
    the same dict, bounds that sum: the kernel beside a bias sums x * c, where x has left a norm of scale 8, so m is
    about 8 * sqrt(sum(c**2)), and sum(|c|) / 2 <= sqrt(n) / 2 * sqrt(sum(c**2)) = 0.6 * m for n = 88.
    """
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    leaves = jax.tree_util.tree_flatten_with_path(want[1])[0]
    largest = {}
    for path, b in leaves:
        largest[path[:-1]] = max(largest.get(path[:-1], 0), np.abs(b).max())
    for (path, b), a in zip(leaves, jax.tree.leaves(got[1]), strict=True):
        near = rtol * np.abs(b).max() + ROWS * MODEL.seq_len * EPS * largest[path[:-1]]
        np.testing.assert_allclose(a, b, rtol=0, atol=near, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("remat", ["full", "mlp", "save_attention", "dots"])
def test_remat_equals_no_remat(plain, remat):
    assert_same(loss_and_gradients(dataclasses.replace(MODEL, remat=remat)), plain)


@pytest.mark.parametrize("remat", ["mlp", pytest.param("full", marks=pytest.mark.slow)])
def test_splash_in_the_model_over_a_mesh(plain, remat):
    """Three kinds in a switch inside the scan, rows over 2 x 2 devices, heads over 2."""
    cfg = dataclasses.replace(MODEL, attention_kernel="splash", remat=remat)
    assert_same(loss_and_gradients(cfg, make_mesh(MeshConfig(data=2, fsdp=2, model=2))), plain, 1e-4)


def test_a_wrong_mask_or_gradient_exceeds_the_bounds(plain):
    """At the wider tolerance of gradients: a window of 5 for 3 in the last layer, and a key bias off by 1e-3."""
    _, wrong = loss_and_gradients(dataclasses.replace(MODEL, conv_kernel=5))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same((plain[0], wrong), plain, 1e-4)
    wrong = jax.tree.map(np.copy, plain[1])
    wrong["blocks"]["attn"]["k"]["bias"][1, 3] += 1e-3
    with pytest.raises(AssertionError, match=r"'k'.*'bias'"):
        assert_same((plain[0], wrong), plain, 1e-4)


def residual_sizes(cfg):
    """Sizes per layer of what the backward pass keeps of the blocks."""
    shapes = jax.eval_shape(lambda: dalle.init(cfg, jax.random.key(0)))
    text, codes = jnp.zeros((4, cfg.text_len), jnp.int32), jnp.zeros((4, cfg.num_codes), jnp.int32)

    def value(params):
        return dalle.loss(cfg, params, text, codes, jax.random.key(0))[0]

    found = jax.eval_shape(lambda p: jax.vjp(value, p)[1], shapes)
    sizes = {leaf.size for leaf in jax.tree.leaves(shapes)}
    stacked = [leaf for leaf in jax.tree.leaves(found) if leaf.shape[:1] == (cfg.layers,) and leaf.ndim > 3]
    return sorted(leaf.size // cfg.layers for leaf in stacked if leaf.size not in sizes)


def test_residuals_of_each_remat_policy():
    """In units of the residual stream: the input of a layer; for `mlp` also queries, keys, values, output of attention,
    and the
    stream after it."""
    unit = 4 * MODEL.seq_len * MODEL.dim
    assert residual_sizes(dataclasses.replace(MODEL, remat="full")) == [unit]
    assert residual_sizes(dataclasses.replace(MODEL, remat="save_attention")) == [unit] * 2
    assert residual_sizes(dataclasses.replace(MODEL, remat="mlp")) == [unit] * 6


@pytest.mark.parametrize("chunk", [1, 10, 36])
def test_chunked_loss_equals_the_loss(plain, chunk):
    """26 text ids and 37 codes, which chunks do not divide."""
    assert_same(loss_and_gradients(dataclasses.replace(MODEL, loss_vocab_chunk=chunk)), plain)


# --- kernel selection ------------------------------------------------------------------------------------


def test_select_kernel(monkeypatch):
    sparse = ("row", "conv")
    assert flash.select_kernel("auto", sparse, 1280, "bfloat16") == "dense"  # this is a CPU
    assert flash.select_kernel("splash", sparse, 1280, "bfloat16") == "splash"
    monkeypatch.setattr(flash, "mesh_platform", lambda: "tpu")
    assert flash.select_kernel("auto", sparse, 1280, "bfloat16") == "splash"
    assert flash.select_kernel("auto", sparse, 20, "bfloat16") == "dense"
    monkeypatch.setattr(flash, "mesh_platform", lambda: "gpu")
    assert flash.select_kernel("auto", sparse, 1280, "bfloat16") == "dense"
    assert flash.select_kernel("auto", ("full",), 1280, "float32") == "dense"
    assert flash.select_kernel("auto", ("full", "full"), 1280, "bfloat16") == "cudnn"


def test_cudnn_rejects_unsupported_models():
    assert flash.select_kernel("cudnn", ("row", "conv", "row"), 1280, "bfloat16") == "cudnn"
    with pytest.raises(
        ValueError,
        match="Expected an even number of positions for attention_kernel cudnn with conv, row layers, got 1281",
    ):
        flash.select_kernel("cudnn", ("row", "conv", "row"), 1281, "bfloat16")
    with pytest.raises(ValueError, match="Expected dtype bfloat16 for attention_kernel cudnn, got float32"):
        flash.select_kernel("cudnn", ("full",), 1280, "float32")


@pytest.mark.parametrize("kinds", [("full",), ("row", "conv")])
def test_cudnn_has_the_mask_of_each_layer(kinds, monkeypatch):
    """With the library's XLA implementation instead of cuDNN's, logits equal the dense ones."""
    library = jax.nn.dot_product_attention
    calls = []

    def use_xla(*x, implementation, **options):
        calls.append((implementation, options["is_causal"]))
        return library(*x, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", use_xla)
    cfg = DalleConfig(
        text_vocab=9, text_len=4, image_vocab=7, grid=4, dim=16, layers=2, heads=2, conv_kernel=3,
        attention=kinds, last_attention=None,
    )  # fmt: skip
    params = dalle.init(cfg, jax.random.key(0))
    text, codes = (
        jnp.zeros((2, 4), jnp.int32),
        jnp.arange(32, dtype=jnp.int32).reshape(2, 16) % cfg.image_vocab,
    )
    want = dalle.logits(cfg, params, text, codes)[1]
    got = dalle.logits(dataclasses.replace(cfg, attention_kernel="cudnn"), params, text, codes)[1]
    np.testing.assert_allclose(got, want, rtol=0, atol=0.02 * np.abs(want).max())
    assert set(calls) == {("cudnn", kinds == ("full",))}


def test_full_mask_is_causal():
    """So cuDNN computes full layers without a mask."""
    np.testing.assert_array_equal(attention_mask("full", 3, 2), np.tril(np.ones((7, 7), bool)))


def test_blocks_by_hand():
    """384 positions are three blocks a side: causal, 6 of 9 blocks; a diagonal band, 5 of 9."""
    near = np.tril(np.ones((384, 384), bool))
    assert flash.block_density(near) == pytest.approx(6 / 9)
    near &= np.arange(384)[:, None] - np.arange(384)[None] <= 1
    assert flash.block_density(near) == pytest.approx(5 / 9)
    assert (
        flash.padded_length(1280) == 1280
        and flash.padded_length(1279) == 1280
        and flash.padded_length(129) == 256
    )
    assert (flash.block_size(1280), flash.block_size(384), flash.block_size(20)) == (256, 128, 128)
