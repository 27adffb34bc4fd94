"""Frechet inception distance (Heusel et al. 2017, 1706.08500): how far two sets of pictures are apart, as the
distance between the normal distributions with the mean and covariance of their Inception features.

    FID = |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

Means and covariances are gathered batch by batch in float64 and merge exactly, so a part may be measured
anywhere. The figure is biased upwards by about 1 / N: compare figures of the same number of pictures only.
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
    """Mean and scatter of `count` rows. mean_D: float64. scatter_DD: float64, the sum over rows of the outer
    product of the row's difference from the mean with itself."""

    count: int
    mean_D: np.ndarray
    scatter_DD: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """float64 (D, D), divided by count - 1. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"the covariance of {self.count} picture; want at least 2 pictures")
        return self.scatter_DD / (self.count - 1)


def feature_stats(rows_ND: np.ndarray) -> FeatureStats:
    """Of one part of the rows. Raises ValueError for no rows, or, naming the row, for one not finite."""
    rows_ND = np.asarray(rows_ND, np.float64)
    if rows_ND.ndim != 2 or not rows_ND.size:
        raise ValueError(f"features are {rows_ND.shape}; want (rows, features), at least one row")
    bad = np.flatnonzero(~np.isfinite(rows_ND).all(axis=1))
    if bad.size:
        raise ValueError(
            f"the features of row {bad[0]} are not finite; look at that picture and at the weights"
        )
    mean_D = rows_ND.mean(axis=0)
    off_ND = rows_ND - mean_D
    return FeatureStats(len(rows_ND), mean_D, off_ND.T @ off_ND)


def merge_stats(a: FeatureStats, b: FeatureStats) -> FeatureStats:
    """Of the rows of both parts together (Chan, Golub and LeVeque 1979: no large sums are subtracted).

    Raises ValueError for parts of different width.
    """
    if a.mean_D.shape != b.mean_D.shape:
        raise ValueError(f"features of {a.mean_D.size} and {b.mean_D.size} columns do not go together")
    count, apart_D = a.count + b.count, b.mean_D - a.mean_D
    scatter_DD = a.scatter_DD + b.scatter_DD + np.outer(apart_D, apart_D) * (a.count * b.count / count)
    return FeatureStats(count, a.mean_D + apart_D * (b.count / count), scatter_DD)


def frechet_distance(
    mean_a_D: np.ndarray, cov_a_DD: np.ndarray, mean_b_D: np.ndarray, cov_b_DD: np.ndarray
) -> float:
    """Squared Frechet (2-Wasserstein) distance of two normal distributions, covariances of any rank; 0 or more.

    With symmetric roots A and B of the covariances, tr (cov_a cov_b)^(1/2) is the sum of the singular values of
    A B: no root of a matrix that is not symmetric, no complex numbers, no term added to the diagonal.
    """
    overlap = np.linalg.svd(_root(cov_a_DD) @ _root(cov_b_DD), compute_uv=False).sum()
    off_D = np.asarray(mean_a_D, np.float64) - mean_b_D
    found = off_D @ off_D + np.trace(cov_a_DD) + np.trace(cov_b_DD) - 2 * overlap
    return max(float(found), 0.0)


def _root(cov_DD: np.ndarray) -> np.ndarray:
    """The symmetric root. Eigenvalues within rounding of zero are zero, as they are for fewer rows than D."""
    values_D, vectors_DD = np.linalg.eigh(np.asarray(cov_DD, np.float64))
    floor = max(values_D[-1], 0.0) * len(values_D) * np.finfo(np.float64).eps
    values_D = np.where(values_D > floor, values_D, 0.0)
    return (vectors_DD * np.sqrt(values_D)) @ vectors_DD.T


def fid(a: FeatureStats, b: FeatureStats) -> float:
    """Frechet distance of two sets of features. Raises ValueError for different widths or fewer than two rows."""
    if a.mean_D.shape != b.mean_D.shape:
        raise ValueError(f"features of {a.mean_D.size} and {b.mean_D.size} columns cannot be compared")
    return frechet_distance(a.mean_D, a.covariance, b.mean_D, b.covariance)


# --- reference statistics -----------------------------------------------------------------------------------


class FIDSettings(NamedTuple):
    """What has to agree for two sets of features to be comparable."""

    weights: str  # fingerprint of the Inception weights
    preprocessing: str  # `inception.PREPROCESSING`
    image_size: int  # side of the pictures before they are resized, pixels


def save_reference(path: str | os.PathLike, found: FeatureStats, settings: FIDSettings) -> None:
    """Writes the statistics of true pictures, whole or not at all: `mean`, `scatter` and `about` (JSON: the
    settings, the number of pictures, a hash of all of it)."""
    about = {"format": _FORMAT, "count": found.count, **settings._asdict()}
    about["hash"] = _hash(found, about)
    write_npz(path, mean=found.mean_D, scatter=found.scatter_DD, about=np.array(json.dumps(about)))


def load_reference(path: str | os.PathLike, settings: FIDSettings) -> FeatureStats:
    """Reads what `save_reference` wrote, for use with features of `settings`.

    Raises FileNotFoundError, or ValueError for a file that is broken or was changed, that was made with other
    settings (naming them), or of fewer than two pictures.
    """
    again = "make it again with `dalle-jax evaluate RUN --fid-weights PATH --fid-save STATS`"
    arrays = read_npz(path, again)
    try:
        about = json.loads(str(arrays["about"]))
        found = FeatureStats(int(about["count"]), arrays["mean"], arrays["scatter"])
        same = about.pop("hash") == _hash(found, about)
        saved = FIDSettings(*(about[name] for name in FIDSettings._fields))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole file of reference statistics ({error}); {again}") from None
    if not same:
        raise ValueError(f"{path} is not what was written: its hash differs; {again}")
    if about["format"] != _FORMAT:
        raise ValueError(f"{path} has format {about['format']}, this version reads {_FORMAT}; {again}")
    for name, want, got in zip(FIDSettings._fields, settings, saved, strict=True):
        if want != got:
            raise ValueError(f"{path} was made with {name} {got!r}, this measure has {want!r}; {again}")
    if found.count < 2:
        raise ValueError(f"{path} is of {found.count} picture; want at least 2; {again}")
    return found


def _hash(found: FeatureStats, about: dict) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for array in (found.mean_D, found.scatter_DD):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
