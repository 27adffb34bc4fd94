"""Sampling with the DALL-E Transformer: one image token at a time, or several drafts, over a KV cache per layer.

A position is the raster index of an image token, in [0, N). With `cfg.shift_masks` the masks count the last text token
as the first image token, so the caches hold it at index 0 and the image token of position i at index i + 1.
B rows, A new rows, C captions, T text positions, N codes, P prefix codes, Q codes fed at once, D width, V image
vocabulary, X text rows of captions and null captions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dalle_jax.config import DalleConfig
from dalle_jax.models.dalle.embedding import (
    apply_head,
    embed_codes,
    embed_null_text,
    embed_text,
    final_norm,
    make_block,
    rope_at,
)
from dalle_jax.nn import drafts
from dalle_jax.nn import kv_cache as kv
from dalle_jax.nn.input_checks import check_prefix
from dalle_jax.nn.kv_cache import KV, LayerCache
from dalle_jax.nn.module import apply_module
from dalle_jax.typing import Params

DalleCache = tuple[LayerCache, ...]  # one per layer


def init_cache(
    cfg: DalleConfig, captions: int, samples_per_caption: int = 1, *, use_cfg: bool = False
) -> DalleCache:
    """Allocate empty caches.

    Args:
      captions: C, number of captions, whose text keys are stored once each.
      samples_per_caption: rows of image keys per caption.
      use_cfg: add as many rows on the null caption, whose text keys are stored once, or with a text encoder once per
        caption.

    Returns:
      One LayerCache per layer, zeros in the compute dtype.
    """
    rows = captions * samples_per_caption * (2 if use_cfg else 1)

    def text_kv(count: int) -> KV:
        zeros = kv.init_heads(cfg, count, cfg.text_len - cfg.shift_masks)
        return KV(zeros, zeros)

    counts = [captions, 1 if cfg.text_encoder is None else captions][: 2 if use_cfg else 1]
    groups = tuple(text_kv(count) for count in counts)
    masks = () if cfg.text_encoder is None else tuple(jnp.ones((n, cfg.text_len), bool) for n in counts)
    return tuple(LayerCache(groups, kv.init_kv_cache(cfg, kind, rows), masks) for kind in cfg.layer_kinds)


def _next_logits(cfg: DalleConfig, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Compute the image logits of the last position, float32 (B, V)."""
    return apply_head(cfg, params, "image_head", final_norm(cfg, params, x_BTD[:, -1:]))[:, 0]


def prefill(
    cfg: DalleConfig,
    params: Params,
    text_CT: jax.Array,
    codes_BP: jax.Array | None = None,
    *,
    samples_per_caption: int = 1,
    use_cfg: bool = False,
) -> tuple[jax.Array, DalleCache]:
    """Run each caption once, then the prefix codes of each row.

    Args:
      params: from `autoregressive.prepare_for_decode`.
      text_CT: int32 in [0, text_vocab + text_len).
      codes_BP: int32 in [0, image_vocab), P < N prefix codes of each row, B = C * samples_per_caption; None is P = 0.
      samples_per_caption: adjacent rows of `codes_BP` that share a caption.
      use_cfg: append B rows with the same codes on the null caption, which is run once, or with a text encoder once
        per caption.

    Returns:
      float32 (B or 2 B, V), the logits of code P, and the caches.

    Raises:
      ValueError: other shapes or dtypes, or nothing left to sample.
    """
    captions = len(text_CT)
    codes_BP = check_prefix(cfg, text_CT, codes_BP, samples_per_caption)
    block, text_kvs, image_kvs = make_block(cfg), [], []
    x_XTD, text_mask_XT = embed_text(cfg, params, text_CT)
    groups = [slice(0, captions)]
    if use_cfg:
        null_XTD, null_mask_XT = embed_null_text(cfg, params, text_mask_XT)
        x_XTD = jnp.concatenate([x_XTD, null_XTD])
        if text_mask_XT is not None and null_mask_XT is not None:
            text_mask_XT = jnp.concatenate([text_mask_XT, null_mask_XT])
        codes_BP = jnp.concatenate([codes_BP, codes_BP])
        groups.append(slice(captions, None))
    text_masks = () if text_mask_XT is None else tuple(text_mask_XT[group] for group in groups)
    x_BPD = embed_codes(cfg, params, codes_BP, jnp.arange(codes_BP.shape[1]))
    if cfg.shift_masks:
        x_BPD = jnp.concatenate([_repeat_rows(x_XTD[:, -1:], captions, samples_per_caption), x_BPD], axis=1)
        x_XTD = x_XTD[:, :-1]
    rope = rope_at(cfg, jnp.arange(x_XTD.shape[1]))
    for layer in params["blocks"]:
        x_XTD, new_kv = apply_module(
            block,
            layer,
            x_XTD,
            attention_fn=lambda q, k, v: (kv.attend_text(q, k, v, text_mask_XT), kv.to_cache_layout(k, v)),
            rope=rope,
        )
        text_kvs.append(tuple(KV(*(x[group] for x in new_kv)) for group in groups))
    if x_BPD.shape[1] == 0:
        logits = _repeat_rows(_next_logits(cfg, params, x_XTD), captions, samples_per_caption)
        image_kvs = [kv.init_kv_cache(cfg, kind, len(codes_BP)) for kind in cfg.layer_kinds]
        return logits, _layer_caches(text_kvs, image_kvs, text_masks)
    rope = rope_at(cfg, x_XTD.shape[1] + jnp.arange(x_BPD.shape[1]))
    for layer, kind, text_kv in zip(params["blocks"], cfg.layer_kinds, text_kvs, strict=True):
        x_BPD, new_kv = apply_module(
            block,
            layer,
            x_BPD,
            attention_fn=lambda q, k, v, kind=kind, text_kv=text_kv: (
                kv.attend_prefix(cfg, kind, text_kv, text_masks, q, k, v),
                kv.to_cache_layout(k, v),
            ),
            rope=rope,
        )
        image_kvs.append(kv.init_from_prefix(cfg, kind, new_kv))
    return _next_logits(cfg, params, x_BPD), _layer_caches(text_kvs, image_kvs, text_masks)


def _layer_caches(
    text_kvs: list[tuple[KV, ...]], image_kvs: list[KV], text_masks: tuple[jax.Array, ...]
) -> DalleCache:
    pairs = zip(text_kvs, image_kvs, strict=True)
    return tuple(LayerCache(text_kv, image_kv, text_masks) for text_kv, image_kv in pairs)


def _repeat_rows(x: jax.Array, captions: int, samples_per_caption: int) -> jax.Array:
    """Repeat per-caption values for each row: first those of the captions, then those of the null captions."""
    rows, null = jnp.repeat(x[:captions], samples_per_caption, axis=0), x[captions:]
    return jnp.concatenate([rows, jnp.repeat(null, len(rows) // len(null), axis=0)]) if len(null) else rows


def resize_cache(cfg: DalleConfig, cache: DalleCache, size: int) -> DalleCache:
    """Resize the caches of full-attention layers, which are read whole, to the first `size` image tokens.

    Every position fed from then on must be below `size`.
    """
    size = min(size + cfg.shift_masks, cfg.num_codes)
    return tuple(
        layer._replace(image=kv.resize_kv(cfg, kind, layer.image, size))
        for layer, kind in zip(cache, cfg.layer_kinds, strict=True)
    )


def insert_into_cache(
    cfg: DalleConfig, cache: DalleCache, prefilled: DalleCache, rows_X: jax.Array
) -> DalleCache:
    """Insert A new images into rows of `cache`; earlier entries of those rows are masked from then on.

    Args:
      cache: one group of captions with one row each.
      prefilled: from `prefill` of A captions with use_cfg and no prefix codes.
      rows_X: int32 (2 A,), the row of each caption, then the row of the null caption for each of them. A row outside
        `cache` is dropped.
    """

    def put(old, new):
        return old.at[rows_X].set(new, mode="drop")

    def insert(old: LayerCache, new: LayerCache) -> LayerCache:
        text_kv = (
            jnp.concatenate([own, null.repeat(len(own) // len(null), axis=0)])
            for own, null in zip(*new.text, strict=True)
        )
        text_mask = tuple(put(x, jnp.concatenate(new.text_mask)) for x in old.text_mask)
        # Only a model with shift_masks has image keys before the first code.
        image_kv = KV(*map(put, old.image, new.image)) if cfg.shift_masks else old.image
        return LayerCache((KV(*map(put, old.text[0], text_kv)),), image_kv, text_mask)

    return tuple(map(insert, cache, prefilled))


def decode_step(
    cfg: DalleConfig, params: Params, cache: DalleCache, code_B: jax.Array, position: jax.Array | int
) -> tuple[jax.Array, DalleCache]:
    """Feed one code per row.

    Args:
      code_B: int32 in [0, image_vocab).
      position: raster index of the codes, int32, a scalar for all rows or (B,).

    Returns:
      float32 (B, V), the logits of the next code, and the caches.
    """
    position, block = jnp.asarray(position), make_block(cfg)
    position_B1 = position[..., None]  # (1,) for all rows, or (B, 1)
    x_B1D = embed_codes(cfg, params, code_B[:, None], position_B1)
    rope = rope_at(cfg, cfg.text_len + position_B1)
    cache_position = position + cfg.shift_masks
    new_cache = []
    for layer, kind, old in zip(params["blocks"], cfg.layer_kinds, cache, strict=True):

        def attention_fn(*qkv, kind=kind, old=old):
            return kv.attend_step(cfg, kind, old, qkv, cache_position)

        x_B1D, new = apply_module(block, layer, x_B1D, attention_fn=attention_fn, rope=rope)
        new_cache.append(new)
    return _next_logits(cfg, params, x_B1D), tuple(new_cache)


def decode_drafts(
    cfg: DalleConfig, params: Params, cache: DalleCache, codes_BQ: jax.Array, position_B: jax.Array
) -> tuple[jax.Array, tuple[KV, ...]]:
    """Feed Q codes per row at once, drafts among them.

    Args:
      codes_BQ: int32 in [0, image_vocab); codes past the end of the raster have no effect.
      position_B: int32, raster index of the first code of each row.

    Returns:
      float32 (B, Q, V), the logits of the code after each, and the new keys and values for `commit_drafts`.
    """
    position_BQ = position_B[:, None] + jnp.arange(codes_BQ.shape[1])[None]
    position_BQ = jnp.minimum(position_BQ, cfg.num_codes - 1)
    x_BQD = embed_codes(cfg, params, codes_BQ, position_BQ)
    rope = rope_at(cfg, cfg.text_len + position_BQ)
    cache_position_B, draft_kvs, block = position_B + cfg.shift_masks, [], make_block(cfg)
    for layer, kind, old in zip(params["blocks"], cfg.layer_kinds, cache, strict=True):

        def attention_fn(*qkv, kind=kind, old=old):
            return drafts.attend_drafts(cfg, kind, old, qkv, cache_position_B)

        x_BQD, draft_kv = apply_module(block, layer, x_BQD, attention_fn=attention_fn, rope=rope)
        draft_kvs.append(draft_kv)
    return apply_head(cfg, params, "image_head", final_norm(cfg, params, x_BQD)), tuple(draft_kvs)


def commit_drafts(
    cfg: DalleConfig,
    cache: DalleCache,
    draft_kvs: tuple[KV, ...],
    position_B: jax.Array,
    num_accepted_B: jax.Array,
) -> DalleCache:
    """Write the first `num_accepted_B` codes of each row that `decode_drafts` fed at `position_B` into the caches."""
    cache_position_B = position_B + cfg.shift_masks
    return tuple(
        drafts.commit_draft_kv(cfg, kind, old, draft_kv, cache_position_B, num_accepted_B)
        for kind, old, draft_kv in zip(cfg.layer_kinds, cache, draft_kvs, strict=True)
    )
