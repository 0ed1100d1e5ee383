import itertools
import multiprocessing

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dlsr import evaluation
from dlsr.errors import UserError
from dlsr.evaluation import beside_paper, evaluate, paper_values, provenance, read_scores, settings
from dlsr.features import extract
from dlsr.metrics import METRICS, bootstrap

from conftest import ROOT, FakeEncoder, image_set, one_sentence

SIZES = {"cifar10/test": 20, "svhn/test": 15, "mnist/test": 10}
ID, *OOD = SIZES
PROFILES = {
    "demo": {"sets": ["a"], "epochs": 2, "lr": 1e-3, "encoder": "small"},
    "pack": {"sets": ["b"], "epochs": 30, "lr": 1e-4, "encoder": "large"},
}


def per_image():
    """Return scores of three methods, larger by 1 and 2 for the OOD sets; kNN has one seed."""
    picks, parts = np.random.RandomState(0), []
    for (shift, (name, n)), seed in itertools.product(enumerate(SIZES.items()), range(2)):
        where = {"set": name, "image": [f"{i}.png" for i in range(n)], "seed": seed}
        scores = {method: picks.randn(n) + shift for method in ("MSE", "LR", "kNN")}
        parts.append(pd.DataFrame(where | scores))
    frame = pd.concat(parts, ignore_index=True)
    frame.loc[frame["seed"] > 0, "kNN"] = np.nan
    frame.attrs = {"about": provenance("cpu", 1.5), "partial": {"svhn/test": "half"}}
    return frame


def of(frame, name, seed, method):
    return frame.loc[(frame["set"] == name) & (frame["seed"] == seed), method].to_numpy()


def row_of(table, **wanted):
    (row,) = table[np.logical_and.reduce([table[k] == v for k, v in wanted.items()])].itertuples()
    return row


def ends(values):
    return tuple(np.percentile(values, [2.5, 97.5]))


def check(*pairs):
    for found, expected in pairs:
        assert found == pytest.approx(expected, nan_ok=True)


# Settings


def test_settings_are_the_profiles_own_but_for_what_is_named():
    run = settings(PROFILES, "demo", epochs=5, lr=0.0, encoder="")
    assert vars(run) == {"sets": ["a"], "epochs": 5, "lr": 1e-3, "encoder": "small"}
    assert vars(settings(PROFILES, "read", epochs=0)) == PROFILES["pack"]
    assert vars(settings({"paper": {"t": 3}}, "read")) == {"t": 3}


@pytest.mark.parametrize(
    ("profile", "overrides", "told"),
    [
        ("large", {}, "'large' was given; this page has read, demo, pack"),
        ("demo", {"epoch": 3}, "epoch=3"),
        *(("demo", {"epochs": wrong}, f"epochs={wrong!r}") for wrong in ("3", 3.0, True, -1)),
        *(("demo", {"encoder": wrong}, f"encoder={wrong!r}") for wrong in (1, None)),
        ("read", {"epochs": 5}, "epochs=5 .*'read'"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(profile, overrides, told):
    with pytest.raises(UserError, match=told) as error:
        settings(PROFILES, profile, **overrides)
    one_sentence(error)
    with pytest.raises(UserError, match=r"'read' was given; this page has demo\."):
        settings({"demo": PROFILES["demo"]}, "read")


# From scores to tables


def test_score_sets_has_a_row_for_each_image_and_seed():
    images = {name: image_set(2, seed=seed) for seed, name in enumerate("ab")}
    features = {n: extract(one, FakeEncoder(), progress=False) for n, one in images.items()}
    scores = lambda one, seed: {"sum": one.raw().sum(1) + seed}  # noqa: E731
    table = evaluation.score_sets(scores, features, ["b", "a"], seeds=2)
    keys = table[["set", "seed", "image"]].agg(lambda row: " ".join(map(str, row)), axis=1)
    by_hand = itertools.product("ba", "01", images["a"].ids)
    assert keys.tolist() == [" ".join(key) for key in by_hand]
    np.testing.assert_allclose(of(table, "a", 1, "sum"), features["a"].raw().sum(1) + 1, rtol=1e-5)
    assert table.attrs["partial"] == {"b": "", "a": ""}


def test_values_are_the_metrics_in_percent_averaged_over_seeds_and_sets():
    frame = per_image()
    table = evaluate(frame, id_test=ID, draws=5)
    assert len(table) == 3 * 3 * len(METRICS)
    for (name, metric), method in itertools.product(METRICS.items(), ("MSE", "LR", "kNN")):
        seeds, by_set = range(1 if method == "kNN" else 2), {}
        for ood in OOD:
            pairs = [(of(frame, ID, s, method), of(frame, ood, s, method)) for s in seeds]
            by_set[ood] = [100 * metric(*pair) for pair in pairs]
        by_set["average"] = np.mean(list(by_set.values()), axis=0)
        for ood, values in by_set.items():
            row = row_of(table, ood=ood, method=method, metric=name)
            check((row.value, np.mean(values)), (row.seed_low, min(values)))
            check((row.seed_high, max(values)), (row.seeds, len(seeds)))
            assert (row.id, row.n_id, row.n_ood) == (ID, 20, {**SIZES, "average": 25}[ood])
    assert table.attrs == frame.attrs
    assert "average" not in set(evaluate(frame, id_test=ID, ood=OOD[:1], draws=5)["ood"])


def test_intervals_and_paired_differences_are_of_the_same_draws():
    frame = per_image()
    table = evaluate(frame, id_test=ID, versus="MSE", draws=30)
    draws = {}
    for name, (method, seeds) in itertools.product(OOD, {"MSE": 2, "LR": 2, "kNN": 1}.items()):
        pairs = [(of(frame, ID, s, method), of(frame, name, s, method)) for s in range(seeds)]
        draws[name, method] = 100 * bootstrap(*zip(*pairs, strict=True), draws=30)["auroc"].mean(0)
        draws["average", method] = draws.get(("average", method), 0) + draws[name, method] / 2
    for (name, method), values in draws.items():
        where = {"ood": name, "metric": "auroc"}
        row, own = (row_of(table, method=m, versus="", **where) for m in (method, "MSE"))
        check(((row.ci_low, row.ci_high), ends(values)))
        if method != "MSE":
            difference = row_of(table, method=method, versus="MSE", **where)
            check((difference.value, row.value - own.value))
            check(((difference.ci_low, difference.ci_high), ends(values - draws[name, "MSE"])))
    assert set(table.loc[table["versus"] != "", "method"]) == {"LR", "kNN"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"id_test": "cifar9/test"}, "no scores of both cifar9/test"),
        ({"ood": ["svhn"]}, "no scores of both .* svhn"),
        ({"metrics": ["aroc"]}, "'aroc'"),
        ({"versus": "auroc"}, "'auroc' and .* known are MSE"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_sentence(options, told):
    with pytest.raises(UserError, match=told) as error:
        evaluate(per_image(), **{"id_test": ID, "draws": 5} | options)
    one_sentence(error)


# The paper's values


def test_the_papers_values_stand_beside_and_its_mean_is_over_the_measured_sets():
    """Table 1 prints 97.3 and 99.4 for MSE, and 98.8 as the mean over seven sets."""
    table = evaluate(per_image().rename(columns={"kNN": "VAE"}), id_test=ID, versus="MSE", draws=5)
    both = beside_paper(table, "table 1")
    for method, (svhn, mnist) in {"MSE": (97.3, 99.4), "VAE": (95.9, 99.9)}.items():
        for name, value in zip([*OOD, "average"], (svhn, mnist, (svhn + mnist) / 2), strict=True):
            row = row_of(both, method=method, ood=name, metric="auroc", versus="")
            same = method == "MSE"  # the VAE of the paper is another one, on pixels
            check((row.paper, value), (row.difference, row.value - value if same else np.nan))
    assert both.loc[both["versus"] != "", ["paper", "difference"]].isna().all(axis=None)
    pd.testing.assert_frame_equal(both[list(table)], table)
    assert both.attrs == table.attrs
    with pytest.raises(UserError, match=r"'table 99'.*table 8") as error:
        paper_values("table 99")
    one_sentence(error)


# Results on disk


def written(project, folder):
    """Return whether a page's two files, whole, are all that was written, and lie in a folder."""
    found = {path for path in project.rglob("*.*") if path.suffix not in (".lock", ".yml")}
    names = ("08_x-pack.csv", "scores/08_x-pack.parquet")
    return found == {project / folder / name for name in names}


@pytest.fixture
def project(monkeypatch, tmp_path):
    """Return a folder that holds a book; the current folder is below it."""
    folder = tmp_path / "project"
    (folder / "notebooks").mkdir(parents=True)
    (folder / "results").mkdir()
    (folder / "_config.yml").touch()
    monkeypatch.chdir(folder / "notebooks")
    assert evaluation.project_folder() == folder
    return folder


def saved(results_dir="", frame=None):
    frame = per_image() if frame is None else frame
    table, more = (evaluate(frame, id_test=ID, draws=5), frame[["set", "image", "seed", "MSE"]].copy())
    more.attrs = frame.attrs | {"partial": {"more/test": "a third"}}
    options = {"profile": "pack", "results_dir": results_dir}
    return evaluation.save_results("08_x", {"": frame, "more": more}, table, **options)


def test_exploration_never_writes_into_results(project):
    assert saved() == project / "_build" / "results"
    assert written(project, "_build/results")


def test_scores_come_back_as_they_were_saved(project):
    frame, folder = per_image(), project / "results"
    assert saved(str(folder)) == folder
    read = read_scores("08_x")
    pd.testing.assert_frame_equal(read, frame)
    assert read.attrs["about"] == frame.attrs["about"]
    more = read_scores("08_x", "more")
    assert list(more) == ["set", "image", "seed", "MSE"]
    assert read.attrs["partial"]["svhn/test"] == "half"
    assert more.attrs["partial"]["more/test"] == "a third"
    table = pd.read_csv(folder / "08_x-pack.csv", keep_default_na=False)
    assert set(table["page"]) == {"08_x"}
    assert set(table["seeding"]) == {"v1"}
    expected = evaluate(frame, id_test=ID, draws=5)
    np.testing.assert_allclose(table["value"].astype(float), expected["value"], atol=1e-4)


def save_often(frame, table):
    for _ in range(15):
        options = {"profile": "pack", "results_dir": str(evaluation.project_folder() / "results")}
        evaluation.save_results("08_x", {"": frame}, table, **options)


def test_two_writers_at_once_leave_whole_files(project):
    """Whoever reads meanwhile, and afterwards, finds a file of one of them, and nothing beside."""
    context, frames = multiprocessing.get_context("fork"), [per_image(), per_image()]
    frames[1]["MSE"] += 5
    saved(project / "results")
    table = pd.concat([evaluate(frames[0], id_test=ID, draws=5)] * 100)
    writers = [context.Process(target=save_often, args=(frame, table)) for frame in frames]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        content = (project / "results" / "scores" / "08_x-pack.parquet").read_bytes()
        read = pq.read_table(pa.BufferReader(content))["MSE"].to_numpy()
        assert any(np.array_equal(read[: len(frame)], frame["MSE"]) for frame in frames)
        assert len(pd.read_csv(project / "results" / "08_x-pack.csv")) in (len(table), 18)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert written(project, "results")


def test_committed_scores_are_read_with_their_origin(monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    frame = read_scores("02_celeba")
    assert list(frame)[:6] == ["set", "image", "seed", "MSE", "LR", "MFsim"]
    table = evaluate(frame, id_test="celeba/test", draws=5)
    old = pd.read_csv(ROOT / "results" / "02_celeba.csv", keep_default_na=False)
    wanted = {"score": "mse", "layers": "all", "reconstruction": "released", "versus": ""}
    old = row_of(old, **wanted, metric="auroc", seed="mean")
    row = row_of(table, method="MSE", metric="auroc", ood="textures/test")
    assert row.value == pytest.approx(float(old.value), abs=1e-4)
    assert (row.n_id, row.n_ood, row.seeds) == (int(old.n_id), int(old.n_ood), 2)
    assert frame.attrs["partial"]["textures/test"].startswith("10 of 47")
    for part in ("commit (not recorded)", frame.attrs["about"]["date"], "seeding v0"):
        assert part in evaluation.origin(frame)
    with pytest.raises(UserError, match=r"no committed scores of 02_celeba none.*'demo'") as error:
        read_scores("02_celeba", "none")
    one_sentence(error)


def test_new_results_say_by_what_they_were_made(monkeypatch):
    assert provenance()["commit"] == "not in a repository"
    monkeypatch.chdir(ROOT)
    about = provenance("cuda", 12.34)
    assert (about["commit"] != "not in a repository") == (ROOT / ".git").exists()
    assert (about["device"], about["seconds"], about["seeding"]) == ("cuda", 12.3, "v1")
    assert all(about[name] for name in ("torch", "timm", "numpy", "scikit-learn", "date"))
    assert [provenance(d)["precision"] for d in ("", "cpu", "cuda:0")] == ["float32", "float32", "bf16"]
