"""Fit an OOD detector on a folder of familiar images, and score other images by it."""

import argparse
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import dlsr
from dlsr.cache import replace_file
from dlsr.errors import UserError

METHOD = (
    "gaussian (the default), knn, mse or mfsim: with 50 images of 18 kinds the mean AUROC of "
    "the Gaussian was 0.947, of the second nearest neighbour 0.941, of mse 0.942, and of mfsim "
    "0.921; the last two train a network"
)
FEWEST = 20  # images, below which a fit must be forced: at 5 % it could call none OOD
UPDATES = 500  # of a network, at least, however few images there are


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 2 after a mistake, which is one sentence."""
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _notice(message)
        try:
            for target in (options.target, options.html):
                _check_target(target, options.overwrite)
            if options.max_pixels:  # Pillow refuses what has twice its limit
                from PIL import Image

                Image.MAX_IMAGE_PIXELS = options.max_pixels / 2
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            options.run(options)  # it imports what is heavy, so that Ctrl-C is caught here
            print(end="", flush=True)  # where there is no standard output, it does nothing
        except BrokenPipeError:  # the reader of the output, such as `head`, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (UserError, OSError) as error:
            _notice(error)
            return 2
        except KeyboardInterrupt:
            _notice("interrupted; the same command goes on from what the cache has.")
            return 130
    return 0


def _check_target(target: Path | None, overwrite: bool) -> None:
    """Raise `UserError` before the work begins if its result could not be written there."""
    if target is None or str(target) == "-":
        return
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise UserError(f"{target} is there and is no plain file; name a file to write.")
    if target.exists() and not overwrite:
        raise UserError(f"{target} is there already; name another, or replace it by --overwrite.")
    folder = next(folder for folder in target.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{target} cannot be written, because {folder} is closed or no folder.")


def _fit(options: argparse.Namespace) -> None:
    import numpy as np

    images, features, reasons = _features(options, dlsr.create_encoder(options.encoder))
    if features is None:
        raise UserError(f"No image of {images.name} can be read; {images.ids[0]}: {reasons[0]}")
    z0 = features.z0()
    z0 = z0[np.sort(np.unique(z0, axis=0, return_index=True)[1])]
    if len(z0) < len(features):
        _notice(f"{len(features) - len(z0)} images are copies of others; they are left out.")
    if len(z0) < FEWEST and not options.force:
        told = f"{len(z0)} different images were given; {FEWEST} or more are needed, better 100"
        raise UserError(f"{told}; --force fits to fewer, but at least to 3.")
    sizes = {name: getattr(options, name) for name in ("k", "width", "blocks", "epochs")}
    sizes["epochs"] = max(sizes["epochs"], -(-UPDATES // max(1, int(0.9 * len(z0)) // 128)))
    chosen = {"method": options.method, "progress": True} | sizes
    detector = dlsr.DLSRDetector(features.channels, **chosen).fit(z0)
    about = {"encoder": options.encoder, "weights_sha256": features.weights_sha256}
    about |= {"images": len(z0), "copies": len(features) - len(z0), "unreadable": len(reasons)}
    detector.save(options.target, about=about | {"backend": features.backend})
    _limit(detector.n_calibration_, (), None, detector.flag_rate)
    print(f"Fitted on {len(z0)} images, of which {detector.n_calibration_} calibrate.")


def _score(options: argparse.Namespace) -> None:
    import numpy as np

    from dlsr.conformal import checked_rate

    for rate in {options.flag_rate, options.fdr} - {None}:
        checked_rate(rate, "--flag-rate or --fdr")
    if options.engine == "ray":
        return _score_by_ray(options)
    detector = dlsr.DLSRDetector.load(options.detector)
    layers = detector.about_.get("layers")  # of a detector that was saved from Python
    encoder = dlsr.create_encoder(detector.encoder_name(), layers=layers)
    detector.encoder_name(encoder.weights_sha256)
    images, features, reasons = _features(options, encoder)
    p, scores, rows = np.empty(0), np.empty(0), []
    if features is not None:
        z0, rows = features.z0(), features.rows
        p, scores = detector.p_values(z0), detector.ood_score(z0)
    rate = detector.settings_["flag_rate"] if options.flag_rate is None else options.flag_rate
    limit, rule = _limit(detector.n_calibration_, p, options.fdr, rate)
    table = _table(images, reasons, rows, scores, p, limit)
    if options.html:
        _write_report(options, detector, encoder, images, features, table, limit, rule)
    _print_or_write(table, options)
    counts, names = table["verdict"].value_counts(), ("OOD", "ID", "unreadable")
    parts = ", ".join(f"{counts.get(name, 0)} {name}" for name in names)
    _notice(f"{len(images)} images: {parts}; OOD means {rule}.")
    if features is None:
        raise UserError(f"no image of {images.name} can be read; {images.ids[0]}: {reasons[0]}")


def _table(images, reasons: dict[int, str], rows, scores, p, limit: float):
    """Return a row for each image: image, ood_score, p_value, verdict, reason; OOD comes first."""
    import pandas as pd

    from dlsr.report import in_order

    # A file's name need not be UTF-8; bytes that are not are written as \udc..
    names = [name.encode("utf-8", "backslashreplace").decode() for name in images.ids]
    table = pd.DataFrame({"image": names, "ood_score": float("nan"), "p_value": float("nan")})
    table["verdict"], table["reason"] = "unreadable", pd.Series(reasons, dtype=object)
    table.loc[rows, "ood_score"], table.loc[rows, "p_value"] = scores, p
    table.loc[rows, "verdict"] = ["OOD" if one <= limit else "ID" for one in p]
    return in_order(table)


def _print_or_write(table, options: argparse.Namespace) -> None:
    """Write the table where it was asked for, as CSV, as JSON, or in columns."""
    if options.json:
        print(table.to_json(orient="records", indent=1, double_precision=15))
    if not options.target:
        return None if options.json else print(table.to_string(index=False, na_rep=""))
    table["image"] = _defused(table["image"])
    if str(options.target) == "-":
        return table.to_csv(sys.stdout, index=False)
    replace_file(options.target, lambda path: table.to_csv(path, index=False))


def _defused(names):
    """Return a column's names as a list, in which a spreadsheet takes none for a formula."""
    return [f"'{name}" if name.startswith(tuple("=+-@\t\r")) else name for name in names]


def _write_report(options, detector, encoder, images, features, table, limit, rule) -> None:
    """Write the report; with the familiar images it has heat maps, neighbours and layers."""
    import numpy as np

    from dlsr import explain, report

    extra = {}
    if options.familiar and features is not None:
        familiar = dlsr.extract(options.familiar, encoder, on_error="skip")  # cached at the fit
        at = np.searchsorted(features.rows, report.strangest(table))
        usual = np.searchsorted(features.rows, table.index[table["verdict"] == "ID"])
        extra = explain.explained(detector, encoder, features, familiar, at, usual)
    about = {"method": detector.settings_["method"]} | detector.about_ | detector.versions_
    report.write_report(
        options.html, table, images.image, rule=rule, limit=limit, settings=about,
        familiar_scores=detector.arrays_["calibration"], title=f"Images of {images.name}", **extra,
    )  # fmt: skip


def _limit(n: int, p, fdr: float | None, rate: float) -> tuple[float, str]:
    """Return the largest p-value that is called OOD, or 0, by n familiar images, and the rule.

    Where these are too few for any, a line says so.
    """
    from dlsr.conformal import benjamini_hochberg, fewest_discoveries, flag_limit

    if fdr is not None:
        least = fewest_discoveries(n, len(p), fdr)
        if least > 1:
            _notice(
                f"With {n} familiar images, {least} of {len(p)} must have the smallest p-value "
                f"before any is called OOD at a false discovery rate of {100 * fdr:.3g} %."
            )
        found = p[benjamini_hochberg(p, fdr)]
        return found.max(initial=0.0), f"a false discovery rate of {100 * fdr:.3g} %"
    limit = flag_limit(n, rate)
    if not limit:
        _notice(
            f"{n} familiar images cannot support {100 * rate:.3g} %; the finest is "
            f"{100 / (n + 1):.2g} %: no image is called OOD."
        )
    return limit, f"p <= {limit:.4g}"


def _score_by_ray(options: argparse.Namespace) -> None:
    """Write the scores block by block, as they come, in any order."""
    if str(options.target) in ("None", "-") or options.json or options.fdr or options.html:
        told = "--engine ray was given without --csv FILE, or with --json, --fdr or --html"
        raise UserError(f"{told}; name a file, and leave those out.")
    from dlsr.cluster import score_images, start_ray
    from dlsr.data import data_folder

    ray, counts = start_ray(), Counter()
    ray.data.DataContext.get_current().enable_progress_bars = False
    pack = data_folder() / f"{options.images}.parquet"
    source = pack if pack.is_file() else options.images
    how = {"workers": options.workers, "max_pixels": options.max_pixels}
    scores = score_images(source, options.detector, flag_rate=options.flag_rate, **how)

    def write(file: Path) -> None:
        for block in scores.iter_batches(batch_size=None, batch_format="pandas"):
            block["path"] = _defused(block["path"])
            block.to_csv(file, mode="a", header=not counts, index=False)
            counts.update(block["verdict"])

    try:
        replace_file(options.target, write)
    except ray.exceptions.RayError as error:  # its last line is what the worker said
        raise UserError(str(error).strip().splitlines()[-1]) from error
    _notice(", ".join(f"{count} images are {verdict}" for verdict, count in counts.items()))


def _info(options: argparse.Namespace) -> None:
    from dlsr.detector import FORMAT

    detector = dlsr.DLSRDetector.load(options.detector, device="cpu")
    n = detector.n_calibration_
    known = {"file": options.detector, "format": FORMAT} | detector.settings_ | detector.about_
    known |= {"calibrated on": n, "finest rate": f"{1 / (n + 1):.4g}"}
    for name, value in (known | detector.versions_).items():
        print(f"{name:20} {value}".encode("utf-8", "backslashreplace").decode())


def _features(options: argparse.Namespace, encoder):
    """Return the images, their features, or None if none is readable, and why others are not."""
    images = dlsr.load_images(options.images)
    if images.left_out:
        _notice(f"{images.left_out} of {options.images} are left out.")
    features, lost = None, range(len(images))
    if any(images.attempt(i)[0] for i in lost):  # most often the first
        features = dlsr.extract(images, encoder, on_error="skip")
        lost = sorted(set(lost) - set(features.rows.tolist()))
    return images, features, {i: images.attempt(i)[1] for i in lost}


def _notice(text: object) -> None:
    print(f"dlsr: {text}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dlsr", description=__doc__)
    parser.add_argument("--version", action="version", version=dlsr.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    images, saved = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    images.add_argument("images", help="a folder of images, or a set's name")
    images.add_argument("--max-pixels", type=int, default=0, help="of an image; 178,956,970")
    images.add_argument("--overwrite", action="store_true", help="replace the file to write")
    saved.add_argument("detector", type=Path, help="the file that fit wrote")
    out = {"dest": "target", "type": Path, "metavar": "FILE"}

    fit = commands.add_parser("fit", parents=[images], help=f"fit a detector; --method is {METHOD}")
    fit.add_argument("--out", **out, required=True, help="where to save it")
    fit.add_argument("--force", action="store_true", help=f"fit to fewer than {FEWEST} images")
    methods = ("gaussian", "knn", "mse", "mfsim")
    fit.add_argument("--method", default="gaussian", choices=methods, help=METHOD)
    fit.add_argument("--encoder", default="efficientnet_lite0", help="%(default)s or a timm model")
    fit.add_argument("--k", type=int, default=2, help="for knn, the neighbour; %(default)s")
    for name, size in (("width", 720), ("blocks", 8), ("epochs", 30)):
        fit.add_argument(f"--{name}", type=int, default=size, help="for mse, mfsim; %(default)s")
    score = commands.add_parser("score", parents=[saved, images], help="score images by it")
    score.add_argument("--csv", **out, help="write the table there, - is stdout; else print it")
    score.add_argument("--html", type=Path, metavar="FILE", help="write a report with pictures")
    score.add_argument("--familiar", metavar="IMAGES", help="those that were fitted on: with them "
                       "the report has heat maps, layers and nearest images")  # fmt: skip
    score.add_argument("--json", action="store_true", help="print the rows as JSON")
    rates = score.add_mutually_exclusive_group()
    rates.add_argument("--flag-rate", type=float, help="call images OOD with p up to it; 0.05")
    rates.add_argument("--fdr", type=float, metavar="Q", help="call images OOD of which at most a "
                       "share Q is familiar, on average (Benjamini and Hochberg)")  # fmt: skip
    score.add_argument("--engine", choices=["ray"], help="on a Ray cluster, by dlsr[ray]")
    score.add_argument("--workers", type=int, default=1, help="of the engine; %(default)s")
    info = commands.add_parser("info", parents=[saved], help="what is known of a detector")
    parser.set_defaults(target=None, html=None, overwrite=False, max_pixels=0)
    for command, run in ((fit, _fit), (score, _score), (info, _info)):
        command.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
