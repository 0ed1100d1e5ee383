"""The method as a scikit-learn outlier detector on z0, which is saved in one file.

Of the paper's scores it has MSE and MFsim; LR needs two networks and is left to `dlsr.scores`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from dlsr import __version__
from dlsr.baselines import Score, fit_gaussian, fit_knn, gaussian_score, knn_score
from dlsr.cache import array_sha256, as_json, read_tensors, write_tensors
from dlsr.diffusion import ddim_released, fixed_noise, reconstruct
from dlsr.errors import UserError
from dlsr.features import check_finite, pick_device
from dlsr.lfdn import LFDN
from dlsr.scores import mfsim, mse
from dlsr.training import train

FORMAT = 2  # of the file; raise it when an older dlsr could not read the new one
METHODS = ("gaussian", "knn", "mse", "mfsim")


@dataclass(eq=False, repr=False)  # scikit-learn reads the parameters from its constructor
class DLSRDetector(OutlierMixin, BaseEstimator):
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

    def fit(self, z: np.ndarray, y: object = None) -> "DLSRDetector":
        """Fit on z0 of ID images, (N, c), and set the threshold; labels ``y`` are not read."""
        z = self._checked(z, reset=True)
        n, share = len(z), self.calibration_fraction
        channels = tuple(map(int, z.shape[1:] if self.channels is None else self.channels))
        if sum(channels) != z.shape[1] or self.method not in METHODS or not 0 < share < 1 or n < 3:
            raise UserError(
                f"{z.shape} vectors, channels={channels}, method={self.method!r} and "
                f"calibration_fraction={share} were given; a fit needs 3 vectors or more, channels "
                f"that sum to their length, one of {', '.join(METHODS)}, and a share in (0, 1)."
            )
        # Scoring reads this copy, so that set_params changes nothing before the next fit.
        unused = {"device": None, "progress": False}
        self.settings_ = self.get_params() | unused | {"channels": channels}
        self.about_, self.versions_ = {}, {"dlsr": __version__, "torch": torch.__version__}
        order = np.random.RandomState(self.seed).permutation(n)
        held_out = min(max(int(np.ceil(share * n)), 1), n - 2)
        self.arrays_ = self._train(z[np.sort(order[held_out:])])
        self.score_ = _score_of(self.settings_, self.arrays_, self.device)
        self.threshold_ = float(np.quantile(self.ood_score(z[order[:held_out]]), 0.95))
        return self

    def ood_score(self, z: np.ndarray) -> np.ndarray:
        """Return the scores of z0, (N, c), as (N,) float32; a larger score means more OOD."""
        check_is_fitted(self)
        return self.score_(self._checked(z)).astype(np.float32)

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
        check_is_fitted(self)
        content = {"format": FORMAT, "parameters": self.settings_, "threshold": self.threshold_}
        content |= {"about": about or self.about_, "versions": self.versions_}
        arrays = {name: torch.from_numpy(array) for name, array in self.arrays_.items()}
        write_tensors(Path(path), arrays, content | {"sha256": _sha256(content, self.arrays_)})

    @classmethod
    def load(cls, path: str | Path, *, device: str | None = None) -> "DLSRDetector":
        """Read a saved detector; ``about_`` and ``versions_`` are what was saved with it.

        Raises `UserError` for a file that is damaged, of another version or no detector.
        """
        content, tensors = read_tensors(Path(path))
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        form = content.get("format")
        if form != FORMAT:
            raise UserError(f"{path} has the format {form}, {FORMAT} is needed; fit it again.")
        if content.pop("sha256", None) != _sha256(content, arrays):
            raise UserError(f"The detector {path} is damaged: its checksum differs; fit it again.")
        settings = content["parameters"]
        settings["channels"] = tuple(settings["channels"])
        detector = cls(**settings | {"device": device})
        detector.settings_, detector.n_features_in_ = settings, sum(settings["channels"])
        detector.arrays_, detector.score_ = arrays, _score_of(settings, arrays, device)
        for name in ("threshold", "about", "versions"):
            setattr(detector, f"{name}_", content[name])
        return detector

    def _checked(self, z: np.ndarray, reset: bool = False) -> np.ndarray:
        options = dict(dtype=np.float32, order="C", ensure_all_finite=False)
        try:
            z = validate_data(self, z, reset=reset, ensure_min_samples=1 + reset, **options)
        except ValueError as error:
            raise UserError(str(error)) from error
        return check_finite(z)

    def _train(self, z: np.ndarray) -> dict[str, np.ndarray]:
        """Return the arrays that scores are computed from, and that are saved."""
        if self.method == "gaussian":
            return fit_gaussian(z).keywords
        if self.method == "knn":
            return {"vectors": fit_knn(z, k=min(self.k, len(z))).keywords["vectors"]}
        names = ("width", "blocks", "epochs", "lr", "weight_decay", "seed", "device", "progress")
        options = {name: getattr(self, name) for name in names}
        network = train(z, batch_size=min(self.batch_size, len(z)), **options).last
        return {name: tensor.cpu().numpy() for name, tensor in network.state_dict().items()}


def _score_of(settings: dict, arrays: dict[str, np.ndarray], device: str | None) -> Score:
    """Return the score of a fitted detector's arrays."""
    if settings["method"] == "gaussian":
        return partial(gaussian_score, **arrays)
    if settings["method"] == "knn":
        return partial(knn_score, **arrays, k=min(settings["k"], len(arrays["vectors"])))
    with torch.device("meta"):  # the weights come from the arrays
        sizes = {name: settings[name] for name in ("width", "blocks")}
        network = LFDN(sum(settings["channels"]), **sizes)
    weights = {name: torch.tensor(array) for name, array in arrays.items()}
    network.load_state_dict(weights, assign=True)
    network.to(pick_device(device)).eval().requires_grad_(False)
    return partial(_reconstruction_score, network=network, settings=settings)


def _reconstruction_score(z: np.ndarray, *, network: LFDN, settings: dict) -> np.ndarray:
    noise = fixed_noise(settings["t"] + 1, z.shape[1], seed=settings["seed"])
    back = reconstruct(network, z, ddim_released, t=settings["t"], noise=noise)
    if settings["method"] == "mse":
        return mse(z, back)
    return mfsim(z, back, settings["channels"], layers=settings["layers"])


def _sha256(content: dict, arrays: dict[str, np.ndarray]) -> str:
    """Return one checksum of what a file says and of all its arrays."""
    parts = {name: array_sha256(array) for name, array in arrays.items()}
    return hashlib.sha256(as_json([content, parts]).encode()).hexdigest()
