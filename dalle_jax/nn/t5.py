"""The encoder of T5 v1.1 and Flan-T5 (Raffel et al. 2020, 1910.10683; Chung et al. 2022, 2210.11416).

The blocks have RMS norms, gated GELU and no biases. Positions are encoded by a learned bias for each head and relative
position of key and query, the same in all layers, which is added to unscaled attention scores. Relative positions share
buckets that grow with the distance.
B batch, T positions, D width, H heads, L layers.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import T5Config
from dalle_jax.nn.attention import Block
from dalle_jax.nn.module import apply_module, scan_layers
from dalle_jax.nn.norm import make_norm
from dalle_jax.nn.products import einsum
from dalle_jax.parallel.sharding import constrain
from dalle_jax.typing import Params

_NORM_EPSILON = 1e-6
_MAX_DISTANCE = 128  # greater distances share the last bucket


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
        epsilon=_NORM_EPSILON,
    )


def init(cfg: T5Config, vocab: int, key: jax.Array) -> Params:
    """Initialize the encoder.

    Args:
      cfg: the encoder.
      vocab: vocabulary size.
      key: random key.

    Returns:
      float32 parameters; those of the blocks are stacked over a leading axis of layers.
    """
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
    """Return the bucket of each relative position.

    Half of the buckets are for keys after the query. Of each half, the first half are for one distance each; the others
    divide the distances up to 128 evenly by their logarithm.

    Args:
      length: T.
      num_buckets: a multiple of 4.

    Returns:
      int (T, T), [query, key], in [0, num_buckets).
    """
    half, exact = num_buckets // 2, num_buckets // 4
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    distance = np.abs(offset)
    ratio = np.maximum(distance, exact) / exact
    log_bucket = exact + np.log(ratio) / math.log(_MAX_DISTANCE / exact) * (half - exact)
    log_bucket = np.floor(log_bucket + 1e-9).astype(int)  # rounding may leave a whole number just below it
    log_bucket = np.minimum(log_bucket, half - 1)
    return np.where(offset > 0, half, 0) + np.where(distance < exact, distance, log_bucket)


def encode(
    cfg: T5Config, params: Params, ids_BT: jax.Array, text_mask_BT: jax.Array, dtype: Any
) -> jax.Array:
    """Encode token ids.

    Args:
      cfg: the encoder.
      params: of `init`.
      ids_BT: int32.
      text_mask_BT: bool, which positions are attended to.
      dtype: compute dtype.

    Returns:
      (B, T, D) in `dtype`.
    """
    x_BTD = constrain(params["embed"][ids_BT], "batch", None, "embed").astype(dtype)
    buckets_TS = jnp.asarray(relative_position_buckets(ids_BT.shape[1], cfg.num_relative_buckets))
    bias_BHTS = jnp.moveaxis(params["relative"][buckets_TS], -1, 0)[None]
    bias_BHTS = jnp.where(text_mask_BT[:, None, None], bias_BHTS, jnp.finfo(jnp.float32).min)

    def attention_fn(q_BTHK, k_BSHK, v_BSHK):
        att_BHTS = einsum("bthk,bshk->bhts", q_BTHK, k_BSHK, out_dtype=jnp.float32)
        att_BHTS = jax.nn.softmax(att_BHTS + bias_BHTS, axis=-1).astype(v_BSHK.dtype)
        return einsum("bhts,bshk->bthk", att_BHTS, v_BSHK), None

    block = _block(cfg, dtype)

    def layer(x_BTD, layer_params):
        return apply_module(block, layer_params, x_BTD, attention_fn=attention_fn)[0]

    x_BTD = scan_layers(layer, x_BTD, params["blocks"])
    norm_out = make_norm("rms", epsilon=_NORM_EPSILON)
    return jnp.asarray(norm_out.apply({"params": params["norm_out"]}, x_BTD), dtype)


def caption_lengths(text_BT: jax.Array, vocab: int) -> jax.Array:
    """Return the number of tokens of each caption, int32 (B,).

    Args:
      text_BT: int32 as for `encode_captions`. A row without a token below `vocab` is a null caption, whose length is
        its last id - vocab + 1.
      vocab: vocabulary size.
    """
    length_B = jnp.sum(text_BT < vocab, axis=1, dtype=jnp.int32)
    return jnp.where(length_B > 0, length_B, text_BT[:, -1] - vocab + 1)


def encode_captions(
    cfg: T5Config, params: Params, text_BT: jax.Array, vocab: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Encode captions and align them to the right of the text positions.

    Args:
      cfg: the encoder.
      params: of `init`.
      text_BT: int32, tokens below `vocab` with the end token last, then padding ids. A caption without padding was
        truncated and gets the end token. Of a null caption only the length matters.
      vocab: vocabulary size.
      dtype: compute dtype.

    Returns:
      The encodings, (B, T, D) in `dtype`, and which positions have one, bool (B, T).
    """
    length = text_BT.shape[1]
    position_1T, length_B1 = jnp.arange(length)[None], caption_lengths(text_BT, vocab)[:, None]
    is_truncated_B = text_BT[:, -1] < vocab
    ids_BT = text_BT.at[:, -1].set(jnp.where(is_truncated_B, cfg.eos_id, text_BT[:, -1]))
    x_BTD = encode(cfg, params, jnp.minimum(ids_BT, vocab - 1), position_1T < length_B1, dtype)
    source_BT = (position_1T + length_B1) % length
    return jnp.take_along_axis(x_BTD, source_BT[..., None], axis=1), position_1T >= length - length_B1
