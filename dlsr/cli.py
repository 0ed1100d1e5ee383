"""Fit an OOD detector on a folder of familiar images, and score other images by it."""

import argparse
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import dlsr
from dlsr.cache import cache_folder, replace_file
from dlsr.errors import UserError

METHOD = (
    "gaussian (the default), knn, mse or mfsim: the Ledoit-Wolf Gaussian on z0 needs no training; "
    "over 18 folders of 50-200 photographs its mean AUROC was 0.948"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 2 after a mistake, which is one sentence."""
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _notice(message)
        try:
            target = getattr(options, "target", None)  # refused if it is a device, link or folder
            if target and (target.is_symlink() or (target.exists() and not target.is_file())):
                raise UserError(f"{target} is there and is no plain file; name a file to write.")
            # What is heavy is imported there, so that Ctrl-C is caught here.
            {"fit": _fit, "score": _score, "info": _info, "sets": _sets}[options.command](options)
            sys.stdout.flush()
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


def _fit(options: argparse.Namespace) -> None:
    features = _features(options, options.encoder)
    sizes = {name: getattr(options, name) for name in ("width", "blocks", "epochs")}
    chosen = {"method": options.method, "progress": True} | sizes
    detector = dlsr.DLSRDetector(features.channels, **chosen).fit(features.z0())
    about = {"encoder": options.encoder, "weights_sha256": features.weights_sha256}
    detector.save(options.target, about=about | {"images": len(features)})
    threshold = f"threshold {detector.threshold_:.6g}"
    print(f"Fitted on {len(features)} images; {threshold}; {options.target}")


def _score(options: argparse.Namespace) -> None:
    if options.engine == "ray":
        return _score_by_ray(options)
    import pandas as pd

    detector = dlsr.DLSRDetector.load(options.detector)
    if not {"encoder", "weights_sha256"} <= set(detector.about_):
        raise UserError(f"{options.detector} does not say its encoder; fit it by `dlsr fit`.")
    features = _features(options, detector.about_["encoder"], detector.about_["weights_sha256"])
    # A file's name need not be UTF-8; bytes that are not are written as \udc..
    names = [name.encode("utf-8", "backslashreplace").decode() for name in features.images.ids]
    table = pd.DataFrame({"image": names, "ood_score": detector.ood_score(features.z0())})
    table["verdict"] = ["OOD" if s > detector.threshold_ else "ID" for s in table["ood_score"]]
    table = table.sort_values("ood_score", ascending=False)
    if options.target:
        replace_file(options.target, lambda path: table.to_csv(path, index=False))
    else:
        print(table.to_string(index=False))
    called = (table["verdict"] == "OOD").sum()
    _notice(f"{called} of {len(table)} images are above {detector.threshold_:.6g}, so OOD.")


def _score_by_ray(options: argparse.Namespace) -> None:
    """Write the scores block by block, as they come, in any order."""
    if not options.target:
        raise UserError("--engine ray was given without --csv FILE; name the file to write.")
    from dlsr.cluster import score_images, start_ray
    from dlsr.data import data_folder

    ray, counts = start_ray(), Counter()
    ray.data.DataContext.get_current().enable_progress_bars = False
    pack = data_folder() / f"{options.images}.parquet"
    source = pack if pack.is_file() else options.images
    scores = score_images(source, options.detector, workers=options.workers)

    def write(file: Path) -> None:
        for block in scores.iter_batches(batch_size=None, batch_format="pandas"):
            block.to_csv(file, mode="a", header=not counts, index=False)
            counts.update(block["verdict"])

    try:
        replace_file(options.target, write)
    except ray.exceptions.RayError as error:  # its last line is what the worker said
        raise UserError(str(error).strip().splitlines()[-1]) from error
    _notice(", ".join(f"{count} images are {verdict}" for verdict, count in counts.items()))


def _info(options: argparse.Namespace) -> None:
    detector = dlsr.DLSRDetector.load(options.detector, device="cpu")
    known = {"method": detector.method, "threshold": detector.threshold_}
    for name, value in (known | detector.about_ | detector.versions_).items():
        print(f"{name:16} {value}")


def _sets(options: argparse.Namespace) -> None:
    from dlsr.data import BUILT_IN, data_folder, load_images, registry

    if options.download:
        load_images(options.download)
    print(f"data folder (DLSR_DATA): {data_folder()}")
    for key, row in registry().items():
        places = [data_folder() / key, data_folder() / f"{key}.parquet"]
        places += [cache_folder() / "data" / row.md5] if row.md5 else []
        places += [cache_folder() / "torchvision" / f"{key}.complete"]
        here = row.source == BUILT_IN or any(place.exists() for place in places)
        print(f"{key:20} {row.images or '':>6} images  {'here' if here else 'not here'}")


def _features(options: argparse.Namespace, name: str, weights_sha256: str = ""):
    """Return the features of the images, unless the encoder has other weights than these."""
    encoder = dlsr.create_encoder(name)
    if weights_sha256 not in ("", encoder.weights_sha256):
        raise UserError(f"{name} has other weights than at the fit; use those, or fit again.")
    on_error = "skip" if options.skip_unreadable else "raise"
    return dlsr.extract(options.images, encoder, on_error=on_error)


def _notice(text: object) -> None:
    print(f"dlsr: {text}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dlsr", description=__doc__)
    parser.add_argument("--version", action="version", version=dlsr.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    images, saved = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    images.add_argument("images", help="a folder of images, or a set's name")
    images.add_argument("--skip-unreadable", action="store_true", help="leave such images out")
    saved.add_argument("detector", type=Path, help="the file that fit wrote")
    out = {"dest": "target", "type": Path, "metavar": "FILE"}

    fit = commands.add_parser("fit", parents=[images], help=f"fit a detector; --method is {METHOD}")
    fit.add_argument("--out", **out, required=True, help="where to save it")
    methods = ("gaussian", "knn", "mse", "mfsim")
    fit.add_argument("--method", default="gaussian", choices=methods, help=METHOD)
    fit.add_argument("--encoder", default="efficientnet_lite0", help="%(default)s or a timm model")
    for name, size in (("width", 720), ("blocks", 8), ("epochs", 30)):
        fit.add_argument(f"--{name}", type=int, default=size, help="for mse, mfsim; %(default)s")
    score = commands.add_parser("score", parents=[saved, images], help="score images by it")
    score.add_argument("--csv", **out, help="write the table there; else it is printed")
    score.add_argument("--engine", choices=["ray"], help="on a Ray cluster, by dlsr[ray]")
    score.add_argument("--workers", type=int, default=1, help="of the engine; %(default)s")
    commands.add_parser("info", parents=[saved], help="what is known of a detector")
    sets = commands.add_parser("sets", help="list the image sets, and which are here")
    sets.add_argument("--download", metavar="NAME", help="get this set first")
    return parser


if __name__ == "__main__":
    sys.exit(main())
