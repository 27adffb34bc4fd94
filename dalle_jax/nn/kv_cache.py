"""KV caches that keep and read only what an attention kind can see (Ramesh et al. 2021, 2102.12092, B.1).

What an image token sees lies no farther back than its kind reaches (`masks.causal_offset_mask`), so a layer keeps no more
than that: a ring of G + 1 tokens for row, a ring of the window's span for conv. A column layer
keeps every token, column by column, and reads the G of one column. Full keeps and reads the whole raster.
Text keys are held apart, once per caption: rows that draw the same caption share them.
Heads stand before positions, so that the products of a step run over neighbouring memory: on a CPU core about
twice as fast as the other order at batch 8 (benchmarks/RESULTS.md).
B rows, C captions, T text positions, G side of the grid, N = G * G image tokens, W tokens kept, R tokens read,
Q positions computed now, S positions seen, H heads, K width of a head.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import DalleConfig
from dalle_jax.config.dalle import AttentionKind
from dalle_jax.nn.masks import attention_mask, causal_offset_mask, mask_padding
from dalle_jax.parallel.sharding import constrain


class KV(NamedTuple):
    """Keys and values, each (rows, H, positions, K)."""

    k: jax.Array
    v: jax.Array


class LayerCache(NamedTuple):
    """text: groups of captions, each (C, H, T, K); the B rows of `image` are, in order, B_i of each group,
    B_i / C_i neighbours on one caption. image: (B, H, W, K); slots not yet written are never seen. seen: of each group,
    which text positions are, bool (C, T); () where all are."""

    text: tuple[KV, ...]
    image: KV
    text_mask: tuple[jax.Array, ...] = ()


def cache_size(cfg: DalleConfig, kind: AttentionKind) -> int:
    """W: image tokens whose keys a layer of this kind keeps."""
    if kind in ("full", "column"):
        return cfg.num_codes
    return 1 + int(np.flatnonzero(causal_offset_mask(kind, cfg.grid, cfg.conv_kernel).any(axis=0))[-1])


def max_read(cfg: DalleConfig, kind: AttentionKind) -> int:
    """R: image tokens that one step of a layer of this kind reads, at most."""
    return cfg.grid if kind == "column" else cache_size(cfg, kind)


def init_kv(cfg: DalleConfig, kind: AttentionKind, rows: int) -> KV:
    """Zeros for the image tokens of `rows` rows, in the compute dtype."""
    zeros = jnp.zeros((rows, cfg.heads, cache_size(cfg, kind), cfg.head_dim), cfg.dtype)
    zeros = constrain(zeros, "batch", "heads", None, None)
    return KV(zeros, zeros)


def to_cache_layout(k: jax.Array, v: jax.Array) -> KV:
    """Keys and values as layers make them, (rows, positions, H, K), in the order of the cache."""
    return KV(k.swapaxes(1, 2), v.swapaxes(1, 2))


def slot_index(cfg: DalleConfig, kind: AttentionKind, position):
    """Where the token of a raster place is kept."""
    if kind == "column":
        return position % cfg.grid * cfg.grid + position // cfg.grid
    return position % cache_size(cfg, kind)


def resize_kv(cfg: DalleConfig, kind: AttentionKind, cache: KV, size: int) -> KV:
    """A full layer's cache with room for the first `size` image tokens, so that a step reads no more; others stay.

    What is cut off is lost; room that is added is not yet written.
    """
    if kind != "full":
        return cache
    more = max(0, size - cache.k.shape[2])
    return KV(*(jnp.pad(x[:, :, :size], ((0, 0), (0, 0), (0, more), (0, 0))) for x in cache))


def init_from_prefix(cfg: DalleConfig, kind: AttentionKind, prefix_kv: KV) -> KV:
    """The cache after the first P image tokens, whose keys and values `new` holds, (B, H, P, K)."""
    rows, given = len(prefix_kv.k), prefix_kv.k.shape[2]
    cache = init_kv(cfg, kind, rows)
    first = max(0, given - cache_size(cfg, kind)) if kind != "column" else 0
    slots = slot_index(cfg, kind, np.arange(first, given))
    return KV(*(c.at[:, :, slots].set(n[:, :, first:]) for c, n in zip(cache, prefix_kv, strict=True)))


def write_kv(cfg: DalleConfig, kind: AttentionKind, cache: KV, new_kv: KV, position: jax.Array) -> KV:
    """Puts one token per row, (B, H, 1, K), at raster `place`: one for all rows, or int32 (B,)."""
    where = slot_index(cfg, kind, position)

    def put(c, n):
        if (
            position.ndim == 0 and len(n) == 1
        ):  # without the axis of rows: `flat` in sampling/generate.py says why
            c, n = c[0], n[0]
        if position.ndim or kind == "column":
            # For columns always: XLA joins a slice that is written with one that is read, and copies the cache for it.
            first = jnp.arange(len(n))
            if n.ndim == 3:
                c = c.at[first, jnp.broadcast_to(where, len(n))].set(n[:, 0])
            else:
                c = c.at[first, :, jnp.broadcast_to(where, len(n))].set(n[:, :, 0])
        else:
            c = jax.lax.dynamic_update_slice_in_dim(c, n, where, axis=c.ndim - 2)
        return c.reshape(-1, *c.shape[-3:])

    return KV(*map(put, cache, new_kv))


def slot_mask(cfg: DalleConfig, kind: AttentionKind, num_slots: int, position: jax.Array) -> jax.Array:
    """Which of R slots a query at raster `place`, scalar or (B,), sees: bool (1 or B, R). They are those of a column,
    or all `slots` of the cache."""
    places = jnp.atleast_1d(position)[:, None]
    if kind == "column":
        return jnp.arange(cfg.grid)[None] <= places // cfg.grid
    if kind == "full":
        return jnp.arange(num_slots)[None] <= places
    size = cache_size(cfg, kind)
    back = (places - jnp.arange(size)[None]) % size
    table = jnp.asarray(causal_offset_mask(kind, cfg.grid, cfg.conv_kernel)[:, :size])
    return table[places % len(table), back] & (back <= places)


def gather_window(
    cfg: DalleConfig, kind: AttentionKind, cache: KV, position: jax.Array
) -> tuple[KV, jax.Array]:
    """What a query at raster `place`, scalar or (B,), reads: (B, H, R, K), and which of it it sees, (1 or B, R)."""
    seen_BR = slot_mask(cfg, kind, cache.k.shape[2], position)
    if kind != "column":
        return cache, seen_BR
    first = position % cfg.grid * cfg.grid

    def column(x):
        if not position.ndim:
            return jax.lax.dynamic_slice_in_dim(x, first, cfg.grid, axis=2)
        return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, cfg.grid, axis=1))(x, first)

    return KV(column(cache.k), column(cache.v)), seen_BR


def attend_text(q: jax.Array, k: jax.Array, v: jax.Array, text_mask_CT: jax.Array | None = None) -> jax.Array:
    """Captions among themselves, (C, T, H, K) each: position t sees itself and, of 0 to t, what is seen."""
    causal = jnp.tri(q.shape[1], dtype=bool)
    return attend_cached(
        q,
        (),
        (to_cache_layout(k, v),),
        causal[None] if text_mask_CT is None else mask_padding(causal, text_mask_CT),
    )


def attend_prefix(
    cfg: DalleConfig,
    kind: AttentionKind,
    text: tuple[KV, ...],
    text_mask: tuple[jax.Array, ...],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> jax.Array:
    """The first P image tokens of each row, (B, P, H, K) each, over their captions and each other."""
    t, given = cfg.text_len, q.shape[1]
    mask = attention_mask(kind, t, cfg.grid, cfg.conv_kernel)[t : t + given, t : t + given]
    return attend_cached(q, text, (to_cache_layout(k, v),), jnp.asarray(mask)[None], text_mask)


def attend_step(
    cfg: DalleConfig,
    kind: AttentionKind,
    cache: LayerCache,
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    position: jax.Array,
) -> tuple[jax.Array, LayerCache]:
    """One token per row: `new` is its query, key and value, (B, 1, H, K) each. Returns (B, 1, H, K)."""
    q, k, v = qkv
    image = write_kv(cfg, kind, cache.image, to_cache_layout(k, v), position)
    found, visible_BR = gather_window(cfg, kind, image, position)
    y_BQHK = attend_cached(q, cache.text, (found,), visible_BR[:, None], cache.text_mask)
    return y_BQHK, cache._replace(image=image)


def attend_cached(
    q_BQHK: jax.Array,
    text: tuple[KV, ...],
    image: tuple[KV, ...],
    mask_BQS: jax.Array,
    text_mask: tuple[jax.Array, ...] = (),
) -> jax.Array:
    """One softmax, in float32, over the text, all of it or what is seen, and what is visible of the parts of `image`,
    in their order.

    Returns (B, Q, H, K).
    """
    q_BHQK = (q_BQHK * (1.0 / math.sqrt(q_BQHK.shape[-1]))).swapaxes(1, 2)
    scores = [_scores(q_BHQK, part.k) for part in image]
    scores = scores[0] if len(image) == 1 else jnp.concatenate(scores, axis=-1)
    scores = jnp.where(mask_BQS[:, None], scores, jnp.finfo(jnp.float32).min)
    if text:
        if q_BHQK.shape[2] > 1:
            # Or XLA makes one product of this and the last on a GPU, for which it copies both caches side by side.
            q_BHQK = jax.lax.optimization_barrier(q_BHQK)
        parts = [_scores(q, kv.k) for q, kv in zip(_groups(q_BHQK, text), text, strict=True)]
        if text_mask:
            parts = [_hidden(part, seen_CT) for part, seen_CT in zip(parts, text_mask, strict=True)]
        scores = jnp.concatenate([jnp.concatenate(parts), scores], axis=-1)
    att_BHQS = jax.nn.softmax(scores, axis=-1).astype(image[0].v.dtype)
    found, at = None, 0
    if text:
        at = text[0].k.shape[2]
        parts = [_mix(a, kv.v) for a, kv in zip(_groups(att_BHQS[..., :at], text), text, strict=True)]
        found = jnp.concatenate(parts)
    for part in image:
        end = at + part.k.shape[2]
        mixed = _mix(att_BHQS[..., at:end], part.v)
        found, at = mixed if found is None else found + mixed, end
    return found.swapaxes(1, 2)


def _hidden(scores_BHQT: jax.Array, seen_CT: jax.Array) -> jax.Array:
    seen_BT = jnp.repeat(seen_CT, len(scores_BHQT) // len(seen_CT), axis=0)
    return jnp.where(seen_BT[:, None, None], scores_BHQT, jnp.finfo(jnp.float32).min)


def _groups(x: jax.Array, text: tuple[KV, ...]) -> list[jax.Array]:
    """The rows of `x` by group of captions: the last group is null captions for as many rows as the others have.

    With one group it has all rows.
    """
    if len(text) == 1:
        return [x]
    half = len(x) // 2
    return [x[:half], x[half:]]


def _scores(q_BHQK: jax.Array, k_CHSK: jax.Array) -> jax.Array:
    """float32 (B, H, Q, S), B / C neighbouring rows on each of C."""
    return _per_caption("chqk,chsk->chqs", q_BHQK, k_CHSK, jnp.float32)


def _mix(att_BHQS: jax.Array, v_CHSK: jax.Array) -> jax.Array:
    """(B, H, Q, K): the values weighted."""
    return _per_caption("chqs,chsk->chqk", att_BHQS, v_CHSK, v_CHSK.dtype)


def _per_caption(product: str, x_BHQX: jax.Array, y_CHSK: jax.Array, dtype: Any) -> jax.Array:
    """`product` of the queries of all rows on a caption, laid one after another, with what the caption has."""
    rows, heads, queries, width = x_BHQX.shape
    captions = len(y_CHSK)
    x = x_BHQX.reshape(captions, -1, heads, queries, width).swapaxes(1, 2)
    x = x.reshape(captions, heads, -1, width)
    out = jnp.einsum(product, x, y_CHSK, preferred_element_type=dtype)
    out = out.reshape(captions, heads, rows // captions, queries, -1).swapaxes(1, 2)
    return out.reshape(rows, heads, queries, -1)
