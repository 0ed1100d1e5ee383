"""What holds the parts of the project together: limits, imports, packages, pages."""

import ast
import re
from pathlib import Path

import dlsr
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings its twin
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
ORDER = [
    "errors", "cache", "downloads", "data", "encoders", "backends", "features", "lfdn", "diffusion",
    "training", "scores", "metrics", "baselines", "conformal", "detector", "explain", "report",
    "cluster", "evaluation", "plots", "cli",
]  # fmt: skip
PACKAGE, STUDY = sorted(ROOT.glob("dlsr/*.py")), sorted(ROOT.glob("dlsr/study/*.py"))
TREES = {file: ast.parse(file.read_text("utf-8")) for file in PACKAGE + STUDY}
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


# Limits


@pytest.mark.parametrize(
    ("files", "limit"), [("dlsr/*.py", 2955), ("dlsr/study/*.py", 1250), ("tests/*.py", 5800)]
)
def test_the_files_are_short(files, limit):
    lines = {file.name: file.read_text("utf-8").count("\n") for file in ROOT.glob(files)}
    assert sum(lines.values()) <= limit, lines


def test_no_line_and_no_function_is_too_long():
    for file, tree in TREES.items():
        lines = file.read_text("utf-8").splitlines()
        assert [line for line in lines if len(line) > 100] == [], file
        nodes = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
        assert [n.name for n in nodes if n.end_lineno - n.lineno + 1 > 40] == [], file


def test_modules_and_public_functions_have_a_docstring():
    for file, tree in TREES.items():
        assert ast.get_docstring(tree), file
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        nodes = [*tree.body, *(method for one in classes for method in one.body)]
        public = [n for n in nodes if isinstance(n, FUNCTIONS | ast.ClassDef) and n.name[0] != "_"]
        silent = [node.name for node in public if not ast.get_docstring(node)]
        assert set(silent) <= {"forward"}, file  # PyTorch's own contract


# Imports


def own_imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dlsr":
            parts = node.module.split(".")
            yield from parts[1:2] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("dlsr."))


def test_a_file_imports_only_earlier_ones():
    names = [file.stem for file in PACKAGE if file.stem != "__init__"]
    assert sorted(names) == sorted(ORDER)
    for file in PACKAGE:
        place = -1 if file.stem == "__init__" else ORDER.index(file.stem)
        for name in set(own_imports(TREES[file])) - {"__version__"}:
            assert ORDER.index(name) < place, f"{file.stem} imports {name}"


def test_every_public_name_is_there():
    assert all(getattr(dlsr, name) is not None for name in dlsr.__all__)


# Packages


def bounds(requirements):
    parsed = [Requirement(text) for text in requirements]
    return {canonicalize_name(r.name): r.specifier for r in parsed}


def test_both_lists_of_packages_are_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["dependencies"]
    plain = [entry for entry in environment if isinstance(entry, str)]
    (by_pip,) = (entry["pip"] for entry in environment if isinstance(entry, dict))
    by_pip = [entry for entry in by_pip if not entry.startswith("-")]
    assert bounds(by_pip) == bounds(PROJECT["project"]["dependencies"])
    assert bounds(plain)["python"] == PROJECT["project"]["requires-python"]


def test_the_lock_pins_every_package_within_its_bounds():
    lines = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    locked = bounds(line for line in lines if not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"]["test"]
    for name, allowed in bounds(PROJECT["project"]["dependencies"] + extras).items():
        (pin,) = locked[name]
        assert pin.operator == "==" and allowed.contains(pin.version), name


def test_what_the_package_reads_is_installed_with_it():
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in (".py", ".pyc"):
                assert any(file.match(pattern) for pattern in patterns), file


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == dlsr.__version__
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "dlsr.__version__"


# Pages


def test_every_page_is_in_the_book():
    contents = (ROOT / "book" / "_toc.yml").read_text("utf-8")
    linked = (ROOT / "book" / "not_reproduced.md").read_text("utf-8")  # those without images here
    pages = set(re.findall(r"notebooks/(\S+)", contents))
    pages |= set(re.findall(r"notebooks/(\w+)\.ipynb", linked))
    assert pages == {file.stem for file in NOTEBOOKS}
