import math
from functools import partial

import numpy as np
import pytest
import torch
from dlsr.baselines import fit_gaussian
from dlsr.errors import UserError
from dlsr.metrics import auroc
from dlsr.study.baselines import (
    BottleneckNetwork,
    VariationalNetwork,
    fit_autoencoder,
    fit_clusters,
    fit_flow,
    fit_forest,
    fit_kernel_pca,
    fit_mixture,
    fit_pca,
    fit_vae,
    varying_directions,
)
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.kernel_approximation import Nystroem
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.mixture import GaussianMixture
from torch import nn

from conftest import easy_features, one_sentence

ID, OOD = easy_features(300)
ID_TEST, _ = easy_features(100, seed=1)
FAR = 20 * OOD
QUICK = {"device": "cpu", "batch_size": 32, "epochs": 2, "latent": 4}
TINY = {
    "pca": partial(fit_pca, components=4),
    "kernel": partial(fit_kernel_pca, components=8, landmarks=40),
    "mixture": partial(fit_mixture, components=2, principal=5),
    "clusters": partial(fit_clusters, clusters=4),
    "forest": partial(fit_forest, trees=20),
    "flow": partial(fit_flow, principal=5, transforms=2, hidden=8, epochs=2, batch_size=64),
    "linear": partial(fit_autoencoder, hidden=(), **QUICK),
    "bottleneck": partial(fit_autoencoder, hidden=(8, 8), **QUICK),
    "denoising": partial(fit_autoencoder, hidden=(8, 8), noise=0.3, **QUICK),
    "vae": partial(fit_vae, width=8, **QUICK),
}
EACH = pytest.mark.parametrize("fit", TINY.values(), ids=TINY)


# Residuals


def test_the_pca_residual_is_numpys():
    x, test = ID + 3, OOD + 3
    mean = x.astype(np.float64).mean(axis=0)
    axes = np.linalg.svd(x - mean, full_matrices=False)[2]
    for components in (1, 4, 20):
        left = (test - mean) @ axes[components:].T
        scores = fit_pca(x, components=components)(test)
        np.testing.assert_allclose(scores, (left**2).sum(axis=1), rtol=1e-4)


def test_all_components_leave_nothing():
    x = np.random.RandomState(0).randn(50, 6)
    for components in (6, 99):
        found = fit_pca(x, components=components)(5 * x)
        np.testing.assert_allclose(found, 0, atol=1e-10)


def test_the_kernel_residual_with_few_landmarks_in_an_explicit_feature_space():
    x, test, gamma = ID[:60].astype(np.float64), OOD[:15].astype(np.float64), 0.02
    score = fit_kernel_pca(x, components=5, landmarks=20, gamma=gamma, seed=3)
    values, vectors = np.linalg.eigh(rbf_kernel(np.concatenate([x, test]), gamma=gamma))
    phi = vectors * np.sqrt(np.maximum(values, 0))  # its inner products are the kernel
    landmarks = phi[Nystroem(n_components=20, random_state=3).fit(x).component_indices_]
    span = np.linalg.svd(landmarks, full_matrices=False)[2]
    projected = phi[:60] @ span.T @ span
    mean = projected.mean(axis=0)
    axes = np.linalg.svd(projected - mean)[2][:5]
    centred = phi[60:] - mean
    by_hand = (centred**2).sum(axis=1) - ((centred @ axes.T) ** 2).sum(axis=1)
    np.testing.assert_allclose(score(test), by_hand, rtol=1e-5)


# Densities


@pytest.mark.parametrize("components", [1, 3])
def test_the_mixture_is_a_sum_of_scipys_gaussians(components):
    pca = PCA(6, svd_solver="full").fit(ID.astype(np.float64))
    ridge = 1e-3 * pca.explained_variance_.mean()
    if components == 1:
        covariance = np.diag(pca.explained_variance_) * 299 / 300 + ridge * np.eye(6)
        parts = [(1.0, np.zeros(6), covariance)]
    else:
        options = {"reg_covar": ridge, "max_iter": 50, "tol": 1e-2, "random_state": 0}
        mixture = GaussianMixture(components, **options).fit(pca.transform(ID))
        parts = list(zip(mixture.weights_, mixture.means_, mixture.covariances_, strict=True))
    inside = pca.transform(OOD)
    logs = [math.log(w) + multivariate_normal(mean, cov).logpdf(inside) for w, mean, cov in parts]
    scores = fit_mixture(ID, components=components, principal=6)(OOD)
    np.testing.assert_allclose(scores, -logsumexp(logs, axis=0), rtol=1e-4)


def test_one_cluster_is_one_gaussian():
    np.testing.assert_allclose(fit_clusters(ID, clusters=1)(OOD), fit_gaussian(ID)(OOD), rtol=1e-4)


def test_clusters_share_the_covariance_about_their_own_means():
    picks = np.random.RandomState(0)
    places, root = 30 * picks.randn(3, 5), picks.randn(5, 5)
    labels = np.repeat([0, 1, 2], [40, 50, 60])
    x = (places[labels] + picks.randn(150, 5) @ root).astype(np.float32)
    means = np.stack([x[labels == label].mean(axis=0) for label in range(3)]).astype(float)
    precision = LedoitWolf(assume_centered=True).fit(x - means[labels]).precision_
    test = (places[labels] + 3 * picks.randn(150, 5)).astype(np.float32)
    apart = test[:, None] - means
    squared = np.einsum("nkc,cd,nkd->nk", apart, precision, apart)
    np.testing.assert_allclose(fit_clusters(x, clusters=3)(test), squared.min(axis=1), rtol=1e-3)
    assert fit_clusters(x, clusters=3)(means)[0] < 0.1 < fit_gaussian(x)(means)[0]


def test_densities_leave_out_directions_without_variance():
    assert varying_directions(ID, 128).n_components_ == 32 - 2  # each layer's sum is 0
    assert varying_directions(ID[:10], 128).n_components_ == 9
    assert varying_directions(ID, 7).n_components_ == 7
    assert np.isfinite(TINY["flow"](ID, principal=128)(OOD)).all()


def test_the_flow_is_a_density():
    picks = np.random.RandomState(0)
    x = picks.randn(2000, 2) * [2, 0.5] + [3, 0]
    x[:, 1] += 0.3 * x[:, 0] ** 2  # no Gaussian
    score = fit_flow(x, hidden=16, epochs=5, batch_size=100)
    ends = zip(x.min(axis=0), x.max(axis=0), strict=True)
    axes = [np.linspace(low - 12, high + 12, 500) for low, high in ends]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    cell = math.prod(axis[1] - axis[0] for axis in axes)
    assert np.exp(-score(grid)).sum() * cell == pytest.approx(1, abs=0.005)


def test_the_flow_finds_a_gaussian_and_its_scale():
    picks = np.random.RandomState(0)
    mix = picks.randn(4, 4)
    x, test = (picks.randn(n, 4) @ mix for n in (4000, 500))
    options = {"hidden": 16, "epochs": 20, "batch_size": 100}
    found = fit_flow(x, **options)(test)
    by_hand = -multivariate_normal(np.zeros(4), mix.T @ mix).logpdf(test)
    assert np.abs(found - by_hand).mean() < 0.25
    assert found.mean() == pytest.approx(by_hand.mean(), abs=0.1)
    scaled, plain = TINY["flow"](4 * ID)(4 * OOD), TINY["flow"](ID)(OOD)
    np.testing.assert_allclose(scaled, plain + 5 * math.log(4), rtol=1e-4, atol=1e-3)


# Autoencoders


def test_the_linear_autoencoder_comes_to_pcas_error():
    x, options = ID + 1, {"latent": 2, "epochs": 600, "lr": 1e-2, "weight_decay": 0.0, "seed": 1}
    score = fit_autoencoder(x, hidden=(), device="cpu", batch_size=100, **options)
    best = fit_pca(x, components=2)(x).mean() / 32
    assert best < 1
    assert best * 0.999 < score(x).mean() < best * 1.03


def test_shapes_of_the_networks():
    linear = BottleneckNetwork((32, 5))
    assert [part.weight.shape for part in (*linear.encoder, *linear.decoder)] == [(5, 32), (32, 5)]
    network = BottleneckNetwork((32, 9, 8, 5), noise=0.2)
    for half, widths in ((network.encoder, [32, 9, 8, 5]), (network.decoder, [5, 8, 9, 32])):
        layers = [part for part in half if isinstance(part, nn.Linear)]
        assert [layers[0].in_features, *(layer.out_features for layer in layers)] == widths
        assert [type(part) for part in half[1::2]] == [nn.SiLU] * 2
    assert network.noise == 0.2


def test_the_noise_is_in_the_loss_and_not_in_the_reconstruction():
    network = BottleneckNetwork((8, 4), noise=0.5)
    network.encoder, network.decoder = nn.Identity(), nn.Identity()
    x = torch.randn(5000, 8)
    assert torch.equal(network(x), x)
    draws = torch.Generator().manual_seed(0)
    assert network.loss(x, draws).item() == pytest.approx(0.25, rel=0.03)
    network.noise = 0.0
    assert network.loss(x, draws).item() == 0


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
    layers = [[isinstance(part, nn.Linear) for part in half] for half in network.children()]
    assert list(map(sum, layers)) == [5, 8]
    network.encoder, network.decoder = Fixed(torch.tensor([[*mean, *log_variance]])), Fixed()
    x = torch.zeros(20_000, 2)
    assert torch.equal(network(x), torch.tensor([mean]).expand(20_000, -1))
    measured = network.loss(x, torch.Generator().manual_seed(0)).item()
    assert measured == pytest.approx(loss, rel=0.02)


def test_autoencoders_do_not_share_a_network():
    fits = [TINY[name] for name in ("linear", "bottleneck", "denoising", "vae")]
    fits += [partial(TINY["bottleneck"], **{k: 3}) for k in ("latent", "epochs", "seed")]
    scores = [fit(ID)(OOD) for fit in fits]
    np.testing.assert_array_equal(TINY["bottleneck"](ID)(OOD), scores[1])
    for i, one in enumerate(scores):
        assert not any(np.array_equal(one, other) for other in scores[:i])


def test_a_bottleneck_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"latent=32 was given; 32 features need 1 to 31") as error:
        fit_autoencoder(ID, latent=32)
    assert one_sentence(error)


# What all have in common


@EACH
def test_a_fit_repeats_and_leaves_the_random_states_alone(fit, monkeypatch, tmp_path):
    state = np.random.get_state()[1].copy()
    torch.manual_seed(5)
    expected = torch.random.get_rng_state()
    first = fit(ID)(OOD)
    monkeypatch.setenv("DLSR_CACHE", str(tmp_path / "another"))
    np.testing.assert_array_equal(fit(ID)(OOD), first)
    assert torch.equal(torch.random.get_rng_state(), expected)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@EACH
def test_constant_and_few_distinct_vectors(fit):
    for x in (ID[np.arange(60) % 2], ID[np.arange(60) % 7]):
        assert np.isfinite(fit(x)(np.concatenate([x, FAR]))).all()


@EACH
def test_far_vectors_score_above_id_and_nan_is_refused(fit):
    score = fit(ID)
    of_id, of_far = score(ID_TEST), score(FAR)
    assert of_id.dtype == np.float32
    assert auroc(of_id, of_far) > 0.95
    for use in (fit, score):
        with pytest.raises(UserError, match="5 of 300"):
            use(np.where(np.arange(300)[:, None] < 5, np.nan, ID))
