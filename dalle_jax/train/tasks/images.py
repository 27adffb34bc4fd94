"""Pictures as tasks need them: evaluation rows, grids made while training."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from dalle_jax.config import TrainConfig
from dalle_jax.data import images
from dalle_jax.data.loader.pipeline import eval_batch
from dalle_jax.data.sources import Dataset
from dalle_jax.typing import Batch

EVAL_BATCH = 128  # rows measured at once
GRID_IMAGES = 16  # cells of a grid made while training


def eval_batches(config: TrainConfig, source, **options) -> list[Batch]:
    """The evaluation rows in batches of at most EVAL_BATCH."""
    rows = min(config.eval_rows, len(source))
    starts = range(0, rows, EVAL_BATCH)
    return [eval_batch(config.data, source, range(a, min(a + EVAL_BATCH, rows)), **options) for a in starts]


def log_bad_records(source: Dataset, run_dir: Path) -> None:
    """Lists records that cannot be used in the run directory, now and as they are found; tells how many."""
    process = jax.process_index()
    source.log_to(run_dir / (f"bad_records-{process}.jsonl" if process else "bad_records.jsonl"))
    if (causes := source.report()) and process == 0:
        told = ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items()))
        print(f"{len(source)} rows; left out: {told} (bad_records.jsonl lists them)", file=sys.stderr)


def labeled_grid(pictures: np.ndarray, columns: int, labels: list[str] | None) -> Image.Image:
    scale = max(1, 128 // pictures.shape[1])
    return images.image_grid(pictures, columns, labels=labels, scale=scale)
