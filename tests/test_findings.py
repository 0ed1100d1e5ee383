"""The chapter's sentences and figures, on made tables."""

import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dlsr import findings, plots
from dlsr.chapter import MEANS, entries
from dlsr.comparison import CONTROLS, REPORT, STUDIES, VIEWS
from dlsr.rivals import RIVALS
from dlsr.search import BUDGET, KINDS
from dlsr.variants import VARIANTS

SCORE = "residual Gaussian + kNN"
CHOICE = {
    "encoder": STUDIES["pack"][0].encoder,
    "score": SCORE,
    "development": {"near": 88.0, "far": 99.0, "objective": 93.5},
    "rival": {"features": "z0", "name": "knn", "setting": "k=5"},
    "rival_development": {"near": 87.0, "far": 98.0, "objective": 92.5},
    "settings": {kind: {name: rival.candidates[0][0] for name, rival in RIVALS.items()} for kind in KINDS},
    "tried": {"variants": len(VARIANTS), "rival candidates": 42},
}
DETECTORS = entries(CHOICE, (4, 4, 4, 4, 4))
STUDY_SET = STUDIES["pack"]


def about(entry, study):
    names = ("features", "name", "title", "kind")
    return {"encoder": study.encoder} | {name: getattr(entry, name) for name in names}


@pytest.fixture(scope="module")
def tables():
    """Every detector's AUROC is a number of its own, one less at matched resolution."""
    cells, paired, controls, costs = [], [], [], []
    for study in STUDY_SET:
        places = {one.name: (one.group, one.stage) for one in study.sets}
        places |= {"cifar100_b, no overlap": ("near", "no overlap")} | {m: (m, "mean") for m in MEANS}
        for i, entry in enumerate(DETECTORS):
            base = about(entry, study)
            for view, less in zip(VIEWS[:2], (0, 1), strict=True):
                for place, (group, stage) in places.items():
                    for metric in ("auroc", "fpr95"):
                        value = 95 - i - less if metric == "auroc" else 5 + i
                        ends = {"ci_low": value - 0.5, "ci_high": value + 0.5}
                        where = {"view": view, "ood": place, "group": group, "stage": stage, "metric": metric}
                        cells.append(base | where | {"value": value} | ends)
                    if entry.kind not in ("layer", "recommended"):
                        ahead = {"difference": i - 3.0, "ci_low": i - 3.5, "ci_high": i - 2.5}
                        paired.append(
                            base | {"view": view, "ood": place} | ahead | {"p": 0.01, "p_holm": 0.2}
                        )
            for control in CONTROLS:
                value = {"half": 90 - i, "double": 50.5, "jpeg": 55 + i}[control]
                ends = {"ci_low": value - 1, "ci_high": value + 1}
                controls.append(base | {"control": control, "value": value} | ends)
            if entry.kind != "layer":
                sizes = {"fit_seconds": 1.25, "score_microseconds": 7.0, "bytes": 2e6, "n_fit": 45000}
                costs.append(base | {"setting": entry.setting} | sizes)
    frames = {"same_features": cells, "paired": paired, "controls": controls, "costs": costs}
    return {name: pd.DataFrame(rows) for name, rows in frames.items()}


@pytest.fixture
def matched(tables):
    cells = tables["same_features"]
    shown = cells["kind"].isin(["rival", "paper", "recommended"]) & (cells["view"] == "matched")
    return cells[shown & (cells["encoder"] == STUDY_SET[0].encoder)]


@pytest.fixture
def on_z0(matched):
    return matched[matched["features"] == "z0"]


@pytest.fixture
def ranked():
    rows = [
        {"kind": "variant", "features": "z0", "name": name, "setting": "", "idea": variant.idea,
         "multiply_adds": 1e6 + i, "near": 90 - i, "far": 95.0, "objective": (185 - i) / 2}
        for i, (name, variant) in enumerate(VARIANTS.items())
    ] + [
        {"kind": "rival", "features": "z0", "name": "knn", "setting": "k=5", "idea": "kNN",
         "multiply_adds": np.nan, "near": 80.0, "far": 90.0, "objective": 85.0}
    ]  # fmt: skip
    return pd.DataFrame(rows).sort_values("objective", ascending=False, ignore_index=True)


def pixels(figure):
    assert isinstance(figure, Figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).std()


def test_the_protocol_names_every_set_at_its_stage():
    text = findings.protocol("pack")
    development, report = (line for line in text.splitlines() if "OOD**" in line)
    for one in STUDY_SET[0].sets:
        line, other = (development, report) if one.stage == "development" else (report, development)
        assert f" {one.title}" in line
        assert f" {one.title}" not in other
    assert "45,000 training images are fitted on, 2,500 calibrate, 2,500" in text


def test_sets_and_means_have_titles():
    assert findings.set_title("cifar100_b, no overlap") == "CIFAR-100, half b, no overlap"
    assert findings.set_title("far") == "mean far"


def test_the_main_titles_numbers_are_the_tables(on_z0):
    auroc = on_z0[on_z0["metric"] == "auroc"]
    value = auroc[auroc["ood"] == "all"].set_index("name")["value"]
    title = findings.best_of(auroc)
    assert f"Mahalanobis {value['mahalanobis']:.1f}\xa0%" in title  # the first of the baselines
    assert f"MFsim {value['mfsim']:.1f}\xa0%" in title
    text = findings.ranking(auroc)
    assert f"MSE, {value['mse']:.1f} [{value['mse'] - 0.5:.1f}, {value['mse'] + 0.5:.1f}] %" in text
    assert f"Of {len(RIVALS)} baselines without a diffusion network, 0 have a higher mean." in text


def test_the_wide_table_has_report_sets_and_means_best_first(on_z0):
    for metric, first in (("auroc", "MSE"), ("fpr95", "MSE")):
        table = findings.wide(on_z0, metric)
        report = [one.title for one in STUDY_SET[0].of(REPORT)]
        assert list(table.columns) == ["method", "mean near", "mean far", "mean of all", *report]
        assert table["method"].iloc[0] == first
        assert len(table) == 3 + 1 + len(RIVALS)


def test_raw_features_are_compared_with_z0(matched):
    assert f"ahead of `z0` for 0 of {len(RIVALS)} baselines" in findings.z0_or_raw(matched)


def test_costs_and_overlap(tables, on_z0):
    table = findings.cost_table(tables["costs"], STUDY_SET[0].encoder)
    assert set(table["size, MB"]) == {"2.0"}
    assert not table["method"].str.contains("without the LFDN").any()
    overlap = findings.without_overlap(on_z0)
    assert list(overlap.columns) == ["method", "CIFAR-100, half b", "CIFAR-100, half b, no overlap"]


def test_what_matching_changes(tables):
    cells = tables["same_features"]
    own = cells[(cells["encoder"] == STUDY_SET[0].encoder) & (cells["metric"] == "auroc")]
    methods = own[(own["features"] == "z0") & own["kind"].isin(["rival", "paper", "recommended"])]
    change = findings.change_by_matching(methods)
    assert (change[list(MEANS)] == -1).all(axis=None)
    assert findings.resolution_title(change).startswith("Matched resolution costs 1.0 points")
    assert "-1.0 points" in findings.said_of_matching(change)
    table = findings.set_by_set(methods)
    assert len(table) == len(STUDY_SET[0].sets)
    assert table["MSE"].str.contains(r"95\.0 → 94\.0 \(-1\.0\)").all()
    layers = own[own["kind"] == "layer"]
    assert "loses most by matching, 1.0 points" in findings.layers_title(layers)
    assert pixels(plots.native_and_matched(methods, title="t")) > 0
    assert pixels(plots.layers_in_views(layers, title="t")) > 0


def test_the_controls_of_resolution(tables):
    controls = tables["controls"]
    controls = controls[(controls["encoder"] == STUDY_SET[0].encoder) & (controls["features"] == "z0")]
    controls = controls[controls["kind"].isin(["rival", "paper", "recommended"])]
    assert "90 % (MSE) AUROC" in findings.controls_title(controls)
    assert "50.5 % in the median" in findings.said_of_controls(controls)
    assert pixels(plots.altered_images(controls, title="t")) > 0


def test_paired_differences_are_counted(tables):
    paired = tables["paired"]
    everywhere = paired[(paired["view"] == "matched") & (paired["ood"] == "all")]
    everywhere = everywhere[~everywhere["kind"].isin(["control", "seed"])]
    rivals = 2 * len(RIVALS)
    assert f"ahead of {rivals}, behind 0 of {rivals}" in findings.paired_title(everywhere)
    said = findings.said_of_pairs(everywhere)
    assert said.count("0 differences stand Holm's correction") == len(STUDY_SET)
    table = findings.paired_table(everywhere)
    assert len(table) == len(STUDY_SET) * (3 + rivals)
    against = findings.against_rival(paired[paired["view"] == "matched"], CHOICE)
    assert len(against) == len(STUDY_SET[0].of(REPORT)) + len(MEANS)
    assert pixels(plots.paired_differences(everywhere, title="t")) > 0


def test_seeds_are_set_beside_images(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = findings.seeds_and_images()
    apart, width = (float(x) for x in re.findall(r"(\d+\.\d\d) points", text))
    assert 0 < apart < width


def test_another_seed_is_told_beside_the_first(tables):
    paired = tables["paired"]
    rows = paired[(paired["view"] == "matched") & (paired["ood"] == "all")]
    less = {name: rows[name] - 0.25 for name in ("difference", "ci_low", "ci_high")}
    itself = rows[rows["kind"] == "seed"].assign(name="recommended", kind="recommended", difference=-0.25)
    second = pd.concat([rows.assign(**less), itself]).assign(of="reseeded")
    both = pd.concat([rows.assign(of="recommended"), second])
    found = findings.other_seed(both, CHOICE)
    assert len(found) == 4 * len(STUDY_SET)  # the rival and three controls
    rival = rows[(rows["name"] == "knn") & (rows["features"] == "z0")].iloc[0]
    by_second = findings.ahead({name: rival[name] - 0.25 for name in less})
    shown = found[found["less"] == "kNN"][["first network", "second network"]]
    assert shown.to_numpy().tolist() == [[findings.ahead(rival), by_second]] * len(STUDY_SET)
    text = findings.said_of_other_seed(both, CHOICE)
    assert text.count("the score is -0.25 [") == len(STUDY_SET)
    controls = rows[rows["kind"].eq("control") & rows["encoder"].eq(STUDY_SET[0].encoder)]
    first, other = (1 + (controls["ci_low"] > by).sum() for by in (0, 0.25))
    said = f"against {first} of 4 with the first network and against {other} with the second"
    assert text.count(said) == len(STUDY_SET)


def test_ranks(on_z0):
    reported = on_z0[(on_z0["stage"] == "report") & (on_z0["metric"] == "auroc")]
    assert findings.ranks_title(reported).startswith("Best mean rank: MSE, 1.0 of")
    assert pixels(plots.ranks(reported, title="t")) > 0


def test_the_search_is_told_whole(ranked):
    text = findings.said_of_search(CHOICE, ranked)
    assert f"Chosen: **{SCORE}**" in text
    assert f"{len(VARIANTS)} variants" in text
    assert list(findings.variants_table(ranked)["variant"]) == list(VARIANTS)
    assert findings.rivals_table(ranked)["setting"].tolist() == ["k=5"]
    assert "93.5 %, the best baseline 92.5 %" in findings.search_title(CHOICE)
    assert pixels(plots.search_log(ranked, budget=BUDGET, chosen=SCORE, title="t")) > 0


@pytest.mark.parametrize(("low", "helps"), [(0.2, True), (-0.2, False)])
def test_diffusion_helps_only_where_all_controls_are_beaten(tables, low, helps):
    paired = tables["paired"]
    paired = paired[paired["view"] == "matched"].copy()
    one = (paired["name"] == "linear") & (paired["ood"] == "all")
    paired.loc[paired["kind"] == "control", "ci_low"] = 0.3
    paired.loc[one, "ci_low"] = low
    text = findings.verdict(paired, CHOICE)
    assert ("diffusion helps here" in text) == helps
    assert ("itself with the linear denoiser" in text) != helps
    assert text.count("is reached") == len(STUDY_SET)
    assert "is behind itself" not in text
    near = (paired["name"] == "removed") & (paired["ood"] == "near")
    paired.loc[near, ["difference", "ci_low", "ci_high"]] = (-0.6, -0.7, -0.5)
    but = "t is behind itself without the LFDN (-0.60 [-0.70, -0.50]) on near-OOD alone."
    assert findings.verdict(paired, CHOICE).count(("But i" if helps else " I") + but) == len(STUDY_SET)
    table = findings.control_table(paired)
    assert len(table) == 3 * len(STUDY_SET)


@pytest.mark.parametrize(("group", "reached"), [("near", False), ("far", False), ("", True)])
def test_the_aim_needs_near_and_far(tables, group, reached):
    paired = tables["paired"]
    paired = paired[paired["view"] == "matched"].copy()
    rival = (paired["name"] == "knn") & (paired["features"] == "z0")
    paired.loc[rival & (paired["ood"] == group), "difference"] = -0.1
    assert ("is reached" in findings.verdict(paired, CHOICE)) == reached


def test_recommendations_and_advice(tables):
    cells = tables["same_features"]
    reported = cells[(cells["view"] == "matched") & (cells["metric"] == "auroc")]
    reported = reported[~reported["kind"].isin(["layer", "control", "seed"])]
    table = findings.recommendations(reported, tables["costs"])
    assert len(table) == len(STUDY_SET) * len(MEANS)
    assert set(table["method"]) == {"MSE"}
    assert "Mahalanobis" in findings.advice(reported, tables["paired"], CHOICE)


def test_the_main_figure(on_z0):
    figure = plots.same_features(on_z0[on_z0["metric"] == "auroc"], title="t")
    assert pixels(figure) > 0
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0] == "MSE"
    assert len(labels) == 3 + 1 + len(RIVALS)
