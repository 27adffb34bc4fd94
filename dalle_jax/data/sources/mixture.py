"""Rows of several sources, mixed by weight.

A fixed pattern that repeats every P rows gives the part of each row: row i is the next row of its part, and a part
that is used up starts again. The pattern is the fairest possible (Tijdeman 1980, "The chairman assignment problem",
Discrete Mathematics 32): in the first m rows, for every m, each part has less than one row more or less than its
fraction of m. Row i is a function of i, so resuming, processes and shuffling need no state of the mixture.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle_jax import config
from dalle_jax.data.images import Crop
from dalle_jax.data.sources.dataset import Captions, Dataset, Split

_MAX_ROWS = 2**32 - 1  # of an epoch; grain's shuffle uses 32-bit indices


class MixtureDataset:
    """A mixture of sources.

    A training split reads every row of every part at least once; shorter parts repeat meanwhile. An evaluation split
    ends before the first row that repeats.
    """

    def __init__(self, mixture: config.MixtureSource, parts: Sequence[Dataset], split: Split):
        """Mix opened sources.

        Args:
          mixture: The configuration.
          parts: The opened sources of `mixture.parts`, in its order.
          split: "train" or "eval".

        Raises:
          ValueError: An epoch would have 2^32 rows or more.
        """
        self._parts, self._counts, self._split = tuple(parts), mixture.counts, split
        self._part_P = mixture_pattern(self._counts)
        self._offsets = [
            np.flatnonzero(self._part_P == k) for k in range(len(parts))
        ]  # of part k in a period
        self._rank_P = np.zeros_like(self._part_P)  # earlier rows of the same part in the period
        for offsets in self._offsets:
            self._rank_P[offsets] = np.arange(len(offsets))
        if split == "train":
            self._num_rows = max(self._index(k, len(part) - 1) + 1 for k, part in enumerate(parts))
        else:
            self._num_rows = min(self._index(k, len(part)) for k, part in enumerate(parts))
        if self._num_rows > _MAX_ROWS:
            raise ValueError(
                f"Expected at most {_MAX_ROWS} rows of the mixture to read every part once, got "
                f"{self._num_rows} (parts "
                f"have {', '.join(str(len(p)) for p in parts)} rows, weights are {mixture.weights}). Raise the "
                "smallest "
                "weights."
            )
        self._classes = tuple(dict.fromkeys(name for part in parts for name in part.classes))
        number = {name: i for i, name in enumerate(self._classes)}
        self._labels = [[number[name] for name in part.classes] for part in parts]

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of all parts; classes of one name are one class."""
        return self._classes

    @property
    def parts(self) -> Sequence[Dataset]:
        return self._parts

    def __len__(self) -> int:
        return self._num_rows

    def locate(self, i: int) -> tuple[int, int]:
        """Return the part of row i and the row of that part."""
        if not 0 <= i < self._num_rows:
            raise IndexError(f"Expected a row in [0, {self._num_rows}), got {i}.")
        period, offset = divmod(i, len(self._part_P))
        part = int(self._part_P[offset])
        return part, (period * self._counts[part] + int(self._rank_P[offset])) % len(self._parts[part])

    def _index(self, part: int, rank: int) -> int:
        """Return the row of the mixture with `rank` earlier rows of the same part."""
        period, offset = divmod(rank, self._counts[part])
        return period * len(self._part_P) + int(self._offsets[part][offset])

    def image(self, i: int, size: int, crop: Crop, rng: np.random.Generator | None = None) -> np.ndarray:
        part, row = self.locate(i)
        try:
            return self._parts[part].image(row, size, crop, rng)
        except ValueError as error:
            raise ValueError(f"data.source.parts[{part}]: {error}") from None

    def captions(self, i: int) -> Captions:
        part, row = self.locate(i)
        return self._parts[part].captions(row)

    def label(self, i: int) -> int | None:
        part, row = self.locate(i)
        label = self._parts[part].label(row)
        return None if label is None else self._labels[part][label]

    def name(self, i: int) -> str:
        part, row = self.locate(i)
        return f"{self._parts[part].name(row)} of part {part}"

    @property
    def replacements(self) -> dict[int, int]:
        """Replaced rows of the parts, for each row of the mixture that shows them.

        A row is left out where the evaluation split is too short to show its replacement.
        """
        rows = {}
        for k, part in enumerate(self._parts):
            for bad_row, replacement in part.replacements.items():
                shown, rank = self._index(k, replacement), bad_row
                while shown < self._num_rows and (i := self._index(k, rank)) < self._num_rows:
                    rows[i] = shown
                    rank += len(part)
        return rows

    def report(self) -> dict[str, int]:
        return dict(sum((Counter(part.report()) for part in self._parts), Counter()))

    def log_to(self, path: Path) -> None:
        for part in self._parts:
            part.log_to(path)

    def fingerprint(self) -> str:
        parts = [{"rows": len(part), **json.loads(part.fingerprint())} for part in self._parts]
        fields = {"counts": list(self._counts), "parts": parts}
        return json.dumps({"kind": "mixture", "split": self._split, **fields}, ensure_ascii=False)

    def exclude(self, names: Collection[str]) -> None:
        raise ValueError("A mixture has no records of its own to exclude. Set `exclude` of its parts.")

    def take_read_errors(self) -> dict[int, Any] | None:
        """Return the read errors of each part, by its number."""
        taken = {k: part.take_read_errors() for k, part in enumerate(self._parts)}
        return {k: errors for k, errors in taken.items() if errors is not None} or None

    def add_read_errors(self, errors: dict[int, Any]) -> None:
        for k, part_errors in errors.items():
            self._parts[k].add_read_errors(part_errors)


def mixture_pattern(counts: Sequence[int]) -> np.ndarray:
    """Return the part of each row of a period of P = sum(counts) rows.

    Args:
      counts: Rows of each part in a period, at least 1 each.

    Returns:
      int32 (P,). For every m, the first m rows have less than one row more or less than m counts[k] / P of part k.
    """
    period, slack = sum(counts), max(1, 2 * len(counts) - 2)
    part_P, used = np.zeros(period, np.int32), [0] * len(counts)
    for m in range(1, period + 1):
        deficits = [slack * (m * c - period * n) for c, n in zip(counts, used, strict=True)]
        eligible = [k for k, d in enumerate(deficits) if d >= period]
        part = min(
            eligible, key=lambda k: (slack * period - period - deficits[k]) / counts[k]
        )  # earliest deadline
        part_P[m - 1] = part
        used[part] += 1
    return part_P
