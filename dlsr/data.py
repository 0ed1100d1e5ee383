"""Image sets: the registry of those the paper and the study use, and any folder of images.

A set comes from a pack (``$DLSR_DATA/<name>/<split>.parquet``), from a folder of images, from a
download, or, for the demo, out of ``demo.npz``.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from torch.utils.data import Subset

from dlsr import downloads
from dlsr.cache import cache_folder, kept_hash
from dlsr.errors import UserError

INPUT_SIZE = (224, 224)  # height, width of what every encoder sees
BUILT_IN = "scikit-learn"  # digits and patches of two photographs
Size = tuple[int, int]  # height, width


@lru_cache
def registry() -> dict[str, SimpleNamespace]:
    """Return the registered image sets by their keys, such as ``cifar10/test``.

    A set has the columns of ``datasets.csv``: ``title``; ``images``, which counts the data pack's
    file, and ``whole``, the published set where that is another number; ``size`` (height, width),
    None where it varies; ``role`` beside CIFAR-10 (``id``, ``near``, ``far``); ``partial``, in
    which way the pack's file is not the published set; and where it is downloaded from.
    """
    found = {}
    for row in csv.DictReader(io.StringIO(files("dlsr").joinpath("datasets.csv").read_text())):
        row |= {name: int(row[name] or 0) for name in ("height", "width", "images", "whole")}
        size = (row["height"], row["width"]) if row["height"] else None
        row |= {"size": size, "calls": json.loads(row["calls"] or "[]")}
        found[row["key"]] = SimpleNamespace(**row)
    return found


def set_title(name: str) -> str:
    """Return a set's name as a reader knows it; an unregistered name stays as it is."""
    return registry()[name].title if name in registry() else name


def data_folder() -> Path:
    """Return ``$DLSR_DATA``, or ``data`` in the cache folder."""
    return Path(os.environ.get("DLSR_DATA") or cache_folder() / "data")


class ParquetImages:
    """The encoded images of a pack, read some at a time, fastest in their order."""

    def __init__(self, file: Path) -> None:
        self.file, self.batches, self.first, self.batch = file, None, 0, ()

    def __getitem__(self, row: int) -> bytes:
        if row < self.first or self.batches is None:
            batches = pq.ParquetFile(self.file).iter_batches(64, columns=["image.bytes"])
            self.batches, self.first, self.batch = batches, 0, ()
        while row >= self.first + len(self.batch):
            self.first, self.batch = self.first + len(self.batch), next(self.batches)["image"]
        return self.batch[int(row - self.first)]["bytes"].as_py()

    def __reduce__(self) -> tuple:  # another process opens the file itself
        return ParquetImages, (self.file,)


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order.

    ``source[i]`` is a file's path, its bytes, an array (H, W[, 3]) of uint8, or torchvision's pair
    of image and label. ``size`` is (height, width), or None where it varies. ``partial`` says in
    which way this is not the published set.
    """

    name: str
    ids: Sequence[str]
    labels: Sequence[str]
    source: Sequence
    size: Size | None = None
    partial: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, i: int) -> Image.Image:
        """Return image i as RGB, turned as its EXIF tag says; raise `UserError` with its name."""
        try:
            content = self._content(i)
            if isinstance(content, np.ndarray):
                return to_rgb(Image.fromarray(content))
            with Image.open(io.BytesIO(content)) as image:
                return to_rgb(ImageOps.exif_transpose(image))
        except Exception as error:  # on damaged files, decoders raise almost anything
            raise UserError(
                f"Image {self.ids[i]!r} of {self.name} cannot be read ({error}); mend or remove "
                "it, or leave such images out with on_error='skip' (--skip-unreadable)."
            ) from error

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
        paths = getattr(self.source, "file", self.source)
        paths = [paths] if isinstance(paths, Path) else paths
        of_files = isinstance(paths, list) and isinstance(paths[0], Path)
        return kept_hash("images", paths, self._hash) if of_files else self._hash()

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for i in range(len(self)):
            try:
                content = np.asarray(self._content(i)).tobytes()
            except OSError:  # whether such an image may be skipped is decided elsewhere
                content = b""
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def take(self, rows: Sequence[int]) -> "ImageSet":
        """Return the images at the given rows, in that order."""
        rows = [int(row) for row in rows]
        ids, labels = ([values[row] for row in rows] for values in (self.ids, self.labels))
        return replace(self, ids=ids, labels=labels, source=Subset(self.source, rows))


def to_rgb(image: Image.Image) -> Image.Image:
    """Return any Pillow mode as 8-bit RGB: 16-bit grey is scaled, transparency laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode != "F" else 255.0 if pixels.max() > 1 else 1.0
        image = Image.fromarray((np.clip(pixels / top, 0, 1) * 255).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_chain(
    resolution: str, *, size: Size | None, id_size: Size | None = None
) -> tuple[Size, ...]:
    """Return the sizes, (height, width), through which an image goes to the encoder.

    ``native``: straight to 224x224. ``matched``: to the ID set's size first; a set that has it
    goes straight, so that its features are the same at both resolutions.
    """
    if resolution not in ("native", "matched") or (resolution == "matched" and not id_size):
        raise UserError(
            f"resolution={resolution!r} and id_size={id_size} were given; choose 'native', or "
            "'matched' with the (height, width) of the ID images."
        )
    straight = resolution == "native" or size == id_size
    return (INPUT_SIZE,) if straight else (id_size, INPUT_SIZE)


def resize(image: Image.Image, chain: Sequence[tuple]) -> Image.Image:
    """Resize step by step through (height, width[, filter]); the aspect ratio is not kept.

    The filter is one of Pillow's, else bilinear; all are antialiased when shrinking.
    """
    for height, width, *names in chain:
        method = Image.Resampling[(names or ["bilinear"])[0].upper()]
        image = image.resize((width, height), method)
    return image


def load_images(name: str | Path, *, n: int = 0, seed: int = 0) -> ImageSet:
    """Return a registered set by its key, or any folder of images by its path.

    ``n`` takes a pick of at most n images, 0 all, the same on every machine by ``seed``.
    Registered sets that are not here are downloaded where that is possible. Raises `UserError`
    that says where a missing set is put.
    """
    if str(name) in registry():
        images = _registered(registry()[str(name)])
    elif Path(name).is_dir():
        images = from_folder(Path(name))
    else:
        raise UserError(
            f"{str(name)!r} is neither a folder nor a known image set; `dlsr sets` lists those."
        )
    if not 0 < n < len(images):
        return images
    rows = np.sort(np.random.RandomState(seed).permutation(len(images))[:n])
    partial = f"a pick of {n:,} of {len(images):,} images"
    return replace(images.take(rows), partial=f"{images.partial}; {partial}".removeprefix("; "))


def _registered(row: SimpleNamespace) -> ImageSet:
    pack, counts = data_folder() / f"{row.key}.parquet", {row.whole or row.images}
    if row.source == BUILT_IN:
        with files("dlsr").joinpath("demo.npz").open("rb") as file:
            names = (f"{row.key.replace('/', '-')}-{part}" for part in ("ids", "labels", "pixels"))
            ids, labels, pixels = map(np.load(file).__getitem__, names)
        return ImageSet(row.key, ids.tolist(), labels.tolist(), pixels, row.size)
    if pack.is_file():
        images = from_parquet(pack, name=row.key, size=row.size)
        images = replace(images, partial=row.partial if len(images) == row.images else "")
        counts.add(row.images)
    else:
        images = _published(row)
    if row.images and len(images) not in counts:
        needed = " or ".join(map(str, sorted(counts)))
        raise UserError(
            f"{row.key} has {len(images)} images here; {needed} are needed: complete it."
        )
    return images


def _published(row: SimpleNamespace) -> ImageSet:
    """Return a set from a folder or a download; ``size`` is None where the images have another."""
    folder = data_folder() / row.key
    try:
        if row.torchvision and not folder.is_dir():
            images = downloads.torchvision_set(row.key, row.torchvision, row.calls)
            labels = np.asarray(getattr(images.datasets[0], "targets", [""] * len(images)))
            ids = [f"{i:05d}" for i in range(len(images))]
            images = ImageSet("", ids, labels.astype(str).tolist(), images)
        else:
            if row.url and not folder.is_dir():
                given = data_folder() / "downloads" / Path(row.url.split("?")[0]).name
                folder = downloads.unpacked_archive(given, row.url, row.md5) / row.folder
            images = from_folder(folder, row.pattern)
        width, height = images.image(0).size
    except Exception as error:  # the tools that download raise almost anything
        pack = f" or $DLSR_DATA/{row.key}.parquet (the data pack's file)" if row.sha256 else ""
        raise UserError(
            f"The image set {row.key} is not here and could not be downloaded ({error}); put it at "
            f"$DLSR_DATA/{row.key}/<class>/ (a folder of its images){pack}; the profile 'demo' "
            "needs no data."
        ) from error
    return replace(images, name=row.key, size=row.size if row.size == (height, width) else None)


def from_folder(folder: Path, pattern: str = "") -> ImageSet:
    """Return every image file under a folder, sorted by path; the label is the file's folder.

    Image files are those that Pillow decodes by itself, told by their suffix; ``pattern`` is one
    that their paths fit. Hidden files are left out.
    """
    known = {s: form for s, form in Image.registered_extensions().items() if form in Image.OPEN}
    suffixes = {suffix for suffix, form in known.items() if form not in ("MPEG", "EPS")}
    everything = sorted(p for p in folder.rglob(pattern or "*") if p.is_file())
    paths = [p for p in everything if p.suffix.lower() in suffixes and p.name[0] != "."]
    if not paths:
        raise UserError(
            f"The folder {folder} has {len(everything)} files, none of them an image; put PNG, "
            "JPEG, WebP or other images in it."
        )
    inner = [p.relative_to(folder) for p in paths]
    labels = [p.parent.as_posix() for p in inner]
    return ImageSet(folder.name, [p.as_posix() for p in inner], labels, paths)


def from_parquet(file: Path, *, name: str, size: Size | None = None) -> ImageSet:
    """Return a pack's images: columns ``image`` (a struct of bytes and path) and ``label``."""
    try:
        table = pq.ParquetFile(file).read(columns=["image.path", "label"])
        ids = [cell["path"] for cell in table["image"].to_pylist()]
        return ImageSet(name, ids, table["label"].to_pylist(), ParquetImages(file), size)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not a readable pack of images ({error}); it needs the columns image, a "
            "struct of bytes and path, and label."
        ) from error
