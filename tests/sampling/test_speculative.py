"""Laws of drawing several codes per pass: the same pictures as code by code, and so the same distribution; wrong
guesses leave nothing behind."""

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
drawn = functools.partial(generate, CFG, return_num_passes=True)


@pytest.mark.parametrize("temperature", [0.4, 0.0])
def test_the_same_pictures_in_fewer_passes(params, temperature):
    keys = row_keys([3, 4, 5])
    want, most = drawn(params, CAPTIONS, keys, temperature=temperature)
    np.testing.assert_array_equal(most, [N - 1] * 3)
    got, passes = drawn(params, CAPTIONS, keys, temperature=temperature, draft_len=DRAFT_LEN)
    assert got.dtype == jnp.int32 and passes.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)
    assert (passes < N - 1).all() and (passes >= -(-(N - 1) // DRAFT_LEN)).all()


def test_windows_beyond_rings_with_guidance_filters_and_given_codes(params):
    keys = row_keys([3, 4, 5])
    options = {"temperature": jnp.array([0.3, 1.0, 0.0]), "guidance_scale": 1.5, "top_k": 5, "top_p": 0.9}
    want, _ = drawn(params, CAPTIONS, keys, **options)
    got, passes = drawn(params, CAPTIONS, keys, draft_len=9, prefix_codes=want[:, :7], **options)
    np.testing.assert_array_equal(got, want)
    assert (passes < N - 1 - 7).all()


def test_length_buckets_and_rows_as_they_come(monkeypatch):
    """A full layer's cache grows as the fastest row needs it. In parts the picture is the same: whole rows of the
    raster, two more each time at least, when the slowest has them, and the passes up to there."""
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


def test_rows_by_hand():
    """Where every guess is right, in a raster of 5 x 5: after the first code, or after seven given ones and the one
    that comes with them, four a pass, and of all of them the whole rows."""
    cfg = dataclasses.replace(CFG, layers=1)
    flat = jax.tree.map(jnp.zeros_like, captioned_params(cfg))
    options = {"temperature": 0.0, "draft_len": DRAFT_LEN, "return_num_passes": True}
    for given, want in {
        0: [(5, 1), (10, 3), (15, 4), (20, 5), (25, 6)],
        7: [(10, 1), (15, 2), (20, 3), (25, 5)],
    }.items():
        begun = {"prefix_codes": jnp.zeros((3, given), jnp.int32)} if given else {}
        parts = generate_stream(cfg, flat, CAPTIONS, row_keys([0, 1, 2]), **options, **begun)
        assert [(codes.shape[1], *set(passes)) for codes, passes in parts] == want


def test_passes_by_hand():
    """Where every guess is right a pass gives as many codes as it looks at."""
    flat = autoregressive.prepare_for_decode(CFG, jax.tree.map(jnp.zeros_like, captioned_params(CFG)))
    codes, passes = drawn(flat, CAPTIONS, row_keys([0, 1, 2]), temperature=0.0, draft_len=DRAFT_LEN)
    np.testing.assert_array_equal(codes, 0)
    np.testing.assert_array_equal(passes, [6] * 3)  # 24 codes after the first, 4 a pass


def test_a_row_is_its_caption_and_seed_alone(params):
    options = {"temperature": 0.4, "draft_len": DRAFT_LEN}
    codes, passes = drawn(params, CAPTIONS, row_keys([3, 4, 5]), **options)
    moved = CAPTIONS[np.array([2, 2, 0])]
    other, mine = drawn(params, moved, row_keys([5, 9, 3]), **options)
    np.testing.assert_array_equal(other[np.array([2, 0])], codes[np.array([0, 2])])
    np.testing.assert_array_equal(mine[np.array([2, 0])], passes[np.array([0, 2])])
    assert len(set(np.asarray(passes))) > 1  # each row at its own pace


@functools.partial(jax.jit, static_argnums=0)
def stepped(cfg, params, cache, codes_BN, place_B):
    """One code of each row after another; a negative place feeds nothing."""
    at = jnp.maximum(place_B, 0)
    code_B = codes_BN[jnp.arange(len(codes_BN)), at]
    scores, fresh = dalle.decode_step(cfg, params, cache, code_B, at)
    keep = place_B >= 0

    def chosen(new, old):
        mask = keep.reshape(-1, *[1] * (new.ndim - 1)) if len(new) == len(keep) else True
        return jnp.where(mask, new, old)

    return scores, jax.tree.map(chosen, fresh, cache)


@pytest.mark.parametrize("in_raster", [False, True])
def test_a_pass_is_as_many_steps_and_wrong_guesses_leave_no_trace(in_raster):
    """A layer of each kind, rows at places of their own. Scores after each code are those of no cache; what is kept is
    what steps keep."""
    kinds = ("row", "column") if in_raster else (*KINDS, "conv_torus", "conv_clamped")
    cfg = dataclasses.replace(TINY, grid=5, attention=kinds, layers=len(kinds), shift_masks=in_raster)
    params = autoregressive.prepare_for_decode(cfg, captioned_params(cfg))
    rng = np.random.default_rng(2)
    codes = jnp.asarray(rng.integers(0, V, (3, N)), jnp.int32)
    want = np.asarray(uncached_logits(cfg, captioned_params(cfg), CAPTIONS, codes))
    _, cache = jax.jit(dalle.prefill, static_argnums=0)(cfg, params, CAPTIONS)
    drafts = jax.jit(dalle.decode_drafts, static_argnums=0)
    keep = jax.jit(dalle.commit_drafts, static_argnums=0)
    draft_len, place, by_steps = 9, np.zeros(3, int), cache
    for count in ([9, 1, 5], [8, 3, 0], [2, 9, 9]):
        right = np.minimum(place[:, None] + np.arange(draft_len), N - 1)
        fed = np.asarray(codes)[np.arange(3)[:, None], right]
        wrong = np.arange(draft_len)[None] >= np.array(count)[:, None]
        fed = np.where(wrong, (fed + 1 + rng.integers(0, V - 1, fed.shape)) % V, fed)
        scores, fresh = drafts(cfg, params, cache, jnp.asarray(fed), jnp.asarray(place))
        for row, many in enumerate(count):
            for i in range(min(many, N - 1 - place[row])):
                np.testing.assert_allclose(
                    scores[row, i], want[row, place[row] + i + 1], rtol=2e-4, atol=2e-4
                )
        cache = keep(cfg, cache, fresh, jnp.asarray(place), jnp.asarray(count))
        for i in range(max(count)):
            at = np.where(i < np.array(count), place + i, -1)
            _, by_steps = stepped(cfg, params, by_steps, codes, jnp.asarray(at))
        place = place + count
        for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(by_steps), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)
    assert want.std() > 0.3


@pytest.mark.parametrize("kind", ["row", "conv"])
def test_no_slot_is_written_twice(kind):
    """The order of two writes to one slot is anybody's: of more tokens than a ring holds the newest alone are kept."""
    size = cache.cache_size(CFG, kind)
    place, count = jnp.array([0, 3, 5]), jnp.array([10, 0, 4])
    for row, at in enumerate(np.asarray(drafts._commit_slots(CFG, kind, size, place, count, 10))):
        kept = at[at < size]
        assert len(set(kept)) == len(kept) == min(count[row], size)
        newest = np.arange(10)[: count[row]][-size:]
        np.testing.assert_array_equal(at[newest], (place[row] + newest) % size)


ENUMERABLE = dataclasses.replace(TINY, grid=2, image_vocab=3, attention=("row",), layers=1)


@functools.lru_cache
def chances():
    """The probability of each of the 81 pictures that there are, by the scores without a cache."""
    every = jnp.asarray(list(itertools.product(range(3), repeat=4)), jnp.int32)
    text = jnp.broadcast_to(CAPTIONS[:1], (81, 3))
    scores = uncached_logits(ENUMERABLE, captioned_params(ENUMERABLE), text, every)
    nats = np.take_along_axis(np.asarray(jax.nn.log_softmax(scores)), np.asarray(every)[..., None], axis=-1)
    return np.exp(nats[..., 0].sum(axis=1))


@pytest.mark.parametrize("draft_len", [None, 3])
def test_the_distribution_is_that_of_the_model(draft_len):
    """Pearson's statistic of 20,000 pictures over the ones that are expected 5 times or more, the rest as one, within
    five standard deviations; 2 of 100 rows given to another picture exceed it."""
    count, chance = 20_000, chances()
    np.testing.assert_allclose(chance.sum(), 1, rtol=1e-4)
    params = autoregressive.prepare_for_decode(ENUMERABLE, captioned_params(ENUMERABLE))
    codes = np.asarray(
        generate(ENUMERABLE, params, CAPTIONS[:1], row_keys(range(count)), draft_len=draft_len)
    )
    seen = np.bincount(codes @ [27, 9, 3, 1], minlength=81)

    def pearson(seen):
        seldom = chance * count < 5
        want = np.append(chance[~seldom] * count, [chance[seldom].sum() * count] * int(seldom.any()))
        got = np.append(seen[~seldom], [seen[seldom].sum()] * int(seldom.any()))
        return ((got - want) ** 2 / want).sum(), len(want) - 1

    found, freedom = pearson(seen)
    bound = freedom + 5 * np.sqrt(2 * freedom)
    assert found < bound and freedom > 20
    moved = seen.copy()
    moved[np.argmax(chance)] -= count // 50
    moved[np.argsort(chance)[-10]] += count // 50
    assert pearson(moved)[0] > bound


def test_bad_windows(params):
    for draft_len in (1, N + 1):
        with pytest.raises(ValueError, match=f"Expected draft_len from 2 to {N}, got {draft_len}"):
            generate(CFG, params, CAPTIONS, row_keys([0, 1, 2]), draft_len=draft_len)
        with pytest.raises(ValueError, match=f"Expected draft_len from 2 to {N}, got {draft_len}"):
            next(generate_stream(CFG, params, CAPTIONS, row_keys([0, 1, 2]), draft_len=draft_len))
