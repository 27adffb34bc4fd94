"""Laws of sampling: the cache changes no logit, and an image depends on its caption and seed alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CAPTIONS, TINY, captioned_params, uncached_logits

from dalle_jax.models import autoregressive, dalle
from dalle_jax.sampling.generate import generate, row_keys

KINDS = ("full", "row", "column", "conv")
T, N, V, B = TINY.text_len, TINY.num_codes, TINY.image_vocab, 3


@pytest.fixture(scope="module")
def params():
    return captioned_params(TINY)


def greedy(params, text_BT, logits_fn=uncached_logits):
    """The most probable code at every position, by a full forward pass for each."""
    codes = np.zeros((len(text_BT), N), np.int32)
    for position in range(N):
        logits = logits_fn(TINY, params, text_BT, jnp.asarray(codes))[:, position]
        codes[:, position] = np.argmax(logits, axis=-1)
    return codes


@pytest.fixture(scope="module")
def best(params):
    return greedy(params, CAPTIONS)


# --- the cache -------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 4))
def cached_logits(cfg, params, text_BT, codes_BN, prefix_len):
    """Logits from position `prefix_len` on: prefill of that many codes, then one step for each that follows."""
    params = autoregressive.prepare_for_decode(cfg, params)
    first, cache = dalle.prefill(cfg, params, text_BT, codes_BN[:, :prefix_len] if prefix_len else None)

    def step(cache, position):
        logits, cache = dalle.decode_step(cfg, params, cache, codes_BN[:, position], position)
        return cache, logits

    _, rest = jax.lax.scan(step, cache, jnp.arange(prefix_len, N - 1))
    return jnp.concatenate([first[:, None], jnp.moveaxis(rest, 0, 1)], axis=1)


@pytest.mark.parametrize(
    ("change", "prefix_len"),
    [
        *(pytest.param({"attention": (kind,), "layers": 1}, 0, id=kind) for kind in KINDS),
        pytest.param({"attention": KINDS, "layers": 4, "qk_norm": True}, 4, id="mixed-qk_norm-prefix"),
    ],
)
def test_cache_matches_full_forward(change, prefix_len):
    """For every kind of attention, and after a prefix: prefill of a prefix equals decoding step by step."""
    cfg = dataclasses.replace(TINY, **change)
    params = captioned_params(cfg)
    codes = jnp.asarray(np.random.default_rng(1).integers(0, V, (B, N)), jnp.int32)
    want = uncached_logits(cfg, params, CAPTIONS, codes)
    got = cached_logits(cfg, params, CAPTIONS, codes, prefix_len)
    assert got.dtype == jnp.float32 and want.std() > 0.3
    np.testing.assert_allclose(got, want[:, prefix_len:], rtol=1e-4, atol=1e-4)


def test_cache_has_the_compute_dtype():
    cfg = dataclasses.replace(TINY, dtype="bfloat16", layers=2)
    cache = jax.eval_shape(lambda: dalle.init_cache(cfg, 5))
    assert len(cache) == 2
    for leaf in jax.tree.leaves(cache):
        assert leaf.shape[:2] == (5, 2) and leaf.shape[3] == 8 and leaf.dtype == jnp.bfloat16


# --- generate --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(params):
    return np.asarray(generate(TINY, params, CAPTIONS, row_keys([3, 4, 5]), temperature=1.0))


def test_temperature_zero_is_greedy(params, best):
    got = generate(TINY, params, CAPTIONS, row_keys([0, 1, 2]), temperature=0.0)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, best)
    assert len(np.unique(best, axis=0)) == B and len(np.unique(best)) > 2  # captions and positions matter


def test_samples_are_codes_and_reproducible(params, sampled):
    assert sampled.shape == (B, N) and sampled.min() >= 0 and sampled.max() < V
    again = generate(TINY, params, CAPTIONS, row_keys([3, 4, 5]), temperature=1.0)
    np.testing.assert_array_equal(again, sampled)
    other = np.asarray(generate(TINY, params, CAPTIONS, row_keys([6, 7, 8]), temperature=1.0))
    assert (other != sampled).any(axis=1).all()


def test_a_row_depends_on_its_caption_and_seed_alone(params, sampled):
    """Not on its index in the batch, and not on the other rows."""
    order = np.array([2, 0, 1])
    moved = generate(TINY, params, CAPTIONS[order], row_keys(np.array([3, 4, 5])[order]), temperature=1.0)
    np.testing.assert_array_equal(moved, sampled[order])
    repeated = jnp.concatenate([CAPTIONS[:1], CAPTIONS[:1], CAPTIONS[:1]])
    got = np.asarray(generate(TINY, params, repeated, row_keys([3, 9, 3]), temperature=1.0))
    np.testing.assert_array_equal(got[0], sampled[0])
    np.testing.assert_array_equal(got[2], sampled[0])
    assert (got[1] != sampled[0]).any()
    alone = generate(TINY, params, CAPTIONS[1:2], row_keys([4]), temperature=1.0)
    np.testing.assert_array_equal(alone[0], sampled[1])


def test_each_position_has_its_own_key():
    """A uniform model samples different codes within a row."""
    flat = jax.tree.map(jnp.zeros_like, captioned_params(TINY))
    got = np.asarray(generate(TINY, flat, CAPTIONS, row_keys([0, 1, 2]), temperature=1.0))
    assert all(len(np.unique(row)) > 2 for row in got)
    assert len(np.unique(got, axis=0)) == B


def test_prefix_is_kept_and_continued(params, sampled):
    """With its own first codes an image is the same; other first codes are kept."""
    keys = row_keys([3, 4, 5])
    got = generate(TINY, params, CAPTIONS, keys, temperature=1.0, prefix_codes=jnp.asarray(sampled[:, :4]))
    np.testing.assert_array_equal(got, sampled)
    other = jnp.asarray((sampled[:, :4] + 1) % V)
    got = np.asarray(generate(TINY, params, CAPTIONS, keys, temperature=1.0, prefix_codes=other))
    np.testing.assert_array_equal(got[:, :4], other)
    assert (got[:, 4:] != sampled[:, 4:]).any()


def test_guidance_by_hand(params, best):
    """Scale 1 is no guidance, 0 the null caption, 3 the combination of the uncached logits of both captions."""
    null = jnp.broadcast_to(dalle.null_text(TINY), CAPTIONS.shape)
    keys = row_keys([0, 1, 2])

    def guided(scale, prefix=None):
        options = {"temperature": 0.0, "top_p": 1.0, "guidance_scale": scale, "prefix_codes": prefix}
        return generate(TINY, params, CAPTIONS, keys, **options)

    def by_hand(cfg, params, text_BT, codes):
        cond = uncached_logits(cfg, params, text_BT, codes)
        uncond = uncached_logits(cfg, params, null, codes)
        return uncond + 3.0 * (cond - uncond)

    three = greedy(params, CAPTIONS, by_hand)
    unconditional = greedy(params, null)
    assert (three != best).any() and (unconditional != best).any()
    np.testing.assert_array_equal(guided(1.0), best)
    np.testing.assert_array_equal(guided(0.0), unconditional)
    np.testing.assert_array_equal(guided(3.0), three)
    np.testing.assert_array_equal(guided(3.0, jnp.asarray(three[:, :5])), three)


def test_rows_with_guidance_are_independent(params):
    keys, options = row_keys([3, 4, 5]), {"temperature": 1.0, "top_p": 1.0, "guidance_scale": 3.0}
    whole = generate(TINY, params, CAPTIONS, keys, **options)
    reversed_rows = generate(TINY, params, CAPTIONS[::-1], keys[::-1], **options)
    np.testing.assert_array_equal(reversed_rows[::-1], whole)


def test_other_values_do_not_compile_again(params):
    """Temperature, top-p and guidance are traced."""

    def run(temperature, top_p, guidance):
        options = {"temperature": temperature, "top_p": top_p, "guidance_scale": guidance}
        return np.asarray(generate(TINY, params, CAPTIONS, row_keys([0, 1, 2]), **options))

    first = run(1.0, 0.9, 1.5)
    programs = generate._cache_size()
    outs = [run(2.5, 0.9, 1.5), run(1.0, 0.2, 1.5), run(0.0, 0.9, 1.5), run(1.0, 0.9, 6.0)]
    assert generate._cache_size() == programs
    assert all((out != first).any() for out in outs)  # the values have an effect


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


def test_row_keys():
    keys = row_keys([7, 8, 2**32 - 1])
    for seed, key in zip([7, 8, 2**32 - 1], keys, strict=True):
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(seed)))
