"""How fast each part is on this machine, as ratios within one run; writes ``speed.csv``.

    python benchmarks/speed.py [--quick]

What is compared takes turns in one process, and a ratio is of medians. Parts whose weights, data or
packages are not here are left out, and named at the end. It takes about ten minutes on two cores.
"""

import argparse
import copy
import io
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import plain
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import dlsr  # first: it sets how threads wait before PyTorch is loaded
from dlsr import backends, features, training
from dlsr.data import INPUT_SIZE, ImageSet, load_images, resize

CPU, CORES = torch.device("cpu"), torch.get_num_threads()
ENCODERS = {"B4*": "efficientnet_b4_without_last_block", "Lite0": "efficientnet_lite0"}
rows, left_out = [], []


def note(part: str, what: str, value: float, unit: str, *, ratio=np.nan, goal="", about="") -> None:
    """Keep a row of the table and print it."""
    rows.append((part, what, value, unit, ratio, goal, about))
    ratio = "" if np.isnan(ratio) else f"{ratio:6.2f}x"
    print(f"{part:12} {what:46} {value:10.4g} {unit:9} {ratio:8} {goal:10} {about}", flush=True)


def in_turns(
    ways: dict[str, Callable], rounds: int, before: Callable[[str], None] = lambda name: None
) -> dict[str, float]:
    """Return the median seconds of each way, which take turns; a first call is not counted.

    ``before(name)`` is called ahead of each turn and not counted.
    """
    seconds = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            before(name)
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def photographs(n: int) -> list[np.ndarray]:
    """Return images of 32x32 pixels: CIFAR-10's where it is here, else patches of photographs."""
    try:
        images = load_images("cifar10/test", n=n)
        return [np.asarray(images.image(i)) for i in range(n)]
    except dlsr.UserError:
        whole, draws = load_sample_images().images, np.random.RandomState(0)
        corners = [(draws.randint(380), draws.randint(600), i % 2) for i in range(n)]
        return [whole[i][y : y + 32, x : x + 32] for y, x, i in corners]


def as_input(images: list[np.ndarray]) -> np.ndarray:
    """Return images as the encoder gets them."""
    return np.stack([np.asarray(resize(Image.fromarray(image), [INPUT_SIZE])) for image in images])


def encoders(rounds: int) -> dict[str, dict[str, float]]:
    """Compare what runs the encoders; return images a second by encoder and way."""
    rates = {}
    for title, name in ENCODERS.items():
        try:
            encoder = dlsr.create_encoder(name)
        except dlsr.UserError as error:
            left_out.append(str(error))
            continue
        pixels = as_input(photographs(64 if title == "Lite0" else 32))
        rates[title] = of_encoder(title, encoder, pixels, rounds)
    return rates


def of_encoder(title: str, encoder, pixels: np.ndarray, rounds: int) -> dict[str, float]:
    """Compare plain PyTorch with each backend and precision on one encoder."""
    tensors, prepared = torch.from_numpy(pixels), {}
    nchw = copy.deepcopy(encoder.model).to(memory_format=torch.contiguous_format)
    about = (encoder.mean, encoder.std)
    references = {
        "plain": partial(plain.encode, encoder.model, *about),
        "as the released code": partial(plain.released, nchw, *about),
    }
    kinds = [("torch", "float32"), ("torch", "bf16"), ("openvino", "float32"), ("openvino", "bf16")]
    for backend, precision in kinds:
        options = {"precision": precision, "device": CPU, "batch_size": backends.BATCH["cpu"]}
        began = time.perf_counter()
        try:
            backends.check_precision(precision, CPU)
            prepared[backend, precision] = backends.prepare(encoder, backend, **options)
        except (backends.Unusable, dlsr.UserError) as error:
            left_out.append(f"{title}, {backend}, {precision}: {error}")
            continue
        if backend == "openvino":
            note("prepare", f"{title}, {backend}, {precision}", time.perf_counter() - began, "s")

    def by_reference(run: Callable) -> None:
        for batch in tensors.split(32):
            run(batch)

    def by_backend(run: Callable) -> list[np.ndarray]:
        size = backends.BATCH["cpu"]
        return [run(pixels[i : i + size]) for i in range(0, len(pixels), size)]

    ways = {name: partial(by_reference, run) for name, run in references.items()}
    ways |= {", ".join(kind): partial(by_backend, run) for kind, run in prepared.items()}
    exact = references["plain"](tensors).flatten(1)

    def settle(name: str) -> None:  # its memory is there before it is timed
        plain.keep_freed_blocks(name in references)
        ways[name]()

    seconds = in_turns(ways, rounds, settle)
    goals = {"B4*": (">= 1.25", ">= 1.3", ">= 2.2"), "Lite0": (">= 1.5", ">= 1.6", ">= 2.6")}[title]
    goals = dict(zip(("torch, float32", "openvino, float32", "openvino, bf16"), goals, strict=True))
    for name, spent in seconds.items():
        apart = ""
        if name not in references:
            found = torch.from_numpy(np.concatenate(ways[name]())).flatten(1)
            apart = f"differs by {((found - exact).norm(dim=1) / exact.norm(dim=1)).max():.1e}"
        ratio, rate = seconds["plain"] / spent, len(pixels) / spent
        note(
            "encoder",
            f"{title}, {name}",
            rate,
            "images/s",
            ratio=ratio,
            goal=goals.get(name, ""),
            about=apart,
        )
    return {name: len(pixels) / spent for name, spent in seconds.items()}


def reading(rounds: int) -> None:
    """Compare reading, resizing and encoding with encoding alone."""
    encoder = dlsr.create_encoder(ENCODERS["Lite0"])
    ways = [("torch", "float32")] + [("openvino", "bf16")] * bool(find_spec("openvino"))
    small = ImageSet(
        "small", *[[str(i) for i in range(256)]] * 2, [encoded(x, "PNG") for x in photographs(256)]
    )
    large = ImageSet(
        "large", *[[str(i) for i in range(16)]] * 2, [large_jpeg(i) for i in range(16)]
    )
    for backend, precision in ways:
        size = backends.BATCH["cpu"]
        options = {"precision": precision, "device": CPU, "batch_size": size}
        run = backends.prepare(encoder, backend, **options)

        def end_to_end(images: ImageSet, run: Callable = run, size: int = size) -> None:
            for _, pixels in features.read_batches(images, [INPUT_SIZE], size):
                run(np.stack(pixels))

        pixels = np.stack(next(features.read_batches(small, [INPUT_SIZE], size))[1])

        def alone(images: ImageSet, run: Callable = run, pixels: np.ndarray = pixels) -> None:
            for _ in range(0, len(images), len(pixels)):
                run(pixels)

        for images, title in ((small, "small PNGs"), (large, "12-megapixel JPEGs")):
            seconds = in_turns(
                {"all": partial(end_to_end, images), "alone": partial(alone, images)}, rounds
            )
            ideal, goal, what = seconds["alone"], ">= 0.95", "encoder alone"
            if images is large:
                ideal += process_seconds(images)
                goal, what = ">= 0.90", "1 / (encoder + decoding by one core)"
            if images is small and backend == "torch":
                spent = process_seconds(images) / CORES / len(images)
                note("an image", "read and resize", 1e6 * spent, "us")
            rate, what = len(images) / seconds["all"], f"of {what}"
            named = f"{title}, Lite0, {backend}, {precision}"
            note(
                "reading",
                named,
                rate,
                "images/s",
                ratio=ideal / seconds["all"],
                goal=goal,
                about=what,
            )


def process_seconds(images: ImageSet) -> float:
    """Return the seconds in which one core reads and resizes all images."""
    began = time.process_time()
    for i in range(len(images)):
        resize(images.image(i), [INPUT_SIZE])
    return time.process_time() - began


def encoded(pixels: np.ndarray, form: str) -> bytes:
    """Return an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, quality=90)
    return file.getvalue()


def large_jpeg(i: int) -> bytes:
    """Return a JPEG of 4000x3000 pixels: a photograph, enlarged, with noise."""
    image = Image.fromarray(load_sample_images().images[i % 2]).resize((4000, 3000))
    noise = np.random.default_rng(i).integers(-16, 17, (3000, 4000, 3))
    return encoded((np.asarray(image) + noise).clip(0, 255).astype(np.uint8), "JPEG")


def network_training(turns: int) -> dict[str, float]:
    """Compare training in both precisions; return the seconds of an update by size in float32."""
    try:
        backends.check_precision("bf16", CPU)
    except dlsr.UserError as error:
        left_out.append(str(error))
        return {}
    found, x = {}, torch.randn(128 * 12, 720, generator=torch.Generator().manual_seed(0))
    for width, blocks in ((720, 8), (1440, 16)):
        build = partial(dlsr.LFDN, 720, width=width, blocks=blocks)
        states = {
            p: training.TrainingState(build, 0, "cpu", lr=1e-4, weight_decay=1e-4)
            for p in ("float32", "bf16")
        }
        batches = torch.arange(len(x)).split(128)

        def epoch(precision: str, states=states, batches=batches) -> None:
            loss, decay = training._noisy_loss, training.ema_decay
            training.run_epoch(states[precision], x, batches, loss, decay, precision)

        seconds = in_turns({p: partial(epoch, p) for p in states}, turns)
        losses = {p: state.losses[-1] for p, state in states.items()}
        for precision, spent in seconds.items():
            note("training", f"{blocks}x{width}, {precision}", 12 / spent, "updates/s",
                 ratio=seconds["float32"] / spent, goal=">= 1.5" * (precision == "bf16"),
                 about=f"loss {losses[precision]:.4f}")  # fmt: skip
        found[f"{blocks}x{width}"] = seconds["float32"] / 12
    return found


TWO = """
import os, sys, time
import dlsr, torch
encoder = dlsr.create_encoder("efficientnet_lite0")
pixels = torch.zeros((16, 224, 224, 3), dtype=torch.uint8)
encoder(pixels)
print("ready", flush=True)
sys.stdin.readline()
began, done = time.perf_counter(), 0
while time.perf_counter() - began < float(sys.argv[1]):
    encoder(pixels)
    done += len(pixels)
print(done / (time.perf_counter() - began))
"""


def together(processes: int, seconds: float, **environment: str) -> float:
    """Return the images a second of all processes that encode with Lite0 at the same time."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE")
    }
    command = [sys.executable, "-c", TWO, str(seconds)]
    running = [
        subprocess.Popen(command, env=inherited | environment, **options) for _ in range(processes)
    ]
    for one in running:
        one.stdout.readline()
    for one in running:
        one.stdin.write("\n")
        one.stdin.flush()
    return sum(float(one.communicate()[0]) for one in running)


def two_processes(seconds: float) -> None:
    """Compare two processes at once with one, as the package sets threads, and as they are."""
    for title, environment in (
        ("threads spin", {"OMP_WAIT_POLICY": "ACTIVE"}),
        ("the default", {}),
    ):
        one, two = (together(n, seconds, **environment) for n in (1, 2))
        goal = ">= 1" if title == "the default" else ""
        note(
            "two at once",
            f"Lite0, {title}",
            two,
            "images/s",
            ratio=two / one,
            goal=goal,
            about=f"one alone {one:.0f}",
        )


def scoring(rates: dict[str, dict[str, float]], updates: dict[str, float]) -> None:
    """Time what stands on top of the features."""
    draws = np.random.default_rng(0)
    fitted, tested = (draws.standard_normal((n, 720), dtype=np.float32) for n in (50_000, 10_000))
    began = time.perf_counter()
    gaussian = dlsr.fit_gaussian(fitted)
    note(
        "scoring", "Ledoit-Wolf fit of 50,000 x 720", time.perf_counter() - began, "s", goal="< 3 s"
    )
    knn = dlsr.fit_knn(fitted, k=50)
    began = time.perf_counter()
    knn(tested)
    note(
        "scoring",
        "kNN of 10,000 against 50,000 x 720",
        time.perf_counter() - began,
        "s",
        goal="< 3 s",
    )
    network, noise = dlsr.LFDN(720, width=720, blocks=8).eval(), dlsr.fixed_noise(4, 720)
    channels, few = (24, 32, 56, 160, 448), tested[:2048]

    def mfsim() -> np.ndarray:
        return dlsr.mfsim(few, dlsr.reconstruct(network, few, t=3, noise=noise), channels)

    for title, of in rates.items():
        for name, rate in of.items():
            if "float32" in name:
                note("an image", f"{title}, {name}", 1e6 / rate, "us")
    fastest = {
        title: max(v for k, v in of.items() if "float32" in k) for title, of in rates.items()
    }
    ways = {"Gaussian": lambda: gaussian(few), "kNN": lambda: knn(few), "LFDN and MFsim": mfsim}
    for name, way in ways.items():
        spent = in_turns({name: way}, 3)[name] / len(few)
        note("an image", name, 1e6 * spent, "us")
        for title, rate in fastest.items():
            about = "of the fastest float32 encoder's time"
            named = f"{name}, beside {title}"
            note(
                "scoring", named, 1e6 * spent, "us", ratio=spent * rate, goal="< 0.05", about=about
            )
    if "B4*" in rates and updates:
        whole_comparison(rates["B4*"], updates["8x720"], in_turns({"m": mfsim}, 3)["m"] / len(few))


def whole_comparison(rates: dict[str, float], update: float, score: float) -> None:
    """Compare scoring and a whole training with a way of working like the released code's."""
    as_released, best = (
        1 / rates["as the released code"],
        1 / max(v for k, v in rates.items() if "float32" in k),
    )
    ratio = (as_released + score) / (best + score)
    note(
        "released",
        "B4*, scoring by MFsim, 8x720",
        1 / (best + score),
        "images/s",
        ratio=ratio,
        about="float32",
    )
    images, epochs = 50_000, 30
    steps = epochs * images / 128 * update
    ours, theirs = images * best + steps, epochs * images * as_released + steps
    note(
        "released",
        "B4*, 30 epochs of 8x720 on 50,000 images",
        ours,
        "s",
        ratio=theirs / ours,
        about="extrapolated",
    )


def start() -> None:
    """Time how long a command takes, from nothing to its end."""
    command = [sys.executable, "-m", "dlsr.cli"]
    spent = in_turns(
        {"help": lambda: subprocess.run([*command, "--help"], capture_output=True, check=True)}, 3
    )
    note("start", "dlsr --help", spent["help"], "s", goal="< 0.5 s")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, images in (("fit", photographs(40)), ("one", photographs(1))):
            (place / name).mkdir()
            for i, image in enumerate(images):
                (place / name / f"{i}.png").write_bytes(encoded(image, "PNG"))
        environment = os.environ | {"DLSR_CACHE": str(place / "cache")}
        options = {"env": environment, "capture_output": True, "check": True}
        subprocess.run([*command, "fit", place / "fit", "--out", place / "detector"], **options)
        began = time.perf_counter()
        subprocess.run([*command, "score", place / "detector", place / "one"], **options)
        note("start", "dlsr score of one image", time.perf_counter() - began, "s", goal="< 4 s")


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of each, to try it out")
    quick = parser.parse_args().quick
    rounds = 1 if quick else 7
    start()
    two_processes(1 if quick else 8)
    rates = encoders(rounds)
    reading(1 if quick else 3)
    updates = network_training(1 if quick else 5)
    scoring(rates, updates)
    table = pd.DataFrame(rows, columns=["part", "what", "value", "unit", "ratio", "goal", "about"])
    table["machine"] = f"{CORES} threads of {processor()}, load {os.getloadavg()[0]:.1f} at the end"
    table["versions"] = ", ".join(versions())
    file = Path(__file__).with_suffix(".csv")
    if not quick:
        table.to_csv(file, index=False, float_format="%.4g", lineterminator="\n")
    print(
        "\n".join(
            ["", table["machine"][0], table["versions"][0], *(f"Left out: {x}" for x in left_out)]
        )
    )


def processor() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions() -> list[str]:
    """Return the versions of what does the work."""
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "timm", "numpy", "scikit-learn", "openvino"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            left_out.append(f"{name} is not installed")
    return found


if __name__ == "__main__":
    main()
