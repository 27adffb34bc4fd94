"""Metrics of tokenizers and image generators: reconstruction, likelihood, FID, accuracy on captions.

Each `measure_*` function returns a flat dict of metrics. Rows are the first ones of the evaluation split, or captions
of procedural scenes of kinds shown in training or held out of it. A larger `count` extends the same rows.
R rows, N codes per image, H W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import DataConfig, ScenesSource, TransformerConfig
from dalle_jax.data.images import to_float
from dalle_jax.data.loader.pipeline import eval_batch
from dalle_jax.data.scenes import generator
from dalle_jax.data.scenes.captions import Caption
from dalle_jax.data.sources import open_source
from dalle_jax.evaluate import fid, inception, inception_score
from dalle_jax.evaluate.scenes import verifier
from dalle_jax.models import autoregressive, tokenizer_losses
from dalle_jax.pipelines import (
    DiffusionSamplingConfig,
    ImageRequest,
    Pipeline,
    ProgressFn,
    SamplingConfig,
    TextToImagePipeline,
    TokenizerPipeline,
)
from dalle_jax.typing import Params

Metrics = dict[str, float]
SceneKind = Literal["one_object", "two_objects", "held_out"]
AnySamplingConfig = SamplingConfig | DiffusionSamplingConfig

EVAL_ROWS = 64  # rows computed at once


class VerifiedImage(NamedTuple):
    """A generated image, uint8 (H, W, 3), its caption and the verdict of the verifier."""

    caption: Caption
    image: np.ndarray
    verdict: verifier.Verdict


def measure_tokenizer(tokenizer: TokenizerPipeline, data: DataConfig, count: int = 256) -> Metrics:
    """Measure the reconstruction of the first `count` rows of the evaluation split.

    Returns:
        `psnr` (dB, mean over images), `mse` (of values in [0, 1]), `codebook_use` (fraction of the codebook that these
        rows use) and `codebook_perplexity` (1 to vocab).

    Raises:
        ValueError: `count` is below 1.
    """
    cfg = tokenizer.config
    source = open_source(data.source, "eval", languages=())
    psnr, mse, codes = [], [], []
    for rows in _batches(min(count, len(source))):
        images = eval_batch(data, source, rows, image_size=cfg.image_size)["image"]
        codes.append(tokenizer.encode(images, batch_size=EVAL_ROWS))
        true, decoded = to_float(images), tokenizer.decode(codes[-1], batch_size=EVAL_ROWS)
        psnr.append(np.asarray(tokenizer_losses.psnr(jnp.asarray(true), jnp.asarray(decoded))))
        mse.append(np.square(true - decoded).mean(axis=(1, 2, 3)))
    use, perplexity = tokenizer_losses.codebook_use(jnp.asarray(np.concatenate(codes)), cfg.vocab)
    return {
        "psnr": float(np.concatenate(psnr).mean()),
        "mse": float(np.concatenate(mse).mean()),
        "codebook_use": float(use),
        "codebook_perplexity": float(perplexity),
    }


@partial(jax.jit, static_argnums=0)
def _loss(
    cfg: TransformerConfig, params: Params, text_BT: jax.Array, codes_BN: jax.Array
) -> dict[str, jax.Array]:
    loss, parts = autoregressive.loss(cfg, params, text_BT, codes_BN, jax.random.key(0))
    return {"loss": loss, **parts}


def measure_nll(model: TextToImagePipeline, count: int = 256) -> Metrics:
    """Measure the cross-entropy of the first `count` rows of the evaluation split, without dropping captions.

    Returns:
        `loss` (weighted as in training), `image_loss` and `text_loss`, nats per token.

    Raises:
        ValueError: `count` is below 1.
    """
    cfg = dataclasses.replace(model.config, cond_drop_prob=0.0)
    data, tokenizer = model.run.config.data, model.tokenizer
    source = open_source(data.source, "eval", languages=data.languages)
    options: dict[str, Any] = {"text": model.text, "text_vocab": cfg.text_vocab, "text_len": cfg.text_len}
    losses, weights = [], []
    for rows in _batches(min(count, len(source))):
        batch = eval_batch(data, source, rows, image_size=model.image_size, **options)
        codes = tokenizer.encode(batch["image"], batch_size=EVAL_ROWS)
        text_BT, codes_BN = jnp.asarray(batch["text"]), jnp.asarray(codes)
        losses.append(jax.device_get(_loss(cfg, model.run.params, text_BT, codes_BN)))
        weights.append(len(codes))
    names = ("loss", "image_loss", "text_loss")
    return {name: float(np.average([row[name] for row in losses], weights=weights)) for name in names}


# --- distance between two sets of images --------------------------------------------------------------------


def fid_settings(network: inception.Inception, image_size: int) -> fid.FIDSettings:
    """Return the settings with which reference statistics must agree."""
    return fid.FIDSettings(network.fingerprint, inception.PREPROCESSING, image_size)


def reference_stats(
    network: inception.Inception,
    data: DataConfig,
    image_size: int,
    count: int = 256,
    *,
    languages: Sequence[str] = (),
    progress: ProgressFn | None = None,
) -> fid.FeatureStats:
    """Compute the statistics of the first `count` images of the evaluation split.

    Args:
        network: the Inception network of the features.
        data: source and preprocessing.
        image_size: side of the images that the model generates.
        count: rows.
        languages: a row needs a caption in one of them; () takes every row with an image.
        progress: called with the rows done and all rows.
    """
    source = open_source(data.source, "eval", languages=languages)
    batches = _batches(min(count, len(source)))
    images = (eval_batch(data, source, rows, image_size=image_size)["image"] for rows in batches)
    return _feature_stats(network, images, batches, progress)[0]


def measure_rfid(
    network: inception.Inception,
    tokenizer: TokenizerPipeline,
    data: DataConfig,
    true: fid.FeatureStats,
    count: int = 256,
    *,
    progress: ProgressFn | None = None,
) -> Metrics:
    """Measure the FID of reconstructions of the first `count` rows of the evaluation split (`rfid_of`)."""

    def reconstruct(images: np.ndarray, rows: range) -> np.ndarray:
        return tokenizer.reconstruct(images, batch_size=EVAL_ROWS)

    return rfid_of(network, reconstruct, data, tokenizer.image_size, true, count, progress=progress)


def rfid_of(
    network: inception.Inception,
    reconstruct: Callable[[np.ndarray, range], np.ndarray],
    data: DataConfig,
    image_size: int,
    true: fid.FeatureStats,
    count: int = 256,
    *,
    progress: ProgressFn | None = None,
) -> Metrics:
    """Measure the FID of reconstructed images against true ones.

    Args:
        network: the Inception network of the features.
        reconstruct: takes images, uint8 (B, H, W, 3), and their rows; returns their reconstructions.
        data: source and preprocessing.
        image_size: side of the images.
        true: statistics of true images.
        count: the first rows of the evaluation split.
        progress: called with the rows done and all rows.

    Returns:
        `rfid`, and the images on each side, `rfid_count` and `rfid_reference_count`.

    Raises:
        ValueError: fewer than two rows.
    """
    source = open_source(data.source, "eval", languages=())
    batches = _batches(min(count, len(source)))
    images = (
        reconstruct(eval_batch(data, source, rows, image_size=image_size)["image"], rows) for rows in batches
    )
    stats, _ = _feature_stats(network, images, batches, progress)
    return {"rfid": fid.fid(stats, true), "rfid_count": stats.count, "rfid_reference_count": true.count}


def measure_fid(
    network: inception.Inception,
    model: Pipeline,
    true: fid.FeatureStats,
    count: int = 256,
    sampling: AnySamplingConfig | None = None,
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> Metrics:
    """Measure the FID of generated images against true ones.

    An image is generated for each of the first `count` rows of the evaluation split, from its caption and label as far
    as the model reads them, row i with seed `seed + i`.

    Returns:
        `fid`, and the images on each side, `fid_count` and `fid_reference_count`. Where the weights have the
        classifier, and for ten images or more, also `inception_score` and its standard deviation over ten parts.

    Raises:
        ValueError: fewer than two rows.
    """
    data = model.run.config.data
    source = open_source(data.source, "eval", languages=model.languages)
    batches = _batches(min(count, len(source)))

    def sample(rows: range) -> np.ndarray:
        batch = eval_batch(
            data, source, rows, image_size=model.image_size, with_labels=model.is_class_conditional
        )
        seeds = [seed + i for i in rows]
        return sample_for_captions(model, batch["caption"], seeds, sampling, labels=batch.get("label"))

    stats, sums = _feature_stats(network, map(sample, batches), batches, progress)
    metrics = {"fid": fid.fid(stats, true), "fid_count": stats.count, "fid_reference_count": true.count}
    if sums is not None and stats.count >= inception_score.NUM_SPLITS:
        names = ("inception_score", "inception_score_std")
        metrics |= dict(zip(names, inception_score.inception_score(sums), strict=True))
    return metrics


def _feature_stats(
    network: inception.Inception,
    images: Iterable[np.ndarray],
    batches: list[range],
    progress: ProgressFn | None,
) -> tuple[fid.FeatureStats, inception_score.ScoreSums | None]:
    """Statistics of images, uint8 (B, H, W, 3) for each of `batches`, and sums for the Inception score where the
    network has the classifier; holds one batch at a time."""
    stats, sums, total = None, None, batches[-1].stop
    if network.classifier is not None:
        sums = inception_score.init_score_sums(network.classifier.shape[1])
    for rows, batch in zip(batches, images, strict=True):
        features = inception.inception_features(network, batch)
        part = fid.feature_stats(features)
        stats = part if stats is None else fid.merge_feature_stats(stats, part)
        if sums is not None:
            logits = inception.inception_logits(network, features)
            sums = inception_score.update_score_sums(sums, logits, rows.start, total)
        if progress:
            progress(rows.stop, total)
    assert stats is not None  # there is at least one batch
    return stats, sums


# --- accuracy on procedural scenes --------------------------------------------------------------------------


def sample_for_captions(
    model: Pipeline,
    captions: Sequence[str],
    seeds: Sequence[int],
    sampling: AnySamplingConfig | None = None,
    *,
    labels: Sequence[int] | np.ndarray | None = None,
    progress: ProgressFn | None = None,
) -> np.ndarray:
    """Generate an image for each caption, uint8 (R, H, W, 3).

    A model that reads no captions generates without them, and one that reads no labels without those. Label -1 is none.
    """
    requests = [
        ImageRequest(
            caption if model.languages else "",
            seed,
            label=int(labels[i]) if labels is not None and model.is_class_conditional else None,
        )
        for i, (caption, seed) in enumerate(zip(captions, seeds, strict=True))
    ]
    images = model.sample(requests, sampling, batch_size=EVAL_ROWS, progress=progress)
    return np.stack([generated.image for generated in images])


def scene_kinds(data: DataConfig, image_size: int) -> tuple[SceneKind, ...]:
    """Return the kinds of captions that can be verified for a model of this source; () where none can.

    The verifier reads procedural scenes of 32 to 256 pixels with one or two objects.
    """
    source = data.source
    if not isinstance(source, ScenesSource) or not 32 <= image_size <= 256:
        return ()
    one, two = source.min_objects == 1, source.min_objects <= 2 <= source.max_objects
    possible: dict[SceneKind, bool] = {"one_object": one, "two_objects": two, "held_out": one}
    return tuple(kind for kind, holds in possible.items() if holds)


def unseen_captions(
    data: DataConfig, kind: SceneKind, count: int
) -> tuple[tuple[Caption, generator.Scene], ...]:
    """Return `count` captions of one of `scene_kinds` that training does not show, each with a scene of it.

    Raises:
        ValueError: the source is not of procedural scenes.
    """
    source = data.source
    if not isinstance(source, ScenesSource):
        raise ValueError(f"Expected a source of procedural scenes, got {type(source).__name__}.")
    return generator.generate_evaluation_set(
        kind,
        count,
        seed=source.seed,
        languages=data.languages,
        max_objects=min(2, source.max_objects),
        sizes=source.sizes,
        fills=source.fills,
        backgrounds=source.backgrounds,
    )


def sample_and_verify(
    model: Pipeline,
    kind: SceneKind,
    count: int = 256,
    sampling: AnySamplingConfig | None = None,
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> list[VerifiedImage]:
    """Generate and verify an image for each of `count` unseen captions of a kind, row i with seed `seed + i`."""
    captions = [caption for caption, _ in unseen_captions(model.run.config.data, kind, count)]
    texts, seeds = [caption.text for caption in captions], range(seed, seed + count)
    return verify_images(captions, sample_for_captions(model, texts, seeds, sampling, progress=progress))


def verify_images(captions: Sequence[Caption], images: np.ndarray) -> list[VerifiedImage]:
    """Verify images, uint8 (R, H, W, 3), against their captions."""
    return [
        VerifiedImage(caption, image, verifier.verify_scene(image, caption.facts))
        for caption, image in zip(captions, images, strict=True)
    ]


def accuracy_metrics(kind: str, images: list[VerifiedImage]) -> Metrics:
    """Return `accuracy_KIND`, the fraction of images that the verifier accepts, and with several languages also
    `accuracy_KIND_LANGUAGE` of each."""
    languages = sorted({image.caption.language for image in images})
    metrics = {f"accuracy_{kind}": _accuracy(images)}
    if len(languages) > 1:
        for name in languages:
            metrics[f"accuracy_{kind}_{name}"] = _accuracy([i for i in images if i.caption.language == name])
    return metrics


def caption_accuracy(
    model: Pipeline,
    count: int = 256,
    sampling: AnySamplingConfig | None = None,
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> Metrics:
    """Measure the fraction of `count` captions of each kind whose generated image the verifier accepts.

    Returns:
        `accuracy_one_object`, `accuracy_two_objects`, `accuracy_held_out` as far as `scene_kinds` has them, and the
        same by language; {} for a source that is not of procedural scenes.
    """
    metrics: Metrics = {}
    for kind in scene_kinds(model.run.config.data, model.image_size):
        images = sample_and_verify(model, kind, count, sampling, seed=seed, progress=progress)
        metrics |= accuracy_metrics(kind, images)
    return metrics


def reconstruction_accuracy(tokenizer: TokenizerPipeline, data: DataConfig, count: int = 256) -> Metrics:
    """Measure the accuracy on reconstructions of true images of the same captions, the upper bound of generation.

    Returns:
        `accuracy_reconstruction`, the fraction accepted of `count` captions of each kind together, and
        `accuracy_reconstruction_KIND`; {} for a source that is not of procedural scenes.
    """
    metrics: Metrics = {}
    for kind in scene_kinds(data, tokenizer.image_size):
        pairs = unseen_captions(data, kind, count)
        images = np.stack([generator.render_scene(scene, tokenizer.image_size) for _, scene in pairs])
        verified = verify_images(
            [caption for caption, _ in pairs], tokenizer.reconstruct(images, batch_size=EVAL_ROWS)
        )
        metrics[f"accuracy_reconstruction_{kind}"] = _accuracy(verified)
    return {"accuracy_reconstruction": float(np.mean(list(metrics.values()))), **metrics} if metrics else {}


def _accuracy(images: list[VerifiedImage]) -> float:
    return float(np.mean([image.verdict.right for image in images]))


def _batches(count: int) -> list[range]:
    if count < 1:
        raise ValueError(f"Expected count of at least 1, got {count}.")
    return [range(start, min(start + EVAL_ROWS, count)) for start in range(0, count, EVAL_ROWS)]


def format_metrics(metrics: dict[str, Any]) -> str:
    """Return a table of metrics, one per line, floats with four digits."""
    width = max((len(name) for name in metrics), default=0)
    return "\n".join(
        f"{name:<{width}}  {value:.4g}" if isinstance(value, float) else f"{name:<{width}}  {value}"
        for name, value in metrics.items()
    )
