"""Tables and the figures that several pages share, in one style; a page draws its own others."""

import html
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.scale import FuncScale

from dlsr.data import set_title
from dlsr.evaluation import AVERAGE

WIDTH = 5.0  # inches; text of 8 points is then readable on a phone
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
    text = table.rename_axis(columns=[None] * table.columns.nlevels).to_html(**options)
    above = f"<p class='caption'>{html.escape(caption)}</p>" if caption else ""
    return HTML(f"<div class='table-box'>{above}{text}</div>")


def comparison_table(both: pd.DataFrame, metric: str = "auroc", *, caption: str = "") -> HTML:
    """Return methods and OOD sets: the measured value over its interval, beside it the paper's.

    ``both`` is what `evaluation.beside_paper` returns; the best of each set is bold. The fewer of
    methods and sets are the columns. Notes below say which sets are not whole.
    """
    rows = both[(both["metric"] == metric) & (both["versus"] == "")].round(1)
    best = rows.groupby("ood")["value"].transform("max" if metric == "auroc" else "min")
    rows = rows.assign(best=rows["value"] == best, paper=rows.get("paper"))
    rows["here"] = rows.apply(_cell, axis=1)
    rows["ood"] = pd.Categorical(rows["ood"], sorted(rows["ood"].unique(), key=AVERAGE.__eq__))
    rows = rows.sort_values("ood", kind="stable")
    names = {"method": html.escape, "ood": lambda name: html.escape(set_title(name))}
    for column, shown in names.items():
        rows[column] = rows[column].astype(str).map(shown)
    down, across = sorted(names, key=lambda column: -rows[column].nunique())
    table = rows.pivot(index=down, columns=across, values=["here", "paper"]).swaplevel(axis=1)
    table = table[list(product(rows[across].unique(), ["here", "paper"]))].dropna(axis=1, how="all")
    table = table.loc[rows[down].unique()].reset_index()
    caption = caption or f"ID: {set_title(rows['id'].iloc[0])}. {NAMES[metric]}."
    shown = show_table(table.rename(columns={down: ""}), caption, escape=False)
    notes = {f"{set_title(k)}: {v}." for k, v in both.attrs.get("partial", {}).items() if v}
    below = f"Not the whole sets: {html.escape(' '.join(sorted(notes)))}"
    return HTML(shown.data + f"<p class='notes'>{below}</p>") if notes else shown


def _cell(row: pd.Series) -> str:
    value = f"<b>{row['value']:.1f}</b>" if row["best"] else f"{row['value']:.1f}"
    return f"{value} <span class='interval'>{row['ci_low']:.1f} to {row['ci_high']:.1f}</span>"


def auroc_scale(axis: Axes, *, low: float = 50.0, which: str = "x") -> None:
    """Make an axis of AUROCs in percent logarithmic in 100 - AUROC, from ``low`` to 99.95."""
    near_100 = (lambda v: -np.log10(np.maximum(100.05 - v, 1e-9)), lambda u: 100.05 - 10.0**-u)
    ticks = [tick for tick in (0, 50, 70, 80, 90, 95, 98, 99, 99.5, 99.9) if tick >= low]
    axis.set(**{f"{which}scale": FuncScale(axis, near_100), f"{which}lim": (low, 100)})
    axis.set(**{f"{which}ticks": ticks, f"{which}ticklabels": [f"{tick:g}" for tick in ticks]})
    axis.set(**{f"{which}label": "AUROC, %"})
