"""The autoregressive Transformer of DALL-E over text and image tokens (Ramesh et al. 2021, 2102.12092, 2.2, B).

One stream: `text_len` text tokens, then the codes of the picture in raster order; each position predicts the
next. Text ids lie in [0, text_vocab) for pieces and at text_vocab + i for the learned pad token of position
i. Training scans over the layers; sampling runs them one by one, each with its KV cache.
B batch, T text positions, N codes, P codes given, S positions of the stream, D width, L layers,
W text ids (pieces and pads), V image vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import DalleConfig
from dalle_jax.nn.attention import Block, KVCache
from dalle_jax.nn.masks import attention_mask
from dalle_jax.nn.sharding import constrain

Params = dict[str, Any]
Cache = tuple[KVCache, ...]  # one per layer


def _block(cfg: DalleConfig) -> Block:
    out_std = 0.02 / math.sqrt(2 * cfg.layers)
    return Block(cfg.heads, cfg.mlp_ratio, cfg.qk_norm, out_std, jnp.dtype(cfg.dtype))


def init(cfg: DalleConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters; those of the blocks are stacked over a leading axis of layers."""
    names = ("text_embed", "image_embed", "text_pos", "image_row", "image_col", "text_head", "image_head")
    *keys, k_blocks = jax.random.split(key, len(names) + 1)
    k = dict(zip(names, keys, strict=True))

    def normal(name: str, *shape: int) -> jax.Array:
        return 0.02 * jax.random.normal(k[name], shape)

    x_BTD, mask_TS = jnp.zeros((1, 1, cfg.dim)), jnp.ones((1, 1), bool)
    blocks = jax.vmap(lambda key: _block(cfg).init(key, x_BTD, mask_TS)["params"])(
        jax.random.split(k_blocks, cfg.layers)
    )
    text_ids = cfg.text_vocab + cfg.text_len
    return {
        "text_embed": normal("text_embed", text_ids, cfg.dim),
        "text_pos": normal("text_pos", cfg.text_len, cfg.dim),
        "image_embed": normal("image_embed", cfg.image_vocab, cfg.dim),
        "image_row": normal("image_row", cfg.grid, cfg.dim),
        "image_col": normal("image_col", cfg.grid, cfg.dim),
        "blocks": blocks,
        "norm_out": {"scale": jnp.ones(cfg.dim), "bias": jnp.zeros(cfg.dim)},
        "text_head": {"kernel": normal("text_head", cfg.dim, text_ids)},
        "image_head": {"kernel": normal("image_head", cfg.dim, cfg.image_vocab)},
    }


def null_text(cfg: DalleConfig) -> jax.Array:
    """The null caption: every position its pad token. Returns int32 (T,)."""
    return cfg.text_vocab + jnp.arange(cfg.text_len, dtype=jnp.int32)


def check_ids(cfg: DalleConfig, text_BT: jax.Array, codes_BP: jax.Array) -> None:
    """Raises ValueError unless these are captions and the first P <= N codes for each."""
    if text_BT.ndim != 2 or text_BT.shape[1] != cfg.text_len:
        raise ValueError(f"text has shape {text_BT.shape}, want (batch, {cfg.text_len}); pad or cut captions")
    if codes_BP.ndim != 2 or codes_BP.shape[1] > cfg.num_codes or len(codes_BP) != len(text_BT):
        raise ValueError(
            f"codes have shape {codes_BP.shape}, want ({len(text_BT)}, {cfg.num_codes}) or fewer columns"
        )
    for name, ids in (("text", text_BT), ("codes", codes_BP)):
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"{name} is {ids.dtype}, want int32 ids")


def _embed_text(cfg: DalleConfig, params: Params, text_BT: jax.Array) -> jax.Array:
    x_BTD = params["text_embed"][text_BT] + params["text_pos"][None]
    return constrain(x_BTD, "batch", None, "embed").astype(cfg.dtype)


def _embed_codes(cfg: DalleConfig, params: Params, codes_BP: jax.Array, start: jax.Array | int) -> jax.Array:
    """Codes of the raster places start, start + 1, ..."""
    place_P = start + jnp.arange(codes_BP.shape[1])
    where_PD = params["image_row"][place_P // cfg.grid] + params["image_col"][place_P % cfg.grid]
    x_BPD = params["image_embed"][codes_BP] + where_PD[None]
    return constrain(x_BPD, "batch", None, "embed").astype(cfg.dtype)


def _norm_out(params: Params, x_BTD: jax.Array) -> jax.Array:
    return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32).apply({"params": params["norm_out"]}, x_BTD)


def _head(cfg: DalleConfig, params: Params, name: str, x_BTD: jax.Array) -> jax.Array:
    """Products in the compute dtype, sums and result in float32."""
    kernel = params[name]["kernel"].astype(cfg.dtype)
    y = jnp.einsum("btd,dv->btv", x_BTD.astype(cfg.dtype), kernel, preferred_element_type=jnp.float32)
    return constrain(y, "batch", None, "vocab")


def _masks(cfg: DalleConfig) -> tuple[np.ndarray, np.ndarray]:
    """The different masks (M, S, S) and which of them each layer uses (L,)."""
    kinds = sorted(set(cfg.layer_kinds))
    masks = [attention_mask(kind, cfg.text_len, cfg.grid, cfg.conv_kernel) for kind in kinds]
    return np.stack(masks), np.array([kinds.index(kind) for kind in cfg.layer_kinds])


def hidden(cfg: DalleConfig, params: Params, text_BT: jax.Array, codes_BP: jax.Array) -> jax.Array:
    """The stream after the last norm.

    text_BT: int32 in [0, text_vocab + text_len). codes_BP: int32 in [0, image_vocab), the first P <= N codes.
    Returns float32 (B, T + P, D). Raises ValueError for other shapes or dtypes.
    """
    check_ids(cfg, text_BT, codes_BP)
    x_BSD = jnp.concatenate(
        [_embed_text(cfg, params, text_BT), _embed_codes(cfg, params, codes_BP, 0)], axis=1
    )
    masks, which = _masks(cfg)
    masks = jnp.asarray(masks[:, : x_BSD.shape[1], : x_BSD.shape[1]])
    block = _block(cfg)

    def layer(x_BSD, layer_params, mask_SS):
        return block.apply({"params": layer_params}, x_BSD, mask_SS)[0]

    match cfg.remat:
        case "full":
            layer = jax.checkpoint(layer)
        case "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            layer = jax.checkpoint(layer, policy=policy)

    def body(x_BSD, xs):
        layer_params, index = xs
        return layer(x_BSD, layer_params, masks[index]), None

    x_BSD, _ = jax.lax.scan(body, x_BSD, (params["blocks"], jnp.asarray(which)), unroll=cfg.scan_unroll)
    return _norm_out(params, x_BSD)


def logits(
    cfg: DalleConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scores of every token given all tokens before it.

    text_BT: int32 (B, T). codes_BN: int32 (B, N). Returns float32 text logits (B, T-1, W), for the text
    tokens 1 to T-1, and float32 image logits (B, N, V), for the codes 0 to N-1. Raises ValueError for other
    shapes or dtypes.
    """
    if codes_BN.shape[1:] != (cfg.num_codes,):
        raise ValueError(f"codes have shape {codes_BN.shape}, want ({len(text_BT)}, {cfg.num_codes})")
    x_BSD = hidden(cfg, params, text_BT, codes_BN[:, :-1])
    text = _head(cfg, params, "text_head", x_BSD[:, : cfg.text_len - 1])
    return text, _head(cfg, params, "image_head", x_BSD[:, cfg.text_len - 1 :])


def _cross_entropy(logits_BTV: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Mean over all tokens, in nats."""
    picked = jnp.take_along_axis(logits_BTV, ids_BT[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits_BTV, axis=-1) - picked)


def loss(
    cfg: DalleConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted cross-entropy of text and image tokens (1/8 and 7/8; 2102.12092, 2.2), in nats per token.

    A share `cfg.null_rate` of the rows, drawn with `key`, has the null caption instead of its own.
    Returns float32 scalar and metrics `text_loss`, `image_loss`.
    """
    drop_B = jax.random.bernoulli(key, cfg.null_rate, (len(text_BT),))
    text_BT = jnp.where(drop_B[:, None], null_text(cfg)[None], text_BT)
    text_logits, image_logits = logits(cfg, params, text_BT, codes_BN)
    text_loss = _cross_entropy(text_logits, text_BT[:, 1:]) if cfg.text_len > 1 else jnp.float32(0)
    image_loss = _cross_entropy(image_logits, codes_BN)
    total = cfg.text_loss_weight * text_loss + (1 - cfg.text_loss_weight) * image_loss
    return total, {"text_loss": text_loss, "image_loss": image_loss}


# --- sampling: one position at a time over a KV cache ----------------------------------------------------


def unstack(cfg: DalleConfig, params: Params) -> Params:
    """The same parameters with `blocks` as a tuple of layers: sampling slices the stack once, not per token."""
    layers = tuple(jax.tree.map(lambda a, i=i: a[i], params["blocks"]) for i in range(cfg.layers))
    return {**params, "blocks": layers}


def init_cache(cfg: DalleConfig, batch: int) -> Cache:
    """Empty caches for `batch` rows: per layer keys and values (B, S, H, K) in the compute dtype."""
    shape = (batch, cfg.length, cfg.heads, cfg.head_dim)
    zeros = constrain(jnp.zeros(shape, cfg.dtype), "batch", None, "heads", None)
    return tuple(KVCache(zeros, zeros) for _ in range(cfg.layers))


def _through_layers(cfg, params, x_BTD, cache, position):
    masks, which = _masks(cfg)
    rows = jax.lax.dynamic_slice_in_dim(jnp.asarray(masks), position, x_BTD.shape[1], axis=1)
    new_cache = []
    for layer_params, layer_cache, index in zip(params["blocks"], cache, which, strict=True):
        x_BTD, layer_cache = _block(cfg).apply(
            {"params": layer_params}, x_BTD, rows[index], layer_cache, position
        )
        new_cache.append(layer_cache)
    return _head(cfg, params, "image_head", _norm_out(params, x_BTD[:, -1:]))[:, 0], tuple(new_cache)


def prefill(
    cfg: DalleConfig, params: Params, text_BT: jax.Array, codes_BP: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Run the caption, and the first P < N codes if given, in one pass.

    `params` as `unstack` returns them. Returns float32 (B, V), the logits of code P, and the caches.
    """
    if codes_BP is None:
        codes_BP = jnp.zeros((len(text_BT), 0), jnp.int32)
    check_ids(cfg, text_BT, codes_BP)
    if codes_BP.shape[1] >= cfg.num_codes:
        raise ValueError(f"{codes_BP.shape[1]} codes are given of {cfg.num_codes}; nothing is left to sample")
    parts = [_embed_text(cfg, params, text_BT), _embed_codes(cfg, params, codes_BP, 0)]
    x_BTD = jnp.concatenate(parts, axis=1)
    return _through_layers(cfg, params, x_BTD, init_cache(cfg, len(text_BT)), 0)


def decode_step(
    cfg: DalleConfig, params: Params, cache: Cache, code_B: jax.Array, place: jax.Array
) -> tuple[jax.Array, Cache]:
    """Feed the code of raster place `place`; returns float32 (B, V), the logits of the next, and the caches."""
    x_B1D = _embed_codes(cfg, params, code_B[:, None], place)
    return _through_layers(cfg, params, x_B1D, cache, cfg.text_len + place)
