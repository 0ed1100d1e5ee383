import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, FakeEncoder, image_set, one_sentence

from dlsr import experiments as module
from dlsr import features
from dlsr.baselines import BASELINES, AutoEncoder
from dlsr.datasets import DATASETS, UserError, load_images
from dlsr.diffusion import Reconstruction
from dlsr.experiments import (
    HEADLINE,
    LINES,
    OURS,
    STAGES,
    Experiment,
    Work,
    layer_place,
    method_name,
    score,
)
from dlsr.results import SetScores, read_scores, write_scores
from dlsr.training import TrainingSettings, _Run

SETS = ("digits/test", "digits_8_9/test", "photo_patches/test")
TINY = Experiment(
    "digits/train",
    SETS[0],
    SETS[1:],
    "fake",
    TrainingSettings(width=8, blocks=1, epochs=2, batch_size=50),
    n_train=150,
    n_test=60,
)
NEAR, FAR = (replace(TINY, ood=(name,)) for name in SETS[1:])
FURTHER = Reconstruction("one_step", t=5, noise_draws=2)
FIT = "digits-fake-native-gap-n150-1x8-2epochs-seed"
MSE = "mse/all/released/t3/k1"


class Effort:
    """How much was extracted (images), trained (epochs) and scored (sets by one reconstruction)."""

    def __init__(self):
        self.encoder, self.epochs, self.seeds = FakeEncoder(), 0, []

    def since(self):
        """So much since the last call."""
        spent = self.encoder.images, self.epochs, len(self.seeds)
        self.encoder.images, self.epochs, self.seeds = 0, 0, []
        return spent


@pytest.fixture
def effort(monkeypatch):
    effort, epoch, all_scores = Effort(), _Run.epoch, module.all_scores

    def train(run):
        effort.epochs += 1
        epoch(run)

    def listening(*arguments, seed, stride_seed):
        effort.seeds.append((seed, stride_seed))
        return all_scores(*arguments, seed=seed, stride_seed=stride_seed)

    monkeypatch.setattr(module, "get_encoder", lambda name: effort.encoder)
    monkeypatch.setattr(_Run, "epoch", train)
    monkeypatch.setattr(module, "all_scores", listening)
    return effort


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "scores"


def run(experiment, folder):
    return score(experiment, folder, progress=False)


def only(runs):
    """The LFDN's scores under its only seed."""
    (found,) = runs["DLSR"]
    return found


def equal(one, other):
    pd.testing.assert_frame_equal(one.table, other.table, check_dtype=False)
    assert one.columns.keys() == other.columns.keys()
    return True


# Files


def test_a_run_writes_one_file_a_set_and_a_fit(effort, folder):
    runs = run(replace(TINY, seeds=2, baselines=("knn",)), folder)
    assert effort.since() == (150 + 3 * 60, 2 * 2, 2 * 3)
    fits = [f"{FIT}0", f"{FIT}1", "digits-fake-native-gap-n150-knn"]
    names = ["digits-test-60", "digits_8_9-test-60", "photo_patches-test-60"]
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.*"))
    assert files == sorted(f"{fit}/{name}.parquet" for fit in fits for name in names)

    assert {method: len(found) for method, found in runs.items()} == {"DLSR": 2, "knn": 1}
    for found in (*runs["DLSR"], *runs["knn"]):
        assert found.sets == list(SETS)
        for name in SETS:
            images = found.table.loc[found.table["set"] == name, "image"]
            assert images.tolist() == load_images(name).subset(60).ids
    assert [found.about["seed"] for found in runs["DLSR"]] == [0, 1]
    one, other = (found.table[MSE] for found in runs["DLSR"])
    assert not np.allclose(one, other)
    assert list(runs["knn"][0].columns) == ["knn:knn/all"]
    about = read_scores(folder / files[0]).about
    assert (about["n_train"], about["encoder"], about["channels"]) == (150, "fake", [3, 4, 5])


def test_a_second_run_makes_nothing_and_gives_the_same(effort, folder):
    one = replace(TINY, baselines=("knn",))
    first = run(one, folder)
    effort.since()
    files = {file: file.stat().st_mtime_ns for file in folder.rglob("*.parquet")}
    again = run(one, folder)
    assert effort.since() == (0, 0, 0)
    assert all(equal(first[method][0], again[method][0]) for method in ("DLSR", "knn"))
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.parquet")} == files


def test_a_further_reconstruction_stands_beside_the_first(effort, folder, tmp_path):
    first = only(run(TINY, folder))
    effort.since()
    both = replace(TINY, reconstructions=(HEADLINE, FURTHER))
    widened = only(run(both, folder))
    images, epochs, _ = effort.since()
    assert (images, epochs) == (0, 0)
    assert [len(widened.columns), len(first.columns)] == [14, 7]
    assert equal(widened, only(run(both, tmp_path / "fresh")))
    assert equal(first, only(run(TINY, folder)))
    assert equal(only(run(replace(TINY, reconstructions=(FURTHER,)), folder)),
                 only(run(replace(TINY, reconstructions=(FURTHER,)), tmp_path / "alone")))  # fmt: skip
    assert len(list(folder.rglob("*.parquet"))) == 3


def test_columns_come_in_the_experiments_order(effort, folder):
    run(replace(NEAR, reconstructions=(HEADLINE, FURTHER)), folder)
    turned = only(run(replace(NEAR, reconstructions=(FURTHER, HEADLINE)), folder))
    ways = [variant["reconstruction"] for variant in turned.columns.values()]
    assert ways == ["one_step"] * 7 + ["released"] * 7
    assert list(turned.columns) == list(turned.table.columns[2:])


def test_experiments_share_their_scores(effort, folder, tmp_path):
    near = only(run(NEAR, folder))
    effort.since()
    shared = folder / f"{FIT}0" / "digits-test-60.parquet"
    written = shared.stat().st_mtime_ns
    far = only(run(FAR, folder))
    assert effort.since() == (60, 0, 1)  # the far images alone
    assert shared.stat().st_mtime_ns == written
    assert np.array_equal(near.of(SETS[0], MSE), far.of(SETS[0], MSE))
    assert equal(only(run(replace(TINY, seeds=1), folder)), only(run(TINY, tmp_path / "fresh")))
    effort.since()
    run(replace(TINY, seeds=2), folder)
    assert effort.since() == (0, 2, 3)  # the second seed alone


def test_layers_apart_are_of_the_headline_alone(effort, folder, tmp_path):
    plain, by_layer = NEAR, replace(NEAR, by_layer=True, reconstructions=(HEADLINE, FURTHER))
    run(plain, folder)
    found = only(run(by_layer, folder))
    single = {name for name, variant in found.columns.items() if variant["layers"].isdigit()}
    assert single == {f"{s}/{m}/released/t3/k1" for s in ("mse", "lr", "mfsim") for m in (1, 2, 3)}
    assert equal(found, only(run(by_layer, tmp_path / "fresh")))
    assert len(only(run(plain, folder)).columns) == 7  # the same file holds more


def test_without_the_headline_no_layers_apart_are_waited_for(effort, folder):
    one = replace(NEAR, by_layer=True, reconstructions=(FURTHER,))
    first = only(run(one, folder))
    effort.since()
    assert equal(first, only(run(one, folder)))
    assert effort.since() == (0, 0, 0)


def test_sets_do_not_share_their_noise(effort, folder):
    """Images in the same place of two sets would else be scored with the same noise."""
    run(replace(TINY, seeds=2, reconstructions=(HEADLINE, FURTHER)), folder)
    assert len(effort.seeds) == 3 * 2 * 2
    assert len({noise for noise, _ in effort.seeds}) == 3 * 2  # all reconstructions share theirs
    assert {strides for _, strides in effort.seeds} == {0, 1}  # all sets of a network take the same way back


# Layers


@pytest.mark.parametrize(
    ("layers", "columns", "method"),
    [("last", slice(7, 12), "DLSR, last layer alone"), ("2", slice(3, 7), "DLSR, layer 2 alone")],
)
def test_a_network_may_see_one_layer(layers, columns, method, effort, folder, monkeypatch):
    seen, train = [], module.train
    monkeypatch.setattr(module, "train", lambda z0, *a, **k: (seen.append(z0), train(z0, *a, **k))[1])
    one = replace(NEAR, layers=layers)
    found = only(run(one, folder))
    whole = Work(one, progress=False).features("digits/train").z0()
    assert np.array_equal(seen[0], whole[:, columns])
    assert {variant["method"] for variant in found.columns.values()} == {method}
    assert {variant["layers"] for variant in found.columns.values()} == {"all"}  # of those it sees
    assert method_name("DLSR", layers) == method
    assert f"-layer-{layers}-" in one.fit_name("DLSR", 0)
    for line in OURS:
        assert line.column(layers) in found.columns


def test_the_lines_of_the_headline():
    assert [line.column("all") for line in OURS] == [
        "mse/all/released/t3/k1", "lr/all/released/t3/k1", "mfsim/2..M/released/t3/k1",
    ]  # fmt: skip
    assert method_name("DLSR", "all") == "DLSR"
    (knn,) = (line for line in LINES if line.method == "knn")
    assert knn.column("all") == "knn:knn/all"


@pytest.mark.parametrize("layers", ["0", "4", "-1", "²", "first", "2..M", ""])
def test_a_layer_that_is_not_there_is_refused(layers, effort):
    with pytest.raises(UserError, match=r"all, last, or a number in 1\.\.3") as error:
        layer_place(layers, (3, 4, 5))
    assert repr(layers) in one_sentence(error)
    with pytest.raises(UserError, match=r"1\.\.3"):
        Work(replace(NEAR, layers=layers), progress=False).network(0)


def test_a_layers_place():
    assert [layer_place(layers, (3, 4, 5)) for layers in ("1", "3", "last")] == [0, 2, 2]


# Images


@pytest.mark.parametrize(("n_train", "n_test"), [(0, 0), (150, 15), (9999, 9999)])
def test_a_number_of_images_is_a_pick_of_each_set_or_all(n_train, n_test, effort, folder, monkeypatch):
    sizes = {"digits/train": 160} | dict(zip(SETS, (30, 20, 10), strict=True))
    images = {name: image_set(n, seed=i, name=name) for i, (name, n) in enumerate(sizes.items())}
    monkeypatch.setattr(module, "load_images", images.__getitem__)
    found = only(run(replace(TINY, n_train=n_train, n_test=n_test), folder))
    assert found.about["n_train"] == min(n_train or 160, 160)
    for name in SETS:
        n = min(n_test or sizes[name], sizes[name])
        ids = found.table.loc[found.table["set"] == name, "image"]
        assert ids.tolist() == images[name].subset(n).ids


def test_sets_that_are_not_in_the_pack_are_left_out_unless_downloaded():
    one = Experiment(
        "cifar10/train",
        "cifar10/test",
        ("svhn/test", "lsun_crop/test", "kmnist/test"),
        "fake",
        TrainingSettings(),
    )
    assert one.available == ("svhn/test",)
    assert one.sets == ("cifar10/test", "svhn/test")
    assert [one.why_not(name) for name in one.ood] == ["", "not in the data pack", "not in the data pack"]
    downloaded = replace(one, downloads=True)
    assert downloaded.available == one.ood
    assert not any(downloaded.why_not(name) for name in one.ood)


# Baselines


class Ear:
    """A baseline that remembers what it is given."""

    def __init__(self, channels, seed):
        self.channels, self.seed = channels, seed

    def fit(self, x, y):
        self.x, self.y = x, y
        return self

    def all_scores(self, x):
        self.scored = [*getattr(self, "scored", []), x]
        return {("ear", "all"): x[:, 0]}


def test_baselines_get_one_seed_and_only_the_probe_labels(effort, folder, monkeypatch):
    ears = {name: [] for name in BASELINES}

    def build(name, channels, seed):
        ears[name].append(Ear(channels, seed))
        return ears[name][-1]

    for name, row in BASELINES.items():
        listening = replace(row, build=lambda channels, seed, name=name: build(name, channels, seed))
        monkeypatch.setitem(module.BASELINES, name, listening)
    one = replace(NEAR, seeds=2, baselines=tuple(ears))
    runs = run(one, folder)
    assert {method: len(found) for method, found in runs.items()} == {"DLSR": 2} | dict.fromkeys(ears, 1)
    work = Work(one, progress=False)
    train, test = work.features("digits/train"), work.features(SETS[1])
    for name, (ear,) in ears.items():
        assert (ear.seed, ear.channels) == (0, (3, 4, 5))
        assert len(ear.scored) == 2
        if name == "probe":
            assert list(ear.y) == list(train.labels)
            assert np.array_equal(ear.x, train.raw()[:, 7:])  # whose ReLU it takes itself
            assert np.array_equal(ear.scored[1], test.raw()[:, 7:])
        else:
            assert ear.y is None
            assert np.array_equal(ear.x, train.z0())
            assert np.array_equal(ear.scored[1], test.z0())


def test_baselines_see_the_layers_that_the_network_sees(effort, folder, monkeypatch):
    small = replace(BASELINES["ae"], build=lambda channels, seed: AutoEncoder(channels, width=8, blocks=1))
    monkeypatch.setitem(module.BASELINES, "ae", small)
    runs = run(replace(NEAR, layers="last", baselines=("mahalanobis", "ae")), folder)
    assert [len(runs[name][0].table) for name in ("mahalanobis", "ae")] == [120, 120]
    for line in replace(NEAR, baselines=("mahalanobis", "ae")).lines:
        assert line.column("last") in runs[line.method][0].columns  # a single layer has no layers 2..M


def test_an_experiments_lines_are_the_lfdns_and_its_baselines():
    assert [line.title for line in TINY.lines] == ["MSE", "LR", "MFsim"]
    assert {line.method for line in replace(TINY, baselines=("ae", "probe")).lines} == {"DLSR", "ae", "probe"}
    assert {line.method for line in LINES} == {"DLSR", *BASELINES}
    assert TINY.fits() == [("DLSR", 0)]
    assert replace(TINY, seeds=2, baselines=("ae", "knn")).fits() == [
        ("DLSR", 0), ("DLSR", 1), ("ae", 0), ("knn", 0),
    ]  # fmt: skip


# Stages


def changed(before, after):
    return {stage for stage in STAGES if before[stage] != after[stage]}


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"encoder": "another"}, {"features"}),
        ({"protocol": "matched"}, {"features"}),
        ({"pooling": "grid14"}, {"features"}),
        ({"n_train": 140}, {"features"}),
        ({"n_test": 50}, {"features"}),
        ({"ood": SETS[1:2]}, {"features"}),
        ({"training": replace(TINY.training, epochs=3)}, {"training"}),
        ({"training": replace(TINY.training, lr=1e-3)}, {"training"}),
        ({"seeds": 2}, {"training"}),
        ({"layers": "last"}, {"training"}),
        ({"baselines": ("knn",)}, {"training", "scores"}),  # their code makes both
        ({"reconstructions": (HEADLINE, FURTHER)}, {"scores"}),
        ({"by_layer": True}, {"scores"}),
        ({"setting": "another name"}, set()),
        ({}, set()),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_changed_setting_puts_its_stage_out_of_date(change, stages):
    assert changed(TINY.stages(), replace(TINY, **change).stages()) == stages


@pytest.mark.parametrize("name", ["digits/train", SETS[0], SETS[2]])
def test_other_data_put_the_features_out_of_date(name, monkeypatch):
    before, near = TINY.stages(), NEAR.stages()
    monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], sha256="b" * 64))
    assert changed(before, TINY.stages()) == {"features"}
    assert changed(near, NEAR.stages()) == (set() if name == SETS[2] else {"features"})


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the package whose code is hashed in its place."""
    copy = shutil.copytree(ROOT / "dlsr", tmp_path / "copy")
    monkeypatch.setattr(features, "__file__", str(copy / "features.py"))
    monkeypatch.setattr(module, "code_hash", features.code_hash.__wrapped__)
    return copy


def test_changed_code_puts_its_stage_out_of_date(copied):
    expected = {
        "plots": set(), "benchmarks": set(), "datasets": set(), "baselines": set(), "features": {"features"},
        "encoders": {"features"}, "lfdn": {"training", "scores"}, "diffusion": {"training", "scores"},
        "training": {"training"}, "scores": {"scores"}, "metrics": {"metrics"}, "results": {"metrics"},
    }  # fmt: skip
    now = TINY.stages()
    assert now == TINY.stages()
    for name, stages in expected.items():
        before, file = now, copied / f"{name}.py"
        file.write_text(file.read_text("utf-8") + "\n\n# a comment\nADDED = 1\n", "utf-8")
        now = TINY.stages()
        assert changed(before, now) == stages, name


def test_the_baselines_code_counts_where_there_are_some(copied):
    one = replace(TINY, baselines=("knn",))
    before, file = one.stages(), copied / "baselines.py"
    file.write_text(file.read_text("utf-8") + "ADDED = 1\n", "utf-8")
    assert changed(before, one.stages()) == {"training", "scores"}


def with_other_code(monkeypatch, *names):
    """As if these files had been changed."""
    plain = features.code_hash
    monkeypatch.setattr(module, "code_hash", lambda *parts: plain(*parts) + "x" * bool({*names} & {*parts}))


def spoiled(folder):
    """Every score on disk becomes 0."""
    for file in folder.rglob("*.parquet"):
        old = read_scores(file)
        table = old.table.assign(**dict.fromkeys(old.columns, np.float32(0)))
        write_scores(file, SetScores(table, old.columns, old.about))


@pytest.mark.parametrize(("name", "remade"), [("scores", True), ("metrics", False), ("plots", False)])
def test_scores_that_are_out_of_date_are_made_again(name, remade, effort, folder, monkeypatch):
    first = only(run(TINY, folder))
    effort.since()
    spoiled(folder)
    with_other_code(monkeypatch, name)
    again = only(run(TINY, folder))
    assert effort.since() == (0, 0, 3 * remade)
    assert equal(first, again) if remade else not again.table[list(again.columns)].to_numpy().any()
    run(TINY, folder)
    assert effort.since() == (0, 0, 0)


def test_columns_of_old_code_do_not_stand_beside_new_ones(effort, folder, monkeypatch):
    run(replace(NEAR, reconstructions=(HEADLINE, FURTHER)), folder)
    with_other_code(monkeypatch, "scores")
    run(NEAR, folder)
    (file,) = folder.rglob("digits-test-60.parquet")
    assert {variant["reconstruction"] for variant in read_scores(file).columns.values()} == {"released"}


def test_the_speed_counts_reading_encoding_and_scoring(effort, folder, monkeypatch):
    """Per image, the seconds add up: 60 images at 20 images/s and 3 s of scoring them, 10 images/s."""
    clock = iter(range(0, 10_000, 3))
    work = Work(NEAR, progress=False)
    work._features[SETS[0]] = replace(work.features(SETS[0]), images_per_second=20.0)
    work.network(0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = work.score("DLSR", 0, SETS[0])
    assert found.columns[MSE]["images_per_second"] == pytest.approx(10)
