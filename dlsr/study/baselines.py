"""Label-free baselines on feature vectors; page 43 chooses their settings on development sets.

All are `dlsr.baselines.Baseline`: fitted on ID vectors, (N, c); a larger score means more OOD.
"""

import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY
from functools import partial

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_approximation import Nystroem
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.mixture import GaussianMixture
from torch import nn
from zuko.flows import MAF

from dlsr import baselines as core
from dlsr.baselines import Baseline, estimator, linear_layers
from dlsr.errors import UserError
from dlsr.scores import mse
from dlsr.training import fit_network

CHUNK = 4096  # vectors scored at once, which bounds the memory
ROUNDING = 1e-11  # times z0's mean square: a smaller variance is float32's rounding
RIDGE = 1e-3  # times the mean variance: added to the mixture's covariances
BANDWIDTH_SAMPLE = 1000  # vectors


@estimator
class PCAResidual(Baseline):
    """Squared norm of what the first principal components leave over (Jackson & Mudholkar 1979)."""

    components: int = 64

    def _fit(self, x: np.ndarray, y: object) -> None:
        self.pca_ = _pca(_in_chunks(self._map, x), self.components)

    def _ood_score(self, x: np.ndarray) -> np.ndarray:
        return _in_chunks(self._residual, x)

    def _residual(self, x: np.ndarray) -> np.ndarray:
        f = self._map(x)
        left = f - self.pca_.mean_
        left -= (left @ self.pca_.components_.T) @ self.pca_.components_
        return (left**2).sum(axis=1) + self._outside(f)

    def _map(self, x: np.ndarray) -> np.ndarray:
        return x

    def _outside(self, f: np.ndarray) -> np.ndarray | float:
        return 0.0


@estimator
class KernelPCAResidual(PCAResidual):
    """Squared residual of kernel PCA in the feature space of a Gaussian kernel (Hoffmann 2007).

    Let φ be the kernel's feature map, μ the mean of φ over the training vectors, V the principal
    components. The score is |φ(x) - μ|² - |Vᵀ(φ(x) - μ)|². The map of scikit-learn's `Nystroem`
    (Williams & Seeger 2001) is f(x) = P φ(x), with P the orthogonal projection onto the span of the
    landmarks' φ. Since k(x, x) = 1, the part of φ(x) outside that span has squared norm
    1 - |f(x)|², which is exact and is large for a vector far from all landmarks. So the score is

        1 - |f(x)|² + |f(x) - m|² - |Vᵀ(f(x) - m)|²,   m the mean of f over the training vectors.

    Two things are approximate: V is found within the span, and m = P μ stands for μ. Both are exact
    where every training vector is a landmark. With ``gamma`` None, the kernel's gamma is one over
    the median squared distance between distinct training vectors.
    """

    landmarks: int = 1000
    gamma: float | None = None
    seed: int = 0

    def _fit(self, x: np.ndarray, y: object) -> None:
        self.gamma_ = _gamma(x, self.seed) if self.gamma is None else self.gamma
        options = {"n_components": min(self.landmarks, len(x)), "random_state": self.seed}
        self.nystroem_ = Nystroem(kernel="rbf", gamma=self.gamma_, **options)
        # In float32 the small eigenvalues of the landmarks' kernel would be noise.
        self.nystroem_.fit(x.astype(np.float64))
        super()._fit(x, y)

    def _map(self, x: np.ndarray) -> np.ndarray:
        return self.nystroem_.transform(x)

    def _outside(self, f: np.ndarray) -> np.ndarray:
        return 1 - (f**2).sum(axis=1)


@estimator
class Mixture(Baseline):
    """Minus the log density of a mixture of Gaussians with full covariances, in nats.

    It is fitted on at most ``principal`` principal components, without directions in which the
    vectors do not vary: z0 has a linear constraint and a fixed norm per layer, so that it has no
    density on all c numbers. EM ends after 50 steps or when a step gains less than 0.01 nats.
    """

    components: int = 8
    principal: int = 128
    seed: int = 0

    def _fit(self, x: np.ndarray, y: object) -> None:
        self.pca_ = _varying_directions(x, self.principal)
        ridge = max(RIDGE * self.pca_.explained_variance_.mean(), 1e-6)
        options = {"max_iter": 50, "tol": 1e-2, "random_state": self.seed}
        self.mixture_ = GaussianMixture(self.components, reg_covar=ridge, **options)
        with warnings.catch_warnings():  # the steps are limited on purpose
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.mixture_.fit(_in_chunks(self.pca_.transform, x))

    def _ood_score(self, x: np.ndarray) -> np.ndarray:
        return -_in_chunks(lambda part: self.mixture_.score_samples(self.pca_.transform(part)), x)


@estimator
class Forest(Baseline):
    """Isolation forest (Liu, Ting & Zhou 2008): a short path to a leaf scores high, from 0 to 1."""

    trees: int = 300
    seed: int = 0

    def _fit(self, x: np.ndarray, y: object) -> None:
        self.forest_ = IsolationForest(n_estimators=self.trees, random_state=self.seed).fit(x)

    def _ood_score(self, x: np.ndarray) -> np.ndarray:
        return -self.forest_.score_samples(x)


@estimator
class Flow(Baseline):
    """Minus the log density of a masked autoregressive flow, in nats (Papamakarios et al. 2017).

    It sees the principal components of `Mixture`, whitened; the density is that before whitening.
    Where it overflows, the score is the largest float32.
    """

    transforms: int = 3
    principal: int = 128
    hidden: int = 256
    epochs: int = 10
    lr: float = 1e-3
    batch_size: int = 512
    seed: int = 0

    def _fit(self, x: np.ndarray, y: object) -> None:
        self.pca_ = _varying_directions(x, self.principal)
        variance = self.pca_.explained_variance_
        self.scale_ = np.sqrt(np.where(variance > ROUNDING * _mean_square(x), variance, 1))
        size = {"transforms": self.transforms, "hidden_features": (self.hidden, self.hidden)}
        build = partial(MAF, len(self.scale_), **size)
        options = {name: getattr(self, name) for name in ("epochs", "lr", "seed")}
        options |= {"batch_size": min(self.batch_size, len(x)), "weight_decay": 0.0}
        options |= {"name": "MAF", "size": size, "device": "cpu", "progress": False}
        self.network_ = fit_network(
            _in_chunks(self._whitened, x),
            build,
            lambda flow, x, _: -flow().log_prob(x).mean(),
            **options,
        ).last

    def _ood_score(self, x: np.ndarray) -> np.ndarray:
        return _in_chunks(self._surprise, x)

    def _whitened(self, x: np.ndarray) -> np.ndarray:
        return (self.pca_.transform(x) / self.scale_).astype(np.float32)

    def _surprise(self, x: np.ndarray) -> np.ndarray:
        whitened = torch.from_numpy(self._whitened(x))
        surprise = -self.network_().log_prob(whitened).double().numpy()
        surprise = np.nan_to_num(surprise + np.log(self.scale_).sum(), nan=np.inf)
        return np.minimum(surprise, np.finfo(np.float32).max)


class BottleneckNetwork(nn.Module):
    """An encoder to few numbers and a decoder back; only the loss adds noise to the input."""

    def __init__(self, widths: tuple[int, ...], *, noise: float = 0.0) -> None:
        super().__init__()
        self.encoder, self.decoder = linear_layers(*widths), linear_layers(*reversed(widths))
        self.noise = noise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction of x, (N, c)."""
        return self.decoder(self.encoder(x))

    def loss(self, x: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
        """Return the mean squared error between x and the reconstruction from noisy x."""
        noisy = x
        if self.noise:
            noisy = x + self.noise * torch.randn(x.shape, generator=draws, device=x.device)
        return ((x - self(noisy)) ** 2).mean()


@estimator
class BottleneckAutoEncoder(core.ReconstructionBaseline):
    """Mean squared error of an autoencoder with ``latent`` numbers in the middle.

    ``hidden`` are the widths of the SiLU layers before it (Hinton & Salakhutdinov 2006); without
    any it is linear, at its optimum PCA (Baldi & Hornik 1989). With ``noise`` above 0 it learns to
    remove Gaussian noise of that standard deviation (Vincent et al. 2008).
    """

    _: KW_ONLY
    latent: int = 64
    hidden: tuple[int, ...] = (512, 512)
    noise: float = 0.0
    epochs: int = 20
    batch_size: int = 256

    def build(self, features: int) -> BottleneckNetwork:
        """Return the untrained network for vectors of ``features`` numbers."""
        if not 1 <= self.latent < features:
            raise UserError(
                f"latent={self.latent} was given; {features} features need 1 to {features - 1}."
            )
        return BottleneckNetwork((features, *self.hidden, self.latent), noise=self.noise)

    def _ood_score(self, x: np.ndarray) -> np.ndarray:
        return mse(x, self.reconstruct(x))


class VAE(core.VAE):
    """The paper's VAE, scored by its mean squared error as the other autoencoders are."""

    def _ood_score(self, x: np.ndarray) -> np.ndarray:
        return mse(x, self.reconstruct(x))


def _pca(x: np.ndarray, components: int) -> PCA:
    """Fit in float64 by the one solver that draws nothing and takes any shape."""
    components = min(components, *x.shape)
    with np.errstate(invalid="ignore"):  # equal vectors have no variance to divide by
        return PCA(components, svd_solver="covariance_eigh").fit(x.astype(np.float64, copy=False))


def _varying_directions(x: np.ndarray, most: int) -> PCA:
    """Return 1 to ``most`` components, without those whose variance is rounding."""
    pca = _pca(x, most)
    varying = int((pca.explained_variance_ > ROUNDING * _mean_square(x)).sum())
    return pca if varying == pca.n_components_ else _pca(x, max(varying, 1))


def _mean_square(x: np.ndarray) -> float:
    return float(np.einsum("nc,nc->", x, x, dtype=np.float64)) / x.size


def _gamma(x: np.ndarray, seed: int) -> float:
    rows = np.random.default_rng(seed).permutation(len(x))[:BANDWIDTH_SAMPLE]
    distinct = np.unique(x[rows], axis=0).astype(np.float64)
    distances = euclidean_distances(distinct, squared=True)
    return float(1 / np.median(distances[np.triu_indices(len(distinct), 1)]))


def _in_chunks(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """Apply ``function`` to float64 rows, a few thousand at a time."""
    parts = (x[start : start + CHUNK] for start in range(0, len(x), CHUNK))
    return np.concatenate([function(part.astype(np.float64)) for part in parts])
