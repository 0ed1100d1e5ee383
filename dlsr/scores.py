"""OOD scores from z0 and its reconstruction; a larger score means more OOD.

z0 and reconstructions are (N, c) float32; ``channels`` are the widths of the M layers in z0.
"""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray

from dlsr.errors import UserError
from dlsr.features import layer_slices


def mse(z0: ndarray, reconstruction: ndarray) -> ndarray:
    """Return the mean squared error over all c numbers, (N,) (the paper's MSE)."""
    return ((z0 - reconstruction) ** 2).mean(axis=1)


def mse_by_layer(z0: ndarray, reconstruction: ndarray, channels: Sequence[int]) -> ndarray:
    """Return the mean squared error of each layer, (N, M)."""
    return np.stack([mse(z0[:, s], reconstruction[:, s]) for s in layer_slices(channels)], axis=1)


def mfsim(
    z0: ndarray, reconstruction: ndarray, channels: Sequence[int], *,
    layers: str | Sequence[int] = "2..M",
) -> ndarray:  # fmt: skip
    """Return minus the mean cosine similarity over layers, (N,) (the paper's MFsim).

    ``layers`` are ``"all"``, as the paper says; ``"2..M"``, since the released code's list of
    slices lacks its leading 0 and so leaves out layer 1; or the numbers of layers, counted from 1.
    Where there is only one layer, ``"2..M"`` takes it. Raises `UserError` for a missing layer.
    """
    every = range(1, len(channels) + 1)
    if isinstance(layers, str):
        layers = {"all": every, "2..M": every[1:] or every}.get(layers, [layers])
    if not set(layers) <= set(every) or not len(layers):
        known = f"'all', '2..M' or numbers from 1 to {len(every)}"
        raise UserError(f"layers={[*layers]} was given; it is {known}.")
    by_layer = mfsim_by_layer(z0, reconstruction, channels)
    return by_layer[:, [m - 1 for m in layers]].mean(axis=1)


def mfsim_by_layer(z0: ndarray, reconstruction: ndarray, channels: Sequence[int]) -> ndarray:
    """Return minus the cosine similarity of each layer, (N, M); 0 where a vector is all zeros."""
    columns = []
    for layer in layer_slices(channels):
        a, b = z0[:, layer], reconstruction[:, layer]
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        columns.append(-(a * b).sum(axis=1) / np.maximum(norms, 1e-8))
    return np.stack(columns, axis=1)


def lr(z0: ndarray, first: ndarray, last: ndarray) -> ndarray:
    """Return the MSE under the first epoch's network minus that under the last one's, (N,).

    This is the paper's LR with its printed sign. ``first`` and ``last`` are the reconstructions.
    """
    return mse(z0, first) - mse(z0, last)
