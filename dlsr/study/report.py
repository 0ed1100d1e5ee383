"""The report: per-image scores of all methods on the report sets, and the tables made of them.

Every table has the columns features (``z0`` or ``raw``), name, title and kind of a method. Kinds
are ``paper``, ``baseline``, ``fused`` (the score that the search chose), ``control`` and ``seed``
(the fused score with something else in the network's place), ``layer`` (one layer alone), and
``other`` (of a later page, by `beside`).
Values are in percent and differences in points, both of AUROC unless ``metric`` says otherwise.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from dlsr.errors import UserError
from dlsr.evaluation import KEYS, project_folder, provenance
from dlsr.features import pick_device
from dlsr.metrics import METRICS, bootstrap
from dlsr.study.paired import delong, holm, paired_p
from dlsr.study.protocol import PROTOCOLS, Protocol, overlaps

METHOD = ["features", "name", "title", "kind"]
MEANS = ("near", "far", "all")  # unweighted, over the report sets
NORMAL_975 = 1.959964  # the normal distribution's 97.5 % quantile
FUSED, NO_NETWORK = "kNN + Gaussian + MSE (fused)", "kNN + Gaussian (no network)"
CLUSTERED = "clusters + kNN (no network)"
OLD_VALUES = {  # committed results have older names, which `_renamed` alone maps
    "kind": {"rival": "baseline", "recommended": "fused"},
    "name": {"recommended": "fused", "removed": "no_network", "reseeded": "other_seed"},
    "of": {"recommended": "fused", "reseeded": "other_seed"},
    "resolution": {f"matched, {name}": name for name in ("bilinear", "bicubic", "box")},
    "title": {
        "recommended": FUSED,
        "without the LFDN": NO_NETWORK,
        "with the linear denoiser": "fused, linear denoiser",
        "with an untrained LFDN": "fused, untrained LFDN",
        "trained from another seed": "fused, LFDN of another seed",
    },
}


@dataclass(frozen=True, eq=False)
class Scores:
    """Per-image scores of the methods in the rows of ``methods``, whose columns are `METHOD`.

    ``values[set, resolution]`` is (methods, images), and ``images`` has frames of the same keys
    with the columns image and label. The sets are ``id``, the OOD sets' names, and ``control``, ID
    images whose "resolution" says how they were altered ("": not at all).
    """

    protocol: Protocol
    methods: pd.DataFrame
    values: Mapping[tuple[str, str], np.ndarray]
    images: Mapping[tuple[str, str], pd.DataFrame]

    def key(self, eval_set: str, resolution: str) -> tuple[str, str]:
        """Return a set's key; one that has the ID set's size is the same at every resolution."""
        key = (eval_set, resolution)
        return key if key in self.values else (eval_set, "native")

    def of(self, eval_set: str, resolution: str = "native") -> np.ndarray:
        """Return a set's scores, (methods, images)."""
        return self.values[self.key(eval_set, resolution)]

    def of_mean(self, resolution: str, group: str = "all") -> tuple[np.ndarray, np.ndarray]:
        """Return `delong` of the mean over the ``near``, ``far`` or all report sets."""
        sets = [one for one in self.protocol.of("report") if group in ("all", one.group)]
        return delong(self.of("id"), *[self.of(one.name, resolution) for one in sets])

    def per_image(self) -> pd.DataFrame:
        """Return the per-image table that `dlsr.save_results` writes."""
        titles = self.methods["title"] + self.methods["features"].map({"z0": "", "raw": " (raw)"})
        parts = []
        for (name, resolution), values in self.values.items():
            images = self.images[name, resolution]["image"].to_numpy()
            about = {"set": f"{name}, {resolution}", "image": images, "seed": 0}
            parts.append(pd.DataFrame(about).join(pd.DataFrame(values.T, columns=titles)))
        table = pd.concat(parts, ignore_index=True)
        partial = {name: frame.attrs.get("partial", "") for (name, _), frame in self.images.items()}
        table.attrs = {"about": provenance(pick_device()), "partial": partial}
        return table


def from_methods(protocol: Protocol, per_image: Mapping, eval_sets: Mapping) -> Scores:
    """Return ``per_image[features, kind, title][set, resolution]``, each (images,), as `Scores`.

    ``eval_sets`` has the features of the sets by the same keys (set, resolution).
    """
    rows = [[features, title, title, kind] for features, kind, title in per_image]
    values = {key: np.stack([one[key] for one in per_image.values()]) for key in eval_sets}
    images = {}
    for key, features in eval_sets.items():
        one = features.images
        images[key] = pd.DataFrame({"image": one.ids, "label": one.labels})
        images[key].attrs["partial"] = features.images.partial
    return Scores(protocol, pd.DataFrame(rows, columns=METHOD), values, images)


def read_table(name: str) -> pd.DataFrame:
    """Return a committed table of the chapter by its name, such as ``paired``."""
    numbers = {column: [""] for column in ("multiply_adds", "p", "p_holm")}
    file = _committed(f"comparison/{name}.csv")
    table = pd.read_csv(file, keep_default_na=False, na_values=numbers)
    table = table.drop(columns="stamp", errors="ignore").rename(columns={"view": "resolution"})
    if "idea" in table:
        table.loc[table["idea"].str.startswith("the paper's"), "kind"] = "paper"
    return _renamed(table)


def read_choice() -> dict:
    """Return what the committed search ended in: its score, the best baseline and all settings."""
    return json.loads(_committed("choice.json").read_text("utf-8"))


def read_scores(encoder: str, part: str = "") -> Scores:
    """Return the committed scores; ``part="half"`` are those of the control fitted at half size."""
    folder = _committed(f"comparison/scores/{encoder}")
    tables = [pq.read_table(file) for file in sorted((folder / part).glob("*-*.parquet"))]
    about = [json.loads(table.schema.metadata[b"dlsr"]) for table in tables]
    columns = np.stack([table["score"].to_numpy() for table in tables])
    images = pd.read_parquet(folder / "images.parquet")
    if part:  # the same images twice, in the order of the scores
        control = images[images["place"] == "control@"]
        images = pd.concat([control.assign(place="control@half"), control])
    keys = {p: tuple(p.replace("matched, ", "").split("@")) for p in images["place"].unique()}
    protocol = next(one for one in PROTOCOLS["pack"] if one.encoder == encoder)
    here = {place: (images["place"] == place).to_numpy() for place in keys}
    return Scores(
        protocol,
        _renamed(pd.DataFrame(about)[METHOD]),
        {key: columns[:, here[place]] for place, key in keys.items()},
        {key: images[here[place]].reset_index() for place, key in keys.items()},
    )


def beside(scores: Scores, per_image: pd.DataFrame, kind: str = "other") -> Scores:
    """Return ``scores`` with the methods of a later page as more rows, on the same images.

    ``per_image`` is what `Scores.per_image` returned there. Images are matched by their names.
    Sets that the later page has not scored are left out.
    """
    titles = [name for name in per_image if name not in (*KEYS, "experiment")]
    values = {}
    for key, known in scores.values.items():
        rows = per_image[per_image["set"] == ", ".join(key)].set_index("image")
        if len(rows):
            added = rows.loc[scores.images[key]["image"], titles]
            values[key] = np.vstack([known, added.to_numpy().T])
    added = pd.DataFrame([["z0", title, title, kind] for title in titles], columns=METHOD)
    methods = pd.concat([scores.methods, added], ignore_index=True)
    return Scores(scores.protocol, methods, values, scores.images)


def _committed(name: str) -> Path:
    file = project_folder() / "results" / name
    if not file.exists():
        raise UserError(f"{file} is not here; change to the project's folder or choose 'demo'.")
    return file


def _renamed(table: pd.DataFrame) -> pd.DataFrame:
    return table.replace({name: new for name, new in OLD_VALUES.items() if name in table})


def resample(scores: Scores, resolution: str) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Return AUROC and FPR95 of all methods on all sets and means, also under resampled images.

    That is a frame of sets and means, the values (metrics, methods, sets), and the same with draws
    as a last axis. All methods meet the same draws, and all sets the same draws of ID images.
    """
    on_id, ood, places = scores.of("id"), {}, []
    scored = {name for name, _ in scores.values}
    sets = [one for one in scores.protocol.sets if one.name in scored]
    for one in sets:
        ood[one.name] = scores.of(one.name, resolution)
        places.append([one.name, one.group, one.stage, ood[one.name].shape[1]])
    for one in scores.protocol.of("report"):
        labels = scores.images[scores.key(one.name, resolution)]["label"]
        others = ~overlaps(one.dataset, labels)
        if not others.all():
            name = f"{one.name}, no overlap"
            ood[name] = ood[one.name][:, others]
            places.append([name, one.group, "no overlap", others.sum()])
    drawn = [bootstrap(on_id, values, draws=scores.protocol.draws) for values in ood.values()]
    draws = np.stack([np.stack([of[name] for of in drawn], axis=1) for name in METRICS])
    pairs = [[*zip(on_id, values, strict=True)] for values in ood.values()]
    values = [[[of(*pair) for pair in one] for one in pairs] for of in METRICS.values()]
    values = np.swapaxes(values, 1, 2)
    for mean in MEANS:
        over = [i for i, s in enumerate(sets) if s.stage == "report" and mean in (s.group, "all")]
        places.append([mean, mean, "mean", sum(places[i][3] for i in over)])
        values = np.concatenate([values, values[:, :, over].mean(2, keepdims=True)], 2)
        draws = np.concatenate([draws, draws[:, :, over].mean(2, keepdims=True)], 2)
    return pd.DataFrame(places, columns=["ood", "group", "stage", "n_ood"]), values, draws


def same_features(scores: Scores, resolution: str, drawn: tuple | None = None) -> pd.DataFrame:
    """Return AUROC and FPR95 of every method on every set and mean, with 95 % intervals.

    ``drawn`` is what `resample` returned before, to save its time.
    """
    places, values, draws = drawn or resample(scores, resolution)
    metrics = pd.DataFrame({"metric": [*METRICS]})
    table = scores.methods.merge(metrics, how="cross").merge(places, how="cross")
    by_method = (x.swapaxes(0, 1) for x in (values, *_ends(draws)))
    about = {"encoder": scores.protocol.encoder, "resolution": resolution}
    return table.assign(**about, **_percent(*by_method), n_id=scores.of("id").shape[1])


def paired(scores: Scores, resolution: str, drawn: tuple | None = None) -> pd.DataFrame:
    """Return the fused score's AUROC less that of every other method, on the same images.

    On the mean of all report sets, ``p`` is DeLong's and ``p_holm`` corrected over the baselines.
    """
    places, values, draws = drawn or resample(scores, resolution)
    kinds = scores.methods["kind"]
    fused, others = np.flatnonzero(kinds == "fused")[0], ~kinds.isin(["fused", "layer"]).to_numpy()
    table = scores.methods[others].merge(places[["ood"]], how="cross")
    ahead, drawn_ahead = (x[0, fused] - x[0, others] for x in (values, draws))
    about = {"encoder": scores.protocol.encoder, "resolution": resolution}
    table = table.assign(**about, **_percent(ahead, *_ends(drawn_ahead), name="difference"))
    _, covariance = scores.of_mean(resolution)
    variances = _variances(covariance, fused)[others]
    of_all = table["ood"] == "all"
    table.loc[of_all, "p"] = [*map(paired_p, table.loc[of_all, "difference"] / 100, variances)]
    tested = of_all & (table["kind"] == "baseline")
    table.loc[tested, "p_holm"] = holm(table.loc[tested, "p"])
    return table


def differences(
    scores: Scores, of: Sequence[str], resolution: str, group: str = "all"
) -> pd.DataFrame:
    """Return the mean AUROC of some methods less that of every other, with DeLong's intervals.

    ``of`` are their names or titles on z0; ``group`` is ``near``, ``far`` or ``all``.
    """
    methods, parts = scores.methods.reset_index(drop=True), []
    means, covariance = scores.of_mean(resolution, group)
    for name in of:
        called_so = (methods[["name", "title"]] == name).any(axis=1)
        own = methods.index[called_so & (methods["features"] == "z0")][0]
        ahead, reach = means[own] - means, NORMAL_975 * np.sqrt(_variances(covariance, own))
        about = {"encoder": scores.protocol.encoder, "of": name}
        numbers = _percent(ahead, ahead - reach, ahead + reach, name="difference")
        parts.append(methods.assign(**about, **numbers).drop(index=own))
    return pd.concat(parts, ignore_index=True)


def aurocs(scores: Scores, on_id: np.ndarray, on_ood: np.ndarray, about: Mapping) -> pd.DataFrame:
    """Return every method's AUROC, with DeLong's interval, of scores (methods, images)."""
    value, covariance = delong(on_id, on_ood)
    reach = NORMAL_975 * np.sqrt(np.diag(covariance))
    ends = np.maximum(value - reach, 0), np.minimum(value + reach, 1)
    about = {"encoder": scores.protocol.encoder, **about, "n_ood": on_ood.shape[1]}
    return scores.methods.assign(**about, **_percent(value, *ends))


def _variances(covariance: np.ndarray, own: int) -> np.ndarray:
    """Return the variance of one method's AUROC less every method's."""
    return covariance[own, own] + np.diag(covariance) - 2 * covariance[own]


def _ends(draws: np.ndarray) -> np.ndarray:
    return np.quantile(draws, [0.025, 0.975], axis=-1)


def _percent(value: np.ndarray, low: np.ndarray, high: np.ndarray, *, name: str = "value") -> dict:
    columns = {name: value, "ci_low": low, "ci_high": high}
    return {column: 100 * numbers.ravel() for column, numbers in columns.items()}
