"""What the chapter's pages say of its tables: tables for readers and sentences, computed and never typed."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from dlsr.benchmarks import results, settings
from dlsr.chapter import COMPARED, RECOMMENDED, RESEEDED
from dlsr.comparison import DEVELOPMENT, REPORT, STUDIES, OODSet, superclasses
from dlsr.datasets import DATASETS
from dlsr.experiments import METHOD
from dlsr.results import AVERAGE, VARIANT
from dlsr.rivals import RIVALS
from dlsr.search import BUDGET, PAPER_PARAMETERS

MEANS = {"near": "mean near", "far": "mean far", "all": "mean of all"}
TITLES = {one.name: one.title for studies in STUDIES.values() for study in studies for one in study.sets}


def with_interval(value: float, low: float, high: float, form: str = ".1f") -> str:
    """``86.2 [85.7, 86.7]``."""
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def compared(table: pd.DataFrame, **where: str) -> pd.DataFrame:
    """The rows of what is ranked, neither controls nor layers alone, that have these values."""
    chosen = table["kind"].isin(COMPARED)
    for name, value in where.items():
        chosen &= table[name] == value
    return table[chosen]


def said(row: Mapping, what: str = "value", form: str = ".1f") -> str:
    """A row's value with its interval."""
    return with_interval(row[what], row["ci_low"], row["ci_high"], form)


def ahead(row: Mapping) -> str:
    """A row's difference with its interval, in points."""
    return said(row, "difference", "+.2f")


def set_title(name: str) -> str:
    """An OOD set of the chapter, or a mean, as a reader knows it."""
    base, _, rest = name.partition(", ")
    return MEANS.get(name) or TITLES.get(base, base) + (f", {rest}" if rest else "")


def protocol(profile: str) -> str:
    """Split and sets, as a list in Markdown."""
    study = STUDIES[profile][0]
    train, test = DATASETS[study.id_train], DATASETS[study.id_test]
    half = study.held_out // 2
    bullets = [
        f"**ID** {train.title}: {train.images - study.held_out:,} training images are fitted on, {half:,} "
        f"calibrate, {study.held_out - half:,} are the ID side of development; the {test.images:,} test "
        "images are ID in the report alone.",
        f"**Development OOD**, which settings were chosen on: {_listed(study.of(DEVELOPMENT))}.",
        f"**Report OOD**: near {_listed(study.of(REPORT), 'near')}; far {_listed(study.of(REPORT), 'far')}. "
        f"Of a far set a seeded pick of at most {study.n_ood:,} images is taken; images that equal an ID "
        "image to the pixel are left out.",
    ]
    if profile != "demo":
        groups = len(superclasses(development=True)) // 5
        bullets.append(
            f"**CIFAR-100** is halved by superclass: {groups} for development, the others to report."
        )
    return "\n".join(f"- {bullet}" for bullet in bullets)


def _listed(sets: Sequence[OODSet], group: str = "") -> str:
    return ", ".join(one.title for one in sets if group in ("", one.group))


# The same features


def of_all(cells: pd.DataFrame) -> pd.DataFrame:
    """The means over all report sets, best first."""
    return cells[cells["ood"] == "all"].sort_values("value", ascending=False, ignore_index=True)


def best_of(auroc: pd.DataFrame) -> str:
    """A figure's title: the best baseline beside MFsim and the recommended score; no line begins with %."""
    means = of_all(auroc)
    best = means[means["kind"] == "rival"].iloc[0]
    value = means.set_index("name")["value"]
    return (
        f"On the same features: {best['title']} {best['value']:.1f}\N{NO-BREAK SPACE}%, "
        f"MFsim {value['mfsim']:.1f}\N{NO-BREAK SPACE}%, "
        f"recommended {value['recommended']:.1f}\N{NO-BREAK SPACE}%"
    )


def ranking(auroc: pd.DataFrame) -> str:
    """How many baselines are ahead of the paper's scores, in sentences."""
    means = of_all(auroc)
    rivals, papers = (means[means["kind"] == kind] for kind in ("rival", "paper"))
    top = papers.iloc[0]
    above = rivals[rivals["value"] > top["value"]]
    names = ", ".join(f"{r.title} ({r.value:.1f})" for r in above.itertuples())
    parts = []
    for group in ("near", "far"):
        part = auroc[auroc["ood"] == group].sort_values("value", ascending=False)
        lead = part.iloc[0]
        parts.append(f"{group}-OOD {lead['title']} with {said(lead)}")
    return (
        f"The paper's best score here is {top['title']}, {said(top)} "
        f"% on the mean of all sets. Of {len(rivals)} baselines without a diffusion network, {len(above)} "
        f"have a higher mean{f': {names}' if names else ''}. First on {'; on '.join(parts)}."
    )


def wide(cells: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A row a detector, a column a report set and a mean, best mean first."""
    chosen = cells[(cells["metric"] == metric) & cells["stage"].isin(["report", "mean"])]
    chosen = chosen.assign(
        cell=list(map(said, chosen.to_dict("records"))),
        ood_=chosen["ood"].map(set_title),
    )
    order = of_all(chosen)["title"]
    order = order if metric == "auroc" else order[::-1]
    # The means first: on a narrow screen the last columns are out of sight.
    places = [*MEANS.values(), *(set_title(name) for name in chosen["ood"].unique() if name not in MEANS)]
    table = chosen.pivot(index="title", columns="ood_", values="cell").loc[order, places]
    return table.rename_axis(index="method", columns=None).reset_index()


def z0_or_raw(cells: pd.DataFrame) -> str:
    """Which of the two kinds of features serves the baselines better."""
    means = cells[(cells["ood"] == "all") & (cells["metric"] == "auroc") & (cells["kind"] == "rival")]
    table = means.pivot(index="title", columns="features", values="value")
    gain = (table["raw"] - table["z0"]).sort_values()
    best = table.max().idxmax()
    return (
        f"Raw features are ahead of `z0` for {(gain > 0).sum()} of {len(gain)} baselines (mean of all sets), "
        f"from {gain.iloc[0]:+.1f} points ({gain.index[0]}) to {gain.iloc[-1]:+.1f} ({gain.index[-1]}). The "
        f"best single result of a baseline is on {'`z0`' if best == 'z0' else 'raw features'}: "
        f"{table[best].idxmax()}, {table[best].max():.1f} %."
    )


def cost_table(costs: pd.DataFrame, encoder: str) -> pd.DataFrame:
    """Setting, seconds, microseconds and megabytes of each detector."""
    own = compared(costs, encoder=encoder)
    return pd.DataFrame(
        {
            "method": own["title"],
            "features": own["features"],
            "setting": own["setting"],
            "fit, s": [f"{r.fit_seconds:.1f}" for r in own.itertuples()],
            "score an image, µs": [f"{r.score_microseconds:.0f}" for r in own.itertuples()],
            "size, MB": [f"{r.bytes / 1e6:.1f}" for r in own.itertuples()],
            "has seen": [f"{r.n_fit:,} ID images" for r in own.itertuples()],
        }
    )


def without_overlap(cells: pd.DataFrame) -> pd.DataFrame:
    """Near sets with and without the classes that are kinds of an ID class."""
    named = cells["ood"].str.endswith(", no overlap")
    pairs = cells.loc[named, "ood"].str.removesuffix(", no overlap").unique()
    chosen = cells[(cells["metric"] == "auroc") & (named | cells["ood"].isin(pairs))]
    chosen = chosen.assign(
        cell=list(map(said, chosen.to_dict("records"))),
        ood=chosen["ood"].map(set_title),
    )
    table = chosen.pivot(index="title", columns="ood", values="cell")
    return table.loc[chosen["title"].unique()].rename_axis(index="method", columns=None).reset_index()


# Resolution


def change_by_matching(cells: pd.DataFrame) -> pd.DataFrame:
    """AUROC matched less native, in points: a row a detector, a column a mean."""
    chosen = cells[cells["ood"].isin(list(MEANS))]
    table = chosen.pivot(index=["title", "kind", "name"], columns=["view", "ood"], values="value")
    return (table["matched"] - table["native"]).reset_index()


def resolution_title(change: pd.DataFrame) -> str:
    """A figure's title: what matching the resolution costs on average."""
    return (
        f"Matched resolution costs {-change['far'].mean():.1f} points on far-OOD and "
        f"{-change['near'].mean():.1f} on near-OOD, on average"
    )


def said_of_matching(change: pd.DataFrame) -> str:
    """Who loses most and least."""
    far, near = change.sort_values("far"), change.sort_values("near")
    return (
        f"On far-OOD the change goes from {far['far'].iloc[0]:+.1f} points ({far['title'].iloc[0]}) to "
        f"{far['far'].iloc[-1]:+.1f} ({far['title'].iloc[-1]}); on near-OOD, where one set has the ID "
        f"set's own size and cannot change, from {near['near'].iloc[0]:+.1f} ({near['title'].iloc[0]}) to "
        f"{near['near'].iloc[-1]:+.1f} ({near['title'].iloc[-1]})."
    )


def set_by_set(cells: pd.DataFrame) -> pd.DataFrame:
    """Native, matched and their difference on every set, development sets too, of a few methods."""
    names = ["mfsim", "mse", "recommended", *_best_rivals(cells, 2)]
    chosen = cells[cells["name"].isin(names) & cells["stage"].isin(["report", "development"])]
    table = chosen.pivot(index="ood", columns=["title", "view"], values="value").loc[chosen["ood"].unique()]
    lines = [
        {"OOD": set_title(ood)}
        | {
            title: f"{row[title]['native']:.1f} → {row[title]['matched']:.1f} "
            f"({row[title]['matched'] - row[title]['native']:+.1f})"
            for title in table.columns.get_level_values(0).unique()
        }
        for ood, row in table.iterrows()
    ]
    return pd.DataFrame(lines)


def _best_rivals(cells: pd.DataFrame, n: int) -> list[str]:
    means = of_all(cells[(cells["kind"] == "rival") & (cells["view"] == "matched")])
    return list(means["name"].head(n))


def filter_table(filters: pd.DataFrame, encoder: str) -> pd.DataFrame:
    """Mean AUROC over the sets that are brought to size, by each filter, and unmatched."""
    if not len(filters):
        return pd.DataFrame({"filter": ["all sets have the ID set's size"]})
    own = compared(filters, encoder=encoder, features="z0")
    table = own.pivot_table(index="title", columns="view", values="value", aggfunc="mean", sort=False)
    return table.rename_axis(index="method", columns=None).reset_index()


def controls_title(controls: pd.DataFrame) -> str:
    """A figure's title: how far resolution alone reaches."""
    half = controls[controls["control"] == "half"].sort_values("value")
    return (
        f"Resolution alone: from {half['value'].iloc[0]:.0f} % ({half['title'].iloc[0]}) to "
        f"{half['value'].iloc[-1]:.0f} % ({half['title'].iloc[-1]}) AUROC"
    )


def said_of_controls(controls: pd.DataFrame) -> str:
    """The three controls in sentences."""
    value = controls.pivot(index="title", columns="control", values="value")
    double, jpeg = value["double"].sort_values(), value["jpeg"].sort_values()
    return (
        f"By resolution alone the methods reach {value['half'].median():.0f} % in the median; MFsim "
        f"{value.loc['MFsim', 'half']:.1f} %. Enlarging twofold first gives from {double.iloc[0]:.1f} % "
        f"({double.index[0]}) to {double.iloc[-1]:.1f} % ({double.index[-1]}), {double.median():.1f} % in "
        f"the median: some methods see how an image was interpolated. JPEG gives from "
        f"{jpeg.iloc[0]:.1f} % ({jpeg.index[0]}) to {jpeg.iloc[-1]:.1f} % ({jpeg.index[-1]})."
    )


def layers_title(layers: pd.DataFrame) -> str:
    """A figure's title: which layer loses most."""
    chosen = layers[layers["ood"] == "far"].pivot(index="title", columns="view", values="value")
    lost = (chosen["native"] - chosen["matched"]).sort_values()
    return f"On far-OOD {lost.index[-1]} alone loses most by matching, {lost.iloc[-1]:.1f} points"


# Intervals


def seeds_and_images() -> str:
    """How far two seeds lie apart, and how wide the interval over images is, in the paper's tables."""
    items = ("01_generative", "02_celeba", "03_rivals", "08_near_ood")
    rows = pd.concat([results(settings(item, {"profile": "pack"})) for item in items])
    rows = rows[(rows["metric"] == "auroc") & (rows["versus"] == "") & (rows["method"] == METHOD)]
    rows = rows[rows["pooling"] == "gap"]
    rows = rows[rows["ood"] != AVERAGE].drop_duplicates(["id", "ood", "encoder", "seed", *VARIANT])
    key = ["id", "ood", "encoder", *VARIANT]
    wide = rows.pivot(index=key, columns="seed", values="value").reindex(columns=["0", "1"]).dropna()
    means = rows[rows["seed"] == "mean"].set_index(key).loc[wide.index]
    apart, width = (wide["0"] - wide["1"]).abs(), means["ci_high"] - means["ci_low"]
    return (
        f"In this book's tables {len(wide)} AUROCs were measured with two seeds each: the seeds lie "
        f"{apart.mean():.2f} points apart on average, the 95 % interval over images is "
        f"{width.mean():.2f} points wide; it is the wider for {(width > apart).mean():.0%} of them."
    )


def paired_title(paired: pd.DataFrame) -> str:
    """A figure's title: against how many baselines the recommended score is surely ahead or behind."""
    parts = []
    for encoder, part in paired[paired["kind"] == "rival"].groupby("encoder", sort=False):
        ahead, behind = (part["ci_low"] > 0).sum(), (part["ci_high"] < 0).sum()
        parts.append(f"{encoder.split('_without')[0]}: ahead of {ahead}, behind {behind} of {len(part)}")
    return "The recommended score and the baselines. " + "; ".join(parts)


def said_of_pairs(paired: pd.DataFrame) -> str:
    """Per encoder: how many differences are certain, and the closest baseline."""
    bullets = []
    for encoder, part in paired[paired["kind"] == "rival"].groupby("encoder", sort=False):
        part = part.sort_values("difference")
        near = part.iloc[0]
        held = (part["p_holm"] < 0.05).sum()
        bullets.append(
            f"`{encoder}`: the interval of the difference is above zero for {(part['ci_low'] > 0).sum()} of "
            f"{len(part)} baselines and below zero for {(part['ci_high'] < 0).sum()}; {held} differences "
            f"stand Holm's correction at 5 %. Closest, or furthest ahead, is {_name(near)} at "
            f"{ahead(near)} points."
        )
    return "\n".join(f"- {bullet}" for bullet in bullets)


def _name(row: Mapping) -> str:
    return f"{row['title']}{' on raw features' if row['features'] == 'raw' else ''}"


def paired_table(paired: pd.DataFrame) -> pd.DataFrame:
    """Differences of the mean AUROC with interval and p values, a row a method and encoder."""
    chosen = paired.sort_values(["encoder", "difference"], kind="stable")
    return pd.DataFrame(
        {
            "encoder": chosen["encoder"],
            "recommended less": [_name(row) for row in chosen.to_dict("records")],
            "points [95 %]": list(map(ahead, chosen.to_dict("records"))),
            "p (DeLong)": chosen["p"].map(_small),
            "p (Holm)": chosen["p_holm"].map(_small),
        }
    )


def _small(p: float) -> str:
    """A p value; none where nothing was tested."""
    return "–" if np.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def against_rival(paired: pd.DataFrame, choice: Mapping) -> pd.DataFrame:
    """The recommended score less the rival, on each report set and mean."""
    rival = choice["rival"]
    own = paired[_is_rival(paired, choice)]
    own = own[own["ood"].isin([*MEANS, *_report_sets(own)])]
    cells = own.assign(
        cell=list(map(ahead, own.to_dict("records"))),
        ood=own["ood"].map(set_title),
    )
    table = cells.pivot(index="ood", columns="encoder", values="cell").loc[cells["ood"].unique()]
    title = f"points ahead of {RIVALS[rival['name']].title} ({rival['features']}, {rival['setting']})"
    return table.rename_axis(index=title, columns=None).reset_index()


def _report_sets(cells: pd.DataFrame) -> list[str]:
    encoders = set(cells["encoder"])
    studies = [study for all_of in STUDIES.values() for study in all_of if study.encoder in encoders]
    return [one.name for study in studies for one in study.of(REPORT)]


def ranks_title(cells: pd.DataFrame) -> str:
    """A figure's title: the best mean rank."""
    table = cells.pivot(index="title", columns="ood", values="value").rank(ascending=False).mean(axis=1)
    return f"Best mean rank: {table.idxmin()}, {table.min():.1f} of {len(table)}"


# The search


def search_title(choice: Mapping) -> str:
    """A figure's title: the chosen variant beside the best baseline, on development."""
    own, rival = choice["development"]["objective"], choice["rival_development"]["objective"]
    return f"On development the chosen score has {own:.1f} %, the best baseline {rival:.1f} %"


def said_of_search(choice: Mapping, ranked: pd.DataFrame) -> str:
    """What was tried and what was chosen."""
    variants = ranked[ranked["kind"] == "variant"].set_index("name")
    rival = choice["rival"]
    passes = variants.loc[choice["score"], "multiply_adds"] / PAPER_PARAMETERS
    best = variants[variants["idea"].str.startswith("the paper's")].iloc[0]
    return (
        f"{choice['tried']['variants']} variants of {variants['idea'].nunique()} ideas were tried, and "
        f"{choice['tried']['rival candidates']} settings of baselines. Chosen: **{choice['score']}** "
        f"({variants.loc[choice['score'], 'idea']}), objective {choice['development']['objective']:.2f} %, "
        f"at the cost of {passes:.2f} passes of the paper's network (at most "
        f"{BUDGET / PAPER_PARAMETERS:.0f} were allowed). The best of the paper's scores, {best.name}, has "
        f"{best['objective']:.2f} %; the best baseline, {RIVALS[rival['name']].title} ({rival['setting']}, "
        f"{rival['features']}), {choice['rival_development']['objective']:.2f} %. These are numbers of "
        "development: they are what was chosen by, and so flatter what was chosen."
    )


def variants_table(ranked: pd.DataFrame) -> pd.DataFrame:
    """Every variant with its idea, cost and development result."""
    own = ranked[ranked["kind"] == "variant"]
    return pd.DataFrame(
        {
            "variant": own["name"],
            "idea": own["idea"],
            "near, %": own["near"].map("{:.2f}".format),
            "far, %": own["far"].map("{:.2f}".format),
            "objective, %": own["objective"].map("{:.2f}".format),
            "passes of the paper's network": (own["multiply_adds"] / PAPER_PARAMETERS).map("{:.2f}".format),
        }
    )


def rivals_table(ranked: pd.DataFrame) -> pd.DataFrame:
    """Every candidate of every baseline with its development result."""
    own = ranked[ranked["kind"] == "rival"]
    return pd.DataFrame(
        {
            "baseline": own["idea"],
            "setting": own["setting"],
            "features": own["features"],
            "near, %": own["near"].map("{:.2f}".format),
            "far, %": own["far"].map("{:.2f}".format),
            "objective, %": own["objective"].map("{:.2f}".format),
        }
    )


def control_table(paired: pd.DataFrame) -> pd.DataFrame:
    """The recommended score less its controls, on the means."""
    own = paired[(paired["kind"] == "control") & paired["ood"].isin(list(MEANS))]
    own = own.assign(
        cell=list(map(ahead, own.to_dict("records"))),
        ood=own["ood"].map(set_title),
    )
    table = own.pivot(index=["encoder", "title"], columns="ood", values="cell")[list(MEANS.values())]
    return table.rename_axis(columns=None).reset_index().rename(columns={"title": "itself"})


def verdict(paired: pd.DataFrame, choice: Mapping) -> str:
    """Whether the recommended score is ahead of its controls and of the rival: whether diffusion helps."""
    bullets = []
    for encoder, part in paired.groupby("encoder", sort=False):
        rows = part[_is_rival(part, choice)].set_index("ood")
        near, far, both = (rows.loc[mean] for mean in MEANS)
        reached = near["difference"] >= 0 and far["difference"] >= 0 and both["ci_low"] > 0
        bullets.append(
            f"`{encoder}`: {_of_controls(part)} Against the rival, {RIVALS[choice['rival']['name']].title}: "
            f"near {ahead(near)}, far {ahead(far)}, all {ahead(both)} points. The aim, no worse on near and "
            f"on far and an interval above zero on all, is {'' if reached else 'not '}reached."
        )
    return "\n".join(f"- {bullet}" for bullet in bullets)


def _of_controls(paired: pd.DataFrame) -> str:
    """Whether all controls are beaten on the mean of all, and where one of them is ahead."""
    controls = paired[paired["kind"] == "control"]
    behind = controls[(controls["ood"] == "all") & (controls["ci_low"] <= 0)]
    lost = controls[controls["ood"].isin(["near", "far"]) & (controls["ci_high"] < 0)]
    text = (
        "ahead of all three on the mean of all sets: diffusion helps here."
        if behind.empty
        else f"not ahead of itself {_and(behind.apply(_by_how_much, axis=1))} on the mean of all sets, so "
        "that diffusion cannot be said to help."
    )
    if lost.empty:
        return text
    alone = [f"{_by_how_much(r)} on {r['ood']}-OOD alone" for r in lost.to_dict("records")]
    return f"{text} {'But it' if behind.empty else 'It'} is behind itself {_and(alone)}."


def other_seed(table: pd.DataFrame, choice: Mapping) -> pd.DataFrame:
    """The recommended score by either seed's network less the rival and its controls, mean of all sets."""
    own = _rival_and_controls(table, choice)
    own = own.assign(cell=list(map(ahead, own.to_dict("records"))))
    wide = own.pivot(index=["encoder", "title"], columns="of", values="cell")[[RECOMMENDED, RESEEDED]]
    names = {"title": "less", RECOMMENDED: "first network", RESEEDED: "second network"}
    return wide.reset_index().rename(columns=names).rename_axis(columns=None)


def said_of_other_seed(table: pd.DataFrame, choice: Mapping) -> str:
    """How far the two networks lie apart, and where either is ahead."""
    bullets = []
    for encoder, part in table.groupby("encoder", sort=False):
        (change,) = part[part["kind"] == RECOMMENDED].to_dict("records")
        leads = _rival_and_controls(part, choice).assign(above=lambda rows: rows["ci_low"] > 0)
        above = leads.groupby("of")["above"].agg(["sum", "size"])
        bullets.append(
            f"`{encoder}`: with the second network the score is {ahead(change)} points away from the "
            f"first's. The interval is above zero against {above.loc[RECOMMENDED, 'sum']} of "
            f"{above.loc[RECOMMENDED, 'size']} with the first network and against "
            f"{above.loc[RESEEDED, 'sum']} with the second."
        )
    return "\n".join(f"- {bullet}" for bullet in bullets)


def _rival_and_controls(table: pd.DataFrame, choice: Mapping) -> pd.DataFrame:
    return table[_is_rival(table, choice) | (table["kind"] == "control")]


def _is_rival(table: pd.DataFrame, choice: Mapping) -> pd.Series:
    """Which rows are of the baseline that the search named."""
    rival = choice["rival"]
    return (table["features"] == rival["features"]) & (table["name"] == rival["name"])


def _by_how_much(row: Mapping) -> str:
    return f"{row['title']} ({ahead(row)})"


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)


# What to use


def recommendations(cells: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """For each need the best detector of each encoder, with its AUROC and its cost."""
    lines = []
    for encoder, part in cells.groupby("encoder", sort=False):
        own = costs[costs["encoder"] == encoder].set_index(["features", "name"])
        for need in MEANS:
            best = part[part["ood"] == need].sort_values("value").iloc[-1]
            cost = own.loc[(best["features"], best["name"])]
            lines.append(
                {
                    "encoder": encoder,
                    "highest": set_title(need),
                    "method": _name(best),
                    "setting": cost["setting"],
                    "AUROC, %": said(best),
                    "fit, s": f"{cost['fit_seconds']:.0f}",
                    "µs an image": f"{cost['score_microseconds']:.0f}",
                }
            )
    return pd.DataFrame(lines)


def advice(cells: pd.DataFrame, paired: pd.DataFrame, choice: Mapping) -> str:
    """What follows, in a few sentences."""
    first = cells["encoder"].iloc[0]
    means = of_all(cells[cells["encoder"] == first])
    best = means.iloc[0]
    simple = means[means["name"].isin(["mahalanobis", "knn", "pca"])].iloc[0]
    papers = means[means["kind"] == "paper"].iloc[0]
    return (
        f"- **Nothing to train**: {_name(simple)}, {said(simple)} "
        f"% on the mean of all report sets, where the paper's best score, {papers['title']}, has "
        f"{said(papers)} %.\n"
        f"- **Highest mean here**: {_name(best)}, {said(best)} %.\n"
        f"- **The recommended score**, chosen on `{choice['encoder']}`: {_carried(paired, choice)}\n"
        "- **Photographs of other sizes than your ID images**: bring all to the same size first, or a "
        "detector tells sizes apart instead of contents.\n"
        "- **Near-OOD** (other classes, same kind of image): look at the near column alone; the mean over "
        "easy far sets hides it."
    )


def _carried(paired: pd.DataFrame, choice: Mapping) -> str:
    """Whether the recommended score is ahead of the rival by every encoder."""
    name = choice["rival"]["name"]
    rows = paired[_is_rival(paired, choice) & (paired["ood"] == "all") & (paired["view"] == "matched")]
    found = [f"{ahead(row)} points by `{row['encoder']}`" for row in rows.to_dict("records")]
    surely = (rows["ci_low"] > 0).all()
    advice = (
        "It is ahead by every encoder tried."
        if surely
        else f"It is not ahead by every encoder tried: on another encoder, try {RIVALS[name].title} first, "
        "which has nothing to train."
    )
    return f"against {RIVALS[name].title} {_and(found)}. {advice}"
