"""The method behind scikit-learn's contract for outlier detectors."""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted

from dlsr import __version__
from dlsr.datasets import UserError
from dlsr.diffusion import Reconstruction, reconstruct
from dlsr.features import check_finite, pick_device, replace_file
from dlsr.lfdn import LFDN
from dlsr.scores import FIRST_EPOCH_NOISE, check_choice, lr, mfsim, mse
from dlsr.training import Trained, TrainingSettings, as_json, flattened, train, weights_of

THRESHOLD_QUANTILE = 0.95
FORMAT = 1


class DLSRDetector(OutlierMixin, BaseEstimator):
    """Diffusion-based layer-wise semantic reconstruction on z0 (see `features.layer_zscore`).

    Defaults are the paper's; ``reconstruction``, ``t`` and ``layers`` are the released code's.

    channels: widths of the layers in z0, in order (None: one layer).
    score: ``mse``, ``lr`` or ``mfsim``.
    layers: the layers MFsim reads, ``2..M`` or ``all``.
    reconstruction, t, noise_draws: see `diffusion.Reconstruction`.
    width, blocks, epochs, lr, weight_decay, batch_size: see `training.TrainingSettings`.
    calibration_fraction: share of the images held out of the fit to set ``threshold_``; 0: none.
    seed: fixes weights, order, noise and the held-out share.
    device: None takes CUDA where there is one.
    """

    def __init__(
        self,
        channels: tuple[int, ...] | None = None,
        *,
        score: str = "mfsim",
        layers: str = "2..M",
        reconstruction: str = "released",
        t: int = 3,
        noise_draws: int = 1,
        width: int = 1440,
        blocks: int = 16,
        epochs: int = 150,
        lr: float = 1e-4,
        weight_decay: float = 1e-4,
        batch_size: int = 128,
        calibration_fraction: float = 0.1,
        seed: int = 0,
        device: str | None = None,
        progress: bool = False,
    ) -> None:
        self.channels = channels
        self.score = score
        self.layers = layers
        self.reconstruction = reconstruction
        self.t = t
        self.noise_draws = noise_draws
        self.width = width
        self.blocks = blocks
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.calibration_fraction = calibration_fraction
        self.seed = seed
        self.device = device
        self.progress = progress

    def fit(self, z: np.ndarray, y: Any = None) -> "DLSRDetector":
        """Train on ID vectors (N, c); labels are ignored."""
        z = np.asarray(z, dtype=np.float32)
        if z.ndim != 2 or (self.channels is not None and z.shape[1] != sum(self.channels)):
            raise UserError(
                f"z of shape {z.shape} was given; channels={self.channels} needs {self._needed()}."
            )
        self.channels_ = tuple(self.channels or (z.shape[1],))
        check_choice(self.score, self.layers, self.channels_)
        self._how()
        if not 0 <= self.calibration_fraction < 1:
            raise UserError(f"calibration_fraction={self.calibration_fraction} was given; it is in [0, 1).")
        fitted, held_out = self._split(z)
        self.n_features_in_ = z.shape[1]
        settings = TrainingSettings(
            width=self.width,
            blocks=self.blocks,
            epochs=self.epochs,
            lr=self.lr,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        self.trained_ = train(fitted, settings, device=self.device, progress=self.progress)
        self.threshold_ = None
        if len(held_out):
            scores = self.ood_score(held_out)
            self.threshold_ = float(np.quantile(scores, THRESHOLD_QUANTILE))
        return self

    def ood_score(self, z: np.ndarray) -> np.ndarray:
        """(N,) scores, larger = more OOD; the noise is fixed by ``seed``."""
        check_is_fitted(self, "trained_")
        z = self._checked(z)
        last = reconstruct(self.trained_.network, z, self._how(), seed=self.seed)
        if self.score == "mfsim":
            return mfsim(z, last, self.channels_, layers=self.layers)
        if self.score == "mse":
            return mse(z, last)
        first = reconstruct(self.trained_.first_epoch, z, self._how(), seed=self.seed + FIRST_EPOCH_NOISE)
        return lr(z, first, last)

    def score_samples(self, z: np.ndarray) -> np.ndarray:
        """Minus the OOD score: larger = more ID, as scikit-learn has it."""
        return -self.ood_score(z)

    def decision_function(self, z: np.ndarray) -> np.ndarray:
        """``threshold_`` minus the OOD score: negative = OOD."""
        check_is_fitted(self, "trained_")
        if self.threshold_ is None:
            raise UserError("No threshold was set: fit with calibration_fraction above 0, or set threshold_.")
        return self.threshold_ - self.ood_score(z)

    def predict(self, z: np.ndarray) -> np.ndarray:
        """+1 for ID, -1 for OOD; at the threshold, 95 % of held-out ID images are +1."""
        return np.where(self.decision_function(z) >= 0, 1, -1)

    def save(self, folder: str | Path, *, about: dict[str, Any] | None = None) -> None:
        """Write ``network.safetensors`` and ``detector.json`` into a folder; no pickle.

        ``about`` is kept as it is: say there which encoder, weights and images z came from.
        """
        check_is_fitted(self, "trained_")
        folder = Path(folder)
        networks = {"network": self.trained_.network, "first_epoch": self.trained_.first_epoch}
        tensors = {name: weight.contiguous().cpu() for name, weight in flattened(networks).items()}
        blob = safetensors.torch.save(tensors)
        content = {
            "format": FORMAT,
            "parameters": self.get_params(),
            "channels": self.channels_,
            "threshold": self.threshold_,
            "losses": self.trained_.losses,
            "network_sha256": hashlib.sha256(blob).hexdigest(),
            "versions": {
                "dlsr": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "about": about or {},
        }
        replace_file(folder / "network.safetensors", lambda path: path.write_bytes(blob))
        replace_file(folder / "detector.json", lambda path: path.write_text(as_json(content)))

    @classmethod
    def load(cls, folder: str | Path, *, device: str | None = None) -> "DLSRDetector":
        """Read a saved detector; what was said of it is in ``about_``."""
        folder = Path(folder)
        try:
            content = json.loads((folder / "detector.json").read_text())
            blob = (folder / "network.safetensors").read_bytes()
            if content["format"] != FORMAT:
                raise UserError(
                    f"The detector in {folder} was saved by another version (format {content['format']}, "
                    f"this is {FORMAT}); fit it again, or use dlsr {content['versions']['dlsr']}."
                )
            if hashlib.sha256(blob).hexdigest() != content["network_sha256"]:
                raise ValueError("network.safetensors is cut short or of another detector")
            tensors = safetensors.torch.load(blob)
            detector = cls(**{**content["parameters"], "device": device})
            detector._restore(content, tensors)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"There is no whole detector in {folder} ({error}); save it again.") from error
        return detector

    def _restore(self, content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.channels_ = tuple(content["channels"])
        self.n_features_in_ = sum(self.channels_)
        self.threshold_ = content["threshold"]
        self.about_ = content["about"]
        self.channels = tuple(self.channels) if self.channels is not None else None
        networks = {}
        for name in ("network", "first_epoch"):
            network = LFDN(self.n_features_in_, width=self.width, blocks=self.blocks)
            network.load_state_dict(weights_of(name, tensors))
            networks[name] = network.to(pick_device(self.device)).eval().requires_grad_(False)
        self.trained_ = Trained(**networks, losses=content["losses"], settings=None)

    def _split(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The vectors that are fitted on, in their order, and those held out to calibrate."""
        order = np.random.RandomState(self.seed).permutation(len(z))
        held_out = int(np.ceil(self.calibration_fraction * len(z)))
        return z[np.sort(order[held_out:])], z[order[:held_out]]

    def _how(self) -> Reconstruction:
        return Reconstruction(self.reconstruction, self.t, self.noise_draws)

    def _needed(self) -> str:
        return "(images, features)" if self.channels is None else f"(images, {sum(self.channels)})"

    def _checked(self, z: np.ndarray) -> np.ndarray:
        z = np.asarray(z, dtype=np.float32)
        if z.ndim != 2 or z.shape[1] != self.n_features_in_:
            raise UserError(
                f"Features of shape {z.shape} were given; this detector was fitted on {self.n_features_in_} "
                "features an image. Use the encoder and layers it was fitted with."
            )
        check_finite(z)
        return z
