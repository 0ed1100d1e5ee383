"""From the scores of every image to tables: AUROC with intervals, beside the paper's values.

A per-image table has the columns ``set``, ``image`` and ``seed``, then one for each method, whose
scores are larger for OOD. A method that was run with fewer seeds has NaN for the others.
"""

import datetime
import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dlsr.cache import as_json, locked, replace_file
from dlsr.errors import UserError
from dlsr.features import Features
from dlsr.metrics import DRAWS, METRICS, bootstrap, interval
from dlsr.training import precision_of

AVERAGE = "average"  # the name, in tables, of the unweighted mean over OOD sets
KEYS = ["set", "image", "seed"]
GROUP = ["fit", "suffix", "seeds", "sets"]  # columns of the index that name files
LIBRARIES = ("torch", "timm", "numpy", "scikit-learn")


def settings(profiles: Mapping[str, dict], profile: str, **overrides: object) -> SimpleNamespace:
    """Return a profile's settings, in which a page's parameters replace what they name.

    A parameter of 0 or "" leaves the profile's own value. The profile ``read`` has the settings of
    ``pack``, else of ``paper``, and takes no others. Raises `UserError` for an unknown profile or
    name, another type, or a negative number.
    """
    measured = [name for name in ("pack", "paper") if name in profiles]
    known = ["read", *profiles] if measured else [*profiles]
    if profile not in known:
        raise UserError(f"profile={profile!r} was given; this page has {', '.join(known)}.")
    chosen = dict(profiles[measured[0] if profile == "read" else profile])
    for name, value in overrides.items():
        own = chosen.get(name)
        wrong = type(value) is not type(own) or (value and value < type(own)())
        if wrong or (value and profile == "read"):
            raise UserError(
                f"{name}={value!r} was given with the profile {profile!r}; its settings are "
                f"{chosen}, and 0 or '' takes one as it is; 'read' only shows committed results."
            )
        chosen[name] = value or own
    return SimpleNamespace(**chosen)


def score_sets(
    scores: Callable[[Features, int], Mapping[str, np.ndarray]],
    features: Mapping[str, Features],
    sets: Sequence[str],
    *,
    seeds: int = 1,
) -> pd.DataFrame:
    """Return the scores of every image of some sets as a per-image table.

    ``scores(features_of_a_set, seed)`` returns a score of every image for each method's name.
    """
    began, parts = time.perf_counter(), []
    for name, seed in ((name, seed) for name in sets for seed in range(seeds)):
        about = {"set": name, "image": list(features[name].ids), "seed": seed}
        parts.append(pd.DataFrame(about | dict(scores(features[name], seed))))
    table = pd.concat(parts, ignore_index=True)
    about = provenance(features[sets[0]].device, time.perf_counter() - began)
    partial = {name: of_set.images.partial for name, of_set in features.items()}
    table.attrs = {"about": about, "partial": partial}
    return table


def evaluate(
    per_image: pd.DataFrame, *, id_test: str, ood: Sequence[str] | None = None,
    metrics: Sequence[str] = ("auroc", "fpr95"), versus: str = "", draws: int = DRAWS,
) -> pd.DataFrame:  # fmt: skip
    """Return every method's metrics on each OOD set and on their unweighted mean, in percent.

    A row has ``id``, ``ood`` (``average`` for the mean), ``method``, ``metric``, ``value`` (the
    mean over seeds), ``ci_low`` and ``ci_high`` (95 %, over images), ``seeds``, ``seed_low``,
    ``seed_high``, ``n_id``, ``n_ood`` and ``versus``. With ``versus``, a method's name, there are
    also the AUROC differences from it, paired on the same images. ``ood`` defaults to all sets.
    """
    methods = [name for name in per_image if name not in KEYS]
    ood = list(ood or [name for name in per_image["set"].unique() if name != id_test])
    cells, known = {}, [*methods, "", *METRICS]
    if not {versus, *metrics} <= set(known):
        raise UserError(f"{versus!r} and {metrics} were given; known are {', '.join(known)}.")
    for name in ood:
        cells |= _cells(per_image, methods, id_test, name, metrics, draws)
    for method, metric in ((m, metric) for m in methods for metric in metrics if len(ood) > 1):
        of_sets = [cells.get((name, method, metric)) for name in ood]
        if None not in of_sets:
            points, spreads, n_id, n_ood = zip(*of_sets, strict=True)
            mean = np.mean(points, axis=0), np.mean(spreads, axis=0), n_id[0], sum(n_ood)
            cells[AVERAGE, method, metric] = mean
    rows = []
    for (name, method, metric), (points, spread, *sizes) in cells.items():
        about = {"id": id_test, "ood": name, "method": method, "metric": metric}
        about |= dict(zip(("n_id", "n_ood"), sizes, strict=True))
        rows.append(about | {"versus": ""} | _summary(points, spread.mean(0)))
        if versus and metric == "auroc" and method != versus:
            other_points, other_spread, *_ = cells[name, versus, metric]
            difference = np.atleast_1d(points.mean() - other_points.mean())
            summary = _summary(difference, spread.mean(0) - other_spread.mean(0))
            rows.append(about | {"versus": versus} | summary)
    table = pd.DataFrame(rows)
    table.attrs = dict(per_image.attrs)
    return table


def _cells(per_image, methods, id_test, ood, metrics, draws) -> dict[tuple, tuple]:
    """Return, by (set, method, metric): values of each seed, their bootstrap draws, and sizes."""
    pairs = {}
    for method in methods:
        scores = per_image.dropna(subset=[method])
        sets = [scores[scores["set"] == name].groupby("seed")[method] for name in (id_test, ood)]
        seeds = [seed for seed in sets[1].groups if seed in sets[0].groups]
        found = [tuple(by.get_group(seed).to_numpy() for by in sets) for seed in seeds]
        pairs |= {method: found} if found else {}
    if not pairs:
        raise UserError(f"There are no scores of both {id_test} and {ood}; compute them first.")
    sampled, cells, start = bootstrap([*chain(*pairs.values())], draws=draws), {}, 0
    for method, found in pairs.items():
        for metric in metrics:
            points = np.array([METRICS[metric](*pair) for pair in found])
            nothing = np.full((start + len(found), 1), np.nan)  # of metrics without intervals
            spread = sampled.get(metric, nothing)[start : start + len(found)]
            cells[ood, method, metric] = points, spread, *map(len, found[0])
        start += len(found)
    return cells


def _summary(points: np.ndarray, spread: np.ndarray) -> dict:
    low, high = interval(spread)
    found = {"value": points.mean(), "ci_low": low, "ci_high": high}
    found |= {"seed_low": points.min(), "seed_high": points.max()}
    return {name: 100 * float(value) for name, value in found.items()} | {"seeds": len(points)}


def paper_values(table: str) -> pd.DataFrame:
    """Return what the paper prints in a table, such as "table 8", one row for each value."""
    with files("dlsr").joinpath("paper_values.csv").open("r", encoding="utf-8") as file:
        values = pd.read_csv(file, keep_default_na=False, na_values={"value": [""], "sd": [""]})
    if table not in set(values["table"]):
        raise UserError(f"The paper has no {table!r}; there are {set(values['table'])}.")
    return values[values["table"] == table].reset_index(drop=True)


def beside_paper(table: pd.DataFrame, printed: str, *, setting: str = "") -> pd.DataFrame:
    """Return a table of `evaluate` with the columns ``paper`` and ``difference``.

    ``printed`` names the paper's table and ``setting`` one of its settings. The paper's mean is
    taken over the measured sets where it prints them all, else it is the printed one. A difference
    stands only where features and sets are the same.
    """
    values = paper_values(printed).query("setting == @setting")
    paper = values.set_index(["id", "method", "metric", "ood"])["value"].to_dict()
    same = set(values.loc[values["same"].astype(str) == "True", "method"])
    measured, found = [name for name in table["ood"].unique() if name != AVERAGE], []
    for row in table.to_dict("records"):
        where, whole = (row["id"], row["method"], row["metric"]), row["ood"] != AVERAGE
        value, of_sets = paper.get((*where, row["ood"])), [paper.get((*where, o)) for o in measured]
        if not whole and None not in of_sets:
            value, whole = float(np.mean(of_sets)), True
        value = np.nan if value is None or row["versus"] else value
        differs = row["value"] - value if whole and row["method"] in same else np.nan
        found.append(row | {"paper": value, "difference": differs})
    both = pd.DataFrame(found)
    both.attrs = dict(table.attrs)
    return both


def project_folder() -> Path:
    """Return the nearest folder above the current one that holds the book, else the current one."""
    here = Path.cwd()
    return next((f for f in (here, *here.parents) if (f / "_config.yml").is_file()), here)


def provenance(device: str = "", seconds: float = 0.0) -> dict[str, str | float]:
    """Return by what results are made now: commit, versions, device, day and seconds."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        options = {"cwd": project_folder(), "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(describe, **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "not in a repository"
    about = {"commit": commit, "device": device, "date": datetime.date.today().isoformat()}
    about |= {library: version(library) for library in LIBRARIES}
    about |= {"precision": precision_of(device or "cpu"), "seconds": round(seconds, 1)}
    return about | {"seeding": "v1"}


def origin(per_image: pd.DataFrame) -> str:
    """Return one sentence on where scores come from: commit, day and device."""
    about = per_image.attrs["about"]
    about = about | {"commit": about["commit"] or "(not recorded)"}
    text = "These numbers are from commit {commit}, {date}, on {device} (seeding {seeding})."
    return text.format(**about)


def save_results(
    page: str, per_image: Mapping[str, pd.DataFrame], table: pd.DataFrame, *, profile: str,
    results_dir: str = "",
) -> Path:  # fmt: skip
    """Write a page's computed results and return their folder.

    ``per_image`` are per-image tables by the experiment's name. The scores go to
    ``scores/<page>-<profile>.parquet`` and the table, with its provenance, to
    ``<page>-<profile>.csv`` in ``results_dir``, which is ``_build/results`` if it is empty.
    """
    folder = Path(results_dir) if results_dir else project_folder() / "_build" / "results"
    frames = [frame.assign(experiment=name) for name, frame in per_image.items()]
    attrs, name = dict(frames[0].attrs), f"{page}-{profile}"
    attrs["partial"] = {k: v for frame in frames for k, v in frame.attrs["partial"].items()}
    scores = pa.Table.from_pandas(pd.concat(frames), preserve_index=False)
    scores = scores.replace_schema_metadata({"dlsr": as_json(attrs)})
    rows = table.assign(page=page, profile=profile, **attrs["about"])
    options = {"index": False, "float_format": "%.4f", "lineterminator": "\n"}
    with locked(folder / name):
        file = folder / "scores" / f"{name}.parquet"
        replace_file(file, lambda path: pq.write_table(scores, path, compression="zstd"))
        replace_file(folder / f"{name}.csv", lambda path: rows.to_csv(path, **options))
    return folder


def read_scores(page: str, experiment: str = "", *, profile: str = "pack") -> pd.DataFrame:
    """Return the committed per-image table of a page's experiment, out of ``results/``.

    Where ``scores/<page>-<profile>.parquet`` is not there, ``pages.csv`` says in which files and
    columns of an older form the scores are. Raises `UserError` if there are none.
    """
    folder = project_folder() / "results"
    file, index = folder / "scores" / f"{page}-{profile}.parquet", folder / "pages.csv"
    if file.is_file():
        table = pq.read_table(file)
        frame = table.to_pandas().query("experiment == @experiment").drop(columns="experiment")
        frame = frame.dropna(axis=1, how="all").reset_index(drop=True)
        frame.attrs = json.loads(table.schema.metadata[b"dlsr"])
        if len(frame):
            return frame
    if profile == "pack" and index.is_file():
        rows = pd.read_csv(index, dtype=str, keep_default_na=False)
        rows = rows.query("page == @page and experiment == @experiment")
        if len(rows):
            return _read_old(folder / "scores", rows)
    raise UserError(
        f"There are no committed scores of {page} {experiment} in {folder}; run this in the "
        "project's folder, or choose the profile 'demo', which computes and needs no data."
    )


def _read_old(folder: Path, index: pd.DataFrame) -> pd.DataFrame:
    """Read files of the older form; the index says in which file and column a method's are."""
    parts, partial, devices = {}, {}, set()
    for (fit, suffix, seeds, sets), rows in index.groupby(GROUP, sort=False):
        for name, seed in ((name, seed) for name in sets.split() for seed in seeds.split()):
            file = f"{name.replace('/', '-')}{suffix}.parquet"
            table = pq.read_table(folder / fit.format(seed=seed) / file)
            about = json.loads(table.schema.metadata[b"dlsr"])["about"]
            where = {"set": name, "image": table["image"].to_pylist(), "seed": int(seed)}
            columns = zip(rows["method"], rows["column"], strict=True)
            scores = {method: table[column].to_numpy() for method, column in columns}
            parts.setdefault((name, seed), []).append(pd.DataFrame(where | scores).set_index(KEYS))
            partial |= {name: about["partial"], about["id_train"]: about["train_partial"]}
            devices.add(about["device"])
    frame = pd.concat([pd.concat(part, axis=1).reset_index() for part in parts.values()])
    frame = frame[[*KEYS, *dict.fromkeys(index["method"])]].reset_index(drop=True)
    about = {"commit": "", "date": max(index["date"]), "device": ", ".join(sorted(devices))}
    frame.attrs = {"about": about | {"seeding": "v0"}, "partial": partial}
    return frame
