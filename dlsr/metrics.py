"""Detection metrics, as fractions, from scores that are larger for OOD; and their intervals."""

from collections.abc import Callable, Sequence

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from dlsr.datasets import UserError

TPR = 0.95
DRAWS = 2000
LEVEL = 0.95


def auroc(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Chance that an OOD image scores above an ID image; the same whichever class is positive."""
    return float(roc_auc_score(*_labelled(id_scores, ood_scores)))


def fpr95(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Share of OOD accepted as ID at the threshold that accepts 95 % of ID (ID positive)."""
    id_scores, ood_scores = _checked(id_scores, ood_scores)
    threshold = np.quantile(id_scores, TPR, method="inverted_cdf")
    return float((ood_scores <= threshold).mean())


def fpr95_ood_positive(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Share of ID flagged as OOD at the threshold that flags 95 % of OOD (OOD positive)."""
    return fpr95(-np.asarray(ood_scores), -np.asarray(id_scores))


def aupr_out(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Average precision with OOD as the positive class."""
    return float(average_precision_score(*_labelled(id_scores, ood_scores)))


def aupr_in(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Average precision with ID as the positive class."""
    return aupr_out(-np.asarray(ood_scores), -np.asarray(id_scores))


Metric = Callable[[np.ndarray, np.ndarray], float]
METRICS: dict[str, Metric] = {
    "auroc": auroc,
    "fpr95": fpr95,
    "fpr95_ood_positive": fpr95_ood_positive,
    "aupr_in": aupr_in,
    "aupr_out": aupr_out,
}


def bootstrap(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], *, draws: int = DRAWS, seed: int = 0
) -> dict[str, np.ndarray]:
    """AUROC and FPR95 of each (ID scores, OOD scores) pair under resampled images.

    Stratified: ID and OOD are drawn apart, so that every OOD set meets the same draws of ID. The
    pairs are scores of the same images (by several methods or seeds) and share every draw, so
    differences between them are paired. Each metric's array is (len(pairs), draws).
    """
    pairs = [_checked(*pair) for pair in pairs]
    n_id, n_ood = len(pairs[0][0]), len(pairs[0][1])
    if any((len(a), len(b)) != (n_id, n_ood) for a, b in pairs):
        raise UserError("Paired scores need the same images; these have different numbers of them.")
    ranked = [_Ranked(*pair) for pair in pairs]
    id_picks, ood_picks = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    values = {name: np.empty((len(pairs), draws)) for name in ("auroc", "fpr95")}
    for draw in range(draws):
        v = np.bincount(id_picks.integers(n_id, size=n_id), minlength=n_id)
        w = np.bincount(ood_picks.integers(n_ood, size=n_ood), minlength=n_ood)
        for row, scores in enumerate(ranked):
            values["auroc"][row, draw], values["fpr95"][row, draw] = scores.auroc_fpr95(v, w)
    return values


def interval(values: np.ndarray, *, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of bootstrap values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class _Ranked:
    """Scores sorted once, so that a draw costs sums over counts and no sorting."""

    def __init__(self, id_scores: np.ndarray, ood_scores: np.ndarray) -> None:
        self.values, place = np.unique(np.concatenate([id_scores, ood_scores]), return_inverse=True)
        self.id_place, self.ood_place = place[: len(id_scores)], place[len(id_scores) :]

    def auroc_fpr95(self, v: np.ndarray, w: np.ndarray) -> tuple[float, float]:
        """With v, w: how often each ID and OOD image was drawn."""
        size = len(self.values)
        id_count = np.bincount(self.id_place, weights=v, minlength=size)
        ood_count = np.bincount(self.ood_place, weights=w, minlength=size)
        id_up_to = np.cumsum(id_count)
        n_id, n_ood = id_up_to[-1], w.sum()
        auroc = ood_count @ (id_up_to - id_count / 2) / (n_id * n_ood)
        threshold = np.searchsorted(id_up_to, TPR * n_id - 1e-9)
        return auroc, ood_count[: threshold + 1].sum() / n_ood


def _checked(id_scores, ood_scores) -> tuple[np.ndarray, np.ndarray]:
    id_scores, ood_scores = np.asarray(id_scores), np.asarray(ood_scores)
    for name, scores in (("ID", id_scores), ("OOD", ood_scores)):
        if scores.ndim != 1 or len(scores) == 0:
            raise UserError(f"The {name} scores have shape {scores.shape}; a non-empty list is needed.")
        if not np.isfinite(scores).all():
            raise UserError(
                f"{int((~np.isfinite(scores)).sum())} of {len(scores)} {name} scores are NaN or infinite."
            )
    return id_scores, ood_scores


def _labelled(id_scores, ood_scores) -> tuple[np.ndarray, np.ndarray]:
    id_scores, ood_scores = _checked(id_scores, ood_scores)
    return np.repeat([0, 1], [len(id_scores), len(ood_scores)]), np.concatenate([id_scores, ood_scores])
