import math

import numpy as np
import pytest
import torch
from dlsr.baselines import KNN, VAE, AutoEncoder, Gaussian, ResidualNetwork, VariationalNetwork
from dlsr.errors import UserError
from dlsr.metrics import auroc
from dlsr.scores import mfsim
from scipy.spatial.distance import mahalanobis
from sklearn.base import clone
from sklearn.covariance import LedoitWolf
from sklearn.exceptions import NotFittedError
from torch import nn

from conftest import easy_features, one_sentence

CHANNELS = (16, 16)
ID, OOD = easy_features(300)
ID_TEST, _ = easy_features(100, seed=1)
TINY = {
    AutoEncoder: {"device": "cpu", "batch_size": 32, "width": 8, "blocks": 1, "epochs": 2},
    VAE: {"device": "cpu", "batch_size": 32, "width": 8, "latent": 2, "epochs": 2},
}
NETWORKS = pytest.mark.parametrize("kind", [AutoEncoder, VAE])
ALL = pytest.mark.parametrize("kind", [KNN, Gaussian, AutoEncoder, VAE])


def tiny(kind):
    return kind(CHANNELS, **TINY[kind]) if kind in TINY else kind()


def fitted(kind):
    return tiny(kind).fit(ID)


# Nearest neighbours and the Gaussian


def test_knn_is_the_distance_to_the_kth_normalised_neighbour():
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (ID, OOD))
    distances = np.sort(np.linalg.norm(test[:, None] - train, axis=2), axis=1)
    for k in (1, 5, 300):
        scores = KNN(k).fit(ID).ood_score(OOD)
        np.testing.assert_allclose(scores, distances[:, k - 1], rtol=1e-4)


def test_knn_counts_neighbours_from_1_and_takes_50():
    angles = np.radians([10, 30, 60])
    train = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    scores = [KNN(k).fit(train).ood_score(np.array([[1.0, 0.0]]))[0] for k in (1, 2, 3)]
    assert scores == pytest.approx(2 * np.sin(angles / 2), abs=1e-5)
    np.testing.assert_array_equal(KNN().fit(ID).ood_score(OOD), KNN(50).fit(ID).ood_score(OOD))


def test_the_gaussian_is_the_squared_distance_under_ledoit_wolf():
    inverse = np.linalg.inv(LedoitWolf().fit(ID.astype(np.float64)).covariance_)
    by_hand = [mahalanobis(x, ID.astype(np.float64).mean(0), inverse) ** 2 for x in OOD]
    np.testing.assert_allclose(Gaussian().fit(ID).ood_score(OOD), by_hand, rtol=1e-5)


def test_the_gaussian_is_computed_in_float64():
    far = (1e4 + np.random.RandomState(0).randn(500, 3) * [1, 1, 0.01]).astype(np.float32)
    exact = LedoitWolf().fit(far.astype(np.float64)).mahalanobis(far.astype(np.float64))
    np.testing.assert_allclose(Gaussian().fit(far).ood_score(far), exact, rtol=1e-5)


# The autoencoder and the VAE


def count(network, kind=nn.Linear):
    return sum(isinstance(part, kind) for part in network.modules())


def test_the_networks_have_the_papers_linear_layers():
    autoencoder, vae = AutoEncoder((300, 420)).build(720), VAE(CHANNELS).build(32)
    assert count(autoencoder) == 16 + 2
    assert autoencoder[1].weight.shape == autoencoder[-1].weight.shape == (720, 720)
    assert (count(vae.encoder), count(vae.decoder)) == (5, 8)
    assert (count(vae.encoder, nn.SiLU), count(vae.decoder, nn.SiLU)) == (4, 7)
    ends = [(part[0].in_features, part[-1].out_features) for part in vae.children()]
    assert ends == [(32, 2 * 64), (64, 32)]


def test_an_untrained_autoencoder_gives_zeros_and_its_blocks_the_identity():
    network = ResidualNetwork(6, width=8, blocks=3)
    x = torch.randn(5, 8)
    for block in network[2], network[3], network[4]:
        assert torch.equal(block(x), x)
    assert torch.equal(network(torch.randn(5, 6)), torch.zeros(5, 6))
    ones = torch.ones(2, 6)
    ones[0] = 3
    assert network.loss(ones, torch.Generator()).item() == pytest.approx((9 + 1) / 2)


class Fixed(nn.Module):
    """Returns the same row for any input, or the input if there is no row."""

    def __init__(self, row=None):
        super().__init__()
        self.row = row

    def forward(self, x):
        return x if self.row is None else self.row.expand(len(x), -1)


@pytest.mark.parametrize(
    ("mean", "log_variance", "loss"),
    [
        # Each of the two drawn numbers has mean square 1 + 1, so half of 4; KL is (1 + 1) / 2.
        ((1.0, -1.0), (0.0, 0.0), 2 + 1),
        ((0.0, 0.0), (math.log(9), math.log(9)), (9 + 9) / 2 + (8 - math.log(9))),
    ],
)
def test_the_vaes_loss_is_half_the_squared_error_plus_kl(mean, log_variance, loss):
    network = VariationalNetwork(2, width=4, latent=2)
    network.encoder, network.decoder = Fixed(torch.tensor([[*mean, *log_variance]])), Fixed()
    x = torch.zeros(20_000, 2)
    assert torch.equal(network(x), torch.tensor([mean]).expand(20_000, -1))
    measured = network.loss(x, torch.Generator().manual_seed(0)).item()
    assert measured == pytest.approx(loss, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (AutoEncoder, {"width": 32, "blocks": 2, "epochs": 15}),
        (VAE, {"width": 32, "latent": 4, "epochs": 40}),
    ],
)
def test_a_network_reconstructs_id_better_than_ood(kind, settings):
    settings |= {"device": "cpu", "batch_size": 32, "lr": 3e-3}
    detector = kind(CHANNELS, **settings).fit(ID)
    assert auroc(detector.ood_score(ID_TEST), detector.ood_score(OOD)) > 0.95
    assert ((ID_TEST - detector.reconstruct(ID_TEST)) ** 2).mean() < 0.5


@NETWORKS
def test_a_networks_score_is_mfsim_of_its_reconstruction(kind):
    detector = fitted(kind)
    again = detector.reconstruct(OOD)
    np.testing.assert_array_equal(again, detector.network_(torch.from_numpy(OOD)).numpy())
    np.testing.assert_array_equal(detector.ood_score(OOD), mfsim(OOD, again, CHANNELS))
    one_layer = kind(**TINY[kind]).fit(ID)
    by_all = mfsim(OOD, again, (32,), layers="all")
    np.testing.assert_array_equal(one_layer.ood_score(OOD), by_all)


@pytest.fixture
def steps(monkeypatch):
    """The learning rate of each step that the optimiser made."""
    made = []
    step = torch.optim.AdamW.step

    def counted(self, *args, **options):
        made.append(self.param_groups[0]["lr"])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    return made


@NETWORKS
def test_a_network_is_trained_once_for_its_settings_and_vectors(kind, steps):
    first = fitted(kind).ood_score(OOD)
    assert len(steps) == 2 * 10  # 9 batches of 32 and one of 12, in each of 2 epochs
    again = tiny(kind).set_params(progress=True).fit(ID).ood_score(OOD)
    assert len(steps) == 20
    np.testing.assert_array_equal(again, first)
    for change in {"seed": 1}, {"lr": 2e-4}, {"epochs": 1}, {"weight_decay": 0.1}, {"width": 16}:
        steps.clear()
        other = tiny(kind).set_params(**change).fit(ID)
        assert steps == [other.lr] * 10 * other.epochs, change
        assert not np.array_equal(other.ood_score(OOD), first), change
    steps.clear()
    tiny(kind).fit(ID[::-1])
    assert len(steps) == 20


@NETWORKS
def test_training_is_repeatable_and_leaves_the_random_state_alone(kind, monkeypatch, tmp_path):
    scores = []
    for run in range(2):
        monkeypatch.setenv("DLSR_CACHE", str(tmp_path / f"cache{run}"))
        torch.manual_seed(run)
        expected = torch.random.get_rng_state()
        scores.append(fitted(kind).ood_score(OOD))
        assert torch.equal(torch.random.get_rng_state(), expected)
    np.testing.assert_array_equal(*scores)


# What all have in common


@ALL
def test_a_fit_keeps_parameters_and_is_repeatable(kind):
    detector = tiny(kind)
    before = detector.get_params()
    x = ID.copy()
    x.flags.writeable = False  # as memory-mapped features are
    assert detector.fit(x, np.arange(300) % 3) is detector
    assert detector.get_params() == clone(detector).get_params() == before
    np.testing.assert_array_equal(x, ID)
    with pytest.raises(NotFittedError):
        clone(detector).ood_score(OOD)
    scores = detector.ood_score(OOD[:70])
    assert (scores.shape, scores.dtype) == ((70,), np.float32)
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(fitted(kind).ood_score(OOD[:70]), scores)


@ALL
def test_what_is_no_finite_matrix_of_the_fits_width_is_refused(kind):
    detector, broken = fitted(kind), ID.copy()
    broken[[3, 8], 5] = np.nan, np.inf
    for refused, told in ((broken, "2 of 300"), (OOD[:, :31], "31 features.*32"), (ID[0], "2D")):
        with pytest.raises(UserError, match=told) as error:
            detector.ood_score(refused)
        one_sentence(error)
    for refused, told in ((broken, "2 of 300"), (ID[:1], "minimum of 2"), (ID[:, 0], "2D")):
        with pytest.raises(UserError, match=told):
            tiny(kind).fit(refused)


@pytest.mark.parametrize(
    ("detector", "told"),
    [
        (KNN(0), "k=0 was given for 300"),
        (KNN(301), "k=301 was given for 300"),
        (AutoEncoder(width=8, blocks=1, epochs=3, lr=1e30, device="cpu"), "lower lr"),
        (AutoEncoder((16, 15)), r"channels=\(16, 15\) was given for 32 features"),
    ],
)
def test_a_fit_that_cannot_be_is_refused(detector, told):
    with pytest.raises(UserError, match=told) as error:
        detector.fit(ID)
    one_sentence(error)
