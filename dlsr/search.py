"""The search: every rival's settings and every variant on the development sets, and what it ends in."""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn
from tqdm import tqdm

from dlsr.baselines import Detector, Reconstructing, train_network
from dlsr.comparison import DEVELOPMENT, Data, Study
from dlsr.datasets import UserError
from dlsr.features import CODE as FEATURES_CODE
from dlsr.features import Features, code_hash, replace_file
from dlsr.metrics import auroc
from dlsr.results import results_folder
from dlsr.rivals import RIVALS, Rival
from dlsr.training import Trained, TrainingSettings, checkpoint_file, train
from dlsr.variants import VARIANTS, Bank, LinearDenoiser, Score, Variant, untrained

KINDS = ("z0", "raw")  # of features: the paper's; pooled, standardised over the training images
DATA_CODE = (*FEATURES_CODE, *(f"comparison.{name}" for name in ("split", "pick", "rows_of", "Data")))
RIVALS_CODE = (*DATA_CODE, "lfdn", "baselines", "rivals")
VARIANTS_CODE = (*RIVALS_CODE[:-1], "diffusion", "training", "scores", "variants")
PAPER_PARAMETERS = 86.74e6  # of the paper's LFDN, on 720 features
TIMED = 1000  # images, from which the time of more is told
BUDGET = 3 * PAPER_PARAMETERS  # multiply-adds an image that the recommended score may cost


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
        self._stands_in: dict[str, nn.Module] = {}
        self._seconds: dict[str, float] = {}

    def training(self, network: str) -> TrainingSettings:
        """Of a network by its name: ``small`` has half the width and depth of ``base``.

        ``standardised`` is a small one on raw features, standardised over the fitted images.
        """
        own = self.study.training
        return own if network == "base" else replace(own, width=own.width // 2, blocks=own.blocks // 2)

    def vectors(self, features: Features, network: str) -> np.ndarray:
        """(N, c): what a network sees of these features."""
        return self.inputs.of(features, "raw" if network == "standardised" else "z0")

    def network(self, name: str) -> Trained:
        """A trained LFDN; one that was trained before is only read."""
        if name not in self._networks:
            self._networks[name] = self._train(name, self.training(name))
        return self._networks[name]

    def _train(self, name: str, settings: TrainingSettings) -> Trained:
        vectors = self.vectors(self.fitted, name)
        file = checkpoint_file(vectors, settings)
        return train(vectors, settings, checkpoint=file, progress=self.progress)

    def training_seconds(self, name: str) -> float:
        """What a network's training takes on this machine, from one epoch of `TIMED` of its vectors."""
        if name not in self._seconds:
            vectors, settings = self.vectors(self.fitted, name), self.training(name)
            one = train(vectors[:TIMED], replace(settings, epochs=1), progress=False)
            self._seconds[name] = settings.epochs * len(vectors) / one.vectors_per_second
        return self._seconds[name]

    def bank(self, place: str, features: Features, network: str) -> Bank:
        """The residuals of a place's images under a network.

        ``linear/NAME`` and the like are under what stands in that network's place; see `denoiser`.
        """
        if (place, network) not in self._banks:
            instead, _, name = network.rpartition("/")
            if instead:
                bank = self.bank(place, features, name).under(self.denoiser(network))
            else:
                vectors = self.vectors(features, name)
                bank = Bank(self.network(name), vectors, self.channels, name=place)
            self._banks[place, network] = bank
        return self._banks[place, network]

    def denoiser(self, network: str) -> nn.Module:
        """A trained LFDN; or what stands in its place.

        Of ``linear/NAME`` the closed form, of ``untrained/NAME`` the network before its training, of
        ``reseeded/NAME`` one that is trained from another seed.
        """
        instead, _, name = network.rpartition("/")
        if not instead:
            return self.network(name).network
        if network not in self._stands_in:
            own = self.training(name)
            size = {"width": own.width, "blocks": own.blocks, "seed": own.seed}
            make = {
                "linear": lambda: LinearDenoiser.fit(self.vectors(self.fitted, name)),
                "untrained": lambda: untrained(sum(self.channels), **size),
                "reseeded": lambda: self._train(name, replace(own, seed=own.seed + 1)).network,
            }
            self._stands_in[network] = make[instead]()
        return self._stands_in[network]

    def fit_variant(
        self, variant: Variant, network: str = ""
    ) -> tuple[Callable[[str, Features], np.ndarray], Score]:
        """A variant fitted on ID images, as a function of a place's name and features; and its score."""
        network = network or variant.network
        fitted = self.bank("fitted", self.fitted, network)
        score = copy.deepcopy(variant.score)  # fitted by another network too, none takes the other's place
        score.fit(fitted, self.bank("calibration", self.calibration, network))
        return (lambda place, features: score.score(self.bank(place, features, network))), score

    def cost(self, variant: Variant) -> float:
        """Multiply-adds an image by this study's network."""
        parameters = sum(p.numel() for p in self.denoiser(variant.network).parameters())
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
    file = search_file(study, profile)
    old = read_table(file) if file.is_file() else pd.DataFrame(columns=SEARCH)
    data = Data(study, progress=progress)
    bench = bench_of(data, progress=progress)
    dev_id = data.of_id(study.id_train).take(data.split.development)
    places = {ood: data.of_ood(ood, "matched") for ood in study.of(DEVELOPMENT)}
    todo = list(tried(study))
    held = old.merge(pd.DataFrame(todo))[SEARCH]  # less what is tried no more
    if len(held) < len(old):
        replace_file(file, lambda path: held.to_csv(path, index=False))
    old = held
    for about in tqdm(todo, desc="search", disable=not progress):
        mine = np.logical_and.reduce([old[name] == value for name, value in about.items()])
        if mine.sum() == len(places):
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
        old = pd.concat([old[~mine], pd.DataFrame(rows)[SEARCH]], ignore_index=True)
        replace_file(file, lambda path, table=old: table.to_csv(path, index=False))
    return read_table(file)


NUMBERS = ("multiply_adds", "auroc", "seconds", "value", "ci_low", "ci_high", "difference", "p", "p_holm")


def read_table(file: Path) -> pd.DataFrame:
    """A table of the chapter: empty cells of text are ``""``, of numbers NaN."""
    empty = {name: [""] for name in NUMBERS}
    return pd.read_csv(file, keep_default_na=False, na_values=empty, dtype={"stamp": str})


def search_file(study: Study, profile: str) -> Path:
    """The log of the search."""
    return chapter_folder(profile) / f"search-{study.encoder}.csv"


def search_sha256(table: pd.DataFrame) -> str:
    """A hash of what the search found; how long it took does not enter."""
    text = table.drop(columns="seconds").to_csv(index=False, float_format="%.4f")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def tried(study: Study) -> Iterator[dict[str, str]]:
    """What tells each thing that the search tries."""
    stamp = stamp_of(study, RIVALS_CODE)
    for kind in KINDS:
        for rival in RIVALS.values():
            for label, _ in rival.candidates:
                yield {
                    "encoder": study.encoder, "kind": "rival", "features": kind, "name": rival.name,
                    "setting": label, "idea": rival.title, "stamp": stamp,
                }  # fmt: skip
    stamp = stamp_of(study, VARIANTS_CODE)
    for name, variant in VARIANTS.items():
        yield {
            "encoder": study.encoder, "kind": "variant", "features": "z0", "name": name, "setting": "",
            "idea": variant.idea, "stamp": stamp,
        }  # fmt: skip


def stamp_of(study: Study, code: tuple[str, ...], *more: str) -> str:
    """A hash of a study's settings and of the code that its scores are made by."""
    settings = json.dumps([asdict(study), *more], sort_keys=True, default=str)
    return hashlib.sha256((settings + code_hash(*code)).encode()).hexdigest()[:12]


def _fit(bench: Bench, about: Mapping[str, str]) -> tuple[Callable[[str, Features], np.ndarray], float]:
    """A candidate fitted, as a function of a place and its features; and its multiply-adds, NaN of rivals."""
    if about["kind"] == "variant":
        variant = VARIANTS[about["name"]]
        return bench.fit_variant(variant)[0], bench.cost(variant)
    return fit_rival(bench, RIVALS[about["name"]], about["setting"], about["features"])[0], np.nan


def fit_rival(
    bench: Bench, rival: Rival, label: str, kind: str
) -> tuple[Callable[[str, Features], np.ndarray], Detector]:
    """A rival with these settings fitted on one of `KINDS`, as a function of a place and its features."""
    detector = build(rival, label, bench.channels).fit(bench.inputs.of(bench.fitted, kind))
    return (lambda _, features: detector.all_scores(bench.inputs.of(features, kind))[rival.score]), detector


def rival_training_seconds(bench: Bench, rival: Rival, label: str, kind: str) -> float:
    """What a rival's training takes on this machine, from one epoch of `TIMED` of its vectors.

    0 of those that train no network that the cache keeps: `fit_rival` is the whole of their fit.
    """
    detector = build(rival, label, bench.channels)
    if not isinstance(detector, Reconstructing):
        return 0.0
    x = bench.inputs.of(bench.fitted, kind)
    network = detector.fit(x).network_.train().requires_grad_(True)
    names = ("lr", "weight_decay", "batch_size", "seed")
    options = {name: getattr(detector, name) for name in names}
    began = time.perf_counter()
    train_network(network, x[:TIMED], epochs=1, **options, device=next(network.parameters()).device)
    return detector.epochs * len(x) / min(TIMED, len(x)) * (time.perf_counter() - began)


def build(rival: Rival, label: str, channels: tuple[int, ...]) -> Detector:
    """A rival's unfitted detector with the settings of this label."""
    return dict(rival.candidates)[label](channels, 0)


def objectives(table: pd.DataFrame) -> pd.DataFrame:
    """Each candidate's mean near and mean far AUROC on development, and the mean of both; best first."""
    names = ["encoder", "kind", "features", "name", "setting", "idea", "multiply_adds"]
    wide = table.groupby([*names, "group"], dropna=False)["auroc"].mean().unstack()
    wide = wide.reset_index().assign(objective=lambda rows: (rows["near"] + rows["far"]) / 2)
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
        "search_sha256": search_sha256(table),
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
