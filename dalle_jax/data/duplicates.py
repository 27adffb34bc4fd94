"""Evaluation pictures that training has as well: the same file, or the same picture stored another way.

Near copies are found by a perceptual hash: the signs of the lowest frequencies of a 32 x 32 grey picture about their
median (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions"). Pictures whose hashes and
mean colours are close are then compared pixel by pixel at that size. T training and E evaluation pictures; 24 bytes
are kept of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dalle_jax.data.images import BadImageError, crop_and_resize, decode_image
from dalle_jax.data.sources.dataset import Dataset, StoredDataset

THUMBNAIL_SIDE = 32  # pixels of the pictures that are compared
HASH_BITS = 6  # of 63 that may differ for two pictures to be compared
MAX_RMS = 12.0  # root mean square of the difference of two pictures, of 255, below which they are one
_COMPARED = 16  # training pictures compared with an evaluation picture at most, the closest hashes first
_CHUNK = 2**20  # training hashes looked at together


@dataclass(frozen=True)
class Duplicate:
    """Picture `eval` of the evaluation split shows what picture `train` of the training split shows."""

    eval: int
    train: int
    exact: bool  # the same bytes
    bits: int  # of the hashes that differ
    difference: float  # root mean square at 32 x 32, of 255


class ImagePool:
    """The stored pictures of several sources, one source after the other."""

    def __init__(self, sources: Sequence[Dataset]):
        """sources: a mixture counts as its parts. Drawn scenes have no stored pictures and are left out."""
        parts = [part for source in sources for part in getattr(source, "parts", (source,))]
        self._parts = [part for part in parts if isinstance(part, StoredDataset)]
        self._ends = np.cumsum([len(part) for part in self._parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._parts else 0

    def _place(self, i: int) -> tuple[StoredDataset, int]:
        part = int(np.searchsorted(self._ends, i, side="right"))
        return self._parts[part], i - int(self._ends[part]) + len(self._parts[part])

    def stored(self, i: int) -> bytes | np.ndarray:
        """Picture i: a file's bytes, or uint8 (H, W, 3). Raises BadImage for one that does not decode."""
        part, row = self._place(i)
        return part.stored(row)

    def name(self, i: int) -> str:
        part, row = self._place(i)
        return part.name(row)


def find_duplicates(
    train: ImagePool,
    evaluation: ImagePool,
    *,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[Duplicate]:
    """The training pictures that each evaluation picture is: all that have its bytes, and of those that are nearly
    the same the 16 closest. In order of the evaluation pictures, then the closest first.

    Reads and decodes every picture once; those that do not decode are left out. Costs T times E comparisons of
    hashes: about a second for a million pictures and a thousand.
    """
    total = len(train) + len(evaluation)
    marks_T = _marks(train, threads, progress, 0, total)
    marks_E = _marks(evaluation, threads, progress, len(train), total)
    order_T = np.argsort(marks_T[:, 0], kind="stable")
    sorted_T = marks_T[order_T, 0]
    found = []
    for i, own in enumerate(marks_E):
        if (digest := own[0]) == 0:
            continue
        first, end = (int(np.searchsorted(sorted_T, digest, side)) for side in ("left", "right"))
        same = [int(row) for row in order_T[first:end]]
        found += [Duplicate(i, row, True, 0, 0.0) for row in same]
        picture, near = None, []
        for bits, row in _close(marks_T, own):
            if row in same:
                continue
            picture = thumbnail(evaluation.stored(i)) if picture is None else picture
            difference = _rms(picture, thumbnail(train.stored(row)))
            if difference < MAX_RMS:
                near.append(Duplicate(i, row, False, bits, difference))
        found += sorted(near, key=lambda d: d.difference)
    return found


def perceptual_hash(picture_SS3: np.ndarray) -> int:
    """63 bits of a picture, uint8 (32, 32, 3): whether each low frequency is above the median of them."""
    if picture_SS3.shape != (THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3) or picture_SS3.dtype != np.uint8:
        raise ValueError(
            f"want uint8 ({THUMBNAIL_SIDE}, {THUMBNAIL_SIDE}, 3), got {picture_SS3.dtype} {picture_SS3.shape}"
        )
    grey_SS = picture_SS3.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    low = (
        (_COSINES @ grey_SS @ _COSINES.T).reshape(-1)[1:].round()
    )  # the first is the mean; no rounding errors
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big") >> 1


def _cosines(count: int) -> np.ndarray:
    """The first `count` vectors of the discrete cosine transform (II), (count, SIDE)."""
    k, n = np.arange(count)[:, None], np.arange(THUMBNAIL_SIDE)[None]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * THUMBNAIL_SIDE)).astype(np.float32)


_COSINES = _cosines(8)


def _marks(
    rows: ImagePool, threads: int, progress: Callable[[int, int], None] | None, done: int, total: int
) -> np.ndarray:
    """Digest of the bytes, perceptual hash and mean colour of each picture, uint64 (N, 3); zeros for one that
    cannot be used."""

    def one(i: int) -> tuple[int, int, int]:
        try:
            data = rows.stored(i)
        except BadImageError:
            return 0, 0, 0
        raw = data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()
        digest = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")
        picture = thumbnail(data)
        mean = sum(int(m) << 16 * k for k, m in enumerate(picture.mean(axis=(0, 1)).round()))
        return max(1, digest), perceptual_hash(picture), mean

    marks = np.zeros((len(rows), 3), np.uint64)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(rows), 1024):  # so that the pool does not hold an answer for every row
            stretch = range(start, min(start + 1024, len(rows)))
            marks[start : stretch.stop] = list(pool.map(one, stretch))
            if progress is not None:
                progress(done + stretch.stop, total)
    return marks


def _close(marks_T: np.ndarray, own: np.ndarray) -> Iterator[tuple[int, int]]:
    """Bits that differ, and row, of the training pictures whose hashes are closest."""
    near: list[tuple[int, int]] = []
    for start in range(0, len(marks_T), _CHUNK):
        chunk = marks_T[start : start + _CHUNK]
        bits = np.bitwise_count(chunk[:, 1] ^ own[1])
        rows = np.flatnonzero((bits <= HASH_BITS) & (chunk[:, 0] != 0))
        apart = [np.abs(_channel(chunk[rows, 2], k) - _channel(own[2], k)) for k in range(3)]
        rows = rows[
            np.max(apart, axis=0) <= np.sqrt(3) * MAX_RMS + 1
        ]  # farther, and DIFFERENCE is out of reach
        near += [
            (int(bits[row]), start + int(row))
            for row in rows[np.argsort(bits[rows], kind="stable")][:_COMPARED]
        ]
    yield from sorted(near)[:_COMPARED]


def _channel(mean: np.ndarray, k: int) -> np.ndarray:
    return ((mean >> np.uint64(16 * k)) & np.uint64(0xFFFF)).astype(np.int64)


def thumbnail(data: bytes | np.ndarray, side: int = THUMBNAIL_SIDE) -> np.ndarray:
    """The whole picture, squashed to a square: uint8 (side, side, 3)."""
    return (crop_and_resize if isinstance(data, np.ndarray) else decode_image)(data, side, crop="none")


def _rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.square(a.astype(np.float32) - b.astype(np.float32)).mean()))
