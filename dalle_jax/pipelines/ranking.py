"""Pictures ranked by a trained CLIP: how well each fits its caption, and the best of many (2102.12092, 2.6).

    clip = load_clip("runs/clip")
    which, score = rank(clip, pictures, ["a red circle"], keep=4)

R rows, C captions, N candidates of each, K kept, H W picture, E common space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dalle_jax.checkpoint.load import Run, load_run
from dalle_jax.checkpoint.run_dir import read_config
from dalle_jax.config import ClipConfig
from dalle_jax.data.images import to_float
from dalle_jax.models import clip as clips
from dalle_jax.pipelines import (
    IMAGE_BATCH,
    ProgressFn,
    SamplingConfig,
    TextToImage,
    in_batches,
    sample_images,
)
from dalle_jax.text.tokenizers import BosEosTokenizer
from dalle_jax.typing import Params


class ClipRanker(NamedTuple):
    """A trained CLIP with its vocabulary."""

    run: Run
    text: BosEosTokenizer

    @property
    def config(self) -> ClipConfig:
        return self.run.config.model


def load_clip(path: str | Path) -> ClipRanker:
    """The CLIP of a run directory.

    Raises FileNotFoundError for a run that is missing or has no checkpoint, ValueError for a run of another
    stage, OSError for files that cannot be read.
    """
    path = Path(path)
    kind = read_config(path).model.kind
    if kind != "clip":
        raise ValueError(
            f"{path} is a run of stage {kind}; want one of stage clip, as configs/demo_clip.py trains it"
        )
    if not (path / "text_tokenizer.model").is_file():
        raise FileNotFoundError(
            f"{path} has no text_tokenizer.model, the vocabulary of its captions: import it again with --text-tokenizer FILE, e.g. CLIP's "
            "bpe_simple_vocab_16e6.txt.gz (docs/import.md), or train it to its first save"
        )
    return ClipRanker(load_run(path), BosEosTokenizer.load(path / "text_tokenizer.model"))


@partial(jax.jit, static_argnums=0)
def _image(cfg: ClipConfig, params: Params, image_u8: jax.Array) -> jax.Array:
    return clips.encode_image(cfg, params, to_float(image_u8))


_text = jax.jit(clips.encode_text, static_argnums=0)


def embed_images(
    clip: ClipRanker, images: np.ndarray, *, batch: int = IMAGE_BATCH, progress: ProgressFn | None = None
) -> np.ndarray:
    """Vectors of pictures, uint8 (R, H, W, 3) of any size: float32 (R, E) of length 1. Raises ValueError for
    another shape or dtype."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"pictures are {images.dtype} {images.shape}, want uint8 (rows, height, width, 3)")
    one = partial(_image, clip.config, clip.run.params)
    return in_batches(one, (images,), min(batch, len(images)), progress)


def embed_captions(clip: ClipRanker, captions: Sequence[str], *, batch: int = IMAGE_BATCH) -> np.ndarray:
    """Vectors of captions, float32 (R, E) of length 1; a caption that is too long is cut."""
    if not len(captions):
        raise ValueError("no captions; want one or more")
    cfg = clip.config
    text_RT = np.stack(
        [clip.text.encode(c, text_vocab=cfg.text_vocab, text_len=cfg.text_len) for c in captions]
    )
    return in_batches(partial(_text, cfg, clip.run.params), (text_RT,), min(batch, len(text_RT)))


def clip_scores(clip: ClipRanker, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """How well each picture fits its own caption: the cosine of their vectors, float32 (R,) in [-1, 1].

    images: uint8 (R, H, W, 3). captions: R texts. Raises ValueError for rows that do not match.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} pictures and {len(captions)} captions; want one caption each")
    different = list(dict.fromkeys(captions))
    text_RE = embed_captions(clip, different)[[different.index(caption) for caption in captions]]
    return np.einsum("re,re->r", embed_images(clip, images), text_RE)


def rank_images(
    clip: ClipRanker, images: np.ndarray, captions: Sequence[str], keep: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `keep` pictures of each caption that fit it best, best first; of equal ones the first.

    images: uint8 (C, N, H, W, 3), N candidates for each caption. Returns indices int64 (C, K) and their scores
    float32 (C, K). Raises ValueError unless 1 <= keep <= N and there is a caption for each set.
    """
    if images.ndim != 5 or len(images) != len(captions):
        raise ValueError(
            f"pictures have shape {images.shape}, want ({len(captions)}, candidates, height, width, 3): a set for "
            "each caption"
        )
    count = images.shape[1]
    if not 1 <= keep <= count:
        raise ValueError(f"keep is {keep}; want 1 to {count}, the candidates of a caption")
    repeated = [caption for caption in captions for _ in range(count)]
    score = clip_scores(clip, images.reshape(-1, *images.shape[2:]), repeated).reshape(len(captions), count)
    which = np.argsort(-score, axis=1, kind="stable")[:, :keep]
    return which, np.take_along_axis(score, which, axis=1)


class RankedImages(NamedTuple):
    """The best of the candidates of one caption, best first. number: of the caption. which: of the candidates,
    int (K,). score: float32 (K,). codes: int32 (K, N). pictures: uint8 (K, H, W, 3)."""

    number: int
    which: np.ndarray
    score: np.ndarray
    codes: np.ndarray
    images: np.ndarray


def sample_and_rerank(
    model: TextToImage,
    clip: ClipRanker,
    captions: Sequence[str],
    seeds: Sequence[int],
    keep: int,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008, frozen
    **options,
) -> Iterator[RankedImages]:
    """Draws candidates for each caption and keeps those that fit it best; caption by caption, as they are done.

    seeds: as many for each caption, those of the first one first; one for each candidate. options: as
    `draw_pictures` takes them. Raises what that does; ValueError for a caption without text, and unless keep is
    1 to the candidates of a caption.
    """
    if empty := [i for i, caption in enumerate(captions) if not caption.strip()]:
        raise ValueError(f"caption {empty[0]} has no text: nothing to rank its pictures by")
    count = len(seeds) // max(1, len(captions))
    if not 1 <= keep <= count:
        raise ValueError(f"keep is {keep}; want 1 to {count}, the candidates of a caption")
    held: list[tuple[np.ndarray, np.ndarray]] = []
    number = 0
    for part in sample_images(model, captions, seeds, sampling, **options):
        held.append(part)
        codes, pictures = (np.concatenate(kind) for kind in zip(*held, strict=True))
        whole = len(codes) // count
        for i in range(whole):
            here = slice(i * count, (i + 1) * count)
            (which,), (score,) = rank_images(clip, pictures[here][None], [captions[number]], keep)
            yield RankedImages(number, which, score, codes[here][which], pictures[here][which])
            number += 1
        held = [(codes[whole * count :], pictures[whole * count :])]
