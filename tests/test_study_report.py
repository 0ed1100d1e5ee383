from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from dlsr.errors import UserError
from dlsr.metrics import METRICS
from dlsr.study import report
from dlsr.study.protocol import CLASSES, PROTOCOLS

from conftest import ROOT, from_page, image_set, one_sentence

objectives, choose = from_page("43_search", "objectives", "choose")

PROTOCOL = replace(PROTOCOLS["pack"][0], draws=50)
NAMES = {"baseline": "Mahalanobis", "paper": "MFsim", "fused": report.FUSED, "layer": "layer 1"}
SIZES = {"cifar100_b": 20, "tiny_imagenet": 15, "textures": 30}


@pytest.fixture
def scores():
    """Random scores of four methods on two near sets and a far one, with and without overlap."""
    sets = [one for one in PROTOCOL.sets if one.name in SIZES]
    overlap = iter(CLASSES["overlap"]["cifar100/test"])
    picks, eval_sets = np.random.RandomState(0), {}
    for key, n in {("id", "native"): 40, **{(k, "matched"): n for k, n in SIZES.items()}}.items():
        images = replace(image_set(n), partial="some" if key[0] == "textures" else "")
        labels = [next(overlap, "apple") if key[0] == "cifar100_b" else "apple" for _ in range(n)]
        eval_sets[key] = SimpleNamespace(images=replace(images, labels=labels))
    per_image = {
        ("z0", kind, title): {
            key: picks.randn(len(f.images)) + i * (key[0] != "id") for key, f in eval_sets.items()
        }
        for i, (kind, title) in enumerate(NAMES.items())
    }
    return report.from_methods(replace(PROTOCOL, sets=tuple(sets)), per_image, eval_sets)


def test_tables_by_hand(scores):
    table = report.same_features(scores, "matched")
    assert len(table) == len(NAMES) * 2 * (len(SIZES) + 1 + 3)
    value = table.set_index(["title", "metric", "ood"])["value"].sort_index()
    for row, title in enumerate(scores.methods["title"]):
        for metric in ("auroc", "fpr95"):
            own = value[title, metric]
            for name in SIZES:
                pair = scores.of("id")[row], scores.of(name, "matched")[row]
                assert own[name] == pytest.approx(100 * METRICS[metric](*pair))
            assert own["near"] == pytest.approx(own[["cifar100_b", "tiny_imagenet"]].mean())
            assert own["far"] == own["textures"]
            assert own["all"] == pytest.approx(own[list(SIZES)].mean())
    n_ood = table.set_index("ood")["n_ood"].to_dict()
    assert (n_ood["cifar100_b, no overlap"], n_ood["near"], n_ood["all"]) == (20 - 7, 35, 65)
    assert (table["ci_low"] <= table["ci_high"]).all()


def test_differences_are_those_of_the_values(scores):
    value = report.same_features(scores, "matched").query("metric == 'auroc'")
    value = value.set_index(["ood", "title"])["value"]
    paired = report.paired(scores, "matched")
    assert set(paired["title"]) == {"Mahalanobis", "MFsim"}
    for row in paired.itertuples():
        by_hand = value[row.ood, report.FUSED] - value[row.ood, row.title]
        assert row.difference == pytest.approx(by_hand)
        assert (row.p >= 0) == (row.ood == "all")
    assert paired.query("kind == 'baseline'")["p_holm"].dropna().tolist() == pytest.approx(
        paired.query("kind == 'baseline'")["p"].dropna().tolist()
    )
    for group in ("near", "far", "all"):
        found = report.differences(scores, ["MFsim"], "matched", group)
        assert "MFsim" not in set(found["title"])
        for row in found.itertuples():
            by_hand = value[group, "MFsim"] - value[group, row.title]
            assert row.difference == pytest.approx(by_hand)
            assert row.ci_low < row.difference < row.ci_high


def test_the_per_image_table_keeps_scores_and_provenance(scores):
    table = scores.per_image()
    chosen = table[table["set"] == "textures, matched"]
    np.testing.assert_array_equal(chosen["MFsim"], scores.of("textures", "matched")[1])
    assert list(chosen["image"]) == list(image_set(30).ids)
    assert table.attrs["partial"]["textures"] == "some"
    assert table.attrs["about"]["seeding"] == "v1"


def test_a_later_pages_scores_stand_beside_the_committed_ones_of_the_same_images(scores):
    later = scores.per_image()[["set", "image", "seed", "MFsim"]].rename(columns={"MFsim": "new"})
    later = later[later["set"] != "textures, matched"].sample(frac=1, random_state=0)
    both = report.beside(scores, later.assign(experiment="any"))
    assert both.methods["title"].tolist() == [*NAMES.values(), "new"]
    assert set(both.values) == {key for key in scores.values if key[0] != "textures"}
    for key, values in both.values.items():
        np.testing.assert_array_equal(values[-1], values[1])
        np.testing.assert_array_equal(values[:-1], scores.values[key])
    with pytest.raises(KeyError):
        report.beside(scores, later[later["image"] != later["image"].iloc[0]])


def test_committed_results_are_read_by_todays_names(monkeypatch):
    with pytest.raises(UserError, match="is not here; change to the project's folder") as error:
        report.read_table("paired")
    assert one_sentence(error)
    monkeypatch.chdir(ROOT)
    old = {"rival", "recommended", "removed", "reseeded", "view"}
    for name in ("same_features", "paired", "other_seed", "filters", "controls", "costs"):
        table = report.read_table(name)
        assert not old & {*table.columns, *table["kind"], *table["name"], *table["title"]}


def test_the_committed_choice_is_that_of_the_committed_log(monkeypatch):
    monkeypatch.chdir(ROOT)
    log, choice = report.read_table(f"search-{PROTOCOL.encoder}"), report.read_choice()
    found = choose(objectives(log))
    assert (found["score"], found["settings"]) == (choice["score"], choice["settings"])
    assert found["baseline"] == choice["rival"]


def test_the_rule_of_the_choice():
    values = {  # near and far of each candidate; the paper's score is best and cannot be chosen
        ("paper", "z0", "MSE", ""): (99, 99),
        ("variant", "z0", "a", ""): (80, 90),
        ("variant", "z0", "b", ""): (84, 88),
        ("baseline", "z0", "kNN", "k=1"): (70, 90),
        ("baseline", "z0", "kNN", "k=5"): (75, 90),
        ("baseline", "raw", "kNN", "k=1"): (60, 60),
    }
    names = ["kind", "features", "name", "setting"]
    rows = [
        dict(zip(names, key, strict=True)) | {"idea": "", "group": group, "auroc": auroc}
        for key, pair in values.items()
        for group, auroc in (("near", pair[0]), ("far", pair[1] - 1), ("far", pair[1] + 1))
    ]
    ranked = objectives(pd.DataFrame(rows))
    assert ranked["objective"].tolist() == [99, 86, 85, 82.5, 80, 60]
    assert choose(ranked) == {
        "score": "b",
        "baseline": {"features": "z0", "name": "kNN", "setting": "k=5"},
        "settings": {"raw": {"kNN": "k=1"}, "z0": {"kNN": "k=5"}},
    }
