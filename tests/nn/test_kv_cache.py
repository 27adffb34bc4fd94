"""Laws of the sparse KV caches: what they keep and read is the written figure, and they change no score."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CAPTIONS, TINY, captioned_params, uncached_logits

from dalle_jax.config import DalleConfig
from dalle_jax.models import autoregressive, dalle
from dalle_jax.nn import kv_cache as kv
from dalle_jax.sampling.generate import generate, generate_stream, row_keys

KINDS = ("full", "row", "column", "conv")
# A raster long enough that the rings of row (6 tokens) and conv (7) go round several times.
CFG = dataclasses.replace(TINY, grid=5, attention=KINDS, layers=4)
N, V = CFG.num_codes, CFG.image_vocab
PAPER = DalleConfig()
# Shorter than a ring, as long as one, longer, and after more than one round; a prefix is any number of codes.
PREFIXES = {"full": (6,), "row": (4, 6, 13), "column": (7,), "conv": (6, 7, 16)}


@pytest.fixture(scope="module")
def codes():
    return jnp.asarray(np.random.default_rng(1).integers(0, V, (3, N)), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def steps(cfg, params, cache, codes_BN, places_LB):
    """Scores (L, B, V) of one step after another, each feeding the code of its place, scalar or per row."""

    def step(cache, place):
        code_B = codes_BN[jnp.arange(len(codes_BN)), place]
        scores, cache = dalle.decode_step(cfg, params, cache, code_B, place)
        return cache, scores

    return jax.lax.scan(step, cache, places_LB)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_every_place_and_after_a_prefix(kind, codes):
    """The scores of all codes, step by step and after a prefix, are those of no cache."""
    cfg = dataclasses.replace(CFG, attention=(kind,), layers=2)
    params = captioned_params(cfg)
    ready = autoregressive.prepare_for_decode(cfg, params)
    want = uncached_logits(cfg, params, CAPTIONS, codes)
    fill = jax.jit(dalle.prefill, static_argnums=0)
    _, cache = fill(cfg, ready, CAPTIONS)
    through = []  # the caches step by step
    for place in range(N - 1):
        cache, scores = steps(cfg, ready, cache, codes, jnp.array([place]))
        np.testing.assert_allclose(scores[0], want[:, place + 1], rtol=2e-4, atol=2e-4)
        through.append(cache)
    for given in PREFIXES[kind]:
        first, cache = fill(cfg, ready, CAPTIONS, codes[:, :given])
        np.testing.assert_allclose(first, want[:, given], rtol=2e-4, atol=2e-4)
        for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(through[given - 1]), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)
    assert want.std() > 0.3


def test_each_row_at_its_own_place(codes):
    """Rows at different places, in caches with the leavings of other pictures, score as they do alone."""
    params = captioned_params(CFG)
    ready = autoregressive.prepare_for_decode(CFG, params)
    want = uncached_logits(CFG, params, CAPTIONS, codes)
    _, cache = dalle.prefill(CFG, ready, CAPTIONS)
    other = (codes + 3) % V
    cache, _ = steps(CFG, ready, cache, other, jnp.arange(N - 1))  # an older picture filled every slot
    start = np.array([0, -4, -9])
    for t in range(N - 1):
        place = np.maximum(start + t, 0)  # a row that has not begun feeds place 0 again and again
        cache, scores = steps(CFG, ready, cache, codes, jnp.asarray(place)[None])
        np.testing.assert_allclose(scores[0], want[np.arange(3), place + 1], rtol=2e-4, atol=2e-4)


def test_what_the_paper_needs():
    """256 text tokens and, of 1024 image tokens, 33 for row, 32 for column, the span of the window for conv."""
    assert [kv.cache_size(PAPER, kind) for kind in KINDS] == [1024, 33, 1024, 5 * 32 + 5 + 1]
    assert [kv.max_read(PAPER, kind) for kind in KINDS] == [1024, 33, 32, 166]
    cache = jax.eval_shape(lambda: dalle.init_cache(PAPER, 2, 3, use_cfg=True))
    rows = 2 * 3 * 2
    image = sum(layer.image.k.shape[2] for layer in cache)
    assert image == 47 * 33 + 16 * 1024 + 166
    for layer in cache:
        assert [kv_.k.shape for kv_ in layer.text] == [(2, 62, 256, 64), (1, 62, 256, 64)]
        assert layer.image.k.shape[0] == rows and layer.image.k.dtype == jnp.bfloat16


def test_a_small_cache_is_enough_until_it_is_full(codes):
    """With room for as many tokens as come, scores and what is kept are those with room for all; then it grows."""
    cfg = dataclasses.replace(CFG, attention=("full", "row"), layers=2)
    params = captioned_params(cfg)
    ready = autoregressive.prepare_for_decode(cfg, params)
    want = uncached_logits(cfg, params, CAPTIONS, codes)
    _, cache = jax.jit(dalle.prefill, static_argnums=0)(cfg, ready, CAPTIONS, codes[:, :6])
    for room, places in ((10, range(6, 10)), (16, range(10, 16)), (N, range(16, N - 1))):
        cache = dalle.resize_cache(cfg, cache, room)
        assert [layer.image.k.shape[2] for layer in cache] == [room, 6]
        cache, scores = steps(cfg, ready, cache, codes, jnp.array(places))
        for place, got in zip(places, scores, strict=True):
            np.testing.assert_allclose(got, want[:, place + 1], rtol=2e-4, atol=2e-4)


def test_candidates_share_their_caption():
    """Several seeds of a caption, run once for all of them, draw what each draws with a caption of its own."""
    params = captioned_params(CFG)
    seeds = row_keys(range(6))
    together = generate(CFG, params, CAPTIONS[:2], seeds, guidance_scale=3.0)
    apart = generate(CFG, params, jnp.repeat(CAPTIONS[:2], 3, axis=0), seeds, guidance_scale=3.0)
    np.testing.assert_array_equal(together, apart)
    assert len(np.unique(together, axis=0)) == 6


@pytest.mark.parametrize("given", [0, 7])
def test_rows_as_they_come(given):
    """The picture in parts is the picture: whole rows of the raster each time, the last part all of it."""
    params = captioned_params(CFG)
    options = {"guidance_scale": jnp.float32(2.0), "top_k": 5, "temperature": jnp.float32(0.8)}
    keys = row_keys([3, 4, 5])
    whole = generate(CFG, params, CAPTIONS, keys, **options)
    options |= {"prefix_codes": whole[:, :given]} if given else {}
    parts = list(generate_stream(CFG, params, CAPTIONS, keys, preview_rows=2, **options))
    for part in parts:
        np.testing.assert_array_equal(part, whole[:, : part.shape[1]])
    lengths = [part.shape[1] for part in parts]
    assert lengths == {0: [10, 20, 25], 7: [15, 25]}[given]
    with pytest.raises(ValueError, match="Expected preview_rows of at least 1, got 0"):
        next(generate_stream(CFG, params, CAPTIONS, keys, preview_rows=0))


def loop_bodies(text):
    """The computations of compiled HLO that are bodies of loops with a cache among their state."""
    names = set(re.findall(r"body=%?([\w.\-]+)", text))
    blocks = re.split(r"\n(?=[%\w].*\{\n)", text)
    return [b for b in blocks if any(re.match(rf"%?{re.escape(n)} ", b) for n in names)]


def programs(grid, draft_len=None, rows=2):
    cfg = dataclasses.replace(CFG, grid=grid, text_len=2, dim=32)
    params = autoregressive.prepare_for_decode(cfg, captioned_params(cfg))
    text = jnp.stack([dalle.null_text(cfg)] * rows)
    return cfg, generate.lower(
        cfg, params, text, row_keys(range(rows)), top_k=3, draft_len=draft_len
    ).compile()


@pytest.mark.parametrize(("draft_len", "rows"), [(None, 2), (5, 2), (None, 1)])
def test_the_loop_copies_no_cache(draft_len, rows):
    """In the compiled loop nothing of the size of a cache is copied, with the axis of a single row or without."""
    cfg, compiled = programs(8, draft_len, rows)
    bodies = loop_bodies(compiled.as_text())
    leads = ("2,2",) if rows == 2 else ("1,2", "2")
    cached = {
        f"f32[{lead},{kept},16]" for lead in leads for kept in {2, *(kv.cache_size(cfg, k) for k in KINDS)}
    }
    held = [b for b in bodies if any(shape in b for shape in cached)]
    assert held, "no loop carries a cache: this test looks at the wrong program"
    for body in held:
        copied = [line for line in body.splitlines() if re.search(r"= f32\[[\d,]+\]\S* copy\(", line)]
        assert not [line for line in copied if any(f"= {shape}" in line for shape in cached)], copied


def test_memory_grows_by_the_cache_alone():
    """Four times the tokens take the larger cache and a few numbers each: no scores and no streams are kept."""
    size = {}
    for grid in (4, 8):
        cfg = dataclasses.replace(
            CFG, grid=grid, text_len=2, dim=32, image_vocab=4096, attention=("full", "column")
        )
        params = jax.eval_shape(
            lambda key, cfg=cfg: autoregressive.prepare_for_decode(cfg, dalle.init(cfg, key)),
            jax.random.key(0),
        )
        text = jax.ShapeDtypeStruct((2, 2), jnp.int32)
        program = generate.lower(cfg, params, text, jax.eval_shape(lambda: row_keys([0, 1]))).compile()
        cache = jax.eval_shape(lambda cfg=cfg: dalle.init_cache(cfg, 2))
        held = sum(leaf.size * 4 for leaf in jax.tree.leaves(cache))
        size[cfg.num_codes] = program.memory_analysis().temp_size_in_bytes, held
    (small, few), (large, many) = size.values()
    assert many - few > 40_000 and small > few
    assert (
        large - small <= (many - few) + 48 * 4 * 32
    )  # 32 numbers a token: a hundredth of its scores of two rows
