"""What the book's pages say of the results: tables and sentences, computed and never typed."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dlsr.baselines import BASELINES
from dlsr.benchmarks import (
    B4_PACK,
    Settings,
    compare,
    paper_table,
    results,
    scores_of,
    select,
    settings,
    stamp,
    state,
    with_profile,
)
from dlsr.datasets import DATASETS
from dlsr.encoders import POOLINGS
from dlsr.experiments import HEADLINE, METHOD, OURS, Experiment
from dlsr.metrics import auroc
from dlsr.results import AVERAGE, SetScores, results_folder
from dlsr.scores import FIRST_EPOCH


def plan(run: Settings) -> pd.DataFrame:
    """What a run fits and scores, a row an experiment; columns that are empty are left out."""
    table = pd.DataFrame(
        {
            "ID": DATASETS[e.id_train].title,
            "setting": e.setting,
            "encoder": e.encoder,
            "LFDN": f"{size_name(e)}, {e.training.epochs} epochs",
            "layers": e.layers,
            "seeds": e.seeds,
            "beside it": ", ".join(BASELINES[name].title for name in e.baselines),
            "OOD sets": f"{len(e.available)} of {len(e.ood)}",
        }
        for e in run.experiments
    )
    return table[[column for column in table if table[column].ne("").any()]]


ENCODERS_SAID = {
    "efficientnet_b4": "the paper's, EfficientNet-B4",
    B4_PACK: "the paper's EfficientNet-B4 without its last block, for which no weights were at hand; the "
    "identity stands in its place",
    "resnet50": "the paper's, ResNet-50",
}


def differences(run: Settings, rows: pd.DataFrame) -> str:
    """What a run did otherwise than the paper, as a list in Markdown."""
    if not run.experiments:
        return f"Nothing was run: {run.item.unmeasured}."
    first, training = run.experiments[0], run.experiments[0].training
    counts = rows.drop_duplicates(["id", "n_train"])
    trained = ", ".join(
        f"{n:,} of {DATASETS[name].title}" for name, n in zip(counts["id"], counts["n_train"], strict=True)
    )
    tested = f"a seeded pick of {first.n_test:,} a set at most" if first.n_test else "all are scored"
    bullets = [
        f"**Encoder** `{first.encoder}`: {ENCODERS_SAID.get(first.encoder, 'not one of the paper')}.",
        f"**LFDN**: {training.blocks} blocks x {training.width}, {training.epochs} epochs, seeds: "
        f"{first.seeds}. The paper: 16 blocks x 1440, 150 epochs, three runs.",
        f"**Training images**: {trained}.",
        f"**Pooling** `{first.pooling}`: the paper says global average (`gap`); the released code samples "
        "each map on a 14x14 grid first (`grid14`).",
        f"**Resolution** `{first.protocol}`: `native`, as in the released code, brings every image straight "
        "to 224x224.",
        f"**Test images**: {tested}; the released code drops the last partial batch.",
    ]
    return "\n".join(f"- {bullet}" for bullet in bullets)


def overall(comparison: pd.DataFrame, *, metric: str = "auroc") -> pd.DataFrame:
    """The cells of the mean over measured sets; of the one set where only one was measured."""
    cells = comparison[(comparison["metric"] == metric) & comparison["measured"].notna()]
    groups = ["setting", "id"]
    has_mean = cells["ood"].eq(AVERAGE).groupby([cells[name] for name in groups]).transform("any")
    return cells[cells["ood"].eq(AVERAGE) | ~has_mean].reset_index(drop=True)


def ranking(comparison: pd.DataFrame, *, metric: str = "auroc") -> str:
    """The lines of each ID set in the order of what was measured, as a list in Markdown."""
    bullets = []
    for (id_set, setting), part in overall(comparison, metric=metric).groupby(["id", "setting"], sort=False):
        part = part.sort_values("measured", ascending=metric != "auroc")
        named = [f"{r.line} {r.measured:.1f} [{r.ci_low:.1f}, {r.ci_high:.1f}]" for r in part.itertuples()]
        name = f"{DATASETS[id_set].title}{f' ({setting})' if setting else ''}"
        bullets.append(f"- **{name}**, {metric.upper()} over the measured sets: {'; '.join(named)}.")
    return "\n".join(bullets) or "Nothing was measured."


def verdict(comparison: pd.DataFrame) -> str:
    """How near the measured cells come to the paper's, in sentences; averages left out."""
    cells = comparison[comparison["ood"] != AVERAGE].dropna(subset=["difference"])
    sentences = []
    for metric, part in cells.groupby("metric", sort=False):
        near = (part["difference"].abs() <= 1).sum()
        inside = part["paper"].between(part["ci_low"], part["ci_high"]).sum()
        far = part.loc[part["difference"].abs().idxmax()]
        sentences.append(
            f"{metric.upper()}: of {len(part)} measured cells that the paper prints too, {near} lie within "
            f"one point of its value, and {inside} have it in their interval; the largest difference is "
            f"{far['difference']:+.1f} points ({far['line']}, {DATASETS[far['id']].title} against "
            f"{DATASETS[far['ood']].title})."
        )
    missing = comparison[(comparison["ood"] != AVERAGE) & comparison["measured"].isna()]
    if len(missing):
        reasons = missing.groupby("why")["ood"].unique()
        sentences += [
            f"Not measured, {why}: {', '.join(DATASETS[name].title for name in sets)}."
            for why, sets in reasons.items()
        ]
    return " ".join(sentences) or "Nothing was measured that the paper prints."


def size_name(experiment: Experiment) -> str:
    """``8x720``: blocks and width of its LFDN."""
    return f"{experiment.training.blocks}x{experiment.training.width}"


FIRST_AND_LAST = ["ID", "OOD", "AUROC after epoch 1, %", "after the last, %", "gain, points"]


def first_and_last(run: Settings, rows: pd.DataFrame) -> pd.DataFrame:
    """AUROC of MFsim by the first epoch's network and the last one's, a row an OOD set."""
    lines = []
    for experiment in run.experiments:
        own = rows[rows["stages"] == stamp(experiment)]
        for ood in experiment.available:
            mfsim = OURS[-1].variant(experiment.layers, experiment.headline) | {"metric": "auroc"}
            both = {
                score: select(own, ood=ood, **(mfsim | {"score": score}))
                for score in (FIRST_EPOCH["mfsim"], "mfsim")
            }
            first, last = (cell["value"] for cell in both.values())
            lines.append({
                "ID": DATASETS[experiment.id_test].title, "OOD": DATASETS[ood].title,
                "AUROC after epoch 1, %": first, "after the last, %": last, "gain, points": last - first,
            })  # fmt: skip
    return pd.DataFrame(lines, columns=FIRST_AND_LAST)


def growth_said(growth: pd.DataFrame) -> str:
    """What `first_and_last` says of the paper's claim."""
    if growth.empty:
        return "Nothing was measured."
    gain = growth["gain, points"]
    return (
        f"The last epoch's network separates better than the first one's on {(gain > 0).sum()} of "
        f"{len(gain)} sets; AUROC changes by {gain.min():+.1f} to {gain.max():+.1f} points."
    )


def growth_title(growth: pd.DataFrame, id_set: str) -> str:
    """The same of one ID set, in a line."""
    gain = growth.loc[growth["ID"] == DATASETS[id_set].title, "gain, points"]
    return (
        f"{DATASETS[id_set].title} is ID: from the first to the last epoch AUROC changes by "
        f"{gain.min():+.1f} to {gain.max():+.1f} points"
    )


def over_timesteps(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the three scores' mean over OOD sets, for each reconstruction and t."""
    chosen = rows[rows["ood"].eq(AVERAGE) & rows["seed"].eq("mean") & rows["versus"].eq("")]
    ours = [(line.score, line.layers) for line in OURS]
    return chosen[[pair in ours for pair in zip(chosen["score"], chosen["layers"], strict=True)]]


def _best_timesteps(means: pd.DataFrame) -> pd.DataFrame:
    auroc = means[means["metric"] == "auroc"]
    return auroc.loc[auroc.groupby(["reconstruction", "score"], sort=False)["value"].idxmax()]


def timestep_title(means: pd.DataFrame) -> str:
    """Where MFsim is best, and what is left of it at t = 1."""
    auroc = means[(means["metric"] == "auroc") & (means["score"] == "mfsim")]
    at_1 = auroc[auroc["t"] == 1].set_index("reconstruction")["value"]
    if not {"released", "paper"} <= set(at_1.index):
        return "AUROC and FPR95 at the timestep asked for"
    others = at_1.drop("released")
    return (
        f"At t = 1 MFsim is at {at_1['released']:.0f} % the released code's way, "
        f"at {np.floor(others.min()):.0f} % or more the others"
    )


def timesteps_said(means: pd.DataFrame) -> str:
    """The best t of each score and reconstruction, as a list in Markdown."""
    bullets = []
    titles = {line.score: line.title for line in OURS}
    for mode, part in _best_timesteps(means).groupby("reconstruction", sort=False):
        best = ", ".join(f"{titles[r.score]} at t = {r.t} ({r.value:.1f} %)" for r in part.itertuples())
        bullets.append(f"- `{mode}`: the mean AUROC is highest for {best}.")
    flat = means[(means["metric"] == "auroc") & (means["t"] > 1)].groupby(["score", "reconstruction"])[
        "value"
    ]
    spread = (flat.max() - flat.min()).groupby("score").max()
    moved = ", ".join(f"{titles[score]} by {points:.1f}" for score, points in spread.items())
    return "\n".join(
        [*bullets, f"- Above t = 1, t moves the mean AUROC of one reconstruction at most: {moved} points."]
    )


def layer_shares(run: Settings) -> pd.DataFrame:
    """Mean AUROC of the MSE on each layer alone, on all others, and on all, from the one network.

    Columns ``ID``, ``layer``, ``alone``, ``left out``, ``all``, in percent, of the first seed.
    """
    lines = []
    for experiment in run.experiments:
        if experiment.by_layer and experiment.layers == "all":
            scores = scores_of(run, experiment)[METHOD][0]
            lines += _layer_shares(scores, experiment)
    return pd.DataFrame(lines, columns=["ID", "layer", "alone", "left out", "all"])


def layer_shares_title(shares: pd.DataFrame) -> str:
    """Which layer's error tells most alone, on average over ID sets, and which is missed most."""
    mean = shares.groupby("layer")[["alone", "left out", "all"]].mean()
    missed = mean["all"] - mean["left out"]
    return (
        f"Layer {mean['alone'].idxmax()} alone reaches {mean['alone'].max():.0f} %; leaving out layer "
        f"{missed.idxmax()} costs most, {missed.max():.1f} points"
    )


def _layer_shares(scores: SetScores, experiment: Experiment) -> list[dict[str, Any]]:
    channels = np.array(scores.about["channels"])
    whole_column = experiment.columns[0]

    def mean_auroc(values: np.ndarray) -> float:
        of = {name: values[(scores.table["set"] == name).to_numpy()] for name in scores.sets}
        return 100 * float(np.mean([auroc(of[experiment.id_test], of[ood]) for ood in experiment.available]))

    everything = scores.table[whole_column].to_numpy()
    lines = []
    for m, width in enumerate(channels):
        alone = scores.table[whole_column.replace("/all/", f"/{m + 1}/")].to_numpy()
        rest = channels.sum() * everything - width * alone
        lines.append({
            "ID": DATASETS[experiment.id_test].title, "layer": str(m + 1), "alone": mean_auroc(alone),
            "left out": mean_auroc(rest), "all": mean_auroc(everything),
        })  # fmt: skip
    return lines


def coverage(profile: str) -> pd.DataFrame:
    """All items: ``item``, ``title``, ``profile``, ``measured`` of ``cells``, ``date``, ``state``.

    Reads committed files alone. A cell is one value of the item's table, averages left out.
    """
    lines = []
    for item in with_profile(profile):
        run = settings(item.name, {"profile": profile})
        cells = compare(run, results(run))
        cells = cells[cells["ood"] != AVERAGE]
        dates = results(run)["date"]
        lines.append({
            "item": item.name, "title": item.title, "profile": profile,
            "measured": int(cells["measured"].notna().sum()), "cells": len(cells),
            "date": dates.max() if len(dates) else "", "state": state(run),
        })  # fmt: skip
    return pd.DataFrame(lines)


def all_cells(profile: str) -> pd.DataFrame:
    """The cells of every table that the paper prints and that are measured; each once, no averages."""
    runs = [settings(item.name, {"profile": profile}) for item in with_profile(profile)]
    cells = pd.concat([compare(run, results(run)) for run in runs])
    cells = cells[(cells["ood"] != AVERAGE) & cells["same"].astype(bool)]
    cells = cells.dropna(subset=["measured", "paper"])
    return cells.drop_duplicates(["id", "ood", "line", "metric", "setting"]).reset_index(drop=True)


def distances_title(cells: pd.DataFrame) -> str:
    """How far the lines of `all_cells` lie from the paper's AUROC, on average."""
    auroc_cells = cells[cells["metric"] == "auroc"]
    mean = auroc_cells["difference"].abs().groupby(auroc_cells["line"]).mean().sort_values()
    named = ", ".join(f"{line.split(',')[0]} {points:.1f}" for line, points in mean.items())
    return f"Mean distance from the paper's AUROC, in points: {named}"


def missing(profile: str) -> pd.DataFrame:
    """Cells that are not measured, by reason: ``why``, ``cells``, ``sets``, ``items``."""
    lines = []
    for item in with_profile(profile):
        run = settings(item.name, {"profile": profile})
        cells = compare(run, results(run))
        lines.append(cells[cells["measured"].isna() & (cells["ood"] != AVERAGE)].assign(item=item.name))
    cells = pd.concat(lines)
    cells = cells.assign(ood=[DATASETS[name].title for name in cells["ood"]])
    named = {"cells": ("ood", "size"), "sets": ("ood", _listed), "items": ("item", _listed)}
    return cells.groupby("why", sort=False).agg(**named).reset_index()


def _listed(names: pd.Series) -> str:
    return ", ".join(dict.fromkeys(names))


def partial_sets() -> pd.DataFrame:
    """The pack's sets that are not those the paper names: ``set``, ``images``, ``how``, ``licence``."""
    return pd.DataFrame(
        {"set": row.key, "images": row.images, "how": row.partial, "licence": row.licence}
        for row in DATASETS.values()
        if row.partial
    )


def results_files() -> list[Path]:
    """The committed tables, in order."""
    return sorted(results_folder("pack").glob("*.csv"))


def measured(item: str, *, pooling: str = "gap") -> pd.DataFrame:
    """The committed rows of an item at the size of the pack: means over seeds, differences left out."""
    rows = results(settings(item, {"profile": "pack"}))
    return rows[(rows["seed"] == "mean") & (rows["versus"] == "") & (rows["pooling"] == pooling)]


def lr_signs() -> pd.DataFrame:
    """AUROC of LR as the paper prints it and with its sign turned, for each encoder and pair of sets."""
    rows = pd.concat([measured(item) for item in ("01_generative", "02_celeba", "03_rivals", "08_near_ood")])
    chosen = rows[rows["score"].eq("lr") & rows["metric"].eq("auroc") & rows["ood"].ne(AVERAGE)]
    chosen = chosen[chosen["layers"].eq("all") & chosen["reconstruction"].eq("released")]
    chosen = chosen.drop_duplicates(["encoder", "id", "ood"])
    return pd.DataFrame(
        {
            "encoder": chosen["encoder"],
            "ID": [DATASETS[name].title for name in chosen["id"]],
            "OOD": [DATASETS[name].title for name in chosen["ood"]],
            "AUROC of LR as printed, %": chosen["value"],
            "with the sign turned, %": 100 - chosen["value"],
        }
    )


def errors_by_epoch(run: Settings) -> pd.DataFrame:
    """Mean MSE of every set by the first epoch's network and the last one's, first seed: what LR is of."""
    lines = []
    for experiment in run.experiments:
        scores = scores_of(run, experiment)[METHOD][0]
        last, lr, _ = experiment.columns
        first = last.replace("mse", FIRST_EPOCH["mse"], 1)
        for name in scores.sets:
            errors = {f"MSE, {when} epoch": scores.of(name, column).mean()
                      for when, column in (("first", first), ("last", last))}  # fmt: skip
            place = {"ID": DATASETS[experiment.id_test].title, "set": DATASETS[name].title}
            lines.append(place | errors | {"mean LR": scores.of(name, lr).mean()})
    table = pd.DataFrame(lines).drop_duplicates(["ID", "set"])
    return table.assign(**{name: table[name].map("{:.4f}".format) for name in table.columns[2:]})


def layers_of_mfsim() -> pd.DataFrame:
    """AUROC of MFsim on layers 2..M, as the released code scores, and on all, as the paper says."""
    rows = pd.concat([measured(item) for item in ("03_rivals", "08_near_ood")])
    chosen = rows[rows["score"].eq("mfsim") & rows["metric"].eq("auroc") & rows["ood"].ne(AVERAGE)]
    chosen = chosen[chosen["layers"].isin(["2..M", "all"]) & chosen["reconstruction"].eq("released")]
    table = chosen.pivot_table(index=["encoder", "id", "ood"], columns="layers", values="value")
    table = table.reset_index().rename_axis(columns=None)
    table[["id", "ood"]] = table[["id", "ood"]].map(lambda name: DATASETS[name].title)
    return table.assign(difference=table["all"] - table["2..M"])


def reconstructions() -> pd.DataFrame:
    """AUROC of the three scores by each way of reconstructing from t = 3, CIFAR-10 against CIFAR-100."""
    return _near_ood(measured("08_near_ood"), ["reconstruction", "noise_draws"])


def poolings() -> pd.DataFrame:
    """AUROC of the three scores by each pooling of the maps, CIFAR-10 against CIFAR-100."""
    rows = pd.concat([measured("08_near_ood", pooling=pooling) for pooling in POOLINGS])
    headline = rows[rows["reconstruction"].eq(HEADLINE.mode) & rows["t"].eq(HEADLINE.t)]
    return _near_ood(headline, ["pooling"])


def _near_ood(rows: pd.DataFrame, ways: list[str]) -> pd.DataFrame:
    """A line each way and a column each of the paper's scores, by the paper's encoder."""
    rows = rows[rows["encoder"].eq(B4_PACK) & rows["metric"].eq("auroc")]
    ours = [(line.score, line.layers) for line in OURS]
    rows = rows[[pair in ours for pair in zip(rows["score"], rows["layers"], strict=True)]]
    return (
        rows.pivot_table(index=ways, columns="score", values="value").reset_index().rename_axis(columns=None)
    )


def paper_sums() -> pd.DataFrame:
    """Printed averages that differ from the mean of the printed cells by more than rounding."""
    lines = []
    for table in AVERAGED:
        printed = paper_table(table)
        for row in printed.to_dict("records"):
            for average, cells in _averaged(printed):
                values = [float(row[name].split("±")[0]) for name in cells]
                found, said = float(np.mean(values)), float(row[average].split("±")[0])
                decimals = len(row[average].split("±")[0].partition(".")[2])
                if abs(found - said) > 0.6 * 10**-decimals + 1e-9:
                    number = table.split("_")[0].removeprefix("table")
                    line = " ".join(row[name] for name in ("ID", "Method") if name in row)
                    place = {"table": number, "line": line, "column": average}
                    lines.append(place | {"printed": f"{said:g}", "mean of its cells": f"{found:.3f}"})
    return pd.DataFrame(lines)


AVERAGED = (
    "table1_cifar10_generative_auroc", "table2_celeba_auroc", "table3_auroc_effb4", "table5_fpr95_effb4",
    "table6_auroc_resnet50", "table7_fpr95_resnet50", "table9_diffguard",
    "table11_ae_vae_features_auroc", "table12_imagenet100",
)  # fmt: skip


def _averaged(printed: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """The columns of averages of a printed table, each with the columns it is of."""
    skipped = ("ID", "Method", "img/s", "Num img/s")
    cells = [name for name in printed.columns if name not in skipped and not name.startswith("av")]
    if "average" in printed.columns:
        return [("average", cells)]
    return [(f"avg {m}", [c for c in cells if c.endswith(m)]) for m in ("AUROC", "FPR95")]
