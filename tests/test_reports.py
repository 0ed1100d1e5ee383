import re
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, FakeEncoder
from test_plots import at, compared, missing

from dlsr import benchmarks, experiments
from dlsr import reports as module
from dlsr import results as results_module
from dlsr.benchmarks import CELLS, ITEMS, Item, compare, reproduce, results, settings, stamp
from dlsr.datasets import DATASETS, UserError
from dlsr.experiments import HEADLINE, OURS
from dlsr.features import layer_slices
from dlsr.metrics import auroc, bootstrap
from dlsr.reports import coverage, overall, ranking, verdict
from dlsr.results import AVERAGE, SetScores

QUICK, NEAR, RIVALS, FACES = "00_quickstart", "08_near_ood", "03_rivals", "02_celeba"
TINY = {"profile": "demo", "n_train": 150, "n_test": 60, "width": 8, "blocks": 1, "epochs": 2}


@pytest.fixture(scope="module")
def nothing_run(tmp_path_factory):
    """Coverage in an empty folder."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("empty"))
        return coverage("pack")


# Plans


def test_a_plan_has_a_row_an_experiment():
    plan = module.plan(settings(RIVALS, {"profile": "paper", "width": 16, "epochs": 3}))
    assert plan["ID"].tolist() == ["CIFAR-10", "CIFAR-100"]
    assert plan["seeds"].tolist() == [3, 3]
    assert set(plan["LFDN"]) == {"16x16, 3 epochs"}
    assert set(plan["OOD sets"]) == {"6 of 6"}
    assert "setting" not in plan  # which none of them has
    assert all(len(titles.split(", ")) == 3 for titles in plan["beside it"])
    plan = module.plan(settings("23_histograms", {"profile": "pack"}))
    assert plan["OOD sets"].tolist() == ["2 of 6"]  # the pack has SVHN and Textures
    plan = module.plan(settings("25_layers", {"profile": "demo"}))
    assert plan[["setting", "layers"]].to_numpy().tolist() == [["single", "last"], ["multi", "all"]]


def test_what_differs_from_the_paper_says_how_many_images_were_trained_on():
    run = settings(RIVALS, {"profile": "pack"})
    rows = pd.DataFrame(
        {"id": ["cifar10/test", "cifar100/test", "cifar10/test"], "n_train": [50_000, 4_500, 50_000]}
    )
    text = module.differences(run, rows)
    assert all(line.startswith("- **") for line in text.splitlines())
    assert "**Training images**: 50,000 of CIFAR-10, 4,500 of CIFAR-100." in text
    assert "without its last block, for which no weights were at hand" in text
    assert "8 blocks x 720, 30 epochs, seeds: 2" in text
    assert "**Pooling** `gap`" in text
    changed = settings(RIVALS, {"profile": "demo", "blocks": 2, "pooling": "grid14", "protocol": "matched"})
    text = module.differences(changed, rows)
    assert "`efficientnet_lite0`: not one of the paper" in text
    assert "2 blocks x 256, 100 epochs, seeds: 1" in text
    assert "**Pooling** `grid14`" in text
    assert "**Resolution** `matched`" in text


def test_what_differs_where_nothing_was_run():
    run = settings("06_resnet50", {"profile": "pack"})
    assert module.differences(run, results(run)) == f"Nothing was run: {run.item.unmeasured}."


# Means and orders


def several():
    """CIFAR-10 has a mean, CelebA one measured set."""
    mean, faces = {"ood": AVERAGE}, {"id": "celeba/test"}
    return compared(
        {}, {"ood": "isun/test"}, mean | at(80), mean | at(82) | {"line": "LR"},
        mean | at(30) | {"metric": "fpr95"}, mean | at(20) | {"metric": "fpr95", "line": "LR"},
        missing(ood="sun/test", **faces), faces | at(95) | {"ood": "textures/test"},
        missing("fewer than two sets", ood=AVERAGE, **faces),
        mean | at(70) | {"setting": "Lite0"}, at(60) | {"setting": "Lite0"},
    )  # fmt: skip


def test_overall_is_the_mean_or_the_one_set_that_was_measured():
    table = overall(several())
    assert table[["setting", "id", "ood", "line", "measured"]].to_numpy().tolist() == [
        ["", "cifar10/test", AVERAGE, "MSE", 80],
        ["", "cifar10/test", AVERAGE, "LR", 82],
        ["", "celeba/test", "textures/test", "MSE", 95],
        ["Lite0", "cifar10/test", AVERAGE, "MSE", 70],
    ]
    assert overall(several(), metric="fpr95")["measured"].tolist() == [30, 20]


def test_the_ranking_begins_with_the_best():
    assert ranking(several()).splitlines() == [
        "- **CIFAR-10**, AUROC over the measured sets: LR 82.0 [81.0, 83.0]; MSE 80.0 [79.0, 81.0].",
        "- **CelebA**, AUROC over the measured sets: MSE 95.0 [94.0, 96.0].",
        "- **CIFAR-10 (Lite0)**, AUROC over the measured sets: MSE 70.0 [69.0, 71.0].",
    ]
    assert ranking(several(), metric="fpr95") == (
        "- **CIFAR-10**, FPR95 over the measured sets: LR 20.0 [19.0, 21.0]; MSE 30.0 [29.0, 31.0]."
    )


def test_nothing_measured_has_no_order():
    assert overall(compared(missing())).empty
    assert ranking(compared(missing())) == "Nothing was measured."


# Verdicts


def hand_made(*cells):
    """A comparison of (line, ood, metric, paper, measured, ci_low, ci_high, why)."""
    names = ["line", "ood", "metric", "paper", "measured", "ci_low", "ci_high", "why"]
    table = pd.DataFrame([dict(zip(names, values, strict=True)) | {"id": "cifar10/test"} for values in cells])
    return table.assign(difference=table["measured"] - table["paper"]).reindex(columns=CELLS)


def test_the_verdict_counts_near_cells_and_names_the_farthest():
    nan = np.nan
    table = hand_made(
        ("MSE", "svhn/test", "auroc", 97.0, 96.2, 96.0, 96.4, ""),  # near, outside its interval
        ("LR", "svhn/test", "auroc", 98.0, 98.3, 97.9, 98.6, ""),  # near and inside
        ("MFsim", "svhn/test", "auroc", 99.0, 96.5, 95.0, 99.1, ""),  # far, yet inside
        ("MFsim", "average", "auroc", 99.0, 50.0, 49.0, 51.0, ""),  # averages are left out
        ("AE", "svhn/test", "auroc", nan, 10.0, 9.0, 11.0, ""),  # the paper prints none
        ("MSE", "svhn/test", "fpr95", 20.0, 26.0, 25.0, 27.0, ""),
        ("MSE", "isun/test", "fpr95", 40.0, nan, nan, nan, "not in the data pack"),
        ("LR", "isun/test", "fpr95", 41.0, nan, nan, nan, "not in the data pack"),
        ("LR", "textures/test", "fpr95", 42.0, nan, nan, nan, "not run yet"),
        ("LR", "average", "fpr95", 42.0, nan, nan, nan, "fewer than two sets"),
    )
    assert verdict(table) == (
        "AUROC: of 3 measured cells that the paper prints too, 2 lie within one point of its value, and 2 "
        "have it in their interval; the largest difference is -2.5 points (MFsim, CIFAR-10 against SVHN). "
        "FPR95: of 1 measured cells that the paper prints too, 0 lie within one point of its value, and 0 "
        "have it in their interval; the largest difference is +6.0 points (MSE, CIFAR-10 against SVHN). "
        "Not measured, not in the data pack: iSUN. Not measured, not run yet: Textures."
    )


def test_the_verdict_without_paper_values():
    run = settings(QUICK, {"profile": "demo"})
    cells = compare(run, results(run)).assign(measured=80.0, ci_low=79.0, ci_high=81.0)
    assert verdict(cells) == "Nothing was measured that the paper prints."


def test_the_verdict_of_an_item_without_experiments_says_why():
    run = settings("12_imagenet100", {"profile": "pack"})
    assert verdict(compare(run, results(run))) == (
        f"Not measured, {run.item.unmeasured}: SUN, iNaturalist, Textures, Places365."
    )


# Single items

ROW = {"id": "cifar10/test", "ood": AVERAGE, "metric": "auroc", "seed": "mean", "versus": "",
       "encoder": "b4", "pooling": "gap", "stages": "", "value": 50.0, **OURS[-1].variant("all")}  # fmt: skip


def table_of(*changes):
    """Rows of results; the headline row of MFsim's mean with these changes."""
    return pd.DataFrame([ROW | change for change in changes])


def test_growth_from_the_first_epoch_to_the_last():
    run = settings("23_histograms", {"profile": "pack"})
    (experiment,) = run.experiments
    assert experiment.available == ("svhn/test", "textures/test")
    own = {"stages": stamp(experiment)}
    svhn, textures = own | {"ood": "svhn/test"}, own | {"ood": "textures/test"}
    first = {"score": "mfsim_first_epoch"}
    hidden = [{"stages": "features:0"}, {"seed": "0"}, {"metric": "fpr95"}, {"layers": "all"}, {"t": 10}]
    rows = table_of(
        svhn | {"value": 95.0}, svhn | first | {"value": 90.0},
        textures | {"value": 91.5}, textures | first | {"value": 93.0},
        *(svhn | {"value": 1.0} | change for change in hidden),
    )  # fmt: skip
    growth = module.first_and_last(run, rows)
    assert growth.to_numpy().tolist() == [
        ["CIFAR-10", "SVHN", 90, 95, 5], ["CIFAR-10", "Textures", 93, 91.5, -1.5],
    ]  # fmt: skip
    assert module.growth_said(growth) == (
        "The last epoch's network separates better than the first one's on 1 of 2 sets; "
        "AUROC changes by -1.5 to +5.0 points."
    )
    assert module.growth_title(growth, "cifar10/test").endswith("AUROC changes by -1.5 to +5.0 points")


def test_no_growth_where_nothing_was_run():
    run = settings("26_histograms_resnet50", {"profile": "pack"})
    growth = module.first_and_last(run, results(run))
    assert list(growth.columns) == module.FIRST_AND_LAST
    assert module.growth_said(growth) == "Nothing was measured."


def swept():
    """Means over sets at three t; other sets, seeds, layers and scores beside them."""
    values = {"released": (50, 97, 96), "paper": (88.84, 90, 95), "one_step": (90.26, 93, 92)}
    way = [
        {"reconstruction": mode, "t": t, "value": value}
        for mode, found in values.items() for t, value in zip((1, 3, 10), found, strict=True)
    ]  # fmt: skip
    mse = [{"score": "mse", "layers": "all"} | place | {"value": 100 - place["t"]} for place in way]
    hidden = [{"ood": "svhn/test"}, {"seed": "0"}, {"versus": "x"}, {"layers": "all"},
              {"score": "mfsim_first_epoch"}, {"score": "mse", "layers": "2"}]  # fmt: skip
    return table_of(
        *way, *mse, *(place | {"metric": "fpr95", "value": 99.0} for place in way),
        *(place | change | {"value": 99.5} for change in hidden for place in way),
    )  # fmt: skip


def test_means_over_timesteps():
    means = module.over_timesteps(swept())
    assert means.groupby(["score", "metric"]).size().to_dict() == {
        ("mfsim", "auroc"): 9, ("mfsim", "fpr95"): 9, ("mse", "auroc"): 9,
    }  # fmt: skip
    assert means["value"].ne(99.5).all()
    assert re.findall(r"[\d.]+ ?%", module.timestep_title(means)) == ["50 %", "88 %"]
    *said, spread = module.timesteps_said(means).splitlines()
    assert "MFsim by 5.0" in spread  # of `paper` from t = 3 to 10
    for line, mode, t, value in zip(
        said, means["reconstruction"].unique(), (3, 10, 3), (97, 95, 93), strict=True
    ):
        assert line.startswith(f"- `{mode}`: ")
        assert f"MFsim at t = {t} ({value}.0 %)" in line
        assert "MSE at t = 1 (99.0 %)" in line


def test_layer_shares_are_those_of_the_mse_without_the_layer(monkeypatch):
    """By hand from z0 and reconstruction, on layers of unequal width."""
    run = settings("25_layers", {"profile": "demo"})
    _, both = run.experiments
    channels, picks = (2, 9, 4), np.random.RandomState(0)
    layers, frames, errors = layer_slices(channels), [], {}
    for shift, name in enumerate(both.sets):
        z0, reconstruction = picks.randn(2, 70, sum(channels))
        reconstruction *= 1 + shift * np.linspace(0.4, 0, sum(channels))  # OOD is worse, early layers most
        errors[name] = (z0 - reconstruction) ** 2
        found = {"all": slice(None)} | {str(m): layer for m, layer in enumerate(layers, start=1)}
        columns = {
            f"mse/{part}/released/t3/k1": errors[name][:, chosen].mean(axis=1)
            for part, chosen in found.items()
        }
        frames.append(pd.DataFrame({"set": name, "image": map(str, range(70))} | columns))
    scores = SetScores(pd.concat(frames, ignore_index=True), {}, {"channels": list(channels)})
    asked = []
    monkeypatch.setattr(module, "scores_of", lambda run, e: asked.append(e) or {"DLSR": [scores, None]})

    def by_hand(kept):
        of = {name: error[:, kept].mean(axis=1) for name, error in errors.items()}
        return 100 * np.mean([auroc(of[both.id_test], of[ood]) for ood in both.available])

    shares = module.layer_shares(run)
    assert asked == [both]  # the network of the last layer has no others to leave out
    assert shares["layer"].tolist() == ["1", "2", "3"]
    assert set(shares["ID"]) == {"digits 0-7"}
    place = np.arange(sum(channels))
    without = [by_hand(np.delete(place, layer)) for layer in layers]
    assert shares["left out"].tolist() == pytest.approx(without, abs=1e-9)
    assert shares["alone"].tolist() == pytest.approx([by_hand(place[layer]) for layer in layers], abs=1e-9)
    assert shares["all"].tolist() == pytest.approx([by_hand(place)] * 3, abs=1e-9)
    assert len({*without, by_hand(place)}) == 4


def test_the_title_of_layer_shares_names_the_best_layer_and_the_one_missed_most():
    columns = ["ID", "layer", "alone", "left out", "all"]
    made = [("A", "1", 90, 70, 72), ("A", "2", 65, 60, 72), ("B", "1", 50, 95, 95), ("B", "2", 85, 91, 95)]
    title = module.layer_shares_title(pd.DataFrame(made, columns=columns))
    assert title.startswith("Layer 2 alone reaches 75 %")  # 70 of layer 1
    assert title.endswith("leaving out layer 2 costs most, 8.0 points")


# Deviations


def committed(monkeypatch, **rows):
    """As if these were the results of the items; others have none."""
    none = table_of({}).iloc[:0]
    monkeypatch.setattr(module, "results", lambda run: rows.get("item_" + run.item.name[:2], none))


def test_the_two_signs_of_lr(monkeypatch):
    lr = {"score": "lr", "layers": "all", "ood": "svhn/test", "value": 30.0}
    hidden = [{"ood": AVERAGE}, {"seed": "0"}, {"versus": "x"}, {"metric": "fpr95"}, {"score": "mse"},
              {"layers": "2"}, {"reconstruction": "paper"}]  # fmt: skip
    committed(
        monkeypatch,
        item_01=table_of(lr, *(lr | {"value": 1.0} | change for change in hidden)),
        item_03=table_of(lr, lr | {"ood": "textures/test", "value": 70.5}),  # the first is there already
        item_08=table_of(lr | {"encoder": "lite0", "value": 40.0}),
    )
    signs = module.lr_signs()
    printed, turned = signs["AUROC of LR as printed, %"], signs["with the sign turned, %"]
    assert printed.tolist() == [30, 70.5, 40]
    assert (printed + turned).tolist() == [100, 100, 100]
    assert signs[["encoder", "ID", "OOD"]].to_numpy().tolist() == [
        ["b4", "CIFAR-10", "SVHN"], ["b4", "CIFAR-10", "Textures"], ["lite0", "CIFAR-10", "SVHN"],
    ]  # fmt: skip


def test_turning_lrs_sign_mirrors_its_auroc():
    inside, outside = np.random.RandomState(0).randn(2, 50)
    assert 100 * auroc(-inside, -outside) == pytest.approx(100 - 100 * auroc(inside, outside))


def test_mfsim_with_and_without_the_first_layer(monkeypatch):
    svhn = {"ood": "svhn/test"}
    committed(monkeypatch, item_03=table_of(
        svhn | {"value": 95.0}, svhn | {"layers": "all", "value": 92.5}, svhn | {"layers": "2", "value": 1.0},
        svhn | {"reconstruction": "paper", "value": 1.0}, {"value": 1.0},
    ))  # fmt: skip
    table = module.layers_of_mfsim()
    assert table[["id", "ood", "2..M", "all", "difference"]].to_numpy().tolist() == [
        ["CIFAR-10", "SVHN", 95, 92.5, -2.5]
    ]


def test_reconstructions_of_the_papers_encoder(monkeypatch):
    b4 = {"encoder": module.B4_PACK}
    ways = [HEADLINE.columns, {"reconstruction": "one_step", "t": 3, "noise_draws": 8}]
    committed(monkeypatch, item_08=table_of(
        *(b4 | way | {"value": value} for way, value in zip(ways, (80.0, 81.0), strict=True)),
        *(b4 | way | {"score": "mse", "layers": "all", "value": 90.0} for way in ways),
        b4 | {"layers": "3", "value": 1.0}, b4 | {"metric": "fpr95", "value": 1.0}, {"encoder": "lite0"},
    ))  # fmt: skip
    table = module.reconstructions().set_index(["reconstruction", "noise_draws"])
    assert table["mfsim"].to_dict() == {("released", 1): 80, ("one_step", 8): 81}
    assert set(table["mse"]) == {90}


def test_poolings_are_told_apart(monkeypatch):
    """Each has its own line, and what is said of the headline is of the paper's pooling alone."""
    b4, grid = {"encoder": module.B4_PACK}, {"pooling": "grid14", "value": 70.0}
    other_way = {"reconstruction": "one_step", "value": 1.0}
    committed(monkeypatch, item_08=table_of(
        b4 | {"value": 80.0}, b4 | grid, b4 | grid | other_way, b4 | other_way | {"value": 81.0}
    ))  # fmt: skip
    table = module.poolings().set_index("pooling")["mfsim"]
    assert table.to_dict() == {"gap": 80, "grid14": 70}
    ways = module.reconstructions().set_index("reconstruction")["mfsim"]
    assert ways.to_dict() == {"released": 80, "one_step": 81}


def test_two_printed_averages_are_not_those_of_their_cells():
    assert module.paper_sums().to_dict("records") == [
        {"table": "5", "line": "CIFAR100 ours(+MFsim)", "column": "average", "printed": "14.78",
         "mean of its cells": "14.738"},
        {"table": "9", "line": "ours(+MFsim)", "column": "avg FPR95", "printed": "27.01",
         "mean of its cells": "27.045"},
    ]  # fmt: skip


MADE = {
    "table98_made": (
        ["ID", "Method", "img/s", "SVHN", "LSUN", "average"],
        [
            ["A", "exact", "999", "10.00±0.5", "20.02±0.5", "15.01±0.1"],
            ["A", "rounded", "999", "10.00", "20.01", "15.01"],
            ["A", "off", "999", "10.00", "20.00", "15.01"],
            ["A", "whole", "-", "10", "21", "16"],
        ],
    ),
    "table99_made": (
        ["Method", "SVHN AUROC", "SVHN FPR95", "LSUN AUROC", "LSUN FPR95", "avg AUROC", "avg FPR95"],
        [["off", "90.0", "10.0", "80.0", "30.0", "85.0", "85.0"]],
    ),
}


def test_a_wrong_average_is_found_and_a_rounded_one_is_none(monkeypatch):
    monkeypatch.setattr(module, "AVERAGED", tuple(MADE))
    monkeypatch.setattr(
        module, "paper_table", lambda name: pd.DataFrame(MADE[name][1], columns=MADE[name][0])
    )
    found = module.paper_sums()
    assert found[["table", "line", "column", "printed", "mean of its cells"]].to_numpy().tolist() == [
        ["98", "A off", "average", "15.01", "15.000"],
        ["99", "off", "avg FPR95", "85", "20.000"],
    ]


# Coverage


def test_coverage_of_what_was_never_run(nothing_run):
    table = nothing_run.set_index("item")
    assert set(table.index) == set(ITEMS) - {QUICK}
    assert table["title"].to_dict() == {name: ITEMS[name].title for name in table.index}
    assert set(table["measured"]) == {0}
    assert set(table["date"]) == {""}
    cells = {
        NEAR: 3 * 3 * 2,  # two encoders and another pooling, three scores, two metrics; averages left out
        RIVALS: 2 * 6 * (3 + 6) * 2 + 2 * 3 * 2,  # two ID sets, six OOD sets, six rivals; scenes
        FACES: 4 * (3 + 1),  # AUROC alone
        "06_resnet50": 2 * 6 * 3 * 2,  # unmeasured items have their cells too
        "12_imagenet100": 4 * 3 * 2,
    }
    assert table.loc[list(cells), "cells"].to_dict() == cells
    for name, told in table["state"].items():
        why = ITEMS[name].unmeasured
        assert told == (f"not measured: {why}" if why else "not run")


def test_coverage_counts_what_was_measured(monkeypatch):
    monkeypatch.setattr(experiments, "get_encoder", lambda name: FakeEncoder())
    monkeypatch.setattr(results_module, "bootstrap", partial(bootstrap, draws=20))
    (one,) = settings(QUICK, TINY).experiments
    items = {
        name: Item(name, name, "", {"demo": experiments_of})
        for name, experiments_of in {"50_done": (one,), "51_left": (replace(one, n_test=50),)}.items()
    }
    monkeypatch.setattr(benchmarks, "ITEMS", items)
    rows = reproduce(settings("50_done", {"profile": "demo"}), progress=False)
    table = coverage("demo").set_index("item")
    assert table.loc["50_done", ["measured", "cells"]].tolist() == [2 * 3 * 2] * 2
    assert table.loc["50_done", ["date", "state"]].tolist() == [rows["date"].iloc[0], "up to date"]
    assert table.loc["51_left", ["measured", "cells", "date", "state"]].tolist() == [0, 12, "", "not run"]
    with pytest.raises(UserError, match="'pack' is unknown; choose one of demo"):
        coverage("pack")


def test_coverage_reads_committed_files_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "load_images", lambda *_: pytest.fail("it read images"))
    monkeypatch.setattr(experiments, "extract", lambda *_, **__: pytest.fail("it extracted"))
    monkeypatch.chdir(ROOT)
    table = coverage("pack")
    assert table["item"].tolist() == [name for name, item in ITEMS.items() if "pack" in item.profiles]
    assert (table["measured"] <= table["cells"]).all()
    assert (table["date"] != "").tolist() == (table["measured"] > 0).tolist()
    assert not (tmp_path / "cache").exists()


def test_every_missing_cell_has_its_reason(nothing_run):
    table = module.missing("pack").set_index("why")
    assert table["cells"].sum() == nothing_run["cells"].sum()
    assert set(table.index) == {"not in the data pack", "not run yet"} | {
        item.unmeasured for item in ITEMS.values() if item.unmeasured
    }
    photographs = table.loc[ITEMS["12_imagenet100"].unmeasured]
    assert photographs.tolist() == [4 * 3 * 2, "SUN, iNaturalist, Textures, Places365", "12_imagenet100"]
    assert "iSUN" in table.loc["not in the data pack", "sets"].split(", ")
    assert "Textures" in table.loc["not run yet", "sets"].split(", ")
    assert NEAR in table.loc["not run yet", "items"].split(", ")
    assert NEAR not in table.loc["not in the data pack", "items"].split(", ")


def test_measured_cells_are_not_missing(monkeypatch):
    whole = compared({}, missing(), {"ood": AVERAGE}, missing("fewer than two sets", ood=AVERAGE))
    monkeypatch.setattr("dlsr.benchmarks.ITEMS", {NEAR: ITEMS[NEAR]})
    monkeypatch.setattr(module, "compare", lambda run, rows: whole)
    assert module.missing("pack").to_numpy().tolist() == [["not in the data pack", 1, "SVHN", NEAR]]


def test_sets_that_are_not_whole():
    table = module.partial_sets()
    assert table["set"].tolist() == [key for key, row in DATASETS.items() if row.partial]
    textures = DATASETS["textures/test"]
    assert table.set_index("set").loc["textures/test"].tolist() == [
        textures.images, textures.partial, textures.licence,
    ]  # fmt: skip


def test_the_committed_tables_in_order(tmp_path):
    folder = tmp_path / "here" / "results"
    (folder / "scores").mkdir(parents=True)
    for name in ("08_b.csv", "01_a.csv", "README.md", "scores/x.csv"):
        (folder / name).touch()
    assert [file.name for file in module.results_files()] == ["01_a.csv", "08_b.csv"]


def test_the_distance_of_each_line_from_the_paper():
    cells = pd.DataFrame(
        {
            "metric": ["auroc", "auroc", "auroc", "fpr95"],
            "line": ["MSE", "MSE", "AE, MFsim", "LR"],
            "difference": [-1.0, 2.0, 0.25, 90.0],
        }
    )
    assert module.distances_title(cells).endswith("in points: AE 0.2, MSE 1.5")
