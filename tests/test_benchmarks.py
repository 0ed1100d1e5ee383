from dataclasses import asdict, fields, replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import FakeEncoder, one_sentence

from dlsr import benchmarks as module
from dlsr import experiments, results
from dlsr.benchmarks import (
    AVERAGE,
    CELLS,
    ITEMS,
    REPORTS,
    Parameters,
    checked,
    compare,
    headline,
    paper_cells,
    read_results,
    reproduce,
    results_file,
    run_name,
    scores_folder,
    scores_of,
    select,
    settings,
    stamp,
    state,
)
from dlsr.datasets import DATASETS, UserError
from dlsr.metrics import METRICS, auroc, bootstrap
from dlsr.results import COLUMNS, read_rows, read_scores
from dlsr.training import _Run

NEAR, QUICK, RIVALS, FACES, SIZES = (
    "08_near_ood", "00_quickstart", "03_rivals", "02_celeba", "04_lfdn_size",
)  # fmt: skip
TINY = {"profile": "demo", "n_train": 150, "n_test": 60, "width": 8, "blocks": 1, "epochs": 2}
NAMES = [field.name for field in fields(Parameters)]
DEMO_OOD = ["digits_8_9/test", "photo_patches/test"]


# Parameters


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"epoch": 3}, "'epoch' is no parameter"),
        ({"lr": 1e-3}, "'lr' is no parameter"),
        ({"epochs": "3"}, "epochs was given '3'; it needs int"),
        ({"epochs": 3.0}, "it needs int"),
        ({"epochs": True}, "it needs int"),
        ({"layers": 5}, "it needs str"),
        ({"encoder": None}, "it needs str"),
        ({"profile": 1}, "it needs str"),
    ],
    ids=str,
)
def test_wrong_names_and_types_are_refused_with_the_list(wrong, told):
    for check in (checked, partial(settings, NEAR)):
        with pytest.raises(UserError, match=told) as error:
            check(wrong)
        assert all(name in one_sentence(error) for name in NAMES)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"profile": "large"}, "demo, pack, paper"),
        ({"encoder": "vgg99"}, "'vgg99'"),
        ({"protocol": "blurred"}, "native, matched"),
        ({"pooling": "max"}, "gap, grid14"),
        ({"t": 100}, r"t=100 .* released takes a whole number in 1\.\.99"),
        ({"layers": "6"}, r"layers='6' .* 1\.\.5"),
        ({"layers": "0"}, r"1\.\.5"),
        ({"layers": "first"}, "'first'"),
        *(
            ({name: -1}, f"{name}=-1")
            for name in ("seeds", "n_train", "n_test", "width", "blocks", "epochs", "t")
        ),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused_before_any_work(wrong, told, tmp_path):
    with pytest.raises(UserError, match=told) as error:
        settings(NEAR, {"profile": "demo"} | wrong)
    one_sentence(error)
    assert not (tmp_path / "cache").exists()


def test_an_unknown_item_is_refused():
    with pytest.raises(UserError, match=NEAR):
        settings("99_nothing", {})


def test_0_and_no_text_take_the_profiles_own_values():
    for name in ITEMS:
        own = ITEMS[name].profiles.get("paper", ())
        if own:
            assert settings(name, {**asdict(Parameters()), "profile": "paper"}).experiments == own


def test_a_parameter_holds_for_all_experiments_and_leaves_the_rest():
    changes = {"seeds": 4, "n_train": 40, "n_test": 30, "epochs": 7, "t": 9, "layers": "last",
               "protocol": "matched", "pooling": "grid14", "encoder": "efficientnet_lite0"}  # fmt: skip
    run = settings(NEAR, {"profile": "pack"} | changes)
    own = ITEMS[NEAR].profiles["pack"]
    assert len(run.experiments) == len(own) == 3
    for one, before in zip(run.experiments, own, strict=True):
        assert one.training == replace(before.training, epochs=7)
        assert [way.t for way in one.reconstructions] == [9] * len(before.reconstructions)
        assert [way.mode for way in one.reconstructions] == [way.mode for way in before.reconstructions]
        for name in set(changes) - {"epochs", "t"}:
            assert getattr(one, name) == changes[name]
        assert (one.ood, one.setting, one.by_layer) == (before.ood, before.setting, before.by_layer)


def test_one_timestep_for_a_sweep_leaves_each_way_once():
    (one,) = settings("24_timestep", {"profile": "demo", "t": 5}).experiments
    assert [(way.mode, way.t) for way in one.reconstructions] == [
        ("released", 5), ("paper", 5), ("one_step", 5),
    ]  # fmt: skip


def test_a_notebooks_namespace_may_hold_other_things():
    namespace = {
        "__name__": "x",
        "_i1": "a",
        "In": [],
        "Out": {},
        "np": np,
        "table": pd.DataFrame(),
        "f": len,
    }
    assert settings(NEAR, namespace | {"profile": "pack"}).profile == "pack"


def test_running_the_cell_again_is_no_mistake():
    namespace = {"profile": "demo", "__name__": "__main__"}
    first = settings(QUICK, namespace)
    namespace |= {"id_train": first.experiments[0].id_train, "order": [1]}
    assert settings(QUICK, namespace) == first
    namespace["profile"] = "nonsense"
    with pytest.raises(UserError, match="nonsense"):
        settings(QUICK, namespace)


def test_only_a_profile_as_it_stands_goes_into_the_book():
    assert settings(NEAR, {"profile": "pack"}).for_the_book
    assert settings(QUICK, {}).for_the_book
    assert not settings(NEAR, {"profile": "demo"}).for_the_book
    for changed in (
        {"encoder": "efficientnet_lite0"}, {"epochs": 3}, {"n_train": 10}, {"pooling": "grid14"},
        {"n_test": 10}, {"t": 5}, {"layers": "last"},
    ):  # fmt: skip
        assert not settings(NEAR, {"profile": "pack"} | changed).for_the_book
    own = {"encoder": "efficientnet_b4_without_last_block", "protocol": "native", "pooling": "gap", "t": 3}
    assert settings(FACES, {"profile": "pack"} | own).for_the_book


# Items


def all_experiments():
    return [(item, p, e) for item in ITEMS.values() for p, es in item.profiles.items() for e in es]


def test_the_demo_never_uses_the_tables_sets():
    for _, profile, experiment in all_experiments():
        names = (experiment.id_train, *experiment.sets)
        built_in = {DATASETS[name].source == "scikit-learn" for name in names}
        assert built_in == {profile == "demo"}


def test_all_experiments_name_registered_sets_and_encoders():
    for name, item in ITEMS.items():
        assert item.name == name
        for profile in item.profiles:
            run = settings(name, {"profile": profile})
            for experiment in run.experiments:
                assert {experiment.id_train, *experiment.sets, *experiment.ood} <= set(DATASETS)
                assert set(experiment.sets) <= set(run.sets)
                assert experiment.id_test not in experiment.ood
                assert experiment.seeds >= 1
    assert not set(REPORTS) & set(ITEMS)


def test_an_item_without_experiments_says_why():
    for item in ITEMS.values():
        assert bool(item.unmeasured) == (not item.profiles.get("pack", True))
        assert item.profiles.get("paper", True)


def test_experiments_of_a_measured_profile_have_stamps_of_their_own():
    for item in ITEMS.values():
        for profile in set(item.profiles) - {"demo"}:
            stamps = [stamp(experiment) for experiment in item.profiles[profile]]
            assert len(set(stamps)) == len(stamps), item.name


def test_the_paper_profile_fetches_and_scores_all_sets():
    for _, profile, experiment in all_experiments():
        if profile == "paper":
            assert experiment.available == experiment.ood
            assert experiment.n_test == 0


def test_a_runs_name_tells_runs_apart():
    variants = [{}, {"epochs": 3}, {"width": 16}, {"blocks": 2}, {"n_train": 99}, {"pooling": "grid14"},
                {"protocol": "matched"}, {"encoder": "resnet50"}, {"t": 5}, {"n_test": 9},
                {"profile": "pack"}, {"layers": "last"}]  # fmt: skip
    names = {run_name(settings(NEAR, {"profile": "demo"} | variant)) for variant in variants}
    assert len(names) == len(variants)
    assert all(name.startswith(NEAR) for name in names)


# What the paper prints


def test_the_papers_table_is_quoted_whole():
    table = module.paper_table("table8_cifar10_vs_cifar100")
    assert list(table.columns) == ["Based", "Method", "FPR95", "AUROC"]
    assert table.set_index("Method").loc["ASH-S", "AUROC"] == "87.13"


COUNTS = {
    ("table1_cifar10_generative_auroc", "auroc"): 8 * 8,
    ("table2_celeba_auroc", "auroc"): 6 * 5,
    ("table3_auroc_effb4", "auroc"): 18 * 7,
    ("table5_fpr95_effb4", "fpr95"): 18 * 7,
    ("table4_lfdn_ablation", "auroc"): 4 * 3,
    ("table6_auroc_resnet50", "auroc"): 18 * 7,
    ("table7_fpr95_resnet50", "fpr95"): 18 * 7,
    ("table8_cifar10_vs_cifar100", "auroc"): 9,
    ("table8_cifar10_vs_cifar100", "fpr95"): 8,  # one is not printed
    ("table9_diffguard", "auroc"): 6 * 3,
    ("table9_diffguard", "fpr95"): 6 * 3,
    ("table10_lmd_auroc", "auroc"): 5 * 4,
    ("table11_ae_vae_features_auroc", "auroc"): 3 * 8,
    ("table12_imagenet100", "auroc"): 7 * 5,
    ("table12_imagenet100", "fpr95"): 7 * 5,
    ("figure5_single_vs_multi_layer", "auroc"): 3 * 6,
}


def test_every_table_is_counted_here():
    assert {(table, metric) for item in ITEMS.values() for metric, table in item.tables.items()} == set(
        COUNTS
    )


@pytest.mark.parametrize(("table", "metric"), COUNTS)
def test_all_cells_of_a_table_are_found(table, metric):
    cells = paper_cells(table, metric)
    assert len(cells) == COUNTS[table, metric]
    assert set(cells["id"]) | set(cells["ood"]) <= {*DATASETS, AVERAGE}
    assert cells["paper"].between(0, 100).all()
    assert not cells.duplicated(["id", "ood", "setting", "method"]).any()


@pytest.mark.parametrize(
    ("table", "metric", "place", "value"),
    [
        ("table1_cifar10_generative_auroc", "auroc",
         ("cifar10/test", "lsun_crop/test", "", "AutoEncoder (feature, MFsim)"), 81.5),
        ("table1_cifar10_generative_auroc", "auroc", ("cifar10/test", "average", "", "ours(+MFsim)"), 99.7),
        ("table2_celeba_auroc", "auroc", ("celeba/test", "inaturalist/test", "", "ours(+MSE)"), 100),
        ("table3_auroc_effb4", "auroc", ("cifar100/test", "isun/test", "", "SimCLR+KNN"), 77.21),
        ("table5_fpr95_effb4", "fpr95", ("cifar10/test", "places365/val", "", "ours(+LR)"), 0.83),
        ("table4_lfdn_ablation", "auroc",
         ("cifar100/test", "average", "Number of Blocks=8", "ours(+LR)"), 87.32),
        ("table7_fpr95_resnet50", "fpr95", ("cifar100/test", "lsun_resize/test", "", "ours(+MFsim)"), 39.66),
        ("table8_cifar10_vs_cifar100", "fpr95", ("cifar10/test", "cifar100/test", "", "VAE"), 90.41),
        ("table8_cifar10_vs_cifar100", "auroc", ("cifar10/test", "cifar100/test", "", "ours(+LR)"), 87.24),
        ("table9_diffguard", "auroc", ("cifar10/test", "tiny_imagenet/val", "", "ours(+MSE)"), 97.68),
        ("table9_diffguard", "fpr95", ("cifar10/test", "average", "", "DiffGuard+Deep Ens"), 48.78),
        ("table10_lmd_auroc", "auroc", ("cifar100/test", "cifar10/test", "", "ours(+MFsim)"), 64.58),
        ("table10_lmd_auroc", "auroc", ("cifar10/test", "svhn/test", "", "LMD"), 99.20),
        ("table11_ae_vae_features_auroc", "auroc", ("cifar10/test", "kmnist/test", "", "VAE(+MFsim)"), 99.96),
        ("table12_imagenet100", "fpr95", ("imagenet100/val", "inaturalist/test", "", "ours(+MSE)"), 71.88),
        ("figure5_single_vs_multi_layer", "auroc", ("celeba/test", "average", "single", "ours(+LR)"), 92.79),
        ("figure5_single_vs_multi_layer", "auroc",
         ("cifar10/test", "average", "multi", "ours(+MFsim)"), 99.35),
    ],
)  # fmt: skip
def test_paper_values_as_printed(table, metric, place, value):
    cells = paper_cells(table, metric).set_index(["id", "ood", "setting", "method"])
    assert cells.loc[place, "paper"] == value


def nothing(run):
    """No rows of results."""
    return read_results(run)


def test_the_papers_values_of_every_measured_experiment_are_found():
    """Of Table 4 and Figure 5 only averages are printed; the other tables name every set."""
    for item in ITEMS.values():
        run = settings(item.name, {"profile": "pack" if "pack" in item.profiles else "demo"})
        cells = compare(run, nothing(run))
        assert cells["paper"].isna().all() or item.tables, item.name
        if item.name in (SIZES, "25_layers"):
            cells = cells[(cells["ood"] == AVERAGE) & (cells["setting"] != "")]
        elif item.tables:
            known = ~cells["setting"].isin(["Lite0", "grid14", module.ONLY_HERE])
            cells = cells[known & (cells["ood"] != AVERAGE)]
        else:
            continue
        if item.name == "11_ae_vae":  # which prints MFsim alone
            cells = cells[cells["line"].str.contains("MFsim")]
        assert cells["paper"].notna().all(), item.name
        assert len(cells) > 0 or item.unmeasured


# Paper and measured side by side


def rows_of(run, value=80.0, only=None):
    """Rows as they are written, every value the same; the seeds one point to either side."""
    rows = []
    for e in {stamp(e): e for e in run.experiments}.values():  # in the demo some are the same
        sets = [name for name in e.available if only is None or name in only]
        for ood in [*sets, *([AVERAGE] if len(sets) > 1 else [])]:
            for line in e.lines:
                for metric in run.item.metrics:
                    own = {"ood": ood, "metric": metric, "stages": stamp(e), "versus": "", "partial": "few"}
                    own |= line.variant(e.layers, e.reconstructions[0])
                    own |= {"ci_low": value - 0.5, "ci_high": value + 0.5}
                    rows += [
                        own | {"seed": seed, "value": value + shift}
                        for seed, shift in (("0", -1), ("1", 1), ("mean", 0))
                    ]
    return pd.DataFrame(rows) if rows else nothing(run)


def test_the_paper_stands_beside_what_was_measured():
    run = settings(NEAR, {"profile": "paper"})
    table = compare(run, rows_of(run))
    assert list(table.columns) == CELLS
    assert table["line"].tolist() == ["MSE", "LR", "MFsim"] * 2
    assert table["metric"].tolist() == ["auroc"] * 3 + ["fpr95"] * 3
    assert table["paper"].tolist() == [87.54, 87.24, 85.60, 48.87, 49.48, 53.70]
    np.testing.assert_allclose(table["difference"], 80 - table["paper"])
    assert table["why"].eq("").all()
    same = {"measured": 80, "ci_low": 79.5, "ci_high": 80.5, "seed_low": 79, "seed_high": 81,
            "partial": "few", "id": "cifar10/test", "ood": "cifar100/test"}  # fmt: skip
    for column, value in same.items():
        assert set(table[column]) == {value}


def test_rows_of_other_stages_and_paired_differences_are_not_compared():
    run = settings(NEAR, {"profile": "paper"})
    rows = rows_of(run)
    for left_out in (rows.assign(stages="features:0"), rows.assign(versus="mse/all/released/t3/k1")):
        assert compare(run, left_out)["measured"].isna().all()
        both = compare(run, pd.concat([rows, left_out.assign(value=1.0)]))
        assert set(both["measured"]) == {80}


def test_a_setting_that_the_paper_has_not_has_no_paper_values():
    run = settings(NEAR, {"profile": "pack"})
    table = compare(run, rows_of(run))
    assert table.groupby("setting")["paper"].count().to_dict() == {"": 6, "Lite0": 0, "grid14": 0}
    assert table["measured"].notna().all()


def cell(table, **wanted):
    (found,) = table[np.logical_and.reduce([table[k] == v for k, v in wanted.items()])].to_dict("records")
    return found


def test_no_difference_is_taken_from_values_on_other_features():
    run = settings(RIVALS, {"profile": "pack"})
    table = compare(run, rows_of(run))
    svhn = partial(cell, table, id="cifar10/test", ood="svhn/test", metric="auroc")
    assert svhn(line="kNN")["paper"] == 92.40
    assert np.isnan(svhn(line="kNN")["difference"])
    assert svhn(line="MSE")["difference"] == pytest.approx(80 - 97.31)
    unlike = table[~table["same"].astype(bool)]
    assert set(unlike["line"]) == {
        "kNN", "Mahalanobis", "MSP (uses labels)", "Energy (uses labels)", "DICE (uses labels)",
        "ASH-S (uses labels)",
    }  # fmt: skip
    assert unlike["measured"].notna().any()
    assert unlike["difference"].isna().all()


def test_what_was_not_measured_has_its_reason():
    run = settings(RIVALS, {"profile": "pack"})
    table = compare(run, rows_of(run, only=["textures/test"]))
    at = partial(cell, table, id="cifar100/test", metric="fpr95", line="MFsim")
    assert at(ood="lsun_crop/test")["why"] == "not in the data pack"
    assert at(ood="svhn/test")["why"] == "not run yet"
    assert at(ood="textures/test")["why"] == ""
    assert at(ood=AVERAGE)["why"] == "not run yet"  # two sets are in the pack
    for ood in ("lsun_crop/test", "svhn/test"):
        assert np.isnan(at(ood=ood)["measured"])
        assert at(ood=ood)["paper"] > 0


def test_the_average_is_over_what_was_measured_on_both_sides():
    run = settings(RIVALS, {"profile": "pack"})
    assert run.experiments[0].available == ("svhn/test", "textures/test")
    at = partial(cell, compare(run, rows_of(run)), ood=AVERAGE, line="LR")
    assert at(id="cifar10/test", metric="auroc")["paper"] == pytest.approx((98.22 + 100) / 2)
    assert at(id="cifar100/test", metric="fpr95")["paper"] == pytest.approx((62.06 + 0.42) / 2)
    assert at(id="cifar10/test", metric="auroc")["difference"] == pytest.approx(80 - 99.11)
    whole = settings(RIVALS, {"profile": "paper"})
    at = partial(cell, compare(whole, rows_of(whole)), ood=AVERAGE, line="MFsim", metric="auroc")
    assert at(id="cifar10/test")["paper"] == pytest.approx(99.34, abs=0.01)  # as the paper prints it


def test_the_average_of_a_single_measured_set_is_none():
    run = settings(FACES, {"profile": "pack"})
    assert run.experiments[0].available == ("textures/test",)
    average = cell(compare(run, rows_of(run)), ood=AVERAGE, line="MSE")
    assert average["why"] == "fewer than two sets"
    assert np.isnan(average["measured"])


def test_printed_averages_stand_beside_their_settings():
    """The one table that prints nothing else; over fewer sets there is no difference to take."""
    run = settings(SIZES, {"profile": "paper"})
    at = partial(cell, compare(run, rows_of(run)), ood=AVERAGE)
    assert at(setting="Linear=720", line="MSE")["paper"] == 83.35
    assert at(setting="Linear=1440", line="MFsim")["paper"] == 97.20
    assert at(setting="Linear=1440", line="MFsim")["difference"] == pytest.approx(80 - 97.2)
    assert np.isnan(at(setting="", line="MFsim")["paper"])
    run = settings(SIZES, {"profile": "pack"})
    assert len(run.experiments[0].available) < len(run.experiments[0].ood)
    at = partial(cell, compare(run, rows_of(run)), ood=AVERAGE)
    assert at(setting="Linear=720", line="MSE")["paper"] == 83.35
    assert np.isnan(at(setting="Linear=720", line="MSE")["difference"])


def test_the_demo_has_no_paper_values():
    run = settings(RIVALS, {"profile": "demo"})
    table = compare(run, rows_of(run))
    assert table["measured"].notna().all()
    assert table["paper"].isna().all()
    assert table["difference"].isna().all()


# A whole run


@pytest.fixture
def fake(monkeypatch):
    encoder = FakeEncoder()
    monkeypatch.setattr(experiments, "get_encoder", lambda name: encoder)
    monkeypatch.setattr(results, "bootstrap", partial(bootstrap, draws=20))
    return encoder


def tiny(item=NEAR, **parameters):
    return settings(item, TINY | parameters)


def whole_run(item=NEAR, **parameters):
    run = tiny(item, **parameters)
    return run, reproduce(run, progress=False)


def test_a_run_from_images_to_results(fake, tmp_path, monkeypatch):
    run, rows = whole_run(seeds=2)
    here = tmp_path / "here"
    file = here / "_build" / "demo" / f"{NEAR}.csv"
    assert file == results_file(run)
    assert not (here / "results").exists()
    table = read_rows(file)
    assert list(table.columns) == COLUMNS
    assert set(table["metric"]) == set(METRICS)
    assert set(table["seed"]) == {"0", "1", "mean"}
    assert set(table["reconstruction"]) == {"released", "paper", "one_step"}
    assert set(table["layers"]) == {"all", "2..M", "1", "2", "3"}
    assert set(table["n_train"]) == {150}
    assert set(table["stages"]) == {stamp(run.experiments[0])}
    sizes = table[["ood", "n_id", "n_ood"]].drop_duplicates().to_numpy().tolist()
    assert sorted(sizes) == [[AVERAGE, 60, 120], *([name, 60, 60] for name in DEMO_OOD)]
    pd.testing.assert_frame_equal(rows, table)
    pd.testing.assert_frame_equal(read_results(run), table)

    column = "mse/all/released/t3/k1"
    assert len(list(scores_folder(run).rglob("*.parquet"))) == 2 * 3
    for seed, scores in enumerate(scores_of(run, run.experiments[0])["DLSR"]):
        by_hand = [100 * auroc(scores.of("digits/test", column), scores.of(o, column)) for o in DEMO_OOD]
        at = partial(select, table, score="mse", layers="all", metric="auroc", seed=str(seed))
        for ood, value in zip([*DEMO_OOD, AVERAGE], [*by_hand, np.mean(by_hand)], strict=True):
            assert at(ood=ood)["value"] == pytest.approx(value, abs=1e-4)
        assert set(run.experiments[0].columns) <= set(scores.columns)
    with pytest.raises(UserError, match="exactly one"):
        select(rows, score="mse")

    comparison = compare(run, rows)
    assert comparison["metric"].tolist() == ["auroc"] * 9 + ["fpr95"] * 9
    assert comparison["line"].tolist() == (["MSE"] * 3 + ["LR"] * 3 + ["MFsim"] * 3) * 2
    assert comparison["ood"].tolist() == [*DEMO_OOD, AVERAGE] * 6
    first = select(rows, score="mse", layers="all", metric="auroc", ood=DEMO_OOD[0])
    assert comparison["measured"][0] == first["value"]
    assert comparison["seed_low"][0] <= comparison["measured"][0] <= comparison["seed_high"][0]
    assert state(run) == "up to date"

    # Once more: nothing is extracted, trained, scored or written
    images, written = fake.images, file.stat().st_mtime_ns
    monkeypatch.setattr(module, "score", lambda *_, **__: pytest.fail("it scored again"))
    pd.testing.assert_frame_equal(whole_run(seeds=2)[1], rows)
    assert (fake.images, file.stat().st_mtime_ns) == (images, written)


def test_items_share_networks_and_scores(fake, monkeypatch):
    whole_run(NEAR)
    images = fake.images
    monkeypatch.setattr(_Run, "epoch", lambda self: pytest.fail("it trained again"))
    monkeypatch.setattr(experiments, "all_scores", lambda *_, **__: pytest.fail("it scored again"))
    run, rows = whole_run(QUICK)
    assert fake.images == images
    assert set(rows["benchmark"]) == {QUICK}
    assert state(run) == "up to date"


def test_runs_of_other_settings_stand_side_by_side(fake):
    run, rows = whole_run(QUICK)
    other, others = whole_run(QUICK, epochs=1)
    table = read_rows(results_file(run))
    assert len(table) == len(rows) + len(others)
    assert set(table["epochs"]) == {1, 2}
    assert set(others["epochs"]) == {1}
    assert state(run) == state(other) == "up to date"


def test_a_run_of_one_experiment_after_another_is_whole_again(fake):
    """Runs of one item that share settings replace each other's rows; none is left half."""
    _, first = whole_run(QUICK, seeds=2)
    whole_run(QUICK, seeds=1)
    run, again = whole_run(QUICK, seeds=2)
    assert len(again) == len(first)
    assert compare(run, again)["measured"].notna().all()


def test_a_baselines_rows_on_one_layer_and_on_all_stand_side_by_side(fake, monkeypatch):
    (one,) = ITEMS[QUICK].profiles["demo"]
    item = replace(ITEMS[QUICK], profiles={"demo": (replace(one, baselines=("knn",)),)})
    monkeypatch.setitem(ITEMS, QUICK, item)
    whole_run(QUICK)
    whole_run(QUICK, layers="last")
    for layers in ("", "last"):
        run, rows = whole_run(QUICK, layers=layers)
        cells = compare(run, rows)
        assert cells.loc[cells["line"] == "kNN", "measured"].notna().all(), layers


def with_other_code(monkeypatch, *names):
    """As if these files had been changed."""
    plain = experiments.code_hash
    changed = lambda *parts: plain(*parts) + "x" * bool({*names} & {*parts})  # noqa: E731
    monkeypatch.setattr(experiments, "code_hash", changed)


def test_the_state_follows_the_code(fake, monkeypatch):
    run = tiny(QUICK)
    assert state(run) == "not run"
    first = reproduce(run, progress=False)
    assert state(run) == "up to date"
    for names, told in (
        (["plots"], "up to date"),
        (["scores"], "out of date: scores"),
        (["encoders", "metrics"], "out of date: features, metrics"),
        (["lfdn"], "out of date: training, scores"),
    ):
        with monkeypatch.context() as patched:
            with_other_code(patched, *names)
            assert state(run) == told
            assert module.results(run).empty == (told != "up to date")
    with_other_code(monkeypatch, "scores")
    again = reproduce(run, progress=False)
    assert state(run) == "up to date"
    assert len(read_results(run)) == len(again) == len(first)  # the old rows are replaced


def test_rows_that_lack_a_set_are_no_whole_result(fake):
    run, rows = whole_run(QUICK)
    rows[rows["ood"] != DEMO_OOD[1]].to_csv(results_file(run), index=False)
    assert state(run) == "out of date: sets"
    assert set(reproduce(run, progress=False)["ood"]) == {*DEMO_OOD, AVERAGE}


def test_results_of_an_earlier_version_are_out_of_date(fake):
    run, rows = whole_run(QUICK)
    rows.drop(columns="stages").to_csv(results_file(run), index=False)
    assert state(run) == "out of date: features, training, scores, metrics"
    assert len(reproduce(run, progress=False)) == len(rows)
    assert len(read_results(run)) == len(rows)


def test_a_run_without_experiments_measures_nothing():
    run = settings("06_resnet50", {"profile": "pack"})
    assert reproduce(run, progress=False).empty
    assert state(run) == f"not measured: {ITEMS['06_resnet50'].unmeasured}"
    assert not results_file(run).exists()


def test_a_damaged_file_of_scores_is_named(fake):
    run, _ = whole_run(QUICK)
    file = next(scores_folder(run).rglob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match="not a whole file of scores") as error:
        scores_of(run, run.experiments[0])
    assert str(file) in one_sentence(error)
    with pytest.raises(UserError):
        read_scores(file)


# Rows


def test_headline_rows_and_columns():
    assert ITEMS[NEAR].profiles["paper"][0].columns == [
        "mse/all/released/t3/k1", "lr/all/released/t3/k1", "mfsim/2..M/released/t3/k1",
    ]  # fmt: skip
    run = settings(NEAR, {"profile": "paper"})
    rows = rows_of(run)
    rows["value"] = rows["score"].map({"mse": 3, "lr": 4, "mfsim": 5})
    table = headline(rows, ood="cifar100/test", metrics=["fpr95"])
    assert list(zip(table["score"], table["metric"], table["value"], strict=True)) == [
        ("mse", "fpr95", 3), ("lr", "fpr95", 4), ("mfsim", "fpr95", 5),
    ]  # fmt: skip
    with pytest.raises(UserError, match="0 rows"):
        headline(rows, ood="svhn/test")
