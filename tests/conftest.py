"""Common to all tests: a cache of their own, no network, and small stand-ins for data and encoder."""

import io
import os
import socket
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dlsr.datasets import ImageSet
from dlsr.features import layer_zscore

matplotlib.use("Agg")
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "real_data(*variables): needs real data or weights, in the folders these variables name"
    )


@pytest.fixture(autouse=True)
def own_place(request, tmp_path, monkeypatch):
    """A fresh cache and working folder; no data, weights, network or GPU that a test did not ask for."""
    marker = request.node.get_closest_marker("real_data")
    wanted = marker.args if marker else ()
    for variable in wanted:
        if not Path(os.environ.get(variable) or "/nowhere").is_dir():
            pytest.skip(f"{variable} names no folder here")
    for variable in {"DLSR_DATA", "DLSR_WEIGHTS"} - set(wanted):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("DLSR_CACHE", str(tmp_path / "cache"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    torch.manual_seed(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def refuse(self, address):
        raise OSError(f"a test reached for the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


class FakeModel(nn.Module):
    """A fixed linear map of a few pixels, in the encoder's shapes. It counts what it sees."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.channels = encoder, encoder.channels
        draws = torch.Generator().manual_seed(1)
        self.register_buffer("weights", torch.randn((2, 27, sum(self.channels)), generator=draws))

    def forward(self, pixels):
        if self.encoder.batches == self.encoder.fail_after:
            raise KeyboardInterrupt
        self.encoder.batches += 1
        self.encoder.images += len(pixels)
        assert pixels.dtype == torch.uint8
        assert pixels.shape[1:] == (224, 224, 3)
        x = pixels[:, 37::75, 37::75].reshape(len(pixels), 27).double() / 255
        return torch.einsum("np,kpc->nkc", x, self.weights.double()).float()


class FakeEncoder:
    """What `dlsr.encoders.Encoder` offers, in milliseconds."""

    def __init__(self, channels=(3, 4, 5), *, sha256="a" * 64, fail_after=None):
        self.name, self.tag, self.layers = "fake", "fake.in1k", None
        self.channels, self.sha256, self.fail_after = tuple(channels), sha256, fail_after
        self.images = self.batches = 0

    def weights_sha256(self):
        return self.sha256

    def build(self):
        return FakeModel(self)


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


def encoded(pixels, form="PNG", **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, form, **options)
    return buffer.getvalue()


def random_pixels(n, *, seed=0, size=(6, 5)):
    return np.random.RandomState(seed).randint(0, 256, (n, *size, 3)).astype(np.uint8)


def image_set(n=6, *, seed=0, size=(6, 5), name="noise"):
    """n images of noise; their size is declared."""
    pixels = random_pixels(n, seed=seed, size=size)
    return ImageSet(
        name, [f"image{i}" for i in range(n)], [str(i % 2) for i in range(n)], pixels.__getitem__, size
    )


def write_folder(folder, n=6, *, seed=0, size=(6, 5)):
    """A folder of n PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(random_pixels(n, seed=seed, size=size)):
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


def easy_features(n, *, seed=0, channels=(16, 16), rank=3):
    """z0 of ID on a plane of few dimensions, in layers; and z0 of OOD all over the space."""
    picks = np.random.RandomState(seed)
    plane = np.random.RandomState(99).randn(rank, sum(channels))
    inside = picks.randn(n, rank) @ plane + 0.05 * picks.randn(n, sum(channels))
    outside = 2 * picks.randn(n, sum(channels))
    return layer_zscore(inside, channels), layer_zscore(outside, channels)


def one_sentence(error):
    """The text of a refusal, that a user is to read: not empty, and on one line."""
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text
