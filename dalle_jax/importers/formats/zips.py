"""Zip archives of unknown origin: the directory is bounded before it is parsed, entries before they are inflated."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

_MAX_DIRECTORY = 1 << 23  # bytes; an entry takes 46 and its name: over 80,000 tensors
_INFLATED = (1 << 28, 16)  # bytes that compressed entries may always take, and further times the file's size


class _CappedFile(io.FileIO):
    """A file that zipfile cannot be made to read more of at once."""

    def read(self, size: int = -1) -> bytes:
        data = super().read(size if 0 <= size <= _MAX_DIRECTORY else _MAX_DIRECTORY + 1)
        if len(data) > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"Expected a directory of at most {_MAX_DIRECTORY} bytes")
        return data


def read_directory(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The entries by name. Raises zipfile.BadZipFile for an archive that is damaged or whose directory is too large."""
    try:
        with _CappedFile(path) as file, zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if len(entries) < len(archive.infolist()):
                raise ValueError("Expected each name once in its directory")
            return entries
    except (EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise zipfile.BadZipFile(str(error)[:200]) from None


def check_inflated_size(path: Path) -> None:
    """Raises zipfile.BadZipFile for an archive that a small file would make huge. zipfile reads no more of an entry
    than the directory says."""
    held = sum(entry.file_size for entry in read_directory(path).values())
    allowed = _INFLATED[0] + _INFLATED[1] * os.path.getsize(path)
    if held > allowed:
        raise zipfile.BadZipFile(f"Expected at most {allowed} bytes when inflated, got {held}")
