"""Baselines on the same frozen features: nearest neighbours and one Gaussian.

Each is fitted on ID vectors, (N, c), by a function that returns the score: a function from other
vectors, (N, c), to (N,) float32, larger for OOD. What was learned stands in its ``keywords``.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from dlsr.errors import UserError
from dlsr.features import check_finite

Score = Callable[[np.ndarray], np.ndarray]


def fit_knn(x: np.ndarray, *, k: int = 50) -> Score:
    """Return `knn_score` with the ID vectors ``x``, (N, c), as neighbours."""
    x = checked(x)
    if not 1 <= k <= len(x):
        raise UserError(f"k={k} was given for {len(x)} vectors; choose 1 to {len(x)}.")
    return partial(knn_score, vectors=normalize(x), k=k)


def knn_score(x: np.ndarray, *, vectors: np.ndarray, k: int) -> np.ndarray:
    """Return the distance to the k-th nearest vector, (N,), all of length 1 (Sun et al. 2022).

    ``vectors``, (n, c), have length 1 already; ``x``, (N, c), is scaled to it.
    """
    distances, _ = nearest(x, vectors, k=k)
    return distances[:, -1].astype(np.float32)


def nearest(x: np.ndarray, vectors: np.ndarray, *, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances to the k nearest vectors, the nearest first, and their rows, (N, k)."""
    # Brute force works through the vectors in blocks: no (N, n) matrix is made.
    neighbours = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(vectors)
    return neighbours.kneighbors(normalize(checked(x, vectors.shape[1])))


def fit_gaussian(x: np.ndarray) -> Score:
    """Return `gaussian_score` with mean and covariance of the ID vectors ``x``, (N, c).

    The covariance is shrunk by Ledoit and Wolf's formula, in float64: z0's own is nearly singular.
    """
    gaussian = LedoitWolf().fit(checked(x).astype(np.float64))
    return partial(gaussian_score, location=gaussian.location_, precision=gaussian.precision_)


def gaussian_score(x: np.ndarray, *, location: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Return squared Mahalanobis distances, (N,) (Lee et al. 2018, here without labels).

    ``location`` is (c,), and ``precision``, (c, c), the inverse of the covariance.
    """
    difference = checked(x, len(location)) - location
    # scikit-learn's own `mahalanobis` is many times slower.
    return ((difference @ precision) * difference).sum(axis=1).astype(np.float32)


def checked(x: np.ndarray, width: int = 0) -> np.ndarray:
    """Return vectors as contiguous float32; without a ``width`` they are to be fitted on.

    Raises `UserError` unless ``x`` is (N, c) with c of that width, finite, and has enough rows.
    """
    x, least = np.ascontiguousarray(x, dtype=np.float32), 1 if width else 2
    if x.ndim != 2 or len(x) < least or (width and x.shape[1] != width):
        needed = f"{least} or more of {width or 'c'} numbers each are needed"
        raise UserError(f"Vectors of shape {x.shape} were given; {needed}.")
    return check_finite(x)
