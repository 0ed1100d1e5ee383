"""Named image sets: what each is, where it is found, and how one image is read.

A set comes from a pack (``$DLSR_DATA/<name>/<split>.parquet``), from a folder of images, from
torchvision's own download, from a published archive, or, for the embedded demo, out of scikit-learn.
"""

import hashlib
import http.client
import io
import os
import stat
import tarfile
import tempfile
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import platformdirs
import pyarrow.parquet as pq
import torchvision.datasets
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits, load_sample_images
from torch.utils.data import ConcatDataset
from tqdm import tqdm

INPUT_SIZE = (224, 224)  # height, width of what every encoder sees
PROTOCOLS = ("native", "matched")
FILTERS = ("bilinear", "bicubic", "box")
Image.init()
IMAGE_SUFFIXES = frozenset(
    suffix
    for suffix, form in Image.registered_extensions().items()
    if form in Image.OPEN and form != "MPEG"  # which Pillow names but cannot decode
)
PACK = "data pack"
TIMEOUT = 30.0  # seconds without an answer from a server
BLOCK = 1 << 20  # bytes that are read and written at a time


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
class Archive:
    """A published archive of images: its address, its md5, and which of its files are the set.

    Those are the image files below ``folder`` whose path from there fits ``pattern``; ``labels`` is
    a text file in the archive that begins each line with an image's name and its label.
    """

    url: str
    md5: str
    folder: str
    pattern: str = "*"
    labels: str = ""

    @property
    def file(self) -> str:
        return PurePosixPath(urlsplit(self.url).path).name


@dataclass(frozen=True)
class Dataset:
    """One row of the registry: a split of a named image set.

    ``title`` is its name in figures and tables; ``size`` is (height, width), or None where it varies;
    ``sha256`` is that of the pack's Parquet file; ``role`` is the role beside CIFAR-10 (``id``,
    ``near``, ``far``) or in the demo; ``images`` counts the pack's file (0: not known) and ``whole``
    the set as it was published, where that is another number; ``partial`` says in which way the pack's
    file is not that set; ``torchvision`` (a class) or ``archive`` is where it is downloaded from.
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
    whole: int = 0
    archive: Archive | None = None

    @property
    def key(self) -> str:
        return f"{self.name}/{self.split}"

    @property
    def published(self) -> int:
        return self.whole or self.images


_CIFAR = "none stated; cite Krizhevsky 2009"
_SKLEARN = "scikit-learn"
_ODIN = "archive of ODIN (Liang et al. 2018)"
_MOS = "archive of MOS (Huang and Li 2021)"
_OWN = "a folder of class folders of your own"
_DROPBOX = "https://www.dropbox.com/s"
_WISC = "https://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset"

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
        Dataset(
            "cifar100", "train", "CIFAR-100", 20_000, (32, 32), PACK, _CIFAR, "near",
            "df2c81a2a4a31c2d3c00ba441c6aeafc7c5af1d771a56762e71f963d8431f44c",
            "20,000 of 50,000 training images", "CIFAR100", 50_000,
        ),
        Dataset(
            "svhn", "test", "SVHN", 7_000, (32, 32), PACK, "non-commercial research", "far",
            "8b3c1cc9af35e2366f410741d796da45b6970b3946b05e9fa6dff3a1558b09e4",
            "the first 7,000 of 26,032 test images", "SVHN", 26_032,
        ),
        Dataset(
            "mnist", "test", "MNIST", 10_000, (28, 28), PACK, "MIT (repository)", "far",
            "204e4f05cd3af6c1b8377cb8023934411923757fd35110e60e1dbf9d51c07215",
            torchvision="MNIST",
        ),
        Dataset(
            "fashion_mnist", "test", "Fashion-MNIST", 10_000, (28, 28), PACK, "MIT", "far",
            "3372ffa9ccad81831b9ba024678764542e9e9461a3c61466a75eb9e76f59efdf",
            "grey levels stretched for every image", "FashionMNIST",
        ),
        Dataset(
            "notmnist", "test", "notMNIST", 10_000, (28, 28), PACK, "MIT (repository)", "far",
            "541d8ef9325de2ea5517e84a401f1ac58041afa6d2b026e629cc4706ffc2a265",
            "10,000 images of which 9,804 differ", whole=18_724,
            archive=Archive(
                "https://commondatastorage.googleapis.com/books1000/notMNIST_small.tar.gz",
                "c9890a473a9769fda4bdf314aaf500dd", "notMNIST_small", "*/*.png",
            ),
        ),
        Dataset(
            "omniglot", "test", "Omniglot", 4_840, (105, 105), PACK, "MIT", "far",
            "ea3b0298c1f0de153b7e5cc24f32de2f0d6bb548715e47a70426bc981c272cd9",
            "8 of the evaluation set's 20 alphabets", "Omniglot", 13_180,
        ),
        Dataset(
            "textures", "test", "Textures", 800, None, PACK, "research (DTD)", "far",
            "c7d709db97b8f0337ca473d84646be25746f15d73fa18aeedb8014f1bf529d38",
            "10 of 47 classes, shorter side 224", "DTD", 5_640,
        ),
        Dataset(
            "tiny_imagenet", "val", "TinyImageNet", 3_000, (64, 64), PACK, "ImageNet terms", "near",
            "d853b7fa7b44b5c11ff77c4022d88ad3270169e27891e1b8dd22ff11003eb970",
            "3,000 of 10,000 validation images", whole=10_000,
            archive=Archive(
                "https://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de",
                "tiny-imagenet-200/val/images", "*.JPEG", "tiny-imagenet-200/val/val_annotations.txt",
            ),
        ),
        Dataset(
            "scenes", "test", "Intel scenes", 800, (64, 64), PACK, "CC0", "far",
            "7b1fa79739b1c400d9235dcc2060ba979637cdbab98f05398ef274fadfbb9c2b",
        ),
        Dataset(
            "celeba", "train", "CelebA", 3_000, (109, 89), PACK, "non-commercial research", "id",
            "01f32e0acb83021d534d3fba04390ac7a70dcfe2bbf2cabc549c62cbcbc03584",
            "3,000 of 162,770 training images, half size", "CelebA", 162_770,
        ),
        Dataset(
            "celeba", "test", "CelebA", 1_000, (109, 89), PACK, "non-commercial research", "id",
            "73ebd6f850752e5e45319db0d2573173c3ffe39204cfd3c0aaa18f255840c45a",
            "1,000 images (005001-006000), half size", "CelebA", 19_962,
        ),
        Dataset(
            "lsun_crop", "test", "LSUN-c", 10_000, None, _ODIN, "none stated (LSUN)", "far",
            archive=Archive(
                f"{_DROPBOX}/fhtsw1m3qxlwj6h/LSUN.tar.gz?dl=1", "458a0a0ab8e5f1cb4516d7400568e460",
                "LSUN/test",
            ),
        ),
        Dataset(
            "lsun_resize", "test", "LSUN-r", 10_000, (32, 32), _ODIN, "none stated (LSUN)", "far",
            archive=Archive(
                f"{_DROPBOX}/moqh2wh8696c3yl/LSUN_resize.tar.gz?dl=1", "278b7b31c8cb7e804a1465a8ce03a2dc",
                "LSUN_resize/LSUN_resize",
            ),
        ),
        Dataset(
            "isun", "test", "iSUN", 8_925, (32, 32), _ODIN, "none stated (iSUN)", "far",
            archive=Archive(
                f"{_DROPBOX}/ssz7qxfqae0cca5/iSUN.tar.gz?dl=1", "be77b0f2c26fda898afac5f99645ee70",
                "iSUN/iSUN_patches",
            ),
        ),
        Dataset(
            "kmnist", "test", "KMNIST", 10_000, (28, 28), "torchvision", "CC BY-SA 4.0", "far",
            torchvision="KMNIST",
        ),
        Dataset(
            "places365", "val", "Places365", 36_500, (256, 256), "torchvision", "Places terms", "far",
            torchvision="Places365",
        ),
        Dataset(
            "sun", "test", "SUN", 10_000, None, _MOS, "research (SUN)", "far",
            archive=Archive(f"{_WISC}/SUN.tar.gz", "8469c3ada62211477954ec1be53b12d0", "SUN/images"),
        ),
        Dataset(
            "inaturalist", "test", "iNaturalist", 10_000, None, _MOS, "non-commercial research", "far",
            archive=Archive(
                f"{_WISC}/iNaturalist.tar.gz", "5be6ea8aa027d7b631916427b32cb335", "iNaturalist/images"
            ),
        ),
        Dataset("imagenet100", "train", "ImageNet-100", 0, None, _OWN, "ImageNet terms", "id"),
        Dataset("imagenet100", "val", "ImageNet-100", 0, None, _OWN, "ImageNet terms", "id"),
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


def sets_here() -> list[str]:
    """The registered sets that need no download: built in, in the data folder, or downloaded before."""
    return [key for key, row in DATASETS.items() if _is_here(row)]


def download(name: str) -> ImageSet:
    """A registered set, from the network unless it is here."""
    if name not in DATASETS:
        raise UserError(f"{name!r} is no known image set. Known sets: {', '.join(DATASETS)}.")
    return _find(DATASETS[name])


def partial_reason(name: str) -> str:
    """In which way the set that is read by this name is not the published one; "" where it is."""
    row = DATASETS.get(name)
    if row is None or not row.partial or not _pack_file(row).is_file():
        return ""
    return row.partial if pq.read_metadata(_pack_file(row)).num_rows == row.images else ""


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


def resized(images: ImageSet, size: tuple[int, int], *, filter: str = "bilinear") -> ImageSet:
    """The same images at (height, width), by one of Pillow's filters: ``bilinear``, ``bicubic``, ``box``.

    All of them are antialiased when shrinking.
    """
    if filter not in FILTERS:
        raise UserError(f"filter={filter!r} is unknown; choose one of {', '.join(FILTERS)}.")
    height, width = size

    def read(i: int) -> np.ndarray:
        return np.asarray(images.image(i).resize((width, height), Image.Resampling[filter.upper()]))

    return ImageSet(f"{images.name} at {width}x{height}, {filter}", images.ids, images.labels, read, size)


def recompressed(images: ImageSet, *, quality: int) -> ImageSet:
    """The same images after a JPEG of this quality, 1 to 95."""

    def read(i: int) -> bytes:
        buffer = io.BytesIO()
        images.image(i).save(buffer, "JPEG", quality=quality)
        return buffer.getvalue()

    return ImageSet(f"{images.name}, JPEG {quality}", images.ids, images.labels, read, images.size)


def pixel_hashes(images: ImageSet) -> list[str]:
    """The sha256 of every image's size and RGB pixels: equal for equal images, however they are stored."""
    pixels = (images.image(i) for i in range(len(images)))
    return [hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest() for image in pixels]


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


def _pack_file(dataset: Dataset) -> Path:
    return data_folder() / dataset.name / f"{dataset.split}.parquet"


def _unpacked(dataset: Dataset) -> Path:
    """Where the images of a downloaded archive lie."""
    return cache_folder() / "data" / dataset.name / dataset.split


def _folder(dataset: Dataset) -> Path | None:
    places = (data_folder() / dataset.name / dataset.split, _unpacked(dataset))
    return next((place for place in places if place.is_dir()), None)


def _torchvision_mark(dataset: Dataset) -> Path:
    """An empty file that says that torchvision's download is complete."""
    return cache_folder() / "torchvision" / f"{dataset.name}-{dataset.split}.complete"


def _is_here(dataset: Dataset) -> bool:
    return (
        dataset.source == _SKLEARN
        or _pack_file(dataset).is_file()
        or _folder(dataset) is not None
        or _torchvision_mark(dataset).is_file()
    )


def _find(dataset: Dataset) -> ImageSet:
    file, folder = _pack_file(dataset), _folder(dataset)
    wanted = {dataset.published}
    if dataset.source == _SKLEARN:
        images = _DEMO[dataset.key](dataset)
    elif file.is_file():
        images = _from_pack(dataset, file)
        wanted.add(dataset.images)
    else:
        images = _download(dataset) if folder is None else from_folder(folder)
        images = replace(images, name=dataset.key, size=_measured(images, dataset.size))
    if dataset.published and len(images) not in wanted:
        pack = f" (that of the data pack {dataset.images})" if len(wanted) > 1 else ""
        raise UserError(
            f"{dataset.key} has {len(images)} images here; the whole set has {dataset.published}{pack}. "
            "Complete it, or pass the folder by its path."
        )
    return images


def _from_pack(dataset: Dataset, file: Path) -> ImageSet:
    images = from_parquet(file, name=dataset.key, size=dataset.size)
    if hashlib.sha256(file.read_bytes()).hexdigest() != dataset.sha256:
        warnings.warn(
            f"{dataset.key} in DLSR_DATA is not the file this project was measured on "
            "(another sha256); results made from it carry the hash of their own image list.",
            stacklevel=4,
        )
    return images


def _measured(images: ImageSet, size: tuple[int, int] | None) -> tuple[int, int] | None:
    """The registered size, or None where the first image has another: some packs are reduced."""
    try:
        width, height = images.image(0).size
    except UserError:  # whether such an image may be skipped is decided elsewhere
        return None
    return size if size == (height, width) else None


def _missing(dataset: Dataset, why: str) -> UserError:
    places = (
        f"$DLSR_DATA/{dataset.key}.parquet (the file of the data pack)" if dataset.sha256 else "",
        f"$DLSR_DATA/downloads/{dataset.archive.file} (that archive)" if dataset.archive else "",
        f"$DLSR_DATA/{dataset.key}/<class>/*.JPEG (a folder of its images, with or without classes)",
    )
    return UserError(
        f"{dataset.key} is not here, and {why}. By hand, put it at "
        f"{' or '.join(filter(None, places))}; DLSR_DATA is {data_folder()}. "
        f"Here are: {', '.join(sets_here())}; `dlsr sets --download NAME` gets others."
    )


def _download(dataset: Dataset) -> ImageSet:
    if dataset.torchvision:
        return _by_torchvision(dataset)
    if dataset.archive:
        return _by_archive(dataset, dataset.archive)
    raise _missing(dataset, "there is no address to download it from")


# Downloads by torchvision, which checks its own checksums


def _numbers(source: Any) -> list[str]:
    return [f"{i:05d}" for i in range(len(source))]


def _class_names(source: Any) -> list[str]:
    return [source.classes[int(i)] for i in source.targets]


def _indexed_names(source: Any) -> list[str]:
    names = {i: name for name, i in source.class_to_idx.items()}
    return [names[i] for i in source.targets]


@dataclass(frozen=True)
class Loader:
    """How a class of torchvision is called: for each split, once for each of its parts; how it is read."""

    calls: Mapping[str, tuple[Mapping[str, Any], ...]]
    labels: Callable[[Any], Sequence[str]] = _class_names
    ids: Callable[[Any], Sequence[str]] = _numbers


_BY_TRAIN = {"train": ({"train": True},), "test": ({"train": False},)}

LOADERS = {
    "CIFAR10": Loader(_BY_TRAIN),
    "CIFAR100": Loader(_BY_TRAIN),
    "MNIST": Loader(_BY_TRAIN),
    "FashionMNIST": Loader(_BY_TRAIN),
    "KMNIST": Loader(_BY_TRAIN),
    "SVHN": Loader({"test": ({"split": "test"},)}, labels=lambda source: [str(i) for i in source.labels]),
    "Omniglot": Loader(
        {"test": ({"background": False},)},
        labels=lambda source: [source._characters[i] for _, i in source._flat_character_images],
        ids=lambda source: [f"{source._characters[i]}/{x}" for x, i in source._flat_character_images],
    ),
    "DTD": Loader(  # all 5,640 images: the partition says only which split an image is in
        {"test": tuple({"split": split, "partition": 1} for split in ("train", "val", "test"))},
        labels=lambda source: [source.classes[i] for i in source._labels],
        ids=lambda source: [f"{file.parent.name}/{file.name}" for file in source._image_files],
    ),
    "Places365": Loader(
        {"val": ({"split": "val", "small": True},)},
        labels=_indexed_names,
        ids=lambda source: [Path(file).name for file, _ in source.imgs],
    ),
    "CelebA": Loader(
        {"train": ({"split": "train"},), "test": ({"split": "test"},)},
        labels=lambda source: [str(i) for i in source.identity.flatten().tolist()],
        ids=lambda source: list(source.filename),
    ),
}


def _by_torchvision(dataset: Dataset) -> ImageSet:
    """Into the cache folder; once complete, the server is not asked again."""
    loader, mark = LOADERS[dataset.torchvision], _torchvision_mark(dataset)
    fetch = not mark.is_file()
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        source_class = getattr(torchvision.datasets, dataset.torchvision)
        parts = [
            source_class(mark.parent, **options, download=fetch) for options in loader.calls[dataset.split]
        ]
        mark.touch()
    except Exception as error:  # the tools it downloads with raise almost anything
        mark.unlink(missing_ok=True)
        raise _missing(dataset, f"torchvision could not download it ({error})") from error
    whole = ConcatDataset(parts)
    return ImageSet(
        dataset.key,
        [name for part in parts for name in loader.ids(part)],
        [label for part in parts for label in loader.labels(part)],
        lambda i: np.asarray(whole[i][0]),
        dataset.size,
    )


# Downloads of archives


def _by_archive(dataset: Dataset, archive: Archive) -> ImageSet:
    """The set's images out of an archive that lies there, or is downloaded, into the cache folder."""
    target = _unpacked(dataset)
    try:
        given = _given(archive)
        file = given or _fetched(dataset, archive)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as place:
            folder = Path(place) / dataset.split
            _extract(file, archive, folder)
            _check_unpacked(dataset, file, folder)
            folder.rename(target)  # at once, so that a broken-off extraction is never taken for the set
        if given is None:
            file.unlink()
    except (OSError, http.client.HTTPException) as error:
        raise _missing(dataset, f"it could not be downloaded from {archive.url} ({error})") from error
    return from_folder(target)


def _given(archive: Archive) -> Path | None:
    """The archive, checked, where someone has put it or an earlier call has left it."""
    places = (base / "downloads" / archive.file for base in (data_folder(), cache_folder()))
    file = next((place for place in places if place.is_file()), None)
    if file is not None and (found := _md5(file)) != archive.md5:
        raise UserError(
            f"The archive {file} has the md5 {found}, but {archive.md5} is expected. Download it again "
            f"from {archive.url}, or remove it."
        )
    return file


def _fetched(dataset: Dataset, archive: Archive) -> Path:
    """The downloaded archive; one with a wrong checksum is put aside."""
    file = cache_folder() / "downloads" / archive.file
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    _fetch(archive.url, part)
    if (found := _md5(part)) == archive.md5:
        return part.replace(file)
    wrong = part.replace(file.with_name(f"{file.name}.wrong"))
    raise _missing(
        dataset,
        f"what {archive.url} gave has the md5 {found}, but {archive.md5} is expected; it was kept as {wrong}",
    )


def _fetch(url: str, part: Path) -> None:
    """Downloads into ``part``, going on where an earlier try stopped if the server can do that."""
    start = part.stat().st_size if part.is_file() else 0
    with _open_url(url, start=start) as answer:
        done = start if answer.status == http.client.PARTIAL_CONTENT else 0
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length else None
        bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=part.stem)
        with part.open("ab" if done else "wb") as file, bar:
            while block := answer.read(BLOCK):
                done += file.write(block)
                bar.update(len(block))
    if total is not None and done < total:
        raise OSError(f"the connection broke at {done:,} of {total:,} bytes; the next try goes on from there")


def _open_url(url: str, *, start: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": "dlsr"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if start and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return _open_url(url, start=0)  # what is here is longer than the file there
        raise


def _md5(file: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("rb") as content:
        while block := content.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _extract(file: Path, archive: Archive, folder: Path) -> None:
    """The images of the set into ``folder``, those with labels in a folder named by the label.

    Only contents are read and only plain files are written, whatever else the archive asks for.
    """
    notes = b""
    folder.mkdir()
    try:
        for path, is_plain, read in _members(file):
            if not _is_wanted(path, archive):
                continue
            if not is_plain:
                raise UserError(f"The archive {file} has a link or device as {path}; it is not unpacked.")
            content = read()
            if str(path) == archive.labels:
                notes = content
            elif content:  # notMNIST has two empty files
                _write(folder / path.relative_to(archive.folder), content)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(
            f"The archive {file} is damaged ({error}); remove it and download it again."
        ) from error
    for line in notes.decode().splitlines():
        name, label = line.split()[:2]
        image = folder / _inside(name, file)
        if image.is_file():
            _write(folder / _inside(f"{label}/{name}", file), image.read_bytes())
            image.unlink()


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def _is_wanted(path: PurePosixPath, archive: Archive) -> bool:
    if str(path) == archive.labels:
        return True
    if not path.is_relative_to(archive.folder) or path.name.startswith("."):  # "._1.png" of macOS
        return False
    inner = path.relative_to(archive.folder)
    return path.suffix.lower() in IMAGE_SUFFIXES and fnmatchcase(str(inner), archive.pattern)


def _members(file: Path) -> Iterator[tuple[PurePosixPath, bool, Callable[[], bytes]]]:
    """Path, whether it is a plain file, and content of all that an archive holds, but folders."""
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as zipped:
            for info in zipped.infolist():
                if not info.is_dir():
                    is_plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
                    yield _inside(info.filename, file), is_plain, partial(zipped.read, info)
    else:
        with tarfile.open(file) as tar:
            for member in tar:
                if not member.isdir():
                    yield (
                        _inside(member.name, file),
                        member.isreg(),
                        lambda m=member: tar.extractfile(m).read(),
                    )


def _inside(name: str, file: Path) -> PurePosixPath:
    """A path in an archive; one that leaves its folder is refused."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive:
        raise UserError(
            f"The archive {file} has a file {name!r}, which would be written outside of its folder; it is "
            "not unpacked. Remove it, and download it again from where it was published."
        )
    return path


def _check_unpacked(dataset: Dataset, file: Path, folder: Path) -> None:
    found = sum(path.is_file() for path in folder.rglob("*"))
    if not found or found != (dataset.published or found):
        raise UserError(
            f"The archive {file} holds {found} images of {dataset.key}; the whole set has "
            f"{dataset.published}. Unpack it by hand, and pass the folder by its path."
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
