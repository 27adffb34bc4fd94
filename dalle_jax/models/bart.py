"""The Transformer of DALL-E Mini and Mega (Dayma et al. 2021): an encoder for captions and a decoder for codes.

BART (Lewis et al. 2019, 1910.13461) with the norms of NormFormer (Shleifer et al. 2021, 2110.09456): one before and one
after each attention, one before and one inside each gated MLP. A norm followed by a matrix has no scale, and only norms
have biases. It shares little with dalle/: two streams with embeddings of their own, bidirectional attention, and two
softmaxes where DALL-E has one. The functions and the text ids are those of dalle/; padding is masked. The null caption
is an empty text: the start token and the end token.
B batch, C captions, T text positions, N codes, P prefix codes, Q positions computed, S positions attended to, D width,
H heads, K width of a head, V image vocabulary, X inserted rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dalle_jax.config import BartConfig
from dalle_jax.nn.input_checks import check_ids, check_prefix
from dalle_jax.nn.kv_cache import KV
from dalle_jax.nn.linear import fused_linear, linear, matmul
from dalle_jax.nn.module import scan_layers
from dalle_jax.nn.products import einsum
from dalle_jax.parallel.sharding import constrain
from dalle_jax.typing import Params


class BartCache(NamedTuple):
    """Caches of the decoder. Rows are ordered by group (captions, null captions), and within it by caption.

    Attributes:
      text_mask: of each group, bool (C, T), False at padding.
      cross_kv: per layer and group, keys and values of the encoded captions, (C, T, H, K).
      self_kv: per layer, keys and values of the start token and the codes, (B, N, H, K).
    """

    text_mask: tuple[jax.Array, ...]
    cross_kv: tuple[tuple[KV, ...], ...]
    self_kv: tuple[KV, ...]


def init(cfg: BartConfig, key: jax.Array) -> Params:
    """Initialize the parameters, float32; those of each stack's blocks are stacked over a leading axis of layers."""
    tables = {
        "text_embed": (cfg.text_vocab, cfg.dim), "text_pos": (cfg.text_len, cfg.dim),
        "image_embed": (cfg.decoder_vocab, cfg.dim), "image_pos": (cfg.num_codes, cfg.dim),
    }  # fmt: skip
    keys = iter(jax.random.split(key, len(tables) + 3))
    params: Params = {name: 0.02 * jax.random.normal(next(keys), shape) for name, shape in tables.items()}
    params["image_head"] = {"kernel": 0.02 * jax.random.normal(next(keys), (cfg.dim, cfg.decoder_vocab))}
    for name in ("text_norm", "image_norm"):
        params[name] = {"scale": jnp.ones(cfg.dim), "bias": jnp.zeros(cfg.dim)}
    for name in ("norm_text_out", "norm_out"):
        params[name] = {"bias": jnp.zeros(cfg.dim)}
    stacks = {"text_blocks": (cfg.encoder_layers, ("attn",)), "blocks": (cfg.layers, ("attn", "cross"))}
    for name, (layers, attentions) in stacks.items():
        params[name] = jax.vmap(partial(_init_block, cfg, layers, attentions))(
            jax.random.split(next(keys), layers)
        )
    return params


def _init_block(cfg: BartConfig, layers: int, attentions: tuple[str, ...], key: jax.Array) -> Params:
    keys = iter(jax.random.split(key, 4 * len(attentions) + 3))

    def dense(fan_in: int, fan_out: int, std: float = 0.02) -> Params:
        return {"kernel": std * jax.random.normal(next(keys), (fan_in, fan_out))}

    out_std = 0.02 / math.sqrt(2 * layers)  # of the kernels that write into the residual stream
    block: Params = {}
    for name in attentions:
        block[f"norm_{name}"] = {"bias": jnp.zeros(cfg.dim)}
        block[name] = {n: dense(cfg.dim, cfg.dim) for n in "qkv"} | {"out": dense(cfg.dim, cfg.dim, out_std)}
        block[f"norm_{name}_out"] = {"scale": jnp.ones(cfg.dim), "bias": jnp.zeros(cfg.dim)}
    block["norm_mlp"] = {"bias": jnp.zeros(cfg.dim)}
    gates = {name: dense(cfg.dim, cfg.mlp_width) for name in ("gate", "up")}
    block["mlp"] = gates | {
        "norm": {"bias": jnp.zeros(cfg.mlp_width)},
        "down": dense(cfg.mlp_width, cfg.dim, out_std),
    }
    return block


def null_text(cfg: BartConfig) -> jax.Array:
    """Return the null caption, int32 (T,): start token, end token, padding."""
    ids = cfg.text_vocab + jnp.arange(cfg.text_len, dtype=jnp.int32)
    return ids.at[:2].set(jnp.array([cfg.bos_id, cfg.eos_id]))


# --- layers -----------------------------------------------------------------------------------------------


def _norm(p: Params, x: jax.Array) -> jax.Array:
    """Apply layer norm in float32, with a scale where there is one."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5)
    x = x * p["scale"][None, None] if "scale" in p else x
    return x + p["bias"][None, None]


def _heads(cfg: BartConfig, p: Params, names: tuple[str, ...], x_BTD: jax.Array) -> Iterator[jax.Array]:
    """Project to the heads of each of the kernels `names` of an attention, (B, T, H, K)."""
    for y in fused_linear(p, names, x_BTD, cfg.dtype):
        y = y.reshape(*y.shape[:2], cfg.heads, cfg.head_dim)
        yield constrain(y, "batch", None, "heads", None)


def _attend(q_BQHK: jax.Array, kv_CSHK: KV, mask_CQS: jax.Array) -> jax.Array:
    """Attend from B / C adjacent rows to each of C keys, softmax in float32. mask: (C or 1, Q or 1, S)."""
    rows, queries, heads, width = q_BQHK.shape
    q = (q_BQHK / math.sqrt(width)).reshape(len(kv_CSHK.k), -1, queries, heads, width)
    att = einsum("cnqhk,cshk->cnhqs", q, kv_CSHK.k, out_dtype=jnp.float32)
    att = jnp.where(mask_CQS[:, None, None], att, jnp.finfo(jnp.float32).min)
    att = jax.nn.softmax(att, axis=-1).astype(kv_CSHK.v.dtype)
    return einsum("cnhqs,cshk->cnqhk", att, kv_CSHK.v).reshape(rows, queries, heads, width)


def _attention(
    cfg: BartConfig, block: Params, name: str, x_BQD: jax.Array, attention_fn: Callable[..., jax.Array]
) -> jax.Array:
    """Apply one attention with its norms and residual sum.

    attention_fn: from queries, and for `attn` keys and values of the same positions, to (B, Q, H, K).
    """
    names = ("q", "k", "v") if name == "attn" else ("q",)
    y = attention_fn(*_heads(cfg, block[name], names, _norm(block[f"norm_{name}"], x_BQD)))
    y = linear(block[name]["out"], y.reshape(*y.shape[:2], cfg.dim), cfg.dtype)
    y = _norm(block[f"norm_{name}_out"], y)
    return constrain(x_BQD + y.astype(x_BQD.dtype), "batch", None, "embed")


def _mlp(cfg: BartConfig, block: Params, x_BQD: jax.Array) -> jax.Array:
    """Apply the gated MLP with its norms and residual sum."""
    p, y = block["mlp"], _norm(block["norm_mlp"], x_BQD)
    pair = fused_linear(p, ("gate", "up"), y, cfg.dtype)
    gate, up = (constrain(y, "batch", None, "mlp") for y in pair)
    y = _norm(p["norm"], jax.nn.gelu(gate, approximate=False) * up)
    return constrain(x_BQD + linear(p["down"], y, cfg.dtype), "batch", None, "embed")


def _scan(
    cfg: BartConfig, layer: Callable[[jax.Array, Params], jax.Array], x: jax.Array, blocks: Params
) -> jax.Array:
    layer = jax.checkpoint(layer) if cfg.remat == "full" else layer
    return scan_layers(layer, x, blocks)


def _embed(cfg: BartConfig, params: Params, part: str, ids_BT: jax.Array, position: jax.Array) -> jax.Array:
    """Embed ids of the part "text" or "image" at `position`, (T,) for all rows or (B, T)."""
    x_BTD = params[f"{part}_embed"][ids_BT] + params[f"{part}_pos"][jnp.atleast_2d(position)]
    return constrain(_norm(params[f"{part}_norm"], x_BTD), "batch", None, "embed").astype(cfg.dtype)


def encode(cfg: BartConfig, params: Params, text_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Run the encoder over captions.

    Args:
      text_BT: int32 in [0, text_vocab + text_len).

    Returns:
      (B, T, D) in the compute dtype, and the text mask, bool (B, T), False at padding.
    """
    ids_BT = jnp.where(text_BT < cfg.text_vocab, text_BT, cfg.pad_id)
    truncated_B = ids_BT[:, -1] != cfg.pad_id  # a truncated caption still ends in the end token
    ids_BT = ids_BT.at[:, -1].set(jnp.where(truncated_B, cfg.eos_id, cfg.pad_id))
    text_mask_BT = ids_BT != cfg.pad_id

    def layer(x_BTD, block):
        def attention_fn(q, k, v):
            return _attend(q, KV(k, v), text_mask_BT[:, None])

        return _mlp(cfg, block, _attention(cfg, block, "attn", x_BTD, attention_fn))

    x_BTD = _embed(cfg, params, "text", ids_BT, jnp.arange(cfg.text_len))
    x_BTD = _scan(cfg, layer, x_BTD, params["text_blocks"])
    return _norm(params["norm_text_out"], x_BTD).astype(cfg.dtype), text_mask_BT


def _image_logits(cfg: BartConfig, params: Params, x_BQD: jax.Array) -> jax.Array:
    """Compute float32 logits of the codes, without the other rows of the decoder vocabulary."""
    head = params["image_head"]
    if isinstance(params["blocks"], dict):  # `autoregressive.prepare_for_decode` slices it once
        head = {name: x[..., : cfg.image_vocab] for name, x in head.items()}
    y_BQV = matmul(head, _norm(params["norm_out"], x_BQD), cfg.dtype, out_dtype=jnp.float32)
    return constrain(y_BQV, "batch", None, "vocab")


def _prepend_start(cfg: BartConfig, codes_BP: jax.Array) -> jax.Array:
    return jnp.pad(codes_BP, ((0, 0), (1, 0)), constant_values=cfg.decoder_start_id)


def logits(
    cfg: BartConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array
) -> tuple[None, jax.Array]:
    """Compute the logits of every code given the caption and all codes before it.

    Args:
      text_BT: int32 in [0, text_vocab + text_len).
      codes_BN: int32 in [0, image_vocab).

    Returns:
      None, as text is not predicted, and float32 image logits (B, N, V) of the codes 0 to N-1.

    Raises:
      ValueError: other shapes or dtypes.
    """
    check_ids(cfg, text_BT, codes_BN)
    if codes_BN.shape[1] != cfg.num_codes:
        raise ValueError(f"Expected codes of shape ({len(text_BT)}, {cfg.num_codes}), got {codes_BN.shape}.")
    text_BTD, text_mask_BT = encode(cfg, params, text_BT)
    causal_1NN = jnp.tri(cfg.num_codes, dtype=bool)[None]

    def layer(x_BND, block):
        def self_attention(q, k, v):
            return _attend(q, KV(k, v), causal_1NN)

        def cross_attention(q):
            return _attend(q, KV(*_heads(cfg, block["cross"], ("k", "v"), text_BTD)), text_mask_BT[:, None])

        x_BND = _attention(cfg, block, "attn", x_BND, self_attention)
        return _mlp(cfg, block, _attention(cfg, block, "cross", x_BND, cross_attention))

    inputs_BN = _prepend_start(cfg, codes_BN[:, :-1])
    x_BND = _embed(cfg, params, "image", inputs_BN, jnp.arange(cfg.num_codes))
    return None, _image_logits(cfg, params, _scan(cfg, layer, x_BND, params["blocks"]))


def loss(
    cfg: BartConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the cross-entropy of the codes, in nats per code.

    Args:
      text_BT: int32 in [0, text_vocab + text_len).
      codes_BN: int32 in [0, image_vocab).
      key: selects the fraction `cfg.cond_drop_prob` of the rows whose caption becomes the null caption.

    Returns:
      float32 scalar, and the metric `image_loss`.

    Raises:
      ValueError: other shapes or dtypes.
    """
    check_ids(cfg, text_BT, codes_BN)
    drop_B = jax.random.bernoulli(key, cfg.cond_drop_prob, (len(text_BT),))
    text_BT = jnp.where(drop_B[:, None], null_text(cfg)[None], text_BT)
    logits_BNV = logits(cfg, params, text_BT, codes_BN)[1]
    target_BN = jnp.take_along_axis(logits_BNV, codes_BN[..., None], axis=-1)[..., 0]
    image_loss = jnp.mean(jax.nn.logsumexp(logits_BNV, axis=-1) - target_BN)
    return image_loss, {"image_loss": image_loss}


# --- sampling: one position at a time over a KV cache ----------------------------------------------------


def init_cache(
    cfg: BartConfig, captions: int, samples_per_caption: int = 1, *, use_cfg: bool = False
) -> BartCache:
    """Allocate empty caches; arguments as in `dalle.init_cache`."""
    counts = (captions, 1) if use_cfg else (captions,)

    def zeros(rows: int, length: int) -> KV:
        x = jnp.zeros((rows, length, cfg.heads, cfg.head_dim), cfg.dtype)
        return KV(x, x)

    cross_kv = tuple(zeros(count, cfg.text_len) for count in counts)
    self_kv = zeros(captions * samples_per_caption * len(counts), cfg.num_codes)
    text_mask = tuple(jnp.ones((count, cfg.text_len), bool) for count in counts)
    return BartCache(text_mask, (cross_kv,) * cfg.layers, (self_kv,) * cfg.layers)


def _attend_text(cache: BartCache, layer: int, q_BQHK: jax.Array) -> jax.Array:
    """Attend from each group of rows to its captions."""
    queries = jnp.split(q_BQHK, len(cache.text_mask))
    groups = zip(queries, cache.cross_kv[layer], cache.text_mask, strict=True)
    return jnp.concatenate([_attend(q, kv, mask[:, None]) for q, kv, mask in groups])


def prefill(
    cfg: BartConfig,
    params: Params,
    text_CT: jax.Array,
    codes_BP: jax.Array | None = None,
    *,
    samples_per_caption: int = 1,
    use_cfg: bool = False,
) -> tuple[jax.Array, BartCache]:
    """Encode each caption once, then run the start token and the prefix codes of each row; as `dalle.prefill`."""
    captions = len(text_CT)
    codes_BP = check_prefix(cfg, text_CT, codes_BP, samples_per_caption)
    groups = [slice(0, captions)]
    if use_cfg:
        text_CT = jnp.concatenate([text_CT, null_text(cfg)[None]])
        codes_BP = jnp.concatenate([codes_BP, codes_BP])
        groups.append(slice(captions, None))
    text_CTD, text_mask_CT = encode(cfg, params, text_CT)
    cross_kvs = [KV(*_heads(cfg, block["cross"], ("k", "v"), text_CTD)) for block in params["blocks"]]
    cross_groups = tuple(tuple(KV(kv.k[group], kv.v[group]) for group in groups) for kv in cross_kvs)
    cache = BartCache(tuple(text_mask_CT[group] for group in groups), cross_groups, ())
    ids_BQ = _prepend_start(cfg, codes_BP)
    causal_1QQ, self_kvs = jnp.tri(ids_BQ.shape[1], dtype=bool)[None], []
    x_BQD = _embed(cfg, params, "image", ids_BQ, jnp.arange(ids_BQ.shape[1]))
    for i, block in enumerate(params["blocks"]):

        def self_attention(q, k, v):
            unused = ((0, 0), (0, cfg.num_codes - q.shape[1]), (0, 0), (0, 0))
            padded = (constrain(jnp.pad(x, unused), "batch", None, "heads", None) for x in (k, v))
            self_kvs.append(KV(*padded))
            return _attend(q, KV(k, v), causal_1QQ)

        x_BQD = _attention(cfg, block, "attn", x_BQD, self_attention)
        x_BQD = _attention(cfg, block, "cross", x_BQD, lambda q, i=i: _attend_text(cache, i, q))
        x_BQD = _mlp(cfg, block, x_BQD)
    return _image_logits(cfg, params, x_BQD[:, -1:])[:, 0], cache._replace(self_kv=tuple(self_kvs))


def resize_cache(cfg: BartConfig, cache: BartCache, size: int) -> BartCache:
    """Resize the self-attention caches to the start token and the first `size` codes; as `dalle.resize_cache`."""
    size = min(size + 1, cfg.num_codes)

    def resize(x: jax.Array) -> jax.Array:
        return jnp.pad(x[:, :size], ((0, 0), (0, max(0, size - x.shape[1])), (0, 0), (0, 0)))

    return cache._replace(self_kv=tuple(KV(resize(k), resize(v)) for k, v in cache.self_kv))


def insert_into_cache(
    cfg: BartConfig, cache: BartCache, prefilled: BartCache, rows_X: jax.Array
) -> BartCache:
    """Insert new images into rows of `cache`; as `dalle.insert_into_cache`."""

    def put(old, new):
        return old.at[rows_X].set(new, mode="drop")

    def put_groups(old, groups):
        own, null = groups
        return put(old, jnp.concatenate([own, null.repeat(len(own), axis=0)]))

    def insert(old: tuple[KV, ...], new: tuple[KV, ...]) -> tuple[KV, ...]:
        return (KV(*map(put_groups, old[0], zip(*new, strict=True))),)

    pairs = zip(cache.self_kv, prefilled.self_kv, strict=True)
    return BartCache(
        text_mask=(put_groups(cache.text_mask[0], prefilled.text_mask),),
        cross_kv=tuple(map(insert, cache.cross_kv, prefilled.cross_kv)),
        self_kv=tuple(KV(*map(put, old, new)) for old, new in pairs),
    )


def decode_step(
    cfg: BartConfig, params: Params, cache: BartCache, code_B: jax.Array, position: jax.Array | int
) -> tuple[jax.Array, BartCache]:
    """Feed one code per row; as `dalle.decode_step`, with `position` < N - 1."""
    logits_B1V, cache = _decode(cfg, params, cache, code_B[:, None], jnp.asarray(position)[..., None])
    return logits_B1V[:, 0], cache


def decode_drafts(
    cfg: BartConfig, params: Params, cache: BartCache, codes_BQ: jax.Array, position_B: jax.Array
) -> tuple[jax.Array, BartCache]:
    """Feed Q codes per row at once; as `dalle.decode_drafts`.

    Rejected drafts stay in the caches: each position has a slot of its own, which no earlier position attends to, and
    which is overwritten before any later one does.
    """
    position_BQ = position_B[:, None] + jnp.arange(codes_BQ.shape[1])[None]
    return _decode(cfg, params, cache, codes_BQ, position_BQ)


def commit_drafts(
    cfg: BartConfig,
    cache: BartCache,
    draft_kvs: BartCache,
    position_B: jax.Array,
    num_accepted_B: jax.Array,
) -> BartCache:
    """Return the caches that `decode_drafts` has written; as `dalle.commit_drafts`."""
    return draft_kvs


def _decode(
    cfg: BartConfig, params: Params, cache: BartCache, codes_BQ: jax.Array, position: jax.Array
) -> tuple[jax.Array, BartCache]:
    """Feed codes at `position`, (1,) for all rows or (B, Q). Returns float32 (B, Q, V) and the caches."""
    slot = position + 1  # the start token is in slot 0
    slots = jnp.arange(cache.self_kv[0].k.shape[1])
    mask_BQS = slots[None, None] <= jnp.atleast_2d(slot)[..., None]
    self_kvs = []
    x_BQD = _embed(cfg, params, "image", codes_BQ, jnp.minimum(slot, cfg.num_codes - 1))
    for i, block in enumerate(params["blocks"]):

        def self_attention(q, *new, i=i):
            kv = KV(*(_write(old, x, slot) for old, x in zip(cache.self_kv[i], new, strict=True)))
            self_kvs.append(kv)
            return _attend(q, kv, mask_BQS)

        x_BQD = _attention(cfg, block, "attn", x_BQD, self_attention)
        x_BQD = _attention(cfg, block, "cross", x_BQD, lambda q, i=i: _attend_text(cache, i, q))
        x_BQD = _mlp(cfg, block, x_BQD)
    return _image_logits(cfg, params, x_BQD), cache._replace(self_kv=tuple(self_kvs))


def _write(old_BNHK: jax.Array, new_BQHK: jax.Array, slot: jax.Array) -> jax.Array:
    """Write keys or values at `slot`, (1,) for all rows or (B, Q)."""
    if slot.ndim == 2:
        return old_BNHK.at[jnp.arange(len(slot))[:, None], slot].set(new_BQHK, mode="drop")
    return jax.lax.dynamic_update_slice(old_BNHK, new_BQHK, (0, slot[0], 0, 0))
