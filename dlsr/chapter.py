"""The chapter's report: the chosen detectors on the report sets, and the tables that the pages read."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from dlsr.baselines import Detector, Mahalanobis
from dlsr.comparison import CONTROLS, REPORT, STUDIES, VIEWS, Data, Study, lists
from dlsr.datasets import UserError
from dlsr.encoders import get_encoder
from dlsr.experiments import OURS
from dlsr.features import Features, code_hash, layer_slices, replace_file
from dlsr.metrics import METRICS, interval
from dlsr.rivals import RIVALS, size_in_bytes
from dlsr.search import (
    KINDS,
    RIVALS_CODE,
    SEARCH,
    TIMED,
    VARIANTS_CODE,
    Bench,
    bench_of,
    chapter_folder,
    choice_file,
    choose,
    fit_rival,
    read_choice,
    read_table,
    rival_training_seconds,
    search,
    search_file,
    search_sha256,
    stamp_of,
    tried,
)
from dlsr.significance import delong, delong_of_mean, holm, paired_bootstrap, paired_p
from dlsr.variants import VARIANTS, Variant, without_network

CHAPTER = {  # its notebooks
    "40_same_features": "Does diffusion help? The same features for all",
    "41_resolution": "How much of it was resolution",
    "42_intervals": "Which differences are certain",
    "43_search": "The search for a better score",
    "44_what_to_use": "What to use when",
}
PAPERS = {line.score: line.title for line in OURS}
RECOMMENDED = "recommended"
CONTROL_TITLES = {
    "removed": "without the LFDN",
    "linear": "with the linear denoiser",
    "untrained": "with an untrained LFDN",
}
RESEEDED = "reseeded"
COMPARED = ("rival", "paper", RECOMMENDED)  # kinds of entries that are ranked; the others explain them
INSTEAD = {  # what stands in the network's place, as `Bench.denoiser` names it
    "removed": "untrained/", "linear": "linear/", "untrained": "untrained/", RESEEDED: "reseeded/"
}  # fmt: skip
NORMAL_975 = 1.959964  # the normal's 97.5 % quantile
HALF_CALIBRATION = 10  # one in so many of the control's training images calibrates


@dataclass(frozen=True)
class Entry:
    """A detector of the report: its features, its name, and what it is."""

    features: str
    name: str
    title: str
    kind: str  # rival, paper, recommended, control, seed or layer
    setting: str = ""

    @property
    def file(self) -> str:
        return f"{self.features}-{self.name}.parquet"


def entries(choice: Mapping, channels: tuple[int, ...], part: str = "") -> list[Entry]:
    """All detectors of the report, in the order of its tables; of the control ``half`` those on z0."""
    rivals = [
        Entry(kind, name, RIVALS[name].title, "rival", setting)
        for kind in KINDS
        for name, setting in ((name, choice["settings"][kind][name]) for name in RIVALS)
    ]
    papers = [Entry("z0", score, title, "paper") for score, title in PAPERS.items()]
    own = [Entry("z0", RECOMMENDED, "recommended", "recommended", choice["score"])]
    own += [Entry("z0", name, title, "control", choice["score"]) for name, title in CONTROL_TITLES.items()]
    own.append(Entry("z0", RESEEDED, "trained from another seed", "seed", choice["score"]))
    layers = [
        Entry("z0", f"{name}-layer{m + 1}", f"{title}, layer {m + 1}", "layer", str(m))
        for name, title in (("mse", "MSE"), ("mahalanobis", "Mahalanobis"))
        for m in range(len(channels))
    ]
    if part == "half":
        return [e for e in (*papers, *own, *rivals) if e.features == "z0" and e.kind in COMPARED]
    return [*papers, *own, *rivals, *layers]


def fit_entry(bench: Bench, entry: Entry) -> tuple[Callable[[str, Features], np.ndarray], int]:
    """A detector of the report fitted, as a function of a place and its features; and its bytes."""
    if entry.kind == "rival":
        found, detector = fit_rival(bench, RIVALS[entry.name], entry.setting, entry.features)
        return found, size_in_bytes(detector)
    if entry.kind == "layer":
        return _fit_layer(bench, entry), 0
    variant = _variant(entry)
    network = INSTEAD.get(entry.name, "") + variant.network
    if entry.name == "removed":
        variant = replace(variant, score=without_network(variant.score) or variant.score)
    found, score = bench.fit_variant(variant, network)
    denoiser = {} if entry.name == "removed" else bench.denoiser(network).state_dict()
    return found, _kept(score) + sum(tensor.nbytes for tensor in denoiser.values())


def _variant(entry: Entry) -> Variant:
    return VARIANTS[PAPERS[entry.name] if entry.kind == "paper" else entry.setting]


def _kept(score: Any) -> int:
    """Bytes of what a fitted score of `variants` keeps."""
    if isinstance(score, Detector):
        return size_in_bytes(score)
    if isinstance(score, np.ndarray):
        return score.nbytes
    parts = score if isinstance(score, list) else [v for name, v in vars(score).items() if name.endswith("_")]
    return sum(map(_kept, parts))


def _fit_layer(bench: Bench, entry: Entry) -> Callable[[str, Features], np.ndarray]:
    """One layer alone: its squared error by the paper's reconstruction, or one Gaussian."""
    m = int(entry.setting)
    if entry.name.startswith("mse"):
        return lambda place, features: bench.bank(place, features, "base").papers["mse", str(m + 1)]
    columns = layer_slices(bench.channels)[m]
    gaussian = Mahalanobis().fit(bench.fitted.z0()[:, columns])
    return lambda _, features: gaussian.ood_score(features.z0()[:, columns])


def report(study: Study, profile: str, *, progress: bool = True) -> None:
    """Score every place by every detector of the report; what is there already is kept."""
    choice = read_choice(profile)
    data = Data(study, progress=progress)
    folder = chapter_folder(profile) / "scores" / study.encoder
    places = _places(data)
    _write_images(folder / "images.parquet", places)
    _score_all(bench_of(data, progress=progress), choice, places, folder, progress=progress)
    half = data.of_control(study.id_train, "half")
    calibrates = np.arange(len(half)) % HALF_CALIBRATION == 0
    rows = half.rows
    bench = Bench(study, half.take(rows[~calibrates]), half.take(rows[calibrates]), progress=progress)
    places = {("control", name): data.of_control(study.id_test, name) for name in ("half", "")}
    _score_all(bench, choice, places, folder, "half", progress=progress)


def _places(data: Data) -> dict[tuple[str, str], Features]:
    """The features of every (set, view) of the report, ID first; ``control`` is ID images, altered."""
    study = data.study
    places = {("id", "native"): data.of_id(study.id_test)}
    for ood in study.sets:
        resized = data.images(ood.dataset).size != study.id_size
        if ood.stage == REPORT or resized:  # a development set only shows what its resolution does
            views = VIEWS if ood.stage == REPORT else VIEWS[:2]
            for view in views if resized else VIEWS[:1]:
                places[ood.name, view] = data.of_ood(ood, view)
    return places | {("control", name): data.of_control(study.id_test, name) for name in ("", *CONTROLS[1:])}


def _score_all(
    bench: Bench,
    choice: Mapping,
    places: Mapping[tuple[str, str], Features],
    folder: Path,
    part: str = "",
    *,
    progress: bool,
) -> None:
    todo, first = entries(choice, bench.channels, part), next(iter(places.values()))
    timed = first.take(first.rows[:TIMED])
    for entry in tqdm(todo, desc=f"{folder.name} {part}", disable=not progress):
        stamp = _entry_stamp(bench.study, entry)
        file = folder / part / entry.file
        if file.is_file() and _about(file)["stamp"] == stamp:
            continue
        training = _training_seconds(bench, entry)
        began = time.perf_counter()
        score, size = fit_entry(bench, entry)
        fit_seconds = training + time.perf_counter() - began
        found = {place: score("@".join(place), features) for place, features in places.items()}
        began = time.perf_counter()
        score(f"timing of {entry.file}", timed)  # a place of its own, of which nothing is kept from before
        rate = (time.perf_counter() - began) / len(timed)
        about = asdict(entry) | {
            "stamp": stamp, "fit_seconds": fit_seconds, "score_microseconds": 1e6 * rate, "bytes": size,
            "n_fit": len(bench.fitted), "choice": choice["search_sha256"],
        }  # fmt: skip
        _write_scores(file, found, about)


def _training_seconds(bench: Bench, entry: Entry) -> float:
    """Of a network that the cache may hold, and that is trained when this returns; 0 without one."""
    if entry.kind == "rival":
        return rival_training_seconds(bench, RIVALS[entry.name], entry.setting, entry.features)
    if entry.kind not in ("paper", RECOMMENDED):
        return 0.0
    name = _variant(entry).network
    bench.network(name)
    return bench.training_seconds(name)


def _entry_stamp(study: Study, entry: Entry) -> str:
    return stamp_of(study, RIVALS_CODE if entry.kind == "rival" else VARIANTS_CODE, entry.setting)


def _write_scores(file: Path, found: Mapping[tuple[str, str], np.ndarray], about: Mapping) -> None:
    table = pa.table({
        "place": np.repeat(["@".join(place) for place in found], list(map(len, found.values()))),
        "score": np.concatenate(list(found.values())).astype(np.float32),
    })  # fmt: skip
    table = table.replace_schema_metadata({"dlsr": json.dumps(about)})
    options = {"compression": "zstd", "use_dictionary": ["place"], "use_byte_stream_split": ["score"]}
    replace_file(file, lambda path: pq.write_table(table, path, **options))


def _write_images(file: Path, places: Mapping[tuple[str, str], Features]) -> None:
    """Which image each row of the scores is, and its class."""
    table = pd.concat(
        pd.DataFrame({"place": "@".join(place), "image": f.ids, "label": f.labels})
        for place, f in places.items()
    )
    replace_file(file, lambda path: table.to_parquet(path, index=False, compression="zstd"))


def _about(file: Path) -> dict:
    return json.loads(pq.read_schema(file).metadata[b"dlsr"])


# The tables


@dataclass(frozen=True)
class Scores:
    """What `report` wrote of one study: for each detector its scores by place, and the images' classes."""

    study: Study
    entries: tuple[Entry, ...]
    about: Mapping[str, dict]  # by an entry's file
    places: Mapping[str, Mapping[str, np.ndarray]]  # by an entry's file, then by ``set@view``
    images: Mapping[str, pd.DataFrame]  # by ``set@view``: image and label

    def of(self, place: str) -> np.ndarray:
        """(detectors, N); a set of the ID set's size is the same in all views."""
        return np.stack([self.places[entry.file][self.place(place)] for entry in self.entries])

    def place(self, place: str) -> str:
        """The place that holds a set's images in a view."""
        return place if place in self.images else f"{place.split('@')[0]}@native"


def read_scores(study: Study, profile: str, part: str = "") -> Scores:
    """The scores of the report; of its control at half size with ``part="half"``."""
    folder = chapter_folder(profile) / "scores" / study.encoder
    channels = get_encoder(study.encoder).channels()
    listed = tuple(entries(read_choice(profile), channels, part))
    about, places = {}, {}
    for entry in listed:
        table = pq.read_table(folder / part / entry.file)
        about[entry.file] = json.loads(table.schema.metadata[b"dlsr"])
        places[entry.file] = _by_place(table.to_pandas())
    images = pd.read_parquet(folder / "images.parquet")
    found = {place: rows for place, rows in images.groupby("place", sort=False)}
    if part:
        found = {place: found["control@"] for place in next(iter(places.values()))}
    return Scores(study, listed, about, places, found)


def _by_place(table: pd.DataFrame) -> dict[str, np.ndarray]:
    return {place: rows["score"].to_numpy() for place, rows in table.groupby("place", sort=False)}


def no_overlap(dataset: str, labels: pd.Series) -> np.ndarray:
    """Which images are of no class that is a kind of one of CIFAR-10's, by the committed list."""
    return ~labels.isin(list(lists()["overlap"].get(dataset, {}))).to_numpy()


MEANS = ("near", "far", "all")  # over the report's sets, unweighted
_ENTRY = ["encoder", "features", "name", "title", "kind"]
SAME_FEATURES = [
    *_ENTRY, "view", "ood", "group", "stage", "metric", "value", "ci_low", "ci_high", "n_id", "n_ood",
]  # fmt: skip


def same_features(scores: Scores, view: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """AUROC and FPR95 of every detector on every set and mean, with intervals; and the paired differences.

    One set of bootstrap draws an ID and OOD pair serves all detectors, and every OOD set meets the same
    draws of ID. The differences are of the recommended score from each other detector's.
    """
    study, on_id = scores.study, scores.of("id@native")
    sets = [one for one in study.sets if f"{one.name}@native" in scores.images]
    ood = {one.name: scores.of(f"{one.name}@{view}") for one in sets}
    about = {one.name: {"group": one.group, "stage": one.stage} for one in sets}
    for one in study.of(REPORT):
        labels = scores.images[scores.place(f"{one.name}@{view}")]["label"]
        kept = no_overlap(one.dataset, labels)
        if not kept.all():
            ood[f"{one.name}, no overlap"] = ood[one.name][:, kept]
            about[f"{one.name}, no overlap"] = {"group": one.group, "stage": "no overlap"}
    draws = paired_bootstrap(on_id, ood)
    sizes = {name: values.shape[1] for name, values in ood.items()}
    points = {
        metric: np.array([[METRICS[metric](*pair) for pair in zip(on_id, values, strict=True)]
                          for values in ood.values()]).T
        for metric in draws
    }  # fmt: skip
    places = list(ood)
    for mean in MEANS:
        over = [i for i, one in enumerate(sets) if one.stage == REPORT and mean in (one.group, "all")]
        for metric in draws:
            draws[metric] = np.concatenate([draws[metric], draws[metric][:, over].mean(1, keepdims=True)], 1)
            points[metric] = np.concatenate(
                [points[metric], points[metric][:, over].mean(1, keepdims=True)], 1
            )
        places.append(mean)
        about[mean] = {"group": mean, "stage": "mean"}
        sizes[mean] = sum(sizes[sets[i].name] for i in over)
    cells = []
    for i, entry in enumerate(scores.entries):
        for metric, values in points.items():
            for j, place in enumerate(places):
                low, high = (100 * end for end in interval(draws[metric][i, j]))
                found = {"metric": metric, "value": 100 * values[i, j], "ci_low": low, "ci_high": high}
                counts = {"n_id": on_id.shape[1], "n_ood": sizes[place]}
                where = {
                    "encoder": study.encoder,
                    **_named(entry),
                    "view": view,
                    "ood": place,
                    **about[place],
                }
                cells.append(where | found | counts)
    return pd.DataFrame(cells)[SAME_FEATURES], _paired(scores, view, on_id, ood, points, draws, places)


def _named(entry: Entry) -> dict[str, str]:
    return {name: getattr(entry, name) for name in _ENTRY[1:]}


def _paired(scores: Scores, view: str, on_id, ood, points, draws, places) -> pd.DataFrame:
    """The recommended score's AUROC less each other detector's; Holm over the baselines, on the mean."""
    own = next(i for i, entry in enumerate(scores.entries) if entry.kind == RECOMMENDED)
    report_sets = {one.name: (on_id, ood[one.name]) for one in scores.study.of(REPORT)}
    _, covariance = delong_of_mean(report_sets)
    rows = []
    for i, entry in enumerate(scores.entries):
        if i == own or entry.kind == "layer":
            continue
        for j, place in enumerate(places):
            difference = points["auroc"][own, j] - points["auroc"][i, j]
            low, high = interval(draws["auroc"][own, j] - draws["auroc"][i, j])
            row = {"encoder": scores.study.encoder, **_named(entry), "view": view, "ood": place}
            row |= {"difference": 100 * difference, "ci_low": 100 * low, "ci_high": 100 * high}
            if place == "all":
                variance = covariance[own, own] + covariance[i, i] - 2 * covariance[own, i]
                row["p"] = paired_p(difference, variance)
            rows.append(row)
    table = pd.DataFrame(rows)
    tested = (table["ood"] == "all") & (table["kind"] == "rival")
    table.loc[tested, "p_holm"] = holm(table.loc[tested, "p"])
    return table


def other_seed(scores: Scores) -> pd.DataFrame:
    """The recommended score by either seed's network less each other detector; intervals by DeLong.

    Of the mean over all report sets, at matched resolution; ``of`` names whose difference it is.
    """
    on_id = scores.of("id@native")
    means, covariance = delong_of_mean(
        {one.name: (on_id, scores.of(f"{one.name}@matched")) for one in scores.study.of(REPORT)}
    )
    detectors = [(i, entry) for i, entry in enumerate(scores.entries) if entry.kind != "layer"]
    seeds = [(i, entry) for i, entry in detectors if entry.kind in (RECOMMENDED, "seed")]
    rows = []
    for (own, of), (i, entry) in product(seeds, detectors):
        if i == own:
            continue
        variance = covariance[own, own] + covariance[i, i] - 2 * covariance[own, i]
        difference, reach = means[own] - means[i], NORMAL_975 * np.sqrt(variance)
        row = {"encoder": scores.study.encoder, "of": of.name, **_named(entry)}
        ends = {"ci_low": 100 * (difference - reach), "ci_high": 100 * (difference + reach)}
        rows.append(row | {"difference": 100 * difference} | ends)
    return pd.DataFrame(rows)


def filters(scores: Scores) -> pd.DataFrame:
    """AUROC after each filter of the way to the ID set's size, of the same pick of images, and unmatched."""
    rows, on_id = [], scores.of("id@native")
    for one in scores.study.of(REPORT):
        place = f"{one.name}@matched, box"
        if place not in scores.images:
            continue
        picked = scores.images[place]["image"]
        for view in VIEWS:
            images = scores.images[f"{one.name}@{view}"]["image"]
            values = scores.of(f"{one.name}@{view}")[:, images.isin(picked).to_numpy()]
            name = {"matched": "matched, bilinear"}.get(view, view)
            rows += _aurocs(scores, on_id, values, {"view": name, "ood": one.name, "group": one.group})
    return pd.DataFrame(rows)


def controls(scores: Scores, half: Scores) -> pd.DataFrame:
    """AUROC of ID test images against the same ones altered: in resolution, and in two harmless ways."""
    plain = scores.of("control@")
    rows = _aurocs(half, half.of("control@half"), half.of("control@"), {"control": "half"})
    for control in CONTROLS[1:]:
        rows += _aurocs(scores, plain, scores.of(f"control@{control}"), {"control": control})
    return pd.DataFrame(rows)


def _aurocs(scores: Scores, on_id: np.ndarray, values: np.ndarray, about: Mapping) -> list[dict]:
    """A row a detector: AUROC with its interval by DeLong."""
    found, covariance = delong(on_id, values)
    reach = NORMAL_975 * np.sqrt(np.diag(covariance))
    return [
        {"encoder": scores.study.encoder, **_named(entry), **about, "value": 100 * value}
        | {"ci_low": 100 * max(value - by, 0), "ci_high": 100 * min(value + by, 1), "n_ood": values.shape[1]}
        for entry, value, by in zip(scores.entries, found, reach, strict=True)
    ]


def costs(scores: Scores) -> pd.DataFrame:
    """What each detector costs: seconds to fit, microseconds to score an image, bytes; and its setting."""
    about = ("setting", "fit_seconds", "score_microseconds", "bytes", "n_fit")
    return pd.DataFrame(
        {"encoder": scores.study.encoder, **_named(entry)}
        | {name: scores.about[entry.file][name] for name in about}
        for entry in scores.entries
        if entry.kind not in ("layer", "seed")
    )


TABLES = ("same_features", "paired", "other_seed", "filters", "controls", "costs")
TABLES_CODE = tuple(
    f"chapter.{name}"
    for name in (
        "no_overlap",
        "same_features",
        "_paired",
        "other_seed",
        "filters",
        "controls",
        "_aurocs",
        "costs",
    )
)


def write_tables(profile: str) -> None:
    """All tables of the chapter, from the scores; `search` writes its own."""
    found: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    for study in STUDIES[profile]:
        scores = read_scores(study, profile)
        both = [same_features(scores, view) for view in VIEWS[:2]]
        found["same_features"] += [cells for cells, _ in both]
        found["paired"] += [differences for _, differences in both]
        found["other_seed"].append(other_seed(scores))
        found["filters"].append(filters(scores))
        found["controls"].append(controls(scores, read_scores(study, profile, "half")))
        found["costs"].append(costs(scores))
    stamp = tables_stamp(profile)
    for name, parts in found.items():
        table = pd.concat(parts, ignore_index=True).assign(stamp=stamp)
        file = chapter_folder(profile) / f"{name}.csv"
        replace_file(file, lambda path, table=table: table.to_csv(path, index=False, float_format="%.6g"))


def tables_stamp(profile: str) -> str:
    """A hash of all scores and of the code that makes tables of them."""
    files = sorted((chapter_folder(profile) / "scores").rglob("*-*.parquet"))
    known = [[_about(file)["stamp"] for file in files], code_hash("metrics", "significance", *TABLES_CODE)]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]


# What pages read


def checked_profile(parameters: Mapping) -> str:
    """The profile, the one parameter that the chapter's notebooks have; anything else is refused."""
    unknown = [name for name in parameters if name != "profile"]
    if unknown:
        raise UserError(f"{', '.join(unknown)} was given; the chapter's notebooks take profile alone.")
    profile = parameters.get("profile", "demo")
    if profile not in STUDIES:
        raise UserError(f"The profile {profile!r} is unknown here; choose one of {', '.join(STUDIES)}.")
    return profile


def coverage(profile: str) -> pd.DataFrame:
    """The chapter's pages, as `reports.coverage` has the items; a cell is a value of a page's tables."""
    columns = ["item", "title", "profile", "measured", "cells", "date", "state"]
    if profile not in STUDIES:
        return pd.DataFrame(columns=columns)
    stands = state(profile)
    files = {name: chapter_folder(profile) / f"{name}.csv" for name in TABLES}
    files["search"] = search_file(STUDIES[profile][0], profile)
    counts = {name: len(read_table(file)) if file.is_file() else 0 for name, file in files.items()}
    rows = []
    for page, title in CHAPTER.items():
        cells = sum(counts[name] for name in READS[page])
        measured = cells if stands == "up to date" else 0
        rows.append([page, title, profile, measured, cells, "", stands])
    return pd.DataFrame(rows, columns=columns)


READS = {  # the tables that a page shows
    "40_same_features": ("same_features", "costs"),
    "41_resolution": ("filters", "controls"),
    "42_intervals": ("paired",),
    "43_search": ("search", "other_seed"),
    "44_what_to_use": ("costs",),
}


def state(profile: str) -> str:
    """``up to date``, ``not run``, or what is out of date."""
    if not choice_file(profile).is_file():
        return "not run"
    choice, first = read_choice(profile), STUDIES[profile][0]
    file = search_file(first, profile)
    wanted = {(about["kind"], about["features"], about["name"], about["setting"], about["stamp"])
             for about in tried(first)}  # fmt: skip
    old = read_table(file) if file.is_file() else pd.DataFrame(columns=SEARCH)
    held = set(zip(old["kind"], old["features"], old["name"], old["setting"], old["stamp"], strict=True))
    if not wanted <= held or choice["search_sha256"] != search_sha256(old):
        return "out of date: search"
    for study in STUDIES[profile]:
        channels = get_encoder(study.encoder).channels()
        for part in ("", "half"):
            for entry in entries(choice, channels, part):
                file = chapter_folder(profile) / "scores" / study.encoder / part / entry.file
                if not file.is_file() or _about(file)["stamp"] != _entry_stamp(study, entry):
                    return "out of date: scores"
    file = chapter_folder(profile) / f"{TABLES[-1]}.csv"
    if not file.is_file() or set(read_table(file)["stamp"]) != {tables_stamp(profile)}:
        return "out of date: tables"
    return "up to date"


def measured(profile: str, *, progress: bool = True) -> dict[str, pd.DataFrame]:
    """The chapter's tables by name, ``search`` among them; what is out of date is measured first.

    In this order: the search on development sets, by the first encoder; its choice; then every encoder
    on the report sets.
    """
    checked_profile({"profile": profile})
    if state(profile) != "up to date":
        first = STUDIES[profile][0]
        table = search(first, profile, progress=progress)
        if not choice_file(profile).is_file() or read_choice(profile)["search_sha256"] != search_sha256(
            table
        ):
            choose(first, table, profile)
        for study in STUDIES[profile]:
            report(study, profile, progress=progress)
        write_tables(profile)
    folder = chapter_folder(profile)
    found = {name: read_table(folder / f"{name}.csv") for name in TABLES}
    return found | {"search": read_table(search_file(STUDIES[profile][0], profile))}
