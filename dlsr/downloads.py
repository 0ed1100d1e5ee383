"""Downloads of published image sets: torchvision's own, and archives with a checksum."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torchvision
from torch.utils.data import ConcatDataset
from torchvision.datasets.utils import download_and_extract_archive

from dlsr.cache import cache_folder, locked


def torchvision_set(name: str, kind: str, calls: Sequence[dict]) -> ConcatDataset:
    """Return a torchvision set, downloaded into the cache if it is not there.

    ``kind`` is the class in `torchvision.datasets`, ``calls`` are the options of each of the
    parts that make up the set. torchvision checks its own checksums, and raises many errors.
    """
    mark = cache_folder() / "torchvision" / f"{name}.complete"  # an empty file
    with locked(mark):
        build, there = getattr(torchvision.datasets, kind), mark.is_file()
        parts = [build(mark.parent, **options, download=not there) for options in calls]
        mark.touch()  # once complete, the server is not asked again
    return ConcatDataset(parts)


def unpacked_archive(data: Path, url: str, md5: str) -> Path:
    """Return the folder in the cache with what an archive holds; it is unpacked once.

    The archive is in ``downloads`` in the folder ``data``, or else downloaded. Its md5 pins what it
    holds; empty files are left out. torchvision raises many errors, also for a wrong checksum.
    """
    name, target = Path(url.split("?")[0]).name, cache_folder() / "data" / md5
    with locked(target):
        if not target.is_dir():
            given, draft = data / "downloads", target.with_suffix(".partial")
            shutil.rmtree(draft, ignore_errors=True)
            place = given if (given / name).is_file() else cache_folder() / "downloads"
            download_and_extract_archive(url, place, draft, name, md5)
            for file in draft.rglob("*"):  # notMNIST has two empty files
                if file.is_file() and not file.stat().st_size:
                    file.unlink()
            draft.rename(target)
    return target
