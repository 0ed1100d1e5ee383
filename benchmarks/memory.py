"""How time and memory grow with the number of images; writes ``memory.csv``.

    python benchmarks/memory.py [--quick]

``extract`` reads a Parquet file of small images and encodes them with EfficientNet-Lite0 in
bfloat16. ``train and score`` trains a small LFDN for an epoch on synthetic vectors, fits a
Gaussian, and scores all vectors by both. Each runs in a process of its own, whose largest resident
memory is noted; the features themselves, which lie on disk and are mapped, are subtracted. It
takes about ten minutes.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

import dlsr  # first: it sets how threads wait before PyTorch is loaded

C = 720  # numbers of a feature vector


def write_pack(file: Path, n: int) -> None:
    """Write n different images of 8x8 pixels into a Parquet file, 1,000 in a row group."""
    shape = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", shape), ("label", pa.string())])
    draws = np.random.default_rng(0)
    with parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, n, 1000):
            rows = range(start, min(start + 1000, n))
            images = [{"bytes": png(draws), "path": f"{i}.png"} for i in rows]
            labels = [""] * len(rows)
            writer.write_table(pa.table({"image": images, "label": labels}, schema=schema))


def png(draws: np.random.Generator) -> bytes:
    """Return a PNG of noise."""
    file = io.BytesIO()
    Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def extract(folder: Path, n: int) -> int:
    """Extract n images; return the bytes of the features."""
    from dlsr.data import from_parquet

    images = from_parquet(folder / f"{n}.parquet", name=f"{n} images")
    encoder = dlsr.create_encoder("efficientnet_lite0")
    return dlsr.extract(images, encoder, precision="bf16", progress=False).values.nbytes


def train_and_score(folder: Path, n: int) -> int:
    """Train on n vectors and score them; return the bytes of the vectors."""
    z0 = np.load(folder / f"{n}.npy", mmap_mode="r")
    networks = dlsr.train(z0, width=64, blocks=1, epochs=1, progress=False)
    gaussian, noise = dlsr.fit_gaussian(z0[:50_000]), dlsr.fixed_noise(4, C)
    for start in range(0, n, 10_000):
        part = z0[start : start + 10_000]
        back = dlsr.reconstruct(networks.last, part, t=3, noise=noise)
        dlsr.mfsim(part, back, (24, 32, 56, 160, 448)), gaussian(part)
    return z0.nbytes


PARTS = {"extract": extract, "train and score": train_and_score}


def measured(part: str, n: int, folder: Path) -> dict:
    """Run a part in a process of its own and return what it took."""
    environment = os.environ | {"DLSR_CACHE": str(folder / "cache")}
    command = [sys.executable, __file__, "--part", part, "--n", str(n), "--folder", str(folder)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    row = json.loads(ran.stdout.splitlines()[-1])
    print(f"{part:16} {n:>9,} {row['seconds']:8.1f} s {row['gib']:6.2f} GiB", flush=True)
    return {"part": part, "images": n} | row


def one(part: str, n: int, folder: Path) -> None:
    """Run one part and print its seconds and its peak memory beside the features."""
    began = time.perf_counter()
    features = PARTS[part](folder, n)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1024 if sys.platform == "linux" else 1
    print(json.dumps({"seconds": seconds, "gib": peak / 2**30, "features_gib": features / 2**30}))


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers only, to try it out")
    for name in ("part", "n", "folder"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return one(options.part, int(options.n), Path(options.folder))
    sizes = {
        "extract": [1_000, 10_000, 60_000],
        "train and score": [1_000, 10_000, 60_000, 1_000_000],
    }
    if options.quick:
        sizes = {part: [300, 1_000] for part in sizes}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, n in ((part, n) for part, ns in sizes.items() for n in ns):
            if part == "extract":
                write_pack(folder / f"{n}.parquet", n)
            else:
                z0 = np.lib.format.open_memmap(folder / f"{n}.npy", "w+", np.float32, (n, C))
                for start in range(0, n, 10_000):
                    part_of = np.random.default_rng(start)
                    z0[start : start + 10_000] = part_of.standard_normal(
                        (len(z0[start : start + 10_000]), C)
                    )
                del z0
            rows.append(measured(part, n, folder))
    if not options.quick:
        table = pd.DataFrame(rows)
        file = Path(__file__).with_suffix(".csv")
        table.to_csv(file, index=False, float_format="%.4g", lineterminator="\n")


if __name__ == "__main__":
    main()
