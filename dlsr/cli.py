"""The command ``dlsr``: reproduce the paper's items, list image sets, use a detector on own images."""

import argparse
import hashlib
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from dlsr import __version__
from dlsr.benchmarks import (
    REPORTS,
    Parameters,
    run_name,
    settings,
    state,
    with_profile,
)
from dlsr.chapter import CHAPTER, checked_profile
from dlsr.chapter import coverage as chapter_coverage
from dlsr.chapter import state as chapter_state
from dlsr.comparison import STUDIES
from dlsr.datasets import DATASETS, UserError, data_folder, download, load_images, sets_here
from dlsr.detector import DLSRDetector
from dlsr.encoders import PRESETS, get_encoder
from dlsr.features import Features, code_hash, extract, replace_file
from dlsr.recommended import RecommendedDetector, load_detector
from dlsr.reports import coverage
from dlsr.results import project_folder
from dlsr.scores import SCORES

VOLATILE = ("papermill", "execution", "language_info")  # metadata that changes with every run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one sentence on stderr and exit status 2."""
    warnings.showwarning = lambda message, *_, **__: print(f"dlsr: {message}", file=sys.stderr)
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except UserError as error:
        print(f"dlsr: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dlsr: interrupted; what was finished is kept and will be resumed.", file=sys.stderr)
        return 130


def run_notebook(name: str, parameters: dict, *, output: Path | None = None, progress: bool = True) -> Path:
    """Execute ``notebooks/<name>.ipynb`` by papermill, and move the copy into place if it succeeded.

    Wrong parameters are refused before a kernel starts. The copy goes to ``book/notebooks`` if it is
    the item's own profile, unchanged; of the demo's to ``_build/demo``, of any other run's to
    ``_build/runs``. A copy that failed stays in ``_build/failed``.
    """
    project = project_folder()
    source = project / "notebooks" / f"{name}.ipynb"
    if not source.is_file():
        there = ", ".join(sorted(p.stem for p in source.parent.glob("*.ipynb"))) or "none here"
        raise UserError(
            f"There is no notebook {name!r}; there are: {there}. Run this in the project's folder."
        )
    output = output or executed_copy(name, parameters)
    draft = project / "_build" / "failed" / source.name
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(source),
            str(draft),
            parameters,
            kernel_name="python3",
            progress_bar=progress,
            stderr_file=sys.stderr if progress else None,
        )
    except PapermillExecutionError as error:
        raise UserError(
            f"{source.name} failed in cell {error.cell_index}: {error.ename}: {error.evalue} "
            f"What it did until then is in {draft}."
        ) from error
    except DeadKernelError as error:
        raise UserError(
            f"{source.name} lost its kernel ({error}); a machine with more memory may be needed."
        ) from error
    notebook = without_volatile(nbformat.read(draft, as_version=4))
    notebook.metadata["dlsr"] = {"page": page_hash(source)}
    replace_file(output, lambda path: nbformat.write(notebook, path))
    draft.unlink()
    return output


def executed_copy(name: str, parameters: dict) -> Path:
    """Where the executed copy of a run belongs; wrong parameters are refused."""
    project = project_folder()
    book = project / "book" / "notebooks" / f"{name}.ipynb"
    if name in REPORTS:
        if parameters:
            raise UserError(
                f"{name} only reads results and has no parameters; {', '.join(parameters)} was given."
            )
        return book
    if name in CHAPTER:
        profile = checked_profile(parameters)
        return book if profile != "demo" else project / "_build" / profile / book.name
    run = settings(name, dict(parameters))
    if run.for_the_book:
        return book
    if run.experiments == run.item.profiles[run.profile]:
        return project / "_build" / run.profile / book.name
    return project / "_build" / "runs" / f"{run_name(run)}.ipynb"


def page_hash(source: Path) -> str:
    """What an executed copy depends on beside the results: its source and the code that shows them."""
    code = ("chapter", "findings") if source.stem in CHAPTER else ("experiments", "benchmarks", "reports")
    return hashlib.sha256(source.read_bytes() + code_hash(*code, "plots").encode()).hexdigest()[:12]


def standing(name: str, parameters: dict) -> str:
    """``up to date``, or what of the results or of the executed copy is not."""
    if name in CHAPTER:
        found = chapter_state(checked_profile(parameters))
    else:
        found = state(settings(name, dict(parameters)))
    if found != "up to date" and not found.startswith("not measured"):
        return found
    copy = executed_copy(name, parameters)
    source = project_folder() / "notebooks" / f"{name}.ipynb"
    try:
        page = nbformat.read(copy, as_version=4).metadata.get("dlsr", {}).get("page")
        fresh = page == page_hash(source)
    except (ValueError, OSError, AttributeError):  # of a copy that is damaged or not there
        fresh = False
    return "up to date" if fresh else f"{found.replace('up to date', 'results up to date')}, page not"


def without_volatile(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An executed notebook less what changes with every run: times, machine, progress bars."""
    about = notebook.metadata.get("papermill", {})
    for cell in notebook.cells:  # progress bars go to stderr
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    for holder in (notebook, *notebook.cells):
        for key in VOLATILE:
            holder.metadata.pop(key, None)
    notebook.metadata["papermill"] = {key: about.get(key) for key in ("parameters", "exception")}
    return notebook


def _run(options: argparse.Namespace) -> int:
    parameters = {name: _value(name, text) for name, text in options.parameter}
    print(f"Wrote {run_notebook(options.notebook, parameters, output=options.out)}")
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    """Run what is out of date; go on after a failure, and tell all failures at the end."""
    parameters = {name: _value(name, text) for name, text in options.parameter}
    if "profile" in parameters:
        raise UserError("-p profile was given; `dlsr reproduce` takes it as --profile.")
    parameters["profile"] = options.profile
    there = [item.name for item in with_profile(options.profile)]
    chapter = list(CHAPTER) if options.profile in STUDIES else []
    unknown = [name for name in options.items if name not in [*there, *chapter]]
    if unknown:
        raise UserError(
            f"There is no item {', '.join(unknown)} with the profile {options.profile!r}; "
            f"there are {', '.join([*there, *chapter])}."
        )
    # The chapter's pages take no other settings, so that a run with -p is of the paper's items.
    every = there if options.parameter else [*there, *chapter]
    names = list(dict.fromkeys(options.items)) or every
    todo = [name for name in names if standing(name, parameters) != "up to date"]
    failed = {}
    for number, name in enumerate(todo, start=1):
        print(f"[{number}/{len(todo)}] {name} ({standing(name, parameters)})", flush=True)
        try:
            print(f"Wrote {run_notebook(name, parameters)}", flush=True)
        except UserError as error:
            failed[name] = error
            print(f"{name} failed: {error}", file=sys.stderr, flush=True)
    print(f"{len(names) - len(todo)} up to date, {len(todo) - len(failed)} executed, {len(failed)} failed.")
    if not todo:
        print("Nothing to do: every item is up to date.")
    for name, error in failed.items():
        print(f"dlsr: {name}: {error}", file=sys.stderr)
    return 1 if failed else 0


def _status(options: argparse.Namespace) -> int:
    profiles = options.profile or ("pack", "paper")
    table = pd.concat(part(profile) for profile in profiles for part in (coverage, chapter_coverage))
    for row in table.itertuples():
        measured = f"{row.measured} of {row.cells} cells"
        print(f"{row.item:24} {row.profile:6} {measured:>18}  {row.date or '-':10}  {row.state}")
    return 0


def _sets(options: argparse.Namespace) -> int:
    for name in options.download:
        print(f"{name}: {len(download(name)):,} images are here.")
    here = set(sets_here())
    print(f"data folder (DLSR_DATA): {data_folder()}")
    for key, row in DATASETS.items():
        count = f"{row.images:,}" if row.images else "your own"
        place = "built in" if row.source == "scikit-learn" else "found" if key in here else "not here"
        print(f"{key:20} {count:>8} images  {row.role:5} {place}")
    return 0


def _fit(options: argparse.Namespace) -> int:
    features = _features(options.images, options)
    own = {} if options.score == "recommended" else {"score": options.score}
    detector = (DLSRDetector if own else RecommendedDetector)(
        features.channels,
        **own,
        width=options.width,
        blocks=options.blocks,
        epochs=options.epochs,
        batch_size=min(128, max(1, int(0.9 * len(features)))),
        progress=True,
    )
    detector.fit(features.z0())
    about = {
        "encoder": options.encoder,
        "weights_sha256": features.key.weights_sha256,
        "images": len(features),
    }
    detector.save(options.out, about=about)
    print(f"Fitted on {len(features)} images; threshold {detector.threshold_:.6g}; saved in {options.out}")
    return 0


def _score(options: argparse.Namespace) -> int:
    detector = load_detector(options.detector)
    if detector.threshold_ is None or not {"encoder", "weights_sha256"} <= set(detector.about_):
        raise UserError(
            f"The detector in {options.detector} has no threshold, or does not say which encoder it needs; "
            "fit one with `dlsr fit`, or score from Python."
        )
    options.encoder = detector.about_["encoder"]
    features = _features(options.images, options)
    if features.key.weights_sha256 != detector.about_["weights_sha256"]:
        raise UserError(
            "The encoder's weights differ from those the detector was fitted with; use the same file."
        )
    scores = detector.ood_score(features.z0())
    table = pd.DataFrame(
        {
            "image": features.ids,
            "ood_score": scores,
            "verdict": np.where(scores <= detector.threshold_, "ID", "OOD"),
        }
    ).sort_values("ood_score", ascending=False)
    if options.csv:
        replace_file(options.csv, lambda path: table.to_csv(path, index=False))
        print(f"Wrote {options.csv}")
    else:
        print(table.to_string(index=False))
    print(f"{len(table)} images scored, {(table['verdict'] == 'OOD').sum()} of them called OOD.")
    return 0


def _features(images: str, options: argparse.Namespace) -> Features:
    on_error = "skip" if options.skip_unreadable else "raise"
    return extract(load_images(images), get_encoder(options.encoder), on_error=on_error)


def _value(name: str, text: str) -> str | int | float:
    """A parameter's value from its text; only text where the parameter is text."""
    if isinstance(getattr(Parameters(), name, 0), str):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float) else text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dlsr", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    settable = argparse.ArgumentParser(add_help=False)
    settable.add_argument(
        "-p",
        dest="parameter",
        metavar=("NAME", "VALUE"),
        nargs=2,
        action="append",
        default=[],
        help="a notebook's parameter",
    )

    run = commands.add_parser(
        "run", parents=[settable], help="execute a notebook and put the copy into the book"
    )
    run.add_argument("notebook", help="its name, as 08_near_ood")
    run.add_argument("--out", type=Path, help="where the executed copy goes")
    run.set_defaults(command=_run)

    reproduce = commands.add_parser(
        "reproduce", parents=[settable], help="run the items that are out of date"
    )
    reproduce.add_argument("items", nargs="*", metavar="ITEM", help="as 08_near_ood; none: all")
    reproduce.add_argument("--profile", default="pack", help="demo, pack (default) or paper")
    reproduce.set_defaults(command=_reproduce)

    status = commands.add_parser("status", help="what is measured, and what is out of date")
    status.add_argument("--profile", action="append", help="demo, pack or paper; unset: pack and paper")
    status.set_defaults(command=_status)

    sets = commands.add_parser("sets", help="list the image sets and which are here")
    sets.add_argument("--download", action="append", default=[], metavar="NAME", help="get a set")
    sets.set_defaults(command=_sets)

    images = argparse.ArgumentParser(add_help=False)
    images.add_argument(
        "--skip-unreadable", action="store_true", help="leave unreadable images out, and name them"
    )

    fit = commands.add_parser("fit", parents=[images], help="train a detector on a folder of images")
    fit.add_argument("images", help="a folder of images, or a set's name")
    fit.add_argument("--out", type=Path, required=True, help="the folder to save the detector in")
    fit.add_argument("--encoder", default="efficientnet_lite0", help=f"{', '.join(PRESETS)} or a timm model")
    fit.add_argument("--score", default="recommended", help=f"recommended, or {', '.join(SCORES)}")
    fit.add_argument("--width", type=int, default=720)
    fit.add_argument("--blocks", type=int, default=8)
    fit.add_argument("--epochs", type=int, default=30)
    fit.set_defaults(command=_fit)

    score = commands.add_parser("score", parents=[images], help="score a folder of images by a detector")
    score.add_argument("detector", help="the folder that fit saved")
    score.add_argument("images", help="a folder of images, or a set's name")
    score.add_argument("--csv", type=Path, help="write the table there")
    score.set_defaults(command=_score)
    return parser


if __name__ == "__main__":
    sys.exit(main())
