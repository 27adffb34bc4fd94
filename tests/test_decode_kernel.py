"""The GPU kernel of a decode step, interpreted, is the path of XLA: for every kind of layer, place and batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampling import CAPTIONS, TINY, lively

from dalle_jax import autoregressive
from dalle_jax.config import BartConfig, DalleConfig, MeshConfig
from dalle_jax.inference import Sampling
from dalle_jax.nn import cache as kv
from dalle_jax.nn import decode_kernel
from dalle_jax.nn.cache import KV, LayerCache
from dalle_jax.nn.sharding import make_mesh
from dalle_jax.sampling.generate import generate, generate_rows, row_keys
from dalle_jax.sampling.queue import Queue, Request

KINDS = ("full", "row", "column", "conv", "conv_clamped")
CFG = DalleConfig(
    text_vocab=20, text_len=11, image_vocab=37, grid=5, dim=32, layers=1, heads=2, conv_kernel=3, dtype="float32"
)  # fmt: skip


def job(cfg, kind, captions, copies, *, guided=False, room=None, seen=False, seed=0):
    """A cache full of random numbers and the new query, key and value of each row."""
    rng = np.random.default_rng(seed)

    def random(*shape):
        return jnp.asarray(rng.normal(size=shape), cfg.dtype)

    counts = (captions, captions if seen else 1)[: 1 + guided]
    rows = captions * copies * len(counts)
    pair = (cfg.heads, cfg.text_len, cfg.head_dim)
    text = tuple(KV(random(n, *pair), random(n, *pair)) for n in counts)
    shape = kv.empty(cfg, kind, rows).k.shape
    image = kv.resized(cfg, kind, KV(random(*shape), random(*shape)), room or cfg.num_codes)
    masks = tuple(jnp.asarray(rng.random((n, cfg.text_len)) < 0.6) for n in counts) if seen else ()
    new = tuple(random(rows, 1, cfg.heads, cfg.head_dim) for _ in range(3))
    return LayerCache(text, image, masks), new


def assert_same(cfg, kind, cache, new, place):
    """To rounding: of float32, or of bfloat16, in which XLA rounds the weights before the sum and the kernel after."""
    place = jnp.asarray(place, jnp.int32)
    want = jax.jit(kv.attend_step, static_argnums=(0, 1))(cfg, kind, cache, new, place)
    run = jax.jit(decode_kernel.attend_step, static_argnums=(0, 1), static_argnames="interpret")
    got = run(cfg, kind, cache, new, place, interpret=True)
    near = 2e-6 if cfg.dtype == "float32" else 2e-2
    np.testing.assert_allclose(got[0].astype(jnp.float32), want[0].astype(jnp.float32), rtol=0, atol=near)
    assert got[0].dtype == want[0].dtype
    for x, y in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_and_places(kind):
    """The first place, the last, and those between where a ring comes round and a column begins."""
    cache, new = job(CFG, kind, 2, 2)
    for place in (0, 4, 5, 7, 18, 24):
        assert_same(CFG, kind, cache, new, place)


@pytest.mark.parametrize("kind", ["full", "column", "conv_torus"])
def test_each_row_at_its_own_place(kind):
    cache, new = job(CFG, kind, 4, 1)
    assert_same(CFG, kind, cache, new, [0, 7, 24, 12])


@pytest.mark.parametrize("programs", [1, 32])
def test_captions_and_copies(programs, monkeypatch):
    """Rows that share a caption, four in a program, two, or alone with the blocks of a head shared by several; null
    captions, once and for each; texts of which not all is seen; a cache with room for a part."""
    monkeypatch.setattr(decode_kernel, "PROGRAMS", programs)
    monkeypatch.setattr(decode_kernel, "HELD", 256)
    jax.clear_caches()  # programs of other numbers
    for captions, copies, guided, seen in ((1, 4, True, False), (2, 2, True, True), (3, 1, False, True)):
        cache, new = job(CFG, "full", captions, copies, guided=guided, seen=seen, room=10)
        assert_same(CFG, "full", cache, new, 6)


def test_plan_by_hand():
    """Few rows: programs share the blocks of a head, as many as there are. Many: rows on one caption share it."""
    plan = functools.partial(decode_kernel._plan, heads=32, width=64, text=256, read=64, apart=False)
    assert plan(1, (1,)) == (1, 4)  # 4 blocks of text and one of the image
    assert plan(4, (4,)) == (1, 2)  # 128 programs
    assert plan(128, (1, 1)) == (4, 1)  # 64 copies of a caption, and of the null caption
    assert plan(128, (64, 1)) == (1, 1)
    assert plan(96, (16, 1)) == (1, 1)  # 3 copies each
    assert plan(128, (1, 1), apart=True) == (1, 1)


def test_a_caption_of_which_nothing_is_seen():
    cache, new = job(CFG, "row", 2, 1, seen=True)
    assert_same(CFG, "row", cache._replace(seen=(jnp.zeros_like(cache.seen[0]),)), new, 0)


def test_bfloat16():
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    cache, new = job(cfg, "conv", 2, 4, guided=True)
    assert_same(cfg, "conv", cache, new, 13)


# --- the choice ------------------------------------------------------------------------------------------


def test_pictures_are_those_of_xla():
    """Through `generate_rows` and the queue, guided; products by the kernels of linear_kernel.py too."""
    cfg = dataclasses.replace(TINY, attention=("row",), layers=1)
    params, options = lively(cfg), {"guidance": jnp.float32(2.0), "top_k": 5}
    args = cfg, params, CAPTIONS[:1], row_keys([3, 4])
    want = np.asarray(generate(*args, **options))
    options["kernels"] = "pallas-interpret"
    np.testing.assert_array_equal(list(generate_rows(*args, rows=3, **options))[-1], want)
    queue = Queue(cfg, params, 2, top_k=5, kernels="pallas-interpret")
    for seed in (3, 4):
        queue.submit(Request(np.asarray(CAPTIONS[0]), seed, guidance=2.0))
    np.testing.assert_array_equal([codes for _, codes in sorted(queue.drain())], want)


def test_where_it_cannot_run():
    args = TINY, lively(TINY), CAPTIONS[:1], row_keys([0])
    with pytest.raises(ValueError, match="kernels pallas needs an NVIDIA GPU, jax runs on cpu; take xla"):
        generate(*args, kernels="pallas")
    with pytest.raises(ValueError, match="pallas draws one code a pass; leave out jacobi, or take xla"):
        generate(*args, kernels="pallas", jacobi=2)
    with pytest.raises(ValueError, match="pallas draws one code a pass; leave out jacobi, or take xla"):
        Sampling(kernels="pallas", jacobi=2)
    with pytest.raises(ValueError, match="kernels is 'cuda'; want one of xla, pallas, pallas-interpret"):
        generate(*args, kernels="cuda")
    with pytest.raises(ValueError, match="width is a power of two, up to 4096; these are 24 wide: take xla"):
        decode_kernel.chosen("pallas-interpret", dataclasses.replace(TINY, dim=48, heads=2))
    with (
        jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, model=2))),
        pytest.raises(ValueError, match="draws on one device, the mesh has 8: take xla"),
    ):
        decode_kernel.chosen("pallas-interpret", TINY)
    with pytest.raises(ValueError, match="pallas draws with a Transformer of one stream, not with this one"):
        autoregressive.decode_step(BartConfig(), {}, (), jnp.zeros(1, jnp.int32), 0, "pallas")
