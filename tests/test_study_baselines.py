import math

import numpy as np
import pytest
import torch
from dlsr.errors import UserError
from dlsr.metrics import auroc
from dlsr.scores import mse
from dlsr.study.baselines import (
    VAE,
    BottleneckAutoEncoder,
    BottleneckNetwork,
    Flow,
    Forest,
    KernelPCAResidual,
    Mixture,
    PCAResidual,
)
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import rbf_kernel
from torch import nn

from conftest import easy_features, one_sentence

ID, OOD = easy_features(300)
ID_TEST, _ = easy_features(100, seed=1)
FAR = 20 * OOD
QUICK = {"device": "cpu", "batch_size": 32, "epochs": 2, "latent": 4}
TINY = {
    "pca": PCAResidual(components=4),
    "kernel": KernelPCAResidual(components=8, landmarks=40),
    "mixture": Mixture(components=2, principal=5),
    "forest": Forest(trees=20),
    "flow": Flow(principal=5, transforms=2, hidden=8, epochs=2, batch_size=64),
    "linear": BottleneckAutoEncoder(hidden=(), **QUICK),
    "bottleneck": BottleneckAutoEncoder(hidden=(8, 8), **QUICK),
    "denoising": BottleneckAutoEncoder(hidden=(8, 8), noise=0.3, **QUICK),
    "vae": VAE(width=8, **QUICK),
}
EACH = pytest.mark.parametrize("detector", TINY.values(), ids=TINY)


# Residuals


def test_the_pca_residual_is_numpys():
    x, test = ID + 3, OOD + 3
    mean = x.astype(np.float64).mean(axis=0)
    axes = np.linalg.svd(x - mean, full_matrices=False)[2]
    for components in (1, 4, 20):
        left = (test - mean) @ axes[components:].T
        scores = PCAResidual(components=components).fit(x).ood_score(test)
        np.testing.assert_allclose(scores, (left**2).sum(axis=1), rtol=1e-4)


def test_all_components_leave_nothing():
    x = np.random.RandomState(0).randn(50, 6)
    for components in (6, 99):
        found = PCAResidual(components=components).fit(x).ood_score(5 * x)
        np.testing.assert_allclose(found, 0, atol=1e-10)


def test_the_kernel_residual_with_few_landmarks_in_an_explicit_feature_space():
    x, test, gamma = ID[:60].astype(np.float64), OOD[:15].astype(np.float64), 0.02
    detector = KernelPCAResidual(components=5, landmarks=20, gamma=gamma, seed=3).fit(x)
    values, vectors = np.linalg.eigh(rbf_kernel(np.concatenate([x, test]), gamma=gamma))
    phi = vectors * np.sqrt(np.maximum(values, 0))  # its inner products are the kernel
    landmarks = phi[detector.nystroem_.component_indices_]
    span = np.linalg.svd(landmarks, full_matrices=False)[2]
    projected = phi[:60] @ span.T @ span
    mean = projected.mean(axis=0)
    axes = np.linalg.svd(projected - mean)[2][:5]
    centred = phi[60:] - mean
    by_hand = (centred**2).sum(axis=1) - ((centred @ axes.T) ** 2).sum(axis=1)
    np.testing.assert_allclose(detector.ood_score(test), by_hand, rtol=1e-5)


# Densities


@pytest.mark.parametrize("components", [1, 3])
def test_the_mixture_is_a_sum_of_scipys_gaussians(components):
    detector = Mixture(components=components, principal=6).fit(ID)
    pca = PCA(6, svd_solver="full").fit(ID.astype(np.float64))
    if components == 1:
        parts = [(1.0, np.zeros(6), np.diag(pca.explained_variance_) * 299 / 300)]
        parts[0][2][np.diag_indices(6)] += 1e-3 * pca.explained_variance_.mean()
    else:
        mixture = detector.mixture_
        parts = list(zip(mixture.weights_, mixture.means_, mixture.covariances_, strict=True))
    signs = np.sign((pca.components_ * detector.pca_.components_).sum(axis=1))
    inside = pca.transform(OOD) * signs
    logs = [math.log(w) + multivariate_normal(mean, cov).logpdf(inside) for w, mean, cov in parts]
    np.testing.assert_allclose(detector.ood_score(OOD), -logsumexp(logs, axis=0), rtol=1e-4)


def test_densities_leave_out_directions_without_variance():
    assert Mixture(components=1).fit(ID).pca_.n_components_ == 32 - 2  # each layer's sum is 0
    assert Mixture(components=1).fit(ID[:10]).pca_.n_components_ == 9
    assert Mixture(components=1, principal=7).fit(ID).pca_.n_components_ == 7
    flow = clone(TINY["flow"]).set_params(principal=128).fit(ID)
    assert flow.pca_.n_components_ == len(flow.scale_) == 30


def test_the_flow_is_a_density():
    picks = np.random.RandomState(0)
    x = picks.randn(2000, 2) * [2, 0.5] + [3, 0]
    x[:, 1] += 0.3 * x[:, 0] ** 2  # no Gaussian
    detector = Flow(hidden=16, epochs=5, batch_size=100).fit(x)
    ends = zip(x.min(axis=0), x.max(axis=0), strict=True)
    axes = [np.linspace(low - 12, high + 12, 500) for low, high in ends]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    cell = math.prod(axis[1] - axis[0] for axis in axes)
    assert np.exp(-detector.ood_score(grid)).sum() * cell == pytest.approx(1, abs=0.005)


def test_the_flow_finds_a_gaussian_and_its_scale():
    picks = np.random.RandomState(0)
    mix = picks.randn(4, 4)
    x, test = (picks.randn(n, 4) @ mix for n in (4000, 500))
    options = {"hidden": 16, "epochs": 20, "batch_size": 100}
    found = Flow(**options).fit(x).ood_score(test)
    by_hand = -multivariate_normal(np.zeros(4), mix.T @ mix).logpdf(test)
    assert np.abs(found - by_hand).mean() < 0.25
    assert found.mean() == pytest.approx(by_hand.mean(), abs=0.1)
    scaled = clone(TINY["flow"]).fit(4 * ID).ood_score(4 * OOD)
    plain = clone(TINY["flow"]).fit(ID).ood_score(OOD)
    np.testing.assert_allclose(scaled, plain + 5 * math.log(4), rtol=1e-4, atol=1e-3)


# Autoencoders


def test_the_linear_autoencoder_comes_to_pcas_error():
    x, options = ID + 1, {"latent": 2, "epochs": 600, "lr": 1e-2, "weight_decay": 0.0, "seed": 1}
    detector = BottleneckAutoEncoder(hidden=(), device="cpu", batch_size=100, **options).fit(x)
    best = PCAResidual(components=2).fit(x).ood_score(x).mean() / 32
    assert best < 1
    assert best * 0.999 < detector.ood_score(x).mean() < best * 1.03


def test_shapes_of_the_networks():
    linear = BottleneckAutoEncoder(latent=5, hidden=()).build(32)
    assert [part.weight.shape for part in (*linear.encoder, *linear.decoder)] == [(5, 32), (32, 5)]
    network = BottleneckAutoEncoder(latent=5, hidden=(9, 8), noise=0.2).build(32)
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


@pytest.mark.parametrize("name", ["linear", "bottleneck", "denoising", "vae"])
def test_an_autoencoder_is_scored_by_its_squared_error(name):
    detector = clone(TINY[name]).fit(ID)
    by_hand = mse(OOD, detector.reconstruct(OOD))
    np.testing.assert_allclose(detector.ood_score(OOD), by_hand, rtol=1e-6)


def test_autoencoders_do_not_share_a_network():
    kinds = [TINY[name] for name in ("linear", "bottleneck", "denoising", "vae")]
    kinds += [clone(TINY["bottleneck"]).set_params(**{k: 3}) for k in ("latent", "epochs", "seed")]
    scores = [clone(one).fit(ID).ood_score(OOD) for one in kinds]
    again = clone(TINY["bottleneck"]).fit(ID).ood_score(OOD)
    np.testing.assert_array_equal(again, scores[1])
    for i, one in enumerate(scores):
        assert not any(np.array_equal(one, other) for other in scores[:i])


def test_a_bottleneck_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"latent=32 was given; 32 features need 1 to 31") as error:
        BottleneckAutoEncoder(latent=32).fit(ID)
    assert one_sentence(error)


# What all have in common


@EACH
def test_repeats_and_clones(detector):
    detector = clone(detector)
    parameters, state = detector.get_params(), np.random.get_state()[1].copy()
    torch.manual_seed(5)
    expected = torch.random.get_rng_state()
    first = detector.fit(ID).ood_score(OOD)
    assert detector.get_params() == parameters
    np.testing.assert_array_equal(clone(detector).fit(ID).ood_score(OOD), first)
    assert torch.equal(torch.random.get_rng_state(), expected)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@EACH
def test_constant_and_few_distinct_vectors(detector):
    for x in (ID[np.arange(60) % 2], ID[np.arange(60) % 7]):
        scores = clone(detector).fit(x).ood_score(np.concatenate([x, FAR]))
        assert np.isfinite(scores).all()


@EACH
def test_far_vectors_score_above_id(detector):
    detector = clone(detector).fit(ID)
    of_id, of_far = detector.ood_score(ID_TEST), detector.ood_score(FAR)
    assert of_id.dtype == np.float32
    assert auroc(of_id, of_far) > 0.95
