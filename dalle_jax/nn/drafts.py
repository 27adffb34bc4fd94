"""Several tokens of each row at once over its KV cache, of which only the first that turn out right are kept.

Guessed tokens see the cache and each other but leave no trace in it: a ring has no room for a token that may be
wrong, as writing it drops one that is still seen. Their keys and values come back beside the result, and
`keep` writes those of the right ones.
B rows, Q tokens of each, W tokens kept, R slots of the cache, H heads, K width of a head.
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
    """The raster place whose token each slot holds when the tokens before `place_B` were written: int32 (B, R).

    A place that is negative or not before `place_B` is none.
    """
    at_1R = jnp.arange(num_slots)[None]
    match kind:
        case "full":
            return jnp.broadcast_to(at_1R, (len(position_B), num_slots))
        case "column":
            place_1R = at_1R % cfg.grid * cfg.grid + at_1R // cfg.grid
            return jnp.broadcast_to(place_1R, (len(position_B), num_slots))
    newest_B1 = position_B[:, None] - 1
    return newest_B1 - (newest_B1 - at_1R) % num_slots


def _draft_mask(
    cfg: DalleConfig, kind: AttentionKind, num_slots: int, position_B: jax.Array, num_drafts: int
) -> jax.Array:
    """What tokens at the places from `place_B` on see of the cache, then of each other: bool (B, Q, R + Q)."""
    places_BQ = position_B[:, None] + jnp.arange(num_drafts)[None]
    held_BR = _slot_positions(cfg, kind, num_slots, position_B)
    there_BR = (held_BR >= 0) & (held_BR < position_B[:, None])
    other_BS = jnp.concatenate([held_BR, places_BQ], axis=1)
    there_BS = jnp.concatenate([there_BR, jnp.ones_like(places_BQ, bool)], axis=1)
    back_BQS = places_BQ[:, :, None] - other_BS[:, None]
    table = jnp.asarray(causal_offset_mask(kind, cfg.grid, cfg.conv_kernel))
    near_BQS = (back_BQS >= 0) & (back_BQS < table.shape[1])
    seen_BQS = table[jnp.minimum(places_BQ, len(table) - 1)[:, :, None], jnp.where(near_BQS, back_BQS, 0)]
    return there_BS[:, None] & near_BQS & seen_BQS


def attend_drafts(
    cfg: DalleConfig,
    kind: AttentionKind,
    cache: LayerCache,
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    position_B: jax.Array,
) -> tuple[jax.Array, KV]:
    """`new` is query, key and value of Q tokens of each row, (B, Q, H, K) each, at the places from `place_B` on.

    The cache is as after the tokens before `place_B`. Returns (B, Q, H, K), and what `keep` takes.
    """
    q, k, v = qkv
    fresh, slots = kv.to_cache_layout(k, v), cache.image.k.shape[2]
    visible_BQS = _draft_mask(cfg, kind, slots, position_B, q.shape[1])
    return kv.attend_cached(q, cache.text, (cache.image, fresh), visible_BQS, cache.text_mask), fresh


def _commit_slots(
    cfg: DalleConfig,
    kind: AttentionKind,
    num_slots: int,
    position_B: jax.Array,
    num_accepted_B: jax.Array,
    num_tokens: int,
) -> jax.Array:
    """The slot of each of `tokens` tokens, int32 (B, Q), `slots` for one that is not kept."""
    token_1Q, count_B1 = jnp.arange(num_tokens)[None], num_accepted_B[:, None]
    # Of more tokens than a ring has slots the newest stay: two writes to one slot have no order.
    stays_BQ = (token_1Q < count_B1) & (token_1Q >= count_B1 - kv.cache_size(cfg, kind))
    return jnp.where(stays_BQ, kv.slot_index(cfg, kind, position_B[:, None] + token_1Q), num_slots)


def commit(
    cfg: DalleConfig,
    kind: AttentionKind,
    cache: LayerCache,
    new_kv: KV,
    position_B: jax.Array,
    num_accepted_B: jax.Array,
) -> LayerCache:
    """The cache with the first `count_B` of the tokens that `attend` saw at `place_B` and on; the rest is dropped."""
    rows = jnp.arange(len(position_B))[:, None]
    at_BQ = _commit_slots(cfg, kind, cache.image.k.shape[2], position_B, num_accepted_B, new_kv.k.shape[2])

    def write(old, new):
        return old.at[rows, :, at_BQ].set(new.swapaxes(1, 2), mode="drop")

    return cache._replace(image=KV(write(cache.image.k, new_kv.k), write(cache.image.v, new_kv.v)))
