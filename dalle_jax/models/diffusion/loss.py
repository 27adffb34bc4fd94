"""The training loss of diffusion models: the squared error of the prediction at noise levels spread over the batch.

Ho et al. 2020 (2006.11239, 3.4), Kingma et al. 2021 (2107.00630, I.1: low-discrepancy times), Ho and Salimans 2022
(2207.12598: conditions dropped for guidance). B batch, H W pixels.
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

BANDS = 4  # intervals of t whose loss is reported separately


def null_conditions(cfg: DiffusionConfig, conditions: Conditions) -> Conditions:
    """Return `conditions` without caption and label; codes and low-resolution image stay, guidance keeps them."""
    text, label = conditions.text, conditions.label
    if cfg.text is not None and text is not None:
        text = jnp.broadcast_to(null_text(cfg.text)[None], text.shape)
    if label is not None:
        label = jnp.full_like(label, cfg.num_classes)
    return conditions._replace(text=text, label=label)


def _drop_conditions(cfg: DiffusionConfig, conditions: Conditions, drop_B: jax.Array) -> Conditions:
    """Replace caption and label of the rows where `drop_B` is True by the null ones."""
    null = null_conditions(cfg, conditions)
    text, label = conditions.text, conditions.label
    if text is not None and null.text is not None:
        text = jnp.where(drop_B[:, None], null.text, text)
    if label is not None and null.label is not None:
        label = jnp.where(drop_B, null.label, label)
    return conditions._replace(text=text, label=label)


def downsample(images_BHWC: jax.Array, size: int) -> jax.Array:
    """Average pixels over squares to float32 (B, size, size, 3), the condition of a model with `low_res_size`."""
    b, h, _, c = images_BHWC.shape
    return images_BHWC.reshape(b, size, h // size, size, h // size, c).mean(axis=(2, 4))


def loss(
    cfg: DiffusionConfig,
    params: Params,
    images_BHWC: jax.Array,
    conditions: Conditions,
    key: jax.Array,
    *,
    train: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the weighted squared error of `cfg.prediction`, mean over values and rows.

    Args:
      images_BHWC: float in [0, 1].
      conditions: of the images, without `low_res`, which is computed here.
      key: of times, noise, dropped conditions and dropout.
      train: drop caption and label of a fraction `cfg.cond_drop_prob` of the rows, and apply dropout.

    Returns:
      float32 scalar and the metrics `band_1` (least noise) to `band_4`, the loss of the rows whose time lies in that
      quarter, and `eps_mse`, the error of the noise for any prediction. Fewer rows than 4 have fewer bands.
    """
    rows = len(images_BHWC)
    k_time, k_noise, k_null, k_dropout = jax.random.split(key, 4)
    x0 = 2 * images_BHWC - 1
    if cfg.low_res_size:
        conditions = conditions._replace(low_res=downsample(x0, cfg.low_res_size))
    if train and cfg.supports_cfg:
        conditions = _drop_conditions(
            cfg, conditions, jax.random.bernoulli(k_null, cfg.cond_drop_prob, (rows,))
        )
    t_B = low_discrepancy_times(cfg.noise, k_time, rows)
    at = alpha_sigma(cfg.noise, t_B)
    noise = jax.random.normal(k_noise, x0.shape)
    x = add_noise(cfg.noise, x0, noise, t_B)
    encoded = encode_conditions(cfg, params, conditions)
    dropout_key = k_dropout if train and cfg.dropout else None
    out = predict(cfg, params, x, t_B, at.alpha, at.sigma, encoded, dropout_key)

    def error(prediction: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(prediction - target), axis=(1, 2, 3))

    target = prediction_target(cfg.prediction, x0, noise, at.alpha, at.sigma)
    error_B = loss_weight(cfg.weighting, cfg.prediction, at) * error(out, target)
    bands = min(BANDS, rows)  # the times are spread, so no band is empty
    band_B = jnp.minimum((t_B * bands).astype(jnp.int32), bands - 1)
    in_band = jax.nn.one_hot(band_B, bands)
    band_mean = error_B @ in_band / jnp.maximum(in_band.sum(axis=0), 1.0)
    metrics = {f"band_{i + 1}": band_mean[i] for i in range(bands)}
    eps = convert_prediction(cfg.prediction, "eps", out, x, at.alpha, at.sigma)
    return jnp.mean(error_B), {**metrics, "eps_mse": jnp.mean(error(eps, noise))}
