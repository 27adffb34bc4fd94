"""Trained diffusion models at work: captions, labels, codes or nothing to pictures, each from a run directory.

    model = load_diffusion("runs/demo_diffusion")
    drawn = draw(model, [0, 1], captions=["a large red star"] * 2)

Rows are computed in batches of one size, the last one padded, so that every call compiles once and a picture
follows from its own conditions and seed alone. R rows, H W picture, F frames.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.checkpoint.load import Run, load_run
from dalle_jax.checkpoint.run_dir import read_config
from dalle_jax.config import DiffusionConfig, SamplerName, Spacing
from dalle_jax.data.images import to_uint8
from dalle_jax.models.diffusion import denoise, likelihood, sampler, unet
from dalle_jax.pipelines import SAMPLE_BATCH, ImageTokenizer, ProgressFn, load_image_tokenizer
from dalle_jax.sampling.generate import row_keys
from dalle_jax.text.tokenizers import TextTokenizer


class DiffusionModel(NamedTuple):
    """A trained diffusion model with the vocabulary and the image tokenizer that it reads, if it reads them."""

    run: Run
    text: TextTokenizer | None
    tokenizer: ImageTokenizer | None

    @property
    def config(self) -> DiffusionConfig:
        return self.run.config.model


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionSamplingConfig:
    """How pictures are drawn; checked when made."""

    sampler: SamplerName = "dpm++2m"
    num_steps: int = 50
    spacing: Spacing = "uniform"  # of the times
    eta: float = 0.0  # of ddim: noise of a step as a share of the ancestral sampler's
    guidance_scale: float = 1.0  # scale of classifier-free guidance; 1 is none
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # guidance where the time lies in this interval
    threshold: float | None = (
        0.0  # dynamic: quantile that clean pictures are held in; 0 clips them, None does not
    )

    def __post_init__(self):
        low, high = self.guidance_interval
        for holds, message in (
            (self.sampler in sampler.SAMPLERS,
             f"sampler is {self.sampler!r}; want one of {', '.join(sampler.SAMPLERS)}"),
            (self.num_steps >= 1, f"num_steps is {self.num_steps}; want at least 1"),
            (0 <= self.eta <= 1, f"eta is {self.eta}; want a share in [0, 1]"),
            (self.eta == 0 or self.sampler == "ddim", f"eta is for ddim; {self.sampler} has none"),
            (0 <= self.guidance_scale < math.inf, f"guidance_scale is {self.guidance_scale}; want 0 or more, 1 is none"),
            (0 <= low < high <= 1, f"guidance times {low} to {high}; want 0 <= first < last <= 1"),
            (self.threshold is None or 0 <= self.threshold < 1,
             f"threshold is {self.threshold}; want a quantile in [0, 1), 0 clips"),
        ):  # fmt: skip
            if not holds:
                raise ValueError(message)

    @property
    def use_cfg(self) -> bool:
        return self.guidance_scale != 1

    @property
    def clip(self) -> denoise.ClipMode:
        return "none" if self.threshold is None else "quantile" if self.threshold else "range"


class DiffusionImages(NamedTuple):
    """images: uint8 (R, H, W, 3). frames: uint8 (R, F, H, W, 3), clean pictures as seen on the way."""

    images: np.ndarray
    frames: np.ndarray


def load_diffusion(path: str | Path) -> DiffusionModel:
    """The diffusion model of a run directory. Raises what `load_run` does; ValueError for a run of another stage."""
    path = Path(path)
    run = load_run(path, "diffusion")
    model = run.config.model
    text = None if model.text is None else TextTokenizer.load(path / "text_tokenizer.model")
    return DiffusionModel(run, text, None if model.codes is None else load_image_tokenizer(path))


def check_decoder(decoder: DiffusionModel, tokenizer: ImageTokenizer) -> None:
    """Raises ValueError unless `decoder` was trained on the codes of `tokenizer`."""
    if decoder.tokenizer is None or decoder.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{decoder.run.path} was not trained on the codes of this tokenizer ({tokenizer.fingerprint}); give a "
            "diffusion model that was (--image-tokenizer of its training)"
        )


def is_diffusion(path: str | Path) -> bool:
    """Is this the run directory of a diffusion model?"""
    return isinstance(read_config(path).model, DiffusionConfig)


def tokenize_diffusion(model: DiffusionModel, captions: Sequence[str]) -> np.ndarray:
    """Token ids of captions, int32 (R, T). An empty caption is the null caption; a longer one is cut."""
    cfg = model.config.text
    one = partial(model.text.encode, text_vocab=cfg.text_vocab, text_len=cfg.text_len)
    return np.stack([one(caption) for caption in captions])


@partial(jax.jit, static_argnames=("cfg", "guided"))
def _read(cfg: DiffusionConfig, params: Any, given: unet.Conditions, guided: bool) -> unet.EncodedConditions:
    return denoise.encode_conditions_cfg(cfg, params, given, use_cfg=guided)


def denoise_images(
    model: DiffusionModel,
    seeds: Sequence[int],
    how: DiffusionSamplingConfig = DiffusionSamplingConfig(),
    *,
    captions: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    codes: np.ndarray | None = None,
    low: np.ndarray | None = None,
    image: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    strength: float | None = None,
    frames: int = 0,
    batch: int = SAMPLE_BATCH,
    progress: ProgressFn | None = None,
) -> DiffusionImages:
    """One picture per seed.

    Args:
      seeds: R integers in [0, 2**32).
      captions, labels, codes, low: what the model reads, R of each: texts ("" is none), classes (-1 is none),
        integers (R, N), uint8 (R, low_res_size, low_res_size, 3).
      image: uint8 (H, W, 3), a picture to begin from. strength: share of the noise that is put on it, (0, 1];
        the rest is drawn. mask: bool (H, W), True where the picture is kept as it is.
      frames: clean pictures on the way that are kept, of each row.
      batch: rows at once; a row is the same in any company. progress: told steps done and in all.

    Raises ValueError for conditions that the model lacks or does not read, guidance of a model that was trained
    without dropping conditions, settings out of range or shapes that do not fit; NonFiniteSampleError naming the step.
    """
    cfg = model.config
    rows = len(seeds)
    if not rows or min(seeds) < 0 or max(seeds) >= 2**32:
        raise ValueError(f"{rows} seeds; want at least one, integers in [0, 2**32)")
    if batch < 1:
        raise ValueError(f"batch_size is {batch}; want at least 1 picture at once")
    _check_guidance(cfg, how, captions, labels)
    given = _conditions(model, captions, labels, codes, low)
    for name, value in given._asdict().items():
        if value is not None and len(value) != rows:
            raise ValueError(f"{len(value)} rows of {name} and {rows} seeds; want one for each")
    options = _from_picture(cfg, image, mask, strength)
    static = {
        "sampler": how.sampler,
        "num_steps": how.num_steps,
        "spacing": how.spacing,
        "num_frames": frames,
    }
    size = min(batch, rows)
    if progress is not None:
        static["on_step"] = _Steps(progress, -(-rows // size) * how.num_steps)
    denoiser, shape = (
        denoise.make_denoiser(cfg, use_cfg=how.use_cfg, clip=how.clip),
        (cfg.image_size,) * 2 + (3,),
    )
    settings = [jnp.float32(v) for v in (how.guidance_scale, *how.guidance_interval, how.threshold or 0.0)]
    images, films = [], []
    for start in range(0, rows, size):
        index = np.minimum(np.arange(start, start + size), rows - 1)  # the last row again, as padding
        here = jax.tree.map(lambda x, index=index: jnp.asarray(x[index]), given)
        read = _read(cfg, model.run.params, here, how.use_cfg)
        context = denoise.DenoiserContext(model.run.params, read, *settings)
        begin = {k: jnp.broadcast_to(v, (size, *v.shape)) for k, v in options.items() if k != "start_time"}
        keys = row_keys(np.asarray(seeds, np.uint32)[index])
        found = sampler.sample(
            cfg.noise, denoiser, context, keys, shape, eta=jnp.float32(how.eta), **static, **begin,
            **({"start_time": options["start_time"]} if "start_time" in options else {}),
        )  # fmt: skip
        sampler.check_finite(found)
        kept = min(size, rows - start)
        images.append(to_uint8(found.x[:kept] / 2 + 0.5))
        films.append(to_uint8(found.frames[:, :kept] / 2 + 0.5).swapaxes(0, 1))
    return DiffusionImages(np.concatenate(images), np.concatenate(films))


class _Steps:
    """Counts the steps of all batches; they come one after the other."""

    def __init__(self, progress: ProgressFn, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, number) -> None:
        self._done += 1
        self._progress(self._done, self._total)


def _check_guidance(cfg: DiffusionConfig, how: DiffusionSamplingConfig, captions, labels) -> None:
    if how.use_cfg and not cfg.supports_cfg:
        raise ValueError(
            f"guidance {how.guidance_scale:g} needs a model that reads captions or labels; use guidance 1"
        )
    nothing = any(c == "" for c in captions or ()) or any(label < 0 for label in labels or ())
    if cfg.cond_drop_prob == 0 and (how.use_cfg or nothing):
        what = f"guidance {how.guidance_scale:g}" if how.use_cfg else "an empty caption or no label"
        raise ValueError(
            f"{what} needs rows without a condition, which this model never saw (trained with model.cond_drop_prob 0). "
            "Use guidance 1 and conditions for all, or train with a cond_drop_prob of 0.1"
        )


def _conditions(model: DiffusionModel, captions, labels, codes, low) -> unet.Conditions:
    cfg = model.config
    for name, value, wanted in (
        ("captions", captions, cfg.text is not None),
        ("labels", labels, cfg.num_classes > 0),
        ("codes", codes, cfg.codes is not None),
        ("a small picture", low, cfg.low_res_size > 0),
    ):
        if wanted and value is None:
            raise ValueError(f"this model draws from {name}; give one for each picture")
        if value is not None and not wanted:
            raise ValueError(f"this model reads no {name.removeprefix('a ')}; leave it out")
    if labels is not None:
        labels = np.asarray(labels, np.int32)
        if labels.min() < -1 or labels.max() >= cfg.num_classes:
            raise ValueError(
                f"labels from {labels.min()} to {labels.max()}; want 0 to {cfg.num_classes - 1}, -1 is none"
            )
        labels = np.where(labels < 0, cfg.num_classes, labels)
    if codes is not None:
        codes = np.asarray(codes)
        n, vocab = cfg.codes.grid**2, cfg.codes.vocab
        if codes.ndim != 2 or codes.shape[1] != n or not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"codes are {codes.dtype} {codes.shape}; want integers (pictures, {n})")
        if codes.min() < 0 or codes.max() >= vocab:
            raise ValueError(f"codes from {codes.min()} to {codes.max()}; this model's are in [0, {vocab})")
        codes = codes.astype(np.int32)
    if low is not None:
        if low.shape[1:] != (cfg.low_res_size, cfg.low_res_size, 3) or low.dtype != np.uint8:
            raise ValueError(
                f"low is {low.dtype} {low.shape}; want uint8 (rows, {cfg.low_res_size}, {cfg.low_res_size}, 3)"
            )
        low = low.astype(np.float32) / np.float32(127.5) - 1
    return unet.Conditions(
        None if captions is None else tokenize_diffusion(model, captions), labels, codes, low
    )


def _from_picture(cfg: DiffusionConfig, image, mask, strength) -> dict[str, Any]:
    """Options of `sampler.sample` for inpainting and image-to-image, for one row."""
    if image is None:
        if mask is not None or strength is not None:
            raise ValueError("a mask or a strength is for a picture to begin from; give one")
        return {}
    if mask is None and strength is None:
        raise ValueError("a picture to begin from needs a strength (image-to-image) or a mask (inpainting)")
    side = cfg.image_size
    if image.shape != (side, side, 3) or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} {image.shape}; want uint8 ({side}, {side}, 3)")
    floats, options = jnp.asarray(image.astype(np.float32) / np.float32(127.5) - 1), {}
    if strength is not None:
        if not cfg.noise.t_min < strength <= 1:
            raise ValueError(f"strength is {strength}; want a share in ({cfg.noise.t_min:g}, 1]")
        if strength < 1:  # at 1 nothing of the picture is left: it is drawn from noise
            options |= {"image": floats, "start_time": float(strength)}
    if mask is not None:
        if mask.shape != (side, side) or mask.dtype != bool:
            raise ValueError(
                f"mask is {mask.dtype} {mask.shape}; want bool ({side}, {side}), True where kept"
            )
        options |= {
            "inpaint_image": floats,
            "inpaint_mask": jnp.asarray(np.repeat(mask[..., None], 3, axis=2)),
        }
    return options


def image_bits_per_dim(
    model: DiffusionModel,
    images: np.ndarray,
    *,
    captions: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    codes: np.ndarray | None = None,
    low: np.ndarray | None = None,
    steps: int = 50,
    seed: int = 0,
    progress: ProgressFn | None = None,
    batch: int = SAMPLE_BATCH,
) -> np.ndarray:
    """Bits per value of pictures, uint8 (R, H, W, 3), under the model's probability-flow ODE: float32 (R,).

    Bytes are dequantised uniformly, the trace is Hutchinson's with one probe: both bound and estimate the likelihood
    of bytes from above, on average. steps: of fourth-order Runge-Kutta. The rest as `draw` has it.
    """
    cfg, rows = model.config, len(images)
    given = _conditions(model, captions, labels, codes, low)
    denoiser, size, found = denoise.make_denoiser(cfg, clip="none"), min(batch, rows), []
    for start in range(0, rows, size):
        index = np.minimum(np.arange(start, start + size), rows - 1)
        here = jax.tree.map(lambda x, index=index: jnp.asarray(x[index]), given)
        context = denoise.DenoiserContext(model.run.params, _read(cfg, model.run.params, here, False))
        k_bytes, k_trace = jax.random.split(jax.random.fold_in(jax.random.key(seed), start))
        x = jnp.asarray(images[index], jnp.float32)
        x = (x + jax.random.uniform(k_bytes, x.shape) - 0.5) / 127.5 - 1
        nats = likelihood.log_likelihood(cfg.noise, denoiser, context, x, k_trace, num_steps=steps)
        bits = likelihood.bits_per_dim(nats, math.prod(x.shape[1:]), levels_per_unit=127.5)
        found.append(np.asarray(bits)[: rows - start])
        if progress:
            progress(min(start + size, rows), rows)
    return np.concatenate(found)
