"""Named image sets: what each is, where it is found, and how one image is read.

A set comes from a pack (``$DLSR_DATA/<name>/<split>.parquet``), from a folder of images, from
torchvision's own download, or, for the embedded demo, out of scikit-learn.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import platformdirs
import pyarrow.parquet as pq
import torchvision.datasets
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits, load_sample_images

INPUT_SIZE = (224, 224)  # height, width of what every encoder sees
PROTOCOLS = ("native", "matched")
Image.init()
IMAGE_SUFFIXES = frozenset(
    suffix
    for suffix, form in Image.registered_extensions().items()
    if form in Image.OPEN and form != "MPEG"  # which Pillow names but cannot decode
)
PACK = "data pack"


class UserError(ValueError):
    """A mistake the user can mend; its text says what was given, what is needed, what to do.

    On one line, also where it quotes a library's error of many.
    """

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(text.split()))


def cache_folder() -> Path:
    """``$DLSR_CACHE``, or the user's cache folder: it outlives any checkout."""
    return Path(os.environ.get("DLSR_CACHE") or platformdirs.user_cache_dir("dlsr", appauthor=False))


def data_folder() -> Path:
    """``$DLSR_DATA``, or ``data`` in the cache folder."""
    return Path(os.environ.get("DLSR_DATA") or cache_folder() / "data")


@dataclass(frozen=True)
class Dataset:
    """One row of the registry: a split of a named image set.

    ``title`` is its name in figures and tables; ``size`` is (height, width), or None where it varies;
    ``sha256`` is that of the pack's Parquet file; ``role`` is the role beside CIFAR-10 (``id``,
    ``near``, ``far``) or in the demo; ``partial`` says why the set is not the whole one that the
    paper's tables name.
    """

    name: str
    split: str
    title: str
    images: int
    size: tuple[int, int] | None
    source: str
    licence: str
    role: str
    sha256: str = ""
    partial: str = ""
    torchvision: str = ""

    @property
    def key(self) -> str:
        return f"{self.name}/{self.split}"


_CIFAR = "none stated; cite Krizhevsky 2009"
_SKLEARN = "scikit-learn"

DATASETS = {
    row.key: row
    for row in (
        Dataset("digits", "train", "digits 0-7", 721, (8, 8), _SKLEARN, "CC BY 4.0 (UCI)", "id"),
        Dataset("digits", "test", "digits 0-7", 722, (8, 8), _SKLEARN, "CC BY 4.0 (UCI)", "id"),
        Dataset("digits_8_9", "test", "digits 8 and 9", 354, (8, 8), _SKLEARN, "CC BY 4.0 (UCI)", "near"),
        Dataset("photo_patches", "test", "photo patches", 400, (8, 8), _SKLEARN, "CC BY 2.0", "far"),
        Dataset(
            "cifar10", "train", "CIFAR-10", 50_000, (32, 32), PACK, _CIFAR, "id",
            "d4327c54fb16c1877b6077def5ce65e8e6f9fffd252a70b0dc2d538a97eb956e",
            torchvision="CIFAR10",
        ),
        Dataset(
            "cifar10", "test", "CIFAR-10", 10_000, (32, 32), PACK, _CIFAR, "id",
            "8c3ef155c49b0833388110e912c55f0a40c8bedc2f0343ae06693fc3e05a4107",
            torchvision="CIFAR10",
        ),
        Dataset(
            "cifar100", "test", "CIFAR-100", 10_000, (32, 32), PACK, _CIFAR, "near",
            "535d6cb63b9902838c2697cc44c417c07e75ac091da6965a1ad19ff328c47460",
            torchvision="CIFAR100",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order. ``read(i)`` gives encoded bytes or an array (H, W[, 3]) of uint8."""

    name: str
    ids: Sequence[str]
    labels: Sequence[str]
    read: Callable[[int], bytes | np.ndarray]
    size: tuple[int, int] | None = None
    whole: "ImageSet | None" = None  # what this is a subset of ...
    rows: np.ndarray | None = None  # ... and which of its rows

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def sha256(self) -> str:
        """Hash of the image list: of every image's content, in order."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            content = self._content(i)
            raw = content.tobytes() if isinstance(content, np.ndarray) else content
            digest.update(hashlib.sha256(raw).digest())
        return digest.hexdigest()

    def image(self, i: int) -> Image.Image:
        """Image i as RGB; an unreadable one raises `UserError` with its name."""
        content = self._content(i)
        try:
            if isinstance(content, np.ndarray):
                return to_rgb(Image.fromarray(content))
            with Image.open(io.BytesIO(content)) as image:
                return to_rgb(image)
        except Exception as error:  # on damaged files, decoders raise almost anything
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "it is in no format that Pillow knows" if unknown else error
            raise UserError(
                f"Image {self.ids[i]!r} of {self.name} cannot be read ({reason}). Mend or remove it, "
                "or pass on_error='skip' (--skip-unreadable) to leave such images out."
            ) from error

    def _content(self, i: int) -> bytes | np.ndarray:
        try:
            return self.read(i)
        except OSError as error:
            raise UserError(
                f"Image {self.ids[i]!r} of {self.name} is gone or unreadable ({error})."
            ) from error

    def subset(self, n: int, *, seed: int = 0) -> "ImageSet":
        """n images, the same ones on every machine (numpy's frozen RandomState), in set order."""
        if not 1 <= n <= len(self):
            raise UserError(f"n={n} images of {self.name} were asked for; it has {len(self)}.")
        return self.take(np.sort(np.random.RandomState(seed).permutation(len(self))[:n]))

    def take(self, rows: np.ndarray) -> "ImageSet":
        """The images at the given rows."""
        read = self.read
        return ImageSet(
            self.name,
            [self.ids[i] for i in rows],
            [self.labels[i] for i in rows],
            lambda i: read(rows[i]),
            self.size,
            self,
            rows,
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as 8-bit RGB: 16-bit grey is scaled, transparency is laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode != "F" else 255.0 if pixels.max() > 1 else 1.0
        image = Image.fromarray((np.clip(pixels / top, 0, 1) * 255).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resize_chain(
    protocol: str, *, size: tuple[int, int] | None, id_size: tuple[int, int] | None
) -> tuple[tuple[int, int], ...]:
    """The (height, width) steps an image of ``size`` goes through on its way to the encoder.

    ``native``: straight to 224x224. ``matched``: to the ID set's size first; a set that already
    has it goes straight, so that its features are the same in both protocols.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"Protocol {protocol!r} is unknown; choose one of {', '.join(PROTOCOLS)}.")
    if protocol == "native" or (size is not None and size == id_size):
        return (INPUT_SIZE,)
    if id_size is None:
        raise UserError("The matched protocol needs the ID set's size, but its images vary in size.")
    return (id_size, INPUT_SIZE)


def resize(image: Image.Image, chain: Sequence[tuple[int, int]]) -> Image.Image:
    """Pillow's bilinear resize (antialiased when shrinking), step by step; aspect is not kept."""
    for height, width in chain:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image


def load_images(name: str | Path, *, n: int | None = None, seed: int = 0) -> ImageSet:
    """A registered set by its name (``cifar10/test``), or any folder of images by its path."""
    if str(name) in DATASETS:
        images = _find(DATASETS[str(name)])
    elif Path(name).is_dir():
        images = from_folder(Path(name))
    else:
        raise UserError(
            f"{str(name)!r} is neither a folder nor a known image set. Known sets: {', '.join(DATASETS)}."
        )
    return images if n is None else images.subset(n, seed=seed)


def from_folder(folder: Path) -> ImageSet:
    """Every image file under a folder, sorted by path; the label is the file's folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    paths = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        what = f"has {len(files)} files, none of them an image" if files else "is empty"
        raise UserError(f"The folder {folder} {what}; put PNG, JPEG, WebP or other images in it.")
    return ImageSet(
        folder.name,
        [p.relative_to(folder).as_posix() for p in paths],
        [p.parent.relative_to(folder).as_posix() for p in paths],
        lambda i: paths[i].read_bytes(),
    )


def from_parquet(file: Path, *, name: str, size: tuple[int, int] | None = None) -> ImageSet:
    """A pack: columns ``image`` (struct of ``bytes`` and ``path``) and ``label``."""
    try:
        table = pq.read_table(file, columns=["image", "label"])
        column = table["image"].combine_chunks()
        content, paths = column.field("bytes"), column.field("path")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} is not a readable pack of images ({error}); it needs the columns image, a struct of "
            "bytes and path, and label."
        ) from error
    return ImageSet(name, paths.to_pylist(), table["label"].to_pylist(), lambda i: content[i].as_py(), size)


def _find(dataset: Dataset) -> ImageSet:
    if dataset.source == _SKLEARN:
        return _DEMO[dataset.key](dataset)
    base = data_folder() / dataset.name
    file = base / f"{dataset.split}.parquet"
    if file.is_file():
        images = from_parquet(file, name=dataset.key, size=dataset.size)
        if hashlib.sha256(file.read_bytes()).hexdigest() != dataset.sha256:
            warnings.warn(
                f"{dataset.key} in DLSR_DATA is not the file this project was measured on "
                "(another sha256); results made from it carry the hash of their own image list.",
                stacklevel=3,
            )
    elif (base / dataset.split).is_dir():
        images = replace(from_folder(base / dataset.split), name=dataset.key, size=dataset.size)
    else:
        images = _download(dataset, file)
    if len(images) != dataset.images:
        raise UserError(
            f"{dataset.key} has {len(images)} images here; the whole set has {dataset.images}. "
            "Complete it, or pass the folder by its path."
        )
    return images


def _download(dataset: Dataset, wanted: Path) -> ImageSet:
    """By torchvision, which checks its own checksums, into the cache folder."""
    root = cache_folder() / "torchvision"
    try:
        root.mkdir(parents=True, exist_ok=True)
        loader = getattr(torchvision.datasets, dataset.torchvision)
        source = loader(root, train=dataset.split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{dataset.key} was not found as {wanted.parent.name}/{wanted.name} in the data folder "
            f"(DLSR_DATA), and torchvision could not download it ({error}). Connect to the network "
            "once, or put that file or a folder of its images there."
        ) from error
    return ImageSet(
        dataset.key,
        [f"{i:05d}" for i in range(len(source))],
        [source.classes[label] for label in source.targets],
        lambda i: np.asarray(source[i][0]),
        dataset.size,
    )


def _from_arrays(dataset: Dataset, pixels: np.ndarray, ids: list[str], labels: list[str]) -> ImageSet:
    return ImageSet(dataset.key, ids, labels, lambda i: pixels[i], dataset.size)


def _digits(dataset: Dataset) -> ImageSet:
    """scikit-learn's handwritten digits, 8x8: 0-7 by halves (even rows train), 8 and 9 apart."""
    bunch = load_digits()
    known = np.flatnonzero(bunch.target < 8)
    rows = {
        "digits/train": known[1::2],
        "digits/test": known[::2],
        "digits_8_9/test": np.flatnonzero(bunch.target >= 8),
    }[dataset.key]
    pixels = (bunch.images[rows] * (255 / 16)).round().astype(np.uint8)
    return _from_arrays(dataset, pixels, [f"{i:04d}" for i in rows], [str(t) for t in bunch.target[rows]])


def _photo_patches(dataset: Dataset) -> ImageSet:
    """Patches of scikit-learn's two sample photographs: 32x32 pixels, grey, reduced to 8x8."""
    photos = load_sample_images()
    side, per_photo = 32, dataset.images // 2
    picks = np.random.RandomState(0)
    pixels, ids, labels = [], [], []
    for photo, file in zip(photos.images, photos.filenames, strict=True):
        grey = Image.fromarray(photo).convert("L")
        for _ in range(per_photo):
            x, y = picks.randint(grey.width - side), picks.randint(grey.height - side)
            patch = grey.crop((x, y, x + side, y + side))
            pixels.append(np.asarray(resize(patch, [dataset.size])))
            ids.append(f"{Path(file).stem}_{x}_{y}")
            labels.append(Path(file).stem)
    return _from_arrays(dataset, np.stack(pixels), ids, labels)


_DEMO = {
    "digits/train": _digits,
    "digits/test": _digits,
    "digits_8_9/test": _digits,
    "photo_patches/test": _photo_patches,
}
