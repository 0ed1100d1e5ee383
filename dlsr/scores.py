"""OOD scores from z0 and its reconstruction; a larger score means more OOD.

z0 and reconstructions are (N, c) float32; ``channels`` are the widths of the M layers in z0.
"""

from collections.abc import Sequence

import numpy as np

from dlsr.errors import UserError
from dlsr.features import layer_slices


def mse(z0: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """Return the mean squared error over all c numbers, (N,) (the paper's MSE)."""
    return ((z0 - reconstruction) ** 2).mean(axis=1)


def mse_by_layer(z0: np.ndarray, reconstruction: np.ndarray, channels: Sequence[int]) -> np.ndarray:
    """Return the mean squared error of each layer, (N, M)."""
    layers = layer_slices(channels)
    return np.stack([mse(z0[:, s], reconstruction[:, s]) for s in layers], axis=1)


def mfsim(
    z0: np.ndarray,
    reconstruction: np.ndarray,
    channels: Sequence[int],
    *,
    layers: str | Sequence[int] = "2..M",
) -> np.ndarray:
    """Return minus the mean cosine similarity over layers, (N,) (the paper's MFsim).

    ``layers`` are ``"all"``, as the paper says; ``"2..M"``, since the released code's list of
    slices lacks its leading 0 and so leaves out layer 1; or the numbers of layers, counted from 1.
    Where there is only one layer, ``"2..M"`` takes it. Raises `UserError` for a layer that is not
    there.
    """
    number = len(channels)
    if isinstance(layers, str):
        named = {"all": range(1, number + 1), "2..M": range(min(2, number), number + 1)}
        layers = named.get(layers, [layers])
    if not set(layers) <= set(range(1, number + 1)) or not len(layers):
        raise UserError(
            f"layers={list(layers)} was given; it is 'all', '2..M' or numbers from 1 to {number}."
        )
    by_layer = mfsim_by_layer(z0, reconstruction, channels)
    return by_layer[:, [m - 1 for m in layers]].mean(axis=1)


def mfsim_by_layer(
    z0: np.ndarray, reconstruction: np.ndarray, channels: Sequence[int]
) -> np.ndarray:
    """Return minus the cosine similarity of each layer, (N, M); 0 where a vector is all zeros."""
    layers = layer_slices(channels)
    return np.stack([-_cosine(z0[:, s], reconstruction[:, s]) for s in layers], axis=1)


def lr(z0: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return the MSE under the first epoch's network minus that under the last one's, (N,).

    This is the paper's LR with its printed sign. ``first`` and ``last`` are the two
    reconstructions.
    """
    return mse(z0, first) - mse(z0, last)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / np.maximum(norms, 1e-8)
