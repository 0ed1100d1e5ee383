"""The cache: where it lies, and how files in it are named, locked, written whole, hashed once."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock
from platformdirs import user_cache_dir
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dlsr.errors import UserError


def cache_folder() -> Path:
    """Return ``$DLSR_CACHE``, or the user's cache folder, which outlives any checkout."""
    return Path(os.environ.get("DLSR_CACHE") or user_cache_dir("dlsr", appauthor=False))


def as_json(content: object) -> str:
    """Return JSON with sorted keys, with numpy's numbers as numbers."""
    return json.dumps(content, indent=1, sort_keys=True, default=lambda number: number.item())


def key(**settings: object) -> str:
    """Return 20 hexadecimal digits that tell these settings from any others."""
    return hashlib.sha256(as_json(settings).encode()).hexdigest()[:20]


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write(temporary)`` fill a file beside ``path``, then move it into place.

    Raises `UserError` if that fails; what stood at ``path`` before is then untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".", dir=path.parent) as aside:
            write(Path(aside) / path.name)
            (Path(aside) / path.name).replace(path)
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error}); make room or give permission there, or choose "
            "another place (DLSR_CACHE names the folder of features and networks)."
        ) from error


def locked(path: Path):
    """Return a context that holds a lock beside ``path``: one process writes, others wait."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{path}.lock").acquire()
    except OSError as error:
        told = f"{path.parent} cannot be written to ({error})"
        raise UserError(f"{told}; set DLSR_CACHE to another folder.") from error


def kept_hash(files: list[Path], make: Callable[[], str]) -> str:
    """Return ``make()``, a hash of what files hold, kept until a size or time changes."""
    stats = [(str(file.resolve()), os.access(file, os.R_OK), file.stat()) for file in files]
    about = [[*parts, stat.st_size, stat.st_mtime_ns] for *parts, stat in stats]
    kept = cache_folder() / "hashes" / f"{key(files=about)}.txt"
    if not kept.is_file():
        replace_file(kept, lambda temporary: temporary.write_text(make()))
    return kept.read_text()


def array_sha256(array) -> str:
    """Return the sha256 of an array's numbers, shape and type."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(array.ravel())  # no copy of an array that lies in one piece
    return digest.hexdigest()


def write_tensors(file: Path, tensors: dict, about: dict) -> None:
    """Write named tensors, and what ``about`` says of them, into one safetensors file."""
    arrays = {name: tensor.numpy(force=True) for name, tensor in tensors.items()}
    replace_file(file, lambda path: path.write_bytes(save(arrays, {"dlsr": as_json(about)})))


def read_tensors(file: Path) -> tuple[dict, dict]:
    """Return what `write_tensors` wrote: ``about`` and the tensors by their names."""
    try:
        if not file.is_file():  # reading a pipe would wait for ever
            raise OSError("it is no plain file")
        with safe_open(file, "pt") as content:
            names, about = content.keys(), dict(json.loads(content.metadata()["dlsr"]))
            return about, {name: content.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged or not dlsr's ({error}); make it again.") from error
