"""Images by a trained diffusion model, from captions, labels, codes, a small image or nothing; its likelihood.

R requests, B rows of a batch, F frames, H W pixels, N codes, T text positions.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import typing
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.checkpoint.layout import TEXT_TOKENIZER_FILE
from dalle_jax.checkpoint.load import Run
from dalle_jax.config import DiffusionConfig, SamplerName, Spacing
from dalle_jax.data.images import to_uint8
from dalle_jax.models.diffusion import denoise, likelihood, sampler, unet
from dalle_jax.pipelines.batching import ProgressFn, chunked
from dalle_jax.pipelines.captions import CaptionTokens
from dalle_jax.pipelines.loading import load
from dalle_jax.pipelines.protocol import (
    SAMPLE_BATCH_SIZE,
    GeneratedImage,
    ImageRequest,
    PreviewFn,
    as_float,
    as_int,
    as_setting,
    check_requests,
    check_unused,
)
from dalle_jax.pipelines.tokenizer import TokenizerPipeline
from dalle_jax.sampling.generate import row_keys
from dalle_jax.text.tokenizers import TextTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionSamplingConfig:
    """How all images of a call are sampled.

    Attributes:
        sampler: the method that removes the noise.
        num_steps: steps of the sampler; heun and pc evaluate the network twice in each.
        spacing: of the times between noise and image.
        eta: of ddim, the noise of a step as a fraction of the ancestral sampler's.
        guidance_scale: scale of classifier-free guidance; 1 turns it off.
        guidance_interval: times between which guidance applies; 1 is noise, 0 is the image.
        threshold: quantile of dynamic thresholding of the denoised images; 0 clips them, None does neither.
        num_frames: denoised images of each row that are returned, evenly spread over the steps.
    """

    sampler: SamplerName = "dpm++2m"
    num_steps: int = 50
    spacing: Spacing = "uniform"
    eta: float = 0.0
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    threshold: float | None = 0.0
    num_frames: int = 0

    def __post_init__(self):
        try:
            low, high = self.guidance_interval
        except (TypeError, ValueError):
            raise ValueError(
                f"Expected guidance_interval as two numbers, got {self.guidance_interval!r}."
            ) from None
        low, high = (as_float("in guidance_interval", time) for time in (low, high))
        converted: dict[str, Any] = {
            "num_steps": as_int("num_steps", self.num_steps),
            "eta": as_float("eta", self.eta),
            "guidance_scale": as_setting("guidance_scale", self.guidance_scale),
            "guidance_interval": (low, high),
            "threshold": None if self.threshold is None else as_float("threshold", self.threshold),
            "num_frames": as_int("num_frames", self.num_frames),
        }
        for name, value in converted.items():
            object.__setattr__(self, name, value)
        spacings = typing.get_args(Spacing)
        for valid, message in (
            (self.sampler in tuple(sampler.SAMPLERS),
             f"Expected sampler to be one of {', '.join(sampler.SAMPLERS)}, got {self.sampler!r}."),
            (self.spacing in spacings,
             f"Expected spacing to be one of {', '.join(spacings)}, got {self.spacing!r}."),
            (self.num_steps >= 1, f"Expected num_steps of at least 1, got {self.num_steps}."),
            (0 <= self.eta <= 1, f"Expected eta in [0, 1], got {self.eta}."),
            (self.eta == 0 or self.sampler == "ddim",
             f"Expected eta 0 for sampler {self.sampler}, got {self.eta}. Use sampler ddim."),
            (0 <= low < high <= 1,
             f"Expected guidance_interval of two numbers with 0 <= first < last <= 1, got {low} and {high}."),
            (self.threshold is None or 0 <= self.threshold < 1,
             f"Expected threshold in [0, 1), got {self.threshold}. Use 0 to clip values, None not to."),
            (0 <= self.num_frames <= self.num_steps,
             f"Expected num_frames in [0, {self.num_steps}], the number of steps, got {self.num_frames}."),
        ):  # fmt: skip
            if not valid:
                raise ValueError(message)

    @property
    def clip(self) -> denoise.ClipMode:
        return "none" if self.threshold is None else "quantile" if self.threshold else "range"


@partial(jax.jit, static_argnames=("cfg", "use_cfg"))
def _encode_conditions(
    cfg: DiffusionConfig, params: Any, conditions: unet.Conditions, use_cfg: bool
) -> unet.EncodedConditions:
    return denoise.encode_conditions_cfg(cfg, params, conditions, use_cfg=use_cfg)


@dataclasses.dataclass(frozen=True, eq=False)
class DiffusionPipeline:
    """A trained diffusion model with the text tokenizer and the image tokenizer whose tokens it reads, if any."""

    kind: ClassVar[str] = "diffusion"

    run: Run
    text: TextTokenizer | None
    tokenizer: TokenizerPipeline | None

    @classmethod
    def from_run(cls, run: Run) -> DiffusionPipeline:
        cfg = cast(DiffusionConfig, run.config.model)
        text = None if cfg.text is None else TextTokenizer.load(run.path / TEXT_TOKENIZER_FILE)
        return cls(run, text, None if cfg.codes is None else load(run.path, TokenizerPipeline))

    @property
    def config(self) -> DiffusionConfig:
        return cast(DiffusionConfig, self.run.config.model)

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def languages(self) -> tuple[str, ...]:
        return () if self.text is None else self.run.config.data.languages

    @property
    def is_class_conditional(self) -> bool:
        return self.config.num_classes > 0

    def check_tokenizer(self, tokenizer: TokenizerPipeline) -> None:
        """Check that this model was trained on the codes of `tokenizer`.

        Raises:
            ValueError: it reads no codes, or those of another tokenizer.
        """
        if self.tokenizer is None or self.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"Expected a diffusion model trained on the codes of tokenizer {tokenizer.fingerprint}, got "
                f"{self.run.path}. Use one trained with this tokenizer as --image-tokenizer."
            )

    def num_dropped_tokens(self, prompt: str) -> int:
        """Return how many tokens of a prompt are beyond those that the model reads."""
        return 0 if self._captions is None else self._captions.num_dropped(prompt)

    @cached_property
    def _captions(self) -> CaptionTokens | None:
        cfg = self.config.text
        if cfg is None or self.text is None:
            return None
        return CaptionTokens(self.text, cfg.text_vocab, cfg.text_len)

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the token ids of captions, int32 (R, T). "" is the null caption; a long caption is truncated.

        Raises:
            ValueError: the model reads no captions.
        """
        if self._captions is None:
            raise ValueError("Expected no captions for a model without text, got some. Use empty prompts.")
        return np.stack([self._captions.ids(prompt) for prompt in prompts])

    def conditions(
        self,
        *,
        prompts: Sequence[str] | None = None,
        labels: Sequence[int | None] | None = None,
        codes: np.ndarray | None = None,
        low_res: np.ndarray | None = None,
    ) -> unet.Conditions:
        """Check conditions and convert them to arrays.

        Args:
            prompts: R captions, "" is none.
            labels: R numbers of classes; None or -1 is none.
            codes: integers (R, N).
            low_res: uint8 (R, low_res_size, low_res_size, 3).

        Returns:
            Arrays of R rows; None for what the model does not read.

        Raises:
            ValueError: a condition that the model reads is missing, one that it does not read is set, or values are
                out of range.
        """
        cfg = self.config
        for name, value, reads in (
            ("captions", prompts, cfg.text is not None),
            ("labels", labels, cfg.num_classes > 0),
            ("codes", codes, cfg.codes is not None),
            ("low_res", low_res, cfg.low_res_size > 0),
        ):
            if reads and value is None:
                raise ValueError(f"Expected {name} for this model, got none. Set one for each image.")
            if value is not None and not reads:
                raise ValueError(f"Expected no {name} for this model, got some. Remove them.")
        label_R = None
        if labels is not None:
            label_R = np.asarray([-1 if label is None else label for label in labels], np.int32)
            if label_R.min() < -1 or label_R.max() >= cfg.num_classes:
                raise ValueError(
                    f"Expected labels in [0, {cfg.num_classes}), got labels from {label_R.min()} to {label_R.max()}. "
                    "Use None for no label."
                )
            label_R = np.where(label_R < 0, cfg.num_classes, label_R)
        if codes is not None and cfg.codes is not None:
            codes = np.asarray(codes)
            count, vocab = cfg.codes.grid**2, cfg.codes.vocab
            if codes.ndim != 2 or codes.shape[1] != count or not np.issubdtype(codes.dtype, np.integer):
                raise ValueError(
                    f"Expected codes of integers (images, {count}), got {codes.dtype} {codes.shape}."
                )
            if codes.min() < 0 or codes.max() >= vocab:
                raise ValueError(
                    f"Expected codes in [0, {vocab}), got codes from {codes.min()} to {codes.max()}. Use those of the "
                    "model's image tokenizer."
                )
            codes = codes.astype(np.int32)
        if low_res is not None:
            size = cfg.low_res_size
            if low_res.shape[1:] != (size, size, 3) or low_res.dtype != np.uint8:
                raise ValueError(
                    f"Expected low_res of uint8 (rows, {size}, {size}, 3), got {low_res.dtype} {low_res.shape}. Resize "
                    "the images."
                )
            low_res = low_res.astype(np.float32) / np.float32(127.5) - 1
        text_RT = None if prompts is None else self.tokenize(prompts)
        arrays = (text_RT, label_R, codes, low_res)
        return unet.Conditions(*(None if array is None else jnp.asarray(array) for array in arrays))

    def _request_conditions(self, requests: list[ImageRequest]) -> unet.Conditions:
        cfg = self.config
        if cfg.text is None and any(request.prompt for request in requests):
            raise ValueError("Expected no captions for a model without text, got some. Use empty prompts.")
        for name, reads in (
            ("label", cfg.num_classes > 0),
            ("codes", cfg.codes is not None),
            ("low_res", cfg.low_res_size > 0),
        ):
            if not reads:
                check_unused(requests, (name,), "this model")
        arrays: dict[str, np.ndarray] = {}
        for name, reads in (("codes", cfg.codes is not None), ("low_res", cfg.low_res_size > 0)):
            rows = [getattr(request, name) for request in requests]
            if reads and any(row is None for row in rows):
                raise ValueError(
                    f"Expected {name} in each request for this model, got one without it. Set {name}."
                )
            if reads:
                arrays[name] = np.stack(rows)
        return self.conditions(
            prompts=[request.prompt for request in requests] if cfg.text is not None else None,
            labels=[request.label for request in requests] if cfg.num_classes > 0 else None,
            **arrays,
        )

    def _check_guidance(self, requests: list[ImageRequest], scales: list[float]) -> None:
        """Raise ValueError for guidance, or no condition, where the model was not trained for it."""
        cfg = self.config
        guided = [scale for scale in scales if scale != 1]
        if guided and not cfg.supports_cfg:
            raise ValueError(
                f"Expected guidance_scale 1 for a model without captions or labels, got {guided[0]:g}. Use 1."
            )
        unconditional = any(
            (cfg.text is not None and not r.prompt) or (cfg.num_classes > 0 and r.label in (None, -1))
            for r in requests
        )
        if cfg.cond_drop_prob == 0 and (guided or unconditional):
            got = f"guidance_scale {guided[0]:g}" if guided else "an empty caption or no label"
            raise ValueError(
                "Expected guidance_scale 1 and a condition for each image for a model trained with cond_drop_prob 0, "
                f"got {got}. Use a model trained with cond_drop_prob above 0."
            )

    def sample(
        self,
        requests: Iterable[ImageRequest],
        config: DiffusionSamplingConfig | None = None,
        *,
        batch_size: int = SAMPLE_BATCH_SIZE,
        on_preview: PreviewFn | None = None,
        progress: ProgressFn | None = None,
    ) -> Iterator[GeneratedImage]:
        """Generate an image for each request, in their order (`Pipeline.sample`).

        Args:
            requests: seed, guidance_scale, image, strength and mask are read, and prompt, label, codes and low_res as
                far as the model reads them.
            config: what all images of the call share; None is DiffusionSamplingConfig().
            batch_size: images computed at once. Neighbors with the same guidance_scale and strength are a batch.
            on_preview: None; `config.num_frames` returns images on the way.
            progress: called with the denoising steps done and all of them.

        Raises:
            ValueError: a condition is missing, not read or out of range, or guidance is asked of a model that was
                trained without dropping conditions.
            NonFiniteSampleError: while iterating; it names the step.
        """
        requests, config = list(requests), DiffusionSamplingConfig() if config is None else config
        check_requests(requests, batch_size, config, DiffusionSamplingConfig)
        check_unused(requests, ("temperature", "top_p", "prefix_codes"), "a diffusion model")
        if on_preview is not None:
            raise ValueError(
                "Expected no on_preview for a diffusion model, got a function. Use num_frames of the config."
            )
        default = config.guidance_scale
        scales = [default if r.guidance_scale is None else r.guidance_scale for r in requests]
        self._check_guidance(requests, scales)
        conditions = self._request_conditions(requests)
        starts = [_start_from_image(self.config, request) for request in requests]
        return self._denoise(requests, scales, conditions, starts, config, batch_size, progress)

    def _denoise(
        self,
        requests: list[ImageRequest],
        scales: list[float],
        conditions: unet.Conditions,
        starts: list[dict[str, Any]],
        config: DiffusionSamplingConfig,
        batch_size: int,
        progress: ProgressFn | None,
    ) -> Iterator[GeneratedImage]:
        cfg, size = self.config, min(batch_size, len(requests))

        def settings(i: int) -> tuple:
            return scales[i], tuple(starts[i]), starts[i].get("start_time")

        batches = [
            batch
            for _, group in itertools.groupby(range(len(requests)), key=settings)
            for batch in chunked(group, size)
        ]
        options: dict[str, Any] = {
            "sampler": config.sampler,
            "num_steps": config.num_steps,
            "spacing": config.spacing,
            "num_frames": config.num_frames,
            "eta": jnp.float32(config.eta),
        }
        if progress is not None:
            options["on_step"] = _StepCounter(progress, len(batches) * config.num_steps)
        shape = (cfg.image_size, cfg.image_size, 3)
        for batch in batches:
            index = np.asarray(batch + batch[-1:] * (size - len(batch)))
            scale, start = scales[batch[0]], starts[batch[0]].get("start_time")
            use_cfg = scale != 1
            rows = jax.tree.map(lambda x, index=index: jnp.asarray(x[index]), conditions)
            encoded = _encode_conditions(cfg, self.run.params, rows, use_cfg)
            numbers = (scale, *config.guidance_interval, config.threshold or 0.0)
            context = denoise.DenoiserContext(self.run.params, encoded, *map(jnp.float32, numbers))
            arrays = {
                name: jnp.stack([starts[i][name] for i in index])
                for name in starts[batch[0]]
                if name != "start_time"
            }
            output = sampler.sample(
                cfg.noise,
                denoise.make_denoiser(cfg, use_cfg=use_cfg, clip=config.clip),
                context,
                row_keys(np.asarray([requests[i].seed for i in index], np.uint32)),
                shape,
                **options,
                **arrays,
                **({} if start is None else {"start_time": start}),
            )
            sampler.check_finite(output)
            images = to_uint8(output.x[: len(batch)] / 2 + 0.5)
            frames = to_uint8(output.frames[:, : len(batch)] / 2 + 0.5).swapaxes(0, 1)
            for i, image, own in zip(batch, images, frames, strict=True):
                request = requests[i]
                yield GeneratedImage(image, request, request.codes, frames=own if config.num_frames else None)

    def bits_per_dim(
        self,
        images: np.ndarray,
        conditions: unet.Conditions,
        *,
        num_steps: int = 50,
        seed: int = 0,
        batch_size: int = SAMPLE_BATCH_SIZE,
        progress: ProgressFn | None = None,
    ) -> np.ndarray:
        """Estimate the likelihood of images under the model's probability-flow ODE (2011.13456, sec. 4.3).

        Bytes are dequantized uniformly and the trace is Hutchinson's with one probe, so the mean bounds the bits of
        the bytes from above.

        Args:
            images: uint8 (R, H, W, 3).
            conditions: of the R images, as `conditions` returns them.
            num_steps: of fourth-order Runge-Kutta.
            seed: of dequantization and probes.
            batch_size: images per call.
            progress: called with the images done and all images.

        Returns:
            Bits per value, float32 (R,).
        """
        cfg, rows = self.config, len(images)
        denoiser, size, results = denoise.make_denoiser(cfg, clip="none"), min(batch_size, rows), []
        for start in range(0, rows, size):
            index = np.minimum(np.arange(start, start + size), rows - 1)
            batch = jax.tree.map(lambda x, index=index: jnp.asarray(x[index]), conditions)
            encoded = _encode_conditions(cfg, self.run.params, batch, False)
            context = denoise.DenoiserContext(self.run.params, encoded)
            k_bytes, k_trace = jax.random.split(jax.random.fold_in(jax.random.key(seed), start))
            x = jnp.asarray(images[index], jnp.float32)
            x = (x + jax.random.uniform(k_bytes, x.shape) - 0.5) / 127.5 - 1
            nats = likelihood.log_likelihood(cfg.noise, denoiser, context, x, k_trace, num_steps=num_steps)
            bits = likelihood.bits_per_dim(nats, math.prod(x.shape[1:]), levels_per_unit=127.5)
            results.append(np.asarray(bits)[: rows - start])
            if progress:
                progress(min(start + size, rows), rows)
        return np.concatenate(results)


class _StepCounter:
    """Count the steps of all batches, which run one after the other."""

    def __init__(self, progress: ProgressFn, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, number: Any) -> None:
        self._done += 1
        self._progress(self._done, self._total)


def _start_from_image(cfg: DiffusionConfig, request: ImageRequest) -> dict[str, Any]:
    """Options of `sampler.sample` for inpainting and image-to-image, for one row."""
    image, mask, strength = request.image, request.mask, request.strength
    if image is None:
        if mask is not None or strength is not None:
            raise ValueError(
                "Expected an image to start from with a mask or a strength, got none. Set image."
            )
        return {}
    if mask is None and strength is None:
        raise ValueError(
            "Expected a strength or a mask with an image, got neither. Set strength for image-to-image or mask for "
            "inpainting."
        )
    size = cfg.image_size
    if image.shape != (size, size, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"Expected image of uint8 ({size}, {size}, 3), got {image.dtype} {image.shape}. Resize it."
        )
    options: dict[str, Any] = {}
    floats = jnp.asarray(image.astype(np.float32) / np.float32(127.5) - 1)
    if strength is not None:
        if not cfg.noise.t_min < strength <= 1:
            raise ValueError(f"Expected strength in ({cfg.noise.t_min:g}, 1], got {strength}.")
        if strength < 1:  # at 1 nothing of the image is left
            options |= {"image": floats, "start_time": float(strength)}
    if mask is not None:
        if mask.shape != (size, size) or mask.dtype != bool:
            raise ValueError(
                f"Expected mask of bool ({size}, {size}), True where the image is kept, got {mask.dtype} {mask.shape}."
            )
        options |= {
            "inpaint_image": floats,
            "inpaint_mask": jnp.asarray(np.repeat(mask[..., None], 3, axis=2)),
        }
    return options
