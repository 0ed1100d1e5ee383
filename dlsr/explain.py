"""Why a detector finds an image strange: which layers, where in it, beside which familiar images.

A heat map is the squared Mahalanobis distance of every position to one Gaussian of all positions
of familiar images. Its highest position lay in a pasted patch in 90 of 100 textures, on which it
was chosen before a Gaussian of each position and the nearest familiar position, but only in 76 of
100 scenes; chance is 8 (``benchmarks/heat_map.py``).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from sklearn.preprocessing import normalize
from torch import nn
from tqdm import tqdm

from dlsr.baselines import Score, checked, fit_gaussian, nearest
from dlsr.data import INPUT_SIZE, ImageSet
from dlsr.encoders import FrozenEncoder
from dlsr.features import layer_slices, pick_device, read_batches

GRID = 14  # positions of a heat map, down and across
FAMILIAR = 300  # images whose positions are fitted to


def layer_shares(settings: dict, arrays: dict, z0: np.ndarray) -> np.ndarray | None:
    """Return the share of each layer in the scores of z0, (N, M); an image's shares sum to 1.

    ``settings`` and ``arrays`` are a detector's; a method but gaussian and knn gives None.
    """
    known = {name: arrays[name] for name in ("location", "precision", "vectors") if name in arrays}
    split = {"gaussian": gaussian_parts, "knn": partial(knn_parts, k=settings.get("k"))}
    if settings["method"] not in split:
        return None
    parts = split[settings["method"]](z0, channels=settings["channels"], **known)
    return parts / np.maximum(parts.sum(axis=1, keepdims=True), 1e-12)


def gaussian_parts(
    z0: np.ndarray, *, location: np.ndarray, precision: np.ndarray, channels: Sequence[int]
) -> np.ndarray:
    """Return what each layer adds to a Gaussian's score, (N, M); the sum is the score.

    The Gaussian is that of `dlsr.baselines.gaussian_score`. The difference from the mean is turned
    into c uncorrelated numbers of variance 1, each as close to one feature as that is possible,
    and a layer has the squares of its own (Garthwaite and Koch 2016). So no part is negative, no
    order of the layers is assumed, and a familiar image has about a layer's width there.
    """
    spread = np.sqrt(np.diag(np.linalg.inv(precision)))
    values, vectors = np.linalg.eigh(precision * np.outer(spread, spread))
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    difference = checked(z0, len(location)) - location
    return _by_layer((difference / spread) @ root, channels)


def knn_parts(
    z0: np.ndarray, *, vectors: np.ndarray, k: int, channels: Sequence[int]
) -> np.ndarray:
    """Return what each layer adds to the square of `dlsr.baselines.knn_score`, (N, M)."""
    _, rows = nearest(z0, vectors, k=min(k, len(vectors)))
    return _by_layer(normalize(z0) - vectors[rows[:, -1]], channels)


def _by_layer(x: np.ndarray, channels: Sequence[int]) -> np.ndarray:
    return np.stack([(x[:, s] ** 2).sum(axis=1) for s in layer_slices(channels)], axis=1)


def position_vectors(
    encoder: FrozenEncoder, images: ImageSet, *, chain: Sequence[tuple] = (INPUT_SIZE,),
    maps: int = 2, device: str | None = None, batch_size: int = 16, progress: bool = True,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Yield the encoder's last maps, batch by batch, (n, 14, 14, c) float32.

    ``maps`` of them, two of EfficientNet with 14x14 and 7x7 positions, are resampled to 14x14 and
    stacked. ``chain`` is that of `dlsr.extract`. Raises `UserError` for an unreadable image.
    """
    encoder, options = encoder.to(pick_device(device)), {"mode": "bilinear", "antialias": True}
    batches = read_batches(images, chain, batch_size)
    total = -(-len(images) // batch_size)
    for rows, pixels in tqdm(batches, "heat maps", total, unit="batch", disable=not progress):
        for row, image in zip(rows, pixels, strict=True):
            if image is None:
                images.image(row)  # raises what is wrong with it
        with torch.inference_mode():
            x = torch.from_numpy(np.stack(pixels)).to(encoder.mean.device)
            found = [m.float() for m in encoder.maps(x)[-maps:]]
            found = [nn.functional.interpolate(m, (GRID, GRID), **options) for m in found]
            yield torch.cat(found, dim=1).permute(0, 2, 3, 1).cpu().numpy()


def sample_positions(
    batches: Iterator[np.ndarray], images: int, *, n: int = 10_000, seed: int = 0
) -> np.ndarray:
    """Return about n vectors, the same number of each of so many images, (images, each, c)."""
    draws, each = np.random.default_rng(seed), min(GRID**2, -(-n // images))
    flat = (vectors for batch in batches for vectors in batch.reshape(len(batch), GRID**2, -1))
    return np.stack([vectors[draws.permutation(GRID**2)[:each]] for vectors in flat])


def fit_positions(vectors: np.ndarray) -> Score:
    """Return the score of positions from those of familiar images, (images, each, c).

    A Gaussian is fitted on four fifths of the images. The score's unit is the value that 1 % of
    the positions of the others exceed; two images are the least.
    """
    held_out = max(1, len(vectors) // 5)
    gaussian = fit_gaussian(vectors[held_out:].reshape(-1, vectors.shape[-1]))
    unit = np.quantile(gaussian(vectors[:held_out].reshape(-1, vectors.shape[-1])), 0.99)
    return lambda x: gaussian(x) / unit


def heat_maps(batches: Iterator[np.ndarray], score: Callable) -> np.ndarray:
    """Return how strange every position is by `fit_positions`, (N, 14, 14)."""
    maps = [score(x.reshape(-1, x.shape[-1])).reshape(x.shape[:3]) for x in batches]
    return np.concatenate(maps)


def explained(detector, encoder, features, familiar, at: np.ndarray, usual: np.ndarray) -> dict:
    """Return what `dlsr.report.write_report` shows of the rows ``at`` of features, by its names.

    ``familiar`` are features of images that the detector was fitted on, and ``usual`` the rows of
    images that it calls ID, whose mean share of each layer is ``typical``.
    """
    z0, order = features.z0(), np.argsort(at)  # a pack is read quickest in its order
    vectors = partial(position_vectors, encoder)
    few = np.sort(np.random.default_rng(0).permutation(len(familiar))[:FAMILIAR])
    positions = sample_positions(vectors(familiar.images.take(few)), len(few))
    heat = heat_maps(vectors(features.images.take(at[order])), fit_positions(positions))
    shares = layer_shares(detector.settings_, detector.arrays_, z0)
    apart, rows = nearest(z0[at], normalize(familiar.z0()), k=min(3, len(familiar)))
    found = {"familiar": familiar.images, "nearest": (1 - apart**2 / 2, rows)}  # the cosines
    found["heat"] = heat[np.argsort(order)]
    if shares is not None:
        typical = shares[usual].mean(axis=0) if len(usual) else None
        found |= {"shares": shares[at], "typical": typical}
    return found
