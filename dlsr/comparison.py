"""The chapter "Does diffusion help?": its split, its sets, and who may look at which of them when."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources

import numpy as np

from dlsr.benchmarks import B4_PACK, BASE
from dlsr.datasets import (
    DATASETS,
    ImageSet,
    UserError,
    load_images,
    pixel_hashes,
    recompressed,
    resized,
)
from dlsr.encoders import get_encoder
from dlsr.features import Features, extract
from dlsr.training import TrainingSettings

NEAR, FAR = "near", "far"
DEVELOPMENT, REPORT = "development", "report"
VIEWS = ("native", "matched", "matched, bicubic", "matched, box")
CONTROLS = ("half", "double", "jpeg")


@cache
def lists() -> dict:
    """The committed lists of classes, out of ``comparison.json``."""
    return json.loads(resources.files("dlsr").joinpath("comparison.json").read_text("utf-8"))


def superclasses(*, development: bool) -> tuple[str, ...]:
    """The classes of those CIFAR-100 superclasses that development uses, or of the others."""
    chosen = lists()["development_superclasses"]
    groups = lists()["superclasses"].items()
    return tuple(name for group, names in groups for name in names if (group in chosen) is development)


@dataclass(frozen=True)
class OODSet:
    """OOD images of the chapter: a registered set, or some of its classes, and what they are for.

    ``group`` is ``near`` or ``far``; ``stage`` says who may see its scores: ``development`` the
    search, ``report`` only what was chosen before.
    """

    name: str
    title: str
    dataset: str
    group: str
    stage: str
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """One encoder's comparison: ID set, how many images are held out, OOD sets, the LFDN's training.

    ``n_ood`` bounds every OOD set (near ones are whole), ``n_filters`` those of bicubic and box;
    ``n_control`` the test images of the controls of resolution, whose detectors are fitted on
    ``n_control_fit`` training images.
    """

    encoder: str
    sets: tuple[OODSet, ...]
    training: TrainingSettings
    id_train: str = "cifar10/train"
    id_test: str = "cifar10/test"
    held_out: int = 5000
    n_ood: int = 2000
    n_filters: int = 300
    n_control: int = 1000
    n_control_fit: int = 10_000

    @property
    def id_size(self) -> tuple[int, int]:
        """Height and width of the ID images."""
        return DATASETS[self.id_train].size

    def of(self, stage: str) -> list[OODSet]:
        """The OOD sets of development or of the report."""
        return [ood for ood in self.sets if ood.stage == stage]


CLASSES = {development: superclasses(development=development) for development in (True, False)}
PACK_SETS = (
    OODSet("cifar100_a", "CIFAR-100, half a", "cifar100/test", NEAR, DEVELOPMENT, CLASSES[True]),
    OODSet("svhn", "SVHN", "svhn/test", FAR, DEVELOPMENT),
    OODSet("mnist", "MNIST", "mnist/test", FAR, DEVELOPMENT),
    OODSet("cifar100_b", "CIFAR-100, half b", "cifar100/test", NEAR, REPORT, CLASSES[False]),
    OODSet("tiny_imagenet", "TinyImageNet", "tiny_imagenet/val", NEAR, REPORT),
    OODSet("textures", "Textures", "textures/test", FAR, REPORT),
    OODSet("scenes", "Intel scenes", "scenes/test", FAR, REPORT),
    OODSet("fashion_mnist", "Fashion-MNIST", "fashion_mnist/test", FAR, REPORT),
    OODSet("notmnist", "notMNIST", "notmnist/test", FAR, REPORT),
    OODSet("omniglot", "Omniglot", "omniglot/test", FAR, REPORT),
)  # fmt: skip
DEMO_SETS = (
    OODSet("digit_8", "digit 8", "digits_8_9/test", NEAR, DEVELOPMENT, ("8",)),
    OODSet("china", "patches of a temple", "photo_patches/test", FAR, DEVELOPMENT, ("china",)),
    OODSet("digit_9", "digit 9", "digits_8_9/test", NEAR, REPORT, ("9",)),
    OODSet("flower", "patches of a flower", "photo_patches/test", FAR, REPORT, ("flower",)),
)
STUDIES = {
    "demo": (
        Study(
            "efficientnet_lite0",
            DEMO_SETS,
            TrainingSettings(width=64, blocks=2, epochs=20, lr=1e-3),
            "digits/train",
            "digits/test",
            held_out=240,
            n_filters=50,
            n_control=100,
            n_control_fit=400,
        ),
    ),
    "pack": tuple(Study(encoder, PACK_SETS, BASE) for encoder in (B4_PACK, "efficientnet_lite0")),
}


@dataclass(frozen=True)
class Split:
    """Rows of the ID training set: fitted on; thresholds and calibration; ID images of development."""

    fit: np.ndarray
    calibration: np.ndarray
    development: np.ndarray


def split(n: int, held_out: int, *, seed: int = 0) -> Split:
    """Hold out ``held_out`` of n training images by numpy's frozen RandomState, half for each use."""
    if not 2 <= held_out < n:
        raise UserError(f"held_out={held_out} of {n} training images was asked for; it is in 2..{n - 1}.")
    order = np.random.RandomState(seed).permutation(n)
    half = held_out // 2
    return Split(*(np.sort(rows) for rows in (order[held_out:], order[:half], order[half:held_out])))


def pick(rows: np.ndarray, n: int) -> np.ndarray:
    """A seeded pick of n of the rows, in their order; all, where there are no more."""
    return rows if n >= len(rows) else np.sort(np.random.RandomState(0).permutation(rows)[:n])


def rows_of(images: ImageSet, classes: Sequence[str]) -> np.ndarray:
    """Rows of the images of these classes; none named: of all."""
    missing = set(classes) - set(images.labels)
    if missing:
        raise UserError(f"{images.name} has no images of the classes {', '.join(sorted(missing))}.")
    return np.flatnonzero(np.isin(images.labels, classes)) if classes else np.arange(len(images))


class Data:
    """The images and features of a study; each set's are made when they are first asked for."""

    def __init__(self, study: Study, *, progress: bool = True) -> None:
        self.study, self.progress = study, progress
        self._images: dict[str, ImageSet] = {}
        self._rows: dict[str, np.ndarray] = {}
        self.split = split(len(self.images(study.id_train)), study.held_out)

    def images(self, dataset: str) -> ImageSet:
        """A whole registered set."""
        if dataset not in self._images:
            self._images[dataset] = load_images(dataset)
        return self._images[dataset]

    @cached_property
    def id_pixels(self) -> frozenset[str]:
        """Hashes of all ID images, train and test."""
        names = (self.study.id_train, self.study.id_test)
        return frozenset(digest for name in names for digest in pixel_hashes(self.images(name)))

    def same_as_id(self, dataset: str) -> np.ndarray:
        """Rows of a set whose pixels are those of an ID image, train or test."""
        images = self.images(dataset)
        if images.size not in (None, self.study.id_size):
            return np.array([], dtype=int)
        return np.flatnonzero([digest in self.id_pixels for digest in pixel_hashes(images)])

    def rows(self, ood: OODSet) -> np.ndarray:
        """The rows of its set that are scored: of its classes, none of them an ID image."""
        if ood.name not in self._rows:
            rows = np.setdiff1d(rows_of(self.images(ood.dataset), ood.classes), self.same_as_id(ood.dataset))
            self._rows[ood.name] = rows if ood.group == NEAR else pick(rows, self.study.n_ood)
        return self._rows[ood.name]

    def of_id(self, dataset: str) -> Features:
        """Features of the whole ID training or test set."""
        return self._extract(self.images(dataset))

    def of_ood(self, ood: OODSet, view: str) -> Features:
        """Features of an OOD set in one of `VIEWS`; of bicubic and box, those of a pick of its images."""
        images = self.images(ood.dataset)
        if view in ("native", "matched"):
            return self._extract(images.take(self.rows(ood)), view)
        shrunk = images.take(pick(self.rows(ood), self.study.n_filters))
        if images.size == self.study.id_size:
            return self._extract(shrunk)
        return self._extract(resized(shrunk, self.study.id_size, filter=view.removeprefix("matched, ")))

    def of_control(self, dataset: str, control: str) -> Features:
        """Features of a pick of ID images, as one of `CONTROLS` alters them; "" leaves them as they are.

        ``half`` and ``double`` bring them to half and twice their size, ``jpeg`` to JPEG of quality 75.
        """
        images, (height, width) = self.images(dataset), self.study.id_size
        if dataset == self.study.id_train:
            images = images.take(pick(self.split.fit, self.study.n_control_fit))
        else:
            images = images.take(pick(np.arange(len(images)), self.study.n_control))
        altered = {
            "": images,
            "half": resized(images, (height // 2, width // 2)),
            "double": resized(images, (2 * height, 2 * width)),
            "jpeg": recompressed(images, quality=75),
        }
        return self._extract(altered[control])

    def _extract(self, images: ImageSet, protocol: str = "native") -> Features:
        options = {"protocol": protocol, "id_size": self.study.id_size, "progress": self.progress}
        return extract(images, get_encoder(self.study.encoder), **options)
