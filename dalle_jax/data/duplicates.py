"""Evaluation images that the training split also has: the same file, or the same image stored in another way.

A perceptual hash finds near copies: the signs of the lowest frequencies of a 32 x 32 gray image about their median
(Zauner 2010, "Implementation and benchmarking of perceptual image hash functions"). Images with close hashes and mean
colors are then compared pixel by pixel at that size. T training and E evaluation images, S side of a thumbnail; 24
bytes are kept of each image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dalle_jax.data.images import BadImageError, crop_and_resize, decode_image
from dalle_jax.data.sources import Dataset, StoredDataset

THUMBNAIL_SIDE = 32  # pixels of the compared images
MAX_HASH_BITS = 6  # of 63 that may differ for two images to be compared
MAX_RMS = 12.0  # two images are one below this root mean square difference, of 255
_MAX_COMPARED = 16  # training images compared with an evaluation image, those with the closest hashes
_CHUNK = 2**20  # training hashes compared at once

Progress = Callable[[int, int], None]  # receives the number of images done and of all


@dataclass(frozen=True)
class Duplicate:
    """Image `eval` of the evaluation split shows what image `train` of the training split shows."""

    eval: int
    train: int
    exact: bool  # the same bytes
    bits: int  # of the hashes that differ
    difference: float  # root mean square at 32 x 32, of 255


class ImagePool:
    """The stored images of several sources, one source after another."""

    def __init__(self, sources: Sequence[Dataset]):
        """Join the sources; a mixture counts as its parts, scenes have no stored images and are left out."""
        parts = [part for source in sources for part in source.parts]
        self._parts = [part for part in parts if isinstance(part, StoredDataset)]
        self._ends = np.cumsum([len(part) for part in self._parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._parts else 0

    def _locate(self, i: int) -> tuple[StoredDataset, int]:
        part = int(np.searchsorted(self._ends, i, side="right"))
        return self._parts[part], i - int(self._ends[part]) + len(self._parts[part])

    def stored_image(self, i: int) -> bytes | np.ndarray:
        """Return image i: a file's bytes, or uint8 (H, W, 3). Raises BadImageError if it does not decode."""
        part, row = self._locate(i)
        return part.stored_image(row)

    def name(self, i: int) -> str:
        """Return the name of image i in its source."""
        part, row = self._locate(i)
        return part.name(row)


def find_duplicates(
    train: ImagePool,
    evaluation: ImagePool,
    *,
    threads: int = 2,
    progress: Progress | None = None,
) -> list[Duplicate]:
    """Find the training images that equal an evaluation image.

    Every image is read and decoded once. The cost is T times E comparisons of hashes: about a second for a million
    images and a thousand.

    Args:
      train: Images of the training split.
      evaluation: Images of the evaluation split.
      threads: Threads that read and decode.
      progress: Called with the number of images read and of all.

    Returns:
      For each evaluation image all training images with its bytes, then of the near copies the 16 closest, closest
      first. Images that do not decode are left out.
    """
    total = len(train) + len(evaluation)
    hashes_T3 = _hash_images(train, threads, progress, 0, total)
    hashes_E3 = _hash_images(evaluation, threads, progress, len(train), total)
    order_T = np.argsort(hashes_T3[:, 0], kind="stable")
    sorted_T = hashes_T3[order_T, 0]
    duplicates = []
    for i, hashes_3 in enumerate(hashes_E3):
        if (digest := hashes_3[0]) == 0:
            continue
        first, end = (int(np.searchsorted(sorted_T, digest, side)) for side in ("left", "right"))
        exact = [int(row) for row in order_T[first:end]]
        duplicates += [Duplicate(i, row, True, 0, 0.0) for row in exact]
        image, near = None, []
        for bits, row in _nearest(hashes_T3, hashes_3):
            if row in exact:
                continue
            image = thumbnail(evaluation.stored_image(i)) if image is None else image
            difference = _rms(image, thumbnail(train.stored_image(row)))
            if difference < MAX_RMS:
                near.append(Duplicate(i, row, False, bits, difference))
        duplicates += sorted(near, key=lambda d: d.difference)
    return duplicates


def perceptual_hash(image_SS3: np.ndarray) -> int:
    """Return 63 bits of an image, uint8 (32, 32, 3): whether each low frequency is above their median."""
    if image_SS3.shape != (THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3) or image_SS3.dtype != np.uint8:
        raise ValueError(
            f"Expected uint8 ({THUMBNAIL_SIDE}, {THUMBNAIL_SIDE}, 3), got {image_SS3.dtype} {image_SS3.shape}."
        )
    gray_SS = image_SS3.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    # The first frequency is the mean. Rounding removes differences between BLAS libraries.
    low = (_COSINES @ gray_SS @ _COSINES.T).reshape(-1)[1:].round()
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big") >> 1


def _cosine_basis(count: int) -> np.ndarray:
    """Return the first `count` vectors of the discrete cosine transform (II), (count, S)."""
    k, n = np.arange(count)[:, None], np.arange(THUMBNAIL_SIDE)[None]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * THUMBNAIL_SIDE)).astype(np.float32)


_COSINES = _cosine_basis(8)


def _hash_images(
    images: ImagePool, threads: int, progress: Progress | None, done: int, total: int
) -> np.ndarray:
    """Return the digest of the bytes, the perceptual hash and the mean color of each image.

    Returns:
      uint64 (N, 3); zeros for an image that cannot be used.
    """

    def hash_image(i: int) -> tuple[int, int, int]:
        try:
            data = images.stored_image(i)
        except BadImageError:
            return 0, 0, 0
        raw = data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()
        digest = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")
        image = thumbnail(data)
        mean = sum(int(m) << 16 * k for k, m in enumerate(image.mean(axis=(0, 1)).round()))
        return max(1, digest), perceptual_hash(image), mean

    hashes = np.zeros((len(images), 3), np.uint64)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(images), 1024):  # bounds the results that the pool holds
            rows = range(start, min(start + 1024, len(images)))
            hashes[start : rows.stop] = list(pool.map(hash_image, rows))
            if progress is not None:
                progress(done + rows.stop, total)
    return hashes


def _nearest(hashes_T3: np.ndarray, hashes_3: np.ndarray) -> list[tuple[int, int]]:
    """Return the differing bits and the row of the training images with the closest hashes, closest first."""
    nearest: list[tuple[int, int]] = []
    for start in range(0, len(hashes_T3), _CHUNK):
        chunk = hashes_T3[start : start + _CHUNK]
        bits = np.bitwise_count(chunk[:, 1] ^ hashes_3[1])
        rows = np.flatnonzero((bits <= MAX_HASH_BITS) & (chunk[:, 0] != 0))
        distances = [np.abs(_channel(chunk[rows, 2], k) - _channel(hashes_3[2], k)) for k in range(3)]
        # With a larger distance of the means the root mean square cannot be below MAX_RMS.
        rows = rows[np.max(distances, axis=0) <= np.sqrt(3) * MAX_RMS + 1]
        closest = rows[np.argsort(bits[rows], kind="stable")][:_MAX_COMPARED]
        nearest += [(int(bits[row]), start + int(row)) for row in closest]
    return sorted(nearest)[:_MAX_COMPARED]


def _channel(mean: np.ndarray, k: int) -> np.ndarray:
    return ((mean >> np.uint64(16 * k)) & np.uint64(0xFFFF)).astype(np.int64)


def thumbnail(data: bytes | np.ndarray, side: int = THUMBNAIL_SIDE) -> np.ndarray:
    """Resize a whole image to a square without keeping its aspect ratio.

    Args:
      data: The bytes of an image file, or uint8 (H, W, 3).
      side: Side of the result, pixels.

    Returns:
      uint8 (side, side, 3).
    """
    if isinstance(data, bytes):
        return decode_image(data, side, crop="none")
    return crop_and_resize(data, side, crop="none")


def _rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.square(a.astype(np.float32) - b.astype(np.float32)).mean()))
