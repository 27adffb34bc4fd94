"""Records of tfrecord files by position, without TensorFlow.

A record is its length (8 bytes, little-endian), a checksum of those (4), the bytes, a checksum of them (4). The file
is walked once, from length to length; after that any record is one read.
"""

from __future__ import annotations

import os
import struct
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_MASK = 0xA282EAD8  # added to a checksum after turning it by 15 bits


class TfRecords:
    """The records of several files, one after the other; any number of threads may read."""

    def __init__(self, files: Sequence[tuple[str | os.PathLike, int, int]]):
        """files: path, records to skip, records to take after those (-1: all) of each. Raises ValueError, naming
        the file, for one that is damaged or too short, FileNotFoundError for one that is missing."""
        self._paths = [Path(path) for path, _, _ in files]
        self._open()
        where = []
        for number, (path, skip, take) in enumerate(files):
            places = _index(Path(path))
            wanted = places[skip:] if take < 0 else places[skip : skip + take]
            if take >= 0 and len(wanted) != take:
                raise ValueError(f"{path} has {len(places)} records, want {skip + take}; copy it again")
            where += [(number, *place) for place in wanted]
        self._where = np.array(where, np.int64).reshape(-1, 3)

    def _open(self) -> None:
        self._files: list[int] = []
        weakref.finalize(self, _close, self._files)
        for path in self._paths:
            self._files.append(os.open(path, os.O_RDONLY))

    def __getstate__(self) -> dict[str, Any]:
        return {"_paths": self._paths, "_where": self._where}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, i: int) -> bytes:
        number, at, size = (int(x) for x in self._where[i])
        return os.pread(self._files[number], size, at)


def _index(path: Path) -> list[tuple[int, int]]:
    """Where each record begins and its bytes."""
    found, end = [], path.stat().st_size
    with open(path, "rb") as file:
        while head := file.read(12):
            (size, check) = struct.unpack("<QI", head) if len(head) == 12 else (0, -1)
            at = file.tell()
            if check != masked_crc(head[:8]) or at + size + 4 > end:
                raise ValueError(
                    f"{path} is damaged or cut short at byte {at - len(head)}, in record {len(found)}; copy it again"
                )
            found.append((at, size))
            file.seek(at + size + 4)
    return found


def masked_crc(data: bytes) -> int:
    """The checksum of tfrecord files: CRC-32C (Castagnoli), turned and shifted."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + _MASK) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _entry(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)  # the polynomial, bits reversed
    return byte


_TABLE = [_entry(byte) for byte in range(256)]


def _close(files: list[int]) -> None:
    while files:
        os.close(files.pop())
