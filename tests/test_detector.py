import errno
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import easy_features, one_sentence
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from dlsr import detector as module
from dlsr.datasets import UserError
from dlsr.detector import DLSRDetector
from dlsr.diffusion import Reconstruction, reconstruct
from dlsr.metrics import auroc
from dlsr.scores import lr, mfsim, mse

CHANNELS = (16, 16)
ID, OOD = easy_features(300)
ID_TEST, _ = easy_features(100, seed=1)
SMALL = {
    "width": 32, "blocks": 2, "epochs": 15, "lr": 3e-3, "batch_size": 32, "device": "cpu",
}  # fmt: skip
TINY = SMALL | {"width": 8, "blocks": 1, "epochs": 2}


@pytest.fixture(scope="module")
def fitted():
    return DLSRDetector(CHANNELS, **SMALL).fit(ID)


@pytest.fixture
def saved(fitted, tmp_path):
    fitted.save(tmp_path / "detector", about={"encoder": "fake"})
    return tmp_path / "detector"


# scikit-learn's contract


def test_parameters_are_read_set_and_cloned():
    detector = DLSRDetector(CHANNELS, score="mse", t=5, seed=3)
    parameters = detector.get_params()
    assert parameters["channels"] == CHANNELS
    assert (parameters["score"], parameters["t"], parameters["seed"]) == ("mse", 5, 3)
    twin = clone(detector)
    assert twin is not detector
    assert twin.get_params() == parameters
    assert twin.set_params(t=7, epochs=1).get_params() == parameters | {"t": 7, "epochs": 1}


def test_the_defaults_are_the_papers():
    parameters = DLSRDetector().get_params()
    expected = {
        "score": "mfsim", "layers": "2..M", "reconstruction": "released", "t": 3, "noise_draws": 1,
        "width": 1440, "blocks": 16, "epochs": 150, "lr": 1e-4, "weight_decay": 1e-4, "batch_size": 128,
    }  # fmt: skip
    assert {name: parameters[name] for name in expected} == expected


def test_nothing_is_checked_or_changed_before_fit():
    assert DLSRDetector(score="nonsense", t=-1).score == "nonsense"


def test_fit_returns_itself_and_does_not_change_parameters(fitted):
    detector = DLSRDetector(CHANNELS, **TINY)
    before = detector.get_params()
    assert detector.fit(ID, np.zeros(300)) is detector
    assert detector.get_params() == before
    assert detector.n_features_in_ == 32
    assert detector.channels_ == CHANNELS


def test_signs_and_threshold(fitted):
    scores = fitted.ood_score(ID_TEST)
    assert scores.shape == (100,)
    np.testing.assert_array_equal(fitted.score_samples(ID_TEST), -scores)
    np.testing.assert_allclose(fitted.decision_function(ID_TEST), fitted.threshold_ - scores)
    verdicts = fitted.predict(ID_TEST)
    assert set(verdicts) == {1, -1}
    np.testing.assert_array_equal(verdicts == 1, scores <= fitted.threshold_)


def test_an_image_at_the_threshold_is_id(fitted):
    detector = DLSRDetector(CHANNELS, **SMALL)
    detector.trained_, detector.channels_, detector.n_features_in_ = fitted.trained_, CHANNELS, 32
    scores = detector.ood_score(ID_TEST)
    detector.threshold_ = float(np.sort(scores)[70])
    assert (detector.predict(ID_TEST) == 1).sum() == 71


def test_it_works_in_a_pipeline_and_by_fit_predict():
    pipeline = make_pipeline(FunctionTransformer(), DLSRDetector(CHANNELS, **TINY))
    verdicts = pipeline.fit(ID).predict(ID_TEST)
    np.testing.assert_array_equal(verdicts, DLSRDetector(CHANNELS, **TINY).fit(ID).predict(ID_TEST))
    assert set(DLSRDetector(CHANNELS, **TINY).fit_predict(ID)) <= {1, -1}


def test_a_detector_that_is_not_fitted_says_so():
    for method in ("ood_score", "score_samples", "decision_function", "predict"):
        with pytest.raises(NotFittedError):
            getattr(DLSRDetector(CHANNELS), method)(ID)
    with pytest.raises(NotFittedError):
        DLSRDetector(CHANNELS).save("nowhere")


# Threshold


def test_the_threshold_is_the_95th_percentile_of_held_out_images(monkeypatch):
    trained_on, held_out = [], []
    train, score = module.train, DLSRDetector.ood_score
    monkeypatch.setattr(module, "train", lambda z, *a, **k: (trained_on.append(z), train(z, *a, **k))[1])
    monkeypatch.setattr(DLSRDetector, "ood_score", lambda self, z: (held_out.append(z), score(self, z))[1])
    detector = DLSRDetector(CHANNELS, **TINY, calibration_fraction=0.2).fit(ID)
    assert (len(trained_on[0]), len(held_out[0])) == (240, 60)
    rows = {tuple(row) for row in trained_on[0].tolist()} | {tuple(row) for row in held_out[0].tolist()}
    assert rows == {tuple(row) for row in ID.tolist()}
    assert detector.threshold_ == pytest.approx(np.quantile(detector.ood_score(held_out[0]), 0.95))


def test_about_95_percent_of_id_is_accepted_and_ood_is_not():
    detector = DLSRDetector(CHANNELS, **SMALL, calibration_fraction=0.5).fit(easy_features(600)[0])
    assert 0.85 < (detector.predict(easy_features(300, seed=1)[0]) == 1).mean() < 1
    assert (detector.predict(OOD) == -1).mean() > 0.9


def test_without_calibration_images_predict_is_refused_by_a_sentence():
    detector = DLSRDetector(CHANNELS, **TINY, calibration_fraction=0).fit(ID)
    assert detector.threshold_ is None
    assert np.isfinite(detector.ood_score(ID_TEST)).all()
    for method in (detector.predict, detector.decision_function):
        with pytest.raises(UserError, match="calibration_fraction above 0") as error:
            method(ID_TEST)
        one_sentence(error)
    detector.threshold_ = 0.0
    assert set(detector.predict(ID_TEST)) <= {1, -1}


# Scores


@pytest.mark.parametrize("score", ["mse", "mfsim"])
@pytest.mark.parametrize("way", [{}, {"reconstruction": "one_step", "t": 30}], ids=str)
def test_far_images_score_higher(score, way):
    detector = DLSRDetector(CHANNELS, **SMALL, score=score, **way).fit(ID)
    assert auroc(detector.ood_score(ID_TEST), detector.ood_score(OOD)) > 0.9


def test_each_score_is_what_its_function_says(fitted):
    def reconstruction(network, seed):
        return reconstruct(network, ID_TEST, Reconstruction("released", 3), seed=seed)

    last = reconstruction(fitted.trained_.network, 0)
    first = reconstruction(fitted.trained_.first_epoch, 1_000_003)
    expected = {
        ("mfsim", "2..M"): mfsim(ID_TEST, last, CHANNELS, layers="2..M"),
        ("mfsim", "all"): mfsim(ID_TEST, last, CHANNELS, layers="all"),
        ("mse", "2..M"): mse(ID_TEST, last),
        ("lr", "2..M"): lr(ID_TEST, first, last),
    }
    for (score, layers), values in expected.items():
        detector = DLSRDetector(CHANNELS, **SMALL, score=score, layers=layers)
        detector.trained_, detector.channels_, detector.n_features_in_ = fitted.trained_, CHANNELS, 32
        np.testing.assert_array_equal(detector.ood_score(ID_TEST), values)


def test_lr_can_be_fitted():
    detector = DLSRDetector(CHANNELS, **TINY, score="lr").fit(ID)
    scores = detector.ood_score(ID_TEST)
    assert np.isfinite(scores).all()
    assert scores.std() > 0


def test_scores_are_repeatable_and_follow_the_seed(fitted):
    np.testing.assert_array_equal(fitted.ood_score(ID_TEST), fitted.ood_score(ID_TEST))
    one, twin, other = (DLSRDetector(CHANNELS, **TINY, seed=seed).fit(ID) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.ood_score(ID_TEST), twin.ood_score(ID_TEST))
    assert not np.array_equal(one.ood_score(ID_TEST), other.ood_score(ID_TEST))


def test_without_channels_all_is_one_layer():
    detector = DLSRDetector(score="mse", **TINY).fit(ID)
    assert detector.channels_ == (32,)
    with pytest.raises(UserError, match="at least two layers"):
        DLSRDetector(**TINY).fit(ID)


# What is refused


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"score": "likelihood"}, "mse, lr, mfsim"),
        ({"layers": "last"}, "2..M, all"),
        ({"reconstruction": "ddpm"}, "released, paper, one_step"),
        ({"t": 100}, "1..99"),
        ({"noise_draws": 2}, "one_step"),
        ({"calibration_fraction": 1.0}, "calibration_fraction=1.0"),
        ({"calibration_fraction": -0.1}, "calibration_fraction=-0.1"),
        ({"width": 7}, "even width"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 300}, "one batch of 300"),
    ],
    ids=str,
)
def test_impossible_parameters_are_refused_by_fit(wrong, told):
    with pytest.raises(UserError, match=told.replace(".", r"\.")) as error:
        DLSRDetector(CHANNELS, **TINY | wrong).fit(ID)
    one_sentence(error)


def test_another_width_is_refused(fitted):
    with pytest.raises(UserError, match=r"\(300, 31\).*\(images, 32\)"):
        DLSRDetector(CHANNELS, **TINY).fit(ID[:, 1:])
    with pytest.raises(UserError, match="fitted on 32 features"):
        fitted.ood_score(ID[:, 1:])
    with pytest.raises(UserError, match="fitted on 32 features"):
        fitted.predict(ID[0])


def test_nan_is_refused_with_a_count(fitted):
    z = ID.copy()
    z[[1, 7, 8], 3] = [np.nan, np.inf, np.nan]
    for method in (fitted.ood_score, DLSRDetector(CHANNELS, **TINY, calibration_fraction=0).fit):
        with pytest.raises(UserError, match="3 of 300"):
            method(z)


# On disk


def test_saving_and_loading_changes_no_score(fitted, saved):
    loaded = DLSRDetector.load(saved, device="cpu")
    np.testing.assert_array_equal(loaded.ood_score(ID_TEST), fitted.ood_score(ID_TEST))
    assert loaded.get_params() == fitted.get_params()
    assert loaded.threshold_ == fitted.threshold_
    assert loaded.channels_ == fitted.channels_
    assert loaded.about_ == {"encoder": "fake"}
    assert loaded.trained_.losses == fitted.trained_.losses
    assert clone(loaded).get_params() == fitted.get_params()


def test_lr_needs_both_networks_after_loading(tmp_path):
    detector = DLSRDetector(CHANNELS, **TINY, score="lr").fit(ID)
    detector.save(tmp_path / "detector")
    loaded = DLSRDetector.load(tmp_path / "detector", device="cpu")
    np.testing.assert_array_equal(loaded.ood_score(ID_TEST), detector.ood_score(ID_TEST))


def test_no_pickle_is_written(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["detector.json", "network.safetensors"]
    content = json.loads((saved / "detector.json").read_text())
    assert content["parameters"]["width"] == 32
    assert set(content["versions"]) == {"dlsr", "torch", "python"}


def test_parameters_of_numpys_types_can_be_saved(tmp_path):
    """As a parameter search or a shape gives them: better found before a long fit than after."""
    channels = tuple(np.array(CHANNELS))
    detector = DLSRDetector(channels, **TINY | {"epochs": np.int64(1)}).fit(ID)
    detector.save(tmp_path / "detector")
    loaded = DLSRDetector.load(tmp_path / "detector", device="cpu")
    np.testing.assert_array_equal(loaded.ood_score(ID_TEST), detector.ood_score(ID_TEST))


@pytest.mark.parametrize("name", ["network.safetensors", "detector.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_cut_short_is_refused(name, share, saved):
    file = saved / name
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(UserError, match="no whole detector") as error:
        DLSRDetector.load(saved)
    assert str(saved) in one_sentence(error)


def test_a_network_of_another_detector_is_refused(saved, tmp_path):
    DLSRDetector(CHANNELS, **TINY).fit(ID).save(tmp_path / "other")
    (tmp_path / "other" / "network.safetensors").replace(saved / "network.safetensors")
    with pytest.raises(UserError, match="another detector"):
        DLSRDetector.load(saved)


def test_another_format_is_refused_by_its_version(saved):
    content = json.loads((saved / "detector.json").read_text()) | {"format": 99}
    (saved / "detector.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="format 99"):
        DLSRDetector.load(saved)


def test_a_folder_without_a_detector_is_refused(tmp_path):
    with pytest.raises(UserError, match="no whole detector") as error:
        DLSRDetector.load(tmp_path)
    one_sentence(error)


def test_a_full_disk_leaves_the_old_detector(fitted, saved, monkeypatch):
    def disk_full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", disk_full)
        with pytest.raises(UserError, match="No space left"):
            fitted.save(saved)
    assert DLSRDetector.load(saved, device="cpu").threshold_ == fitted.threshold_
    assert len(list(saved.iterdir())) == 2
