"""Whether differences between detectors exceed chance: DeLong's covariance, Holm, a paired bootstrap.

Scores are larger for OOD and stand in arrays of (M, images): a row for each of M scores (methods or
seeds) and a column for each image, the same images in all rows. AUROC and its covariance are fractions.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dlsr.datasets import UserError
from dlsr.metrics import DRAWS, bootstrap

ROUNDING = 1e-15  # what the variance of a difference between equal scores may fall short of 0


def delong(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC (M,) and its covariance (M, M), from scores of (M, n_id) and (M, n_ood).

    DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988), by the midranks of Sun and Xu, IEEE Signal
    Processing Letters 21 (2014). The variance of the difference of scores a and b, for `paired_p`, is
    ``covariance[a, a] + covariance[b, b] - 2 * covariance[a, b]``.
    """
    return delong_of_mean({"OOD": (id_scores, ood_scores)})


def delong_of_mean(
    pairs_by_set: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """`delong` of the unweighted mean of AUROC over OOD sets: (M,) and (M, M).

    Each OOD set's name leads to its scores, (M, n_id) and (M, n_ood). All sets share the ID images, in
    the same order, so the ID images' structural components are averaged over the sets before their
    covariance is taken; images of different OOD sets are taken as independent.
    """
    if not pairs_by_set:
        raise UserError("There is no OOD set; at least one is needed.")
    pairs = [_checked(name, *pair) for name, pair in pairs_by_set.items()]
    shapes = [id_scores.shape for id_scores, _ in pairs]
    if len(set(shapes)) > 1:
        raise UserError(
            f"The ID scores have shapes {', '.join(map(str, shapes))}; the OOD sets need the same "
            "methods and ID images."
        )
    id_parts, ood_parts = zip(*(_components(*pair) for pair in pairs), strict=True)
    auroc = np.mean([part.mean(axis=1) for part in ood_parts], axis=0)
    covariance = _covariance_of_mean(np.mean(id_parts, axis=0))
    covariance += sum(map(_covariance_of_mean, ood_parts)) / len(pairs) ** 2
    return auroc, covariance


def paired_p(difference: float, variance: float) -> float:
    """Two-sided p value of a difference of AUROCs with this variance, by the normal distribution.

    Without variance, as between scores that put all images in the same order or that separate them
    perfectly, p is 1 where there is no difference and 0 where there is one.
    """
    if not (math.isfinite(difference) and -ROUNDING <= variance < math.inf):
        raise UserError(f"A difference of {difference} with a variance of {variance} has no p value.")
    if difference == 0:
        return 1.0
    return math.erfc(abs(difference) / math.sqrt(2 * variance)) if variance > 0 else 0.0


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """p values (tests,) adjusted for their number, in the order given.

    Step-down, Scandinavian Journal of Statistics 6 (1979): those below a level hold the chance of any
    false rejection below it, however the tests depend on each other.
    """
    p = _numbers("p values", p_values)
    if p.ndim != 1 or len(p) == 0:
        raise UserError(f"The p values have shape {p.shape}; a non-empty list is needed.")
    if not ((p >= 0) & (p <= 1)).all():
        raise UserError(f"The p values {p} are not all within 0..1.")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def paired_bootstrap(
    id_scores: np.ndarray, ood: Mapping[str, np.ndarray], *, draws: int = DRAWS, seed: int = 0
) -> dict[str, np.ndarray]:
    """AUROC and FPR95 under resampled images; each metric's array is (M, sets, draws).

    ``id_scores`` are (M, n_id), and each OOD set's name in ``ood`` leads to (M, n_ood); sets stand in
    that order. The draws are those of `dlsr.metrics.bootstrap`: all M scores share every draw, so a
    difference along the first axis is paired, and all OOD sets meet the same draws of ID images, so
    the mean over the second axis has the spread of the mean AUROC. `dlsr.metrics.interval` of either
    is its percentile interval.

    OOD sets of the same size share their draws of positions too. That is as good as drawing them apart
    where the images at a position have nothing to do with each other.
    """
    if not ood or draws < 1:
        raise UserError(f"{len(ood)} OOD sets and {draws} draws are given; at least one each is needed.")
    pairs = [_checked(name, id_scores, scores) for name, scores in ood.items()]
    of_sets = [bootstrap(list(zip(*pair, strict=True)), draws=draws, seed=seed) for pair in pairs]
    return {metric: np.stack([values[metric] for values in of_sets], axis=1) for metric in of_sets[0]}


def _components(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DeLong's structural components: each image's share of pairs in the right order, ties by half."""
    n_id, n_ood = id_scores.shape[1], ood_scores.shape[1]
    pooled = _midranks(np.hstack([id_scores, ood_scores]))
    ood_below = pooled[:, :n_id] - _midranks(id_scores)
    id_below = pooled[:, n_id:] - _midranks(ood_scores)
    return 1 - ood_below / n_ood, id_below / n_id


def _midranks(scores: np.ndarray) -> np.ndarray:
    """Ranks from 1 within each row; equal scores have the mean of their ranks."""
    ranks = np.empty(scores.shape)
    for row, values in enumerate(scores):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks[row] = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks


def _covariance_of_mean(parts: np.ndarray) -> np.ndarray:
    """The (M, M) covariance of the means of M rows."""
    n = parts.shape[1]
    return np.atleast_2d(np.cov(parts)) / n


def _checked(name: str, id_scores, ood_scores) -> tuple[np.ndarray, np.ndarray]:
    checked = []
    for part, scores in (("ID", id_scores), (name, ood_scores)):
        scores = _numbers(f"{part} scores", scores)
        if scores.ndim != 2 or len(scores) == 0 or scores.shape[1] < 2:
            raise UserError(
                f"The {part} scores have shape {scores.shape}; "
                "needed are a row for each score and at least two images."
            )
        if not np.isfinite(scores).all():
            raise UserError(
                f"{int((~np.isfinite(scores)).sum())} of {scores.size} {part} scores are NaN or infinite."
            )
        checked.append(scores)
    if len(checked[0]) != len(checked[1]):
        raise UserError(
            f"There are {len(checked[0])} rows of ID scores and {len(checked[1])} of {name} scores; "
            "the same methods are needed."
        )
    return checked[0], checked[1]


def _numbers(what: str, values) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The {what} make no array of numbers ({error}); rows of the same length are needed."
        ) from error
