"""An experiment: what is fitted on one ID set, scored on others, and when that is out of date."""

import hashlib
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from dlsr.baselines import BASELINES, Detector
from dlsr.datasets import DATASETS, PACK, UserError, load_images, partial_reason
from dlsr.diffusion import Reconstruction
from dlsr.encoders import get_encoder
from dlsr.features import CODE as FEATURES_CODE
from dlsr.features import Features, code_hash, extract, layer_slices
from dlsr.results import SetScores, joined, read_scores, variant_column, write_scores
from dlsr.scores import all_scores
from dlsr.training import CODE as TRAINING_CODE
from dlsr.training import Trained, TrainingSettings, checkpoint_file, train

HEADLINE = Reconstruction("released", t=3)
METHOD = "DLSR"
STAGES = {  # the code a stage is made by; what it is made from enters through its settings
    "features": FEATURES_CODE,
    "training": TRAINING_CODE,
    "scores": ("lfdn", "diffusion", "scores", "experiments.Work"),
    "metrics": ("metrics", "results"),
}


@dataclass(frozen=True)
class Line:
    """A line of the tables: a score of a method, and what the paper calls it.

    ``same`` is False where the paper's line was computed on other features or by another classifier:
    then its values stand beside, and no difference is taken.
    """

    title: str
    method: str
    score: str
    layers: str
    quoted: tuple[str, ...]
    same: bool = True

    def column(self, layers: str, way: Reconstruction = HEADLINE) -> str:
        """Its column among the scores of an LFDN on these layers."""
        return variant_column(self.variant(layers, way))

    def variant(self, layers: str, way: Reconstruction = HEADLINE) -> dict[str, str | int]:
        """Its values in the results; one layer alone has no layers 2..M."""
        scored = "all" if self.layers == "2..M" and layers != "all" else self.layers
        own = {"method": method_name(self.method, layers), "score": self.score, "layers": scored}
        return own | (way.columns if self.method == METHOD else NO_WAY)


def method_name(method: str, layers: str) -> str:
    """What the results call a method that sees these layers."""
    if layers == "all":
        return method
    return f"{method}, {'last layer' if layers == 'last' else f'layer {layers}'} alone"


NO_WAY = {"reconstruction": "", "t": 0, "noise_draws": 0}  # of methods that do not diffuse
OURS = (
    Line("MSE", METHOD, "mse", "all", ("ours(+MSE)",)),
    Line("LR", METHOD, "lr", "all", ("ours(+LR)",)),
    Line("MFsim", METHOD, "mfsim", "2..M", ("ours(+MFsim)", "Diffusion(+MFsim)")),
)
LINES = (
    *OURS,
    Line("AE, MFsim", "ae", "mfsim", "2..M",
         ("AutoEncoder (feature, MFsim)", "AutoEncoder (feature)", "AE(+MFsim)")),
    Line("VAE, MFsim", "vae", "mfsim", "2..M", ("VAE(+MFsim)",)),
    Line("kNN", "knn", "knn", "all", ("SimCLR+KNN",), same=False),
    Line("Mahalanobis", "mahalanobis", "mahalanobis", "all", ("SimCLR+Mahalanobis",), same=False),
    Line("MSP (uses labels)", "probe", "msp", "last", ("MSP",), same=False),
    Line("Energy (uses labels)", "probe", "energy", "last", ("EBO",), same=False),
    Line("DICE (uses labels)", "probe", "dice", "last", ("DICE",), same=False),
    Line("ASH-S (uses labels)", "probe", "ash_s", "last", ("ASH-S",), same=False),
)  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """One ID set, its OOD sets, and what is fitted and scored on them.

    ``layers`` are those that the LFDN sees: ``all``, ``last`` or one layer's number. ``setting`` is
    its name where the paper's table has several. ``n_train`` and ``n_test`` take a seeded pick of
    every set; 0 takes all. ``downloads`` says whether sets that are not here are fetched.
    """

    id_train: str
    id_test: str
    ood: tuple[str, ...]
    encoder: str
    training: TrainingSettings
    seeds: int = 1
    reconstructions: tuple[Reconstruction, ...] = (HEADLINE,)
    by_layer: bool = False
    layers: str = "all"
    baselines: tuple[str, ...] = ()
    setting: str = ""
    n_train: int = 0
    n_test: int = 0
    protocol: str = "native"
    pooling: str = "gap"
    downloads: bool = False

    @property
    def available(self) -> tuple[str, ...]:
        """The OOD sets that are scored: all where they are fetched, else those of the pack."""
        return tuple(name for name in self.ood if not self.why_not(name))

    def why_not(self, ood: str) -> str:
        """Why an OOD set is not measured; empty if it is."""
        here = self.downloads or DATASETS[ood].source in (PACK, "scikit-learn")
        return "" if here else "not in the data pack"

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets that are scored: ID test first, then OOD."""
        return (self.id_test, *self.available)

    @property
    def headline(self) -> Reconstruction:
        """The reconstruction of the tables: `HEADLINE`, or the first where that is not among them."""
        return HEADLINE if HEADLINE in self.reconstructions else self.reconstructions[0]

    @property
    def columns(self) -> list[str]:
        """The columns of MSE, LR and MFsim among its scores."""
        return [line.column(self.layers, self.headline) for line in OURS]

    @property
    def lines(self) -> list[Line]:
        """The lines of its table."""
        return [line for line in LINES if line.method in (METHOD, *self.baselines)]

    def fits(self) -> list[tuple[str, int]]:
        """(method, seed) of all that is fitted; baselines have one seed."""
        return [(METHOD, seed) for seed in range(self.seeds)] + [(name, 0) for name in self.baselines]

    def stages(self) -> dict[str, str]:
        """A hash of each stage's settings, data and code; it changes when the stage is out of date."""
        images = [DATASETS[name].sha256 for name in (self.id_train, *self.sets)]
        sizes = [BASELINES[name].size for name in self.baselines]
        made_from = {
            "features": [self.encoder, self.protocol, self.pooling, self.n_train, self.n_test, images],
            "training": [asdict(self.training), self.seeds, self.layers, self.baselines, sizes],
            "scores": [[way.columns for way in self.reconstructions], self.by_layer],
            "metrics": [],
        }
        code = {stage: code_hash(*files) for stage, files in STAGES.items()}
        if self.baselines:
            code |= {stage: code[stage] + code_hash("baselines") for stage in ("training", "scores")}
        return {stage: _hash([settings, code[stage]]) for stage, settings in made_from.items()}

    def fit_name(self, method: str, seed: int) -> str:
        """A folder name that tells fits apart: ``cifar10-<encoder>-native-gap-8x720-30epochs-seed0``."""
        training = self.training
        size = f"{training.blocks}x{training.width}-{training.epochs}epochs-seed{seed}"
        parts = [self.id_train.split("/")[0], self.encoder, self.protocol, self.pooling]
        parts += [f"layer-{self.layers}"] if self.layers != "all" else []
        parts += [f"n{self.n_train}"] if self.n_train else []
        return "-".join([*parts, size if method == METHOD else method])


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


class Work:
    """What an experiment has made so far; each thing is made when it is first asked for."""

    def __init__(self, experiment: Experiment, *, progress: bool = True) -> None:
        self.experiment, self.progress = experiment, progress
        self._features: dict[str, Features] = {}
        self._networks: dict[int, Trained] = {}
        self._baselines: dict[str, Detector] = {}

    def features(self, name: str) -> Features:
        """Of one set, out of the cache where they are there."""
        if name not in self._features:
            experiment = self.experiment
            n = experiment.n_train if name == experiment.id_train else experiment.n_test
            images = load_images(name)
            images = images.subset(min(n, len(images))) if n else images
            id_size = DATASETS[experiment.id_train].size
            options = {"protocol": experiment.protocol, "id_size": id_size, "progress": self.progress}
            self._features[name] = extract(images, get_encoder(experiment.encoder), **options)
        return self._features[name]

    def z0(self, name: str) -> tuple[np.ndarray, tuple[int, ...]]:
        """(N, c) of one set, and the channels of the layers in it."""
        features, layers = self.features(name), self.experiment.layers
        z0 = features.z0(self.experiment.pooling)
        if layers == "all":
            return z0, features.channels
        place = layer_place(layers, features.channels)
        chosen = layer_slices(features.channels)[place]
        return np.ascontiguousarray(z0[:, chosen]), (features.channels[place],)

    def network(self, seed: int) -> Trained:
        """The LFDN of this seed; one that was trained before is only read."""
        if seed not in self._networks:
            z0, _ = self.z0(self.experiment.id_train)
            settings = replace(self.experiment.training, seed=seed)
            file = checkpoint_file(z0, settings)
            self._networks[seed] = train(z0, settings, checkpoint=file, progress=self.progress)
        return self._networks[seed]

    def baseline(self, name: str) -> Detector:
        """A baseline, fitted on the same training images."""
        if name not in self._baselines:
            row, train_set = BASELINES[name], self.experiment.id_train
            labels = np.asarray(self.features(train_set).labels) if row.labels else None
            detector = row.build(self.z0(train_set)[1], 0)
            self._baselines[name] = detector.fit(self._input(name, train_set), labels)
        return self._baselines[name]

    def _input(self, baseline: str, name: str) -> np.ndarray:
        if BASELINES[baseline].features == "z0":
            return self.z0(name)[0]
        features = self.features(name)
        last = layer_slices(features.channels)[-1]
        return features.raw(self.experiment.pooling)[:, last]

    def score(self, method: str, seed: int, name: str) -> SetScores:
        """All columns of one set by one fit, with the settings they were made in."""
        ways = self.experiment.reconstructions if method == METHOD else (None,)
        columns, values = {}, {}
        for way in ways:
            found, about = self._score_by(method, seed, name, way)
            for (score, layers), numbers in found.items():
                if layers.isdigit() and not (self.experiment.by_layer and way == self.experiment.headline):
                    continue
                variant = {"score": score, "layers": layers} | about
                columns[variant_column(variant)] = variant
                values[variant_column(variant)] = numbers
        table = {"set": name, "image": self.features(name).ids}
        return SetScores(pd.DataFrame(table | values), columns, self._about(method, seed, name))

    def _score_by(
        self, method: str, seed: int, name: str, way: Reconstruction | None
    ) -> tuple[dict[tuple[str, str], np.ndarray], dict]:
        """Scores of one set by one reconstruction, and the columns of the results that go with it."""
        rate = self.features(name).images_per_second
        if way is None:
            detector, vectors = self.baseline(method), self._input(method, name)
            began = time.perf_counter()
            found = detector.all_scores(vectors)
            named = method_name(method, self.experiment.layers)
            about = {"method": named, **BASELINES[method].size, **NO_WAY}
        else:
            trained, (z0, channels) = self.network(seed), self.z0(name)
            noise = zlib.crc32(f"{name} {seed}".encode())  # sets must not share their noise
            began = time.perf_counter()
            found = all_scores(trained, z0, channels, way, seed=noise, stride_seed=seed)
            size = {key: getattr(self.experiment.training, key) for key in ("width", "blocks", "epochs")}
            named = method_name(METHOD, self.experiment.layers)
            about = {"method": named, **size, **way.columns}
        seconds = time.perf_counter() - began
        about["images_per_second"] = 1 / (1 / rate + seconds / len(self.features(name)))
        return found, about

    def _about(self, method: str, seed: int, name: str) -> dict:
        """The settings that all columns of a file share."""
        experiment, train_set = self.experiment, self.features(self.experiment.id_train)
        about = {
            "seed": seed,
            "id_train": experiment.id_train,
            "n_train": len(train_set),
            "encoder": experiment.encoder,
            "weights_sha256": train_set.key.weights_sha256,
            "images_sha256": self.features(name).key.images_sha256,
            "protocol": experiment.protocol,
            "pooling": experiment.pooling,
            "partial": partial_reason(name),
            "train_partial": partial_reason(experiment.id_train),
            "channels": list(train_set.channels),
            "extracted_per_second": self.features(name).images_per_second,
            "device": self.features(name).device,
        }
        if method == METHOD:
            trained = self.network(seed)
            about |= {"losses": trained.losses, "device": "+".join(sorted({about["device"], trained.device}))}
        return about


def layer_place(layers: str, channels: Sequence[int]) -> int:
    """The index of a layer named ``last`` or by its number from 1; one that is not there is refused."""
    place = len(channels) if layers == "last" else int(layers) if layers.isdecimal() else 0
    if not 1 <= place <= len(channels):
        raise UserError(f"layers={layers!r} was given; it is all, last, or a number in 1..{len(channels)}.")
    return place - 1


def score(experiment: Experiment, folder: Path, *, progress: bool = True) -> dict[str, list[SetScores]]:
    """Scores of all sets by each method, a table a seed; what ``folder`` holds and fits is only read."""
    work = Work(experiment, progress=progress)
    runs: dict[str, list[SetScores]] = {}
    todo = [(*fit, name) for fit in experiment.fits() for name in experiment.sets]
    parts = []
    for method, seed, name in tqdm(todo, desc="scores", unit="set", disable=not progress):
        parts.append(_stored(work, method, seed, name, folder))
    for i, (method, _) in enumerate(experiment.fits()):
        n = len(experiment.sets)
        runs.setdefault(method, []).append(joined(parts[i * n : (i + 1) * n]))
    return runs


def _stored(work: Work, method: str, seed: int, name: str, folder: Path) -> SetScores:
    """One set's scores by one fit: read, or made and written."""
    experiment = work.experiment
    number = f"-{experiment.n_test}" if experiment.n_test else ""
    file = folder / experiment.fit_name(method, seed) / f"{name.replace('/', '-')}{number}.parquet"
    baselines = () if method == METHOD else (method,)
    ood = () if name == experiment.id_test else (name,)
    alike = {"seeds": 1, "reconstructions": (), "by_layer": False, "setting": "", "downloads": True}
    one = replace(experiment, ood=ood, baselines=baselines, **alike)
    stages = {stage: value for stage, value in one.stages().items() if stage != "metrics"}
    old = read_scores(file) if file.is_file() else None
    if old is not None and old.about.get("stages") != stages:
        old = None
    if old is None or not _holds(old, method, experiment):
        made = work.score(method, seed, name)
        old = _merged(old, made, stages)
        write_scores(file, old)
    kept = _kept(old, method, experiment)
    table = old.table[["set", "image", *kept]]
    return SetScores(table, {column: old.columns[column] for column in kept}, old.about)


def _merged(old: SetScores | None, made: SetScores, stages: Mapping[str, str]) -> SetScores:
    """New columns beside those that were there already, of the same images."""
    table, columns = made.table, dict(made.columns)
    if old is not None:
        more = [column for column in old.columns if column not in columns]
        table = pd.concat([table, old.table[more]], axis=1)
        columns |= {column: old.columns[column] for column in more}
    return SetScores(table, columns, dict(made.about) | {"stages": dict(stages)})


def _kept(scores: SetScores, method: str, experiment: Experiment) -> list[str]:
    """The columns that belong to the experiment, in its order; files are shared between experiments."""
    if method != METHOD:
        return list(scores.columns)
    return [
        column
        for way in experiment.reconstructions
        for column, variant in scores.columns.items()
        if {name: variant[name] for name in way.columns} == way.columns
        and (not variant["layers"].isdigit() or (experiment.by_layer and way == experiment.headline))
    ]


def _holds(scores: SetScores, method: str, experiment: Experiment) -> bool:
    """Whether a file has all columns that the experiment needs."""
    if method != METHOD:
        return True
    held = {
        (variant["layers"].isdigit(), *(variant[name] for name in HEADLINE.columns))
        for variant in scores.columns.values()
    }
    needed = {(False, *way.columns.values()) for way in experiment.reconstructions}
    by_layer = {(True, *experiment.headline.columns.values())} if experiment.by_layer else set()
    return needed | by_layer <= held
