"""The chapter's measurements: a search on development sets, the choice it ends in, then the report."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn
from tqdm import tqdm

from dlsr.baselines import Mahalanobis
from dlsr.comparison import CONTROLS, DEVELOPMENT, VIEWS, Data, Study
from dlsr.datasets import UserError
from dlsr.experiments import OURS
from dlsr.features import CODE as FEATURES_CODE
from dlsr.features import Features, code_hash, layer_slices, replace_file
from dlsr.metrics import auroc
from dlsr.results import results_folder
from dlsr.rivals import RIVALS, Rival, size_in_bytes
from dlsr.training import Trained, TrainingSettings, checkpoint_file, train
from dlsr.variants import VARIANTS, Bank, LinearDenoiser, Variant, untrained, without_network

KINDS = ("z0", "raw")  # of features: the paper's; pooled, standardised over the training images
RIVALS_CODE = (*FEATURES_CODE, "comparison", "lfdn", "baselines", "rivals")
VARIANTS_CODE = (
    *FEATURES_CODE,
    "comparison",
    "lfdn",
    "diffusion",
    "training",
    "scores",
    "baselines",
    "variants",
)
PAPER_PARAMETERS = 86.74e6  # of the paper's LFDN, on 720 features
BUDGET = 3 * PAPER_PARAMETERS  # multiply-adds an image that the recommended score may cost
PAPERS = {line.score: line.title for line in OURS}
RECOMMENDED = "recommended"
CONTROL_TITLES = {
    "removed": "without the LFDN",
    "linear": "with the linear denoiser",
    "untrained": "with an untrained LFDN",
}
HALF_CALIBRATION = 10  # one in so many of the control's training images calibrates


def chapter_folder(profile: str) -> Path:
    """Where the chapter's tables and scores lie."""
    return results_folder(profile) / "comparison"


def choice_file(profile: str) -> Path:
    """What the search ended in; nothing of the search touches a report set before it is there."""
    return results_folder(profile) / "choice.json"


class Inputs:
    """What detectors are given, made from features: z0, or raw ones standardised over ``fitted``."""

    def __init__(self, fitted: Features) -> None:
        raw = np.asarray(fitted.raw(), dtype=np.float64)
        self.mean, self.std = raw.mean(axis=0), raw.std(axis=0) + 1e-12

    def of(self, features: Features, kind: str) -> np.ndarray:
        """(N, c) float32."""
        if kind == "z0":
            return features.z0()
        return ((features.raw() - self.mean) / self.std).astype(np.float32)


class Bench:
    """Fitted and held-out ID features of a study, and the networks trained on the fitted ones."""

    def __init__(
        self, study: Study, fitted: Features, calibration: Features, *, progress: bool = True
    ) -> None:
        self.study, self.fitted, self.calibration = study, fitted, calibration
        self.progress, self.inputs, self.channels = progress, Inputs(fitted), fitted.channels
        self._networks: dict[str, Trained] = {}
        self._banks: dict[tuple[str, str], Bank] = {}
        self._stands_in: dict[tuple[str, str], nn.Module] = {}

    def training(self, network: str) -> TrainingSettings:
        """Of a network by its name: ``small`` has half the width and depth, ``short`` a sixth of the epochs.

        ``standardised`` is a small one on raw features, standardised over the fitted images.
        """
        own = self.study.training
        half = replace(own, width=own.width // 2, blocks=own.blocks // 2)
        short = replace(own, epochs=max(own.epochs // 6, 1))
        return {"base": own, "small": half, "short": short, "standardised": half}[network]

    def vectors(self, features: Features, network: str) -> np.ndarray:
        """(N, c): what a network sees of these features."""
        return self.inputs.of(features, "raw" if network == "standardised" else "z0")

    def network(self, name: str) -> Trained:
        """A trained LFDN; one that was trained before is only read."""
        if name not in self._networks:
            vectors, settings = self.vectors(self.fitted, name), self.training(name)
            file = checkpoint_file(vectors, settings)
            self._networks[name] = train(vectors, settings, checkpoint=file, progress=self.progress)
        return self._networks[name]

    def bank(self, place: str, features: Features, network: str) -> Bank:
        """The residuals of a place's images under a network.

        ``linear/NAME`` and ``untrained/NAME`` are under what stands in that network's place.
        """
        if (place, network) not in self._banks:
            instead, _, name = network.rpartition("/")
            if instead:
                bank = self.bank(place, features, name).under(self._instead(instead, name))
            else:
                vectors = self.vectors(features, name)
                bank = Bank(self.network(name), vectors, self.channels, name=place)
            self._banks[place, network] = bank
        return self._banks[place, network]

    def _instead(self, instead: str, name: str) -> nn.Module:
        """The closed-form denoiser of the fitted images, or an untrained network."""
        if (instead, name) not in self._stands_in:
            own = self.training(name)
            size = {"width": own.width, "blocks": own.blocks, "seed": own.seed}
            linear = instead == "linear"
            self._stands_in[instead, name] = (
                LinearDenoiser.fit(self.vectors(self.fitted, name))
                if linear
                else untrained(sum(self.channels), **size)
            )
        return self._stands_in[instead, name]

    def fit_variant(self, variant: Variant, network: str = "") -> Callable[[str, Features], np.ndarray]:
        """A variant fitted on ID images, as a function of a place's name and features."""
        network = network or variant.network
        fitted = self.bank("fitted", self.fitted, network)
        score = variant.score.fit(fitted, self.bank("calibration", self.calibration, network))
        return lambda place, features: score.score(self.bank(place, features, network))

    def cost(self, variant: Variant) -> float:
        """Multiply-adds an image by this study's network."""
        network = self.network(variant.network).network
        parameters = sum(p.numel() for p in network.parameters())
        return variant.score.cost(sum(self.channels), parameters, len(self.fitted))


def bench_of(data: Data, *, progress: bool = True) -> Bench:
    """The bench of a study's split."""
    train_set = data.of_id(data.study.id_train)
    return Bench(
        data.study, train_set.take(data.split.fit), train_set.take(data.split.calibration), progress=progress
    )


# The search


SEARCH = [
    "encoder", "kind", "features", "name", "setting", "idea", "multiply_adds", "ood", "group", "auroc",
    "seconds", "stamp",
]  # fmt: skip


def search(study: Study, profile: str, *, progress: bool = True) -> pd.DataFrame:
    """Every candidate of every rival and every variant on the development sets, matched resolution.

    A row a candidate and set; those that are there already, by the same code, are kept.
    """
    file = chapter_folder(profile) / f"search-{study.encoder}.csv"
    old = pd.read_csv(file, keep_default_na=False) if file.is_file() else pd.DataFrame(columns=SEARCH)
    data = Data(study, progress=progress)
    bench = bench_of(data, progress=progress)
    dev_id = data.of_id(study.id_train).take(data.split.development)
    places = {ood: data.of_ood(ood, "matched") for ood in study.of(DEVELOPMENT)}
    todo = list(_tried(study))
    for about in tqdm(todo, desc="search", disable=not progress):
        kept = old[np.logical_and.reduce([old[name] == value for name, value in about.items()])]
        if len(kept) == len(places):
            continue
        began = time.perf_counter()
        score, cost = _fit(bench, about)
        on_id = score("development", dev_id)
        found = {ood: auroc(on_id, score(ood.name, features)) for ood, features in places.items()}
        seconds = time.perf_counter() - began
        more = {"multiply_adds": cost, "seconds": round(seconds, 1)}
        rows = [
            about | more | {"ood": ood.name, "group": ood.group, "auroc": round(100 * value, 4)}
            for ood, value in found.items()
        ]
        same = np.logical_and.reduce([old[n] == v for n, v in about.items() if n != "stamp"])
        old = pd.concat([old[~same], pd.DataFrame(rows)[SEARCH]], ignore_index=True)
        replace_file(file, lambda path, table=old: table.to_csv(path, index=False))
    return old


def _tried(study: Study) -> Iterator[dict[str, str]]:
    """What tells each thing that the search tries."""
    stamp = _stamp(study, RIVALS_CODE)
    for kind in KINDS:
        for rival in RIVALS.values():
            for label, _ in rival.candidates:
                yield {
                    "encoder": study.encoder, "kind": "rival", "features": kind, "name": rival.name,
                    "setting": label, "idea": rival.title, "stamp": stamp,
                }  # fmt: skip
    stamp = _stamp(study, VARIANTS_CODE)
    for name, variant in VARIANTS.items():
        yield {
            "encoder": study.encoder, "kind": "variant", "features": "z0", "name": name, "setting": "",
            "idea": variant.idea, "stamp": stamp,
        }  # fmt: skip


def _stamp(study: Study, code: tuple[str, ...], *more: str) -> str:
    settings = json.dumps([asdict(study), *more], sort_keys=True, default=str)
    return hashlib.sha256((settings + code_hash(*code)).encode()).hexdigest()[:12]


def _fit(bench: Bench, about: Mapping[str, str]) -> tuple[Callable[[str, Features], np.ndarray], float]:
    """A candidate fitted, as a function of a place and its features; and its multiply-adds, NaN of rivals."""
    if about["kind"] == "variant":
        variant = VARIANTS[about["name"]]
        return bench.fit_variant(variant), bench.cost(variant)
    rival, kind = RIVALS[about["name"]], about["features"]
    detector = _build(rival, about["setting"], bench.channels).fit(bench.inputs.of(bench.fitted, kind))
    return (lambda _, features: detector.all_scores(bench.inputs.of(features, kind))[rival.score]), np.nan


def _build(rival: Rival, label: str, channels: tuple[int, ...]):
    return dict(rival.candidates)[label](channels, 0)


def objectives(table: pd.DataFrame) -> pd.DataFrame:
    """Each candidate's mean near and mean far AUROC on development, and the mean of both; best first."""
    names = ["encoder", "kind", "features", "name", "setting", "idea", "multiply_adds"]
    wide = table.fillna({"multiply_adds": -1.0}).pivot_table("auroc", names, "group", "mean").reset_index()
    wide["objective"] = (wide["near"] + wide["far"]) / 2
    wide["multiply_adds"] = wide["multiply_adds"].where(wide["multiply_adds"] >= 0)
    return wide.sort_values("objective", ascending=False, ignore_index=True).rename_axis(columns=None)


def choose(study: Study, table: pd.DataFrame, profile: str) -> dict:
    """Write ``choice.json``: each rival's setting, the best rival, the best affordable variant."""
    ranked = objectives(table)
    rivals, variants = ranked[ranked["kind"] == "rival"], ranked[ranked["kind"] == "variant"]
    settings: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    for row in rivals.itertuples():
        settings[row.features].setdefault(row.name, row.setting)
    own = variants[(variants["multiply_adds"] <= BUDGET) & ~variants["name"].map(_is_the_papers)]
    best, rival = own.iloc[0], rivals.iloc[0]
    choice = {
        "about": "What the search on the development sets ended in; written before any of it touched a "
        "report set.",
        "encoder": study.encoder,
        "score": best["name"],
        "development": {name: round(float(best[name]), 2) for name in ("near", "far", "objective")},
        "rival": {"features": rival["features"], "name": rival["name"], "setting": rival["setting"]},
        "rival_development": {name: round(float(rival[name]), 2) for name in ("near", "far", "objective")},
        "settings": settings,
        "tried": {"variants": len(variants), "rival candidates": len(rivals)},
        "search_sha256": hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()[:12],
    }
    text = json.dumps(choice, indent=1) + "\n"
    replace_file(choice_file(profile), lambda path: path.write_text(text))
    return choice


def _is_the_papers(name: str) -> bool:
    return VARIANTS[name].idea.startswith("the paper's")


def read_choice(profile: str) -> dict:
    """The committed choice; without it no variant may be scored on a report set."""
    file = choice_file(profile)
    if not file.is_file():
        raise UserError(
            f"There is no {file.name}: the search comes before the report, so that nothing is chosen on the "
            "report sets. Run 43_search first."
        )
    return json.loads(file.read_text("utf-8"))


# The report


@dataclass(frozen=True)
class Entry:
    """A detector of the report: its features, its name, and what it is."""

    features: str
    name: str
    title: str
    kind: str  # rival, paper, recommended, control or layer
    setting: str = ""

    @property
    def file(self) -> str:
        return f"{self.features}-{self.name}.parquet"


def entries(choice: Mapping, channels: tuple[int, ...]) -> list[Entry]:
    """All detectors of the report, in the order of its tables."""
    rivals = [
        Entry(kind, name, RIVALS[name].title, "rival", setting)
        for kind in KINDS
        for name, setting in ((name, choice["settings"][kind][name]) for name in RIVALS)
    ]
    papers = [Entry("z0", score, title, "paper") for score, title in PAPERS.items()]
    own = [Entry("z0", RECOMMENDED, "recommended", "recommended", choice["score"])]
    own += [Entry("z0", name, title, "control", choice["score"]) for name, title in CONTROL_TITLES.items()]
    layers = [
        Entry("z0", f"{name}-layer{m + 1}", f"{title}, layer {m + 1}", "layer", str(m))
        for name, title in (("mse", "MSE"), ("mahalanobis", "Mahalanobis"))
        for m in range(len(channels))
    ]
    return [*papers, *own, *rivals, *layers]


def fit_entry(bench: Bench, entry: Entry) -> tuple[Callable[[str, Features], np.ndarray], int]:
    """A detector of the report fitted, as a function of a place and its features; and its bytes."""
    if entry.kind == "rival":
        rival = RIVALS[entry.name]
        detector = _build(rival, entry.setting, bench.channels)
        detector.fit(bench.inputs.of(bench.fitted, entry.features))
        found = lambda _, f: detector.all_scores(bench.inputs.of(f, entry.features))[rival.score]  # noqa: E731
        return found, size_in_bytes(detector)
    if entry.kind == "layer":
        return _fit_layer(bench, entry), 0
    variant = VARIANTS[PAPERS[entry.name] if entry.kind == "paper" else entry.setting]
    network = variant.network
    if entry.name in ("linear", "untrained"):
        network = f"{entry.name}/{network}"
    if entry.name == "removed":
        left = without_network(variant.score)
        network = network if left else f"untrained/{network}"  # which predicts 0: z0 itself is scored
        variant = replace(variant, score=left or variant.score)
    found = bench.fit_variant(variant, network)
    size = sum(p.numel() * p.element_size() for p in bench.network(variant.network).network.parameters())
    return found, size


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
    _score_all(bench, choice, places, folder / "half", progress=progress)


def _places(data: Data) -> dict[tuple[str, str], Features]:
    """The features of every (set, view) of the report, ID first; ``control`` is ID images, altered."""
    study = data.study
    places = {("id", "native"): data.of_id(study.id_test)}
    for ood in study.sets:
        for view in VIEWS:
            if view == "native" or data.images(ood.dataset).size != study.id_size:
                places[ood.name, view] = data.of_ood(ood, view)
    return places | {("control", name): data.of_control(study.id_test, name) for name in ("", *CONTROLS[1:])}


def _score_all(
    bench: Bench, choice: Mapping, places: Mapping[tuple[str, str], Features], folder: Path, *, progress: bool
) -> None:
    todo = entries(choice, bench.channels)
    for entry in tqdm(todo, desc=folder.name, disable=not progress):
        code = RIVALS_CODE if entry.kind == "rival" else VARIANTS_CODE
        stamp = _stamp(bench.study, code, entry.setting)
        file = folder / entry.file
        if file.is_file() and _about(file)["stamp"] == stamp:
            continue
        began = time.perf_counter()
        score, size = fit_entry(bench, entry)
        fit_seconds = time.perf_counter() - began
        began = time.perf_counter()
        found = {place: score("@".join(place), features) for place, features in places.items()}
        rate = (time.perf_counter() - began) / sum(map(len, found.values()))
        about = asdict(entry) | {
            "stamp": stamp, "fit_seconds": fit_seconds, "score_microseconds": 1e6 * rate, "bytes": size,
            "n_fit": len(bench.fitted), "choice": choice["search_sha256"],
        }  # fmt: skip
        _write_scores(file, found, about)


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
