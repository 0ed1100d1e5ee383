"""Three published scores by diffusion that a reader will miss beside the paper's.

Diffusion time estimation (DTE) fits its own network on z0, as a baseline does, and its two
functions return a score as in `dlsr.baselines`. EigenScore and SCOPED ask a denoiser, such as an
LFDN, and return statistics of vectors, (N, c), at some timesteps, which count from 1. All noise is
seeded, and every vector meets the same.

Let z_t = sqrt(a) z0 + sqrt(1 - a) noise with a = alpha_bar_t, D the denoiser's guess of z0, and J
the derivative of D by z_t. Tweedie's formulas give, for the best denoiser, the score
∇ log p(z_t) = (sqrt(a) D - z_t) / (1 - a) and the covariance of z0 given z_t, (1 - a) / sqrt(a) J.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from sklearn.neighbors import KernelDensity, NearestNeighbors
from torch import nn
from torch.func import jvp

from dlsr.baselines import Score, checked
from dlsr.diffusion import add_noise, fixed_noise, in_batches, noise_schedule
from dlsr.training import fit_network

DTE_STEPS = 400  # of DTE's own schedule, by the authors' code: beta from 1e-4 to 0.01, linear
Statistic = Callable[[np.ndarray], np.ndarray]


def fit_dte_nearest(x: np.ndarray, *, k: int = 5) -> Score:
    """Score by DTE's non-parametric estimate of the noise's variance (Livernoche et al. 2024).

    If x is a training vector plus Gaussian noise, the posterior of the noise's variance is an
    inverse Gamma distribution whose mode is the squared distance to that vector over c. As in the
    authors' code, the mean squared distance to the k nearest stands for it. It is not rounded to
    a timestep, which would only tie scores.
    """
    x = checked(x)
    nearest = NearestNeighbors(n_neighbors=min(k, len(x)), algorithm="brute").fit(x)
    distances = lambda x: nearest.kneighbors(checked(x, nearest.n_features_in_))[0]  # noqa: E731
    return lambda x: ((distances(x) ** 2).mean(axis=1) / nearest.n_features_in_).astype(np.float32)


def dte_noise() -> torch.Tensor:
    """Return the standard deviations of DTE's noise, (`DTE_STEPS`,)."""
    beta = torch.linspace(1e-4, 0.01, DTE_STEPS, dtype=torch.float64)
    return (1 - torch.cumprod(1 - beta, dim=0)).sqrt().float()


def fit_dte(
    x: np.ndarray, *, bins: int = 7, epochs: int = 30, hidden=(256, 512, 256), **options: object
) -> Score:
    """Score by the mean diffusion time that a classifier predicts (Livernoche et al. 2024).

    The categorical DTE: x + s_t noise with t uniform is classified into ``bins`` equal parts of
    the steps, by cross-entropy; the score is the mean bin under the predicted probabilities.
    Layers, schedule, bins, learning rate and weight decay are those of the authors' code; it also
    has dropout and 400 epochs in batches of 64, here there is none and they are 30 and 128.
    """
    x, spread = checked(x), dte_noise()
    widths = (x.shape[1], *hidden, bins)

    def build() -> nn.Module:
        layers = [nn.Linear(*pair) for pair in pairwise(widths)]
        between = [part for layer in layers for part in (layer, nn.ReLU())]
        return nn.Sequential(*between[:-1])

    def loss(network: nn.Module, x: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
        t = torch.randint(DTE_STEPS, (len(x),), generator=draws, device=x.device)
        noise = torch.randn(x.shape, generator=draws, device=x.device)
        noisy = x + spread.to(x.device)[t][:, None] * noise
        return nn.functional.cross_entropy(network(noisy), t * bins // DTE_STEPS)

    size = {"widths": widths, "steps": DTE_STEPS}
    options = {"epochs": epochs, "lr": 1e-4, "weight_decay": 5e-4, "progress": False} | options
    options["batch_size"] = min(options.get("batch_size", 128), len(x))
    network = fit_network(x, build, loss, name="DTE", size=size, **options).last
    mean = lambda batch: network(batch).softmax(1) @ torch.arange(bins).to(batch)  # noqa: E731
    return lambda x: in_batches(network, checked(x, widths[0]), mean)


def by_timestep(network: nn.Module, of_one: Callable, ts: Sequence[int], draws: int) -> Statistic:
    """Return a function from vectors, (N, c), to ``of_one`` averaged over noise, (N, timesteps).

    ``of_one(denoise, z_t, alpha_bar)`` is (N,); ``denoise`` is the denoiser at that timestep.
    """

    def of_vectors(z0: torch.Tensor, t: int) -> torch.Tensor:
        alpha_bar, times = noise_schedule(z0.device)[t - 1], z0.new_full((len(z0),), t - 1)
        noise = fixed_noise(draws, z0.shape[1]).to(z0.device)
        noisy = [add_noise(z0, alpha_bar, eps) for eps in noise]
        denoise = lambda z_t: network(z_t, times)  # noqa: E731
        return torch.stack([of_one(denoise, z_t, alpha_bar) for z_t in noisy]).mean(0)

    at = lambda x, t: in_batches(network, x, partial(of_vectors, t=t), 256)  # noqa: E731
    return lambda x: np.stack([at(x, t) for t in ts], axis=1)


def eigenvalues(
    denoise: Callable, z_t: torch.Tensor, alpha_bar: torch.Tensor, *, count: int, steps: int
) -> torch.Tensor:
    """Return the largest ``count`` eigenvalues of the covariance of z0 given z_t, (N, count).

    They are found by ``steps`` of subspace iteration on J from one seeded start. The norms of J q
    for orthonormal q estimate them; J is symmetric only for the best denoiser.
    """
    start = fixed_noise(count, z_t.shape[1], seed=1).T.to(z_t.device)
    q = torch.linalg.qr(start)[0].expand(len(z_t), -1, -1)
    for _ in range(steps):
        columns = [jvp(denoise, (z_t,), (v.contiguous(),))[1] for v in q.unbind(-1)]
        moved = torch.stack(columns, dim=-1)
        q = torch.linalg.qr(moved)[0]
    norms = moved.norm(dim=1).sort(dim=1, descending=True).values
    return (1 - alpha_bar) / alpha_bar.sqrt() * norms


def eigen_score(
    network: nn.Module, ts: Sequence[int], *, count: int = 3, steps: int = 5, draws: int = 1
) -> Statistic:
    """Return the sum of the posterior covariance's largest eigenvalues at each timestep.

    EigenScore (Shoushtari et al. 2025) is the sum over timesteps, each in standard deviations of ID
    images (`standardised_sum`). The authors sum three eigenvalues, differentiate by differences
    instead of exactly, and iterate until convergence, up to 50 times.
    """
    sums = lambda *at: eigenvalues(*at, count=count, steps=steps).sum(1)  # noqa: E731
    return by_timestep(network, sums, ts, draws)


def standardised_sum(held_out: np.ndarray) -> Statistic:
    """Return the sum over timesteps, (N, timesteps) to (N,), in std of held-out ID images."""
    mean, std = held_out.mean(axis=0), held_out.std(axis=0) + 1e-12
    return lambda values: ((values - mean) / std).sum(axis=1)


def curvature_ratio(
    denoise: Callable, z_t: torch.Tensor, alpha_bar: torch.Tensor, *, probes: int = 1
) -> torch.Tensor:
    """Return |s|² / tr(∇s), (N,), with s = -∇ log p(z_t): about 1 where p(z_t) is typical.

    The trace is Hutchinson's estimate by seeded probes of ±1, one derivative along each.
    """
    ones = fixed_noise(probes, z_t.shape[1], seed=1).sign().to(z_t.device)
    pairs = [jvp(denoise, (z_t,), (v.expand_as(z_t).contiguous(),)) for v in ones]
    score = (z_t - alpha_bar.sqrt() * pairs[0][0]) / (1 - alpha_bar)
    trace = torch.stack([(along * v).sum(1) for (_, along), v in zip(pairs, ones, strict=True)])
    curvature = (z_t.shape[1] - alpha_bar.sqrt() * trace.mean(0)) / (1 - alpha_bar)
    return (score**2).sum(1) / curvature


def scoped(network: nn.Module, ts: Sequence[int], *, probes: int = 1, draws: int = 1) -> Statistic:
    """Return SCOPED's ratio of squared score to curvature (Barkley et al. 2025) by timestep.

    The score of an image is the largest of its `surprise` over two timesteps.
    """
    return by_timestep(network, partial(curvature_ratio, probes=probes), ts, draws)


def surprise(held_out: np.ndarray) -> Statistic:
    """Return the largest over timesteps, (N, timesteps) to (N,), of -log density of ID images.

    The density of each timestep's values is estimated by Gaussian kernels on held-out ID images,
    of Scott's width; the authors do not state theirs.
    """
    width = np.maximum(held_out.std(axis=0), 1e-12) * len(held_out) ** -0.2
    columns = (held_out / width).T[:, :, None]
    fitted = [KernelDensity(bandwidth=1.0).fit(column) for column in columns]

    def score(values: np.ndarray) -> np.ndarray:
        columns = (values / width).T[:, :, None]
        parts = [-of.score_samples(x) for of, x in zip(fitted, columns, strict=True)]
        return np.max(parts, axis=0)

    return score
