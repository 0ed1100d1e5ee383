"""The method as a scikit-learn outlier detector on z0, which is saved in one file.

Of the paper's scores it has MSE and MFsim; LR needs two networks and is left to `dlsr.scores`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import KW_ONLY
from pathlib import Path

import numpy as np
import torch
from sklearn.base import OutlierMixin
from sklearn.utils.validation import check_is_fitted

from dlsr import __version__
from dlsr.baselines import KNN, Baseline, Gaussian, estimator
from dlsr.cache import array_sha256, as_json, read_tensors, write_tensors
from dlsr.diffusion import ddim_released, fixed_noise, reconstruct
from dlsr.errors import UserError
from dlsr.features import pick_device
from dlsr.lfdn import LFDN
from dlsr.scores import mfsim, mse
from dlsr.training import train

FORMAT = 2  # of the file; raise it when an older dlsr could not read the new one
METHODS = ("gaussian", "knn", "mse", "mfsim")


@estimator
class DLSRDetector(OutlierMixin, Baseline):
    """An OOD detector on z0 (see `dlsr.features.layer_zscore`), fitted on ID images without labels.

    ``channels`` are the layers' widths in z0; None means one layer. ``method`` is ``gaussian`` or
    ``knn``, which need no training (`dlsr.baselines`), or ``mse`` or ``mfsim``, which train an
    LFDN and score its reconstruction by `dlsr.diffusion.ddim_released` from timestep ``t``;
    ``mfsim`` reads ``layers`` (see `dlsr.scores.mfsim`), and ``knn`` takes the ``k``-th neighbour,
    or the last. ``width`` to ``batch_size`` are those of `dlsr.training.train`; the paper's
    network has a width of 1440, 16 blocks and 150 epochs. ``calibration_fraction`` is the share of
    the images, at least one, that is held out of the fit to set ``threshold_``: 95 % of them pass.
    ``seed`` fixes that share, the training and the noise, which is the same for every image, so
    that the score of an image depends on no other image.
    """

    channels: Sequence[int] | None = None
    _: KW_ONLY
    method: str = "gaussian"
    layers: str | Sequence[int] = "2..M"
    t: int = 3
    k: int = 50
    width: int = 720
    blocks: int = 8
    epochs: int = 30
    lr: float = 1e-4
    weight_decay: float = 1e-4
    batch_size: int = 128
    calibration_fraction: float = 0.1
    seed: int = 0
    device: str | None = None
    progress: bool = False

    def score_samples(self, z: np.ndarray) -> np.ndarray:
        """Return minus the OOD score of z0, (N, c), as (N,): larger means more ID."""
        return -self.ood_score(z).astype(float)

    def decision_function(self, z: np.ndarray) -> np.ndarray:
        """Return ``threshold_`` minus the OOD score of z0, (N, c), as (N,): negative means OOD."""
        return self.score_samples(z) - self.offset_

    def predict(self, z: np.ndarray) -> np.ndarray:
        """Return +1 for each ID and -1 for each OOD row of z0, (N, c); the threshold is ID."""
        return np.where(self.decision_function(z) >= 0, 1, -1)

    @property
    def offset_(self) -> float:
        """Minus ``threshold_``, scikit-learn's name and sign of it."""
        return -self.threshold_

    def save(self, path: str | Path, *, about: dict | None = None) -> None:
        """Write the fitted detector into one safetensors file, which holds no code.

        ``about`` goes with it as it is: say there which encoder, weights and images z0 came from.
        Raises `UserError` if the file cannot be written; an older one there is then unharmed.
        """
        check_is_fitted(self, "threshold_")
        content = {"format": FORMAT, "parameters": self.settings_, "threshold": self.threshold_}
        content |= {"about": about or self.about_, "versions": self.versions_}
        arrays = {name: torch.from_numpy(array) for name, array in self.arrays_.items()}
        write_tensors(Path(path), arrays, content | {"sha256": _sha256(content, self.arrays_)})

    @classmethod
    def load(cls, path: str | Path, *, device: str | None = None) -> "DLSRDetector":
        """Read a saved detector; ``about_`` and ``versions_`` are what was saved with it.

        Raises `UserError` for a file that is damaged, of another version or no detector.
        """
        if (Path(path) / "detector.json").exists():
            raise UserError(f"{path} was saved by an older version of dlsr; fit it again.")
        content, tensors = read_tensors(Path(path))
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        if content.get("format") != FORMAT:
            form = content.get("format")
            raise UserError(f"{path} has the format {form}, {FORMAT} is needed; fit it again.")
        if content.pop("sha256", None) != _sha256(content, arrays):
            raise UserError(f"The detector {path} is damaged: its checksum differs; fit it again.")
        settings = content["parameters"]
        settings["channels"] = tuple(settings["channels"])
        detector = cls(**settings | {"device": device})
        detector.settings_, detector.n_features_in_ = settings, sum(settings["channels"])
        detector._restore(arrays)
        for name in ("threshold", "about", "versions"):
            setattr(detector, f"{name}_", content[name])
        return detector

    def _fit(self, x: np.ndarray, y: object) -> None:
        n, share = len(x), self.calibration_fraction
        channels = tuple(map(int, x.shape[1:] if self.channels is None else self.channels))
        if sum(channels) != x.shape[1] or self.method not in METHODS or not 0 < share < 1 or n < 3:
            raise UserError(
                f"{x.shape} vectors, channels={channels}, method={self.method!r} and "
                f"calibration_fraction={share} were given; a fit needs 3 vectors or more, channels "
                f"that sum to their length, one of {', '.join(METHODS)}, and a share in (0, 1)."
            )
        # Scoring reads this copy, so that set_params changes nothing before the next fit.
        unused = {"device": None, "progress": False}
        self.settings_ = self.get_params() | unused | {"channels": channels}
        self.about_, self.versions_ = {}, {"dlsr": __version__, "torch": torch.__version__}
        order = np.random.RandomState(self.seed).permutation(n)
        held_out = min(max(int(np.ceil(share * n)), 1), n - 2)
        self._restore(self._train(x[np.sort(order[held_out:])]))
        self.threshold_ = float(np.quantile(self.ood_score(x[order[:held_out]]), 0.95))

    def _train(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Return the arrays that scores are computed from, and that are saved."""
        if self.method == "gaussian":
            gaussian = Gaussian().fit(x)
            return {"location": gaussian.location_, "precision": gaussian.precision_}
        if self.method == "knn":
            return {"vectors": KNN(k=min(self.k, len(x))).fit(x).vectors_}
        names = ("width", "blocks", "epochs", "lr", "weight_decay", "seed", "device", "progress")
        options = {name: getattr(self, name) for name in names}
        network = train(x, batch_size=min(self.batch_size, len(x)), **options).last
        return {name: tensor.cpu().numpy() for name, tensor in network.state_dict().items()}

    def _restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Make the model of these arrays."""
        self.arrays_, settings = arrays, self.settings_
        if settings["method"] == "gaussian":
            self.model_ = Gaussian()
            self.model_.location_, self.model_.precision_ = arrays["location"], arrays["precision"]
        elif settings["method"] == "knn":
            self.model_ = KNN(k=min(settings["k"], len(arrays["vectors"])))
            self.model_.vectors_ = arrays["vectors"]
        else:
            with torch.device("meta"):  # the weights come from the arrays
                sizes = {name: settings[name] for name in ("width", "blocks")}
                self.model_ = LFDN(self.n_features_in_, **sizes)
            weights = {name: torch.tensor(array) for name, array in arrays.items()}
            self.model_.load_state_dict(weights, assign=True)
            self.model_.to(pick_device(self.device)).eval().requires_grad_(False)

    def _ood_score(self, x: np.ndarray) -> np.ndarray:
        settings = self.settings_
        if settings["method"] in ("gaussian", "knn"):
            return self.model_._ood_score(x)
        noise = fixed_noise(settings["t"] + 1, x.shape[1], seed=settings["seed"])
        back = reconstruct(self.model_, x, ddim_released, t=settings["t"], noise=noise)
        if settings["method"] == "mse":
            return mse(x, back)
        return mfsim(x, back, settings["channels"], layers=settings["layers"])


def _sha256(content: dict, arrays: dict[str, np.ndarray]) -> str:
    """Return one checksum of what a file says and of all its arrays."""
    parts = {name: array_sha256(array) for name, array in arrays.items()}
    return hashlib.sha256(as_json([content, parts]).encode()).hexdigest()
