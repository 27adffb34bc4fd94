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
from dalle_jax.data import scenes
from dalle_jax.data.images import to_bytes, to_floats
from dalle_jax.data.pipeline import eval_batch
from dalle_jax.data.sources import open_source
from dalle_jax.diffusion import loss, unet
from dalle_jax.evaluate import fid, inception, verifier
from dalle_jax.evaluate.measures import (
    BATCH,
    Figures,
    languages,
    measure_rfid,
    reads_labels,
    rfid_of,
    right_shares,
    scene_kinds,
    unseen_captions,
    verified,
)
from dalle_jax.inference import Progress, Sampling, TextToImage, decode_codes, draw_codes, encode_images
from dalle_jax.inference.diffusion import (
    Denoising,
    DiffusionModel,
    bits_per_dim,
    check_decoder,
    draw,
    text_rows,
)
from dalle_jax.tokenizer import losses


@partial(jax.jit, static_argnums=0)
def _loss(cfg: DiffusionConfig, params: Any, images, given: unet.Conditions, key) -> dict[str, jax.Array]:
    value, metrics = loss.loss(cfg, params, images, given, key, train=False)
    return {"loss": value, **metrics}


def measure_error(model: DiffusionModel, count: int = 256) -> Figures:
    """Training error of the first `count` rows of the evaluation split, nothing dropped, one time for each row.

    Returns `loss`, `eps_mse` and `band_1` (least noise) to `band_4`.
    """
    found, weights = [], []
    for first in range(0, count, BATCH):
        rows = _rows(model, range(first, min(first + BATCH, count)))
        images, label = rows["image"], rows.get("label")
        given = unet.Conditions(
            text=None if model.text is None else jnp.asarray(text_rows(model, rows["caption"])),
            label=None if label is None else jnp.where(label < 0, model.config.classes, label),
            codes=None if model.tokenizer is None else jnp.asarray(encode_images(model.tokenizer, images)),
        )
        key = jax.random.fold_in(jax.random.key(0), first)
        floats = jnp.asarray(to_floats(images))
        found.append(jax.device_get(_loss(model.config, model.run.params, floats, given, key)))
        weights.append(len(images))
        if len(images) < BATCH:
            break
    return {name: float(np.average([f[name] for f in found], weights=weights)) for name in found[0]}


def _rows(model: DiffusionModel, rows: range) -> dict[str, Any]:
    data = model.run.config.data
    source = open_source(data.source, "eval", languages=languages(model))
    return eval_batch(data, source, rows, image_size=model.config.image_size, labels=reads_labels(model))


def measure_likelihood(model: DiffusionModel, count: int, *, progress: Progress | None = None) -> Figures:
    """`bits_per_dim`, mean over the first `count` rows of the evaluation split, and `bits_per_dim_rows`."""
    rows = _rows(model, range(count))
    low = None
    if size := model.config.low_size:
        low = to_bytes(loss.shrink(jnp.asarray(to_floats(rows["image"])), size))
    bits = bits_per_dim(
        model,
        rows["image"],
        captions=None if model.text is None else rows["caption"],
        labels=rows.get("label"),
        codes=None if model.tokenizer is None else encode_images(model.tokenizer, rows["image"]),
        low=low,
        batch=min(BATCH, count),
        progress=progress,
    )
    return {"bits_per_dim": float(bits.mean()), "bits_per_dim_rows": len(bits)}


def measure_decoder(
    model: DiffusionModel, count: int, how: Denoising, *, seed: int = 0, progress: Progress | None = None
) -> Figures:
    """A model on codes beside the decoder of its tokenizer, on the same codes of the same pictures.

    Returns `psnr` and `tokenizer_psnr` (dB, mean over the first `count` rows of the evaluation split), and on
    scenes that can be verified `right_reconstruction` and `tokenizer_right_reconstruction`, over `count` captions of
    each kind.
    """
    data, size = model.run.config.data, model.config.image_size
    true = _rows(model, range(count))["image"]
    drawn, decoded = _both(model, true, how, seed, progress)
    figures = {"psnr": _psnr(true, drawn), "tokenizer_psnr": _psnr(true, decoded)}
    right: dict[str, list[bool]] = {"right_reconstruction": [], "tokenizer_right_reconstruction": []}
    for kind in scene_kinds(data, size):
        pairs = unseen_captions(data, kind, count)
        images = np.stack([scenes.render(scene, size) for _, scene in pairs])
        for name, again in zip(right, _both(model, images, how, seed, progress), strict=True):
            facts = [caption.facts for caption, _ in pairs]
            right[name] += [verifier.check(i, f).right for i, f in zip(again, facts, strict=True)]
    return figures | {name: float(np.mean(found)) for name, found in right.items() if found}


def measure_decoder_rfid(
    network: inception.Inception,
    model: DiffusionModel,
    true: fid.Moments,
    count: int,
    how: Denoising,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Figures:
    """What `measures.measure_rfid` returns, of the pictures that a model on codes draws from those of true ones, and
    `tokenizer_rfid`, that of its tokenizer's own decoder on the same codes."""
    data, size = model.run.config.data, model.config.image_size

    def again(pictures: np.ndarray, rows: range) -> np.ndarray:
        codes = encode_images(model.tokenizer, pictures, batch=BATCH)
        return draw(model, [seed + i for i in rows], how, codes=codes, batch=BATCH).images

    drawn = rfid_of(network, again, data, size, true, count, progress=progress)
    decoded = measure_rfid(network, model.tokenizer, data, true, count, progress=progress)
    return drawn | {"tokenizer_rfid": decoded["rfid"]}


def _both(model, images, how, seed, progress) -> tuple[np.ndarray, np.ndarray]:
    codes = encode_images(model.tokenizer, images, batch=BATCH)
    seeds = range(seed, seed + len(codes))
    drawn = draw(model, seeds, how, codes=codes, batch=BATCH, progress=progress).images
    return drawn, to_bytes(decode_codes(model.tokenizer, codes, batch=BATCH))


def _psnr(true: np.ndarray, images: np.ndarray) -> float:
    return float(np.asarray(losses.psnr(to_floats(true), to_floats(images))).mean())


def measure_decoded(
    model: TextToImage,
    decoder: DiffusionModel,
    count: int,
    sampling: Sampling,
    how: Denoising,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Figures:
    """Share of `count` captions of each kind whose codes, drawn by the Transformer, are right as pixels of its
    tokenizer, `right_KIND`, and as pixels of the diffusion model, `right_KIND_decoder`.

    Raises ValueError for a decoder of another tokenizer.
    """
    check_decoder(decoder, model.tokenizer)
    figures: Figures = {}
    for kind in scene_kinds(model.run.config.data, decoder.config.image_size):
        captions = [caption for caption, _ in unseen_captions(model.run.config.data, kind, count)]
        seeds = range(seed, seed + count)
        codes = draw_codes(model, [c.text for c in captions], seeds, sampling, batch=BATCH)
        pixels = to_bytes(decode_codes(model.tokenizer, codes, batch=BATCH))
        drawn = draw(decoder, seeds, how, codes=codes, batch=BATCH, progress=progress).images
        figures |= right_shares(kind, verified(captions, pixels))
        figures[f"right_{kind}_decoder"] = right_shares(kind, verified(captions, drawn))[f"right_{kind}"]
    return figures
