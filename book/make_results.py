"""Measure pages and put what they computed into ``results/``, of which this is the only writer.

python book/make_results.py --profile pack [08_near_ood ...] [-p NAME VALUE ...]

A page is executed aside, and its results are moved into place when it has succeeded; otherwise they
stay as they were, and the other pages go on. Results of the demo, or with changed parameters, go to
``_build/results`` instead.
"""

import argparse
import ast
import sys
import tempfile
from pathlib import Path

import nbformat
import papermill

ROOT = Path(__file__).resolve().parents[1]
OWN = {"profile", "results_dir"}  # parameters that are set here


def all_pages() -> dict[str, dict]:
    """Return the parameters of every page that computes results, by the page's name."""
    files = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    found = {file.stem: papermill.inspect_notebook(str(file)) for file in files}
    return {page: parameters for page, parameters in found.items() if set(parameters) >= OWN}


def profiles(page: str) -> list[str]:
    """Return the names of a page's profiles: the keys of its dictionary ``PROFILES``."""
    cells = nbformat.read(ROOT / "notebooks" / f"{page}.ipynb", as_version=4).cells
    (source,) = (cell.source for cell in cells if "PROFILES = " in cell.source)
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    (found,) = (n.value for n in assigned if ast.unparse(n.targets[0]) == "PROFILES")
    return [key.value for key in found.keys]


def typed(given: list[tuple[str, str]], parameters: dict[str, dict], page: str) -> dict:
    """Return parameters in the types of the page's own, or stop with a sentence."""
    values = {}
    for name, text in given:
        if name not in set(parameters) - OWN:
            known = ", ".join(sorted(set(parameters) - OWN)) or "none"
            sys.exit(f"{name!r} cannot be changed on the page {page}; its parameters are: {known}.")
        kind = type(ast.literal_eval(parameters[name]["default"]))
        try:
            values[name] = kind(text)
        except ValueError:
            sys.exit(f"{name}={text!r} was given; a value of type {kind.__name__} is needed.")
    return values


def measure(page: str, parameters: dict, target: Path) -> None:
    """Execute a page with these parameters and move its results into the folder ``target``."""
    (ROOT / "_build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{page}-", dir=ROOT / "_build") as folder:
        results = Path(folder) / "results"
        source, copy = ROOT / "notebooks" / f"{page}.ipynb", Path(folder) / f"{page}.ipynb"
        parameters = {**parameters, "results_dir": str(results)}
        papermill.execute_notebook(str(source), str(copy), parameters, cwd=str(ROOT))
        for file in [f for f in results.rglob("*") if f.suffix in (".csv", ".parquet", ".json")]:
            place = target / file.relative_to(results)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)


def main() -> None:
    """Measure the pages that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", nargs="*", help="a page, such as 08_near_ood; none: all pages")
    parser.add_argument("--profile", required=True, choices=("demo", "pack", "paper"))
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    options, known, failed = parser.parse_args(), all_pages(), []
    if unknown := set(options.page) - set(known):
        sys.exit(f"There is no page {min(unknown)!r} that computes; there are {', '.join(known)}.")
    chosen = {page: typed(options.p, known[page], page) for page in options.page or known}
    target = ROOT / ("_build/results" if options.p or options.profile == "demo" else "results")
    for page, parameters in chosen.items():
        if options.profile not in profiles(page):
            print(f"{page}: profile {options.profile} has no images or weights for it.")
            continue
        print(f"{page} is measured", flush=True)
        try:
            measure(page, {**parameters, "profile": options.profile}, target)
        except Exception as error:  # the other pages go on
            print(f"{page} failed: {error}", file=sys.stderr)
            failed.append(page)
    if failed:
        sys.exit(f"These pages failed; their results are as they were: {', '.join(failed)}.")
    print(f"The results are in {target}.")


if __name__ == "__main__":
    main()
