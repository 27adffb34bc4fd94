"""Noise schedules and prediction types: x_t = alpha(t) x_0 + sigma(t) eps, t in [0, 1].

One continuous form covers the variance-preserving and -exploding processes of Song et al. 2021 (2011.13456), the
discrete DDPM (Ho et al. 2020, 2006.11239; step i of n is t = i / n), the cosine schedule (Nichol and Dhariwal
2021, 2102.09672) and the noise levels of Karras et al. 2022 (2206.00364). Functions of time take floats, NumPy
arrays (computed in float64) or jax arrays (float32). B batch; `x` is (B, ...).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config.diffusion import NoiseConfig, Prediction, Spacing, Weighting

_COSINE_SHIFT = 0.008  # 2102.09672, 3.2
_COSINE_LAST = 0.9946  # where the cosine's time ends, so that alpha(1) = 0.008 and not 0; 2206.00927, D


class AlphaSigma(NamedTuple):
    """alpha, sigma and their derivatives with respect to t, each of the shape of t."""

    alpha: Any
    sigma: Any
    d_alpha: Any
    d_sigma: Any

    @property
    def snr(self):
        """The signal-to-noise ratio alpha^2 / sigma^2."""
        return (self.alpha / self.sigma) ** 2


def beta_schedule(cfg: NoiseConfig) -> np.ndarray:
    """Return the betas of the discrete DDPM, float64 (cfg.num_timesteps,); 1e-4 to 0.02 for 1000 steps."""
    return np.linspace(cfg.beta_min / cfg.num_timesteps, cfg.beta_max / cfg.num_timesteps, cfg.num_timesteps)


def _raw_alpha(cfg: NoiseConfig, t, xp):
    """Compute alpha and its derivative, before zero terminal SNR and shift."""
    match cfg.kind:
        case "linear":
            slope = cfg.beta_max - cfg.beta_min
            alpha = xp.exp(-0.25 * t**2 * slope - 0.5 * t * cfg.beta_min)
            return alpha, -0.5 * alpha * (t * slope + cfg.beta_min)
        case "cosine":
            scale = 0.5 * math.pi / (1 + _COSINE_SHIFT)
            rate, first = scale * _COSINE_LAST, math.cos(scale * _COSINE_SHIFT)
            angle = rate * t + scale * _COSINE_SHIFT
            return xp.cos(angle) / first, -rate * xp.sin(angle) / first
        case "ddpm":  # log alpha is linear between the steps
            log_alpha = np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-beta_schedule(cfg)))])
            log_alpha = xp.asarray(log_alpha, t.dtype)
            i = xp.clip(xp.ceil(t * cfg.num_timesteps).astype("int32"), 1, cfg.num_timesteps)
            d_log = (log_alpha[i] - log_alpha[i - 1]) * cfg.num_timesteps
            alpha = xp.exp(log_alpha[i] + d_log * (t - i / cfg.num_timesteps))
            return alpha, d_log * alpha
    raise AssertionError(cfg.kind)


def alpha_sigma(cfg: NoiseConfig, t) -> AlphaSigma:
    """Compute alpha, sigma and their derivatives.

    Args:
      t: in [0, 1], a float or NumPy array (computed and returned in float64) or a jax array (float32). At t = 0 of a
        variance-preserving schedule sigma is 0 and its derivative infinite; use at least `cfg.t_min`.
    """
    xp = jnp if isinstance(t, jax.Array) else np
    t = xp.asarray(t, jnp.float32 if xp is jnp else np.float64)
    if cfg.kind == "ve":
        rate = math.log(cfg.sigma_max / cfg.sigma_min)
        sigma = cfg.sigma_min * xp.exp(rate * t)
        return AlphaSigma(xp.ones_like(t), sigma, xp.zeros_like(t), rate * sigma)
    if cfg.kind == "edm":
        low, high = cfg.sigma_min ** (1 / cfg.rho), cfg.sigma_max ** (1 / cfg.rho)
        root = low + t * (high - low)
        d_sigma = cfg.rho * root ** (cfg.rho - 1) * (high - low)
        return AlphaSigma(xp.ones_like(t), root**cfg.rho, xp.zeros_like(t), d_sigma)
    alpha, d_alpha = _raw_alpha(cfg, t, xp)
    if cfg.zero_terminal_snr:  # alpha(0) is unchanged, alpha(1) becomes 0; 2305.08891, algorithm 1
        last = float(_raw_alpha(cfg, np.asarray(1.0), np)[0])
        alpha, d_alpha = xp.maximum((alpha - last) / (1 - last), 0.0), d_alpha / (1 - last)
    sigma = xp.sqrt(xp.maximum((1 - alpha) * (1 + alpha), 0.0))
    if cfg.shift != 1:  # multiplies sigma / alpha, with alpha^2 + sigma^2 = 1
        norm = xp.sqrt(alpha**2 + (cfg.shift * sigma) ** 2)
        alpha, sigma, d_alpha = alpha / norm, cfg.shift * sigma / norm, d_alpha * cfg.shift**2 / norm**3
    with np.errstate(divide="ignore", invalid="ignore"):
        d_sigma = -alpha * d_alpha / sigma
    return AlphaSigma(alpha, sigma, d_alpha, d_sigma)


def _rows(value, x: jax.Array):
    """Reshape `value`, () or (B,), to broadcast over the trailing axes of `x`."""
    value = jnp.asarray(value, jnp.float32)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value


def add_noise(cfg: NoiseConfig, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """Compute x_t from clean images `x0` and standard normal `noise` of the same shape, at times t, (B,) or ()."""
    at = alpha_sigma(cfg, jnp.asarray(t))
    return _rows(at.alpha, x0) * x0 + _rows(at.sigma, x0) * noise


def prediction_target(prediction: Prediction, x0, noise, alpha, sigma) -> jax.Array:
    """Compute the regression target of a network; v = alpha eps - sigma x_0 (2202.00512, D)."""
    a, s = _rows(alpha, x0), _rows(sigma, x0)
    match prediction:
        case "eps":
            return noise
        case "x0":
            return x0
        case "v":
            return a * noise - s * x0
        case "score":
            return -noise / s
    raise ValueError(f"Expected prediction eps, x0, v or score, got {prediction!r}.")


def to_x0(prediction: Prediction, out: jax.Array, x: jax.Array, alpha, sigma) -> jax.Array:
    """Convert the network's prediction `out` at `x` to the clean image; alpha and sigma are () or (B,).

    eps and score do not determine x_0 where alpha is 0; a schedule with zero terminal SNR needs x0 or v.
    """
    a, s = _rows(alpha, x), _rows(sigma, x)
    match prediction:
        case "eps":
            return (x - s * out) / a
        case "x0":
            return out
        case "v":
            return (a * x - s * out) / (a**2 + s**2)
        case "score":
            return (x + s**2 * out) / a
    raise ValueError(f"Expected prediction eps, x0, v or score, got {prediction!r}.")


def to_noise(x0: jax.Array, x: jax.Array, alpha, sigma) -> jax.Array:
    """Compute the noise in `x` given its clean image `x0`; sigma > 0."""
    return (x - _rows(alpha, x) * x0) / _rows(sigma, x)


def convert_prediction(
    source: Prediction, target: Prediction, out: jax.Array, x: jax.Array, alpha, sigma
) -> jax.Array:
    """Convert the prediction `out` at `x` from the type `source` to the type `target`."""
    x0 = to_x0(source, out, x, alpha, sigma)
    return prediction_target(target, x0, to_noise(x0, x, alpha, sigma), alpha, sigma)


def loss_weight(
    weighting: Weighting, prediction: Prediction, at: AlphaSigma, gamma: float = 5.0
) -> jax.Array:
    """Compute the weight of the squared error of the prediction, of the shape of `at.sigma`.

    Args:
      weighting: `simple` is 1 (for the score sigma^2, which is 1 on eps; 2006.11239, 3.4). `min_snr` is min(SNR, gamma)
        on the error of x_0 (2303.09556, 3.4). `likelihood` is half the rate at which the log SNR falls, on the error of
        eps: the continuous variational bound, in nats (2107.00630, eq. 17).
      gamma: of `min_snr`.
    """
    if weighting == "simple":
        return at.sigma**2 if prediction == "score" else jnp.ones_like(at.sigma)
    if weighting == "likelihood":
        on_eps = at.d_sigma / at.sigma - at.d_alpha / at.alpha
    elif weighting == "min_snr":
        on_eps = jnp.minimum(1.0, gamma / at.snr)
    else:
        raise ValueError(f"Expected weighting simple, min_snr or likelihood, got {weighting!r}.")
    match prediction:  # |error of eps|^2 = factor * |error of the prediction|^2
        case "eps":
            return on_eps
        case "score":
            return on_eps * at.sigma**2
        case "x0":
            return on_eps * at.snr
        case "v":
            return on_eps * (at.alpha / (at.alpha**2 + at.sigma**2)) ** 2
    raise ValueError(f"Expected prediction eps, x0, v or score, got {prediction!r}.")


def low_discrepancy_times(cfg: NoiseConfig, key: jax.Array, batch: int) -> jax.Array:
    """Sample times, float32 (batch,) in [t_min, 1]: each uniform, one per interval of 1 / batch (2107.00630, I.1)."""
    u = (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1.0
    return cfg.t_min + (1 - cfg.t_min) * u


def time_grid(
    cfg: NoiseConfig, num_steps: int, start_time: float = 1.0, spacing: Spacing = "uniform"
) -> np.ndarray:
    """Compute the descending times of a sampler with `num_steps` steps, float64 (num_steps,).

    Args:
      start_time: the first time, in (t_min, 1]; the last is t_min (with one step, `start_time` alone).
      spacing: `uniform` in t; `log_snr`, equal ratios of sigma / alpha; `karras`, equal steps of (sigma / alpha)^(1/7)
        (2206.00364, eq. 5).

    Raises:
      ValueError: an argument out of range.
    """
    if num_steps < 1:
        raise ValueError(f"Expected num_steps of at least 1, got {num_steps}.")
    if cfg.kind == "ddpm" and num_steps > cfg.num_timesteps:
        raise ValueError(
            f"Expected num_steps in [1, {cfg.num_timesteps}] (noise.num_timesteps), got {num_steps}."
        )
    if not cfg.t_min < start_time <= 1:
        raise ValueError(f"Expected start_time in ({cfg.t_min}, 1], got {start_time}.")
    if spacing == "uniform":
        return np.linspace(start_time, cfg.t_min, num_steps)
    if spacing not in ("log_snr", "karras"):
        raise ValueError(f"Expected spacing uniform, log_snr or karras, got {spacing!r}.")
    fine = [space(cfg.t_min, start_time, 20_001) for space in (np.geomspace, np.linspace)]
    times = np.unique(np.concatenate(fine))
    at = alpha_sigma(cfg, times)
    with np.errstate(divide="ignore"):
        log_ratio = np.log(at.sigma) - np.log(at.alpha)
    log_ratio = np.minimum(log_ratio, 12.0)  # the logarithm of a terminal SNR of zero is infinite
    first, last = log_ratio[-1], log_ratio[0]
    fraction = np.linspace(0.0, 1.0, num_steps)
    if spacing == "log_snr":
        targets = first + fraction * (last - first)
    else:
        targets = 7 * np.log(np.exp(first / 7) + fraction * (np.exp(last / 7) - np.exp(first / 7)))
    grid = np.interp(targets, log_ratio, times)
    grid[0], grid[-1] = start_time, cfg.t_min if num_steps > 1 else start_time
    return grid
