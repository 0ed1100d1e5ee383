"""Detection metrics and their uncertainty, as fractions, from scores that are larger for OOD.

ID is the positive class of FPR95. Arrays of several scores are (M, images): a row for each method
or seed, the same images in all rows.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

from dlsr.errors import UserError

TPR = 0.95
DRAWS = 2000


def auroc(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Return the chance that an OOD image scores above an ID image; ties count by half."""
    id_scores, ood_scores = _checked(id_scores, ood_scores)
    labels = np.repeat([0, 1], [len(id_scores), len(ood_scores)])
    return float(roc_auc_score(labels, np.concatenate([id_scores, ood_scores])))


def fpr95(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Return the share of OOD accepted as ID at the threshold that accepts 95 % of ID."""
    id_scores, ood_scores = _checked(id_scores, ood_scores)
    threshold = np.quantile(id_scores, TPR, method="inverted_cdf")
    return float((ood_scores <= threshold).mean())


def aupr_out(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Return the average precision with OOD as the positive class."""
    id_scores, ood_scores = _checked(id_scores, ood_scores)
    labels = np.repeat([0, 1], [len(id_scores), len(ood_scores)])
    return float(average_precision_score(labels, np.concatenate([id_scores, ood_scores])))


def aupr_in(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Return the average precision with ID as the positive class."""
    id_scores, ood_scores = _checked(id_scores, ood_scores)
    return aupr_out(-ood_scores, -id_scores)


METRICS = {metric.__name__: metric for metric in (auroc, fpr95, aupr_in, aupr_out)}


def bootstrap(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], *, draws: int = DRAWS, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return AUROC and FPR95 of each (ID scores, OOD scores) pair under resampled images.

    The pairs are scores of the same images by several methods or seeds. All share every draw, so
    that differences between them are paired. ID and OOD images are drawn apart, so every OOD set
    meets the same draws of ID. Each metric's array is (pairs, draws).
    """
    pairs = [_checked(*pair) for pair in pairs]
    sizes = {(len(id_scores), len(ood_scores)) for id_scores, ood_scores in pairs}
    if len(sizes) != 1:
        raise UserError(f"Scores of {sizes} images were given; pairs need the same images.")
    ((n_id, n_ood),) = sizes
    ranked = []  # sorted once, so that a draw costs sums over counts and no sorting
    for id_scores, ood_scores in pairs:
        order = np.argsort(id_scores, kind="stable")
        sides = [np.searchsorted(id_scores[order], ood_scores, s) for s in ("left", "right")]
        ranked.append((order, *sides, id_scores[order], ood_scores))
    picks = [(np.random.default_rng([seed, i]), n) for i, n in enumerate((n_id, n_ood))]
    values = {name: np.empty((len(pairs), draws)) for name in ("auroc", "fpr95")}
    for draw in range(draws):
        drawn = (np.bincount(pick.integers(n, size=n), minlength=n) for pick, n in picks)
        v, w = (times.astype(float) for times in drawn)
        for row, (order, below, up_to, ordered, ood_scores) in enumerate(ranked):
            counts = np.concatenate([[0.0], np.cumsum(v[order])])
            rightly = w @ (counts[below] + counts[up_to]) / 2
            threshold = ordered[np.searchsorted(counts[1:], TPR * n_id - 1e-9)]
            values["auroc"][row, draw] = rightly / (n_id * n_ood)
            values["fpr95"][row, draw] = w @ (ood_scores <= threshold) / n_ood
    return values


def interval(values: np.ndarray, *, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of bootstrap values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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


def paired_bootstrap(
    id_scores: np.ndarray, ood: Mapping[str, np.ndarray], *, draws: int = DRAWS, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return AUROC and FPR95 under resampled images; each array is (M, sets, draws).

    ``id_scores`` are (M, n_id), and each OOD set's name leads to (M, n_ood). All scores share
    every draw and all sets the draws of ID, so differences along the first axis are paired, and
    the mean over the second has the spread of the mean AUROC.
    """
    of_sets = [
        bootstrap(list(zip(id_scores, scores, strict=True)), draws=draws, seed=seed)
        for scores in ood.values()
    ]
    return {name: np.stack([values[name] for values in of_sets], axis=1) for name in of_sets[0]}


def _checked(id_scores, ood_scores) -> tuple[np.ndarray, np.ndarray]:
    arrays = np.asarray(id_scores), np.asarray(ood_scores)
    for name, scores in zip(("ID", "OOD"), arrays, strict=True):
        if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
            raise UserError(
                f"{name} scores of shape {scores.shape} were given, empty or with NaN or infinite "
                "ones; a list of finite numbers is needed."
            )
    return arrays
