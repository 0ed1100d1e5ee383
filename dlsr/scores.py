"""OOD scores from z0 and its reconstruction; larger means more OOD."""

from collections.abc import Sequence

import numpy as np

from dlsr.datasets import UserError
from dlsr.diffusion import Reconstruction, reconstruct
from dlsr.features import layer_slices
from dlsr.training import Trained

FIRST_EPOCH_NOISE = 1_000_003  # added to the seed: LR's two networks have separate draws
SCORES = ("mse", "lr", "mfsim")
FIRST_EPOCH = {"mse": "mse_first_epoch", "mfsim": "mfsim_first_epoch"}  # by the network of epoch 1
LAYER_CHOICES = {"2..M": slice(1, None), "all": slice(None)}  # as released; as printed


def mse(z0: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """Mean squared error over all c numbers, (N,) (paper: MSE)."""
    return ((z0 - reconstruction) ** 2).mean(axis=1)


def mse_by_layer(z0: np.ndarray, reconstruction: np.ndarray, channels: Sequence[int]) -> np.ndarray:
    """Mean squared error of each layer, (N, M)."""
    return np.stack([mse(z0[:, s], reconstruction[:, s]) for s in layer_slices(channels)], axis=1)


def mfsim(
    z0: np.ndarray, reconstruction: np.ndarray, channels: Sequence[int], *, layers: str = "2..M"
) -> np.ndarray:
    """Minus the mean cosine similarity over layers, (N,) (paper: MFsim).

    The paper takes all M layers; the released code's slice list lacks its leading 0 and so scores
    layers 2..M, which is the default here.
    """
    check_choice("mfsim", layers, channels)
    return mfsim_by_layer(z0, reconstruction, channels)[:, LAYER_CHOICES[layers]].mean(axis=1)


def mfsim_by_layer(z0: np.ndarray, reconstruction: np.ndarray, channels: Sequence[int]) -> np.ndarray:
    """Minus the cosine similarity of each layer, (N, M); 0 where a vector is all zeros."""
    return np.stack([-_cosine(z0[:, s], reconstruction[:, s]) for s in layer_slices(channels)], axis=1)


def lr(z0: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """MSE under the first epoch's network minus MSE under the last one's, (N,), as the paper prints it."""
    return mse(z0, first) - mse(z0, last)


def all_scores(
    trained: Trained,
    z0: np.ndarray,
    channels: Sequence[int],
    how: Reconstruction | None = None,
    *,
    seed: int = 0,
    stride_seed: int = 0,
) -> dict[tuple[str, str], np.ndarray]:
    """Every score by (score, layers), where layers is ``all``, ``2..M`` or one layer's number.

    MSE and MFsim stand there under the first epoch's network too (`FIRST_EPOCH`). LR's two networks
    reconstruct with separate noise draws, as in the released code.
    """
    last = reconstruct(trained.network, z0, how, seed=seed, stride_seed=stride_seed)
    first_seed = seed + FIRST_EPOCH_NOISE
    first = reconstruct(trained.first_epoch, z0, how, seed=first_seed, stride_seed=stride_seed)
    by_layer = {
        "mse": mse_by_layer(z0, last, channels),
        "lr": mse_by_layer(z0, first, channels) - mse_by_layer(z0, last, channels),
        "mfsim": mfsim_by_layer(z0, last, channels),
    }
    first_mfsim = mfsim_by_layer(z0, first, channels)
    scores = {("mse", "all"): mse(z0, last), ("lr", "all"): lr(z0, first, last)}
    for layers, chosen in LAYER_CHOICES.items():
        if first_mfsim[:, chosen].shape[1]:
            scores["mfsim", layers] = by_layer["mfsim"][:, chosen].mean(axis=1)
            scores[FIRST_EPOCH["mfsim"], layers] = first_mfsim[:, chosen].mean(axis=1)
    scores[FIRST_EPOCH["mse"], "all"] = mse(z0, first)
    for score, values in by_layer.items():
        scores |= {(score, str(m + 1)): values[:, m] for m in range(len(channels))}
    return {name: values.astype(np.float32) for name, values in scores.items()}


def check_choice(score: str, layers: str, channels: Sequence[int]) -> None:
    """Refuse an unknown score or choice of layers, and 2..M of a single layer."""
    if score not in SCORES:
        raise UserError(f"The score {score!r} is unknown; choose one of {', '.join(SCORES)}.")
    if layers not in LAYER_CHOICES:
        raise UserError(f"layers={layers!r} is unknown; choose one of {', '.join(LAYER_CHOICES)}.")
    if score == "mfsim" and layers == "2..M" and len(channels) < 2:
        raise UserError("MFsim on layers 2..M needs at least two layers; pass layers='all'.")


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / np.maximum(norms, 1e-8)
