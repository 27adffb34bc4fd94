"""Inception score (Salimans et al. 2016, 1606.03498, 4): exp of the mean over images of KL(p(y|x) || p(y)).

p(y|x) are the 1,008 probabilities of the classifier of the Inception of 2015, without its bias as in the published
code. The set is cut into consecutive parts, each with its own p(y); the score is the mean over parts, beside it their
standard deviation. Only sums are kept, in float64. R rows, C classes, S parts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NUM_SPLITS = 10


class ScoreSums(NamedTuple):
    """Sums of each part, float64: images, sum_y p log p, and p."""

    count_S: np.ndarray
    negative_entropy_S: np.ndarray
    p_SC: np.ndarray


def init_score_sums(classes: int, parts: int = NUM_SPLITS) -> ScoreSums:
    """Return the sums of no images."""
    return ScoreSums(np.zeros(parts), np.zeros(parts), np.zeros((parts, classes)))


def update_score_sums(sums: ScoreSums, logits_RC: np.ndarray, first: int, total: int) -> ScoreSums:
    """Add the rows `first`, `first + 1`, ... of a set of `total`.

    Args:
        sums: of the rows before.
        logits_RC: float (R, C).
        first: index of the first row.
        total: rows of the whole set.

    Raises:
        ValueError: logits of a row, which the message names, are not finite, or rows are beyond the set.
    """
    logits_RC = np.asarray(logits_RC, np.float64)
    bad = np.flatnonzero(~np.isfinite(logits_RC).all(axis=1))
    if bad.size:
        raise ValueError(f"Expected finite logits, got others in row {first + bad[0]}. Check that image.")
    if first + len(logits_RC) > total:
        raise ValueError(
            f"Expected rows in [0, {total}), the rows of the set, got {first} to {first + len(logits_RC) - 1}."
        )
    part_R = (first + np.arange(len(logits_RC))) * len(sums.count_S) // total
    log_p_RC = logits_RC - logits_RC.max(axis=1, keepdims=True)
    log_p_RC -= np.log(np.exp(log_p_RC).sum(axis=1, keepdims=True))
    p_RC = np.exp(log_p_RC)
    count_S, negative_S, p_SC = (array.copy() for array in sums)
    np.add.at(count_S, part_R, 1)
    np.add.at(negative_S, part_R, (p_RC * log_p_RC).sum(axis=1))
    np.add.at(p_SC, part_R, p_RC)
    return ScoreSums(count_S, negative_S, p_SC)


def inception_score(sums: ScoreSums) -> tuple[float, float]:
    """Return mean and standard deviation over the parts. Raises ValueError for a part without images."""
    if not sums.count_S.all():
        raise ValueError(
            f"Expected at least {len(sums.count_S)} images for an Inception score in as many parts, got "
            f"{int(sums.count_S.sum())}."
        )
    p_SC = sums.p_SC / sums.count_S[:, None]
    log_p_SC = np.log(np.where(p_SC > 0, p_SC, 1.0))
    score_S = np.exp(sums.negative_entropy_S / sums.count_S - (p_SC * log_p_SC).sum(axis=1))
    return float(score_S.mean()), float(score_S.std())
