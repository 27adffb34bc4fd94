"""The encoder of T5 v1.1 and Flan-T5 (Raffel et al. 2020, 1910.10683; Chung et al. 2022, 2210.11416).

Our blocks with RMS norms, gated GELU and no biases; positions are told by a learned number for each head and distance
between query and key, the same in all layers, added to scores that are not scaled. Distances share buckets: near ones
have their own, far ones more and more share one.
B batch, T positions, D width, H heads, L layers.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import T5Config
from dalle_jax.nn.attention import Block, make_norm
from dalle_jax.parallel.sharding import constrain
from dalle_jax.typing import Params

T5_NORM_EPSILON = 1e-6  # of the norms
MAX_DISTANCE = 128  # distance from which on all share the last bucket


def _block(cfg: T5Config, dtype: Any) -> Block:
    return Block(
        heads=cfg.heads,
        mlp_width=cfg.mlp_width,
        qk_norm=False,
        out_std=0.02 / math.sqrt(2 * cfg.layers),
        dtype=dtype,
        activation="geglu",
        norm="rms",
        biases=False,
        epsilon=T5_NORM_EPSILON,
    )


def init(cfg: T5Config, vocab: int, key: jax.Array) -> Params:
    """Fresh float32 parameters; those of the blocks are stacked over a leading axis of layers."""
    k_embed, k_relative, k_blocks = jax.random.split(key, 3)
    x_BTD, mask_TT = jnp.zeros((1, 1, cfg.dim)), jnp.ones((1, 1), bool)
    make = jax.vmap(lambda k: _block(cfg, jnp.float32).init(k, x_BTD, mask_TT)["params"])
    return {
        "embed": 0.02 * jax.random.normal(k_embed, (vocab, cfg.dim)),
        "relative": 0.02 * jax.random.normal(k_relative, (cfg.num_relative_buckets, cfg.heads)),
        "blocks": make(jax.random.split(k_blocks, cfg.layers)),
        "norm_out": {"scale": jnp.ones(cfg.dim)},
    }


def relative_position_buckets(length: int, num_buckets: int) -> np.ndarray:
    """Which of `count` buckets the distance from query to key is in: int (length, length).

    The second half is for keys that come later. Of a half, half again are of one distance each, the others cut the
    distances up to FAR evenly by their logarithm.
    """
    half, own = num_buckets // 2, num_buckets // 4
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    far = np.maximum(np.abs(distance), own) / own
    shared = own + np.log(far) / math.log(MAX_DISTANCE / own) * (half - own)
    shared = np.minimum(
        np.floor(shared + 1e-9).astype(int), half - 1
    )  # a whole number may come out just below it
    return np.where(distance > 0, half, 0) + np.where(np.abs(distance) < own, np.abs(distance), shared)


def encode(
    cfg: T5Config, params: Params, ids_BT: jax.Array, text_mask_BT: jax.Array, dtype: Any
) -> jax.Array:
    """What the encoder makes of pieces, (B, T, D) in `dtype`; positions look where `seen_BT` is True."""
    x_BTD = constrain(params["embed"][ids_BT], "batch", None, "embed").astype(dtype)
    table = jnp.asarray(relative_position_buckets(ids_BT.shape[1], cfg.num_relative_buckets))
    added_BHTS = jnp.moveaxis(params["relative"][table], -1, 0)[None]
    added_BHTS = jnp.where(text_mask_BT[:, None, None], added_BHTS, jnp.finfo(jnp.float32).min)

    def attention_fn(q_BTHK, k_BSHK, v_BSHK):
        att_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK, preferred_element_type=jnp.float32)
        att_BHTS = jax.nn.softmax(att_BHTS + added_BHTS, axis=-1).astype(v_BSHK.dtype)
        return jnp.einsum("bhts,bshk->bthk", att_BHTS, v_BSHK), None

    block = _block(cfg, dtype)
    x_BTD, _ = jax.lax.scan(
        lambda x, layer: (block.apply({"params": layer}, x, attention_fn=attention_fn)[0], None),
        x_BTD,
        params["blocks"],
    )
    return (
        make_norm("rms", epsilon=T5_NORM_EPSILON).apply({"params": params["norm_out"]}, x_BTD).astype(dtype)
    )


def caption_lengths(text_BT: jax.Array, vocab: int) -> jax.Array:
    """Pieces of captions, and of null captions what their last id says (dalle/): int32 (B,)."""
    pieces_B = jnp.sum(text_BT < vocab, axis=1, dtype=jnp.int32)
    return jnp.where(pieces_B > 0, pieces_B, text_BT[:, -1] - vocab + 1)


def encode_captions(
    cfg: T5Config, params: Params, text_BT: jax.Array, vocab: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Captions at the right of the text positions: what the encoder makes of them, (B, T, D), and where they are, bool
    (B, T).

    text_BT: pieces below `vocab`, the end piece last, then ids of padding. A caption without padding was cut, and still
    has its end. Of a null caption only the length counts.
    """
    length = text_BT.shape[1]
    place_T, pieces_B1 = jnp.arange(length), caption_lengths(text_BT, vocab)[:, None]
    cut_B = text_BT[:, -1] < vocab
    ids_BT = text_BT.at[:, -1].set(jnp.where(cut_B, cfg.eos_id, text_BT[:, -1]))
    x_BTD = encode(cfg, params, jnp.minimum(ids_BT, vocab - 1), place_T[None] < pieces_B1, dtype)
    from_BT = (place_T[None] + pieces_B1) % length
    return jnp.take_along_axis(x_BTD, from_BT[..., None], axis=1), place_T[None] >= length - pieces_B1
