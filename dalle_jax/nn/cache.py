"""KV caches that keep and read only what an attention kind can see (Ramesh et al. 2021, 2102.12092, B.1).

What an image token sees lies no farther back than its kind reaches (`masks.seen_back`), so a layer keeps no more
than that: a ring of G + 1 tokens for row, a ring of the window's span for conv. A column layer
keeps every token, column by column, and reads the G of one column. Full keeps and reads the whole raster.
Text keys are held apart, once per caption: rows that draw the same caption share them.
B rows, C captions, T text positions, G side of the grid, N = G * G image tokens, W tokens kept, R tokens read,
Q positions computed now, S positions seen, H heads, K width of a head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import DalleConfig
from dalle_jax.config.dalle import AttentionKind
from dalle_jax.nn.masks import attention_mask, seen_back
from dalle_jax.nn.sharding import constrain


class KV(NamedTuple):
    """Keys and values, each (rows, positions, H, K)."""

    k: jax.Array
    v: jax.Array


class LayerCache(NamedTuple):
    """text: groups of captions, each (C, T, H, K); the B rows of `image` are, in order, B_i of each group,
    B_i / C_i neighbours on one caption. image: (B, W, H, K); slots not yet written are never seen."""

    text: tuple[KV, ...]
    image: KV


def kept(cfg: DalleConfig, kind: AttentionKind) -> int:
    """W: image tokens whose keys a layer of this kind keeps."""
    if kind in ("full", "column"):
        return cfg.num_codes
    return 1 + int(np.flatnonzero(seen_back(kind, cfg.grid, cfg.conv_kernel).any(axis=0))[-1])


def read(cfg: DalleConfig, kind: AttentionKind) -> int:
    """R: image tokens that one step of a layer of this kind reads, at most."""
    return cfg.grid if kind == "column" else kept(cfg, kind)


def empty(cfg: DalleConfig, kind: AttentionKind, rows: int) -> KV:
    """Zeros for the image tokens of `rows` rows, in the compute dtype."""
    zeros = jnp.zeros((rows, kept(cfg, kind), cfg.heads, cfg.head_dim), cfg.dtype)
    zeros = constrain(zeros, "batch", None, "heads", None)
    return KV(zeros, zeros)


def _slot(cfg: DalleConfig, kind: AttentionKind, place):
    """Where the token of a raster place is kept."""
    if kind == "column":
        return place % cfg.grid * cfg.grid + place // cfg.grid
    return place % kept(cfg, kind)


def fill(cfg: DalleConfig, kind: AttentionKind, new: KV) -> KV:
    """The cache after the first P image tokens, whose keys and values `new` holds, (B, P, H, K)."""
    rows, given = new.k.shape[:2]
    cache = empty(cfg, kind, rows)
    first = max(0, given - kept(cfg, kind)) if kind != "column" else 0
    slots = _slot(cfg, kind, np.arange(first, given))
    return KV(*(c.at[:, slots].set(n[:, first:]) for c, n in zip(cache, new, strict=True)))


def write(cfg: DalleConfig, kind: AttentionKind, cache: KV, new: KV, place: jax.Array) -> KV:
    """Puts one token per row, (B, 1, H, K), at raster `place`: one for all rows, or int32 (B,)."""
    slot = _slot(cfg, kind, place)
    if place.ndim:
        rows = jnp.arange(len(place))
        return KV(*(c.at[rows, slot].set(n[:, 0]) for c, n in zip(cache, new, strict=True)))
    start = (0, slot, 0, 0)
    return KV(*(jax.lax.dynamic_update_slice(c, n, start) for c, n in zip(cache, new, strict=True)))


def window(
    cfg: DalleConfig, kind: AttentionKind, cache: KV, place: jax.Array, limit: int | None = None
) -> tuple[KV, jax.Array]:
    """What a query at raster `place`, scalar or (B,), reads: (B, R, H, K), and which of it it sees, (1 or B, R).

    limit: full layers read this many tokens; `place` must lie below it.
    """
    places = jnp.atleast_1d(place)[:, None]
    if kind == "column":
        first = places[:, 0] % cfg.grid * cfg.grid

        def column(x):
            if not place.ndim:
                return jax.lax.dynamic_slice_in_dim(x, first[0], cfg.grid, axis=1)
            return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, cfg.grid))(x, first)

        return KV(column(cache.k), column(cache.v)), jnp.arange(cfg.grid)[None] <= places // cfg.grid
    if kind == "full":
        size = cfg.num_codes if limit is None else min(limit, cfg.num_codes)
        return KV(cache.k[:, :size], cache.v[:, :size]), jnp.arange(size)[None] <= places
    size = kept(cfg, kind)
    back = (places - jnp.arange(size)[None]) % size
    table = jnp.asarray(seen_back(kind, cfg.grid, cfg.conv_kernel)[:, :size])
    return cache, table[places % len(table), back] & (back <= places)


def attend_text(cfg: DalleConfig, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Captions among themselves, (C, T, H, K) each: position t sees 0 to t."""
    length = q.shape[1]
    causal = jnp.asarray(attention_mask("full", length, 1)[:length, :length])
    return _attend(q, (), KV(k, v), causal[None])


def attend_first(
    cfg: DalleConfig, kind: AttentionKind, text: tuple[KV, ...], q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """The first P image tokens of each row, (B, P, H, K) each, over their captions and each other."""
    t, given = cfg.text_len, q.shape[1]
    mask = attention_mask(kind, t, cfg.grid, cfg.conv_kernel)[t : t + given, t : t + given]
    return _attend(q, text, KV(k, v), jnp.asarray(mask)[None])


def attend_step(
    cfg: DalleConfig,
    kind: AttentionKind,
    cache: LayerCache,
    new: tuple[jax.Array, jax.Array, jax.Array],
    place: jax.Array,
    limit: int | None = None,
) -> tuple[jax.Array, LayerCache]:
    """One token per row: `new` is its query, key and value, (B, 1, H, K) each. Returns (B, 1, H, K)."""
    q, k, v = new
    image = write(cfg, kind, cache.image, KV(k, v), place)
    seen, visible_BR = window(cfg, kind, image, place, limit)
    return _attend(q, cache.text, seen, visible_BR[:, None]), LayerCache(cache.text, image)


def _attend(q_BQHK, text: tuple[KV, ...], image: KV, visible_BQS: jax.Array) -> jax.Array:
    """One softmax, in float32, over all of the text and what is visible of `image`."""
    scaled = q_BQHK * (1.0 / math.sqrt(q_BQHK.shape[-1]))
    scores = _scores(scaled, image.k)
    scores = jnp.where(visible_BQS[:, None], scores, jnp.finfo(jnp.float32).min)
    if text:
        parts = [_scores(q, kv.k) for q, kv in zip(_groups(scaled, text), text, strict=True)]
        scores = jnp.concatenate([jnp.concatenate(parts), scores], axis=-1)
    att_BHQS = jax.nn.softmax(scores, axis=-1).astype(image.v.dtype)
    if not text:
        return _mix(att_BHQS, image.v)
    t = text[0].k.shape[1]
    parts = [_mix(a, kv.v) for a, kv in zip(_groups(att_BHQS[..., :t], text), text, strict=True)]
    return jnp.concatenate(parts) + _mix(att_BHQS[..., t:], image.v)


def _groups(x: jax.Array, text: tuple[KV, ...]) -> list[jax.Array]:
    """The rows of `x` by group of captions: the last group is one caption for as many rows as the others have.

    With one group it has all rows.
    """
    if len(text) == 1:
        return [x]
    half = len(x) // 2
    return [x[:half], x[half:]]


def _scores(q_BQHK: jax.Array, k_CSHK: jax.Array) -> jax.Array:
    """float32 (B, H, Q, S), B / C neighbouring rows on each of C."""
    rows, queries, heads, width = q_BQHK.shape
    q = q_BQHK.reshape(len(k_CSHK), -1, queries, heads, width)
    s = jnp.einsum("cnqhk,cshk->cnhqs", q, k_CSHK, preferred_element_type=jnp.float32)
    return s.reshape(rows, heads, queries, -1)


def _mix(att_BHQS: jax.Array, v_CSHK: jax.Array) -> jax.Array:
    """(B, Q, H, K): the values weighted."""
    rows, heads, queries, seen = att_BHQS.shape
    a = att_BHQS.reshape(len(v_CSHK), -1, heads, queries, seen)
    y = jnp.einsum("cnhqs,cshk->cnqhk", a, v_CSHK)
    return y.reshape(rows, queries, heads, -1)
