"""Every figure of the book, in one style. A function draws one figure and returns it."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from sklearn.decomposition import PCA
from sklearn.metrics import roc_curve

from dlsr.benchmarks import headline
from dlsr.datasets import DATASETS, ImageSet
from dlsr.diffusion import LARGEST_T
from dlsr.experiments import METHOD
from dlsr.features import Features, layer_slices, replace_file
from dlsr.findings import with_interval
from dlsr.reports import overall
from dlsr.results import AVERAGE, SetScores, project_folder
from dlsr.scores import FIRST_EPOCH

PALETTE = sns.color_palette("colorblind")
COLOURS = {"id": PALETTE[0], "near": PALETTE[1], "far": PALETTE[2]}
SCORE_STYLES = {
    "mse": {"color": PALETTE[3], "linestyle": "-"},
    "lr": {"color": PALETTE[4], "linestyle": ":"},
    "mfsim": {"color": PALETTE[9], "linestyle": "--"},
}
SCORE_NAMES = {"mse": "MSE", "lr": "LR", "mfsim": "MFsim"}
METRIC_NAMES = {"auroc": "AUROC, %: higher is better", "fpr95": "FPR95, %: lower is better"}
LINE_COLOURS = [PALETTE[i] for i in (3, 4, 9, 0, 2, 1, 5, 7, 8, 6)]  # the scores' own colours first
WIDTH = 7.2  # inches: the column of the book


def use_style() -> None:
    """The book's look; every function here calls it."""
    sns.set_theme(style="whitegrid", palette="colorblind", font_scale=0.95)
    plt.rcParams |= {
        "figure.dpi": 110,
        "savefig.dpi": 150,
        "axes.titlesize": "medium",
        "figure.titlesize": "medium",
        "figure.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def set_name(key: str) -> str:
    """A set as a reader knows it."""
    return DATASETS[key].title if key in DATASETS else key


def show_table(table: pd.DataFrame) -> HTML:
    """A table without its index, as the book's pages style it; numbers with one decimal."""
    options = {"index": False, "border": 0, "classes": "table", "na_rep": "–", "justify": "left"}
    return HTML(table.to_html(float_format="{:.1f}".format, **options))


def intervals_table(rows: pd.DataFrame) -> pd.DataFrame:
    """AUROC and FPR95 of the headline scores on every OOD set, with intervals."""
    entries = []
    for ood in rows["ood"].unique():
        for score, part in headline(rows, ood=ood).groupby("score", sort=False):
            cells = {
                f"{r.metric.upper()}, %": with_interval(r.value, r.ci_low, r.ci_high)
                for r in part.itertuples()
            }
            entries.append({"OOD": set_name(ood), "score": SCORE_NAMES[score]} | cells)
    return pd.DataFrame(entries)


def comparison_tables(comparison: pd.DataFrame) -> HTML:
    """What `benchmarks.compare` returns, a table for each ID set, metric and choice of OOD sets.

    A cell holds the measured value with its interval, then the paper's, quoted, and the difference,
    in colour where the interval does not hold the paper's value. Letters lead to notes below.
    """
    notes: dict[str, str] = {}
    tables = []
    sets = comparison.groupby(["setting", "id", "metric", "line"])["ood"].transform(" ".join)
    for (id_set, metric, _), group in comparison.groupby(["id", "metric", sets], sort=False):
        settings = group["setting"].unique()
        caption = f"ID: {set_name(id_set)}. {METRIC_NAMES[metric]}."
        if len(settings) == 1 and settings[0]:
            caption += f" {settings[0]}."
        prefix = (group["setting"] + ": ").where((group["setting"] != "") & (len(settings) > 1), "")
        named = prefix + group["line"]
        oods = [ood for ood in group["ood"].unique() if ood != AVERAGE]
        oods += [AVERAGE] if group.loc[group["ood"] == AVERAGE, "measured"].notna().any() else []
        lines = [
            [name, *(_cell(cells, ood, notes) for ood in oods)]
            for name, cells in group.groupby(named, sort=False)
        ]
        table = pd.DataFrame(lines, columns=["", *(_column_title(group, ood, notes) for ood in oods)])
        options = {"index": False, "border": 0, "classes": "table comparison", "escape": False}
        tables.append(f"<p><b>{caption}</b></p>" + table.to_html(justify="left", **options))
    below = "".join(f"<li><sup>{letter}</sup> {html.escape(note)}</li>" for note, letter in notes.items())
    return HTML("".join(tables) + f'<ul class="notes">{below}</ul>')


MEAN_NOTE = (
    "The unweighted mean over the measured sets. The paper's is over the same sets where it prints them, "
    "else over all of its own."
)


def _note(notes: dict[str, str], text: str) -> str:
    letter = notes.setdefault(text, chr(ord("a") + len(notes)) if len(notes) < 26 else str(len(notes)))
    return f"<sup>{letter}</sup>"


def _column_title(group: pd.DataFrame, ood: str, notes: dict[str, str]) -> str:
    """The OOD set's name, with marks for what is partial or missing about it."""
    if ood == AVERAGE:
        return "mean" + _note(notes, MEAN_NOTE)
    cells = group[group["ood"] == ood]
    found = [text for texts in cells["partial"].dropna() for text in texts.split("; ") if text]
    marks = [f"{set_name(key)}: {reason}" for key, reason in (t.split(": ", 1) for t in dict.fromkeys(found))]
    marks += [f"Not measured: {why}." for why in cells["why"].unique() if why]
    return set_name(ood) + " ".join(_note(notes, mark) for mark in marks)


def _cell(cells: pd.DataFrame, ood: str, notes: dict[str, str]) -> str:
    row = cells[cells["ood"] == ood].iloc[0]
    if pd.isna(row["measured"]) and pd.isna(row["paper"]):
        return "–"
    measured = "–"
    if pd.notna(row["measured"]):
        seeds = f"; seeds {row['seed_low']:.1f}–{row['seed_high']:.1f}"
        several = round(row["seed_low"], 1) != round(row["seed_high"], 1)
        interval = f"[{row['ci_low']:.1f}, {row['ci_high']:.1f}]{seeds if several else ''}"
        measured = f"<b>{row['measured']:.1f}</b> <span class='beside'>{interval}</span>"
    if pd.isna(row["paper"]):
        return measured
    paper = f"paper {row['paper']:.1f}"
    if not row["same"]:
        paper += _note(notes, "The paper's value is of other features or another classifier.")
    elif pd.notna(row["difference"]):
        inside = row["ci_low"] <= row["paper"] <= row["ci_high"]
        better = (row["difference"] > 0) == (row["metric"] == "auroc")
        colour = "" if inside else "better" if better else "worse"
        paper += f', <span class="{colour}">{row["difference"]:+.1f}</span>'
    return f"{measured}<br><span class='beside'>{paper}</span>"


def beside(cell: pd.Series) -> str:
    """``98.8 % (paper: 99.3 %)``."""
    paper = f" (paper: {cell['paper']:.1f} %)" if pd.notna(cell["paper"]) else ""
    return f"{cell['measured']:.1f} %{paper}"


def settings_table(rows: pd.DataFrame) -> pd.DataFrame:
    """AUROC of every setting an item was run in, a line for each and a column a score."""
    chosen = rows.query("metric == 'auroc' and seed == 'mean' and versus == '' and layers in ['all', '2..M']")
    chosen = chosen[chosen["score"].isin(SCORE_NAMES) & (chosen["method"] == METHOD)]
    chosen = chosen.assign(
        LFDN=[f"{r.blocks}x{r.width}, {r.epochs} epochs" for r in chosen.itertuples()],
        how=[
            f"{r.reconstruction}, t = {r.t}" + (f", K = {r.noise_draws}" if r.noise_draws > 1 else "")
            for r in chosen.itertuples()
        ],
        column=chosen["score"].map(SCORE_NAMES) + chosen["layers"].map({"all": "", "2..M": " 2..M"}),
        cell=[with_interval(r.value, r.ci_low, r.ci_high) for r in chosen.itertuples()],
    )
    rarely = ["ood", "protocol", "pooling", "n_train", "profile", "weights_sha256"]  # shown if they differ
    settings = [*rarely, "encoder", "LFDN", "how"]
    table = chosen.pivot(index=settings, columns="column", values="cell").reset_index()
    told_apart = table.groupby("encoder")["weights_sha256"].transform("nunique") > 1
    table["weights_sha256"] = table["weights_sha256"].str[:8].where(told_apart, "")
    table = table.drop(columns=[name for name in rarely if table[name].nunique() == 1])
    table = table.rename(columns={"how": "reconstruction", "MFsim": "MFsim, all layers"})
    return table.rename_axis(columns=None)


def coverage_table(coverage: pd.DataFrame) -> pd.DataFrame:
    """What `reports.coverage` returns, as a reader sees it."""
    return pd.DataFrame(
        {
            "item": coverage["item"],
            "what": coverage["title"],
            "measured": [f"{r.measured} of {r.cells}" for r in coverage.itertuples()],
            "when": coverage["date"].replace("", "–"),
            "state": coverage["state"],
        }
    )


def furthest(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells of `reports.all_cells` in a line each."""
    return pd.DataFrame(
        {
            "ID": cells["id"].map(set_name),
            "OOD": cells["ood"].map(set_name),
            "line": cells["line"],
            "metric": cells["metric"].str.upper(),
            "paper (quoted)": cells["paper"],
            "measured": [with_interval(r.measured, r.ci_low, r.ci_high) for r in cells.itertuples()],
            "difference": cells["difference"].map("{:+.1f}".format),
        }
    )


def browsable(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of a results table that a reader wants to see, with intervals."""
    headline = rows["reconstruction"].isin(["", "released"]) & rows["t"].isin([0, 3])
    whole = ~rows["layers"].str.isdigit() & ~rows["score"].isin(FIRST_EPOCH.values())
    chosen = rows[headline & whole & (rows["seed"] == "mean") & (rows["versus"] == "")]
    chosen = chosen[chosen["metric"].isin(METRIC_NAMES)]
    return pd.DataFrame(
        {
            "item": chosen["benchmark"],
            "ID": chosen["id"].map(set_name),
            "OOD": chosen["ood"].map(set_name),
            "method": chosen["method"],
            "score": chosen["score"] + " " + chosen["layers"],
            "encoder": chosen["encoder"].str.removeprefix("efficientnet_"),
            "LFDN": [f"{r.blocks}x{r.width}, {r.epochs}" if r.width else "–" for r in chosen.itertuples()],
            "metric": chosen["metric"].str.upper(),
            "value": [with_interval(r.value, r.ci_low, r.ci_high) for r in chosen.itertuples()],
        }
    )


def save(figure: Figure, name: str) -> Path:
    """Write a figure into ``book/images``, for the pages that are no notebooks."""
    path = project_folder() / "book" / "images" / name
    replace_file(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:]))
    return path


def glue(name: str, value: float | str) -> None:
    """Keep a value in the notebook's output, invisibly, for the book's other pages.

    What ``myst_nb.glue`` writes, so that a kernel (Colab's, say) needs no myst_nb.
    """
    prefix = "application/papermill.record/"
    about = {"scrapbook": {"name": name, "mime_prefix": prefix}}
    display({f"{prefix}text/plain": repr(value)}, raw=True, metadata=about)


def _colour(key: str):
    return COLOURS[DATASETS[key].role] if key in DATASETS else PALETTE[7]


def _figure(columns: int, *, height: float, rows: int = 1, **options) -> tuple[Figure, np.ndarray]:
    use_style()
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained", **options
    )
    return figure, axes


def _errors(rows: pd.DataFrame, value: str) -> np.ndarray:
    """The bars' lengths; a bootstrap interval need not hold its point."""
    below, above = rows[value] - rows["ci_low"], rows["ci_high"] - rows[value]
    return np.maximum(np.stack([below, above]).astype(float), 0)


def _finish(figure: Figure, title: str) -> Figure:
    figure.suptitle(title, wrap=True)
    plt.close(figure)  # shown once, by being a cell's last expression
    return figure


def image_grid(
    sets: Mapping[str, tuple[ImageSet, Sequence[int]]],
    *,
    title: str,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Images of several sets, a row each, under optional labels."""
    columns = max(len(rows) for _, rows in sets.values())
    figure, axes = _figure(columns, rows=len(sets), height=0.4 + len(sets) * (0.85 if labels else 0.62))
    for line, (name, (images, rows)) in zip(axes, sets.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for place, (axis, row) in enumerate(zip(line, rows, strict=False)):
            axis.imshow(images.image(int(row)), interpolation="nearest")
            if labels:
                axis.set_title(labels[name][place], fontsize=8, pad=2)
        line[0].text(-0.25, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    return _finish(figure, title)


def layer_maps(features: Mapping[str, Features], *, pooling: str, title: str) -> Figure:
    """The first two principal components of z0, layer by layer, fitted on the first set."""
    first = next(iter(features.values()))
    figure, axes = _figure(len(first.channels), height=2.1)
    z0 = {name: f.z0(pooling) for name, f in features.items()}
    for number, (axis, layer) in enumerate(zip(axes[0], layer_slices(first.channels), strict=True), start=1):
        pca = PCA(2, random_state=0).fit(z0[next(iter(z0))][:, layer])
        for name, values in z0.items():
            x, y = pca.transform(values[:, layer]).T
            axis.scatter(
                x,
                y,
                s=3,
                alpha=0.5,
                linewidths=0,
                color=_colour(name),
                label=set_name(name),
                rasterized=True,
            )
        axis.set(title=f"layer {number}\n{layer.stop - layer.start} channels", xticks=[], yticks=[])
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), markerscale=4, frameon=False)
    return _finish(figure, title)


def training_curve(losses: Mapping[str, Sequence[float]], *, title: str) -> Figure:
    """Mean training loss by epoch."""
    figure, axes = _figure(1, height=2.6)
    for name, values in losses.items():
        axes[0][0].plot(range(1, len(values) + 1), values, label=name)
    axes[0][0].set(xlabel="epoch", ylabel="loss, mean squared error", yscale="log")
    axes[0][0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0][0].yaxis.set_major_formatter("{x:g}")
    axes[0][0].yaxis.set_minor_formatter(NullFormatter())
    if len(losses) > 1:
        axes[0][0].legend(frameon=False)
    return _finish(figure, title)


def score_histograms(scores: SetScores, columns: Sequence[str], *, title: str) -> Figure:
    """Densities of each score, one colour a set; the dashed line accepts 95 % of ID."""
    figure, axes = _figure(len(columns), height=2.7)
    for axis, column in zip(axes[0], columns, strict=True):
        values = scores.table[column]
        bins = np.linspace(*values.quantile([0.001, 0.999]), 60)
        for name in scores.sets:
            sns.histplot(
                x=scores.of(name, column), bins=bins, stat="density", element="step", alpha=0.3, ax=axis,
                color=_colour(name), label=set_name(name),
            )  # fmt: skip
        axis.axvline(np.quantile(scores.of(scores.sets[0], column), 0.95), color="0.3", ls="--", lw=1)
        axis.set(
            title=SCORE_NAMES[scores.columns[column]["score"]],
            xlabel="score, larger = more OOD",
            ylabel="",
        )
        axis.set_yticks([])
        axis.xaxis.set_major_locator(MaxNLocator(4))
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return _finish(figure, title)


def roc_curves(scores: SetScores, columns: Sequence[str], *, title: str) -> Figure:
    """ID accepted against OOD accepted, a panel for each OOD set; FPR95 lies on the dashed line."""
    id_set, *ood_sets = scores.sets
    figure, axes = _figure(len(ood_sets), height=3.4, sharey=True)
    figure.set_figwidth(min(WIDTH, 4.2 * len(ood_sets)))
    for axis, ood in zip(axes[0], ood_sets, strict=True):
        for column in columns:
            id_scores, ood_scores = scores.of(id_set, column), scores.of(ood, column)
            labels = np.repeat([1, 0], [len(id_scores), len(ood_scores)])
            accepted_ood, accepted_id, _ = roc_curve(labels, -np.concatenate([id_scores, ood_scores]))
            score = scores.columns[column]["score"]
            style = {"label": SCORE_NAMES[score], **SCORE_STYLES[score]}
            axis.plot(100 * accepted_ood, 100 * accepted_id, **style)
        axis.axhline(95, color="0.4", ls="--", lw=1)
        axis.set(title=f"OOD: {set_name(ood)}", xlabel="OOD accepted as ID, %", aspect="equal")
    axes[0][0].set_ylabel("ID accepted, %")
    axes[0][-1].legend(frameon=False, loc="lower right")
    return _finish(figure, title)


def paper_and_measured(comparison: pd.DataFrame, *, title: str) -> Figure:
    """Measured values with their intervals beside the paper's: a row a set, a panel an ID and metric.

    See `benchmarks.compare`; settings and averages stand in the tables only.
    """
    shown = comparison[
        (comparison["ood"] != AVERAGE) & (comparison["setting"] == comparison["setting"].iloc[0])
    ]
    if shown["measured"].notna().any():
        shown = shown[shown.groupby(["id", "ood"])["measured"].transform("count") > 0]
    groups = list(shown.groupby(["id", "metric"], sort=False))
    lines = list(shown["line"].unique())
    colours = dict(zip(lines, LINE_COLOURS, strict=False))
    sets = max(part["ood"].nunique() for _, part in groups)
    down = -(-len(groups) // 2)
    height = 0.6 + down * (0.7 + 0.17 * len(lines) * sets)
    figure, axes = _figure(min(2, len(groups)), rows=down, height=height)
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, ((id_set, metric), part) in zip(axes.flat, groups, strict=False):
        oods = list(part["ood"].unique())
        for place, line in enumerate(lines):
            rows = part[part["line"] == line].set_index("ood").reindex(oods)
            y = -np.arange(len(oods)) - 0.7 * (place - (len(lines) - 1) / 2) / len(lines)
            errors = _errors(rows, "measured")
            style = {"color": colours[line], "fmt": "o", "ms": 4, "capsize": 2, "label": line}
            axis.errorbar(rows["measured"], y, xerr=errors, **style)
            paper = {"facecolors": "none", "edgecolors": [colours[line]], "s": 26, "zorder": 3}
            axis.scatter(rows["paper"].where(rows["same"]), y, marker="D", **paper)
        axis.set(yticks=-np.arange(len(oods)), yticklabels=map(set_name, oods), xlabel=METRIC_NAMES[metric])
        if len({key for (key, _), _ in groups}) > 1:
            axis.set_title(f"ID: {set_name(id_set)}")
        axis.xaxis.set_major_locator(MaxNLocator(5))
    handles, names = axes[0][0].get_legend_handles_labels()
    diamond = axes[0][0].scatter([], [], marker="D", facecolors="none", edgecolors="0.3", s=26)
    figure.legend([*handles, diamond], [*names, "paper (quoted)"], loc="outside lower center",
                  ncols=min(4, len(names) + 1), frameon=False)  # fmt: skip
    return _finish(figure, title)


def coverage_bars(coverage: pd.DataFrame, *, title: str) -> Figure:
    """How many cells of each item are measured."""
    figure, axes = _figure(1, height=0.9 + 0.23 * len(coverage))
    axis, y = axes[0][0], np.arange(len(coverage))[::-1]
    axis.barh(y, coverage["cells"], color="0.88", label="not measured")
    axis.barh(y, coverage["measured"], color=PALETTE[0], label="measured")
    axis.set(yticks=y, yticklabels=coverage["item"], xlabel="cells")
    axis.legend(frameon=False)
    return _finish(figure, title)


def paper_against_measured(cells: pd.DataFrame, *, title: str) -> Figure:
    """Every cell as a point, the paper's value across and the measured one up, a panel a metric."""
    figure, axes = _figure(len(METRIC_NAMES), height=3.7)
    lines = list(cells["line"].unique())
    for axis, (metric, label) in zip(axes[0], METRIC_NAMES.items(), strict=True):
        part = cells[cells["metric"] == metric]
        for line, colour in zip(lines, LINE_COLOURS, strict=False):
            points = part[part["line"] == line]
            errors = _errors(points, "measured")
            axis.errorbar(points["paper"], points["measured"], yerr=errors, fmt="o", ms=4, lw=1,
                          color=colour, label=line)  # fmt: skip
        ends = [min(axis.get_xlim()[0], axis.get_ylim()[0]), max(axis.get_xlim()[1], axis.get_ylim()[1])]
        axis.plot(ends, ends, color="0.5", ls="--", lw=1, zorder=0)
        axis.set(xlabel=f"paper (quoted), {label.split(':')[0]}", aspect="equal", xlim=ends, ylim=ends)
    axes[0][0].set_ylabel("measured here")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return _finish(figure, title)


def near_comparison(comparison: pd.DataFrame, *, title: str) -> Figure:
    """One pair of sets: a row a score, a panel a metric; see `benchmarks.compare`."""
    figure, axes = _figure(len(METRIC_NAMES), height=2.3)
    for axis, (metric, label) in zip(axes[0], METRIC_NAMES.items(), strict=True):
        part = comparison[comparison["metric"] == metric]
        value, y = part["measured"], np.arange(len(part))[::-1]
        errors = _errors(part, "measured")
        axis.errorbar(value, y, xerr=errors, fmt="o", color=PALETTE[0], capsize=3, label="measured here")
        paper = {"facecolors": "none", "edgecolors": "0.2", "label": "paper (quoted)"}
        axis.scatter(part["paper"], y, marker="D", zorder=3, **paper)
        axis.set(yticks=y, yticklabels=part["line"], xlabel=label)
        axis.set_ylim(-0.6, len(part) - 0.4)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    return _finish(figure, title)


def first_and_last_epoch(scores: SetScores, mfsim: str, *, title: str) -> Figure:
    """Densities of the column ``mfsim`` under the first epoch's network (left) and the last one's."""
    columns = {
        f"after epoch {epoch}": mfsim.replace("mfsim", name, 1)
        for epoch, name in (("1", FIRST_EPOCH["mfsim"]), (len(scores.about["losses"]), "mfsim"))
    }
    figure, axes = _figure(len(columns), height=3.2)
    colours = dict(zip(scores.sets, LINE_COLOURS, strict=False))
    for axis, (label, column) in zip(axes[0], columns.items(), strict=True):
        values = scores.table[column]
        for name in scores.sets:
            sns.kdeplot(
                x=scores.of(name, column), ax=axis, color=colours[name], fill=True, alpha=0.25,
                label=set_name(name), common_norm=False, clip=tuple(values.quantile([0, 1])),
            )  # fmt: skip
        axis.set(title=label, xlabel="MFsim, larger = more OOD", ylabel="", yticks=[])
        axis.xaxis.set_major_locator(MaxNLocator(4))
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return _finish(figure, title)


def over_timesteps(rows: pd.DataFrame, *, title: str) -> Figure:
    """AUROC and FPR95 over t, a row a metric and a panel a reconstruction, with intervals."""
    modes = [mode for mode in LARGEST_T if mode in set(rows["reconstruction"])]
    figure, axes = _figure(len(modes), rows=len(METRIC_NAMES), height=4.6, sharex=True, sharey="row")
    for line, metric in zip(axes, METRIC_NAMES, strict=True):
        for axis, mode in zip(line, modes, strict=True):
            for score, name in SCORE_NAMES.items():
                part = rows.query("metric == @metric and reconstruction == @mode and score == @score")
                part = part.sort_values("t")
                style = SCORE_STYLES[score]
                axis.plot(part["t"], part["value"], label=name, marker="o", ms=3, **style)
                axis.fill_between(part["t"], part["ci_low"], part["ci_high"], alpha=0.2, color=style["color"])
            axis.set(xscale="log", title=mode if metric == "auroc" else "", ylabel="")
            ticks = sorted(rows["t"].unique())
            axis.set_xticks(ticks, [str(t) for t in ticks])
            axis.minorticks_off()
        line[0].set_ylabel(f"{metric.upper()}, %")
    axes[-1][len(modes) // 2].set_xlabel("timestep t (of released: its n)")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return _finish(figure, title)


def one_or_all_layers(comparison: pd.DataFrame, *, title: str) -> Figure:
    """Mean AUROC of the last layer alone and of all, a panel an ID set; diamonds are the paper's."""
    shown = overall(comparison)
    ids = list(shown["id"].unique())
    figure, axes = _figure(max(1, len(ids)), height=3.0, sharey=True)
    for axis, id_set in zip(axes[0], ids, strict=False):
        part = shown[shown["id"] == id_set]
        lines = list(part["line"].unique())
        for i, (setting, rows) in enumerate(part.groupby("setting", sort=False)):
            rows = rows.set_index("line").reindex(lines)
            x = np.arange(len(lines)) + 0.3 * (i - 0.5)
            errors = _errors(rows, "measured")
            label = {"single": "last layer alone", "multi": "all layers"}.get(setting, setting)
            axis.errorbar(x, rows["measured"], yerr=errors, fmt="o", capsize=3, color=PALETTE[i], label=label)
            axis.scatter(x, rows["paper"], marker="D", facecolors="none", edgecolors=[PALETTE[i]], zorder=3)
        axis.set_xticks(range(len(lines)), lines)
        axis.set(title=f"ID: {set_name(id_set)}", xlim=(-0.6, len(lines) - 0.4))
    axes[0][0].set_ylabel("AUROC, %")
    handles, names = axes[0][0].get_legend_handles_labels()
    diamond = axes[0][0].scatter([], [], marker="D", facecolors="none", edgecolors="0.3")
    figure.legend([*handles, diamond], [*names, "paper (quoted)"], loc="outside lower center", ncols=3,
                  frameon=False)  # fmt: skip
    return _finish(figure, title)


def lfdn_sizes(sizes: pd.DataFrame, *, title: str) -> Figure:
    """Mean AUROC of the scores for each size of the LFDN (column ``size``); the paper's as diamonds."""
    figure, axes = _figure(1, height=2.9)
    axis = axes[0][0]
    names = list(dict.fromkeys(sizes["size"]))
    for i, (line, part) in enumerate(sizes.groupby("line", sort=False)):
        part = part.set_index("size").reindex(names)
        x = np.arange(len(names)) + 0.16 * (i - 1)
        errors = _errors(part, "measured")
        axis.errorbar(x, part["measured"], yerr=errors, fmt="o", capsize=3, color=LINE_COLOURS[i], label=line)
        axis.scatter(x, part["paper"], marker="D", facecolors="none", edgecolors=[LINE_COLOURS[i]], zorder=3)
    axis.set_xticks(range(len(names)), names)
    axis.set(xlabel="LFDN: blocks x width", ylabel="mean AUROC, %")
    axis.legend(frameon=False)
    return _finish(figure, title)


def layer_shares(shares: pd.DataFrame, *, title: str) -> Figure:
    """What `reports.layer_shares` returns, a panel an ID set."""
    ids = list(shares["ID"].unique())
    figure, axes = _figure(max(1, len(ids)), height=2.9, sharey=True)
    for axis, name in zip(axes[0], ids, strict=False):
        part = shares[shares["ID"] == name]
        axis.plot(part["layer"], part["alone"], "o", color=PALETTE[0], label="this layer alone")
        axis.plot(
            part["layer"], part["left out"], "s", color=PALETTE[1], mfc="none", label="all but this layer"
        )
        axis.axhline(part["all"].iloc[0], color="0.4", ls="--", lw=1)
        axis.set(title=f"ID: {name}", xlabel="layer")
    axes[0][0].set_ylabel("mean AUROC of the MSE, %")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    return _finish(figure, title)


def timesteps_table(means: pd.DataFrame) -> pd.DataFrame:
    """AUROC of `reports.over_timesteps` with intervals: a row a reconstruction and score, t across."""
    auroc = means[means["metric"] == "auroc"]
    auroc = auroc.assign(
        cell=[with_interval(r.value, r.ci_low, r.ci_high) for r in auroc.itertuples()],
        score=auroc["score"].map(SCORE_NAMES),
    )
    table = auroc.pivot(index=["reconstruction", "score"], columns="t", values="cell")
    table.columns = [f"t = {t}" for t in table.columns]
    return table.fillna("not possible").reset_index().rename_axis(columns=None)


def layer_bars(table: pd.DataFrame, *, title: str) -> Figure:
    """AUROC of each layer alone with its interval.

    ``table`` has columns ``layer``, ``score``, ``value``, ``ci_low``, ``ci_high``.
    """
    figure, axes = _figure(1, height=2.8)
    axis = axes[0][0]
    scores = list(table["score"].unique())
    for i, score in enumerate(scores):
        part = table[table["score"] == score]
        x = part["layer"].astype(float) + 0.16 * (i - (len(scores) - 1) / 2)
        errors = _errors(part, "value")
        style = {"color": SCORE_STYLES[score]["color"], "label": SCORE_NAMES[score]}
        axis.errorbar(x, part["value"], yerr=errors, fmt="o", capsize=3, **style)
    axis.axhline(50, color="0.4", ls="--", lw=1)
    axis.set(xlabel="layer of the encoder (1 = nearest the pixels)", ylabel="AUROC, %")
    axis.set_xticks(sorted(table["layer"].astype(int).unique()))
    axis.legend(frameon=False)
    return _finish(figure, title)


# The chapter of comparison; its tables are those of `chapter.measured`

KIND_COLOURS = {
    "rival": PALETTE[0], "paper": PALETTE[3], "recommended": PALETTE[2], "control": PALETTE[7],
}  # fmt: skip
KIND_NAMES = {
    "rival": "baseline, no network that diffuses", "paper": "the paper's scores",
    "recommended": "recommended here", "control": "the recommended score's controls",
}  # fmt: skip
CONTROL_NAMES = {
    "half": "fitted at half the size:\nthe same images, whole",
    "double": "enlarged twofold first:\nnothing is added",
    "jpeg": "saved as JPEG\nof quality 75",
}


def _of_kinds(axes: np.ndarray, figure: Figure, kinds: Sequence[str]) -> None:
    """One legend of the kinds of detectors."""
    handles = [axes.flat[0].scatter([], [], color=KIND_COLOURS[kind]) for kind in kinds]
    names = [KIND_NAMES[kind] for kind in kinds]
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)


def _dots(axis: Axes, rows: pd.DataFrame, y: np.ndarray, value: str) -> None:
    """Values with their intervals, in the colours of the detectors' kinds."""
    for kind, colour in KIND_COLOURS.items():
        chosen = (rows["kind"] == kind).to_numpy()
        options = {"fmt": "o", "ms": 4, "capsize": 2, "color": colour}
        axis.errorbar(rows[value][chosen], y[chosen], xerr=_errors(rows[chosen], value), **options)


def same_features(cells: pd.DataFrame, *, title: str) -> Figure:
    """AUROC with intervals of every detector: a row each, best first, a panel near and far."""
    order = cells[cells["ood"] == "all"].sort_values("value", ascending=False)
    figure, axes = _figure(2, height=1.3 + 0.21 * len(order), sharey=True)
    y = -np.arange(len(order))
    for axis, group in zip(axes[0], ("near", "far"), strict=True):
        part = cells[cells["ood"] == group].set_index(["features", "name"])
        part = part.loc[list(zip(order["features"], order["name"], strict=True))]
        _dots(axis, part, y, "value")
        axis.set(yticks=y, yticklabels=order["title"], xlabel=f"mean AUROC over {group}-OOD, %")
    _of_kinds(axes, figure, [kind for kind in KIND_COLOURS if (order["kind"] == kind).any()])
    return _finish(figure, title)


def native_and_matched(cells: pd.DataFrame, *, title: str) -> Figure:
    """From native (hollow) to matched resolution (filled), a row a detector, a panel near and far."""
    matched = cells[cells["view"] == "matched"]
    order = matched[matched["ood"] == "all"].sort_values("value", ascending=False)
    figure, axes = _figure(2, height=1.3 + 0.21 * len(order), sharey=True)
    y = -np.arange(len(order))
    for axis, group in zip(axes[0], ("near", "far"), strict=True):
        part = cells[cells["ood"] == group].pivot(index="name", columns="view", values="value")
        part = part.loc[order["name"]]
        colours = [KIND_COLOURS[kind] for kind in order["kind"]]
        axis.hlines(y, part["matched"], part["native"], color=colours, lw=1.5)
        axis.scatter(part["matched"], y, color=colours, s=24, zorder=3)
        axis.scatter(part["native"], y, facecolors="white", edgecolors=colours, s=24, zorder=3)
        axis.set(yticks=y, yticklabels=order["title"], xlabel=f"mean AUROC over {group}-OOD, %")
    filled = axes[0][0].scatter([], [], color="0.3")
    hollow = axes[0][0].scatter([], [], facecolors="white", edgecolors="0.3")
    names = ["matched: every set at the ID set's size first", "native: as the paper"]
    figure.legend([filled, hollow], names, loc="outside lower center", ncols=2, frameon=False)
    return _finish(figure, title)


def altered_images(controls: pd.DataFrame, *, title: str) -> Figure:
    """AUROC of ID images against themselves, altered: a row a detector, a panel a control."""
    rows = controls["title"].nunique()
    figure, axes = _figure(len(CONTROL_NAMES), height=1.4 + 0.21 * rows, sharey=True)
    order = controls[controls["control"] == "half"].sort_values("value", ascending=False)["name"].tolist()
    y = -np.arange(len(order))
    for axis, (control, name) in zip(axes[0], CONTROL_NAMES.items(), strict=True):
        part = controls[controls["control"] == control].set_index("name").loc[order]
        _dots(axis, part, y, "value")
        axis.axvline(50, color="0.4", ls="--", lw=1)
        axis.set(yticks=y, yticklabels=part["title"], xlabel="AUROC, %")
        axis.set_title(name, fontsize="small")
    return _finish(figure, title)


def layers_in_views(cells: pd.DataFrame, *, title: str) -> Figure:
    """Mean AUROC of each layer alone: native (dashed) and matched, a panel near and far."""
    figure, axes = _figure(2, height=3.0, sharey=True)
    method = cells["title"].str.rpartition(", layer ")[0]
    layer = cells["title"].str.rpartition(" ")[2].astype(int)
    for axis, group in zip(axes[0], ("near", "far"), strict=True):
        for colour, name in zip((KIND_COLOURS["paper"], KIND_COLOURS["rival"]), method.unique(), strict=True):
            for view, style in (("native", "--"), ("matched", "-")):
                part = cells[(cells["ood"] == group) & (method == name) & (cells["view"] == view)]
                x, errors = layer[part.index], _errors(part, "value")
                options = {"color": colour, "ls": style, "marker": "o", "ms": 4, "capsize": 2}
                axis.errorbar(x, part["value"], yerr=errors, label=f"{name}, {view}", **options)
        axis.axhline(50, color="0.4", ls=":", lw=1)
        axis.set(xlabel="layer of the encoder", xticks=sorted(layer.unique()), title=f"{group}-OOD")
    axes[0][0].set_ylabel("mean AUROC, %")
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    return _finish(figure, title)


def paired_differences(paired: pd.DataFrame, *, title: str) -> Figure:
    """The recommended score less each other detector, with intervals; a panel an encoder."""
    encoders = list(paired["encoder"].unique())
    first = paired[paired["encoder"] == encoders[0]].sort_values("difference")
    keys = list(zip(first["features"], first["name"], strict=True))
    figure, axes = _figure(len(encoders), height=1.3 + 0.2 * len(keys), sharey=True)
    y = -np.arange(len(keys))
    for axis, encoder in zip(axes[0], encoders, strict=True):
        part = paired[paired["encoder"] == encoder].set_index(["features", "name"])
        part = part.reindex(pd.MultiIndex.from_tuples(keys))  # not every encoder has all
        _dots(axis, part, y, "difference")
        axis.axvline(0, color="0.3", lw=1)
        raw = first["features"].map({"raw": " (raw)"}).fillna("")
        axis.set(yticks=y, yticklabels=first["title"] + raw, xlabel="points of mean AUROC")
        axis.set_xscale("symlog", linthresh=2)  # one method far behind must not hide the others
        axis.set_title(encoder, fontsize="small")
    _of_kinds(axes, figure, [kind for kind in KIND_COLOURS if (first["kind"] == kind).any()])
    return _finish(figure, title)


def ranks(cells: pd.DataFrame, *, title: str) -> Figure:
    """Each detector's rank by AUROC on every set (dots) and its mean rank (bar); 1 is best."""
    table = cells.pivot(index="name", columns="ood", values="value").rank(ascending=False)
    mean = table.mean(axis=1).sort_values()
    about = cells.drop_duplicates("name").set_index("name")
    figure, axes = _figure(1, height=0.9 + 0.22 * len(mean))
    axis, y = axes[0][0], -np.arange(len(mean))
    for place, name in zip(y, mean.index, strict=True):
        colour = KIND_COLOURS[about.loc[name, "kind"]]
        axis.scatter(table.loc[name], np.full(table.shape[1], place), color=colour, s=16, alpha=0.6)
        axis.plot([mean[name]] * 2, [place - 0.35, place + 0.35], color=colour, lw=3)
    axis.set(
        yticks=y, yticklabels=about.loc[mean.index, "title"], xlabel="rank by AUROC on a set (1 is best)"
    )
    return _finish(figure, title)


def search_log(ranked: pd.DataFrame, *, budget: float, chosen: str, title: str) -> Figure:
    """Cost against the development objective of every variant; the best baseline is a line."""
    figure, axes = _figure(1, height=3.8)
    axis = axes[0][0]
    variants, rivals = (ranked[ranked["kind"] == kind] for kind in ("variant", "rival"))
    papers = variants["idea"].str.startswith("the paper's")
    for part, kind in ((variants[~papers], "control"), (variants[papers], "paper")):
        axis.scatter(part["multiply_adds"], part["objective"], color=KIND_COLOURS[kind], s=22)
    own = variants[variants["name"] == chosen].iloc[0]
    axis.scatter(own["multiply_adds"], own["objective"], color=KIND_COLOURS["recommended"], s=60, zorder=3)
    axis.annotate(chosen, (own["multiply_adds"], own["objective"]), xytext=(-8, -3),
                  textcoords="offset points", ha="right")  # fmt: skip
    best = rivals.iloc[0]
    axis.axhline(best["objective"], color=KIND_COLOURS["rival"], ls="--", lw=1.5)
    name = f"best baseline: {best['idea']}, {best['setting']}, {best['features']}"
    axis.annotate(name, (0.02, best["objective"]), xycoords=("axes fraction", "data"), xytext=(0, 4),
                  textcoords="offset points", color=KIND_COLOURS["rival"], fontsize="small")  # fmt: skip
    axis.axvline(budget, color="0.4", ls=":", lw=1)
    axis.annotate("most it may cost", (budget, 0.03), xycoords=("data", "axes fraction"), rotation=90,
                  xytext=(-12, 0), textcoords="offset points", fontsize="small")  # fmt: skip
    axis.set(xscale="log", xlabel="multiply-adds an image, encoder apart", ylabel="development objective, %")
    low = np.quantile(variants["objective"], 0.1)
    axis.set_ylim(low, max(ranked["objective"].max() + 0.3, low + 1))
    return _finish(figure, title)
