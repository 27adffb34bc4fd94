"""Metrics of a CLIP: retrieval of captions and images, and zero-shot classification (Radford et al. 2021, 2103.00020,
sec. 3.1).

Q queries, A answers, R rows, C classes, E common space.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dalle_jax.config import DataConfig, ScenesSource
from dalle_jax.data.scenes import generator
from dalle_jax.data.scenes.scene import COLORS, SHAPES
from dalle_jax.data.sources import Dataset, open_source
from dalle_jax.evaluate.metrics import EVAL_ROWS, Metrics, scene_kinds, unseen_captions
from dalle_jax.pipelines import ClipPipeline, ProgressFn

_KS = (1, 5, 10)
_DEFAULT_TEMPLATES = ("a {}",)


def retrieval_ranks(score_QA: np.ndarray, right_QA: np.ndarray) -> np.ndarray:
    """Count the wrong answers before the first right one.

    A wrong answer with the same score counts as before it, so a model that gives all answers one score finds none.

    Args:
        score_QA: floats.
        right_QA: bool, with at least one right answer for each query.

    Returns:
        int (Q,); 0 means that the right answer is first.
    """
    best_Q1 = np.max(np.where(right_QA, score_QA, -np.inf), axis=1, keepdims=True)
    return np.sum(~right_QA & (score_QA >= best_Q1), axis=1)


def recall_at_k(name: str, rank_Q: np.ndarray, answers: int) -> Metrics:
    """Return `NAME_recall_K`, the fraction of queries with a right answer among the first K, for each K below
    `answers`."""
    return {f"{name}_recall_{k}": float(np.mean(rank_Q < k)) for k in _KS if k < answers}


def measure_retrieval(
    clip: ClipPipeline, data: DataConfig, count: int = 256, *, progress: ProgressFn | None = None
) -> Metrics:
    """Measure retrieval among the first `count` rows of the evaluation split, with all their captions.

    A caption that several rows share is one text, and right for each of them.

    Returns:
        `image_to_text_recall_K` and `text_to_image_recall_K` for K of 1, 5 and 10, and the numbers of `images` and
        `texts`: recall compares at the same numbers only.
    """
    source = open_source(data.source, "eval", languages=data.languages)
    rows = min(count, len(source))
    image_RE = _embed_rows(clip, data, source, range(rows), progress)
    texts: dict[str, list[int]] = {}
    for row in range(rows):
        for captions in source.captions(row).values():
            for caption in captions:
                texts.setdefault(caption, []).append(row)
    right_RA = np.zeros((rows, len(texts)), bool)
    for i, owners in enumerate(texts.values()):
        right_RA[owners, i] = True
    score_RA = image_RE @ clip.embed_captions(list(texts)).T
    return {
        **recall_at_k("image_to_text", retrieval_ranks(score_RA, right_RA), len(texts)),
        **recall_at_k("text_to_image", retrieval_ranks(score_RA.T, right_RA.T), rows),
        "images": rows,
        "texts": len(texts),
    }


def class_embeddings(clip: ClipPipeline, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """Embed each class as the mean of its name in each template (sec. 3.1.4).

    Args:
        clip: the CLIP.
        names: C names of classes; "_" stands for a space.
        templates: texts in which {} stands for the name.

    Returns:
        Vectors of length 1, float32 (C, E).

    Raises:
        ValueError: there is no template, or one without {}.
    """
    if not templates or any("{}" not in template for template in templates):
        raise ValueError(
            f"Expected one or more templates, each with {{}} for the name, got {tuple(templates)}."
        )
    texts = [template.replace("{}", name.replace("_", " ")) for name in names for template in templates]
    mean_CE = clip.embed_captions(texts).reshape(len(names), len(templates), -1).mean(axis=1)
    return mean_CE / np.linalg.norm(mean_CE, axis=1, keepdims=True)


def zero_shot(name: str, image_RE: np.ndarray, label_R: np.ndarray, class_CE: np.ndarray) -> Metrics:
    """Return `NAME_top1` and, for more than 5 classes, `NAME_top5`: fractions of rows whose class is among the
    nearest ones."""
    right_RC = np.arange(len(class_CE))[None] == np.asarray(label_R)[:, None]
    rank_R = retrieval_ranks(image_RE @ class_CE.T, right_RC)
    return {f"{name}_top{k}": float(np.mean(rank_R < k)) for k in (1, 5) if k < len(class_CE)}


def measure_zero_shot(
    clip: ClipPipeline,
    data: DataConfig,
    count: int = 256,
    *,
    templates: Sequence[str] = (),
    progress: ProgressFn | None = None,
) -> Metrics:
    """Measure zero-shot classification of the first `count` rows of the evaluation split of a source with labels.

    For procedural scenes of one object the classes are the 120 pairs of color and shape.

    Args:
        clip: the CLIP.
        data: source and preprocessing.
        count: rows.
        templates: texts for a class, {} stands for its name; () takes those of the source.
        progress: called with the rows done and all rows.

    Returns:
        `zero_shot_top1`, `zero_shot_top5` and `classes`. For scenes `zero_shot_one_object_top1` of pairs shown in
        training, `zero_shot_held_out_top1` of pairs never shown, and so on. {} for a source without labels.
    """
    if isinstance(data.source, ScenesSource):
        return _scene_classes(clip, data, count, templates or _DEFAULT_TEMPLATES)
    source = open_source(data.source, "eval", languages=())
    if not source.classes:
        return {}
    rows = range(min(count, len(source)))
    image_RE = _embed_rows(clip, data, source, rows, progress)
    labels = [source.label(i) for i in rows]  # after the images: a replacement row has its own label
    labeled = [i for i, label in enumerate(labels) if label is not None]
    if not labeled:
        return {}
    templates = templates or getattr(data.source, "templates", _DEFAULT_TEMPLATES)
    vectors = class_embeddings(clip, source.classes, templates)
    metrics = zero_shot("zero_shot", image_RE[labeled], np.array([labels[i] for i in labeled]), vectors)
    return {**metrics, "classes": len(source.classes)}


def _scene_classes(clip: ClipPipeline, data: DataConfig, count: int, templates: Sequence[str]) -> Metrics:
    metrics: Metrics = {}
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    vectors = class_embeddings(clip, [" ".join(pair) for pair in pairs], templates)
    for kind in scene_kinds(data, clip.image_size):
        scenes = [scene for _, scene in unseen_captions(data, kind, count) if len(scene.objects) == 1]
        if not scenes or kind == "two_objects":
            continue
        image_RE = clip.embed_images(
            np.stack([generator.render_scene(scene, clip.image_size) for scene in scenes])
        )
        labels = np.array([pairs.index((s.objects[0].color, s.objects[0].shape)) for s in scenes])
        metrics |= zero_shot(f"zero_shot_{kind}", image_RE, labels, vectors)
    return {**metrics, "classes": len(pairs)} if metrics else {}


def _embed_rows(
    clip: ClipPipeline, data: DataConfig, source: Dataset, rows: range, progress: ProgressFn | None
) -> np.ndarray:
    """Vectors of the images of rows, read and embedded batch by batch."""
    crop, vectors = "none" if data.crop == "none" else "center", []
    for start in range(0, len(rows), EVAL_ROWS):
        batch = rows[start : start + EVAL_ROWS]
        images = np.stack([source.image(i, clip.image_size, crop) for i in batch])
        vectors.append(clip.embed_images(images, batch_size=EVAL_ROWS))
        if progress:
            progress(start + len(batch), len(rows))
    return np.concatenate(vectors)
