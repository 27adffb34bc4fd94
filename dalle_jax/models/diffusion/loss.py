"""What a diffusion model descends: the squared error of its answer at noise levels spread evenly over the batch.

Ho et al. 2020 (2006.11239, 3.4), Kingma et al. 2021 (2107.00630, I.1: low-discrepancy times), Ho and Salimans 2022
(2207.12598: conditions dropped, for guidance). B batch, H W pixels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dalle_jax.config import DiffusionConfig
from dalle_jax.models.diffusion.schedule import (
    add_noise,
    alpha_sigma,
    convert_prediction,
    loss_weight,
    low_discrepancy_times,
    prediction_target,
)
from dalle_jax.models.diffusion.text_encoder import null_text
from dalle_jax.models.diffusion.unet import Conditions, encode_conditions, predict
from dalle_jax.typing import Params

BANDS = 4  # stretches of t whose loss is told apart


def null_conditions(cfg: DiffusionConfig, given: Conditions) -> Conditions:
    """`given` with no caption and no label; codes and a small picture stay, they are not guided by."""
    text, label = given.text, given.label
    if text is not None:
        text = jnp.broadcast_to(null_text(cfg.text)[None], text.shape)
    return given._replace(text=text, label=None if label is None else jnp.full_like(label, cfg.num_classes))


def downsample(images_BHWC: jax.Array, size: int) -> jax.Array:
    """Means of squares, float32 (B, size, size, 3): the small picture that a model of `low_res_size` begins from."""
    b, h, _, c = images_BHWC.shape
    return images_BHWC.reshape(b, size, h // size, size, h // size, c).mean(axis=(2, 4))


def loss(
    cfg: DiffusionConfig,
    params: Params,
    images_BHWC: jax.Array,
    given: Conditions,
    key: jax.Array,
    *,
    train: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted squared error of `cfg.prediction`, mean over values and rows.

    images: float (B, H, W, 3) in [0, 1]. given: their conditions without the small picture, which is made here.
    train: drop caption and label of a share `cfg.cond_drop_prob` of the rows, and run dropout.

    Returns a float32 scalar and metrics: `band_1` (least noise) to `band_4`, the loss of the rows whose time lies in
    that quarter, and `eps_mse`, the error of the noise whatever is predicted. Fewer rows than 4 have fewer bands.
    """
    rows = len(images_BHWC)
    k_time, k_noise, k_null, k_dropout = jax.random.split(key, 4)
    x0 = 2 * images_BHWC - 1
    if cfg.low_res_size:
        given = given._replace(low_res=downsample(x0, cfg.low_res_size))
    if train and cfg.supports_cfg:
        drop_B, null = jax.random.bernoulli(k_null, cfg.cond_drop_prob, (rows,)), null_conditions(cfg, given)
        if given.text is not None:
            given = given._replace(text=jnp.where(drop_B[:, None], null.text, given.text))
        if given.label is not None:
            given = given._replace(label=jnp.where(drop_B, null.label, given.label))
    t_B = low_discrepancy_times(cfg.noise, k_time, rows)
    at = alpha_sigma(cfg.noise, t_B)
    noise = jax.random.normal(k_noise, x0.shape)
    x = add_noise(cfg.noise, x0, noise, t_B)
    read = encode_conditions(cfg, params, given)
    out = predict(cfg, params, x, t_B, at.alpha, at.sigma, read, k_dropout if train and cfg.dropout else None)

    def error(got, want):
        return jnp.mean(jnp.square(got - want), axis=(1, 2, 3))

    wanted = prediction_target(cfg.prediction, x0, noise, at.alpha, at.sigma)
    error_B = loss_weight(cfg.weighting, cfg.prediction, at) * error(out, wanted)
    bands = min(BANDS, rows)  # the times are spread, so that no band is empty
    which_B = jnp.minimum((t_B * bands).astype(jnp.int32), bands - 1)
    of_band = jax.nn.one_hot(which_B, bands)
    mean_band = error_B @ of_band / jnp.maximum(of_band.sum(axis=0), 1.0)
    metrics = {f"band_{i + 1}": mean_band[i] for i in range(bands)}
    eps = convert_prediction(cfg.prediction, "eps", out, x, at.alpha, at.sigma)
    return jnp.mean(error_B), {**metrics, "eps_mse": jnp.mean(error(eps, noise))}
