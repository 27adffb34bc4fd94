"""Tiny Transformers for several test modules: configurations, parameters and inputs.

B batch, T text positions, N codes, V image vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import BartConfig, DalleConfig, T5Config, TransformerConfig
from dalle_jax.models import autoregressive
from dalle_jax.parallel.sharding import path_name

# --- one model with two sparse layers ---------------------------------------------------------------------

TINY = DalleConfig(
    text_vocab=6, text_len=3, image_vocab=7, grid=3, dim=16, layers=2, heads=2, mlp_ratio=2,
    attention=("row", "conv"), last_attention=None, conv_kernel=3, dtype="float32", remat="none",
)  # fmt: skip
CAPTIONS = jnp.array([[1, 2, 3], [5, 7, 8], [0, 4, 8]], jnp.int32)  # of TINY; ids from 6 on are padding

# --- one model of each public family ----------------------------------------------------------------------

TINY_FAMILY = DalleConfig(
    text_vocab=6, text_len=3, image_vocab=7, grid=4, dim=16, layers=3, heads=2, mlp_ratio=2, conv_kernel=3,
    attention=("full",), last_attention=None, dtype="float32", remat="none", cond_drop_prob=0.0,
)  # fmt: skip
_MALEVICH = dataclasses.replace(
    TINY_FAMILY,
    sandwich_norm=True,
    second_final_norm=True,
    head_bias=True,
    attention=("row", "column"),
    last_attention="conv_clamped",
)
FAMILIES = {
    "mindalle": dataclasses.replace(TINY_FAMILY, activation="gelu", pos_embed="learned", pad_id=5),
    "malevich_v3": _MALEVICH,
    "malevich_v2": dataclasses.replace(
        _MALEVICH, attention=("row", "full", "column"), last_attention="conv_torus", layers=4, shift_masks=True
    ),
    "llamagen": dataclasses.replace(
        TINY_FAMILY, norm="rms", biases=False, pos_embed="rope2d", activation="swiglu", mlp_width=12, text_len=1,
        text_loss_weight=0.0,
    ),
    "llamagen_t2i": dataclasses.replace(
        TINY_FAMILY, norm="rms", biases=False, pos_embed="rope2d", activation="swiglu", mlp_width=12,
        text_loss_weight=0.0, text_encoder=T5Config(dim=8, layers=2, heads=2, mlp_width=6, num_relative_buckets=4),
    ),
    "dalle_mini": BartConfig(
        text_vocab=9, text_len=5, image_vocab=7, decoder_vocab=9, decoder_start_id=7, grid=4, dim=16, encoder_layers=2,
        layers=2, heads=2, mlp_width=11, dtype="float32", remat="none", cond_drop_prob=0.0,
    ),
}  # fmt: skip


# --- parameters and inputs --------------------------------------------------------------------------------


def random_params(cfg: TransformerConfig, seed: int = 0, **std: float):
    """Return parameters large enough that each of them changes the logits by whole units.

    Args:
      cfg: the model.
      seed: of the NumPy generator.
      **std: standard deviation of parameters whose name contains the keyword; 0.3 for all others.
    """
    shapes = jax.eval_shape(lambda key: autoregressive.init(cfg, key), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def random_leaf(path, leaf):
        name = path_name(path)
        size = next((value for part, value in std.items() if part in name), 0.3)
        return jnp.asarray(("scale" in name) + size * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(random_leaf, shapes)


# Captions with large embeddings change the codes that are sampled.
captioned_params = functools.partial(random_params, text_embed=2.0)
family_params = functools.partial(random_params, embed=0.5)


def family_batch(cfg: TransformerConfig, batch_size: int = 3) -> tuple[jax.Array, jax.Array]:
    """Return captions int32 (B, T), the first with padding, and codes int32 (B, N)."""
    rng = np.random.default_rng(1)
    text = rng.integers(0, cfg.text_vocab, (batch_size, cfg.text_len))  # token 1 of BART is padding too
    text[0, -1] = cfg.text_vocab + cfg.text_len - 1  # padding
    codes = rng.integers(0, cfg.image_vocab, (batch_size, cfg.num_codes))
    return jnp.asarray(text, jnp.int32), jnp.asarray(codes, jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def uncached_logits(cfg: TransformerConfig, params, text_BT: jax.Array, codes_BN: jax.Array) -> jax.Array:
    """Return the image logits of the full forward pass, float32 (B, N, V)."""
    return autoregressive.logits(cfg, params, text_BT, codes_BN)[1]
