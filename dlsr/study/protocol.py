"""What the study compares on: its encoders, its image sets, and the split of the ID training set.

The search sees the development sets and half of the held-out ID training images. The report sets
and the ID test set are for what the search has chosen.
"""

import csv
import hashlib
import io
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from dlsr.data import INPUT_SIZE, ImageSet, load_images
from dlsr.encoders import create_encoder
from dlsr.errors import UserError
from dlsr.features import Features, extract

RESOLUTIONS = ("native", "matched", "bicubic", "box")  # matched is bilinear
FOLDER = Path(__file__).parent
CLASSES = json.loads((FOLDER / "classes.json").read_text("utf-8"))


@dataclass(frozen=True)
class OODSet:
    """A row of ``sets.csv``: OOD images of a registered set, or of some of its classes.

    ``group`` is ``near`` or ``far``, ``stage`` is ``development`` or ``report``. ``classes`` are
    names of classes or of CIFAR-100's superclasses, separated by semicolons.
    """

    profile: str
    name: str
    title: str
    dataset: str
    group: str
    stage: str
    classes: str = ""

    @property
    def labels(self) -> list[str]:
        """The labels of the images that belong to the set; empty if all do."""
        groups, names = CLASSES["superclasses"], filter(None, self.classes.split(";"))
        return [label for name in names for label in groups.get(name, [name])]


def ood_sets(profile: str) -> tuple[OODSet, ...]:
    """Return the OOD sets of the profile ``demo`` or ``pack``."""
    rows = csv.DictReader((FOLDER / "sets.csv").read_text("utf-8").splitlines())
    return tuple(OODSet(**row) for row in rows if row["profile"] == profile)


@dataclass(frozen=True)
class Protocol:
    """One encoder's comparison. ``training`` is given to `dlsr.train`.

    ``held_out`` ID training images are not fitted on: half of them calibrate, half are the ID side
    of development. ``n_ood`` bounds every far set, ``n_filters`` the sets that are resized by other
    filters. Of the controls of resolution, ``n_control`` ID test images are scored by methods that
    are fitted on ``n_control_fit`` training images. ``draws`` is the bootstrap's number.
    """

    encoder: str
    sets: tuple[OODSet, ...]
    training: dict = field(hash=False)
    id_train: str = "cifar10/train"
    id_test: str = "cifar10/test"
    held_out: int = 5000
    n_ood: int = 2000
    n_filters: int = 300
    n_control: int = 1000
    n_control_fit: int = 10_000
    draws: int = 2000

    def of(self, stage: str) -> list[OODSet]:
        """Return the OOD sets of ``development`` or ``report``."""
        return [ood for ood in self.sets if ood.stage == stage]


DEMO = Protocol(
    "efficientnet_lite0", ood_sets("demo"), dict(width=64, blocks=2, epochs=20, lr=1e-3),
    "digits/train", "digits/test", held_out=240, n_filters=50, n_control=60, n_control_fit=150,
    draws=200,
)  # fmt: skip
B4, LITE0 = (
    Protocol(encoder, ood_sets("pack"), dict(width=720, blocks=8, epochs=30))
    for encoder in ("efficientnet_b4_without_last_block", "efficientnet_lite0")
)
PROTOCOLS = {"demo": [DEMO], "pack": [B4, LITE0]}


def split(n: int, held_out: int) -> dict[str, np.ndarray]:
    """Return the rows of n training images to fit on, for calibration and for development."""
    order, half = np.random.RandomState(0).permutation(n), held_out // 2
    parts = np.split(order, [half, held_out])
    names = ("calibration", "development", "fit")
    return {name: np.sort(rows) for name, rows in zip(names, parts, strict=True)}


def pick(rows: np.ndarray, n: int) -> np.ndarray:
    """Return a seeded pick of n of the rows in their order, or all if there are no more."""
    return rows if n >= len(rows) else np.sort(np.random.RandomState(0).permutation(rows)[:n])


def overlaps(dataset: str, labels: np.ndarray) -> np.ndarray:
    """Return which images belong to a class that is a kind of one of CIFAR-10's, by our list."""
    return np.isin(labels, list(CLASSES["overlap"].get(dataset, {})))


def pixel_hashes(images: ImageSet) -> list[str]:
    """Return a hash of every image's size and RGB pixels, equal however the image is stored."""
    pixels = (images.image(i) for i in range(len(images)))
    return [hashlib.sha256(repr(x.size).encode() + x.tobytes()).hexdigest() for x in pixels]


@dataclass
class Jpeg:
    """The images of a set after JPEG compression of quality 75."""

    images: ImageSet

    def __getitem__(self, row: int) -> bytes:
        buffer = io.BytesIO()
        self.images.image(row).save(buffer, "JPEG", quality=75)
        return buffer.getvalue()


class Data:
    """The images and features of a protocol. Nothing is read before it is asked for."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.encoder = create_encoder(protocol.encoder)
        self.id_images = {name: load_images(name) for name in (protocol.id_train, protocol.id_test)}
        self.id_size = self.id_images[protocol.id_train].size
        self.split = split(len(self.id_images[protocol.id_train]), protocol.held_out)

    def id_part(self, part: str) -> Features:
        """Return ID features: ``fit``, ``calibration``, ``development`` or ``test``."""
        if part == "test":
            return self._extract(self.id_images[self.protocol.id_test])
        return take(self._extract(self.id_images[self.protocol.id_train]), self.split[part])

    def ood(self, ood: OODSet, resolution: str) -> Features:
        """Return the features of an OOD set in one of `RESOLUTIONS`; see `ood_images`."""
        images = self.ood_images(ood)
        if resolution in ("bicubic", "box"):
            images = images.take(pick(np.arange(len(images)), self.protocol.n_filters))
        same = resolution == "native" or images.size == self.id_size
        steps = {"matched": self.id_size}.get(resolution, (*self.id_size, resolution))
        return self._extract(images, () if same else (steps,))

    def ood_images(self, ood: OODSet) -> ImageSet:
        """Return the images of a set's classes without ID images; far sets are bounded."""
        images = load_images(ood.dataset)
        chosen = np.isin(images.labels, ood.labels or images.labels)
        if images.size in (None, self.id_size):
            chosen &= ~np.isin(pixel_hashes(images), list(self._id_pixels))
        rows = np.flatnonzero(chosen)
        return images.take(rows if ood.group == "near" else pick(rows, self.protocol.n_ood))

    def altered(self, part: str, control: str) -> Features:
        """Return features of ID images, altered or, if ``control`` is empty, as they are.

        Controls are ``half`` and ``double`` size and ``jpeg``. ``part`` is ``fit``, a pick of the
        images that are fitted on, or ``test``, a pick of the test images.
        """
        p, (height, width) = self.protocol, self.id_size
        if part == "fit":
            images = self.id_images[p.id_train].take(pick(self.split["fit"], p.n_control_fit))
        else:
            images = self.id_images[p.id_test]
            images = images.take(pick(np.arange(len(images)), p.n_control))
        if control == "jpeg":
            images = replace(images, source=Jpeg(images))
        sizes = {"half": [(height // 2, width // 2)], "double": [(2 * height, 2 * width)]}
        return self._extract(images, sizes.get(control, []))

    @cached_property
    def _id_pixels(self) -> set[str]:
        return {digest for images in self.id_images.values() for digest in pixel_hashes(images)}

    def _extract(self, images: ImageSet, steps=()) -> Features:
        return extract(images, self.encoder, chain=(*steps, INPUT_SIZE))


def take(features: Features, rows: np.ndarray) -> Features:
    """Return the features of the given rows of the set that was asked for, in that order.

    Raises `UserError` if one of these images was skipped as unreadable.
    """
    at, missing = np.searchsorted(features.rows, rows), ~np.isin(rows, features.rows)
    if missing.any():
        raise UserError(f"{missing.sum()} of these rows were skipped as unreadable; omit them.")
    values, images = features.values[at], features.images.take(at)
    return replace(features, values=values, rows=np.arange(len(at)), images=images)


def standardiser(features: Features):
    """Return a function to raw features standardised by the mean and std of these, (N, c)."""
    raw = np.asarray(features.raw(), dtype=np.float64)
    mean, std = raw.mean(axis=0), raw.std(axis=0) + 1e-12
    return lambda other: ((other.raw() - mean) / std).astype(np.float32)
