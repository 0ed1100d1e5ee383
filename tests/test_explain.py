"""Explanations on tiny arrays and a tiny encoder."""

import numpy as np
import pandas as pd
import pytest
import torch
from dlsr import explain
from dlsr.baselines import fit_gaussian, fit_knn, nearest
from dlsr.data import ImageSet
from dlsr.errors import UserError
from sklearn.preprocessing import normalize

from conftest import ROOT, easy_features

CHANNELS = (16, 10, 6)


class FakeMaps(torch.nn.Module):
    """An encoder of two maps, 28x28 and 14x14: mean colours of squares."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((3,), 128.0))
        self.register_buffer("std", torch.full((3,), 64.0))

    def maps(self, pixels):
        x = ((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2)
        return [torch.nn.functional.avg_pool2d(x, size) for size in (8, 16)]


def pictures(n, *, seed=0):
    """Return n images of low contrast."""
    pixels = np.random.RandomState(seed).randint(100, 140, (n, 224, 224, 3)).astype(np.uint8)
    return ImageSet("pictures", [f"{i}.png" for i in range(n)], [""] * n, list(pixels), (224, 224))


def test_the_parts_of_a_gaussian_sum_to_its_score():
    (inside, outside), new = easy_features(200), easy_features(30, seed=1)
    score = fit_gaussian(inside)
    for z0 in (inside, outside, *new):
        parts = explain.gaussian_parts(z0, channels=CHANNELS, **score.keywords)
        assert parts.shape == (len(z0), 3)
        assert (parts >= 0).all()
        np.testing.assert_allclose(parts.sum(1), score(z0), rtol=1e-4)


def test_independent_layers_have_their_own_distances():
    rng = np.random.RandomState(0)
    blocks = [np.cov(rng.randn(width, 50)) for width in CHANNELS]
    precision = np.zeros((32, 32))
    ends = np.cumsum((0, *CHANNELS))
    z0, expected = rng.randn(5, 32), []
    for block, start, end in zip(blocks, ends, ends[1:], strict=False):
        precision[start:end, start:end] = np.linalg.inv(block)
        part = z0[:, start:end]
        expected.append(((part @ np.linalg.inv(block)) * part).sum(1))
    parts = explain.gaussian_parts(z0, location=np.zeros(32), precision=precision, channels=CHANNELS)
    np.testing.assert_allclose(parts, np.stack(expected, 1), rtol=1e-4)


def test_the_parts_of_knn_sum_to_its_squared_score():
    inside, outside = easy_features(40)
    score = fit_knn(inside, k=4)
    parts = explain.knn_parts(outside, channels=CHANNELS, **score.keywords)
    np.testing.assert_allclose(parts.sum(1), score(outside) ** 2, rtol=1e-4)


@pytest.mark.parametrize("method", ["gaussian", "knn"])
def test_shares_sum_to_one_and_name_the_strange_layer(method):
    inside, _ = easy_features(200)
    new = inside[:5].copy()
    new[:, 16:26] += 3 * np.random.RandomState(2).randn(5, 10)
    arrays = {"gaussian": fit_gaussian(inside).keywords, "knn": fit_knn(inside, k=5).keywords}[method]
    settings = {"method": method, "channels": CHANNELS, "k": 5}
    shares = explain.layer_shares(settings, arrays | {"calibration": np.zeros(3)}, new)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    assert (shares.argmax(1) == 1).all()


def test_other_methods_have_no_shares():
    assert explain.layer_shares({"method": "mfsim"}, {}, np.zeros((1, 3))) is None


def test_nearest_familiar_vectors_are_those_of_the_largest_cosine():
    inside, outside = easy_features(20)
    apart, rows = nearest(np.stack([2 * inside[7], outside[0]]), normalize(inside), k=3)
    assert rows[0, 0] == 7 and apart[0, 0] == pytest.approx(0, abs=1e-3)
    unit = inside / np.linalg.norm(inside, axis=1, keepdims=True)
    cosines = unit @ (outside[0] / np.linalg.norm(outside[0]))
    assert rows[1].tolist() == np.argsort(-cosines)[:3].tolist()
    np.testing.assert_allclose(1 - apart[1] ** 2 / 2, np.sort(cosines)[::-1][:3], rtol=1e-4)


def test_the_strange_position_is_the_highest_of_the_map():
    encoder, familiar, new = FakeMaps(), pictures(8), pictures(3, seed=1)
    corners = [(0, 0), (5, 9), (13, 13)]
    for pixels, (y, x) in zip(new.source, corners, strict=True):
        pixels[16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = (255, 0, 0)
    options = {"batch_size": 3, "progress": False}
    vectors = explain.sample_positions(explain.position_vectors(encoder, familiar, **options), 8)
    score = explain.fit_positions(vectors)
    heat = explain.heat_maps(explain.position_vectors(encoder, new, **options), score)
    assert heat.shape == (3, 14, 14)
    found = [np.unravel_index(one.argmax(), one.shape) for one in heat]
    assert found == corners
    assert all(one.max() > 2 for one in heat) and np.median(heat) < 1


def test_positions_come_in_batches_of_both_maps():
    batches = list(
        explain.position_vectors(FakeMaps(), pictures(5), batch_size=2, device="cpu", progress=False)
    )
    assert [batch.shape for batch in batches] == [(2, 14, 14, 6)] * 2 + [(1, 14, 14, 6)]
    (last,) = explain.position_vectors(FakeMaps(), pictures(1), maps=1, progress=False)
    np.testing.assert_allclose(last[0], batches[0][0, ..., 3:], rtol=1e-5)


def test_a_sample_is_bounded_and_repeats():
    batch = np.random.RandomState(0).randn(5, 14, 14, 3).astype(np.float32)
    first, again = (explain.sample_positions([batch], 5, n=50, seed=1) for _ in range(2))
    assert first.shape == (5, 10, 3) and (first == again).all()
    assert explain.sample_positions([batch], 5).shape == (5, 196, 3)


def test_an_image_that_cannot_be_read_is_named():
    images = ImageSet("set", ["a.png"], [""], [b"no image"])
    with pytest.raises(UserError, match=r"a\.png"):
        list(explain.position_vectors(FakeMaps(), images, progress=False))


def test_what_is_said_of_the_heat_map_was_measured():
    table = pd.read_csv(ROOT / "benchmarks" / "heat_map.csv")
    rows = table[table["chosen"] & (table["familiar"] == "same class")].set_index("set")
    textures, scenes = (round(100 * rows["found"][key]) for key in ("textures/test", "scenes/test"))
    assert rows["way"].unique() == ["one Gaussian"] and rows["maps"].unique() == ["both"]
    assert f"{textures} of 100 textures" in explain.__doc__
    assert f"only in {scenes} of\n100 scenes; chance is {100 * rows['chance'].iloc[0]:.0f}" in explain.__doc__
    assert f"in {scenes} of 100." in (ROOT / "dlsr" / "report.html").read_text("utf-8")
