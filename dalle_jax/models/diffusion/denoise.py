"""Denoisers of a trained diffusion model for samplers and likelihood: from a noised image to its clean image x_0.

Classifier-free guidance (Ho and Salimans 2022, 2207.12598) in an interval of times (2404.07724); x_0 is clipped to its
range (2006.11239) or by dynamic thresholding (2205.11487, 2.3). B batch, H W pixels.
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
    """The traced inputs of a denoiser from `make_denoiser`.

    Attributes:
      params: of the model.
      conditions: from `encode_conditions_cfg`, of B rows, or with guidance of 2 B rows, null conditions last.
      guidance_scale: 1 is no guidance.
      guidance_low, guidance_high: interval of times in [0, 1] where guidance applies.
      quantile: of dynamic thresholding, in [0, 1).
    """

    params: Params
    conditions: EncodedConditions
    guidance_scale: jax.Array | float = 1.0
    guidance_low: jax.Array | float = 0.0
    guidance_high: jax.Array | float = 1.0
    quantile: jax.Array | float = 0.995


def encode_conditions_cfg(
    cfg: DiffusionConfig, params: Params, conditions: Conditions, *, use_cfg: bool
) -> EncodedConditions:
    """Encode conditions for a `DenoiserContext`; with guidance the null conditions are appended as B more rows."""
    encoded = encode_conditions(cfg, params, conditions)
    if not use_cfg:
        return encoded
    null = encode_conditions(cfg, params, null_conditions(cfg, conditions))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), encoded, null)


@functools.lru_cache(maxsize=64)
def make_denoiser(cfg: DiffusionConfig, *, use_cfg: bool = False, clip: ClipMode = "range") -> Denoiser:
    """Make a denoiser, the same object for the same arguments, so that programs compiled with it are reused.

    Args:
      use_cfg: apply classifier-free guidance.
      clip: `range` clips x_0 to [-1, 1], `quantile` is dynamic thresholding, `none` (for the likelihood) keeps it.

    Returns:
      `(context: DenoiserContext, x, t, alpha, sigma) -> x_0`, x and x_0 float32 (B, H, W, 3).
    """

    def denoise(context: DenoiserContext, x, t, alpha, sigma):
        inputs = jnp.concatenate([x, x]) if use_cfg else x
        t_B, alpha_B, sigma_B = (jnp.broadcast_to(value, (len(inputs),)) for value in (t, alpha, sigma))
        out = predict(cfg, context.params, inputs, t_B, alpha_B, sigma_B, context.conditions)
        x0 = to_x0(cfg.prediction, out, inputs, alpha_B, sigma_B)
        if use_cfg:
            interval = (context.guidance_low, context.guidance_high)
            x0 = combine_guidance(x0[: len(x)], x0[len(x) :], context.guidance_scale, t, interval)
        match clip:
            case "range":
                return jnp.clip(x0, -1.0, 1.0)
            case "quantile":
                return dynamic_threshold(x0, context.quantile)
        return x0

    return denoise
