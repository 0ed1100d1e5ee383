"""Whatever a file holds and whenever a command is killed: it works, or a sentence says why not."""

import contextlib
import copy
import json
import re
import signal
import struct
import sys
import warnings
from functools import cache, partial
from pathlib import Path

import dlsr
import numpy as np
import pandas as pd
import pytest
from dlsr.cli import main

from conftest import ROOT, FakeEncoder, easy_features, encoded, run_python

resource = pytest.importorskip("resource")  # Windows knows no such limits
sys.path.append(str(ROOT / "benchmarks"))
from prove_unbreakable import WAYS, damaged, seeds  # noqa: E402

ID, OTHERS = easy_features(40, channels=(4, 4))
METHODS, INF, NAN, HUGE = ("gaussian", "knn", "mse"), float("inf"), float("nan"), 10**9


@cache
def fitted(method):
    return dlsr.DLSRDetector((4, 4), method=method, width=8, blocks=1, epochs=1, k=2).fit(ID)


def write(file, method, change):  # with a right checksum
    detector = copy.copy(fitted(method))
    detector.settings_, detector.arrays_ = detector.settings_.copy(), detector.arrays_.copy()
    detector.about_ = {"encoder": "fake", "weights_sha256": "a" * 64}
    change(detector)
    detector.save(file)
    return file.read_bytes()


@contextlib.contextmanager
def bounded(megabytes=200, seconds=10):
    """Let what is inside allocate no more (Linux says how much there is), and take no longer."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), before[1]))
    late = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"it hung for {seconds} s"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, late)
        resource.setrlimit(resource.RLIMIT_AS, before)


def check(file, method, harmless=False):
    """Be sure that a file is refused, or, if it is harmless, that it says what it should."""
    said = lambda one: [*one.ood_score(OTHERS), *one.score_samples(OTHERS)]  # noqa: E731
    with bounded(), Path("/dev/null").open("w") as out, contextlib.redirect_stdout(out):
        try:
            found = said(detector := dlsr.DLSRDetector.load(file, device="cpu"))
            assert isinstance(detector.encoder_name(), str) and main(["info", str(file)]) == 0
        except dlsr.UserError as error:
            assert 0 < len(str(error)) < 2000 and "\n" not in str(error)
            return
    assert harmless and found == said(fitted(method)), f"a detector by {method} was loaded"


def flip(place, bit, whole):
    i = place % len(whole)
    return whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :]


def header(change, whole):
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    parts = json.loads(whole[8:start])
    change(parts, parts["__metadata__"])
    text = json.dumps(parts).encode()
    return struct.pack("<Q", len(text)) + text + whole[start:]


TEXTS = ("[]", "3", '"text"', "null", "NaN", "{}", "{", "9" * 9999, "[" * 10**5)
HEADERS = {f"JSON {text[:9]}": lambda _, own, x=text: own.update(dlsr=x) for text in TEXTS} | {
    f"format {x}": lambda _, own, x=x: own.update(dlsr=re.sub(r'"format": \d+', x, own["dlsr"]))
    for x in ('"format": 2', '"format": 99', '"format": "4"', '"format": [4]', '"no": 4')
} | {
    f"a tensor {told}": lambda parts, _, told=told: parts["calibration"].update(told)
    for told in (
        {"dtype": "F8_E5M2", "shape": [160]}, {"dtype": "S9"}, {"shape": [10**12]}, {"shape": [-1]},
        {"shape": [2**33, 2**33]}, {"data_offsets": [0, 2**62]}, {"dtype": "BF16", "shape": [80]},
    )
} | {
    "nothing": lambda h, _: h.pop("__metadata__"), "other": lambda _, own: own.update(dlsr="?"),
    "swapped": lambda h, _: h.update(vectors=h["calibration"], calibration=h["vectors"]),
}  # fmt: skip
BYTES = {f"bit {b} at {at}": partial(flip, at, b) for b in (0, 7) for at in (0, 7, 8, 300, -99, -1)}
BYTES |= {f"cut at {n}": lambda whole, n=n: whole[:n] for n in (0, 4, 8, 99, -1, -64, -1300)}
BYTES |= {kind: partial(header, change) for kind, change in HEADERS.items()} | {
    "a byte more": lambda whole: whole + b"\0", "twice": lambda whole: whole + whole,
    "zeros": lambda whole: bytes(len(whole)), "a pickle": lambda _: b"\x80\x04K\x04.",
    "a PNG": lambda _: encoded(ID > 0), "no UTF-8": lambda w: w.replace(b"vers", b"v\xff\xfes"),
}  # fmt: skip
put = lambda place, name, value: lambda one: getattr(one, place).update({name: value})  # noqa: E731
SETTINGS = {  # the methods that read a parameter, and values of it that make no sense
    "flag_rate": (METHODS, NAN, -0.1, 2, "0.05", [0.05], None), "depth": (METHODS, 1),
    "channels": (METHODS, [-1, 9], [4.5, 3.5], [INF], "44", [], [HUGE], [10**30], [[8]], None, 7),
    "method": (METHODS, "lr", None, ["mse"]), "k": (["knn"], 0, -3, 2.5, "2", None),
    "width": (["mse"], HUGE, 10**30, -8, 7, 8.0, "8"), "blocks": (["mse"], HUGE, 0, 1.5, "1"),
    "t": (["mse"], HUGE, 0, 100, 2.5, "3", None), "seed": (["mse"], "0", 2.5, 10**30, None),
    "layers": (["mfsim"], "x", [9], [[1]], [], 7, None),
}  # fmt: skip
FORGED = {  # the methods, and how their detector is changed
    f"{name}={value}": (methods, put("settings_", name, value))
    for name, (methods, *values) in SETTINGS.items() for value in values
} | {
    f"no {name}": (methods, lambda detector, name=name: detector.settings_.pop(name))
    for name, (methods, *_) in SETTINGS.items() if name != "depth"
} | {
    f"no {name}": ([method], lambda detector, name=name: detector.arrays_.pop(name))
    for method, name in (("gaussian", "location"), ("knn", "vectors"), ("mse", "into.1.bias"))
} | {
    f"{place}={value}": (["knn"], lambda detector, p=place, v=value: setattr(detector, p, v))
    for place in ("settings_", "about_", "versions_") for value in (3, "text", [["a", 1]])
} | {
    f"encoder={x!a}": (["knn"], put("about_", "encoder", x)) for x in (5, ["a"], "\ud800")
} | {
    "no image": (METHODS, lambda d: d.arrays_.update(fold=ID[:0, 0] > 0, calibration=ID[:0, 0])),
    "all in fold 0": (METHODS, lambda d: d.arrays_.update(fold=d.arrays_["fold"] * 0)),
    "folds far": (METHODS, lambda d: d.arrays_.update(fold=d.arrays_["fold"] * 10**12 + 9**9)),
    "a tensor more": (METHODS, put("arrays_", "more", ID)),
}  # fmt: skip
HARMLESS = ("encoder='\\ud800'", "all in fold 0", "a tensor more")  # a network has one fold


@pytest.mark.parametrize("kind", [*BYTES, *FORGED])
def test_a_tampered_detector_is_refused_also_with_a_right_checksum(kind, tmp_path):
    methods, change = FORGED.get(kind, (METHODS if kind not in HEADERS else ["knn"], id))
    for method in methods:
        whole = write(tmp_path / "d", method, change)
        (tmp_path / "d").write_bytes(BYTES.get(kind, bytes)(whole))
        check(tmp_path / "d", method, kind in HARMLESS)


ARRAYS = {f"of {x}": lambda a, x=x: a.astype(x) for x in ("?", "u1", "f2", "c8", "i4")}
ARRAYS |= {"NaN": lambda a: a * NAN, "infinite": lambda a: a - INF, "empty": lambda a: a[:0]}
ARRAYS |= {"cut": lambda a: a[1:], "deeper": lambda a: a[None], "one number": lambda a: a.max()}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_that_makes_no_sense_is_refused(kind, tmp_path):
    for method in METHODS:
        for name, array in fitted(method).arrays_.items():
            write(tmp_path / "d", method, put("arrays_", name, np.asarray(ARRAYS[kind](array))))
            check(tmp_path / "d", method)


@pytest.mark.filterwarnings("ignore")
def test_an_image_is_read_or_refused_and_every_file_is_counted(tmp_path, monkeypatch):
    random, refused = np.random.RandomState(0), set()
    for name, content in seeds().items():
        for way in ("whole", *WAYS):
            bad = content if way == "whole" else damaged(content, way, random)
            (tmp_path / "here" / f"{way}-{name}").write_bytes(bad)
    images = dlsr.load_images(tmp_path / "here")
    for i, name in enumerate(images.ids):
        with bounded(1000), warnings.catch_warnings(), contextlib.suppress(dlsr.UserError):
            warnings.simplefilter("error")
            refused.add(name)
            assert images.image(i).resize((224, 224)).mode == "RGB"
            refused.remove(name)
    monkeypatch.setattr("dlsr.encoders.create_encoder", lambda *_, **__: FakeEncoder())
    folder, file, csv = (str(tmp_path / name) for name in ("here", "d", "csv"))
    assert main(["fit", folder, "--out", file, "--encoder", "fake"]) == 0
    assert main(["score", file, folder, "--csv", csv]) == 0
    rows, about = pd.read_csv(csv).set_index("image"), dlsr.DLSRDetector.load(file).about_
    lost = set(rows.index[rows["reason"].notna() & rows["ood_score"].isna()])
    assert lost <= refused - {f"whole-{name}" for name in seeds()}
    assert about["unreadable"] == len(lost) == rows["ood_score"].isna().sum()
    assert about["images"] + about["copies"] + len(lost) == len(images) == 8 * len(seeds())
    assert len(lost | {*rows.index} | {*images.ids}) == len(rows) == len(images)


SCRIPT = r"""
import itertools, os, random, shutil, signal, sys, time
from pathlib import Path
import dlsr.cli, dlsr.detector, dlsr.encoders, dlsr.features, pandas
from conftest import FakeEncoder, write_folder
def start(work, numbers, *rest):  # in a process of its own, to which all is imported
    if child := os.fork(): return child
    for i in numbers: work(i, *rest)
    os._exit(0)
def ended(child): return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
def info(i, file, output):
    for n, name in ((1, output), (2, f"told{i}")): os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), n)
    if i == 1: sys.stdout = None  # as where it is closed
    sys.exit(dlsr.cli.main(["info", file]))
def run(*command): assert dlsr.cli.main([*command, "--overwrite"]) == 0
def score(i, file): run("score", "fit0", photos[i], "--csv", file)
def fit(i, file):
    shutil.rmtree("cache/features", True), run("fit", photos[i], "--out", file, "--encoder", "fake")
def save(i, file): dlsr.DLSRDetector.load(f"fit{i}").save(file)
os.environ["DLSR_CACHE"], moments = str(Path("cache").resolve()), random.Random(0)
dlsr.encoders.create_encoder = lambda *_, **__: FakeEncoder()
photos = [str(write_folder(Path(f"photos{i}"), 30, seed=i)) for i in range(2)]
for work in (fit, score, save):
    begin, names = time.perf_counter(), [work.__name__ + x for x in "01"]
    assert [ended(start(work, [i], names[i])) for i in range(2)] == [0, 0]
    once, right = (time.perf_counter() - begin) / 2, [Path(name).read_bytes() for name in names]
    for target in map(Path, ("new", "again", "again")):
        old = target.read_bytes() if target.exists() else None
        child = start(work, itertools.cycle([1, 0]), target.name)
        time.sleep(moments.uniform(0.1, 2) * once), os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        assert (target.read_bytes() if target.exists() else None) in (old, *right), work
        assert ended(start(work, [0], target.name)) == 0
        assert target.read_bytes() == right[0] != right[1], work
del os.environ["DLSR_CACHE"], os.environ["HOME"]; odd = shutil.copy("fit0", os.fsdecode(b"caf\xe9"))
for i, job in enumerate([("fit0", "/dev/full"), ("fit0", os.devnull), (odd, os.devnull)]):
    status, told = ended(start(info, [i], *job)), Path(f"told{i}").read_text()
    assert (status == 2 or i) and "Traceback" not in told and "ignored" not in told, told
"""


def test_nothing_is_half_written_and_no_output_that_is_lost_gives_a_traceback(tmp_path):
    assert run_python(SCRIPT, tmp_path) == 0
