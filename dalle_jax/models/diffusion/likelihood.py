"""Likelihood of images under the probability-flow ODE (Song et al. 2021, 2011.13456, D.2; Hutchinson's trace).

d log p(x_t) / dt = -div f along dx/dt = f(x, t) = alpha'(t) x_0(x, t) + sigma'(t) eps(x, t), integrated from t_min
to 1 by fourth-order Runge-Kutta on times of equal steps in the log SNR (ddpm: equal ratios of t). B batch, D values of
an image.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config.diffusion import NoiseConfig
from dalle_jax.models.diffusion.sampler import Denoiser
from dalle_jax.models.diffusion.schedule import alpha_sigma, time_grid, to_noise


@partial(jax.jit, static_argnames=("cfg", "denoise", "num_steps", "num_probes", "trace"))
def log_likelihood(
    cfg: NoiseConfig,
    denoise: Denoiser,
    context: Any,
    x: jax.Array,
    key: jax.Array,
    *,
    num_steps: int = 100,
    num_probes: int = 1,
    trace: Literal["hutchinson", "exact"] = "hutchinson",
) -> jax.Array:
    """Compute the log density of each row of `x` at time t_min.

    The prior at t = 1 is normal with standard deviation sigma(1).

    Args:
      cfg: the noise schedule; static.
      denoise: static function `(context, x, t, alpha, sigma) -> x_0`.
      context: traced inputs of `denoise`.
      x: float (B, ...), scaled as in training.
      key: of the probes.
      num_steps: Runge-Kutta steps of four evaluations each; static.
      num_probes: Rademacher vectors per row and evaluation; static.
      trace: `exact` computes D derivatives instead, for small D; static.

    Returns:
      float32 (B,), nats.

    Raises:
      ValueError: zero terminal SNR, or an argument out of range.
    """
    if num_steps < 1 or num_probes < 1:
        raise ValueError(
            f"Expected num_steps and num_probes of at least 1, got {num_steps} and {num_probes}."
        )
    if trace not in ("hutchinson", "exact"):
        raise ValueError(f"Expected trace hutchinson or exact, got {trace!r}.")
    if cfg.zero_terminal_snr:
        raise ValueError(
            "Expected a schedule without zero terminal SNR, got one with it: its ODE has no eps at t = 1."
        )
    if cfg.kind == "ddpm":  # alpha is not smooth between its steps
        times = np.geomspace(cfg.t_min, 1.0, num_steps + 1)
    else:
        times = time_grid(cfg, num_steps + 1, spacing="log_snr")[::-1]
    stages = np.stack([times[:-1], 0.5 * (times[:-1] + times[1:]), times[1:]], axis=1)
    at = alpha_sigma(cfg, stages)
    columns = [np.asarray(c, np.float32) for c in (stages, *at)]
    dt_S = np.diff(times).astype(np.float32)
    shape, size = x.shape, math.prod(x.shape[1:])

    def field(x, p):
        t, alpha, sigma, d_alpha, d_sigma = p
        x0 = denoise(context, x, t, alpha, sigma)
        return d_alpha * x0 + d_sigma * to_noise(x0, x, alpha, sigma)

    def with_divergence(x, p, vectors):
        """Compute the field, (B, ...), and its divergence, (B,)."""
        # v J v by the reverse mode: products of 16-bit inputs have no forward mode (nn/products.py).
        value, pullback = jax.vjp(lambda x: field(x, p), x)
        div = jax.lax.map(lambda v: jnp.sum((v * pullback(v)[0]).reshape(len(x), -1), axis=1), vectors)
        return value, jnp.mean(div, axis=0) if trace == "hutchinson" else jnp.sum(div, axis=0)

    def body(carry, inputs):
        x, log_B = carry
        (first, middle, last), dt, index = inputs
        if trace == "exact":
            basis = jnp.eye(size).reshape(size, 1, *shape[1:])
            vectors = jnp.broadcast_to(basis, (size, *shape))
        else:
            vectors = jax.random.rademacher(jax.random.fold_in(key, index), (num_probes, *shape), jnp.float32)
        k1, d1 = with_divergence(x, first, vectors)
        k2, d2 = with_divergence(x + 0.5 * dt * k1, middle, vectors)
        k3, d3 = with_divergence(x + 0.5 * dt * k2, middle, vectors)
        k4, d4 = with_divergence(x + dt * k3, last, vectors)
        x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return (x, log_B + dt / 6 * (d1 + 2 * d2 + 2 * d3 + d4)), None

    per_stage = tuple(tuple(jnp.asarray(c[:, i]) for c in columns) for i in range(3))
    inputs = (per_stage, jnp.asarray(dt_S), jnp.arange(num_steps))
    (x, change_B), _ = jax.lax.scan(body, (x.astype(jnp.float32), jnp.zeros(len(x))), inputs)
    std = float(alpha_sigma(cfg, 1.0).sigma)
    squares_B = jnp.sum(x.reshape(len(x), -1) ** 2, axis=1)
    prior_B = -0.5 * squares_B / std**2 - size * math.log(std * math.sqrt(2 * math.pi))
    return prior_B + change_B


def bits_per_dim(log_likelihood_B: jax.Array, size: int, levels_per_unit: float = 1.0) -> jax.Array:
    """Convert log densities in nats to bits per value.

    Args:
      log_likelihood_B: float (B,), nats.
      size: values of an image, D.
      levels_per_unit: gray levels per unit of the model's scale, e.g. 127.5 for bytes mapped to [-1, 1] and dequantized
        uniformly.

    Returns:
      float (B,).
    """
    return -log_likelihood_B / (size * math.log(2)) + math.log2(levels_per_unit)
