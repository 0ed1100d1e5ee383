"""What holds the parts of the project together: imports, packages, addresses, notebooks."""

import ast
import re
import subprocess
from dataclasses import fields

import nbformat
import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dlsr.benchmarks import ITEMS, REPORTS, Parameters
from dlsr.chapter import CHAPTER

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings its twin
    import tomli as tomllib

ORDER = [
    "datasets", "encoders", "features", "lfdn", "diffusion", "training", "scores", "metrics", "significance",
    "detector", "baselines", "rivals", "variants", "recommended", "results", "experiments", "benchmarks",
    "comparison", "search", "chapter", "findings", "reports", "plots", "cli",
]  # fmt: skip
MODULES = sorted((ROOT / "dlsr").glob("*.py"))
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))


def tracked(*paths):
    """The files under git; the quickstart's executed copy, which `make book` makes, is not one."""
    command = ["git", "ls-files", "-z", *paths]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return sorted(filter(None, listed.stdout.split("\0")))


COPIES = [ROOT / name for name in tracked("book/notebooks")]


def files(paths, folder):
    """Parameters of a test: the files, or one that skips."""
    missing = pytest.param(None, marks=pytest.mark.skip(reason=f"there are no notebooks in {folder} yet"))
    return [pytest.param(path, id=path.stem) for path in paths] or [missing]


# Modules


def own_imports(tree):
    """The files of the package that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "dlsr"):
            name = (node.module or "").removeprefix("dlsr").strip(".")
            yield from [name.split(".")[0]] if name else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("dlsr."))


@pytest.mark.parametrize("file", files([m for m in MODULES if m.stem != "__init__"], "dlsr"))
def test_a_file_imports_only_earlier_ones(file):
    assert file.stem in ORDER
    for name in own_imports(ast.parse(file.read_text("utf-8"))):
        if name != "__version__":
            assert ORDER.index(name) < ORDER.index(file.stem), f"{file.stem} imports {name}"


def test_the_package_itself_imports_none_of_its_files():
    assert not list(own_imports(ast.parse((ROOT / "dlsr" / "__init__.py").read_text("utf-8"))))


# Packages and addresses


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def bounds(requirements):
    parsed = [Requirement(text) for text in requirements]
    return {canonicalize_name(r.name): str(r.specifier) for r in parsed}


def test_both_lists_of_packages_are_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["dependencies"]
    plain = [entry for entry in environment if isinstance(entry, str)]
    (by_pip,) = (entry["pip"] for entry in environment if isinstance(entry, dict))
    by_pip = [entry for entry in by_pip if not entry.startswith(("-", "."))]
    assert bounds(by_pip) == bounds(project()["dependencies"])
    assert {Requirement(entry).name for entry in plain} == {"python", "pip"}
    assert bounds(plain)["python"] == project()["requires-python"]


def tracked_texts():
    for name in tracked():
        try:
            yield name, (ROOT / name).read_text("utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def test_all_files_name_the_same_repository():
    texts = dict(tracked_texts())
    if not texts:
        pytest.skip("this is no git checkout")
    address = project()["urls"]["Repository"]
    assert re.fullmatch(r"https://github\.com/[\w-]+/dlsr", address)
    found = {
        (name, match)
        for name, text in texts.items()
        for match in re.findall(r"https://github\.com/[\w-]+/dlsr\b", text)
    }
    assert found
    assert [pair for pair in sorted(found) if pair[1] != address] == []


def test_every_table_of_results_can_be_downloaded():
    page = (ROOT / "book" / "downloads.md").read_text("utf-8")
    offered = re.findall(r"{download}`\S+ <\.\./results/(\S+)>`", page)
    assert offered
    there = [*(ROOT / "results").glob("*.csv"), *(ROOT / "results" / "comparison").glob("*.csv")]
    there += (ROOT / "results").glob("*.json")
    assert sorted(offered) == sorted(p.relative_to(ROOT / "results").as_posix() for p in there)


# Notebooks


def read(path):
    return nbformat.read(path, as_version=4)


def tags(cell):
    return cell.metadata.get("tags", [])


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("source", files(SOURCES, "notebooks"))
def test_a_source_holds_no_outputs(source):
    notebook = read(source)
    assert code(notebook)
    assert not any(cell.outputs or cell.execution_count for cell in code(notebook))
    assert notebook.metadata.kernelspec["name"] == "python3"
    assert source.stem in {**ITEMS, **REPORTS, **CHAPTER}


@pytest.mark.parametrize("name", [*ITEMS, *REPORTS, *CHAPTER])
def test_every_item_and_report_has_a_notebook(name):
    assert ROOT / "notebooks" / f"{name}.ipynb" in SOURCES


def parameter_cells(notebook):
    return [cell for cell in notebook.cells if "parameters" in tags(cell)]


@pytest.mark.parametrize("source", files([s for s in SOURCES if s.stem in ITEMS], "notebooks"))
def test_a_sources_parameters_are_the_packages(source):
    (cell,) = parameter_cells(read(source))
    given = {}
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.Assign | ast.AnnAssign)
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        given[target.id] = type(ast.literal_eval(node.value))
    assert given == {field.name: type(field.default) for field in fields(Parameters)}


@pytest.mark.parametrize("source", files([s for s in SOURCES if s.stem in CHAPTER], "notebooks"))
def test_a_page_of_the_chapter_has_the_profile_as_its_one_parameter(source):
    (cell,) = parameter_cells(read(source))
    (node,) = ast.parse(cell.source).body
    assert (node.target.id, ast.literal_eval(node.value)) == ("profile", "demo")


@pytest.mark.parametrize("source", files([s for s in SOURCES if s.stem in REPORTS], "notebooks"))
def test_a_report_has_no_parameters(source):
    assert parameter_cells(read(source)) == []


@pytest.mark.parametrize("source", files(SOURCES, "notebooks"))
def test_a_sources_code_fits_the_page(source):
    long = [line for cell in code(read(source)) for line in cell.source.splitlines() if len(line) > 79]
    assert long == []


@pytest.mark.parametrize("copy", files(COPIES, "book/notebooks"))
def test_a_copy_is_its_source_executed_without_error(copy):
    notebook = read(copy)
    source = ROOT / "notebooks" / copy.name
    assert source.is_file()
    kept = [cell.source for cell in notebook.cells if "injected-parameters" not in tags(cell)]
    assert kept == [cell.source for cell in read(source).cells]
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert notebook.metadata.papermill["exception"] is None


def test_what_the_module_reads_is_installed_with_it():
    """An editable install would hide that it is not."""
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"][
        "package-data"
    ]["dlsr"]
    for path in (ROOT / "dlsr").iterdir():
        if path.is_file() and path.suffix != ".py":
            assert any(path.match(pattern) for pattern in package_data), path.name
