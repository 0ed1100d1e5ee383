"""From the scores of every image to tables: AUROC with intervals, beside the paper's values.

A per-image table has the columns ``set``, ``image`` and ``seed``, then one for each method, whose
scores are larger for OOD. A method that was run with fewer seeds has NaN for the others.
"""

import json
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from dlsr.cache import locked, replace_file
from dlsr.errors import UserError
from dlsr.features import Features
from dlsr.metrics import DRAWS, METRICS, bootstrap
from dlsr.training import precision_of

AVERAGE = "average"  # the name, in tables, of the unweighted mean over OOD sets
KEYS = ["set", "image", "seed"]


def settings(profiles: Mapping[str, dict], profile: str, **overrides: object) -> SimpleNamespace:
    """Return a profile's settings, in which a page's parameters replace what they name.

    A parameter of 0 or "" leaves the profile's own value. The profile ``read`` has the settings of
    ``pack``, else of ``paper``, and takes no others. Raises `UserError` for an unknown profile or
    name, another type, or a negative number.
    """
    measured = [profiles[name] for name in ("pack", "paper") if name in profiles]
    known = {"read": measured[0], **profiles} if measured else profiles
    if profile not in known:
        raise UserError(f"profile={profile!r} was given; this page has {', '.join(known)}.")
    chosen = dict(known[profile])
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
    scores: Callable[[Features, int], Mapping[str, np.ndarray]], features: Mapping[str, Features],
    sets: Sequence[str], *, seeds: int = 1,
) -> pd.DataFrame:  # fmt: skip
    """Return the scores of every image of some sets as a per-image table.

    ``scores(features_of_a_set, seed)`` returns a score of every image for each method's name.
    """
    began, parts = time.perf_counter(), []
    for name, seed in product(sets, range(seeds)):
        about = {"set": name, "image": list(features[name].images.ids), "seed": seed}
        parts.append(pd.DataFrame(about | dict(scores(features[name], seed))))
    table = pd.concat(parts, ignore_index=True)
    about = provenance(features[sets[0]].device, time.perf_counter() - began)
    about |= {"features": features[sets[0]].backend}
    partial = {name: of_set.images.partial for name, of_set in features.items()}
    table.attrs = {"about": about, "partial": partial}
    return table


def evaluate(
    per_image: pd.DataFrame, *, id_test: str, ood: Sequence[str] | None = None,
    metrics: Sequence[str] = tuple(METRICS), versus: str = "", draws: int = DRAWS,
) -> pd.DataFrame:  # fmt: skip
    """Return every method's metrics on each OOD set and on their unweighted mean, in percent.

    A row has ``id``, ``ood`` (``average`` for the mean), ``method``, ``metric``, ``value`` (the
    mean over seeds), ``ci_low`` and ``ci_high`` (95 %, over images), ``seeds``, ``seed_low``,
    ``seed_high``, ``n_id``, ``n_ood`` and ``versus``. With ``versus``, a method's name, there are
    also the AUROC differences from it, paired on the same images. ``ood`` defaults to all sets.
    """
    methods = [name for name in per_image if name not in KEYS]
    ood = list(ood or [name for name in per_image["set"].unique() if name != id_test])
    if versus not in ("", *methods) or not set(metrics) <= set(METRICS):
        known = ", ".join([*methods, "", *METRICS])
        raise UserError(f"{versus!r} and {metrics} were given; known are {known}.")
    groups, cells, rows = per_image.groupby(["set", "seed"]), {}, []
    scores = {(*key, m): one.to_numpy() for m in methods for key, one in groups[m] if one.count()}
    for name in ood:
        cells |= _cells(scores, id_test, name, metrics, draws)
    sizes = groups.size().groupby("set").max()
    sizes[AVERAGE] = sizes[ood].sum()
    for method, metric in product(methods, metrics):
        of_sets = [cells.get((name, method, metric)) for name in ood]
        if len(ood) > 1 and None not in of_sets:
            cells[AVERAGE, method, metric] = list(np.mean(of_sets, axis=0))
    for (name, method, metric), values in cells.items():
        about = {"id": id_test, "ood": name, "method": method, "metric": metric}
        about |= {"n_id": sizes[id_test], "n_ood": sizes[name], "versus": ""}
        rows.append(about | _summary(values))
        if metric == "auroc" and method != versus and (name, versus, metric) in cells:
            difference = np.mean(values, axis=0) - np.mean(cells[name, versus, metric], axis=0)
            rows.append(about | {"versus": versus} | _summary([difference]))
    table = pd.DataFrame(rows)
    table.attrs = dict(per_image.attrs)
    return table


def _cells(scores, id_test, ood, metrics, draws) -> dict[tuple, list[np.ndarray]]:
    """Return, by (set, method, metric), an array for each seed: the value, then its draws."""
    rows = [row for name, *row in scores if name == ood and (id_test, *row) in scores]
    if not rows:
        raise UserError(f"There are no scores of both {id_test} and {ood}; compute them first.")
    on_id, on_ood = (np.stack([scores[(s, *row)] for row in rows]) for s in (id_test, ood))
    sampled, cells = bootstrap(on_id, on_ood, draws=draws), defaultdict(list)
    for (i, (_, method)), metric in product(enumerate(rows), metrics):
        value = METRICS[metric](on_id[i], on_ood[i])
        cells[ood, method, metric].append(np.append(value, sampled[metric][i]))
    return cells


def _summary(values: list[np.ndarray]) -> dict[str, float]:
    mean, by_seed = np.mean(values, axis=0), [of_seed[0] for of_seed in values]
    numbers = [mean[0], *np.quantile(mean[1:], [0.025, 0.975]), min(by_seed), max(by_seed)]
    names = ["value", "ci_low", "ci_high", "seed_low", "seed_high"]
    return dict(zip(names, 100 * np.array(numbers), strict=True)) | {"seeds": len(values)}


def paper_values(table: str) -> pd.DataFrame:
    """Return what the paper prints in a table, such as "table 8", one row for each value."""
    file = Path(__file__).with_name("paper_values.csv")
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
    keys = ["id", "method", "metric", "versus"]
    values = paper_values(printed).query("setting == @setting").assign(versus="")
    both = table.join(values.set_index([*keys, "ood"])["value"].rename("paper"), on=[*keys, "ood"])
    single = both["ood"] != AVERAGE
    mean = both[single].groupby(keys)["paper"].agg(lambda of_sets: of_sets.to_numpy().mean())
    mean = both.join(mean.rename("mean"), on=keys)["mean"].where(~single)  # NaN if a set has none
    both["paper"] = mean.fillna(both["paper"])
    same = both["method"].isin(values.loc[values["same"], "method"]) & (single | mean.notna())
    both["difference"] = (both["value"] - both["paper"]).where(same)
    both.attrs = dict(table.attrs)
    return both


def project_folder() -> Path:
    """Return the nearest folder above the current one that holds the book, else the current one."""
    here = Path.cwd()
    return next((f for f in (here, *here.parents) if (f / "_config.yml").is_file()), here)


def provenance(device: str = "", seconds: float = 0.0) -> dict[str, str | float]:
    """Return by what results are made now: commit, versions, device, day and seconds."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    options = {"cwd": project_folder(), "capture_output": True, "text": True}
    commit = "not in a repository"
    with suppress(OSError):  # git is not installed
        commit = subprocess.run(describe, **options).stdout.strip() or commit
    about = {"commit": commit, "device": device, "date": time.strftime("%Y-%m-%d")}
    about |= {name: version(name) for name in ("torch", "timm", "numpy", "scikit-learn")}
    about |= {"precision": precision_of(device or "cpu"), "seconds": round(seconds, 1)}
    return about | {"seeding": "v1"}


def origin(per_image: pd.DataFrame) -> str:
    """Return one sentence on where scores come from: commit, day and device."""
    text = "These numbers are from commit {commit}, {date}, on {device} (seeding {seeding})."
    return text.format(**per_image.attrs["about"])


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
    name, frames = f"{page}-{profile}", list(per_image.values())
    scores = pd.concat([frame.assign(experiment=key) for key, frame in per_image.items()])
    partial = {k: v for frame in frames for k, v in frame.attrs["partial"].items()}
    scores.attrs = frames[0].attrs | {"partial": partial}  # pandas keeps them in the file
    rows = table.assign(page=page, profile=profile, **scores.attrs["about"])
    options = {"index": False, "float_format": "%.4f", "lineterminator": "\n"}
    with locked(folder / name):
        file = folder / "scores" / f"{name}.parquet"
        replace_file(file, lambda path: scores.to_parquet(path, index=False, compression="zstd"))
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
        frame = pd.read_parquet(file, filters=[("experiment", "==", experiment)])
        if len(frame):
            return frame.drop(columns="experiment").dropna(axis=1, how="all")
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
    parts, partial, devices = [], {}, set()
    for (fit, suffix, seeds, sets), rows in index.groupby(["fit", "suffix", "seeds", "sets"]):
        methods = dict(zip(rows["column"], rows["method"], strict=True))
        for name, seed in product(sets.split(), seeds.split()):
            file = folder / fit.format(seed=seed) / f"{name.replace('/', '-')}{suffix}.parquet"
            table = pq.read_table(file, columns=["image", *methods])
            about = json.loads(table.schema.metadata[b"dlsr"])["about"]
            partial |= {name: about["partial"], about["id_train"]: about["train_partial"]}
            devices.add(about["device"])
            parts.append(table.to_pandas().rename(columns=methods).assign(set=name, seed=int(seed)))
    frame = pd.concat(parts).groupby(KEYS, sort=False).first()[index["method"].unique()]
    frame = frame.reset_index()
    about = {"commit": "(not recorded)", "date": max(index["date"]), "seeding": "v0"}
    frame.attrs = {"about": about | {"device": ", ".join(sorted(devices))}, "partial": partial}
    return frame
