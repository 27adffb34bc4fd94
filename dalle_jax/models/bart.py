"""The Transformer of DALL-E Mini and Mega (Dayma et al. 2021): captions through an encoder, codes through a decoder.

BART (Lewis et al. 2019, 1910.13461) with NormFormer's norms (Shleifer et al. 2021, 2110.09456): one before and one
after each attention, one before and one inside each gated MLP; a norm that a matrix follows has no scale, and nothing
but norms has biases. A file of its own beside dalle/, because little is shared: two streams with embeddings of their
own, attention that looks both ways, two softmaxes where the paper has one. The functions are those of dalle/.
Text ids are as there; padding is not seen. The null caption is an empty text: its begin and its end.
B batch, C captions, T text positions, N codes, P codes given, Q positions computed, S positions seen, D width,
H heads, K width of a head, V image vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dalle_jax.config import BartConfig
from dalle_jax.nn.input_checks import check_ids
from dalle_jax.nn.kv_cache import KV
from dalle_jax.nn.linear import fused_linear, linear, matmul
from dalle_jax.parallel.sharding import constrain
from dalle_jax.typing import Params


class BartCache(NamedTuple):
    """seen: which text positions of its captions each group of rows sees, (C, T) each. cross: per layer and group, keys
    and values of those captions, (C, T, H, K). own: per layer those of the codes, (B, N, H, K). The rows are, in order,
    those of each group, neighbours on one caption."""

    seen: tuple[jax.Array, ...]
    cross: tuple[tuple[KV, ...], ...]
    own: tuple[KV, ...]


def init(cfg: BartConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters; those of each stack's blocks are stacked over a leading axis of layers."""
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

    def dense(wide: int, out: int, std: float = 0.02) -> Params:
        return {"kernel": std * jax.random.normal(next(keys), (wide, out))}

    small = 0.02 / math.sqrt(2 * layers)  # of what writes into the residual stream
    block: Params = {}
    for name in attentions:
        block[f"norm_{name}"] = {"bias": jnp.zeros(cfg.dim)}
        block[name] = {n: dense(cfg.dim, cfg.dim) for n in "qkv"} | {"out": dense(cfg.dim, cfg.dim, small)}
        block[f"norm_{name}_out"] = {"scale": jnp.ones(cfg.dim), "bias": jnp.zeros(cfg.dim)}
    block["norm_mlp"] = {"bias": jnp.zeros(cfg.dim)}
    gates = {name: dense(cfg.dim, cfg.mlp_width) for name in ("gate", "up")}
    block["mlp"] = gates | {
        "norm": {"bias": jnp.zeros(cfg.mlp_width)},
        "down": dense(cfg.mlp_width, cfg.dim, small),
    }
    return block


def null_text(cfg: BartConfig) -> jax.Array:
    """The null caption: begin, end, padding. Returns int32 (T,)."""
    ids = cfg.text_vocab + jnp.arange(cfg.text_len, dtype=jnp.int32)
    return ids.at[:2].set(jnp.array([cfg.bos_id, cfg.eos_id]))


# --- layers -----------------------------------------------------------------------------------------------


def _norm(p: Params, x: jax.Array) -> jax.Array:
    """Layer norm in float32; without a scale where there is none."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5)
    x = x * p["scale"][None, None] if "scale" in p else x
    return x + p["bias"][None, None]


def _heads(cfg: BartConfig, p: Params, names: tuple[str, ...], x_BTD: jax.Array) -> Iterator[jax.Array]:
    """Of each of the matrices `names` of an attention, (B, T, H, K)."""
    for y in fused_linear(p, names, x_BTD, cfg.dtype):
        y = y.reshape(*y.shape[:2], cfg.heads, cfg.head_dim)
        yield constrain(y, "batch", None, "heads", None)


def _attend(q_BQHK: jax.Array, kv_CSHK: KV, seen_CQS: jax.Array) -> jax.Array:
    """B / C neighbouring rows look at each of C; the softmax is in float32. seen: (C or 1, Q or 1, S)."""
    rows, queries, heads, width = q_BQHK.shape
    q = (q_BQHK / math.sqrt(width)).reshape(len(kv_CSHK.k), -1, queries, heads, width)
    att = jnp.einsum("cnqhk,cshk->cnhqs", q, kv_CSHK.k, preferred_element_type=jnp.float32)
    att = jnp.where(seen_CQS[:, None, None], att, jnp.finfo(jnp.float32).min)
    att = jax.nn.softmax(att, axis=-1).astype(kv_CSHK.v.dtype)
    return jnp.einsum("cnhqs,cshk->cnqhk", att, kv_CSHK.v).reshape(rows, queries, heads, width)


def _attention(cfg: BartConfig, block: Params, name: str, x_BQD: jax.Array, attention_fn) -> jax.Array:
    """The stream after one attention. look: queries, and for `attn` the keys and values of the same positions, to what
    they attend to, (B, Q, H, K)."""
    names = ("q", "k", "v") if name == "attn" else ("q",)
    y = attention_fn(*_heads(cfg, block[name], names, _norm(block[f"norm_{name}"], x_BQD)))
    y = linear(block[name]["out"], y.reshape(*y.shape[:2], cfg.dim), cfg.dtype)
    y = _norm(block[f"norm_{name}_out"], y)
    return constrain(x_BQD + y.astype(x_BQD.dtype), "batch", None, "embed")


def _mlp(cfg: BartConfig, block: Params, x_BQD: jax.Array) -> jax.Array:
    """The stream after the gated MLP."""
    p, y = block["mlp"], _norm(block["norm_mlp"], x_BQD)
    both = fused_linear(p, ("gate", "up"), y, cfg.dtype)
    gate, up = (constrain(y, "batch", None, "mlp") for y in both)
    y = _norm(p["norm"], jax.nn.gelu(gate, approximate=False) * up)
    return constrain(x_BQD + linear(p["down"], y, cfg.dtype), "batch", None, "embed")


def _scan(cfg: BartConfig, layer, x: jax.Array, blocks: Params) -> jax.Array:
    layer = jax.checkpoint(layer) if cfg.remat == "full" else layer
    return jax.lax.scan(lambda x, block: (layer(x, block), None), x, blocks)[0]


def _embed(cfg: BartConfig, params: Params, part: str, ids_BT: jax.Array, position: jax.Array) -> jax.Array:
    """part: text or image. position: (T,) for all rows, or (B, T)."""
    x_BTD = params[f"{part}_embed"][ids_BT] + params[f"{part}_pos"][jnp.atleast_2d(position)]
    return constrain(_norm(params[f"{part}_norm"], x_BTD), "batch", None, "embed").astype(cfg.dtype)


def encode(cfg: BartConfig, params: Params, text_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Captions as the decoder sees them, (B, T, D) in the compute dtype, and which positions it sees, bool (B, T)."""
    ids_BT = jnp.where(text_BT < cfg.text_vocab, text_BT, cfg.pad_id)
    cut_B = ids_BT[:, -1] != cfg.pad_id  # a caption that fills all positions was cut, and still has its end
    ids_BT = ids_BT.at[:, -1].set(jnp.where(cut_B, cfg.eos_id, cfg.pad_id))
    seen_BT = ids_BT != cfg.pad_id

    def layer(x_BTD, block):
        def attention_fn(q, k, v):
            return _attend(q, KV(k, v), seen_BT[:, None])

        return _mlp(cfg, block, _attention(cfg, block, "attn", x_BTD, attention_fn))

    x_BTD = _embed(cfg, params, "text", ids_BT, jnp.arange(cfg.text_len))
    x_BTD = _scan(cfg, layer, x_BTD, params["text_blocks"])
    return _norm(params["norm_text_out"], x_BTD).astype(cfg.dtype), seen_BT


def _head(cfg: BartConfig, params: Params, x_BQD: jax.Array) -> jax.Array:
    """Products in the compute dtype, sums and result in float32; the rows that are codes."""
    head = params["image_head"]
    if isinstance(params["blocks"], dict):  # `autoregressive.prepare_for_decode` has cut it
        head = {name: x[..., : cfg.image_vocab] for name, x in head.items()}
    y_BQV = matmul(head, _norm(params["norm_out"], x_BQD), cfg.dtype, out_dtype=jnp.float32)
    return constrain(y_BQV, "batch", None, "vocab")


def _started(cfg: BartConfig, codes_BP: jax.Array) -> jax.Array:
    return jnp.pad(codes_BP, ((0, 0), (1, 0)), constant_values=cfg.decoder_start_id)


def logits(
    cfg: BartConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array
) -> tuple[None, jax.Array]:
    """Scores of every code given the caption and all codes before it.

    text_BT: int32 (B, T). codes_BN: int32 (B, N). Returns None, as there are no scores of text, and float32 image
    logits (B, N, V), for the codes 0 to N-1. Raises ValueError for other shapes or dtypes.
    """
    check_ids(cfg, text_BT, codes_BN)
    if codes_BN.shape[1] != cfg.num_codes:
        raise ValueError(f"codes have shape {codes_BN.shape}, want ({len(text_BT)}, {cfg.num_codes})")
    text_BTD, seen_BT = encode(cfg, params, text_BT)
    causal_1NN = jnp.tri(cfg.num_codes, dtype=bool)[None]

    def layer(x_BND, block):
        def own(q, k, v):
            return _attend(q, KV(k, v), causal_1NN)

        def cross(q):
            return _attend(q, KV(*_heads(cfg, block["cross"], ("k", "v"), text_BTD)), seen_BT[:, None])

        x_BND = _attention(cfg, block, "attn", x_BND, own)
        return _mlp(cfg, block, _attention(cfg, block, "cross", x_BND, cross))

    x_BND = _embed(cfg, params, "image", _started(cfg, codes_BN[:, :-1]), jnp.arange(cfg.num_codes))
    return None, _head(cfg, params, _scan(cfg, layer, x_BND, params["blocks"]))


def loss(
    cfg: BartConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of the codes, in nats per code.

    A share `cfg.cond_drop_prob` of the rows, drawn with `key`, has the null caption instead of its own.
    Returns float32 scalar and the metric `image_loss`.
    """
    check_ids(cfg, text_BT, codes_BN)
    drop_B = jax.random.bernoulli(key, cfg.cond_drop_prob, (len(text_BT),))
    text_BT = jnp.where(drop_B[:, None], null_text(cfg)[None], text_BT)
    scores_BNV = logits(cfg, params, text_BT, codes_BN)[1]
    picked_BN = jnp.take_along_axis(scores_BNV, codes_BN[..., None], axis=-1)[..., 0]
    image_loss = jnp.mean(jax.nn.logsumexp(scores_BNV, axis=-1) - picked_BN)
    return image_loss, {"image_loss": image_loss}


# --- sampling: one position at a time over a KV cache ----------------------------------------------------


def init_cache(cfg: BartConfig, captions: int, copies: int = 1, *, guided: bool = False) -> BartCache:
    """Empty caches: of `captions` captions with `copies` rows for each; guided: as many rows again on the null
    caption, whose keys are held once."""
    counts = (captions, 1) if guided else (captions,)

    def zeros(rows: int, length: int) -> KV:
        x = jnp.zeros((rows, length, cfg.heads, cfg.head_dim), cfg.dtype)
        return KV(x, x)

    cross = tuple(zeros(count, cfg.text_len) for count in counts)
    own = zeros(captions * copies * len(counts), cfg.num_codes)
    seen = tuple(jnp.ones((count, cfg.text_len), bool) for count in counts)
    return BartCache(seen, (cross,) * cfg.layers, (own,) * cfg.layers)


def _look_across(cache: BartCache, layer: int, q_BQHK: jax.Array) -> jax.Array:
    parts = jnp.split(q_BQHK, len(cache.seen))
    groups = zip(parts, cache.cross[layer], cache.seen, strict=True)
    return jnp.concatenate([_attend(q, kv, seen[:, None]) for q, kv, seen in groups])


def prefill(
    cfg: BartConfig,
    params: Params,
    text_CT: jax.Array,
    codes_BP: jax.Array | None = None,
    *,
    copies: int = 1,
    guided: bool = False,
) -> tuple[jax.Array, BartCache]:
    """Encode each caption once, then run the start and the first P < N codes of each row, if given.

    As `dalle.prefill`: float32 (B or 2 B, V), the logits of code P, and the caches.
    """
    captions = len(text_CT)
    rows = captions * copies
    if codes_BP is None:
        codes_BP = jnp.zeros((rows, 0), jnp.int32)
    check_ids(cfg, text_CT, codes_BP[::copies])
    if len(codes_BP) != rows:
        raise ValueError(f"codes have shape {codes_BP.shape}, want {rows} rows: {copies} for each caption")
    if codes_BP.shape[1] >= cfg.num_codes:
        raise ValueError(f"{codes_BP.shape[1]} codes are given of {cfg.num_codes}; nothing is left to sample")
    parts = [slice(0, captions)]
    if guided:
        text_CT = jnp.concatenate([text_CT, null_text(cfg)[None]])
        codes_BP = jnp.concatenate([codes_BP, codes_BP])
        parts.append(slice(captions, None))
    text_CTD, seen_CT = encode(cfg, params, text_CT)
    cross = [KV(*_heads(cfg, block["cross"], ("k", "v"), text_CTD)) for block in params["blocks"]]
    grouped = tuple(tuple(KV(kv.k[part], kv.v[part]) for part in parts) for kv in cross)
    cache = BartCache(tuple(seen_CT[part] for part in parts), grouped, ())
    ids_BQ = _started(cfg, codes_BP)
    causal_1QQ, own = jnp.tri(ids_BQ.shape[1], dtype=bool)[None], []
    x_BQD = _embed(cfg, params, "image", ids_BQ, jnp.arange(ids_BQ.shape[1]))
    for i, block in enumerate(params["blocks"]):

        def attention_fn(q, k, v):
            kv, missing = KV(k, v), ((0, 0), (0, cfg.num_codes - q.shape[1]), (0, 0), (0, 0))
            own.append(KV(*(constrain(jnp.pad(x, missing), "batch", None, "heads", None) for x in kv)))
            return _attend(q, kv, causal_1QQ)

        x_BQD = _attention(cfg, block, "attn", x_BQD, attention_fn)
        x_BQD = _attention(cfg, block, "cross", x_BQD, lambda q, i=i: _look_across(cache, i, q))
        x_BQD = _mlp(cfg, block, x_BQD)
    return _head(cfg, params, x_BQD[:, -1:])[:, 0], cache._replace(own=tuple(own))


def resize_cache(cfg: BartConfig, cache: BartCache, size: int) -> BartCache:
    """As `dalle.resize_cache`: room in the decoder's own keys for the start and the first `size` codes."""
    size = min(size + 1, cfg.num_codes)

    def one(x: jax.Array) -> jax.Array:
        return jnp.pad(x[:, :size], ((0, 0), (0, max(0, size - x.shape[1])), (0, 0), (0, 0)))

    return cache._replace(own=tuple(KV(one(k), one(v)) for k, v in cache.own))


def insert_into_cache(cfg: BartConfig, cache: BartCache, begun: BartCache, rows_X: jax.Array) -> BartCache:
    """As `dalle.seat`."""

    def put(old, new):
        return old.at[rows_X].set(new, mode="drop")

    def both(old, groups):
        own, null = groups
        return put(old, jnp.concatenate([own, null.repeat(len(own), axis=0)]))

    def one(old: tuple[KV, ...], new: tuple[KV, ...]) -> tuple[KV, ...]:
        return (KV(*map(both, old[0], zip(*new, strict=True))),)

    own = tuple(KV(*map(put, old, new)) for old, new in zip(cache.own, begun.own, strict=True))
    return BartCache((both(cache.seen[0], begun.seen),), tuple(map(one, cache.cross, begun.cross)), own)


def decode_step(
    cfg: BartConfig,
    params: Params,
    cache: BartCache,
    code_B: jax.Array,
    place: jax.Array,
) -> tuple[jax.Array, BartCache]:
    """Feed the code of raster place `place` < N - 1: one for all rows, or int32 (B,), each row its own.

    Returns float32 (B, V), the logits of the next code, and the caches.
    """
    logits, cache = _decode(cfg, params, cache, code_B[:, None], jnp.asarray(place)[..., None])
    return logits[:, 0], cache


def decode_drafts(
    cfg: BartConfig, params: Params, cache: BartCache, codes_BQ: jax.Array, place_B: jax.Array
) -> tuple[jax.Array, BartCache]:
    """As `dalle.decode_drafts`. Wrong guesses stay in the caches: each place has room of its own there, and is seen by
    no place before it and written anew before any after it."""
    places_BQ = place_B[:, None] + jnp.arange(codes_BQ.shape[1])[None]
    return _decode(cfg, params, cache, codes_BQ, places_BQ)


def commit_drafts(
    cfg: BartConfig, cache: BartCache, fresh: BartCache, place_B: jax.Array, count_B: jax.Array
) -> BartCache:
    """As `dalle.commit_drafts`."""
    return fresh


def _decode(
    cfg: BartConfig, params: Params, cache: BartCache, codes_BQ: jax.Array, place: jax.Array
) -> tuple[jax.Array, BartCache]:
    """place: of each code, (1,) for all rows or (B, Q). Returns float32 (B, Q, V), and the caches."""
    position = place + 1  # the start is at 0
    read = jnp.arange(cache.own[0].k.shape[1])
    seen_BQS = read[None, None] <= jnp.atleast_2d(position)[..., None]
    own = []
    x_BQD = _embed(cfg, params, "image", codes_BQ, jnp.minimum(position, cfg.num_codes - 1))
    for i, block in enumerate(params["blocks"]):

        def attention_fn(q, *new, i=i):
            kv = KV(*(_write(old, x, position) for old, x in zip(cache.own[i], new, strict=True)))
            own.append(kv)
            return _attend(q, kv, seen_BQS)

        x_BQD = _attention(cfg, block, "attn", x_BQD, attention_fn)
        x_BQD = _attention(cfg, block, "cross", x_BQD, lambda q, i=i: _look_across(cache, i, q))
        x_BQD = _mlp(cfg, block, x_BQD)
    return _head(cfg, params, x_BQD), cache._replace(own=tuple(own))


def _write(old_BNHK: jax.Array, new_BQHK: jax.Array, position: jax.Array) -> jax.Array:
    if position.ndim == 2:
        return old_BNHK.at[jnp.arange(len(position))[:, None], position].set(new_BQHK, mode="drop")
    return jax.lax.dynamic_update_slice(old_BNHK, new_BQHK, (0, position[0], 0, 0))
