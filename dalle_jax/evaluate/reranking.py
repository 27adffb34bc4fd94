"""Accuracy of re-ranking: the fraction of accepted images among the best of n candidates, on procedural scenes.

C captions, N candidates of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dalle_jax.data.loader.pipeline import eval_batch
from dalle_jax.data.scenes.captions import Caption
from dalle_jax.data.sources import open_source
from dalle_jax.evaluate.metrics import EVAL_ROWS, Metrics, scene_kinds, unseen_captions
from dalle_jax.evaluate.scenes import verifier
from dalle_jax.pipelines import (
    ClipPipeline,
    ImageRequest,
    ProgressFn,
    SamplingConfig,
    TextToImagePipeline,
    chunked,
)


def best_of(score_CN: np.ndarray, right_CN: np.ndarray, n: int) -> float:
    """Return the fraction of accepted images where the best of `n` candidates by score is taken.

    It is the mean over captions and over the N // n groups of neighboring candidates; n = 1 gives the fraction of all
    candidates.

    Args:
        score_CN: float (C, N).
        right_CN: bool (C, N), whether a candidate is accepted.
        n: candidates of a group.

    Raises:
        ValueError: `n` is not in 1 to N.
    """
    captions, candidates = score_CN.shape
    if not 1 <= n <= candidates:
        raise ValueError(f"Expected n in [1, {candidates}], the candidates of a caption, got {n}.")
    groups = candidates // n
    score, right = (x[:, : groups * n].reshape(captions, groups, n) for x in (score_CN, right_CN))
    best = np.take_along_axis(right, score.argmax(axis=2)[..., None], axis=2)
    return float(best.mean())


def candidate_counts(candidates: int) -> list[int]:
    """Return 1, 4, 16, ... and `candidates` itself."""
    powers = [4**i for i in range(candidates.bit_length()) if 4**i < candidates]
    return [*powers, candidates]


def measure_reranking(
    model: TextToImagePipeline,
    clip: ClipPipeline,
    count: int = 256,
    candidates: int = 64,
    sampling: SamplingConfig | None = None,
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> Metrics:
    """Verify the best of 1, 4, 16, ... of `candidates` images for each of `count` captions of each kind.

    Candidate j of caption i has the seed `seed + i * candidates + j`.

    Returns:
        `accuracy_KIND_best_of_N`, and `accuracy_KIND_any_of_N`, the fraction of captions with an accepted image among
        all candidates, the upper bound of any ranking; {} for a source that is not of procedural scenes.

    Raises:
        ValueError: `candidates` is below 1.
    """
    if candidates < 1:
        raise ValueError(f"Expected candidates of at least 1, got {candidates}.")
    metrics: Metrics = {}
    for kind in scene_kinds(model.run.config.data, model.image_size):
        captions = [caption for caption, _ in unseen_captions(model.run.config.data, kind, count)]
        score, right = _score_and_verify(model, clip, captions, candidates, sampling, seed, progress)
        metrics |= {
            f"accuracy_{kind}_best_of_{n}": best_of(score, right, n) for n in candidate_counts(candidates)
        }
        metrics[f"accuracy_{kind}_any_of_{candidates}"] = float(right.any(axis=1).mean())
    return metrics


def _score_and_verify(
    model: TextToImagePipeline,
    clip: ClipPipeline,
    captions: Sequence[Caption],
    candidates: int,
    sampling: SamplingConfig | None,
    seed: int,
    progress: ProgressFn | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and verdicts of all candidates, (C, N) each; holds one batch of images at a time."""
    owners = [caption for caption in captions for _ in range(candidates)]
    requests = [ImageRequest(caption.text, seed + i) for i, caption in enumerate(owners)]
    score, right = [], []
    generated = model.sample(requests, sampling, batch_size=EVAL_ROWS, progress=progress)
    for batch in chunked(zip(generated, owners, strict=True), EVAL_ROWS):
        images = np.stack([image.image for image, _ in batch])
        score.append(clip.score(images, [caption.text for _, caption in batch]))
        right += [verifier.verify_scene(image.image, caption.facts).right for image, caption in batch]
    shape = (len(captions), candidates)
    return np.concatenate(score).reshape(shape), np.array(right).reshape(shape)


def measure_clip_score(
    model: TextToImagePipeline,
    clip: ClipPipeline,
    count: int = 256,
    sampling: SamplingConfig | None = None,
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> Metrics:
    """Measure the CLIP score (Hessel et al. 2021, 2104.08718), which does not compare between different CLIPs.

    An image is generated for each of the first `count` rows of the evaluation split, row i with seed `seed + i`.

    Returns:
        `clip_score`, the mean cosine similarity of captions and generated images, and `clip_score_true`, the same of
        the true images.
    """
    data = model.run.config.data
    source = open_source(data.source, "eval", languages=data.languages)
    captions, generated_scores, true_scores = [], [], []
    rows = min(count, len(source))
    for start in range(0, rows, EVAL_ROWS):
        batch_rows = range(start, min(start + EVAL_ROWS, rows))
        batch = eval_batch(data, source, batch_rows, image_size=model.image_size)
        captions += batch["caption"]
        true_scores.append(clip.score(batch["image"], batch["caption"]))
    requests = [ImageRequest(caption, seed + i) for i, caption in enumerate(captions)]
    generated = model.sample(requests, sampling, batch_size=EVAL_ROWS, progress=progress)
    for batch in chunked(generated, EVAL_ROWS):
        images = np.stack([image.image for image in batch])
        generated_scores.append(clip.score(images, [image.request.prompt for image in batch]))
    return {
        "clip_score": float(np.concatenate(generated_scores).mean()),
        "clip_score_true": float(np.concatenate(true_scores).mean()),
    }
