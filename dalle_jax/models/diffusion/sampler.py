"""Samplers of diffusion models, each one jitted scan with a random key per row.

Ancestral DDPM (Ho et al. 2020, 2006.11239), DDIM (Song et al. 2021, 2010.02502), Euler and Heun on the
probability-flow ODE and predictor-corrector with Langevin steps (Song et al. 2021, 2011.13456),
DPM-Solver++(2M) (Lu et al. 2022, 2211.01095). All of them call a denoiser that predicts the clean image x_0, and the
last step goes from t_min to x_0 itself. S steps, B batch, F frames; x is (B, ...). Suffix _s: at the end of a step.
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

# (context, x (B, ...), t (), alpha (), sigma ()) -> the clean image, float32 (B, ...)
Denoiser = Callable[[Any, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class SamplerOutput(NamedTuple):
    """The result of `sample`.

    Attributes:
      x: float32 (B, ...), the sampled images.
      frames: float32 (F, B, ...), predicted clean images of intermediate steps.
      first_nonfinite_step: int32 (B,), the first step (from 0) after which a row was not finite, or -1.
    """

    x: jax.Array
    frames: jax.Array
    first_nonfinite_step: jax.Array


class NonFiniteSampleError(ArithmeticError):
    """A sampled image is not finite."""


def check_finite(output: SamplerOutput) -> None:
    """Check that all rows are finite.

    Raises:
      NonFiniteSampleError: it names the first step and the rows.
    """
    first_B = np.asarray(output.first_nonfinite_step)
    if (first_B >= 0).any():
        step = int(first_B[first_B >= 0].min())
        rows = ", ".join(map(str, np.flatnonzero(first_B >= 0)[:8]))
        raise NonFiniteSampleError(
            f"Expected finite values, got others in sampling step {step + 1} (rows {rows}). Use a lower "
            "guidance scale, "
            "more steps, or an earlier checkpoint."
        )


def combine_guidance(
    cond: jax.Array,
    uncond: jax.Array,
    guidance_scale: jax.Array | float,
    t: jax.Array | float,
    interval: tuple[jax.Array | float, jax.Array | float] = (0.0, 1.0),
) -> jax.Array:
    """Apply classifier-free guidance (2207.12598), `uncond + guidance_scale (cond - uncond)`, to times in `interval`
    (2404.07724); at other times return `cond`."""
    low, high = interval
    scale = jnp.where((t >= low) & (t <= high), guidance_scale, 1.0)
    return uncond + scale * (cond - uncond)


def dynamic_threshold(x0: jax.Array, quantile: jax.Array | float) -> jax.Array:
    """Apply dynamic thresholding (2205.11487, 2.3): clip each row to s and divide it by s, the `quantile` of its
    absolute values, at least 1. Quantile 0 clips to [-1, 1]."""
    flat = jnp.abs(x0.reshape(len(x0), -1))
    s = jnp.maximum(jnp.quantile(flat, quantile, axis=1), 1.0).reshape((-1,) + (1,) * (x0.ndim - 1))
    return jnp.clip(x0, -s, s) / s


def _noise(keys_B: jax.Array, index: jax.Array | int, x: jax.Array) -> jax.Array:
    """Sample standard normal noise (B, ...), each row from its own key and `index` alone."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), x.shape[1:]))(keys_B)


def _step_table(cfg: NoiseConfig, grid: np.ndarray) -> dict[str, jax.Array]:
    """Compute the coefficients of each step, in float64: at its start (t) and at its end (s)."""
    at = alpha_sigma(cfg, grid)
    a_s, s_s = (
        np.append(at.alpha[1:], 1.0),
        np.append(at.sigma[1:], 0.0),
    )  # the last step ends at the clean image
    t_s = np.append(grid[1:], 0.0)
    d_a_s, d_s_s = np.append(at.d_alpha[1:], 0.0), np.append(at.d_sigma[1:], 0.0)
    var_ts = np.maximum(at.sigma**2 - (at.alpha / a_s) ** 2 * s_s**2, 0.0)  # of x_t given x_s
    posterior_std = s_s * np.sqrt(var_ts) / at.sigma  # of x_s given x_t and x_0; 2006.11239, eq. 7
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.log(a_s / s_s) - np.log(at.alpha / at.sigma)  # half the log SNR that a step gains
        second_order = np.append(0.0, 0.5 * h[1:] / h[:-1])  # weight of the change of x_0 since the last step
    second_order[~np.isfinite(second_order)] = 0.0
    second_order[-1] = 0.0  # the last step is of first order: its h is infinite
    columns = {
        "index": np.arange(len(grid)), "t": grid, "t_s": t_s, "alpha": at.alpha, "sigma": at.sigma,
        "d_alpha": at.d_alpha, "d_sigma": at.d_sigma, "alpha_s": a_s, "sigma_s": s_s, "d_alpha_s": d_a_s,
        "d_sigma_s": d_s_s, "posterior_std": posterior_std, "decay": np.exp(-h), "second_order": second_order,
    }  # fmt: skip
    return {
        name: jnp.asarray(v, jnp.int32 if name == "index" else jnp.float32) for name, v in columns.items()
    }


_STATIC = (
    "cfg",
    "denoise",
    "shape",
    "sampler",
    "num_steps",
    "spacing",
    "start_time",
    "num_frames",
    "on_step",
)


@partial(jax.jit, static_argnames=_STATIC)
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
    start_time: float = 1.0,
    inpaint_image: jax.Array | None = None,
    inpaint_mask: jax.Array | None = None,
    num_frames: int = 0,
    on_step: Callable[[jax.Array], None] | None = None,
) -> SamplerOutput:
    """Sample one image per key.

    Args:
      cfg: the noise schedule; static.
      denoise: static function `(context, x, t, alpha, sigma) -> x_0`, guidance and thresholding included.
      context: traced inputs of `denoise` (parameters, conditions, guidance).
      keys_B: one key per row; a row depends on its key and its part of the context alone.
      shape: of one image, e.g. (32, 32, 3); static.
      sampler: ancestral, ddim, euler, heun, dpm++2m or pc; static. heun and pc call the denoiser twice per step.
      num_steps: S; static.
      spacing: of the times, see `schedule.time_grid`; static.
      eta: of ddim; 0 is deterministic and 1 is ancestral.
      corrector_snr: of pc (2011.13456, algorithms 4 and 5).
      image: float (B, *shape), for image-to-image: noised to `start_time` < 1 and denoised from there.
      start_time: the first time, in (t_min, 1]; static.
      inpaint_image: float (B, *shape), for inpainting: its noised pixels replace those where `inpaint_mask` is True
        after each step (2011.13456, I.2). The others follow it less closely than exact conditional samples would.
      inpaint_mask: bool (B, *shape), True where the image is kept.
      num_frames: F in [0, S], predicted clean images to return, evenly spaced, the last step's included; static.
      on_step: called on the host with the index of each step, from 0, once it is done; static.

    Returns:
      The images. `check_finite`, outside of jit, reports values that are not finite.

    Raises:
      ValueError: unknown sampler or spacing, an argument out of range, or another shape.
    """
    _check(keys_B, shape, sampler, num_steps, image, start_time, inpaint_image, inpaint_mask, num_frames)
    grid = time_grid(cfg, num_steps, start_time, spacing)
    steps = _step_table(cfg, grid)
    first = alpha_sigma(cfg, grid[0])
    zeros = jnp.zeros((len(keys_B), *shape))
    x = float(first.sigma) * _noise(keys_B, 0, zeros)
    x = x if image is None else x + float(first.alpha) * image
    frame_steps = np.round(np.linspace(num_steps / max(num_frames, 1), num_steps, num_frames)).astype(int) - 1
    frame_index = np.full(num_steps, -1)
    frame_index[frame_steps] = np.arange(num_frames)

    def advance(x, x0, previous_x0, p):
        eps = to_noise(x0, x, p["alpha"], p["sigma"])
        match sampler:
            case "ddim" | "ancestral" | "pc":
                std = p["posterior_std"] * (eta if sampler == "ddim" else 1.0)
                eps_scale = jnp.sqrt(jnp.maximum(p["sigma_s"] ** 2 - std**2, 0.0))
                return p["alpha_s"] * x0 + eps_scale * eps + std * _noise(keys_B, 2 * p["index"] + 1, x)
            case "dpm++2m":
                d = x0 + p["second_order"] * (x0 - previous_x0)
                # sigma_s / sigma x - alpha_s (exp(-h) - 1) d
                return p["sigma_s"] / p["sigma"] * x + p["alpha_s"] * (1 - p["decay"]) * d
            case "euler" | "heun":
                dt = p["t_s"] - p["t"]
                slope = p["d_alpha"] * x0 + p["d_sigma"] * eps
                x_s = x + dt * slope
                if sampler == "heun":
                    end = p["t_s"], p["alpha_s"], jnp.maximum(p["sigma_s"], 1e-12)
                    x0_s = denoise(context, x_s, *end)
                    slope_s = p["d_alpha_s"] * x0_s + p["d_sigma_s"] * to_noise(x0_s, x_s, *end[1:])
                    x_s = x + dt * 0.5 * (slope + slope_s)
                return jnp.where(p["index"] == num_steps - 1, x0, x_s)

    def correct(x, p):
        """Take one Langevin step at the noise level of `x`. Its size has the norms of the paper's algorithm by their
        expectation, |z|^2 = D and |score|^2 = D / sigma^2, so it depends on no other row and not on z."""
        level = p["t_s"], p["alpha_s"], jnp.maximum(p["sigma_s"], 1e-12)
        score = -to_noise(denoise(context, x, *level), x, *level[1:]) / level[2]
        size = 2 * (corrector_snr * p["sigma_s"]) ** 2
        z = _noise(keys_B, 2 * p["index"] + 2, x)
        return jnp.where(p["index"] == num_steps - 1, x, x + size * score + jnp.sqrt(2 * size) * z)

    def body(carry, inputs):
        x, previous_x0, frames, first_nonfinite_step = carry
        p, slot = inputs
        with jax.named_scope("denoise"):
            x0 = denoise(context, x, p["t"], p["alpha"], p["sigma"])
        x = advance(x, x0, previous_x0, p)
        if sampler == "pc":
            x = correct(x, p)
        if inpaint_mask is not None:
            noise = _noise(keys_B, 2 * num_steps + 2 + p["index"], x)
            x = jnp.where(inpaint_mask, p["alpha_s"] * inpaint_image + p["sigma_s"] * noise, x)
        finite_B = jnp.isfinite(x).reshape(len(x), -1).all(axis=1)
        first_nonfinite_step = jnp.where(
            (first_nonfinite_step < 0) & ~finite_B, p["index"], first_nonfinite_step
        )
        if num_frames:
            updated = jax.lax.dynamic_update_index_in_dim(frames, x0, jnp.maximum(slot, 0), 0)
            frames = jnp.where(slot >= 0, updated, frames)
        if on_step is not None:
            # The argument depends on the finished step, so the call cannot run ahead of it.
            jax.debug.callback(on_step, p["index"] + 0 * first_nonfinite_step[0])
        return (x, x0, frames, first_nonfinite_step), None

    carry = (x, zeros, jnp.zeros((num_frames, *zeros.shape)), jnp.full(len(keys_B), -1, jnp.int32))
    (x, _, frames, first_nonfinite_step), _ = jax.lax.scan(body, carry, (steps, jnp.asarray(frame_index)))
    return SamplerOutput(x, frames, first_nonfinite_step)


def _check(
    keys_B: jax.Array,
    shape: tuple[int, ...],
    sampler: str,
    num_steps: int,
    image: jax.Array | None,
    start_time: float,
    inpaint_image: jax.Array | None,
    inpaint_mask: jax.Array | None,
    num_frames: int,
) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"Expected sampler {', '.join(SAMPLERS)}, got {sampler!r}.")
    if (inpaint_image is None) != (inpaint_mask is None):
        raise ValueError("Expected both inpaint_image and inpaint_mask or neither, got one.")
    if (image is None) != (start_time == 1):
        raise ValueError("Expected both an image and a start_time below 1 or neither, got one.")
    if not 0 <= num_frames <= num_steps:
        raise ValueError(f"Expected num_frames in [0, {num_steps}] (num_steps), got {num_frames}.")
    expected = (len(keys_B), *shape)
    images = (("image", image), ("inpaint_image", inpaint_image), ("inpaint_mask", inpaint_mask))
    for name, value in images:
        if value is not None and value.shape != expected:
            raise ValueError(f"Expected {name} of shape {expected}, one image per key, got {value.shape}.")
    if inpaint_mask is not None and inpaint_mask.dtype != bool:
        raise ValueError(f"Expected a bool inpaint_mask, True where kept, got {inpaint_mask.dtype}.")
