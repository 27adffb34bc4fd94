"""What a diffusion model is worth: its error by noise level, its likelihood, and its pixels beside a tokenizer's.

Functions return flat dicts of figures, of the rows and captions that measures.py measures. R rows, N codes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import DiffusionConfig
from dalle_jax.data.images import to_float, to_uint8
from dalle_jax.data.loader.pipeline import eval_batch
from dalle_jax.data.scenes import generator
from dalle_jax.data.sources import open_source
from dalle_jax.evaluate import fid, inception
from dalle_jax.evaluate.metrics import (
    EVAL_ROWS,
    Metrics,
    accuracy_by_kind,
    is_class_conditional,
    measure_rfid,
    model_languages,
    rfid_of,
    scene_kinds,
    unseen_captions,
    verify_images,
)
from dalle_jax.evaluate.scenes import verifier
from dalle_jax.models import tokenizer_losses
from dalle_jax.models.diffusion import loss, unet
from dalle_jax.pipelines import (
    ProgressFn,
    SamplingConfig,
    TextToImage,
    decode_codes,
    encode_images,
    sample_code_rows,
)
from dalle_jax.pipelines.diffusion import (
    DiffusionModel,
    DiffusionSamplingConfig,
    check_decoder,
    denoise_images,
    image_bits_per_dim,
    tokenize_diffusion,
)


@partial(jax.jit, static_argnums=0)
def _loss(cfg: DiffusionConfig, params: Any, images, given: unet.Conditions, key) -> dict[str, jax.Array]:
    value, metrics = loss.loss(cfg, params, images, given, key, train=False)
    return {"loss": value, **metrics}


def measure_denoising_error(model: DiffusionModel, count: int = 256) -> Metrics:
    """Training error of the first `count` rows of the evaluation split, nothing dropped, one time for each row.

    Returns `loss`, `eps_mse` and `band_1` (least noise) to `band_4`.
    """
    found, weights = [], []
    for first in range(0, count, EVAL_ROWS):
        rows = _rows(model, range(first, min(first + EVAL_ROWS, count)))
        images, label = rows["image"], rows.get("label")
        given = unet.Conditions(
            text=None if model.text is None else jnp.asarray(tokenize_diffusion(model, rows["caption"])),
            label=None if label is None else jnp.where(label < 0, model.config.num_classes, label),
            codes=None if model.tokenizer is None else jnp.asarray(encode_images(model.tokenizer, images)),
        )
        key = jax.random.fold_in(jax.random.key(0), first)
        floats = jnp.asarray(to_float(images))
        found.append(jax.device_get(_loss(model.config, model.run.params, floats, given, key)))
        weights.append(len(images))
        if len(images) < EVAL_ROWS:
            break
    return {name: float(np.average([f[name] for f in found], weights=weights)) for name in found[0]}


def _rows(model: DiffusionModel, rows: range) -> dict[str, Any]:
    data = model.run.config.data
    source = open_source(data.source, "eval", languages=model_languages(model))
    return eval_batch(
        data, source, rows, image_size=model.config.image_size, with_labels=is_class_conditional(model)
    )


def measure_bits_per_dim(model: DiffusionModel, count: int, *, progress: ProgressFn | None = None) -> Metrics:
    """`bits_per_dim`, mean over the first `count` rows of the evaluation split, and `bits_per_dim_rows`."""
    rows = _rows(model, range(count))
    low = None
    if size := model.config.low_res_size:
        low = to_uint8(loss.downsample(jnp.asarray(to_float(rows["image"])), size))
    bits = image_bits_per_dim(
        model,
        rows["image"],
        captions=None if model.text is None else rows["caption"],
        labels=rows.get("label"),
        codes=None if model.tokenizer is None else encode_images(model.tokenizer, rows["image"]),
        low=low,
        batch=min(EVAL_ROWS, count),
        progress=progress,
    )
    return {"bits_per_dim": float(bits.mean()), "bits_per_dim_rows": len(bits)}


def measure_decoder(
    model: DiffusionModel,
    count: int,
    how: DiffusionSamplingConfig,
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> Metrics:
    """A model on codes beside the decoder of its tokenizer, on the same codes of the same pictures.

    Returns `psnr` and `tokenizer_psnr` (dB, mean over the first `count` rows of the evaluation split), and on
    scenes that can be verified `accuracy_reconstruction` and `tokenizer_accuracy_reconstruction`, over `count` captions of
    each kind.
    """
    data, size = model.run.config.data, model.config.image_size
    true = _rows(model, range(count))["image"]
    drawn, decoded = _both(model, true, how, seed, progress)
    figures = {"psnr": _psnr(true, drawn), "tokenizer_psnr": _psnr(true, decoded)}
    right: dict[str, list[bool]] = {"accuracy_reconstruction": [], "tokenizer_accuracy_reconstruction": []}
    for kind in scene_kinds(data, size):
        pairs = unseen_captions(data, kind, count)
        images = np.stack([generator.render(scene, size) for _, scene in pairs])
        for name, again in zip(right, _both(model, images, how, seed, progress), strict=True):
            facts = [caption.facts for caption, _ in pairs]
            right[name] += [verifier.verify(i, f).right for i, f in zip(again, facts, strict=True)]
    return figures | {name: float(np.mean(found)) for name, found in right.items() if found}


def measure_decoder_rfid(
    network: inception.Inception,
    model: DiffusionModel,
    true: fid.FeatureStats,
    count: int,
    how: DiffusionSamplingConfig,
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> Metrics:
    """What `measures.measure_rfid` returns, of the pictures that a model on codes draws from those of true ones, and
    `tokenizer_rfid`, that of its tokenizer's own decoder on the same codes."""
    data, size = model.run.config.data, model.config.image_size

    def again(pictures: np.ndarray, rows: range) -> np.ndarray:
        codes = encode_images(model.tokenizer, pictures, batch=EVAL_ROWS)
        return denoise_images(model, [seed + i for i in rows], how, codes=codes, batch=EVAL_ROWS).images

    drawn = rfid_of(network, again, data, size, true, count, progress=progress)
    decoded = measure_rfid(network, model.tokenizer, data, true, count, progress=progress)
    return drawn | {"tokenizer_rfid": decoded["rfid"]}


def _both(model, images, how, seed, progress) -> tuple[np.ndarray, np.ndarray]:
    codes = encode_images(model.tokenizer, images, batch=EVAL_ROWS)
    seeds = range(seed, seed + len(codes))
    drawn = denoise_images(model, seeds, how, codes=codes, batch=EVAL_ROWS, progress=progress).images
    return drawn, to_uint8(decode_codes(model.tokenizer, codes, batch=EVAL_ROWS))


def _psnr(true: np.ndarray, images: np.ndarray) -> float:
    return float(np.asarray(tokenizer_losses.psnr(to_float(true), to_float(images))).mean())


def measure_decoded(
    model: TextToImage,
    decoder: DiffusionModel,
    count: int,
    sampling: SamplingConfig,
    how: DiffusionSamplingConfig,
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> Metrics:
    """Share of `count` captions of each kind whose codes, drawn by the Transformer, are right as pixels of its
    tokenizer, `accuracy_KIND`, and as pixels of the diffusion model, `accuracy_KIND_decoder`.

    Raises ValueError for a decoder of another tokenizer.
    """
    check_decoder(decoder, model.tokenizer)
    figures: Metrics = {}
    for kind in scene_kinds(model.run.config.data, decoder.config.image_size):
        captions = [caption for caption, _ in unseen_captions(model.run.config.data, kind, count)]
        seeds = range(seed, seed + count)
        codes = sample_code_rows(model, [c.text for c in captions], seeds, sampling, batch=EVAL_ROWS)
        pixels = to_uint8(decode_codes(model.tokenizer, codes, batch=EVAL_ROWS))
        drawn = denoise_images(decoder, seeds, how, codes=codes, batch=EVAL_ROWS, progress=progress).images
        figures |= accuracy_by_kind(kind, verify_images(captions, pixels))
        figures[f"accuracy_{kind}_decoder"] = accuracy_by_kind(kind, verify_images(captions, drawn))[
            f"accuracy_{kind}"
        ]
    return figures
