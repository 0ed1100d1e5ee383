from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import FakeEncoder, easy_features, write_folder

from dlsr import __version__, cli
from dlsr.cli import main
from dlsr.datasets import DATASETS, UserError
from dlsr.detector import DLSRDetector

NEAR = "08_near_ood"


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
    cell = nbformat.v4.new_code_cell('profile: str = "demo"\nepochs: int = 0')
    cell.metadata.tags = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "notebooks" / f"{NEAR}.ipynb")
    monkeypatch.chdir(folder)
    return folder


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
    return main(["fit", str(photos), "--out", str(out), "--encoder", "fake", *sizes, *more])


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
        ("encoder", "7", "it needs str"),
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
    threshold = DLSRDetector.load(tmp_path / "detector").threshold_
    np.testing.assert_array_equal(table["verdict"] == "OOD", table["ood_score"] > threshold)
    assert fake.images == 47


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
    assert main(["run", NEAR, "-p", "profile", "pack", "-p", "seeds", "1"]) == 0
    copy = project / "book" / "notebooks" / f"{NEAR}.ipynb"
    assert str(copy) in capsys.readouterr().out
    notebook = nbformat.read(copy, as_version=4)
    assert notebook.metadata.papermill == {
        "parameters": {"profile": "pack", "seeds": 1}, "exception": None,
    }  # fmt: skip
    assert not any("papermill" in cell.metadata for cell in notebook.cells)
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


@pytest.mark.parametrize("changed", [["profile", "demo"], ["epochs", "3"], ["encoder", "efficientnet_lite0"]])
def test_a_run_of_other_settings_never_replaces_the_books_copy(project, monkeypatch, changed):
    monkeypatch.setattr(cli.papermill, "execute_notebook", executed)
    assert main(["run", NEAR, "-p", "profile", "pack", "-p", *changed]) == 0
    assert not (project / "book").exists()
    (copy,) = (project / "_build" / "runs").iterdir()
    assert copy.name.startswith(NEAR)


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
