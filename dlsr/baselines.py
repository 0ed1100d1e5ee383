"""Baselines on the same frozen features: nearest neighbours, a Gaussian and two autoencoders."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import partial

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from dlsr.errors import UserError
from dlsr.features import check_finite
from dlsr.lfdn import zero
from dlsr.scores import mfsim
from dlsr.training import fit_network

# scikit-learn reads the parameters from the constructor that dataclass writes.
estimator = dataclass(eq=False, repr=False)


class Baseline(BaseEstimator):
    """A detector by scikit-learn's contract; a subclass writes ``_fit`` and ``_ood_score``."""

    def fit(self, x: np.ndarray, y: Sequence | None = None) -> "Baseline":
        """Fit on ID vectors ``x``, (N, c); none of the baselines here reads the labels ``y``."""
        self._fit(self._checked(x, fit=True), y)
        return self

    def ood_score(self, x: np.ndarray) -> np.ndarray:
        """Return the scores of ``x``, (N, c), as (N,) float32; a larger score means more OOD."""
        check_is_fitted(self)
        return self._ood_score(self._checked(x)).astype(np.float32)

    def _checked(self, x: np.ndarray, fit: bool = False) -> np.ndarray:
        options = dict(dtype=np.float32, order="C", ensure_all_finite=False)
        try:
            x = validate_data(self, x, reset=fit, ensure_min_samples=1 + fit, **options)
        except ValueError as error:
            raise UserError(str(error)) from error
        check_finite(x)
        return x


@estimator
class KNN(Baseline):
    """Distance to the k-th nearest training vector, all scaled to length 1 (Sun et al. 2022)."""

    k: int = 50

    def _fit(self, x: np.ndarray, y: Sequence | None) -> None:
        if not 1 <= self.k <= len(x):
            raise UserError(f"k={self.k} was given for {len(x)} vectors; choose 1 to {len(x)}.")
        self.vectors_ = normalize(x)

    def _ood_score(self, x: np.ndarray) -> np.ndarray:
        # Brute force works through the training vectors in blocks: no (N, training) matrix is made.
        neighbours = NearestNeighbors(n_neighbors=self.k, algorithm="brute").fit(self.vectors_)
        return neighbours.kneighbors(normalize(x))[0][:, -1]


class Gaussian(Baseline):
    """Squared Mahalanobis distance from one Gaussian (Lee et al. 2018, here without labels).

    The covariance is shrunk by Ledoit and Wolf's formula, in float64: z0's own is nearly singular.
    """

    def _fit(self, x: np.ndarray, y: Sequence | None) -> None:
        gaussian = LedoitWolf().fit(x.astype(np.float64))
        self.location_, self.precision_ = gaussian.location_, gaussian.precision_

    def _ood_score(self, x: np.ndarray) -> np.ndarray:
        difference = x - self.location_  # scikit-learn's own `mahalanobis` is many times slower
        return ((difference @ self.precision_) * difference).sum(axis=1)


class ResidualBlock(nn.Sequential):
    """`dlsr.lfdn.ResidualBlock` without the timestep."""

    def __init__(self, width: int) -> None:
        into = nn.GroupNorm(1, width), nn.SiLU(), nn.Linear(width, width)
        super().__init__(*into, nn.GroupNorm(1, width), nn.SiLU(), zero(nn.Linear(width, width)))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ResidualNetwork(nn.Sequential):
    """`dlsr.lfdn.LFDN` without the timestep: 2 linear layers a block, one before and one after."""

    def __init__(self, features: int, *, width: int, blocks: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(features, width))
        self.extend(ResidualBlock(width) for _ in range(blocks))
        self.extend([nn.GroupNorm(1, width), nn.SiLU(), zero(nn.Linear(width, features))])

    def loss(self, x: Tensor, draws: torch.Generator) -> Tensor:
        """Return the mean squared error of the reconstruction of ``x``, (N, c)."""
        return ((x - self(x)) ** 2).mean()


class VariationalNetwork(nn.Module):
    """5 linear layers to a Gaussian of ``latent`` numbers and 8 back, with SiLU between them."""

    def __init__(self, features: int, *, width: int, latent: int) -> None:
        super().__init__()
        self.encoder = linear_layers(features, *[width] * 4, 2 * latent)
        self.decoder = linear_layers(latent, *[width] * 7, features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of ``x``, (N, c), from the latent mean."""
        return self.decoder(self.encoder(x).chunk(2, dim=1)[0])

    def loss(self, x: Tensor, draws: torch.Generator) -> Tensor:
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


@estimator
class ReconstructionBaseline(Baseline):
    """A network whose reconstruction of z0 is scored by MFsim, as the LFDN's is.

    A subclass writes ``build(features)``, which returns a network with ``forward(x)`` and
    ``loss(x, draws)``; its own parameters tell that network from others in the cache (see
    `dlsr.training.fit_network`). ``channels`` are the layers' widths in z0; None means one layer.
    """

    channels: tuple[int, ...] | None = None
    _: KW_ONLY
    epochs: int = 30
    lr: float = 1e-3
    weight_decay: float = 1e-4
    batch_size: int = 128
    seed: int = 0
    device: str | None = None
    progress: bool = False

    def _fit(self, x: np.ndarray, y: Sequence | None) -> None:
        self.channels_ = tuple(self.channels or x.shape[1:])
        if sum(self.channels_) != x.shape[1]:
            raise UserError(f"channels={self.channels_} was given for {x.shape[1]} features.")
        size = self.get_params()
        common = [f.name for f in fields(ReconstructionBaseline) if f.name != "channels"]
        options = {name: size.pop(name) for name in common}
        del size["channels"]
        options |= {"name": type(self).__name__, "size": size}
        options["batch_size"] = min(self.batch_size, len(x))
        self.network_ = fit_network(x, partial(self.build, x.shape[1]), _loss, **options).last

    def reconstruct(self, x: np.ndarray) -> np.ndarray:
        """Return the reconstruction of ``x``, (N, c) float32."""
        check_is_fitted(self, "network_")
        parts = torch.tensor(x, dtype=torch.float32).split(4096)  # this bounds the memory
        device = next(self.network_.parameters()).device
        return torch.cat([self.network_(part.to(device)).cpu() for part in parts]).numpy()

    def _ood_score(self, x: np.ndarray) -> np.ndarray:
        return mfsim(x, self.reconstruct(x), self.channels_)


def _loss(network: nn.Module, x: Tensor, draws: torch.Generator) -> Tensor:
    return network.loss(x, draws)


@estimator
class AutoEncoder(ReconstructionBaseline):
    """The paper's AE, "the LFDN network without the timestep embedding, i.e., a 16-layer linear
    network".

    In our reading the 16 layers are those of 8 blocks, with no noise and no bottleneck. The paper
    states neither width nor epochs; both are ours.
    """

    _: KW_ONLY
    width: int = 720
    blocks: int = 8
    epochs: int = 10
    lr: float = 1e-4

    def build(self, features: int) -> ResidualNetwork:
        """Return the untrained network."""
        return ResidualNetwork(features, width=self.width, blocks=self.blocks)


@estimator
class VAE(ReconstructionBaseline):
    """The paper's VAE, "a 5-layer linear network as the encoder and an 8-layer linear network as
    the decoder".

    The paper states neither width, latent size, activation, initial weights, learning rate nor
    epochs; all are ours.
    """

    _: KW_ONLY
    width: int = 512
    latent: int = 64

    def build(self, features: int) -> VariationalNetwork:
        """Return the untrained network."""
        return VariationalNetwork(features, width=self.width, latent=self.latent)
