"""Every figure of the book, in one style. A function draws one figure and returns it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML, display
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from sklearn.decomposition import PCA
from sklearn.metrics import roc_curve

from dlsr.benchmarks import headline
from dlsr.datasets import DATASETS, ImageSet
from dlsr.features import Features, layer_slices, replace_file
from dlsr.results import SetScores, project_folder

PALETTE = sns.color_palette("colorblind")
COLOURS = {"id": PALETTE[0], "near": PALETTE[1], "far": PALETTE[2]}
SCORE_STYLES = {
    "mse": {"color": PALETTE[3], "linestyle": "-"},
    "lr": {"color": PALETTE[4], "linestyle": ":"},
    "mfsim": {"color": PALETTE[9], "linestyle": "--"},
}
SCORE_NAMES = {"mse": "MSE", "lr": "LR", "mfsim": "MFsim"}
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


def with_interval(value: float, low: float, high: float) -> str:
    """``86.2 [85.7, 86.7]``."""
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


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


def comparison_table(comparison: pd.DataFrame) -> pd.DataFrame:
    """What `benchmarks.compare` returns, as a reader sees it."""
    return pd.DataFrame(
        {
            "score": comparison["score"].map(SCORE_NAMES),
            "metric": comparison["metric"].str.upper(),
            "paper (quoted)": comparison["paper"],
            "measured [95 % interval]": [
                with_interval(r.measured, r.ci_low, r.ci_high) for r in comparison.itertuples()
            ],
            "difference": comparison["difference"].map("{:+.1f}".format, na_action="ignore"),
        }
    )


def settings_table(rows: pd.DataFrame) -> pd.DataFrame:
    """AUROC of every setting an item was run in, a line for each and a column a score."""
    chosen = rows.query("metric == 'auroc' and seed == 'mean' and versus == '' and layers in ['all', '2..M']")
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
    """Measured values with their intervals beside the paper's, a panel for each metric.

    See `benchmarks.compare`.
    """
    metrics = {"auroc": "AUROC, %: higher is better", "fpr95": "FPR95, %: lower is better"}
    figure, axes = _figure(len(metrics), height=2.3)
    for axis, (metric, label) in zip(axes[0], metrics.items(), strict=True):
        part = comparison[comparison["metric"] == metric]
        value, y = part["measured"], np.arange(len(part))[::-1]
        errors = [value - part["ci_low"], part["ci_high"] - value]
        axis.errorbar(value, y, xerr=errors, fmt="o", color=PALETTE[0], capsize=3, label="measured here")
        paper = {"facecolors": "none", "edgecolors": "0.2", "label": "paper (quoted)"}
        axis.scatter(part["paper"], y, marker="D", zorder=3, **paper)
        axis.set(yticks=y, yticklabels=part["score"].map(SCORE_NAMES), xlabel=label)
        axis.set_ylim(-0.6, len(part) - 0.4)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    return _finish(figure, title)


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
        errors = [part["value"] - part["ci_low"], part["ci_high"] - part["value"]]
        style = {"color": SCORE_STYLES[score]["color"], "label": SCORE_NAMES[score]}
        axis.errorbar(x, part["value"], yerr=errors, fmt="o", capsize=3, **style)
    axis.axhline(50, color="0.4", ls="--", lw=1)
    axis.set(xlabel="layer of the encoder (1 = nearest the pixels)", ylabel="AUROC, %")
    axis.set_xticks(sorted(table["layer"].astype(int).unique()))
    axis.legend(frameon=False)
    return _finish(figure, title)
