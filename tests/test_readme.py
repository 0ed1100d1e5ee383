"""The README's table of results is what the committed tables and the paper's values say.

`python tests/test_readme.py` prints the table.
"""

from functools import reduce
from pathlib import Path

import dlsr
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
C10, C100 = "cifar10/test", "cifar100/test"
OURS = {
    "MSE": {"method": "DLSR", "score": "mse", "layers": "all"},
    "LR": {"method": "DLSR", "score": "lr", "layers": "all"},
    "MFsim": {"method": "DLSR", "score": "mfsim", "layers": "2..M"},
}
BASELINES = {
    f"{name}, MFsim": {"method": name.lower(), "score": "mfsim", "layers": "2..M"} for name in ("AE", "VAE")
}
LINES = [  # the paper's table, page, ID set, OOD set, methods
    (8, "08_near_ood", C10, C100, OURS),
    (1, "01_generative", C10, "average", OURS),
    (3, "03_rivals", C10, "average", OURS),
    (3, "03_rivals", C100, "average", OURS),
    (2, "02_celeba", "celeba/test", "textures/test", OURS),
    (10, "10_lmd", C10, "average", OURS),
    (10, "10_lmd", C100, "average", OURS),
    (11, "11_ae_vae", C10, "average", BASELINES),
]


def where(rows, **values):
    return reduce(lambda rows, item: rows[rows[item[0]] == item[1]], values.items(), rows)


def table():
    lines = [
        "| table | ID | OOD | method | paper | measured | 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, page, id_test, ood, methods in LINES:
        rows = pd.read_csv(ROOT / "results" / f"{page}.csv", keep_default_na=False, dtype=str)
        rows = where(rows, id=id_test, metric="auroc", seed="mean", versus="", pooling="gap")
        rows = where(rows, encoder="efficientnet_b4_without_last_block")
        rows = rows[rows["reconstruction"].isin(["", "released"])]
        sets = [name for name in rows["ood"].unique() if name not in ("average", "scenes/test")]
        paper = where(dlsr.paper_values(f"table {number}"), id=id_test, metric="auroc")
        for method, columns in methods.items():
            row = where(rows, ood=ood, **columns).iloc[0]
            value, low, high = (float(row[name]) for name in ("value", "ci_low", "ci_high"))
            printed = where(paper, method=method).set_index("ood").loc[sets, "value"].mean()
            titles = [dlsr.set_title(name) for name in (id_test, *sets)]
            lines.append(
                f"| {number} | {titles[0]} | {', '.join(titles[1:])} | {method} | {printed:.1f} "
                f"| **{value:.1f}** | {low:.1f} to {high:.1f} |"
            )
    return "\n".join(lines)


def test_the_readme_has_this_table():
    assert table() in (ROOT / "README.md").read_text("utf-8")


if __name__ == "__main__":
    print(table())
