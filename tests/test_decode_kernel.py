"""The GPU kernel of a decode step, interpreted, is the path of XLA: for every kind of layer, place and batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.config import DalleConfig
from dalle_jax.nn import cache as kv
from dalle_jax.nn import decode_kernel
from dalle_jax.nn.cache import KV, LayerCache

KINDS = ("full", "row", "column", "conv", "conv_clamped", "conv_torus")
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
