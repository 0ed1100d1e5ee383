"""Common to all tests: a cache of their own, no network, and stand-ins for data and encoder."""

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dlsr.data import ImageSet
from dlsr.features import layer_zscore
from PIL import Image
from torch import nn

os.environ["MPLBACKEND"] = "Agg"
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    marker = "real_data(*variables): needs data or weights in the folders that these variables name"
    config.addinivalue_line("markers", marker)


@pytest.fixture(autouse=True)
def own_place(request, tmp_path, monkeypatch):
    """Give a test its own cache and folder; no data, weights, network or GPU it did not ask for."""
    marker = request.node.get_closest_marker("real_data")
    wanted = marker.args if marker else ()
    for variable in wanted:
        if not Path(os.environ.get(variable) or "/nowhere").is_dir():
            pytest.skip(f"{variable} names no folder here")
    for variable in {"DLSR_DATA", "DLSR_WEIGHTS"} - set(wanted):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("DLSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for the processes that a test starts
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    torch.manual_seed(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family != socket.AF_UNIX:  # between processes
            raise OSError(f"a test reached for the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


class FakeEncoder:
    """A fixed linear map of a few pixels, with an encoder's attributes; it counts its images.

    ``stop`` is called instead of batch number ``after``, counted from 0.
    """

    def __init__(
        self, channels=(3, 4, 5), *, sha256="a" * 64, tag="fake.in1k", identity=(), after=-1, stop=None
    ):
        self.name, self.channels, self.weights_sha256 = "fake", tuple(channels), sha256
        self.about = {"tag": tag, "layers": None, "identity": identity}
        self.after, self.stop, self.images, self.batches = after, stop, 0, 0
        draws = torch.Generator().manual_seed(1)
        self.map = torch.randn((2, 27, sum(channels)), generator=draws, dtype=torch.float64)

    def to(self, device):
        return self

    def __call__(self, pixels):
        if self.batches == self.after:
            self.stop()
        self.batches += 1
        self.images += len({image.numpy().tobytes() for image in pixels})  # a batch is padded
        assert pixels.dtype == torch.uint8
        assert pixels.shape[1:] == (224, 224, 3)
        x = pixels[:, 37::75, 37::75].reshape(len(pixels), 27).double() / 255
        return torch.einsum("np,kpc->nkc", x, self.map).float()


class Rule(nn.Module):
    """A network from a function of (z_t, t)."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.unused = rule, nn.Parameter(torch.zeros(1))

    def forward(self, z_t, t):
        return self.rule(z_t, t)


@pytest.fixture
def encoder():
    return FakeEncoder()


def run_python(code, folder):
    """Run another Python process, in which ``conftest`` can be imported; return its exit status."""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": path}).returncode


def encoded(pixels, form="PNG", **options):
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, form, **options)
    return buffer.getvalue()


def random_pixels(n, *, seed=0, size=(6, 5)):
    return np.random.RandomState(seed).randint(0, 256, (n, *size, 3)).astype(np.uint8)


def image_set(n=6, *, seed=0, size=(6, 5), name="noise"):
    """Return n images of noise; their size is declared."""
    ids, labels = ([form.format(i, i % 2) for i in range(n)] for form in ("image{0}", "{1}"))
    return ImageSet(name, ids, labels, random_pixels(n, seed=seed, size=size), size)


def write_folder(folder, n=6, *, seed=0, size=(6, 5)):
    """Write a folder of n PNG files and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(random_pixels(n, seed=seed, size=size)):
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


def easy_features(n, *, seed=0, channels=(16, 16), rank=3):
    """Return z0 of ID on a plane of few dimensions, and z0 of OOD all over the space."""
    picks = np.random.RandomState(seed)
    plane = np.random.RandomState(99).randn(rank, sum(channels))
    inside = picks.randn(n, rank) @ plane + 0.05 * picks.randn(n, sum(channels))
    outside = 2 * picks.randn(n, sum(channels))
    return layer_zscore(inside, channels), layer_zscore(outside, channels)


def one_sentence(error):
    """Return the text of a refusal, that a user is to read: not empty, and on one line."""
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


def from_page(page, *names):
    """Return functions that the cells of a notebook define, by its own imports."""
    notebook, found = json.loads((ROOT / "notebooks" / f"{page}.ipynb").read_text("utf-8")), {}
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for source in sources:
        if "import dlsr\n" in source or any(f"def {name}(" in source for name in names):
            exec(source, found)
    return [found[name] for name in names]
