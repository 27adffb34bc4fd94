"""What training and sampling share: captions and codes into the stream, and out of it through the heads.

B batch, T text positions, P codes, D width, C captions, E width of the text encoder, V image vocabulary, R pairs that
rotary positions turn.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from dalle_jax.config import DalleConfig
from dalle_jax.nn import t5
from dalle_jax.nn.attention import Block, make_norm
from dalle_jax.nn.linear import matmul
from dalle_jax.nn.rope import axial_rope_table
from dalle_jax.parallel.sharding import constrain
from dalle_jax.typing import Params


def make_block(cfg: DalleConfig) -> Block:
    return Block(
        heads=cfg.heads,
        mlp_width=cfg.mlp_dim,
        qk_norm=cfg.qk_norm,
        out_std=0.02 / math.sqrt(2 * cfg.layers),
        dtype=jnp.dtype(cfg.dtype),
        activation=cfg.activation,
        norm=cfg.norm,
        sandwich_norm=cfg.sandwich_norm,
        biases=cfg.biases,
    )


def null_text(cfg: DalleConfig) -> jax.Array:
    """The null caption: every position its pad token. Returns int32 (T,)."""
    return cfg.text_vocab + jnp.arange(cfg.text_len, dtype=jnp.int32)


def null_texts(cfg: DalleConfig, text_BT: jax.Array) -> jax.Array:
    """The null caption that guides each caption, int32 (B, T): with a text encoder as long as that."""
    null_BT = jnp.broadcast_to(null_text(cfg), text_BT.shape)
    if cfg.text_encoder is None:
        return null_BT
    return jnp.minimum(null_BT, cfg.text_vocab + t5.caption_lengths(text_BT, cfg.text_vocab)[:, None] - 1)


def map_pad_ids(cfg: DalleConfig, text_BT: jax.Array) -> jax.Array:
    """The ids as rows of the text embedding: those of padding are `pad_id` where there is one."""
    if cfg.pad_id is None:
        return text_BT
    return jnp.where(text_BT < cfg.text_vocab, text_BT, cfg.pad_id)


def embed_text(cfg: DalleConfig, params: Params, text_BT: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The text positions of the stream, (B, T, D), and which of them are seen, bool (B, T); None where all are."""
    if cfg.text_encoder is None:
        return _placed(cfg, params, params["text_embed"][map_pad_ids(cfg, text_BT)]), None
    frozen = jax.lax.stop_gradient(params["t5"])
    x_BTE, seen_BT = t5.encode_captions(cfg.text_encoder, frozen, text_BT, cfg.text_vocab, cfg.dtype)
    null_B = text_BT[:, 0] >= cfg.text_vocab
    x_BTE = jnp.where(null_B[:, None, None], params["text_null"][None].astype(cfg.dtype), x_BTE)
    return _projected(cfg, params, x_BTE), seen_BT


def embed_null_text(
    cfg: DalleConfig, params: Params, seen_CT: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The same of the null captions that guide captions: of one that serves for all, or of one for each."""
    if seen_CT is None:
        return embed_text(cfg, params, null_text(cfg)[None])
    x_1TD = _projected(cfg, params, params["text_null"][None].astype(cfg.dtype))
    return jnp.broadcast_to(x_1TD, (len(seen_CT), *x_1TD.shape[1:])), seen_CT


def _projected(cfg: DalleConfig, params: Params, x_BTE: jax.Array) -> jax.Array:
    up, down = (params["text_proj"][name]["kernel"].astype(cfg.dtype) for name in ("up", "down"))
    return _placed(cfg, params, jax.nn.gelu(x_BTE @ up) @ down)


def _placed(cfg: DalleConfig, params: Params, x_BTD: jax.Array) -> jax.Array:
    if cfg.pos_embed != "rope2d":
        x_BTD = x_BTD + params["text_pos"][None]
    return constrain(x_BTD, "batch", None, "embed").astype(cfg.dtype)


def embed_codes(cfg: DalleConfig, params: Params, codes_BP: jax.Array, place: jax.Array) -> jax.Array:
    """place: raster places of the codes, (P,) for all rows or (B, P)."""
    place = jnp.atleast_2d(place)
    x_BPD = params["image_embed"][codes_BP]
    match cfg.pos_embed:
        case "axial":
            x_BPD = x_BPD + params["image_row"][place // cfg.grid] + params["image_col"][place % cfg.grid]
        case "learned":
            x_BPD = x_BPD + params["image_pos"][place]
    return constrain(x_BPD, "batch", None, "embed").astype(cfg.dtype)


def rope_at(cfg: DalleConfig, position: jax.Array) -> jax.Array | None:
    """Of queries and keys at positions of the stream, (T,) or (B, T): (1 or B, T, 2, R), or None."""
    if cfg.pos_embed != "rope2d":
        return None
    return jnp.asarray(axial_rope_table(cfg.text_len, cfg.grid, cfg.head_dim))[jnp.atleast_2d(position)]


def norm_out(cfg: DalleConfig, params: Params, x_BTD: jax.Array) -> jax.Array:
    x_BTD = make_norm(cfg.norm).apply({"params": params["norm_out"]}, x_BTD)
    return (
        make_norm(cfg.norm).apply({"params": params["norm_head"]}, x_BTD) if cfg.second_final_norm else x_BTD
    )


def apply_head(cfg: DalleConfig, params: Params, name: str, x_BTD: jax.Array) -> jax.Array:
    """Products in the compute dtype, sums and result in float32."""
    y_BTV = matmul(params[name], x_BTD, cfg.dtype, out_dtype=jnp.float32)
    if cfg.head_bias:
        y_BTV = y_BTV + params[name]["bias"][None, None]
    return constrain(y_BTV, "batch", None, "vocab")
