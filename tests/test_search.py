import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import MADE_CHANNELS, ROOT, SMALL_RIVALS, SMALL_STUDY, SMALL_VARIANTS, one_sentence

from dlsr import search as module
from dlsr.comparison import DEVELOPMENT, NEAR, STUDIES, Data
from dlsr.datasets import UserError
from dlsr.features import layer_zscore
from dlsr.metrics import auroc
from dlsr.results import results_folder
from dlsr.rivals import RIVALS
from dlsr.search import (
    BUDGET,
    KINDS,
    PAPER_PARAMETERS,
    SEARCH,
    VARIANTS_CODE,
    Inputs,
    bench_of,
    choice_file,
    choose,
    objectives,
    read_choice,
    read_table,
    search,
    search_file,
    search_sha256,
    stamp_of,
    tried,
)
from dlsr.training import _Run
from dlsr.variants import VARIANTS, LinearDenoiser

DEVELOPED = [ood.name for ood in SMALL_STUDY.of(DEVELOPMENT)]
TRIED = 2 * (1 + 2 + 2) + len(SMALL_VARIANTS)  # rivals on both features, and variants


def run():
    return search(SMALL_STUDY, "demo", progress=False)


def file():
    return search_file(SMALL_STUDY, "demo")


@pytest.fixture
def fitted(monkeypatch):
    """What is fitted, by its name and setting; ``left`` more may be fitted before the run is killed."""

    class Fitted(Counter):
        left = 9999

    fits, fit = Fitted(), module._fit

    def listening(bench, about):
        if fits.left == 0:
            raise KeyboardInterrupt
        fits.left -= 1
        fits[about["name"], about["setting"]] += 1
        return fit(bench, about)

    monkeypatch.setattr(module, "_fit", listening)
    return fits


@pytest.fixture
def bench(fresh_chapter):
    return bench_of(Data(SMALL_STUDY, progress=False), progress=False)


# Vectors and networks


def test_raw_inputs_are_standardised_over_the_fitted_images(bench):
    inputs = bench.inputs
    fitted = inputs.of(bench.fitted, "raw")
    assert fitted.dtype == np.float32
    np.testing.assert_allclose(fitted.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(fitted.std(axis=0), 1, atol=1e-4)
    raw = bench.fitted.raw().astype(np.float64)
    by_hand = (bench.calibration.raw() - raw.mean(axis=0)) / raw.std(axis=0)
    np.testing.assert_allclose(inputs.of(bench.calibration, "raw"), by_hand, atol=1e-4)
    z0 = layer_zscore(bench.calibration.raw(), MADE_CHANNELS)
    np.testing.assert_array_equal(inputs.of(bench.calibration, "z0"), z0)


def test_a_feature_without_spread_is_harmless(bench):
    flat = replace(bench.fitted, values=np.ones_like(bench.fitted.values))
    assert np.isfinite(Inputs(flat).of(flat, "raw")).all()


def test_the_bench_holds_the_splits_images(bench):
    found = Data(SMALL_STUDY, progress=False)
    ids = found.images("digits/train").ids
    assert list(bench.fitted.ids) == [ids[i] for i in found.split.fit]
    assert list(bench.calibration.ids) == [ids[i] for i in found.split.calibration]


def test_the_search_trains_networks_of_three_kinds(bench):
    own = SMALL_STUDY.training
    settings = {name: bench.training(name) for name in ("base", "small", "standardised")}
    assert settings["base"] == own
    assert settings["small"] == settings["standardised"] == replace(own, width=8, blocks=1)


def test_a_network_is_trained_once(bench, monkeypatch):
    network = bench.network("small")
    assert bench.network("small") is network
    monkeypatch.setattr(_Run, "epoch", lambda run: pytest.fail("it is trained again"))
    again = bench_of(Data(SMALL_STUDY, progress=False), progress=False).network("small")
    assert again.network.width == 8
    for one, other in zip(network.network.parameters(), again.network.parameters(), strict=True):
        np.testing.assert_array_equal(one.numpy(force=True), other.numpy(force=True))


def test_other_denoisers_stand_in_a_networks_place(bench):
    z0 = bench.fitted.z0()
    nothing = bench.bank("fitted", bench.fitted, "untrained/small")
    np.testing.assert_array_equal(nothing.residual((10, 0)), z0)
    linear = bench.bank("fitted", bench.fitted, "linear/base")
    assert isinstance(linear.network, LinearDenoiser)
    np.testing.assert_allclose(linear.network.mean.numpy(), z0.mean(axis=0), atol=1e-5)
    assert linear.trained is None
    assert bench.bank("fitted", bench.fitted, "linear/base") is linear
    raw = bench.bank("fitted", bench.fitted, "standardised")
    np.testing.assert_array_equal(raw.z0, bench.inputs.of(bench.fitted, "raw"))
    assert linear._plain is bench.bank("fitted", bench.fitted, "base")._plain
    assert linear._plain is not raw._plain


def test_a_fitted_score_does_not_change_when_another_is_fitted(bench):
    """The variants share their parts, and the same one is fitted by several networks."""
    variant, images = VARIANTS["residual Gaussian + kNN"], bench.calibration
    own, _ = bench.fit_variant(variant)
    before = own("one", images)
    alone = bench.fit_variant(variant, "untrained/base")[0]("one", images)
    assert not np.array_equal(before, alone)
    np.testing.assert_array_equal(own("other", images), before)


def test_a_variants_cost_is_by_the_studys_network(bench):
    parameters = sum(p.numel() for p in bench.network("base").network.parameters())
    assert bench.cost(VARIANTS["MSE"]) == 3 * parameters
    c = sum(MADE_CHANNELS)
    fusion = VARIANTS["residual Gaussian + kNN"]
    assert bench.cost(fusion) == parameters + c**2 + len(bench.fitted) * c
    assert bench.cost(replace(fusion, network="small")) < bench.cost(fusion)


def test_a_networks_training_is_timed_by_an_epoch_of_a_few_vectors(bench, monkeypatch):
    asked = []

    def timed(vectors, settings, **options):
        asked.append((len(vectors), settings.epochs, options))
        return SimpleNamespace(vectors_per_second=10.0)

    monkeypatch.setattr(module, "train", timed)
    monkeypatch.setattr(module, "TIMED", 50)
    expected = SMALL_STUDY.training.epochs * len(bench.fitted) / 10
    assert bench.training_seconds("base") == bench.training_seconds("base") == expected
    assert asked == [(50, 1, {"progress": False})]


def test_an_autoencoders_training_is_timed_though_the_cache_holds_it(bench, monkeypatch):
    lengths, train = [], module.train_network

    def timed(network, x, **options):
        lengths.append((len(x), options["epochs"]))
        train(network, x, **options)

    monkeypatch.setattr(module, "train_network", timed)
    monkeypatch.setattr(module, "TIMED", 50)
    rival, label = RIVALS["vae"], "epochs=10"
    before = module.fit_rival(bench, rival, label, "raw")[1]
    assert module.rival_training_seconds(bench, rival, label, "raw") > 0
    assert lengths == [(50, 1)]
    after = module.fit_rival(bench, rival, label, "raw")[1]
    x = bench.inputs.of(bench.calibration, "raw")
    np.testing.assert_array_equal(after.ood_score(x), before.ood_score(x))  # the cached one is as it was
    assert module.rival_training_seconds(bench, RIVALS["mahalanobis"], "default", "z0") == 0


def test_the_budget_is_the_papers_own_cost():
    assert pytest.approx(VARIANTS["MSE"].score.cost(720, PAPER_PARAMETERS, 0)) == BUDGET


# The search


def test_everything_is_tried_on_the_development_sets_alone(small_chapter):
    table = read_table(file())
    assert list(table.columns) == SEARCH
    assert set(table["ood"]) == set(DEVELOPED)
    assert len(table) == TRIED * len(DEVELOPED)
    rivals, variants = (table[table["kind"] == kind] for kind in ("rival", "variant"))
    assert set(zip(rivals["features"], rivals["name"], rivals["setting"], strict=True)) == {
        (kind, rival.name, label) for kind in KINDS for rival in SMALL_RIVALS.values()
        for label, _ in rival.candidates
    }  # fmt: skip
    assert set(variants["name"]) == set(SMALL_VARIANTS)
    assert rivals["multiply_adds"].isna().all()
    assert (variants["multiply_adds"] > 0).all()
    assert set(variants["stamp"]) == {stamp_of(SMALL_STUDY, VARIANTS_CODE)}


def test_report_sets_are_not_touched_before_the_choice(finished_study):
    _, order = finished_study
    assert order.before == set(DEVELOPED)
    assert order.after == {ood.name for ood in SMALL_STUDY.sets} - {"near_dev"}  # nothing to match there


def test_the_searchs_values_are_aurocs_of_held_out_id_and_development(small_chapter):
    data = Data(SMALL_STUDY, progress=False)
    bench = bench_of(data, progress=False)
    held_out = data.of_id(SMALL_STUDY.id_train).take(data.split.development)
    table = read_table(file()).set_index(["features", "name", "setting", "ood"])["auroc"]
    knn = SMALL_RIVALS["knn"].candidates[1][1](MADE_CHANNELS, 0).fit(bench.inputs.of(bench.fitted, "raw"))
    small, _ = bench.fit_variant(VARIANTS["residual Gaussian + kNN, small LFDN"])
    for ood in SMALL_STUDY.of(DEVELOPMENT):
        on_ood = data.of_ood(ood, "matched")
        pair = (knn.ood_score(bench.inputs.of(one, "raw")) for one in (held_out, on_ood))
        assert table["raw", "knn", "k=20", ood.name] == pytest.approx(100 * auroc(*pair), abs=1e-3)
        pair = small("development", held_out), small(ood.name, on_ood)
        found = table["z0", "residual Gaussian + kNN, small LFDN", "", ood.name]
        assert found == pytest.approx(100 * auroc(*pair), abs=1e-3)


def test_a_second_search_fits_nothing(small_chapter, fitted):
    before = file().read_bytes()
    table = run()
    assert not fitted
    assert file().read_bytes() == before
    pd.testing.assert_frame_equal(table, read_table(file()))


def test_only_what_has_another_stamp_is_fitted_again(small_chapter, fitted):
    whole = read_table(file())
    changed = whole.copy()
    changed.loc[(changed["name"] == "knn") & (changed["setting"] == "k=20"), "stamp"] = "old"
    changed.loc[changed["name"] == "MSE", "auroc"] = 12.0
    changed.loc[changed["name"] == "MSE", "stamp"] = "old"
    changed.to_csv(file(), index=False)
    table = run()
    assert fitted == {("knn", "k=20"): 2, ("MSE", ""): 1}
    assert len(table) == len(whole)
    names = ["features", "name", "setting", "ood"]
    one, other = (t.drop(columns="seconds").set_index(names).sort_index() for t in (whole, table))
    pd.testing.assert_frame_equal(one, other)


def test_a_candidate_that_lacks_a_set_is_fitted_again(small_chapter, fitted):
    whole = read_table(file())
    whole.drop(index=3).to_csv(file(), index=False)
    assert len(run()) == len(whole)
    assert sum(fitted.values()) == 1


def test_what_is_tried_no_more_is_dropped(small_chapter, fitted):
    whole = read_table(file())
    gone = whole.tail(2).assign(name="an idea of before", stamp="old", auroc=100.0)
    pd.concat([whole, gone]).to_csv(file(), index=False)
    pd.testing.assert_frame_equal(run(), whole)
    assert not fitted


def test_a_killed_search_goes_on(fresh_chapter, fitted, small_chapter, monkeypatch):
    whole = read_table(file())
    monkeypatch.chdir(fresh_chapter)
    assert not file().is_file()
    fitted.left = 4
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(read_table(file())) == 4 * len(DEVELOPED)
    fitted.left = 9999
    table = run()
    assert set(fitted.values()) == {1, 2}  # two features of the rivals
    assert sum(fitted.values()) == TRIED
    assert search_sha256(table) == search_sha256(whole)


def test_the_stamp_follows_settings_and_code(monkeypatch):
    stamp = stamp_of(SMALL_STUDY, VARIANTS_CODE)
    assert stamp == stamp_of(SMALL_STUDY, VARIANTS_CODE)
    longer = replace(SMALL_STUDY, training=replace(SMALL_STUDY.training, epochs=3))
    classes = replace(
        SMALL_STUDY, sets=(replace(SMALL_STUDY.sets[0], classes=("8a",)), *SMALL_STUDY.sets[1:])
    )
    others = [stamp_of(study, VARIANTS_CODE) for study in (longer, classes, replace(SMALL_STUDY, n_ood=9))]
    others += [stamp_of(SMALL_STUDY, VARIANTS_CODE, "k=1"), stamp_of(SMALL_STUDY, VARIANTS_CODE[:-1])]
    monkeypatch.setattr(module, "code_hash", lambda *parts: "another")
    others.append(stamp_of(SMALL_STUDY, VARIANTS_CODE))
    assert len({stamp, *others}) == 7


def test_the_searchs_hash_is_of_all_but_the_seconds(small_chapter):
    table = read_table(file())
    found = search_sha256(table)
    assert search_sha256(table.assign(seconds=9.9)) == found
    for column, value in (("auroc", 50.0), ("setting", "x"), ("stamp", "x"), ("multiply_adds", 3.0)):
        changed = table.copy()
        changed.loc[1, column] = value
        assert search_sha256(changed) != found


def test_a_table_is_read_as_it_was_written(tmp_path):
    """Empty text is no number, and a stamp of digits alone is none either."""
    table = pd.DataFrame({"name": ["NA", ""], "auroc": [np.nan, 50.0], "stamp": ["012345678901"] * 2})
    table.to_csv(tmp_path / "table.csv", index=False)
    pd.testing.assert_frame_equal(read_table(tmp_path / "table.csv"), table)


# What it ends in


def hand_made(*rows):
    """A table of the search; a row is (kind, features, name, setting, multiply-adds, near, far)."""
    cells = []
    for kind, features, name, setting, cost, near, far in rows:
        about = {"encoder": "e", "kind": kind, "features": features, "name": name, "setting": setting}
        about |= {"idea": f"idea of {name}", "multiply_adds": cost, "seconds": 1.0, "stamp": "s"}
        for ood, group, value in (("n", "near", near), ("f1", "far", far), ("f2", "far", far + 2)):
            cells.append(about | {"ood": ood, "group": group, "auroc": float(value)})
    return pd.DataFrame(cells)[SEARCH]


CHEAP, DEAR = 1e6, BUDGET + 1
TABLE = hand_made(
    ("rival", "z0", "knn", "k=1", np.nan, 60, 80),
    ("rival", "z0", "knn", "k=20", np.nan, 70, 80),
    ("rival", "raw", "knn", "k=1", np.nan, 72, 80),
    ("rival", "raw", "knn", "k=20", np.nan, 61, 80),
    ("rival", "z0", "pca", "components=2", np.nan, 65, 89),
    ("rival", "raw", "pca", "components=8", np.nan, 50, 50),
    ("variant", "z0", "MSE", "", CHEAP, 95, 97),
    ("variant", "z0", "MFsim, all layers", "", CHEAP, 94, 96),
    ("variant", "z0", "MSE at t=50", "", DEAR, 90, 96),
    ("variant", "z0", "residual Gaussian at t=10", "", BUDGET, 80, 95),
    ("variant", "z0", "MSE + kNN", "", CHEAP, 81, 93),
)


def test_the_objective_is_the_mean_of_near_and_far():
    found = objectives(TABLE.sample(frac=1, random_state=0))
    assert len(found) == 11
    assert found["objective"].is_monotonic_decreasing
    row = found.set_index(["features", "name", "setting"]).loc[("z0", "pca", "components=2")]
    assert (row["near"], row["far"], row["objective"]) == (65, 90, 77.5)
    assert found["name"][:3].tolist() == ["MSE", "MFsim, all layers", "MSE at t=50"]


def test_the_choice_is_the_best_affordable_variant_and_each_rivals_best_setting():
    choice = choose(SMALL_STUDY, TABLE, "demo")
    assert choice["score"] == "residual Gaussian at t=10"
    assert choice["development"] == {"near": 80, "far": 96, "objective": 88}
    assert choice["rival"] == {"features": "z0", "name": "pca", "setting": "components=2"}
    assert choice["rival_development"] == {"near": 65, "far": 90, "objective": 77.5}
    assert choice["settings"] == {
        "z0": {"knn": "k=20", "pca": "components=2"},
        "raw": {"knn": "k=1", "pca": "components=8"},
    }
    assert choice["tried"] == {"variants": 5, "rival candidates": 6}
    assert choice["search_sha256"] == search_sha256(TABLE)
    assert read_choice("demo") == choice == json.loads(choice_file("demo").read_text())


@pytest.mark.parametrize(("cost", "chosen"), [(BUDGET, "MSE at t=50"), (BUDGET * 1.001, "MSE + kNN")])
def test_what_costs_more_than_the_paper_is_not_chosen(cost, chosen):
    rows = ("variant", "z0", "MSE at t=50", "", cost, 90, 96), ("variant", "z0", "MSE + kNN", "", 1.0, 50, 50)
    rival = ("rival", "z0", "knn", "k=1", np.nan, 60, 80)
    assert choose(SMALL_STUDY, hand_made(*rows, rival), "demo")["score"] == chosen


def test_without_a_choice_the_search_is_named(fresh_chapter):
    with pytest.raises(UserError, match="43_search") as error:
        read_choice("demo")
    assert "choice.json" in one_sentence(error)


def test_the_small_studys_choice_is_its_searchs(small_chapter):
    table, choice = read_table(file()), read_choice("demo")
    assert choice["search_sha256"] == search_sha256(table)
    assert choice["encoder"] == SMALL_STUDY.encoder
    papers = [name for name in SMALL_VARIANTS if VARIANTS[name].idea.startswith("the paper's")]
    assert papers == ["MSE", "LR", "MFsim"]
    own = table[(table["kind"] == "variant") & ~table["name"].isin(papers)]
    means = own.groupby(["name", "group"])["auroc"].mean().groupby("name").mean()
    assert choice["score"] == means.idxmax()
    assert set(choice["settings"]["raw"]) == set(choice["settings"]["z0"]) == set(SMALL_RIVALS)


# The committed choice


@pytest.fixture
def committed(monkeypatch):
    """The committed choice and search table."""
    monkeypatch.chdir(ROOT)
    assert results_folder("pack") == ROOT / "results"
    if not choice_file("pack").is_file():
        pytest.skip("results/choice.json is not there yet")
    return read_choice("pack"), read_table(search_file(STUDIES["pack"][0], "pack"))


def test_the_committed_choice_is_the_committed_searchs(committed):
    choice, table = committed
    first = STUDIES["pack"][0]
    assert choice["search_sha256"] == search_sha256(table)
    assert choice["encoder"] == first.encoder
    assert set(table["encoder"]) == {first.encoder}
    assert set(table["ood"]) == {ood.name for ood in first.of(DEVELOPMENT)}
    groups = {ood.name: ood.group for ood in first.of(DEVELOPMENT)}
    assert (table["group"] == table["ood"].map(groups)).all()
    assert NEAR in set(table["group"])


def test_the_committed_search_is_of_all_candidates(committed):
    choice, table = committed
    names = ["kind", "features", "name", "setting"]
    todo = {tuple(about[name] for name in names) for about in tried(STUDIES["pack"][0])}
    assert set(table[names].itertuples(index=False, name=None)) == todo
    assert choice["score"] in VARIANTS
    assert not VARIANTS[choice["score"]].idea.startswith("the paper's")
    row = table[(table["kind"] == "variant") & (table["name"] == choice["score"])]
    assert (row["multiply_adds"] <= BUDGET).all()
