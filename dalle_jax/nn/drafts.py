"""Attention of several draft tokens per row over a KV cache, for speculative decoding (sampling/speculative.py).

Draft tokens attend to the cache and to each other but are not written to it: a ring buffer has no slot for a token that
may be rejected, because writing it drops a token that is still attended to. Their keys and values are returned instead,
and `commit` writes those of the accepted tokens.
A position is the raster index of an image token.
B rows, Q draft tokens of each, R slots of the cache, S keys, H heads, K width of a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dalle_jax.config import DalleConfig
from dalle_jax.config.dalle import AttentionKind
from dalle_jax.nn import kv_cache as kv
from dalle_jax.nn.kv_cache import KV, LayerCache
from dalle_jax.nn.masks import causal_offset_mask


def _slot_positions(
    cfg: DalleConfig, kind: AttentionKind, num_slots: int, position_B: jax.Array
) -> jax.Array:
    """Return the position of the token in each slot after the tokens before `position_B`, int32 (B, R).

    A slot is not written yet if the result is negative or not below `position_B`.
    """
    slot_1R = jnp.arange(num_slots)[None]
    match kind:
        case "full":
            return jnp.broadcast_to(slot_1R, (len(position_B), num_slots))
        case "column":
            slot_position_1R = slot_1R % cfg.grid * cfg.grid + slot_1R // cfg.grid
            return jnp.broadcast_to(slot_position_1R, (len(position_B), num_slots))
    newest_B1 = position_B[:, None] - 1
    return newest_B1 - (newest_B1 - slot_1R) % num_slots


def _draft_mask(
    cfg: DalleConfig, kind: AttentionKind, num_slots: int, position_B: jax.Array, num_drafts: int
) -> jax.Array:
    """Return which slots, then which drafts, the drafts from `position_B` on attend to, bool (B, Q, R + Q)."""
    query_BQ = position_B[:, None] + jnp.arange(num_drafts)[None]
    slot_BR = _slot_positions(cfg, kind, num_slots, position_B)
    written_BR = (slot_BR >= 0) & (slot_BR < position_B[:, None])
    key_BS = jnp.concatenate([slot_BR, query_BQ], axis=1)
    valid_BS = jnp.concatenate([written_BR, jnp.ones_like(query_BQ, bool)], axis=1)
    offset_BQS = query_BQ[:, :, None] - key_BS[:, None]
    table = jnp.asarray(causal_offset_mask(kind, cfg.grid, cfg.conv_kernel))
    in_table_BQS = (offset_BQS >= 0) & (offset_BQS < table.shape[1])
    table_row_BQ1 = jnp.minimum(query_BQ, len(table) - 1)[:, :, None]
    mask_BQS = table[table_row_BQ1, jnp.where(in_table_BQS, offset_BQS, 0)]
    return valid_BS[:, None] & in_table_BQS & mask_BQS


def attend_drafts(
    cfg: DalleConfig,
    kind: AttentionKind,
    cache: LayerCache,
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    position_B: jax.Array,
) -> tuple[jax.Array, KV]:
    """Compute attention of Q draft tokens of each row.

    Args:
      cfg: the model.
      kind: of the layer.
      cache: after the tokens before `position_B`.
      qkv: query, key and value, (B, Q, H, K) each.
      position_B: int32, the position of the first draft token.

    Returns:
      (B, Q, H, K), and the keys and values of the drafts for `commit`.
    """
    q, k, v = qkv
    new_kv, num_slots = kv.to_cache_layout(k, v), cache.image.k.shape[2]
    mask_BQS = _draft_mask(cfg, kind, num_slots, position_B, q.shape[1])
    return kv.attend_cached(q, cache.text, (cache.image, new_kv), mask_BQS, cache.text_mask), new_kv


def _commit_slots(
    cfg: DalleConfig,
    kind: AttentionKind,
    num_slots: int,
    position_B: jax.Array,
    num_accepted_B: jax.Array,
    num_tokens: int,
) -> jax.Array:
    """Return the slot of each token, int32 (B, Q); `num_slots` for a token that is not written."""
    token_1Q, num_accepted_B1 = jnp.arange(num_tokens)[None], num_accepted_B[:, None]
    # Of more tokens than a ring buffer holds only the newest are written: two writes to one slot have no defined order.
    size = kv.cache_size(cfg, kind)
    written_BQ = (token_1Q < num_accepted_B1) & (token_1Q >= num_accepted_B1 - size)
    return jnp.where(written_BQ, kv.slot_index(cfg, kind, position_B[:, None] + token_1Q), num_slots)


def commit_draft_kv(
    cfg: DalleConfig,
    kind: AttentionKind,
    cache: LayerCache,
    new_kv: KV,
    position_B: jax.Array,
    num_accepted_B: jax.Array,
) -> LayerCache:
    """Write the accepted tokens of `attend_drafts` to the cache.

    Args:
      cfg: the model.
      kind: of the layer.
      cache: as given to `attend_drafts`.
      new_kv: as `attend_drafts` returns it.
      position_B: as given to `attend_drafts`.
      num_accepted_B: int32, how many tokens of each row are written, from the first; the others are dropped.
    """
    rows = jnp.arange(len(position_B))[:, None]
    slot_BQ = _commit_slots(cfg, kind, cache.image.k.shape[2], position_B, num_accepted_B, new_kv.k.shape[2])

    def write(old, new):
        return old.at[rows, :, slot_BQ].set(new.swapaxes(1, 2), mode="drop")

    return cache._replace(image=KV(write(cache.image.k, new_kv.k), write(cache.image.v, new_kv.v)))
