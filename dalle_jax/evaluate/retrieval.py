"""What a CLIP is worth alone: finding captions for pictures and pictures for captions, and naming classes that it
was not trained to name (Radford et al. 2021, arXiv 2103.00020, 3.1).

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
from dalle_jax.pipelines import ProgressFn
from dalle_jax.pipelines.ranking import ClipRanker, embed_captions, embed_images

KS = (1, 5, 10)
SCENE_TEMPLATES = ("a {}",)


def ranks(score_QA: np.ndarray, right_QA: np.ndarray) -> np.ndarray:
    """How many wrong answers stand before the first right one, int (Q,); 0 is found first.

    score_QA: floats. right_QA: bool, at least one right answer for each query. A wrong answer with the same score
    stands before: a model that gives all answers one score finds nothing.
    """
    best_Q1 = np.max(np.where(right_QA, score_QA, -np.inf), axis=1, keepdims=True)
    return np.sum(~right_QA & (score_QA >= best_Q1), axis=1)


def recalls(name: str, rank_Q: np.ndarray, answers: int) -> Metrics:
    """`NAME_recall_K`: share of queries with a right answer among the first K, for each K below `answers`."""
    return {f"{name}_recall_{k}": float(np.mean(rank_Q < k)) for k in KS if k < answers}


def measure_retrieval(
    clip: ClipRanker, data: DataConfig, count: int = 256, *, progress: ProgressFn | None = None
) -> Metrics:
    """Both ways among the first `count` rows of the evaluation split, with all their captions.

    A caption that several rows share is one text, and right for each of them. Returns `image_to_text_recall_K`
    and `text_to_image_recall_K` for K of 1, 5, 10, and `pictures`, `texts`: recall compares at the same
    numbers only.
    """
    source = open_source(data.source, "eval", languages=data.languages)
    rows = min(count, len(source))
    image_RE = _embed_rows(clip, data, source, range(rows), progress)
    texts: dict[str, list[int]] = {}
    for row in range(rows):
        for said in source.captions(row).values():
            for caption in said:
                texts.setdefault(caption, []).append(row)
    right_RA = np.zeros((rows, len(texts)), bool)
    for number, owners in enumerate(texts.values()):
        right_RA[owners, number] = True
    score_RA = image_RE @ embed_captions(clip, list(texts)).T
    return {
        **recalls("image_to_text", ranks(score_RA, right_RA), len(texts)),
        **recalls("text_to_image", ranks(score_RA.T, right_RA.T), rows),
        "pictures": rows,
        "texts": len(texts),
    }


def class_vectors(clip: ClipRanker, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """A vector for each class, float32 (C, E) of length 1: the mean of its name in each template (3.1.4).

    Raises ValueError for a template without `{}`, where the name goes.
    """
    if not templates or any("{}" not in t for t in templates):
        raise ValueError(f"templates are {tuple(templates)}; want one or more, each with {{}} for the name")
    texts = [t.replace("{}", name.replace("_", " ")) for name in names for t in templates]
    mean_CE = embed_captions(clip, texts).reshape(len(names), len(templates), -1).mean(axis=1)
    return mean_CE / np.linalg.norm(mean_CE, axis=1, keepdims=True)


def zero_shot(name: str, image_RE: np.ndarray, label_R: np.ndarray, class_CE: np.ndarray) -> Metrics:
    """`NAME_top1` and, of more than 5 classes, `NAME_top5`: shares of rows whose class is among the nearest."""
    right_RC = np.arange(len(class_CE))[None] == np.asarray(label_R)[:, None]
    rank_R = ranks(image_RE @ class_CE.T, right_RC)
    return {f"{name}_top{k}": float(np.mean(rank_R < k)) for k in (1, 5) if k < len(class_CE)}


def measure_zero_shot(
    clip: ClipRanker,
    data: DataConfig,
    count: int = 256,
    *,
    templates: Sequence[str] = (),
    progress: ProgressFn | None = None,
) -> Metrics:
    """Zero-shot classification of the first `count` rows of the evaluation split of a source with labels.

    templates: of the texts for a class; () takes those of the source. Returns `zero_shot_top1`,
    `zero_shot_top5` and `classes`. Of procedural scenes of one object the classes are the 120 pairs of colour and
    shape: `zero_shot_one_object_top1` of pairs that training shows, `zero_shot_held_out_top1` of pairs that it
    never does, and so on. {} for a source without labels.
    """
    if isinstance(data.source, ScenesSource):
        return _scene_classes(clip, data, count, templates or SCENE_TEMPLATES)
    source = open_source(data.source, "eval", languages=())
    if not source.classes:
        return {}
    rows = range(min(count, len(source)))
    image_RE = _embed_rows(clip, data, source, rows, progress)
    labels = [source.label(i) for i in rows]  # after the pictures: a stand-in brings its label
    named = [i for i, label in enumerate(labels) if label is not None]
    if not named:
        return {}
    templates = templates or getattr(data.source, "templates", SCENE_TEMPLATES)
    vectors = class_vectors(clip, source.classes, templates)
    found = zero_shot("zero_shot", image_RE[named], np.array([labels[i] for i in named]), vectors)
    return {**found, "classes": len(source.classes)}


def _scene_classes(clip: ClipRanker, data: DataConfig, count: int, templates: Sequence[str]) -> Metrics:
    size, figures = clip.config.image_size, {}
    pairs = [(colour, shape) for colour in COLORS for shape in SHAPES]
    vectors = class_vectors(clip, [" ".join(pair) for pair in pairs], templates)
    for kind in scene_kinds(data, size):
        asked = [scene for _, scene in unseen_captions(data, kind, count) if len(scene.objects) == 1]
        if not asked or kind == "two_objects":
            continue
        image_RE = embed_images(clip, np.stack([generator.render(scene, size) for scene in asked]))
        labels = np.array([pairs.index((s.objects[0].color, s.objects[0].shape)) for s in asked])
        figures |= zero_shot(f"zero_shot_{kind}", image_RE, labels, vectors)
    return {**figures, "classes": len(pairs)} if figures else {}


def _embed_rows(
    clip: ClipRanker, data: DataConfig, source: Dataset, rows: range, progress: ProgressFn | None
) -> np.ndarray:
    """Vectors of the pictures of rows, read and embedded batch by batch."""
    crop, found = "none" if data.crop == "none" else "center", []
    for start in range(0, len(rows), EVAL_ROWS):
        here = rows[start : start + EVAL_ROWS]
        pictures = np.stack([source.image(i, clip.config.image_size, crop) for i in here])
        found.append(embed_images(clip, pictures, batch=EVAL_ROWS))
        if progress:
            progress(start + len(here), len(rows))
    return np.concatenate(found)
