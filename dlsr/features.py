"""Features: each image goes once through the frozen encoder; what comes out is kept on disk.

Source: section 3.1 of the paper. The z-score of every layer is the released code's.
"""

import os
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dlsr import backends
from dlsr.cache import cache_folder, key, locked, replace_file
from dlsr.data import INPUT_SIZE, ImageSet, load_images, resize
from dlsr.encoders import POOLINGS, FrozenEncoder
from dlsr.errors import UserError

VERSION = 2  # raise it when the same image gives other features; 2: EXIF orientation is applied
DELTA = 1e-5  # keeps a constant layer from dividing by zero, as in the released code


@dataclass(frozen=True)
class Features:
    """Pooled features of one image set, memory-mapped.

    ``values`` is (N, poolings, c) float32 of the images in ``images``; ``rows`` are their rows in
    the set that was asked for, from which unreadable images are missing if they were skipped;
    ``channels`` are the layers' widths, and ``backend`` is what ran the encoder in which precision,
    such as ``openvino, float32``.
    """

    values: np.ndarray
    rows: np.ndarray
    images: ImageSet
    channels: tuple[int, ...]
    weights_sha256: str
    device: str
    backend: str

    def __len__(self) -> int:
        return len(self.rows)

    def raw(self, pooling: str = "gap") -> np.ndarray:
        """Return the features as they are pooled, (N, c) float32."""
        if pooling not in POOLINGS:
            raise UserError(f"pooling={pooling!r} was given; choose one of {', '.join(POOLINGS)}.")
        return self.values[:, POOLINGS.index(pooling)]

    def z0(self, pooling: str = "gap") -> np.ndarray:
        """Return the z-score of every layer of each image, (N, c) float32 (`layer_zscore`)."""
        return layer_zscore(self.raw(pooling), self.channels)


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


def check_finite(x: np.ndarray, which: str = "images") -> np.ndarray:
    """Return x, (N, c); raise `UserError` with a count of the images if it holds NaN or inf."""
    bad = int((~np.isfinite(x)).any(axis=1).sum())
    if bad:
        raise UserError(f"{bad} of {len(x)} {which} have NaN or infinite features; omit them.")
    return x


def pick_device(device: str | None = None) -> str:
    """Return the device asked for, else CUDA, else the CPU; raise `UserError` for what is none."""
    try:
        return str(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    except RuntimeError as error:
        raise UserError(f"device={device!r} was given; it is cpu, cuda or cuda:0, say.") from error


def extract(
    images: ImageSet | str | Path, encoder: FrozenEncoder, *, precision: str = "float32",
    chain: Sequence[tuple] = (INPUT_SIZE,), backend: str = "", batch_size: int = 0,
    device: str | None = None, on_error: str = "raise", progress: bool = True,
) -> Features:  # fmt: skip
    """Return the features of an image set, of a registered one by its key, or of a folder.

    They come out of the cache, or are extracted into it; a run that was cut off goes on, and of
    two processes one waits for the other. ``chain`` names the sizes through which an image goes to
    the encoder, as in `data.resize`. ``precision`` is ``float32`` or ``bf16``, and ``backend`` is
    ``torch``, ``openvino`` or "", the fastest for so many images. With ``on_error="skip"``
    unreadable images are left out and named, else they raise `UserError`.
    """
    if on_error not in ("raise", "skip"):
        raise UserError(f"on_error={on_error!r} was given; choose raise or skip.")
    images = images if isinstance(images, ImageSet) else load_images(images)
    device = torch.device(pick_device(device))
    backends.check_precision(precision, device)
    backend = backend or backends.choose(len(images), device)
    what = (images, chain, encoder, precision, device, batch_size, progress)
    try:
        values = _extracted(backend, *what)
    except backends.Unusable as error:
        warnings.warn(f"{backend} is not used, because {error}; PyTorch is.", stacklevel=2)
        backend, values = "torch", _extracted("torch", *what)
    rows, n = np.flatnonzero(np.isfinite(values[:, 0, 0])), len(images)
    if len(rows) < n:
        first = images.ids[np.setdiff1d(range(n), rows)[0]]
        told = f"{n - len(rows)} of {n} images of {images.name} cannot be read, {first!r} first"
        if on_error == "raise" or not len(rows):
            raise UserError(f"{told}; mend or remove them, or skip them (on_error='skip').")
        tqdm.write(f"{told}; they are left out.", file=sys.stderr)
        values, images = values[rows], images.take(rows)
    about = (encoder.channels, encoder.weights_sha256, str(device))
    return Features(values, rows, images, *about, f"{backend}, {precision}")


def _extracted(backend, images, chain, encoder, precision, device, batch_size, progress):
    """Return the raw features out of the cache, where they are put if they are not there."""
    made_from = {"images": images.sha256, "weights": encoder.weights_sha256, "chain": chain}
    made_by = {"device": device.type, "precision": precision, "backend": backend}
    name = key(encoder=encoder.about, **made_from, **made_by, version=VERSION)
    file = cache_folder() / "features" / f"{name}.npy"
    with locked(file):
        if not file.is_file():
            size = batch_size or backends.BATCH.get(device.type, 16)
            options = {"precision": precision, "device": device, "batch_size": size}
            run = backends.prepare(encoder, backend, **options)
            ahead = 0 if device.type == "cpu" else 2  # on a CPU reading would slow the encoder
            batches = partial(read_batches, images, chain, size, ahead=ahead)
            _extract_to(file, images, batches, run, sum(encoder.channels), progress)
    try:
        return np.load(file, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"The features {file} are damaged ({error}); delete them.") from error


def _extract_to(file, images, batches, run, width, progress) -> None:
    """Fill an array on disk batch by batch, and move it into place.

    It starts as NaN, so that a run that was cut off shows how far it came; rows of unreadable
    images become infinite.
    """
    draft, shape = file.with_suffix(".draft"), (len(images), len(POOLINGS), width)
    if not draft.is_file():
        replace_file(draft, np.broadcast_to(np.float32(np.nan), shape).tofile)
    values = np.memmap(draft, np.float32, "r+", shape=shape)
    done = int(np.isnan(np.append(values[:, -1, -1], np.nan)).argmax())
    with tqdm(initial=done, total=len(images), unit="image", disable=not progress) as bar:
        for rows, pixels in batches(first=done):
            found = np.full((len(rows), *shape[1:]), np.inf, np.float32)
            readable = [i for i, image in enumerate(pixels) if image is not None]
            if readable:
                found[readable] = run(np.stack([pixels[i] for i in readable]))
                which = f"images of {images.name} from {images.ids[rows[0]]!r} on"
                check_finite(found[readable].reshape(len(readable), -1), which)
            values[rows.start : rows.stop] = found
            bar.update(len(rows))
    replace_file(file, lambda path: np.save(path, values))
    draft.unlink()


def read_batches(
    images: ImageSet, chain: Sequence[tuple], size: int, *, first: int = 0, ahead: int = 0
) -> Iterator[tuple[range, list[np.ndarray | None]]]:
    """Yield the rows and the resized pixels of ``size`` images after the other, read by all cores.

    An image that cannot be read is None. ``ahead`` batches are read while others are used.
    """

    def read(i: int, content: object) -> np.ndarray | None:
        image, _ = replace(images, source={i: content}).attempt(i)
        return image and np.array(resize(image, chain))

    waiting = deque()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(first, len(images), size):
            rows = range(start, min(start + size, len(images)))
            contents = [images.source[i] for i in rows]  # a pack is read here, in its order
            waiting.append((rows, pool.map(read, rows, contents)))
            if len(waiting) > ahead:
                rows, pixels = waiting.popleft()
                yield rows, list(pixels)
        for rows, pixels in waiting:
            yield rows, list(pixels)
