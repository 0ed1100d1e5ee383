"""The score that the book's search recommends, behind the same contract as the paper's detector."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dlsr.datasets import UserError
from dlsr.detector import DLSRDetector
from dlsr.features import replace_file
from dlsr.variants import VARIANTS, Bank, Fusion, Score

RECOMMENDED = "2 kNN of hidden + Gaussian + MSE, layers 3..4"  # as results/choice.json says
VECTORS = "vectors.safetensors"


class RecommendedDetector(DLSRDetector):
    """An LFDN with another score than the paper's; see `dlsr.variants` and the book's search.

    variant: a name of `variants.VARIANTS` whose LFDN sees z0.
    calibration_fraction: share of the images held out of the fit, which calibrate the score's parts and
    set ``threshold_``; above 0.
    The other parameters are those of `DLSRDetector`.
    """

    # What the paper's detector has as parameters, and this one does not need.
    score, layers, reconstruction, t, noise_draws = "mse", "all", "released", 3, 1

    def __init__(
        self,
        channels: tuple[int, ...] | None = None,
        *,
        variant: str = RECOMMENDED,
        width: int = 720,
        blocks: int = 8,
        epochs: int = 30,
        lr: float = 1e-4,
        weight_decay: float = 1e-4,
        batch_size: int = 128,
        calibration_fraction: float = 0.1,
        seed: int = 0,
        device: str | None = None,
        progress: bool = False,
    ) -> None:
        self.channels = channels
        self.variant = variant
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

    def fit(self, z: np.ndarray, y: Any = None) -> "RecommendedDetector":
        """Train on ID vectors (N, c), calibrate on the held-out ones; labels are ignored."""
        if self.variant not in VARIANTS or VARIANTS[self.variant].network != "base":
            known = ", ".join(name for name, one in VARIANTS.items() if one.network == "base")
            raise UserError(f"The variant {self.variant!r} is unknown; choose one of {known}.")
        if not 0 < self.calibration_fraction < 1:
            raise UserError(
                f"calibration_fraction={self.calibration_fraction} was given; the recommended score needs "
                "held-out images: it is above 0 and below 1."
            )
        layers, needed = len(self.channels or (1,)), layers_read(VARIANTS[self.variant].score)
        if layers < needed:
            raise UserError(
                f"Features of {layers} layers were given; {self.variant!r} reads {needed}. Give channels, "
                "take an encoder with more layers, or one of the paper's scores."
            )
        self.vectors_ = np.asarray(z, dtype=np.float32)
        self.score_ = None
        return super().fit(self.vectors_)

    def ood_score(self, z: np.ndarray) -> np.ndarray:
        """(N,) scores, larger = more OOD; the noise, where the score has any, is fixed by ``seed``."""
        z = self._checked(z)
        if self.score_ is None:
            fitted, calibration = map(self._bank, self._split(self.vectors_))
            self.score_ = deepcopy(VARIANTS[self.variant].score).fit(fitted, calibration)
        return self.score_.score(self._bank(z))

    def save(self, folder: str | Path, *, about: dict[str, Any] | None = None) -> None:
        """As `DLSRDetector.save`, and the vectors it was fitted on, among which neighbours are found."""
        super().save(folder, about=about)
        vectors = {"vectors": np.ascontiguousarray(self.vectors_)}
        replace_file(Path(folder) / VECTORS, lambda path: save_file(vectors, path))

    def _restore(self, content: dict[str, Any], tensors: dict) -> None:
        super()._restore(content, tensors)
        self.score_ = None

    @classmethod
    def load(cls, folder: str | Path, *, device: str | None = None) -> "RecommendedDetector":
        """Read a saved detector; what was said of it is in ``about_``."""
        detector = super().load(folder, device=device)
        try:
            detector.vectors_ = load_file(Path(folder) / VECTORS)["vectors"]
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(f"There is no whole detector in {folder} ({error}); save it again.") from error
        return detector

    def _bank(self, z: np.ndarray) -> Bank:
        return Bank(self.trained_, z, self.channels_, name=f"seed {self.seed}")


def layers_read(score: Score) -> int:
    """How many layers of z0 a score needs."""
    parts = score.parts if isinstance(score, Fusion) else (score,)
    return max(max(getattr(part, "layers", None) or (0,)) + 1 for part in parts)


def load_detector(folder: str | Path, *, device: str | None = None) -> DLSRDetector:
    """A saved detector of either kind."""
    try:
        parameters = json.loads((Path(folder) / "detector.json").read_text())["parameters"]
    except (OSError, ValueError, KeyError, TypeError):
        parameters = {}  # `load` says what is wrong
    kind = RecommendedDetector if "variant" in parameters else DLSRDetector
    return kind.load(folder, device=device)
