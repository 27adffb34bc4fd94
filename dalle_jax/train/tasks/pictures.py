"""Pictures as tasks need them: bytes and floats, evaluation rows, grids made while training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dalle_jax.config import TrainConfig
from dalle_jax.data import images
from dalle_jax.data.pipeline import eval_batch

Batch = dict[str, Any]

EVAL_BATCH = 128  # rows measured at once
PICTURES = 16  # cells of a grid made while training


def to_floats(image_u8: jax.Array) -> jax.Array:
    """uint8 pictures to float32 in [0, 1]."""
    return image_u8.astype(jnp.float32) / 255.0


def to_bytes(image: Any) -> np.ndarray:
    """Float pictures in [0, 1] to uint8, rounded."""
    return np.round(np.clip(np.asarray(image, np.float32), 0.0, 1.0) * 255.0).astype(np.uint8)


def eval_batches(config: TrainConfig, source, **options) -> list[Batch]:
    """The evaluation rows in batches of at most EVAL_BATCH."""
    rows = min(config.eval_rows, len(source))
    starts = range(0, rows, EVAL_BATCH)
    return [eval_batch(config.data, source, range(a, min(a + EVAL_BATCH, rows)), **options) for a in starts]


def grid(pictures: np.ndarray, columns: int, labels: list[str] | None) -> Image.Image:
    scale = max(1, 128 // pictures.shape[1])
    return images.grid(pictures, columns, labels=labels, scale=scale)
