"""KV caches that keep and read only what an attention kind attends to (Ramesh et al. 2021, 2102.12092, B.1).

An image token attends no farther back than its kind allows (`masks.causal_offset_mask`), so a layer keeps no more than
that: `row` has a ring buffer of G + 1 tokens, `conv` a ring buffer of the window's span. A `column` layer keeps every
token, column by column, and reads the G tokens of one column. `full` keeps and reads the whole raster. Keys and values
of text are held separately, once per caption: rows that sample the same caption share them.

Heads come before positions, so that the products of a step run over contiguous memory: on a CPU core about twice as
fast as the other order at batch 8 (benchmarks/RESULTS.md). A TPU pads the last axis of an array to 128 lanes, so there
heads of 64 channels are held in groups of two, side by side in that axis (`heads_per_group`), in half of the memory.

A position is the raster index of an image token, unless it is called a text position.
B rows, C captions, T text positions, G side of the raster, N = G * G image tokens, P prefix codes, W tokens kept, R
tokens read, Q queries, S keys, H heads, K width of a head, I heads per group, J = H / I groups, L = I * K width of a
group.
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
from dalle_jax.nn.products import einsum
from dalle_jax.parallel.sharding import constrain, mesh_platform, partition_spec

_TPU_LANES = 128


class KV(NamedTuple):
    """Keys and values, each (rows, J, positions, L)."""

    k: jax.Array
    v: jax.Array


class LayerCache(NamedTuple):
    """Cache of one layer.

    Attributes:
      text: keys and values of groups of captions, (C, J, T, L) each. The B rows of `image` are, in order, those of each
        group, with B_i / C_i adjacent rows on one caption.
      image: (B, J, W, L). Slots that are not written yet are masked.
      text_mask: for each group, which text positions are attended to, bool (C, T); () where all are.
    """

    text: tuple[KV, ...]
    image: KV
    text_mask: tuple[jax.Array, ...] = ()


def heads_per_group(heads: int, head_dim: int) -> int:
    """Return I, the heads that a cache holds side by side: on a TPU as many as fill its lanes, elsewhere 1.

    It is also 1 if the heads do not divide into such groups, or if the mesh divides the heads but not the groups.
    """
    size = max(1, _TPU_LANES // head_dim)
    if mesh_platform() != "tpu" or heads % size:
        return 1
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return size
    by_head, by_group = (partition_spec(mesh, ("heads",), (n,)) for n in (heads, heads // size))
    return size if by_head == by_group else 1


def cache_size(cfg: DalleConfig, kind: AttentionKind) -> int:
    """Return W, the image tokens that a layer of this kind keeps."""
    if kind in ("full", "column"):
        return cfg.num_codes
    return 1 + int(np.flatnonzero(causal_offset_mask(kind, cfg.grid, cfg.conv_kernel).any(axis=0))[-1])


def init_heads(cfg: DalleConfig, rows: int, positions: int) -> jax.Array:
    """Return zeros for keys or values, (rows, J, positions, L), in the compute dtype."""
    size = heads_per_group(cfg.heads, cfg.head_dim)
    return jnp.zeros((rows, cfg.heads // size, positions, size * cfg.head_dim), cfg.dtype)


def init_kv_cache(cfg: DalleConfig, kind: AttentionKind, rows: int) -> KV:
    """Return zeros for the image tokens of `rows` rows, in the compute dtype."""
    zeros = init_heads(cfg, rows, cache_size(cfg, kind))
    zeros = constrain(zeros, "batch", "heads", None, None)
    return KV(zeros, zeros)


def to_cache_layout(k: jax.Array, v: jax.Array) -> KV:
    """Convert keys and values of a layer, (rows, positions, H, K), to the cache's (rows, J, positions, L)."""
    size = heads_per_group(*k.shape[2:])
    if size > 1:
        k, v = (x.reshape(*x.shape[:2], x.shape[2] // size, -1) for x in (k, v))
    return _heads_first(k, v)


def _heads_first(k: jax.Array, v: jax.Array) -> KV:
    """Swap positions and heads of (rows, positions, H, K)."""
    return KV(k.swapaxes(1, 2), v.swapaxes(1, 2))


def slot_index(cfg: DalleConfig, kind: AttentionKind, position: Any) -> Any:
    """Return the cache slots of the tokens at positions, an integer array of NumPy or JAX."""
    if kind == "column":
        return position % cfg.grid * cfg.grid + position // cfg.grid
    return position % cache_size(cfg, kind)


def resize_kv(cfg: DalleConfig, kind: AttentionKind, cache: KV, size: int) -> KV:
    """Resize the cache of a full layer to the first `size` image tokens, so that a step reads no more.

    Tokens beyond `size` are lost; added slots are not written yet. Caches of other kinds are returned unchanged.
    """
    if kind != "full":
        return cache
    added = max(0, size - cache.k.shape[2])
    return KV(*(jnp.pad(x[:, :, :size], ((0, 0), (0, 0), (0, added), (0, 0))) for x in cache))


def init_from_prefix(cfg: DalleConfig, kind: AttentionKind, prefix_kv: KV) -> KV:
    """Return the cache after the first P image tokens, whose keys and values are (B, J, P, L)."""
    rows, prefix_len = len(prefix_kv.k), prefix_kv.k.shape[2]
    cache = init_kv_cache(cfg, kind, rows)
    first = max(0, prefix_len - cache_size(cfg, kind)) if kind != "column" else 0
    slots = slot_index(cfg, kind, np.arange(first, prefix_len))
    k, v = (old.at[:, :, slots].set(new[:, :, first:]) for old, new in zip(cache, prefix_kv, strict=True))
    return KV(k, v)


def _write_kv(cfg: DalleConfig, kind: AttentionKind, cache: KV, new_kv: KV, position: jax.Array) -> KV:
    """Write one token per row.

    Args:
      cfg: the model.
      kind: of the layer.
      cache: (B, J, W, L).
      new_kv: (B, J, 1, L).
      position: of the token, an int32 scalar for all rows, or int32 (B,).
    """
    slot = slot_index(cfg, kind, position)

    def write(old, new):
        if position.ndim == 0 and len(new) == 1:  # without the batch axis, see generate.squeeze_batch
            old, new = old[0], new[0]
        if position.ndim or kind == "column":
            # For columns always: XLA fuses a slice that is written with one that is read and copies the cache for it.
            rows = jnp.arange(len(new))
            if new.ndim == 3:
                old = old.at[rows, jnp.broadcast_to(slot, len(new))].set(new[:, 0])
            else:
                old = old.at[rows, :, jnp.broadcast_to(slot, len(new))].set(new[:, :, 0])
        else:
            old = jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=old.ndim - 2)
        return old.reshape(-1, *old.shape[-3:])

    return KV(write(cache.k, new_kv.k), write(cache.v, new_kv.v))


def _slot_mask(cfg: DalleConfig, kind: AttentionKind, num_slots: int, position: jax.Array) -> jax.Array:
    """Return which of the R slots that are read a query attends to.

    Args:
      cfg: the model.
      kind: of the layer.
      num_slots: of the cache of a full layer.
      position: of the query, an int32 scalar for all rows, or int32 (B,).

    Returns:
      bool (1 or B, R); R are the slots of one column for `column`, all slots for other kinds.
    """
    position_B1 = jnp.atleast_1d(position)[:, None]
    if kind == "column":
        return jnp.arange(cfg.grid)[None] <= position_B1 // cfg.grid
    if kind == "full":
        return jnp.arange(num_slots)[None] <= position_B1
    size = cache_size(cfg, kind)
    offset_BR = (position_B1 - jnp.arange(size)[None]) % size
    table = jnp.asarray(causal_offset_mask(kind, cfg.grid, cfg.conv_kernel)[:, :size])
    return table[position_B1 % len(table), offset_BR] & (offset_BR <= position_B1)


def _gather_window(
    cfg: DalleConfig, kind: AttentionKind, cache: KV, position: jax.Array
) -> tuple[KV, jax.Array]:
    """Return what the query at `position`, a scalar or (B,), reads, (B, J, R, L), and its mask, bool (1 or B, R)."""
    mask_BR = _slot_mask(cfg, kind, cache.k.shape[2], position)
    if kind != "column":
        return cache, mask_BR
    first = position % cfg.grid * cfg.grid

    def column(x):
        if not position.ndim:
            return jax.lax.dynamic_slice_in_dim(x, first, cfg.grid, axis=2)
        return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, cfg.grid, axis=1))(
            x, first
        )

    return KV(column(cache.k), column(cache.v)), mask_BR


def attend_text(q: jax.Array, k: jax.Array, v: jax.Array, text_mask_CT: jax.Array | None = None) -> jax.Array:
    """Compute causal attention of captions.

    Args:
      q: queries (C, T, H, K).
      k: keys (C, T, H, K).
      v: values (C, T, H, K).
      text_mask_CT: bool, which text positions are attended to; None is all. A position always attends to itself.

    Returns:
      (C, T, H, K).
    """
    causal_TT = jnp.tri(q.shape[1], dtype=bool)
    mask_CTT = causal_TT[None] if text_mask_CT is None else mask_padding(causal_TT, text_mask_CT)
    return attend_cached(q, (), (_heads_first(k, v),), mask_CTT)


def attend_prefix(
    cfg: DalleConfig,
    kind: AttentionKind,
    text: tuple[KV, ...],
    text_mask: tuple[jax.Array, ...],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> jax.Array:
    """Compute attention of the first P image tokens of each row to their captions and to each other.

    Args:
      cfg: the model.
      kind: of the layer.
      text: as in `LayerCache`.
      text_mask: as in `LayerCache`.
      q: queries (B, P, H, K).
      k: keys (B, P, H, K).
      v: values (B, P, H, K).

    Returns:
      (B, P, H, K).
    """
    start, prefix_len = cfg.text_len, q.shape[1]
    mask_TT = attention_mask(kind, start, cfg.grid, cfg.conv_kernel)
    mask_PP = jnp.asarray(mask_TT[start : start + prefix_len, start : start + prefix_len])
    return attend_cached(q, text, (_heads_first(k, v),), mask_PP[None], text_mask)


def attend_step(
    cfg: DalleConfig,
    kind: AttentionKind,
    cache: LayerCache,
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    position: jax.Array,
) -> tuple[jax.Array, LayerCache]:
    """Write one token per row to the cache and compute its attention.

    Args:
      cfg: the model.
      kind: of the layer.
      cache: after the tokens before `position`.
      qkv: query, key and value, (B, 1, H, K) each.
      position: of the token, an int32 scalar for all rows, or int32 (B,).

    Returns:
      (B, 1, H, K), and the new cache.
    """
    q, k, v = qkv
    image = _write_kv(cfg, kind, cache.image, to_cache_layout(k, v), position)
    window, mask_BR = _gather_window(cfg, kind, image, position)
    y_BQHK = attend_cached(q, cache.text, (window,), mask_BR[:, None], cache.text_mask)
    return y_BQHK, cache._replace(image=image)


def attend_cached(
    q_BQHK: jax.Array,
    text: tuple[KV, ...],
    image: tuple[KV, ...],
    mask_BQS: jax.Array,
    text_mask: tuple[jax.Array, ...] = (),
) -> jax.Array:
    """Compute attention with one softmax, in float32, over text and image tokens.

    Args:
      q_BQHK: queries.
      text: as in `LayerCache`; () for no text.
      image: parts with S tokens together, at least one part, (B, J, S_i, L) each, where I
        may differ between the text and each part.
      mask_BQS: bool, which image tokens are attended to; the first two axes may be 1.
      text_mask: as in `LayerCache`.

    Returns:
      (B, Q, H, K).
    """
    q_BHQK = (q_BQHK * (1.0 / math.sqrt(q_BQHK.shape[-1]))).swapaxes(1, 2)
    image_scores = [_scores(q_BHQK, part.k) for part in image]
    scores = image_scores[0] if len(image) == 1 else jnp.concatenate(image_scores, axis=-1)
    scores = jnp.where(mask_BQS[:, None], scores, jnp.finfo(jnp.float32).min)
    if text:
        if q_BHQK.shape[2] > 1:
            # Without the barrier XLA fuses this product with the last one on a GPU and concatenates both caches for it.
            q_BHQK = jax.lax.optimization_barrier(q_BHQK)
        text_scores = [_scores(q, kv.k) for q, kv in zip(_split_groups(q_BHQK, text), text, strict=True)]
        if text_mask:
            text_scores = [_mask_text(x, mask) for x, mask in zip(text_scores, text_mask, strict=True)]
        scores = jnp.concatenate([jnp.concatenate(text_scores), scores], axis=-1)
    att_BHQS = jax.nn.softmax(scores, axis=-1).astype(image[0].v.dtype)
    outputs, start = [], 0
    if text:
        start = text[0].k.shape[2]
        groups = zip(_split_groups(att_BHQS[..., :start], text), text, strict=True)
        outputs.append(jnp.concatenate([_weighted_values(att, kv.v) for att, kv in groups]))
    for part in image:
        end = start + part.k.shape[2]
        outputs.append(_weighted_values(att_BHQS[..., start:end], part.v))
        start = end
    return sum(outputs[1:], outputs[0]).swapaxes(1, 2)


def _mask_text(scores_BHQT: jax.Array, text_mask_CT: jax.Array) -> jax.Array:
    mask_BT = jnp.repeat(text_mask_CT, len(scores_BHQT) // len(text_mask_CT), axis=0)
    return jnp.where(mask_BT[:, None, None], scores_BHQT, jnp.finfo(jnp.float32).min)


def _split_groups(x: jax.Array, text: tuple[KV, ...]) -> list[jax.Array]:
    """Split rows by group of captions: one group has all rows; of two, the second has the null captions' half."""
    if len(text) == 1:
        return [x]
    half = len(x) // 2
    return [x[:half], x[half:]]


def _scores(q_BHQK: jax.Array, k_CJSL: jax.Array) -> jax.Array:
    """Return attention scores, float32 (B, H, Q, S), with B / C adjacent rows per caption."""
    q_BJQL = _group_queries(q_BHQK, k_CJSL.shape[1])
    scores = _einsum_per_caption("cjql,cjsl->cjqs", q_BJQL, k_CJSL, jnp.float32)
    return scores.reshape(*q_BHQK.shape[:3], -1)


def _weighted_values(att_BHQS: jax.Array, v_CJSL: jax.Array) -> jax.Array:
    """Return the values weighted by attention, (B, H, Q, K)."""
    rows, heads, queries, num_keys = att_BHQS.shape
    groups, width = v_CJSL.shape[1], v_CJSL.shape[3]
    att_BJQS = att_BHQS.reshape(rows, groups, -1, num_keys)  # the I * Q queries of a group
    y = _einsum_per_caption("cjqs,cjsl->cjql", att_BJQS, v_CJSL, v_CJSL.dtype)
    if groups == heads:
        return y
    size = heads // groups
    y_BJIQL = y.reshape(rows, groups, size, queries, width)
    y_BJQL = jnp.where(_own_channels(size, width), y_BJIQL, 0).sum(axis=2)
    y_BJQIK = y_BJQL.reshape(rows, groups, queries, size, -1)
    return y_BJQIK.swapaxes(2, 3).reshape(rows, heads, queries, -1)


def _group_queries(q_BHQK: jax.Array, groups: int) -> jax.Array:
    """Return the queries of groups of heads, (B, J, I * Q, L), zero in the channels of other heads."""
    rows, heads, queries, width = q_BHQK.shape
    if groups == heads:
        return q_BHQK
    size = heads // groups
    q_BJQIK = q_BHQK.reshape(rows, groups, size, queries, width).swapaxes(2, 3)
    q_BJ1QL = q_BJQIK.reshape(rows, groups, 1, queries, size * width)
    q_BJIQL = jnp.where(_own_channels(size, size * width), q_BJ1QL, 0)
    return q_BJIQL.reshape(rows, groups, size * queries, size * width)


def _own_channels(size: int, width: int) -> np.ndarray:
    """Return which channels of a group belong to each of its heads, bool (1, 1, I, 1, L)."""
    own_IL = np.arange(width) // (width // size) == np.arange(size)[:, None]
    return own_IL[None, None, :, None]


def _einsum_per_caption(subscripts: str, x_BJQX: jax.Array, y_CJSL: jax.Array, dtype: Any) -> jax.Array:
    """Compute an einsum of the queries of all rows on a caption, flattened to one axis, with the caption's `y_CJSL`."""
    rows, groups, queries, width = x_BJQX.shape
    captions = len(y_CJSL)
    x = x_BJQX.reshape(captions, -1, groups, queries, width).swapaxes(1, 2)
    x = x.reshape(captions, groups, -1, width)
    out = einsum(subscripts, x, y_CJSL, out_dtype=dtype)
    out = out.reshape(captions, groups, rows // captions, queries, -1).swapaxes(1, 2)
    return out.reshape(rows, groups, queries, -1)
