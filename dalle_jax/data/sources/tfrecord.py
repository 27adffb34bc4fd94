"""Records of tfrecord files by index, without TensorFlow.

A record is its length (8 bytes, little-endian), a checksum of the length (4), the data, and a checksum of the data (4).
Each file is walked once, from length to length; after that a record is one read.
"""

from __future__ import annotations

import os
import struct
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_MASK = 0xA282EAD8  # added to a checksum after a rotation by 15 bits


class TfRecords:
    """The records of several files, one file after the other; any number of threads may read."""

    def __init__(self, files: Sequence[tuple[str | os.PathLike, int, int]]):
        """Index the records.

        Args:
          files: Path, records to skip, and records to take after those (-1: all) of each file.

        Raises:
          ValueError: A file is damaged or too short.
          FileNotFoundError: A file is missing.
        """
        self._paths = [Path(path) for path, _, _ in files]
        self._open()
        index = []
        for number, (path, skip, take) in enumerate(files):
            records = _index_records(Path(path))
            taken = records[skip:] if take < 0 else records[skip : skip + take]
            if take >= 0 and len(taken) != take:
                raise ValueError(
                    f"Expected {skip + take} records in {path}, got {len(records)}. Copy it again."
                )
            index += [(number, *record) for record in taken]
        self._index = np.array(index, np.int64).reshape(-1, 3)  # file, offset, bytes

    def _open(self) -> None:
        self._files: list[int] = []
        weakref.finalize(self, _close_files, self._files)
        for path in self._paths:
            self._files.append(os.open(path, os.O_RDONLY))

    def __getstate__(self) -> dict[str, Any]:
        return {"_paths": self._paths, "_index": self._index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> bytes:
        file, offset, size = (int(x) for x in self._index[i])
        return os.pread(self._files[file], size, offset)


def _index_records(path: Path) -> list[tuple[int, int]]:
    """Return the offset and the bytes of each record."""
    records, end = [], path.stat().st_size
    with open(path, "rb") as file:
        while header := file.read(12):
            size, checksum = struct.unpack("<QI", header) if len(header) == 12 else (0, -1)
            offset = file.tell()
            if checksum != masked_crc(header[:8]) or offset + size + 4 > end:
                raise ValueError(
                    f"{path} is damaged or cut short at byte {offset - len(header)}, in record {len(records)}. Copy it "
                    "again."
                )
            records.append((offset, size))
            file.seek(offset + size + 4)
    return records


def masked_crc(data: bytes) -> int:
    """Return the checksum of tfrecord files: CRC-32C, rotated and shifted by a constant."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + _MASK) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of `data`, uint32."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _table_entry(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)  # the polynomial, bits reversed
    return byte


_TABLE = [_table_entry(byte) for byte in range(256)]


def _close_files(files: list[int]) -> None:
    while files:
        os.close(files.pop())
