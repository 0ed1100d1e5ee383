"""Tables and the figures that several pages share, in one style; a page draws its own others."""

import html
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML, display
from matplotlib.figure import Figure

from dlsr.data import set_title
from dlsr.evaluation import AVERAGE

WIDTH = 6.4  # inches; text of 9 points is then readable on a phone
NAMES = {"auroc": "AUROC, %, higher is better", "fpr95": "FPR95, %, lower is better"}
_P = sns.color_palette("colorblind")
COLOURS = {  # one colour a method, through the whole book
    "MSE": _P[3], "LR": _P[4], "MFsim": _P[0], "AE, MFsim": _P[1], "VAE, MFsim": _P[5],
    "kNN": _P[2], "Mahalanobis": "0.15", "MSP": _P[7], "Energy": _P[7], "DICE": _P[7],
    "ASH-S": _P[7],
}  # fmt: skip
ROLES = {"id": _P[0], "near": _P[1], "far": _P[2]}


def figure(height: float, *, rows: int = 1, columns: int = 1, **options):
    """Return a figure in the book's style and its axes, (rows, columns)."""
    sns.set_theme(style="whitegrid", palette="colorblind", font_scale=0.85)
    plt.rcParams |= {"figure.dpi": 120, "axes.titlesize": "medium", "figure.titleweight": "bold"}
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
    options = {"squeeze": False, "layout": "constrained"} | options
    return plt.subplots(rows, columns, figsize=(WIDTH, height), **options)


def finish(drawn: Figure, title: str) -> Figure:
    """Give a figure its title and return it, to be shown once as a cell's last expression."""
    drawn.suptitle(title, wrap=True, fontsize="medium")
    plt.close(drawn)
    return drawn


def colour(method: str):
    """Return a method's colour; one that is not in the list is grey."""
    return COLOURS.get(method, COLOURS.get(method.split(",")[0], "0.45"))


def show_table(table: pd.DataFrame, caption: str = "") -> HTML:
    """Return a table as HTML without its index, numbers with one decimal."""
    options = {"index": False, "border": 0, "classes": "table", "na_rep": "–", "justify": "left"}
    text = table.rename_axis(columns=None).to_html(float_format="{:.1f}".format, **options)
    return HTML(_captioned(text, caption))


def comparison_table(both: pd.DataFrame, metric: str = "auroc", *, caption: str = "") -> HTML:
    """Return methods by OOD sets: the measured value and its interval, the paper's, the difference.

    ``both`` is what `evaluation.beside_paper` returns. Notes below say which sets are not whole.
    """
    rows = both[(both["metric"] == metric) & (both["versus"] == "")]
    sets = sorted(dict.fromkeys(rows["ood"]), key=lambda name: name == AVERAGE)
    notes = {f"{set_title(k)}: {v}." for k, v in both.attrs.get("partial", {}).items() if v}
    cells = rows.assign(cell=rows.apply(_cell, axis=1)).pivot(
        index="method", columns="ood", values="cell"
    )
    table = cells.loc[rows["method"].unique(), sets].fillna("–").reset_index()
    table.columns = ["", *("mean" if name == AVERAGE else set_title(name) for name in sets)]
    options = {"index": False, "border": 0, "classes": "table comparison", "escape": False}
    caption = caption or f"ID: {set_title(rows['id'].iloc[0])}. {NAMES[metric]}."
    below = " ".join(html.escape(note) for note in sorted(notes))
    below = f"<p class='notes'>Not the whole sets: {below}</p>" if below else ""
    return HTML(_captioned(table.to_html(justify="left", **options), caption) + below)


def _cell(row: pd.Series) -> str:
    text = "<b>{value:.1f}</b> <span class='beside'>[{ci_low:.1f}, {ci_high:.1f}]"
    text += "<br>paper {paper:.1f}" if pd.notna(row.get("paper")) else ""
    text += ", {difference:+.1f}" if pd.notna(row.get("difference")) else ""
    tenths = {k: round(v, 1) + 0.0 for k, v in row.items() if isinstance(v, float)}  # no -0.0
    return text.format(**tenths) + "</span>"


def _captioned(table: str, caption: str) -> str:
    below = f"<p class='caption'>{html.escape(caption)}</p>" if caption else ""
    return f"<div class='table-box'>{below}{table}</div>"


def comparison_figure(both: pd.DataFrame, *, title: str, methods: Sequence[str] = ()) -> Figure:
    """Draw how far each AUROC is from 100 %: dots measured, with intervals, diamonds the paper's.

    The axis is logarithmic, so that values near 100 % can be told apart; 0.01 and less is drawn at
    0.01.
    """
    rows = both[(both["metric"] == "auroc") & (both["versus"] == "")]
    chosen = list(methods or rows["method"].unique())
    rows = pd.concat([rows[rows["method"] == method] for method in chosen], ignore_index=True)
    drawn, axes = figure(0.9 + 0.2 * len(rows))
    axis, y = axes[0][0], -np.arange(len(rows))
    shade = [colour(method) for method in rows["method"]]
    error = {name: np.maximum(100 - rows[name], 0.01) for name in ("value", "ci_low", "ci_high")}
    axis.hlines(y, error["ci_high"], error["ci_low"], colors=shade, lw=2)
    axis.scatter(error["value"], y, color=shade, s=26, zorder=3)
    if "paper" in rows:
        paper = np.maximum(100 - rows["paper"], 0.01)
        axis.scatter(paper, y, marker="D", facecolors="white", edgecolors=shade, s=26, zorder=2)
    names = rows["ood"].map(lambda name: "mean" if name == AVERAGE else set_title(name))
    axis.set(xscale="log", yticks=y, yticklabels=rows["method"] + ": " + names)
    axis.set_xlabel("100 % − AUROC (log scale; left is better)")
    axis.xaxis.set_major_formatter("{x:g}")
    return finish(drawn, title)


def glue(name: str, value: float | str) -> None:
    """Keep a value in the notebook's output, invisibly, for other pages of the book.

    This writes what ``myst_nb.glue`` writes, so that a kernel, of Colab, say, needs no myst_nb.
    """
    prefix = "application/papermill.record/"
    about = {"scrapbook": {"name": name, "mime_prefix": prefix}}
    display({f"{prefix}text/plain": repr(value)}, raw=True, metadata=about)
