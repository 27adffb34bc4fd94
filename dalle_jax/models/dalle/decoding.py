"""Sampling: one position at a time, or several guesses, over a KV cache in each layer (nn/kv_cache.py).

B rows, C captions, T text positions, N codes, P codes given, Q codes fed at once, D width, V image vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dalle_jax.config import DalleConfig
from dalle_jax.models.dalle.embedding import (
    Params,
    apply_head,
    embed_codes,
    embed_null_text,
    embed_text,
    make_block,
    norm_out,
    rope_at,
)
from dalle_jax.nn import drafts
from dalle_jax.nn import kv_cache as kv
from dalle_jax.nn.input_checks import check_ids
from dalle_jax.nn.kv_cache import KV, LayerCache

DalleCache = tuple[LayerCache, ...]  # one per layer


def init_cache(cfg: DalleConfig, captions: int, copies: int = 1, *, guided: bool = False) -> DalleCache:
    """Empty caches: per layer the text keys of `captions` and the image keys of `copies` rows for each.

    guided: as many rows again on the null caption, whose text keys are held once, or once for each caption where its
    length is the caption's.
    """
    rows = captions * copies * (2 if guided else 1)

    def text(count):
        length = cfg.text_len - cfg.shift_masks
        zeros = jnp.zeros((count, cfg.heads, length, cfg.head_dim), cfg.dtype)
        return KV(zeros, zeros)

    counts = [captions, 1 if cfg.text_encoder is None else captions][: 2 if guided else 1]
    groups = tuple(text(count) for count in counts)
    seen = () if cfg.text_encoder is None else tuple(jnp.ones((n, cfg.text_len), bool) for n in counts)
    return tuple(LayerCache(groups, kv.init_kv(cfg, kind, rows), seen) for kind in cfg.layer_kinds)


def _image_logits(cfg: DalleConfig, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Of the last position given, float32 (B, V)."""
    return apply_head(cfg, params, "image_head", norm_out(cfg, params, x_BTD[:, -1:]))[:, 0]


def prefill(
    cfg: DalleConfig,
    params: Params,
    text_CT: jax.Array,
    codes_BP: jax.Array | None = None,
    *,
    copies: int = 1,
    guided: bool = False,
) -> tuple[jax.Array, DalleCache]:
    """Run each caption once, then the first P < N codes of each row, if given.

    `params` as `autoregressive.prepare_for_decode` returns them. copies: rows per caption, neighbours; B = C * copies. guided:
    B more rows follow, with the same codes on the null caption, which is run once (with a text encoder, once for each
    caption, as long as that). Returns float32 (B or 2 B, V), the logits of code P, and the caches.
    """
    rows = len(text_CT) * copies
    if codes_BP is None:
        codes_BP = jnp.zeros((rows, 0), jnp.int32)
    check_ids(cfg, text_CT, codes_BP[::copies])
    if len(codes_BP) != rows:
        raise ValueError(f"codes have shape {codes_BP.shape}, want {rows} rows: {copies} for each caption")
    if codes_BP.shape[1] >= cfg.num_codes:
        raise ValueError(f"{codes_BP.shape[1]} codes are given of {cfg.num_codes}; nothing is left to sample")
    captions = len(text_CT)
    block, texts, first = make_block(cfg), [], []
    x_CTD, seen_CT = embed_text(cfg, params, text_CT)
    if guided:
        null_XTD, null_XT = embed_null_text(cfg, params, seen_CT)
        x_CTD = jnp.concatenate([x_CTD, null_XTD])
        seen_CT = None if seen_CT is None else jnp.concatenate([seen_CT, null_XT])
        codes_BP = jnp.concatenate([codes_BP, codes_BP])
    parts = (slice(0, captions), slice(captions, None)) if guided else (slice(0, captions),)
    seen = () if seen_CT is None else tuple(seen_CT[part] for part in parts)
    x_BPD = embed_codes(cfg, params, codes_BP, jnp.arange(codes_BP.shape[1]))
    if cfg.shift_masks:
        x_BPD = jnp.concatenate([_to_rows(x_CTD[:, -1:], captions, copies), x_BPD], axis=1)
        x_CTD = x_CTD[:, :-1]
    rope = rope_at(cfg, jnp.arange(x_CTD.shape[1]))
    for layer in params["blocks"]:
        x_CTD, new = block.apply(
            {"params": layer},
            x_CTD,
            attention_fn=lambda q, k, v: (kv.attend_text(q, k, v, seen_CT), kv.to_cache_layout(k, v)),
            rope=rope,
        )
        texts.append(tuple(KV(*(x[part] for x in new)) for part in parts))
    if x_BPD.shape[1] == 0:
        logits = _to_rows(_image_logits(cfg, params, x_CTD), captions, copies)
        images = [kv.init_kv(cfg, kind, len(codes_BP)) for kind in cfg.layer_kinds]
        return logits, tuple(LayerCache(t, i, seen) for t, i in zip(texts, images, strict=True))
    rope = rope_at(cfg, x_CTD.shape[1] + jnp.arange(x_BPD.shape[1]))
    for layer, kind, text in zip(params["blocks"], cfg.layer_kinds, texts, strict=True):
        x_BPD, new = block.apply(
            {"params": layer},
            x_BPD,
            attention_fn=lambda q, k, v, kind=kind, text=text: (
                kv.attend_prefix(cfg, kind, text, seen, q, k, v),
                kv.to_cache_layout(k, v),
            ),
            rope=rope,
        )
        first.append(kv.init_from_prefix(cfg, kind, new))
    cache = tuple(LayerCache(t, i, seen) for t, i in zip(texts, first, strict=True))
    return _image_logits(cfg, params, x_BPD), cache


def _to_rows(x: jax.Array, captions: int, copies: int) -> jax.Array:
    """What was computed once per caption, for each of its rows; then that of the null captions, if there, for each."""
    own, null = jnp.repeat(x[:captions], copies, axis=0), x[captions:]
    return jnp.concatenate([own, jnp.repeat(null, len(own) // len(null), axis=0)]) if len(null) else own


def resize_cache(cfg: DalleConfig, cache: DalleCache, size: int) -> DalleCache:
    """The caches with room for the first `size` image tokens in layers of full attention, which read no further.

    Every place fed from then on must lie below `size`.
    """
    size = min(size + cfg.shift_masks, cfg.num_codes)
    return tuple(
        layer._replace(image=kv.resize_kv(cfg, kind, layer.image, size))
        for layer, kind in zip(cache, cfg.layer_kinds, strict=True)
    )


def insert_into_cache(
    cfg: DalleConfig, cache: DalleCache, begun: DalleCache, rows_X: jax.Array
) -> DalleCache:
    """`cache`, of one group of captions with a row for each, with A new pictures in rows that others leave.

    begun: of a guided `prefill` of A captions, without codes. rows_X: int32 (2 A,), where its captions go, then where
    the null caption goes for each of them; a row that `cache` does not have is dropped. What else stood in a row is
    never seen.
    """

    def put(old, new):
        return old.at[rows_X].set(new, mode="drop")

    def one(old: LayerCache, new: LayerCache) -> LayerCache:
        both = (
            jnp.concatenate([a, b.repeat(len(a) // len(b), axis=0)]) for a, b in zip(*new.text, strict=True)
        )
        text = KV(*map(put, old.text[0], both))
        seen = tuple(put(x, jnp.concatenate(new.text_mask)) for x in old.text_mask)
        # The first image tokens, which only a model with text in its raster has by now.
        image = KV(*map(put, old.image, new.image)) if cfg.shift_masks else old.image
        return LayerCache((text,), image, seen)

    return tuple(map(one, cache, begun))


def decode_step(
    cfg: DalleConfig,
    params: Params,
    cache: DalleCache,
    code_B: jax.Array,
    place: jax.Array,
) -> tuple[jax.Array, DalleCache]:
    """Feed the code of raster place `place`: one for all rows, or int32 (B,), each row its own.

    Returns float32 (B, V), the logits of the next code, and the caches.
    """
    place, block = jnp.asarray(place), make_block(cfg)
    place_B1 = place[..., None]  # (1,) for all rows, or (B, 1)
    x_B1D, rope = embed_codes(cfg, params, code_B[:, None], place_B1), rope_at(cfg, cfg.text_len + place_B1)
    if cfg.shift_masks:
        place = place + 1
    after = []
    for layer, kind, before in zip(params["blocks"], cfg.layer_kinds, cache, strict=True):

        def attention_fn(*new, kind=kind, before=before):
            return kv.attend_step(cfg, kind, before, new, place)

        x_B1D, new = block.apply({"params": layer}, x_B1D, attention_fn=attention_fn, rope=rope)
        after.append(new)
    return _image_logits(cfg, params, x_B1D), tuple(after)


def decode_drafts(
    cfg: DalleConfig, params: Params, cache: DalleCache, codes_BQ: jax.Array, place_B: jax.Array
) -> tuple[jax.Array, tuple[KV, ...]]:
    """Feed Q codes of each row at once, guesses among them, for the raster places from `place_B`, int32 (B,), on.

    Returns float32 (B, Q, V), the logits of the codes after each, and what `commit_drafts` takes to put those that
    were right into the cache. Codes for places that the raster does not have are fed for nothing.
    """
    places_BQ = place_B[:, None] + jnp.arange(codes_BQ.shape[1])[None]
    places_BQ = jnp.minimum(places_BQ, cfg.num_codes - 1)
    x_BQD = embed_codes(cfg, params, codes_BQ, places_BQ)
    rope = rope_at(cfg, cfg.text_len + places_BQ)
    place_B, fresh = place_B + cfg.shift_masks, []
    for layer, kind, before in zip(params["blocks"], cfg.layer_kinds, cache, strict=True):
        x_BQD, new = make_block(cfg).apply(
            {"params": layer},
            x_BQD,
            attention_fn=lambda *new, kind=kind, before=before: drafts.attend_drafts(
                cfg, kind, before, new, place_B
            ),
            rope=rope,
        )
        fresh.append(new)
    return apply_head(cfg, params, "image_head", norm_out(cfg, params, x_BQD)), tuple(fresh)


def commit_drafts(
    cfg: DalleConfig, cache: DalleCache, fresh: tuple[KV, ...], place_B: jax.Array, count_B: jax.Array
) -> DalleCache:
    """The caches with the first `count_B` codes of each row of those that `decode_drafts` fed at `place_B`."""
    place_B = place_B + cfg.shift_masks
    return tuple(
        drafts.commit(cfg, kind, before, new, place_B, count_B)
        for kind, before, new in zip(cfg.layer_kinds, cache, fresh, strict=True)
    )
