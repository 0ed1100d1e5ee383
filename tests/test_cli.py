import json
import os
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, FakeEncoder, easy_features, image_set, write_folder

from dlsr import __version__, cli
from dlsr.benchmarks import ITEMS, REPORTS, results_file, run_name, settings, stamp
from dlsr.chapter import CHAPTER
from dlsr.cli import main
from dlsr.comparison import STUDIES
from dlsr.datasets import DATASETS, UserError
from dlsr.detector import DLSRDetector
from dlsr.experiments import method_name
from dlsr.recommended import RECOMMENDED, RecommendedDetector, load_detector
from dlsr.results import COLUMNS, write_rows
from dlsr.variants import VARIANTS

QUICK, NEAR, GUARD, LMD = "00_quickstart", "08_near_ood", "09_diffguard", "10_lmd"


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    encoder = FakeEncoder()
    whole = cli.get_encoder
    monkeypatch.setattr(cli, "get_encoder", lambda name: encoder if name == "fake" else whole(name))
    return encoder


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of one notebook that only holds its parameters."""
    folder = tmp_path / "project"
    (folder / "notebooks").mkdir(parents=True)
    (folder / "_config.yml").touch()
    write_notebook(folder, NEAR)
    monkeypatch.chdir(folder)
    return folder


def write_notebook(folder, name):
    cell = nbformat.v4.new_code_cell('profile: str = "demo"\nepochs: int = 0')
    cell.metadata.tags = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")


@pytest.fixture
def photos(tmp_path):
    return write_folder(tmp_path / "photos", 40, size=(12, 12))


def refused(capsys, *arguments):
    """The one line on stderr of a command that a user's mistake stopped."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("dlsr: ")
    assert "Traceback" not in captured.err + captured.out
    return lines[0]


def fit(photos, out, *more):
    sizes = ["--width", "16", "--blocks", "1", "--epochs", "2"]
    score = [] if "--score" in more else ["--score", "mfsim"]  # the encoder has too few layers for another
    return main(["fit", str(photos), "--out", str(out), "--encoder", "fake", *sizes, *score, *more])


# Mistakes


def test_an_unknown_notebook_is_refused_with_those_there_are(project, capsys):
    line = refused(capsys, "run", "99_nothing")
    assert "99_nothing" in line
    assert NEAR in line


def test_outside_the_project_there_is_no_notebook(capsys):
    assert "none here" in refused(capsys, "run", NEAR)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("epoch", "3", "'epoch' is no parameter"),
        ("epochs", "three", "it needs int"),
        ("epochs", "-3", "epochs=-3"),
        ("encoder", "vgg99", "vgg99"),
        ("profile", "large", "demo, pack, paper"),
        ("encoder", "7", "'7' is unknown"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(name, value, told, project, capsys, monkeypatch):
    monkeypatch.setattr(cli.papermill, "execute_notebook", lambda *_, **__: pytest.fail("it ran"))
    assert told in refused(capsys, "run", NEAR, "-p", name, value)


def test_an_unknown_encoder_is_refused(photos, tmp_path, capsys):
    line = refused(capsys, "fit", photos, "--out", tmp_path / "out", "--encoder", "vgg99")
    assert "efficientnet_lite0" in line
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_is_refused(tmp_path, capsys):
    line = refused(capsys, "fit", tmp_path / "nowhere", "--out", tmp_path / "out", "--encoder", "fake")
    assert "nowhere" in line


def test_an_empty_folder_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    line = refused(capsys, "fit", tmp_path / "empty", "--out", tmp_path / "out", "--encoder", "fake")
    assert "is empty" in line


def test_an_unknown_score_is_refused(photos, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cli, "extract", lambda images, *_, **__: ready(images))
        line = refused(
            capsys, "fit", photos, "--out", tmp_path / "out", "--encoder", "fake", "--score", "likelihood"
        )
    assert "mse, lr, mfsim" in line


def test_a_folder_without_a_detector_is_refused(photos, tmp_path, capsys):
    assert "no whole detector" in refused(capsys, "score", tmp_path, photos)


def ready(images):
    """Features without the extraction's progress bar, which is on stderr too."""
    return cli_extract(images, FakeEncoder(), progress=False)


cli_extract = cli.extract


@pytest.mark.parametrize("about", [None, {"encoder": "fake"}], ids=["nothing", "no weights"])
def test_a_detector_that_does_not_say_its_encoder_is_refused(about, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "extract", lambda images, *_, **__: ready(images))
    z = easy_features(60, channels=(3, 4, 5))[0]
    detector = DLSRDetector((3, 4, 5), width=8, blocks=1, epochs=1, batch_size=32, device="cpu").fit(z)
    detector.save(tmp_path / "detector", about=about)
    assert "encoder" in refused(capsys, "score", tmp_path / "detector", photos)


def test_a_detector_without_a_threshold_is_refused_or_gives_no_verdict(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "extract", lambda images, *_, **__: ready(images))
    z = easy_features(60, channels=(3, 4, 5))[0]
    detector = DLSRDetector(
        (3, 4, 5), width=8, blocks=1, epochs=1, batch_size=32, device="cpu", calibration_fraction=0
    ).fit(z)
    detector.save(tmp_path / "detector", about={"encoder": "fake", "weights_sha256": "a" * 64})
    assert "threshold" in refused(capsys, "score", tmp_path / "detector", photos)


def test_a_long_message_of_another_library_stays_on_one_line(photos, tmp_path, capsys, monkeypatch):
    def extract(*_, **__):
        raise UserError("The weights are of another model: Error(s) in loading:\n\tsize mismatch\n\tsize")

    monkeypatch.setattr(cli, "extract", extract)
    assert "size mismatch" in refused(capsys, "fit", photos, "--out", tmp_path, "--encoder", "fake")


def test_an_interrupted_run_says_that_it_will_be_resumed(photos, tmp_path, capsys, monkeypatch):
    def extract(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "extract", extract)
    assert fit(photos, tmp_path / "out") == 130
    assert "resumed" in capsys.readouterr().err


def test_a_warning_is_one_line(monkeypatch, capsys):
    def warn(options):
        cli.warnings.warn("another sha256", stacklevel=1)
        return 0

    monkeypatch.setattr(cli, "_sets", warn)
    assert main(["sets"]) == 0
    assert capsys.readouterr().err == "dlsr: another sha256\n"


# Commands


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_sets_lists_all_and_says_which_are_here(capsys, tmp_path, monkeypatch):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "test.parquet").touch()
    monkeypatch.setenv("DLSR_DATA", str(tmp_path))
    assert main(["sets"]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path) in out
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert set(lines) >= set(DATASETS)
    assert lines["digits/train"].endswith("built in")
    assert lines["cifar10/test"].endswith("found")
    assert lines["cifar10/train"].endswith("not here")
    assert "10,000 images" in lines["cifar10/test"]


def test_sets_are_downloaded_by_name(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "download", lambda name: asked.append(name) or image_set(3))
    assert main(["sets", "--download", "svhn/test", "--download", "cifar10/test"]) == 0
    assert asked == ["svhn/test", "cifar10/test"]
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["svhn/test: 3 images are here.", "cifar10/test: 3 images are here."]
    assert len(out) == 3 + len(DATASETS)


def test_a_set_that_nobody_knows_is_not_downloaded(capsys):
    assert "'cifar11/test' is no known image set" in refused(capsys, "sets", "--download", "cifar11/test")


def test_fit_and_score(photos, tmp_path, capsys, fake):
    assert fit(photos, tmp_path / "detector") == 0
    assert "Fitted on 40 images" in capsys.readouterr().out
    others = write_folder(tmp_path / "others", 7, seed=5)
    csv = tmp_path / "new" / "scores.csv"
    assert main(["score", str(tmp_path / "detector"), str(others), "--csv", str(csv)]) == 0
    out = capsys.readouterr().out
    table = pd.read_csv(csv)
    assert list(table.columns) == ["image", "ood_score", "verdict"]
    assert sorted(table["image"]) == [f"{i:03d}.png" for i in range(7)]
    assert table["ood_score"].is_monotonic_decreasing
    called = int((table["verdict"] == "OOD").sum())
    assert called + (table["verdict"] == "ID").sum() == 7
    assert f"7 images scored, {called} of them called OOD" in out
    threshold = load_detector(tmp_path / "detector").threshold_
    np.testing.assert_array_equal(table["verdict"] == "OOD", table["ood_score"] > threshold)
    assert fake.images == 47


@pytest.mark.parametrize(
    ("score", "kind"), [("recommended", RecommendedDetector), ("mse", DLSRDetector), ("lr", DLSRDetector)]
)
def test_the_score_is_an_option(score, kind, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dlsr.recommended.layers_read", lambda score: 1)
    monkeypatch.setitem(VARIANTS, RECOMMENDED, VARIANTS["kNN of hidden + Gaussian"])
    assert fit(photos, tmp_path / "detector", "--score", score) == 0
    assert type(load_detector(tmp_path / "detector")) is kind
    assert main(["score", str(tmp_path / "detector"), str(photos)]) == 0
    assert "40 images scored" in capsys.readouterr().out


def test_an_encoder_with_too_few_layers_is_refused(photos, tmp_path, capsys):
    assert main(["fit", str(photos), "--out", str(tmp_path), "--encoder", "fake"]) == 2
    assert "dlsr: Features of 3 layers were given" in capsys.readouterr().err.splitlines()[-1]


def test_score_without_csv_prints_the_table(photos, tmp_path, capsys):
    assert fit(photos, tmp_path / "detector") == 0
    capsys.readouterr()
    assert main(["score", str(tmp_path / "detector"), str(photos)]) == 0
    out = capsys.readouterr().out
    assert out.count(".png") == 40
    assert "40 images scored" in out


def test_skip_unreadable_leaves_images_out_and_names_them(photos, tmp_path, capsys):
    (photos / "003.png").write_bytes(b"no image")
    assert fit(photos, tmp_path / "detector") == 2
    assert "003.png" in capsys.readouterr().err
    assert fit(photos, tmp_path / "detector", "--skip-unreadable") == 0
    assert "Fitted on 39 images" in capsys.readouterr().out


def test_other_weights_than_those_of_the_fit_are_refused(photos, tmp_path, capsys, fake):
    assert fit(photos, tmp_path / "detector") == 0
    fake.sha256 = "b" * 64
    capsys.readouterr()
    assert main(["score", str(tmp_path / "detector"), str(photos)]) == 2
    assert "weights differ" in capsys.readouterr().err


def test_a_few_images_are_enough_to_fit(tmp_path, capsys):
    assert fit(write_folder(tmp_path / "few", 3), tmp_path / "detector") == 0
    assert "Fitted on 3 images" in capsys.readouterr().out


def test_a_table_that_cannot_be_written_is_told_in_a_sentence(photos, tmp_path, capsys, monkeypatch):
    assert fit(photos, tmp_path / "detector") == 0
    capsys.readouterr()
    (tmp_path / "file").touch()
    csv = tmp_path / "file" / "scores.csv"
    monkeypatch.setattr(cli, "extract", lambda images, *_, **__: ready(images))
    assert "scores.csv" in refused(capsys, "score", tmp_path / "detector", photos, "--csv", csv)


# Running a notebook


def executed(source, path, parameters, **_):
    """What papermill would write: the source with an injected cell and its own metadata."""
    notebook = nbformat.read(source, as_version=4)
    cell = nbformat.v4.new_code_cell(f"# {parameters}")
    cell.metadata.tags = ["injected-parameters"]
    cell.metadata.papermill = {"duration": 1.5}
    notebook.cells.append(cell)
    notebook.metadata.papermill = {"parameters": parameters, "exception": None, "duration": 3.2}
    nbformat.write(notebook, path)


def test_a_run_puts_the_copy_where_it_belongs(project, monkeypatch, capsys):
    monkeypatch.setattr(cli.papermill, "execute_notebook", executed)
    assert main(["run", NEAR, "-p", "profile", "pack", "-p", "t", "3"]) == 0
    copy = project / "book" / "notebooks" / f"{NEAR}.ipynb"
    assert str(copy) in capsys.readouterr().out
    notebook = nbformat.read(copy, as_version=4)
    assert notebook.metadata.papermill == {
        "parameters": {"profile": "pack", "t": 3}, "exception": None,
    }  # fmt: skip
    assert re.fullmatch("[0-9a-f]{12}", notebook.metadata.dlsr.page)
    assert not any("papermill" in cell.metadata for cell in notebook.cells)
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


@pytest.mark.parametrize("changed", [["epochs", "3"], ["seeds", "1"], ["encoder", "efficientnet_lite0"]])
def test_a_run_of_other_settings_never_replaces_the_books_copy(project, monkeypatch, changed):
    monkeypatch.setattr(cli.papermill, "execute_notebook", executed)
    assert main(["run", NEAR, "-p", "profile", "pack", "-p", *changed]) == 0
    assert not (project / "book").exists()
    (copy,) = (project / "_build" / "runs").iterdir()
    assert copy.name.startswith(NEAR)


def test_the_demos_copy_lies_apart(project, monkeypatch):
    monkeypatch.setattr(cli.papermill, "execute_notebook", executed)
    assert main(["run", NEAR]) == 0
    assert not (project / "book").exists()
    assert (project / "_build" / "demo" / f"{NEAR}.ipynb").is_file()


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_goes_into_the_book_and_takes_no_parameters(name, project, monkeypatch, capsys):
    monkeypatch.setattr(cli.papermill, "execute_notebook", executed)
    write_notebook(project, name)
    line = refused(capsys, "run", name, "-p", "profile", "pack", "-p", "seeds", "1")
    assert "no parameters; profile, seeds was given" in line
    assert not (project / "book").exists()
    assert main(["run", name]) == 0
    assert (project / "book" / "notebooks" / f"{name}.ipynb").is_file()


def test_a_dead_kernel_is_one_line(project, monkeypatch, capsys):
    def die(*_, **__):
        raise cli.DeadKernelError("Kernel died")

    monkeypatch.setattr(cli.papermill, "execute_notebook", die)
    line = refused(capsys, "run", NEAR)
    assert f"{NEAR}.ipynb lost its kernel" in line
    assert "memory" in line
    assert not (project / "_build" / "demo").exists()


def test_a_named_output_is_kept_to(project, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.papermill, "execute_notebook", executed)
    assert main(["run", NEAR, "--out", str(tmp_path / "mine.ipynb")]) == 0
    assert (tmp_path / "mine.ipynb").is_file()


def test_a_failing_cell_is_one_line_and_leaves_the_old_copy(project, monkeypatch, capsys):
    copy = project / "book" / "notebooks" / f"{NEAR}.ipynb"
    copy.parent.mkdir(parents=True)
    copy.write_text("old")

    def fail(source, path, *_, **__):
        Path(path).write_text("half")
        raise cli.PapermillExecutionError(0, 3, "code", "ValueError", "no\nsuch thing", ["Traceback"])

    monkeypatch.setattr(cli.papermill, "execute_notebook", fail)
    line = refused(capsys, "run", NEAR, "-p", "profile", "pack")
    assert "ValueError" in line
    assert copy.read_text() == "old"
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


# Reproducing


class Kernel:
    """Papermill's stand-in: it writes the copy and the item's results, or raises what the item is to."""

    def __init__(self):
        self.ran, self.parameters, self.raising = [], [], {}

    def __call__(self, source, path, parameters, **_):
        name = Path(source).stem
        self.ran.append(name)
        self.parameters.append(parameters)
        if name in self.raising:
            Path(path).write_text("half")
            raise self.raising[name]
        if name not in CHAPTER:
            measure(settings(name, dict(parameters)))
        executed(source, path, parameters)


def measure(run):
    """Rows of every fit on every set of the run, by the code as it stands."""
    rows = [
        dict.fromkeys(COLUMNS, "0")
        | {"method": method_name(method, e.layers), "seed": seed, "ood": ood, "profile": run.profile}
        | {"stages": stamp(e), "weights_sha256": stamp(e)}
        for e in run.experiments
        for method, number in e.fits()
        for seed in (str(number), "mean")
        for ood in e.available
    ]
    if rows:
        write_rows(results_file(run), pd.DataFrame(rows))


@pytest.fixture
def kernel(project, monkeypatch):
    """A project of four items, whose notebooks are run by a `Kernel`."""
    for name in (QUICK, GUARD, LMD):
        write_notebook(project, name)
    monkeypatch.setattr("dlsr.benchmarks.ITEMS", {name: ITEMS[name] for name in (QUICK, NEAR, GUARD, LMD)})
    monkeypatch.setattr(cli, "CHAPTER", {})
    kernel = Kernel()
    monkeypatch.setattr(cli.papermill, "execute_notebook", kernel)
    return kernel


def reproduce(kernel, *arguments, profile="demo"):
    """The exit status, and the items that were run this time."""
    kernel.ran.clear()
    return main(["reproduce", *arguments, "--profile", profile]), list(kernel.ran)


def failure(text, name="ValueError"):
    return cli.PapermillExecutionError(0, 3, "code", name, text, ["Traceback"])


def copies(folder):
    return sorted(path.stem for path in folder.glob("*.ipynb"))


def test_every_item_of_the_profile_is_run_and_then_nothing(kernel, project, capsys):
    assert reproduce(kernel) == (0, [QUICK, NEAR, GUARD, LMD])
    out = capsys.readouterr().out
    assert f"[2/4] {NEAR} (not run)" in out
    assert "0 up to date, 4 executed, 0 failed." in out
    assert "Nothing to do" not in out
    assert copies(project / "_build" / "demo") == [NEAR, GUARD, LMD]
    assert copies(project / "book" / "notebooks") == [QUICK]  # the demo is the quickstart's own profile
    assert reproduce(kernel) == (0, [])
    assert "Nothing to do" in capsys.readouterr().out


def test_the_packs_copies_go_into_the_book(kernel, project):
    assert reproduce(kernel, GUARD, LMD, profile="pack") == (0, [GUARD, LMD])
    assert copies(project / "book" / "notebooks") == [GUARD, LMD]
    assert not (project / "_build" / "demo").exists()


def test_an_item_without_experiments_has_a_page_all_the_same(kernel, project, monkeypatch, capsys):
    monkeypatch.setattr("dlsr.benchmarks.ITEMS", ITEMS)
    write_notebook(project, "06_resnet50")
    assert reproduce(kernel, "06_resnet50", profile="pack") == (0, ["06_resnet50"])
    assert "(not measured: " in capsys.readouterr().out
    assert reproduce(kernel, "06_resnet50", profile="pack") == (0, [])


def test_what_is_up_to_date_is_skipped(kernel, capsys):
    reproduce(kernel, GUARD)
    assert reproduce(kernel, NEAR, GUARD, LMD) == (0, [NEAR, LMD])
    assert "1 up to date, 2 executed, 0 failed." in capsys.readouterr().out
    results_file(settings(NEAR, {})).unlink()
    assert reproduce(kernel, NEAR, GUARD, LMD) == (0, [NEAR])


def test_a_page_is_run_again_when_its_source_changes(kernel, project, capsys):
    reproduce(kernel, NEAR, GUARD)
    source = project / "notebooks" / f"{GUARD}.ipynb"
    source.write_text(source.read_text().replace("epochs: int = 0", "epochs: int = 0  # of training"))
    capsys.readouterr()
    assert reproduce(kernel, NEAR, GUARD) == (0, [GUARD])
    assert f"{GUARD} (results up to date, page not)" in capsys.readouterr().out
    assert reproduce(kernel, NEAR, GUARD) == (0, [])


@pytest.mark.parametrize("file", ["plots", "reports", "benchmarks"])
def test_a_page_is_run_again_when_the_code_that_shows_it_changes(file, kernel, monkeypatch):
    reproduce(kernel, GUARD)
    before = cli.code_hash
    changed = lambda *parts: before(*parts) + "x" * (file in parts)  # noqa: E731
    monkeypatch.setattr(cli, "code_hash", changed)
    assert reproduce(kernel, GUARD) == (0, [GUARD])
    assert reproduce(kernel, GUARD) == (0, [])


def test_a_copy_that_does_not_say_its_code_is_out_of_date(kernel, project):
    reproduce(kernel, GUARD)
    copy = project / "_build" / "demo" / f"{GUARD}.ipynb"
    notebook = nbformat.read(copy, as_version=4)
    del notebook.metadata["dlsr"]
    nbformat.write(notebook, copy)
    assert reproduce(kernel, GUARD) == (0, [GUARD])


def test_the_others_go_on_after_a_failure_which_is_named_at_the_end(kernel, project, capsys):
    kernel.raising = {NEAR: failure("no such thing"), LMD: cli.DeadKernelError("Kernel died")}
    assert reproduce(kernel) == (1, [QUICK, NEAR, GUARD, LMD])
    captured = capsys.readouterr()
    assert "0 up to date, 2 executed, 2 failed." in captured.out
    near, lmd = captured.err.splitlines()[-2:]
    assert near.startswith(f"dlsr: {NEAR}: ")
    assert "cell 0: ValueError: no such thing" in near
    assert lmd.startswith(f"dlsr: {LMD}: {LMD}.ipynb lost its kernel")
    assert copies(project / "_build" / "demo") == [GUARD]
    assert copies(project / "_build" / "failed") == [NEAR, LMD]
    kernel.raising = {}
    assert reproduce(kernel) == (0, [NEAR, LMD])
    assert copies(project / "_build" / "failed") == []


def test_an_interruption_keeps_what_is_done(kernel, project, capsys):
    kernel.raising = {NEAR: KeyboardInterrupt()}
    assert reproduce(kernel) == (130, [QUICK, NEAR])
    assert "resumed" in capsys.readouterr().err
    assert copies(project / "book" / "notebooks") == [QUICK]
    kernel.raising = {}
    assert reproduce(kernel) == (0, [NEAR, GUARD, LMD])


def test_an_unknown_item_is_refused_with_those_there_are(kernel, capsys):
    line = refused(capsys, "reproduce", NEAR, "99_nothing", "--profile", "demo")
    assert "There is no item 99_nothing" in line
    assert all(name in line for name in (QUICK, NEAR, GUARD, LMD))
    assert "30_deviations" in refused(capsys, "reproduce", "30_deviations")  # a report is no item
    assert kernel.ran == []


@pytest.mark.parametrize(("items", "profile"), [([QUICK], "pack"), ([], "large")])
def test_items_without_the_profile_are_refused(items, profile, kernel, capsys):
    assert repr(profile) in refused(capsys, "reproduce", *items, "--profile", profile)
    assert kernel.ran == []


def test_all_items_leave_out_those_without_the_profile(kernel):
    assert reproduce(kernel, profile="pack") == (0, [NEAR, GUARD, LMD])


def test_parameters_are_passed_on(kernel, project):
    changes = ["-p", "n_train", "130", "-p", "encoder", "resnet50"]
    assert reproduce(kernel, NEAR, *changes) == (0, [NEAR])
    assert kernel.parameters == [{"n_train": 130, "encoder": "resnet50", "profile": "demo"}]
    run = settings(NEAR, dict(kernel.parameters[0]))
    assert copies(project / "_build" / "runs") == [run_name(run)]
    assert not (project / "_build" / "demo" / f"{NEAR}.ipynb").exists()


def test_a_run_with_parameters_is_not_done_twice(kernel, capsys):
    assert reproduce(kernel, GUARD, "-p", "n_train", "130") == (0, [GUARD])
    assert reproduce(kernel, GUARD, "-p", "n_train", "130") == (0, [])
    assert "Nothing to do" in capsys.readouterr().out
    assert reproduce(kernel, GUARD, "-p", "n_train", "131") == (0, [GUARD])


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("epoch", "3", "'epoch' is no parameter"),
        ("epochs", "-3", "epochs=-3"),
        ("layers", "first", "layers='first'"),
    ],
)
def test_wrong_parameters_of_any_item_are_refused_before_the_first_starts(name, value, told, kernel, capsys):
    assert told in refused(capsys, "reproduce", "--profile", "demo", "-p", name, value)
    assert kernel.ran == []


# Status


@pytest.mark.parametrize("profile", ["pack", "paper"])
def test_the_status_lists_every_item_of_the_profile_without_data(profile, tmp_path, capsys):
    assert main(["status", "--profile", profile]) == 0
    lines = capsys.readouterr().out.splitlines()
    chapter = list(CHAPTER) if profile in STUDIES else []
    there = [name for name, item in ITEMS.items() if profile in item.profiles]
    assert [line.split()[0] for line in lines] == [*there, *chapter]
    for line in lines:
        name, found, measured, *_ = line.split()
        assert (found, measured) == (profile, "0")
        unmeasured = name in ITEMS and ITEMS[name].profiles[profile] == ()
        assert ("not measured" if unmeasured else "not run") in line
    assert not (tmp_path / "cache").exists()


def test_the_status_of_both_profiles_after_a_run(kernel, monkeypatch, capsys):
    asked = []
    whole = cli.coverage
    monkeypatch.setattr("dlsr.benchmarks.ITEMS", {GUARD: ITEMS[GUARD]})
    monkeypatch.setattr(cli, "coverage", lambda profile: asked.append(profile) or whole(profile))
    reproduce(kernel, GUARD, profile="pack")
    capsys.readouterr()
    assert main(["status"]) == 0
    assert asked == ["pack", "paper"]
    pack, *chapter, paper = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in chapter] == list(CHAPTER)
    assert pack.split()[:2] == [GUARD, "pack"]
    assert pack.endswith("up to date")
    assert paper.split()[:2] == [GUARD, "paper"]
    assert paper.endswith("not run")


# The chapter's pages


def test_a_page_of_the_chapter_takes_the_profile_alone(project, monkeypatch, capsys):
    name = next(iter(CHAPTER))
    write_notebook(project, name)
    monkeypatch.setattr(cli.papermill, "execute_notebook", executed)
    line = refused(capsys, "run", name, "-p", "profile", "pack", "-p", "seeds", "1")
    assert "seeds was given" in line
    assert "paper" in refused(capsys, "run", name, "-p", "profile", "paper")
    assert main(["run", name, "-p", "profile", "pack"]) == 0
    assert main(["run", name]) == 0
    for folder in ("book/notebooks", "_build/demo"):
        assert (project / folder / f"{name}.ipynb").is_file()


def test_reproduce_runs_the_chapters_pages_that_are_out_of_date(kernel, project, monkeypatch, capsys):
    pages = list(CHAPTER)[:2]
    for name in pages:
        write_notebook(project, name)
    monkeypatch.setattr(cli, "CHAPTER", dict.fromkeys(pages, ""))
    monkeypatch.setattr(cli, "chapter_state", lambda profile: "up to date")
    monkeypatch.setattr("dlsr.benchmarks.ITEMS", {GUARD: ITEMS[GUARD]})
    assert reproduce(kernel) == (0, [GUARD, *pages])
    assert reproduce(kernel) == (0, [])
    monkeypatch.setattr(cli, "chapter_state", lambda profile: "out of date: scores")
    capsys.readouterr()
    assert reproduce(kernel) == (0, pages)
    assert f"[1/2] {pages[0]} (out of date: scores)" in capsys.readouterr().out
    kernel.ran.clear()
    assert main(["reproduce", "--profile", "demo", "-p", "epochs", "2"]) == 0
    assert kernel.ran == [GUARD]


# A whole run


NO_NETWORK = """
import os, socket
from pathlib import Path

log = Path(os.environ["DLSR_TEST_NETWORK_LOG"])
log.touch()

def refuse(self, address):
    with log.open("a") as file:
        print(address, file=file)
    raise OSError(f"a test reached for the network: {address}")

socket.socket.connect = socket.socket.connect_ex = refuse
"""


def test_a_real_item_is_reproduced_by_its_notebook(tmp_path, monkeypatch, capsys):
    project, site, log = tmp_path / "project", tmp_path / "site", tmp_path / "network.txt"
    shutil.copytree(ROOT / "notebooks", project / "notebooks")
    (project / "_config.yml").touch()
    site.mkdir()
    (site / "sitecustomize.py").write_text(NO_NETWORK)  # the kernel is a process of its own
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(ROOT)]))
    monkeypatch.setenv("DLSR_TEST_NETWORK_LOG", str(log))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(project)
    sizes = {"n_train": 130, "n_test": 40, "width": 16, "blocks": 1, "epochs": 2}
    changes = [word for name, n in sizes.items() for word in ("-p", name, str(n))]
    command = ["reproduce", GUARD, "--profile", "demo", *changes]
    assert main(command) == 0, capsys.readouterr().err
    assert log.read_text() == ""
    run = settings(GUARD, sizes | {"profile": "demo"})
    copy = project / "_build" / "runs" / f"{run_name(run)}.ipynb"
    notebook = nbformat.read(copy, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type in ("error", "stream")]
    texts = json.dumps(outputs)
    assert "image/png" in texts
    assert "130 of digits 0-7" in texts
    rows = pd.read_csv(results_file(run))
    assert set(rows["n_id"]) == {40}
    assert copies(project / "_build" / "failed") == []

    written = copy.stat().st_mtime_ns
    capsys.readouterr()
    assert main(command) == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert copy.stat().st_mtime_ns == written
