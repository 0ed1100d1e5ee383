"""Tables and the figures that several pages share, in one style; a page draws its own others."""

import html
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib.figure import Figure

from dlsr.data import set_title
from dlsr.evaluation import AVERAGE

WIDTH = 6.4  # inches; text of 9 points is then readable on a phone
NAMES = {"auroc": "AUROC, %, higher is better", "fpr95": "FPR95, %, lower is better"}
_P = sns.color_palette("colorblind")
COLOURS = {  # one colour a method, through the whole book
    "MSE": _P[3], "LR": _P[4], "MFsim": _P[0], "AE, MFsim": _P[1], "VAE, MFsim": _P[5],
    "kNN": _P[2], "Mahalanobis": "0.15",
} | dict.fromkeys(["MSP", "Energy", "DICE", "ASH-S"], _P[7])  # fmt: skip


def figure(height: float, *, rows: int = 1, columns: int = 1, **options):
    """Return a figure in the book's style and its axes, (rows, columns)."""
    style = {"figure.dpi": 120, "axes.titlesize": "medium", "figure.titleweight": "bold"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    sns.set_theme(style="whitegrid", palette="colorblind", font_scale=0.85, rc=style)
    options = {"figsize": (WIDTH, height), "squeeze": False, "layout": "constrained"} | options
    return plt.subplots(rows, columns, **options)


def finish(drawn: Figure, title: str) -> Figure:
    """Give a figure its title and return it, to be shown once as a cell's last expression."""
    drawn.suptitle(title, wrap=True, fontsize="medium")
    plt.close(drawn)
    return drawn


def colour(method: str):
    """Return a method's colour; one that is not in the list is grey."""
    return COLOURS.get(method, COLOURS.get(method.split(",")[0], "0.45"))


def show_table(table: pd.DataFrame, caption: str = "", **options) -> HTML:
    """Return a table as HTML without its index, numbers with one decimal, with pandas' options."""
    options = {"classes": "table", "float_format": "{:.1f}".format} | options
    options |= {"index": False, "border": 0, "na_rep": "–", "justify": "left"}
    text = table.rename_axis(columns=None).to_html(**options)
    above = f"<p class='caption'>{html.escape(caption)}</p>" if caption else ""
    return HTML(f"<div class='table-box'>{above}{text}</div>")


def comparison_table(both: pd.DataFrame, metric: str = "auroc", *, caption: str = "") -> HTML:
    """Return methods by OOD sets: the measured value and its interval, the paper's, the difference.

    ``both`` is what `evaluation.beside_paper` returns. Notes below say which sets are not whole.
    """
    rows = both[(both["metric"] == metric) & (both["versus"] == "")]
    rows = rows.assign(cell=rows.apply(_cell, axis=1), method=rows["method"].map(html.escape))
    sets = sorted(rows["ood"].unique(), key=lambda name: name == AVERAGE)
    table = rows.pivot(index="method", columns="ood", values="cell")
    table = table.loc[rows["method"].unique(), sets].reset_index()
    table.columns = ["", *(html.escape(set_title(name)) for name in sets)]
    caption = caption or f"ID: {set_title(rows['id'].iloc[0])}. {NAMES[metric]}."
    shown = show_table(table, caption, classes="table comparison", escape=False)
    notes = {f"{set_title(k)}: {v}." for k, v in both.attrs.get("partial", {}).items() if v}
    below = f"Not the whole sets: {html.escape(' '.join(sorted(notes)))}"
    return HTML(shown.data + f"<p class='notes'>{below}</p>") if notes else shown


def _cell(row: pd.Series) -> str:
    text = "<b>{value:.1f}</b> <span class='beside'>[{ci_low:.1f}, {ci_high:.1f}]"
    text += "<br>paper {paper:.1f}" if pd.notna(row.get("paper")) else ""
    text += ", {difference:+.1f}" if pd.notna(row.get("difference")) else ""
    tenths = {k: round(v, 1) + 0.0 for k, v in row.items() if isinstance(v, float)}  # no -0.0
    return text.format(**tenths) + "</span>"


def comparison_figure(both: pd.DataFrame, *, title: str, methods: Sequence[str] = ()) -> Figure:
    """Draw how far each AUROC is from 100 %: dots measured, with intervals, diamonds the paper's.

    The axis is logarithmic, so that values near 100 % can be told apart; 0.01 and less is drawn at
    0.01.
    """
    rows = both[(both["metric"] == "auroc") & (both["versus"] == "")]
    chosen = list(methods or rows["method"].unique())
    rows = pd.concat([rows[rows["method"] == method] for method in chosen], ignore_index=True)
    drawn, axes = figure(0.9 + 0.2 * len(rows))
    axis, y, shade = axes[0][0], -np.arange(len(rows)), rows["method"].map(colour)
    error = np.maximum(100 - rows.reindex(columns=["value", "ci_low", "ci_high", "paper"]), 0.01)
    axis.hlines(y, error["ci_high"], error["ci_low"], colors=shade, lw=2)
    axis.scatter(error["value"], y, color=shade, s=26, zorder=3)
    axis.scatter(error["paper"], y, c="white", edgecolors=shade, marker="D", s=26, zorder=2)
    axis.set(xscale="log", yticks=y, yticklabels=rows["method"] + ": " + rows["ood"].map(set_title))
    axis.set_xlabel("100 % − AUROC (log scale; left is better)")
    axis.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    return finish(drawn, title)
