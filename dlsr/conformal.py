"""P-values of OOD scores from familiar images alone, and what may be decided by them.

A p-value is the share of familiar images, the image itself among them, that score at least as high
as it does. Where familiar and new images are exchangeable, few of the new ones get a small one.
Sources: cross-conformal prediction (Vovk 2015), false discoveries among conformal p-values (Bates
et al. 2023), betting against exchangeability (Vovk et al. 2021).
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence

import numpy as np
from scipy.stats import false_discovery_control

from dlsr.errors import UserError


def assign_folds(n: int, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each of n images, (n,) int64 in 0..min(folds, n)-1, drawn by ``seed``.

    The folds' sizes differ by one image at most.
    """
    return np.random.RandomState(seed).permutation(n).astype(np.int64) % min(folds, n)


def cross_conformal(scores: Sequence[np.ndarray], held_out: Sequence[np.ndarray]) -> np.ndarray:
    """Return the p-values of N images, (N,) float64.

    ``scores[f]`` are their scores, (N,), by the model of fold f, and ``held_out[f]`` those of the
    familiar images that this model was not fitted on. With n familiar images in all folds, p is
    (1 + the number of them that score at least as high as the image does by the same model) /
    (n + 1). With one fold, P(p <= a) is at most a for every a, where the images are exchangeable;
    with several it is at most about 2 a, and in practice below a.
    """
    counts = np.ones(len(scores[0]), np.int64)
    for by_model, familiar in zip(scores, held_out, strict=True):
        counts += len(familiar) - np.searchsorted(np.sort(familiar), by_model, side="left")
    return counts / (1 + sum(map(len, held_out)))


def flag_limit(n: int, rate: float) -> float:
    """Return the largest p-value of n familiar images that is at most ``rate``; 0 if none is."""
    steps = np.arange(n + 2) / (n + 1)
    return float(steps[np.searchsorted(steps, rate, side="right") - 1])


def benjamini_hochberg(p: np.ndarray, q: float) -> np.ndarray:
    """Return which of N images, (N,) bool, are called OOD at a false discovery rate of ``q``.

    Of the images that are called OOD, a share of at most ``q`` is familiar on average over many
    draws. Raises `UserError` unless ``q`` is in (0, 1).
    """
    return false_discovery_control(p) <= checked_rate(q, "q")


def fewest_discoveries(n: int, images: int, q: float) -> int:
    """Return how many of so many images must have the smallest p-value for the first discovery.

    It is more than ``images`` where n familiar images can support no discovery at rate ``q``.
    """
    return max(1, int(np.ceil(images / ((n + 1) * q) - 1e-9)))


def checked_rate(rate: float, name: str) -> float:
    """Return a rate; raise `UserError` with its name unless it is in (0, 1)."""
    if not 0 < rate < 1:
        raise UserError(f"{rate} was given as {name}; it is between 0 and 1, such as 0.05.")
    return rate


def stream_p_values(scores: np.ndarray, familiar: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Return the smoothed p-values, (N,), of images that come one after the other.

    Each of the ``scores``, (N,), is compared with those of ``familiar`` images, (n,), that the
    detector was not fitted on, and with all images of the stream before it. Ties are broken at
    random by ``seed``. As long as all are exchangeable, the p-values are independent and uniform.
    """
    known, p = np.sort(familiar).tolist(), np.empty(len(scores))
    for i, u in enumerate(np.random.RandomState(seed).rand(len(scores))):
        below, upto = bisect_left(known, scores[i]), bisect_right(known, scores[i])
        p[i] = (len(known) - upto + u * (upto - below + 1)) / (len(known) + 1)
        insort(known, float(scores[i]))
    return p


def stream_alarm(
    p: np.ndarray, *, threshold: float = 100.0, jump: float = 0.01
) -> tuple[int | None, np.ndarray]:
    """Return the first image at which a stream has become OOD, or None, and all wealths, (N,).

    ``p`` are `stream_p_values`. The wealth is a conformal martingale that starts at 1: it bets on
    small p-values by e p^(e - 1) for e of 1, which is no bet, 0.6 and 0.2, and at every image a
    share ``jump`` of it is divided among the three anew. While familiar images come, it ever
    reaches ``threshold`` with a probability of at most 1 / threshold. Raises `UserError` unless
    the threshold is above 1 and ``jump`` in (0, 1).
    """
    if threshold <= 1 or not 0 < jump < 1:
        raise UserError(f"threshold={threshold} and jump={jump} were given; see `stream_alarm`.")
    bets, wealth = np.array([1.0, 0.6, 0.2]), np.full(3, 1 / 3)
    wealths, least = np.empty(len(p)), np.finfo(float).tiny
    for i, value in enumerate(np.maximum(p, least)):
        wealth = (1 - jump) * wealth + jump * wealth.mean()
        wealth = np.minimum(wealth * bets * value ** (bets - 1), 1e300)
        wealths[i] = wealth.sum()
    over = np.flatnonzero(wealths >= threshold)
    return (int(over[0]) if len(over) else None), wealths
