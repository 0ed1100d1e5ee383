"""Other detectors fitted on the same frozen features as the LFDN, to compare it with."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.base import BaseEstimator
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize
from sklearn.utils.validation import check_is_fitted
from torch import nn
from tqdm import tqdm

from dlsr.datasets import UserError, cache_folder
from dlsr.features import check_finite, code_hash, pick_device, replace_file
from dlsr.lfdn import zero
from dlsr.scores import LAYER_CHOICES, mfsim, mse
from dlsr.training import as_json

CHUNK = 4096  # vectors scored at once, which bounds the memory
DICE_SPARSITY = 0.9
ASH_PERCENTILE = 90
Scores = dict[tuple[str, str], np.ndarray]


class Detector(BaseEstimator):
    """What every baseline offers; `_fit` and `_scores` are its own, the checks are here."""

    def fit(self, x: np.ndarray, y: Sequence | None = None) -> "Detector":
        """Fit on ID vectors (N, c); only the probe reads the labels."""
        x = self._checked(x)
        if len(x) < 2:
            raise UserError(f"{len(x)} images were given to fit on; give at least 2.")
        self._fit(x, y)
        self.n_features_in_ = x.shape[1]
        return self

    def all_scores(self, x: np.ndarray) -> Scores:
        """(N,) float32 by (score, layers), named as by `dlsr.scores.all_scores`; larger = more OOD."""
        check_is_fitted(self, "n_features_in_")
        x = self._checked(x)
        if x.shape[1] != self.n_features_in_:
            raise UserError(
                f"Features of shape {x.shape} were given; this {type(self).__name__} was fitted on "
                f"{self.n_features_in_} features an image. Use the encoder and layers it was fitted with."
            )
        return {name: values.astype(np.float32) for name, values in self._scores(x).items()}

    def ood_score(self, x: np.ndarray) -> np.ndarray:
        """The first of `all_scores`, (N,)."""
        return next(iter(self.all_scores(x).values()))

    def _fit(self, x: np.ndarray, y: Sequence | None) -> None:
        raise NotImplementedError

    def _scores(self, x: np.ndarray) -> Scores:
        raise NotImplementedError

    def _checked(self, x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x, dtype=np.float32)
        if x.ndim != 2:
            raise UserError(f"Features of shape {x.shape} were given; (images, features) is needed.")
        check_finite(x)
        return x


class KNN(Detector):
    """Distance to the k-th nearest training vector, all of length 1 (Sun et al. 2022, deep kNN).

    On vectors of length 1 the Euclidean distance orders as the cosine does.
    """

    def __init__(self, k: int = 50) -> None:
        self.k = k

    def _fit(self, x: np.ndarray, y: Sequence | None) -> None:
        if not 1 <= self.k <= len(x):
            raise UserError(
                f"k={self.k} neighbours were asked of {len(x)} training images; choose k from 1 to {len(x)}."
            )
        self.neighbours_ = NearestNeighbors(n_neighbors=self.k, algorithm="brute").fit(normalize(x))

    def _scores(self, x: np.ndarray) -> Scores:
        # scikit-learn goes through the training vectors in blocks: no (N, training) matrix is made.
        return {("knn", "all"): self.neighbours_.kneighbors(normalize(x))[0][:, -1]}


class Mahalanobis(Detector):
    """Squared distance from one Gaussian (Lee et al. 2018, without labels), Ledoit-Wolf, in float64."""

    def _fit(self, x: np.ndarray, y: Sequence | None) -> None:
        self.gaussian_ = LedoitWolf().fit(x.astype(np.float64))

    def _scores(self, x: np.ndarray) -> Scores:
        # Not `gaussian_.mahalanobis`: without a matrix product it takes many times as long.
        difference = x - self.gaussian_.location_
        squared = ((difference @ self.gaussian_.precision_) * difference).sum(axis=1)
        return {("mahalanobis", "all"): squared}


class ResidualBlock(nn.Module):
    """`dlsr.lfdn.ResidualBlock` without the timestep."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = nn.Sequential(nn.GroupNorm(1, width), nn.SiLU(), nn.Linear(width, width))
        self.out = nn.Sequential(nn.GroupNorm(1, width), nn.SiLU(), zero(nn.Linear(width, width)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(self.into(x))


class ResidualNetwork(nn.Module):
    """`dlsr.lfdn.LFDN` without the timestep: 2 linear layers a block, and one before and after all."""

    def __init__(self, features: int, *, width: int, blocks: int) -> None:
        super().__init__()
        self.into = nn.Sequential(nn.SiLU(), nn.Linear(features, width))
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.out = nn.Sequential(nn.GroupNorm(1, width), nn.SiLU(), zero(nn.Linear(width, features)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, c) -> its reconstruction."""
        return self.out(self.blocks(self.into(x)))

    def loss(self, x: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
        """Mean squared error; nothing is drawn."""
        return ((x - self(x)) ** 2).mean()


class VariationalNetwork(nn.Module):
    """5 linear layers to a Gaussian of ``latent`` numbers, 8 back, SiLU between them."""

    def __init__(self, features: int, *, width: int, latent: int) -> None:
        super().__init__()
        self.encoder = linear_layers(features, *[width] * 4, 2 * latent)
        self.decoder = linear_layers(latent, *[width] * 7, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, c) -> its reconstruction from the latent mean."""
        mean, _ = self.encoder(x).chunk(2, dim=1)
        return self.decoder(mean)

    def loss(self, x: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
        """Minus the ELBO under unit variance, less its constant: half the squared error plus the KL."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=draws, device=mean.device)
        reconstruction = self.decoder(mean + (log_variance / 2).exp() * noise)
        error = ((x - reconstruction) ** 2).sum(dim=1) / 2
        return (error + kl_divergence(mean, log_variance)).mean()


def linear_layers(*widths: int) -> nn.Sequential:
    """Linear layers between these widths, SiLU between them."""
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        linear = nn.Linear(widths[i], widths[i + 1])
        # Under torch's default the signal fades over 13 layers, and a VAE ignores its latent at first.
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def kl_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """From each diagonal Gaussian (N, latent) to the standard normal, (N,)."""
    return (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=1) / 2


def train_network(
    network: nn.Module,
    x: np.ndarray,
    *,
    epochs: int,
    lr: float,
    weight_decay: float,
    batch_size: int,
    seed: int,
    device: str,
    progress: bool = False,
) -> None:
    """AdamW on ``network.loss`` over (N, c), in a new order every epoch; the smaller last batch counts."""
    vectors = torch.tensor(x, device=device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    draws = torch.Generator(device).manual_seed(seed)
    bar = tqdm(range(epochs), unit="epoch", desc=type(network).__name__, disable=not progress)
    for epoch in bar:
        total = torch.zeros((), device=device)
        for rows in torch.randperm(len(vectors), generator=draws, device=device).split(batch_size):
            loss = network.loss(vectors[rows], draws)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
        mean = total.item() / len(vectors)
        bar.set_postfix(loss=f"{mean:.4f}")
        if not math.isfinite(mean):
            raise UserError(f"The training loss became {mean} in epoch {epoch + 1}; lower lr (it is {lr}).")


class Reconstructing(Detector):
    """A network that reconstructs z0, scored as the LFDN is; trained once, then read from the cache."""

    def _network(self, features: int) -> nn.Module:
        raise NotImplementedError

    def _fit(self, x: np.ndarray, y: Sequence | None) -> None:
        settings = self._settings()
        if x.shape[1] != sum(self.channels):
            raise UserError(
                f"Features of shape {x.shape} were given; channels={tuple(self.channels)} needs "
                f"(images, {sum(self.channels)})."
            )
        device = pick_device(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = self._network(x.shape[1]).to(device)
        file = self._file(x, settings)
        if file.is_file():
            _read(file, network)
        else:
            names = ("epochs", "lr", "weight_decay", "batch_size", "seed")
            options = {name: settings[name] for name in names}
            train_network(network, x, **options, device=device, progress=self.progress)
            tensors = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
            replace_file(file, lambda path: save_file(tensors, path))
        self.network_ = network.eval().requires_grad_(False)

    def _scores(self, x: np.ndarray) -> Scores:
        reconstruction = self.reconstruct(x)
        scores = {
            ("mfsim", layers): mfsim(x, reconstruction, self.channels, layers=layers)
            for layers in LAYER_CHOICES
            if layers != "2..M" or len(self.channels) > 1
        }
        return scores | {("mse", "all"): mse(x, reconstruction)}

    def reconstruct(self, x: np.ndarray) -> np.ndarray:
        """(N, c) -> (N, c)."""
        check_is_fitted(self, "network_")
        device = next(self.network_.parameters()).device
        chunks = torch.tensor(x, dtype=torch.float32).split(CHUNK)
        with torch.no_grad():
            return torch.cat([self.network_(chunk.to(device)).cpu() for chunk in chunks]).numpy()

    def _settings(self) -> dict[str, Any]:
        """All parameters that change the network."""
        settings = {k: v for k, v in self.get_params().items() if k not in ("device", "progress")}
        sizes = [k for k in settings if k not in ("channels", "lr", "weight_decay", "seed")]
        if min(settings[name] for name in sizes) < 1 or self.lr <= 0 or min(self.weight_decay, self.seed) < 0:
            raise UserError(
                f"{type(self).__name__} needs {', '.join(sizes)} of at least 1, lr above 0, weight_decay "
                f"and seed of at least 0; it was given {settings}."
            )
        return settings

    def _file(self, x: np.ndarray, settings: dict[str, Any]) -> Path:
        about = {
            "network": type(self).__name__,
            "settings": settings,
            "data_sha256": hashlib.sha256(x.view(np.uint8)).hexdigest(),
            "code": code_hash("lfdn", "baselines"),
        }
        digest = hashlib.sha256(as_json(about).encode()).hexdigest()[:20]
        return cache_folder() / "networks" / f"{digest}.safetensors"


class AutoEncoder(Reconstructing):
    """The paper's AE: "the LFDN network without the timestep embedding, i.e., a 16-layer linear network".

    Our reading: 8 blocks hold the 16 linear layers. No noise, no bottleneck, trained with MSE. The
    paper states neither width nor epochs for it; both are ours.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        *,
        width: int = 720,
        blocks: int = 8,
        epochs: int = 10,
        lr: float = 1e-4,
        weight_decay: float = 1e-4,
        batch_size: int = 128,
        seed: int = 0,
        device: str | None = None,
        progress: bool = False,
    ) -> None:
        self.channels = channels
        self.width = width
        self.blocks = blocks
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.progress = progress

    def _network(self, features: int) -> ResidualNetwork:
        return ResidualNetwork(features, width=self.width, blocks=self.blocks)


class VAE(Reconstructing):
    """The paper's VAE: "a 5-layer linear network as the encoder and an 8-layer linear network as the
    decoder".

    Its width, latent size, activation, initial weights, learning rate and epochs are not stated; all
    are ours.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        *,
        width: int = 512,
        latent: int = 64,
        epochs: int = 30,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        batch_size: int = 128,
        seed: int = 0,
        device: str | None = None,
        progress: bool = False,
    ) -> None:
        self.channels = channels
        self.width = width
        self.latent = latent
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.progress = progress

    def _network(self, features: int) -> VariationalNetwork:
        return VariationalNetwork(features, width=self.width, latent=self.latent)


class Probe(Detector):
    """Multinomial logistic regression on ReLU of the last layer's raw features; it sees ID labels.

    The ReLU is taken here. One constant, the standard deviation of all training values, scales the
    features, so that ``C`` means the same for every encoder. ``seed`` only goes on to scikit-learn:
    its solver lbfgs draws nothing.
    """

    def __init__(self, seed: int = 0, *, C: float = 0.01, max_iter: int = 1000) -> None:
        self.seed = seed
        self.C = C
        self.max_iter = max_iter

    def _fit(self, x: np.ndarray, y: Sequence | None) -> None:
        if y is None:
            raise UserError("The probe needs the ID training labels and none were given; call fit(x, y).")
        labels = np.asarray(y)
        if labels.shape != (len(x),):
            raise UserError(f"Labels of shape {labels.shape} were given for {len(x)} images; give one each.")
        if len(np.unique(labels)) < 2:
            raise UserError("All labels given are the same; the probe needs images of at least 2 classes.")
        self.scale_ = 1 / (float(np.maximum(x, 0).std()) or 1.0)
        activations = self._activations(x)
        regression = LogisticRegression(C=self.C, max_iter=self.max_iter, random_state=self.seed)
        regression.fit(activations, labels)
        self.classes_ = regression.classes_
        self.weights_, self.bias_ = regression.coef_, regression.intercept_
        if len(self.classes_) == 2:  # scikit-learn keeps the difference of the two classes' logits
            self.weights_ = np.concatenate([-self.weights_, self.weights_]) / 2
            self.bias_ = np.concatenate([-self.bias_, self.bias_]) / 2
        self.dice_weights_ = dice_weights(self.weights_, activations.mean(axis=0))
        self.accuracy_ = self._share_right(activations, labels)

    def accuracy(self, x: np.ndarray, y: Sequence) -> float:
        """Share of the images (N, c) that get their label."""
        check_is_fitted(self, "n_features_in_")
        return self._share_right(self._activations(self._checked(x)), np.asarray(y))

    def _share_right(self, activations: np.ndarray, labels: np.ndarray) -> float:
        logits = activations @ self.weights_.T + self.bias_
        return float((self.classes_[logits.argmax(axis=1)] == labels).mean())

    def _activations(self, x: np.ndarray) -> np.ndarray:
        return np.maximum(x, 0).astype(np.float64) * self.scale_

    def _scores(self, x: np.ndarray) -> Scores:
        x = self._activations(x)
        logits = x @ self.weights_.T + self.bias_
        return {
            ("msp", "last"): -torch.from_numpy(logits).softmax(dim=1).amax(dim=1).numpy(),
            ("energy", "last"): energy(logits),
            ("dice", "last"): energy(x @ self.dice_weights_.T + self.bias_),
            ("ash_s", "last"): energy(ash_s(x) @ self.weights_.T + self.bias_),
        }


def energy(logits: np.ndarray) -> np.ndarray:
    """Minus the log of the summed exponentials of (N, K), (N,) (Liu et al. 2020)."""
    return -torch.from_numpy(logits).logsumexp(dim=1).numpy()


def dice_weights(
    weights: np.ndarray, mean_activation: np.ndarray, *, sparsity: float = DICE_SPARSITY
) -> np.ndarray:
    """(K, c) with only the largest contributions, weight times mean activation (Sun & Li 2022, DICE)."""
    contribution = (weights * mean_activation).ravel()
    kept = np.argsort(contribution, kind="stable")[round(sparsity * contribution.size) :]
    sparse = np.zeros(contribution.size)
    sparse[kept] = weights.ravel()[kept]
    return sparse.reshape(weights.shape)


def ash_s(x: np.ndarray, *, percentile: float = ASH_PERCENTILE) -> np.ndarray:
    """(N, c) >= 0, of each vector the part from its percentile on, times exp(sum before / sum after).

    Djurisic et al. 2023, ASH-S.
    """
    pruned = np.where(x >= np.percentile(x, percentile, axis=1, keepdims=True), x, 0)
    before, after = x.sum(axis=1, keepdims=True), pruned.sum(axis=1, keepdims=True)
    return pruned * np.exp(np.divide(before, after, out=np.ones_like(after), where=after > 0))


@dataclass(frozen=True)
class Baseline:
    """One row of `BASELINES`.

    ``name`` is the one in results and file names, ``title`` the readers'; ``build`` makes an unfitted
    detector of (channels, seed); ``features`` is ``z0``, the LFDN's own input, or ``last_raw``, the last
    layer's raw pooled features; ``labels`` says whether it sees the ID training labels;
    ``size`` holds width, blocks and epochs, 0 where there is none.
    """

    name: str
    title: str
    build: Callable[[tuple[int, ...], int], Detector]
    features: str
    labels: bool
    size: Mapping[str, int]


def _baseline(
    name: str, title: str, build: Callable, *, features: str = "z0", labels: bool = False
) -> Baseline:
    parameters = build((1,), 0).get_params()
    size = {part: parameters.get(part, 0) for part in ("width", "blocks", "epochs")}
    return Baseline(name, title, build, features, labels, size)


BASELINES: dict[str, Baseline] = {
    row.name: row
    for row in (
        _baseline("knn", "kNN", lambda channels, seed: KNN()),
        _baseline("mahalanobis", "Mahalanobis", lambda channels, seed: Mahalanobis()),
        _baseline("ae", "AE", lambda channels, seed: AutoEncoder(channels, seed=seed)),
        _baseline("vae", "VAE", lambda channels, seed: VAE(channels, seed=seed)),
        _baseline(
            "probe", "Linear probe", lambda channels, seed: Probe(seed), features="last_raw", labels=True
        ),
    )
}


def _read(file: Path, network: nn.Module) -> None:
    try:
        network.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"The network {file} is cut short or damaged ({error}). Delete it to train it again."
        ) from error
