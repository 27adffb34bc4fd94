"""Parameters, logits and loss of the DALL-E Transformer.

B batch, T text positions, N codes, P prefix codes, S stream positions, D width, L layers, M masks, W rows of the text
embedding, V image vocabulary, F width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dalle_jax.config import DalleConfig
from dalle_jax.config.dalle import Remat
from dalle_jax.models.dalle.embedding import (
    apply_head,
    embed_codes,
    embed_text,
    final_norm,
    make_block,
    map_pad_ids,
    null_texts,
    rope_at,
)
from dalle_jax.nn import flash, t5
from dalle_jax.nn.attention import ATTN_OUT, POST_ATTN, QKV, dense_attention
from dalle_jax.nn.cross_entropy import cross_entropy
from dalle_jax.nn.input_checks import check_ids
from dalle_jax.nn.masks import attention_mask, mask_padding
from dalle_jax.nn.module import apply_module, scan_layers
from dalle_jax.nn.norm import make_norm
from dalle_jax.nn.products import DOT
from dalle_jax.parallel.sharding import REPLICATE_BELOW_BYTES, check_divides
from dalle_jax.typing import Params


def init(cfg: DalleConfig, key: jax.Array) -> Params:
    """Initialize the parameters, float32; those of the blocks are stacked over a leading axis of layers."""
    encoder = cfg.text_encoder
    if encoder is None:
        shapes = {"text_embed": (cfg.num_text_ids, cfg.dim)}
    else:
        shapes = {"text_null": (cfg.text_len, encoder.dim)}
    shapes |= {"image_embed": (cfg.image_vocab, cfg.dim)}
    match cfg.pos_embed:
        case "axial":
            axes = {"image_row": (cfg.grid, cfg.dim), "image_col": (cfg.grid, cfg.dim)}
            shapes |= {"text_pos": (cfg.text_len, cfg.dim), **axes}
        case "learned":
            shapes |= {"text_pos": (cfg.text_len, cfg.dim), "image_pos": (cfg.num_codes, cfg.dim)}
    heads = {"image_head": cfg.image_vocab}
    if cfg.text_loss_weight > 0:
        heads["text_head"] = cfg.num_text_ids
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
        params["t5"] = t5.init(encoder, cfg.text_vocab, k_t5)
        params["text_proj"] = {
            "up": {"kernel": 0.02 * jax.random.normal(k_up, (encoder.dim, cfg.dim))},
            "down": {"kernel": 0.02 * jax.random.normal(k_down, (cfg.dim, cfg.dim))},
        }
    x_11D = jnp.zeros((1, 1, cfg.dim))
    for name in ("norm_out", "norm_head")[: 2 if cfg.second_final_norm else 1]:
        params[name] = make_norm(cfg.norm).init(key, x_11D)["params"]

    def block(key: jax.Array) -> Params:
        return make_block(cfg).init(key, x_11D, jnp.ones((1, 1), bool))["params"]

    return {**params, "blocks": jax.vmap(block)(jax.random.split(k_blocks, cfg.layers))}


def check_dalle_mesh(cfg: DalleConfig, mesh: Mesh) -> None:
    """Check that `mesh` divides the heads and the large parameters.

    Raises:
      MeshError: it names the first field that the mesh does not divide.
    """
    check_divides(mesh, "heads", cfg.heads, "model.heads")
    if 4 * cfg.dim**2 > REPLICATE_BELOW_BYTES:
        for axis in ("width", "heads", "heads_in"):
            check_divides(mesh, axis, cfg.dim, "model.dim")
        field = "model.mlp_width" if cfg.mlp_width else "model.dim * model.mlp_ratio"
        check_divides(mesh, "mlp_in", cfg.mlp_dim, field)
    for field, ids in (
        ("model.image_vocab", cfg.image_vocab),
        ("model.text_vocab + model.text_len", cfg.num_text_ids),
    ):
        if 4 * ids * cfg.dim > REPLICATE_BELOW_BYTES:
            check_divides(mesh, "vocab", ids, field)


def layer_masks(cfg: DalleConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct attention masks, bool (M, S, S), and the index of each layer's mask, int (L,)."""
    kinds = sorted(set(cfg.layer_kinds))
    text = cfg.text_len - cfg.shift_masks
    masks = [attention_mask(kind, text, cfg.grid, cfg.conv_kernel) for kind in kinds]
    return np.stack(masks), np.array([kinds.index(kind) for kind in cfg.layer_kinds])


def hidden_states(cfg: DalleConfig, params: Params, text_BT: jax.Array, codes_BP: jax.Array) -> jax.Array:
    """Run the layers over the stream.

    Args:
      text_BT: int32 in [0, text_vocab + text_len).
      codes_BP: int32 in [0, image_vocab), the first P <= N codes.

    Returns:
      float32 (B, T + P, D), the stream after the final norm.

    Raises:
      ValueError: other shapes or dtypes.
    """
    check_ids(cfg, text_BT, codes_BP)
    x_BTD, text_mask_BT = embed_text(cfg, params, text_BT)
    x_BPD = embed_codes(cfg, params, codes_BP, jnp.arange(codes_BP.shape[1]))
    x_BSD = jnp.concatenate([x_BTD, x_BPD], axis=1)
    length, block = x_BSD.shape[1], make_block(cfg)
    masks, mask_index_L = layer_masks(cfg)
    masks = masks[:, :length, :length]
    kernel = flash.select_kernel(cfg.attention_kernel, cfg.layer_kinds, length, cfg.dtype)
    key_mask_BS = None
    if text_mask_BT is not None:  # only the dense kernel takes a mask that differs between rows
        kernel = "dense"
        key_mask_BS = jnp.pad(text_mask_BT, ((0, 0), (0, codes_BP.shape[1])), constant_values=True)
    rope = rope_at(cfg, jnp.arange(length))

    def layer(x_BSD, layer_params, index):
        def attention_fn(q, k, v):
            match kernel:
                case "dense":
                    mask = jnp.asarray(masks)[index]
                    mask = mask if key_mask_BS is None else mask_padding(mask, key_mask_BS)
                    return dense_attention(q, k, v, mask), None
                case "splash":
                    return flash.splash_attention(q, k, v, masks, index), None
                case "cudnn":
                    mask = None if set(cfg.layer_kinds) == {"full"} else jnp.asarray(masks)[index]
                    return flash.cudnn_attention(q, k, v, mask), None

        return apply_module(block, layer_params, x_BSD, attention_fn=attention_fn, rope=rope)[0]

    remat_layer = _remat(cfg.remat, layer)

    layers = (params["blocks"], jnp.asarray(mask_index_L))
    x_BSD = scan_layers(lambda x_BSD, entry: remat_layer(x_BSD, *entry), x_BSD, layers, cfg.scan_unroll)
    return final_norm(cfg, params, x_BSD)


def _remat(remat: Remat, layer: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Wrap a layer so that its backward pass recomputes what `remat` names."""
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return layer
        case "full":
            return jax.checkpoint(layer)
        case "save_attention":
            policy = policies.save_only_these_names(ATTN_OUT)
        case "mlp":
            policy = policies.save_only_these_names(QKV, ATTN_OUT, POST_ATTN)
        case "dots":
            policy = policies.save_only_these_names(DOT)
    return jax.checkpoint(layer, policy=policy)


def logits(
    cfg: DalleConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """Compute the logits of every token given all tokens before it.

    Args:
      text_BT: int32 in [0, text_vocab + text_len).
      codes_BN: int32 in [0, image_vocab).

    Returns:
      float32 text logits (B, T-1, W) of the text tokens 1 to T-1, None without a text head, and float32 image logits
      (B, N, V) of the codes 0 to N-1.

    Raises:
      ValueError: other shapes or dtypes.
    """
    text_BTD, image_BND = _before_heads(cfg, params, text_BT, codes_BN)
    text_logits = apply_head(cfg, params, "text_head", text_BTD) if cfg.text_loss_weight > 0 else None
    return text_logits, apply_head(cfg, params, "image_head", image_BND)


def _before_heads(
    cfg: DalleConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the stream where it predicts text, (B, T-1, D), and where it predicts codes, (B, N, D)."""
    if codes_BN.shape[1:] != (cfg.num_codes,):
        raise ValueError(f"Expected codes of shape ({len(text_BT)}, {cfg.num_codes}), got {codes_BN.shape}.")
    # The last code predicts nothing, but with it the stream has its whole length, 1280 at the paper's sizes, which
    # suits kernels and layouts better than 1279. With shift_masks the masks end one position earlier.
    x_BSD = hidden_states(cfg, params, text_BT, codes_BN[:, :-1] if cfg.shift_masks else codes_BN)
    first = cfg.text_len - 1
    return x_BSD[:, :first], x_BSD[:, first : first + cfg.num_codes]


def loss(
    cfg: DalleConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the weighted cross-entropy of text and image tokens, in nats per token (1/8 and 7/8; 2102.12092, 2.2).

    Args:
      text_BT: int32 in [0, text_vocab + text_len).
      codes_BN: int32 in [0, image_vocab).
      key: selects the fraction `cfg.cond_drop_prob` of the rows whose caption becomes the null caption.

    Returns:
      float32 scalar, and the metrics `text_loss` and `image_loss`.

    Raises:
      ValueError: other shapes or dtypes.
    """
    check_ids(cfg, text_BT, codes_BN)
    drop_B = jax.random.bernoulli(key, cfg.cond_drop_prob, (len(text_BT),))
    text_BT = jnp.where(drop_B[:, None], null_texts(cfg, text_BT), text_BT)
    text_BTD, image_BND = _before_heads(cfg, params, text_BT, codes_BN)

    def head_loss(name, x_BTD, ids_BT):
        head = params[name]
        return cross_entropy(
            x_BTD,
            head["kernel"],
            ids_BT,
            bias_V=head.get("bias"),
            dtype=cfg.dtype,
            vocab_chunk=cfg.loss_vocab_chunk,
        )

    text_loss = jnp.float32(0)
    if cfg.text_loss_weight > 0 and cfg.text_len > 1:
        text_loss = head_loss("text_head", text_BTD, map_pad_ids(cfg, text_BT[:, 1:]))
    image_loss = head_loss("image_head", image_BND, codes_BN)
    total = cfg.text_loss_weight * text_loss + (1 - cfg.text_loss_weight) * image_loss
    return total, {"text_loss": text_loss, "image_loss": image_loss}
