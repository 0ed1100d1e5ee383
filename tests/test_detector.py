import os
import re
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from dlsr import detector as module
from dlsr.baselines import fit_gaussian, fit_knn
from dlsr.detector import METHODS, DLSRDetector
from dlsr.diffusion import ddim_released, fixed_noise, reconstruct
from dlsr.errors import UserError
from dlsr.metrics import auroc
from dlsr.scores import mfsim, mse
from safetensors.numpy import save_file
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from conftest import easy_features, one_sentence

CHANNELS = (16, 16)
ID, OOD = easy_features(300)
ID_TEST, _ = easy_features(100, seed=1)
SMALL = {"width": 32, "blocks": 2, "epochs": 15, "lr": 3e-3, "batch_size": 32, "device": "cpu"}
TINY = SMALL | {"width": 8, "blocks": 1, "epochs": 2}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)


def tiny(method="gaussian", **settings):
    return DLSRDetector(CHANNELS, **TINY | {"method": method} | settings)


@pytest.fixture
def saved(tmp_path):
    """The file of a saved detector, and the detector."""
    detector = tiny("mse").fit(ID)
    detector.save(tmp_path / "detector", about={"encoder": "fake"})
    return tmp_path / "detector", detector


# scikit-learn's contract


@parametrize_with_checks([DLSRDetector()])
def test_default_construction_passes_scikit_learns_checks(estimator, check):
    check(estimator)


@EVERY_METHOD
def test_signs_threshold_and_offset(method):
    detector = tiny(method)
    before = detector.get_params()
    assert detector.fit(ID, np.zeros(300)) is detector
    assert detector.get_params() == before
    scores = detector.ood_score(ID_TEST)
    assert scores.shape == (100,)
    np.testing.assert_array_equal(detector.score_samples(ID_TEST), -scores)
    decision = detector.decision_function(ID_TEST)
    np.testing.assert_allclose(decision, detector.threshold_ - scores, rtol=1e-6)
    detector.threshold_ = float(np.sort(scores)[70])  # an image at the threshold is ID
    assert (detector.predict(ID_TEST) == 1).sum() == 71
    np.testing.assert_array_equal(detector.predict(ID_TEST) == 1, scores <= detector.threshold_)


def test_a_detector_that_is_not_fitted_says_so():
    for method in ("ood_score", "score_samples", "decision_function", "predict", "save"):
        with pytest.raises(NotFittedError):
            getattr(DLSRDetector(CHANNELS), method)(ID)


# The threshold


def test_the_threshold_is_the_95th_percentile_of_held_out_images(monkeypatch):
    fitted = []
    spy = lambda z: (fitted.append(z), fit_gaussian(z))[1]  # noqa: E731
    monkeypatch.setattr(module, "fit_gaussian", spy)
    detector = tiny(calibration_fraction=0.2).fit(ID)
    assert len(fitted[0]) == 240
    held_out = [row for row in ID.tolist() if row not in fitted[0].tolist()]
    assert len(held_out) == 60
    by_hand = np.quantile(detector.ood_score(np.array(held_out)), 0.95)
    assert detector.threshold_ == pytest.approx(by_hand)


@EVERY_METHOD
def test_about_95_percent_of_id_is_accepted_and_ood_is_not(method):
    detector = DLSRDetector(CHANNELS, **SMALL, method=method, calibration_fraction=0.5)
    detector.fit(easy_features(600)[0])
    assert 0.85 < (detector.predict(easy_features(300, seed=1)[0]) == 1).mean() < 1
    assert (detector.predict(OOD) == -1).mean() > 0.8
    assert auroc(detector.ood_score(ID_TEST), detector.ood_score(OOD)) > 0.9


# Scores


def test_each_score_is_what_its_function_says():
    order = np.random.RandomState(0).permutation(300)
    z = ID[np.sort(order[30:])]
    for method, score in (("gaussian", fit_gaussian(z)), ("knn", fit_knn(z, k=7))):
        expected = score(ID_TEST)
        np.testing.assert_array_equal(tiny(method, k=7).fit(ID).ood_score(ID_TEST), expected)
    detector = tiny("mse").fit(ID)
    noise = fixed_noise(4, 32, seed=0)
    back = reconstruct(detector.score_.keywords["network"], ID_TEST, ddim_released, t=3, noise=noise)
    np.testing.assert_array_equal(detector.ood_score(ID_TEST), mse(ID_TEST, back))
    for layers in ("2..M", "all"):
        scores = tiny("mfsim", layers=layers).fit(ID).ood_score(ID_TEST)
        np.testing.assert_array_equal(scores, mfsim(ID_TEST, back, CHANNELS, layers=layers))


@EVERY_METHOD
def test_an_images_score_depends_on_no_other_image_and_not_on_its_place(method):
    detector = tiny(method).fit(ID)
    scores = detector.ood_score(ID_TEST)
    order = np.random.RandomState(0).permutation(100)
    np.testing.assert_allclose(detector.ood_score(ID_TEST[order]), scores[order], rtol=1e-5)
    mixed = detector.ood_score(np.concatenate([OOD, ID_TEST]))[-100:]
    np.testing.assert_allclose(mixed, scores, rtol=1e-5)
    alone = [detector.ood_score(ID_TEST[[i]])[0] for i in range(0, 100, 9)]
    np.testing.assert_allclose(alone, scores[::9], rtol=1e-5)


def test_the_seed_fixes_the_scores():
    one, twin, other = (tiny("mse", seed=s).fit(ID).ood_score(ID_TEST) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, twin)
    assert not np.array_equal(one, other)


@EVERY_METHOD
def test_setting_parameters_changes_no_fitted_detector(method, tmp_path):
    detector = tiny(method).fit(ID)
    scores = detector.ood_score(ID_TEST)
    detector.set_params(channels=(8, 24), method="knn", t=9, k=3, seed=5, layers="all", width=64)
    np.testing.assert_array_equal(detector.ood_score(ID_TEST), scores)
    detector.save(tmp_path / "detector")
    loaded = DLSRDetector.load(tmp_path / "detector", device="cpu")
    np.testing.assert_array_equal(loaded.ood_score(ID_TEST), scores)


@EVERY_METHOD
@pytest.mark.parametrize("n", [3, 10])
def test_few_images_are_enough(method, n):
    detector = DLSRDetector(**TINY, method=method).fit(ID[:n])
    assert np.isfinite(detector.ood_score(OOD)).all()
    assert np.isfinite(detector.threshold_)


# What is refused


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"method": "lr"}, "gaussian, knn, mse, mfsim"),
        ({"method": "mfsim", "layers": "last"}, "2..M"),
        ({"method": "mse", "t": 100}, "1 to 99"),
        ({"method": "knn", "k": 0}, "k=0"),
        ({"calibration_fraction": 1.0}, "calibration_fraction=1.0"),
        ({"calibration_fraction": 0}, "calibration_fraction=0"),
        ({"method": "mse", "width": 7}, "even width"),
        ({"method": "mse", "epochs": 0}, "epochs"),
        ({"channels": (16, 15)}, "channels=(16, 15)"),
    ],
    ids=str,
)
def test_impossible_parameters_are_refused_by_fit(wrong, told):
    with pytest.raises(UserError, match=re.escape(told)) as error:
        tiny().set_params(**wrong).fit(ID)
    one_sentence(error)


def test_impossible_vectors_are_refused():
    detector, broken = tiny().fit(ID), ID.copy()
    broken[[1, 7, 8], 3] = [np.nan, np.inf, np.nan]
    for method in (detector.ood_score, tiny().fit):
        with pytest.raises(UserError, match="3 of 300"):
            method(broken)
    with pytest.raises(UserError, match=r"31 features.*32"):
        detector.predict(ID[:, 1:])
    for n, told in ((1, "minimum of 2"), (2, "3 vectors or more")):
        with pytest.raises(UserError, match=told):
            tiny().fit(ID[:n])


# On disk


@EVERY_METHOD
def test_saving_and_loading_changes_no_bit(method, tmp_path):
    # Numbers of numpy's types come out of a parameter search or a shape.
    detector = DLSRDetector(np.array(CHANNELS), **TINY | {"method": method, "t": np.int64(3)})
    detector.fit(ID).save(tmp_path / "new" / "detector", about={"encoder": "fake"})
    state = torch.random.get_rng_state()
    loaded = DLSRDetector.load(tmp_path / "new" / "detector", device="cpu")
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(loaded.ood_score(ID_TEST), detector.ood_score(ID_TEST))
    np.testing.assert_array_equal(loaded.predict(OOD), detector.predict(OOD))
    assert loaded.threshold_ == detector.threshold_
    assert loaded.get_params() | {"channels": CHANNELS} == tiny(method).get_params()
    assert loaded.about_ == {"encoder": "fake"}
    assert set(loaded.versions_) == {"dlsr", "torch"}
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "new" / "detector").read_bytes()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["detector"]


def test_a_flipped_byte_anywhere_and_a_file_cut_short_are_refused(saved):
    file, _ = saved
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    places = [*range(0, header, 37), *range(header, len(whole), 501), len(whole) - 1]
    flipped = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in places]
    short = [whole[: int(share * len(whole))] for share in (0.0, 0.01, 0.5, 0.99)]
    for damaged in flipped + short:
        file.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            DLSRDetector.load(file)
        one_sentence(error)


def test_what_is_no_detector_of_this_version_is_refused(saved, tmp_path, monkeypatch):
    save_file({"a": np.zeros(2)}, tmp_path / "other.safetensors")
    for name, told in (("other.safetensors", "not dlsr's"), ("nowhere", "not dlsr's"), ("", "not dlsr's")):
        with pytest.raises(UserError, match=told) as error:
            DLSRDetector.load(tmp_path / name)
        one_sentence(error)
    monkeypatch.setattr(module, "FORMAT", 3)
    with pytest.raises(UserError, match="has the format 2, 3 is needed"):
        DLSRDetector.load(saved[0])


KILLED = """
import os, signal, sys, numpy as np
from pathlib import Path
from dlsr.detector import DLSRDetector
def half(path, content, write=Path.write_bytes):
    write(path, content[: len(content) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
Path.write_bytes = half
DLSRDetector(method="knn").fit(np.random.rand(9, 4)).save(sys.argv[1])
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_save_that_is_killed_half_way_leaves_the_old_detector(saved):
    file, detector = saved
    ended = subprocess.run([sys.executable, "-c", KILLED, str(file)], check=False)
    assert ended.returncode == -signal.SIGKILL
    loaded = DLSRDetector.load(file, device="cpu")
    np.testing.assert_array_equal(loaded.ood_score(ID_TEST), detector.ood_score(ID_TEST))
