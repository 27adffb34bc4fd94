"""Laws of speculative decoding: images equal sequential decoding, and so does their distribution; rejected drafts leave
no
trace in the cache."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CAPTIONS, TINY, captioned_params, uncached_logits

from dalle_jax.models import autoregressive, dalle
from dalle_jax.nn import drafts
from dalle_jax.nn import kv_cache as cache
from dalle_jax.sampling.generate import generate, generate_stream, row_keys

KINDS = ("full", "row", "column", "conv")
CFG = dataclasses.replace(TINY, grid=5, attention=KINDS, layers=4)  # rings of 6 and 7 tokens, 25 codes
N, V = CFG.num_codes, CFG.image_vocab


@pytest.fixture(scope="module")
def params():
    return autoregressive.prepare_for_decode(CFG, captioned_params(CFG))


DRAFT_LEN = 4
sample = functools.partial(generate, CFG, return_num_passes=True)


@pytest.mark.parametrize("temperature", [0.4, 0.0])
def test_speculative_equals_sequential_in_fewer_passes(params, temperature):
    keys = row_keys([3, 4, 5])
    want, num_steps = sample(params, CAPTIONS, keys, temperature=temperature)
    np.testing.assert_array_equal(num_steps, [N - 1] * 3)
    got, passes = sample(params, CAPTIONS, keys, temperature=temperature, draft_len=DRAFT_LEN)
    assert got.dtype == jnp.int32 and passes.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)
    assert (passes < N - 1).all() and (passes >= -(-(N - 1) // DRAFT_LEN)).all()


def test_drafts_longer_than_ring_buffers_with_guidance_and_prefix(params):
    keys = row_keys([3, 4, 5])
    options = {"temperature": jnp.array([0.3, 1.0, 0.0]), "guidance_scale": 1.5, "top_k": 5, "top_p": 0.9}
    want, _ = sample(params, CAPTIONS, keys, **options)
    got, passes = sample(params, CAPTIONS, keys, draft_len=9, prefix_codes=want[:, :7], **options)
    np.testing.assert_array_equal(got, want)
    assert (passes < N - 1 - 7).all()


def test_cache_sizes_and_stream(monkeypatch):
    """The cache of a full layer grows with the fastest row. The stream yields the same image in parts: whole raster
    rows, at
    least two more each time, when the slowest image has them, and the passes so far."""
    monkeypatch.setattr("dalle_jax.sampling.generate.CACHE_BUCKETS", 2)
    cfg = dataclasses.replace(TINY, grid=12, attention=("full",), layers=1)
    params = autoregressive.prepare_for_decode(cfg, captioned_params(cfg))
    keys = row_keys([0, 1, 2])
    want = generate(cfg, params, CAPTIONS, keys, temperature=0.3)
    options = {"temperature": 0.3, "draft_len": 7, "return_num_passes": True}
    got, passes = generate(cfg, params, CAPTIONS, keys, **options)
    np.testing.assert_array_equal(got, want)
    assert (passes < cfg.num_codes - 1).all() and len(set(np.asarray(passes))) > 1
    parts = list(generate_stream(cfg, params, CAPTIONS, keys, preview_rows=2, **options))
    lengths = [codes.shape[1] for codes, _ in parts]
    for codes, _ in parts:
        np.testing.assert_array_equal(codes, want[:, : codes.shape[1]])
    assert not np.any(np.array(lengths) % 12) and min(np.diff([0, *lengths])) >= 24 and len(parts) > 3
    counts = np.array([passes for _, passes in parts])
    assert (np.diff(counts, axis=0) >= 0).all() and (counts[0] >= 23 / 7).all()
    np.testing.assert_array_equal(counts[-1], passes)


def test_stream_by_hand():
    """With every draft accepted, in a raster of 5 x 5: four codes per pass after the first code, or after seven prefix
    codes
    and the one of the prefill; whole rows are yielded."""
    cfg = dataclasses.replace(CFG, layers=1)
    flat = jax.tree.map(jnp.zeros_like, captioned_params(cfg))
    options = {"temperature": 0.0, "draft_len": DRAFT_LEN, "return_num_passes": True}
    for prefix_len, want in {
        0: [(5, 1), (10, 3), (15, 4), (20, 5), (25, 6)],
        7: [(10, 1), (15, 2), (20, 3), (25, 5)],
    }.items():
        prefix = {"prefix_codes": jnp.zeros((3, prefix_len), jnp.int32)} if prefix_len else {}
        parts = generate_stream(cfg, flat, CAPTIONS, row_keys([0, 1, 2]), **options, **prefix)
        assert [(codes.shape[1], *set(passes)) for codes, passes in parts] == want


def test_passes_by_hand():
    """With every draft accepted, a pass decodes as many codes as it feeds."""
    flat = autoregressive.prepare_for_decode(CFG, jax.tree.map(jnp.zeros_like, captioned_params(CFG)))
    codes, passes = sample(flat, CAPTIONS, row_keys([0, 1, 2]), temperature=0.0, draft_len=DRAFT_LEN)
    np.testing.assert_array_equal(codes, 0)
    np.testing.assert_array_equal(passes, [6] * 3)  # 24 codes after the first, 4 per pass


def test_a_row_depends_on_its_caption_and_seed_alone(params):
    options = {"temperature": 0.4, "draft_len": DRAFT_LEN}
    codes, passes = sample(params, CAPTIONS, row_keys([3, 4, 5]), **options)
    moved = CAPTIONS[np.array([2, 2, 0])]
    other, other_passes = sample(params, moved, row_keys([5, 9, 3]), **options)
    np.testing.assert_array_equal(other[np.array([2, 0])], codes[np.array([0, 2])])
    np.testing.assert_array_equal(other_passes[np.array([2, 0])], passes[np.array([0, 2])])
    assert len(set(np.asarray(passes))) > 1  # each row at its own rate


@functools.partial(jax.jit, static_argnums=0)
def masked_step(cfg, params, cache, codes_BN, position_B):
    """A decoding step of the rows whose position is not negative."""
    at_B = jnp.maximum(position_B, 0)
    code_B = codes_BN[jnp.arange(len(codes_BN)), at_B]
    logits, new_cache = dalle.decode_step(cfg, params, cache, code_B, at_B)
    is_fed = position_B >= 0

    def select(new, old):
        mask = is_fed.reshape(-1, *[1] * (new.ndim - 1)) if len(new) == len(is_fed) else True
        return jnp.where(mask, new, old)

    return logits, jax.tree.map(select, new_cache, cache)


@pytest.mark.parametrize("shift_masks", [False, True])
def test_drafts_match_full_forward_and_rejected_ones_leave_no_trace(shift_masks):
    """A layer of each kind, rows at different positions. Logits equal those without a cache; the cache equals that of
    single
    steps."""
    kinds = ("row", "column") if shift_masks else (*KINDS, "conv_torus", "conv_clamped")
    cfg = dataclasses.replace(TINY, grid=5, attention=kinds, layers=len(kinds), shift_masks=shift_masks)
    params = autoregressive.prepare_for_decode(cfg, captioned_params(cfg))
    rng = np.random.default_rng(2)
    codes = jnp.asarray(rng.integers(0, V, (3, N)), jnp.int32)
    want = np.asarray(uncached_logits(cfg, captioned_params(cfg), CAPTIONS, codes))
    _, cache = jax.jit(dalle.prefill, static_argnums=0)(cfg, params, CAPTIONS)
    drafts = jax.jit(dalle.decode_drafts, static_argnums=0)
    keep = jax.jit(dalle.commit_drafts, static_argnums=0)
    draft_len, position, by_steps = 9, np.zeros(3, int), cache
    for count in ([9, 1, 5], [8, 3, 0], [2, 9, 9]):
        right = np.minimum(position[:, None] + np.arange(draft_len), N - 1)
        fed = np.asarray(codes)[np.arange(3)[:, None], right]
        wrong = np.arange(draft_len)[None] >= np.array(count)[:, None]
        fed = np.where(wrong, (fed + 1 + rng.integers(0, V - 1, fed.shape)) % V, fed)
        logits, new_kv = drafts(cfg, params, cache, jnp.asarray(fed), jnp.asarray(position))
        for row, many in enumerate(count):
            for i in range(min(many, N - 1 - position[row])):
                np.testing.assert_allclose(
                    logits[row, i], want[row, position[row] + i + 1], rtol=2e-4, atol=2e-4
                )
        cache = keep(cfg, cache, new_kv, jnp.asarray(position), jnp.asarray(count))
        for i in range(max(count)):
            at = np.where(i < np.array(count), position + i, -1)
            _, by_steps = masked_step(cfg, params, by_steps, codes, jnp.asarray(at))
        position = position + count
        for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(by_steps), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)
    assert want.std() > 0.3


@pytest.mark.parametrize("kind", ["row", "conv"])
def test_no_slot_is_written_twice(kind):
    """Two writes to one slot have no defined order: of more tokens than a ring buffer holds only the newest are
    written."""
    size = cache.cache_size(CFG, kind)
    position, count = jnp.array([0, 3, 5]), jnp.array([10, 0, 4])
    for row, at in enumerate(np.asarray(drafts._commit_slots(CFG, kind, size, position, count, 10))):
        kept = at[at < size]
        assert len(set(kept)) == len(kept) == min(count[row], size)
        newest = np.arange(10)[: count[row]][-size:]
        np.testing.assert_array_equal(at[newest], (position[row] + newest) % size)


ENUMERABLE = dataclasses.replace(TINY, grid=2, image_vocab=3, attention=("row",), layers=1)


@functools.lru_cache
def image_probabilities():
    """The probability of each of the 81 possible images, by the logits without a cache."""
    every = jnp.asarray(list(itertools.product(range(3), repeat=4)), jnp.int32)
    text = jnp.broadcast_to(CAPTIONS[:1], (81, 3))
    logits = uncached_logits(ENUMERABLE, captioned_params(ENUMERABLE), text, every)
    nats = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(every)[..., None], axis=-1)
    return np.exp(nats[..., 0].sum(axis=1))


@pytest.mark.parametrize("draft_len", [None, 3])
def test_the_distribution_is_that_of_the_model(draft_len):
    """Pearson's chi-squared statistic of 20,000 images over those expected 5 times or more, the rest as one, is within
    five
    standard deviations; moving 2% of the samples to another image exceeds it."""
    count, prob = 20_000, image_probabilities()
    np.testing.assert_allclose(prob.sum(), 1, rtol=1e-4)
    params = autoregressive.prepare_for_decode(ENUMERABLE, captioned_params(ENUMERABLE))
    codes = np.asarray(
        generate(ENUMERABLE, params, CAPTIONS[:1], row_keys(range(count)), draft_len=draft_len)
    )
    seen = np.bincount(codes @ [27, 9, 3, 1], minlength=81)

    def pearson(seen):
        seldom = prob * count < 5
        want = np.append(prob[~seldom] * count, [prob[seldom].sum() * count] * int(seldom.any()))
        got = np.append(seen[~seldom], [seen[seldom].sum()] * int(seldom.any()))
        return ((got - want) ** 2 / want).sum(), len(want) - 1

    found, freedom = pearson(seen)
    bound = freedom + 5 * np.sqrt(2 * freedom)
    assert found < bound and freedom > 20
    moved = seen.copy()
    moved[np.argmax(prob)] -= count // 50
    moved[np.argsort(prob)[-10]] += count // 50
    assert pearson(moved)[0] > bound


def test_invalid_draft_len(params):
    for draft_len in (1, N + 1):
        with pytest.raises(ValueError, match=f"Expected draft_len from 2 to {N}, got {draft_len}"):
            generate(CFG, params, CAPTIONS, row_keys([0, 1, 2]), draft_len=draft_len)
        with pytest.raises(ValueError, match=f"Expected draft_len from 2 to {N}, got {draft_len}"):
            next(generate_stream(CFG, params, CAPTIONS, row_keys([0, 1, 2]), draft_len=draft_len))
