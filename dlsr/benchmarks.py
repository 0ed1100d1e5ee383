"""The registry of reproduced items, their profiles, and the few steps that each of them takes."""

import json
import time
import zlib
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from dlsr.datasets import DATASETS, PROTOCOLS, UserError, load_images
from dlsr.diffusion import Reconstruction
from dlsr.encoders import POOLINGS, get_encoder
from dlsr.features import Features, extract
from dlsr.results import (
    SetScores,
    read_rows,
    results_folder,
    summarise,
    variant_column,
    write_rows,
    write_scores,
)
from dlsr.scores import all_scores
from dlsr.training import Trained, TrainingSettings, checkpoint_file, train

HEADLINE = Reconstruction("released", t=3)
HEADLINE_SCORES = {"mse": "all", "lr": "all", "mfsim": "2..M"}  # and their layers
PAPER_ROWS = {"mse": "ours(+MSE)", "lr": "ours(+LR)", "mfsim": "ours(+MFsim)"}
METHOD = "DLSR"


@dataclass(frozen=True)
class Profile:
    """How large an item is run: its sets, encoder, LFDN and number of seeds."""

    id_train: str
    id_test: str
    ood: tuple[str, ...]
    encoder: str
    training: TrainingSettings
    seeds: int


@dataclass(frozen=True)
class Item:
    """A table or figure of the paper. ``others`` are reconstructions beside the headline one."""

    name: str
    title: str
    claim: str
    table: str
    profiles: Mapping[str, Profile]
    others: tuple[Reconstruction, ...] = ()


DEMO = Profile(
    "digits/train",
    "digits/test",
    ("digits_8_9/test", "photo_patches/test"),
    "efficientnet_lite0",
    TrainingSettings(width=256, blocks=4, epochs=100, lr=1e-3),
    seeds=1,
)
B4_PACK = "efficientnet_b4_without_last_block"

ITEMS = {
    item.name: item
    for item in (
        Item(
            "00_quickstart",
            "Quickstart: handwritten digits",
            "A network trained on unlabelled ID features reconstructs those of other images worse.",
            "",
            {"demo": DEMO},
        ),
        Item(
            "08_near_ood",
            "Table 8: CIFAR-10 against CIFAR-100",
            "Without labels, MSE and LR are ahead of scores that use labels; MFsim is behind.",
            "table8_cifar10_vs_cifar100",
            {
                "demo": replace(DEMO, ood=("digits_8_9/test",)),
                "pack": Profile(
                    "cifar10/train",
                    "cifar10/test",
                    ("cifar100/test",),
                    B4_PACK,
                    TrainingSettings(width=720, blocks=8, epochs=30),
                    seeds=1,
                ),
                "paper": Profile(
                    "cifar10/train",
                    "cifar10/test",
                    ("cifar100/test",),
                    "efficientnet_b4",
                    TrainingSettings(),
                    seeds=3,
                ),
            },
            (
                Reconstruction("paper", t=3),
                Reconstruction("one_step", t=3),
                Reconstruction("one_step", t=3, noise_draws=8),
            ),
        ),
    )
}


@dataclass(frozen=True)
class Parameters:
    """What every notebook's parameters cell holds; 0 or "" takes the profile's own value."""

    profile: str = "demo"
    encoder: str = ""
    seeds: int = 0
    n_train: int = 0
    width: int = 0
    blocks: int = 0
    epochs: int = 0
    protocol: str = "native"
    pooling: str = "gap"


@dataclass(frozen=True)
class Settings:
    """All that fixes a run of an item."""

    item: Item
    profile_name: str
    profile: Profile
    n_train: int | None = None
    protocol: str = "native"
    pooling: str = "gap"

    @property
    def for_the_book(self) -> bool:
        """Whether the executed copy belongs into the book: the item's own profile, nothing changed."""
        own = Settings(self.item, self.profile_name, self.item.profiles[self.profile_name])
        return self == own and (self.profile_name != "demo" or len(self.item.profiles) == 1)

    @property
    def sets(self) -> tuple[str, ...]:
        """ID test first, then the OOD sets."""
        return (self.profile.id_test, *self.profile.ood)


_CHECKED = "_dlsr_parameters_checked"
_NOTEBOOK_NAMES = frozenset({"In", "Out", "exit", "quit", "open", "get_ipython"})


def settings(item: str, namespace: MutableMapping[str, Any]) -> Settings:
    """Check a notebook's parameters (pass ``globals()``) and turn them into settings.

    A name that is no parameter, a value of another type or one that makes no sense is refused
    before anything runs. Modules, functions and names with an underscore are not parameters. When
    the cell is run again, names that the notebook itself has set since are no longer looked at.
    """
    if item not in ITEMS:
        raise UserError(f"The item {item!r} is unknown; there are {', '.join(ITEMS)}.")
    known = {f.name for f in fields(Parameters)}
    given = {
        name: value
        for name, value in namespace.items()
        if name in known
        or (
            not (name.startswith("_") or name in _NOTEBOOK_NAMES or _CHECKED in namespace)
            and (value is None or isinstance(value, str | int | float | list | dict | tuple))
        )
    }
    run = resolve(ITEMS[item], checked(given))
    namespace[_CHECKED] = True
    return run


def checked(given: Mapping[str, Any]) -> Parameters:
    """Parameters of the right names and types, or a `UserError` that lists them."""
    known = {f.name: f for f in fields(Parameters)}
    listing = ", ".join(f"{name}: {type(f.default).__name__}" for name, f in known.items())
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{name!r} is no parameter of this notebook; its parameters are {listing}.")
        if type(value) is not type(known[name].default):
            wanted = type(known[name].default).__name__
            raise UserError(f"{name} was given {value!r}; it needs {wanted}. The parameters are {listing}.")
    return Parameters(**given)


def resolve(item: Item, parameters: Parameters) -> Settings:
    """Fill in what the profile says where a parameter is 0 or ""."""
    if parameters.profile not in item.profiles:
        raise UserError(
            f"The profile {parameters.profile!r} is unknown to {item.name}; "
            f"choose one of {', '.join(item.profiles)}."
        )
    numbers = {name: getattr(parameters, name) for name in ("seeds", "n_train", "width", "blocks", "epochs")}
    for name, value in numbers.items():
        if value < 0:
            raise UserError(f"{name}={value} was given; it is at least 1, or 0 for the profile's own.")
    for name, choices in (("protocol", PROTOCOLS), ("pooling", POOLINGS)):
        if getattr(parameters, name) not in choices:
            raise UserError(
                f"{name}={getattr(parameters, name)!r} is unknown; choose one of {', '.join(choices)}."
            )
    profile = item.profiles[parameters.profile]
    sizes = {name: numbers[name] for name in ("width", "blocks", "epochs") if numbers[name]}
    profile = replace(
        profile,
        encoder=get_encoder(parameters.encoder or profile.encoder).name,
        training=replace(profile.training, **sizes),
        seeds=parameters.seeds or profile.seeds,
    )
    return Settings(
        item,
        parameters.profile,
        profile,
        parameters.n_train or None,
        parameters.protocol,
        parameters.pooling,
    )


def extract_sets(run: Settings, *, progress: bool = True) -> dict[str, Features]:
    """Features of the ID train set, the ID test set and every OOD set, by the sets' names."""
    encoder = get_encoder(run.profile.encoder)
    id_size = DATASETS[run.profile.id_train].size
    found = {}
    for name in (run.profile.id_train, *run.sets):
        images = load_images(name, n=run.n_train if name == run.profile.id_train else None)
        found[name] = extract(images, encoder, protocol=run.protocol, id_size=id_size, progress=progress)
    return found


def train_networks(
    run: Settings, features: Mapping[str, Features], *, progress: bool = True
) -> list[Trained]:
    """One LFDN a seed on the ID train set; a network that was trained before is only read."""
    z0 = features[run.profile.id_train].z0(run.pooling)
    networks = []
    for seed in range(run.profile.seeds):
        training = replace(run.profile.training, seed=seed)
        file = checkpoint_file(z0, training)
        networks.append(train(z0, training, checkpoint=file, progress=progress))
    return networks


def score_sets(run: Settings, features: Mapping[str, Features], networks: list[Trained]) -> list[SetScores]:
    """Scores of all images, a table for each seed, also written to ``results/scores``."""
    tables = []
    z0 = {name: features[name].z0(run.pooling) for name in run.sets}
    for seed, trained in enumerate(networks):
        columns: dict[str, dict[str, str | int | float]] = {}
        values: dict[str, np.ndarray] = {}
        for way in tqdm((HEADLINE, *run.item.others), desc=f"scores, seed {seed}", unit="reconstruction"):
            found, rate = _score_sets_by(z0, features[run.profile.id_test], trained, way, seed)
            for score, layers in found[run.profile.id_test]:
                if way == HEADLINE or not layers.isdigit():
                    variant = {"score": score, "layers": layers} | way.columns
                    column = variant_column(variant)
                    columns[column] = variant | {"images_per_second": rate}
                    values[column] = np.concatenate([found[name][score, layers] for name in run.sets])
        table = {
            "set": np.repeat(run.sets, [len(features[name]) for name in run.sets]),
            "image": [image for name in run.sets for image in features[name].ids],
        }
        scores = SetScores(pd.DataFrame(table | values), columns, _about(run, features, trained, seed))
        file = f"{run_name(run)}-seed{seed}.parquet"
        write_scores(results_folder(run.profile_name) / "scores" / file, scores)
        tables.append(scores)
    return tables


def _score_sets_by(
    z0: Mapping[str, np.ndarray], id_test: Features, trained: Trained, way: Reconstruction, seed: int
) -> tuple[dict[str, dict[tuple[str, str], np.ndarray]], float]:
    """All scores of every set by one reconstruction, and the images/s of encoder and LFDN together."""
    began = time.perf_counter()
    found = {}
    for name, vectors in z0.items():
        noise = zlib.crc32(f"{name} {seed}".encode())  # sets must not share their noise
        found[name] = all_scores(trained, vectors, id_test.channels, way, seed=noise, stride_seed=seed)
    seconds = time.perf_counter() - began
    return found, 1 / (1 / id_test.images_per_second + seconds / sum(map(len, z0.values())))


def measure(run: Settings, scores: list[SetScores]) -> pd.DataFrame:
    """The metrics of these scores, added to the item's CSV; returns the rows of this run."""
    rows = summarise(scores, id_set=run.profile.id_test)
    write_rows(results_file(run), rows)
    return rows


def results_file(run: Settings) -> Path:
    return results_folder(run.profile_name) / f"{run.item.name}.csv"


def run_name(run: Settings) -> str:
    """A file name that tells runs of an item apart."""
    training = run.profile.training
    size = f"{training.blocks}x{training.width}-{training.epochs}epochs"
    parts = [run.item.name, run.profile.encoder, run.protocol, run.pooling, size]
    return "-".join(parts + ([f"n{run.n_train}"] if run.n_train else []))


def paper_value(table: str, row: str, column: str) -> float:
    """A value as the paper prints it, quoted from ``paper_values.json``; the ± is left out."""
    for _, cells in paper_table(table).iterrows():
        if row in cells.to_list()[:2]:
            return float(cells[column].split("±")[0])
    raise UserError(f"The paper's {table} has no row {row!r}.")


def paper_table(table: str) -> pd.DataFrame:
    """A table of the paper as printed, quoted from ``paper_values.json``."""
    values = json.loads(resources.files("dlsr").joinpath("paper_values.json").read_text("utf-8"))[table]
    return pd.DataFrame(values["rows"], columns=values["columns"])


def compare(run: Settings, rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of the headline scores, with the paper's value and the difference beside it.

    Columns ``score``, ``metric``, ``paper``, ``measured``, ``ci_low``, ``ci_high``, ``difference``;
    in the demo, which has other images, ``paper`` is NaN.
    """
    table = headline(rows, ood=run.profile.ood[0]).rename(columns={"value": "measured"})
    quoted = run.item.table and run.profile_name != "demo"
    table["paper"] = [
        paper_value(run.item.table, PAPER_ROWS[score], metric.upper()) if quoted else np.nan
        for score, metric in zip(table["score"], table["metric"], strict=True)
    ]
    return table.assign(difference=table["measured"] - table["paper"])


def headline(rows: pd.DataFrame, *, ood: str, metrics: Sequence[str] = ("auroc", "fpr95")) -> pd.DataFrame:
    """``score``, ``metric``, ``value``, ``ci_low``, ``ci_high`` of the three scores on one OOD set."""
    chosen = [
        select(rows, ood=ood, score=score, layers=layers, metric=metric)
        for metric in metrics
        for score, layers in HEADLINE_SCORES.items()
    ]
    return pd.DataFrame(chosen, columns=["score", "metric", "value", "ci_low", "ci_high"]).reset_index(
        drop=True
    )


def read_results(run: Settings) -> pd.DataFrame:
    """All rows of the item that were measured on the same sets, whatever their other settings."""
    rows = read_rows(results_file(run))
    return rows[rows["id"].eq(run.profile.id_test) & rows["ood"].isin(run.profile.ood)]


def headline_columns() -> list[str]:
    """The score columns of MSE, LR and MFsim in the headline setting."""
    return [variant_column({"score": s, "layers": m} | HEADLINE.columns) for s, m in HEADLINE_SCORES.items()]


def select(rows: pd.DataFrame, **wanted: Any) -> pd.Series:
    """The one row with these values; the mean over seeds in the headline setting unless said."""
    wanted = {"seed": "mean", "versus": ""} | HEADLINE.columns | wanted
    chosen = rows[np.logical_and.reduce([rows[name] == value for name, value in wanted.items()])]
    if len(chosen) != 1:
        raise UserError(f"{len(chosen)} rows of the results fit {wanted}; exactly one is needed.")
    return chosen.iloc[0]


def _about(
    run: Settings, features: Mapping[str, Features], trained: Trained, seed: int
) -> dict[str, str | int | float]:
    """The columns of the results that all rows of a run share."""
    train_set, test_set = features[run.profile.id_train], features[run.profile.id_test]
    training = asdict(run.profile.training)
    return {
        "benchmark": run.item.name,
        "method": METHOD,
        "seed": seed,
        "n_train": len(train_set),
        "encoder": run.profile.encoder,
        "weights_sha256": test_set.key.weights_sha256,
        "protocol": run.protocol,
        "pooling": run.pooling,
        "width": training["width"],
        "blocks": training["blocks"],
        "epochs": training["epochs"],
        "partial": "; ".join(filter(None, (DATASETS[name].partial for name in run.sets))),
        "profile": run.profile_name,
        "device": "+".join(sorted({test_set.device, trained.device})),
    }
