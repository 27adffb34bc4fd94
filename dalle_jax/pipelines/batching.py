"""Rows through a compiled function in batches of one size, so that it compiles once; progress output."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

ProgressFn = Callable[[int, int], None]  # (done, total)
_T = TypeVar("_T")


class ProgressPrinter:
    """A `ProgressFn` that prints `name 120/400` to standard error, at most every two seconds and at the end."""

    def __init__(self, name: str):
        self._name, self._printed = name, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._printed > 2 or done == total:
            self._printed = now
            print(f"{self._name} {done}/{total}", file=sys.stderr, flush=True)


def pad_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """Pad `rows` to `count` rows with copies of the last one."""
    missing = count - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows


def map_batches(
    fn: Callable[..., jax.Array],
    arrays: tuple[np.ndarray, ...],
    batch_size: int,
    progress: ProgressFn | None = None,
) -> np.ndarray:
    """Apply `fn` to `batch_size` rows of all `arrays` at a time and concatenate the results.

    Args:
        fn: takes arrays of `batch_size` rows and returns one.
        arrays: at least one row each, all with the same number of rows. The last batch is padded.
        batch_size: rows per call.
        progress: called with the number of rows done and of all rows after each batch.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"Expected batch_size of at least 1, got {batch_size}.")
    count, results = len(arrays[0]), []
    for start in range(0, count, batch_size):
        batch = [rows[start : start + batch_size] for rows in arrays]
        result = fn(*(jnp.asarray(pad_rows(rows, batch_size)) for rows in batch))
        results.append(np.asarray(result)[: len(batch[0])])
        if progress:
            progress(min(start + batch_size, count), count)
    return np.concatenate(results)


def chunked(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Yield lists of `size` consecutive items; the last list may be shorter."""
    chunk: list[_T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
