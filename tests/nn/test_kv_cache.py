"""Laws of the KV caches of sparse attention: their sizes are those of the paper, and they change no logit."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CAPTIONS, TINY, captioned_params, uncached_logits

from dalle_jax.config import DalleConfig, MeshConfig
from dalle_jax.models import autoregressive, dalle
from dalle_jax.nn import kv_cache as kv
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.sampling.generate import generate, generate_stream, row_keys

KINDS = ("full", "row", "column", "conv")
# A raster long enough that the ring buffers of row (6 tokens) and conv (7) wrap around several times.
CFG = dataclasses.replace(TINY, grid=5, attention=KINDS, layers=4)
N, V = CFG.num_codes, CFG.image_vocab
PAPER = DalleConfig()
# Prefixes shorter than a ring buffer, as long, longer, and longer than two of them.
PREFIXES = {"full": (6,), "row": (4, 6, 13), "column": (7,), "conv": (6, 7, 16)}


@pytest.fixture(scope="module")
def codes():
    return jnp.asarray(np.random.default_rng(1).integers(0, V, (3, N)), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def decode_steps(cfg, params, cache, codes_BN, positions_LB):
    """Logits (L, B, V) of consecutive steps, each of which feeds the code at its position, a scalar or one per row."""

    def step(cache, position):
        code_B = codes_BN[jnp.arange(len(codes_BN)), position]
        logits, cache = dalle.decode_step(cfg, params, cache, code_B, position)
        return cache, logits

    return jax.lax.scan(step, cache, positions_LB)


def pair_heads(monkeypatch):
    """Hold two heads side by side as on a TPU. The model must differ from those of other tests: jit ignores this."""
    monkeypatch.setattr(kv, "heads_per_group", lambda heads, head_dim: 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [2, 4])
def test_cache_matches_full_forward_at_every_position(kind, heads, codes, monkeypatch):
    """Step by step, and after a prefix, whose prefill gives the cache of single steps. Four heads are in two groups."""
    cfg = dataclasses.replace(CFG, attention=(kind,), layers=2, heads=heads)
    if heads == 4:
        pair_heads(monkeypatch)
    params = captioned_params(cfg)
    ready = autoregressive.prepare_for_decode(cfg, params)
    want = uncached_logits(cfg, params, CAPTIONS, codes)
    fill = jax.jit(dalle.prefill, static_argnums=0)
    _, cache = fill(cfg, ready, CAPTIONS)
    assert cache[0].text[0].k.shape == (3, 2, 3, 16 // 2) == (*cache[0].image.k.shape[:2], 3, 8)
    by_steps = []  # the caches of single steps
    for position in range(N - 1):
        cache, logits = decode_steps(cfg, ready, cache, codes, jnp.array([position]))
        np.testing.assert_allclose(logits[0], want[:, position + 1], rtol=2e-4, atol=2e-4)
        by_steps.append(cache)
    for prefix_len in PREFIXES[kind]:
        first, cache = fill(cfg, ready, CAPTIONS, codes[:, :prefix_len])
        np.testing.assert_allclose(first, want[:, prefix_len], rtol=2e-4, atol=2e-4)
        for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(by_steps[prefix_len - 1]), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)
    assert want.std() > 0.3


def test_rows_at_different_positions(codes):
    """In caches that still hold other images, each row has the logits of the full forward pass."""
    params = captioned_params(CFG)
    ready = autoregressive.prepare_for_decode(CFG, params)
    want = uncached_logits(CFG, params, CAPTIONS, codes)
    _, cache = dalle.prefill(CFG, ready, CAPTIONS)
    other = (codes + 3) % V
    cache, _ = decode_steps(
        CFG, ready, cache, other, jnp.arange(N - 1)
    )  # an older image has filled every slot
    start = np.array([0, -4, -9])
    for t in range(N - 1):
        position = np.maximum(start + t, 0)  # a row that has not started feeds position 0 repeatedly
        cache, logits = decode_steps(CFG, ready, cache, codes, jnp.asarray(position)[None])
        np.testing.assert_allclose(logits[0], want[np.arange(3), position + 1], rtol=2e-4, atol=2e-4)


def test_heads_side_by_side_change_no_image(monkeypatch):
    """With guidance, several samples per caption, a prefix and drafts."""
    apart = dataclasses.replace(CFG, heads=4, dim=32)
    paired = dataclasses.replace(apart, remat="full")  # traced on its own
    params = captioned_params(apart)
    for options in ({}, {"guidance_scale": 3.0}, {"guidance_scale": 3.0, "draft_len": 5}):
        want = generate(apart, params, CAPTIONS[:2], row_keys(range(4)), **options)
        with monkeypatch.context() as patch:
            pair_heads(patch)
            got = generate(paired, params, CAPTIONS[:2], row_keys(range(4)), **options)
            np.testing.assert_array_equal(got, want)
            again = generate(
                paired, params, CAPTIONS[:2], row_keys(range(4)), prefix_codes=want[:, :7], **options
            )
            np.testing.assert_array_equal(again, want)


def test_heads_per_group(monkeypatch):
    """Heads fill the 128 lanes of a TPU, except where a group would cross devices."""
    assert kv.heads_per_group(62, 64) == 1
    monkeypatch.setattr(kv, "mesh_platform", lambda: "tpu")
    shapes = [(62, 64), (32, 64), (16, 128), (8, 32), (3, 64), (6, 32), (4, 96), (2, 256)]
    assert [kv.heads_per_group(*shape) for shape in shapes] == [2, 2, 1, 4, 1, 1, 1, 1]
    with jax.set_mesh(make_mesh(MeshConfig(data=4, fsdp=1, model=2))):
        assert kv.heads_per_group(62, 64) == 1 and kv.heads_per_group(64, 64) == 2


def test_cache_sizes_of_the_paper():
    """Of 1024 image tokens full and column layers store all, row layers 33, conv layers the span of the window."""
    assert [kv.cache_size(PAPER, kind) for kind in KINDS] == [1024, 33, 1024, 5 * 32 + 5 + 1]
    cache = jax.eval_shape(lambda: dalle.init_cache(PAPER, 2, 3, use_cfg=True))
    rows = 2 * 3 * 2
    image = sum(layer.image.k.shape[2] for layer in cache)
    assert image == 47 * 33 + 16 * 1024 + 166
    for layer in cache:
        assert [kv_.k.shape for kv_ in layer.text] == [(2, 62, 256, 64), (1, 62, 256, 64)]
        assert layer.image.k.shape[0] == rows and layer.image.k.dtype == jnp.bfloat16


def test_a_resized_cache_matches_full_forward(codes):
    """Caches of full layers that grow as tokens are added change no logit."""
    cfg = dataclasses.replace(CFG, attention=("full", "row"), layers=2)
    params = captioned_params(cfg)
    ready = autoregressive.prepare_for_decode(cfg, params)
    want = uncached_logits(cfg, params, CAPTIONS, codes)
    _, cache = jax.jit(dalle.prefill, static_argnums=0)(cfg, ready, CAPTIONS, codes[:, :6])
    for size, positions in ((10, range(6, 10)), (16, range(10, 16)), (N, range(16, N - 1))):
        cache = dalle.resize_cache(cfg, cache, size)
        assert [layer.image.k.shape[2] for layer in cache] == [size, 6]
        cache, logits = decode_steps(cfg, ready, cache, codes, jnp.array(positions))
        for position, got in zip(positions, logits, strict=True):
            np.testing.assert_allclose(got, want[:, position + 1], rtol=2e-4, atol=2e-4)


def test_samples_of_a_caption_share_its_prefill():
    """Several seeds per caption sample what each seed samples with its own copy of the caption."""
    params = captioned_params(CFG)
    seeds = row_keys(range(6))
    together = generate(CFG, params, CAPTIONS[:2], seeds, guidance_scale=3.0)
    apart = generate(CFG, params, jnp.repeat(CAPTIONS[:2], 3, axis=0), seeds, guidance_scale=3.0)
    np.testing.assert_array_equal(together, apart)
    assert len(np.unique(together, axis=0)) == 6


@pytest.mark.parametrize("prefix_len", [0, 7])
def test_stream_equals_generate(prefix_len):
    """Each part is the start of the image in whole raster rows; the last part is all of it."""
    params = captioned_params(CFG)
    options = {"guidance_scale": jnp.float32(2.0), "top_k": 5, "temperature": jnp.float32(0.8)}
    keys = row_keys([3, 4, 5])
    whole = generate(CFG, params, CAPTIONS, keys, **options)
    options |= {"prefix_codes": whole[:, :prefix_len]} if prefix_len else {}
    parts = list(generate_stream(CFG, params, CAPTIONS, keys, preview_rows=2, **options))
    for part in parts:
        np.testing.assert_array_equal(part, whole[:, : part.shape[1]])
    lengths = [part.shape[1] for part in parts]
    assert lengths == {0: [10, 20, 25], 7: [15, 25]}[prefix_len]
    with pytest.raises(ValueError, match="Expected preview_rows of at least 1, got 0"):
        next(generate_stream(CFG, params, CAPTIONS, keys, preview_rows=0))


def loop_bodies(text):
    """The bodies of loops in compiled HLO."""
    names = set(re.findall(r"body=%?([\w.\-]+)", text))
    blocks = re.split(r"\n(?=[%\w].*\{\n)", text)
    return [b for b in blocks if any(re.match(rf"%?{re.escape(n)} ", b) for n in names)]


def compile_generate(grid, draft_len=None, rows=2):
    cfg = dataclasses.replace(CFG, grid=grid, text_len=2, dim=32)
    params = autoregressive.prepare_for_decode(cfg, captioned_params(cfg))
    text = jnp.stack([dalle.null_text(cfg)] * rows)
    return cfg, generate.lower(
        cfg, params, text, row_keys(range(rows)), top_k=3, draft_len=draft_len
    ).compile()


@pytest.mark.parametrize(("draft_len", "rows"), [(None, 2), (5, 2), (None, 1)])
def test_the_decode_loop_copies_no_cache(draft_len, rows):
    """The compiled loop has no copy of the size of a cache, with the batch axis of a single row or without."""
    cfg, compiled = compile_generate(8, draft_len, rows)
    bodies = loop_bodies(compiled.as_text())
    leads = ("2,2",) if rows == 2 else ("1,2", "2")
    cached = {
        f"f32[{lead},{kept},16]" for lead in leads for kept in {2, *(kv.cache_size(cfg, k) for k in KINDS)}
    }
    held = [b for b in bodies if any(shape in b for shape in cached)]
    assert held, "no loop carries a cache: the test examines the wrong program"
    for body in held:
        copied = [line for line in body.splitlines() if re.search(r"= f32\[[\d,]+\]\S* copy\(", line)]
        assert not [line for line in copied if any(f"= {shape}" in line for shape in cached)], copied


def test_memory_grows_by_the_cache_alone():
    """Four times the tokens need the larger cache and a few numbers each: no logits or hidden states are kept."""
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
    )  # 32 numbers per token, a hundredth of its logits of two rows
