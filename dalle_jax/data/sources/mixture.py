"""Rows of several sources, mixed by weight.

Row i belongs to a part by a fixed pattern that repeats every P rows, and is the next row of that part, which
starts again when it is used up. The pattern is the fairest there is (Tijdeman 1980, "The chairman assignment
problem", Discrete Mathematics 32): in the first m rows every part has less than one row more or less than
its share of m. So row i is a function of i, and resuming, processes and shuffling know nothing of mixtures.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle_jax import config
from dalle_jax.data.images import Crop
from dalle_jax.data.sources.dataset import Captions, Dataset, Split

_MOST_ROWS = 2**32 - 1  # of an epoch; the shuffle counts in 32 bits


class MixtureDataset:
    """A train split is as long as it takes to read every row of every part once, rows of the other parts
    repeating meanwhile; an evaluation split ends before the first row that repeats."""

    def __init__(self, mixture: config.MixtureSource, parts: Sequence[Dataset], split: Split):
        """parts: the opened sources of `mixture.parts`, in its order. Raises ValueError if an epoch would
        have 2^32 rows or more."""
        self.parts, self._counts, self._split = tuple(parts), mixture.counts, split
        self._part_P = mixture_pattern(self._counts)
        self._places = [np.flatnonzero(self._part_P == k) for k in range(len(parts))]
        self._turn_P = np.zeros_like(self._part_P)  # how many rows of the same part the pattern has before
        for places in self._places:
            self._turn_P[places] = np.arange(len(places))
        if split == "train":
            self._rows = max(self._index(k, len(part) - 1) + 1 for k, part in enumerate(parts))
        else:
            self._rows = min(self._index(k, len(part)) for k, part in enumerate(parts))
        if self._rows > _MOST_ROWS:
            raise ValueError(
                f"it takes {self._rows} rows of the mixture to read every part once (parts have "
                f"{', '.join(str(len(p)) for p in parts)} rows, weights are {mixture.weights}); want at most "
                f"{_MOST_ROWS}: raise the smallest weights"
            )
        self.classes: tuple[str, ...] = tuple(dict.fromkeys(name for part in parts for name in part.classes))
        number = {name: i for i, name in enumerate(self.classes)}
        self._labels = [[number[name] for name in part.classes] for part in parts]

    def __len__(self) -> int:
        return self._rows

    def locate(self, i: int) -> tuple[int, int]:
        """The part that row i comes from, and its row there."""
        if not 0 <= i < self._rows:
            raise IndexError(f"row {i} of a source of {self._rows}")
        period, at = divmod(i, len(self._part_P))
        part = int(self._part_P[at])
        return part, (period * self._counts[part] + int(self._turn_P[at])) % len(self.parts[part])

    def _index(self, part: int, turn: int) -> int:
        """The row of the mixture that is number `turn` of those of a part."""
        period, at = divmod(turn, self._counts[part])
        return period * len(self._part_P) + int(self._places[part][at])

    def image(self, i: int, size: int, crop: Crop, rng: np.random.Generator | None = None) -> np.ndarray:
        part, row = self.locate(i)
        try:
            return self.parts[part].image(row, size, crop, rng)
        except ValueError as error:  # a share of unusable records, in words of a source by itself
            raise ValueError(f"data.source.parts[{part}]: {error}") from None

    def captions(self, i: int) -> Captions:
        part, row = self.locate(i)
        return self.parts[part].captions(row)

    def label(self, i: int) -> int | None:
        """An index into the classes of all parts; classes of one name are one class."""
        part, row = self.locate(i)
        label = self.parts[part].label(row)
        return None if label is None else self._labels[part][label]

    def name(self, i: int) -> str:
        """What row i is called in its part; a drawn scene has no name."""
        part, row = self.locate(i)
        return f"{self.parts[part].name(row)} of part {part}"

    @property
    def replacements(self) -> dict[int, int]:
        """A broken picture of a part is replaced in each row that shows it, by a row of the same part; left
        out where a short evaluation split has no row of that one."""
        found = {}
        for k, part in enumerate(self.parts):
            for broken, shown in part.replacements.items():
                instead, turn = self._index(k, shown), broken
                while instead < self._rows and (i := self._index(k, turn)) < self._rows:
                    found[i] = instead
                    turn += len(part)
        return found

    def report(self) -> dict[str, int]:
        return dict(sum((Counter(part.report()) for part in self.parts), Counter()))

    def log_to(self, path: Path) -> None:
        for part in self.parts:
            part.log_to(path)

    def take_read_errors(self) -> dict[int, Any] | None:
        """By number of the part."""
        taken = {k: part.take_read_errors() for k, part in enumerate(self.parts)}
        return {k: found for k, found in taken.items() if found is not None} or None

    def add_read_errors(self, findings: dict[int, Any]) -> None:
        for k, found in findings.items():
            self.parts[k].add_read_errors(found)

    def fingerprint(self) -> str:
        parts = [{"rows": len(part), **json.loads(part.fingerprint())} for part in self.parts]
        fields = {"counts": list(self._counts), "parts": parts}
        return json.dumps({"kind": "mixture", "split": self._split, **fields}, ensure_ascii=False)


def mixture_pattern(counts: Sequence[int]) -> np.ndarray:
    """The part of each of P = sum(counts) rows, int32 (P,), with counts[k] of part k; the first m have less
    than one row more or less than m counts[k] / P of each part, for every m."""
    period, slack = sum(counts), max(1, 2 * len(counts) - 2)
    out_P, had = np.zeros(period, np.int32), [0] * len(counts)
    for m in range(1, period + 1):
        behind = [slack * (m * c - period * x) for c, x in zip(counts, had, strict=True)]
        due = [k for k, b in enumerate(behind) if b >= period]  # others have had enough for now
        part = min(due, key=lambda k: (slack * period - period - behind[k]) / counts[k])  # earliest deadline
        out_P[m - 1] = part
        had[part] += 1
    return out_P
