import json

import numpy as np
import pytest
from conftest import ROOT, easy_features, one_sentence
from sklearn.base import clone

from dlsr.datasets import UserError
from dlsr.metrics import auroc
from dlsr.recommended import RECOMMENDED, VECTORS, RecommendedDetector, load_detector
from dlsr.variants import VARIANTS

CHANNELS = (8, 8, 8, 8)
ID, OOD = easy_features(300, channels=CHANNELS)
ID_TEST, _ = easy_features(100, seed=1, channels=CHANNELS)
SMALL = {"width": 32, "blocks": 2, "epochs": 15, "lr": 3e-3, "batch_size": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def fitted():
    return RecommendedDetector(CHANNELS, **SMALL).fit(ID)


def test_it_is_what_the_search_chose():
    file = ROOT / "results" / "choice.json"
    if not file.is_file():
        pytest.skip("the search was not run yet: there is no results/choice.json")
    assert json.loads(file.read_text())["score"] == RECOMMENDED
    assert VARIANTS[RECOMMENDED].network == "base"


def test_parameters_are_read_and_cloned():
    detector = RecommendedDetector(CHANNELS, width=64, seed=3)
    assert clone(detector).get_params() == detector.get_params()
    assert "score" not in detector.get_params()
    assert detector.get_params()["variant"] == RECOMMENDED


def test_it_tells_ood_from_id(fitted):
    assert auroc(fitted.ood_score(ID_TEST), fitted.ood_score(OOD)) > 0.9
    assert np.array_equal(fitted.score_samples(OOD), -fitted.ood_score(OOD))
    assert (fitted.predict(OOD) == -1).mean() > 0.5
    held_out_passed = (fitted.predict(ID_TEST) == 1).mean()
    assert held_out_passed > 0.7


def test_fitted_again_it_scores_the_same(fitted):
    again = RecommendedDetector(CHANNELS, **SMALL).fit(ID)
    assert np.array_equal(again.ood_score(OOD), fitted.ood_score(OOD))
    assert again.threshold_ == fitted.threshold_


def test_saved_and_loaded_it_scores_the_same(fitted, tmp_path):
    fitted.save(tmp_path / "detector", about={"encoder": "fake"})
    loaded = load_detector(tmp_path / "detector")
    assert isinstance(loaded, RecommendedDetector)
    assert loaded.about_ == {"encoder": "fake"}
    assert loaded.threshold_ == fitted.threshold_
    assert np.array_equal(loaded.ood_score(OOD), fitted.ood_score(OOD))


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_detector_without_whole_vectors_is_refused(fitted, tmp_path, damage):
    fitted.save(tmp_path)
    file = tmp_path / VECTORS
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match="no whole detector") as error:
        load_detector(tmp_path)
    assert one_sentence(error)


@pytest.mark.parametrize("wrong", [{"variant": "best"}, {"calibration_fraction": 0}])
def test_a_wrong_parameter_is_refused_before_anything_is_trained(wrong, monkeypatch):
    monkeypatch.setattr("dlsr.detector.train", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(UserError) as error:
        RecommendedDetector(CHANNELS, **SMALL | wrong).fit(ID)
    assert one_sentence(error)


@pytest.mark.parametrize("channels", [None, (16, 16)])
def test_too_few_layers_are_refused(channels, monkeypatch):
    monkeypatch.setattr("dlsr.detector.train", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(UserError, match="reads 4") as error:
        RecommendedDetector(channels, **SMALL).fit(ID)
    assert one_sentence(error)


def test_vectors_of_another_width_are_refused(fitted):
    with pytest.raises(UserError, match="fitted on 32"):
        fitted.ood_score(ID_TEST[:, :10])
