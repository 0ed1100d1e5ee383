import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import MADE_CHANNELS, OVERLAP, SMALL_RIVALS, SMALL_STUDY, one_sentence
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from dlsr import chapter as module
from dlsr.baselines import KNN, Mahalanobis
from dlsr.chapter import (
    CONTROL_TITLES,
    PAPERS,
    TABLES,
    entries,
    fit_entry,
    measured,
    no_overlap,
    read_scores,
    report,
    same_features,
    state,
    write_tables,
)
from dlsr.comparison import DEVELOPMENT, REPORT, STUDIES, VIEWS, Data, pick
from dlsr.datasets import UserError
from dlsr.diffusion import noise_schedule
from dlsr.metrics import METRICS, auroc
from dlsr.search import bench_of, chapter_folder, choice_file, read_choice, read_table, search_file, tried
from dlsr.training import train
from dlsr.variants import VARIANTS, noise_free

REPORTED = [ood.name for ood in SMALL_STUDY.of(REPORT)]
DETECTORS = 3 + 5 + 2 * len(SMALL_RIVALS) + 2 * len(MADE_CHANNELS)
HALF = 3 + 1 + len(SMALL_RIVALS)  # which the control at half size has: on z0, no controls, no layers
FILES = DETECTORS + HALF


def folder():
    return chapter_folder("demo") / "scores" / SMALL_STUDY.encoder


def table(name):
    return read_table(chapter_folder("demo") / f"{name}.csv")


def listed(**changes):
    return entries(read_choice("demo") | changes, MADE_CHANNELS)


def entry(name, features="z0", **changes):
    (found,) = (one for one in listed(**changes) if (one.name, one.features) == (name, features))
    return found


@pytest.fixture
def scores(small_chapter):
    return read_scores(SMALL_STUDY, "demo")


@pytest.fixture
def data(small_chapter):
    return Data(SMALL_STUDY, progress=False)


@pytest.fixture
def bench(data):
    return bench_of(data, progress=False)


@pytest.fixture
def fitted(monkeypatch):
    """The entries that are fitted; ``left`` more may be before the run is killed."""

    class Fitted(list):
        left = 9999

    fits, fit = Fitted(), module.fit_entry

    def listening(bench, one):
        if fits.left == 0:
            raise KeyboardInterrupt
        fits.left -= 1
        fits.append(one.file)
        return fit(bench, one)

    monkeypatch.setattr(module, "fit_entry", listening)
    return fits


def again():
    return measured("demo", progress=False)


# Choice before report


def no_choice():
    choice_file("demo").unlink()


@pytest.mark.parametrize(
    "ask",
    [
        lambda: report(SMALL_STUDY, "demo", progress=False),
        lambda: read_scores(SMALL_STUDY, "demo"),
        lambda: write_tables("demo"),
    ],
    ids=["report", "read_scores", "write_tables"],
)
def test_nothing_is_reported_without_a_choice(ask, small_chapter, fitted, monkeypatch):
    no_choice()
    monkeypatch.setattr(module, "Data", lambda *a, **k: pytest.fail("images are asked for"))
    with pytest.raises(UserError, match=r"no choice\.json.*43_search") as error:
        ask()
    assert one_sentence(error)
    assert not fitted


def test_every_file_of_scores_names_its_choice(small_chapter):
    for file in folder().rglob("*-*.parquet"):
        about = json.loads(pq.read_schema(file).metadata[b"dlsr"])
        assert about["choice"] == read_choice("demo")["search_sha256"]


# A development set of the ID set's size is not scored again: it has no resolution to compare.
SCORED = [ood for ood in SMALL_STUDY.sets if ood.name != "near_dev"]


def test_means_are_of_report_sets_and_the_search_of_development_sets(small_chapter):
    cells = table("same_features")
    stages = cells.groupby("ood")["stage"].agg(set).to_dict()
    assert stages.pop("near_report, no overlap") == {"no overlap"}
    assert stages == {ood.name: {ood.stage} for ood in SCORED} | {
        mean: {"mean"} for mean in ("near", "far", "all")
    }
    assert set(read_table(search_file(SMALL_STUDY, "demo"))["ood"]) == {
        ood.name for ood in SMALL_STUDY.of(DEVELOPMENT)
    }
    assert set(table("filters")["ood"]) <= set(REPORTED)


# Entries


def test_entries_are_the_papers_the_recommended_its_controls_rivals_and_layers(small_chapter):
    found = listed()
    kinds = [one.kind for one in found]
    own = ["recommended"] + ["control"] * 3 + ["seed"]
    assert kinds == ["paper"] * 3 + own + ["rival"] * 6 + ["layer"] * 6
    assert len({one.file for one in found}) == len(found) == DETECTORS
    choice = read_choice("demo")
    for one in found:
        if one.kind == "rival":
            assert one.setting == choice["settings"][one.features][one.name]
        if one.kind in ("recommended", "control"):
            assert one.setting == choice["score"]
    assert [one.name for one in found if one.kind == "control"] == list(CONTROL_TITLES)


def test_a_rival_is_fitted_with_its_chosen_setting(bench, data):
    far = data.of_ood(SMALL_STUDY.sets[3], "native")
    for features in ("z0", "raw"):
        x, test = (bench.inputs.of(one, features) for one in (bench.fitted, far))
        for k in (1, 20):
            settings = {
                kind: read_choice("demo")["settings"][kind] | {"knn": f"k={k}"} for kind in ("z0", "raw")
            }
            score, size = fit_entry(bench, entry("knn", features, settings=settings))
            np.testing.assert_allclose(score("place", far), KNN(k=k).fit(x).ood_score(test), rtol=1e-6)
            assert size >= x.nbytes


GAUSSIAN, FUSION = "residual Gaussian at t=10", "residual Gaussian + kNN"


def test_without_the_network_the_residual_is_z0(bench):
    """What takes away the network of a residual's Gaussian is the features' Gaussian."""
    score, _ = fit_entry(bench, entry("removed", score=GAUSSIAN))
    by_hand = Mahalanobis().fit(bench.fitted.z0()).ood_score(bench.calibration.z0())
    np.testing.assert_allclose(score("place", bench.calibration), by_hand, rtol=1e-6)


def test_without_the_network_a_fusion_is_of_z0(bench):
    score, _ = fit_entry(bench, entry("removed", score=FUSION))
    z0, calibration = bench.fitted.z0(), bench.calibration.z0()
    parts = [detector.fit(z0) for detector in (Mahalanobis(), KNN(k=50))]
    known = [np.log(part.ood_score(calibration)) for part in parts]
    by_hand = np.mean([(values - values.mean()) / values.std() for values in known], axis=0)
    found = score("place", bench.calibration)
    np.testing.assert_allclose(found, by_hand, atol=1e-3)


def test_a_scores_size_is_its_denoisers_and_what_it_has_fitted(bench):
    z0 = bench.fitted.z0()
    network = sum(tensor.nbytes for tensor in bench.network("base").network.state_dict().values())
    neighbours = KNN(k=50).fit(z0).neighbours_._fit_X.nbytes
    sizes = {name: fit_entry(bench, entry(name, score=FUSION))[1] for name in ("recommended", "removed")}
    paper = fit_entry(bench, entry("mse"))[1]
    assert paper == network
    assert sizes["recommended"] > network + neighbours > sizes["removed"] > neighbours


def test_the_fit_of_a_score_holds_the_training_of_its_network(bench, monkeypatch):
    monkeypatch.setattr(bench, "training_seconds", {"base": 7.0}.__getitem__)
    found = {one.name: module._training_seconds(bench, one) for one in listed(score=FUSION)}
    assert {name for name, seconds in found.items() if seconds == 7} == {*PAPERS, "recommended"}
    assert set(found.values()) == {0, 7}


@pytest.mark.parametrize("name", ["linear", "untrained"])
def test_other_denoisers_take_the_networks_place(name, bench):
    score, _ = fit_entry(bench, entry(name, score=GAUSSIAN))
    found = score("place", bench.calibration)
    z0, test = bench.fitted.z0(), bench.calibration.z0()
    if name == "linear":
        gaussian = LedoitWolf().fit(z0.astype(np.float64))
        mean, covariance = gaussian.location_, gaussian.covariance_
        share = float(noise_schedule().double()[9])
        shrink = covariance @ np.linalg.inv(covariance + (1 - share) / share * np.eye(len(mean)))
        z0, test = (x - (mean + (x - mean) @ shrink.T) for x in (z0, test))
    by_hand = Mahalanobis().fit(z0).ood_score(test)
    np.testing.assert_allclose(found, by_hand, rtol=1e-3)


def test_another_seeds_network_takes_the_networks_place(bench):
    settings = replace(SMALL_STUDY.training, seed=SMALL_STUDY.training.seed + 1)
    network = train(bench.fitted.z0(), settings, progress=False).network
    residuals = [one.z0() - noise_free(network, one.z0(), t=10) for one in (bench.fitted, bench.calibration)]
    score, _ = fit_entry(bench, entry("reseeded", score=GAUSSIAN))
    by_hand = Mahalanobis().fit(residuals[0]).ood_score(residuals[1])
    np.testing.assert_allclose(score("place", bench.calibration), by_hand, rtol=1e-4)
    own, _ = fit_entry(bench, entry("recommended", score=GAUSSIAN))
    assert not np.allclose(own("place", bench.calibration), by_hand)


def test_layers_alone(bench):
    ends = np.cumsum(MADE_CHANNELS)
    for m, end in enumerate(ends):
        columns = slice(end - MADE_CHANNELS[m], end)
        score, _ = fit_entry(bench, entry(f"mahalanobis-layer{m + 1}"))
        by_hand = (
            Mahalanobis().fit(bench.fitted.z0()[:, columns]).ood_score(bench.calibration.z0()[:, columns])
        )
        np.testing.assert_allclose(score("place", bench.calibration), by_hand)
        score, _ = fit_entry(bench, entry(f"mse-layer{m + 1}"))
        papers = bench.bank("place", bench.calibration, "base").papers
        np.testing.assert_array_equal(score("place", bench.calibration), papers["mse", str(m + 1)])


# Scores


def test_scores_are_of_every_set_in_every_view_it_has(scores, data):
    """A near set is of the ID set's size here; the filters are compared on report sets alone."""
    places = {"id@native", "control@", "control@double", "control@jpeg"}
    places |= {f"{ood.name}@native" for ood in SCORED}
    places |= {f"far_dev@{view}" for view in VIEWS[:2]} | {f"far_report@{view}" for view in VIEWS}
    assert set(scores.images) == places
    for found in scores.places.values():
        assert {place: len(values) for place, values in found.items()} == {
            place: len(images) for place, images in scores.images.items()
        }
    for ood in SCORED:
        images = data.images(ood.dataset).take(data.rows(ood))
        assert scores.images[f"{ood.name}@native"]["image"].tolist() == list(images.ids)
        assert scores.images[f"{ood.name}@native"]["label"].tolist() == list(images.labels)
    half = read_scores(SMALL_STUDY, "demo", "half")
    assert set(half.places["z0-mse.parquet"]) == {"control@half", "control@"}
    assert half.of("control@half").shape == half.of("control@").shape == (HALF, SMALL_STUDY.n_control)


def test_a_set_of_the_id_size_is_the_same_in_all_views(scores):
    for view in VIEWS:
        np.testing.assert_array_equal(scores.of(f"near_report@{view}"), scores.of("near_report@native"))
    assert not np.array_equal(scores.of("far_report@matched"), scores.of("far_report@native"))


def test_written_scores_are_those_of_the_fitted_detector(scores, bench, data):
    far = data.of_ood(SMALL_STUDY.sets[3], "matched")
    for name in ("mse", "recommended", "linear", "knn", "mahalanobis-layer2"):
        one = entry(name)
        found = fit_entry(bench, one)[0]("far_report@matched", far)
        np.testing.assert_allclose(scores.places[one.file]["far_report@matched"], found, rtol=1e-4, atol=1e-5)


def test_the_control_at_half_size_is_fitted_on_half_size(small_chapter, data):
    half = read_scores(SMALL_STUDY, "demo", "half")
    train = data.of_control(SMALL_STUDY.id_train, "half")
    rows = np.arange(len(train))
    fitted, calibrates = train.take(rows[rows % 10 != 0]), train.take(rows[rows % 10 == 0])
    gaussian = Mahalanobis().fit(fitted.z0())
    found = half.places["z0-mahalanobis.parquet"]
    for name in ("half", ""):
        by_hand = gaussian.ood_score(data.of_control(SMALL_STUDY.id_test, name).z0())
        np.testing.assert_allclose(found[f"control@{name}"], by_hand, rtol=1e-4)
    assert half.about["z0-mahalanobis.parquet"]["n_fit"] == len(fitted) == 72
    assert len(calibrates) == 8


def test_a_detector_is_timed_on_a_place_of_its_own(small_chapter, monkeypatch):
    """What one detector computed is kept for the next, which would else seem to cost nothing."""
    places, fit = {}, module.fit_entry

    def listening(bench, one):
        score, size = fit(bench, one)
        asked = places.setdefault((len(bench.fitted), one.file), [])
        return (
            lambda place, features: (asked.append((place, len(features))), score(place, features))[1]
        ), size

    monkeypatch.setattr(module, "fit_entry", listening)
    monkeypatch.setattr(module, "TIMED", 12)
    shutil.rmtree(folder())
    report(SMALL_STUDY, "demo", progress=False)
    assert len(places) == FILES
    last = {key: asked[-1] for key, asked in places.items()}
    assert {images for _, images in last.values()} == {12}
    assert len({(key[0], place) for key, (place, _) in last.items()}) == FILES
    scored = {place for asked in places.values() for place, _ in asked[:-1]}
    assert not scored & {place for place, _ in last.values()}


# Tables


@pytest.mark.parametrize("view", VIEWS[:2])
def test_values_are_the_metrics_of_the_scores(view, scores):
    cells = table("same_features")
    cells = cells[cells["view"] == view]
    assert len(cells) == DETECTORS * 2 * (3 + 1 + 3)
    by_set = cells[cells["stage"].isin([DEVELOPMENT, REPORT])]
    for row in by_set.itertuples():
        found = scores.places[f"{row.features}-{row.name}.parquet"]
        place = f"{row.ood}@{view}" if row.ood.startswith("far") else f"{row.ood}@native"
        on_id, on_ood = found["id@native"], found[place]
        assert row.value == pytest.approx(100 * METRICS[row.metric](on_id, on_ood), abs=1e-3)
        assert (row.n_id, row.n_ood) == (len(on_id), len(on_ood))
        group = {ood.name: ood.group for ood in SMALL_STUDY.sets}[row.ood]
        assert row.group == group


def test_means_are_unweighted_over_report_sets_alone(small_chapter):
    cells = table("same_features")
    keys = ["features", "name", "view", "metric"]
    groups = {"near": ["near_report"], "far": ["far_report"], "all": REPORTED}
    wide = cells.pivot(index=keys, columns="ood", values="value")
    sizes = cells.pivot(index=keys, columns="ood", values="n_ood")
    for mean, sets in groups.items():
        np.testing.assert_allclose(wide[mean], wide[sets].mean(axis=1), atol=2e-4)
        assert (sizes[mean] == sizes[sets].sum(axis=1)).all()
    assert len(set(sizes.loc[:, REPORTED].iloc[0])) == 2  # a weighted mean would differ


def test_intervals_contain_their_values(small_chapter):
    for name in ("same_features", "filters", "controls"):
        cells = table(name)
        cells = cells[cells["metric"] == "auroc"] if "metric" in cells else cells
        assert (cells["ci_low"] <= cells["value"] + 1e-6).all()
        assert (cells["value"] <= cells["ci_high"] + 1e-6).all()
        assert cells[["ci_low", "ci_high"]].stack().between(0, 100).all()


def test_rows_without_overlap_drop_the_listed_classes(scores):
    cells = table("same_features")
    images = scores.images["near_report@native"]
    dropped = images["label"].isin(list(OVERLAP["digits_8_9/test"])).to_numpy()
    assert 0 < dropped.sum() < len(images)
    rows = cells[cells["ood"] == "near_report, no overlap"]
    assert (rows["n_ood"] == (~dropped).sum()).all()
    for row in rows[rows["metric"] == "auroc"].itertuples():
        found = scores.places[f"{row.features}-{row.name}.parquet"]
        value = auroc(found["id@native"], found["near_report@native"][~dropped])
        assert row.value == pytest.approx(100 * value, abs=1e-3)


def test_no_overlap_by_the_committed_list(monkeypatch):
    labels = pd.Series(["apple", "wolf", "pickup_truck", "bear"])
    assert no_overlap("cifar100/test", labels).tolist() == [True, False, False, True]
    assert no_overlap("svhn/test", labels).all()


def test_without_a_listed_class_there_is_no_further_row(scores, monkeypatch):
    monkeypatch.setattr(module, "lists", lambda: {"overlap": {}})
    cells, paired = same_features(scores, "native")
    for found in (cells, paired):
        assert not found["ood"].str.contains("overlap").any()


# Paired differences


def by_name(cells, name, features="z0"):
    return cells[(cells["name"] == name) & (cells["features"] == features)].set_index("ood")


def test_differences_are_those_of_the_values(small_chapter):
    cells, paired = table("same_features"), table("paired")
    cells = cells[cells["metric"] == "auroc"]
    compared = [one for one in listed() if one.kind not in ("recommended", "layer")]
    for view in VIEWS[:2]:
        values, differences = (found[found["view"] == view] for found in (cells, paired))
        own = by_name(values, "recommended")["value"]
        assert len(differences) == len(compared) * len(own)
        for one in compared:
            found = by_name(differences, one.name, one.features)
            other = by_name(values, one.name, one.features)["value"]
            np.testing.assert_allclose(found["difference"], (own - other)[found.index], atol=3e-4)
            assert (found["ci_low"] <= found["difference"] + 1e-6).all()
            assert (found["difference"] <= found["ci_high"] + 1e-6).all()


def shares(one, others):
    """Of each number, the share of the others that it exceeds; ties count half."""
    return (np.sign(np.subtract.outer(one, others)) + 1).mean(axis=1) / 2


def test_p_values_are_delongs_of_the_mean_over_report_sets(scores):
    paired = table("paired")
    tested = paired[(paired["view"] == "matched") & (paired["ood"] == "all")]
    places = ["near_report@native", "far_report@matched"]

    def parts(name, features):
        found = scores.places[f"{features}-{name}.parquet"]
        of_id = [1 - shares(found["id@native"], found[place]) for place in places]
        of_ood = [shares(found[place], found["id@native"]) for place in places]
        return np.mean(of_id, axis=0), of_ood

    own_id, own_ood = parts("recommended", "z0")
    for row in tested.itertuples():
        other_id, other_ood = parts(row.name, row.features)
        difference = np.mean([a.mean() - b.mean() for a, b in zip(own_ood, other_ood, strict=True)])
        variance = np.var(own_id - other_id, ddof=1) / len(own_id)
        variance += sum(np.var(a - b, ddof=1) / len(a) for a, b in zip(own_ood, other_ood, strict=True)) / 4
        by_hand = math.erfc(abs(difference) / math.sqrt(2 * variance))
        assert row.difference == pytest.approx(100 * difference, abs=1e-3)
        assert row.p == pytest.approx(by_hand, abs=1e-4)


def test_holm_is_over_the_rivals_alone(small_chapter):
    paired = table("paired")
    assert paired.loc[paired["ood"] != "all", ["p", "p_holm"]].isna().all(axis=None)
    assert paired.loc[paired["kind"] != "rival", "p_holm"].isna().all()
    assert paired.loc[paired["ood"] == "all", "p"].notna().all()
    for view in VIEWS[:2]:
        rows = paired[(paired["view"] == view) & (paired["ood"] == "all") & (paired["kind"] == "rival")]
        rows = rows.sort_values("p")
        steps = rows["p"].to_numpy() * np.arange(len(rows), 0, -1)
        assert len(rows) == 2 * len(SMALL_RIVALS)
        np.testing.assert_allclose(rows["p_holm"], np.minimum(np.maximum.accumulate(steps), 1), atol=6e-4)


# Filters, controls, costs


def test_filters_are_compared_on_the_same_images(scores, data):
    filters = table("filters")
    assert set(filters["ood"]) == {"far_report"}
    assert set(filters["view"]) == {"native", "matched, bilinear", "matched, bicubic", "matched, box"}
    assert set(filters["n_ood"]) == {SMALL_STUDY.n_filters}
    rows = data.rows(SMALL_STUDY.sets[3])
    kept = np.isin(rows, pick(rows, SMALL_STUDY.n_filters))
    for row in filters.itertuples():
        found = scores.places[f"{row.features}-{row.name}.parquet"]
        view = {"matched, bilinear": "matched"}.get(row.view, row.view)
        values = found[f"far_report@{view}"]
        value = auroc(found["id@native"], values if len(values) == kept.sum() else values[kept])
        assert row.value == pytest.approx(100 * value, abs=1e-3)


def test_controls_tell_altered_images_from_the_same_ones(scores):
    controls = table("controls")
    assert set(controls["control"]) == {"half", "double", "jpeg"}
    half = read_scores(SMALL_STUDY, "demo", "half")
    for row in controls.itertuples():
        file = f"{row.features}-{row.name}.parquet"
        found = half.places[file] if row.control == "half" else scores.places[file]
        pair = {"half": ("control@half", "control@")}.get(row.control, ("control@", f"control@{row.control}"))
        on_id, on_ood = (found[place] for place in pair)
        labels = np.repeat([0, 1], [len(on_id), len(on_ood)])
        value = roc_auc_score(labels, np.concatenate([on_id, on_ood]))
        assert row.value == pytest.approx(100 * value, abs=1e-3)
        assert row.n_ood == SMALL_STUDY.n_control


def test_the_other_seed_is_compared_as_the_first_is(small_chapter):
    """By DeLong: the differences are those of the bootstrap's table, the intervals near its own."""
    found, paired = table("other_seed"), table("paired")
    paired = paired[(paired["view"] == "matched") & (paired["ood"] == "all")]
    key = ["features", "name"]
    first = found[found["of"] == "recommended"].set_index(key)
    by_bootstrap = paired.set_index(key).loc[first.index]
    np.testing.assert_allclose(first["difference"], by_bootstrap["difference"], atol=1e-3)
    width = first["ci_high"] - first["ci_low"]
    np.testing.assert_allclose(width, by_bootstrap["ci_high"] - by_bootstrap["ci_low"], rtol=0.3, atol=0.2)
    second = found[found["of"] == "reseeded"].set_index(key)
    assert set(second.index) == set(first.index) - {("z0", "reseeded")} | {("z0", "recommended")}
    changed = second.loc[("z0", "recommended"), "difference"]
    assert changed == pytest.approx(-first.loc[("z0", "reseeded"), "difference"])
    both = second.index.intersection(first.index)
    np.testing.assert_allclose(
        second.loc[both, "difference"], first.loc[both, "difference"] + changed, atol=1e-3
    )


def test_costs_are_of_all_but_the_layers(small_chapter):
    costs = table("costs")
    assert len(costs) == len([one for one in listed() if one.kind not in ("layer", "seed")])
    assert (costs["n_fit"] == 140).all()
    assert (costs[["fit_seconds", "bytes"]] >= 0).all(axis=None)
    assert (costs["score_microseconds"] > 0).all()
    settings = costs.set_index(["features", "name"])["setting"]
    assert settings["z0", "recommended"] == read_choice("demo")["score"]
    assert settings["raw", "knn"] == read_choice("demo")["settings"]["raw"]["knn"]


# What is there


def test_a_measured_chapter_is_up_to_date_and_only_read(small_chapter, fitted, monkeypatch):
    assert state("demo") == "up to date"
    before = {file: file.read_bytes() for file in small_chapter.rglob("*.*") if file.is_file()}
    monkeypatch.setattr(module, "search", lambda *a, **k: pytest.fail("it is searched again"))
    found = again()
    assert set(found) == {*TABLES, "search"}
    assert all(len(rows) for rows in found.values())
    assert not fitted
    assert {file: file.read_bytes() for file in small_chapter.rglob("*.*") if file.is_file()} == before


def test_before_the_first_run_the_state_says_so(fresh_chapter):
    assert state("demo") == "not run"


def change_search():
    file = search_file(SMALL_STUDY, "demo")
    rows = read_table(file)
    rows.loc[0, "auroc"] += 1
    rows.to_csv(file, index=False)


def change_tables():
    file = chapter_folder("demo") / f"{TABLES[-1]}.csv"
    read_table(file).assign(stamp="old").to_csv(file, index=False)


CHANGES = {
    "no choice": (no_choice, "not run"),
    "no search": (lambda: search_file(SMALL_STUDY, "demo").unlink(), "out of date: search"),
    "another search": (change_search, "out of date: search"),
    "no scores": (lambda: (folder() / "raw-pca.parquet").unlink(), "out of date: scores"),
    "no scores at half size": (lambda: (folder() / "half" / "z0-lr.parquet").unlink(), "out of date: scores"),
    "no tables": (lambda: (chapter_folder("demo") / "costs.csv").unlink(), "out of date: tables"),
    "old tables": (change_tables, "out of date: tables"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_out_of_date_is_said(change, small_chapter):
    do, told = CHANGES[change]
    do()
    assert state("demo") == told


def test_another_study_is_out_of_date(small_chapter, monkeypatch):
    longer = replace(SMALL_STUDY, training=replace(SMALL_STUDY.training, epochs=3))
    monkeypatch.setitem(STUDIES, "demo", (longer,))
    assert state("demo") == "out of date: search"


def test_another_choice_is_out_of_date(small_chapter, fitted):
    """And then only what was chosen otherwise is fitted again."""
    choice = read_choice("demo")
    other = next(n for n in ("MSE at t=10, no noise", FUSION) if n != choice["score"])
    choice_file("demo").write_text(json.dumps(choice | {"score": other}))
    assert state("demo") == "out of date: scores"
    again()
    names = ["recommended", *CONTROL_TITLES, "reseeded"]
    assert fitted == [f"z0-{name}.parquet" for name in (*names, "recommended")]
    assert state("demo") == "up to date"


def test_a_lost_choice_is_made_again_and_nothing_else(small_chapter, fitted):
    choice = read_choice("demo")
    no_choice()
    again()
    assert read_choice("demo") == choice
    assert not fitted
    assert state("demo") == "up to date"


@pytest.mark.parametrize("part", ["", "half"])
def test_one_lost_file_of_scores_is_made_again_alone(part, small_chapter, fitted):
    file = folder() / part / "z0-recommended.parquet"
    before, tables = pq.read_table(file), {name: table(name) for name in TABLES[:-1]}
    file.unlink()
    found = again()
    assert fitted == ["z0-recommended.parquet"]
    assert pq.read_table(file).equals(before)
    for name, rows in tables.items():
        pd.testing.assert_frame_equal(found[name], rows)


def test_a_killed_run_goes_on(small_chapter, fitted):
    shutil.rmtree(folder())
    fitted.left = 5
    with pytest.raises(KeyboardInterrupt):
        again()
    assert len(list(folder().rglob("*-*.parquet"))) == 5
    assert state("demo") == "out of date: scores"
    fitted.left = 9999
    again()
    assert len(fitted) == FILES == len(list(folder().rglob("*-*.parquet")))
    assert state("demo") == "up to date"


@pytest.mark.parametrize("profile", ["paper", "nothing"])
def test_an_unknown_profile_is_refused(profile, fresh_chapter):
    with pytest.raises(UserError, match=f"'{profile}'.* demo, pack") as error:
        measured(profile)
    assert one_sentence(error)


def test_every_choice_that_the_search_can_end_in_can_be_reported(bench, data):
    """Each small variant but the paper's, with its three controls."""
    names = {about["name"] for about in tried(SMALL_STUDY) if about["kind"] == "variant"}
    for name in sorted(names):
        if VARIANTS[name].idea.startswith("the paper's"):
            continue
        for one in ("recommended", *CONTROL_TITLES):
            score, size = fit_entry(bench, entry(one, score=name))
            values = score(f"{name} {one}", bench.calibration)
            assert np.isfinite(values).all()
            assert size > 0 or one == "removed"  # of which nothing may be left
