"""Logits processing and sampling by hand-made examples (sampling/logits.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.sampling.generate import row_keys
from dalle_jax.sampling.logits import (
    _argmax,
    _kth_largest,
    apply_cfg,
    keep_top_k,
    keep_top_p,
    sample_logits,
)


def kept(filtered):
    """Indices of each row that are not minus infinity."""
    return [sorted(np.flatnonzero(np.isfinite(row))) for row in np.asarray(filtered)]


def test_apply_cfg():
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
def test_kth_largest_equals_sorting(k):
    """With numbers of every size and sign, ties and infinities."""
    rng = np.random.default_rng(k)
    rows = rng.normal(size=(4, 50)).astype(np.float32)
    rows[1] = np.round(rows[1])  # ties
    rows[2] *= 10.0 ** rng.integers(-30, 30, 50)
    rows[3, ::3], rows[3, 1] = -np.inf, np.inf
    np.testing.assert_array_equal(_kth_largest(jnp.asarray(rows), k), np.sort(rows, axis=-1)[:, -k])


@pytest.mark.parametrize(
    ("p", "want"),
    [
        (1e-6, [[2], [0, 1, 2, 3]]),  # the most probable stays for any p; a tie of all stays
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
    """Also tokens so improbable that a float32 sum of probabilities reaches 1 without them."""
    logits = jnp.array([[0.0, -20.0, -40.0, -jnp.inf]])
    np.testing.assert_array_equal(keep_top_p(logits, 1.0), logits)


def test_sampling_equals_jax_categorical():
    """For every key, with all tokens and with a few."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(300, 40)) * 3, jnp.float32)
    keys = jax.random.split(jax.random.key(5), 300)
    for x in (logits, jnp.where(logits > 3, logits, -jnp.inf).at[:, 7].set(1.0)):
        np.testing.assert_array_equal(sample_logits(x, keys), jax.vmap(jax.random.categorical)(keys, x))


@pytest.mark.parametrize("row", [[0.0, -0.0, -1.0], [-0.0, 0.0], [-np.inf, -3.0, -3.0], [-np.inf] * 3])
def test_argmax_returns_the_first_maximum(row):
    x = jnp.array([row, row[::-1]])
    np.testing.assert_array_equal(_argmax(x), np.argmax(np.asarray(x), axis=1))


def test_temperature_and_order_of_processing():
    """Top-k, then temperature, then top-p."""
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def fractions(**options):
        out = sample_logits(jnp.broadcast_to(logits, (len(keys), 3)), keys, **options)
        return np.bincount(out, minlength=3) / len(keys)

    assert_fractions(fractions(), [0.5, 0.3, 0.2])
    assert_fractions(fractions(temperature=0.5), np.array([25, 9, 4]) / 38)
    assert_fractions(fractions(temperature=2.0), np.sqrt([0.5, 0.3, 0.2]) / np.sqrt([0.5, 0.3, 0.2]).sum())
    assert_fractions(fractions(top_k=2), [5 / 8, 3 / 8, 0])
    assert_fractions(fractions(top_p=0.7), [5 / 8, 3 / 8, 0])
    # 25/38 = 0.66 after the temperature, 0.5 before: top-p 0.6 keeps one token only if it applies second
    assert_fractions(fractions(temperature=0.5, top_p=0.6), [1, 0, 0])
    # 25/34 = 0.74 after top-k, 0.66 without: top-p 0.7 keeps one token only if top-k applies first
    assert_fractions(fractions(temperature=0.5, top_p=0.7, top_k=2), [1, 0, 0])
    assert_fractions(fractions(temperature=0.0), [1, 0, 0])
    assert_fractions(fractions(top_k=1), [1, 0, 0])


def assert_fractions(got, want):
    """Within four standard deviations of 4000 samples, and exactly 0 and 1 where those are expected."""
    want = np.asarray(want)
    assert (np.abs(got - want) <= 4 * np.sqrt(want * (1 - want) / 4000) + 1e-9).all(), (got, want)


def test_a_row_depends_on_its_own_key():
    logits = jnp.zeros((64, 50))
    keys = jax.random.split(jax.random.key(1), 64)
    a = np.asarray(sample_logits(logits, keys))
    np.testing.assert_array_equal(sample_logits(logits[:5], keys[:5]), a[:5])
    np.testing.assert_array_equal(sample_logits(logits, keys[::-1]), a[::-1])
    assert len(np.unique(a)) > 20


def test_temperature_zero_takes_the_first_of_a_tie():
    out = sample_logits(
        jnp.array([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]]), row_keys([0, 1]), temperature=0.0, top_p=0.5
    )
    np.testing.assert_array_equal(out, [1, 0])
