"""What decoding a JPEG at reduced size saves, and how far it moves features: ``reduced.csv``.

    python benchmarks/reduced.py

libjpeg can decode an image at a half, a quarter or an eighth of its size. Eight photographs of
4000x3000 pixels, enlarged from smaller ones, with noise, are decoded at the smallest of these sizes
that is at least 1, 2 or 4 times the encoder's, and compared with those decoded whole.
"""

import io
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import dlsr  # first: it sets how threads wait before PyTorch is loaded
from dlsr.data import INPUT_SIZE, resize


def photographs() -> list[bytes]:
    """Return eight JPEGs of 4000x3000 pixels."""
    found = []
    for i in range(8):
        whole = Image.fromarray(load_sample_images().images[i % 2])
        part = whole.crop((40 * i, 20 * i, 40 * i + 320, 20 * i + 240)).resize((4000, 3000))
        noise = np.random.default_rng(i).integers(-16, 17, (3000, 4000, 3))
        pixels = (np.asarray(part) + noise).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def decoded(content: bytes, times: int) -> np.ndarray:
    """Return an image as the encoder gets it, decoded at ``times`` its size or more; 0: whole."""
    image = Image.open(io.BytesIO(content))
    if times:
        image.draft("RGB", (times * INPUT_SIZE[1], times * INPUT_SIZE[0]))
    return np.asarray(resize(image.convert("RGB"), [INPUT_SIZE]))


def main() -> None:
    """Measure, print and write the table."""
    encoder, contents, rows = dlsr.create_encoder("efficientnet_lite0"), photographs(), []
    whole = None
    for times in (0, 4, 2, 1):
        began = time.perf_counter()
        pixels = np.stack([decoded(content, times) for content in contents])
        milliseconds = 1000 * (time.perf_counter() - began) / len(contents)
        features = encoder(torch.from_numpy(pixels)).flatten(1)
        whole = features if whole is None else whole
        apart = (features - whole).norm(dim=1) / whole.norm(dim=1)
        rows.append((times or "whole", milliseconds, float(apart.max())))
    table = pd.DataFrame(rows, columns=["times", "milliseconds", "difference"])
    print(table.to_string(index=False))
    file = Path(__file__).with_suffix(".csv")
    table.to_csv(file, index=False, float_format="%.4g", lineterminator="\n")


if __name__ == "__main__":
    main()
