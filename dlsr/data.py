"""Image sets: the registry of those the paper and the study use, and any folder of images.

A set comes from a pack (``$DLSR_DATA/<name>/<split>.parquet``), from a folder of images, from a
download, or, for the demo, out of ``demo.npz``.
"""

import csv
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Subset

from dlsr import downloads
from dlsr.cache import cache_folder, kept_hash, key
from dlsr.errors import UserError

INPUT_SIZE = (224, 224)  # height, width of what every encoder sees
BUILT_IN = "scikit-learn"  # digits and patches of two photographs
HERE = Path(__file__).parent
HEIF = (".heic", ".heif", ".hif", ".avif")  # read where there is a decoder
# Files that a user takes for images, but that need an interpreter or a camera's own colours.
NOT_READ = (".eps", ".ps", ".ai", ".pdf", ".svg", ".svgz", ".wmf", ".emf", ".cr2", ".cr3", ".nef")
NOT_READ += (".arw", ".dng", ".orf", ".raf", ".rw2")
PIXELS = Image.MAX_IMAGE_PIXELS  # Pillow's; it refuses images with more than twice as many


@lru_cache
def registry() -> dict[str, SimpleNamespace]:
    """Return the registered image sets by their keys, such as ``cifar10/test``.

    A set has the columns of ``datasets.csv``: ``title``; ``images``, which counts the data pack's
    file, and ``whole``, the published set where that is another number; ``size`` (height, width),
    None where it varies; ``role`` beside CIFAR-10 (``id``, ``near``, ``far``); ``partial``, in
    which way the pack's file is not the published set; and where it is downloaded from.
    """
    found = {}
    for row in csv.DictReader((HERE / "datasets.csv").read_text("utf-8").splitlines()):
        row |= {name: int(row[name] or 0) for name in ("height", "width", "images", "whole")}
        row["size"] = (row["height"], row["width"]) if row["height"] else None
        found[row["key"]] = SimpleNamespace(**row)
    return found


def set_title(name: str) -> str:
    """Return a set's name as a reader knows it; "average" is "mean", an unknown name stays."""
    return registry()[name].title if name in registry() else {"average": "mean"}.get(name, name)


def data_folder() -> Path:
    """Return ``$DLSR_DATA``, or ``data`` in the cache folder."""
    return Path(os.environ.get("DLSR_DATA") or cache_folder() / "data")


class ParquetImages:
    """The encoded images of a pack, read 64 at a time in their order within a row group."""

    def __init__(self, file: Path) -> None:
        self.files, self.pack = [file], pq.ParquetFile(file)
        groups = map(self.pack.metadata.row_group, range(self.pack.num_row_groups))
        self.starts = np.cumsum([0, *(group.num_rows for group in groups)])
        self.first = self.end = 0  # of the batch that was read, and of its row group

    def __getitem__(self, row: int) -> bytes:
        if not self.first <= row < self.end:
            group = int(np.searchsorted(self.starts, row, side="right")) - 1
            self.first, self.end, self.batch = *self.starts[group : group + 2].tolist(), ()
            self.batches = self.pack.iter_batches(64, row_groups=[group], columns=["image.bytes"])
        while row >= self.first + len(self.batch):
            self.first, self.batch = self.first + len(self.batch), next(self.batches)["image"]
        return self.batch[int(row) - self.first]["bytes"].as_py()


@lru_cache
def formats() -> list[str]:
    """Return Pillow's names of the formats that are read; none of them starts an interpreter.

    HEIC is among them where ``pillow-heif`` is installed.
    """
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return [form for form in Image.OPEN if form not in ("EPS", "WMF", "MPEG")]


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order.

    ``source[i]`` is a file's path, its bytes, an array (H, W[, 3]) of uint8, or torchvision's pair
    of image and label. ``size`` is (height, width), or None where it varies. ``partial`` says in
    which way this is not the published set; ``left_out`` counts what a folder has besides.
    """

    name: str
    ids: Sequence[str]
    labels: Sequence[str]
    source: Sequence
    size: tuple[int, int] | None = None
    partial: str = ""
    left_out: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, i: int) -> Image.Image:
        """Return image i as 8-bit RGB, turned as its EXIF tag says.

        Any Pillow mode is read: 16-bit grey is scaled, transparency laid on white. Raises
        `UserError` with the image's name and why it cannot be read.
        """
        image, reason = self.attempt(i)
        if image is None:
            told = f"Image {self.ids[i]!r} of {self.name} cannot be read ({reason})"
            raise UserError(f"{told}; mend or remove it, or skip such images (on_error='skip').")
        return image

    def attempt(self, i: int) -> tuple[Image.Image | None, str]:
        """Return `image` i and "", or None and in a few words why it cannot be read."""
        try:
            return _rgb(self._content(i)), ""
        except Exception as error:  # on damaged files, decoders raise almost anything
            return None, _reason(self.ids[i].lower(), error)

    def _content(self, i: int) -> bytes | np.ndarray:
        content = self.source[i]
        if isinstance(content, tuple):
            return np.asarray(content[0])
        return content.read_bytes() if isinstance(content, Path) else content

    @cached_property
    def sha256(self) -> str:
        """A hash of the image list: of every image's content, in order.

        It is kept with the size and time of the files, so that no start reads them all again.
        """
        files = getattr(self.source, "files", self.source)
        of_files = isinstance(files, list) and isinstance(files[0], Path)
        found = kept_hash(files, self._hash) if of_files else self._hash()
        # Whether some images can be read depends on more than on what they hold.
        limit = {"limit": Image.MAX_IMAGE_PIXELS} if Image.MAX_IMAGE_PIXELS != PIXELS else {}
        if any(name.lower().endswith(HEIF) for name in self.ids):
            limit["formats"] = formats()
        return key(images=found, **limit) if limit else found

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for i in range(len(self)):
            try:
                content = bytes(self._content(i))
            except OSError:  # whether such an image may be skipped is decided elsewhere
                content = b""
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def take(self, rows: Sequence[int]) -> "ImageSet":
        """Return the images at the given rows, in that order."""
        ids, labels = ([values[row] for row in rows] for values in (self.ids, self.labels))
        return replace(self, ids=ids, labels=labels, source=Subset(self.source, rows))


def _rgb(content: bytes | np.ndarray) -> Image.Image:
    if isinstance(content, np.ndarray):
        image = Image.fromarray(content)
    else:
        image = Image.open(io.BytesIO(content), formats=formats())
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ValueError("it has pixels that are NaN or infinite")
    if image.mode == "F" or image.mode.startswith("I"):
        top = 65535 if image.mode != "F" else 255 if image.getextrema()[1] > 1 else 1
        image = image.convert("F").point(lambda grey: grey * (255 / top) + 0.5).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _reason(name: str, error: Exception) -> str:
    """Return in a few words why an image of this name, in small letters, cannot be read."""
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; see --max-pixels"
    if name.endswith(NOT_READ):
        return "files of its kind are not read; save it as PNG or JPEG"
    if name.endswith(HEIF) and isinstance(error, UnidentifiedImageError):
        return "its decoder is missing, or it is damaged: pip install 'dlsr[heic]'"
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a format that is read"
    return " ".join(str(error).split()) or repr(error)


def resize(image: Image.Image, chain: Sequence[tuple]) -> Image.Image:
    """Resize step by step through (height, width[, filter]); the aspect ratio is not kept.

    The filter is one of Pillow's, else bilinear; all are antialiased when shrinking.
    """
    for height, width, *names in chain:
        image = image.resize((width, height), Image.Resampling[(*names, "bilinear")[0].upper()])
    return image


def load_images(name: str | Path, *, n: int = 0, seed: int = 0) -> ImageSet:
    """Return a registered set by its key, or any folder of images by its path.

    ``n`` takes a pick of at most n images, 0 all, the same on every machine by ``seed``.
    Registered sets that are not here are downloaded where that is possible. Raises `UserError`
    that says where a missing set is put.
    """
    row, folder = registry().get(str(name)), Path(name)
    if not row and not (str(name) and folder.is_dir()):
        raise UserError(f"{str(name)!r} is neither a folder nor a set of `dlsr.registry()`.")
    images = _registered(row) if row else from_folder(folder)
    if not 0 < n < len(images):
        return images
    rows = np.sort(np.random.RandomState(seed).permutation(len(images))[:n])
    partial = f"a pick of {n:,} of {len(images):,} images"
    return replace(images.take(rows), partial=f"{images.partial}; {partial}".removeprefix("; "))


def _registered(row: SimpleNamespace) -> ImageSet:
    """Return a set of the package, of the data pack, or else the published one."""
    if row.source == BUILT_IN:
        name, demo = row.key.replace("/", "-"), np.load(HERE / "demo.npz")
        ids, labels, pixels = (demo[f"{name}-{part}"] for part in ("ids", "labels", "pixels"))
        return ImageSet(row.key, ids.tolist(), labels.tolist(), pixels, row.size)
    pack, counts = data_folder() / f"{row.key}.parquet", {row.whole or row.images: ""}
    if pack.is_file():
        images = from_parquet(pack, name=row.key, size=row.size)
        counts |= {row.images: row.partial}
    else:
        images = _published(row)
    n, needed = len(images), " or ".join(map(str, sorted(counts)))
    if row.images and n not in counts:
        raise UserError(f"{row.key} has {n} images here; {needed} are needed: complete it.")
    return replace(images, partial=counts.get(n, ""))


def _published(row: SimpleNamespace) -> ImageSet:
    """Return a set from a folder or a download; ``size`` is None where the images have another."""
    folder = data_folder() / row.key
    try:
        if row.url and not folder.is_dir():
            folder = downloads.unpacked_archive(data_folder(), row.url, row.md5) / row.folder
        if row.torchvision and not folder.is_dir():
            source = downloads.torchvision_set(row.key, row.torchvision, json.loads(row.calls))
            labels = np.asarray(getattr(source.datasets[0], "targets", [""] * len(source)))
            ids = [f"{i:05d}" for i in range(len(source))]
            images = ImageSet(row.key, ids, labels.astype(str).tolist(), source)
        else:
            images = from_folder(folder, row.pattern)
        size = row.size if images.image(0).size[::-1] == row.size else None
        return replace(images, name=row.key, size=size)
    except Exception as error:  # the tools that download raise almost anything
        pack = f" or $DLSR_DATA/{row.key}.parquet (the data pack's file)" if row.sha256 else ""
        raise UserError(
            f"The image set {row.key} is not here and could not be downloaded ({error}); put it at "
            f"$DLSR_DATA/{row.key}/<class>/ (a folder of its images){pack}; the profile 'demo' "
            "needs no data."
        ) from error


def from_folder(folder: Path, pattern: str = "") -> ImageSet:
    """Return every image file under a folder, sorted by path; the label is the file's folder.

    Image files are told by their suffix: those that Pillow decodes by itself, and those of which an
    `ImageSet` says why it cannot read them. ``pattern`` is one that their paths fit. ``left_out``
    counts hidden files, other files, and folders that are links or not open to this user.
    """
    paths, others, read = [], Counter(), formats()  # it also fills what Pillow has registered
    known = {suffix for suffix, form in Image.registered_extensions().items() if form in read}
    known |= {*HEIF, *NOT_READ, ".mpo"}  # photographs of some cameras, which Pillow opens as JPEG
    for path in sorted(folder.rglob(pattern or "*")):
        parts = path.relative_to(folder).parts
        if path.is_dir():
            closed = path.is_symlink() or not os.access(path, os.R_OK | os.X_OK)
            others["linked or closed folders"] += closed
        elif any(part[0] == "." or part == "__MACOSX" for part in parts):
            others["hidden files"] += 1
        elif path.suffix.lower() not in known or not path.is_file():
            others["other files"] += 1
        else:
            paths.append(path)
    left_out = ", ".join(f"{count} {kind}" for kind, count in others.items() if count)
    if not paths:
        told = f"The folder {folder} has {left_out or '0 files'}, none of them an image"
        raise UserError(f"{told}; put PNG, JPEG, WebP or other images in it.")
    inner = [p.relative_to(folder) for p in paths]
    labels = [p.parent.as_posix() for p in inner]
    return ImageSet(folder.name, [p.as_posix() for p in inner], labels, paths, left_out=left_out)


def from_parquet(file: Path, *, name: str, size: tuple[int, int] | None = None) -> ImageSet:
    """Return a pack's images: columns ``image`` (a struct of bytes and path) and ``label``."""
    try:
        table = pq.ParquetFile(file).read(columns=["image.path", "label"]).flatten()
        ids, labels = (table[column].to_pylist() for column in ("image.path", "label"))
        return ImageSet(name, ids, labels, ParquetImages(file), size)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not a readable pack of images ({error}); it needs the columns image, a "
            "struct of bytes and path, and label."
        ) from error
