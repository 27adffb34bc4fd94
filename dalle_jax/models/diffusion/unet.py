"""The U-Net of pixel-space diffusion models and its conditions.

Ho et al. 2020 (2006.11239, B): residual blocks with group norm and an added time embedding, attention at some
resolutions. Dhariwal and Nichol 2021 (2105.05233, 3): a time embedding that scales and shifts, narrow heads, residual
blocks that resample. Nichol et al. 2021 (2112.10741, 2.2): attention over the image and the caption together. Embedded
image tokens and a low-resolution image are upsampled and concatenated to the noised channels (2104.07636, 3).
B batch, H W pixels, h w patches, C channels, E width of the time embedding, T text positions, N codes, S positions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.config import DiffusionConfig
from dalle_jax.models.diffusion import text_encoder
from dalle_jax.nn.attention import dense_attention
from dalle_jax.nn.conv import Conv
from dalle_jax.nn.linear import Dense
from dalle_jax.nn.module import apply_module
from dalle_jax.nn.norm import GroupNorm
from dalle_jax.parallel.sharding import constrain
from dalle_jax.typing import Params

_INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
_ZERO = nn.initializers.zeros


class Conditions(NamedTuple):
    """Conditions of a batch of images; None where the model does not use one.

    Attributes:
      text: int32 (B, T), ids of `text_encoder.encode_text`.
      label: int32 (B,) in [0, num_classes], num_classes for no label.
      codes: int32 (B, N), image tokens.
      low_res: float (B, low_res_size, low_res_size, 3) in [-1, 1].
    """

    text: jax.Array | None = None
    label: jax.Array | None = None
    codes: jax.Array | None = None
    low_res: jax.Array | None = None


class EncodedConditions(NamedTuple):
    """Conditions with encoded captions, which are computed once and not once per step."""

    text: text_encoder.EncodedText | None
    label: jax.Array | None
    codes: jax.Array | None
    low_res: jax.Array | None


def _conv(
    width: int, dtype: Any, name: str, *, strides: int = 1, padding: Any = None, init: Any = _INIT
) -> Conv:
    return Conv(width, 3, strides, padding, dtype, init, name=name)


def _dense(width: int, dtype: Any, name: str, init: Any = _INIT) -> Dense:
    """Make a linear layer; it also computes 1x1 convolutions, faster than a convolution does."""
    return Dense(width, True, dtype, init, name=name)


def _upsample(x_BHWC: jax.Array, factor: int) -> jax.Array:
    """Upsample by nearest neighbor."""
    b, h, w, c = x_BHWC.shape
    x = jnp.broadcast_to(x_BHWC[:, :, None, :, None], (b, h, factor, w, factor, c))
    return x.reshape(b, h * factor, w * factor, c)


def _halve(x_BHWC: jax.Array) -> jax.Array:
    """Average over squares of 2 x 2."""
    b, h, w, c = x_BHWC.shape
    return x_BHWC.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def patchify(x_BHWC: jax.Array, patch: int) -> jax.Array:
    """Move squares of `patch` x `patch` pixels to channels, (B, H / patch, W / patch, patch^2 C)."""
    b, h, w, c = x_BHWC.shape
    x = x_BHWC.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // patch, w // patch, patch * patch * c)


def unpatchify(x_BhwC: jax.Array, patch: int) -> jax.Array:
    """Invert `patchify`."""
    b, h, w, c = x_BhwC.shape
    x = x_BhwC.reshape(b, h, w, patch, patch, c // patch**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * patch, w * patch, c // patch**2)


def timestep_embedding(time_B: jax.Array, width: int) -> jax.Array:
    """Compute sinusoidal embeddings, float32 (B, width): sines, then cosines, of wavelengths from 2 pi to 20,000 pi, as
    in the code of 2006.11239."""
    half = width // 2
    rate = jnp.exp(-math.log(10_000) * jnp.arange(half) / max(half - 1, 1))
    angle = time_B[:, None].astype(jnp.float32) * rate[None]
    embedding = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)
    return jnp.pad(embedding, ((0, 0), (0, width - 2 * half)))


def _norm(groups: int | None, channels: int, name: str) -> GroupNorm:
    if groups is None:
        groups = next(g for g in range(min(32, max(channels // 4, 1)), 0, -1) if channels % g == 0)
    return GroupNorm(groups, name=name)


class UNetResBlock(nn.Module):
    """A residual block with the time embedding."""

    width: int
    groups: int | None
    scale_shift_norm: bool
    dropout: float
    dtype: Any
    resample: str | None = None  # down, up, or None

    @nn.compact
    def __call__(self, x_BHWC, time_BE, train: bool):
        y = nn.swish(_norm(self.groups, x_BHWC.shape[-1], "norm1")(x_BHWC)).astype(self.dtype)
        if self.resample is not None:
            resample = _halve if self.resample == "down" else lambda x: _upsample(x, 2)
            x_BHWC, y = resample(x_BHWC), resample(y)
        y = _conv(self.width, self.dtype, "conv1")(y)
        time = _dense(self.width * (2 if self.scale_shift_norm else 1), self.dtype, "time")(nn.swish(time_BE))
        time = time[:, None, None].astype(jnp.float32)
        norm = _norm(self.groups, self.width, "norm2")
        if self.scale_shift_norm:
            scale, shift = jnp.split(time, 2, axis=-1)
            y = norm(y) * (1 + scale) + shift
        else:
            y = norm(y + time)
        y = nn.Dropout(self.dropout, deterministic=not train)(nn.swish(y)).astype(self.dtype)
        y = _conv(self.width, self.dtype, "conv2", init=_ZERO)(y)
        if x_BHWC.shape[-1] != self.width:
            x_BHWC = _dense(self.width, self.dtype, "shortcut")(x_BHWC)
        return constrain(x_BHWC + y, "batch", None, None, "embed")


class UNetAttnBlock(nn.Module):
    """Full attention over the positions of the image and, with text, of the caption."""

    head_dim: int | None
    groups: int | None
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC, text_BTD=None):
        b, h, w, c = x_BHWC.shape
        head = self.head_dim or c

        def heads(x_BSC):
            x_BSHK = x_BSC.reshape(b, x_BSC.shape[1], c // head, head)
            return constrain(x_BSHK, "batch", None, "heads", None)

        y_BSC = _norm(self.groups, c, "norm")(x_BHWC).reshape(b, h * w, c).astype(self.dtype)
        q, k, v = (heads(_dense(c, self.dtype, name)(y_BSC)) for name in "qkv")
        if text_BTD is not None:
            k_text, v_text = (heads(_dense(c, self.dtype, name)(text_BTD)) for name in ("text_k", "text_v"))
            k, v = jnp.concatenate([k_text, k], axis=1), jnp.concatenate([v_text, v], axis=1)
        with jax.named_scope("attend"):
            y_BSC = dense_attention(q, k, v, jnp.ones((q.shape[1], k.shape[1]), bool)).reshape(b, h * w, c)
        y = _dense(c, self.dtype, "proj", _ZERO)(y_BSC).reshape(b, h, w, c)
        return constrain(x_BHWC + y, "batch", None, None, "embed")


class UNet(nn.Module):
    """The network of one prediction."""

    cfg: DiffusionConfig

    @nn.compact
    def __call__(self, x_BHWC, time_B, conditions: EncodedConditions, train: bool):
        """Return float32 (B, H, W, 3) from `x` of about unit variance and times from about 0 to 1000."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        res = nn.remat(UNetResBlock, static_argnums=(3,)) if cfg.remat else UNetResBlock
        attn = nn.remat(UNetAttnBlock) if cfg.remat else UNetAttnBlock

        def block(width: int, name: str, resample: str | None = None):
            module = res(
                width, cfg.norm_groups, cfg.scale_shift_norm, cfg.dropout, dtype, resample, name=name
            )
            return lambda x: module(x, time_BE, train)

        def attention(name: str):
            module = attn(cfg.head_dim, cfg.norm_groups, dtype, name=name)
            return lambda x: module(x, None if conditions.text is None else conditions.text.states)

        time_BE = _dense(4 * cfg.width, dtype, "time_1")(timestep_embedding(time_B, cfg.width))
        time_BE = _dense(4 * cfg.width, dtype, "time_2")(nn.swish(time_BE))
        if cfg.num_classes:
            table = nn.Embed(cfg.num_classes + 1, 4 * cfg.width, dtype=dtype, name="class_embed")
            time_BE = time_BE + table(conditions.label)
        if conditions.text is not None:
            time_BE = time_BE + _dense(4 * cfg.width, dtype, "text_mean")(conditions.text.mean)

        x = patchify(x_BHWC, cfg.patch_size).astype(dtype)
        if cfg.codes is not None:
            grid = cfg.codes.grid
            table = nn.Embed(cfg.codes.vocab, cfg.codes.width, dtype=dtype, name="codes_embed")
            codes = table(conditions.codes).reshape(len(x), grid, grid, cfg.codes.width)
            x = jnp.concatenate([x, _upsample(codes, x.shape[1] // grid)], axis=-1)
        if cfg.low_res_size:
            low_res = jax.image.resize(conditions.low_res, x_BHWC.shape, "bilinear", antialias=False)
            x = jnp.concatenate([x, patchify(low_res, cfg.patch_size).astype(dtype)], axis=-1)

        x = constrain(_conv(cfg.width, dtype, "conv_in")(x), "batch", None, None, "embed")
        skips, last = [x], len(cfg.channel_multipliers) - 1
        for level, multiplier in enumerate(cfg.channel_multipliers):
            for j in range(cfg.blocks):
                x = block(cfg.width * multiplier, f"down_{level}_block_{j}")(x)
                if cfg.sizes[level] in cfg.attention_sizes:
                    x = attention(f"down_{level}_attn_{j}")(x)
                skips.append(x)
            if level != last:
                name = f"down_{level}_downsample"
                if cfg.resample == "block":
                    x = block(x.shape[-1], name, "down")(x)
                else:
                    x = _conv(x.shape[-1], dtype, name, strides=2, padding=((0, 1), (0, 1)))(x)
                skips.append(x)
        x = block(x.shape[-1], "mid_block_1")(x)
        x = attention("mid_attn")(x)
        x = block(x.shape[-1], "mid_block_2")(x)
        for level in reversed(range(last + 1)):
            for j in range(cfg.blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(cfg.width * cfg.channel_multipliers[level], f"up_{level}_block_{j}")(x)
                if cfg.sizes[level] in cfg.attention_sizes:
                    x = attention(f"up_{level}_attn_{j}")(x)
            if level > 0:
                name = f"up_{level}_upsample"
                if cfg.resample == "block":
                    x = block(x.shape[-1], name, "up")(x)
                else:
                    x = _conv(x.shape[-1], dtype, name)(_upsample(x, 2))
        x = nn.swish(_norm(cfg.norm_groups, x.shape[-1], "norm_out")(x))
        x = _conv(3 * cfg.patch_size**2, jnp.float32, "conv_out", init=_ZERO)(x)
        return unpatchify(x, cfg.patch_size)


def init(cfg: DiffusionConfig, key: jax.Array) -> Params:
    """Initialize the parameters, float32: `unet`, and `text_encoder` for a model with captions."""
    k_unet, k_text = jax.random.split(key)
    params: Params = {}
    if cfg.text is not None:
        params["text_encoder"] = text_encoder.init(cfg.text, k_text)
    states = jnp.zeros((1, 1, cfg.text.dim if cfg.text else 1))
    conditions = EncodedConditions(
        text=None if cfg.text is None else text_encoder.EncodedText(states, states[:, 0]),
        label=jnp.zeros(1, jnp.int32),
        codes=jnp.zeros((1, cfg.codes.grid**2 if cfg.codes else 0), jnp.int32),
        low_res=jnp.zeros((1, cfg.low_res_size, cfg.low_res_size, 3)),
    )
    x = jnp.zeros((1, cfg.image_size, cfg.image_size, 3))
    params["unet"] = UNet(cfg).init(k_unet, x, jnp.zeros(1), conditions, False)["params"]
    return params


def encode_conditions(cfg: DiffusionConfig, params: Params, conditions: Conditions) -> EncodedConditions:
    """Encode the conditions for `predict`.

    Raises:
      ValueError: a condition is missing or not one of this model, or has another shape or dtype.
    """
    used = {
        "text": cfg.text is not None,
        "label": cfg.num_classes > 0,
        "codes": cfg.codes is not None,
        "low_res": cfg.low_res_size > 0,
    }
    for name, value in conditions._asdict().items():
        if used[name] and value is None:
            raise ValueError(f"Expected the condition {name} of this model, got none.")
        if not used[name] and value is not None:
            raise ValueError(f"Expected no condition {name}, which this model does not use, got one.")
    text, label, codes, low_res = conditions
    if cfg.codes is not None and codes is not None and codes.shape[1:] != (cfg.codes.grid**2,):
        raise ValueError(f"Expected codes of shape (batch, {cfg.codes.grid**2}), got {codes.shape}.")
    size = cfg.low_res_size
    if low_res is not None and low_res.shape[1:] != (size, size, 3):
        raise ValueError(f"Expected low_res of shape (batch, {size}, {size}, 3), got {low_res.shape}.")
    encoded = None
    if cfg.text is not None and text is not None:
        encoded = text_encoder.encode_text(cfg.text, params["text_encoder"], text, jnp.dtype(cfg.dtype))
    return EncodedConditions(encoded, label, codes, low_res)


def predict(
    cfg: DiffusionConfig,
    params: Params,
    x_BHWC: jax.Array,
    t_B: jax.Array,
    alpha_B: jax.Array,
    sigma_B: jax.Array,
    conditions: EncodedConditions,
    key: jax.Array | None = None,
) -> jax.Array:
    """Predict `cfg.prediction` from noised images.

    Args:
      x_BHWC: float, noised images of clean ones in [-1, 1].
      t_B: float32 in [t_min, 1].
      alpha_B, sigma_B: float32, of `schedule.alpha_sigma`.
      conditions: from `encode_conditions`.
      key: of dropout; None disables dropout.

    Returns:
      float32 (B, H, W, 3).

    Raises:
      ValueError: images of another size.
    """
    expected = (len(x_BHWC), cfg.image_size, cfg.image_size, 3)
    if x_BHWC.shape != expected:
        raise ValueError(f"Expected images of shape {expected}, got {x_BHWC.shape}.")
    # The discrete schedule counts its timesteps from 0; the others have none and use the same range.
    time_B = t_B * cfg.noise.num_timesteps - 1 if cfg.noise.kind == "ddpm" else 1000 * t_B
    std = jnp.sqrt(alpha_B**2 + sigma_B**2)[:, None, None, None]  # 1 for variance-preserving schedules
    rngs = None if key is None else {"dropout": key}
    x_BHWC = constrain(x_BHWC / std, "batch", None, None, None)
    out = apply_module(UNet(cfg), params["unet"], x_BHWC, time_B, conditions, key is not None, rngs=rngs)
    return out / sigma_B[:, None, None, None] if cfg.prediction == "score" else out
