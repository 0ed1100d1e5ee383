"""Common to all tests: a cache of their own, no network, and small stand-ins for data and encoder."""

import io
import os
import shutil
import socket
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dlsr import chapter, comparison, search
from dlsr.baselines import KNN, Mahalanobis
from dlsr.comparison import DEVELOPMENT, FAR, NEAR, REPORT, OODSet, Study
from dlsr.datasets import ImageSet, load_images, resize, resize_chain, resized
from dlsr.features import Features, layer_zscore
from dlsr.rivals import RIVALS, PCAResidual, _candidates
from dlsr.significance import paired_bootstrap
from dlsr.training import TrainingSettings
from dlsr.variants import VARIANTS

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


# A small study of the chapter: its features are made, and it has few rivals, variants and draws

MADE_CHANNELS = (6, 7, 8)
OVERLAP = {"digits_8_9/test": {"9b": "digit 0"}}


SMALL_STUDY = Study(
    "efficientnet_lite0",
    (
        OODSet("near_dev", "near", "digits_8_9/test", NEAR, DEVELOPMENT, ("8a", "8b")),
        OODSet("far_dev", "far", "photo_patches/test", FAR, DEVELOPMENT, ("china",)),
        OODSet("near_report", "near", "digits_8_9/test", NEAR, REPORT, ("9a", "9b")),
        OODSet("far_report", "far", "photo_patches/test", FAR, REPORT, ("flower",)),
    ),
    TrainingSettings(width=16, blocks=2, epochs=2, lr=1e-3, batch_size=50),
    "digits/train",
    "digits/test",
    held_out=60,
    n_ood=35,
    n_filters=20,
    n_control=30,
    n_control_fit=80,
)
SMALL_RIVALS = {
    name: replace(RIVALS[name], candidates=candidates)
    for name, candidates in (
        ("mahalanobis", _candidates(Mahalanobis)),
        ("knn", _candidates(KNN, {"k": 1}, {"k": 20})),
        ("pca", _candidates(PCAResidual, {"components": 2}, {"components": 8})),
    )
}
SMALL_VARIANTS = (
    "MSE", "LR", "MFsim", "MSE at t=10, no noise", "residual Gaussian at t=10", "residual Gaussian + kNN",
    "residual Gaussian + kNN, small LFDN", "MSE, standardised LFDN",
)  # fmt: skip


@cache
def small_images(name):
    """The demo's sets, fewer of each; digits 8 and 9 in halves a and b, and patches of twice the size."""
    images = load_images(name).subset(
        {"digits/train": 200, "digits/test": 90, "digits_8_9/test": 100, "photo_patches/test": 80}[name]
    )
    if name == "digits_8_9/test":
        return replace(images, labels=[f"{label}{'ab'[i % 2]}" for i, label in enumerate(images.labels)])
    return resized(images, (16, 16)) if name == "photo_patches/test" else images


def made_features(images, encoder, *, protocol="native", id_size=None, progress=True):
    """A fixed random map of small pixels, in an encoder's place."""
    chain = resize_chain(protocol, size=images.size, id_size=id_size)
    steps = [*chain[:-1], (16, 16)]
    pixels = [np.asarray(resize(images.image(i), steps))[:, :, 0].ravel() for i in range(len(images))]
    weights = np.random.RandomState(1).randn(2, 256, sum(MADE_CHANNELS)) / 16
    values = np.einsum("np,kpc->nkc", np.tanh(np.stack(pixels) / 255.0), weights).astype(np.float32)
    rows = np.arange(len(images))
    return Features(values, rows, images.ids, images.labels, MADE_CHANNELS, None, 1.0, "cpu")


def use_small_study(patch, folder):
    """The demo is `SMALL_STUDY` until ``patch`` is undone, and its results lie under ``folder``."""
    patch.chdir(folder)
    patch.setenv("DLSR_CACHE", str(folder / "cache"))
    patch.setitem(comparison.STUDIES, "demo", (SMALL_STUDY,))
    patch.setattr(comparison, "load_images", small_images)
    patch.setattr(comparison, "get_encoder", lambda name: name)
    patch.setattr(comparison, "extract", made_features)
    patch.setattr(chapter, "lists", lambda: {"overlap": OVERLAP})
    patch.setattr(chapter, "get_encoder", lambda name: SimpleNamespace(channels=lambda: MADE_CHANNELS))
    patch.setattr(chapter, "paired_bootstrap", partial(paired_bootstrap, draws=50))
    for module in (search, chapter):
        patch.setattr(module, "RIVALS", SMALL_RIVALS)
        patch.setattr(module, "VARIANTS", {name: VARIANTS[name] for name in SMALL_VARIANTS})


class Order:
    """Which OOD sets were asked for before the choice was written, and after."""

    def __init__(self, patch):
        self.before, self.after = set(), set()
        of_ood = comparison.Data.of_ood

        def listening(data, ood, view):
            there = search.choice_file("demo").is_file()
            (self.after if there else self.before).add(ood.name)
            return of_ood(data, ood, view)

        patch.setattr(comparison.Data, "of_ood", listening)


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory):
    """The folder of a chapter that was measured once, and the order in which its sets were asked for."""
    folder = tmp_path_factory.mktemp("chapter")
    with pytest.MonkeyPatch.context() as patch:
        use_small_study(patch, folder)
        order = Order(patch)
        chapter.measured("demo", progress=False)
    return folder, order


@pytest.fixture
def small_chapter(own_place, finished_study, tmp_path, monkeypatch):
    """A copy of the measured chapter to work on."""
    folder = tmp_path / "chapter"
    shutil.copytree(finished_study[0], folder)
    use_small_study(monkeypatch, folder)
    return folder


@pytest.fixture
def fresh_chapter(own_place, tmp_path, monkeypatch):
    """The small study before anything was measured."""
    folder = tmp_path / "fresh"
    folder.mkdir()
    use_small_study(monkeypatch, folder)
    return folder
