"""`make results` refuses wrong parameters and moves results only of pages that succeeded."""

import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = 'profile: str = "read"\nresults_dir: str = ""\nepochs: int = 0'


@pytest.fixture
def make_results(tmp_path, monkeypatch):
    """The script with three pages of a made project; the last has no profile ``pack``."""
    monkeypatch.syspath_prepend(ROOT / "book")
    import make_results

    (tmp_path / "notebooks").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "01_bad-pack.csv").write_text("old")
    for name in ("01_bad", "02_good", "03_no_weights"):
        pack = "" if name == "03_no_weights" else "'pack': dict(), "
        cells = [PARAMETERS, f"PROFILES = {{'demo': dict(), {pack}'paper': dict()}}"]
        notebook = new_notebook(cells=[new_code_cell(source) for source in cells])
        notebook.cells[0].metadata["tags"] = ["parameters"]
        kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
        notebook.metadata["kernelspec"] = kernel
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")

    def execute(source, copy, parameters, **options):
        page, folder = Path(source).stem, Path(parameters["results_dir"])
        (folder / "scores").mkdir(parents=True)
        for name in (f"{page}-pack.csv", f"scores/{page}-pack.parquet", f"{page}-pack.lock"):
            (folder / name).write_text(f"epochs {parameters.get('epochs')}")
        if page == "01_bad":
            raise RuntimeError("the third cell fails")

    monkeypatch.setattr(make_results, "ROOT", tmp_path)
    monkeypatch.setattr(make_results.papermill, "execute_notebook", execute)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["make_results.py", *arguments])
        make_results.main()
        return tmp_path

    run.folder = tmp_path
    return run


@pytest.mark.parametrize("file", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda f: f.stem)
def test_the_profiles_of_every_page_that_computes_are_found(file, monkeypatch):
    if "results_dir: str" in file.read_text("utf-8"):
        monkeypatch.syspath_prepend(ROOT / "book")
        import make_results

        assert "demo" in make_results.profiles(file.stem)


def files(folder):
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())


def test_a_failing_page_keeps_its_results_and_the_others_go_on(make_results, capsys):
    with pytest.raises(SystemExit, match=r"failed.*: 01_bad\.") as stopped:
        make_results("--profile", "pack")
    assert stopped.value.code not in (0, None)
    results = make_results.folder / "results"
    assert files(results) == ["01_bad-pack.csv", "02_good-pack.csv", "scores/02_good-pack.parquet"]
    assert (results / "01_bad-pack.csv").read_text() == "old"
    said = capsys.readouterr()
    assert "03_no_weights: profile pack has no images or weights for it." in said.out
    assert "the third cell fails" in said.err


@pytest.mark.parametrize("arguments", [("--profile", "pack", "-p", "epochs", "3"), ("--profile", "demo")])
def test_changed_parameters_and_the_demo_leave_the_results_alone(make_results, arguments):
    folder = make_results(*arguments, "02_good")
    assert files(folder / "results") == ["01_bad-pack.csv"]
    assert "02_good-pack.csv" in files(folder / "_build" / "results")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-p", "epoch", "3"), "'epoch' cannot be changed .* its parameters are: epochs"),
        (("-p", "results_dir", "x"), "'results_dir' cannot be changed"),
        (("-p", "epochs", "few"), "a value of type int is needed"),
        (("04_other",), "There is no page '04_other'"),
    ],
)
def test_what_cannot_be_is_one_sentence(make_results, arguments, sentence):
    with pytest.raises(SystemExit, match=sentence):
        make_results("--profile", "demo", *arguments)
