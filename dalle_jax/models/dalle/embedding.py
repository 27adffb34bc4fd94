"""Embeddings and output heads of the DALL-E Transformer, shared by training and sampling.

A position is the raster index of an image token, in [0, num_codes); a stream position is an index in text + image.
B batch, C captions, T text positions, P codes, D width, E width of the text encoder, V vocabulary of a head, R pairs of
channels that RoPE rotates.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from dalle_jax.config import DalleConfig
from dalle_jax.nn import t5
from dalle_jax.nn.attention import Block
from dalle_jax.nn.linear import matmul
from dalle_jax.nn.module import apply_module
from dalle_jax.nn.norm import make_norm
from dalle_jax.nn.rope import axial_rope_table
from dalle_jax.parallel.sharding import constrain
from dalle_jax.typing import Params


def make_block(cfg: DalleConfig) -> Block:
    """Make the Linen module of one layer."""
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
    """Return the null caption, int32 (T,): the pad token at every position."""
    return cfg.text_vocab + jnp.arange(cfg.text_len, dtype=jnp.int32)


def null_texts(cfg: DalleConfig, text_BT: jax.Array) -> jax.Array:
    """Return the null caption for guiding each caption, int32 (B, T); with a text encoder it has the same length."""
    null_BT = jnp.broadcast_to(null_text(cfg), text_BT.shape)
    if cfg.text_encoder is None:
        return null_BT
    return jnp.minimum(null_BT, cfg.text_vocab + t5.caption_lengths(text_BT, cfg.text_vocab)[:, None] - 1)


def map_pad_ids(cfg: DalleConfig, text_BT: jax.Array) -> jax.Array:
    """Map text ids to rows of the text embedding: pad tokens to `pad_id` where it is set."""
    if cfg.pad_id is None:
        return text_BT
    return jnp.where(text_BT < cfg.text_vocab, text_BT, cfg.pad_id)


def embed_text(cfg: DalleConfig, params: Params, text_BT: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Embed captions.

    Args:
      text_BT: int32 in [0, text_vocab + text_len).

    Returns:
      The text positions of the stream, (B, T, D) in the compute dtype, and the text mask, bool (B, T), False at
      positions that are never attended to; None where there are none.
    """
    if cfg.text_encoder is None:
        return _add_text_positions(cfg, params, params["text_embed"][map_pad_ids(cfg, text_BT)]), None
    frozen = jax.lax.stop_gradient(params["t5"])
    x_BTE, text_mask_BT = t5.encode_captions(cfg.text_encoder, frozen, text_BT, cfg.text_vocab, cfg.dtype)
    is_null_B = text_BT[:, 0] >= cfg.text_vocab
    x_BTE = jnp.where(is_null_B[:, None, None], params["text_null"][None].astype(cfg.dtype), x_BTE)
    return _project_text(cfg, params, x_BTE), text_mask_BT


def embed_null_text(
    cfg: DalleConfig, params: Params, text_mask_CT: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Embed the null captions for guiding C captions.

    Args:
      text_mask_CT: the text mask of the captions, from `embed_text`.

    Returns:
      As `embed_text`, of one null caption for all where `text_mask_CT` is None, else of one for each caption.
    """
    if text_mask_CT is None:
        return embed_text(cfg, params, null_text(cfg)[None])
    x_1TD = _project_text(cfg, params, params["text_null"][None].astype(cfg.dtype))
    return jnp.broadcast_to(x_1TD, (len(text_mask_CT), *x_1TD.shape[1:])), text_mask_CT


def _project_text(cfg: DalleConfig, params: Params, x_BTE: jax.Array) -> jax.Array:
    up, down = (params["text_proj"][name]["kernel"].astype(cfg.dtype) for name in ("up", "down"))
    return _add_text_positions(cfg, params, jax.nn.gelu(x_BTE @ up) @ down)


def _add_text_positions(cfg: DalleConfig, params: Params, x_BTD: jax.Array) -> jax.Array:
    if cfg.pos_embed != "rope2d":
        x_BTD = x_BTD + params["text_pos"][None]
    return constrain(x_BTD, "batch", None, "embed").astype(cfg.dtype)


def embed_codes(cfg: DalleConfig, params: Params, codes_BP: jax.Array, position: jax.Array) -> jax.Array:
    """Embed image tokens.

    Args:
      codes_BP: int32 in [0, image_vocab).
      position: int32, raster index of each code, (P,) for all rows or (B, P).

    Returns:
      (B, P, D) in the compute dtype.
    """
    position = jnp.atleast_2d(position)
    x_BPD = params["image_embed"][codes_BP]
    match cfg.pos_embed:
        case "axial":
            row, column = position // cfg.grid, position % cfg.grid
            x_BPD = x_BPD + params["image_row"][row] + params["image_col"][column]
        case "learned":
            x_BPD = x_BPD + params["image_pos"][position]
    return constrain(x_BPD, "batch", None, "embed").astype(cfg.dtype)


def rope_at(cfg: DalleConfig, stream_position: jax.Array) -> jax.Array | None:
    """Look up RoPE's cosines and sines at stream positions, (T,) or (B, T).

    Returns:
      float32 (1 or B, T, 2, R), or None where the model has no RoPE.
    """
    if cfg.pos_embed != "rope2d":
        return None
    table = axial_rope_table(cfg.text_len, cfg.grid, cfg.head_dim)
    return jnp.asarray(table)[jnp.atleast_2d(stream_position)]


def final_norm(cfg: DalleConfig, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Apply the final norm or norms, in float32."""
    norm = make_norm(cfg.norm)
    x_BTD = apply_module(norm, params["norm_out"], x_BTD)
    return apply_module(norm, params["norm_head"], x_BTD) if cfg.second_final_norm else x_BTD


def apply_head(cfg: DalleConfig, params: Params, name: str, x_BTD: jax.Array) -> jax.Array:
    """Compute the logits of the head `name`, float32 (B, T, V): products in the compute dtype, sums in float32."""
    y_BTV = matmul(params[name], x_BTD, cfg.dtype, out_dtype=jnp.float32)
    if cfg.head_bias:
        y_BTV = y_BTV + params[name]["bias"][None, None]
    return constrain(y_BTV, "batch", None, "vocab")
