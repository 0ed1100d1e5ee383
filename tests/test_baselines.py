import math

import numpy as np
import pytest
import torch
from conftest import easy_features, one_sentence
from scipy.spatial.distance import mahalanobis
from scipy.special import log_softmax
from sklearn.base import clone
from sklearn.covariance import LedoitWolf
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from torch import nn

from dlsr import baselines as module
from dlsr.baselines import (
    BASELINES,
    KNN,
    VAE,
    AutoEncoder,
    Mahalanobis,
    Probe,
    ResidualNetwork,
    VariationalNetwork,
    ash_s,
    dice_weights,
    energy,
    kl_divergence,
    train_network,
)
from dlsr.datasets import UserError, cache_folder
from dlsr.metrics import auroc
from dlsr.scores import mfsim, mse

CHANNELS = (16, 16)
ID, OOD = easy_features(300)
ID_TEST, _ = easy_features(100, seed=1)
CPU = {"device": "cpu", "batch_size": 32}
SMALL = {
    AutoEncoder: CPU | {"width": 32, "blocks": 2, "epochs": 15, "lr": 3e-3},
    VAE: CPU | {"width": 32, "latent": 4, "epochs": 40, "lr": 3e-3},
}
TINY = {
    AutoEncoder: CPU | {"width": 8, "blocks": 1, "epochs": 2},
    VAE: CPU | {"width": 8, "latent": 2, "epochs": 2},
}
NETWORKS = pytest.mark.parametrize("kind", [AutoEncoder, VAE])
ROWS = pytest.mark.parametrize("row", BASELINES.values(), ids=lambda row: row.name)
X, LABELS = np.random.RandomState(0).randn(200, 40).astype(np.float32), np.arange(200) % 5
X[np.arange(200), LABELS] += 2


def built(row, channels=CHANNELS, seed=0):
    """A row's detector, its network as small as a test wants it."""
    detector = row.build(channels, seed)
    return detector.set_params(**TINY.get(type(detector), {}))


def fitted(row, seed=0):
    return built(row, seed=seed).fit(ID, np.arange(300) % 3 if row.labels else None)


# k nearest neighbours


def by_hand_knn(train, test, k):
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    return np.sort(np.linalg.norm(test[:, None] - train, axis=2), axis=1)[:, k - 1]


def test_knn_is_the_distance_to_the_kth_normalised_neighbour():
    for k in (1, 5, 300):
        scores = KNN(k).fit(ID).all_scores(OOD)
        assert list(scores) == [("knn", "all")]
        np.testing.assert_allclose(scores["knn", "all"], by_hand_knn(ID, OOD, k), rtol=1e-4)


def test_knn_counts_neighbours_from_1():
    angles = np.radians([10, 30, 60])
    train = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    scores = [KNN(k).fit(train).ood_score(np.array([[1.0, 0.0]]))[0] for k in (1, 2, 3)]
    assert scores == pytest.approx(2 * np.sin(angles / 2), abs=1e-5)


def test_knn_does_not_see_the_length_of_vectors():
    lengths = np.random.RandomState(1).uniform(0.1, 10, (300, 1))
    scores = KNN(7).fit(ID).ood_score(OOD)
    np.testing.assert_allclose(KNN(7).fit(lengths * ID).ood_score(OOD), scores, rtol=1e-4)
    np.testing.assert_allclose(KNN(7).fit(ID).ood_score(lengths * OOD), scores, rtol=1e-4)


def test_the_default_k_is_50():
    np.testing.assert_array_equal(KNN().fit(ID).ood_score(OOD), KNN(50).fit(ID).ood_score(OOD))
    assert not np.array_equal(KNN(49).fit(ID).ood_score(OOD), KNN(50).fit(ID).ood_score(OOD))


@pytest.mark.parametrize("k", [0, 301])
def test_an_impossible_k_is_refused(k):
    with pytest.raises(UserError, match="300") as error:
        KNN(k).fit(ID)
    assert f"k={k} " in one_sentence(error)


# Mahalanobis


def test_mahalanobis_is_the_squared_distance_under_ledoit_wolf():
    gaussian = LedoitWolf().fit(ID.astype(np.float64))
    inverse = np.linalg.inv(gaussian.covariance_)
    by_hand = [mahalanobis(x, ID.astype(np.float64).mean(0), inverse) ** 2 for x in OOD]
    scores = Mahalanobis().fit(ID).all_scores(OOD)
    assert list(scores) == [("mahalanobis", "all")]
    np.testing.assert_allclose(scores["mahalanobis", "all"], by_hand, rtol=1e-5)


def test_mahalanobis_is_computed_in_float64():
    detector = Mahalanobis().fit(ID)
    assert detector.gaussian_.precision_.dtype == detector.gaussian_.location_.dtype == np.float64
    far = (1e4 + np.random.RandomState(0).randn(500, 3) * [1, 1, 0.01]).astype(np.float32)
    gaussian = LedoitWolf().fit(far.astype(np.float64))
    np.testing.assert_allclose(
        Mahalanobis().fit(far).ood_score(far), gaussian.mahalanobis(far.astype(np.float64)), rtol=1e-5
    )


# The autoencoder and the VAE


def count(network, kind=nn.Linear):
    return sum(isinstance(part, kind) for part in network.modules())


def test_the_autoencoders_blocks_have_the_papers_16_linear_layers():
    network = AutoEncoder((300, 420))._network(720)
    assert count(network.blocks) == 16
    assert count(network) == 16 + 2
    assert network.into[1].weight.shape == network.out[2].weight.shape == (720, 720)


def test_the_vae_has_the_papers_5_and_8_linear_layers():
    network = VAE(CHANNELS)._network(32)
    assert count(network.encoder) == 5
    assert count(network.decoder) == 8
    assert count(network.encoder, nn.SiLU) == 4
    assert count(network.decoder, nn.SiLU) == 7
    assert not isinstance(network.decoder[-1], nn.SiLU)
    assert [network.encoder[0].in_features, network.encoder[-1].out_features] == [32, 2 * 64]
    assert [network.decoder[0].in_features, network.decoder[-1].out_features] == [64, 32]


def test_an_untrained_autoencoder_gives_zeros_and_its_blocks_the_identity():
    network = ResidualNetwork(6, width=8, blocks=3)
    x = torch.randn(5, 8)
    assert torch.equal(network.blocks(x), x)
    assert torch.equal(network(torch.randn(5, 6)), torch.zeros(5, 6))
    ones = torch.ones(2, 6)
    ones[0] = 3
    assert network.loss(ones, torch.Generator()).item() == pytest.approx((9 + 1) / 2)


def test_the_kl_divergence_by_hand():
    zeros = torch.zeros(3, 4)
    assert kl_divergence(zeros, zeros).tolist() == [0, 0, 0]
    assert kl_divergence(zeros + 2, zeros).tolist() == [8, 8, 8]
    assert kl_divergence(zeros, zeros + math.log(4)).tolist() == pytest.approx(
        [4 * (3 - math.log(4)) / 2] * 3
    )


class Fixed(nn.Module):
    """Gives the same row whatever comes, or what comes where there is none."""

    def __init__(self, row=None):
        super().__init__()
        self.row = row

    def forward(self, x):
        return x if self.row is None else self.row.expand(len(x), -1)


def test_the_vaes_loss_is_half_the_squared_error_plus_kl():
    network = VariationalNetwork(2, width=4, latent=2)
    network.encoder, network.decoder = Fixed(torch.tensor([[1.0, -1.0, 0.0, 0.0]])), Fixed()
    x = torch.zeros(20_000, 2)
    assert torch.equal(network(x), torch.tensor([[1.0, -1.0]]).expand(20_000, -1))
    # Each of the two drawn numbers has mean square 1 + 1, so half of 4, and KL (1 + 1) / 2.
    assert network.loss(x, torch.Generator().manual_seed(0)).item() == pytest.approx(2 + 1, rel=0.02)
    network.encoder = Fixed(torch.tensor([[0.0, 0.0, math.log(9), math.log(9)]]))
    by_hand = (9 + 9) / 2 + (8 - math.log(9))
    assert network.loss(x, torch.Generator().manual_seed(0)).item() == pytest.approx(by_hand, rel=0.02)


@NETWORKS
def test_a_network_reconstructs_id_better_than_ood(kind):
    detector = kind(CHANNELS, **SMALL[kind]).fit(ID)
    of_id, of_ood = detector.all_scores(ID_TEST), detector.all_scores(OOD)
    assert list(of_id) == [("mfsim", "2..M"), ("mfsim", "all"), ("mse", "all")]
    for name in of_id:
        assert auroc(of_id[name], of_ood[name]) > 0.95, name
    assert of_id["mse", "all"].mean() < 0.5


@NETWORKS
def test_a_networks_scores_are_those_of_its_reconstruction(kind):
    detector = kind(CHANNELS, **TINY[kind]).fit(ID)
    again = detector.reconstruct(OOD)
    with torch.no_grad():
        np.testing.assert_array_equal(again, detector.network_(torch.from_numpy(OOD)).numpy())
    scores = detector.all_scores(OOD)
    np.testing.assert_allclose(scores["mse", "all"], mse(OOD, again), rtol=1e-6)
    np.testing.assert_allclose(scores["mfsim", "all"], mfsim(OOD, again, CHANNELS, layers="all"), rtol=1e-6)
    np.testing.assert_allclose(scores["mfsim", "2..M"], mfsim(OOD, again, CHANNELS), rtol=1e-6)
    np.testing.assert_array_equal(detector.ood_score(OOD), scores["mfsim", "2..M"])


@NETWORKS
def test_scoring_in_chunks_changes_nothing(kind, monkeypatch):
    detector = kind(CHANNELS, **TINY[kind]).fit(ID)
    whole = detector.ood_score(OOD)
    monkeypatch.setattr(module, "CHUNK", 7)
    np.testing.assert_allclose(detector.ood_score(OOD), whole, atol=1e-5)


@NETWORKS
def test_a_single_layer_has_no_2_to_m(kind):
    detector = kind((32,), **TINY[kind]).fit(ID)
    assert list(detector.all_scores(OOD)) == [("mfsim", "all"), ("mse", "all")]


@pytest.fixture
def steps(monkeypatch):
    """How many steps the optimiser made."""
    made = []
    step = torch.optim.AdamW.step

    def counted(self, *args, **options):
        made.append(self.param_groups[0]["lr"])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    return made


@NETWORKS
def test_a_network_is_trained_once_and_read_afterwards(kind, steps):
    first = kind(CHANNELS, **TINY[kind]).fit(ID)
    assert len(steps) == 2 * 10  # 300 images: nine batches of 32 and one of 12, in each of 2 epochs
    again = kind(CHANNELS, **TINY[kind], progress=True).fit(ID)
    assert len(steps) == 20
    np.testing.assert_array_equal(again.ood_score(OOD), first.ood_score(OOD))
    assert len(list((cache_folder() / "networks").glob("*.safetensors"))) == 1


@NETWORKS
@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"lr": 2e-4}, {"epochs": 1}, {"channels": (8, 24)}, {"weight_decay": 0.1}]
)
def test_another_setting_trains_anew(kind, change, steps):
    first = kind(CHANNELS, **TINY[kind]).fit(ID).ood_score(OOD)
    steps.clear()
    settings = {"channels": CHANNELS} | TINY[kind] | change
    other = kind(**settings).fit(ID).ood_score(OOD)
    assert len(steps) == 10 * settings["epochs"]
    assert set(steps) == {settings.get("lr", 1e-4 if kind is AutoEncoder else 1e-3)}
    assert not np.array_equal(other, first)


@NETWORKS
def test_other_data_or_code_train_anew(kind, steps, monkeypatch):
    kind(CHANNELS, **TINY[kind]).fit(ID)
    steps.clear()
    kind(CHANNELS, **TINY[kind]).fit(ID[::-1])
    assert len(steps) == 20
    asked = []
    monkeypatch.setattr(module, "code_hash", lambda *parts: asked.append(parts) or "other")
    kind(CHANNELS, **TINY[kind]).fit(ID)
    assert len(steps) == 40
    assert asked == [("lfdn", "baselines")]


def test_networks_of_two_kinds_do_not_share_a_file():
    same = {"width": 8, "epochs": 1}
    AutoEncoder(CHANNELS, **same).fit(ID)
    VAE(CHANNELS, **same).fit(ID)
    assert len(list((cache_folder() / "networks").iterdir())) == 2


@NETWORKS
def test_a_damaged_network_is_refused(kind):
    kind(CHANNELS, **TINY[kind]).fit(ID)
    (file,) = (cache_folder() / "networks").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="Delete it") as error:
        kind(CHANNELS, **TINY[kind]).fit(ID)
    assert str(file) in one_sentence(error)


@NETWORKS
def test_training_is_repeatable_and_leaves_the_random_state_alone(kind, monkeypatch, tmp_path):
    scores = []
    for run in range(2):
        monkeypatch.setenv("DLSR_CACHE", str(tmp_path / f"cache{run}"))
        torch.manual_seed(run)
        expected = torch.random.get_rng_state()
        scores.append(kind(CHANNELS, **TINY[kind]).fit(ID).ood_score(OOD))
        assert torch.equal(torch.random.get_rng_state(), expected)
    np.testing.assert_array_equal(*scores)


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(UserError, match="lower lr") as error:
        AutoEncoder(CHANNELS, **CPU, width=8, blocks=1, epochs=3, lr=1e30).fit(ID)
    one_sentence(error)
    assert not list(cache_folder().rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (AutoEncoder, {"blocks": 0}), (AutoEncoder, {"width": 0}), (AutoEncoder, {"epochs": 0}),
        (AutoEncoder, {"lr": 0.0}), (AutoEncoder, {"seed": -1}), (AutoEncoder, {"weight_decay": -0.1}),
        (VAE, {"latent": 0}), (VAE, {"width": 0}), (VAE, {"batch_size": 0}),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(kind, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"'{name}': {value}") as error:
        kind(CHANNELS, **TINY[kind] | wrong).fit(ID)
    assert kind.__name__ in one_sentence(error)


@NETWORKS
def test_channels_that_do_not_fit_are_refused(kind):
    with pytest.raises(UserError, match=r"channels=\(16, 15\) needs \(images, 31\)"):
        kind((16, 15), **TINY[kind]).fit(ID)


def test_every_vector_is_seen_once_an_epoch():
    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.zeros(1)), []

        def loss(self, x, draws):
            self.seen.append(x[:, 0].tolist())
            return (self.weight * x).mean()

    network = Recorder()
    rows = np.arange(10, dtype=np.float32)[:, None]
    train_network(network, rows, epochs=2, lr=1e-3, weight_decay=0.0, batch_size=4, seed=0, device="cpu")
    assert [len(batch) for batch in network.seen] == [4, 4, 2] * 2
    first, second = ([i for batch in half for i in batch] for half in (network.seen[:3], network.seen[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


# The probe


@pytest.fixture(scope="module")
def probe():
    return Probe().fit(X, LABELS)


def test_msp_and_energy_by_hand(probe):
    activations = np.maximum(X, 0) / np.maximum(X, 0).std()
    regression = LogisticRegression(C=0.01, max_iter=1000).fit(activations.astype(np.float64), LABELS)
    logits = regression.decision_function(activations)
    scores = probe.all_scores(X)
    assert list(scores) == [("msp", "last"), ("energy", "last"), ("dice", "last"), ("ash_s", "last")]
    np.testing.assert_allclose(
        scores["msp", "last"], -regression.predict_proba(activations).max(1), rtol=1e-3
    )
    np.testing.assert_allclose(
        scores["energy", "last"], log_softmax(logits, axis=1)[:, 0] - logits[:, 0], rtol=1e-3
    )
    np.testing.assert_array_equal(probe.ood_score(X), scores["msp", "last"])


def test_scores_of_a_probe_with_known_weights(probe):
    known = clone(probe).fit(X[:, :2], LABELS)
    known.scale_, known.weights_, known.bias_ = 2.0, np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0.0, 1.0])
    known.dice_weights_ = np.array([[1.0, 0.0], [0.0, 0.0]])
    scores = known.all_scores(np.array([[1.0, -5.0], [0.5, 1.0]]))  # activations (2, 0) and (1, 2)
    e = math.exp
    p = [e(2) / (e(2) + e(1)), e(3) / (e(1) + e(3))]
    assert scores["msp", "last"].tolist() == pytest.approx([-p[0], -p[1]])
    assert scores["energy", "last"].tolist() == pytest.approx(
        [-math.log(e(2) + e(1)), -math.log(e(1) + e(3))]
    )
    assert scores["dice", "last"].tolist() == pytest.approx([-math.log(e(2) + e(1)), -math.log(e(1) + e(1))])
    scaled = [2 * e(1), 2 * e(3 / 2)]  # of (2, 0) all is left in 2; of (1, 2) 2 of 3
    assert scores["ash_s", "last"].tolist() == pytest.approx(
        [-math.log(e(scaled[0]) + e(1)), -math.log(e(0) + e(scaled[1] + 1))]
    )


def test_energy_by_hand_and_without_overflow():
    assert energy(np.array([[0.0, math.log(3)]])).tolist() == pytest.approx([-math.log(4)])
    assert energy(np.array([[1e4, 1e4]])).tolist() == pytest.approx([-1e4 - math.log(2)])


def test_dice_keeps_the_tenth_with_the_largest_contributions(probe):
    assert np.count_nonzero(probe.dice_weights_) == 20  # of 5 x 40
    contribution = probe.weights_ * np.maximum(X, 0).mean(axis=0)
    kept = probe.dice_weights_ != 0
    assert contribution[kept].min() > contribution[~kept].max()
    np.testing.assert_array_equal(probe.dice_weights_[kept], probe.weights_[kept])


def test_dice_by_hand_takes_the_sign_and_the_activation_into_account():
    weights, activation = np.array([[-9.0, 1.0, 2.0], [3.0, 8.0, 1.0]]), np.array([1.0, 0.1, 2.0])
    # Contributions: -9, 0.1, 4 and 3, 0.8, 2
    assert dice_weights(weights, activation, sparsity=0.5).tolist() == [[0, 0, 2], [3, 0, 1]]


def test_dice_keeps_its_share_among_equal_contributions():
    assert np.count_nonzero(dice_weights(np.ones((4, 25)), np.zeros(25))) == 10


def test_ash_s_by_hand():
    x = np.array([[5.0, 1.0, 2.0, 4.0, 0.0], [0.0, 0.0, 0.0, 0.0, 3.0]])
    # The 60th percentile of 0, 1, 2, 4, 5 lies at rank 2.4: 2.8. Left: 9 of 12, and 3 of 3.
    by_hand = [[5 * math.exp(12 / 9), 0, 0, 4 * math.exp(12 / 9), 0], [0, 0, 0, 0, 3 * math.e]]
    np.testing.assert_allclose(ash_s(x, percentile=60), by_hand)


def test_ash_s_keeps_a_tenth_and_bears_a_vector_of_zeros():
    x = np.random.RandomState(0).rand(3, 100)
    assert np.count_nonzero(ash_s(x), axis=1).tolist() == [10, 10, 10]
    assert ash_s(np.zeros((1, 5))).tolist() == [[0] * 5]


def test_the_probe_does_not_see_negative_values_or_the_scale(probe):
    np.testing.assert_array_equal(probe.ood_score(np.maximum(X, 0)), probe.ood_score(X))
    scaled = Probe().fit(1000 * X, LABELS).all_scores(1000 * X)
    for name, values in probe.all_scores(X).items():
        np.testing.assert_allclose(scaled[name], values, rtol=1e-2, err_msg=name)


def test_accuracy(probe):
    names = np.array(["ant", "bee", "cat", "dog", "eel"])[LABELS]
    named = Probe().fit(X, names)
    assert 0.5 < named.accuracy_ <= 1
    assert named.accuracy_ == probe.accuracy_ == named.accuracy(X, names)
    right = [named.accuracy(X[[i]], names[[i]]) for i in range(200)]
    assert set(right) == {0.0, 1.0}
    assert np.mean(right) == pytest.approx(named.accuracy_)
    assert named.accuracy(X, np.array(["fox"] * 200)) == 0


def test_two_classes_get_two_logits():
    labels = LABELS % 2
    probe = Probe().fit(X, labels)
    assert probe.weights_.shape == (2, 40)
    activations = np.maximum(X, 0).astype(np.float64) * probe.scale_
    of_sklearn = LogisticRegression(C=0.01, max_iter=1000).fit(activations, labels).predict_proba(activations)
    np.testing.assert_allclose(probe.ood_score(X), -of_sklearn.max(1), rtol=1e-5)


@pytest.mark.parametrize(
    ("labels", "told"),
    [(None, "needs the ID training labels"), (LABELS[:-1], "199"), (np.zeros(200), "at least 2 classes")],
)
def test_the_probe_refuses_to_go_without_labels(labels, told):
    with pytest.raises(UserError, match=told) as error:
        Probe().fit(X, labels)
    one_sentence(error)


def test_a_probe_that_did_not_converge_says_so():
    with pytest.warns(ConvergenceWarning):
        Probe(max_iter=1).fit(X, LABELS)


# What all have in common


def test_the_table():
    assert list(BASELINES) == ["knn", "mahalanobis", "ae", "vae", "probe"]
    assert all(name == row.name for name, row in BASELINES.items())
    assert [row.name for row in BASELINES.values() if row.labels] == ["probe"]
    assert {row.features for row in BASELINES.values()} == {"z0", "last_raw"}
    assert BASELINES["probe"].features == "last_raw"
    none = {"width": 0, "blocks": 0, "epochs": 0}
    assert [BASELINES[name].size for name in ("knn", "mahalanobis", "probe")] == [none] * 3
    assert BASELINES["ae"].size == {"width": 720, "blocks": 8, "epochs": 10}
    assert BASELINES["vae"].size == {"width": 512, "blocks": 0, "epochs": 30}


@ROWS
def test_a_row_builds_what_its_columns_say(row):
    parameters = row.build((3, 4), 7).get_params()
    assert parameters.get("seed", 7) == 7
    assert parameters.get("channels", (3, 4)) == (3, 4)
    assert {part: parameters.get(part, 0) for part in row.size} == row.size


@ROWS
def test_a_row_fits_and_gives_finite_scores(row):
    detector = built(row)
    before = detector.get_params()
    assert detector.fit(ID, np.arange(300) % 3 if row.labels else None) is detector
    assert detector.get_params() == before
    scores = detector.all_scores(OOD[:70])
    for (score, layers), values in scores.items():
        assert isinstance(score, str)
        assert layers in ("all", "2..M", "last")
        assert values.shape == (70,)
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
    np.testing.assert_array_equal(detector.ood_score(OOD[:70]), next(iter(scores.values())))


@ROWS
def test_a_row_is_repeatable(row):
    np.testing.assert_array_equal(fitted(row).ood_score(OOD), fitted(row).ood_score(OOD))


@ROWS
def test_a_row_does_not_change_what_it_is_given(row):
    x = ID.copy()
    x.flags.writeable = False  # as features mapped into memory are
    built(row).fit(x, np.arange(300) % 3 if row.labels else None).all_scores(x)
    np.testing.assert_array_equal(x, ID)


@ROWS
def test_a_row_that_is_not_fitted_says_so(row):
    detector = built(row)
    for method in (detector.all_scores, detector.ood_score):
        with pytest.raises(NotFittedError):
            method(OOD)
    with pytest.raises(UserError):
        detector.fit(ID[:, 0], LABELS)
    with pytest.raises(NotFittedError):
        clone(fitted(row)).ood_score(OOD)


@ROWS
def test_a_row_refuses_features_that_are_not_finite(row):
    detector = fitted(row)
    for wrong in (np.nan, np.inf):
        broken = ID.copy()
        broken[[3, 8], 5] = wrong
        for method in (lambda x: built(row).fit(x, np.arange(300) % 3), detector.all_scores):
            with pytest.raises(UserError, match="2 of 300 images have NaN or infinite"):
                method(broken)


@ROWS
def test_a_row_refuses_another_width_and_a_single_image(row):
    with pytest.raises(UserError, match=r"\(300, 31\) were given.* 32 features") as error:
        fitted(row).all_scores(OOD[:, :31])
    one_sentence(error)
    with pytest.raises(UserError, match="at least 2"):
        built(row).fit(ID[:1], [0])


def test_networks_and_probes_that_are_not_fitted_say_so():
    with pytest.raises(NotFittedError):
        AutoEncoder(CHANNELS).reconstruct(ID)
    with pytest.raises(NotFittedError):
        Probe().accuracy(X, LABELS)
