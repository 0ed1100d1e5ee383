"""Other scores by a trained LFDN than the paper's three, and what may stand in the network's place.

The search goes through `VARIANTS`; each is fitted on ID images alone.
"""

import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from torch import nn

from dlsr.baselines import KNN, Mahalanobis
from dlsr.datasets import UserError
from dlsr.diffusion import Reconstruction, noise_schedule, reconstruct
from dlsr.features import layer_slices
from dlsr.lfdn import LFDN
from dlsr.scores import all_scores, mfsim_by_layer, mse_by_layer
from dlsr.training import Trained

Key = tuple[int, int]  # t, 1-based, and which draw of noise; draw 0 adds none
T_GRID = (1, 3, 10, 25, 50, 100)
GAUSSIAN_IMAGES = 10_000  # of the fitted ones, whose residuals give a covariance


class LinearDenoiser(nn.Module):
    """The best linear guess of z0 from z_t, if z0 has this mean and covariance: Σ(Σ + s²I)⁻¹.

    With s² = (1 - alpha_bar) / alpha_bar; it is called as an LFDN is.
    """

    def __init__(self, mean: np.ndarray, covariance: np.ndarray) -> None:
        super().__init__()
        values, vectors = np.linalg.eigh(covariance)
        for name, content in (("mean", mean), ("variances", values.clip(0)), ("vectors", vectors)):
            self.register_parameter(name, nn.Parameter(torch.tensor(content), requires_grad=False))

    @classmethod
    def fit(cls, z0: np.ndarray) -> "LinearDenoiser":
        """From (N, c) ID vectors, the covariance by Ledoit-Wolf in float64."""
        gaussian = LedoitWolf().fit(z0.astype(np.float64))
        return cls(gaussian.location_, gaussian.covariance_)

    def forward(self, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """(N, c) and (N,) 0-based timesteps -> predicted z0 of (N, c)."""
        alpha_bar = noise_schedule().to(z_t.device).double()[t][:, None]
        along = (z_t / alpha_bar.sqrt() - self.mean) @ self.vectors
        shrunk = along * self.variances / (self.variances + (1 - alpha_bar) / alpha_bar)
        return (self.mean + shrunk @ self.vectors.T).float()


def untrained(features: int, *, width: int, blocks: int, seed: int = 0) -> LFDN:
    """An LFDN as training starts; its last layer is zero, so that it predicts 0 whatever it is given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LFDN(features, width=width, blocks=blocks).eval().requires_grad_(False)


@torch.inference_mode()
def noise_free(network: nn.Module, z0: np.ndarray, *, t: int, batch_size: int = 1024) -> np.ndarray:
    """(N, c): the z0 predicted from sqrt(alpha_bar) z0, no noise added; t is 1-based."""
    device = next(network.parameters()).device
    share = noise_schedule()[t - 1].sqrt()
    parts = []
    for batch in torch.from_numpy(np.ascontiguousarray(z0, dtype=np.float32)).split(batch_size):
        times = torch.full((len(batch),), t - 1, device=device)
        parts.append(network((share * batch).to(device), times).cpu().numpy())
    return np.concatenate(parts) if parts else np.empty_like(z0)


def hidden(network: nn.Module, z0: np.ndarray, *, t: int) -> np.ndarray:
    """(N, width): what a network's last layers read in `noise_free`; what it predicts, if it has none."""
    if not hasattr(network, "out"):
        return noise_free(network, z0, t=t)
    parts: list[np.ndarray] = []
    hook = network.out.register_forward_pre_hook(lambda _, given: parts.append(given[0].cpu().numpy()))
    try:
        noise_free(network, z0, t=t)
    finally:
        hook.remove()
    return np.concatenate(parts)


class Bank:
    """Residuals z0 - x̂0 of one set's images under one denoiser, and what was made of them; each once.

    ``name`` fixes the noise, which is a set's own.
    """

    def __init__(
        self, trained: Trained | nn.Module, z0: np.ndarray, channels: Sequence[int], *, name: str = ""
    ) -> None:
        self.trained = trained if isinstance(trained, Trained) else None
        self.network = trained.network if isinstance(trained, Trained) else trained
        self.z0, self.channels, self.name = z0, tuple(channels), name
        self._kept: dict[Hashable, Any] = {}
        self._plain: dict[Hashable, Any] = {}  # of what no network enters

    def __len__(self) -> int:
        return len(self.z0)

    def under(self, denoiser: nn.Module) -> "Bank":
        """The same images under another denoiser."""
        other = Bank(denoiser, self.z0, self.channels, name=self.name)
        other._plain = self._plain
        return other

    def once(self, name: Hashable, make: Callable[[], Any], *, plain: bool = False) -> Any:
        """What ``make`` gives, made when it is first asked for; ``plain``: no network enters."""
        kept = self._plain if plain else self._kept
        if name not in kept:
            kept[name] = make()
        return kept[name]

    @property
    def sample(self) -> "Bank":
        """A seeded pick of `GAUSSIAN_IMAGES` of the images; all, where there are no more."""
        return self.once("sample", self._sampled)

    def _sampled(self) -> "Bank":
        rows = np.random.RandomState(0).permutation(len(self))[:GAUSSIAN_IMAGES]
        return Bank(self.trained or self.network, self.z0[np.sort(rows)], self.channels, name=self.name)

    def predicted(self, key: Key) -> np.ndarray:
        """(N, c): x̂0 of a timestep and a draw of noise, which is the set's own."""
        return self.z0 - self.residual(key)

    def residual(self, key: Key) -> np.ndarray:
        """(N, c): z0 less x̂0."""
        return self.once(key, lambda: self.z0 - self._denoised(key))

    def _denoised(self, key: Key) -> np.ndarray:
        t, draw = key
        if draw == 0:
            return noise_free(self.network, self.z0, t=t)
        seed = zlib.crc32(f"{self.name} {draw}".encode())
        return reconstruct(self.network, self.z0, Reconstruction("one_step", t=t), seed=seed)

    def layer_errors(self, key: Key) -> np.ndarray:
        """(N, M): the mean squared residual of each layer."""
        return self.once(("errors", key), lambda: mse_by_layer(self.z0, self.predicted(key), self.channels))

    def hidden(self, t: int) -> np.ndarray:
        """(N, width): the network's last hidden activations at t, no noise added."""
        return self.once(("hidden", t), lambda: hidden(self.network, self.z0, t=t))

    @cached_property
    def papers(self) -> Mapping[tuple[str, str], np.ndarray]:
        """The paper's three scores, released steps from n = 3, as everywhere in the book."""
        if self.trained is None:
            raise UserError("The paper's scores need a trained LFDN with its first epoch.")
        return all_scores(self.trained, self.z0, self.channels, seed=zlib.crc32(f"{self.name} 0".encode()))


class Score(Protocol):
    """A label-free score: fitted on ID images, larger = more OOD."""

    def fit(self, fitted: Bank, calibration: Bank) -> "Score":
        """Learn from the images that the LFDN was fitted on, and from others of the same set."""

    def score(self, bank: Bank) -> np.ndarray:
        """(N,)."""

    def cost(self, features: int, parameters: int, fitted: int) -> float:
        """Multiply-adds an image, the encoder's apart; a pass of the network counts its parameters."""


@dataclass
class Papers:
    """One of the paper's scores."""

    score_name: str
    layers: str = "all"

    def fit(self, fitted: Bank, calibration: Bank) -> "Papers":
        return self

    def score(self, bank: Bank) -> np.ndarray:
        return bank.papers[self.score_name, self.layers]

    def cost(self, features: int, parameters: int, fitted: int) -> float:
        return 3 * parameters * (2 if self.score_name == "lr" else 1)


@dataclass
class Errors:
    """Squared residuals, averaged over keys and over layers (None: all features alike).

    ``weights`` of the keys; ``cosine`` takes minus the cosine similarity of x̂0 instead.
    """

    keys: tuple[Key, ...]
    layers: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None
    cosine: bool = False

    def fit(self, fitted: Bank, calibration: Bank) -> "Errors":
        return self

    def score(self, bank: Bank) -> np.ndarray:
        weights = np.asarray(self.weights or [1.0] * len(self.keys))
        parts = np.stack([self._one(bank, key) for key in self.keys])
        return (weights / weights.sum()) @ parts

    def _one(self, bank: Bank, key: Key) -> np.ndarray:
        layers = list(range(len(bank.channels))) if self.layers is None else list(self.layers)
        if self.cosine:
            return mfsim_by_layer(bank.z0, bank.predicted(key), bank.channels)[:, layers].mean(axis=1)
        if self.layers is None:
            return (bank.residual(key) ** 2).mean(axis=1)
        return bank.layer_errors(key)[:, layers].mean(axis=1)

    def cost(self, features: int, parameters: int, fitted: int) -> float:
        return len(self.keys) * parameters


@dataclass
class ResidualGaussian:
    """Squared Mahalanobis distance of the residual from ID residuals, averaged over keys.

    One Gaussian a key, Ledoit-Wolf in float64. ``held_out`` takes the calibration images' residuals
    instead of the fitted images'; ``layers`` those of some layers alone.
    """

    keys: tuple[Key, ...]
    held_out: bool = False
    layers: tuple[int, ...] | None = None

    def fit(self, fitted: Bank, calibration: Bank) -> "ResidualGaussian":
        bank = calibration if self.held_out else fitted.sample
        self.gaussians_ = [
            bank.once(("Gaussian", key, self.layers), lambda key=key: Mahalanobis().fit(self._of(bank, key)))
            for key in self.keys
        ]
        return self

    def score(self, bank: Bank) -> np.ndarray:
        found = [
            self._one(bank, key, gaussian) for key, gaussian in zip(self.keys, self.gaussians_, strict=True)
        ]
        return np.mean(found, axis=0)

    def _one(self, bank: Bank, key: Key, gaussian: Mahalanobis) -> np.ndarray:
        name = ("distance", key, self.layers, self.held_out)
        return bank.once(name, lambda: gaussian.ood_score(self._of(bank, key)))

    def _of(self, bank: Bank, key: Key) -> np.ndarray:
        residual = bank.residual(key)
        if self.layers is None:
            return residual
        slices = layer_slices(bank.channels)
        return np.concatenate([residual[:, slices[m]] for m in self.layers], axis=1)

    def cost(self, features: int, parameters: int, fitted: int) -> float:
        return len(self.keys) * (parameters + features**2)


@dataclass
class ErrorProfile:
    """Mahalanobis distance of the log errors, a number a layer and key, from those of held-out ID images."""

    keys: tuple[Key, ...]

    def fit(self, fitted: Bank, calibration: Bank) -> "ErrorProfile":
        self.gaussian_ = Mahalanobis().fit(self._of(calibration))
        return self

    def score(self, bank: Bank) -> np.ndarray:
        return self.gaussian_.ood_score(self._of(bank))

    def _of(self, bank: Bank) -> np.ndarray:
        return np.log(np.concatenate([bank.layer_errors(key) for key in self.keys], axis=1) + 1e-12)

    def cost(self, features: int, parameters: int, fitted: int) -> float:
        return len(self.keys) * parameters


@dataclass
class CalibratedLayers:
    """Each layer's log error in standard deviations of held-out ID images: their mean, or the largest."""

    keys: tuple[Key, ...]
    largest: bool = False

    def fit(self, fitted: Bank, calibration: Bank) -> "CalibratedLayers":
        errors = self._of(calibration)
        self.mean_, self.std_ = errors.mean(axis=0), errors.std(axis=0) + 1e-12
        return self

    def score(self, bank: Bank) -> np.ndarray:
        standard = (self._of(bank) - self.mean_) / self.std_
        return standard.max(axis=1) if self.largest else standard.mean(axis=1)

    def _of(self, bank: Bank) -> np.ndarray:
        return np.log(np.mean([bank.layer_errors(key) for key in self.keys], axis=0) + 1e-12)

    def cost(self, features: int, parameters: int, fitted: int) -> float:
        return len(self.keys) * parameters


@dataclass
class Neighbours:
    """Distance to the k-th neighbour among fitted images, by cosine (`baselines.KNN`).

    ``of`` z0; or, at the key's t, of x̂0 (``predicted``), of the ``residual``, or of the network's
    ``hidden`` activations. Neighbours of x̂0 and of the residual are among a pick of the images.
    """

    of: str = "z0"
    k: int = 50
    key: Key = (1, 0)

    def fit(self, fitted: Bank, calibration: Bank) -> "Neighbours":
        bank = fitted if self.of in ("z0", "hidden") else fitted.sample
        k = min(self.k, len(bank))
        self.knn_ = bank.once(repr(self), lambda: KNN(k=k).fit(self._of(bank)), plain=self.is_plain)
        return self

    def score(self, bank: Bank) -> np.ndarray:
        return bank.once(repr(self), lambda: self.knn_.ood_score(self._of(bank)), plain=self.is_plain)

    @property
    def is_plain(self) -> bool:
        """Whether no network enters."""
        return self.of == "z0"

    def _of(self, bank: Bank) -> np.ndarray:
        ways = {
            "z0": lambda: bank.z0,
            "predicted": lambda: bank.predicted(self.key),
            "residual": lambda: bank.residual(self.key),
            "hidden": lambda: bank.hidden(self.key[0]),
        }
        return ways[self.of]()

    def cost(self, features: int, parameters: int, fitted: int) -> float:
        return fitted * features + (0 if self.is_plain else parameters)


@dataclass
class HiddenGaussian:
    """Squared Mahalanobis distance of the network's last hidden activations at t, no noise added."""

    t: int = 1

    def fit(self, fitted: Bank, calibration: Bank) -> "HiddenGaussian":
        self.gaussian_ = Mahalanobis().fit(fitted.sample.hidden(self.t))
        return self

    def score(self, bank: Bank) -> np.ndarray:
        return self.gaussian_.ood_score(bank.hidden(self.t))

    def cost(self, features: int, parameters: int, fitted: int) -> float:
        return parameters + features**2


@dataclass
class Gaussian:
    """Squared Mahalanobis distance of z0; no network."""

    is_plain = True

    def fit(self, fitted: Bank, calibration: Bank) -> "Gaussian":
        self.gaussian_ = fitted.once(repr(self), lambda: Mahalanobis().fit(fitted.z0), plain=True)
        return self

    def score(self, bank: Bank) -> np.ndarray:
        return bank.once(repr(self), lambda: self.gaussian_.ood_score(bank.z0), plain=True)

    def cost(self, features: int, parameters: int, fitted: int) -> float:
        return features**2


@dataclass
class Fusion:
    """The mean of several scores, each in standard deviations of held-out ID images.

    ``logs`` takes the logarithm of every score first, which bounds what one far image can do;
    ``weights`` of the parts, else all alike.
    """

    parts: tuple[Any, ...]
    weights: tuple[float, ...] | None = None
    logs: bool = True

    def fit(self, fitted: Bank, calibration: Bank) -> "Fusion":
        self.parts_ = [part.fit(fitted, calibration) for part in self.parts]
        known = [self._scale(part.score(calibration)) for part in self.parts_]
        self.mean_ = np.array([values.mean() for values in known])
        self.std_ = np.array([values.std() + 1e-12 for values in known])
        return self

    def _scale(self, values: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(values, 1e-12)) if self.logs else values

    def score(self, bank: Bank) -> np.ndarray:
        found = np.stack([self._scale(part.score(bank)) for part in self.parts_], axis=1)
        weights = np.asarray(self.weights or [1.0] * len(self.parts))
        return (found - self.mean_) / self.std_ @ (weights / weights.sum())

    def cost(self, features: int, parameters: int, fitted: int) -> float:
        return sum(part.cost(features, parameters, fitted) for part in self.parts)


def without_network(score: Score) -> Score | None:
    """The same score of z0 itself, where it read what the network makes of z0; None if nothing is left.

    Reconstruction errors go; neighbours and Gaussians are then of z0. It is to be fitted under an
    `untrained` network, whose residual is z0.
    """
    parts = score.parts if isinstance(score, Fusion) else (score,)
    weights = (score.weights if isinstance(score, Fusion) else None) or (1.0,) * len(parts)
    kept = [(_of_z0(part), weight) for part, weight in zip(parts, weights, strict=True)]
    kept = [(part, weight) for part, weight in kept if part is not None]
    if not kept:
        return None
    if not isinstance(score, Fusion):
        return kept[0][0]
    return Fusion(tuple(part for part, _ in kept), tuple(weight for _, weight in kept), score.logs)


def _of_z0(part: Score) -> Score | None:
    if isinstance(part, Neighbours):
        return replace(part, of="z0")
    if isinstance(part, HiddenGaussian):
        return Gaussian()
    return part if isinstance(part, Gaussian | ResidualGaussian) else None


@dataclass(frozen=True)
class Variant:
    """One thing that the search tries: what the idea is, the score, and by which LFDN of the study."""

    idea: str
    score: Score
    network: str = "base"


def free(*ts: int) -> tuple[Key, ...]:
    """Keys of these timesteps without noise."""
    return tuple((t, 0) for t in ts)


def noisy(*ts: int, draws: int = 1) -> tuple[Key, ...]:
    """Keys of these timesteps with each draw of noise."""
    return tuple((t, draw) for t in ts for draw in range(1, draws + 1))


def likelihood_weights(ts: Sequence[int]) -> tuple[float, ...]:
    """SNR(t - 1) - SNR(t), the weight of a squared error at t in the variational bound; t at least 2."""
    alpha_bar = noise_schedule().double()
    snr = alpha_bar / (1 - alpha_bar)
    return tuple(float(snr[t - 2] - snr[t - 1]) for t in ts)


_LATE = T_GRID[1:]
_ERROR, _GAUSSIAN, _KNN = Errors(free(10)), ResidualGaussian(free(10)), Neighbours("z0", 50)
_OTHER_T, _NO_NOISE, _COVARIANCE = "one step from another t", "no noise added", "covariance of ID residuals"
_LAYERS, _SMALLER = "single or deeper layers", "a smaller LFDN"
_CALIBRATED, _STANDARDISED = "layers calibrated on held-out ID", "features standardised over the training set"
_AND_KNN, _AND_GAUSSIAN = "fusion with kNN", "fusion with the feature Gaussian"
_TWO = "fusion of two scores of one residual"
_HIDDEN, _HIDDEN_AND = "the LFDN's hidden activations", "fusion with its hidden activations"
_HIDDEN_KNN = Neighbours("hidden", 50, (10, 0))

VARIANTS = {
    "MSE": Variant("the paper's", Papers("mse")),
    "LR": Variant("the paper's", Papers("lr")),
    "MFsim": Variant("the paper's, as released", Papers("mfsim", "2..M")),
    "MFsim, all layers": Variant("the paper's, as printed", Papers("mfsim")),
    **{f"MSE at t={t}": Variant(_OTHER_T, Errors(noisy(t))) for t in T_GRID},
    **{f"MFsim at t={t}": Variant(_OTHER_T, Errors(noisy(t), (1, 2, 3, 4), cosine=True)) for t in (10, 50)},
    "MSE over 6 t": Variant("several t", Errors(noisy(*T_GRID))),
    "MSE at t=10, 4 draws": Variant("several draws of noise", Errors(noisy(10, draws=4))),
    "MSE over 6 t, 2 draws": Variant("several t and draws of noise", Errors(noisy(*T_GRID, draws=2))),
    "weighted loss over 5 t": Variant(
        "the weighted denoising loss", Errors(noisy(*_LATE), weights=likelihood_weights(_LATE))
    ),
    **{f"MSE at t={t}, no noise": Variant(_NO_NOISE, Errors(free(t))) for t in T_GRID},
    **{f"MSE, layer {m + 1}": Variant(_LAYERS, Errors(free(10), (m,))) for m in range(5)},
    "MSE, layers 1..4": Variant(_LAYERS, Errors(free(10), (0, 1, 2, 3))),
    "MSE, layers 3..4": Variant(_LAYERS, Errors(free(10), (2, 3))),
    "MSE, layers 4..5": Variant(_LAYERS, Errors(free(10), (3, 4))),
    **{f"residual Gaussian at t={t}": Variant(_COVARIANCE, ResidualGaussian(free(t))) for t in T_GRID},
    "residual Gaussian, noise": Variant(_COVARIANCE, ResidualGaussian(noisy(10))),
    "residual Gaussian, held-out": Variant(_COVARIANCE, ResidualGaussian(free(10), held_out=True)),
    "residual Gaussian over 3 t": Variant(_COVARIANCE, ResidualGaussian(free(3, 25, 100))),
    "residual Gaussian, layers 1..4": Variant(_LAYERS, ResidualGaussian(free(10), layers=(0, 1, 2, 3))),
    "residual Gaussian, layers 4..5": Variant(_LAYERS, ResidualGaussian(free(10), layers=(3, 4))),
    "layers calibrated, mean": Variant(_CALIBRATED, CalibratedLayers(free(10))),
    "layers calibrated, largest": Variant(_CALIBRATED, CalibratedLayers(free(10), largest=True)),
    "error profile": Variant(_CALIBRATED, ErrorProfile(free(10))),
    "error profile over 6 t": Variant(_CALIBRATED, ErrorProfile(free(*T_GRID))),
    "kNN of x̂0 at t=50": Variant("neighbours of x̂0", Neighbours("predicted", 50, (50, 0))),
    **{f"kNN of hidden at t={t}": Variant(_HIDDEN, Neighbours("hidden", 50, (t, 0))) for t in (1, 10, 50)},
    **{f"kNN of hidden, k={k}": Variant(_HIDDEN, Neighbours("hidden", k, (10, 0))) for k in (5, 200)},
    "Gaussian of hidden": Variant(_HIDDEN, HiddenGaussian(10)),
    "kNN of hidden + kNN": Variant(_HIDDEN_AND, Fusion((_HIDDEN_KNN, _KNN))),
    "kNN of hidden + Gaussian": Variant(_HIDDEN_AND, Fusion((_HIDDEN_KNN, Gaussian()))),
    "kNN of hidden, k=200 + Gaussian": Variant(
        _HIDDEN_AND, Fusion((Neighbours("hidden", 200, (10, 0)), Gaussian()))
    ),
    "kNN of hidden + Gaussian + MSE, layers 3..4": Variant(
        _HIDDEN_AND, Fusion((_HIDDEN_KNN, Gaussian(), Errors(free(10), (2, 3))))
    ),
    "2 kNN of hidden + Gaussian + MSE, layers 3..4": Variant(
        _HIDDEN_AND, Fusion((_HIDDEN_KNN, Gaussian(), Errors(free(10), (2, 3))), weights=(2, 1, 1))
    ),
    "kNN of hidden + Gaussian + MSE": Variant(_HIDDEN_AND, Fusion((_HIDDEN_KNN, Gaussian(), _ERROR))),
    "kNN of hidden + MSE": Variant(_HIDDEN_AND, Fusion((_HIDDEN_KNN, _ERROR))),
    "kNN of hidden + residual Gaussian": Variant(_HIDDEN_AND, Fusion((_HIDDEN_KNN, _GAUSSIAN))),
    "2 kNN of hidden + residual Gaussian": Variant(
        _HIDDEN_AND, Fusion((_HIDDEN_KNN, _GAUSSIAN), weights=(2, 1))
    ),
    "kNN of hidden + residual Gaussian, layers 1..4": Variant(
        _HIDDEN_AND, Fusion((_HIDDEN_KNN, ResidualGaussian(free(10), layers=(0, 1, 2, 3))))
    ),
    "kNN of hidden + MSE, layers 3..4": Variant(_HIDDEN_AND, Fusion((_HIDDEN_KNN, Errors(free(10), (2, 3))))),
    "kNN of the residual": Variant("neighbours of the residual", Neighbours("residual", 50, (10, 0))),
    "MSE + kNN": Variant(_AND_KNN, Fusion((_ERROR, _KNN))),
    "MSE + Gaussian": Variant(_AND_GAUSSIAN, Fusion((_ERROR, Gaussian()))),
    "MSE + Gaussian + kNN": Variant("fusion with both", Fusion((_ERROR, Gaussian(), _KNN))),
    "residual Gaussian + kNN": Variant(_AND_KNN, Fusion((_GAUSSIAN, _KNN))),
    "residual Gaussian + kNN, no logs": Variant(_AND_KNN, Fusion((_GAUSSIAN, _KNN), logs=False)),
    "residual Gaussian + kNN of 5": Variant(_AND_KNN, Fusion((_GAUSSIAN, Neighbours("z0", 5)))),
    "residual Gaussian + 2 kNN": Variant(_AND_KNN, Fusion((_GAUSSIAN, _KNN), weights=(1, 2))),
    "MSE + residual Gaussian": Variant(_TWO, Fusion((_ERROR, _GAUSSIAN))),
    "MSE + residual Gaussian + kNN": Variant(_AND_KNN, Fusion((_ERROR, _GAUSSIAN, _KNN))),
    **{
        f"{name}, {network} LFDN": Variant(idea, score, network)
        for network, idea in (("small", _SMALLER), ("standardised", _STANDARDISED))
        for name, score in (
            ("MSE", _ERROR),
            ("residual Gaussian", _GAUSSIAN),
            ("residual Gaussian + kNN", Fusion((_GAUSSIAN, _KNN))),
            ("kNN of hidden", _HIDDEN_KNN),
        )
    },
}
