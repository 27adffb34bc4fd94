"""Captions to codes and pictures with a trained Transformer.

N codes of a picture, H W picture, C captions, R rows, K pictures of each caption.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import Quantization
from dalle_jax.data.images import to_uint8
from dalle_jax.models import autoregressive
from dalle_jax.pipelines.batching import ProgressFn, pad_rows
from dalle_jax.pipelines.image_codes import decode_codes
from dalle_jax.pipelines.loading import ImageTokenizer, TextToImage
from dalle_jax.sampling.batcher import ContinuousBatcher
from dalle_jax.sampling.generate import generate, generate_stream, row_keys
from dalle_jax.sampling.speculative import check_draft_len

SAMPLE_BATCH = 8  # pictures drawn at once where the caller does not say


@functools.partial(jax.jit, static_argnums=(0, 2))
def _unstack(cfg, params, weights: Quantization | None):
    return autoregressive.prepare_for_decode(cfg, params, weights)


def _prepared(model: TextToImage, weights: Quantization | None) -> dict:
    """The parameters as sampling wants them, on the first device; made where those of the run are."""
    params = _unstack(model.config, model.run.params, weights)
    return jax.device_put(params, jax.local_devices()[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How codes are drawn; checked when made. A guidance of 1 is no guidance."""

    temperature: float = 1.0  # 0 takes the most probable code
    top_k: int | None = None  # codes that stay in the draw; None is all
    top_p: float | None = None  # share of the probability that stays in the draw, (0, 1]; None is all
    guidance_scale: float = 1.0  # scale of classifier-free guidance
    draft_len: int | None = None  # codes that one pass looks at: same pictures, fewer passes; None is one
    quantization: Quantization | None = None  # 8-bit matrices; None is the compute dtype

    def __post_init__(self):
        for holds, message in (
            (0 <= self.temperature < np.inf, f"temperature is {self.temperature}; want 0 (greedy) or more"),
            (self.top_k is None or self.top_k >= 1, f"top_k is {self.top_k}; want at least 1 code"),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p is {self.top_p}; want a share in (0, 1]"),
            (
                0 <= self.guidance_scale < np.inf,
                f"guidance_scale is {self.guidance_scale}; want 0 or more, 1 is none",
            ),
            (
                self.draft_len is None or self.draft_len >= 2,
                f"jacobi is {self.draft_len}; want at least 2 codes at once",
            ),
            (
                self.quantization in (None, *typing.get_args(Quantization)),
                f"quantization is {self.quantization!r}; want one of {', '.join(typing.get_args(Quantization))}, or None",
            ),
        ):
            if not holds:
                raise ValueError(message)


def tokenize_captions(model: TextToImage, captions: Sequence[str]) -> np.ndarray:
    """Token ids of captions, int32 (R, T). An empty caption is the null caption; a longer one is cut."""
    cfg = model.config
    one = partial(model.text.encode, text_vocab=cfg.text_vocab, text_len=cfg.text_len)
    return np.stack([one(caption) for caption in captions])


def check_null(model: TextToImage, text_CT: np.ndarray, guidance: float) -> None:
    """Raises ValueError where the null caption is wanted of a model that never saw it."""
    guided, null = guidance != 1, bool((text_CT[:, 0] >= model.config.text_vocab).any())
    if model.config.cond_drop_prob == 0 and (guided or null):
        what = f"guidance {guidance:g}" if guided else "an empty caption"
        raise ValueError(
            f"{what} needs the null caption, which this model never saw (trained with model.cond_drop_prob 0). "
            "Use guidance 1 and captions with text, or train with a cond_drop_prob of 0.1"
        )


def make_batcher(
    model: TextToImage, slots: int, sampling: SamplingConfig = SamplingConfig()
) -> ContinuousBatcher:
    """A queue that draws with the model; its requests have the ids of `text_rows`, and of `sampling` what is not
    theirs to say: top-k, codes looked at together, and weights."""
    cfg = model.config
    check_draft_len(cfg, sampling.draft_len)
    top_k = None if sampling.top_k is None else min(sampling.top_k, cfg.image_vocab)
    params = _prepared(model, sampling.quantization)
    return ContinuousBatcher(cfg, params, slots, top_k=top_k, draft_len=sampling.draft_len)


def sample_code_rows(
    model: TextToImage,
    captions: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig = SamplingConfig(),
    *,
    prefix_codes: np.ndarray | None = None,
    batch: int = SAMPLE_BATCH,
    progress: ProgressFn | None = None,
) -> np.ndarray:
    """The codes of R = n * C pictures, n of each caption, neighbours: int32 (R, N).

    captions: C texts; "" draws without a caption. A caption is run once for all its pictures in a batch.
    seeds: R integers in [0, 2**32), those of the first caption first. prefix: int32 (P,), the first P < N
    codes of every picture. batch: rows at once, at most.

    Raises ValueError for rows that do not match, seeds out of range, and for guidance or an empty caption
    where the model was trained without null captions: it never learned what to draw for one.
    """
    found = [codes for codes, _ in _drawn(model, captions, seeds, sampling, prefix_codes, batch, progress)]
    return np.concatenate(found)


def sample_images(
    model: TextToImage,
    captions: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig = SamplingConfig(),
    *,
    prefix_codes: np.ndarray | None = None,
    batch: int = SAMPLE_BATCH,
    progress: ProgressFn | None = None,
    preview_rows: int | None = None,
    on_preview: Callable[[np.ndarray], None] | None = None,
    on_batch: Callable[[np.ndarray], None] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`sample_code_rows` and `decode_codes`, batch by batch as they are done: codes int32 (b, N) and pictures, uint8
    (b, H, W, 3).

    rows: after so many rows of codes of a batch, each time, `shown` is called with its unfinished pictures, uint8
    (b, H, W, 3), grey where nothing is drawn yet; the device draws on meanwhile. passed: called after each batch with
    the passes of the network that each picture took after its first code, int32 (b,).
    Raises what `sample_code_rows` does, and ValueError for `rows` below 1.
    """
    tokenizer = model.tokenizer

    def show(codes: np.ndarray) -> None:
        on_preview(_unfinished(tokenizer, codes))

    for codes, size in _drawn(
        model, captions, seeds, sampling, prefix_codes, batch, progress, preview_rows, show, on_batch
    ):
        pictures = decode_codes(tokenizer, pad_rows(codes, size), batch=size)[: len(codes)]
        yield codes, to_uint8(pictures)


def _unfinished(tokenizer: ImageTokenizer, codes: np.ndarray) -> np.ndarray:
    """Pictures of the first codes of each, (b, M): the last whole row stands for those to come, under the grey."""
    cfg = tokenizer.config
    done = codes.shape[1] // cfg.grid
    rows = codes[:, : done * cfg.grid].reshape(len(codes), done, cfg.grid)
    rows = np.concatenate([rows, np.repeat(rows[:, -1:], cfg.grid - done, axis=1)], axis=1)
    pictures = to_uint8(decode_codes(tokenizer, rows.reshape(len(codes), -1), batch=len(codes)))
    pictures[:, done * (cfg.image_size // cfg.grid) :] = 128
    return pictures


def batch_shape(captions: int, copies: int, batch: int) -> tuple[int, int]:
    """Captions in a batch and pictures of each, for `copies` pictures of each caption and at most `batch` at once.

    More copies than a batch holds are spread evenly over the batches of one caption.
    """
    parts = -(-copies // batch)
    per_caption = -(-copies // parts)
    return min(captions, batch // per_caption), per_caption


def _drawn(
    model: TextToImage,
    captions: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    prefix: np.ndarray | None,
    batch: int,
    progress: ProgressFn | None,
    rows: int | None = None,
    shown: Callable[[np.ndarray], None] | None = None,
    passed: Callable[[np.ndarray], None] | None = None,
) -> Iterator[tuple[np.ndarray, int]]:
    """Codes of neighbouring rows, (b, N), in order, and the rows that were computed for them, b and padding."""
    cfg = model.config
    if not len(captions) or not len(seeds) or len(seeds) % len(captions):
        raise ValueError(
            f"{len(captions)} captions and {len(seeds)} seeds; want one seed per caption, or as many for each, "
            "at least one"
        )
    if min(seeds) < 0 or max(seeds) >= 2**32:
        raise ValueError(f"seeds from {min(seeds)} to {max(seeds)}; want integers in [0, 2**32)")
    if batch < 1:
        raise ValueError(f"batch_size is {batch}; want at least 1 picture at once")
    check_draft_len(cfg, sampling.draft_len)
    text_CT = tokenize_captions(model, captions)
    check_null(model, text_CT, sampling.guidance_scale)
    guided = sampling.guidance_scale != 1
    options = {
        "temperature": jnp.float32(sampling.temperature),
        "top_k": None if sampling.top_k is None else min(sampling.top_k, cfg.image_vocab),
        "top_p": None if sampling.top_p is None else jnp.float32(sampling.top_p),
        "guidance_scale": jnp.float32(sampling.guidance_scale) if guided else None,
        "draft_len": sampling.draft_len,
        "return_num_passes": True,
    }
    seeds_CK = np.asarray(seeds, np.uint32).reshape(len(captions), -1)
    at_once, copies = batch_shape(*seeds_CK.shape, batch)
    size = at_once * copies
    if prefix is not None:
        options["prefix_codes"] = jnp.broadcast_to(jnp.asarray(prefix, jnp.int32)[None], (size, len(prefix)))

    params = _prepared(model, sampling.quantization)  # once, not in every batch
    done = 0
    for first in range(0, len(captions), at_once):
        text = pad_rows(text_CT[first : first + at_once], at_once)
        for start in range(0, seeds_CK.shape[1], copies):
            here = seeds_CK[first : first + at_once, start : start + copies]
            keys = row_keys(pad_rows(pad_rows(here.T, copies).T, at_once).ravel())

            def asked(codes, here=here):  # without the padding
                codes = np.asarray(codes).reshape(at_once, copies, -1)[: len(here), : here.shape[1]]
                return codes.reshape(here.size, -1)

            drawn = (cfg, params, jnp.asarray(text), keys)
            parts = (
                [generate(*drawn, **options)]
                if rows is None
                else generate_stream(*drawn, preview_rows=rows, **options)
            )
            for part in parts:
                if rows is not None:
                    shown(asked(part[0]))
            codes, passes_B = part
            if passed is not None:
                passed(asked(passes_B)[:, 0])
            done += here.size
            if progress:
                progress(done, seeds_CK.size)
            yield asked(codes), size
