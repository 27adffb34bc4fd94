"""Weights of the networks that judge pictures, from npz files."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from dalle_jax.importers.formats.zips import check_inflated_size


def read_npz(path: str | Path, want: str) -> dict[str, np.ndarray]:
    """The arrays of an npz file by name. want: what the messages ask for.

    Raises FileNotFoundError, or ValueError for a file that is not whole or not npz; nothing in it is run.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights {path}; {want}")
    try:
        check_inflated_size(Path(path))
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (
        OSError, ValueError, EOFError, AttributeError, MemoryError, zipfile.BadZipFile, zlib.error
    ) as error:  # fmt: skip
        raise ValueError(f"{path} is not a whole npz file of weights ({error}); {want}") from None
