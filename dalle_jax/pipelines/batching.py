"""Many rows through a compiled function: batches of one size, the last one padded, so that it compiles once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

ProgressFn = Callable[[int, int], None]  # rows done, rows in all


class ProgressPrinter:
    """A `Progress` on standard error, `name 120/400`: at most one line in two seconds, and the last one."""

    def __init__(self, name: str):
        self._name, self._printed = name, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._printed > 2 or done == total:
            self._printed = now
            print(f"{self._name} {done}/{total}", file=sys.stderr, flush=True)


def pad_rows(rows: np.ndarray, batch: int) -> np.ndarray:
    """`rows` up to `batch` of them, the last one repeated."""
    missing = batch - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows


def in_batches(
    fn: Callable[..., jax.Array], rows: tuple[np.ndarray, ...], batch: int, progress: ProgressFn | None = None
) -> np.ndarray:
    """`fn` over the leading axis of `rows`, `batch` rows at a time, the last batch padded."""
    count, found = len(rows[0]), []
    for start in range(0, count, batch):
        here = [r[start : start + batch] for r in rows]
        found.append(np.asarray(fn(*(jnp.asarray(pad_rows(r, batch)) for r in here)))[: len(here[0])])
        if progress:
            progress(min(start + batch, count), count)
    return np.concatenate(found)
