"""The method as a scikit-learn outlier detector on z0, which is saved in one file.

Of the paper's scores it has MSE and MFsim; LR needs two networks and is left to `dlsr.scores`.
What it calls OOD is decided by p-values of familiar images (`dlsr.conformal`).
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
from dlsr.conformal import assign_folds, checked_rate, cross_conformal, flag_limit
from dlsr.diffusion import T, ddim_released, fixed_noise, reconstruct
from dlsr.errors import UserError
from dlsr.features import check_finite, pick_device
from dlsr.lfdn import LFDN
from dlsr.scores import mfsim, mse
from dlsr.training import train

FORMAT = 4  # of the file; raise it when an older dlsr could not read the new one
METHODS = ("gaussian", "knn", "mse", "mfsim")
GAUSSIAN = ("location", "precision")  # its arrays
BLOCK = 64  # vectors are scored by so many, the last ones filled up, as fewer are rounded otherwise


@dataclass(eq=False, repr=False)  # scikit-learn reads the parameters from its constructor
class DLSRDetector(OutlierMixin, BaseEstimator):
    """An OOD detector on z0 (see `dlsr.features.layer_zscore`), fitted on ID images without labels.

    ``channels`` are the layers' widths in z0; None means one layer. ``method`` is ``gaussian`` or
    ``knn``, which need no training (`dlsr.baselines`), or ``mse`` or ``mfsim``, which train an
    LFDN and score its reconstruction by `dlsr.diffusion.ddim_released` from timestep ``t``;
    ``mfsim`` reads ``layers`` (see `dlsr.scores.mfsim`), and ``knn`` takes the ``k``-th neighbour,
    or the last. ``width`` to ``batch_size`` are those of `dlsr.training.train`; the paper's
    network has a width of 1440, 16 blocks and 150 epochs.

    Images with a p-value of at most ``flag_rate`` are called OOD. ``gaussian`` and ``knn`` are
    fitted on all images and once more without each of ``folds`` folds (fewer if there are fewer
    images), so that all images calibrate the p-values. For ``mse`` and ``mfsim`` that would be as
    many trainings: there ``calibration_fraction`` of the images, at least one, is held out of the
    only one and calibrates alone. ``seed`` fixes the folds, the training and the noise, which is
    the same for every image, so that what is said of an image depends on no other image.

    After the fit ``n_calibration_`` is the number of images that calibrate, ``threshold_`` the
    largest p-value that is called OOD, 0 if so few images can give none, and ``offset_`` lies half
    a step of p-values above it.
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
    flag_rate: float = 0.05
    folds: int = 10
    calibration_fraction: float = 0.1
    seed: int = 0
    device: str | None = None
    progress: bool = False

    def fit(self, z: np.ndarray, y: object = None) -> "DLSRDetector":
        """Fit on z0 of ID images, (N, c), and calibrate; labels ``y`` are not read.

        Raises `UserError` for parameters that make no sense, and for vectors that are not finite,
        fewer than three, or all the same.
        """
        z = self._checked(z, reset=True)
        n, share = len(z), self.calibration_fraction
        channels = tuple(map(int, z.shape[1:] if self.channels is None else self.channels))
        checked_rate(self.flag_rate, "flag_rate")
        same = "the same " if np.ptp(z, axis=0).max() <= 1e-6 * np.abs(z).max() else ""
        makes_sense = sum(channels) == z.shape[1] and self.folds > 1 and self.method in METHODS
        if n < 3 or same or not makes_sense or not 0 < share < 1:
            raise UserError(
                f"{n} times {same}{z.shape[1]} numbers, channels={channels}, folds={self.folds}, "
                f"method={self.method!r} and calibration_fraction={share} were given; a fit needs "
                "3 vectors or more, not copies of one, channels that sum to their length, 2 folds "
                f"or more, one of {', '.join(METHODS)}, and a share in (0, 1)."
            )
        # Scoring reads this copy, so that set_params changes nothing before the next fit.
        unused = {"device": None, "progress": False}
        self.settings_ = self.get_params() | unused | {"channels": channels}
        self.about_, self.versions_ = {}, {"dlsr": __version__, "torch": torch.__version__}
        self.arrays_ = self._fit_arrays(z)
        self.score_, self.fold_scores_ = _scores_of(self.settings_, self.arrays_, self.device)
        return self

    def ood_score(self, z: np.ndarray) -> np.ndarray:
        """Return the scores of z0, (N, c), as (N,) float32; a larger score means more OOD.

        For ``gaussian`` and ``knn`` they are those of the model of all images.
        """
        check_is_fitted(self)
        return _in_blocks(self.score_, self._checked(z))

    def p_values(self, z: np.ndarray) -> np.ndarray:
        """Return the p-values of z0, (N, c), as (N,) float64 (`dlsr.conformal.cross_conformal`).

        They are multiples of 1 / (``n_calibration_`` + 1); a small one means OOD.
        """
        check_is_fitted(self)
        z, scores, fold = self._checked(z), self.arrays_["calibration"], self.arrays_["fold"]
        held_out = [scores[fold == f] for f in range(len(self.fold_scores_))]
        return cross_conformal([_in_blocks(score, z) for score in self.fold_scores_], held_out)

    def score_samples(self, z: np.ndarray) -> np.ndarray:
        """Return the p-values of z0, (N, c), as (N,), under scikit-learn's name."""
        return self.p_values(z)

    def decision_function(self, z: np.ndarray) -> np.ndarray:
        """Return `score_samples` of z0, (N, c), minus ``offset_``, as (N,): negative means OOD."""
        return self.score_samples(z) - self.offset_

    def predict(self, z: np.ndarray) -> np.ndarray:
        """Return -1 (OOD) for each row of z0, (N, c), whose p-value is <= ``flag_rate``, else 1."""
        return np.where(self.decision_function(z) >= 0, 1, -1)

    @property
    def n_calibration_(self) -> int:
        """The number of familiar images that the p-values are made from."""
        return len(self.arrays_["calibration"])

    @property
    def threshold_(self) -> float:
        """The largest p-value that is called OOD, or 0."""
        return flag_limit(self.n_calibration_, self.settings_["flag_rate"])

    @property
    def offset_(self) -> float:
        """The value of `score_samples` below which an image is called OOD."""
        return self.threshold_ + 0.5 / (self.n_calibration_ + 1)

    def encoder_name(self, weights_sha256: str = "") -> str:
        """Return the name of the encoder whose z0 the detector was fitted on.

        Raises `UserError` if the detector does not say it, or says other weights than these.
        """
        if not {"encoder", "weights_sha256"} <= set(self.about_):
            raise UserError("The detector does not say its encoder; fit it by `dlsr fit`.")
        name = self.about_["encoder"]
        if weights_sha256 not in ("", self.about_["weights_sha256"]):
            raise UserError(f"{name} has other weights than at the fit; use those, or fit again.")
        return name

    def save(self, path: str | Path, *, about: dict | None = None) -> None:
        """Write the fitted detector into one safetensors file, which holds no code.

        ``about`` goes with it as it is: say there which encoder, weights and images z0 came from.
        Raises `UserError` if the file cannot be written; an older one there is then unharmed.
        """
        check_is_fitted(self)
        content = {"format": FORMAT, "parameters": self.settings_, "versions": self.versions_}
        content["about"] = about or self.about_
        arrays = {name: torch.from_numpy(array) for name, array in self.arrays_.items()}
        write_tensors(Path(path), arrays, content | {"sha256": _sha256(content, self.arrays_)})

    @classmethod
    def load(cls, path: str | Path, *, device: str | None = None) -> "DLSRDetector":
        """Read a saved detector; ``about_`` and ``versions_`` are what was saved with it.

        Raises `UserError` for a file that is damaged, of another version or no detector.
        """
        content, tensors = read_tensors(Path(path))
        if content.get("format") != FORMAT:
            form = str(content.get("format"))
            raise UserError(f"{path} has the format {form:.9}, {FORMAT} is needed; fit it again.")
        try:
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            if content.pop("sha256", None) != _sha256(content, arrays):
                raise ValueError("it is damaged, as its checksum differs")
            settings = content["parameters"]
            _check_content(settings, arrays, content["about"], content["versions"])
            settings["channels"] = tuple(settings["channels"])
            detector = cls(**settings | {"device": device})
            detector.settings_, detector.arrays_ = settings, arrays
            detector.n_features_in_ = sum(settings["channels"])
            detector.about_, detector.versions_ = content["about"], content["versions"]
            detector.score_, detector.fold_scores_ = _scores_of(settings, arrays, device)
            detector.decision_function(np.ones((1, detector.n_features_in_), np.float32))
        except Exception as error:  # a file can be forged so that it raises almost anything
            told = " ".join(str(error).split())
            raise UserError(f"{path} is no detector ({told:.200}); fit it again.") from error
        return detector

    def _checked(self, z: np.ndarray, reset: bool = False) -> np.ndarray:
        options = dict(dtype=np.float32, order="C", ensure_all_finite=False)
        try:
            z = validate_data(self, z, reset=reset, ensure_min_samples=1 + reset, **options)
        except ValueError as error:
            raise UserError(str(error)) from error
        return check_finite(z)

    def _fit_arrays(self, z: np.ndarray) -> dict[str, np.ndarray]:
        """Return all arrays that scores and p-values are computed from, and that are saved.

        ``calibration`` has the score of each image that calibrates, by the model of its ``fold``.
        """
        n = len(z)
        if self.method in ("mse", "mfsim"):
            order = np.random.RandomState(self.seed).permutation(n)
            held_out = min(max(int(np.ceil(self.calibration_fraction * n)), 1), n - 2)
            arrays, z = self._train(z[np.sort(order[held_out:])]), z[order[:held_out]]
            fold = np.zeros(held_out, np.int64)
        else:
            fold, arrays = assign_folds(n, self.folds, self.seed), self._train(z)
        if self.method == "gaussian":  # float32 halves the file
            models = [self._train(z[fold != f]) for f in range(fold.max() + 1)]
            arrays |= {f"fold_{name}": np.float32([m[name] for m in models]) for name in GAUSSIAN}
        arrays["fold"] = fold
        _, by_fold = _scores_of(self.settings_, arrays, self.device)
        held_out = np.stack([_in_blocks(score, z) for score in by_fold])
        return arrays | {"calibration": held_out[fold, np.arange(len(z))]}

    def _train(self, z: np.ndarray) -> dict[str, np.ndarray]:
        """Return the arrays of one model of z0, (n, c)."""
        if self.method == "gaussian":
            return dict(fit_gaussian(z).keywords)
        if self.method == "knn":
            return {"vectors": fit_knn(z, k=min(self.k, len(z))).keywords["vectors"]}
        names = ("width", "blocks", "epochs", "lr", "weight_decay", "seed", "device", "progress")
        options = {name: getattr(self, name) for name in names}
        network = train(z, batch_size=min(self.batch_size, len(z)), **options).last
        return {name: tensor.cpu().numpy() for name, tensor in network.state_dict().items()}


def _check_content(settings: dict, arrays: dict[str, np.ndarray], about, versions) -> None:
    """Raise ValueError, or another error, for what scoring would not notice in a file."""
    channels, fold, method = settings["channels"], arrays["fold"], settings["method"]
    c, n, folds = sum(channels), len(fold), 1 + int(fold.max())
    model = {"location": (c,), "precision": (c, c)}
    shapes = {"knn": {"vectors": (n, c)}, "mse": {}, "mfsim": {}, "gaussian": model.copy()}
    shapes["gaussian"] |= {f"fold_{name}": (folds, *shape) for name, shape in model.items()}
    needed = {"calibration": (n,), "fold": (n,)} | shapes[method]
    types = {"fold": np.int64} | dict.fromkeys(GAUSSIAN, np.float64)
    wrong = [name for name, shape in needed.items() if arrays[name].shape != shape]
    for name, array in arrays.items():
        if array.dtype != types.get(name, np.float32) or not np.isfinite(array).all():
            wrong.append(name)
    if wrong or fold.min() < 0 or folds > (1 if method in ("mse", "mfsim") else n):
        raise ValueError(f"its arrays {', '.join(wrong) or 'fold'} make no sense")
    listed = isinstance(channels, list) and all(type(x) is int and x > 0 for x in channels)
    told = isinstance(about, dict) and isinstance(about.get("encoder", ""), str)
    if not (listed and told and isinstance(versions, dict) and settings["blocks"] < 1000):
        raise ValueError("what it says of itself makes no sense")
    if not 0 < settings["t"] < T:
        raise ValueError(f"its t is {settings['t']}")
    checked_rate(settings["flag_rate"], "flag_rate")


def _in_blocks(score: Score, z: np.ndarray) -> np.ndarray:
    """Return scores of (N, c) as (N,) float32, computed in blocks of equal size.

    So the bits of an image's score depend neither on the other images nor on their number.
    """
    found = []
    for start in range(0, len(z), BLOCK):
        block = z[start : start + BLOCK]
        found.append(score(np.resize(block, (BLOCK, z.shape[1])))[: len(block)])
    return np.concatenate(found).astype(np.float32)


def _scores_of(settings: dict, arrays: dict[str, np.ndarray], device: str | None):
    """Return the score of all images and those without each fold; a network has only its own."""
    fold = arrays["fold"]
    if settings["method"] == "gaussian":
        models = zip(*(arrays[f"fold_{name}"] for name in GAUSSIAN), strict=True)
        by_fold = [partial(gaussian_score, location=m, precision=p) for m, p in models]
        return partial(gaussian_score, **{name: arrays[name] for name in GAUSSIAN}), by_fold
    if settings["method"] == "knn":
        parts = [arrays["vectors"][fold != f] for f in range(-1, fold.max() + 1)]  # -1 is no fold
        own, *by_fold = (partial(knn_score, vectors=v, k=min(settings["k"], len(v))) for v in parts)
        return own, by_fold
    with torch.device("meta"):  # the weights come from the arrays
        sizes = {name: settings[name] for name in ("width", "blocks")}
        network = LFDN(sum(settings["channels"]), **sizes)
    weights = {name: torch.tensor(arrays[name]) for name in network.state_dict()}
    network.load_state_dict(weights, assign=True)
    network.to(pick_device(device)).eval().requires_grad_(False)
    score = partial(_reconstruction_score, network=network, settings=settings)
    return score, [score]


def _reconstruction_score(z: np.ndarray, *, network: LFDN, settings: dict) -> np.ndarray:
    noise = fixed_noise(min(settings["t"], T) + 1, z.shape[1], seed=settings["seed"])
    back = reconstruct(network, z, ddim_released, t=settings["t"], noise=noise)
    if settings["method"] == "mse":
        return mse(z, back)
    return mfsim(z, back, settings["channels"], layers=settings["layers"])


def _sha256(content: dict, arrays: dict[str, np.ndarray]) -> str:
    """Return one checksum of what a file says and of all its arrays."""
    parts = {name: array_sha256(array) for name, array in arrays.items()}
    return hashlib.sha256(as_json([content, parts]).encode()).hexdigest()
