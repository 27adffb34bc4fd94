"""Zip and npz archives from outside: the directory is bounded before it is parsed, entries before they are inflated."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

_MAX_DIRECTORY = 1 << 23  # bytes; an entry takes 46 and its name: over 80,000 arrays
_MAX_INFLATED = 1 << 28  # bytes that inflated entries may take whatever the size of the file
_MAX_RATIO = 16  # and further times the size of the file


class _CappedFile(io.FileIO):
    """A file of which zipfile can read a bounded number of bytes at once."""

    def read(self, size: int | None = -1) -> bytes:
        bounded = size is not None and 0 <= size <= _MAX_DIRECTORY
        data = super().read(size if bounded else _MAX_DIRECTORY + 1) or b""
        if len(data) > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"Expected a directory of at most {_MAX_DIRECTORY} bytes")
        return data


def read_zip_directory(path: str | os.PathLike) -> dict[str, zipfile.ZipInfo]:
    """Read the directory of a zip archive: its entries by name.

    Raises:
      zipfile.BadZipFile: The archive is damaged, or its directory is too large or has a name twice.
    """
    try:
        with _CappedFile(path) as file, zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if len(entries) < len(archive.infolist()):
                raise ValueError("Expected each name once in its directory")
            return entries
    except (EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise zipfile.BadZipFile(str(error)[:200]) from None


def read_npz(
    path: str | os.PathLike, hint: str, names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """Read the arrays of an npz file; nothing in the file is executed.

    Args:
      path: The file.
      hint: The last sentence of error messages: the file to use.
      names: The arrays to read, as far as the file has them; None reads all.

    Returns:
      The arrays by name.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: The file is not a whole npz file of numbers, or its arrays are far larger than the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected an npz file, got no file {path}. {hint}")
    try:
        _check_inflated_size(path)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if names is None or name in names}
    except ValueError:  # NumPy's message advises allow_pickle=True, which would execute the file
        raise ValueError(f"Expected an npz file of numbers, got {path} with other values. {hint}") from None
    except (OSError, EOFError, AttributeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"Expected a whole npz file, got {path} ({error}). {hint}") from None


def list_npz(path: str | os.PathLike, hint: str) -> list[str]:
    """Return the names of the arrays of an npz file. Raises what `read_npz` raises."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected an npz file, got no file {path}. {hint}")
    try:
        return [name.removesuffix(".npy") for name in read_zip_directory(path)]
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"Expected a whole npz file, got {path} ({error}). {hint}") from None


def _check_inflated_size(path: str | os.PathLike) -> None:
    """Raise zipfile.BadZipFile if a small file would become huge.

    zipfile reads no more of an entry than its directory states.
    """
    size = sum(entry.file_size for entry in read_zip_directory(path).values())
    allowed = _MAX_INFLATED + _MAX_RATIO * os.path.getsize(path)
    if size > allowed:
        raise zipfile.BadZipFile(f"Expected at most {allowed} bytes when inflated, got {size}")
