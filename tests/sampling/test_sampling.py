"""Laws of drawing: the cache changes nothing, a row depends on its caption and seed alone, and the filters
do what their hand-made examples say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CAPTIONS, TINY, captioned_params, uncached_logits

from dalle_jax.models import autoregressive, dalle
from dalle_jax.sampling.generate import generate, row_keys
from dalle_jax.sampling.logits import (
    _argmax,
    _kth_largest,
    apply_cfg,
    keep_top_k,
    keep_top_p,
    sample_logits,
)

KINDS = ("full", "row", "column", "conv")
T, N, V, B = TINY.text_len, TINY.num_codes, TINY.image_vocab, 3


@pytest.fixture(scope="module")
def params():
    return captioned_params(TINY)


def greedy(params, text_BT, scores=uncached_logits):
    """The most probable code at every place, by running the whole stream anew for each."""
    codes = np.zeros((len(text_BT), N), np.int32)
    for place in range(N):
        codes[:, place] = np.argmax(scores(TINY, params, text_BT, jnp.asarray(codes))[:, place], axis=-1)
    return codes


@pytest.fixture(scope="module")
def best(params):
    return greedy(params, CAPTIONS)


# --- the cache -------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 4))
def cached(cfg, params, text_BT, codes_BN, given):
    """Scores of the codes from `given` on: a prefill of that many, then one step for each that follows."""
    params = autoregressive.prepare_for_decode(cfg, params)
    first, cache = dalle.prefill(cfg, params, text_BT, codes_BN[:, :given] if given else None)

    def step(cache, place):
        scores, cache = dalle.decode_step(cfg, params, cache, codes_BN[:, place], place)
        return cache, scores

    _, rest = jax.lax.scan(step, cache, jnp.arange(given, N - 1))
    return jnp.concatenate([first[:, None], jnp.moveaxis(rest, 0, 1)], axis=1)


@pytest.mark.parametrize(
    ("change", "given"),
    [
        *(pytest.param({"attention": (kind,), "layers": 1}, 0, id=kind) for kind in KINDS),
        pytest.param({"attention": KINDS, "layers": 4, "qk_norm": True}, 4, id="mixed-qk_norm-prefix"),
    ],
)
def test_cached_equals_uncached(change, given):
    """For every kind of attention; with codes given in advance, prefill of a prefix equals step by step."""
    cfg = dataclasses.replace(TINY, **change)
    params = captioned_params(cfg)
    codes = jnp.asarray(np.random.default_rng(1).integers(0, V, (B, N)), jnp.int32)
    want = uncached_logits(cfg, params, CAPTIONS, codes)
    got = cached(cfg, params, CAPTIONS, codes, given)
    assert got.dtype == jnp.float32 and want.std() > 0.3
    np.testing.assert_allclose(got, want[:, given:], rtol=1e-4, atol=1e-4)


def test_cache_holds_the_compute_dtype():
    cfg = dataclasses.replace(TINY, dtype="bfloat16", layers=2)
    cache = jax.eval_shape(lambda: dalle.init_cache(cfg, 5))
    assert len(cache) == 2
    for leaf in jax.tree.leaves(cache):
        assert leaf.shape[:2] == (5, 2) and leaf.shape[3] == 8 and leaf.dtype == jnp.bfloat16


# --- generate --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(params):
    return np.asarray(generate(TINY, params, CAPTIONS, row_keys([3, 4, 5]), temperature=1.0))


def test_temperature_zero_is_greedy(params, best):
    got = generate(TINY, params, CAPTIONS, row_keys([0, 1, 2]), temperature=0.0)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, best)
    assert len(np.unique(best, axis=0)) == B and len(np.unique(best)) > 2  # captions matter, places matter


def test_draws_are_codes_and_repeat(params, drawn):
    assert drawn.shape == (B, N) and drawn.min() >= 0 and drawn.max() < V
    again = generate(TINY, params, CAPTIONS, row_keys([3, 4, 5]), temperature=1.0)
    np.testing.assert_array_equal(again, drawn)
    other = np.asarray(generate(TINY, params, CAPTIONS, row_keys([6, 7, 8]), temperature=1.0))
    assert (other != drawn).any(axis=1).all()


def test_a_row_is_its_caption_and_seed_alone(params, drawn):
    """In another place among other mates, and by itself, a row comes out the same."""
    order = np.array([2, 0, 1])
    moved = generate(TINY, params, CAPTIONS[order], row_keys(np.array([3, 4, 5])[order]), temperature=1.0)
    np.testing.assert_array_equal(moved, drawn[order])
    mates = jnp.concatenate([CAPTIONS[:1], CAPTIONS[:1], CAPTIONS[:1]])
    got = np.asarray(generate(TINY, params, mates, row_keys([3, 9, 3]), temperature=1.0))
    np.testing.assert_array_equal(got[0], drawn[0])
    np.testing.assert_array_equal(got[2], drawn[0])
    assert (got[1] != drawn[0]).any()
    alone = generate(TINY, params, CAPTIONS[1:2], row_keys([4]), temperature=1.0)
    np.testing.assert_array_equal(alone[0], drawn[1])


def test_each_place_draws_with_its_own_key():
    """From a uniform model, codes of one row are not the same draw again and again."""
    flat = jax.tree.map(jnp.zeros_like, captioned_params(TINY))
    got = np.asarray(generate(TINY, flat, CAPTIONS, row_keys([0, 1, 2]), temperature=1.0))
    assert all(len(np.unique(row)) > 2 for row in got)
    assert len(np.unique(got, axis=0)) == B


def test_prime_is_kept_and_continued(params, drawn):
    """A picture begun with its own first codes goes on as it did; with others, it keeps those."""
    keys = row_keys([3, 4, 5])
    got = generate(TINY, params, CAPTIONS, keys, temperature=1.0, prefix_codes=jnp.asarray(drawn[:, :4]))
    np.testing.assert_array_equal(got, drawn)
    other = jnp.asarray((drawn[:, :4] + 1) % V)
    got = np.asarray(generate(TINY, params, CAPTIONS, keys, temperature=1.0, prefix_codes=other))
    np.testing.assert_array_equal(got[:, :4], other)
    assert (got[:, 4:] != drawn[:, 4:]).any()


def test_guidance_by_hand(params, best):
    """Scale 1 is no guidance, 0 the null caption, 3 what the uncached scores of both captions give."""
    null = jnp.broadcast_to(dalle.null_text(TINY), CAPTIONS.shape)
    keys = row_keys([0, 1, 2])

    def guided(scale, prime=None):
        options = {"temperature": 0.0, "top_p": 1.0, "guidance_scale": scale, "prefix_codes": prime}
        return generate(TINY, params, CAPTIONS, keys, **options)

    def by_hand(cfg, params, text_BT, codes):
        caption, none = (
            uncached_logits(cfg, params, text_BT, codes),
            uncached_logits(cfg, params, null, codes),
        )
        return none + 3.0 * (caption - none)

    three = greedy(params, CAPTIONS, by_hand)
    nobody = greedy(params, null)
    assert (three != best).any() and (nobody != best).any()
    np.testing.assert_array_equal(guided(1.0), best)
    np.testing.assert_array_equal(guided(0.0), nobody)
    np.testing.assert_array_equal(guided(3.0), three)
    np.testing.assert_array_equal(guided(3.0, jnp.asarray(three[:, :5])), three)


def test_guided_rows_are_independent_too(params):
    keys, options = row_keys([3, 4, 5]), {"temperature": 1.0, "top_p": 1.0, "guidance_scale": 3.0}
    whole = generate(TINY, params, CAPTIONS, keys, **options)
    turned = generate(TINY, params, CAPTIONS[::-1], keys[::-1], **options)
    np.testing.assert_array_equal(turned[::-1], whole)


def test_other_values_do_not_compile_again(params):
    """Temperature, top-p and guidance are traced."""

    def go(temperature, top_p, guidance):
        options = {"temperature": temperature, "top_p": top_p, "guidance_scale": guidance}
        return np.asarray(generate(TINY, params, CAPTIONS, row_keys([0, 1, 2]), **options))

    first = go(1.0, 0.9, 1.5)
    programs = generate._cache_size()
    outs = [go(2.5, 0.9, 1.5), go(1.0, 0.2, 1.5), go(0.0, 0.9, 1.5), go(1.0, 0.9, 6.0)]
    assert generate._cache_size() == programs
    assert all((out != first).any() for out in outs)  # and yet the values count


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"keys": row_keys([0])}, r"Expected one key per row, \(3,\) or a multiple of it, got shape \(1,\)"),
        ({"text": CAPTIONS[:, :2]}, r"Expected text of shape \(batch, 3\), got \(3, 2\)"),
        (
            {"text": CAPTIONS[:, :2], "guidance_scale": 2.0},
            r"Expected text of shape \(batch, 3\), got \(3, 2\)",
        ),
        ({"prefix_codes": jnp.zeros((B, N), jnp.int32)}, "fewer than 9 codes, got 9"),
        (
            {"prefix_codes": jnp.zeros((2, 4), jnp.int32)},
            r"Expected codes of shape \(3, 9\) or fewer columns, got \(2, 4\)",
        ),
        (
            {"prefix_codes": jnp.zeros((2, 4), jnp.int32), "guidance_scale": 2.0},
            r"Expected codes of shape \(3, 9\) or fewer columns, got \(2, 4\)",
        ),
        ({"prefix_codes": jnp.zeros((B, 4))}, "Expected codes of int32 ids, got float32"),
        ({"prefix_codes": jnp.zeros(4, jnp.int32)}, r"Expected codes of shape \(3, 9\) .*, got \(4,\)"),
        ({"top_k": 0}, "Expected top_k of at least 1, got 0"),
    ],
)
def test_generate_refuses(params, change, match):
    options = {"text": CAPTIONS, "keys": row_keys([0, 1, 2]), **change}
    with pytest.raises(ValueError, match=match):
        generate(TINY, params, options.pop("text"), options.pop("keys"), **options)


# --- filters ---------------------------------------------------------------------------------------------


def kept(filtered):
    """The places of each row that are not minus infinity."""
    return [sorted(np.flatnonzero(np.isfinite(row))) for row in np.asarray(filtered)]


def test_guide():
    cond, null = jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]])
    np.testing.assert_array_equal(apply_cfg(cond, null, 0.0), null)
    np.testing.assert_array_equal(apply_cfg(cond, null, 1.0), cond)
    np.testing.assert_array_equal(apply_cfg(cond, null, 3.0), [[3.0, -2.0]])


def test_top_k():
    logits = jnp.array([[0.1, 3.0, -2.0, 2.0], [5.0, 1.0, 1.0, 0.0]])
    assert kept(keep_top_k(logits, 1)) == [[1], [0]]
    assert kept(keep_top_k(logits, 2)) == [[1, 3], [0, 1, 2]]  # the tie with the second stays
    assert kept(keep_top_k(logits, 3)) == [[0, 1, 3], [0, 1, 2]]
    for k in (4, 5, 100):
        np.testing.assert_array_equal(keep_top_k(logits, k), logits)
    out = np.asarray(keep_top_k(logits, 2))
    np.testing.assert_array_equal(out[np.isfinite(out)], np.asarray(logits)[np.isfinite(out)])


@pytest.mark.parametrize("k", [1, 2, 5, 40, 49, 50])
def test_the_kth_is_found_bit_by_bit(k):
    """What sorting finds, with numbers of every size and sign, ties, and minus infinity."""
    rng = np.random.default_rng(k)
    rows = rng.normal(size=(4, 50)).astype(np.float32)
    rows[1] = np.round(rows[1])  # ties
    rows[2] *= 10.0 ** rng.integers(-30, 30, 50)
    rows[3, ::3], rows[3, 1] = -np.inf, np.inf
    np.testing.assert_array_equal(_kth_largest(jnp.asarray(rows), k), np.sort(rows, axis=-1)[:, -k])


@pytest.mark.parametrize(
    ("p", "want"),
    [
        (1e-6, [[2], [0, 1, 2, 3]]),  # the best stays, however small p is; the tie of all stays whole
        (0.45, [[2], [0, 1, 2, 3]]),
        (0.55, [[0, 2], [0, 1, 2, 3]]),  # 0.5 is short of 0.55
        (0.79, [[0, 2], [0, 1, 2, 3]]),
        (0.81, [[0, 2, 3], [0, 1, 2, 3]]),
        (0.96, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (1.0, [[0, 1, 2, 3], [0, 1, 2, 3]]),
    ],
)
def test_top_p(p, want):
    logits = jnp.log(jnp.array([[0.3, 0.05, 0.5, 0.15], [0.25, 0.25, 0.25, 0.25]]))
    assert kept(keep_top_p(logits, p)) == want
    assert kept(keep_top_p(logits + 7.0, jnp.float32(p))) == want


def test_top_p_of_one_keeps_everything():
    """Also what is so improbable that a sum of shares in float32 reaches 1 without it."""
    logits = jnp.array([[0.0, -20.0, -40.0, -jnp.inf]])
    np.testing.assert_array_equal(keep_top_p(logits, 1.0), logits)


def test_the_draw_is_that_of_jax():
    """For every key what jax.random.categorical draws, of a whole row as of one that is cut to a few."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(300, 40)) * 3, jnp.float32)
    keys = jax.random.split(jax.random.key(5), 300)
    for x in (logits, jnp.where(logits > 3, logits, -jnp.inf).at[:, 7].set(1.0)):
        np.testing.assert_array_equal(sample_logits(x, keys), jax.vmap(jax.random.categorical)(keys, x))


@pytest.mark.parametrize("row", [[0.0, -0.0, -1.0], [-0.0, 0.0], [-np.inf, -3.0, -3.0], [-np.inf] * 3])
def test_the_first_of_the_highest(row):
    x = jnp.array([row, row[::-1]])
    np.testing.assert_array_equal(_argmax(x), np.argmax(np.asarray(x), axis=1))


def test_temperature_and_order_of_the_filters():
    """Top-k, then temperature, then top-p: shares 1/2, 1/4, 1/4 cut to two are 2/3, 1/3; squared 4/5, 1/5."""
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def shares(**options):
        out = sample_logits(jnp.broadcast_to(logits, (len(keys), 3)), keys, **options)
        return np.bincount(out, minlength=3) / len(keys)

    assert_shares(shares(), [0.5, 0.3, 0.2])
    assert_shares(shares(temperature=0.5), np.array([25, 9, 4]) / 38)
    assert_shares(shares(temperature=2.0), np.sqrt([0.5, 0.3, 0.2]) / np.sqrt([0.5, 0.3, 0.2]).sum())
    assert_shares(shares(top_k=2), [5 / 8, 3 / 8, 0])
    assert_shares(shares(top_p=0.7), [5 / 8, 3 / 8, 0])
    # 25/38 = 0.66 after the temperature, 0.5 before: top-p 0.6 keeps one token only if it comes second
    assert_shares(shares(temperature=0.5, top_p=0.6), [1, 0, 0])
    # 25/34 = 0.74 of what top-k left, 0.66 of all: top-p 0.7 keeps one token only if top-k comes first
    assert_shares(shares(temperature=0.5, top_p=0.7, top_k=2), [1, 0, 0])
    assert_shares(shares(temperature=0.0), [1, 0, 0])
    assert_shares(shares(top_k=1), [1, 0, 0])


def assert_shares(got, want):
    """Within four standard deviations of 4000 draws, and exactly 0 and 1 where those are wanted."""
    want = np.asarray(want)
    assert (np.abs(got - want) <= 4 * np.sqrt(want * (1 - want) / 4000) + 1e-9).all(), (got, want)


def test_a_row_draws_by_its_own_key():
    logits = jnp.zeros((64, 50))
    keys = jax.random.split(jax.random.key(1), 64)
    a = np.asarray(sample_logits(logits, keys))
    np.testing.assert_array_equal(sample_logits(logits[:5], keys[:5]), a[:5])
    np.testing.assert_array_equal(sample_logits(logits, keys[::-1]), a[::-1])
    assert len(np.unique(a)) > 20


def test_temperature_zero_takes_the_first_of_equals():
    out = sample_logits(
        jnp.array([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]]), row_keys([0, 1]), temperature=0.0, top_p=0.5
    )
    np.testing.assert_array_equal(out, [1, 0])


def test_row_keys():
    keys = row_keys([7, 8, 2**32 - 1])
    for seed, key in zip([7, 8, 2**32 - 1], keys, strict=True):
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(seed)))
