"""Downloads of published image sets: torchvision's own, and archives with a checksum."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torchvision
from torch.utils.data import ConcatDataset
from torchvision.datasets.utils import check_md5, download_url

from dlsr.cache import cache_folder, locked
from dlsr.errors import UserError


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

    The archive is in ``downloads`` in the folder ``data``, or else downloaded. Links, devices and
    paths that lead outside are refused, and empty files left out. Raises `UserError` for a wrong
    checksum or a damaged archive, and `OSError` or `RuntimeError` where the download fails.
    """
    name, target = Path(url.split("?")[0]).name, cache_folder() / "data" / md5
    with locked(target):
        if target.is_dir():
            return target
        archive = data / "downloads" / name
        if not archive.is_file():
            archive = cache_folder() / "downloads" / name
            download_url(url, archive.parent, name, md5)
        if not check_md5(archive, md5):
            raise UserError(f"{archive} has not the md5 {md5}; get it again from {url}.")
        draft = target.with_suffix(".partial")
        shutil.rmtree(draft, ignore_errors=True)
        try:  # "data" refuses links, devices and paths that lead outside; ZIP files need no filter
            options = {} if name.endswith(".zip") else {"filter": "data"}
            shutil.unpack_archive(archive, draft, **options)
        except Exception as error:  # the unpackers raise almost anything
            raise UserError(f"{archive} was not unpacked ({error}); download it again.") from error
        for file in draft.rglob("*"):  # notMNIST has two empty files
            if file.is_file() and not file.stat().st_size:
                file.unlink()
        draft.rename(target)
    return target
