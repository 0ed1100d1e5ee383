"""How fast the steps are on this machine; writes ``benchmarks/speed.csv``.

    python benchmarks/speed.py

``before`` and ``after`` come from one run, so that ``ratio`` depends little on what else the machine
does. An epoch's seconds are scaled up from a shorter one; what it costs to extract features anew in
every epoch, as the released code does, is the extraction's time added.
"""

import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dlsr.datasets import load_images
from dlsr.encoders import get_encoder
from dlsr.features import keep_freed_memory, replace_file
from dlsr.training import TrainingSettings, train

IMAGES = 192
ROUNDS = 3


def encoder_rate(name: str, *, keep: bool) -> float:
    """Images a second of a frozen encoder, in batches of 32."""
    if keep:
        keep_freed_memory()
    model = get_encoder(name).build()
    images = load_images("digits/train")
    pixels = np.stack([np.array(images.image(i).resize((224, 224))) for i in range(32)])
    batch = torch.from_numpy(pixels)
    model(batch)
    began = time.perf_counter()
    for _ in range(IMAGES // 32):
        model(batch)
    return IMAGES / (time.perf_counter() - began)


def in_own_process(name: str, keep: bool) -> float:
    """The allocator's setting cannot be taken back, so each measurement has its own process."""
    command = [sys.executable, __file__, name, str(int(keep))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def epoch_seconds(width: int, blocks: int, *, vectors: int = 2560, features: int = 720) -> float:
    """Seconds that an epoch on 50,000 vectors takes, from a shorter one."""
    z0 = np.random.default_rng(0).standard_normal((vectors, features)).astype(np.float32)
    trained = train(z0, TrainingSettings(width=width, blocks=blocks, epochs=1), progress=False)
    return 50_000 / trained.vectors_per_second


def main() -> None:
    rows = []
    for name in ("efficientnet_lite0",):
        pairs = [(in_own_process(name, False), in_own_process(name, True)) for _ in range(ROUNDS)]
        before, after = np.median(pairs, axis=0)
        rows.append(("encoder, freed memory kept", name, "images/s", before, after, after / before))
        extraction = 50_000 / after
        for width, blocks in ((720, 8), (1440, 16)):
            epoch = epoch_seconds(width, blocks)
            rows.append(
                (
                    "an epoch, features cached instead of extracted anew",
                    f"{blocks}x{width} on {name}, 50,000 images",
                    "s",
                    extraction + epoch,
                    epoch,
                    (extraction + epoch) / epoch,
                )
            )
    table = pd.DataFrame(rows, columns=["what", "where", "unit", "before", "after", "ratio"])
    table["device"] = f"{'cuda' if torch.cuda.is_available() else 'cpu'}, {torch.get_num_threads()} threads"
    table["torch"], table["python"] = torch.__version__, platform.python_version()
    file = Path(__file__).with_name("speed.csv")
    replace_file(file, lambda path: table.to_csv(path, index=False, float_format="%.2f"))
    print(table.to_string(index=False))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(encoder_rate(sys.argv[1], keep=sys.argv[2] == "1"))
    else:
        main()
