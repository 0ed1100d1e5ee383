"""Detection metrics and their uncertainty, as fractions, from scores that are larger for OOD.

ID is the positive class of FPR95. Arrays of several scores are (M, images): a row for each method
or seed, the same images in all rows.
"""

import numpy as np
from sklearn.metrics import roc_auc_score

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


METRICS = {"auroc": auroc, "fpr95": fpr95}


def bootstrap(
    id_scores: np.ndarray, ood_scores: np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return AUROC and FPR95, each (M, draws), under resampled images.

    ``id_scores``, (M, n_id), and ``ood_scores``, (M, n_ood), are of the same images by M methods or
    seeds. All share every draw, so that differences between them are paired. ID and OOD images are
    drawn apart, so every OOD set meets the same draws of ID.
    """
    ranked = []  # sorted once, so that a draw costs sums over counts and no sorting
    for pair in zip(id_scores, ood_scores, strict=True):
        on_id, on_ood = _checked(*pair)
        order = np.argsort(on_id, kind="stable")
        sides = [np.searchsorted(on_id[order], on_ood, side) for side in ("left", "right")]
        ranked.append((order, *sides, on_id[order], on_ood))
    sizes = n_id, n_ood = len(on_id), len(on_ood)
    picks = [(np.random.default_rng([seed, i]), n) for i, n in enumerate(sizes)]
    values = {name: np.empty((len(ranked), draws)) for name in METRICS}
    for draw in range(draws):
        drawn = (np.bincount(pick.integers(n, size=n), minlength=n) for pick, n in picks)
        v, w = (times.astype(float) for times in drawn)
        for row, (order, below, up_to, ordered, on_ood) in enumerate(ranked):
            counts = np.concatenate([[0.0], np.cumsum(v[order])])
            rightly = w @ (counts[below] + counts[up_to]) / 2
            threshold = ordered[np.searchsorted(counts[1:], TPR * n_id - 1e-9)]
            values["auroc"][row, draw] = rightly / (n_id * n_ood)
            values["fpr95"][row, draw] = w @ (on_ood <= threshold) / n_ood
    return values


def _checked(id_scores, ood_scores) -> tuple[np.ndarray, np.ndarray]:
    arrays = np.asarray(id_scores), np.asarray(ood_scores)
    for name, scores in zip(("ID", "OOD"), arrays, strict=True):
        if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
            told = f"{name} scores of shape {scores.shape} were given, empty or with NaN or"
            raise UserError(f"{told} infinite ones; a list of finite numbers is needed.")
    return arrays
