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
    both = np.concatenate([ID_TEST, OOD])
    p, samples = detector.p_values(both), detector.score_samples(both)
    np.testing.assert_array_equal(samples, p)
    np.testing.assert_allclose(detector.decision_function(both), samples - detector.offset_)
    np.testing.assert_array_equal(detector.predict(both) == -1, p <= 0.05)
    np.testing.assert_array_equal(detector.predict(both) == -1, p <= detector.threshold_)


def test_a_detector_that_is_not_fitted_says_so():
    for method in ("ood_score", "score_samples", "decision_function", "predict", "save"):
        with pytest.raises(NotFittedError):
            getattr(DLSRDetector(CHANNELS), method)(ID)


# P-values


@EVERY_METHOD
def test_p_values_count_held_out_images_that_score_as_high(method, monkeypatch):
    """Each fold's model saw none of its images; networks have one fold."""
    name = {"gaussian": "fit_gaussian", "knn": "fit_knn"}.get(method, "train")
    fitted, real = [], getattr(module, name)
    spy = lambda z, **options: (fitted.append(z), real(z, **options))[1]  # noqa: E731
    monkeypatch.setattr(module, name, spy)
    detector = tiny(method, k=5, folds=4, calibration_fraction=0.25).fit(ID)
    fold, calibration = detector.arrays_["fold"], detector.arrays_["calibration"]
    if method in ("mse", "mfsim"):
        assert [len(z) for z in fitted] == [225]
        held_out = [row for row in ID.tolist() if row not in fitted[0].tolist()]
        np.testing.assert_array_equal(np.sort(detector.ood_score(held_out)), np.sort(calibration))
        scores = detector.ood_score(ID_TEST)
        by_hand = [(1 + (calibration >= score).sum()) / 76 for score in scores]
    else:
        assert [len(z) for z in fitted] == ([300] + [225] * 4 if method == "gaussian" else [300])
        counts = np.ones(100)
        for f in range(4):
            rows = np.flatnonzero(fold == f)
            fit = fit_gaussian if method == "gaussian" else lambda z: fit_knn(z, k=5)
            model = fit(ID[fold != f])
            scores, others = model(ID_TEST), model(ID[rows])
            counts += (others[:, None] >= scores).sum(0)
        by_hand = counts / 301
    np.testing.assert_allclose(detector.p_values(ID_TEST), by_hand, atol=1.1 / 301)
    assert (detector.p_values(ID_TEST) == by_hand).mean() > 0.95  # up to rounding at ties


@EVERY_METHOD
def test_about_95_percent_of_id_is_accepted_and_ood_is_not(method):
    detector = DLSRDetector(CHANNELS, **SMALL, method=method, calibration_fraction=0.5)
    detector.fit(easy_features(600)[0])
    assert 0.85 < (detector.predict(easy_features(300, seed=1)[0]) == 1).mean() < 1
    assert (detector.predict(OOD) == -1).mean() > 0.8
    assert auroc(detector.ood_score(ID_TEST), detector.ood_score(OOD)) > 0.9


@pytest.mark.parametrize("method", ["gaussian", "knn"])
@pytest.mark.parametrize("n", [30, 60])
def test_no_more_familiar_images_are_flagged_than_the_rate_says(method, n):
    """Over draws of familiar and new images alike the share is at most 5 % plus 3 errors."""
    draws = [easy_features(n + 40, seed=seed)[0] for seed in range(40)]
    flags = [(tiny(method).fit(z[:n]).predict(z[n:]) == -1).mean() for z in draws]
    assert np.mean(flags) <= 0.05 + 3 * np.std(flags) / np.sqrt(len(flags))


def test_more_may_be_flagged_and_too_few_images_flag_nothing():
    rates = [(tiny(flag_rate=rate).fit(ID).predict(ID_TEST) == -1).mean() for rate in (0.01, 0.2)]
    assert rates[0] < 0.05 < 0.1 < rates[1]
    few = tiny().fit(ID[:18])
    assert (few.threshold_, few.predict(OOD).min()) == (0, 1)
    assert tiny().fit(ID[:19]).predict(OOD).min() == -1


# Scores


def test_each_score_is_what_its_function_says():
    for method, score in (("gaussian", fit_gaussian(ID)), ("knn", fit_knn(ID, k=7))):
        scores = tiny(method, k=7).fit(ID).ood_score(ID_TEST)
        np.testing.assert_allclose(scores, score(ID_TEST), rtol=1e-6)
    detector = tiny("mse").fit(ID)
    noise = fixed_noise(4, 32, seed=0)
    back = reconstruct(detector.score_.keywords["network"], ID_TEST, ddim_released, t=3, noise=noise)
    np.testing.assert_allclose(detector.ood_score(ID_TEST), mse(ID_TEST, back), rtol=1e-5)
    for layers in ("2..M", "all"):
        scores = tiny("mfsim", layers=layers).fit(ID).ood_score(ID_TEST)
        expected = mfsim(ID_TEST, back, CHANNELS, layers=layers)
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


@EVERY_METHOD
def test_an_images_score_depends_on_no_other_image_and_not_on_its_place(method):
    detector = tiny(method).fit(ID)
    order = np.random.RandomState(0).permutation(100)
    for values in (detector.ood_score, detector.p_values, detector.score_samples):
        found = values(ID_TEST)
        np.testing.assert_array_equal(values(ID_TEST[order]), found[order])
        mixed = values(np.concatenate([OOD, ID_TEST]))[-100:]
        np.testing.assert_array_equal(mixed, found)
        alone = [values(ID_TEST[[i]])[0] for i in range(0, 100, 9)]
        np.testing.assert_array_equal(alone, found[::9])


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
    assert detector.threshold_ == 0
    assert np.isfinite(detector.p_values(OOD)).all()


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
        ({"flag_rate": 5}, "5 was given as flag_rate"),
        ({"folds": 1}, "folds=1"),
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
    with pytest.raises(UserError, match="not copies of one"):
        tiny().fit(np.repeat(ID[:1], 40, axis=0))


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
    np.testing.assert_array_equal(loaded.p_values(OOD), detector.p_values(OOD))
    assert (loaded.threshold_, loaded.offset_) == (detector.threshold_, detector.offset_)
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
    monkeypatch.setattr(module, "FORMAT", 5)
    with pytest.raises(UserError, match="has the format 4, 5 is needed"):
        DLSRDetector.load(saved[0])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("calibration", lambda a: a[:-1]),
        ("calibration", lambda a: np.full_like(a, np.nan)),
        ("fold", lambda a: a - 1),
        ("fold", lambda a: a.astype(np.float32)),
        ("location", lambda a: a[:-1]),
        ("precision", lambda a: a * np.inf),
        ("fold_precision", lambda a: a[:-1]),
        ("flag_rate", lambda a: 2),
        ("method", lambda a: "knn"),
        ("channels", lambda a: 7),
    ],
)
def test_arrays_that_do_not_fit_are_refused_also_with_a_right_checksum(name, change, tmp_path):
    detector = tiny().fit(ID)
    place = detector.arrays_ if name in detector.arrays_ else detector.settings_
    with np.errstate(invalid="ignore"):
        place[name] = change(place[name])
    detector.save(tmp_path / "detector")
    with pytest.raises(UserError, match="is no detector") as error:
        DLSRDetector.load(tmp_path / "detector")
    one_sentence(error)


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
