"""A trained model as the samplers and the likelihood want it: the clean picture behind a noised one.

Classifier-free guidance (Ho and Salimans 2022, 2207.12598) in an interval of noise (2404.07724); the clean picture is
held in range as it is (2006.11239) or by its quantile (2205.11487, 2.3). B batch, H W pixels.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from dalle_jax.config import DiffusionConfig
from dalle_jax.models.diffusion.loss import null_conditions
from dalle_jax.models.diffusion.sampler import Denoiser, combine_guidance, dynamic_threshold
from dalle_jax.models.diffusion.schedule import to_x0
from dalle_jax.models.diffusion.unet import Conditions, EncodedConditions, encode_conditions, predict
from dalle_jax.typing import Params

ClipMode = Literal["none", "range", "quantile"]


class DenoiserContext(NamedTuple):
    """All that a denoiser of `denoiser` reads. read: of B rows, or with guidance of 2 B, those without conditions
    last. scale, low, high: of the guidance and its times. share: of the quantile."""

    params: Params
    conditions: EncodedConditions
    scale: jax.Array | float = 1.0
    low: jax.Array | float = 0.0
    high: jax.Array | float = 1.0
    share: jax.Array | float = 0.995


def encode_conditions_cfg(
    cfg: DiffusionConfig, params: Params, given: Conditions, *, guided: bool
) -> EncodedConditions:
    """Conditions for a `Context`: read once, and with guidance the null conditions behind them."""
    read = encode_conditions(cfg, params, given)
    if not guided:
        return read
    null = encode_conditions(cfg, params, null_conditions(cfg, given))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), read, null)


@functools.lru_cache(maxsize=64)
def make_denoiser(cfg: DiffusionConfig, *, guided: bool = False, clip: ClipMode = "range") -> Denoiser:
    """`(context, x, t, alpha, sigma) -> x_0`, x float32 (B, H, W, 3); the same function for the same arguments, so
    that what was compiled with it is found again. clip: `range` holds x_0 in [-1, 1], `quantile` is dynamic
    thresholding, `none` (for the likelihood) leaves it."""

    def denoise(context: DenoiserContext, x, t, alpha, sigma):
        whole = jnp.concatenate([x, x]) if guided else x
        t_B, alpha_B, sigma_B = (jnp.broadcast_to(value, (len(whole),)) for value in (t, alpha, sigma))
        out = predict(cfg, context.params, whole, t_B, alpha_B, sigma_B, context.conditions)
        x0 = to_x0(cfg.prediction, out, whole, alpha_B, sigma_B)
        if guided:
            x0 = combine_guidance(x0[: len(x)], x0[len(x) :], context.scale, t, (context.low, context.high))
        match clip:
            case "range":
                return jnp.clip(x0, -1.0, 1.0)
            case "quantile":
                return dynamic_threshold(x0, context.share)
        return x0

    return denoise
