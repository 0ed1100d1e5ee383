"""Other scores by a trained LFDN than the paper's three, and denoisers that may take its place.

`Denoised` holds the arrays of one image set under one denoiser. What `error` and the functions
below it return is a score before it is fitted: ``fit(fitted, calibration)`` takes two such sets,
the images that the LFDN was fitted on and held-out ID images, and returns a function from a
`Denoised` to scores, (N,), larger = more OOD. A key, as in ``error(*keys)``, is an `At`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from torch import nn

from dlsr.baselines import fit_gaussian, fit_knn
from dlsr.diffusion import fixed_noise, noise_schedule, one_step, reconstruct
from dlsr.features import layer_slices
from dlsr.lfdn import LFDN
from dlsr.scores import mse_by_layer

DRAWS = 4  # of noise that a score may average over
GAUSSIAN_IMAGES = 10_000  # of the fitted images, whose residuals give a covariance
TINY = 1e-12  # keeps logarithms finite
At = tuple[int, int]  # a timestep, counted from 1, and a draw of noise; draw 0 adds none


class LinearDenoiser(nn.Module):
    """The best linear guess of z0 from z_t if z0 has this mean and covariance Σ: Σ(Σ + s²I)⁻¹.

    Here s² = (1 - alpha_bar) / alpha_bar. It is called as an LFDN is.
    """

    def __init__(self, mean: np.ndarray, covariance: np.ndarray) -> None:
        super().__init__()
        variances, vectors = np.linalg.eigh(covariance)
        content = {"mean": mean, "variances": variances.clip(0), "vectors": vectors}
        for name, values in content.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(values), requires_grad=False))

    @classmethod
    def fit(cls, z0: np.ndarray) -> "LinearDenoiser":
        """Estimate mean and covariance (Ledoit-Wolf in float64) from ID vectors, (N, c)."""
        gaussian = LedoitWolf().fit(z0.astype(np.float64))
        return cls(gaussian.location_, gaussian.covariance_)

    def forward(self, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Predict z0, (N, c), from z_t at 0-based timesteps (N,)."""
        alpha_bar = noise_schedule(z_t.device).double()[t.long()][:, None]
        along = (z_t / alpha_bar.sqrt() - self.mean) @ self.vectors
        shrunk = along * self.variances / (self.variances + (1 - alpha_bar) / alpha_bar)
        return (self.mean + shrunk @ self.vectors.T).float()


def untrained(features: int, *, width: int, blocks: int, seed: int = 0) -> LFDN:
    """Return an LFDN as training starts. Its last layer is zero, so it predicts 0 for any input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LFDN(features, width=width, blocks=blocks).eval().requires_grad_(False)


def predict_noise_free(network: nn.Module, z0: np.ndarray, *, t: int) -> np.ndarray:
    """Return the z0 predicted from sqrt(alpha_bar_t) z0 without noise; t counts from 1.

    ``z0`` and the result are (N, c) float32. The paper has no such score.
    """
    return reconstruct(network, z0, one_step, t=t, noise=torch.zeros(1, z0.shape[1]))


def hidden(network: nn.Module, z0: np.ndarray, *, t: int = 10) -> np.ndarray:
    """Return what the output layers read at t, (N, width); no noise is added.

    A denoiser without output layers returns its prediction instead.
    """
    if not hasattr(network, "out"):
        return predict_noise_free(network, z0, t=t)
    parts: list[np.ndarray] = []
    keep = lambda _, inputs: parts.append(inputs[0].cpu().numpy())  # noqa: E731
    with network.out.register_forward_pre_hook(keep):
        predict_noise_free(network, z0, t=t)
    return np.concatenate(parts)


def fuse(parts: Sequence[Callable], calibration, *, weights=None, logs: bool = True) -> Callable:
    """Return the weighted mean of fitted scores, each in standard deviations of held-out ID images.

    Each of ``parts`` maps a set, such as ``calibration``, to its scores (N,), and so does the
    result. With ``logs`` their logarithms are taken first, which bounds what one far image can do.
    """
    weights = np.ones(len(parts)) if weights is None else np.asarray(weights, dtype=float)

    def values(x) -> np.ndarray:
        scores = np.stack([part(x) for part in parts], axis=1)
        return np.log(np.maximum(scores, TINY)) if logs else scores

    held_out = values(calibration)
    mean, std = held_out.mean(axis=0), held_out.std(axis=0) + TINY
    return lambda x: (values(x) - mean) / std @ (weights / weights.sum())


@dataclass
class Denoised:
    """One image set under one denoiser. An array is computed when it is first needed, and kept.

    ``z0`` is (N, c), ``channels`` are the layers' widths. ``first``, the network after the first
    epoch, is needed by LR alone.
    """

    z0: np.ndarray
    channels: tuple[int, ...]
    network: nn.Module
    first: nn.Module | None = None
    arrays: dict = field(default_factory=dict, repr=False)

    def residual(self, at: At) -> np.ndarray:
        """Return z0 less the z0 predicted at a timestep with a draw of noise, (N, c)."""
        return self.once(("residual", at), lambda: self.z0 - self._predict(*at))

    def predicted(self, at: At) -> np.ndarray:
        """Return the predicted z0, (N, c)."""
        return self.z0 - self.residual(at)

    def errors(self, at: At) -> np.ndarray:
        """Return the mean squared residual of each layer, (N, M)."""
        return mse_by_layer(self.z0, self.predicted(at), self.channels)

    def hidden(self, t: int = 10) -> np.ndarray:
        """Return `hidden` at t, (N, width)."""
        return self.once(("hidden", t), lambda: hidden(self.network, self.z0, t=t))

    def as_paper(self, network: str = "network") -> np.ndarray:
        """Return the reconstruction by the released code's steps from t = 3, (N, c)."""
        noise = fixed_noise(4, self.z0.shape[1], seed=int(network == "first"))
        return self.once(
            network, lambda: reconstruct(getattr(self, network), self.z0, t=3, noise=noise)
        )

    def sample(self) -> "Denoised":
        """Return a seeded pick of `GAUSSIAN_IMAGES` of the images, or all if there are no more."""
        rows = np.sort(np.random.RandomState(0).permutation(len(self.z0))[:GAUSSIAN_IMAGES])
        return self.once("sample", lambda: Denoised(self.z0[rows], self.channels, self.network))

    def _predict(self, t: int, draw: int) -> np.ndarray:
        if draw == 0:
            return predict_noise_free(self.network, self.z0, t=t)
        noise = fixed_noise(DRAWS, self.z0.shape[1])[draw - 1 : draw]
        return reconstruct(self.network, self.z0, one_step, t=t, noise=noise)

    def once(self, name: object, make: Callable):
        """Return what ``make()`` returned when it was first asked for by this name."""
        if name not in self.arrays:
            self.arrays[name] = make()
        return self.arrays[name]


Function = Callable[[Denoised], np.ndarray]
Fit = Callable[[Denoised, Denoised], Function]


def formula(of: Function) -> Fit:
    """Return a score that learns nothing from ID images."""
    return lambda fitted, calibration: of


def error(*keys: At, layers: list[int] | None = None, weights=None) -> Fit:
    """Average squared residuals over timesteps and draws, and over 0-based layers.

    Without ``layers`` all c numbers count alike. ``weights`` are those of the timesteps.
    """

    def at(x: Denoised, key: At) -> np.ndarray:
        if layers is None:
            return (x.residual(key) ** 2).mean(axis=1)
        return x.errors(key)[:, layers].mean(axis=1)

    return formula(lambda x: np.average([at(x, key) for key in keys], axis=0, weights=weights))


def gaussian(*arrays: Function, on: str = "sample") -> Fit:
    """Average squared Mahalanobis distances (Ledoit-Wolf), one Gaussian for each of some arrays.

    They are estimated ``on`` the ``fitted`` images, a ``sample`` of them, or ``calibration`` ones.
    """

    def fit(fitted: Denoised, calibration: Denoised) -> Function:
        known = {"fitted": fitted, "sample": fitted.sample(), "calibration": calibration}[on]
        scores = [(fit_gaussian(array(known)), array) for array in arrays]
        return lambda x: np.mean([score(array(x)) for score, array in scores], axis=0)

    return fit


def residual_gaussian(*keys: At, layers: list[int] | None = None, on: str = "sample") -> Fit:
    """Average the residual's squared Mahalanobis distance over timesteps and draws."""

    def columns(x: Denoised, key: At) -> np.ndarray:
        slices = layer_slices(x.channels)
        chosen = slices if layers is None else [slices[m] for m in layers]
        return np.concatenate([x.residual(key)[:, s] for s in chosen], axis=1)

    return gaussian(*[lambda x, key=key: columns(x, key) for key in keys], on=on)


def neighbours(array: Function, *, k: int = 50, sample: bool = False) -> Fit:
    """Distance to the k-th neighbour by cosine among the fitted images, or a sample of them."""

    def fit(fitted: Denoised, calibration: Denoised) -> Function:
        known = array(fitted.sample() if sample else fitted)
        score = fit_knn(known, k=min(k, len(known)))
        return lambda x: score(array(x))

    return fit


def fused(*fits: Fit, weights=None, logs: bool = True) -> Fit:
    """Fuse several scores by `fuse`; a part that other fusions have too is fitted once."""

    def fit(fitted: Denoised, calibration: Denoised) -> Function:
        def part(one: Fit) -> Function:
            key = ("fitted", one, id(calibration))
            score = fitted.once(key, lambda: one(fitted, calibration))
            return lambda x: x.once(("score", score), lambda: score(x))

        return fuse([*map(part, fits)], calibration, weights=weights, logs=logs)

    return fit
