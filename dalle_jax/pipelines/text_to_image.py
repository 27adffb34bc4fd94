"""Captions to images with a Transformer over image tokens.

R requests, C captions of a batch, K images of each caption, B = C K, T text positions, N codes, P prefix codes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.checkpoint.layout import TEXT_TOKENIZER_FILE
from dalle_jax.checkpoint.load import Run
from dalle_jax.config import Quantization, TransformerConfig
from dalle_jax.data.images import to_uint8
from dalle_jax.models import autoregressive
from dalle_jax.pipelines.batching import ProgressFn, chunked, pad_rows
from dalle_jax.pipelines.captions import CaptionTokens
from dalle_jax.pipelines.loading import load
from dalle_jax.pipelines.protocol import (
    SAMPLE_BATCH_SIZE,
    GeneratedImage,
    ImageRequest,
    PreviewFn,
    as_int,
    as_setting,
    check_requests,
    check_unused,
)
from dalle_jax.pipelines.tokenizer import TokenizerPipeline
from dalle_jax.sampling.continuous_batcher import ContinuousBatcher, SamplingRequest
from dalle_jax.sampling.generate import generate, generate_stream, row_keys
from dalle_jax.sampling.speculative import check_draft_len
from dalle_jax.text.tokenizers import TextTokenizer
from dalle_jax.typing import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How all images of a call are sampled.

    Attributes:
        temperature: 0 takes the most probable code.
        top_k: sample among this many most probable codes; None is all.
        top_p: sample among the most probable codes with this probability together, (0, 1]; None is all.
        guidance_scale: scale of classifier-free guidance; 1 turns it off.
        draft_len: codes per pass of speculative decoding, which gives the same images; None is one code.
        quantization: 8-bit matrices; None is the compute dtype.
        preview_rows: with `on_preview`, rows of codes between two previews.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0
    draft_len: int | None = None
    quantization: Quantization | None = None
    preview_rows: int = 1

    def __post_init__(self):
        optional = ("top_p", "top_k", "draft_len")
        for names, convert in (
            (("temperature", "top_p", "guidance_scale"), as_setting),
            (("top_k", "draft_len", "preview_rows"), as_int),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None or name not in optional:
                    object.__setattr__(self, name, convert(name, value))
        kinds = typing.get_args(Quantization)
        for valid, message in (
            (
                self.top_k is None or self.top_k >= 1,
                f"Expected top_k of at least 1, got {self.top_k}. Use None to keep every code.",
            ),
            (
                self.draft_len is None or self.draft_len >= 2,
                f"Expected draft_len of at least 2, got {self.draft_len}. Use None to decode one code per pass.",
            ),
            (
                self.quantization in (None, *kinds),
                f"Expected quantization to be one of {', '.join(kinds)}, or None, got {self.quantization!r}.",
            ),
            (self.preview_rows >= 1, f"Expected preview_rows of at least 1, got {self.preview_rows}."),
        ):
            if not valid:
                raise ValueError(message)


class _Settings(NamedTuple):
    """The settings of a request, those of the call filled in."""

    temperature: float
    top_p: float | None
    guidance_scale: float


class _Batch(NamedTuple):
    """Codes int32 (b, N) of the next b requests, and codes per pass so far; None without speculative decoding."""

    codes: np.ndarray
    codes_per_pass: float | None


@functools.partial(jax.jit, static_argnums=(0, 2))
def _prepare_for_decode(cfg: TransformerConfig, params: Params, quantization: Quantization | None) -> Params:
    return autoregressive.prepare_for_decode(cfg, params, quantization)


@dataclasses.dataclass(frozen=True, eq=False)
class TextToImagePipeline:
    """A trained Transformer with the text tokenizer and the image tokenizer that it was trained with.

    Images come from batches of `generate`, which runs a caption once for all its images. Requests with different
    settings, and with speculative decoding more of them than a batch, go through a `ContinuousBatcher`, where a
    finished image makes room for the next request.
    """

    kind: ClassVar[str] = "text-to-image"
    is_class_conditional: ClassVar[bool] = False

    run: Run
    text: TextTokenizer
    tokenizer: TokenizerPipeline

    @classmethod
    def from_run(cls, run: Run) -> TextToImagePipeline:
        text = TextTokenizer.load(run.path / TEXT_TOKENIZER_FILE)
        return cls(run, text, load(run.path, TokenizerPipeline))

    @property
    def config(self) -> TransformerConfig:
        return cast(TransformerConfig, self.run.config.model)

    @property
    def image_size(self) -> int:
        return self.tokenizer.image_size

    @property
    def languages(self) -> tuple[str, ...]:
        return self.run.config.data.languages

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the token ids of captions, int32 (R, T). "" is the null caption; a long caption is truncated."""
        return np.stack([self._captions.ids(prompt) for prompt in prompts])

    def num_dropped_tokens(self, prompt: str) -> int:
        """Return how many tokens of a prompt are beyond those that the model reads."""
        return self._captions.num_dropped(prompt)

    @functools.cached_property
    def _captions(self) -> CaptionTokens:
        return CaptionTokens(self.text, self.config.text_vocab, self.config.text_len)

    def sample(
        self,
        requests: Iterable[ImageRequest],
        config: SamplingConfig | None = None,
        *,
        batch_size: int = SAMPLE_BATCH_SIZE,
        on_preview: PreviewFn | None = None,
        progress: ProgressFn | None = None,
    ) -> Iterator[GeneratedImage]:
        """Generate an image for each request, in their order (`Pipeline.sample`).

        Args:
            requests: prompt, seed, guidance_scale, temperature, top_p and prefix_codes are read. Neighbors with the
                same prompt share its prefill.
            config: what all images of the call share; None is SamplingConfig().
            batch_size: images computed at once.
            on_preview: called after every `config.preview_rows` rows of codes with the unfinished images of the batch,
                uint8 (B, H, W, 3), gray where nothing is sampled yet. The device continues meanwhile.
            progress: called with the images done and all images.

        Raises:
            ValueError: a setting or prefix is out of range, or guidance or an empty prompt is asked of a model that
                was trained without null captions.
        """
        requests, config = list(requests), SamplingConfig() if config is None else config
        check_requests(requests, batch_size, config, SamplingConfig)
        unused = ("label", "codes", "low_res", "image", "strength", "mask")
        check_unused(requests, unused, "a Transformer")
        check_draft_len(self.config, config.draft_len)
        settings = [self._settings(request, config) for request in requests]
        self._check_null_caption(requests, settings)
        for request in requests:
            self._check_prefix(request.prefix_codes)
        return self._generate(requests, settings, config, batch_size, on_preview, progress)

    def _settings(self, request: ImageRequest, config: SamplingConfig) -> _Settings:
        names = ("temperature", "top_p", "guidance_scale")
        own = (getattr(request, name) for name in names)
        return _Settings(
            *(getattr(config, n) if value is None else value for n, value in zip(names, own, strict=True))
        )

    def _check_null_caption(self, requests: list[ImageRequest], settings: list[_Settings]) -> None:
        """Raise ValueError where the null caption is needed by a model that was trained without it."""
        if self.config.cond_drop_prob > 0:
            return
        for request, own in zip(requests, settings, strict=True):
            guided = own.guidance_scale != 1
            if guided or self._captions.ids(request.prompt)[0] >= self.config.text_vocab:
                got = f"guidance_scale {own.guidance_scale:g}" if guided else "an empty caption"
                raise ValueError(
                    "Expected guidance_scale 1 and captions with text for a model trained with cond_drop_prob 0, "
                    f"got {got}. Use a model trained with cond_drop_prob above 0."
                )

    def _check_prefix(self, prefix: np.ndarray | None) -> None:
        cfg = self.config
        if prefix is None:
            return
        if prefix.ndim != 1 or len(prefix) >= cfg.num_codes or not np.issubdtype(prefix.dtype, np.integer):
            raise ValueError(
                f"Expected prefix_codes of fewer than {cfg.num_codes} integers, got {prefix.dtype} {prefix.shape}."
            )
        if len(prefix) and not 0 <= prefix.min() <= prefix.max() < cfg.image_vocab:
            raise ValueError(
                f"Expected prefix_codes in [0, {cfg.image_vocab}), got codes from {prefix.min()} to {prefix.max()}."
            )

    def _generate(
        self,
        requests: list[ImageRequest],
        settings: list[_Settings],
        config: SamplingConfig,
        batch_size: int,
        on_preview: PreviewFn | None,
        progress: ProgressFn | None,
    ) -> Iterator[GeneratedImage]:
        """Decode the codes of either engine to images."""
        size = min(batch_size, len(requests))
        keys = [
            (own, b"" if r.prefix_codes is None else np.asarray(r.prefix_codes, np.int32).tobytes())
            for own, r in zip(settings, requests, strict=True)
        ]
        several = len(set(keys)) > 1 or (config.draft_len is not None and len(requests) > batch_size)
        if several and on_preview is None:
            batches = self._continuous(requests, settings, config, size)
        else:
            batches = self._batched(requests, keys, config, size, on_preview)
        done = 0
        for codes, codes_per_pass in batches:
            decoded = self.tokenizer.decode(pad_rows(codes, size), batch_size=size)[: len(codes)]
            if progress:
                progress(done + len(codes), len(requests))
            for row, image in zip(codes, to_uint8(decoded), strict=True):
                yield GeneratedImage(image, requests[done], row, codes_per_pass=codes_per_pass)
                done += 1

    def _batched(
        self,
        requests: list[ImageRequest],
        keys: list[tuple[_Settings, bytes]],
        config: SamplingConfig,
        batch_size: int,
        on_preview: PreviewFn | None,
    ) -> Iterator[_Batch]:
        """Batches of neighbors with the same settings, in the program of `generate`."""
        params = self._decode_params(config.quantization)
        num_codes = num_passes = 0
        for (own, _), rows in itertools.groupby(range(len(requests)), key=lambda i: keys[i]):
            group = [requests[i] for i in rows]
            prefix = group[0].prefix_codes
            prefix_len = 0 if prefix is None else len(prefix)
            copies = math.gcd(*(len(list(run)) for _, run in itertools.groupby(r.prompt for r in group)))
            captions, copies_at_once = text_to_image_batch_shape(len(group) // copies, copies, batch_size)
            size = captions * copies_at_once
            options = self._options(own, config, prefix if prefix_len else None, size)
            parts = [part for block in chunked(group, copies) for part in chunked(block, copies_at_once)]
            for batch in chunked(parts, captions):  # requests by caption
                text_CT = pad_rows(self.tokenize([part[0].prompt for part in batch]), captions)
                padded = [part + part[-1:] * (copies_at_once - len(part)) for part in batch]
                seeds_CK = pad_rows(
                    np.asarray([[r.seed for r in part] for part in padded], np.uint32), captions
                )
                real_B = [i * copies_at_once + j for i, part in enumerate(batch) for j in range(len(part))]
                arguments = (self.config, params, jnp.asarray(text_CT), row_keys(seeds_CK.ravel()))
                if on_preview is None:
                    stream = [generate(*arguments, **options)]
                else:
                    stream = generate_stream(*arguments, preview_rows=config.preview_rows, **options)
                for part in stream:
                    codes_BM, passes_B = (np.asarray(array)[real_B] for array in part)
                    if on_preview is not None:
                        on_preview(self._preview(codes_BM))
                num_codes += len(real_B) * (self.config.num_codes - 1 - prefix_len)
                num_passes += int(passes_B.sum())
                rate = num_codes / max(num_passes, 1) if config.draft_len is not None else None
                yield _Batch(codes_BM, rate)

    def _options(
        self, own: _Settings, config: SamplingConfig, prefix: np.ndarray | None, size: int
    ) -> dict[str, typing.Any]:
        """Options of `generate` for a batch of `size` images."""
        options = {
            "temperature": jnp.float32(own.temperature),
            "top_k": self._top_k(config),
            "top_p": None if own.top_p is None else jnp.float32(own.top_p),
            "guidance_scale": None if own.guidance_scale == 1 else jnp.float32(own.guidance_scale),
            "draft_len": config.draft_len,
            "return_num_passes": True,
        }
        if prefix is not None:
            options["prefix_codes"] = jnp.broadcast_to(
                jnp.asarray(prefix, jnp.int32)[None], (size, len(prefix))
            )
        return options

    def _continuous(
        self,
        requests: list[ImageRequest],
        settings: list[_Settings],
        config: SamplingConfig,
        batch_size: int,
    ) -> Iterator[_Batch]:
        """Requests of any settings, in the slots of a ContinuousBatcher."""
        guided = any(own.guidance_scale != 1 for own in settings)
        batcher = ContinuousBatcher(
            self.config,
            self._decode_params(config.quantization),
            batch_size * (2 if guided else 1),
            top_k=self._top_k(config),
            draft_len=config.draft_len,
        )
        waiting = iter(range(len(requests)))
        row_of: dict[int, int] = {}  # by ticket
        finished: dict[int, np.ndarray] = {}  # by row
        next_row = 0
        while True:
            while len(batcher) < 2 * batcher.num_slots and (row := next(waiting, None)) is not None:
                request, own = requests[row], settings[row]
                prefix = np.zeros(0, np.int32) if request.prefix_codes is None else request.prefix_codes
                top_p = 1.0 if own.top_p is None else own.top_p
                text_T = self._captions.ids(request.prompt)
                ticket = batcher.submit(
                    SamplingRequest(text_T, request.seed, own.temperature, top_p, own.guidance_scale, prefix)
                )
                row_of[ticket] = row
            if not len(batcher):
                return
            for ticket, codes_N in batcher.step():
                finished[row_of.pop(ticket)] = codes_N
            ready = []
            while next_row in finished:
                ready.append(finished.pop(next_row))
                next_row += 1
            rate = batcher.codes_per_pass if config.draft_len is not None else None
            for batch in chunked(ready, batch_size):
                yield _Batch(np.stack(batch), rate)

    def _top_k(self, config: SamplingConfig) -> int | None:
        return None if config.top_k is None else min(config.top_k, self.config.image_vocab)

    def _decode_params(self, quantization: Quantization | None) -> Params:
        """The parameters in the form for sampling, on the first device; computed where those of the run are."""
        params = _prepare_for_decode(self.config, self.run.params, quantization)
        return jax.device_put(params, jax.local_devices()[0])

    def _preview(self, codes_BM: np.ndarray) -> np.ndarray:
        """Images of the first M codes, uint8 (B, H, W, 3); the rows to come are decoded as the last one, then gray."""
        cfg = self.tokenizer.config
        done = codes_BM.shape[1] // cfg.grid
        rows = codes_BM[:, : done * cfg.grid].reshape(len(codes_BM), done, cfg.grid)
        rows = np.concatenate([rows, np.repeat(rows[:, -1:], cfg.grid - done, axis=1)], axis=1)
        codes_BN = rows.reshape(len(codes_BM), -1)
        images = to_uint8(self.tokenizer.decode(codes_BN, batch_size=len(codes_BN)))
        images[:, done * (cfg.image_size // cfg.grid) :] = 128
        return images


def text_to_image_batch_shape(captions: int, copies: int, batch_size: int) -> tuple[int, int]:
    """Return the captions of a batch and the images of each, for `copies` images of each caption.

    More images of a caption than a batch holds are spread evenly over batches of that caption.
    """
    parts = -(-copies // batch_size)
    per_caption = -(-copies // parts)
    return min(captions, batch_size // per_caption), per_caption
