"""What a trained model is worth, in figures: reconstruction, likelihood, captions verified in the picture.

Every measure is a function that returns a flat dict of figures. Rows are those of the evaluation split, or
captions of scenes drawn for the purpose, of kinds seen in training or held out of it; a larger `count` extends the
same rows, so figures stay comparable.
R rows, N codes of a picture, H W picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import DataConfig, ScenesSource, TransformerConfig
from dalle_jax.data.images import to_float, to_uint8
from dalle_jax.data.loader.pipeline import eval_batch
from dalle_jax.data.scenes import generator
from dalle_jax.data.scenes.captions import Caption
from dalle_jax.data.sources import open_source
from dalle_jax.evaluate import fid, inception, inception_score
from dalle_jax.evaluate.scenes import verifier
from dalle_jax.models import autoregressive, tokenizer_losses
from dalle_jax.pipelines import (
    ImageTokenizer,
    ProgressFn,
    SamplingConfig,
    TextToImage,
    decode_codes,
    encode_images,
    sample_code_rows,
)
from dalle_jax.pipelines.diffusion import DiffusionModel, DiffusionSamplingConfig
from dalle_jax.pipelines.diffusion import denoise_images as draw_diffusion
from dalle_jax.typing import Params

Metrics = dict[str, float]
TextToImageModel = TextToImage | DiffusionModel  # what draws pictures

EVAL_ROWS = 64  # rows measured at once


class VerifiedImage(NamedTuple):
    """One sampled picture with what was asked for and what the verifier says. image: uint8 (H, W, 3)."""

    caption: Caption
    image: np.ndarray
    verdict: verifier.Verdict


def measure_tokenizer(tokenizer: ImageTokenizer, data: DataConfig, count: int = 256) -> Metrics:
    """Reconstruction of the first `count` rows of the evaluation split from their codes.

    Returns `psnr` (dB, mean over pictures), `mse` (of values in [0, 1]), `codebook_use` (share of the
    codebook that these rows use) and `codebook_perplexity` (1 to vocab).
    """
    cfg = tokenizer.config
    source = open_source(data.source, "eval", languages=())
    psnr, mse, codes = [], [], []
    for rows in _batches(min(count, len(source))):
        images = eval_batch(data, source, rows, image_size=cfg.image_size)["image"]
        codes.append(encode_images(tokenizer, images, batch=EVAL_ROWS))
        want, got = to_float(images), decode_codes(tokenizer, codes[-1], batch=EVAL_ROWS)
        psnr.append(np.asarray(tokenizer_losses.psnr(want, got)))
        mse.append(np.square(want - got).mean(axis=(1, 2, 3)))
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


def measure_nll(model: TextToImage, count: int = 256) -> Metrics:
    """Cross-entropy of the first `count` rows of the evaluation split, nats per token, no caption dropped.

    Returns `loss` (weighted as in training), `image_loss`, `text_loss`.
    """
    cfg = dataclasses.replace(model.config, cond_drop_prob=0.0)
    data, tokenizer = model.run.config.data, model.tokenizer
    source = open_source(data.source, "eval", languages=data.languages)
    options = {"text": model.text, "text_vocab": cfg.text_vocab, "text_len": cfg.text_len}
    found, weights = [], []
    for rows in _batches(min(count, len(source))):
        batch = eval_batch(data, source, rows, image_size=tokenizer.config.image_size, **options)
        codes = encode_images(tokenizer, batch["image"], batch=EVAL_ROWS)
        found.append(
            jax.device_get(_loss(cfg, model.run.params, jnp.asarray(batch["text"]), jnp.asarray(codes)))
        )
        weights.append(len(codes))
    names = ("loss", "image_loss", "text_loss")
    return {name: float(np.average([f[name] for f in found], weights=weights)) for name in names}


# --- distance of two sets of pictures -----------------------------------------------------------------------


def fid_settings(network: inception.Inception, image_size: int) -> fid.FIDSettings:
    """What reference statistics for pictures of this side have to agree with."""
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
    """Statistics of the first `count` pictures of the evaluation split, at the side that the model draws.

    languages: of the captions that a row must have one of; none asked, every row with a picture counts.
    """
    source = open_source(data.source, "eval", languages=languages)
    batches = _batches(min(count, len(source)))
    pictures = (eval_batch(data, source, rows, image_size=image_size)["image"] for rows in batches)
    return _moments(network, pictures, batches, progress)[0]


def measure_rfid(
    network: inception.Inception,
    tokenizer: ImageTokenizer,
    data: DataConfig,
    true: fid.FeatureStats,
    count: int = 256,
    *,
    progress: ProgressFn | None = None,
) -> Metrics:
    """FID of reconstructions of the first `count` rows of the evaluation split against true pictures.

    Returns `rfid`, and the pictures on each side, `rfid_count` and `rfid_reference_count`. Raises ValueError
    for fewer than two rows.
    """

    def again(pictures: np.ndarray, rows: range) -> np.ndarray:
        return to_uint8(
            decode_codes(tokenizer, encode_images(tokenizer, pictures, batch=EVAL_ROWS), batch=EVAL_ROWS)
        )

    return rfid_of(network, again, data, tokenizer.config.image_size, true, count, progress=progress)


def rfid_of(
    network: inception.Inception,
    again: Callable[[np.ndarray, range], np.ndarray],
    data: DataConfig,
    size: int,
    true: fid.FeatureStats,
    count: int = 256,
    *,
    progress: ProgressFn | None = None,
) -> Metrics:
    """What `measure_rfid` returns, of any way to make pictures again: `again` takes uint8 (B, size, size, 3) and
    which rows they are, and returns the like."""
    source = open_source(data.source, "eval", languages=())
    batches = _batches(min(count, len(source)))
    made = (again(eval_batch(data, source, rows, image_size=size)["image"], rows) for rows in batches)
    moments, _ = _moments(network, made, batches, progress)
    return {
        "rfid": fid.fid(moments, true), "rfid_count": moments.count, "rfid_reference_count": true.count
    }  # fmt: skip


def measure_fid(
    network: inception.Inception,
    model: TextToImageModel,
    true: fid.FeatureStats,
    count: int = 256,
    sampling: SamplingConfig | DiffusionSamplingConfig = SamplingConfig(),  # noqa: B008, frozen
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> Metrics:
    """FID of a picture drawn for each of the first `count` rows of the evaluation split, with its caption and label
    as far as the model reads them, row i with seed `seed + i`, against true pictures.

    Returns `fid`, and the pictures on each side, `fid_count` and `fid_reference_count`; where the weights hold the
    classifier and there are ten pictures or more, also `inception_score` and its standard deviation over ten parts.
    Raises ValueError for fewer than two rows.
    """
    data, size = model.run.config.data, image_size(model)
    source = open_source(data.source, "eval", languages=model_languages(model))
    batches = _batches(min(count, len(source)))

    def draw(rows: range) -> np.ndarray:
        asked = eval_batch(data, source, rows, image_size=size, with_labels=is_class_conditional(model))
        labels = asked.get("label")
        return sample_for_captions(model, asked["caption"], [seed + i for i in rows], sampling, labels=labels)

    made, scored = _moments(network, map(draw, batches), batches, progress)
    found = {"fid": fid.fid(made, true), "fid_count": made.count, "fid_reference_count": true.count}
    if scored is not None and made.count >= inception_score.NUM_SPLITS:
        names = ("inception_score", "inception_score_std")
        found |= dict(zip(names, inception_score.inception_score(scored), strict=True))
    return found


def _moments(
    network: inception.Inception,
    pictures: Iterable[np.ndarray],
    batches: list[range],
    progress: ProgressFn | None,
) -> tuple[fid.FeatureStats, inception_score.ScoreSums | None]:
    """Statistics of pictures, uint8 (rows, H, W, 3) for each of `batches`, and their classes where the network names
    them; no more than one batch is held."""
    found, scored, total = None, None, batches[-1].stop
    if network.classifier is not None:
        scored = inception_score.init_sums(network.classifier.shape[1])
    for rows, images in zip(batches, pictures, strict=True):
        features = inception.inception_features(network, images)
        part = fid.feature_stats(features)
        found = part if found is None else fid.merge_stats(found, part)
        if scored is not None:
            logits = inception.class_scores(network, features)
            scored = inception_score.add_logits(scored, logits, rows.start, total)
        if progress:
            progress(rows.stop, total)
    return found, scored


# --- models that draw ---------------------------------------------------------------------------------------


def image_size(model: TextToImageModel) -> int:
    """Side of the pictures that a model draws, pixels."""
    return model.config.image_size if isinstance(model, DiffusionModel) else model.tokenizer.config.image_size


def model_languages(model: TextToImageModel) -> tuple[str, ...]:
    """Of the captions that a model was trained on; () for one that reads none."""
    reads = not isinstance(model, DiffusionModel) or model.text is not None
    return model.run.config.data.languages if reads else ()


def is_class_conditional(model: TextToImageModel) -> bool:
    return isinstance(model, DiffusionModel) and model.config.num_classes > 0


def sample_for_captions(
    model: TextToImageModel,
    captions: Sequence[str],
    seeds: Sequence[int],
    how: SamplingConfig | DiffusionSamplingConfig,
    *,
    labels: Sequence[int] | None = None,
    progress: ProgressFn | None = None,
) -> np.ndarray:
    """One picture for each caption, uint8 (R, H, W, 3); a diffusion model that reads no captions draws without."""
    if isinstance(model, DiffusionModel):
        captions = captions if model.text is not None else None
        return draw_diffusion(
            model, seeds, how, captions=captions, labels=labels, batch=EVAL_ROWS, progress=progress
        ).images
    codes = sample_code_rows(model, captions, seeds, how, batch=EVAL_ROWS, progress=progress)
    return to_uint8(decode_codes(model.tokenizer, codes, batch=EVAL_ROWS))


# --- faithfulness on procedural scenes ----------------------------------------------------------------------


def scene_kinds(data: DataConfig, image_size: int) -> tuple[str, ...]:
    """Kinds of captions on which a model of this source can be verified; () where none can.

    The verifier reads procedural scenes of 32 to 256 pixels; one or two objects are asked for, as far as the
    source shows them.
    """
    source = data.source
    if not isinstance(source, ScenesSource) or not 32 <= image_size <= 256:
        return ()
    one, two = source.min_objects == 1, source.min_objects <= 2 <= source.max_objects
    return (*(("one_object",) if one else ()), *(("two_objects",) if two else ()),
            *(("held_out",) if one else ()))  # fmt: skip


def unseen_captions(data: DataConfig, kind: str, count: int) -> tuple[tuple[Caption, generator.Scene], ...]:
    """`count` captions of one of `scene_kinds`, none seen in training, each with a scene it is true of."""
    return generator.evaluation_set(
        kind,
        count,
        seed=data.source.seed,
        languages=data.languages,
        max_objects=min(2, data.source.max_objects),
        sizes=data.source.sizes,
        fills=data.source.fills,
        backgrounds=data.source.backgrounds,
    )


def sample_and_verify(
    model: TextToImageModel,
    kind: str,
    count: int = 256,
    sampling: SamplingConfig | DiffusionSamplingConfig = SamplingConfig(),  # noqa: B008, frozen
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> list[VerifiedImage]:
    """A picture for each of `count` unseen captions of a kind, row i with seed `seed + i`; its verdict."""
    captions = [caption for caption, _ in unseen_captions(model.run.config.data, kind, count)]
    texts, seeds = [c.text for c in captions], range(seed, seed + count)
    return verify_images(captions, sample_for_captions(model, texts, seeds, sampling, progress=progress))


def verify_images(captions: Sequence[Caption], images: np.ndarray) -> list[VerifiedImage]:
    """Pictures, uint8 (R, H, W, 3), with what was asked for and the verdicts."""
    return [
        VerifiedImage(caption, image, verifier.verify(image, caption.facts))
        for caption, image in zip(captions, images, strict=True)
    ]


def accuracy_by_kind(kind: str, drawn: list[VerifiedImage]) -> Metrics:
    """`accuracy_KIND`: share that the verifier accepts; with several languages `accuracy_KIND_en` and so on too."""
    languages = sorted({d.caption.language for d in drawn})
    figures = {f"accuracy_{kind}": _share(drawn)}
    if len(languages) > 1:
        for name in languages:
            figures[f"accuracy_{kind}_{name}"] = _share([d for d in drawn if d.caption.language == name])
    return figures


def caption_accuracy(
    model: TextToImageModel,
    count: int = 256,
    sampling: SamplingConfig | DiffusionSamplingConfig = SamplingConfig(),  # noqa: B008, frozen
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> Metrics:
    """Share of `count` captions of each kind whose sampled picture the verifier accepts.

    Returns `accuracy_one_object`, `accuracy_two_objects`, `accuracy_held_out` as far as `scene_kinds` allows, and the
    same per language; {} for a source that is not of procedural scenes.
    """
    figures: Metrics = {}
    for kind in scene_kinds(model.run.config.data, image_size(model)):
        figures |= accuracy_by_kind(
            kind, sample_and_verify(model, kind, count, sampling, seed=seed, progress=progress)
        )
    return figures


def reconstruction_accuracy(tokenizer: ImageTokenizer, data: DataConfig, count: int = 256) -> Metrics:
    """What the tokenizer alone allows: the verifier on reconstructions of true pictures of the same captions.

    Returns `accuracy_reconstruction`, the share accepted of `count` captions of each kind together, and
    `accuracy_reconstruction_KIND`; {} for a source that is not of procedural scenes.
    """
    size = tokenizer.config.image_size
    figures: Metrics = {}
    for kind in scene_kinds(data, size):
        pairs = unseen_captions(data, kind, count)
        images = np.stack([generator.render(scene, size) for _, scene in pairs])
        codes = encode_images(tokenizer, images, batch=EVAL_ROWS)
        again = to_uint8(decode_codes(tokenizer, codes, batch=EVAL_ROWS))
        right = [
            verifier.verify(i, caption.facts).right for (caption, _), i in zip(pairs, again, strict=True)
        ]
        figures[f"accuracy_reconstruction_{kind}"] = float(np.mean(right))
    return {"accuracy_reconstruction": float(np.mean(list(figures.values()))), **figures} if figures else {}


def _share(drawn: list[VerifiedImage]) -> float:
    return float(np.mean([d.verdict.right for d in drawn]))


def _batches(count: int) -> list[range]:
    if count < 1:
        raise ValueError(f"count is {count}; want at least 1 row")
    return [range(a, min(a + EVAL_ROWS, count)) for a in range(0, count, EVAL_ROWS)]


def format_metrics(figures: dict[str, Any]) -> str:
    """A table of figures for people: one per line, shares as they are, four digits."""
    width = max((len(name) for name in figures), default=0)
    return "\n".join(
        f"{name:<{width}}  {value:.4g}" if isinstance(value, float) else f"{name:<{width}}  {value}"
        for name, value in figures.items()
    )
