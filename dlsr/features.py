"""Features: each image goes once through the frozen encoder; what comes out is kept on disk.

Source: section 3.1 of the paper. The z-score of every layer is the released code's.
"""

import ctypes
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dlsr.cache import cache_folder, key, locked
from dlsr.data import ImageSet, Size, load_images, resize, resize_chain
from dlsr.encoders import POOLINGS, FrozenEncoder
from dlsr.errors import UserError

VERSION = 2  # raise it when the same image gives other features; 2: EXIF orientation is applied
DELTA = 1e-5  # keeps a constant layer from dividing by zero, as in the released code


@dataclass(frozen=True)
class Features:
    """Pooled features of one image set, memory-mapped.

    ``values`` is (N, poolings, c) float32 of the images in ``images``; ``rows`` are their rows in
    the set that was asked for, from which unreadable images are missing if they were skipped;
    ``channels`` are the layers' widths; ``encoder`` is the encoder's name.
    """

    values: np.ndarray
    rows: np.ndarray
    images: ImageSet
    channels: tuple[int, ...]
    encoder: str
    weights_sha256: str
    device: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> Sequence[str]:
        """The images' names."""
        return self.images.ids

    @property
    def labels(self) -> Sequence[str]:
        """The images' labels."""
        return self.images.labels

    def raw(self, pooling: str = "gap") -> np.ndarray:
        """Return the features as they are pooled, (N, c) float32."""
        if pooling not in POOLINGS:
            raise UserError(f"pooling={pooling!r} was given; choose one of {', '.join(POOLINGS)}.")
        return self.values[:, POOLINGS.index(pooling)]

    def z0(self, pooling: str = "gap") -> np.ndarray:
        """Return the z-score of every layer of each image, (N, c) float32 (`layer_zscore`)."""
        return layer_zscore(self.raw(pooling), self.channels)

    def take(self, rows: Sequence[int]) -> "Features":
        """Return the features of the image set's given rows, in that order.

        Raises `UserError` if one of these images was skipped as unreadable.
        """
        places = {row: i for i, row in enumerate(self.rows.tolist())}
        at = [places.get(int(row), -1) for row in rows]
        if -1 in at:
            raise UserError(f"{at.count(-1)} of these rows were skipped as unreadable; omit them.")
        own = {"values": self.values[at], "images": self.images.take(at)}
        return replace(self, rows=np.arange(len(at)), **own)


def layer_slices(channels: Sequence[int]) -> list[slice]:
    """Return where each layer lies among the c columns."""
    ends = np.cumsum(channels)
    return [slice(int(end - width), int(end)) for end, width in zip(ends, channels, strict=True)]


def layer_zscore(raw: np.ndarray, channels: Sequence[int]) -> np.ndarray:
    """Return z0: (f - mean) / (std + 1e-5) for every image and layer, with the unbiased std.

    ``raw`` is (N, c), ``channels`` are the layers' widths; the result is (N, c) float32. Every
    layer has mean 0, and the squared norm of z0 is about sum(n_m - 1), 715 for EfficientNet-B4.
    Raises `UserError` for NaN, infinite values and another width.
    """
    if raw.shape[1] != sum(channels):
        raise UserError(f"Features of shape {raw.shape} were given for layers of {channels}.")
    check_finite(raw)
    z0 = np.empty(raw.shape, dtype=np.float32)
    for layer in layer_slices(channels):
        f = np.asarray(raw[:, layer], dtype=np.float32)
        z0[:, layer] = (f - f.mean(1, keepdims=True)) / (f.std(1, ddof=1, keepdims=True) + DELTA)
    return z0


def check_finite(features: np.ndarray) -> None:
    """Raise `UserError` with a count of the images if (N, c) features hold NaN or inf."""
    bad = len(features) - int(np.isfinite(features).all(axis=1).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(features)} images have NaN or infinite features; omit them."
        )


def pick_device(device: str | None = None) -> str:
    """Return the device asked for, else CUDA where there is one, else the CPU."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def device_kind(device: str) -> str:
    """Return ``cuda`` for ``cuda:0`` and so on; raise `UserError` for what is no device."""
    try:
        return torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"device={device!r} was given; it is cpu, cuda or cuda:0, say.") from error


def reading_workers(device: str, cores: int) -> int:
    """Return how many processes read images: none on a CPU, where the encoder needs all cores."""
    return min(16, cores) if device_kind(device) == "cuda" else 0


def extract(
    images: ImageSet | str | Path, encoder: FrozenEncoder, *, resolution: str = "native",
    id_size: Size | None = None, chain: Sequence[tuple] | None = None, batch_size: int = 0,
    device: str | None = None, on_error: str = "raise", progress: bool = True,
) -> Features:  # fmt: skip
    """Return the features of an image set, of a registered one by its key, or of a folder.

    They come out of the cache, or are extracted into it; a run that was cut off goes on, and of
    two processes one waits for the other. ``resolution`` is ``native`` or ``matched`` (see
    `data.resize_chain`); ``chain`` names the sizes instead. With ``on_error="skip"`` unreadable
    images are left out and named, else they raise `UserError`.
    """
    if on_error not in ("raise", "skip"):
        raise UserError(f"on_error={on_error!r} was given; choose raise or skip.")
    images = images if isinstance(images, ImageSet) else load_images(images)
    chain = chain or resize_chain(resolution, size=images.size, id_size=id_size)
    device = pick_device(device)
    made_from = {"images": images.sha256, "weights": encoder.weights_sha256, "chain": chain}
    made_with = {"device": device_kind(device), "precision": "float32", "version": VERSION}
    name = key(encoder=encoder.about, **made_from, **made_with)
    file = cache_folder() / "features" / f"{name}.npy"
    with locked(file):
        if not file.is_file():
            _extract_to(file, _Pixels(images, chain), encoder, batch_size, device, progress)
    try:
        values = np.load(file, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"The features {file} are damaged ({error}); delete them.") from error
    readable = np.flatnonzero(np.isfinite(values[:, 0, 0]))
    if len(readable) < len(images):
        lost = np.setdiff1d(np.arange(len(images)), readable)
        what = f"{len(lost)} of {len(images)} images of {images.name} cannot be read, "
        what += f"{images.ids[lost[0]]!r} first"
        if on_error == "raise" or not len(readable):
            raise UserError(f"{what}; mend or remove them, or skip them (--skip-unreadable).")
        tqdm.write(f"{what}; they are left out.", file=sys.stderr)
        values, images = values[readable], images.take(readable)
    about = (encoder.channels, encoder.name, encoder.weights_sha256, device)
    return Features(values, readable, images, *about)


class _Pixels(Dataset):
    """The row and the pixels of each image from ``first`` on; None where it cannot be read."""

    def __init__(self, images: ImageSet, chain: Sequence[tuple]) -> None:
        self.images, self.chain, self.first = images, chain, 0

    def __len__(self) -> int:
        return len(self.images) - self.first

    def __getitem__(self, i: int) -> tuple[int, np.ndarray | None]:
        row = self.first + i
        try:
            return row, np.array(resize(self.images.image(row), self.chain))
        except UserError:
            return row, None


def _extract_to(file, pixels, encoder, batch_size, device, progress) -> None:
    """Fill an array on disk batch by batch, and move it into place.

    It starts as NaN, so that a run that was cut off shows how far it came; rows of unreadable
    images become infinite.
    """
    if sys.platform == "linux":  # glibc is to keep large freed blocks: twice the images/s
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, 1 << 30)
    torch.backends.cudnn.allow_tf32 = False  # features of a GPU are float32 too
    draft, total = file.with_suffix(".partial"), len(pixels)
    if not draft.is_file():
        shape, empty = (total, len(POOLINGS), sum(encoder.channels)), draft.with_suffix(".empty")
        if shutil.disk_usage(file.parent).free < 4 * math.prod(shape):
            raise UserError(f"{file.parent} has no room for {shape} numbers; make room there.")
        np.lib.format.open_memmap(empty, "w+", np.float32, shape)[:] = np.nan
        empty.rename(draft)
    values = np.lib.format.open_memmap(draft, "r+")
    pixels.first = int(np.isnan(np.append(values[:, -1, -1], np.nan)).argmax())
    encoder, kind = encoder.to(device), device_kind(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = reading_workers(device, cores or 1)  # started once, not forked beside CUDA
    options = {"num_workers": workers, "multiprocessing_context": "spawn" if workers else None}
    batches = DataLoader(
        pixels, batch_size or {"cuda": 256}.get(kind, 32), collate_fn=list, **options
    )
    options = {"initial": pixels.first, "desc": pixels.images.name, "disable": not progress}
    with tqdm(total=total, unit="image", **options) as bar:
        for batch in batches:
            values[[row for row, image in batch if image is None]] = np.inf
            readable = [(row, image) for row, image in batch if image is not None]
            if readable:
                found = torch.from_numpy(np.stack([image for _, image in readable])).to(device)
                values[[row for row, _ in readable]] = encoder(found).cpu().numpy()
            bar.update(len(batch))
    values.flush()
    draft.rename(file)
