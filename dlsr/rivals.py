"""Label-free detectors on the LFDN's own input z0 (N, c), from plain to strong, to compare it with."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_approximation import Nystroem
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.mixture import GaussianMixture
from sklearn.tree._tree import Tree
from sklearn.utils.validation import check_is_fitted
from torch import nn
from zuko.flows import MAF

from dlsr.baselines import (
    CHUNK,
    KNN,
    VAE,
    Detector,
    Mahalanobis,
    Reconstructing,
    Scores,
    linear_layers,
    train_network,
)
from dlsr.datasets import UserError
from dlsr.features import code_hash

LARGEST_SEED = 2**32 - 1  # scikit-learn's
ROUNDING = 1e-11  # of z0's mean square: a variance below it is float32's rounding
RIDGE = 1e-3  # of the mean variance, added to the mixture's covariances
EM_STEPS = 50
EM_TOLERANCE = 1e-2  # nats a vector
BANDWIDTH_SAMPLE = 1000


class PCAResidual(Detector):
    """Squared norm of what the first principal components leave over (Jackson & Mudholkar 1979, Q)."""

    def __init__(self, *, components: int = 64) -> None:
        self.components = components

    def _fit(self, x: np.ndarray, y: Any) -> None:
        _need_whole(self, "components", 1, min(x.shape), f"for {_shape(x)}")
        self.pca_ = _pca(x, self.components)

    def _scores(self, x: np.ndarray) -> Scores:
        return {("pca", "all"): _in_chunks(self._residual, x)}

    def _residual(self, x: np.ndarray) -> np.ndarray:
        left = x - self.pca_.mean_
        left -= (left @ self.pca_.components_.T) @ self.pca_.components_
        return (left**2).sum(axis=1)


class KernelPCAResidual(Detector):
    """Squared residual of kernel PCA in the feature space of a Gaussian kernel (Hoffmann 2007).

    Let φ be the kernel's feature map, μ the mean of φ over the training vectors, V the principal
    components. The score is |φ(x) - μ|² - |Vᵀ(φ(x) - μ)|². The map of scikit-learn's `Nystroem`
    (Williams & Seeger 2001) is f(x) = P φ(x), with P the orthogonal projection onto the span of the
    landmarks' φ. Since k(x, x) = 1, the part of φ(x) outside that span has squared norm 1 - |f(x)|²,
    which is exact and is large for a vector far from all landmarks. So the score is

        1 - |f(x)|² + |f(x) - m|² - |Vᵀ(f(x) - m)|²,   m the mean of f over the training vectors.

    Two things are approximate: V is found within the span, and m = P μ stands for μ. Both are exact
    where every training vector is a landmark.

    ``landmarks`` vectors are drawn, all where there are fewer. ``gamma=None`` is one over the median
    squared distance between distinct vectors of a sample.
    """

    def __init__(
        self, *, components: int = 64, landmarks: int = 1000, gamma: float | None = None, seed: int = 0
    ) -> None:
        self.components = components
        self.landmarks = landmarks
        self.gamma = gamma
        self.seed = seed

    def _fit(self, x: np.ndarray, y: Any) -> None:
        _need_whole(self, "landmarks", 1)
        landmarks = min(self.landmarks, len(x))
        _need_whole(self, "components", 1, landmarks, f"for {landmarks} landmarks")
        _need_whole(self, "seed", 0, LARGEST_SEED)
        if self.gamma is not None:
            _need_number(self, "gamma", above=0)
        self.gamma_ = _gamma(x, self.seed) if self.gamma is None else self.gamma
        # In float32 the small eigenvalues of the landmarks' kernel would be noise.
        nystroem = Nystroem(kernel="rbf", gamma=self.gamma_, n_components=landmarks, random_state=self.seed)
        self.nystroem_ = nystroem.fit(x.astype(np.float64))
        self.pca_ = _pca(_in_chunks(self.nystroem_.transform, x), self.components)

    def _scores(self, x: np.ndarray) -> Scores:
        return {("kernel_pca", "all"): _in_chunks(self._residual, x)}

    def _residual(self, x: np.ndarray) -> np.ndarray:
        f = self.nystroem_.transform(x)
        centred = f - self.pca_.mean_
        inside = centred @ self.pca_.components_.T
        return 1 - (f**2).sum(axis=1) + (centred**2).sum(axis=1) - (inside**2).sum(axis=1)


class Mixture(Detector):
    """Minus the log density of a mixture of Gaussians with full covariances, in nats.

    On the first ``principal`` principal components, fewer where z0 varies in fewer directions or there
    are fewer vectors: z0 has one linear constraint and one fixed norm a layer, so that it has no density
    on all c numbers. EM stops after 50 steps or when a step gains less than 0.01 nats a vector.
    """

    def __init__(self, *, components: int = 8, principal: int = 128, seed: int = 0) -> None:
        self.components = components
        self.principal = principal
        self.seed = seed

    def _fit(self, x: np.ndarray, y: Any) -> None:
        _need_whole(self, "components", 1, len(x), f"for {_shape(x)}")
        _need_whole(self, "principal", 1)
        _need_whole(self, "seed", 0, LARGEST_SEED)
        self.pca_ = _principal(x, self.principal)
        mixture = GaussianMixture(
            self.components,
            covariance_type="full",
            reg_covar=max(RIDGE * self.pca_.explained_variance_.mean(), 1e-6),
            max_iter=EM_STEPS,
            tol=EM_TOLERANCE,
            random_state=self.seed,
        )
        with warnings.catch_warnings():
            # The steps are limited on purpose, and duplicates may leave k-means a start too few.
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.mixture_ = mixture.fit(_in_chunks(self.pca_.transform, x))

    def _scores(self, x: np.ndarray) -> Scores:
        return {("mixture", "all"): _in_chunks(self._surprise, x)}

    def _surprise(self, x: np.ndarray) -> np.ndarray:
        return -self.mixture_.score_samples(self.pca_.transform(x))


class Forest(Detector):
    """Isolation forest (Liu, Ting & Zhou 2008): short paths to a leaf score high, from 0 to 1."""

    def __init__(self, *, trees: int = 300, seed: int = 0) -> None:
        self.trees = trees
        self.seed = seed

    def _fit(self, x: np.ndarray, y: Any) -> None:
        _need_whole(self, "trees", 1)
        _need_whole(self, "seed", 0, LARGEST_SEED)
        self.forest_ = IsolationForest(n_estimators=self.trees, random_state=self.seed).fit(x)

    def _scores(self, x: np.ndarray) -> Scores:
        return {("forest", "all"): -self.forest_.score_samples(x)}


class FlowNetwork(nn.Module):
    """A masked autoregressive flow from (N, features) to the standard normal."""

    def __init__(self, features: int, *, transforms: int, hidden: int) -> None:
        super().__init__()
        self.flow = MAF(features, transforms=transforms, hidden_features=(hidden, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, features) -> log density, (N,)."""
        return self.flow().log_prob(x)

    def loss(self, x: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
        """Minus the mean log density; nothing is drawn."""
        return -self(x).mean()


class Flow(Detector):
    """Minus the log density of a masked autoregressive flow, in nats (Papamakarios et al. 2017).

    On the same principal components as `Mixture`; they are whitened for the network, and the density
    is that before whitening. Where it overflows, the score is the largest of float32.
    """

    def __init__(
        self,
        *,
        principal: int = 128,
        transforms: int = 3,
        hidden: int = 256,
        epochs: int = 10,
        lr: float = 1e-3,
        batch_size: int = 512,
        seed: int = 0,
    ) -> None:
        self.principal = principal
        self.transforms = transforms
        self.hidden = hidden
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.seed = seed

    def _fit(self, x: np.ndarray, y: Any) -> None:
        for name in ("principal", "transforms", "hidden", "epochs", "batch_size"):
            _need_whole(self, name, 1)
        _need_whole(self, "seed", 0, LARGEST_SEED)
        _need_number(self, "lr", above=0)
        self.pca_ = _principal(x, self.principal)
        variance = self.pca_.explained_variance_
        self.scale_ = np.sqrt(np.where(variance > ROUNDING * _mean_square(x), variance, 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = FlowNetwork(len(self.scale_), transforms=self.transforms, hidden=self.hidden)
        train_network(
            network,
            _in_chunks(self._whitened, x),
            epochs=self.epochs,
            lr=self.lr,
            weight_decay=0.0,
            batch_size=self.batch_size,
            seed=self.seed,
            device="cpu",
        )
        self.network_ = network.eval().requires_grad_(False)

    def _scores(self, x: np.ndarray) -> Scores:
        return {("flow", "all"): _in_chunks(self._surprise, x)}

    def _whitened(self, x: np.ndarray) -> np.ndarray:
        return (self.pca_.transform(x) / self.scale_).astype(np.float32)

    def _surprise(self, x: np.ndarray) -> np.ndarray:
        surprise = -self.network_(torch.from_numpy(self._whitened(x))).double().numpy()
        largest = float(np.finfo(np.float32).max)
        surprise = np.nan_to_num(surprise + np.log(self.scale_).sum(), nan=largest, posinf=largest)
        return np.minimum(surprise, largest)


class BottleneckNetwork(nn.Module):
    """An encoder to ``latent`` numbers and a decoder back; its input gets noise in the loss only."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, *, noise: float = 0.0) -> None:
        super().__init__()
        self.encoder, self.decoder, self.noise = encoder, decoder, noise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, c) -> its reconstruction."""
        return self.decoder(self.encoder(x))

    def loss(self, x: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
        """Mean squared error of the reconstruction from the noisy input, to the clean one."""
        noisy = x
        if self.noise:
            noisy = x + self.noise * torch.randn(x.shape, generator=draws, device=x.device)
        return ((x - self(noisy)) ** 2).mean()


class LinearAutoEncoder(Reconstructing):
    """One linear layer to ``latent`` numbers, one back: at its optimum PCA (Baldi & Hornik 1989)."""

    def __init__(
        self,
        channels: tuple[int, ...],
        *,
        latent: int = 64,
        epochs: int = 30,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        batch_size: int = 256,
        seed: int = 0,
        device: str | None = None,
        progress: bool = False,
    ) -> None:
        self.channels = channels
        self.latent = latent
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.progress = progress

    def _network(self, features: int) -> BottleneckNetwork:
        return BottleneckNetwork(linear_layers(features, self.latent), linear_layers(self.latent, features))

    def _settings(self) -> dict[str, Any]:
        """As in `Reconstructing`, and this file's code: a change of it trains anew."""
        settings = {k: v for k, v in self.get_params().items() if k not in ("device", "progress")}
        features = sum(self.channels)
        _need_whole(self, "latent", 1, features - 1, f"fewer than the {features} features")
        for name in settings:
            if name in ("width", "epochs", "batch_size"):
                _need_whole(self, name, 1)
            elif name in ("weight_decay", "noise"):
                _need_number(self, name)
        _need_whole(self, "seed", 0)
        _need_number(self, "lr", above=0)
        return settings | {"code_of_rivals": code_hash("rivals")}


class BottleneckAutoEncoder(LinearAutoEncoder):
    """Two hidden SiLU layers to ``latent`` numbers, two back (Hinton & Salakhutdinov 2006)."""

    def __init__(
        self,
        channels: tuple[int, ...],
        *,
        latent: int = 64,
        width: int = 512,
        epochs: int = 20,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        batch_size: int = 256,
        seed: int = 0,
        device: str | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__(
            channels,
            latent=latent,
            epochs=epochs,
            lr=lr,
            weight_decay=weight_decay,
            batch_size=batch_size,
            seed=seed,
            device=device,
            progress=progress,
        )
        self.width = width

    def _network(self, features: int) -> BottleneckNetwork:
        widths = (features, self.width, self.width, self.latent)
        return BottleneckNetwork(linear_layers(*widths), linear_layers(*reversed(widths)))


class DenoisingAutoEncoder(BottleneckAutoEncoder):
    """The same, trained to remove Gaussian noise of standard deviation ``noise`` (Vincent et al. 2008)."""

    def __init__(
        self,
        channels: tuple[int, ...],
        *,
        latent: int = 64,
        width: int = 512,
        noise: float = 0.2,
        epochs: int = 20,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        batch_size: int = 256,
        seed: int = 0,
        device: str | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__(
            channels,
            latent=latent,
            width=width,
            epochs=epochs,
            lr=lr,
            weight_decay=weight_decay,
            batch_size=batch_size,
            seed=seed,
            device=device,
            progress=progress,
        )
        self.noise = noise

    def _network(self, features: int) -> BottleneckNetwork:
        network = super()._network(features)
        network.noise = self.noise
        return network


def size_in_bytes(detector: Detector) -> int:
    """Bytes of all arrays and tensors that a fitted detector keeps, each once."""
    check_is_fitted(detector, "n_features_in_")
    fitted = [value for name, value in vars(detector).items() if name.endswith("_")]
    return _bytes(fitted, {})


def _bytes(thing: Any, seen: dict[int, Any]) -> int:
    if id(thing) in seen:
        return 0
    seen[id(thing)] = thing  # kept, so that no other object gets its id
    if isinstance(thing, torch.Tensor) or (isinstance(thing, np.ndarray) and thing.dtype != object):
        return thing.nbytes
    if isinstance(thing, nn.Module):
        thing = thing.state_dict()
    elif isinstance(thing, BaseEstimator):
        thing = vars(thing)
    elif isinstance(thing, Tree):
        thing = thing.__getstate__()
    if isinstance(thing, Mapping):
        thing = list(thing.values())
    elif isinstance(thing, np.ndarray):
        thing = thing.ravel().tolist()
    if isinstance(thing, list | tuple | set):
        return sum(_bytes(part, seen) for part in thing)
    return 0


Builder = Callable[[tuple[int, ...], int], Detector]


@dataclass(frozen=True)
class Rival:
    """One row of `RIVALS`.

    ``name`` is the one in results and file names, ``title`` the readers'; ``candidates`` are (label,
    builder of an unfitted detector from (channels, seed)), among which a development set chooses;
    ``score`` is which of `Detector.all_scores` is read; ``sees`` is what it has been fitted on.
    """

    name: str
    title: str
    candidates: tuple[tuple[str, Builder], ...]
    score: tuple[str, str]
    sees: str = "ID train"


def _candidates(kind: type[Detector], *choices: dict[str, Any]) -> tuple[tuple[str, Builder], ...]:
    """One candidate for each choice of settings, labelled with them."""
    return tuple((_label(choice), _builder(kind, choice)) for choice in choices or ({},))


def _label(choice: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in choice.items()) or "default"


def _builder(kind: type[Detector], choice: dict[str, Any]) -> Builder:
    def build(channels: tuple[int, ...], seed: int) -> Detector:
        given = {"channels": channels, "seed": seed}
        taken = signature(kind).parameters
        return kind(**{name: value for name, value in given.items() if name in taken}, **choice)

    return build


RIVALS: dict[str, Rival] = {
    row.name: row
    for row in (
        Rival("mahalanobis", "Mahalanobis", _candidates(Mahalanobis), ("mahalanobis", "all")),
        Rival("knn", "kNN", _candidates(KNN, *({"k": k} for k in (1, 5, 50, 200))), ("knn", "all")),
        Rival(
            "pca",
            "PCA residual",
            _candidates(PCAResidual, *({"components": n} for n in (16, 64, 128, 256))),
            ("pca", "all"),
        ),
        Rival(
            "kernel_pca",
            "Kernel PCA residual",
            _candidates(KernelPCAResidual, *({"components": n} for n in (64, 256))),
            ("kernel_pca", "all"),
        ),
        Rival(
            "mixture",
            "Gaussian mixture",
            _candidates(Mixture, *({"components": n} for n in (2, 8, 16))),
            ("mixture", "all"),
        ),
        Rival("forest", "Isolation forest", _candidates(Forest, {"trees": 300}), ("forest", "all")),
        Rival(
            "linear_ae",
            "Linear AE",
            _candidates(LinearAutoEncoder, {"latent": 128}),
            ("mse", "all"),
        ),
        Rival(
            "ae",
            "Bottleneck AE",
            _candidates(BottleneckAutoEncoder, {"latent": 128}),
            ("mse", "all"),
        ),
        Rival(
            "denoising_ae",
            "Denoising AE",
            _candidates(DenoisingAutoEncoder, *({"noise": s, "latent": 128} for s in (0.2, 0.5))),
            ("mse", "all"),
        ),
        Rival("vae", "VAE", _candidates(VAE, {"epochs": 10}), ("mse", "all")),
        Rival(
            "flow",
            "Normalising flow",
            _candidates(Flow, {"transforms": 3}),
            ("flow", "all"),
        ),
    )
}


def _pca(x: np.ndarray, components: int) -> PCA:
    """In float64 and by the one solver that draws nothing and takes any shape."""
    with np.errstate(invalid="ignore"):  # equal vectors have no variance to divide
        return PCA(components, svd_solver="covariance_eigh").fit(x.astype(np.float64, copy=False))


def _principal(x: np.ndarray, most: int) -> PCA:
    """At least 1 and at most ``most`` components, without those whose variance is rounding."""
    pca = _pca(x, min(most, *x.shape))
    varying = int((pca.explained_variance_ > ROUNDING * _mean_square(x)).sum())
    return pca if varying == pca.n_components_ else _pca(x, max(varying, 1))


def _mean_square(x: np.ndarray) -> float:
    return float(np.einsum("nc,nc->", x, x, dtype=np.float64)) / x.size


def _gamma(x: np.ndarray, seed: int) -> float:
    rows = np.random.default_rng(seed).permutation(len(x))[:BANDWIDTH_SAMPLE]
    distinct = np.unique(x[rows], axis=0).astype(np.float64)
    if len(distinct) == 1:
        return 1.0
    distances = euclidean_distances(distinct, squared=True)
    return float(1 / np.median(distances[np.triu_indices(len(distinct), 1)]))


def _in_chunks(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """``function`` of float64 rows."""
    parts = (x[start : start + CHUNK] for start in range(0, len(x), CHUNK))
    return np.concatenate([function(part.astype(np.float64)) for part in parts])


def _shape(x: np.ndarray) -> str:
    return f"{len(x)} vectors of {x.shape[1]} features"


def _need_whole(detector: Detector, name: str, low: int, high: int | None = None, why: str = "") -> None:
    value = getattr(detector, name)
    if isinstance(value, Integral) and low <= value <= (math.inf if high is None else high):
        return
    needed = f"of at least {low}" if high is None else f"from {low} to {high}{f' ({why})' if why else ''}"
    raise UserError(
        f"{type(detector).__name__} was given {name}={value!r}; a whole number {needed} is needed."
    )


def _need_number(detector: Detector, name: str, *, above: float | None = None) -> None:
    """Refuse what is not finite, and what is not above ``above`` or, without it, is below 0."""
    value = getattr(detector, name)
    finite = isinstance(value, Real) and math.isfinite(value)
    if not finite or (value < 0 if above is None else value <= above):
        needed = "of at least 0" if above is None else f"above {above}"
        raise UserError(f"{type(detector).__name__} was given {name}={value!r}; a number {needed} is needed.")
