"""Prove `dlsr.cluster` at full size on this machine; writes ``prove_cluster.log`` beside it.

    python benchmarks/prove_cluster.py

It needs ``pip install 'dlsr[ray]'`` and CIFAR-10 in ``$DLSR_DATA``, and takes about ten minutes.
Each part runs in a process and a Ray of its own. A part that fails ends it with an error.
"""

import io
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet

import dlsr
from dlsr import cluster
from dlsr.backends import BATCH
from dlsr.data import ParquetImages, data_folder, from_parquet, resize

LOG, ROOT = Path(__file__).with_suffix(".log"), Path(__file__).resolve().parents[1]
ENCODER, CPUS, STORE = "efficientnet_lite0", 2, 400 << 20
TINY = {"encoder": "tiny", "weights_sha256": "a" * 64}


class Tiny:
    """A fixed linear map of 27 pixels in place of an encoder; it notes its batches in a folder."""

    def __init__(self, name: str, notes: Path | None = None) -> None:
        self.channels, self.weights_sha256, self.name, self.about = (8, 8), "a" * 64, name, {}
        draws = torch.Generator().manual_seed(1)
        self.map = torch.randn((2, 27, 16), generator=draws, dtype=torch.float64)
        self.note, self.batches = notes and notes / str(os.getpid()), 0

    def to(self, device: str) -> "Tiny":
        return self

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.batches += 1
        if self.note:
            self.note.write_text(str(self.batches))
        x = pixels[:, 37::75, 37::75].reshape(len(pixels), 27).double() / 255
        return torch.einsum("np,kpc->nkc", x, self.map).float()


def say(text: str) -> None:
    """Print a line and append it to the log."""
    print(text, flush=True)
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"{text}\n")


def start_ray():
    """Start Ray with two CPUs; its processes find the package of this checkout."""
    import ray

    os.environ["PYTHONPATH"] = str(ROOT)
    options = {"include_dashboard": False, "logging_level": "error", "log_to_driver": False}
    ray.init("local", num_cpus=CPUS, object_store_memory=STORE, **options)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def write_pack(file: Path, images: list[bytes]) -> Path:
    """Write encoded images as Parquet, in row groups of 500."""
    cells = [{"bytes": content, "path": f"{i:06d}"} for i, content in enumerate(images)]
    table = pa.table({"image": cells, "label": [""] * len(cells)})
    parquet.write_table(table, file, row_group_size=500)
    return file


def tiny_pack(file: Path, n: int) -> Path:
    """Write n images of 8x8 pixels of noise, of which every 5,000th is corrupt."""
    images = []
    for i, pixels in enumerate(np.random.RandomState(0).randint(0, 256, (n, 8, 8, 3), "u1")):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "BMP")
        images.append(b"no image" if i % 5000 == 4999 else buffer.getvalue())
    return write_pack(file, images)


def one_process(file: Path, encoder, about: dict) -> tuple[Path, pd.DataFrame, float]:
    """Return a detector's file, the scores by `dlsr.extract` in this process, and its images/s."""
    images, start = from_parquet(file, name="pack"), time.perf_counter()
    features = dlsr.extract(images, encoder, on_error="skip", progress=False)
    rate = len(images) / (time.perf_counter() - start)
    detector = dlsr.DLSRDetector(features.channels).fit(features.z0()[::2])
    detector.save(file.with_suffix(".detector"), about=about)
    scores = detector.ood_score(features.z0())
    verdicts = np.where(detector.predict(features.z0()) == -1, "OOD", "ID")
    truth = pd.DataFrame({"score": scores, "verdict": verdicts}, list(features.images.ids))
    return file.with_suffix(".detector"), truth, rate


def check(rows: pd.DataFrame, truth: pd.DataFrame, n: int) -> str:
    """Return a report, after it is sure that n rows are there, and equal to those of the truth."""
    rows = rows.assign(path=rows["path"].astype(str).str.zfill(6)).set_index("path").sort_index()
    assert len(rows) == n, f"{len(rows)} rows of {n}"
    assert rows.index.is_unique
    readable = rows[rows["verdict"] != "unreadable"]
    assert list(readable.index) == list(truth.index)
    np.testing.assert_array_equal(readable["score"].to_numpy(np.float32), truth["score"])
    assert readable["verdict"].tolist() == truth["verdict"].tolist()
    lost = rows[rows["verdict"] == "unreadable"]
    assert lost["reason"].notna().all()
    assert lost["score"].isna().all()
    return f"{n:,} rows, each image once, {len(lost)} with a reason; all scores are bit-equal"


def part_shapes(folder: Path) -> None:
    """Count the images whose features change with the batch's size and the number of threads."""
    images = ParquetImages(data_folder() / "cifar10/test.parquet")
    pictures = [Image.open(io.BytesIO(images[i])).convert("RGB") for i in range(32)]
    pixels = torch.from_numpy(np.stack([resize(image, [(224, 224)]) for image in pictures]))
    encoder, lines, first = dlsr.create_encoder(ENCODER), [], None
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for size in (32, 16, 8, 1):
            found = torch.cat([encoder(batch) for batch in pixels.split(size)])
            first = found if first is None else first
            other = int((found != first).any(dim=(1, 2)).sum())
            lines.append(f"{threads} threads, batches of {size}: {other}")
    say("of 32 images, other bits than with 2 threads in a batch of 32: " + "; ".join(lines))


def part_real(folder: Path) -> None:
    """Score 2,000 images of CIFAR-10 with the real encoder: one process, 2 and 3 workers."""
    images = ParquetImages(data_folder() / "cifar10/test.parquet")
    file = write_pack(folder / "pack.parquet", [images[i] for i in range(2000)])
    encoder = dlsr.create_encoder(ENCODER)
    about = {"encoder": ENCODER, "weights_sha256": encoder.weights_sha256}
    detector, truth, rate = one_process(file, encoder, about)
    threads = torch.get_num_threads()
    say(
        f"one process, {threads} threads, {ENCODER}, batches of {BATCH['cpu']}: {rate:.1f} images/s"
    )
    start_ray()
    for workers in (2, 3):
        start, first, blocks = time.perf_counter(), None, []
        scores = cluster.score_images(file, detector, workers=workers)
        for block in scores.iter_batches(batch_size=None, batch_format="pandas"):
            first = first or (time.perf_counter(), len(block))
            blocks.append(block)
        seconds, after = time.perf_counter() - start, time.perf_counter() - first[0]
        report = check(pd.concat(blocks), truth, 2000)
        steady = (2000 - first[1]) / after
        say(
            f"{workers} workers on {CPUS} CPUs: {2000 / seconds:.1f} images/s with the start of "
            f"{seconds - after:.0f} s, {steady:.1f} images/s after the first block; {report}"
        )


def part_killed(folder: Path) -> None:
    """Kill a worker in the middle of 20,000 images."""
    n, notes = 20_000, folder / "notes"
    notes.mkdir()
    detector, truth, _ = one_process(tiny_pack(folder / "pack.parquet", n), Tiny("tiny"), TINY)
    start_ray()
    killed = []

    def kill() -> None:
        while not killed:
            time.sleep(0.05)
            batches = {int(note.name): int(note.read_text() or 0) for note in notes.iterdir()}
            if sum(batches.values()) > n / 16 / 2:
                pid = max(batches, key=batches.get)
                os.kill(pid, signal.SIGKILL)
                killed.append((pid, sum(batches.values())))

    threading.Thread(target=kill, daemon=True).start()
    start, target = time.perf_counter(), folder / "scores.csv"
    options = {"workers": 2, "create": lambda name: Tiny(name, notes)}
    counts = to_file(folder / "pack.parquet", detector, target, **options)
    seconds = time.perf_counter() - start
    (pid, batches), workers = killed[0], len(list(notes.iterdir()))
    report = check(pd.read_csv(target, dtype={"score": np.float32}), truth, n)
    say(
        f"worker {pid} was killed with -9 after {batches} of {n // 16} batches; {seconds:.0f} s in "
        f"all, {workers} workers in the end; {report}; {dict(counts)}"
    )


def to_file(source: Path, detector: Path, target: Path, **options) -> Counter:
    """Write the scores into a CSV file block by block; return how many have each verdict."""
    counts = Counter()
    scores = cluster.score_images(source, detector, **options)
    for block in scores.iter_batches(batch_size=None, batch_format="pandas"):
        block.to_csv(target, mode="a", header=not counts, index=False)
        counts.update(block["verdict"])
    return counts


def part_memory(folder: Path, n: int) -> None:
    """Report the driver's peak memory over n images."""
    command = [sys.executable, __file__, "prepare", str(folder), str(n)]
    subprocess.run(command, check=True)
    start_ray()
    before, start = resident("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    files = [folder / name for name in ("pack.parquet", "few.detector", "scores.csv")]
    counts = to_file(*files, workers=2, create=Tiny)
    peak, seconds = resident("VmHWM"), time.perf_counter() - start
    assert sum(counts.values()) == n
    say(f"{n:>6,} images: {peak} MB at the peak, {before} MB before; {seconds:.0f} s")


def part_prepare(folder: Path, n: int) -> None:
    """Write a pack of n images, and a detector that is fitted on 500."""
    tiny_pack(folder / "pack.parquet", n)
    one_process(tiny_pack(folder / "few.parquet", 500), Tiny("tiny"), TINY)


def resident(name: str) -> int:
    """Return a number of this process' memory in MB."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) >> 10


PARTS = (
    ("A convolution's bits and the batch's shape", ["shapes"]),
    ("The real encoder on CIFAR-10, 2,000 images", ["real"]),
    ("20,000 images of 8x8 pixels, a small linear map in place of the encoder", ["killed"]),
    ("The driver's memory, with the same map", ["memory", "1000"]),
    ("", ["memory", "10000"]),
    ("", ["memory", "50000"]),
)


def main() -> None:
    """Run all parts, each in a process of its own."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    model = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    LOG.write_text("", encoding="utf-8")
    say(f"{time.strftime('%Y-%m-%d %H:%M')}, commit {commit.stdout.strip()}")
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    name = model[0].split(":")[1].strip()
    gpu = "a GPU" if torch.cuda.is_available() else "no GPU"
    say(f"{os.cpu_count()} cores of {name}, {memory} GB, {gpu}; load before: {load}")
    packages = ("ray", "torch", "timm", "numpy", "pyarrow", "pillow")
    used = ", ".join(f"{package} {version(package)}" for package in packages)
    say(f"Python {platform.python_version()}, {used}")
    start = time.perf_counter()
    for title, part in PARTS:
        if title:
            say(f"\n{title}")
        subprocess.run(
            [sys.executable, __file__, *part],
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    say(f"\nAll parts passed in {time.perf_counter() - start:.0f} s; load after: {load}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["prepare"]:
        part_prepare(Path(sys.argv[2]), int(sys.argv[3]))
    elif len(sys.argv) > 1:
        with tempfile.TemporaryDirectory() as place:
            os.environ["DLSR_CACHE"] = place
            numbers = [int(number) for number in sys.argv[2:]]
            globals()[f"part_{sys.argv[1]}"](Path(place), *numbers)
    else:
        main()
