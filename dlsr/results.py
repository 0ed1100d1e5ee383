"""Results on disk: one CSV a benchmark, and the scores of every image that all of it follows from."""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dlsr import __version__
from dlsr.datasets import UserError
from dlsr.features import replace_file
from dlsr.metrics import METRICS, bootstrap, interval

# fmt: off
COLUMNS = [
    "benchmark", "id", "ood", "method", "score", "metric", "value", "ci_low", "ci_high", "versus",
    "seed", "n_train", "n_id", "n_ood", "encoder", "weights_sha256", "protocol", "pooling", "layers",
    "reconstruction", "t", "noise_draws", "width", "blocks", "epochs", "partial", "profile", "device",
    "images_per_second", "version", "date", "seeds", "stages",
]
# fmt: on
MEASURED = (
    "value",
    "ci_low",
    "ci_high",
    "images_per_second",
    "device",
    "version",
    "date",
    "seeds",
    "stages",
)  # fmt: skip
SETTINGS = [column for column in COLUMNS if column not in MEASURED]  # rows equal in these are replaced
APPENDED = ("seeds", "stages")  # columns that files of earlier versions lack
VARIANT = ("score", "layers", "reconstruction", "t", "noise_draws")  # what tells a score's column
AVERAGE = "average"  # the OOD set's name in rows of the unweighted mean over all of them


@dataclass(frozen=True)
class SetScores:
    """Scores of every image of one run, one seed: a column per variant beside ``set`` and ``image``.

    ``columns`` gives each score column its `VARIANT` values and its speed; ``about`` holds the
    settings that all rows share, by the names of `COLUMNS`.
    """

    table: pd.DataFrame
    columns: Mapping[str, Mapping[str, str | int | float]]
    about: Mapping[str, str | int | float] = field(default_factory=dict)

    def of(self, name: str, column: str) -> np.ndarray:
        """The scores of one set."""
        return self.table.loc[self.table["set"] == name, column].to_numpy()

    @property
    def sets(self) -> list[str]:
        return list(self.table["set"].unique())


def project_folder() -> Path:
    """The nearest folder above the current one that holds the book, else the current one."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "_config.yml").is_file() and (folder / "notebooks").is_dir():
            return folder
    return here


def results_folder(profile: str) -> Path:
    """``results/``; for the demo ``_build/demo/``, so that it never stands among real results."""
    return project_folder() / ("_build/demo" if profile == "demo" else "results")


def variant_column(variant: Mapping[str, str | int]) -> str:
    """``mfsim/2..M/released/t3/k1``; ``knn/all`` where nothing is reconstructed by diffusion."""
    score, layers, mode, t, k = (variant[name] for name in VARIANT)
    return f"{score}/{layers}/{mode}/t{t}/k{k}" if mode else f"{variant['method']}:{score}/{layers}"


def joined(parts: Sequence[SetScores]) -> SetScores:
    """One run's scores of several sets as one table; ID first. Columns are those of the first."""
    first = parts[0]
    partials = {name: part.about.get("partial", "") for part in parts for name in part.sets}
    table = pd.concat([part.table[list(first.table)] for part in parts], ignore_index=True)
    return SetScores(table, first.columns, dict(first.about) | {"partials": partials})


def write_scores(file: Path, scores: SetScores) -> None:
    """Parquet, float32, with the settings in the schema's metadata."""
    table = pa.Table.from_pandas(scores.table, preserve_index=False)
    about = json.dumps({"columns": scores.columns, "about": scores.about})
    table = table.replace_schema_metadata({"dlsr": about})
    options = {
        "compression": "zstd",
        "use_dictionary": ["set"],
        "use_byte_stream_split": list(scores.columns),
    }
    replace_file(file, lambda path: pq.write_table(table, path, **options))


def read_scores(file: Path) -> SetScores:
    """What `write_scores` wrote."""
    try:
        table = pq.read_table(file)
        about = json.loads((table.schema.metadata or {})[b"dlsr"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{file} is not a whole file of scores ({error!r}); delete it and run its benchmark again."
        ) from error
    return SetScores(table.to_pandas(), about["columns"], about["about"])


def summarise(runs: Sequence[SetScores], *, id_set: str) -> pd.DataFrame:
    """Rows of `COLUMNS`, in percent, from the same settings' scores under several seeds.

    For each OOD set, variant and metric one row a seed and one for their mean; AUROC and FPR95 have
    a 95 % interval over images (stratified bootstrap, the mean's over the mean of seeds), and stand
    there as the unweighted mean over the OOD sets too, where there are several. Rows with ``versus``
    are the paired AUROC difference of a headline score from the first score.
    """
    names = list(runs[0].columns)
    ood_sets = [name for name in runs[0].sets if name != id_set]
    rows, sums = [], []
    for ood in ood_sets:
        pairs = [[(run.of(id_set, name), run.of(ood, name)) for run in runs] for name in names]
        draws = bootstrap([pair for of_name in pairs for pair in of_name])
        draws = {m: v.reshape(len(names), len(runs), -1) for m, v in draws.items()}
        points = {
            metric: np.array([[function(*pair) for pair in of_name] for of_name in pairs])
            for metric, function in METRICS.items()
        }
        n_id, n_ood = map(len, pairs[0][0])
        common = {"id": id_set, "ood": ood, "n_id": n_id, "n_ood": n_ood}
        common["partial"] = _partial(runs[0], [id_set, ood])
        rows += _cells(runs, common, points, draws)
        sums.append((common, points, draws))
    if len(ood_sets) > 1:
        rows += _cells(runs, *_average(runs[0], sums))
    return pd.DataFrame(rows).reindex(columns=COLUMNS)


def _average(run: SetScores, sums: list[tuple[dict, dict, dict]]) -> tuple[dict, dict, dict]:
    """What `_cells` needs for the mean over OOD sets; they share the draws of ID images."""
    commons, points, draws = zip(*sums, strict=True)
    common = commons[0] | {"ood": AVERAGE, "n_ood": sum(c["n_ood"] for c in commons)}
    common["partial"] = _partial(run, [commons[0]["id"], *(c["ood"] for c in commons)])
    return (
        common,
        {metric: np.mean([p[metric] for p in points], axis=0) for metric in draws[0]},
        {metric: np.mean([d[metric] for d in draws], axis=0) for metric in draws[0]},
    )


def _partial(run: SetScores, sets: Sequence[str]) -> str:
    """Why the training set or one of these sets is not the whole set that the paper names."""
    partials = run.about.get("partials", {})
    reasons = {run.about.get("id_train", "training"): run.about.get("train_partial", "")}
    reasons |= {name: partials.get(name, "") for name in sets}
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)


def _cells(
    runs: Sequence[SetScores], common: dict, points: dict[str, np.ndarray], draws: dict[str, np.ndarray]
) -> list[dict]:
    """Rows of one OOD set; ``points`` are (names, seeds) a metric, ``draws`` (names, seeds, draws)."""
    names, columns = list(runs[0].columns), runs[0].columns
    rows = []
    for i, name in enumerate(names):
        for metric, values in points.items():
            sample = draws[metric][i] if metric in draws else None
            rows += _rows(runs, name, common | {"metric": metric}, values[i], sample)
        same = columns[name]["reconstruction"] == columns[names[0]]["reconstruction"]
        if i and same and not columns[name]["layers"].isdigit():
            about = common | {"metric": "auroc", "versus": names[0]}
            difference = draws["auroc"][i] - draws["auroc"][0]
            rows += _rows(runs, name, about, points["auroc"][i] - points["auroc"][0], difference)
    return rows


def _rows(
    runs: Sequence[SetScores], name: str, common: dict, points: np.ndarray, draws: np.ndarray | None
) -> list[dict]:
    """One row a seed, and the mean: ``points`` is (seeds,), ``draws`` (seeds, draws) or None."""
    stamp = {"version": __version__, "date": datetime.date.today().isoformat()}
    shared = [{"versus": ""} | dict(run.about) | dict(run.columns[name]) | common | stamp for run in runs]
    rows = [
        row
        | {"seed": str(row["seed"]), "seeds": 1}
        | _measured(points[i], None if draws is None else draws[i])
        for i, row in enumerate(shared)
    ]
    rate = float(np.mean([row["images_per_second"] for row in shared]))
    mean = {"seed": "mean", "seeds": len(runs), "images_per_second": rate}
    rows.append(shared[0] | mean | _measured(points.mean(), None if draws is None else draws.mean(0)))
    return rows


def _measured(value: float, draws: np.ndarray | None) -> dict[str, float]:
    low, high = (np.nan, np.nan) if draws is None else interval(draws)
    return {"value": 100 * value, "ci_low": 100 * low, "ci_high": 100 * high}


def write_rows(file: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Add rows to a CSV; those with the same settings are replaced. Returns the whole table."""
    rows = as_table(rows)
    if file.is_file():
        old = read_rows(file)
        keys = set(map(tuple, rows[SETTINGS].to_numpy()))
        kept = [tuple(row) not in keys for row in old[SETTINGS].to_numpy()]
        rows = pd.concat([old[kept], rows], ignore_index=True) if any(kept) else rows
    order = [
        "benchmark",
        "encoder",
        "pooling",
        "ood",
        "versus",
        "score",
        "layers",
        "reconstruction",
        "metric",
        "seed",
    ]
    rows = rows.sort_values([*order, "t", "width", "blocks", "epochs"], kind="stable", ignore_index=True)
    replace_file(file, lambda path: rows.to_csv(path, index=False, float_format="%.4f", lineterminator="\n"))
    return rows


def read_rows(file: Path) -> pd.DataFrame:
    """A results CSV: text and numbers as `COLUMNS` has them, empty cells of text as ''."""
    try:
        rows = pd.read_csv(file, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a readable table of results ({error}).") from error
    missing = [column for column in COLUMNS if column not in rows and column not in APPENDED]
    if missing:
        raise UserError(f"{file} lacks the columns {', '.join(missing)}; it is of another version.")
    return as_table(rows.assign(**{column: "" for column in APPENDED if column not in rows}))


NUMBERS = ("value", "ci_low", "ci_high", "images_per_second")
WHOLE = ("n_train", "n_id", "n_ood", "t", "noise_draws", "width", "blocks", "epochs")


def as_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The same rows with one type a column, so that settings compare."""
    rows = rows.copy()
    for column in rows.columns:
        if column in NUMBERS:
            rows[column] = pd.to_numeric(rows[column])
        elif column in WHOLE:
            rows[column] = pd.to_numeric(rows[column]).astype(int)
        elif column == "seeds":
            rows[column] = pd.to_numeric(rows[column]).astype("Int64")
        else:
            rows[column] = rows[column].astype(object).fillna("").astype(str)
    return rows
