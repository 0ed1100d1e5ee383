"""Whatever a file holds and whenever a command is killed: it works, or says so in one sentence."""

import copy
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import dlsr
import numpy as np
import pandas as pd
import pytest
from dlsr.cli import main
from dlsr.data import resize
from PIL import Image

from conftest import FakeEncoder, easy_features, encoded, random_pixels, run_python

ID, OTHERS = easy_features(40, channels=(4, 4))
METHODS, LINUX = ("gaussian", "knn", "mse"), sys.platform == "linux"


@cache
def fitted(method):
    sizes = {"width": 8, "blocks": 1, "epochs": 1, "k": 2, "device": "cpu"}
    return dlsr.DLSRDetector((4, 4), method=method, **sizes).fit(ID)


def write(file, method, change=lambda detector: None):
    """Save a detector that says what it is not; the checksum is right. Return the file's bytes."""
    detector = copy.deepcopy(fitted(method))
    detector.about_ = {"encoder": "fake", "weights_sha256": "a" * 64}
    change(detector)
    detector.save(file)
    return file.read_bytes()


def said(detector):
    """Return all that a detector says of vectors."""
    return np.stack([detector.ood_score(OTHERS), detector.score_samples(OTHERS)])


@contextmanager
def bounded(megabytes=200, seconds=10):
    """Let what is inside allocate no more, and take no longer; only Linux can be told."""
    if not LINUX:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    late = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"it hung for {seconds} s"))
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, late)


def check(file, method, harmless=False):
    """Be sure that a file is refused, or, if it is harmless, that it says what it should."""
    with bounded():
        try:
            found = said(detector := dlsr.DLSRDetector.load(file, device="cpu"))
            assert isinstance(detector.encoder_name(), str)
            assert main(["info", str(file)]) == 0
        except dlsr.UserError as error:
            assert 0 < len(str(error)) < 2000 and "\n" not in str(error)
            return
    np.testing.assert_array_equal(found, said(fitted(method)))
    assert harmless, f"a detector by {method} was loaded"


# Files of other bytes


def header_of(content):
    """Return what a file's header says, and where its tensors begin."""
    start = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:start]), start


def header(change):
    def changed(content):
        said, start = header_of(content)
        change(said)
        text = json.dumps(said).encode()
        return struct.pack("<Q", len(text)) + text + content[start:]

    return changed


def told(text):  # instead of all that dlsr wrote there
    return header(lambda said: said["__metadata__"].update(dlsr=text))


def tensor(name="calibration", **fields):
    return header(lambda said: said[name].update(fields))


def flipped(place, bit):
    def changed(content):
        i = {"tensors": header_of(content)[1], "last": len(content) - 1}.get(place, place)
        return content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :]

    return changed


def swap(said):
    one, other = said["into.1.bias"], said["into.1.weight"]
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]


BYTES = {f"bit {bit} of {at}": flipped(at, bit) for bit in (0, 7) for at in (0, 8, 300, "tensors", "last")}
BYTES |= {f"cut at {n}": lambda content, n=n: content[:n] for n in (0, 4, 8, 99, -1, -64, -1300)}
BYTES |= {f"JSON is {text}": told(text) for text in ("[]", "3", '"text"', "null", "NaN", "{}", "{")}
BYTES |= {
    "bit 7 of the length's last byte": flipped(7, 7), "a byte more": lambda whole: whole + b"\0",
    "a megabyte more": lambda whole: whole + bytes(1 << 20), "twice": lambda whole: whole + whole,
    "zeros": lambda whole: bytes(len(whole)), "a pickle": lambda whole: pickle.dumps({"format": 3}),
    "a PNG": lambda whole: encoded(ID > 0), "no metadata": header(lambda said: said.pop("__metadata__")),
    "other metadata": header(lambda said: said.update(__metadata__={"format": "pt"})),
    "no UTF-8": lambda whole: whole.replace(b"versions", b"versi\xff\xfes"),
    "deep": told("[" * 100_000), "deep and whole": told("[" * 100_000 + "]" * 100_000),
    "a long number": told("9" * 9999), "bf16": tensor("fold", dtype="BF16", shape=[16]),
    "float8": tensor(dtype="F8_E5M2", shape=[16]), "an unknown type": tensor(dtype="S9"),
    "a huge shape": tensor(shape=[10**12]), "a negative shape": tensor(shape=[-1]),
    "an overflow": tensor(shape=[2**33, 2**33]), "a huge offset": tensor(data_offsets=[0, 2**62]),
    "swapped tensors": header(swap), "a tensor less": header(lambda said: said.pop("fold")),
}  # fmt: skip


@pytest.mark.parametrize("kind", BYTES)
def test_a_file_of_other_bytes_is_refused(kind, tmp_path):
    for method in METHODS[2:] if kind[:2] in ("bf", "fl", "sw") else METHODS:
        whole = write(tmp_path / method, method)
        (tmp_path / method).write_bytes(BYTES[kind](whole))
        check(tmp_path / method, method)


# Files whose checksum is right


INF, NAN, HUGE = float("inf"), float("nan"), 10**9
SETTINGS = {  # values of a parameter, and the methods that read it
    "flag_rate": (METHODS, NAN, -0.1, 2, "0.05", [0.05], None),
    "channels": (METHODS, [-1, 9], [4.5, 3.5], [INF], "44", [], [HUGE], [10**30], [[4, 4]], None, 7),
    "method": (METHODS, "lr", None, ["mse"]),
    "depth": (METHODS, 1),
    "k": (["knn"], 0, -3, 2.5, "2", None),
    "width": (["mse"], HUGE, 10**30, -8, 7, 8.0, "8"),
    "blocks": (["mse"], HUGE, 0, 1.5, "1"),
    "t": (["mse"], HUGE, 0, 100, 2.5, "3", None),
    "seed": (["mse"], "0", 2.5, 10**30, None),
    "layers": (["mfsim"], "x", [9], [[1]], [], 7, None),
}
EACH = [(name, value) for name, (_, *values) in SETTINGS.items() for value in values]


@pytest.mark.parametrize(("name", "value"), EACH, ids=str)
def test_a_parameter_that_makes_no_sense_is_refused(name, value, tmp_path):
    for method in SETTINGS[name][0]:
        write(tmp_path / "d", method, lambda detector: detector.settings_.update({name: value}))
        check(tmp_path / "d", method)


@pytest.mark.parametrize("value", [[], 3, "text", None, [["a", 1]]], ids=str)
@pytest.mark.parametrize("name", ["settings_", "about_", "versions_"])
def test_what_a_file_says_of_itself_is_by_names(name, value, tmp_path):
    write(tmp_path / "d", "gaussian", lambda detector: setattr(detector, name, value))
    check(tmp_path / "d", "gaussian")


@pytest.mark.parametrize("value", [5, None, ["fake"], "\ud800"], ids=ascii)
def test_an_encoder_that_is_no_name_is_refused_or_told(value, tmp_path):
    write(tmp_path / "d", "knn", lambda detector: detector.about_.update(encoder=value))
    check(tmp_path / "d", "knn", harmless=True)


def test_a_missing_parameter_is_refused(tmp_path):
    for name, (methods, *_) in SETTINGS.items():
        for method in methods if name != "depth" else ():
            write(tmp_path / "d", method, lambda detector, name=name: detector.settings_.pop(name))
            check(tmp_path / "d", method)


@pytest.mark.parametrize("value", [2, 99, "3", [3], None], ids=str)
def test_another_format_is_refused(value, tmp_path, monkeypatch):
    with monkeypatch.context() as changed:
        changed.setattr("dlsr.detector.FORMAT", value)
        write(tmp_path / "d", "knn")
    check(tmp_path / "d", "knn")


ARRAYS = {f"of {kind}": lambda a, kind=kind: a.astype(kind) for kind in ("?", "u1", "f2", "c8", "i4")}
ARRAYS |= {f"with {x}": lambda a, x=x: np.where(np.arange(a.size) < 1, x, a.ravel()).reshape(a.shape)
           for x in (NAN, -INF)}  # fmt: skip
ARRAYS |= {"empty": lambda a: a[:0], "cut": lambda a: a[1:], "deeper": lambda a: a[None]}
ARRAYS |= {"one number": lambda a: a.ravel()[:1].reshape(())}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_that_makes_no_sense_is_refused(kind, tmp_path):
    for method in METHODS:
        for name, array in fitted(method).arrays_.items():
            other = np.ascontiguousarray(ARRAYS[kind](array)).reshape(ARRAYS[kind](array).shape)
            write(tmp_path / "d", method, lambda d, n=name, other=other: d.arrays_.update({n: other}))
            check(tmp_path / "d", method)
            write(tmp_path / "d", method, lambda detector, name=name: detector.arrays_.pop(name))
            check(tmp_path / "d", method)


FOLDS = {"all one": lambda fold: fold * 0, "far": lambda fold: fold * 10**12, "apart": lambda fold: fold + 1}


@pytest.mark.parametrize("kind", FOLDS)
@pytest.mark.parametrize("method", METHODS)
def test_folds_that_make_no_sense_are_refused(kind, method, tmp_path):
    change = lambda detector: detector.arrays_.update(fold=FOLDS[kind](detector.arrays_["fold"]))  # noqa: E731
    write(tmp_path / "d", method, change)
    check(tmp_path / "d", method, harmless=True)


def test_no_images_are_refused_and_an_array_more_changes_nothing(tmp_path):
    none = {"fold": np.zeros(0, np.int64), "calibration": np.zeros(0, np.float32)}
    for method in METHODS:
        for arrays, harmless in ((none, False), ({"more": np.ones(3, np.float32)}, True)):
            write(tmp_path / "d", method, lambda d, arrays=arrays: d.arrays_.update(arrays))
            check(tmp_path / "d", method, harmless=harmless)
