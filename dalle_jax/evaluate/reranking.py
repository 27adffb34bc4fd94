"""Does re-ranking help? The share of right pictures among the best of n candidates, on procedural scenes.

C captions, N candidates of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dalle_jax.data.loader.pipeline import eval_batch
from dalle_jax.data.sources import open_source
from dalle_jax.evaluate.metrics import EVAL_ROWS, Metrics, scene_kinds, unseen_captions
from dalle_jax.evaluate.scenes import verifier
from dalle_jax.pipelines import ProgressFn, SamplingConfig, TextToImage, sample_images
from dalle_jax.pipelines.ranking import ClipRanker, clip_scores


def best_of(score_CN: np.ndarray, right_CN: np.ndarray, n: int) -> float:
    """Share of right pictures where the best of `n` candidates by score is taken: the mean over captions and over
    the N // n groups of neighbouring candidates. n = 1 is the share of all candidates.

    Raises ValueError unless 1 <= n <= N.
    """
    captions, candidates = score_CN.shape
    if not 1 <= n <= candidates:
        raise ValueError(f"the best of {n} of {candidates} candidates; want 1 to {candidates}")
    groups = candidates // n
    score, right = (x[:, : groups * n].reshape(captions, groups, n) for x in (score_CN, right_CN))
    taken = np.take_along_axis(right, score.argmax(axis=2)[..., None], axis=2)
    return float(taken.mean())


def candidate_counts(candidates: int) -> list[int]:
    """1, 4, 16, ... and `candidates` itself."""
    powers = [4**i for i in range(candidates.bit_length()) if 4**i < candidates]
    return [*powers, candidates]


def measure_reranking(
    model: TextToImage,
    clip: ClipRanker,
    count: int = 256,
    candidates: int = 64,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008, frozen
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> Metrics:
    """The verifier on the best of 1, 4, 16, ... of `candidates` pictures for each of `count` captions of each
    kind; candidate j of caption i has the seed `seed + i * candidates + j`.

    Returns `accuracy_KIND_best_of_N`, and `accuracy_KIND_any_of_N`, the share of captions with a right picture among
    all candidates, which no ranking can exceed; {} for a source that is not of procedural scenes.
    """
    if candidates < 1:
        raise ValueError(f"candidates is {candidates}; want at least 1")
    figures: Metrics = {}
    for kind in scene_kinds(model.run.config.data, model.tokenizer.config.image_size):
        captions = [caption for caption, _ in unseen_captions(model.run.config.data, kind, count)]
        score, right = _judged(model, clip, captions, candidates, sampling, seed, progress)
        figures |= {
            f"accuracy_{kind}_best_of_{n}": best_of(score, right, n) for n in candidate_counts(candidates)
        }
        figures[f"accuracy_{kind}_any_of_{candidates}"] = float(right.any(axis=1).mean())
    return figures


def _judged(
    model: TextToImage,
    clip: ClipRanker,
    captions: Sequence,
    candidates: int,
    sampling: SamplingConfig,
    seed: int,
    progress,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and verdicts of all candidates, (C, N) each; no more than a batch of pictures is held."""
    texts = [caption.text for caption in captions]
    seeds = range(seed, seed + len(texts) * candidates)
    score, right = [], []
    for _, pictures in sample_images(model, texts, seeds, sampling, batch=EVAL_ROWS, progress=progress):
        owners = [(len(right) + i) // candidates for i in range(len(pictures))]
        score.append(clip_scores(clip, pictures, [texts[i] for i in owners]))
        right += [
            verifier.verify(picture, captions[i].facts).right
            for i, picture in zip(owners, pictures, strict=True)
        ]
    shape = (len(texts), candidates)
    return np.concatenate(score).reshape(shape), np.array(right).reshape(shape)


def measure_clip_score(
    model: TextToImage,
    clip: ClipRanker,
    count: int = 256,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008, frozen
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> Metrics:
    """`clip_score`: the mean cosine of captions and the pictures drawn for them, one for each of the first `count`
    rows of the evaluation split, row i with seed `seed + i`; `clip_score_true`, the same of the true pictures.

    Figures of different CLIPs do not compare (Hessel et al. 2021, arXiv 2104.08718).
    """
    data, size = model.run.config.data, model.tokenizer.config.image_size
    source = open_source(data.source, "eval", languages=data.languages)
    captions, drawn, true = [], [], []
    rows = min(count, len(source))
    for start in range(0, rows, EVAL_ROWS):
        batch = eval_batch(data, source, range(start, min(start + EVAL_ROWS, rows)), image_size=size)
        captions += batch["caption"]
        true.append(clip_scores(clip, batch["image"], batch["caption"]))
    seeds, done = range(seed, seed + rows), 0
    for _, pictures in sample_images(model, captions, seeds, sampling, batch=EVAL_ROWS, progress=progress):
        drawn.append(clip_scores(clip, pictures, captions[done : done + len(pictures)]))
        done += len(pictures)
    return {
        "clip_score": float(np.concatenate(drawn).mean()),
        "clip_score_true": float(np.concatenate(true).mean()),
    }
