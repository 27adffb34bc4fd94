"""Samplers of a diffusion model, each one jitted scan; traced guidance, seeds per row.

Ancestral DDPM (Ho et al. 2020, 2006.11239), DDIM (Song et al. 2021, 2010.02502), Euler and Heun on the
probability-flow ODE and predictor-corrector with Langevin steps (Song et al. 2021, 2011.13456),
DPM-Solver++(2M) (Lu et al. 2022, 2211.01095). All of them ask a denoiser for the clean picture and end with it:
the last step goes from t_min to the picture itself. S steps, B batch, F frames; x is (B, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config.diffusion import NoiseConfig, SamplerName, Spacing
from dalle_jax.models.diffusion.schedule import alpha_sigma, time_grid, to_noise

SAMPLERS: tuple[str, ...] = get_args(SamplerName)

# (context, x (B, ...), t (), alpha (), sigma ()) -> the clean picture, float32 (B, ...)
Denoiser = Callable[[Any, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class SamplerOutput(NamedTuple):
    """x (B, ...): the pictures. frames (F, B, ...): clean pictures as seen on the way. first_bad (B,): int32, the
    first step (from 0) after which a row was not finite, or -1."""

    x: jax.Array
    frames: jax.Array
    first_bad: jax.Array


class NonFiniteSampleError(ArithmeticError):
    """A sampled picture is not finite."""


def check_finite(drawn: SamplerOutput) -> None:
    """Raises NonFiniteSampleError naming the first step and the rows, if any row was not finite."""
    bad = np.asarray(drawn.first_bad)
    if (bad >= 0).any():
        step = int(bad[bad >= 0].min())
        rows = ", ".join(map(str, np.flatnonzero(bad >= 0)[:8]))
        raise NonFiniteSampleError(
            f"sampling step {step + 1} gave values that are not finite (rows {rows}); lower the guidance, "
            "use more steps, or a checkpoint from before training went wrong"
        )


def combine_guidance(
    with_condition: jax.Array, without: jax.Array, scale, t, interval=(0.0, 1.0)
) -> jax.Array:
    """Classifier-free guidance (2207.12598): `without + scale (with - without)`; only for t in `interval`
    (2404.07724), elsewhere the conditional answer. All traced."""
    low, high = interval
    scale = jnp.where((t >= low) & (t <= high), scale, 1.0)
    return without + scale * (with_condition - without)


def dynamic_threshold(x0: jax.Array, share) -> jax.Array:
    """Dynamic thresholding (2205.11487, 2.3): each row is clipped to the `share` quantile s of its absolute
    values, at least 1, and divided by s. share 0 clips to [-1, 1]."""
    flat = jnp.abs(x0.reshape(len(x0), -1))
    s = jnp.maximum(jnp.quantile(flat, share, axis=1), 1.0).reshape((-1,) + (1,) * (x0.ndim - 1))
    return jnp.clip(x0, -s, s) / s


def _noise(keys_B: jax.Array, number, x: jax.Array) -> jax.Array:
    """Standard normal (B, ...), each row from its own key and `number` alone."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), x.shape[1:]))(keys_B)


def _plan(cfg: NoiseConfig, grid: np.ndarray) -> dict[str, jax.Array]:
    """What each step needs to know, computed in float64: levels at its start (t) and its end (s)."""
    at = alpha_sigma(cfg, grid)
    a_s, s_s = np.append(at.alpha[1:], 1.0), np.append(at.sigma[1:], 0.0)  # the last step ends at the picture
    t_s = np.append(grid[1:], 0.0)
    d_a_s, d_s_s = np.append(at.d_alpha[1:], 0.0), np.append(at.d_sigma[1:], 0.0)
    var_ts = np.maximum(at.sigma**2 - (at.alpha / a_s) ** 2 * s_s**2, 0.0)  # of x_t given x_s
    posterior = s_s * np.sqrt(var_ts) / at.sigma  # std of x_s given x_t and x_0; 2006.11239, eq. 7
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.log(a_s / s_s) - np.log(at.alpha / at.sigma)  # half the log SNR that a step gains
        second = np.append(0.0, 0.5 * h[1:] / h[:-1])  # weight of the last denoised picture's change
    second[~np.isfinite(second)] = 0.0
    second[-1] = 0.0  # the last step is of first order: its h is infinite
    columns = {
        "number": np.arange(len(grid)), "t": grid, "t_s": t_s, "alpha": at.alpha, "sigma": at.sigma,
        "d_alpha": at.d_alpha, "d_sigma": at.d_sigma, "alpha_s": a_s, "sigma_s": s_s, "d_alpha_s": d_a_s,
        "d_sigma_s": d_s_s, "posterior": posterior, "decay": np.exp(-h), "second": second,
    }  # fmt: skip
    return {
        name: jnp.asarray(v, jnp.int32 if name == "number" else jnp.float32) for name, v in columns.items()
    }


@partial(
    jax.jit,
    static_argnames=(
        "cfg",
        "denoise",
        "shape",
        "sampler",
        "num_steps",
        "spacing",
        "frames",
        "start",
        "on_step",
    ),
)
def sample(
    cfg: NoiseConfig,
    denoise: Denoiser,
    context: Any,
    keys_B: jax.Array,
    shape: tuple[int, ...],
    *,
    sampler: SamplerName = "ddim",
    num_steps: int = 50,
    spacing: Spacing = "uniform",
    eta: jax.Array | float = 0.0,
    corrector_snr: jax.Array | float = 0.16,
    image: jax.Array | None = None,
    start: float = 1.0,
    known: jax.Array | None = None,
    mask: jax.Array | None = None,
    frames: int = 0,
    on_step: Callable[[jax.Array], None] | None = None,
) -> SamplerOutput:
    """Draws one picture per key.

    Args:
      denoise: static function `(context, x, t, alpha, sigma) -> x_0`; guidance and thresholding are its own.
      context: whatever `denoise` needs (parameters, conditions, guidance), traced.
      keys_B: one key per row; a row follows from its key and its part of the context alone.
      shape: of one picture, e.g. (32, 32, 3).
      sampler: ancestral, ddim, euler, heun, dpm++2m, pc. steps: static; heun and pc ask the denoiser twice a step.
      spacing: of the times, see `schedule.time_grid`.
      eta: of ddim, 0 is deterministic and 1 is ancestral. corrector_snr: of pc (2011.13456, algorithms 4, 5).
      image, start: float (B, *shape), image-to-image: noise of time `start` < 1 is put on it, the rest is drawn.
      known, mask: float and bool (B, *shape), inpainting: where the mask is True the picture is `known`; on the way
        the noised `known` stands there (2011.13456, I.2). What is drawn follows it, though less than an exact
        conditional draw would.
      frames: how many clean pictures on the way are kept, evenly spread, the last one included.
      on_step: static; called on the host with the number of each step, from 0, as it is done.

    Returns Drawn. Raises ValueError for an unknown sampler or spacing, steps or start out of range, or shapes that
    do not fit. Values that are not finite are told by `check_finite(drawn)`, outside of jit.
    """
    _check(keys_B, shape, sampler, num_steps, image, start, known, mask, frames)
    grid = time_grid(cfg, num_steps, start, spacing)
    plan = _plan(cfg, grid)
    first = alpha_sigma(cfg, grid[0])
    whole = jnp.zeros((len(keys_B), *shape))
    x = float(first.sigma) * _noise(keys_B, 0, whole)
    x = x if image is None else x + float(first.alpha) * image
    keep = np.round(np.linspace(num_steps / max(frames, 1), num_steps, frames)).astype(int) - 1
    slots = np.full(num_steps, -1)
    slots[keep] = np.arange(frames)

    def move(x, x0, before, p):
        eps = to_noise(x0, x, p["alpha"], p["sigma"])
        match sampler:
            case "ddim" | "ancestral" | "pc":
                std = p["posterior"] * (eta if sampler == "ddim" else 1.0)
                left = jnp.sqrt(jnp.maximum(p["sigma_s"] ** 2 - std**2, 0.0))
                return p["alpha_s"] * x0 + left * eps + std * _noise(keys_B, 2 * p["number"] + 1, x)
            case "dpm++2m":
                d = x0 + p["second"] * (x0 - before)
                # sigma_s / sigma x - alpha_s (exp(-h) - 1) d
                return p["sigma_s"] / p["sigma"] * x + p["alpha_s"] * (1 - p["decay"]) * d
            case "euler" | "heun":
                dt = p["t_s"] - p["t"]
                slope = p["d_alpha"] * x0 + p["d_sigma"] * eps
                ahead = x + dt * slope
                if sampler == "heun":
                    end = p["t_s"], p["alpha_s"], jnp.maximum(p["sigma_s"], 1e-12)
                    x0_s = denoise(context, ahead, *end)
                    slope_s = p["d_alpha_s"] * x0_s + p["d_sigma_s"] * to_noise(x0_s, ahead, *end[1:])
                    ahead = x + dt * 0.5 * (slope + slope_s)
                return jnp.where(p["number"] == num_steps - 1, x0, ahead)

    def correct(x, p):
        """One Langevin step at the level that `x` is at. Its size has the norms of the paper's algorithm by their
        expectation, |z|^2 = D and |score|^2 = D / sigma^2: then it depends on no other row and not on z."""
        level = p["t_s"], p["alpha_s"], jnp.maximum(p["sigma_s"], 1e-12)
        score = -to_noise(denoise(context, x, *level), x, *level[1:]) / level[2]
        size = 2 * (corrector_snr * p["sigma_s"]) ** 2
        z = _noise(keys_B, 2 * p["number"] + 2, x)
        return jnp.where(p["number"] == num_steps - 1, x, x + size * score + jnp.sqrt(2 * size) * z)

    def body(carry, inputs):
        x, before, pictures, first_bad = carry
        p, slot = inputs
        with jax.named_scope("denoise"):
            x0 = denoise(context, x, p["t"], p["alpha"], p["sigma"])
        x = move(x, x0, before, p)
        if sampler == "pc":
            x = correct(x, p)
        if mask is not None:
            there = p["alpha_s"] * known + p["sigma_s"] * _noise(keys_B, 2 * num_steps + 2 + p["number"], x)
            x = jnp.where(mask, there, x)
        finite_B = jnp.isfinite(x).reshape(len(x), -1).all(axis=1)
        first_bad = jnp.where((first_bad < 0) & ~finite_B, p["number"], first_bad)
        if frames:
            new = jax.lax.dynamic_update_index_in_dim(pictures, x0, jnp.maximum(slot, 0), 0)
            pictures = jnp.where(slot >= 0, new, pictures)
        if on_step is not None:
            # Of a value of the finished step, so that the call cannot run ahead of it.
            jax.debug.callback(on_step, p["number"] + 0 * first_bad[0])
        return (x, x0, pictures, first_bad), None

    carry = (x, whole, jnp.zeros((frames, *whole.shape)), jnp.full(len(keys_B), -1, jnp.int32))
    (x, _, pictures, first_bad), _ = jax.lax.scan(body, carry, (plan, jnp.asarray(slots)))
    return SamplerOutput(x, pictures, first_bad)


def _check(keys_B, shape, sampler, steps, image, start, known, mask, frames) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; want one of {', '.join(SAMPLERS)}")
    if (known is None) != (mask is None):
        raise ValueError("inpainting needs both `known` and `mask`")
    if (image is None) != (start == 1):
        raise ValueError("image-to-image needs both `image` and a `start` below 1")
    if not 0 <= frames <= steps:
        raise ValueError(f"frames is {frames}; want 0 to {steps}, the number of steps")
    want = (len(keys_B), *shape)
    for name, value in (("image", image), ("known", known), ("mask", mask)):
        if value is not None and value.shape != want:
            raise ValueError(
                f"{name} has shape {value.shape}, want {want}: one per key, of the picture's size"
            )
    if mask is not None and mask.dtype != bool:
        raise ValueError(f"mask is {mask.dtype}, want bool: True where the picture is known")
