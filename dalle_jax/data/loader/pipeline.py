"""Rows to batches. The data position is the step number: batch k is a function of the configuration and k.

Each epoch is a permutation of the source by `data.seed`. The random choices of a row (caption, BPE dropout, crop) are
seeded by its position in the stream of rows. A run therefore resumes at its exact row, on any number of processes,
threads and workers, and training on codes reads the rows and captions that training on images reads. B rows of a batch,
H W image, N codes, T text positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from dalle_jax import config
from dalle_jax.data.codes import EVAL_DIR, CodesDataset, check_codes_dataset
from dalle_jax.data.loader.examples import ExampleBuilder, label_array
from dalle_jax.data.loader.workers import ProcessBatches
from dalle_jax.data.sources import Dataset, open_source
from dalle_jax.text.tokenizers import TextTokenizer
from dalle_jax.typing import HostBatch


def open_train_source(data: config.DataConfig) -> Dataset:
    """Open the rows to train on: those of `data.codes` if it is set, else those of `data.source`.

    With codes the images are not needed.

    Raises:
      ValueError: What `open_source` raises; the codes are of other data.
      FileNotFoundError: What `open_source` raises.
    """
    if data.codes is None:
        return open_source(data.source, "train", languages=data.languages)
    rows = CodesDataset(data.codes)
    check_codes_dataset(rows, data)
    return rows


def open_eval_source(data: config.DataConfig) -> Dataset:
    """Open the rows to evaluate on: those of `data.codes` if `dalle-jax encode` wrote some, else images."""
    directory = None if data.codes is None else Path(data.codes) / EVAL_DIR
    if directory is None or not directory.is_dir():
        return open_source(data.source, "eval", languages=data.languages)
    rows = CodesDataset(directory)
    check_codes_dataset(rows, data, "eval")
    return rows


def train_batches(
    data: config.DataConfig,
    source: Dataset,
    *,
    start: int,
    image_size: int | None,
    text: TextTokenizer | None = None,
    text_vocab: int = 0,
    text_len: int = 0,
    bpe_dropout: float = 0.0,
    with_labels: bool = False,
    rows: Sequence[int] | None = None,
) -> ThreadedBatches | ProcessBatches:
    """Return an endless iterator over the batches of steps `start`, `start + 1`, ...

    Close it, or use it in a `with` block. A source shorter than a batch repeats within it.

    Args:
      data: The configuration. With `data.num_workers` that many processes build the rows.
      source: The result of `open_train_source`; batches of codes have no images.
      start: First step, 0 or more.
      image_size: Side of the images, pixels; unused with codes.
      text: Encodes one caption of each row, chosen among its languages and then among its captions; None leaves
        captions out.
      text_vocab: See `TextTokenizer.encode`.
      text_len: See `TextTokenizer.encode`.
      bpe_dropout: See `TextTokenizer.encode`.
      with_labels: Add the class of each row, -1 for none.
      rows: Rows of each batch of `data.batch_size` that this process needs, ascending; None is all.

    Returns:
      Batches of `image` uint8 (B, H, W, 3) or `codes` int32 (B, N); with text `text` int32 (B, T); with labels `label`
      int32 (B,).

    Raises:
      ValueError: An argument is out of range, or the source cannot be sent to worker processes.
      RuntimeError: A worker process does not start; while iterating, a worker process was lost.
    """
    if start < 0:
        raise ValueError(f"Expected a start step of 0 or more, got {start}.")
    local_rows = [int(r) for r in (range(data.batch_size) if rows is None else rows)]
    ascending = local_rows == sorted(set(local_rows))
    if not local_rows or not ascending or not 0 <= local_rows[0] <= local_rows[-1] < data.batch_size:
        raise ValueError(
            f"Expected one or more ascending rows in [0, {data.batch_size}), got {local_rows[:8]}"
            f"{'...' * (len(local_rows) > 8)}."
        )
    if image_size is None and not isinstance(source, CodesDataset):
        raise ValueError("Expected image_size, the side of the images in pixels, got None.")
    if text is not None and (text_vocab < 1 or text_len < 1):
        raise ValueError(f"Expected text_vocab and text_len of at least 1, got {text_vocab} and {text_len}.")

    builder = ExampleBuilder(
        data=data, source=source, image_size=image_size or 0, text=text, text_vocab=text_vocab, text_len=text_len,
        bpe_dropout=bpe_dropout, with_labels=with_labels,
    )  # fmt: skip
    order: Any = grain.MapDataset.range(len(source)).shuffle(seed=data.seed).repeat()
    if data.num_workers == 0:
        batches = _BatchRows(order.map_with_index(builder), data.batch_size, local_rows)
        batches = batches.batch(len(local_rows), drop_remainder=True)
        return ThreadedBatches(batches, start=start, num_threads=data.num_threads, prefetch=data.prefetch)

    def rows_at(step: int) -> tuple[list[int], list[int]]:
        positions = [step * data.batch_size + r for r in local_rows]
        return positions, [order[position] for position in positions]

    return ProcessBatches(
        builder,
        rows_at,
        start=start,
        batch_size=len(local_rows),
        num_workers=min(data.num_workers, len(local_rows)),
        prefetch=data.prefetch,
    )


def eval_batch(
    data: config.DataConfig,
    source: Dataset,
    rows: int | range,
    *,
    image_size: int,
    text: TextTokenizer | None = None,
    text_vocab: int = 0,
    text_len: int = 0,
    with_labels: bool = False,
) -> dict[str, Any]:
    """Return rows of a source, the same every time.

    Images are cropped to the center, or resized without a crop if `data.crop` is "none". Row i takes its first caption
    in language i modulo the number of its languages.

    Args:
      data: The configuration.
      source: The result of `open_eval_source`.
      rows: Number of rows, from the first, or a range of rows; those beyond the source are left out.
      image_size: Side of the images, pixels; unused with codes.
      text: See `train_batches`.
      text_vocab: See `TextTokenizer.encode`.
      text_len: See `TextTokenizer.encode`.
      with_labels: Add the class of each row, -1 for none.

    Returns:
      `image` uint8 (B, H, W, 3) or `codes` int32 (B, N); `caption` list of B str, "" for a row without; with text
      `text` int32 (B, T); with labels `label` int32 (B,).

    Raises:
      ValueError: The source has none of the rows.
    """
    indices = [i for i in (range(rows) if isinstance(rows, int) else rows) if i < len(source)]
    if not indices:
        raise ValueError(f"Expected rows to evaluate, got {rows} of a source of {len(source)} rows.")
    crop = "none" if data.crop == "none" else "center"
    arrays, captions = [], []
    for i in indices:
        if isinstance(source, CodesDataset):
            arrays.append(source.row(i)[0])
        else:
            arrays.append(source.image(i, image_size, crop))
        by_language = source.captions(i)
        names = [name for name in data.languages if name in by_language] or list(by_language)
        captions.append(by_language[names[i % len(names)]][0] if names else "")
    name = "codes" if isinstance(source, CodesDataset) else "image"
    batch: dict[str, Any] = {name: np.stack(arrays), "caption": captions}
    if text is not None:
        batch["text"] = np.stack([text.encode(c, text_vocab=text_vocab, text_len=text_len) for c in captions])
    if with_labels:
        batch["label"] = np.stack([label_array(source, i) for i in indices])
    return batch


class ThreadedBatches(Iterator[HostBatch]):
    """An endless iterator over batches that threads build ahead. Close it, or use it in a `with` block."""

    def __init__(self, batches: grain.MapDataset, *, start: int, num_threads: int, prefetch: int):
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        self._iterator = iter(batches.to_iter_dataset(options))
        self._iterator.set_state({"next_index": start})

    def __next__(self) -> HostBatch:
        return next(self._iterator)

    def close(self) -> None:
        """Stop building ahead; threads finish their present batch. May be called twice."""
        self._iterator.close()

    def __enter__(self) -> ThreadedBatches:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _BatchRows(grain.MapDataset):
    """Some rows of each batch of a stream; positions stay those of the whole stream."""

    def __init__(self, stream: grain.MapDataset, batch_size: int, rows: list[int]):
        super().__init__(stream)
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, len(self._rows))
        return self._parent[step * self._batch_size + self._rows[row]]
