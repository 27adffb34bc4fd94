"""The protocol of every data source: rows of an image, captions and a class label, by index.

A row index names the same row for as long as the files are unchanged. A row whose image does not decode shows another
row in its place: image, captions and label of the next row whose image decodes. No other row moves, in this run or
after a resume.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from dalle_jax.data.images import Crop

Split = Literal["train", "eval"]
Captions = dict[str, tuple[str, ...]]  # language -> its captions, at least one each


class Dataset(Protocol):
    """Rows by index, 0 to len - 1; any number of threads may read."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the class labels; () for a source without labels."""
        ...

    @property
    def parts(self) -> Sequence[Dataset]:
        """The sources that a mixture reads; of any other source, the source itself."""
        ...

    def __len__(self) -> int: ...

    def image(self, i: int, size: int, crop: Crop, rng: np.random.Generator | None = None) -> np.ndarray:
        """Read the image of row i.

        Args:
          i: Index of the row.
          size: Side of the result, pixels.
          crop: How a square is cut out (`images.decode_image`).
          rng: Random numbers of a random crop.

        Returns:
          uint8 (size, size, 3).

        Raises:
          ValueError: More records are unusable than the source allows.
        """
        ...

    def captions(self, i: int) -> Captions:
        """Return the captions of row i; those of its replacement if `image(i)` found one."""
        ...

    def label(self, i: int) -> int | None:
        """Return the class of row i, an index into `classes`, or None; of a replaced row, its replacement's."""
        ...

    def name(self, i: int) -> str:
        """Return the name of row i in its files, for messages and lists."""
        ...

    @property
    def replacements(self) -> dict[int, int]:
        """Rows whose image did not decode, of those read so far -> the row that each one shows."""
        ...

    def report(self) -> dict[str, int]:
        """Return the number of unusable records found so far, by cause."""
        ...

    def log_to(self, path: Path) -> None:
        """Append unusable records, those known and those found later, to the JSON lines file `path`."""
        ...

    def fingerprint(self) -> str:
        """Return JSON that is equal for two sources if their rows are equal."""
        ...

    def exclude(self, names: Collection[str]) -> None:
        """Replace the rows of these names, like rows whose image does not decode.

        Raises:
          ValueError: No row has one of the names, every row does, or the source stores no records.
        """
        ...

    def take_read_errors(self) -> Any:
        """Return the read errors since the last call, or since the source was unpickled; None if there are none.

        The result is for `add_read_errors` of the source that was pickled for a worker process.
        """
        ...

    def add_read_errors(self, errors: Any) -> None:
        """Count and log the read errors of a worker process.

        Raises:
          ValueError: More records are unusable than the source allows.
        """
        ...
