"""Base of the stages that train on rows of `config.data`."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from dalle_jax.config import TrainConfig
from dalle_jax.data import images
from dalle_jax.data.codes import CodesDataset
from dalle_jax.data.loader.pipeline import eval_batch, train_batches
from dalle_jax.data.sources import Dataset
from dalle_jax.train.task import BatchStream, Task
from dalle_jax.typing import HostBatch, Params

_EVAL_BATCH = 128  # rows of an evaluation batch
_GRID_IMAGES = 16  # images of a sample grid
_GRID_COLUMNS = 4
_GRID_MIN_SIZE = 128  # side of an image in a grid, pixels


class DataTask(Task):
    """A stage whose batches are rows of `config.data`; a subclass sets the sources in `prepare`."""

    train_source: Dataset | CodesDataset
    eval_source: Dataset | CodesDataset

    def __init__(self, config: TrainConfig):
        self.config = config
        self.frozen: Params = {}

    @abstractmethod
    def row_options(self) -> dict[str, Any]:
        """Return the arguments of `train_batches` and `eval_batch` that select the inputs of a row."""

    def batches(self, start: int, rows: Sequence[int] | None = None) -> BatchStream:
        return train_batches(
            self.config.data,
            self.train_source,
            start=start,
            rows=rows,
            bpe_dropout=self.config.text.bpe_dropout,
            **self.row_options(),
        )

    def eval_batches(self) -> list[HostBatch]:
        count = min(self.config.eval_rows, len(self.eval_source))
        ranges = [range(i, min(i + _EVAL_BATCH, count)) for i in range(0, count, _EVAL_BATCH)]
        batches = [
            eval_batch(self.config.data, self.eval_source, rows, **self.row_options()) for rows in ranges
        ]
        return [{name: x for name, x in batch.items() if name != "caption"} for batch in batches]

    def grid_batch(self) -> tuple[HostBatch, list[str]]:
        """Return the first rows of the evaluation split and their captions, for `sample_grid`."""
        batch = eval_batch(self.config.data, self.eval_source, _GRID_IMAGES, **self.row_options())
        captions = batch.pop("caption")
        return batch, captions


def log_bad_records(source: Dataset | CodesDataset, run_dir: Path) -> None:
    """Write unusable records to `bad_records.jsonl`, those known and those found later, and print their counts."""
    process = jax.process_index()
    source.log_to(run_dir / (f"bad_records-{process}.jsonl" if process else "bad_records.jsonl"))
    if (causes := source.report()) and process == 0:
        counts = ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items()))
        print(
            f"{len(source)} rows; excluded: {counts} (bad_records.jsonl has the list)",
            file=sys.stderr,
        )


def labeled_grid(images_u8: np.ndarray, labels: list[str] | None) -> Image.Image:
    """Return a grid of uint8 images (B, H, W, 3), each above its label, enlarged to a readable size."""
    scale = max(1, _GRID_MIN_SIZE // images_u8.shape[1])
    return images.image_grid(images_u8, _GRID_COLUMNS, labels=labels, scale=scale)
