"""How fast training is on this machine with features from the cache; writes ``speed.csv``.

    python benchmarks/speed.py

An epoch's seconds are scaled up from a shorter one. Without the cache every epoch would have to
extract the features anew, as the released code does, so the extraction's time is added to it.
"""

import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import dlsr
from dlsr.features import pick_device

IMAGES = 50_000  # of CIFAR-10
ENCODER = "efficientnet_lite0"


def extraction_seconds(batches: int = 8) -> float:
    """Return the seconds in which the encoder takes all images, from a few batches of 32."""
    device = pick_device()
    model = dlsr.create_encoder(ENCODER).to(device)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 224, 224, 3), dtype=np.uint8)
    batch = torch.from_numpy(pixels).to(device)
    model(batch).cpu()
    began = time.perf_counter()
    for _ in range(batches):
        model(batch).cpu()
    return (time.perf_counter() - began) / (32 * batches) * IMAGES


def epoch_seconds(width: int, blocks: int, *, vectors: int = 2560, features: int = 720) -> float:
    """Return the seconds of an epoch on all vectors, from a shorter one that is not cached."""
    z0 = np.random.default_rng(0).standard_normal((vectors, features)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DLSR_CACHE"] = folder
        networks = dlsr.train(z0, width=width, blocks=blocks, epochs=1, progress=False)
    return networks.seconds / vectors * IMAGES


def main() -> None:
    """Measure, print and write the table."""
    extraction, rows = extraction_seconds(), []
    for width, blocks in ((720, 8), (1440, 16)):
        epoch = epoch_seconds(width, blocks)
        where = f"{blocks}x{width} on {ENCODER}, {IMAGES:,} images"
        values = (extraction + epoch, epoch, (extraction + epoch) / epoch)
        rows.append(("an epoch, features cached instead of extracted anew", where, "s", *values))
    table = pd.DataFrame(rows, columns=["what", "where", "unit", "before", "after", "ratio"])
    table["device"] = f"{pick_device()}, {torch.get_num_threads()} threads"
    table["torch"], table["python"] = torch.__version__, platform.python_version()
    file = Path(__file__).with_name("speed.csv")
    table.to_csv(file, index=False, float_format="%.2f", lineterminator="\n")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
