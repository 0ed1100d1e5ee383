"""Features: each image once through the frozen encoder, kept on disk, memory-mapped afterwards."""

import ast
import ctypes
import hashlib
import io
import json
import os
import shutil
import sys
import time
import tokenize
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from dlsr.datasets import ImageSet, UserError, cache_folder, resize, resize_chain
from dlsr.encoders import POOLINGS, Encoder

TRANSFORM_VERSION = 1  # raise it when the way from an image to its features changes
PART = 1024  # images a part; a killed run loses at most one part
DELTA = 1e-5  # keeps a constant layer from dividing by zero, as in the released code
ON_ERROR = ("raise", "skip")
CODE = ("encoders", "features", "datasets.to_rgb", "datasets.resize", "datasets.resize_chain")
SPOT_CHECK = 8  # images extracted again when the code has changed since
DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # of a file cut short


@dataclass(frozen=True)
class Key:
    """What features depend on; equal keys mean equal features."""

    encoder: str
    layers: tuple[int, ...] | None
    weights_sha256: str
    images_sha256: str
    chain: tuple[tuple[int, int], ...]
    transform_version: int = TRANSFORM_VERSION

    def folder(self) -> Path:
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:20]
        return cache_folder() / "features" / digest


@dataclass(frozen=True)
class Features:
    """Raw pooled values of one image set, memory-mapped.

    ``values`` is (N, 2, c) float32 in the order of `POOLINGS`; ``rows`` are the rows of the image
    set that they belong to (unreadable images that were skipped are absent); ``channels`` are the
    layers' widths; ``images_per_second`` is of the extraction, encoder and reading together.
    """

    values: np.ndarray
    rows: np.ndarray
    ids: Sequence[str]
    labels: Sequence[str]
    channels: tuple[int, ...]
    key: Key
    images_per_second: float
    device: str

    def __len__(self) -> int:
        return len(self.values)

    def raw(self, pooling: str = "gap") -> np.ndarray:
        """(N, c) float32, not normalised."""
        if pooling not in POOLINGS:
            raise UserError(f"Pooling {pooling!r} is unknown; choose one of {', '.join(POOLINGS)}.")
        return self.values[:, POOLINGS.index(pooling)]

    def z0(self, pooling: str = "gap") -> np.ndarray:
        """(N, c) float32: the per-image z-score of every layer."""
        return layer_zscore(self.raw(pooling), self.channels)

    def take(self, rows: np.ndarray) -> "Features":
        """The features of the image set's given rows, of which none may have been skipped."""
        at = np.searchsorted(self.rows, rows)
        return Features(
            self.values[at],
            np.arange(len(rows)),
            [self.ids[i] for i in at],
            [self.labels[i] for i in at],
            self.channels,
            self.key,
            self.images_per_second,
            self.device,
        )


def layer_slices(channels: Sequence[int]) -> list[slice]:
    """Where each layer lies among the c columns."""
    ends = np.cumsum(channels)
    return [slice(int(end - width), int(end)) for end, width in zip(ends, channels, strict=True)]


def layer_zscore(raw: np.ndarray, channels: Sequence[int]) -> np.ndarray:
    """(f - mean) / (std + 1e-5) for every image and layer, with the unbiased std.

    So every layer has mean 0 and the squared norm of z0 is about sum(n_m - 1), 715 for
    EfficientNet-B4. Raises `UserError` on NaN or infinite values and on another width.
    """
    if raw.shape[1] != sum(channels):
        raise UserError(
            f"The features have {raw.shape[1]} columns; layers {tuple(channels)} need {sum(channels)}."
        )
    check_finite(raw)
    z0 = np.empty(raw.shape, dtype=np.float32)
    for layer in layer_slices(channels):
        f = np.asarray(raw[:, layer], dtype=np.float32)
        z0[:, layer] = (f - f.mean(1, keepdims=True)) / (f.std(1, ddof=1, keepdims=True) + DELTA)
    return z0


def check_finite(features: np.ndarray) -> None:
    """Refuse (N, c) features that hold NaN or infinite values, with a count of the images."""
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        bad = len(features) - int(finite.sum())
        raise UserError(f"{bad} of {len(features)} images have NaN or infinite features; leave them out.")


def pick_device(device: str | None = None) -> str:
    """The device asked for, else CUDA where there is one, else the CPU."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def extract(
    images: ImageSet,
    encoder: Encoder,
    *,
    protocol: str = "native",
    id_size: tuple[int, int] | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    on_error: str = "raise",
    progress: bool = True,
) -> Features:
    """Features of an image set: out of the cache, or extracted into it, resuming what was begun.

    A subset takes its rows from the whole set where that has been extracted already. With
    ``on_error="skip"`` unreadable images are left out and named.
    """
    if on_error not in ON_ERROR:
        raise UserError(f"on_error={on_error!r} is unknown; choose one of {', '.join(ON_ERROR)}.")
    chain = resize_chain(protocol, size=images.size, id_size=id_size)
    weights_sha256 = encoder.weights_sha256()
    device = pick_device(device)
    if images.whole is not None:
        whole = _key(images.whole, encoder, weights_sha256, chain)
        if _is_kept(whole, images.whole, encoder, device):
            features = load(whole, images.whole)
            if np.isin(images.rows, features.rows).all():
                return features.take(images.rows)
    key = _key(images, encoder, weights_sha256, chain)
    if not _is_kept(key, images, encoder, device):
        batch_size = batch_size or (256 if device == "cuda" else 32)
        _extract_to(key, images, encoder, batch_size, device, on_error, progress)
    features = load(key, images)
    skipped = [images.ids[i] for i in np.setdiff1d(np.arange(len(images)), features.rows)]
    if skipped:
        what = (
            f"{len(skipped)} of the {len(images)} images of {images.name} cannot be read: "
            f"{', '.join(skipped[:5])}{' ...' if len(skipped) > 5 else ''}"
        )
        if on_error == "raise":
            raise UserError(f"{what}. Mend them, or pass on_error='skip' (--skip-unreadable).")
        tqdm.write(f"{what}; they are left out.")
    return features


def _is_kept(key: Key, images: ImageSet, encoder: Encoder, device: str) -> bool:
    """Whether the cache holds these features as this code would make them; if not, it is emptied."""
    file = key.folder() / "features.json"
    try:
        if not file.is_file():
            return False
        if json.loads(file.read_text()).get("code") == code_hash(*CODE):
            return True
    except DAMAGE:
        return True  # `load` says what is wrong
    if _spot_check(key, images, encoder, device):
        return True
    tqdm.write(f"The code gives other features of {images.name} than before; they are extracted again.")
    shutil.rmtree(key.folder())
    return False


def _spot_check(key: Key, images: ImageSet, encoder: Encoder, device: str) -> bool:
    """Whether this code gives the kept features for the first images; then they are its own."""
    features = load(key, images)
    rows = [int(row) for row in features.rows[:SPOT_CHECK]]
    model = encoder.build().to(device)
    with tqdm(disable=True) as bar:
        again = _run(model, _Pixels(images, key.chain), rows, SPOT_CHECK, device, "raise", bar)["values"]
    same = again.shape == features.values[: len(rows)].shape and np.allclose(
        again, features.values[: len(rows)], rtol=1e-2, atol=1e-3
    )
    if same:
        file = key.folder() / "features.json"
        about = json.loads(file.read_text()) | {"code": code_hash(*CODE)}
        replace_file(file, lambda path: path.write_text(json.dumps(about, indent=1)))
    return same


def load(key: Key, images: ImageSet) -> Features:
    """Memory-map what `extract` wrote; a file that was cut short is refused."""
    folder = key.folder()
    try:
        about = json.loads((folder / "features.json").read_text())
        values = np.load(folder / "features.npy", mmap_mode="r")
        rows = np.load(folder / "rows.npy")
        if values.shape != (len(rows), len(POOLINGS), sum(about["channels"])):
            raise ValueError("the shapes disagree")
    except DAMAGE as error:
        raise UserError(
            f"The cached features of {images.name} in {folder} are cut short or damaged ({error}). "
            "Delete that folder to extract them again."
        ) from error
    return Features(
        values,
        rows,
        [images.ids[i] for i in rows],
        [images.labels[i] for i in rows],
        tuple(about["channels"]),
        key,
        about["images_per_second"],
        about["device"],
    )


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write(temporary)`` fill a file beside ``path`` and move it into place.

    Where that fails, what stood there before is untouched.
    """
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} could not be written ({error}). Free some space on that disk or choose another "
            "folder (DLSR_CACHE for features and networks); all that was finished before is kept."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@cache
def code_hash(*parts: str) -> str:
    """12 digits of a hash of the package's code, less comments, docstrings and empty lines.

    A part is a file (``"features"``) or one function or class of it (``"datasets.resize"``).
    """
    digest = hashlib.sha256()
    for part in parts:
        module, _, name = part.partition(".")
        source = Path(__file__).with_name(f"{module}.py").read_text("utf-8")
        tree = ast.parse(source)
        lines = _without_comments(source, tree)
        chosen = lines
        if name:
            (node,) = (n for n in tree.body if getattr(n, "name", None) == name)
            first = min(n.lineno for n in (node, *node.decorator_list))
            chosen = lines[first - 1 : node.end_lineno]
        digest.update("\n".join(line for line in chosen if line).encode())
    return digest.hexdigest()[:12]


def _without_comments(source: str, tree: ast.Module) -> list[str]:
    """The file's lines; those of docstrings are empty."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            first = node.body[0]
            lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return [line.rstrip() for line in lines]


def keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks: each layer's output would be paged in anew.

    Twice the images/s with EfficientNet-Lite0 on two cores (``benchmarks/speed.csv``); on systems
    other than Linux it does nothing.
    """
    if sys.platform == "linux":
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
        mallopt(m_trim_threshold, 1 << 30)
        mallopt(m_mmap_threshold, 1 << 30)


def _key(images: ImageSet, encoder: Encoder, weights_sha256: str, chain) -> Key:
    return Key(encoder.tag, encoder.layers, weights_sha256, images.sha256, chain)


class _Pixels(TorchDataset):
    """(row, pixels of uint8) of each image; where it cannot be read, what is wrong with it.

    The text and not the error, since a worker process would wrap that in its own traceback.
    """

    def __init__(self, images: ImageSet, chain: Sequence[tuple[int, int]]) -> None:
        self.images, self.chain = images, chain

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[int, np.ndarray | str]:
        try:
            return i, np.array(resize(self.images.image(i), self.chain))
        except UserError as error:
            return i, str(error)


def _extract_to(key, images, encoder, batch_size, device, on_error, progress) -> None:
    """Parts of `PART` images, each written whole; then one file, and ``features.json`` last."""
    keep_freed_memory()
    parts = key.folder() / "parts"
    model = encoder.build().to(device)
    pixels = _Pixels(images, key.chain)
    with tqdm(total=len(images), unit="image", desc=images.name, disable=not progress) as bar:
        for start in range(0, len(images), PART):
            rows = range(start, min(start + PART, len(images)))
            file = parts / f"{start:08d}.npz"
            if _is_whole(file):
                bar.update(len(rows))
                continue
            part = _run(model, pixels, rows, batch_size, device, on_error, bar)
            replace_file(file, lambda path, part=part: _save_part(path, part))
    files = sorted(parts.glob("[0-9]*.npz"))
    if not any(len(np.load(file)["rows"]) for file in files):
        shutil.rmtree(key.folder())
        raise UserError(f"None of the {len(images)} images of {images.name} can be read.")
    _join(key, files, model.channels, device)


def _run(model, pixels, rows, batch_size, device, on_error, bar) -> dict[str, np.ndarray]:
    """One part: which rows could be read, their values, and how many seconds it took."""
    # On a CPU the encoder needs all cores; other ways to start a process cannot take the images along.
    parallel = device == "cuda" and "fork" in torch.multiprocessing.get_all_start_methods()
    loader = DataLoader(
        torch.utils.data.Subset(pixels, rows),
        batch_size=batch_size,
        num_workers=min(16, os.cpu_count() or 1) if parallel else 0,
        multiprocessing_context="fork" if parallel else None,
        collate_fn=lambda batch: batch,
    )
    began = time.perf_counter()
    kept, values = [], [np.empty((0, len(POOLINGS), sum(model.channels)), np.float32)]
    for batch in loader:
        wrong = [found for _, found in batch if isinstance(found, str)]
        if wrong and on_error == "raise":
            raise UserError(wrong[0])
        readable = [(i, found) for i, found in batch if not isinstance(found, str)]
        if readable:
            numbers, arrays = zip(*readable, strict=True)
            values.append(model(torch.from_numpy(np.stack(arrays)).to(device)).cpu().numpy())
            kept += numbers
        bar.update(len(batch))
    seconds = np.float64(time.perf_counter() - began)
    return {"rows": np.array(kept, np.int64), "values": np.concatenate(values), "seconds": seconds}


def _save_part(path: Path, part: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **part)


def _is_whole(file: Path) -> bool:
    try:
        with np.load(file) as part:
            return len(part["rows"]) == len(part["values"]) and part["seconds"] >= 0
    except DAMAGE:
        return False


def _join(key: Key, parts: list[Path], channels: tuple[int, ...], device: str) -> None:
    folder = key.folder()
    rows = np.concatenate([np.load(part)["rows"] for part in parts])
    seconds = sum(float(np.load(part)["seconds"]) for part in parts)

    def write_values(path: Path) -> None:
        shape = (len(rows), len(POOLINGS), sum(channels))
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.load(part)["values"].astype("<f4").tobytes())

    def write_rows(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, rows)

    about = {
        "channels": channels,
        "images_per_second": len(rows) / seconds,
        "device": device,
        "key": asdict(key),
        "code": code_hash(*CODE),
    }
    replace_file(folder / "features.npy", write_values)
    replace_file(folder / "rows.npy", write_rows)
    replace_file(folder / "features.json", lambda path: path.write_text(json.dumps(about, indent=1)))
    shutil.rmtree(folder / "parts")
