from dataclasses import asdict, fields
from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import FakeEncoder, one_sentence

from dlsr import benchmarks as module
from dlsr import results
from dlsr.benchmarks import (
    HEADLINE_SCORES,
    ITEMS,
    Parameters,
    checked,
    compare,
    extract_sets,
    headline,
    headline_columns,
    measure,
    paper_value,
    read_results,
    results_file,
    run_name,
    score_sets,
    select,
    settings,
    train_networks,
)
from dlsr.datasets import DATASETS, UserError
from dlsr.metrics import METRICS, auroc, bootstrap
from dlsr.results import COLUMNS, read_rows, read_scores
from dlsr.training import _Run

NEAR, QUICK = "08_near_ood", "00_quickstart"
TINY = {"profile": "demo", "n_train": 150, "width": 8, "blocks": 1, "epochs": 2}
NAMES = [field.name for field in fields(Parameters)]


# Parameters


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"epoch": 3}, "'epoch' is no parameter"),
        ({"lr": 1e-3}, "'lr' is no parameter"),
        ({"epochs": "3"}, "epochs was given '3'; it needs int"),
        ({"epochs": 3.0}, "it needs int"),
        ({"epochs": True}, "it needs int"),
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
        *(({name: -1}, f"{name}=-1") for name in ("seeds", "n_train", "width", "blocks", "epochs")),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(wrong, told):
    with pytest.raises(UserError, match=told) as error:
        settings(NEAR, wrong)
    one_sentence(error)


def test_an_unknown_item_is_refused():
    with pytest.raises(UserError, match=NEAR):
        settings("99_nothing", {})


def test_0_takes_the_profiles_own_value():
    profile = ITEMS[NEAR].profiles["paper"]
    run = settings(NEAR, {**asdict(Parameters()), "profile": "paper"})
    assert run.profile == profile
    assert run.n_train is None
    run = settings(NEAR, {"profile": "paper", "epochs": 7, "seeds": 2, "n_train": 40})
    assert (run.profile.training.epochs, run.profile.seeds, run.n_train) == (7, 2, 40)
    assert run.profile.training.width == profile.training.width
    assert run.profile.encoder == profile.encoder


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
    assert settings(NEAR, namespace | {"profile": "demo"}).profile_name == "demo"


def test_the_demo_never_uses_the_tables_sets():
    for item in ITEMS.values():
        demo = item.profiles["demo"]
        for name in (demo.id_train, demo.id_test, *demo.ood):
            assert DATASETS[name].source == "scikit-learn"
        for name, profile in item.profiles.items():
            assert name == "demo" or DATASETS[profile.id_test].source != "scikit-learn"


def test_all_profiles_name_registered_sets_and_encoders():
    for name, item in ITEMS.items():
        assert item.name == name
        for profile_name, profile in item.profiles.items():
            run = settings(name, {"profile": profile_name})
            assert {profile.id_train, *run.sets} <= set(DATASETS)
            assert profile.id_test not in profile.ood
            assert profile.seeds >= 1


def test_the_headline_rows_of_every_item_are_in_the_paper():
    for item in ITEMS.values():
        if item.table:
            for score in HEADLINE_SCORES:
                assert 50 < paper_value(item.table, module.PAPER_ROWS[score], "AUROC") <= 100


def test_paper_values_as_printed():
    assert paper_value("table8_cifar10_vs_cifar100", "ours(+MSE)", "AUROC") == 87.54
    assert paper_value("table8_cifar10_vs_cifar100", "ours(+MFsim)", "AUROC") == 85.60
    assert paper_value("table8_cifar10_vs_cifar100", "ours(+LR)", "FPR95") == 49.48
    with pytest.raises(UserError, match="no row 'ours'"):
        paper_value("table8_cifar10_vs_cifar100", "ours", "AUROC")


def test_a_runs_name_tells_runs_apart():
    variants = [{}, {"epochs": 3}, {"width": 16}, {"blocks": 2}, {"n_train": 99}, {"pooling": "grid14"},
                {"protocol": "matched"}, {"encoder": "resnet50"}]  # fmt: skip
    names = {run_name(settings(NEAR, {"profile": "demo"} | variant)) for variant in variants}
    assert len(names) == len(variants)
    assert all(name.startswith(NEAR) for name in names)


# A whole run


@pytest.fixture
def fake(monkeypatch):
    encoder = FakeEncoder()
    monkeypatch.setattr(module, "get_encoder", lambda name: encoder)
    monkeypatch.setattr(results, "bootstrap", partial(bootstrap, draws=20))
    return encoder


def whole_run(**parameters):
    run = settings(NEAR, TINY | parameters)
    features = extract_sets(run, progress=False)
    networks = train_networks(run, features, progress=False)
    scores = score_sets(run, features, networks)
    return run, features, scores, measure(run, scores)


def test_a_run_from_images_to_results(fake, tmp_path, monkeypatch):
    run, features, _, rows = whole_run(seeds=2)
    here = tmp_path / "here"
    assert list(features) == ["digits/train", "digits/test", "digits_8_9/test"]
    assert [len(part) for part in features.values()] == [150, 722, 354]

    file = here / "_build" / "demo" / f"{NEAR}.csv"
    assert file == results_file(run)
    assert not (here / "results").exists()
    table = read_rows(file)
    assert list(table.columns) == COLUMNS
    assert set(table["metric"]) == set(METRICS)
    assert set(table["seed"]) == {"0", "1", "mean"}
    assert set(table["reconstruction"]) == {"released", "paper", "one_step"}
    assert set(table["n_train"]) == {150}
    assert set(map(tuple, table[["n_id", "n_ood"]].to_numpy())) == {(722, 354)}

    files = sorted((file.parent / "scores").glob("*.parquet"))
    assert [f.stem for f in files] == [f"{run_name(run)}-seed{seed}" for seed in (0, 1)]
    column = "mse/all/released/t3/k1"
    for seed, parquet in enumerate(files):
        read = read_scores(parquet)
        assert read.about["seed"] == seed
        assert read.table["set"].value_counts().to_dict() == {"digits/test": 722, "digits_8_9/test": 354}
        by_hand = 100 * auroc(read.of("digits/test", column), read.of("digits_8_9/test", column))
        row = select(table, score="mse", layers="all", metric="auroc", seed=str(seed))
        assert row["value"] == pytest.approx(by_hand, abs=1e-4)

    comparison = compare(run, rows)
    assert comparison["score"].tolist() == ["mse", "lr", "mfsim"] * 2
    assert comparison["metric"].tolist() == ["auroc"] * 3 + ["fpr95"] * 3
    assert comparison["paper"].isna().all()
    assert comparison["measured"][0] == select(rows, score="mse", layers="all", metric="auroc")["value"]
    with pytest.raises(UserError, match="exactly one"):
        select(rows, score="mse")
    pd.testing.assert_frame_equal(read_results(run), table)
    assert set(headline_columns()) <= set(read.columns)

    # Once more: nothing is extracted or trained, and the rows are replaced
    images, content = fake.images, table.drop(columns="images_per_second")
    monkeypatch.setattr(_Run, "step", lambda self, z0: pytest.fail("it trained again"))
    whole_run(seeds=2)
    assert fake.images == images
    again = read_rows(file).drop(columns="images_per_second")
    pd.testing.assert_frame_equal(again, content)


def test_sets_do_not_share_their_noise(fake, monkeypatch):
    """Images in the same place of two sets would else be scored with the same noise."""
    seeds = []
    whole = module.all_scores

    def listening(*arguments, seed, stride_seed):
        seeds.append((seed, stride_seed))
        return whole(*arguments, seed=seed, stride_seed=stride_seed)

    monkeypatch.setattr(module, "all_scores", listening)
    whole_run(seeds=2)
    assert len({noise for noise, _ in seeds}) == 2 * 2  # sets and networks; all reconstructions share theirs
    assert {strides for _, strides in seeds} == {0, 1}  # all sets of a network take the same way back


def test_running_the_cell_again_is_no_mistake():
    namespace = {"profile": "demo", "__name__": "__main__"}
    first = settings(QUICK, namespace)
    namespace |= {"id_train": first.profile.id_train, "order": [1]}
    assert settings(QUICK, namespace) == first
    namespace["profile"] = "nonsense"
    with pytest.raises(UserError, match="nonsense"):
        settings(QUICK, namespace)


def test_only_a_profile_as_it_stands_goes_into_the_book():
    assert settings(NEAR, {"profile": "pack"}).for_the_book
    assert settings(QUICK, {}).for_the_book
    assert not settings(NEAR, {"profile": "demo"}).for_the_book
    for changed in ({"encoder": "efficientnet_lite0"}, {"epochs": 3}, {"n_train": 10}, {"pooling": "grid14"}):
        assert not settings(NEAR, {"profile": "pack"} | changed).for_the_book
    assert settings(NEAR, {"profile": "pack", "encoder": "efficientnet_b4_without_last_block"}).for_the_book


def test_the_papers_table_is_quoted_whole():
    table = module.paper_table("table8_cifar10_vs_cifar100")
    assert list(table.columns) == ["Based", "Method", "FPR95", "AUROC"]
    assert table.set_index("Method").loc["ASH-S", "AUROC"] == "87.13"


def test_headline_rows_and_columns():
    assert headline_columns() == [
        "mse/all/released/t3/k1", "lr/all/released/t3/k1", "mfsim/2..M/released/t3/k1",
    ]  # fmt: skip
    rows = mean_rows().assign(value=range(6))
    table = headline(rows, ood="cifar100/test", metrics=["fpr95"])
    assert list(zip(table["score"], table["metric"], table["value"], strict=True)) == [
        ("mse", "fpr95", 3), ("lr", "fpr95", 4), ("mfsim", "fpr95", 5),
    ]  # fmt: skip
    with pytest.raises(UserError, match="0 rows"):
        headline(rows, ood="svhn/test")


def test_runs_of_other_settings_stand_side_by_side(fake):
    run, *_, rows = whole_run()
    whole_run(epochs=1)
    table = read_rows(results_file(run))
    assert len(table) == 2 * len(rows)
    assert set(table["epochs"]) == {1, 2}


def mean_rows():
    """The headline scores' rows on CIFAR-100, all with the same value."""
    how = {"reconstruction": "released", "t": 3, "noise_draws": 1, "seed": "mean", "versus": ""}
    value = {"ood": "cifar100/test", "value": 80.0, "ci_low": 79.0, "ci_high": 81.0}
    return pd.DataFrame(
        [
            {"score": score, "layers": layers, "metric": metric, **how, **value}
            for metric in ("auroc", "fpr95")
            for score, layers in HEADLINE_SCORES.items()
        ]
    )


def test_the_paper_stands_beside_what_was_measured():
    table = compare(settings(NEAR, {"profile": "paper"}), mean_rows())
    assert table["score"].tolist() == ["mse", "lr", "mfsim"] * 2
    assert table["paper"].tolist() == [87.54, 87.24, 85.60, 48.87, 49.48, 53.70]
    np.testing.assert_allclose(table["difference"], 80 - table["paper"])
