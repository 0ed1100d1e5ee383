"""More images than one machine takes, on Ray Data, with the bits that `dlsr.extract` gives.

On a CPU, batches below 16 images are rounded otherwise. A worker fills every batch to one size, so
an image's numbers depend on no other image, on no worker and on no number of threads.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from dlsr import backends, data, encoders, features
from dlsr.conformal import checked_rate
from dlsr.detector import DLSRDetector
from dlsr.errors import UserError


def score_images(source, detector: str | Path, *, flag_rate: float | None = None, **options):
    """Return a lazy Ray dataset of path, score, p_value, verdict and reason, in any order.

    ``source`` is a folder of images or of Parquet with ``image``, a struct of bytes and path; such
    a file or address; or a Ray dataset with ``image``, or with ``path`` and ``bytes``. An image
    that cannot be read is ``unreadable`` and has a reason; one with a p-value of at most
    ``flag_rate``, by default the detector's, is ``OOD``. Each of the ``workers`` has ``gpus`` GPUs
    and an encoder, ``create(name)``; an image may have ``max_pixels``, 0 means Pillow's limit.
    """
    loaded = DLSRDetector.load(detector, device="cpu")  # there it computes on GPU workers as well
    if flag_rate is not None:
        loaded.settings_["flag_rate"] = checked_rate(flag_rate, "flag_rate")
    return extract_images(source, loaded.encoder_name(), detector=loaded, **options)


def start_ray():
    """Return Ray on the cluster of ``$RAY_ADDRESS`` or, where there is none, on this machine."""
    try:
        import ray.data
    except ImportError as error:
        raise UserError("A cluster needs Ray; install it with: pip install 'dlsr[ray]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="error")
    return ray


def extract_images(
    source, name, *, workers=1, gpus=0, batch_size=16, create=None, detector=None, max_pixels=0
):
    """Return a lazy Ray dataset of ``path``, ``reason`` and ``z0`` of the encoder ``name``."""
    ray = start_ray()
    if not isinstance(source, ray.data.Dataset):
        folder = Path(source)
        if folder.is_dir() and not any(folder.glob("*.parquet")):
            paths = [{"path": str(path)} for path in data.from_folder(folder).source]
            source = ray.data.from_items(paths)
        else:
            source = ray.data.read_parquet(str(source), num_cpus=0.25)
    cpus = ray.cluster_resources().get("CPU", 1)
    if cpus < 2:  # listing Parquet files takes a whole one
        raise UserError("Ray has 1 CPU; it needs 2 to read beside a worker: give it more.")
    # Half of the CPUs are left to read, without which it hangs; Ray joins steps of equal num_cpus.
    options = {"num_cpus": min(0.5, 0.5 * cpus / workers), "num_gpus": gpus}
    options |= {"compute": ray.data.ActorPoolStrategy(size=workers), "batch_size": batch_size}
    made_of = (name, create or encoders.create_encoder, detector, batch_size)
    options["fn_constructor_args"] = (*made_of, int(cpus // workers), gpus)
    reading = {"batch_size": batch_size, "batch_format": "pyarrow", "num_cpus": 0.43}
    pixels = source.map_batches(_pixels, fn_kwargs={"max_pixels": max_pixels}, **reading)
    pixels.context.target_max_block_size = 4 * batch_size * 3 * int(np.prod(data.INPUT_SIZE))
    return pixels.map_batches(_Worker, **options)


def _pixels(rows: pa.Table, max_pixels: int = 0) -> dict[str, np.ndarray]:
    if max_pixels:  # this is another process
        data.Image.MAX_IMAGE_PIXELS = max_pixels / 2
    cells, n = rows.flatten().to_pydict(), len(rows)
    paths = cells.get("path") or cells["image.path"]
    files = cells.get("bytes") or cells.get("image.bytes") or list(map(Path, paths))
    images = data.ImageSet("source", paths, paths, files)
    reasons, pixels = np.full(n, "", object), np.zeros((n, *data.INPUT_SIZE, 3), np.uint8)
    for i in range(n):
        image, reasons[i] = images.attempt(i)
        if image:
            pixels[i] = data.resize(image, [data.INPUT_SIZE])
    return {"path": np.array(paths, object), "pixels": pixels, "reason": reasons}


class _Worker:
    def __init__(self, name, create, detector, size, threads, gpus) -> None:
        torch.set_num_threads(max(threads, 1))  # Ray's own number is that of a worker's num_cpus
        encoder, device = create(name), torch.device("cuda" if gpus else "cpu")
        if detector:
            detector.encoder_name(encoder.weights_sha256)
        options = {"precision": "float32", "device": device, "batch_size": size}
        self.run = backends.prepare(encoder, "torch", **options)
        self.detector, self.channels = detector, encoder.channels

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        bad = batch["reason"] != ""
        z0 = features.layer_zscore(self.run(batch["pixels"])[:, 0], self.channels)
        row = {"path": batch["path"], "reason": pa.array(batch["reason"], pa.string(), mask=~bad)}
        if self.detector:
            found = {"score": self.detector.ood_score(z0), "p_value": self.detector.p_values(z0)}
            out = found["p_value"] <= self.detector.threshold_
            found = {name: pa.array(values, mask=bad) for name, values in found.items()}
            found["verdict"] = np.select([bad, out], ["unreadable", "OOD"], "ID")
            return pa.table({"path": row["path"], **found, "reason": row["reason"]})
        return pa.table(row | {"z0": pa.array(list(z0), pa.list_(pa.float32()), mask=bad)})
