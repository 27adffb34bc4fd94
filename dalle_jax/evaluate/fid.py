"""Frechet inception distance (Heusel et al. 2017, 1706.08500): the distance of two sets of images, between the normal
distributions with the mean and covariance of their Inception features.

    FID = |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

Means and covariances are accumulated batch by batch in float64 and merge exactly. FID is biased upwards by about 1 / N:
compare only values of the same number of images.
N rows, D features.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import NamedTuple

import numpy as np

from dalle_jax.files.archives import read_npz
from dalle_jax.files.atomic import write_npz

_FORMAT = 1


class FeatureStats(NamedTuple):
    """Mean and scatter of features.

    Attributes:
        count: rows.
        mean_D: float64.
        scatter_DD: float64, the sum over rows of the outer product of the row's deviation from the mean with itself.
    """

    count: int
    mean_D: np.ndarray
    scatter_DD: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """The covariance, float64 (D, D), divided by count - 1. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"Expected at least 2 images for a covariance, got {self.count}.")
        return self.scatter_DD / (self.count - 1)


def feature_stats(rows_ND: np.ndarray) -> FeatureStats:
    """Compute the statistics of features, float (N, D).

    Raises:
        ValueError: there are no rows, or one, which the message names, is not finite.
    """
    rows_ND = np.asarray(rows_ND, np.float64)
    if rows_ND.ndim != 2 or not rows_ND.size:
        raise ValueError(f"Expected features (rows, features), at least one row, got {rows_ND.shape}.")
    bad = np.flatnonzero(~np.isfinite(rows_ND).all(axis=1))
    if bad.size:
        raise ValueError(
            f"Expected finite features, got others in row {bad[0]}. Check that image and the weights."
        )
    mean_D = rows_ND.mean(axis=0)
    deviation_ND = rows_ND - mean_D
    return FeatureStats(len(rows_ND), mean_D, deviation_ND.T @ deviation_ND)


def merge_feature_stats(a: FeatureStats, b: FeatureStats) -> FeatureStats:
    """Merge the statistics of two sets of rows without subtracting large sums (Chan, Golub and LeVeque 1979).

    Raises:
        ValueError: the numbers of features differ.
    """
    if a.mean_D.shape != b.mean_D.shape:
        raise ValueError(
            f"Expected features of as many columns to merge, got {a.mean_D.size} and {b.mean_D.size}."
        )
    count, shift_D = a.count + b.count, b.mean_D - a.mean_D
    scatter_DD = a.scatter_DD + b.scatter_DD + np.outer(shift_D, shift_D) * (a.count * b.count / count)
    return FeatureStats(count, a.mean_D + shift_D * (b.count / count), scatter_DD)


def frechet_distance(
    mean_a_D: np.ndarray, cov_a_DD: np.ndarray, mean_b_D: np.ndarray, cov_b_DD: np.ndarray
) -> float:
    """Compute the squared Frechet (2-Wasserstein) distance of two normal distributions, 0 or more.

    With symmetric roots A and B of the covariances, which may be of any rank, tr (cov_a cov_b)^(1/2) is the sum of the
    singular values of A B. So no root of an asymmetric matrix, no complex number and no term on the diagonal is needed.
    """
    overlap = np.linalg.svd(_root(cov_a_DD) @ _root(cov_b_DD), compute_uv=False).sum()
    shift_D = np.asarray(mean_a_D, np.float64) - mean_b_D
    distance = shift_D @ shift_D + np.trace(cov_a_DD) + np.trace(cov_b_DD) - 2 * overlap
    return max(float(distance), 0.0)


def _root(cov_DD: np.ndarray) -> np.ndarray:
    """The symmetric root. Eigenvalues within rounding of zero count as zero: fewer rows than D have such."""
    values_D, vectors_DD = np.linalg.eigh(np.asarray(cov_DD, np.float64))
    floor = max(values_D[-1], 0.0) * len(values_D) * np.finfo(np.float64).eps
    values_D = np.where(values_D > floor, values_D, 0.0)
    return (vectors_DD * np.sqrt(values_D)) @ vectors_DD.T


def fid(a: FeatureStats, b: FeatureStats) -> float:
    """Compute the FID of two sets of features. Raises ValueError for different widths or fewer than two rows."""
    if a.mean_D.shape != b.mean_D.shape:
        raise ValueError(
            f"Expected features of as many columns to compare, got {a.mean_D.size} and {b.mean_D.size}."
        )
    return frechet_distance(a.mean_D, a.covariance, b.mean_D, b.covariance)


# --- reference statistics -----------------------------------------------------------------------------------


class FIDSettings(NamedTuple):
    """Settings that must agree for two sets of features to be comparable.

    Attributes:
        weights: fingerprint of the Inception weights.
        preprocessing: `inception.PREPROCESSING`.
        image_size: side of the images before they are resized, pixels.
    """

    weights: str
    preprocessing: str
    image_size: int


def save_fid_reference(path: str | os.PathLike, stats: FeatureStats, settings: FIDSettings) -> None:
    """Write the statistics of true images atomically: `mean`, `scatter` and `about` (JSON: the settings, the number of
    images, a hash of all of it)."""
    about = {"format": _FORMAT, "count": stats.count, **settings._asdict()}
    about["hash"] = _hash(stats, about)
    write_npz(path, mean=stats.mean_D, scatter=stats.scatter_DD, about=np.array(json.dumps(about)))


def load_fid_reference(path: str | os.PathLike, settings: FIDSettings) -> FeatureStats:
    """Read what `save_fid_reference` wrote, for comparison with features of `settings`.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is broken or was changed, was made with other settings, which the message names, or of
            fewer than two images.
    """
    again = "Make it again with `dalle-jax evaluate RUN --fid-weights PATH --fid-save STATS`."
    arrays = read_npz(path, again)
    try:
        about = json.loads(str(arrays["about"]))
        stats = FeatureStats(int(about["count"]), arrays["mean"], arrays["scatter"])
        same = about.pop("hash") == _hash(stats, about)
        saved = FIDSettings(*(about[name] for name in FIDSettings._fields))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected a whole file of reference statistics, got {path} ({error}). {again}"
        ) from None
    if not same:
        raise ValueError(f"Expected an unchanged {path}, got one whose hash differs. {again}")
    if about["format"] != _FORMAT:
        raise ValueError(f"Expected format {_FORMAT} of {path}, got {about['format']}. {again}")
    for name, want, got in zip(FIDSettings._fields, settings, saved, strict=True):
        if want != got:
            raise ValueError(f"Expected {path} with {name} {want!r}, got {got!r}. {again}")
    if stats.count < 2:
        raise ValueError(f"Expected at least 2 images in {path}, got {stats.count}. {again}")
    return stats


def _hash(stats: FeatureStats, about: dict) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for array in (stats.mean_D, stats.scatter_DD):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
