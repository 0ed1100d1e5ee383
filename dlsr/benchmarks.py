"""The registry of reproduced tables and figures, their profiles, and their values beside the paper's."""

import hashlib
import json
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dlsr.datasets import PROTOCOLS, UserError
from dlsr.diffusion import Reconstruction
from dlsr.encoders import POOLINGS, get_encoder
from dlsr.experiments import HEADLINE, OURS, STAGES, Experiment, Line, layer_place, method_name, score
from dlsr.results import (
    AVERAGE,
    COLUMNS,
    SetScores,
    as_table,
    read_rows,
    results_folder,
    summarise,
    write_rows,
)
from dlsr.training import TrainingSettings

METRICS = ("auroc", "fpr95")


@dataclass(frozen=True)
class Item:
    """Tables or figures of the paper that one notebook reproduces.

    ``tables`` name them in ``paper_values.json``, a metric each; ``unmeasured`` says why the profile
    ``pack`` has no experiment.
    """

    name: str
    title: str
    claim: str
    profiles: Mapping[str, tuple[Experiment, ...]]
    tables: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...] = METRICS
    unmeasured: str = ""


B4_PACK = "efficientnet_b4_without_last_block"
BASE = TrainingSettings(width=720, blocks=8, epochs=30)  # the LFDN of profile pack
DEMO = Experiment(
    "digits/train",
    "digits/test",
    ("digits_8_9/test", "photo_patches/test"),
    "efficientnet_lite0",
    TrainingSettings(width=256, blocks=4, epochs=100, lr=1e-3),
)
SIX = ("svhn/test", "lsun_crop/test", "lsun_resize/test", "isun/test", "textures/test", "places365/val")
SEVEN = (
    "svhn/test", "lsun_crop/test", "mnist/test", "fashion_mnist/test", "kmnist/test", "omniglot/test",
    "notmnist/test",
)  # fmt: skip
PHOTOGRAPHS = ("sun/test", "inaturalist/test", "textures/test", "places365/val")
RIVALS = ("knn", "mahalanobis", "probe")


def pack(id_name: str, ood: Sequence[str], **options: Any) -> Experiment:
    """An experiment at the size that two CPU cores can bear."""
    own = {"encoder": B4_PACK, "training": BASE} | options
    return Experiment(f"{id_name}/train", f"{id_name}/test", tuple(ood), **own)


def whole(experiment: Experiment, **options: Any) -> Experiment:
    """The same at the paper's size."""
    own = {"training": TrainingSettings(), "encoder": "efficientnet_b4", "seeds": 3, "n_test": 0}
    return replace(experiment, **own | {"downloads": True} | options)


def demo(experiment: Experiment, **options: Any) -> Experiment:
    """The same on scikit-learn's images, which stand for ID, near- and far-OOD."""
    own = {name: getattr(DEMO, name) for name in ("id_train", "id_test", "ood", "encoder", "training")}
    return replace(experiment, **own | {"seeds": 1, "n_test": 0} | options)


def all_profiles(
    *experiments: Experiment, pack_only: Sequence[Experiment] = ()
) -> dict[str, tuple[Experiment, ...]]:
    """The three profiles of an item from its experiments at the size of the pack."""
    return {
        "demo": tuple(dict.fromkeys(demo(experiment) for experiment in experiments)),  # one ID set
        "pack": (*experiments, *pack_only),
        "paper": tuple(whole(experiment) for experiment in experiments),
    }


LFDN_SIZES = {  # width, blocks: what the paper's Table 4 calls it
    (720, 8): "",
    (720, 16): "Linear=720",
    (1440, 8): "Number of Blocks=8",
    (1440, 16): "Linear=1440",
}
SWEPT = {  # the paper's t; `released` cannot take 100
    "released": (1, 3, 10, 25, 50),
    "paper": (1, 3, 10, 25, 50, 100),
    "one_step": (1, 3, 10, 25, 50, 100),
}
SWEEP = tuple(Reconstruction(mode, t=t) for mode, ts in SWEPT.items() for t in ts)


def _sizes(profile: str, epochs: int) -> tuple[Experiment, ...]:
    """The four LFDNs of Table 4; an eighth of their width, and a quarter of their depth, in the demo."""
    found = []
    for (width, blocks), setting in LFDN_SIZES.items():
        training = TrainingSettings(width=width, blocks=blocks, epochs=epochs)
        one = pack("cifar100", SIX, training=training, setting=setting)
        small = replace(DEMO.training, width=width // 8, blocks=blocks // 4)
        found.append({
            "demo": demo(one, training=small), "pack": one, "paper": whole(one, training=training),
        }[profile])  # fmt: skip
    return tuple(found)


def _one_or_all_layers(id_name: str, ood: Sequence[str]) -> tuple[Experiment, Experiment]:
    """Figure 5: an LFDN on the last layer alone, and the base network."""
    both = pack(id_name, ood, seeds=2, by_layer=True, setting="multi")
    return replace(both, layers="last", setting="single", seeds=1, by_layer=False), both


_CIFARS = (pack("cifar10", SIX, seeds=2), pack("cifar100", SIX, seeds=2))
ONLY_HERE = "a set of the data pack that no table of the paper has"
_RESNET = {
    "demo": (demo(_CIFARS[0]),),
    "pack": (),
    "paper": tuple(whole(experiment, encoder="resnet50") for experiment in _CIFARS),
}
_NO_RESNET = "no ResNet-50 weights are in the data pack; profile paper gets them from the model hub"
_NEAR = pack("cifar10", ["cifar100/test"], seeds=2, by_layer=True)
_LITE0 = {"encoder": "efficientnet_lite0", "training": replace(BASE, epochs=15), "setting": "Lite0"}

ITEMS = {
    item.name: item
    for item in (
        Item(
            "00_quickstart",
            "Quickstart: handwritten digits",
            "A network trained on unlabelled ID features reconstructs those of other images worse.",
            {"demo": (DEMO,)},
        ),
        Item(
            "01_generative",
            "Table 1: CIFAR-10 against seven sets",
            "MFsim reaches 99.7 % AUROC on average, far above pixel models and the autoencoder.",
            all_profiles(
                pack("cifar10", SEVEN, seeds=2, baselines=("ae",)),
                pack_only=[pack("cifar10", SEVEN, **_LITE0)],
            ),
            {"auroc": "table1_cifar10_generative_auroc"},
            ("auroc",),
        ),
        Item(
            "02_celeba",
            "Table 2: CelebA against photographs",
            "Faces are told from photographs almost without error, 300 times faster than by a pixel DDPM.",
            all_profiles(pack("celeba", PHOTOGRAPHS, seeds=2, baselines=("ae",))),
            {"auroc": "table2_celeba_auroc"},
            ("auroc",),
        ),
        Item(
            "03_rivals",
            "Tables 3 and 5: CIFAR-10 and CIFAR-100 against six sets",
            "MFsim is ahead of all rivals on average, of those that use labels too.",
            all_profiles(
                *(replace(experiment, baselines=RIVALS) for experiment in _CIFARS),
                pack_only=[replace(e, ood=("scenes/test",), setting=ONLY_HERE) for e in _CIFARS],
            ),
            {"auroc": "table3_auroc_effb4", "fpr95": "table5_fpr95_effb4"},
        ),
        Item(
            "04_lfdn_size",
            "Table 4: width and depth of the LFDN",
            "A wider and a deeper network is better, most of all for LR.",
            {name: _sizes(name, epochs) for name, epochs in (("demo", 100), ("pack", 5), ("paper", 150))},
            {"auroc": "table4_lfdn_ablation"},
            ("auroc",),
        ),
        Item(
            "06_resnet50",
            "Tables 6 and 7: ResNet-50",
            "The method works on another encoder's features.",
            _RESNET,
            {"auroc": "table6_auroc_resnet50", "fpr95": "table7_fpr95_resnet50"},
            unmeasured=_NO_RESNET,
        ),
        Item(
            "08_near_ood",
            "Table 8: CIFAR-10 against CIFAR-100",
            "Without labels, MSE and LR are ahead of scores that use labels; MFsim is behind.",
            all_profiles(
                replace(
                    _NEAR,
                    reconstructions=(
                        HEADLINE,
                        Reconstruction("paper", t=3),
                        Reconstruction("one_step", t=3),
                        Reconstruction("one_step", t=3, noise_draws=8),
                    ),
                ),
                pack_only=[
                    pack("cifar10", ["cifar100/test"], **_LITE0),
                    pack("cifar10", ["cifar100/test"], pooling="grid14", setting="grid14"),
                ],
            ),
            {"auroc": "table8_cifar10_vs_cifar100", "fpr95": "table8_cifar10_vs_cifar100"},
        ),
        Item(
            "09_diffguard",
            "Table 9: beside DiffGuard",
            "On CIFAR-100 DiffGuard, which uses labels, is ahead; on TinyImageNet it is far behind.",
            all_profiles(pack("cifar10", ["cifar100/test", "tiny_imagenet/val"], seeds=2)),
            {"auroc": "table9_diffguard", "fpr95": "table9_diffguard"},
        ),
        Item(
            "10_lmd",
            "Table 10: beside LMD",
            "The method is ahead of a pixel diffusion model on average, by what it gains on near-OOD.",
            all_profiles(
                pack("cifar10", ["cifar100/test", "svhn/test"], seeds=2),
                pack("cifar100", ["cifar10/test", "svhn/test"], seeds=2),
            ),
            {"auroc": "table10_lmd_auroc"},
            ("auroc",),
        ),
        Item(
            "11_ae_vae",
            "Table 11: AE and VAE on the same features",
            "On the same features and with MFsim, diffusion is ahead of a VAE, and both of an AE.",
            all_profiles(pack("cifar10", SEVEN, seeds=2, baselines=("ae", "vae"))),
            {"auroc": "table11_ae_vae_features_auroc"},
            ("auroc",),
        ),
        Item(
            "12_imagenet100",
            "Table 12: ImageNet-100",
            "On ImageNet-100 MSE is ahead of scores that use labels, but LR and iNaturalist are weak.",
            {
                "demo": (demo(DEMO),),
                "pack": (),
                "paper": (
                    whole(
                        Experiment(
                            "imagenet100/train", "imagenet100/val", PHOTOGRAPHS, "", TrainingSettings()
                        )
                    ),
                ),
            },
            {"auroc": "table12_imagenet100", "fpr95": "table12_imagenet100"},
            unmeasured="ImageNet-100 is not in the data pack and cannot be downloaded without an account; "
            "profile paper reads your own folder of it",
        ),
        Item(
            "23_histograms",
            "Figures 3 and 9: MFsim after the first and the last epoch",
            "Training brings ID images' reconstructions nearer and so draws the histograms apart.",
            all_profiles(pack("cifar10", SIX)),
        ),
        Item(
            "24_timestep",
            "Figure 4: which timestep t",
            "t = 1 is bad, 3 to 10 is best, larger t is worse.",
            {
                name: tuple(replace(experiment, reconstructions=SWEEP) for experiment in experiments)
                for name, experiments in all_profiles(pack("cifar10", SIX, n_test=2000)).items()
            },
        ),
        Item(
            "25_layers",
            "Figure 5: the last layer alone, or all",
            "Five layers are better than the last alone, most of all for MFsim on CIFAR-100.",
            all_profiles(
                *_one_or_all_layers("cifar10", SIX),
                *_one_or_all_layers("cifar100", SIX),
                *_one_or_all_layers("celeba", PHOTOGRAPHS),
            ),
            {"auroc": "figure5_single_vs_multi_layer"},
            ("auroc",),
        ),
        Item(
            "26_histograms_resnet50",
            "Figures 6 and 7: MFsim on ResNet-50",
            "The histograms draw apart on ResNet-50's features too.",
            _RESNET,
            unmeasured=_NO_RESNET,
        ),
    )
}


REPORTS = {  # notebooks that only read results
    "30_deviations": "Where paper, released code and this project differ",
    "31_coverage": "What is measured",
    "32_results": "All results",
}


@dataclass(frozen=True)
class Parameters:
    """What every notebook's parameters cell holds; 0 or "" takes the profile's own value."""

    profile: str = "demo"
    encoder: str = ""
    seeds: int = 0
    n_train: int = 0
    n_test: int = 0
    width: int = 0
    blocks: int = 0
    epochs: int = 0
    t: int = 0
    layers: str = ""
    protocol: str = ""
    pooling: str = ""


@dataclass(frozen=True)
class Settings:
    """All that fixes a run of an item."""

    item: Item
    profile: str
    experiments: tuple[Experiment, ...]

    @property
    def for_the_book(self) -> bool:
        """Whether the executed copy belongs into the book: the item's own profile, nothing changed."""
        own = self.experiments == self.item.profiles[self.profile]
        return own and (self.profile != "demo" or len(self.item.profiles) == 1)

    @property
    def sets(self) -> tuple[str, ...]:
        """Every set that is scored, ID first."""
        return tuple(dict.fromkeys(name for e in self.experiments for name in e.sets))


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
    """Fill in what the profile says where a parameter is 0 or ""; the others hold for all experiments."""
    if parameters.profile not in item.profiles:
        raise UserError(
            f"The profile {parameters.profile!r} is unknown to {item.name}; "
            f"choose one of {', '.join(item.profiles)}."
        )
    for name in [f.name for f in fields(Parameters) if type(f.default) is int]:
        if (value := getattr(parameters, name)) < 0:
            raise UserError(f"{name}={value} was given; it is at least 1, or 0 for the profile's own.")
    for name, choices in (("protocol", PROTOCOLS), ("pooling", POOLINGS)):
        if getattr(parameters, name) not in ("", *choices):
            raise UserError(
                f"{name}={getattr(parameters, name)!r} is unknown; choose one of {', '.join(choices)}."
            )
    experiments = tuple(_changed(e, parameters) for e in item.profiles[parameters.profile])
    return Settings(item, parameters.profile, experiments)


def _changed(experiment: Experiment, parameters: Parameters) -> Experiment:
    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(parameters, name) for name in names if getattr(parameters, name)}

    encoder = get_encoder(parameters.encoder or experiment.encoder)
    if parameters.layers not in ("", "all"):
        layer_place(parameters.layers, encoder.channels())
    ways = experiment.reconstructions
    if parameters.t:
        ways = tuple(dict.fromkeys(replace(way, t=parameters.t) for way in ways))
    return replace(
        experiment,
        encoder=encoder.name,
        training=replace(experiment.training, **given("width", "blocks", "epochs")),
        **given("seeds", "n_train", "n_test", "layers", "protocol", "pooling"),
        reconstructions=ways,
    )


def reproduce(run: Settings, *, progress: bool = True) -> pd.DataFrame:
    """The run's rows of results: read where they are up to date, else measured and written."""
    for experiment in run.experiments:
        if not is_current(run, experiment):
            found = score(experiment, scores_folder(run), progress=progress)
            rows = [summarise(runs, id_set=experiment.id_test) for runs in found.values()]
            about = {"benchmark": run.item.name, "profile": run.profile, "stages": stamp(experiment)}
            write_rows(results_file(run), pd.concat(rows).assign(**about))
    return results(run)


def results(run: Settings) -> pd.DataFrame:
    """The up-to-date rows of a run; none where nothing was measured."""
    rows = read_results(run)
    return rows[rows["stages"].isin([stamp(experiment) for experiment in run.experiments])]


def read_results(run: Settings) -> pd.DataFrame:
    """All rows of the item, whatever their settings."""
    file = results_file(run)
    return read_rows(file) if file.is_file() else as_table(pd.DataFrame(columns=COLUMNS))


def scores_of(run: Settings, experiment: Experiment) -> dict[str, list[SetScores]]:
    """The scores of every image, by method, a table for each seed."""
    return score(experiment, scores_folder(run), progress=False)


def stamp(experiment: Experiment) -> str:
    """The stages' hashes in one line, as the results hold it."""
    return " ".join(f"{stage}:{value}" for stage, value in experiment.stages().items())


def is_current(run: Settings, experiment: Experiment) -> bool:
    """Whether the results hold every fit on every set, made by the code as it stands."""
    rows = read_results(run)
    rows = rows[rows["stages"] == stamp(experiment)]
    held = set(zip(rows["method"], rows["seed"], rows["ood"], strict=True))
    return {
        (method_name(method, experiment.layers), seed, ood)
        for method, number in experiment.fits()
        for seed in (str(number), "mean")
        for ood in experiment.available
    } <= held


def results_file(run: Settings) -> Path:
    return results_folder(run.profile) / f"{run.item.name}.csv"


def scores_folder(run: Settings) -> Path:
    """Scores are shared: the same fit on the same set serves every item."""
    return results_folder(run.profile) / "scores"


def run_name(run: Settings) -> str:
    """A file name that tells runs of an item apart."""
    made = "".join(stamp(experiment) for experiment in run.experiments)
    return f"{run.item.name}-{run.profile}-{hashlib.sha256(made.encode()).hexdigest()[:8]}"


# What the paper prints


def paper_table(table: str) -> pd.DataFrame:
    """A table of the paper as printed, quoted from ``paper_values.json``."""
    values = json.loads(resources.files("dlsr").joinpath("paper_values.json").read_text("utf-8"))[table]
    return pd.DataFrame(values["rows"], columns=values["columns"])


PAPER_SETS = {
    "CIFAR10": "cifar10/test", "CIFAR100": "cifar100/test", "CIFAR-100": "cifar100/test",
    "CelebA": "celeba/test", "ImageNet100": "imagenet100/val", "SVHN": "svhn/test",
    "LSUN": "lsun_crop/test",  # Table 1 has Table 3's values of LSUN-c under this name
    "LSUN-c": "lsun_crop/test", "LSUN-r": "lsun_resize/test", "iSUN": "isun/test",
    "Textures": "textures/test", "Places365": "places365/val", "MNIST": "mnist/test",
    "FMNIST": "fashion_mnist/test", "KMNIST": "kmnist/test", "Omniglot": "omniglot/test",
    "NotMNIST": "notmnist/test", "TinyImageNet": "tiny_imagenet/val", "SUN": "sun/test",
    "iNaturalist": "inaturalist/test", "average": AVERAGE, "avg": AVERAGE, "AVERAGE": AVERAGE,
}  # fmt: skip
PAPER_ID = {  # of tables that have it in their caption
    "table1": "cifar10/test", "table2": "celeba/test", "table4": "cifar100/test", "table8": "cifar10/test",
    "table9": "cifar10/test", "table11": "cifar10/test", "table12": "imagenet100/val",
}  # fmt: skip
SPEED = ("img/s", "Num img/s")
NAMED = ("ID", "OOD", "Method", "Setting", "Based")


def paper_cells(table: str, metric: str) -> pd.DataFrame:
    """A printed table as one row a value: ``id``, ``ood``, ``setting``, ``method``, ``paper`` (in percent).

    The \u00b1 of three runs is left out; speeds are.
    """
    cells = []
    for row in paper_table(table).to_dict("records"):
        for column, text in row.items():
            if column not in (*NAMED, *SPEED) and text != "-":
                place = _place(table, row, column)
                found = place.pop("metric", metric)
                if found == metric:
                    cells.append(place | {"paper": float(text.split("\u00b1")[0])})
    return pd.DataFrame(cells, columns=["id", "ood", "setting", "method", "paper"])


def _place(table: str, row: Mapping[str, str], column: str) -> dict[str, str]:
    """What a printed cell is of, by its row and its column's title."""
    start = table.split("_")[0]
    place = {"setting": row.get("Setting", ""), "method": row.get("Method", ""), "ood": AVERAGE}
    place["id"] = PAPER_SETS.get(row.get("ID", ""), PAPER_ID.get(start, ""))
    for word in column.split():
        if word.lower() in METRICS:
            place["metric"] = word.lower()
        elif word in PAPER_SETS:
            place["ood"] = PAPER_SETS[word]
        elif word in ("single", "multi"):
            place["setting"] = word
        else:
            place["method"] = word if word.startswith("ours") or word == "LMD" else f"ours(+{word})"
    if start == "table8":
        place["ood"] = "cifar100/test"
    if "OOD" in row:
        place["ood"] = PAPER_SETS.get(row["OOD"], AVERAGE)
    return place


def compare(run: Settings, rows: pd.DataFrame) -> pd.DataFrame:
    """Every cell of the item's table: the paper's value, quoted, and the measured one with its interval.

    One row a cell: ``setting``, ``id``, ``ood``, ``line``, ``metric``, ``paper`` (NaN where it prints
    none), ``measured``, ``ci_low``, ``ci_high``, ``seed_low``, ``seed_high``, ``difference`` (NaN where
    the paper's line is of other features, or its mean of other sets), ``partial``, ``why`` it was not
    measured. An average is over the sets that were measured, of the paper's cells too where it has them.
    """
    tables = {} if run.profile == "demo" else run.item.tables
    printed = {metric: paper_cells(table, metric) for metric, table in tables.items()}
    cells = []
    for experiment in run.experiments or run.item.profiles["paper"]:
        own = rows[(rows["stages"] == stamp(experiment)) & (rows["versus"] == "")]
        cells += [
            _cell(experiment, own, line, ood, metric) | _printed(experiment, printed.get(metric), line, ood)
            for metric in run.item.metrics
            for line in experiment.lines
            for ood in [*experiment.ood, *([AVERAGE] if len(experiment.ood) > 1 else [])]
        ]
    table = pd.DataFrame(cells, columns=[*CELLS, "same_sets"])
    if not run.experiments:
        table["why"] = run.item.unmeasured
    alike = (table["same"] & table.pop("same_sets")).astype(bool)
    return table.assign(difference=(table["measured"] - table["paper"]).where(alike))


CELLS = [
    "setting", "id", "ood", "line", "same", "metric", "paper", "measured", "ci_low", "ci_high",
    "seed_low", "seed_high", "difference", "partial", "why",
]  # fmt: skip


def _cell(experiment: Experiment, rows: pd.DataFrame, line: Line, ood: str, metric: str) -> dict[str, Any]:
    """What was measured of one cell, or why it was not."""
    cell = {
        "setting": experiment.setting, "id": experiment.id_test, "ood": ood, "line": line.title,
        "same": line.same, "metric": metric, "why": experiment.why_not(ood) if ood != AVERAGE else "",
    }  # fmt: skip
    wanted = {"ood": ood, "metric": metric} | line.variant(experiment.layers, experiment.headline)
    found = rows[np.logical_and.reduce([rows[name] == value for name, value in wanted.items()])]
    if len(found):
        (mean,) = found[found["seed"] == "mean"].to_dict("records")
        seeds = found.loc[found["seed"] != "mean", "value"]
        cell |= {name: mean[name] for name in ("ci_low", "ci_high", "partial")}
        cell |= {"measured": mean["value"], "seed_low": seeds.min(), "seed_high": seeds.max()}
    elif not cell["why"]:
        alone = ood == AVERAGE and len(experiment.available) < 2
        cell["why"] = "fewer than two sets" if alone else "not run yet"
    return cell


def _printed(experiment: Experiment, printed: pd.DataFrame | None, line: Line, ood: str) -> dict[str, Any]:
    """The paper's value of a cell, NaN where it prints none, and whether it is of the same sets."""
    if printed is None:
        return {"paper": np.nan, "same_sets": False}
    of_line = printed[
        printed["method"].isin(line.quoted)
        & (printed["id"] == experiment.id_test)
        & (printed["setting"] == experiment.setting)
    ]
    values = of_line.set_index("ood")["paper"]
    if ood == AVERAGE and experiment.available and set(experiment.available) <= set(values.index):
        return {"paper": float(values[list(experiment.available)].mean()), "same_sets": True}
    paper = float(values[ood]) if ood in values.index else np.nan
    return {"paper": paper, "same_sets": ood != AVERAGE or experiment.available == experiment.ood}


def headline(rows: pd.DataFrame, *, ood: str, metrics: Sequence[str] = METRICS) -> pd.DataFrame:
    """``score``, ``metric``, ``value``, ``ci_low``, ``ci_high`` of the three scores on one OOD set."""
    chosen = [
        select(rows, ood=ood, metric=metric, **line.variant("all")) for metric in metrics for line in OURS
    ]
    columns = ["score", "metric", "value", "ci_low", "ci_high"]
    return pd.DataFrame(chosen, columns=columns).reset_index(drop=True)


def select(rows: pd.DataFrame, **wanted: Any) -> pd.Series:
    """The one row with these values; the mean over seeds in the headline setting unless said."""
    wanted = {"seed": "mean", "versus": ""} | HEADLINE.columns | wanted
    chosen = rows[np.logical_and.reduce([rows[name] == value for name, value in wanted.items()])]
    if len(chosen) != 1:
        raise UserError(f"{len(chosen)} rows of the results fit {wanted}; exactly one is needed.")
    return chosen.iloc[0]


def with_profile(profile: str) -> list[Item]:
    """The items that have this profile; an unknown one is refused."""
    items = [item for item in ITEMS.values() if profile in item.profiles]
    if not items:
        known = dict.fromkeys(name for item in ITEMS.values() for name in item.profiles)
        raise UserError(f"The profile {profile!r} is unknown; choose one of {', '.join(known)}.")
    return items


def state(run: Settings) -> str:
    """``up to date``; ``out of date: <stages>``; ``not run``; or why it cannot be run."""
    if not run.experiments:
        return f"not measured: {run.item.unmeasured}"
    old = [e for e in run.experiments if not is_current(run, e)]
    if not old:
        return "up to date"
    rows = read_results(run)
    known = rows.loc[rows["profile"] == run.profile, "stages"].unique()
    if len(known) == 0:
        return "not run"
    stages = [stage for stage in STAGES if any(not _has_stage(known, e, stage) for e in old)]
    return f"out of date: {', '.join(stages) or 'sets'}"


def _has_stage(known: Sequence[str], experiment: Experiment, stage: str) -> bool:
    return any(f"{stage}:{experiment.stages()[stage]}" in line for line in known)
