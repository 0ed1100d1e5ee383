"""Label-free baselines on feature vectors; page 43 chooses their settings on development sets.

Each is fitted on ID vectors, (N, c), by a function that returns the score, as in `dlsr.baselines`:
a function from other vectors, (N, c), to (N,) float32, larger for OOD.
"""

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_approximation import Nystroem
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits
from torch import nn
from zuko.flows import MAF

from dlsr.baselines import Score, checked
from dlsr.diffusion import in_batches
from dlsr.errors import UserError
from dlsr.scores import mse
from dlsr.training import fit_network

CHUNK = 4096  # vectors scored at once, which bounds the memory
ROUNDING = 1e-11  # times z0's mean square: a smaller variance is float32's rounding
RIDGE = 1e-3  # times the mean variance: added to the mixture's covariances
BANDWIDTH_SAMPLE = 1000  # vectors


def fit_pca(x: np.ndarray, *, components: int = 64) -> Score:
    """Score by the squared norm of what the first principal components leave over.

    Source: Jackson & Mudholkar 1979.
    """
    return _in_chunks(partial(_left_over, _pca(checked(x), components)))


def fit_kernel_pca(
    x: np.ndarray, *, components: int = 64, landmarks: int = 1000, gamma: float = 0.0, seed: int = 0
) -> Score:
    """Score by the squared residual of kernel PCA under a Gaussian kernel (Hoffmann 2007).

    Let φ be the kernel's feature map, μ the mean of φ over the training vectors, V the principal
    components. The score is |φ(x) - μ|² - |Vᵀ(φ(x) - μ)|². The map of scikit-learn's `Nystroem`
    (Williams & Seeger 2001) is f(x) = P φ(x), with P the orthogonal projection onto the span of the
    landmarks' φ. Since k(x, x) = 1, the part of φ(x) outside that span has squared norm
    1 - |f(x)|², which is exact and is large for a vector far from all landmarks. So the score is

        1 - |f(x)|² + |f(x) - m|² - |Vᵀ(f(x) - m)|²,   m the mean of f over the training vectors.

    Two things are approximate: V is found within the span, and m = P μ stands for μ. Both are exact
    where every training vector is a landmark. With ``gamma`` 0, the kernel's gamma is one over
    the median squared distance between distinct training vectors.
    """
    x = checked(x)
    options = {"n_components": min(landmarks, len(x)), "random_state": seed}
    nystroem = Nystroem(kernel="rbf", gamma=gamma or _gamma(x, seed), **options)
    # In float32 the small eigenvalues of the landmarks' kernel would be noise.
    nystroem.fit(x.astype(float))
    pca = _pca(_in_chunks(nystroem.transform, np.float64)(x), components)

    def score(x: np.ndarray) -> np.ndarray:
        f = nystroem.transform(x)
        return 1 - (f**2).sum(axis=1) + _left_over(pca, f)

    return _in_chunks(score)


def fit_mixture(
    x: np.ndarray, *, components: int = 8, principal: int = 128, seed: int = 0
) -> Score:
    """Score by minus the log density of a mixture of Gaussians with full covariances, in nats.

    It is fitted on at most ``principal`` principal components, without directions in which the
    vectors do not vary: z0 has a linear constraint and a fixed norm per layer, so that it has no
    density on all c numbers. EM ends after 50 steps or when a step gains less than 0.01 nats.
    """
    x = checked(x)
    pca = varying_directions(x, principal)
    ridge = max(RIDGE * pca.explained_variance_.mean(), 1e-6)
    options = {"max_iter": 50, "tol": 1e-2, "random_state": seed}
    mixture = GaussianMixture(components, reg_covar=ridge, **options)
    with warnings.catch_warnings():  # the steps are limited on purpose
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(_in_chunks(pca.transform, np.float64)(x))
    return _in_chunks(lambda x: -mixture.score_samples(pca.transform(x)))


def fit_clusters(x: np.ndarray, *, clusters: int = 100, seed: int = 0) -> Score:
    """Score by the smallest squared Mahalanobis distance from a cluster's mean.

    The clusters are those of k-means in place of classes (Lee et al. 2018; SSD of Sehwag et al.
    2021). All share one covariance, that of the vectors about their own cluster's mean, shrunk by
    Ledoit and Wolf's formula. With one cluster this is `fit_gaussian`.
    """
    x = checked(x)
    options = {"n_init": 1, "max_iter": 100, "random_state": seed}
    with threadpool_limits(1), warnings.catch_warnings():  # threads would sum in any order
        warnings.simplefilter("ignore", ConvergenceWarning)  # there may be fewer distinct vectors
        labels = KMeans(min(clusters, len(x)), **options).fit_predict(x)
    x = x.astype(float)
    means = np.stack([x[labels == label].mean(axis=0) for label in np.unique(labels)])
    within = LedoitWolf(assume_centered=True).fit(x - means[labels])
    variances, vectors = np.linalg.eigh(within.precision_)
    whiten = vectors * np.sqrt(variances.clip(0))
    known = means @ whiten
    squared = lambda x: euclidean_distances(x @ whiten, known, squared=True)  # noqa: E731
    return _in_chunks(lambda x: squared(x).min(axis=1))


def fit_forest(x: np.ndarray, *, trees: int = 300, seed: int = 0) -> Score:
    """Score by an isolation forest, 0 to 1: a short path to a leaf is OOD (Liu et al. 2008)."""
    forest = IsolationForest(n_estimators=trees, random_state=seed).fit(checked(x))
    return lambda x: -forest.score_samples(checked(x, forest.n_features_in_)).astype(np.float32)


def fit_flow(
    x: np.ndarray, *, transforms: int = 3, principal: int = 128, hidden: int = 256,
    epochs: int = 10, lr: float = 1e-3, batch_size: int = 512, seed: int = 0,
) -> Score:  # fmt: skip
    """Score by minus the log density of a masked autoregressive flow (Papamakarios et al. 2017).

    It is in nats. The flow sees the principal components of `fit_mixture`, whitened; the density is
    that before whitening. Where it overflows, the score is the largest float32.
    """
    x = checked(x)
    pca = varying_directions(x, principal)
    variance = pca.explained_variance_
    scale = np.sqrt(np.where(variance > ROUNDING * _mean_square(x), variance, 1))
    size = {"transforms": transforms, "hidden_features": (hidden, hidden)}
    options = {"epochs": epochs, "lr": lr, "seed": seed, "batch_size": min(batch_size, len(x))}
    options |= {"weight_decay": 0.0, "device": "cpu", "progress": False}
    flow = fit_network(
        _in_chunks(lambda x: pca.transform(x) / scale)(x), partial(MAF, len(scale), **size),
        lambda flow, x, _: -flow().log_prob(x).mean(), name="MAF", size=size, **options,
    ).last  # fmt: skip

    def score(x: np.ndarray) -> np.ndarray:
        whitened = torch.from_numpy((pca.transform(x) / scale).astype(np.float32))
        surprise = -flow().log_prob(whitened).double().numpy()
        surprise = np.nan_to_num(surprise + np.log(scale).sum(), nan=np.inf)
        return np.minimum(surprise, np.finfo(np.float32).max)

    return _in_chunks(score)


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


class VariationalNetwork(nn.Module):
    """5 linear layers to a Gaussian of ``latent`` numbers and 8 back, with SiLU between them.

    These are the paper's numbers of layers; it states neither widths nor activation.
    """

    def __init__(self, features: int, *, width: int, latent: int) -> None:
        super().__init__()
        self.encoder = linear_layers(features, *[width] * 4, 2 * latent)
        self.decoder = linear_layers(latent, *[width] * 7, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction of ``x``, (N, c), from the latent mean."""
        return self.decoder(self.encoder(x).chunk(2, dim=1)[0])

    def loss(self, x: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
        """Return minus the ELBO under unit variance, without its constant."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=draws, device=mean.device)
        reconstruction = self.decoder(mean + (log_variance / 2).exp() * noise)
        error = ((x - reconstruction) ** 2).sum(dim=1) / 2
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=1) / 2
        return (error + divergence).mean()


def linear_layers(*widths: int) -> nn.Sequential:
    """Return linear layers between these widths, with SiLU between the layers."""
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        layers += [nn.SiLU(), nn.Linear(widths[i], widths[i + 1])]
        # By torch's default the signal fades over 13 layers, and a VAE ignores its latent at first.
        nn.init.kaiming_normal_(layers[-1].weight, nonlinearity="relu")
        nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers[1:])


def fit_autoencoder(
    x: np.ndarray, *, latent: int = 64, hidden: tuple[int, ...] = (512, 512), noise: float = 0.0,
    epochs: int = 20, **options: object,
) -> Score:  # fmt: skip
    """Score by the mean squared error of an autoencoder with ``latent`` numbers in the middle.

    ``hidden`` are the widths of the SiLU layers before it (Hinton & Salakhutdinov 2006); without
    any it is linear, at its optimum PCA (Baldi & Hornik 1989). With ``noise`` above 0 it learns to
    remove Gaussian noise of that standard deviation (Vincent et al. 2008). ``options`` are those
    of `dlsr.fit_network`; batches have 256 vectors.
    """
    if not 1 <= latent < x.shape[-1]:
        raise UserError(
            f"latent={latent} was given; {x.shape[-1]} features need 1 to {x.shape[-1] - 1}."
        )
    build = partial(BottleneckNetwork, (x.shape[-1], *hidden, latent), noise=noise)
    size = {"latent": latent, "hidden": hidden, "noise": noise}
    return _fit(x, build, "autoencoder", size, {"epochs": epochs, "batch_size": 256} | options)


def fit_vae(x: np.ndarray, *, width: int = 512, latent: int = 64, **options: object) -> Score:
    """Score by the mean squared error of the paper's VAE; see `fit_autoencoder` for ``options``.

    Width, latent size, initial weights, learning rate and epochs are ours.
    """
    size = {"width": width, "latent": latent}
    build = partial(VariationalNetwork, x.shape[-1], **size)
    return _fit(x, build, "VAE", size, {"epochs": 30} | options)


def _fit(x: np.ndarray, build: Callable, name: str, size: dict, options: dict) -> Score:
    x, options = checked(x), {"lr": 1e-3, "batch_size": 128, "progress": False} | options
    options["batch_size"] = min(options["batch_size"], len(x))
    options |= {"name": name, "size": size}
    fitted = fit_network(x, build, lambda network, x, draws: network.loss(x, draws), **options)
    return lambda x: mse(x, in_batches(fitted.last, checked(x, x.shape[-1])))


def _pca(x: np.ndarray, components: int) -> PCA:
    """Fit in float64 by the one solver that draws nothing and takes any shape."""
    components = min(components, *x.shape)
    with np.errstate(invalid="ignore"):  # equal vectors have no variance to divide by
        return PCA(components, svd_solver="covariance_eigh").fit(x.astype(float))


def _left_over(pca: PCA, x: np.ndarray) -> np.ndarray:
    left = x - pca.mean_
    left -= (left @ pca.components_.T) @ pca.components_
    return (left**2).sum(axis=1)


def varying_directions(x: np.ndarray, most: int) -> PCA:
    """Return 1 to ``most`` principal components, without those whose variance is rounding."""
    pca = _pca(x, most)
    varying = int((pca.explained_variance_ > ROUNDING * _mean_square(x)).sum())
    return pca if varying == pca.n_components_ else _pca(x, max(varying, 1))


def _mean_square(x: np.ndarray) -> float:
    return float(np.einsum("nc,nc->", x, x, dtype=np.float64)) / x.size


def _gamma(x: np.ndarray, seed: int) -> float:
    rows = np.random.default_rng(seed).permutation(len(x))[:BANDWIDTH_SAMPLE]
    distances = euclidean_distances(np.unique(x[rows], axis=0).astype(float), squared=True)
    return float(1 / np.median(distances[np.triu_indices(len(distances), 1)]))


def _in_chunks(function: Score, dtype: type = np.float32) -> Score:
    """Return ``function`` of float64 rows, a few thousand at a time."""

    def of_all(x: np.ndarray) -> np.ndarray:
        x = checked(x, x.shape[-1])
        parts = (x[start : start + CHUNK] for start in range(0, len(x), CHUNK))
        return np.concatenate([function(part.astype(float)) for part in parts]).astype(dtype)

    return of_all
