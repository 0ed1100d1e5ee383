"""Prove that damaged images and killed commands do no harm; writes ``prove_unbreakable.log``.

    python benchmarks/prove_unbreakable.py [--files 4000] [--kills 20]

Images of 28 kinds are damaged in seven ways and read. Commands are killed at moments that a seed
draws, or while they write, and run again: that gives the bytes of a run that nobody killed.
"""

import argparse
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

LOG, ROOT = Path(__file__).with_suffix(".log"), Path(__file__).resolve().parents[1]
WAYS = ("cut", "byte", "bytes", "zeros", "repeat", "head", "noise")
HEADS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0\x08\0", b"P6 9 9 9")
PAGES = {"save_all": True, "append_images": [Image.new("RGB", (16, 20), "red")]}
KINDS = (  # suffix, Pillow's mode, and how it is saved
    ("png", "RGB", {}), ("png", "L", {}), ("png", "1", {}), ("png", "P", {"transparency": 0}),
    ("png", "LA", {}), ("png", "RGBA", {}), ("png", "I;16", {}), ("apng", "RGB", PAGES),
    ("jpg", "RGB", {"quality": 30}), ("jpg", "L", {"progressive": True}), ("jpg", "CMYK", {}),
    ("jpg", "RGB", PAGES | {"format": "MPO"}), ("gif", "P", {}), ("gif", "RGB", PAGES),
    ("webp", "RGB", {}), ("webp", "RGBA", {"lossless": True}), ("tif", "RGB", {}), ("tif", "F", {}),
    ("tif", "I;16", {"compression": "tiff_lzw"}), ("tif", "L", {"compression": "jpeg"}),
    ("tif", "CMYK", {}), ("ppm", "RGB", {}), ("tga", "RGBA", {"rle": True}), ("bmp", "RGB", {}),
    ("pcx", "P", {}), ("ico", "RGBA", {}), ("sgi", "RGB", {}), ("dds", "RGBA", {}),
)  # fmt: skip
READ = """
import resource, sys, dlsr
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
images = dlsr.load_images(sys.argv[1])
for i, name in enumerate(images.ids):
    try: print(name, {"RGB": "read"}[images.image(i).resize((224, 224)).mode])
    except dlsr.UserError: print(name, "refused")
"""
SAVE = "import sys, dlsr; both = [*map(dlsr.DLSRDetector.load, sys.argv[2:4])]\n"
SAVE += "for i in range(int(sys.argv[1])): both[i % 2].save(sys.argv[4])"
ONCE, FIT = "1", ["fit", "photos", "--encoder", "efficientnet_lite0", "--overwrite", "--out"]
SCORE, failures = ["photos", "--overwrite", "--csv"], []


def say(text: str) -> None:
    """Print a line and append it to the log."""
    print(text, flush=True)
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"{text}\n")


def expect(right: bool, told: str) -> None:
    """Note what failed, if it is not right."""
    if not right:
        failures.append(say(f"FAILED: {' '.join(told.split())}"))


def seeds() -> dict[str, bytes]:
    """Return a small image of each kind, by a name such as ``06-png-I16.png``."""
    rgb, found = np.random.RandomState(0).randint(0, 256, (20, 16, 3), "u1"), {}
    deep = {"I;16": rgb[..., 0].astype("u2") * 257, "F": rgb[..., 0].astype("f4") / 255}
    for i, (suffix, mode, options) in enumerate(KINDS):
        image, buffer = Image.fromarray(deep.get(mode, rgb)), io.BytesIO()
        options = {"format": Image.registered_extensions()[f".{suffix}"]} | options
        (image if mode in deep else image.convert(mode)).save(buffer, **options)
        found[f"{i:02d}-{suffix}-{mode.replace(';', '')}.{suffix}"] = buffer.getvalue()
    return found


def damaged(content: bytes, way: str, random: np.random.RandomState) -> bytes:
    """Return an image's bytes after one of the accidents in `WAYS`."""
    n, i, changed = len(content), random.randint(len(content)), bytearray(content)
    for at in random.randint(n, size=30 if way == "bytes" else 1):
        changed[at] ^= random.randint(1, 256)
    head, end = HEADS[random.randint(len(HEADS))], min(i + 40, n)
    ways = content[:i], changed, changed, content[:i] + bytes(end - i) + content[end:]
    ways += content[:end] + content[i:], head + content[len(head) :], content[:16] + random.bytes(n)
    return bytes(ways[WAYS.index(way)])


def prove_images(place: Path, files: int) -> None:
    """Read all images, and score them by the command line; report the counts of each kind."""
    random, fates = np.random.RandomState(0), {}
    each = [(*pair, way) for pair in seeds().items() for way in WAYS]
    for n, (name, content, way) in enumerate(each * max(1, round(files / len(each))), 1):
        file = place / "set" / f"{n // 500:03d}" / name.replace(".", f"-{way}-{n}.")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(damaged(content, way, random))
    for folder in sorted((place / "set").iterdir()):
        job = start(place, ["timeout", 300, sys.executable, "-uc", READ, folder])
        out, told = job.communicate()
        expect(job.returncode == 0, f"reading {folder.name}: {job.returncode} {told[-300:]}")
        fates |= {f"{folder.name}/{row.split()[0]}": row.split()[1] for row in out.splitlines()}
    counts = Counter((name.split("/")[1].rsplit("-", 2)[0], fate) for name, fate in fates.items())
    for kind in sorted({kind for kind, _ in counts}):
        say(f"  {kind:12} {counts[kind, 'read']:5} read {counts[kind, 'refused']:5} refused")
    lost = sorted(name for name, fate in fates.items() if fate == "refused")
    finish(place, ["score", "a", "set", "--csv", "all.csv"])
    rows = pd.read_csv(place / "all.csv").set_index("image")
    same = sorted(rows.index[rows["reason"].notna()]) == lost and {*rows.index} == {*fates}
    expect(same and len(rows) == n, f"of {n} images {len(fates)} were read, {len(rows)} scored")
    say(f"{n} files: {n - len(lost)} were read and scored, {len(lost)} have a reason and no score")


def start(place: Path, line: list) -> subprocess.Popen:
    """Start a program, or a command of this checkout's dlsr, in a folder with its own cache."""
    env = os.environ | {"DLSR_CACHE": "cache", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    own = [] if line[0] in (sys.executable, "timeout") else [sys.executable, "-m", "dlsr.cli"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, own + line)), cwd=place, env=env, **pipes)


def finish(place: Path, line: list) -> float:
    """Run a command to its end; return the seconds that it took."""
    begin = time.perf_counter()
    told = (job := start(place, line)).communicate()[1]
    expect(job.returncode == 0 and "Traceback" not in told, f"{line}: {told[-500:]}")
    return time.perf_counter() - begin


def prove_kills(place: Path, name: str, line: list, old: bytes, kills: int) -> None:
    """Kill a command at so many moments, and run it again each time; report what was left."""
    moments = (0.9, 1.3) if ONCE in line else (0.3, 1)  # as shares of the time that it takes
    target, left, random = place / name / "target", Counter(), np.random.RandomState(1)
    target.parent.mkdir()
    seconds, right = finish(place, [*line, target]), target.read_bytes()
    known = {old: "the old file", right: "the new file", None: "no file"}
    for i in range(kills):
        if i % 4 < 2:  # else the images' features are there already
            shutil.rmtree(place / "cache", ignore_errors=True)
        target.write_bytes(old) if i % 3 else target.unlink()
        job = start(place, [10**9 if part == ONCE else part for part in [*line, target]])
        end = time.perf_counter() + random.uniform(*moments) * seconds
        most = len(list(target.parent.glob(".*"))) if i % 2 else kills  # of temporary folders
        while time.perf_counter() < end and len(list(target.parent.glob(".*"))) <= most:
            time.sleep(0.0005)
        job.kill()
        job.communicate()
        state = known.get(target.read_bytes() if target.exists() else None, "a broken file")
        expect("broken" not in state and (state != "no file" or i % 3 == 0), f"{name}: {state}")
        left[f"{state} (it had ended)" if job.returncode == 0 else state] += 1
        finish(place, [*line, target])
        expect(target.exists() and target.read_bytes() == right, f"{name} {i}: other bytes again")
    say(f"{name}: {kills} kills in {seconds:.1f} s, what was left: {dict(left)}; all ran again")


def prove_others(place: Path, moments: int = 5) -> None:
    """Interrupt a fit at moments from its start to shortly before its end; run two at once."""
    seconds, statuses, right = finish(place, [*FIT, "other"]), [], (place / "a").read_bytes()
    for i in range(moments):
        shutil.rmtree(place / "cache", ignore_errors=True)
        job = start(place, [*FIT, "other"])
        time.sleep(seconds * (0.2 + 0.7 * i / moments))
        job.send_signal(signal.SIGINT)
        told = job.communicate()[1]
        statuses.append(told[-500:] if "Traceback" in told else job.returncode)
    expect(set(statuses) <= {130, -2}, f"Ctrl-C: {statuses}")  # a shell calls both of them 130
    say(f"Ctrl-C at {moments} moments of {seconds:.1f} s: the statuses were {statuses}")
    shutil.rmtree(place / "cache", ignore_errors=True)
    jobs = [start(place, [*FIT, name]) for name in ("one", "two")]
    told = [job.communicate()[1][-300:] for job in jobs]
    twins = [(place / name).read_bytes() for name in ("one", "two") if (place / name).exists()]
    expect(twins == [right, right], f"two at once: {told}")
    say("two fits at once on one empty cache: the bytes of one alone")


def main() -> int:
    """Run all parts."""
    parser = argparse.ArgumentParser(description="Damage images, and kill commands.")
    for option, number in (("--files", 4000), ("--kills", 20)):
        parser.add_argument(option, type=int, default=number)
    options, begin = parser.parse_args(), time.perf_counter()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    LOG.write_text("", encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        (photos := (place := Path(folder)) / "photos").mkdir()
        for i, pixels in enumerate(np.random.RandomState(2).randint(0, 256, (30, 40, 40, 3), "u1")):
            Image.fromarray(pixels).save(photos / f"{i:02d}.png")
        for line in ([*FIT, "a"], [*FIT, "b", "--method", "knn"], ["score", "b", *SCORE, "csv"]):
            finish(place, line)
        old, csv = (place / "b").read_bytes(), (place / "csv").read_bytes()
        prove_images(place, options.files)
        prove_kills(place, "fit", FIT, old, options.kills)
        prove_kills(place, "score", ["score", "a", *SCORE], csv, options.kills)
        prove_kills(place, "save", [sys.executable, "-c", SAVE, ONCE, *"ab"], old, options.kills)
        prove_others(place)
    say(f"{len(failures)} failures; it took {time.perf_counter() - begin:.0f} s")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
