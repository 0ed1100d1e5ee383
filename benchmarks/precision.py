"""How far bfloat16 moves the AUROC of a Gaussian; writes ``precision.csv``.

    python benchmarks/precision.py [--images 2000] [--fit 5000]

For each encoder, a Ledoit-Wolf Gaussian is fitted on z0 of CIFAR-10 images in float32 and in
bfloat16, and each scores every set of the data pack in its own precision.
"""

import argparse
from pathlib import Path

import pandas as pd

import dlsr
from dlsr.data import data_folder

ENCODERS = ("efficientnet_lite0", "efficientnet_b4_without_last_block")


def aurocs(name: str, precision: str, *, images: int, fit: int) -> dict[str, float]:
    """Return the AUROC in percent of every OOD set of the pack for CIFAR-10 as ID."""
    encoder = dlsr.create_encoder(name)

    def z0(key: str, n: int):
        return dlsr.extract(dlsr.load_images(key, n=n), encoder, precision=precision).z0()

    score = dlsr.fit_gaussian(z0("cifar10/train", fit))
    on_id, found = score(z0("cifar10/test", images)), {}
    for key in dlsr.registry():
        is_test = not key.startswith("cifar10/") and not key.endswith("/train")
        if is_test and (data_folder() / f"{key}.parquet").is_file():
            found[key] = 100 * dlsr.auroc(on_id, score(z0(key, images)))
    return found


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000, help="of each test set")
    parser.add_argument("--fit", type=int, default=5000, help="of CIFAR-10's training set")
    options = vars(parser.parse_args())
    rows = []
    for name in ENCODERS:
        exact, rough = (aurocs(name, p, **options) for p in ("float32", "bf16"))
        for key, value in exact.items():
            moved = rough[key] - value
            rows.append((name, key, value, rough[key], moved, options["images"], options["fit"]))
        columns = ["encoder", "ood", "float32", "bf16", "moved", "images", "fit"]
        table = pd.DataFrame(rows, columns=columns)
        file = Path(__file__).with_suffix(".csv")  # after each encoder, so that one is kept
        table.to_csv(file, index=False, float_format="%.3f", lineterminator="\n")
    print(table.to_string(index=False, float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
