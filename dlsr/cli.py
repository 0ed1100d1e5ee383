"""The command ``dlsr``: run a notebook, list the image sets, fit and use a detector on own images."""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
from papermill.exceptions import PapermillExecutionError

from dlsr import __version__
from dlsr.benchmarks import run_name, settings
from dlsr.datasets import DATASETS, UserError, data_folder, load_images
from dlsr.detector import DLSRDetector
from dlsr.encoders import PRESETS, get_encoder
from dlsr.features import Features, extract, replace_file
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
    the item's own profile, unchanged; that of any other run to ``_build/runs``. A copy that failed
    stays in ``_build/failed``.
    """
    project = project_folder()
    source = project / "notebooks" / f"{name}.ipynb"
    if not source.is_file():
        there = ", ".join(sorted(p.stem for p in source.parent.glob("*.ipynb"))) or "none here"
        raise UserError(
            f"There is no notebook {name!r}; there are: {there}. Run this in the project's folder."
        )
    run = settings(name, dict(parameters))
    place = project / "book" / "notebooks" / source.name
    output = output or (place if run.for_the_book else project / "_build" / "runs" / f"{run_name(run)}.ipynb")
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
    notebook = without_volatile(nbformat.read(draft, as_version=4))
    replace_file(output, lambda path: nbformat.write(notebook, path))
    draft.unlink()
    return output


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
    parameters = {name: _value(text) for name, text in options.parameter}
    print(f"Wrote {run_notebook(options.notebook, parameters, output=options.out)}")
    return 0


def _sets(options: argparse.Namespace) -> int:
    print(f"data folder (DLSR_DATA): {data_folder()}")
    for key, row in DATASETS.items():
        base = data_folder() / row.name
        here = (base / f"{row.split}.parquet").is_file() or (base / row.split).is_dir()
        place = "built in" if row.source == "scikit-learn" else "found" if here else "not here"
        print(f"{key:20} {row.images:>7,} images  {row.role:5} {place}")
    return 0


def _fit(options: argparse.Namespace) -> int:
    features = _features(options.images, options)
    detector = DLSRDetector(
        features.channels,
        score=options.score,
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
    detector = DLSRDetector.load(options.detector)
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


def _value(text: str) -> str | int | float:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float) else text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dlsr", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="execute a notebook and put the copy into the book")
    run.add_argument("notebook", help="its name, as 08_near_ood")
    run.add_argument("-p", dest="parameter", metavar=("NAME", "VALUE"), nargs=2, action="append", default=[])
    run.add_argument("--out", type=Path, help="where the executed copy goes")
    run.set_defaults(command=_run)

    sets = commands.add_parser("sets", help="list the image sets and which are here")
    sets.set_defaults(command=_sets)

    images = argparse.ArgumentParser(add_help=False)
    images.add_argument(
        "--skip-unreadable", action="store_true", help="leave unreadable images out, and name them"
    )

    fit = commands.add_parser("fit", parents=[images], help="train a detector on a folder of images")
    fit.add_argument("images", help="a folder of images, or a set's name")
    fit.add_argument("--out", type=Path, required=True, help="the folder to save the detector in")
    fit.add_argument("--encoder", default="efficientnet_lite0", help=f"{', '.join(PRESETS)} or a timm model")
    fit.add_argument("--score", default="mfsim", help=f"{', '.join(SCORES)}")
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
