"""The autoregressive Transformer of DALL-E over text and image tokens (Ramesh et al. 2021, 2102.12092, 2.2, B).

One stream: `text_len` text tokens, then the codes of the picture in raster order; each position predicts the
next. Text ids lie in [0, text_vocab) for pieces and at text_vocab + i for the pad token of position i, which has
a row of its own in the text embedding, or is `pad_piece`. Training scans over the layers; sampling runs them one
by one, each with its KV cache. The choices of `DalleConfig` cover minDALL-E, ruDALL-E and LlamaGen too.

With a `text_encoder` (nn/t5.py), which is frozen, captions of n pieces stand at the last n of the text positions, and
the others are not seen. A null caption has a length, too, and learned vectors in place of what the encoder makes: one
that guides a caption is as long as that. In text ids it is a row without a piece that ends in text_vocab + n - 1.
B batch, T text positions, N codes, P codes given, S positions of the stream, D width, L layers,
W rows of the text embedding, V image vocabulary, C captions, E width of the text encoder.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import DalleConfig
from dalle_jax.nn import cache as kv
from dalle_jax.nn import drafts, flash, t5
from dalle_jax.nn.attention import ATTENDED, MIDDLE, QKV, Block, attend, norm
from dalle_jax.nn.cache import KV, LayerCache
from dalle_jax.nn.cross_entropy import cross_entropy
from dalle_jax.nn.ids import check_ids
from dalle_jax.nn.masks import attention_mask, hide
from dalle_jax.nn.quantized import product
from dalle_jax.nn.rotary import raster_turns
from dalle_jax.nn.sharding import constrain

Params = dict[str, Any]
Cache = tuple[LayerCache, ...]  # one per layer


def _block(cfg: DalleConfig) -> Block:
    return Block(
        heads=cfg.heads,
        mlp_width=cfg.mlp_dim,
        qk_norm=cfg.qk_norm,
        out_std=0.02 / math.sqrt(2 * cfg.layers),
        dtype=jnp.dtype(cfg.dtype),
        activation=cfg.activation,
        norm=cfg.norm,
        sandwich=cfg.sandwich,
        biases=cfg.biases,
    )


def init(cfg: DalleConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters; those of the blocks are stacked over a leading axis of layers."""
    encoder = cfg.text_encoder
    text = (
        {"text_embed": (cfg.text_ids, cfg.dim)}
        if encoder is None
        else {"text_null": (cfg.text_len, encoder.dim)}
    )
    shapes = text | {"image_embed": (cfg.image_vocab, cfg.dim)}
    match cfg.positions:
        case "grid":
            own = {"image_row": (cfg.grid, cfg.dim), "image_col": (cfg.grid, cfg.dim)}
            shapes |= {"text_pos": (cfg.text_len, cfg.dim), **own}
        case "raster":
            shapes |= {"text_pos": (cfg.text_len, cfg.dim), "image_pos": (cfg.num_codes, cfg.dim)}
    heads = {"image_head": cfg.image_vocab}
    if cfg.text_loss_weight > 0:
        heads["text_head"] = cfg.text_ids
    *keys, k_blocks = jax.random.split(key, len(shapes) + len(heads) + 1)
    k = dict(zip([*shapes, *heads], keys, strict=True))

    def normal(name: str, shape: tuple[int, ...]) -> jax.Array:
        return 0.02 * jax.random.normal(k[name], shape)

    params: Params = {name: normal(name, shape) for name, shape in shapes.items()}
    for name, width in heads.items():
        params[name] = {"kernel": normal(name, (cfg.dim, width))}
        if cfg.head_bias:
            params[name]["bias"] = jnp.zeros(width)
    if encoder is not None:
        k_t5, k_up, k_down = jax.random.split(jax.random.fold_in(key, 0), 3)
        up, down = ((k_up, encoder.dim), (k_down, cfg.dim))
        params["t5"] = t5.init(encoder, cfg.text_vocab, k_t5)
        params["text_proj"] = {
            name: {"kernel": 0.02 * jax.random.normal(k, (wide, cfg.dim))}
            for name, (k, wide) in {"up": up, "down": down}.items()
        }
    x_11D = jnp.zeros((1, 1, cfg.dim))
    for name in ("norm_out", "norm_head")[: 2 if cfg.head_norm else 1]:
        params[name] = norm(cfg.norm).init(key, x_11D)["params"]

    def block(key: jax.Array) -> Params:
        return _block(cfg).init(key, x_11D, jnp.ones((1, 1), bool))["params"]

    return {**params, "blocks": jax.vmap(block)(jax.random.split(k_blocks, cfg.layers))}


def null_text(cfg: DalleConfig) -> jax.Array:
    """The null caption: every position its pad token. Returns int32 (T,)."""
    return cfg.text_vocab + jnp.arange(cfg.text_len, dtype=jnp.int32)


def null_texts(cfg: DalleConfig, text_BT: jax.Array) -> jax.Array:
    """The null caption that guides each caption, int32 (B, T): with a text encoder as long as that."""
    null_BT = jnp.broadcast_to(null_text(cfg), text_BT.shape)
    if cfg.text_encoder is None:
        return null_BT
    return jnp.minimum(null_BT, cfg.text_vocab + t5.lengths(text_BT, cfg.text_vocab)[:, None] - 1)


def _known(cfg: DalleConfig, text_BT: jax.Array) -> jax.Array:
    """The ids as rows of the text embedding: those of padding are `pad_piece` where there is one."""
    if cfg.pad_piece is None:
        return text_BT
    return jnp.where(text_BT < cfg.text_vocab, text_BT, cfg.pad_piece)


def _read_text(cfg: DalleConfig, params: Params, text_BT: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The text positions of the stream, (B, T, D), and which of them are seen, bool (B, T); None where all are."""
    if cfg.text_encoder is None:
        return _placed(cfg, params, params["text_embed"][_known(cfg, text_BT)]), None
    frozen = jax.lax.stop_gradient(params["t5"])
    x_BTE, seen_BT = t5.read(cfg.text_encoder, frozen, text_BT, cfg.text_vocab, cfg.dtype)
    null_B = text_BT[:, 0] >= cfg.text_vocab
    x_BTE = jnp.where(null_B[:, None, None], params["text_null"][None].astype(cfg.dtype), x_BTE)
    return _projected(cfg, params, x_BTE), seen_BT


def _read_nulls(
    cfg: DalleConfig, params: Params, seen_CT: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The same of the null captions that guide captions: of one that serves for all, or of one for each."""
    if seen_CT is None:
        return _read_text(cfg, params, null_text(cfg)[None])
    x_1TD = _projected(cfg, params, params["text_null"][None].astype(cfg.dtype))
    return jnp.broadcast_to(x_1TD, (len(seen_CT), *x_1TD.shape[1:])), seen_CT


def _projected(cfg: DalleConfig, params: Params, x_BTE: jax.Array) -> jax.Array:
    up, down = (params["text_proj"][name]["kernel"].astype(cfg.dtype) for name in ("up", "down"))
    return _placed(cfg, params, jax.nn.gelu(x_BTE @ up) @ down)


def _placed(cfg: DalleConfig, params: Params, x_BTD: jax.Array) -> jax.Array:
    if cfg.positions != "rope":
        x_BTD = x_BTD + params["text_pos"][None]
    return constrain(x_BTD, "batch", None, "embed").astype(cfg.dtype)


def _embed_codes(cfg: DalleConfig, params: Params, codes_BP: jax.Array, place: jax.Array) -> jax.Array:
    """place: raster places of the codes, (P,) for all rows or (B, P)."""
    place = jnp.atleast_2d(place)
    x_BPD = params["image_embed"][codes_BP]
    match cfg.positions:
        case "grid":
            x_BPD = x_BPD + params["image_row"][place // cfg.grid] + params["image_col"][place % cfg.grid]
        case "raster":
            x_BPD = x_BPD + params["image_pos"][place]
    return constrain(x_BPD, "batch", None, "embed").astype(cfg.dtype)


def _turns(cfg: DalleConfig, position: jax.Array) -> jax.Array | None:
    """Of queries and keys at positions of the stream, (T,) or (B, T): (1 or B, T, 2, R), or None."""
    if cfg.positions != "rope":
        return None
    return jnp.asarray(raster_turns(cfg.text_len, cfg.grid, cfg.head_dim))[jnp.atleast_2d(position)]


def _norm_out(cfg: DalleConfig, params: Params, x_BTD: jax.Array) -> jax.Array:
    x_BTD = norm(cfg.norm).apply({"params": params["norm_out"]}, x_BTD)
    return norm(cfg.norm).apply({"params": params["norm_head"]}, x_BTD) if cfg.head_norm else x_BTD


def _head(cfg: DalleConfig, params: Params, name: str, x_BTD: jax.Array) -> jax.Array:
    """Products in the compute dtype, sums and result in float32."""
    y_BTV = product(params[name], x_BTD, cfg.dtype, out=jnp.float32)
    if cfg.head_bias:
        y_BTV = y_BTV + params[name]["bias"][None, None]
    return constrain(y_BTV, "batch", None, "vocab")


def layer_masks(cfg: DalleConfig) -> tuple[np.ndarray, np.ndarray]:
    """The different masks (M, S, S) and which of them each layer uses (L,)."""
    kinds = sorted(set(cfg.layer_kinds))
    text = cfg.text_len - cfg.text_in_raster
    masks = [attention_mask(kind, text, cfg.grid, cfg.conv_kernel) for kind in kinds]
    return np.stack(masks), np.array([kinds.index(kind) for kind in cfg.layer_kinds])


def hidden(cfg: DalleConfig, params: Params, text_BT: jax.Array, codes_BP: jax.Array) -> jax.Array:
    """The stream after the last norm.

    text_BT: int32 in [0, text_vocab + text_len). codes_BP: int32 in [0, image_vocab), the first P <= N codes.
    Returns float32 (B, T + P, D). Raises ValueError for other shapes or dtypes.
    """
    check_ids(cfg, text_BT, codes_BP)
    place_P = jnp.arange(codes_BP.shape[1])
    x_BTD, seen_BT = _read_text(cfg, params, text_BT)
    x_BSD = jnp.concatenate([x_BTD, _embed_codes(cfg, params, codes_BP, place_P)], axis=1)
    length, block = x_BSD.shape[1], _block(cfg)
    masks, which = layer_masks(cfg)
    masks = masks[:, :length, :length]
    kernel = flash.choose(cfg.attention_kernel, cfg.layer_kinds, length, cfg.dtype)
    if seen_BT is not None:  # the other kernels know no mask that differs from row to row
        kernel, seen_BS = "dense", jnp.pad(seen_BT, ((0, 0), (0, codes_BP.shape[1])), constant_values=True)
    turns = _turns(cfg, jnp.arange(length))

    def layer(x_BSD, layer_params, index):
        def look(q, k, v):
            match kernel:
                case "dense":
                    mask = jnp.asarray(masks)[index]
                    return attend(q, k, v, mask if seen_BT is None else hide(mask, seen_BS)), None
                case "splash":
                    return flash.splash(q, k, v, masks, index), None
                case "cudnn":
                    return flash.cudnn(q, k, v), None

        return block.apply({"params": layer_params}, x_BSD, look=look, turns=turns)[0]

    policies = jax.checkpoint_policies
    match cfg.remat:
        case "full":
            layer = jax.checkpoint(layer)
        case "matrices":
            layer = jax.checkpoint(layer, policy=policies.save_only_these_names(ATTENDED))
        case "mlp":
            kept = policies.save_only_these_names(QKV, ATTENDED, MIDDLE)
            layer = jax.checkpoint(layer, policy=kept)
        case "dots":
            layer = jax.checkpoint(layer, policy=policies.dots_with_no_batch_dims_saveable)

    def body(x_BSD, xs):
        layer_params, index = xs
        return layer(x_BSD, layer_params, index), None

    x_BSD, _ = jax.lax.scan(body, x_BSD, (params["blocks"], jnp.asarray(which)), unroll=cfg.scan_unroll)
    return _norm_out(cfg, params, x_BSD)


def logits(
    cfg: DalleConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """Scores of every token given all tokens before it.

    text_BT: int32 (B, T). codes_BN: int32 (B, N). Returns float32 text logits (B, T-1, W), for the text
    tokens 1 to T-1, None without a text head, and float32 image logits (B, N, V), for the codes 0 to N-1. Raises
    ValueError for other shapes or dtypes.
    """
    text_BTD, image_BND = _before_heads(cfg, params, text_BT, codes_BN)
    text = _head(cfg, params, "text_head", text_BTD) if cfg.text_loss_weight > 0 else None
    return text, _head(cfg, params, "image_head", image_BND)


def _before_heads(
    cfg: DalleConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The stream where it predicts text (B, T-1, D) and where it predicts codes (B, N, D)."""
    if codes_BN.shape[1:] != (cfg.num_codes,):
        raise ValueError(f"codes have shape {codes_BN.shape}, want ({len(text_BT)}, {cfg.num_codes})")
    # The last code predicts nothing, but with it the stream has its whole length: 1280 at the paper's sizes,
    # which kernels and layouts like better than 1279. Masks that take the last text token into the raster end
    # one place sooner.
    x_BSD = hidden(cfg, params, text_BT, codes_BN[:, :-1] if cfg.text_in_raster else codes_BN)
    first = cfg.text_len - 1
    return x_BSD[:, :first], x_BSD[:, first : first + cfg.num_codes]


def loss(
    cfg: DalleConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted cross-entropy of text and image tokens (1/8 and 7/8; 2102.12092, 2.2), in nats per token.

    A share `cfg.null_rate` of the rows, drawn with `key`, has the null caption instead of its own.
    Returns float32 scalar and metrics `text_loss`, `image_loss`.
    """
    drop_B = jax.random.bernoulli(key, cfg.null_rate, (len(text_BT),))
    text_BT = jnp.where(drop_B[:, None], null_texts(cfg, text_BT), text_BT)
    text_BTD, image_BND = _before_heads(cfg, params, text_BT, codes_BN)

    def nats(name, x_BTD, ids_BT):
        head = params[name]
        return cross_entropy(
            x_BTD, head["kernel"], ids_BT, bias_V=head.get("bias"), dtype=cfg.dtype, chunk=cfg.vocab_chunk
        )

    text_loss = jnp.float32(0)
    if cfg.text_loss_weight > 0 and cfg.text_len > 1:
        text_loss = nats("text_head", text_BTD, _known(cfg, text_BT[:, 1:]))
    image_loss = nats("image_head", image_BND, codes_BN)
    total = cfg.text_loss_weight * text_loss + (1 - cfg.text_loss_weight) * image_loss
    return total, {"text_loss": text_loss, "image_loss": image_loss}


# --- sampling: one position at a time over a KV cache ----------------------------------------------------


def init_cache(cfg: DalleConfig, captions: int, copies: int = 1, *, guided: bool = False) -> Cache:
    """Empty caches: per layer the text keys of `captions` and the image keys of `copies` rows for each.

    guided: as many rows again on the null caption, whose text keys are held once, or once for each caption where its
    length is the caption's.
    """
    rows = captions * copies * (2 if guided else 1)

    def text(count):
        length = cfg.text_len - cfg.text_in_raster
        zeros = jnp.zeros((count, cfg.heads, length, cfg.head_dim), cfg.dtype)
        return KV(zeros, zeros)

    counts = [captions, 1 if cfg.text_encoder is None else captions][: 2 if guided else 1]
    groups = tuple(text(count) for count in counts)
    seen = () if cfg.text_encoder is None else tuple(jnp.ones((n, cfg.text_len), bool) for n in counts)
    return tuple(LayerCache(groups, kv.empty(cfg, kind, rows), seen) for kind in cfg.layer_kinds)


def _image_logits(cfg: DalleConfig, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Of the last position given, float32 (B, V)."""
    return _head(cfg, params, "image_head", _norm_out(cfg, params, x_BTD[:, -1:]))[:, 0]


def prefill(
    cfg: DalleConfig,
    params: Params,
    text_CT: jax.Array,
    codes_BP: jax.Array | None = None,
    *,
    copies: int = 1,
    guided: bool = False,
) -> tuple[jax.Array, Cache]:
    """Run each caption once, then the first P < N codes of each row, if given.

    `params` as `autoregressive.unstack` returns them. copies: rows per caption, neighbours; B = C * copies. guided:
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
    block, texts, first = _block(cfg), [], []
    x_CTD, seen_CT = _read_text(cfg, params, text_CT)
    if guided:
        null_XTD, null_XT = _read_nulls(cfg, params, seen_CT)
        x_CTD = jnp.concatenate([x_CTD, null_XTD])
        seen_CT = None if seen_CT is None else jnp.concatenate([seen_CT, null_XT])
        codes_BP = jnp.concatenate([codes_BP, codes_BP])
    parts = (slice(0, captions), slice(captions, None)) if guided else (slice(0, captions),)
    seen = () if seen_CT is None else tuple(seen_CT[part] for part in parts)
    x_BPD = _embed_codes(cfg, params, codes_BP, jnp.arange(codes_BP.shape[1]))
    if cfg.text_in_raster:
        x_BPD = jnp.concatenate([_to_rows(x_CTD[:, -1:], captions, copies), x_BPD], axis=1)
        x_CTD = x_CTD[:, :-1]
    turns = _turns(cfg, jnp.arange(x_CTD.shape[1]))
    for layer in params["blocks"]:
        x_CTD, new = block.apply(
            {"params": layer},
            x_CTD,
            look=lambda q, k, v: (kv.attend_text(q, k, v, seen_CT), kv.stored(k, v)),
            turns=turns,
        )
        texts.append(tuple(KV(*(x[part] for x in new)) for part in parts))
    if x_BPD.shape[1] == 0:
        logits = _to_rows(_image_logits(cfg, params, x_CTD), captions, copies)
        images = [kv.empty(cfg, kind, len(codes_BP)) for kind in cfg.layer_kinds]
        return logits, tuple(LayerCache(t, i, seen) for t, i in zip(texts, images, strict=True))
    turns = _turns(cfg, x_CTD.shape[1] + jnp.arange(x_BPD.shape[1]))
    for layer, kind, text in zip(params["blocks"], cfg.layer_kinds, texts, strict=True):
        x_BPD, new = block.apply(
            {"params": layer},
            x_BPD,
            look=lambda q, k, v, kind=kind, text=text: (
                kv.attend_first(cfg, kind, text, seen, q, k, v),
                kv.stored(k, v),
            ),
            turns=turns,
        )
        first.append(kv.fill(cfg, kind, new))
    cache = tuple(LayerCache(t, i, seen) for t, i in zip(texts, first, strict=True))
    return _image_logits(cfg, params, x_BPD), cache


def _to_rows(x: jax.Array, captions: int, copies: int) -> jax.Array:
    """What was computed once per caption, for each of its rows; then that of the null captions, if there, for each."""
    own, null = jnp.repeat(x[:captions], copies, axis=0), x[captions:]
    return jnp.concatenate([own, jnp.repeat(null, len(own) // len(null), axis=0)]) if len(null) else own


def resize_cache(cfg: DalleConfig, cache: Cache, size: int) -> Cache:
    """The caches with room for the first `size` image tokens in layers of full attention, which read no further.

    Every place fed from then on must lie below `size`.
    """
    size = min(size + cfg.text_in_raster, cfg.num_codes)
    return tuple(
        layer._replace(image=kv.resized(cfg, kind, layer.image, size))
        for layer, kind in zip(cache, cfg.layer_kinds, strict=True)
    )


def seat(cfg: DalleConfig, cache: Cache, begun: Cache, rows_X: jax.Array) -> Cache:
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
        seen = tuple(put(x, jnp.concatenate(new.seen)) for x in old.seen)
        # The first image tokens, which only a model with text in its raster has by now.
        image = KV(*map(put, old.image, new.image)) if cfg.text_in_raster else old.image
        return LayerCache((text,), image, seen)

    return tuple(map(one, cache, begun))


def decode_step(
    cfg: DalleConfig,
    params: Params,
    cache: Cache,
    code_B: jax.Array,
    place: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Feed the code of raster place `place`: one for all rows, or int32 (B,), each row its own.

    Returns float32 (B, V), the logits of the next code, and the caches.
    """
    place = jnp.asarray(place)
    place_B1 = place[..., None]  # (1,) for all rows, or (B, 1)
    x_B1D, turns = _embed_codes(cfg, params, code_B[:, None], place_B1), _turns(cfg, cfg.text_len + place_B1)
    if cfg.text_in_raster:
        place = place + 1
    after = []
    for layer, kind, before in zip(params["blocks"], cfg.layer_kinds, cache, strict=True):
        x_B1D, layer_cache = _block(cfg).apply(
            {"params": layer},
            x_B1D,
            look=lambda *new, kind=kind, before=before: kv.attend_step(cfg, kind, before, new, place),
            turns=turns,
        )
        after.append(layer_cache)
    return _image_logits(cfg, params, x_B1D), tuple(after)


def decode_drafts(
    cfg: DalleConfig, params: Params, cache: Cache, codes_BQ: jax.Array, place_B: jax.Array
) -> tuple[jax.Array, tuple[KV, ...]]:
    """Feed Q codes of each row at once, guesses among them, for the raster places from `place_B`, int32 (B,), on.

    Returns float32 (B, Q, V), the logits of the codes after each, and what `keep_drafts` takes to put those that
    were right into the cache. Codes for places that the raster does not have are fed for nothing.
    """
    places_BQ = place_B[:, None] + jnp.arange(codes_BQ.shape[1])[None]
    places_BQ = jnp.minimum(places_BQ, cfg.num_codes - 1)
    x_BQD = _embed_codes(cfg, params, codes_BQ, places_BQ)
    turns = _turns(cfg, cfg.text_len + places_BQ)
    place_B, fresh = place_B + cfg.text_in_raster, []
    for layer, kind, before in zip(params["blocks"], cfg.layer_kinds, cache, strict=True):
        x_BQD, new = _block(cfg).apply(
            {"params": layer},
            x_BQD,
            look=lambda *new, kind=kind, before=before: drafts.attend(cfg, kind, before, new, place_B),
            turns=turns,
        )
        fresh.append(new)
    return _head(cfg, params, "image_head", _norm_out(cfg, params, x_BQD)), tuple(fresh)


def keep_drafts(
    cfg: DalleConfig, cache: Cache, fresh: tuple[KV, ...], place_B: jax.Array, count_B: jax.Array
) -> Cache:
    """The caches with the first `count_B` codes of each row of those that `decode_drafts` fed at `place_B`."""
    place_B = place_B + cfg.text_in_raster
    return tuple(
        drafts.keep(cfg, kind, before, new, place_B, count_B)
        for kind, before, new in zip(cfg.layer_kinds, cache, fresh, strict=True)
    )
