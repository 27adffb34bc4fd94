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

from dalle_jax import autoregressive
from dalle_jax.config import DataConfig, ScenesSource, TransformerConfig
from dalle_jax.data import scenes
from dalle_jax.data.images import to_bytes, to_floats
from dalle_jax.data.pipeline import eval_batch
from dalle_jax.data.scene_captions import Caption
from dalle_jax.data.sources import open_source
from dalle_jax.evaluate import fid, inception, inception_score, verifier
from dalle_jax.inference import (
    Progress,
    Sampling,
    TextToImage,
    Tokenizer,
    decode_codes,
    draw_codes,
    encode_images,
)  # fmt: skip
from dalle_jax.inference.diffusion import Denoising, DiffusionModel
from dalle_jax.inference.diffusion import draw as draw_diffusion
from dalle_jax.tokenizer import losses

Figures = dict[str, float]
Params = dict[str, Any]
Model = TextToImage | DiffusionModel  # what draws pictures

BATCH = 64  # rows measured at once


class Drawn(NamedTuple):
    """One sampled picture with what was asked for and what the verifier says. image: uint8 (H, W, 3)."""

    caption: Caption
    image: np.ndarray
    verdict: verifier.Verdict


def measure_tokenizer(tokenizer: Tokenizer, data: DataConfig, count: int = 256) -> Figures:
    """Reconstruction of the first `count` rows of the evaluation split from their codes.

    Returns `psnr` (dB, mean over pictures), `mse` (of values in [0, 1]), `codebook_use` (share of the
    codebook that these rows use) and `codebook_perplexity` (1 to vocab).
    """
    cfg = tokenizer.config
    source = open_source(data.source, "eval", languages=())
    psnr, mse, codes = [], [], []
    for rows in _batches(min(count, len(source))):
        images = eval_batch(data, source, rows, image_size=cfg.image_size)["image"]
        codes.append(encode_images(tokenizer, images, batch=BATCH))
        want, got = to_floats(images), decode_codes(tokenizer, codes[-1], batch=BATCH)
        psnr.append(np.asarray(losses.psnr(want, got)))
        mse.append(np.square(want - got).mean(axis=(1, 2, 3)))
    use, perplexity = losses.codebook_use(jnp.asarray(np.concatenate(codes)), cfg.vocab)
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


def measure_likelihood(model: TextToImage, count: int = 256) -> Figures:
    """Cross-entropy of the first `count` rows of the evaluation split, nats per token, no caption dropped.

    Returns `loss` (weighted as in training), `image_loss`, `text_loss`.
    """
    cfg = dataclasses.replace(model.config, null_rate=0.0)
    data, tokenizer = model.run.config.data, model.tokenizer
    source = open_source(data.source, "eval", languages=data.languages)
    options = {"text": model.text, "text_vocab": cfg.text_vocab, "text_len": cfg.text_len}
    found, weights = [], []
    for rows in _batches(min(count, len(source))):
        batch = eval_batch(data, source, rows, image_size=tokenizer.config.image_size, **options)
        codes = encode_images(tokenizer, batch["image"], batch=BATCH)
        found.append(
            jax.device_get(_loss(cfg, model.run.params, jnp.asarray(batch["text"]), jnp.asarray(codes)))
        )
        weights.append(len(codes))
    names = ("loss", "image_loss", "text_loss")
    return {name: float(np.average([f[name] for f in found], weights=weights)) for name in names}


# --- distance of two sets of pictures -----------------------------------------------------------------------


def fid_settings(network: inception.Inception, image_size: int) -> fid.Settings:
    """What reference statistics for pictures of this side have to agree with."""
    return fid.Settings(network.fingerprint, inception.PREPROCESSING, image_size)


def true_moments(
    network: inception.Inception,
    data: DataConfig,
    image_size: int,
    count: int = 256,
    *,
    languages: Sequence[str] = (),
    progress: Progress | None = None,
) -> fid.Moments:
    """Statistics of the first `count` pictures of the evaluation split, at the side that the model draws.

    languages: of the captions that a row must have one of; none asked, every row with a picture counts.
    """
    source = open_source(data.source, "eval", languages=languages)
    batches = _batches(min(count, len(source)))
    pictures = (eval_batch(data, source, rows, image_size=image_size)["image"] for rows in batches)
    return _moments(network, pictures, batches, progress)[0]


def measure_rfid(
    network: inception.Inception,
    tokenizer: Tokenizer,
    data: DataConfig,
    true: fid.Moments,
    count: int = 256,
    *,
    progress: Progress | None = None,
) -> Figures:
    """FID of reconstructions of the first `count` rows of the evaluation split against true pictures.

    Returns `rfid`, and the pictures on each side, `rfid_count` and `rfid_reference_count`. Raises ValueError
    for fewer than two rows.
    """

    def again(pictures: np.ndarray, rows: range) -> np.ndarray:
        return to_bytes(decode_codes(tokenizer, encode_images(tokenizer, pictures, batch=BATCH), batch=BATCH))

    return rfid_of(network, again, data, tokenizer.config.image_size, true, count, progress=progress)


def rfid_of(
    network: inception.Inception,
    again: Callable[[np.ndarray, range], np.ndarray],
    data: DataConfig,
    size: int,
    true: fid.Moments,
    count: int = 256,
    *,
    progress: Progress | None = None,
) -> Figures:
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
    model: Model,
    true: fid.Moments,
    count: int = 256,
    sampling: Sampling | Denoising = Sampling(),  # noqa: B008, frozen
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Figures:
    """FID of a picture drawn for each of the first `count` rows of the evaluation split, with its caption and label
    as far as the model reads them, row i with seed `seed + i`, against true pictures.

    Returns `fid`, and the pictures on each side, `fid_count` and `fid_reference_count`; where the weights hold the
    classifier and there are ten pictures or more, also `inception_score` and its standard deviation over ten parts.
    Raises ValueError for fewer than two rows.
    """
    data, size = model.run.config.data, image_size(model)
    source = open_source(data.source, "eval", languages=languages(model))
    batches = _batches(min(count, len(source)))

    def draw(rows: range) -> np.ndarray:
        asked = eval_batch(data, source, rows, image_size=size, labels=reads_labels(model))
        labels = asked.get("label")
        return draw_pictures(model, asked["caption"], [seed + i for i in rows], sampling, labels=labels)

    made, scored = _moments(network, map(draw, batches), batches, progress)
    found = {"fid": fid.fid(made, true), "fid_count": made.count, "fid_reference_count": true.count}
    if scored is not None and made.count >= inception_score.PARTS:
        names = ("inception_score", "inception_score_std")
        found |= dict(zip(names, inception_score.score(scored), strict=True))
    return found


def _moments(
    network: inception.Inception,
    pictures: Iterable[np.ndarray],
    batches: list[range],
    progress: Progress | None,
) -> tuple[fid.Moments, inception_score.Sums | None]:
    """Statistics of pictures, uint8 (rows, H, W, 3) for each of `batches`, and their classes where the network names
    them; no more than one batch is held."""
    found, scored, total = None, None, batches[-1].stop
    if network.classifier is not None:
        scored = inception_score.empty(network.classifier.shape[1])
    for rows, images in zip(batches, pictures, strict=True):
        features = inception.features(network, images)
        part = fid.moments(features)
        found = part if found is None else fid.merge(found, part)
        if scored is not None:
            logits = inception.class_scores(network, features)
            scored = inception_score.add(scored, logits, rows.start, total)
        if progress:
            progress(rows.stop, total)
    return found, scored


# --- models that draw ---------------------------------------------------------------------------------------


def image_size(model: Model) -> int:
    """Side of the pictures that a model draws, pixels."""
    return model.config.image_size if isinstance(model, DiffusionModel) else model.tokenizer.config.image_size


def languages(model: Model) -> tuple[str, ...]:
    """Of the captions that a model was trained on; () for one that reads none."""
    reads = not isinstance(model, DiffusionModel) or model.text is not None
    return model.run.config.data.languages if reads else ()


def reads_labels(model: Model) -> bool:
    return isinstance(model, DiffusionModel) and model.config.classes > 0


def draw_pictures(
    model: Model,
    captions: Sequence[str],
    seeds: Sequence[int],
    how: Sampling | Denoising,
    *,
    labels: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """One picture for each caption, uint8 (R, H, W, 3); a diffusion model that reads no captions draws without."""
    if isinstance(model, DiffusionModel):
        captions = captions if model.text is not None else None
        return draw_diffusion(
            model, seeds, how, captions=captions, labels=labels, batch=BATCH, progress=progress
        ).images
    codes = draw_codes(model, captions, seeds, how, batch=BATCH, progress=progress)
    return to_bytes(decode_codes(model.tokenizer, codes, batch=BATCH))


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


def unseen_captions(data: DataConfig, kind: str, count: int) -> tuple[tuple[Caption, scenes.Scene], ...]:
    """`count` captions of one of `scene_kinds`, none seen in training, each with a scene it is true of."""
    return scenes.evaluation_set(
        kind,
        count,
        seed=data.source.seed,
        languages=data.languages,
        max_objects=min(2, data.source.max_objects),
        sizes=data.source.sizes,
        fills=data.source.fills,
        backgrounds=data.source.backgrounds,
    )


def draw_verified(
    model: Model,
    kind: str,
    count: int = 256,
    sampling: Sampling | Denoising = Sampling(),  # noqa: B008, frozen
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Drawn]:
    """A picture for each of `count` unseen captions of a kind, row i with seed `seed + i`; its verdict."""
    captions = [caption for caption, _ in unseen_captions(model.run.config.data, kind, count)]
    texts, seeds = [c.text for c in captions], range(seed, seed + count)
    return verified(captions, draw_pictures(model, texts, seeds, sampling, progress=progress))


def verified(captions: Sequence[Caption], images: np.ndarray) -> list[Drawn]:
    """Pictures, uint8 (R, H, W, 3), with what was asked for and the verdicts."""
    return [
        Drawn(caption, image, verifier.check(image, caption.facts))
        for caption, image in zip(captions, images, strict=True)
    ]


def right_shares(kind: str, drawn: list[Drawn]) -> Figures:
    """`right_KIND`: share that the verifier accepts; with several languages `right_KIND_en` and so on too."""
    languages = sorted({d.caption.language for d in drawn})
    figures = {f"right_{kind}": _share(drawn)}
    if len(languages) > 1:
        for name in languages:
            figures[f"right_{kind}_{name}"] = _share([d for d in drawn if d.caption.language == name])
    return figures


def measure_faithfulness(
    model: Model,
    count: int = 256,
    sampling: Sampling | Denoising = Sampling(),  # noqa: B008, frozen
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Figures:
    """Share of `count` captions of each kind whose sampled picture the verifier accepts.

    Returns `right_one_object`, `right_two_objects`, `right_held_out` as far as `scene_kinds` allows, and the
    same per language; {} for a source that is not of procedural scenes.
    """
    figures: Figures = {}
    for kind in scene_kinds(model.run.config.data, image_size(model)):
        figures |= right_shares(
            kind, draw_verified(model, kind, count, sampling, seed=seed, progress=progress)
        )
    return figures


def measure_ceiling(tokenizer: Tokenizer, data: DataConfig, count: int = 256) -> Figures:
    """What the tokenizer alone allows: the verifier on reconstructions of true pictures of the same captions.

    Returns `right_reconstruction`, the share accepted of `count` captions of each kind together, and
    `right_reconstruction_KIND`; {} for a source that is not of procedural scenes.
    """
    size = tokenizer.config.image_size
    figures: Figures = {}
    for kind in scene_kinds(data, size):
        pairs = unseen_captions(data, kind, count)
        images = np.stack([scenes.render(scene, size) for _, scene in pairs])
        codes = encode_images(tokenizer, images, batch=BATCH)
        again = to_bytes(decode_codes(tokenizer, codes, batch=BATCH))
        right = [verifier.check(i, caption.facts).right for (caption, _), i in zip(pairs, again, strict=True)]
        figures[f"right_reconstruction_{kind}"] = float(np.mean(right))
    return {"right_reconstruction": float(np.mean(list(figures.values()))), **figures} if figures else {}


def _share(drawn: list[Drawn]) -> float:
    return float(np.mean([d.verdict.right for d in drawn]))


def _batches(count: int) -> list[range]:
    if count < 1:
        raise ValueError(f"count is {count}; want at least 1 row")
    return [range(a, min(a + BATCH, count)) for a in range(0, count, BATCH)]


def describe(figures: dict[str, Any]) -> str:
    """A table of figures for people: one per line, shares as they are, four digits."""
    width = max((len(name) for name in figures), default=0)
    return "\n".join(
        f"{name:<{width}}  {value:.4g}" if isinstance(value, float) else f"{name:<{width}}  {value}"
        for name, value in figures.items()
    )
