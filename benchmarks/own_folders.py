"""How well small folders of familiar images work; writes ``own_folders.csv``.

    python benchmarks/own_folders.py [--seeds 5] [--ideas | --networks]

Each of 18 tasks takes one class of a set as familiar and the set's other classes as OOD: horses of
CIFAR-10, the digit 3 of MNIST, ten textures, six kinds of scene. A detector is fitted on a few
images that a seed draws, and tested on other images of that class and of the others. Every image
goes through EfficientNet-Lite0 once. ``--ideas`` also tries mirrored images and sums of two scores,
which are to be chosen by every second task (``half`` is ``choose``) and read on the others.
``--networks`` measures only the methods that train a network, on 50 images. Rows that are measured
again replace those of the same task, size, method and seed; the others stay.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import ImageOps

import dlsr
from dlsr.data import ImageSet

SETS = {  # familiar classes (none: each in turn), and images of each familiar and other class
    "textures/test": ([], 80, 80),
    "scenes/test": ([], 143, 143),
    "mnist/test": (["3"], 1010, 34),
    "cifar10/train": (["horse"], 2300, 34),
}
SIZES = {"cifar10/train": (30, 50, 100, 200, 500, 2000), "mnist/test": (30, 50, 100, 200, 500)}
TEST = 300  # images of the class, and of the others, at most


class Mirrored:
    """The pixels of an image set, each image flipped from left to right."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __getitem__(self, row: int) -> np.ndarray:
        return np.asarray(ImageOps.mirror(self.images.image(row)))


def features(key: str, encoder, *, ideas: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return z0 of a set's pool, plain and averaged with the mirrored image's, and its labels."""
    familiar, many, few = SETS[key]
    images = dlsr.load_images(key)
    labels, rows = np.array(images.labels), []
    for label in np.unique(labels):
        n = many if label in familiar or not familiar else few
        rows += np.random.RandomState(0).permutation(np.flatnonzero(labels == label))[:n].tolist()
    pool = images.take(sorted(rows))
    raw = {"": dlsr.extract(pool, encoder).raw()}
    if ideas:
        mirrored = ImageSet(f"{key}, mirrored", pool.ids, pool.labels, Mirrored(pool))
        raw["flip"] = (raw[""] + dlsr.extract(mirrored, encoder).raw()) / 2
    channels = encoder.channels
    return {kind: dlsr.layer_zscore(x, channels) for kind, x in raw.items()}, np.array(pool.labels)


def standardised(detector: dlsr.DLSRDetector, z: np.ndarray) -> np.ndarray:
    """Return log scores in standard deviations of the held-out familiar images' log scores."""
    familiar = np.log(detector.arrays_["calibration"])
    own = np.log(np.mean([score(z) for score in detector.fold_scores_], axis=0))
    return (own - familiar.mean()) / familiar.std()


def methods(channels: tuple[int, ...], kinds: list[str], networks: bool) -> dict[str, Callable]:
    """Return functions of z0 by kind to fit on, which return a function to scores and flags."""

    def one(method: str, kind: str = "", **options) -> Callable:
        def fit(z: dict[str, np.ndarray]) -> Callable:
            detector = dlsr.DLSRDetector(channels, method=method, **options).fit(z[kind])
            return lambda z: (detector.ood_score(z[kind]), detector.predict(z[kind]) == -1)

        return fit

    def both(z: dict[str, np.ndarray]) -> Callable:
        pair = [dlsr.DLSRDetector(channels, method="gaussian").fit(z[""])]
        pair += [dlsr.DLSRDetector(channels, method="knn", k=2).fit(z[""])]
        return lambda z: (sum(standardised(one, z[""]) for one in pair), None)

    if networks:  # 45 images are one batch, so that an epoch is one of the 500 updates of `fit`
        return {method: one(method, epochs=500) for method in ("mse", "mfsim")}
    found = {"gaussian": one("gaussian"), "knn": one("knn"), "knn k=2": one("knn", k=2)}
    if "flip" in kinds:
        found["gaussian + knn"] = both
        found["gaussian + flip"] = one("gaussian", "flip")
    return found


def run_task(z, familiar, sizes, seed, channels, networks):
    """Yield the numbers of each size and method of one task, as dictionaries."""
    picks = np.random.RandomState(seed)
    inside, outside = (picks.permutation(np.flatnonzero(mask)) for mask in (familiar, ~familiar))
    for size in sizes:
        parts = (inside[:size], inside[max(sizes) :][:TEST], outside[:TEST])
        if networks and size != 50:
            continue
        fit, on_id, on_ood = ({kind: x[rows] for kind, x in z.items()} for rows in parts)
        for name, method in methods(channels, list(z), networks).items():
            began = time.perf_counter()
            score = method(fit)
            seconds = time.perf_counter() - began
            (a, flagged), (b, found) = score(on_id), score(on_ood)
            row = {"size": size, "method": name, "seed": seed, "auroc": 100 * dlsr.auroc(a, b)}
            if flagged is not None:
                row |= {"familiar_flagged": 100 * flagged.mean(), "ood_flagged": 100 * found.mean()}
            yield row | {"test_id": len(a), "test_ood": len(b), "fit_seconds": seconds}


def main() -> None:
    """Measure, print the means and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ideas", action="store_true", help="also try what could be better")
    parser.add_argument("--networks", action="store_true", help="only those, on 50 images")
    options, file = parser.parse_args(), Path(__file__).with_suffix(".csv")
    known = [pd.read_csv(file)] if file.is_file() else []
    encoder, rows, tasks = dlsr.create_encoder("efficientnet_lite0"), [], 0
    for key, (chosen, *_) in SETS.items():
        z, labels = features(key, encoder, ideas=options.ideas)
        for label in chosen or np.unique(labels):
            half, tasks = ("choose", "report")[tasks % 2], tasks + 1
            about = {"task": f"{key.split('/')[0]}: {label}", "half": half}
            for seed in range(options.seeds):
                sizes = SIZES.get(key, (30, 50))
                how = (seed, encoder.channels, options.networks)
                found = run_task(z, labels == label, sizes, *how)
                rows += [about | row for row in found]
            table = pd.concat([*known, pd.DataFrame(rows)])
            table = table.drop_duplicates(["task", "size", "method", "seed"], keep="last")
            table.to_csv(file, index=False, float_format="%.4g")
    means = table.groupby(["half", "size", "method"])[["auroc", "familiar_flagged", "ood_flagged"]]
    print(means.mean().round(2).to_string())


if __name__ == "__main__":
    main()
