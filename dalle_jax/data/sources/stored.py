"""The base class of sources whose images are stored: replacing, counting and logging rows that cannot be used."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalle_jax.data.images import (
    ANY_SIZE,
    BadImageError,
    Crop,
    ImageLimits,
    check_image_sides,
    crop_and_resize,
    decode_image,
)
from dalle_jax.data.sources.dataset import Captions

EXCLUDED = "excluded"  # cause of a row that `exclude` names
_MAX_LOGGED = 10_000  # records written to the log; the counts have no limit


class ReadErrors(NamedTuple):
    """Rows that one process found to be unusable."""

    causes: dict[int, str]  # row -> cause
    replacements: dict[int, int]  # row -> the row that it shows


class StoredDataset:
    """Rows whose images are stored.

    The constructor of a subclass finds the records, calls `_reject` for each one that cannot be used, then
    `_set_num_rows`. The subclass implements `_read_image`, `_read_captions`, `_row_name`, `_source_name` and
    `_fingerprint_fields`, and `_read_label` if it has labels.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, max_bad_fraction: float, languages: Sequence[str], limits: ImageLimits = ANY_SIZE):
        self._max_bad_fraction, self._languages, self._limits = max_bad_fraction, tuple(languages), limits
        self._rejected: Counter[str] = Counter()  # cause -> records that are not rows
        self._bad_rows: dict[int, str] = {}  # row -> cause
        self._replacements: dict[int, int] = {}
        self._num_excluded = 0  # of the bad rows
        self._num_rows = 0
        self._num_taken = (0, 0)  # bad rows and replacements that take_read_errors has returned
        self._log: Path | None = None
        self._unlogged: list[tuple[str, str]] = []  # name and cause
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process, which logs nothing."""
        with self._lock:
            return {**self.__dict__, "_lock": None, "_log": None, "_unlogged": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
        self._num_taken = (len(self._bad_rows), len(self._replacements))

    # --- implemented by a subclass

    def _read_image(self, row: int) -> bytes | np.ndarray:
        """Return the bytes of an image file, or uint8 (H, W, 3). Raises BadImageError."""
        raise NotImplementedError

    def _read_captions(self, row: int) -> Captions:
        raise NotImplementedError

    def _read_label(self, row: int) -> int | None:
        return None

    def _row_name(self, row: int) -> str:
        raise NotImplementedError

    def _source_name(self) -> str:
        raise NotImplementedError

    def _fingerprint_fields(self) -> dict[str, Any]:
        raise NotImplementedError

    # --- called by a subclass

    def _reject(self, name: str, cause: str) -> None:
        """Count a record that does not become a row."""
        self._rejected[cause] += 1
        if len(self._unlogged) < _MAX_LOGGED:
            self._unlogged.append((name, cause))

    def _set_num_rows(self, rows: int) -> None:
        self._num_rows = rows
        self._check_bad_fraction()

    # --- the protocol Dataset

    @property
    def parts(self) -> Sequence[StoredDataset]:
        return (self,)

    def __len__(self) -> int:
        return self._num_rows

    def image(self, i: int, size: int, crop: Crop, rng: np.random.Generator | None = None) -> np.ndarray:
        n = len(self)
        if not 0 <= i < n:
            raise IndexError(f"Expected a row in [0, {n}), got {i}.")
        for row in (j % n for j in range(i, i + n)):
            if row in self._bad_rows:
                continue
            try:
                image = self._decode(self._read_image(row), size, crop, rng)
            except BadImageError as error:
                self._add_bad_row(row, error.cause)
                continue
            if row != i:
                self._replacements[i] = row
            return image
        raise ValueError(f"No image of {self._source_name()} can be used.{self._format_causes()}")

    def stored_image(self, i: int) -> bytes | np.ndarray:
        """Return the image of row i as it is stored, without replacing it.

        Returns:
          The bytes of an image file, or uint8 (H, W, 3).

        Raises:
          BadImageError: The image does not decode, or the row is excluded.
        """
        if self._bad_rows.get(i) == EXCLUDED:
            raise BadImageError(EXCLUDED, f"{self.name(i)} is excluded")
        data = self._read_image(i)
        self._decode(data, 8, "center", None)
        return data

    def captions(self, i: int) -> Captions:
        return self._read_captions(self._replacements.get(i, i))

    def label(self, i: int) -> int | None:
        return self._read_label(self._replacements.get(i, i))

    def name(self, i: int) -> str:
        return self._row_name(i)

    @property
    def replacements(self) -> dict[int, int]:
        return dict(self._replacements)

    def report(self) -> dict[str, int]:
        return dict(self._rejected + Counter(list(self._bad_rows.values())))

    def log_to(self, path: Path) -> None:
        with self._lock:
            self._log, unlogged, self._unlogged = path, self._unlogged, []
            self._write_log(path, unlogged)

    def fingerprint(self) -> str:
        fields = self._fingerprint_fields()
        if self._num_excluded:
            rows = sorted(row for row, cause in self._bad_rows.items() if cause == EXCLUDED)
            fields["excluded"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
        return json.dumps(fields, ensure_ascii=False)

    def exclude(self, names: Collection[str]) -> None:
        excluded = set(names)
        rows = [row for row in range(len(self)) if self._row_name(row) in excluded] if excluded else []
        if excluded and not rows:
            raise ValueError(
                f"none of the {len(excluded)} names is a record of {self._source_name()}, whose names are like "
                f"{self._row_name(0)!r}. Use the names that `dalle-jax data PATH --duplicates` writes for it."
            )
        if rows and len(rows) == len(self):
            raise ValueError(f"every one of the {len(rows)} rows of {self._source_name()} is excluded.")
        self._num_excluded = len(rows)
        self._bad_rows.update(dict.fromkeys(rows, EXCLUDED))
        self._unlogged += [(self._row_name(row), EXCLUDED) for row in rows]
        for row in reversed(rows):
            after = (row + 1) % len(self)
            while after in self._bad_rows and after not in self._replacements:  # a run of rows across the end
                after = (after + 1) % len(self)
            self._replacements[row] = self._replacements.get(after, after)

    def take_read_errors(self) -> ReadErrors | None:
        rows, replacements = self._num_taken
        self._num_taken = (len(self._bad_rows), len(self._replacements))
        if (rows, replacements) == self._num_taken:
            return None
        return ReadErrors(
            dict(islice(self._bad_rows.items(), rows, None)),
            dict(islice(self._replacements.items(), replacements, None)),
        )

    def add_read_errors(self, errors: ReadErrors) -> None:
        self._replacements.update(errors.replacements)
        for row, cause in errors.causes.items():
            self._add_bad_row(row, cause)

    # --- private

    def _decode(
        self, data: bytes | np.ndarray, size: int, crop: Crop, rng: np.random.Generator | None
    ) -> np.ndarray:
        if not isinstance(data, np.ndarray):
            return decode_image(data, size, crop=crop, rng=rng, limits=self._limits)
        check_image_sides(data.shape[1], data.shape[0], self._limits)
        return crop_and_resize(data, size, crop=crop, rng=rng)

    def _add_bad_row(self, row: int, cause: str) -> None:
        with self._lock:
            if row in self._bad_rows:
                return
            self._bad_rows[row] = cause
            record = (self._row_name(row), cause)
            if self._log is not None:
                self._write_log(self._log, [record])
            elif len(self._unlogged) < _MAX_LOGGED:
                self._unlogged.append(record)
        self._check_bad_fraction()

    @staticmethod
    def _write_log(path: Path, records: list[tuple[str, str]]) -> None:
        """Append the records that the log does not list yet; the log is small, so it is read whole."""
        if not records:
            return
        logged = set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
        lines = dict.fromkeys(json.dumps({"name": name, "cause": cause}) for name, cause in records)
        new = [line for line in lines if line not in logged][: max(0, _MAX_LOGGED - len(logged))]
        if new:
            with open(path, "a", encoding="utf-8") as file:
                file.write("\n".join(new) + "\n")

    def _check_bad_fraction(self) -> None:
        bad = self._rejected.total() + len(self._bad_rows) - self._num_excluded
        total = self._num_rows + self._rejected.total()
        if bad > self._max_bad_fraction * total:
            raise ValueError(
                f"{bad} of {total} records of {self._source_name()} cannot be used. Repair the files or raise "
                f"data.source.max_bad_fraction, now {self._max_bad_fraction:g}.{self._format_causes()}"
            )

    def _format_causes(self) -> str:
        causes = sorted(self.report().items(), key=lambda item: (-item[1], item[0]))
        return "".join(f"\n{count:9d}  {cause}" for cause, count in causes)
