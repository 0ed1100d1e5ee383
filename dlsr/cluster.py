"""More images than one machine takes, on Ray Data, with the bits that `dlsr.extract` gives.

On a CPU, batches below 16 images are rounded otherwise. A worker fills every batch to one size, so
an image's numbers depend on no other image, on no worker and on no number of threads.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from dlsr import cache, data, encoders, features
from dlsr.detector import DLSRDetector
from dlsr.errors import UserError


def score_images(source, detector: str | Path, **options):
    """Return a lazy Ray dataset of ``path``, ``score``, ``verdict`` and ``reason``, in any order.

    ``source`` is a folder of images or of Parquet with ``image``, a struct of bytes and path; such
    a file or address; or a Ray dataset with ``image``, or with ``path`` and ``bytes``. An image
    that cannot be read is ``unreadable`` and has a reason. ``workers`` are a number or, where the
    cluster may grow, (least, most); each has ``gpus`` GPUs and an encoder, ``create(name)``.
    """
    loaded = DLSRDetector.load(detector, device="cpu")  # there it computes on GPU workers as well
    if not {"encoder", "weights_sha256"} <= set(loaded.about_):
        raise UserError(f"{detector} does not say its encoder; fit it by `dlsr fit`.")
    return extract_images(source, loaded.about_["encoder"], detector=loaded, **options)


def score_to_file(source, detector: str | Path, target: str | Path, **options) -> Counter:
    """Write `score_images` into a CSV file, block by block; return how many have each verdict."""
    scores, counts = score_images(source, detector, **options), Counter()

    def write(file: Path) -> None:
        for block in scores.iter_batches(batch_size=None, batch_format="pandas"):
            block.to_csv(file, mode="a", header=not counts, index=False)
            counts.update(block["verdict"])

    cache.replace_file(Path(target), write)
    return counts


def extract_images(source, name, *, workers=1, gpus=0, batch_size=32, create=None, detector=None):
    """Return a lazy Ray dataset of ``path``, ``reason`` and ``z0`` of the encoder ``name``."""
    try:
        import ray.data
    except ImportError as error:
        raise UserError("A cluster needs Ray; install it with: pip install 'dlsr[ray]'") from error
    folder = None if isinstance(source, ray.data.Dataset) else Path(source)
    if folder and folder.is_dir() and not any(folder.glob("*.parquet")):
        source = ray.data.from_items([{"path": str(p)} for p in data.from_folder(folder).source])
    elif folder:
        source = ray.data.read_parquet(str(source), num_cpus=0.25)
    cpus, shape = ray.cluster_resources().get("CPU", 1), (batch_size, *data.INPUT_SIZE, 3)
    least, most = workers if isinstance(workers, tuple) else (workers, workers)
    # Half of the CPUs are left to read, without which it hangs; Ray joins steps of equal num_cpus.
    options = {"num_cpus": 0.5 if least < most else min(0.5, 0.5 * cpus / most), "num_gpus": gpus}
    options["compute"] = ray.data.ActorPoolStrategy(min_size=least, max_size=most)
    made = (name, create or encoders.create_encoder, detector, shape, int(cpus // most), gpus)
    pixels = source.map_batches(_pixels, batch_size=shape[0], batch_format="pyarrow", num_cpus=0.43)
    pixels.context.target_max_block_size = 4 * int(np.prod(shape))  # 4 full batches
    return pixels.map_batches(_Worker, fn_constructor_args=made, batch_size=shape[0], **options)


def _pixels(rows: pa.Table) -> dict[str, np.ndarray]:
    cells, n = rows.flatten().to_pydict(), len(rows)
    paths = cells.get("path") or cells["image.path"]
    files = cells.get("bytes") or cells.get("image.bytes") or list(map(Path, paths))
    images = data.ImageSet("source", paths, paths, files)
    reasons, pixels = np.full(n, "", object), np.zeros((n, *data.INPUT_SIZE, 3), np.uint8)
    for i in range(n):
        try:
            pixels[i] = data.resize(images.image(i), [data.INPUT_SIZE])
        except UserError as error:
            reasons[i] = repr(error.__cause__)
    return {"path": np.array(paths, object), "pixels": pixels, "reason": reasons}


class _Worker:
    def __init__(self, name, create, detector, shape, threads, gpus) -> None:
        torch.set_num_threads(max(threads, 1))  # Ray's own number is that of a worker's num_cpus
        torch.backends.cudnn.allow_tf32 = False  # as in dlsr.extract
        self.detector, self.shape, self.device = detector, shape, "cuda" if gpus else "cpu"
        self.encoder = create(name).to(self.device)
        if detector and detector.about_["weights_sha256"] != self.encoder.weights_sha256:
            raise UserError(f"{name} has other weights than at the fit; use those, or fit again.")

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        n, bad = len(batch["path"]), batch["reason"] != ""
        pixels = torch.from_numpy(np.resize(batch["pixels"], self.shape)).to(self.device)
        z0 = features.layer_zscore(self.encoder(pixels).cpu().numpy()[:, 0], self.encoder.channels)
        row = {"path": batch["path"], "reason": pa.array(batch["reason"], pa.string(), mask=~bad)}
        if self.detector:
            score, limit = self.detector.ood_score(z0)[:n], self.detector.threshold_
            verdict = np.select([bad, score.astype(float) > limit], ["unreadable", "OOD"], "ID")
            return pa.table(row | {"score": pa.array(score, mask=bad), "verdict": verdict})
        return pa.table(row | {"z0": pa.array(list(z0[:n]), pa.list_(pa.float32()), mask=bad)})
