"""Metrics of a diffusion model: error by noise level, likelihood, and its pixels beside those of a tokenizer.

Rows and captions are those of metrics.py. R rows, N codes.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    accuracy_metrics,
    measure_rfid,
    rfid_of,
    scene_kinds,
    unseen_captions,
    verify_images,
)
from dalle_jax.evaluate.scenes import verifier
from dalle_jax.models import tokenizer_losses
from dalle_jax.models.diffusion import loss, unet
from dalle_jax.pipelines import (
    DiffusionPipeline,
    DiffusionSamplingConfig,
    ImageRequest,
    ProgressFn,
    SamplingConfig,
    TextToImagePipeline,
    TokenizerPipeline,
)
from dalle_jax.typing import Params


@partial(jax.jit, static_argnums=0)
def _loss(
    cfg: DiffusionConfig, params: Params, images: jax.Array, conditions: unet.Conditions, key: jax.Array
) -> dict[str, jax.Array]:
    value, metrics = loss.loss(cfg, params, images, conditions, key, train=False)
    return {"loss": value, **metrics}


def measure_denoising_error(model: DiffusionPipeline, count: int = 256) -> Metrics:
    """Measure the training loss of the first `count` rows of the evaluation split, without dropping conditions.

    Returns:
        `loss`, `eps_mse`, and the squared error by noise level, `band_1` (least noise) to `band_4`.
    """
    losses, weights = [], []
    for first in range(0, count, EVAL_ROWS):
        batch = _rows(model, range(first, min(first + EVAL_ROWS, count)))
        key = jax.random.fold_in(jax.random.key(0), first)
        images = jnp.asarray(to_float(batch["image"]))
        conditions = _conditions(model, batch)._replace(low_res=None)  # the loss makes the small image itself
        losses.append(jax.device_get(_loss(model.config, model.run.params, images, conditions, key)))
        weights.append(len(images))
        if len(images) < EVAL_ROWS:
            break
    return {name: float(np.average([row[name] for row in losses], weights=weights)) for name in losses[0]}


def _conditions(model: DiffusionPipeline, batch: dict[str, Any]) -> unet.Conditions:
    """Conditions of true images, as far as the model reads them."""
    images, size = batch["image"], model.config.low_res_size
    return model.conditions(
        prompts=None if model.text is None else batch["caption"],
        labels=batch.get("label"),
        codes=None if model.tokenizer is None else model.tokenizer.encode(images),
        low_res=to_uint8(loss.downsample(jnp.asarray(to_float(images)), size)) if size else None,
    )


def _rows(model: DiffusionPipeline, rows: range) -> dict[str, Any]:
    data = model.run.config.data
    source = open_source(data.source, "eval", languages=model.languages)
    return eval_batch(data, source, rows, image_size=model.image_size, with_labels=model.is_class_conditional)


def measure_bits_per_dim(
    model: DiffusionPipeline, count: int, *, progress: ProgressFn | None = None
) -> Metrics:
    """Measure the likelihood of the first `count` rows of the evaluation split.

    Returns:
        `bits_per_dim`, the mean of the bits per value, and the number of rows, `bits_per_dim_rows`.
    """
    batch = _rows(model, range(count))
    bits = model.bits_per_dim(
        batch["image"], _conditions(model, batch), batch_size=min(EVAL_ROWS, count), progress=progress
    )
    return {"bits_per_dim": float(bits.mean()), "bits_per_dim_rows": len(bits)}


def measure_decoder(
    model: DiffusionPipeline,
    count: int,
    sampling: DiffusionSamplingConfig,
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> Metrics:
    """Compare a diffusion model on codes with its tokenizer's decoder, on the same codes of the same images.

    Returns:
        `psnr` and `tokenizer_psnr` (dB, mean over the first `count` rows of the evaluation split), and on scenes that
        can be verified `accuracy_reconstruction` and `tokenizer_accuracy_reconstruction`, over `count` captions of
        each kind.
    """
    tokenizer = _tokenizer_of(model)
    data = model.run.config.data
    true = _rows(model, range(count))["image"]
    generated, decoded = _decode_both(model, tokenizer, true, sampling, seed, progress)
    metrics = {"psnr": _psnr(true, generated), "tokenizer_psnr": _psnr(true, decoded)}
    right: dict[str, list[bool]] = {"accuracy_reconstruction": [], "tokenizer_accuracy_reconstruction": []}
    for kind in scene_kinds(data, model.image_size):
        pairs = unseen_captions(data, kind, count)
        images = np.stack([generator.render_scene(scene, model.image_size) for _, scene in pairs])
        facts = [caption.facts for caption, _ in pairs]
        both = _decode_both(model, tokenizer, images, sampling, seed, progress)
        for verdicts, decoded in zip(right.values(), both, strict=True):
            verdicts += [verifier.verify_scene(i, f).right for i, f in zip(decoded, facts, strict=True)]
    return metrics | {name: float(np.mean(verdicts)) for name, verdicts in right.items() if verdicts}


def measure_decoder_rfid(
    network: inception.Inception,
    model: DiffusionPipeline,
    true: fid.FeatureStats,
    count: int,
    sampling: DiffusionSamplingConfig,
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> Metrics:
    """Measure the rFID of a diffusion model on the codes of true images, and of its tokenizer's decoder.

    Returns:
        What `metrics.measure_rfid` returns, of the diffusion model, and `tokenizer_rfid`.
    """
    tokenizer, data = _tokenizer_of(model), model.run.config.data

    def reconstruct(images: np.ndarray, rows: range) -> np.ndarray:
        codes = tokenizer.encode(images, batch_size=EVAL_ROWS)
        return decode_evaluation_codes(model, codes, [seed + i for i in rows], sampling)

    metrics = rfid_of(network, reconstruct, data, model.image_size, true, count, progress=progress)
    decoded = measure_rfid(network, tokenizer, data, true, count, progress=progress)
    return metrics | {"tokenizer_rfid": decoded["rfid"]}


def decode_evaluation_codes(
    model: DiffusionPipeline,
    codes: np.ndarray,
    seeds: Sequence[int],
    sampling: DiffusionSamplingConfig | None = None,
    *,
    progress: ProgressFn | None = None,
) -> np.ndarray:
    """Generate the pixels of codes, int32 (R, N), with a diffusion model: uint8 (R, H, W, 3)."""
    requests = [ImageRequest(seed=seed, codes=row) for seed, row in zip(seeds, codes, strict=True)]
    images = model.sample(requests, sampling, batch_size=EVAL_ROWS, progress=progress)
    return np.stack([generated.image for generated in images])


def _tokenizer_of(model: DiffusionPipeline) -> TokenizerPipeline:
    if model.tokenizer is None:
        raise ValueError(
            f"Expected a diffusion model on codes, got {model.run.path} without. Use one trained with model.codes."
        )
    return model.tokenizer


def _decode_both(
    model: DiffusionPipeline,
    tokenizer: TokenizerPipeline,
    images: np.ndarray,
    sampling: DiffusionSamplingConfig,
    seed: int,
    progress: ProgressFn | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The codes of images as pixels of the diffusion model and of its tokenizer."""
    codes = tokenizer.encode(images, batch_size=EVAL_ROWS)
    generated = decode_evaluation_codes(
        model, codes, range(seed, seed + len(codes)), sampling, progress=progress
    )
    return generated, to_uint8(tokenizer.decode(codes, batch_size=EVAL_ROWS))


def _psnr(true: np.ndarray, images: np.ndarray) -> float:
    return float(np.asarray(tokenizer_losses.psnr(to_float(true), to_float(images))).mean())


def measure_decoder_accuracy(
    model: TextToImagePipeline,
    decoder: DiffusionPipeline,
    count: int,
    sampling: SamplingConfig,
    denoising: DiffusionSamplingConfig,
    *,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> Metrics:
    """Measure the accuracy of a Transformer's codes as pixels of its tokenizer and of a diffusion model.

    Returns:
        `accuracy_KIND` and `accuracy_KIND_decoder`, over `count` captions of each kind.

    Raises:
        ValueError: the decoder was trained with another tokenizer.
    """
    decoder.check_tokenizer(model.tokenizer)
    metrics: Metrics = {}
    for kind in scene_kinds(model.run.config.data, decoder.image_size):
        captions = [caption for caption, _ in unseen_captions(model.run.config.data, kind, count)]
        requests = [ImageRequest(caption.text, seed + i) for i, caption in enumerate(captions)]
        generated = list(model.sample(requests, sampling, batch_size=EVAL_ROWS))
        codes = np.stack([image.codes for image in generated if image.codes is not None])
        decoded = decode_evaluation_codes(
            decoder, codes, range(seed, seed + count), denoising, progress=progress
        )
        images = np.stack([image.image for image in generated])
        metrics |= accuracy_metrics(kind, verify_images(captions, images))
        by_kind = accuracy_metrics(kind, verify_images(captions, decoded))
        metrics[f"accuracy_{kind}_decoder"] = by_kind[f"accuracy_{kind}"]
    return metrics
