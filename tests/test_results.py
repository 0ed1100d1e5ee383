from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import one_sentence

from dlsr import results as module
from dlsr.datasets import UserError
from dlsr.metrics import METRICS, bootstrap, interval
from dlsr.results import (
    COLUMNS,
    SETTINGS,
    SetScores,
    as_table,
    joined,
    project_folder,
    read_rows,
    read_scores,
    results_folder,
    summarise,
    variant_column,
    write_rows,
    write_scores,
)

VARIANT = {"score": "mse", "layers": "all", "reconstruction": "released", "t": 3, "noise_draws": 1}
VARIANTS = [
    VARIANT,
    VARIANT | {"score": "mfsim", "layers": "2..M"},
    VARIANT | {"score": "mfsim", "layers": "3"},
    VARIANT | {"reconstruction": "paper"},
]
MSE, MFSIM, LAYER, PAPER = map(variant_column, VARIANTS)
ABOUT = {
    "benchmark": "08_near_ood", "method": "DLSR", "n_train": 50, "encoder": "fake", "weights_sha256": "a",
    "protocol": "native", "pooling": "gap", "width": 8, "blocks": 1, "epochs": 2, "partial": "",
    "profile": "demo", "device": "cpu", "images_per_second": 12.5,
}  # fmt: skip
SETS = {"id/test": 20, "near/test": 15, "far/test": 10}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(module, "bootstrap", partial(bootstrap, draws=30))


def scores(seed=0, variants=VARIANTS):
    """Hand-made: every score is noise, and larger by 1 and 2 for the OOD sets."""
    picks = np.random.RandomState(seed)
    frames = []
    for shift, (name, n) in enumerate(SETS.items()):
        frame = pd.DataFrame({"set": name, "image": [f"{i}.png" for i in range(n)]})
        for variant in variants:
            frame[variant_column(variant)] = (picks.randn(n) + shift).astype(np.float32)
        frames.append(frame)
    columns = {variant_column(variant): variant for variant in variants}
    return SetScores(pd.concat(frames, ignore_index=True), columns, ABOUT | {"seed": seed})


@pytest.fixture(scope="module")
def summary():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "bootstrap", partial(bootstrap, draws=30))
        return summarise([scores(0), scores(1)], id_set="id/test")


def chosen(rows, **wanted):
    return rows[np.logical_and.reduce([rows[name] == value for name, value in wanted.items()])]


# Scores on disk


def test_a_variants_column():
    assert MSE == "mse/all/released/t3/k1"
    assert variant_column(VARIANT | {"t": 50, "noise_draws": 8}) == "mse/all/released/t50/k8"


def test_scores_of_one_set():
    one = scores()
    assert one.sets == list(SETS)
    assert len(one.of("near/test", MSE)) == 15
    assert np.array_equal(one.of("far/test", MFSIM), one.table[MFSIM].to_numpy()[-10:])


def test_scores_come_back_as_they_were(tmp_path):
    file = tmp_path / "new" / "scores.parquet"
    written = scores()
    write_scores(file, written)
    read = read_scores(file)
    pd.testing.assert_frame_equal(read.table, written.table, check_dtype=False)
    assert read.table[MSE].dtype == np.float32
    assert read.columns == written.columns
    assert read.about == written.about


def test_a_file_of_scores_cut_short_is_refused(tmp_path):
    file = tmp_path / "scores.parquet"
    write_scores(file, scores())
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match="not a whole file of scores") as error:
        read_scores(file)
    assert str(file) in one_sentence(error)


def test_a_parquet_file_of_something_else_is_refused(tmp_path):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(UserError, match="not a whole file of scores"):
        read_scores(tmp_path / "other.parquet")


# Summaries


def test_every_cell_has_a_row_for_each_seed_and_one_for_their_mean(summary):
    assert list(summary.columns) == COLUMNS
    for ood, metrics in {"near/test": METRICS, "far/test": METRICS, "average": ("auroc", "fpr95")}.items():
        for variant in VARIANTS:
            for metric in metrics:
                cell = chosen(summary, ood=ood, metric=metric, versus="", **variant)
                assert cell["seed"].tolist() == ["0", "1", "mean"]
    assert set(summary["ood"]) == {"near/test", "far/test", "average"}


def test_values_are_the_metrics_in_percent(summary):
    for metric, function in METRICS.items():
        cell = chosen(summary, ood="near/test", metric=metric, versus="", **VARIANTS[1])
        by_hand = [
            100 * function(run.of("id/test", MFSIM), run.of("near/test", MFSIM))
            for run in (scores(0), scores(1))
        ]
        assert cell["value"].tolist() == pytest.approx([*by_hand, np.mean(by_hand)])


def test_intervals_are_those_of_the_shared_draws(summary):
    runs = [scores(0), scores(1)]
    names = list(runs[0].columns)
    pairs = [(run.of("id/test", name), run.of("far/test", name)) for name in names for run in runs]
    for metric in ("auroc", "fpr95"):
        values = 100 * bootstrap(pairs, draws=30)[metric][2:4]  # MFsim of both seeds
        cell = chosen(summary, ood="far/test", metric=metric, versus="", **VARIANTS[1])
        expected = [interval(values[0]), interval(values[1]), interval(values.mean(0))]
        assert list(zip(cell["ci_low"], cell["ci_high"], strict=True)) == [
            pytest.approx(pair) for pair in expected
        ]
    cell = chosen(summary, metric="aupr_in")
    assert cell[["ci_low", "ci_high"]].isna().all(axis=None)


def test_differences_from_the_first_score_are_of_the_same_reconstruction(summary):
    versus = summary[summary["versus"] != ""]
    assert set(versus["versus"]) == {MSE}
    assert set(versus["metric"]) == {"auroc"}
    assert set(map(tuple, versus[["score", "layers", "reconstruction"]].to_numpy())) == {
        ("mfsim", "2..M", "released")
    }
    for row in versus.itertuples():
        cell = partial(chosen, summary, ood=row.ood, metric="auroc", versus="", seed=row.seed)
        difference = cell(**VARIANTS[1])["value"].item() - cell(**VARIANTS[0])["value"].item()
        assert row.value == pytest.approx(difference)
        assert row.ci_low < row.ci_high


def test_identical_scores_differ_by_0_with_no_width():
    run = scores(variants=VARIANTS[:2])
    run.table[MFSIM] = run.table[MSE]
    versus = summarise([run], id_set="id/test").query("versus != ''")
    assert len(versus) == 3 * 2  # two sets and their average, a seed and the mean
    assert not versus[["value", "ci_low", "ci_high"]].to_numpy().any()


def test_the_average_is_the_unweighted_mean_over_ood_sets(summary):
    """Of its values and, draw by draw, of its interval; the ID images are drawn alike for all sets."""
    runs = [scores(0), scores(1)]
    for metric in ("auroc", "fpr95"):
        of = partial(chosen, summary, metric=metric, versus="", **VARIANTS[1])
        near, far, average = (of(ood=o)["value"].to_numpy() for o in ("near/test", "far/test", "average"))
        np.testing.assert_allclose(average, (near + far) / 2)
    draws = {
        ood: bootstrap([(run.of("id/test", MFSIM), run.of(ood, MFSIM)) for run in runs], draws=30)
        for ood in ("near/test", "far/test")
    }
    for metric in ("auroc", "fpr95"):
        values = 50 * (draws["near/test"][metric] + draws["far/test"][metric])
        cell = chosen(summary, ood="average", metric=metric, versus="", **VARIANTS[1])
        expected = [interval(values[0]), interval(values[1]), interval(values.mean(0))]
        assert list(zip(cell["ci_low"], cell["ci_high"], strict=True)) == [
            pytest.approx(pair) for pair in expected
        ]
    assert set(chosen(summary, ood="average")["n_ood"]) == {15 + 10}
    assert set(chosen(summary, ood="average")["n_id"]) == {20}


def test_a_single_ood_set_has_no_average():
    whole = scores(variants=VARIANTS[:1])
    run = SetScores(whole.table[whole.table["set"] != "far/test"], whole.columns, whole.about)
    assert set(summarise([run], id_set="id/test")["ood"]) == {"near/test"}


def test_rows_say_which_sets_are_not_whole():
    whole = scores(variants=VARIANTS[:1])
    about = {"id_train": "id/train", "train_partial": "half", "partials": {"id/test": "", "far/test": "few"}}
    rows = summarise([SetScores(whole.table, whole.columns, whole.about | about)], id_set="id/test")
    found = rows.groupby("ood")["partial"].unique().map(list).to_dict()
    told = ["id/train: half; far/test: few"]
    assert found == {"near/test": ["id/train: half"], "far/test": told, "average": told}


def test_sets_are_joined_into_one_run():
    whole = scores()
    parts = [
        SetScores(whole.table[whole.table["set"] == name], whole.columns, whole.about | {"partial": told})
        for name, told in (("id/test", ""), ("near/test", "few"))
    ]
    turned = parts[1].table[[*parts[1].table.columns[:2], *reversed(parts[1].table.columns[2:])]]
    run = joined([parts[0], SetScores(turned, parts[1].columns, parts[1].about)])
    assert run.sets == ["id/test", "near/test"]
    assert np.array_equal(run.of("near/test", MFSIM), whole.of("near/test", MFSIM))
    assert run.about["partials"] == {"id/test": "", "near/test": "few"}
    assert run.columns == whole.columns


def test_a_method_without_reconstruction():
    """Its columns bear its name, and its scores are compared with its own first."""
    plain = {"reconstruction": "", "t": 0, "noise_draws": 0, "method": "probe"}
    variants = [plain | {"score": name, "layers": "last"} for name in ("msp", "dice")]
    assert [variant_column(variant) for variant in variants] == ["probe:msp/last", "probe:dice/last"]
    rows = summarise([scores(variants=variants)], id_set="id/test")
    assert set(rows["method"]) == {"probe"}
    assert set(rows.loc[rows["versus"] != "", "score"]) == {"dice"}
    assert set(rows["versus"]) == {"", "probe:msp/last"}


def test_rows_say_what_they_are_of(summary):
    row = chosen(summary, ood="far/test", metric="auroc", versus="", seed="mean", **VARIANT).iloc[0]
    assert (row["id"], row["n_id"], row["n_ood"], row["n_train"]) == ("id/test", 20, 10, 50)
    assert {name: row[name] for name in ABOUT} == ABOUT
    assert row["version"] == module.__version__
    assert len(row["date"]) == 10


# The CSV


def test_a_table_comes_back_with_its_types(summary, tmp_path):
    file = tmp_path / "results" / "table.csv"
    written = write_rows(file, summary)
    read = read_rows(file)
    assert list(read.columns) == COLUMNS
    pd.testing.assert_frame_equal(read, written, check_exact=False, atol=5.1e-5, rtol=0, check_dtype=False)
    assert read["n_train"].dtype.kind == "i"
    assert read["value"].dtype.kind == "f"
    assert set(read["partial"]) == {""}
    assert "b'" not in file.read_text()


def test_writing_the_same_rows_again_changes_nothing(summary, tmp_path):
    file = tmp_path / "table.csv"
    write_rows(file, summary)
    content = file.read_text()
    write_rows(file, summary)
    assert file.read_text() == content
    write_rows(file, summary.sample(frac=1, random_state=0))
    assert file.read_text() == content


def test_rows_of_the_same_settings_are_replaced_and_others_kept(summary, tmp_path):
    file = tmp_path / "table.csv"
    write_rows(file, summary)
    again = summary.assign(value=1.25, device="cuda", date="2000-01-01")
    assert len(write_rows(file, again)) == len(summary)
    assert set(read_rows(file)["value"]) == {1.25}
    other = summary.assign(width=16, value=2.5)
    both = write_rows(file, other)
    assert len(both) == 2 * len(summary)
    assert both.groupby("width")["value"].unique().map(list).to_dict() == {8: [1.25], 16: [2.5]}
    part = write_rows(file, again.head(1).assign(value=9.0))
    assert len(part) == 2 * len(summary)
    assert (part["value"] == 9).sum() == 1


def test_what_was_measured_is_no_setting():
    assert not {"value", "ci_low", "ci_high", "date", "version", "device", "stages"} & set(SETTINGS)
    assert {"seed", "metric", "t", "epochs", "weights_sha256", "versus", "n_train"} <= set(SETTINGS)


def test_a_table_that_lacks_columns_is_refused(summary, tmp_path):
    file = tmp_path / "table.csv"
    summary.drop(columns=["protocol", "t"]).to_csv(file, index=False)
    with pytest.raises(UserError, match="lacks the columns protocol, t"):
        read_rows(file)
    with pytest.raises(UserError, match="lacks the columns"):
        write_rows(file, summary)


def test_a_table_of_an_earlier_version_is_read_and_added_to(summary, tmp_path):
    """Columns may be appended: what was measured before has them empty."""
    file = tmp_path / "table.csv"
    summary.drop(columns=["seeds", "stages"]).to_csv(file, index=False)
    assert read_rows(file)["seeds"].isna().all()
    assert set(read_rows(file)["stages"]) == {""}
    rows = write_rows(file, summary.assign(benchmark="another"))
    assert len(rows) == 2 * len(summary)
    assert rows.loc[rows["benchmark"] == "another", "seeds"].notna().all()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00"])
def test_a_file_that_is_no_table_is_refused(content, tmp_path):
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"table\.csv") as error:
        read_rows(tmp_path / "table.csv")
    one_sentence(error)


def test_as_table_gives_one_type_a_column():
    rows = pd.DataFrame({"t": ["3"], "value": ["1.5"], "seed": [0], "versus": [None]})
    table = as_table(rows)
    assert table.iloc[0].tolist() == [3, 1.5, "0", ""]
    assert rows["t"].tolist() == ["3"]


def test_a_full_disk_is_told_in_a_sentence_and_leaves_the_old_table(summary, tmp_path, monkeypatch):
    file = tmp_path / "table.csv"
    write_rows(file, summary)
    content = file.read_text()

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", disk_full)
    monkeypatch.setattr(module.pq, "write_table", disk_full)
    with pytest.raises(UserError, match="No space left"):
        write_rows(file, summary)
    with pytest.raises(UserError, match="No space left"):
        write_scores(tmp_path / "scores.parquet", scores())
    assert file.read_text() == content
    assert [p.name for p in tmp_path.glob("*.*")] == ["table.csv"]


# Folders


def test_results_lie_in_the_project_and_the_demos_apart(tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "notebooks").mkdir(parents=True)
    (project / "_config.yml").touch()
    monkeypatch.chdir(project / "notebooks")
    assert project_folder() == project
    assert results_folder("paper") == project / "results"
    assert results_folder("demo") == project / "_build" / "demo"


def test_outside_a_project_results_lie_in_the_current_folder(tmp_path):
    assert project_folder() == tmp_path / "here"
