"""Rows to batches. The position in the data is the step number: batch k is a function of the configuration
and k.

Each epoch is a permutation of the source, drawn from `data.seed`; what is random about a row (caption,
skipped merges, crop) is drawn from its position in the stream. So a run resumes at its exact row, on any
number of processes, threads and workers, and training on codes sees the rows and captions that training on
pictures sees. B rows of a batch, H W picture, N codes, T text positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from dalle_jax import config
from dalle_jax.data.codes import EVAL_DIR, CodesDataset, check_codes_dataset
from dalle_jax.data.loader.examples import ExampleBuilder, label_array
from dalle_jax.data.loader.workers import ProcessBatches
from dalle_jax.data.sources import Dataset, open_source
from dalle_jax.text.tokenizers import TextTokenizer
from dalle_jax.typing import HostBatch


def open_train_source(data: config.DataConfig) -> Dataset | CodesDataset:
    """The rows to train on: those of `data.source`, or of the directory `data.codes` if that is set; then the
    pictures need not be there. Raises what `open_source` raises; ValueError for codes of other data."""
    if data.codes is None:
        return open_source(data.source, "train", languages=data.languages)
    rows = CodesDataset(data.codes)
    check_codes_dataset(rows, data)
    return rows


def open_eval_source(data: config.DataConfig) -> Dataset | CodesDataset:
    """The rows to evaluate on: those that `dalle-jax encode` put into `data.codes`, if it did, else pictures."""
    held_out = None if data.codes is None else Path(data.codes) / EVAL_DIR
    if held_out is None or not held_out.is_dir():
        return open_source(data.source, "eval", languages=data.languages)
    rows = CodesDataset(held_out)
    check_codes_dataset(rows, data, "eval")
    return rows


def train_batches(
    data: config.DataConfig,
    source: Dataset | CodesDataset,
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
    """The batches of steps `start`, `start + 1`, ... without end.

    source: what `open_train_source` returns; with codes the batches hold those and not the pictures.
    image_size: side of the pictures, pixels; not used with codes.
    text: encodes one caption for each row, chosen among its languages and then among its captions; None
        leaves text out. text_vocab, text_len, dropout: see `TextTokenizer.encode`.
    labels: the class of each row, too, -1 where it has none.
    rows: which rows of each batch of `data.batch_size` to make, ascending: those that this process needs; None is all.

    Each batch has `image` uint8 (B, H, W, 3) or `codes` int32 (B, N), with text `text` int32 (B, T), with labels
    `label` int32 (B,). A source shorter than a batch repeats within it. Raises ValueError for rows that a batch
    does not have. With `data.num_workers` rows are made by that many processes: ValueError for a source that cannot be
    sent to them, RuntimeError if one is lost. Close what is returned, or use it in a `with`.
    """
    if start < 0:
        raise ValueError(f"start is step {start}; want 0 or more")
    wanted = [int(r) for r in (range(data.batch_size) if rows is None else rows)]
    if not wanted or wanted != sorted(set(wanted)) or not 0 <= wanted[0] <= wanted[-1] < data.batch_size:
        raise ValueError(
            f"rows {wanted[:8]}{'...' * (len(wanted) > 8)} of a batch of {data.batch_size}; want at least one, ascending, "
            f"from 0 to {data.batch_size - 1}"
        )
    if image_size is None and not isinstance(source, CodesDataset):
        raise ValueError("image_size is None, but the source has no codes; give the side of the pictures")
    if text is not None and (text_vocab < 1 or text_len < 1):
        raise ValueError(f"text needs text_vocab and text_len, got {text_vocab} and {text_len}")

    maker = ExampleBuilder(
        data=data, source=source, image_size=image_size, text=text, text_vocab=text_vocab, text_len=text_len,
        bpe_dropout=bpe_dropout, with_labels=with_labels,
    )  # fmt: skip
    order = grain.MapDataset.range(len(source)).shuffle(seed=data.seed).repeat()
    if data.num_workers == 0:
        batches = _Share(order.map_with_index(maker), data.batch_size, wanted)
        batches = batches.batch(len(wanted), drop_remainder=True)
        return ThreadedBatches(batches, start=start, threads=data.num_threads, prefetch=data.prefetch)

    def rows_of(step: int) -> tuple[list[int], list[int]]:
        positions = [step * data.batch_size + r for r in wanted]
        return positions, [order[position] for position in positions]

    workers = min(data.num_workers, len(wanted))
    return ProcessBatches(
        maker, rows_of, start=start, batch=len(wanted), workers=workers, prefetch=data.prefetch
    )


def eval_batch(
    data: config.DataConfig,
    source: Dataset | CodesDataset,
    rows: int | range,
    *,
    image_size: int,
    text: TextTokenizer | None = None,
    text_vocab: int = 0,
    text_len: int = 0,
    with_labels: bool = False,
) -> dict:
    """The first `rows` rows of a source, or those of a range, the same every time.

    At most as many as the source has. Pictures are cropped to the centre (or squashed, as `data.crop` says);
    row i takes its first caption in the language whose turn it is (i modulo the languages).

    Returns `image` uint8 (B, H, W, 3), or `codes` int32 (B, N) of a source of codes, `caption` list of B str ("" for a
    row without), with text `text` int32 (B, T), with labels `label` int32 (B,), -1 for a row without.
    """
    wanted = range(rows) if isinstance(rows, int) else rows
    wanted = [i for i in wanted if i < len(source)]
    if not wanted:
        raise ValueError(f"no rows to evaluate: asked for {rows} of a source of {len(source)}")
    crop = "none" if data.crop == "none" else "center"
    coded = isinstance(source, CodesDataset)
    shown, captions = [], []
    for i in wanted:
        shown.append(source.row(i)[0] if coded else source.image(i, image_size, crop))
        said = source.captions(i)
        names = [name for name in data.languages if name in said] or list(said)
        captions.append(said[names[i % len(names)]][0] if names else "")
    out = {"codes" if coded else "image": np.stack(shown), "caption": captions}
    if text is not None:
        out["text"] = np.stack([text.encode(c, text_vocab=text_vocab, text_len=text_len) for c in captions])
    if with_labels:
        out["label"] = np.stack([label_array(source, i) for i in wanted])
    return out


class ThreadedBatches(Iterator[HostBatch]):
    """An endless iterator over batches; holds the threads that read ahead. Close it, or use it in a
    `with`."""

    def __init__(self, batches: grain.MapDataset, *, start: int, threads: int, prefetch: int):
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        self._iterator = iter(batches.to_iter_dataset(options))
        self._iterator.set_state({"next_index": start})

    def __next__(self) -> HostBatch:
        return next(self._iterator)

    def close(self) -> None:
        """Stops reading ahead; threads end with the batch that they are at. Closing twice is fine."""
        self._iterator.close()

    def __enter__(self) -> ThreadedBatches:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Share(grain.MapDataset):
    """Of each batch of a stream only some rows. Positions stay those of the whole stream."""

    def __init__(self, stream: grain.MapDataset, batch: int, rows: list[int]):
        super().__init__(stream)
        self._batch, self._rows = batch, rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch * len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, len(self._rows))
        return self._parent[step * self._batch + self._rows[row]]
