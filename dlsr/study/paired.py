"""Paired comparisons of AUROCs: DeLong's covariance, p-values, and Holm's correction of many."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata


def delong(id_scores: np.ndarray, *ood: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return AUROC, (M,), and its covariance, (M, M), of scores (M, n_id) and (M, n_ood).

    With several OOD sets, AUROC is the unweighted mean over them: they share the ID images, whose
    components are averaged before their covariance is taken, and are independent otherwise.
    Source: DeLong et al., Biometrics 44 (1988), by the midranks of Sun and Xu (2014). The variance
    of a difference a - b is ``covariance[a, a] + covariance[b, b] - 2 * covariance[a, b]``.
    """
    n_id, id_parts, means, covariance = np.shape(id_scores)[1], 0.0, 0.0, 0.0
    for scores in ood:
        pooled, n_ood = rankdata(np.hstack([id_scores, scores]), axis=1), np.shape(scores)[1]
        ood_below = pooled[:, :n_id] - rankdata(id_scores, axis=1)
        shares = (pooled[:, n_id:] - rankdata(scores, axis=1)) / n_id  # rightly ordered pairs
        id_parts = id_parts + (1 - ood_below / n_ood) / len(ood)
        means = means + shares.mean(axis=1) / len(ood)
        covariance = covariance + np.atleast_2d(np.cov(shares)) / n_ood / len(ood) ** 2
    return means, covariance + np.atleast_2d(np.cov(id_parts)) / n_id


def paired_p(difference: float, variance: float) -> float:
    """Return the two-sided p-value of a difference of AUROCs with this variance, by the normal.

    Without variance, as between scores that order all images alike, it is 1 or, if they differ, 0.
    """
    if variance > 0:
        return math.erfc(abs(difference) / math.sqrt(2 * variance))
    return float(difference == 0)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Return p-values adjusted by Holm's step-down method (1979), in the order given."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted
