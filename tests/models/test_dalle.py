"""Tests of the DALL-E Transformer: attention masks, loss weights, and equal results of equivalent computations.

The reference below is NumPy in float64, a loop over layers, written from the paper's description.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params

from dalle_jax.config import DalleConfig
from dalle_jax.models import autoregressive, dalle
from dalle_jax.models.dalle import embedding
from dalle_jax.nn.attention import Block
from dalle_jax.parallel.sharding import path_name
from dalle_jax.text import tokenizers as text

KINDS = ("full", "row", "column", "conv")
TINY = DalleConfig(
    text_vocab=6, text_len=3, image_vocab=7, grid=3, dim=16, layers=4, heads=2, mlp_ratio=2, attention=KINDS,
    last_attention=None, conv_kernel=3, cond_drop_prob=0.0, dtype="float32", remat="none",
)  # fmt: skip
T, N = TINY.text_len, TINY.num_codes


def random_rows(cfg, batch, seed=0):
    """Return random captions with padding at their ends, int32 (B, T), and codes, int32 (B, N)."""
    rng = np.random.default_rng(seed)
    pieces = rng.integers(0, cfg.text_vocab, (batch, cfg.text_len))
    length = rng.integers(1, cfg.text_len + 1, (batch, 1))
    position = np.arange(cfg.text_len)[None]
    caption = np.where(position < length, pieces, cfg.text_vocab + position)
    codes = rng.integers(0, cfg.image_vocab, (batch, cfg.num_codes))
    return jnp.asarray(caption, jnp.int32), jnp.asarray(codes, jnp.int32)


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


@pytest.fixture(scope="module")
def fresh():
    return jax.jit(dalle.init, static_argnums=0)(TINY, jax.random.key(0))


BATCH = T + N + 1  # of every call of `logits`, which compiles once for all tests


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, params, text_BT, codes_BN):
    return dalle.logits(cfg, params, text_BT, codes_BN)


# --- against the reference -------------------------------------------------------------------------------


def layer_norm(x, p):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p["scale"] + p["bias"]


def gelu(x):  # tanh approximation
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attends(kind, q, k, cfg):
    """Return whether stream position q attends to position k: the paper's masks, the convolution's of size 3."""
    if k > q:
        return False
    if k < cfg.text_len:
        return True
    q, k, side = q - cfg.text_len, k - cfg.text_len, cfg.grid
    return {
        "full": True,
        "row": q - k <= side,
        "column": (q - k) % side == 0,
        "conv": q - k in (0, 1, side - 1, side, side + 1),
    }[kind]


def reference(cfg, params, caption, codes):
    """Compute text and image logits of one row."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    stream = [p["text_embed"][w] + p["text_pos"][i] for i, w in enumerate(caption)]
    for i, code in enumerate(codes):
        row, column = divmod(i, cfg.grid)
        stream.append(p["image_embed"][code] + p["image_row"][row] + p["image_col"][column])
    x = np.stack(stream)
    size = cfg.dim // cfg.heads
    for number, kind in enumerate(cfg.layer_kinds):
        b = jax.tree.map(lambda a, i=number: a[i], p["blocks"])
        y = layer_norm(x, b["norm_attn"])
        out = np.zeros_like(x)
        for h in range(cfg.heads):
            head = slice(h * size, (h + 1) * size)
            q, k, v = (y @ b["attn"][n]["kernel"][:, head] + b["attn"][n]["bias"][head] for n in "qkv")
            if cfg.qk_norm:
                q = q / np.sqrt((q**2).mean(-1, keepdims=True) + 1e-6) * b["attn"]["q_scale"]
                k = k / np.sqrt((k**2).mean(-1, keepdims=True) + 1e-6) * b["attn"]["k_scale"]
            for t in range(len(x)):
                keys = [s for s in range(len(x)) if attends(kind, t, s, cfg)]
                weights = np.exp([q[t] @ k[s] / math.sqrt(size) for s in keys])
                mixed = sum(w * v[s] for w, s in zip(weights / weights.sum(), keys, strict=True))
                out[t] += mixed @ b["attn"]["out"]["kernel"][head]
        x = x + out + b["attn"]["out"]["bias"]
        y = layer_norm(x, b["norm_mlp"])
        y = gelu(y @ b["mlp"]["up"]["kernel"] + b["mlp"]["up"]["bias"])
        x = x + y @ b["mlp"]["down"]["kernel"] + b["mlp"]["down"]["bias"]
    x = layer_norm(x, p["norm_out"])
    text, image = x[: cfg.text_len - 1], x[cfg.text_len - 1 : -1]  # position i predicts token i + 1
    return text @ p["text_head"]["kernel"], image @ p["image_head"]["kernel"]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_logits_equal_the_reference(qk_norm):
    cfg = dataclasses.replace(TINY, qk_norm=qk_norm)
    params = random_params(cfg)
    caption, codes = random_rows(cfg, BATCH)
    got_text, got_image = logits(cfg, params, caption, codes)
    assert got_text.shape == (BATCH, T - 1, 6 + T) and got_image.shape == (BATCH, N, 7)
    assert got_text.dtype == got_image.dtype == jnp.float32
    for b in range(2):
        want_text, want_image = reference(cfg, params, np.asarray(caption[b]), np.asarray(codes[b]))
        assert want_image.std() > 0.3
        np.testing.assert_allclose(got_text[b], want_text, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got_image[b], want_image, rtol=1e-4, atol=1e-4)


# --- dependence between positions ------------------------------------------------------------------------


def dependence(cfg, params, function):
    """Return bool (S, S): changing the token of position k (second axis) changes row q of `function(text, codes)`."""
    caption, codes = random_rows(cfg, 1)
    stream = np.concatenate([caption, codes], axis=1)
    size = np.array([cfg.text_vocab] * cfg.text_len + [cfg.image_vocab] * cfg.num_codes)
    other = np.repeat(stream, cfg.seq_len + 1, axis=0)
    for k in range(cfg.seq_len):
        other[k + 1, k] = (other[k + 1, k] + 1) % size[k]
    out = function(cfg, params, jnp.asarray(other[:, : cfg.text_len]), jnp.asarray(other[:, cfg.text_len :]))
    out = np.asarray(out)
    return (out[1:] != out[:1]).any(axis=-1).T


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_depends_on_its_mask(kind):
    """Position q depends on every position that its mask allows, and on no other."""
    cfg = dataclasses.replace(TINY, layers=1, attention=(kind,))
    got = dependence(cfg, random_params(cfg), jax.jit(dalle.hidden_states, static_argnums=0))
    want = [[attends(kind, q, k, cfg) for k in range(cfg.seq_len)] for q in range(cfg.seq_len)]
    np.testing.assert_array_equal(got, want)


def test_no_future_leak(params):
    """The logits of token t, computed at position t - 1, depend on tokens before t only, and through all layers on
    each of them that the masks connect to it."""

    def all_logits(cfg, params, text_BT, codes_BN):
        both = logits(cfg, params, text_BT, codes_BN)
        return jnp.concatenate([jnp.pad(x, ((0, 0), (0, 0), (0, 16 - x.shape[-1]))) for x in both], axis=1)

    got = dependence(TINY, params, all_logits)  # [i, k]: logits of token i + 1, changed token k
    assert got.shape == (T + N - 1, T + N)
    reach = np.eye(T + N, dtype=bool)  # dependence through all layers
    for kind in TINY.layer_kinds:
        reach = np.array([[attends(kind, q, k, TINY) for k in range(T + N)] for q in range(T + N)]) @ reach
    assert not np.triu(got, k=1).any()
    np.testing.assert_array_equal(got, reach[:-1])


# --- equivalent computations -----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grad(cfg, params, text_BT, codes_BN, key):
    return jax.value_and_grad(lambda p: dalle.loss(cfg, p, text_BT, codes_BN, key), has_aux=True)(params)


def assert_close(a, b, **tolerance):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), **tolerance)


@pytest.fixture(scope="module")
def plain(params):
    return loss_and_grad(TINY, params, *random_rows(TINY, 4), jax.random.key(0))


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing(params, plain, remat):
    cfg = dataclasses.replace(TINY, remat=remat)
    got = loss_and_grad(cfg, params, *random_rows(TINY, 4), jax.random.key(0))
    assert_close(got, plain, rtol=1e-5, atol=1e-6)


def test_unrolling_changes_nothing(params):
    caption, codes = random_rows(TINY, BATCH)
    got = logits(dataclasses.replace(TINY, scan_unroll=3), params, caption, codes)
    assert_close(got, logits(TINY, params, caption, codes), rtol=1e-5, atol=1e-5)


def test_remat_changes_the_program(params):
    """Otherwise the test above would hold for an option without effect."""
    caption, codes = random_rows(TINY, 4)

    def program(remat):
        cfg = dataclasses.replace(TINY, remat=remat)
        return str(jax.make_jaxpr(lambda p: dalle.logits(cfg, p, caption, codes))(params))

    assert "policy=" not in program("none")
    assert "policy=None" in program("full")
    assert "policy=" in program("dots") and "policy=None" not in program("dots")


def test_scan_equals_a_loop_over_the_layers(params):
    caption, codes = random_rows(TINY, BATCH)

    @jax.jit
    def embed(params):
        x = embedding.embed_text(TINY, params, caption)[0]
        return jnp.concatenate(
            [x, embedding.embed_codes(TINY, params, codes[:, :-1], jnp.arange(N - 1))], axis=1
        )

    @jax.jit
    def head(params, x):
        return embedding.apply_head(
            TINY, params, "image_head", embedding.final_norm(TINY, params, x[:, T - 1 :])
        )

    x = embed(params)
    layers = jax.jit(autoregressive.prepare_for_decode, static_argnums=0)(TINY, params)["blocks"]
    assert len(layers) == TINY.layers
    block = Block(TINY.heads, TINY.mlp_dim, TINY.qk_norm, 0.0, jnp.float32)
    apply = jax.jit(lambda layer, x, mask: block.apply({"params": layer}, x, mask)[0])
    size = x.shape[1]
    for kind, layer in zip(TINY.layer_kinds, layers, strict=True):
        mask = [[attends(kind, q, k, TINY) for k in range(size)] for q in range(size)]
        x = apply(layer, x, jnp.asarray(mask))
    x = head(params, x)
    np.testing.assert_allclose(x, logits(TINY, params, caption, codes)[1], rtol=1e-5, atol=1e-5)


# Softmax cancels a term shared by all keys: without qk_norm its gradient is zero up to rounding.
SHARED_BY_ALL_KEYS = "blocks/attn/k/bias"


def test_bfloat16_is_close_to_float32(params, plain):
    cfg = dataclasses.replace(TINY, dtype="bfloat16")
    caption, codes = random_rows(TINY, BATCH)
    got, want = logits(cfg, params, caption, codes), logits(TINY, params, caption, codes)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.float32
        error = np.sqrt(np.mean((a - b) ** 2)) / np.std(b)
        assert 1e-4 < error < 0.03  # 8 bits of mantissa; a smaller error would mean that the dtype is unused
    (value, _), grads = loss_and_grad(cfg, params, *random_rows(TINY, 4), jax.random.key(0))
    (want_value, _), want_grads = plain
    assert abs(value - want_value) < 0.02
    scale = np.linalg.norm(want_grads["blocks"]["attn"]["q"]["bias"])
    wanted = jax.tree.leaves(want_grads)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(grads)[0], wanted, strict=True):
        assert a.dtype == jnp.float32
        is_zero = path_name(path) == SHARED_BY_ALL_KEYS
        assert np.linalg.norm(a - b) < 0.1 * (scale if is_zero else np.linalg.norm(b)), path_name(path)


def test_every_parameter_has_a_gradient(plain):
    """Gradients are finite and not all zero; those of the tables are nonzero exactly in the rows of the batch."""
    _, grads = plain
    for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
        name, largest = path_name(path), np.abs(grad).max()
        assert np.isfinite(grad).all(), name
        assert largest < 1e-6 if name == SHARED_BY_ALL_KEYS else largest > 1e-6, name
    caption, codes = (np.asarray(ids) for ids in random_rows(TINY, 4))
    present = np.isin(np.arange(len(grads["text_embed"])), caption)
    assert 0 < present.sum() < len(present)
    np.testing.assert_array_equal(np.abs(grads["text_embed"]).max(axis=1) > 0, present)
    fed = np.isin(np.arange(TINY.image_vocab), codes[:, :-1])  # the last code is never an input
    np.testing.assert_array_equal(np.abs(grads["image_embed"]).max(axis=1) > 0, fed)


# --- the loss --------------------------------------------------------------------------------------------


def cross_entropy(logits, ids):
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.mean([log_p[b, t, ids[b, t]] for b in range(ids.shape[0]) for t in range(ids.shape[1])])


def test_loss_by_hand(params, plain):
    (total, metrics), _ = plain
    caption, codes = random_rows(TINY, 4)
    padded = [jnp.pad(x, ((0, BATCH - 4), (0, 0))) for x in (caption, codes)]
    text_logits, image_logits = (x[:4] for x in logits(TINY, params, *padded))
    want_text = cross_entropy(text_logits, np.asarray(caption)[:, 1:])
    want_image = cross_entropy(image_logits, np.asarray(codes))
    assert abs(want_text - want_image) > 0.05  # otherwise swapped weights would pass
    np.testing.assert_allclose(metrics["text_loss"], want_text, rtol=1e-5)
    np.testing.assert_allclose(metrics["image_loss"], want_image, rtol=1e-5)
    np.testing.assert_allclose(total, want_text / 8 + want_image * 7 / 8, rtol=1e-5)


def test_initial_loss_is_that_of_a_uniform_guess(fresh):
    """With small random weights it is the logarithm of the number of ids."""
    (_, metrics), _ = loss_and_grad(TINY, fresh, *random_rows(TINY, 4), jax.random.key(0))
    assert abs(metrics["text_loss"] - math.log(6 + T)) < 0.05
    assert abs(metrics["image_loss"] - math.log(7)) < 0.05


def test_a_text_of_one_token_has_no_text_loss():
    cfg = dataclasses.replace(TINY, text_len=1, layers=1)
    total, metrics = jax.jit(dalle.loss, static_argnums=0)(
        cfg, random_params(cfg), *random_rows(cfg, 2), jax.random.key(0)
    )
    assert metrics["text_loss"] == 0
    np.testing.assert_allclose(total, metrics["image_loss"] * 7 / 8, rtol=1e-6)


def test_cond_drop_prob(params):
    """0 keeps every caption, 1 drops all, and 0.3 drops that fraction of the rows, each independently."""
    caption, codes = random_rows(TINY, 2)
    keys = jax.random.split(jax.random.key(5), 300)
    null = jnp.broadcast_to(dalle.null_text(TINY), caption.shape)
    # (row 0 is null, row 1 is null) -> the loss of the batch with these captions
    nulled = {(i, j): jnp.where(jnp.array([[i], [j]], bool), null, caption) for i in (0, 1) for j in (0, 1)}

    @functools.partial(jax.jit, static_argnums=0)
    def losses(rate, text_BT):
        cfg = dataclasses.replace(TINY, cond_drop_prob=rate)
        return jax.vmap(lambda key: dalle.loss(cfg, params, text_BT, codes, key)[0])(keys)

    want = {pair: float(losses(0.0, text_BT)[0]) for pair, text_BT in nulled.items()}
    assert min(abs(a - b) for p, a in want.items() for q, b in want.items() if p < q) > 1e-3
    got = {}
    for rate in (0.0, 0.3, 1.0):
        out = np.asarray(losses(rate, caption))
        near = [min(want, key=lambda p, v=v: abs(want[p] - v)) for v in out]
        np.testing.assert_allclose(out, [want[p] for p in near], rtol=1e-5)
        got[rate] = np.array(near)
    assert (got[0.0] == 0).all() and (got[1.0] == 1).all()
    assert (abs(got[0.3].mean(axis=0) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 300)).all()
    assert abs(np.corrcoef(got[0.3].T)[0, 1]) < 4 / math.sqrt(300)


def test_row_order_does_not_matter(params, plain):
    caption, codes = random_rows(TINY, 4)
    order = jnp.array([2, 0, 3, 1])
    got = loss_and_grad(TINY, params, caption[order], codes[order], jax.random.key(0))
    assert_close(got, plain, rtol=1e-5, atol=1e-6)


def test_rows_are_independent(params):
    caption, codes = random_rows(TINY, BATCH)
    whole = logits(TINY, params, caption, codes)
    changed = logits(TINY, params, caption.at[1:].set(0), codes.at[1:].set(0))
    for a, b in zip(whole, changed, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        assert not np.array_equal(a[1], b[1])


def test_each_position_has_its_own_pad_token(fresh):
    null = np.asarray(dalle.null_text(TINY))
    np.testing.assert_array_equal(null, [6, 7, 8])
    np.testing.assert_array_equal(null, text.null_caption(TINY.text_vocab, TINY.text_len))
    assert fresh["text_embed"].shape == (6 + 3, 16)
    pads = np.asarray(fresh["text_embed"])[null]
    assert np.linalg.norm(pads[:, None] - pads[None], axis=-1)[~np.eye(3, dtype=bool)].min() > 0.02


def test_init(fresh):
    """Kernels and tables are normal with std 0.02, those that write into the residual stream scaled by its depth, and
    no two share a random key."""
    blocks = fresh["blocks"]
    assert {name: blocks["attn"][name]["kernel"].shape for name in ("q", "k", "v", "out")} == dict.fromkeys(
        ("q", "k", "v", "out"), (4, 16, 16)
    )
    random = {
        "text_embed": 0.02, "text_pos": 0.02, "image_embed": 0.02, "image_row": 0.02, "image_col": 0.02,
        "text_head/kernel": 0.02, "image_head/kernel": 0.02, "blocks/attn/q/kernel": 0.02,
        "blocks/attn/k/kernel": 0.02, "blocks/attn/v/kernel": 0.02,
        "blocks/mlp/up/kernel": 0.02, "blocks/attn/out/kernel": 0.02 / math.sqrt(8),
        "blocks/mlp/down/kernel": 0.02 / math.sqrt(8),
    }  # fmt: skip
    kernels = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(fresh)[0]:
        name, leaf = path_name(path), np.asarray(leaf)
        if name in random:
            assert abs(leaf.std() / random[name] - 1) < 4 / math.sqrt(2 * leaf.size), name
            kernels[name] = leaf
        else:
            assert (leaf == (1.0 if name.endswith("scale") else 0.0)).all(), name
    assert kernels.keys() == random.keys()
    units = np.concatenate([leaf.ravel() / random[name] for name, leaf in kernels.items()])
    assert len(np.unique(units)) > 0.99 * len(units)  # no two tables or layers share a key


# --- invalid input ---------------------------------------------------------------------------------------

GOOD_TEXT, GOOD_CODES = jnp.zeros((2, T), jnp.int32), jnp.zeros((2, N), jnp.int32)


@pytest.mark.parametrize(
    ("caption", "codes", "match"),
    [
        (GOOD_TEXT[:, :2], GOOD_CODES, r"Expected text of shape \(batch, 3\), got \(2, 2\). Pad or truncate"),
        (GOOD_TEXT[0], GOOD_CODES, r"Expected text of shape .*, got \(3,\)"),
        (GOOD_TEXT, GOOD_CODES[:1], r"Expected codes of shape \(2, 9\).*, got \(1, 9\)"),
        (GOOD_TEXT, GOOD_CODES[:, 1:], r"codes of shape \(2, 9\), got \(2, 8\)"),  # not a shorter image
        (GOOD_TEXT, jnp.zeros((2, N + 1), jnp.int32), r"Expected codes of shape \(2, 9\).*, got \(2, 10\)"),
        (GOOD_TEXT, GOOD_CODES[0], r"Expected codes of shape \(2, 9\).*, got \(9,\)"),
        (GOOD_TEXT * 1.0, GOOD_CODES, "Expected text of int32 ids, got float32"),
        (GOOD_TEXT, GOOD_CODES * 1.0, "Expected codes of int32 ids, got float32"),
        ([[0] * T] * 2, GOOD_CODES, "Expected text to be an array of int32 ids, got a list"),
        (GOOD_TEXT - 1, GOOD_CODES, r"Expected text in \[0, 9\), .* got ids from -1 to -1"),
        (GOOD_TEXT + 9, GOOD_CODES, r"Expected text in \[0, 9\), .* got ids from 9 to 9"),
        (GOOD_TEXT, GOOD_CODES.at[0, 0].set(7),
        r"Expected codes in \[0, 7\), which is image_vocab, got ids from 0 to 7"),
    ],
)  # fmt: skip
def test_invalid_arrays_raise(params, caption, codes, match):
    with pytest.raises(ValueError, match=match):
        dalle.logits(TINY, params, caption, codes)
    with pytest.raises(ValueError, match=match):
        dalle.loss(TINY, params, caption, codes, jax.random.key(0))


def test_another_number_of_layers_raises(params):
    deeper = dataclasses.replace(TINY, layers=5)
    for other in (params, autoregressive.prepare_for_decode(TINY, params)):
        with pytest.raises(ValueError, match=r"parameters of 5 layers \(cfg\.layers\), got 4"):
            autoregressive.prepare_for_decode(deeper, other)


def test_hidden_takes_at_most_all_codes(params):
    with pytest.raises(ValueError, match=r"Expected codes of shape \(2, 9\) or fewer columns, got \(2, 10\)"):
        dalle.hidden_states(TINY, params, GOOD_TEXT, jnp.zeros((2, N + 1), jnp.int32))


def test_prefill_of_all_codes_raises(params):
    with pytest.raises(ValueError, match=r"fewer than 9 codes, got 9\. Use a shorter prefix"):
        dalle.prefill(TINY, autoregressive.prepare_for_decode(TINY, params), GOOD_TEXT, GOOD_CODES)
