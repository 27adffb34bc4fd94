"""The stage of CLIP: it learns which caption belongs to which picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dalle_jax.checkpoint.run_dir import load_frozen, read_config, sync_run_dir
from dalle_jax.config import TokenizerConfig, TrainConfig
from dalle_jax.data.images import to_float
from dalle_jax.data.loader.pipeline import eval_batch, train_batches
from dalle_jax.data.sources import open_source
from dalle_jax.models import clip, tokenizer
from dalle_jax.parallel.processes import gather_to_host
from dalle_jax.text.tokenizers import BosEosTokenizer
from dalle_jax.train.tasks.captions import make_text_tokenizer, warn_truncated
from dalle_jax.train.tasks.images import GRID_IMAGES, eval_batches, labeled_grid, log_bad_records  # fmt: skip
from dalle_jax.train.tasks.prepare import prepare
from dalle_jax.typing import Batch, Params


class ClipTask:
    """A vision and a text tower learn to find each other's partner among the rows of a batch.

    With a tokenizer every second picture is what that makes of it: a CLIP that has only seen clean pictures does not
    know what is wrong with drawn ones.
    """

    best = ("eval_loss", "min")

    def __init__(self, config: TrainConfig, *, on_codes: bool = False):
        self.config, self.model = config, config.model
        self.frozen: Params = {}
        if config.image_tokenizer is not None:  # before the run directory is made
            _check_tokenizer(read_config(config.image_tokenizer).model, config)
        self.tokens_per_row = self.model.num_patches + self.model.text_len
        size = self.model.image_size
        self.batch_spec = {
            "image": ((size, size, 3), jnp.uint8),
            "text": ((self.model.text_len,), jnp.int32),
        }

    def prepare(self, run_dir: Path) -> None:
        data = self.config.data
        self._source = open_source(data.source, "train", languages=data.languages)
        self._eval = open_source(data.source, "eval", languages=data.languages)
        log_bad_records(self._source, run_dir)
        vocabulary = run_dir / "text_tokenizer.model"
        if jax.process_index() == 0:
            make_text_tokenizer(self.config, self._source, vocabulary, self.model.text_vocab - 2)
        sync_run_dir(run_dir)
        self.text = BosEosTokenizer.load(vocabulary)
        self.text.encode("", **self._sizes())  # a vocabulary that is too large is told now
        if jax.process_index() == 0:
            warn_truncated(self.text, self._source, self.model.text_len - 2)
        if self.config.image_tokenizer is not None:
            prepare(self.config, self._source, run_dir, vocab=None, tokenizer=True)
            self.tokenizer, self.frozen, _ = load_frozen(run_dir / "tokenizer")

    def init(self, key: jax.Array) -> Params:
        return clip.init(self.model, key)

    def loss(self, params, frozen, batch, key, step):
        images_BHWC = to_float(batch["image"])
        if frozen:
            images_BHWC = half_reconstructed(self.tokenizer, frozen, images_BHWC)
        return clip.loss(self.model, params, images_BHWC, batch["text"])

    def _sizes(self) -> dict[str, int]:
        return {"text_vocab": self.model.text_vocab, "text_len": self.model.text_len}

    def batches(self, start: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        return train_batches(
            self.config.data,
            self._source,
            start=start,
            image_size=self.model.image_size,
            text=self.text,
            bpe_dropout=self.config.text.bpe_dropout,
            rows=rows,
            **self._sizes(),
        )

    def eval_batches(self) -> list[Batch]:
        options = {"image_size": self.model.image_size, "text": self.text, **self._sizes()}
        batches = eval_batches(self.config, self._eval, **options)
        return [{"image": batch["image"], "text": batch["text"]} for batch in batches]

    def evaluate(self, params, frozen, batch, key):
        """Among the rows of one evaluation batch, of which there are fewer than in training, or more."""
        model = dataclasses.replace(self.model, grad_cache_chunks=1)
        value, metrics = clip.loss(model, params, to_float(batch["image"]), batch["text"])
        shares = {f"eval_{name}": metrics[name] for name in ("image_to_text", "text_to_image")}
        return {"eval_loss": value, **shares}

    def sample_grid(self, params, frozen, key) -> Image.Image:
        """Pictures of the evaluation split, each above the caption that fits it best of all that are shown, with
        its cosine; `not` stands before one that is not its own."""
        options = {"image_size": self.model.image_size, "text": self.text, **self._sizes()}
        batch = eval_batch(self.config.data, self._eval, GRID_IMAGES, **options)
        cosine = gather_to_host(
            _cosines(self.model, params, jnp.asarray(batch["image"]), jnp.asarray(batch["text"]))
        )
        labels = []
        for row, best in enumerate(cosine.argmax(axis=1)):
            right = batch["caption"][best] == batch["caption"][row]
            labels.append(f"{'' if right else 'not: '}{batch['caption'][best]} ({cosine[row, best]:.2f})")
        return labeled_grid(batch["image"], 4, labels)


def _check_tokenizer(model: Any, config: TrainConfig) -> None:
    """Raises ValueError unless `model` is a tokenizer of pictures of the size that this CLIP reads."""
    if not isinstance(model, TokenizerConfig):
        raise ValueError(
            f"tokenizer {config.image_tokenizer} is a run of stage {model.kind}, want a tokenizer (dvae, vqgan)"
        )
    if model.image_size != config.model.image_size:
        raise ValueError(
            f"model.image_size is {config.model.image_size}, the tokenizer's is {model.image_size}; set them equal"
        )


def half_reconstructed(model: TokenizerConfig, params: Params, images_BHWC: jax.Array) -> jax.Array:
    """The rows 1, 3, 5, ... as the tokenizer decodes their codes, the others as they are; an even number of rows."""
    pairs = images_BHWC.reshape(-1, 2, *images_BHWC.shape[1:])  # neighbours lie on one device
    decoded = tokenizer.decode(model, params, tokenizer.encode(model, params, pairs[:, 1]))
    return jnp.stack([pairs[:, 0], decoded], axis=1).reshape(images_BHWC.shape)


def _cosines(model, params: Params, image_u8: jax.Array, text_BT: jax.Array) -> jax.Array:
    def both(params, image_u8, text_BT):
        image_BE = clip.encode_image(model, params, to_float(image_u8))
        return image_BE @ clip.encode_text(model, params, text_BT).T

    return jax.jit(both)(params, image_u8, text_BT)
