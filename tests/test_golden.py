"""Numbers must stay what they were: the method on stored arrays, and every committed result.

``golden/method.npz`` and ``golden/features.npz`` hold inputs and outputs of the code that made the
committed results. Results are recomputed from the scores of every image: all point values and
p-values; of the bootstrap intervals those of the main tables, a fixed tenth of the columns of other
tables, of single layers and of first-epoch networks, and every tenth method of the study.
"""

import hashlib
import json
import zlib
from functools import cache
from operator import attrgetter
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from dlsr import data, diffusion, encoders, evaluation, features, metrics, scores, training
from dlsr.lfdn import LFDN
from dlsr.study import report
from dlsr.study.paired import delong, holm, paired_p
from scipy.sparse import csr_matrix
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score

from conftest import from_page

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
gold = np.load(HERE / "golden" / "method.npz", allow_pickle=False)
kept = np.load(HERE / "golden" / "features.npz", allow_pickle=False)
CHANNELS = tuple(int(width) for width in gold["channels"])
LITE0, B4 = (str(name) for name in kept["encoders"])


def aupr_out(id_scores, ood_scores):
    """The average precision with OOD as the positive class."""
    labels = np.repeat([0, 1], [len(id_scores), len(ood_scores)])
    return average_precision_score(labels, np.concatenate([id_scores, ood_scores]))


METRICS = metrics.METRICS | {  # these three are in committed results alone
    "aupr_in": lambda a, b: aupr_out(-b, -a),
    "aupr_out": aupr_out,
    "fpr95_ood_positive": lambda a, b: metrics.fpr95(-b, -a),
}
ENDS = [0.025, 0.975]  # of a 95 % interval
FILES_SHA256 = "63cb2434d365be12b89dd18af8cd3f564f5a035c4dfb7086d987a48286f917b9"
LOG_SHA256 = "52120b180b63cef69418bf763c84ab8191b284670222bcad42c841d06cd563bd"
COSTS_SHA256 = "969cccd82a22c8cdba5b89143caba8c3fa94fb1161625c35a95ae90b12f6779f"


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(RESULTS.parent)


def close(found, wanted, tolerance=1e-5):
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def tensor(name):
    return torch.from_numpy(gold[name])


def network(name):
    model = LFDN(sum(CHANNELS), width=16, blocks=2)
    model.load_state_dict({part: tensor(f"{name}.{part}") for part in model.state_dict()})
    return model.eval()


@torch.inference_mode()
def test_schedule_samplers_and_loss():
    z0, noise, t, model = tensor("z0"), tensor("noise"), tensor("loss_t"), network("network")
    close(diffusion.noise_schedule(), gold["schedule"])
    close(model(z0, t), gold["network_out"])
    close(training.diffusion_loss(model, z0, t, tensor("loss_noise")), gold["loss"])
    for n in (1, 3, 10):
        for name, which in (("released", "network"), ("released_first", "first")):
            back = diffusion.ddim_released(network(which), z0, t=n, noise=noise[:, : n + 1])
            close(back, gold[f"{name}_{n}"])
    for n in (3, 10):
        options = {"noise": noise[:, :1], "strides": gold[f"strides_{n}"].tolist()}
        close(diffusion.ddim(model, z0, t=n, **options), gold[f"paper_{n}"])
    for draws in (1, 8):
        back = diffusion.one_step(model, z0, t=3, noise=noise[:, :draws])
        close(back, gold[f"one_step_3_{draws}"])
    for name in (name for name in gold.files if name.startswith("random_strides")):
        t, seed = map(int, name.split("_")[-2:])
        assert diffusion.random_strides(t, seed=seed) == gold[name].tolist()


def test_zscore_and_scores():
    z0, last, first = gold["z0"], gold["released_3"], gold["released_first_3"]
    close(features.layer_zscore(gold["raw"], CHANNELS), z0)
    close(scores.mse(z0, last), gold["mse"])
    close(scores.mse_by_layer(z0, last, CHANNELS), gold["mse_by_layer"])
    close(scores.mfsim(z0, last, CHANNELS), gold["mfsim_2_M"])
    close(scores.mfsim(z0, last, CHANNELS, layers="all"), gold["mfsim_all"])
    close(scores.mfsim_by_layer(z0, last, CHANNELS), gold["mfsim_by_layer"])
    close(scores.lr(z0, first, last), gold["lr"])


def test_two_epochs_of_training():
    rates = {"lr": 1e-3, "weight_decay": 1e-4}
    state = training.TrainingState(lambda: network("network"), 0, "cpu", **rates)
    for epoch in range(2):
        rows, *drawn = (tensor(f"train_{x}")[epoch].split(16) for x in ("order", "t", "noise"))
        batches = zip(*drawn, strict=True)

        def loss(model, x, _, batches=batches):
            return training.diffusion_loss(model, x, *next(batches))

        training.run_epoch(state, tensor("train_z0"), rows, loss, training.ema_decay)
    close(state.losses, gold["train_losses"], 1e-3)
    for name, model in (("last", state.network), ("ema", state.last), ("first_ema", state.first)):
        for part, weights in model.state_dict().items():
            close(weights, gold[f"train_{name}.{part}"], 1e-3)


def test_metrics():
    on_id, ood, other = gold["id_scores"], gold["ood_scores"], gold["ood_scores_2"]
    pairs = list(zip(on_id, ood, strict=True))
    for name, metric in METRICS.items():
        close([metric(*pair) for pair in pairs], gold[f"metric_{name}"])
    drawn, second = (metrics.bootstrap(on_id, part, draws=20, seed=0) for part in (ood, other))
    for name in ("auroc", "fpr95"):
        close(drawn[name], gold[f"bootstrap_{name}"])
        both = np.stack([drawn[name], second[name]], axis=1)
        close(both, gold[f"paired_bootstrap_{name}"])
    close(np.quantile(drawn["auroc"], ENDS, axis=1).T, gold["interval"])
    for name, sets in (("delong", [ood]), ("mean", [ood, other])):
        for part, found in zip(("auroc", "covariance"), delong(on_id, *sets), strict=True):
            close(found, gold[f"{name}_{part}"])
    close([paired_p(*pair) for pair in gold["p_of"]], gold["p"])
    close(holm(gold["holm_of"]), gold["holm"])


def check_features(encoder_name, *, in_pack):
    """Images have their stored hashes, and the first ones the stored features, of both poolings."""
    encoder = encoders.create_encoder(encoder_name)
    assert encoder.weights_sha256 == kept["weights_sha256"][[LITE0, B4].index(encoder_name)]
    assert tuple(encoder.channels) == tuple(kept[f"{encoder_name}.channels"])
    for name, sha256 in zip(kept["sets"].tolist(), kept["images_sha256"], strict=True):
        if name.startswith(("digits", "photo")) is in_pack:
            continue
        images = data.load_images(name)
        assert images.sha256 == sha256, name
        matched = [] if images.size == (32, 32) else [(32, 32)]
        for resolution, sizes in {"native": [], "matched": matched}.items():
            if (key := f"{encoder_name}/{name}/{resolution}") in kept:
                first, chain = images.take(range(len(kept[key]))), [*sizes, (224, 224)]
                found = features.extract(first, encoder, chain=chain, progress=False)
                for i, pooling in enumerate(("gap", "grid14")):
                    error = np.linalg.norm(found.raw(pooling) - kept[key][:, i], axis=1)
                    assert (error <= 1e-5 * np.linalg.norm(kept[key][:, i], axis=1)).all(), key


def test_features_of_built_in_sets():
    check_features(LITE0, in_pack=False)


@pytest.mark.real_data("DLSR_DATA", "DLSR_WEIGHTS")
@pytest.mark.parametrize("encoder_name", [LITE0, B4])
def test_features_of_the_pack(encoder_name):
    check_features(encoder_name, in_pack=True)


# The tables of the paper

FIT = ["method", "encoder", "pooling", "width", "blocks", "epochs"]
VARIANT = ["score", "layers", "reconstruction", "t", "noise_draws"]
fit_of, variant_of = attrgetter(*FIT), attrgetter(*VARIANT)
INDEX = pd.read_csv(RESULTS / "pages.csv", dtype=str, keep_default_na=False)


@cache
def all_scores():
    """Columns by fit, seed, set, whether they are of a pick, and name; names by fit and variant."""
    values, names = {}, {}
    for file in RESULTS.glob("scores/*/*.parquet"):
        table = pq.read_table(file)
        content = json.loads(table.schema.metadata[b"dlsr"])
        for column, entry in content["columns"].items():
            about = content["about"] | entry
            fit = (about["id_train"].split("/")[0], *(str(about[name]) for name in FIT))
            where = (str(about["seed"]), table["set"][0].as_py(), file.stem.endswith("-2000"))
            values[(fit, *where, column)] = table[column].to_numpy()
            names[(fit, *(str(about[name]) for name in VARIANT))] = column
    return values, names


@cache
def resamples(n, stream):
    """How often each of n images is drawn, in blocks of 100 of the bootstrap's 2,000 draws."""
    picks = np.random.default_rng([0, stream])
    draws = [np.bincount(picks.integers(n, size=n), minlength=n) for _ in range(metrics.DRAWS)]
    return [np.stack(draws[i : i + 100], 1).astype(np.int8) for i in range(0, len(draws), 100)]


def draw(id_scores, ood_scores):
    """`metrics.bootstrap` of one pair, but faster, with counts in int16 (at most 16,383 images)."""
    values, rank = np.unique(np.concatenate([id_scores, ood_scores]), return_inverse=True)
    n_id, n_ood = len(id_scores), len(ood_scores)
    kind = np.zeros((2, len(values)), int)
    kind[0, rank[:n_id]], kind[1, rank[n_id:]] = 1, 1
    new = (kind[:, 1:] != kind[:, :-1]).any(axis=0) | kind[:, 1:].all(axis=0)
    run = np.concatenate([[0], np.cumsum(new)])[rank]
    runs, found = np.arange(run.max() + 1)[:, None], []
    sums = [
        csr_matrix((np.ones(len(of), np.int16), (of, np.arange(len(of)))), (len(runs), len(of)))
        for of in (run[:n_id], run[n_id:])
    ]
    for v, w in zip(resamples(n_id, 0), resamples(n_ood, 1), strict=True):
        v, w = sums[0] @ v, (sums[1] @ w).astype(np.int32)
        up_to = np.cumsum(v, axis=0, dtype=np.int16)
        accepted = runs <= (up_to < metrics.TPR * n_id - 1e-9).sum(axis=0)
        won = np.einsum("ij,ij->j", (2 * up_to - v).astype(np.int32), w) / (2 * n_id * n_ood)
        found.append([won, np.where(accepted, w, 0).sum(axis=0) / n_ood])
    return dict(zip(("auroc", "fpr95"), np.concatenate(found, axis=1), strict=True))


@cache
def measured(fit, seed, id_set, ood, picked, column, drawn):
    """All metrics of one column; or AUROC and FPR95 under resampled images."""
    pair = [all_scores()[0][fit, seed, name, picked, column] for name in (id_set, ood)]
    return draw(*pair) if drawn else {name: metric(*pair) for name, metric in METRICS.items()}


def recomputed(row, fit, column, sets, *, drawn):
    """A row's value, or its draws: the mean over its seeds and OOD sets, less its ``versus``."""
    parts = []
    for seed in map(str, range(int(row.seeds))) if row.seed == "mean" else [row.seed]:
        for ood in sets if row.ood == "average" else [row.ood]:
            where = fit, seed, row.id, ood, row.n_id == "2000"
            value = measured(*where, column, drawn)[row.metric]
            minus = measured(*where, row.versus, drawn)[row.metric] if row.versus else 0
            parts.append(value - minus)
    return 100 * np.mean(parts, axis=0)


@pytest.mark.parametrize("page", INDEX["page"].unique())
def test_tables_follow_from_scores(page):
    table = pd.read_csv(RESULTS / f"{page}.csv", dtype=str, keep_default_na=False)
    single = table[~table["ood"].isin(["average", "scenes/test"])]  # scenes are an experiment apart
    sets_of = single.groupby(["id", *FIT])["ood"].unique().to_dict()
    for row in table.itertuples():
        fit = (row.id.split("/")[0], *fit_of(row))
        column = all_scores()[1][(fit, *variant_of(row))]
        about = fit, column, sets_of.get((row.id, *fit_of(row)))
        assert abs(recomputed(row, *about, drawn=False) - float(row.value)) < 6e-5, row
        part = row.layers.isdigit() or row.score.endswith("first_epoch")
        main = (page < "04" or "08" <= page < "12") and not part
        tenth = zlib.crc32(f"{column} {row.versus}".encode()) % 10 == 0
        if row.ci_low and (tenth or main):
            ends = np.quantile(recomputed(row, *about, drawn=True), ENDS)
            assert np.abs(ends - [float(row.ci_low), float(row.ci_high)]).max() < 6e-5, row


@pytest.mark.parametrize("page", INDEX["page"].unique())
def test_pages_read_what_tables_were_made_of(page):
    """FPR95 of every method, seed and set of a page is that of a row with the same settings."""
    table = pd.read_csv(RESULTS / f"{page}.csv", dtype=str, keep_default_na=False)
    table = table[table["metric"] == "fpr95"].groupby([*VARIANT, "id", "ood", "seed"])["value"]
    known = table.agg(lambda values: values.astype(float).to_list()).to_dict()
    for experiment, rows in INDEX[INDEX["page"] == page].groupby("experiment"):
        read = evaluation.read_scores(page, experiment).groupby(["set", "seed"])
        for row in rows.itertuples():
            id_set, *ood_sets = row.sets.split()
            for seed, ood in ((seed, ood) for seed in row.seeds.split() for ood in ood_sets):
                pair = [read.get_group((name, int(seed)))[row.method] for name in (id_set, ood)]
                value = 100 * metrics.fpr95(*(one.to_numpy() for one in pair))
                old = np.array(known[(*variant_of(row), id_set, ood, seed)])
                assert np.abs(old - value).min() < 6e-5, (row, seed, ood)


def test_evaluate_gives_table_2():
    """Values, intervals by the package's own bootstrap, and paired differences."""
    names = INDEX.loc[INDEX["page"] == "02_celeba", ["method", *VARIANT]]
    old = pd.read_csv(RESULTS / "02_celeba.csv", dtype=str, keep_default_na=False)
    old = old[(old["seed"] == "mean") & old["metric"].isin(list(metrics.METRICS))]
    old = old.drop(columns="method").merge(names, on=VARIANT)
    old["versus"] = old["versus"].replace("mse/all/released/t3/k1", "MSE")
    options = {"id_test": "celeba/test", "versus": "MSE"}
    table = evaluation.evaluate(evaluation.read_scores("02_celeba"), **options)
    both = table.merge(old, on=["ood", "method", "metric", "versus"], suffixes=("", "_old"))
    assert len(both) == len(table) - 1 == 19  # the AE has no committed difference from MSE
    for name in ("value", "ci_low", "ci_high"):
        close(both[name], pd.to_numeric(both[f"{name}_old"]), 6e-5)


def test_old_files_are_untouched_and_described():
    """The files of scores keep their bytes, and ``legacy.csv`` says what each of them is of."""
    files = sorted(RESULTS.glob("**/scores/*/**/*.parquet"))
    hashes = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    assert hashlib.sha256(hashes).hexdigest() == FILES_SHA256
    legacy = pd.read_csv(RESULTS / "legacy.csv", keep_default_na=False)
    for file in (file for file in files if file.name != "images.parquet"):
        name = file.relative_to(RESULTS)
        rows = legacy[[PurePosixPath(name).match(pattern) for pattern in legacy["file"]]]
        places = pq.read_table(file).to_pandas().get("place", pd.Series([""])).unique()
        assert rows["place"].to_list() == list(places)


# The study of other methods on the same features


def agree(name, rows, *columns):
    """Recomputed rows of a committed table have its values."""
    table = report.read_table(name)
    numbers = {"value", "difference", "ci_low", "ci_high", "p", "p_holm"}
    options = {"on": [key for key in table if key not in numbers], "suffixes": ("", "_old")}
    both = rows.merge(table, validate="1:1", **options)
    assert len(both) == len(rows) > 0
    for column in columns:
        known = both[column].notna()
        assert known.any()
        close(both.loc[known, column], both.loc[known, f"{column}_old"])


def auroc_by_ranks(id_scores, ood_scores):
    """`metrics.auroc`, several times as fast."""
    ranks = rankdata(np.concatenate([id_scores, ood_scores]))[len(id_scores) :]
    return (ranks.mean() - (len(ranks) + 1) / 2) / len(id_scores)


@pytest.mark.parametrize("encoder_name", [B4, LITE0])
def test_study_follows_from_scores(encoder_name, monkeypatch):
    """Bootstrap intervals are checked of every tenth method and of the fused one."""
    found, half = (report.read_scores(encoder_name, part) for part in ("", "half"))
    ends = ("ci_low", "ci_high")
    controls, filters = from_page("41_resolution", "controls", "filters")
    agree("controls", controls(found, half), "value", *ends)
    agree("filters", filters(found), "value", *ends)
    reseeded = report.differences(found, ["fused", "other_seed"], "matched")
    agree("other_seed", reseeded.query("kind != 'layer'"), "difference", *ends)
    chosen = (np.arange(len(found.methods)) % 10 == 0) | (found.methods["kind"] == "fused")

    def draws_of_chosen(on_id, ood, draws):
        drawn = {m: np.full((len(on_id), draws), np.nan) for m in ("auroc", "fpr95")}
        for i in np.flatnonzero(chosen):
            for metric, values in draw(on_id[i], ood[i]).items():
                drawn[metric][i] = values
        return drawn

    monkeypatch.setattr(report, "bootstrap", draws_of_chosen)
    monkeypatch.setitem(report.METRICS, "auroc", auroc_by_ranks)
    for resolution in ("native", "matched"):
        drawn = report.resample(found, resolution)
        agree("same_features", report.same_features(found, resolution, drawn), "value", *ends)
        paired = report.paired(found, resolution, drawn)
        agree("paired", paired, "difference", *ends, "p", "p_holm")


def test_search_log_and_costs_are_untouched():
    """They cannot be recomputed from scores; the choice holds a hash of what the search found."""
    log = RESULTS / "comparison" / f"search-{B4}.csv"
    for file, sha256 in ((log, LOG_SHA256), (log.with_name("costs.csv"), COSTS_SHA256)):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == sha256
    numbers = {name: [""] for name in ("multiply_adds", "auroc", "seconds")}
    table = pd.read_csv(log, keep_default_na=False, na_values=numbers, dtype={"stamp": str})
    options = {"index": False, "float_format": "%.4f", "lineterminator": "\n"}
    text = table.drop(columns="seconds").to_csv(**options)
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == report.read_choice()["search_sha256"]
