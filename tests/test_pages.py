"""The notebooks: their common cells, what an edit of a page changes, and how it refuses mistakes."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from dlsr.errors import UserError

from conftest import one_sentence

ROOT = Path(__file__).resolve().parents[1]
PAGES = {file.stem: file for file in sorted(ROOT.glob("notebooks/*.ipynb"))}
REPORTS = {"30_deviations", "31_coverage", "32_results", "33_claims", "34_far_ood", "35_near_ood"}
REPORTS |= {"36_ablations", "50_speed", "51_cluster", "52_own_folders"}
COLAB = "# On Colab, fetch module and results first; elsewhere this does nothing.\n"


def cells_of(page, kind="code"):
    cells = nbformat.read(PAGES[page], as_version=4).cells
    return [cell for cell in cells if cell.cell_type == kind]


def tags(cell):
    return set(cell.metadata.get("tags", []))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_begins_with_the_cell_for_colab_and_names_its_parameters(page):
    first, *others = cells_of(page)
    assert tags(first) == {"remove-cell"} and first.source.startswith(COLAB)
    parameters = [cell.source for cell in others if "parameters" in tags(cell)]
    assert len(parameters) == (page not in REPORTS)
    assert all(source.startswith("profile: str = ") for source in parameters)
    assert not any(cell.outputs or cell.execution_count for cell in (first, *others))
    assert nbformat.read(PAGES[page], as_version=4).metadata.kernelspec["name"] == "python3"
    assert [n for c in cells_of(page) for n in c.source.splitlines() if len(n) > 79] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_roles_that_jupyter_and_colab_do_not_know(page):
    assert not [cell for cell in cells_of(page, "markdown") if re.search(r"\{\w+\}`", cell.source)]


def test_the_method_from_scratch_has_at_most_100_lines_and_no_dlsr_in_them():
    shown = [c for c in cells_of("00_from_scratch") if not tags(c) & {"remove-cell", "hide-input"}]
    lines = [line for cell in shown for line in cell.source.splitlines() if line.strip()]
    assert 50 < len(lines) <= 100
    assert not [line for line in lines if "dlsr" in line]


# A page answers for what stands in its cells

SMALL = {"profile": "demo", "epochs": 2, "n_train": 200, "n_test": 100}


def execute(page, folder, *, replace=("", ""), **parameters):
    """Run a page by papermill, with one change of its source; return the table it wrote."""
    source, results = folder / f"{page}.ipynb", folder / "results"
    notebook = nbformat.read(PAGES[page], as_version=4)
    before, after = replace
    for cell in notebook.cells:
        if before and before in cell.source:
            cell.source, before = cell.source.replace(before, after), ""
    assert not before, f"{page} has no {before!r}"
    nbformat.write(notebook, source)
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--kernel", "python3"]
    command += [str(source), str(folder / "executed.ipynb"), "-p", "results_dir", str(results)]
    for name, value in parameters.items():
        command += ["-p", name, str(value)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return pd.read_csv(results / f"{page}-{parameters['profile']}.csv", keep_default_na=False)


def auroc_of(table, method):
    rows = table[(table["method"] == method) & (table["metric"] == "auroc")]
    (value,) = rows.loc[rows["versus"] == "", "value"]
    return value


def test_a_score_that_is_edited_in_a_cell_is_the_one_that_is_evaluated(tmp_path):
    for name in ("as it is", "edited"):
        (tmp_path / name).mkdir()
    page, score = "08_near_ood", "dlsr.mse(z0, last)"
    before = execute(page, tmp_path / "as it is", **SMALL)
    after = execute(page, tmp_path / "edited", replace=(score, f"-{score}"), **SMALL)
    assert auroc_of(before, "MSE") > 55
    assert auroc_of(after, "MSE") == pytest.approx(100 - auroc_of(before, "MSE"), abs=1e-3)
    assert auroc_of(after, "MFsim") == pytest.approx(auroc_of(before, "MFsim"), abs=1e-3)


# A wrong parameter is answered by a sentence before anything is computed


def settings_of(page, **parameters):
    """Run a page's cells up to its settings, as they are with these parameters."""
    names = {}
    for cell in cells_of(page)[1:]:
        exec(cell.source, names)
        if "parameters" in tags(cell):
            assert set(parameters) <= set(names)
            names |= parameters
        if "dlsr.settings(" in cell.source:
            return names["run"]
    raise AssertionError(f"{page} has no settings")


@pytest.mark.parametrize("page", sorted(set(PAGES) - REPORTS))
def test_a_page_names_its_profiles_when_it_is_given_another(page):
    with pytest.raises(UserError) as error:
        settings_of(page, profile="large")
    assert "large" in one_sentence(error) and "demo" in str(error.value)


@pytest.mark.parametrize(
    "parameters",
    [
        {"profile": "read", "epochs": 3},
        {"profile": "demo", "epochs": -1},
        {"profile": "demo", "n_test": "many"},
        {"profile": "demo", "t": 2.5},
    ],
)
def test_a_wrong_parameter_is_answered_by_one_sentence(parameters):
    name, value = list(parameters.items())[-1]
    with pytest.raises(UserError) as error:
        settings_of("08_near_ood", **parameters)
    assert f"{name}={value!r}" in one_sentence(error)


def test_parameters_replace_those_of_the_profile():
    run = settings_of("08_near_ood", profile="demo", epochs=7)
    assert (run.epochs, run.width, run.ood) == (7, 256, ["digits_8_9/test"])
