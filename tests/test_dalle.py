"""Laws of the Transformer: what each position sees, what the loss weighs, and that how it is computed does
not matter. The reference below is NumPy in float64, a loop over layers, written from the paper's description.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import dalle, text
from dalle_jax.config import DalleConfig
from dalle_jax.nn.attention import Block

KINDS = ("full", "row", "column", "conv")
TINY = DalleConfig(
    text_vocab=6, text_len=3, image_vocab=7, grid=3, dim=16, layers=4, heads=2, mlp_ratio=2, attention=KINDS,
    last_attention=None, conv_kernel=3, null_rate=0.0, dtype="float32", remat="none",
)  # fmt: skip
T, N = TINY.text_len, TINY.num_codes


@functools.partial(jax.jit, static_argnums=(0, 1))
def lively(cfg, seed=0):
    """Parameters large enough that every one of them matters to the result, biases and gains too."""
    params = dalle.init(cfg, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [a + 0.25 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def rows(cfg, batch, seed=0):
    """Captions (with padding at their ends) and codes."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, cfg.text_vocab, (batch, cfg.text_len))
    used = rng.integers(1, cfg.text_len + 1, (batch, 1))
    place = np.arange(cfg.text_len)[None]
    caption = np.where(place < used, words, cfg.text_vocab + place)
    codes = rng.integers(0, cfg.image_vocab, (batch, cfg.num_codes))
    return jnp.asarray(caption, jnp.int32), jnp.asarray(codes, jnp.int32)


@pytest.fixture(scope="module")
def params():
    return lively(TINY)


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, params, text_BT, codes_BN):
    return dalle.logits(cfg, params, text_BT, codes_BN)


# --- against the reference -------------------------------------------------------------------------------


def layer_norm(x, p):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p["scale"] + p["bias"]


def gelu(x):  # the tanh form
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def may_see(kind, q, k, cfg):
    """Position q of the stream sees position k: the paper's masks for a window of 3, one case at a time."""
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
    """Text and image logits of one row."""
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
            q, k, v = (
                y @ b["attn"]["qkv"]["kernel"][:, i, h] + b["attn"]["qkv"]["bias"][i, h] for i in range(3)
            )
            if cfg.qk_norm:
                q = q / np.sqrt((q**2).mean(-1, keepdims=True) + 1e-6) * b["attn"]["q_scale"]
                k = k / np.sqrt((k**2).mean(-1, keepdims=True) + 1e-6) * b["attn"]["k_scale"]
            for t in range(len(x)):
                seen = [s for s in range(len(x)) if may_see(kind, t, s, cfg)]
                weights = np.exp([q[t] @ k[s] / math.sqrt(size) for s in seen])
                mixed = sum(w * v[s] for w, s in zip(weights / weights.sum(), seen, strict=True))
                out[t] += mixed @ b["attn"]["out"]["kernel"][h]
        x = x + out + b["attn"]["out"]["bias"]
        y = layer_norm(x, b["norm_mlp"])
        y = gelu(y @ b["mlp"]["up"]["kernel"] + b["mlp"]["up"]["bias"])
        x = x + y @ b["mlp"]["down"]["kernel"] + b["mlp"]["down"]["bias"]
    x = layer_norm(x, p["norm_out"])
    # position i predicts token i + 1
    return x[: cfg.text_len - 1] @ p["text_head"]["kernel"], x[cfg.text_len - 1 : -1] @ p["image_head"]["kernel"]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_logits_equal_the_reference(qk_norm):
    cfg = dataclasses.replace(TINY, qk_norm=qk_norm)
    params = lively(cfg)
    caption, codes = rows(cfg, 2)
    got_text, got_image = logits(cfg, params, caption, codes)
    assert got_text.shape == (2, T - 1, 6 + T) and got_image.shape == (2, N, 7)
    assert got_text.dtype == got_image.dtype == jnp.float32
    for b in range(2):
        want_text, want_image = reference(cfg, params, np.asarray(caption[b]), np.asarray(codes[b]))
        assert want_image.std() > 0.3
        np.testing.assert_allclose(got_text[b], want_text, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got_image[b], want_image, rtol=1e-4, atol=1e-4)


# --- who sees whom ---------------------------------------------------------------------------------------


def moved(cfg, params, what):
    """bool (S, S): does changing the token of position k (second axis) move row q of `what(text, codes)`?"""
    caption, codes = rows(cfg, 1)
    stream = np.concatenate([caption, codes], axis=1)
    size = np.array([cfg.text_vocab] * cfg.text_len + [cfg.image_vocab] * cfg.num_codes)
    other = np.repeat(stream, cfg.length + 1, axis=0)
    for k in range(cfg.length):
        other[k + 1, k] = (other[k + 1, k] + 1) % size[k]
    out = what(cfg, params, jnp.asarray(other[:, : cfg.text_len]), jnp.asarray(other[:, cfg.text_len :]))
    out = np.asarray(out)
    return (out[1:] != out[:1]).any(axis=-1).T


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_sees_what_its_mask_says(kind):
    """Exactly: nothing else moves position q, and everything that it may see does."""
    cfg = dataclasses.replace(TINY, layers=1, attention=(kind,))
    got = moved(cfg, lively(cfg), jax.jit(dalle.hidden, static_argnums=0))
    want = [[may_see(kind, q, k, cfg) for k in range(cfg.length)] for q in range(cfg.length)]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_no_future_leak(kind):
    """Scores of token t, read at position t - 1, follow from tokens before t alone, and, through the layers, of
    all those that the kind can carry there: with full attention of each one."""
    cfg = TINY if kind == "mixed" else dataclasses.replace(TINY, attention=(kind,))
    params = lively(cfg)

    def scores(cfg, params, text_BT, codes_BN):
        both = [jnp.pad(x, ((0, 0), (0, 0), (0, 16 - x.shape[-1]))) for x in logits(cfg, params, text_BT, codes_BN)]
        return jnp.concatenate(both, axis=1)

    got = moved(cfg, params, scores)  # [i, k]: scores of token i + 1, changed token k
    assert got.shape == (T + N - 1, T + N)
    reach = np.eye(cfg.length, dtype=bool)  # who hears of whom, over all layers
    for layer in cfg.layer_kinds:
        step = np.array([[may_see(layer, q, k, cfg) for k in range(cfg.length)] for q in range(cfg.length)])
        reach = step @ reach
    np.testing.assert_array_equal(got, reach[:-1])
    assert not np.triu(got, k=1).any()
    if kind in ("full", "mixed"):
        assert got[np.tril_indices(len(got))].all()


# --- the same numbers however they are computed ----------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grad(cfg, params, text_BT, codes_BN, key):
    return jax.value_and_grad(lambda p: dalle.loss(cfg, p, text_BT, codes_BN, key)[0])(params)


def assert_close(a, b, **tolerance):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), **tolerance)


@pytest.fixture(scope="module")
def plain(params):
    return loss_and_grad(TINY, params, *rows(TINY, 4), jax.random.key(0))


@pytest.mark.parametrize(
    "change", [{"remat": "full"}, {"remat": "dots"}, {"scan_unroll": 2}, {"scan_unroll": 4}], ids=str
)
def test_remat_and_unrolling_change_nothing(params, plain, change):
    cfg = dataclasses.replace(TINY, **change)
    got = loss_and_grad(cfg, params, *rows(TINY, 4), jax.random.key(0))
    assert_close(got, plain, rtol=1e-5, atol=1e-6)


def test_remat_saves_memory_in_the_backward_pass(params):
    """What the switch is for: without it, remat == no remat would hold of a switch that does nothing."""

    def kept(remat):
        cfg = dataclasses.replace(TINY, remat=remat)
        caption, codes = rows(TINY, 4)
        program = jax.make_jaxpr(lambda p: jax.grad(lambda p: dalle.loss(cfg, p, caption, codes, jax.random.key(0))[0])(p))
        return str(program(params)).count("remat")

    assert kept("none") == 0 < kept("full")
    assert kept("dots") > 0


def test_scan_is_a_loop_over_the_layers(params):
    caption, codes = rows(TINY, 2)
    x = dalle._embed_text(TINY, params, caption)
    x = jnp.concatenate([x, dalle._embed_codes(TINY, params, codes, 0)], axis=1)
    layers = dalle.unstack(TINY, params)["blocks"]
    assert len(layers) == TINY.layers
    out_std = 0.02 / math.sqrt(2 * TINY.layers)
    block = Block(TINY.heads, TINY.mlp_ratio, TINY.qk_norm, out_std, jnp.float32)
    for kind, layer in zip(TINY.layer_kinds, layers, strict=True):
        mask = np.array([[may_see(kind, q, k, TINY) for k in range(T + N)] for q in range(T + N)])
        x, cache = block.apply({"params": layer}, x, jnp.asarray(mask))
        assert cache is None
    got = dalle.hidden(TINY, params, caption, codes)
    np.testing.assert_allclose(got, dalle._norm_out(params, x), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_close_to_float32(params):
    cfg = dataclasses.replace(TINY, dtype="bfloat16")
    caption, codes = rows(TINY, 4)
    got, want = logits(cfg, params, caption, codes), logits(TINY, params, caption, codes)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.float32
        error = np.sqrt(np.mean((a - b) ** 2)) / np.std(b)
        assert 0 < error < 0.03  # 8 bits of mantissa; 0 would mean that the dtype is not used
    (value, grads), (want_value, _) = (
        loss_and_grad(c, params, caption, codes, jax.random.key(0)) for c in (cfg, TINY)
    )
    assert abs(value - want_value) < 0.02
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_every_parameter_learns(params, plain):
    """Finite gradients, and none that is nowhere: but for tokens absent from the batch and what softmax ignores."""
    _, grads = plain
    for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-6, jax.tree_util.keystr(path)
    caption, codes = rows(TINY, 4)
    seen = np.isin(np.arange(len(grads["text_embed"])), np.asarray(caption))
    np.testing.assert_array_equal(np.abs(grads["text_embed"]).max(axis=1) > 0, seen)
    fed = np.isin(np.arange(TINY.image_vocab), np.asarray(codes[:, :-1]))  # the last code is fed to nothing
    np.testing.assert_array_equal(np.abs(grads["image_embed"]).max(axis=1) > 0, fed)


# --- the loss --------------------------------------------------------------------------------------------


def by_hand(scores, ids):
    scores = np.asarray(scores, np.float64)
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return -np.mean([log_p[b, t, ids[b, t]] for b in range(ids.shape[0]) for t in range(ids.shape[1])])


def test_loss_by_hand(params):
    caption, codes = rows(TINY, 3)
    total, metrics = dalle.loss(TINY, params, caption, codes, jax.random.key(0))
    text_logits, image_logits = logits(TINY, params, caption, codes)
    want_text = by_hand(text_logits, np.asarray(caption)[:, 1:])
    want_image = by_hand(image_logits, np.asarray(codes))
    np.testing.assert_allclose(metrics["text_loss"], want_text, rtol=1e-5)
    np.testing.assert_allclose(metrics["image_loss"], want_image, rtol=1e-5)
    np.testing.assert_allclose(total, want_text / 8 + want_image * 7 / 8, rtol=1e-5)


def test_fresh_parameters_know_nothing():
    """Small random weights: the loss is that of a uniform guess, log of the number of ids."""
    params = dalle.init(TINY, jax.random.key(0))
    _, metrics = dalle.loss(TINY, params, *rows(TINY, 4), jax.random.key(0))
    assert abs(metrics["text_loss"] - math.log(6 + T)) < 0.05
    assert abs(metrics["image_loss"] - math.log(7)) < 0.05


def test_a_text_of_one_token(params):
    cfg = dataclasses.replace(TINY, text_len=1)
    total, metrics = dalle.loss(cfg, lively(cfg), *rows(cfg, 2), jax.random.key(0))
    assert metrics["text_loss"] == 0 and np.isfinite(total)


@functools.partial(jax.jit, static_argnums=0)
def values(cfg, params, text_BT, codes_BN, keys):
    """The loss for each of many keys."""
    return jax.vmap(lambda key: dalle.loss(cfg, params, text_BT, codes_BN, key)[0])(keys)


def test_null_rate(params):
    """0 keeps every caption, 1 none; between, that share of the rows, each row by itself."""
    caption, codes = rows(TINY, 2)
    keys = jax.random.split(jax.random.key(5), 300)
    null = jnp.broadcast_to(dalle.null_text(TINY), caption.shape)
    alone = [values(TINY, params, t[r : r + 1], codes[r : r + 1], keys[:1])[0] for r in (0, 1) for t in (caption, null)]
    pairs = {(i, j): (alone[i] + alone[2 + j]) / 2 for i in (0, 1) for j in (0, 1)}  # (row 0 null?, row 1 null?)
    got = {}
    for rate in (0.0, 0.3, 1.0):
        out = values(dataclasses.replace(TINY, null_rate=rate), params, caption, codes, keys)
        near = [min(pairs, key=lambda p, v=v: abs(pairs[p] - v)) for v in out]
        assert max(abs(pairs[p] - v) for p, v in zip(near, out, strict=True)) < 1e-5
        got[rate] = np.array(near)
    assert len({round(float(v), 4) for v in pairs.values()}) == 4  # else rows cannot be told apart
    assert (got[0.0] == 0).all() and (got[1.0] == 1).all()
    share = got[0.3].mean(axis=0)
    assert (abs(share - 0.3) < 4 * math.sqrt(0.21 / 300)).all(), share
    assert abs(np.corrcoef(got[0.3].T)[0, 1]) < 4 / math.sqrt(300)


def test_null_rate_one_ignores_the_text(params):
    cfg = dataclasses.replace(TINY, null_rate=1.0)
    caption, codes = rows(TINY, 3)
    keys = jax.random.split(jax.random.key(0), 2)
    np.testing.assert_array_equal(
        values(cfg, params, caption, codes, keys), values(cfg, params, caption[::-1] * 0 + 1, codes, keys)
    )


def test_row_order_does_not_matter(params, plain):
    caption, codes = rows(TINY, 4)
    order = jnp.array([2, 0, 3, 1])
    got = loss_and_grad(TINY, params, caption[order], codes[order], jax.random.key(0))
    assert_close(got, plain, rtol=1e-5, atol=1e-6)


def test_rows_do_not_see_each_other(params):
    caption, codes = rows(TINY, 4)
    whole = logits(TINY, params, caption, codes)
    other_text, other_codes = caption.at[1:].set(0), codes.at[1:].set(0)
    changed = logits(TINY, params, other_text, other_codes)
    for a, b in zip(whole, changed, strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def test_each_position_has_its_own_pad_token(params):
    null = np.asarray(dalle.null_text(TINY))
    np.testing.assert_array_equal(null, [6, 7, 8])
    np.testing.assert_array_equal(null, text.null_caption(TINY.text_vocab, TINY.text_len))
    pads = np.asarray(dalle.init(TINY, jax.random.key(0))["text_embed"])[6:]
    assert len(pads) == T and np.abs(pads[:, None] - pads[None]).max(axis=-1)[~np.eye(T, dtype=bool)].min() > 1e-3


def test_init(params):
    """Same key, same numbers; every matrix its own; layers differ; the residual writers are scaled down."""
    cfg = dataclasses.replace(TINY, dim=64, layers=8)
    a, b = dalle.init(cfg, jax.random.key(3)), dalle.init(cfg, jax.random.key(3))
    assert_close(a, b, rtol=0, atol=0)
    kernel = np.asarray(a["blocks"]["attn"]["qkv"]["kernel"])
    assert kernel.shape == (8, 64, 3, 2, 32)
    assert np.abs(kernel[0] - kernel[1]).min(axis=None) >= 0 and (kernel[0] != kernel[1]).mean() > 0.99
    assert abs(kernel.std() / 0.02 - 1) < 0.02
    for name, writer in (("attn", "out"), ("mlp", "down")):
        std = np.asarray(a["blocks"][name][writer]["kernel"]).std()
        assert abs(std / (0.02 / math.sqrt(16)) - 1) < 0.05
    random = [np.asarray(a[n]).ravel()[:128] for n in ("text_embed", "text_pos", "image_embed", "image_row", "image_col")]
    for i, x in enumerate(random):
        assert all(not np.array_equal(x, y) for y in random[:i])


# --- refusals --------------------------------------------------------------------------------------------

GOOD_TEXT, GOOD_CODES = jnp.zeros((2, T), jnp.int32), jnp.zeros((2, N), jnp.int32)


@pytest.mark.parametrize(
    ("caption", "codes", "match"),
    [
        (GOOD_TEXT[:, :2], GOOD_CODES, r"text has shape \(2, 2\), want \(batch, 3\); pad or cut captions"),
        (GOOD_TEXT[0], GOOD_CODES, r"text has shape \(3,\)"),
        (GOOD_TEXT, GOOD_CODES[:1], r"codes have shape \(1, 9\), want \(2, 9\)"),
        (GOOD_TEXT, GOOD_CODES[:, 1:], r"codes have shape \(2, 8\), want \(2, 9\)"),  # not a shorter picture
        (GOOD_TEXT, jnp.zeros((2, N + 1), jnp.int32), r"codes have shape \(2, 10\), want \(2, 9\)"),
        (GOOD_TEXT, GOOD_CODES[0], r"codes have shape \(9,\), want \(2, 9\)"),
        (GOOD_TEXT * 1.0, GOOD_CODES, "text is float32, want int32 ids"),
        (GOOD_TEXT, GOOD_CODES * 1.0, "codes is float32, want int32 ids"),
    ],
)
def test_refuses_wrong_arrays(params, caption, codes, match):
    with pytest.raises(ValueError, match=match):
        dalle.logits(TINY, params, caption, codes)


def test_hidden_takes_a_prefix_but_no_more_than_a_picture(params):
    whole = dalle.hidden(TINY, params, GOOD_TEXT, GOOD_CODES)
    part = dalle.hidden(TINY, params, GOOD_TEXT, GOOD_CODES[:, :4])
    np.testing.assert_allclose(part, whole[:, : T + 4], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"codes have shape \(2, 10\), want \(2, 9\) or fewer columns"):
        dalle.hidden(TINY, params, GOOD_TEXT, jnp.zeros((2, N + 1), jnp.int32))


def test_prefill_wants_something_left_to_sample(params):
    with pytest.raises(ValueError, match="9 codes are given of 9; nothing is left to sample"):
        dalle.prefill(TINY, dalle.unstack(TINY, params), GOOD_TEXT, GOOD_CODES)
