import math

import numpy as np
import pytest
import torch
from conftest import easy_features, one_sentence
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.decomposition import PCA, KernelPCA
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import NotFittedError
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.mixture import GaussianMixture
from torch import nn

from dlsr import rivals as module
from dlsr.baselines import KNN, VAE, Mahalanobis
from dlsr.datasets import UserError, cache_folder
from dlsr.metrics import auroc
from dlsr.rivals import (
    RIVALS,
    BottleneckAutoEncoder,
    BottleneckNetwork,
    DenoisingAutoEncoder,
    Flow,
    FlowNetwork,
    Forest,
    KernelPCAResidual,
    LinearAutoEncoder,
    Mixture,
    PCAResidual,
    size_in_bytes,
)

CHANNELS = (16, 16)
ID, OOD = easy_features(300)
ID_TEST, _ = easy_features(100, seed=1)
FAR = 20 * OOD
CPU = {"device": "cpu", "batch_size": 32}
TINY = {
    PCAResidual: {"components": 4},
    KernelPCAResidual: {"components": 8, "landmarks": 40},
    Mixture: {"components": 2, "principal": 5},
    Forest: {"trees": 20},
    Flow: {"principal": 5, "transforms": 2, "hidden": 8, "epochs": 2, "batch_size": 64},
    LinearAutoEncoder: CPU | {"latent": 4, "epochs": 2},
    BottleneckAutoEncoder: CPU | {"latent": 4, "width": 8, "epochs": 2},
    DenoisingAutoEncoder: CPU | {"latent": 4, "width": 8, "epochs": 2},
}
OTHERS = {Mahalanobis: {}, KNN: {"k": 5}, VAE: CPU | {"latent": 4, "width": 8, "epochs": 2}}
NETWORKS = pytest.mark.parametrize("kind", [LinearAutoEncoder, BottleneckAutoEncoder, DenoisingAutoEncoder])
KINDS = pytest.mark.parametrize("kind", TINY)
CANDIDATES = [
    pytest.param(row, build, id=f"{row.name}-{label}")
    for row in RIVALS.values()
    for label, build in row.candidates
]


def tiny(kind, **changes):
    channels = {"channels": CHANNELS} if "latent" in TINY[kind] else {}
    return kind(**channels | TINY[kind] | changes)


# Residuals


def test_the_pca_residual_is_numpys():
    x, test = ID + 3, OOD + 3
    mean = x.astype(np.float64).mean(axis=0)
    axes = np.linalg.svd(x - mean, full_matrices=False)[2]
    for components in (1, 4, 20):
        left = (test - mean) @ axes[components:].T
        scores = PCAResidual(components=components).fit(x).all_scores(test)
        assert list(scores) == [("pca", "all")]
        np.testing.assert_allclose(scores["pca", "all"], (left**2).sum(axis=1), rtol=1e-4)


def test_all_components_leave_nothing():
    x = np.random.RandomState(0).randn(50, 6)
    np.testing.assert_allclose(PCAResidual(components=6).fit(x).ood_score(5 * x), 0, atol=1e-10)


def test_with_all_points_as_landmarks_the_kernel_residual_is_that_of_kernel_pca():
    x, test, gamma = ID[:80], np.concatenate([ID_TEST[:20], OOD[:20]]), 0.02
    detector = KernelPCAResidual(components=10, landmarks=80, gamma=gamma).fit(x)
    exact = KernelPCA(10, kernel="rbf", gamma=gamma).fit(x.astype(np.float64))
    kernel = rbf_kernel(x.astype(np.float64), gamma=gamma)
    centred = 1 - 2 * rbf_kernel(test.astype(np.float64), x, gamma=gamma).mean(axis=1) + kernel.mean()
    by_hand = centred - (exact.transform(test.astype(np.float64)) ** 2).sum(axis=1)
    np.testing.assert_allclose(detector.ood_score(test), by_hand, rtol=1e-5)


def test_the_kernel_residual_with_few_landmarks_in_an_explicit_feature_space():
    x, test, gamma = ID[:60].astype(np.float64), OOD[:15].astype(np.float64), 0.02
    detector = KernelPCAResidual(components=5, landmarks=20, gamma=gamma, seed=3).fit(x)
    values, vectors = np.linalg.eigh(rbf_kernel(np.concatenate([x, test]), gamma=gamma))
    phi = vectors * np.sqrt(np.maximum(values, 0))  # its inner products are the kernel
    span = np.linalg.svd(phi[detector.nystroem_.component_indices_], full_matrices=False)[2]
    projected = phi[:60] @ span.T @ span
    mean = projected.mean(axis=0)
    axes = np.linalg.svd(projected - mean)[2][:5]
    centred = phi[60:] - mean
    by_hand = (centred**2).sum(axis=1) - ((centred @ axes.T) ** 2).sum(axis=1)
    np.testing.assert_allclose(detector.ood_score(test), by_hand, rtol=1e-5)


def test_few_landmarks_order_vectors_nearly_as_all_do():
    test = np.concatenate([ID_TEST, OOD])
    few, every = (KernelPCAResidual(components=8, landmarks=n).fit(ID).ood_score(test) for n in (100, 300))
    assert np.corrcoef(few, every)[0, 1] > 0.98


def test_gamma_is_one_over_the_median_squared_distance_of_distinct_vectors():
    squared = ((ID[:40, None].astype(np.float64) - ID[:40]) ** 2).sum(axis=2)[np.triu_indices(40, 1)]
    x = np.concatenate([ID[:40], ID[:1].repeat(200, axis=0)])
    detector = KernelPCAResidual(components=2).fit(x)
    assert detector.gamma_ == pytest.approx(1 / np.median(squared), rel=1e-5)
    assert KernelPCAResidual(components=2, gamma=0.3).fit(ID).gamma_ == 0.3


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
    inside = pca.transform(OOD)
    signs = np.sign((pca.components_ * detector.pca_.components_).sum(axis=1))
    logs = [math.log(w) + multivariate_normal(mean, cov).logpdf(inside * signs) for w, mean, cov in parts]
    scores = detector.all_scores(OOD)
    assert list(scores) == [("mixture", "all")]
    np.testing.assert_allclose(scores["mixture", "all"], -logsumexp(logs, axis=0), rtol=1e-4)


def test_densities_leave_out_directions_without_variance():
    assert Mixture(components=1).fit(ID).pca_.n_components_ == 32 - 2  # each layer's sum is 0
    assert Mixture(components=1).fit(ID[:10]).pca_.n_components_ == 9
    detector = tiny(Flow, principal=128).fit(ID)
    assert detector.pca_.n_components_ == len(detector.scale_) == 30
    assert Mixture(components=1, principal=7).fit(ID).pca_.n_components_ == 7


def test_the_flow_is_a_density():
    picks = np.random.RandomState(0)
    x = picks.randn(2000, 2) * [2, 0.5] + [3, 0]
    x[:, 1] += 0.3 * x[:, 0] ** 2  # no Gaussian
    for data in (x, x[:, :1]):
        detector = Flow(hidden=16, epochs=5, batch_size=100).fit(data)
        span = zip(data.min(axis=0), data.max(axis=0), strict=True)
        axes = [np.linspace(low - 12, high + 12, 500) for low, high in span]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
        cell = math.prod(axis[1] - axis[0] for axis in axes)
        assert np.exp(-detector.ood_score(grid)).sum() * cell == pytest.approx(1, abs=0.005)


def test_the_flow_finds_a_gaussian():
    picks = np.random.RandomState(0)
    mix = picks.randn(4, 4)
    x, test = (picks.randn(n, 4) @ mix for n in (4000, 500))
    scores = Flow(hidden=16, epochs=20, batch_size=100).fit(x).all_scores(test)
    assert list(scores) == [("flow", "all")]
    by_hand = -multivariate_normal(np.zeros(4), mix.T @ mix).logpdf(test)
    assert np.abs(scores["flow", "all"] - by_hand).mean() < 0.25
    assert scores["flow", "all"].mean() == pytest.approx(by_hand.mean(), abs=0.1)


def test_the_flows_density_is_that_before_whitening():
    scores = tiny(Flow).fit(ID).ood_score(OOD)
    np.testing.assert_allclose(
        tiny(Flow).fit(4 * ID).ood_score(4 * OOD), scores + 5 * math.log(4), rtol=1e-4, atol=1e-3
    )


def test_the_flows_first_weights_are_drawn_by_its_seed():
    first, again, other = (tiny(Flow, seed=s, lr=1e-12).fit(ID).ood_score(OOD) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


def test_the_flows_network_is_masked():
    network = FlowNetwork(4, transforms=3, hidden=16)
    z = network.flow().transform
    jacobian = torch.autograd.functional.jacobian(z.transforms[0], torch.randn(4))
    assert torch.equal(jacobian, jacobian.tril())
    x = torch.randn(7, 4)
    assert network.loss(x, torch.Generator()).item() == pytest.approx(-network(x).mean().item())


def test_a_vector_beyond_the_flows_range_scores_highest():
    detector = tiny(Flow).fit(ID)
    scores = detector.ood_score(1e25 * OOD)
    assert np.isfinite(scores).all()
    assert scores.min() > detector.ood_score(OOD).max()


def test_the_forest_is_sklearns():
    scores = Forest(trees=30, seed=4).fit(ID).all_scores(OOD)
    assert list(scores) == [("forest", "all")]
    by_hand = -IsolationForest(n_estimators=30, random_state=4).fit(ID).score_samples(OOD)
    np.testing.assert_allclose(scores["forest", "all"], by_hand, rtol=1e-6)


# Autoencoders


def test_the_linear_autoencoder_comes_to_pcas_error():
    x = ID + 1
    detector = LinearAutoEncoder(
        CHANNELS, device="cpu", batch_size=100, latent=2, epochs=600, lr=1e-2, weight_decay=0.0
    ).fit(x)
    error = detector.all_scores(x)["mse", "all"].mean()
    best = PCAResidual(components=2).fit(x).ood_score(x).mean() / 32
    assert best < 1
    assert best * 0.999 < error < best * 1.03


def test_shapes_of_the_networks():
    linear = LinearAutoEncoder(CHANNELS, latent=5)._network(32)
    assert [part.weight.shape for part in (*linear.encoder, *linear.decoder)] == [(5, 32), (32, 5)]
    for kind in (BottleneckAutoEncoder, DenoisingAutoEncoder):
        network = kind(CHANNELS, latent=5, width=9)._network(32)
        for half, widths in ((network.encoder, [32, 9, 9, 5]), (network.decoder, [5, 9, 9, 32])):
            layers = [part for part in half if isinstance(part, nn.Linear)]
            assert [layers[0].in_features, *(layer.out_features for layer in layers)] == widths
            assert [type(part) for part in half[1::2]] == [nn.SiLU] * 2
    assert network.noise == 0.2
    assert BottleneckAutoEncoder(CHANNELS)._network(32).noise == 0


def test_without_noise_the_denoising_autoencoder_is_the_autoencoder():
    settings = TINY[BottleneckAutoEncoder]
    plain = BottleneckAutoEncoder(CHANNELS, **settings).fit(ID)
    denoising = DenoisingAutoEncoder(CHANNELS, **settings, noise=0).fit(ID)
    x, draws = torch.from_numpy(OOD), torch.Generator().manual_seed(0)
    assert denoising.network_.loss(x, draws).item() == plain.network_.loss(x, draws).item()
    np.testing.assert_array_equal(denoising.ood_score(OOD), plain.ood_score(OOD))
    assert not np.array_equal(tiny(DenoisingAutoEncoder).fit(ID).ood_score(OOD), plain.ood_score(OOD))


def test_the_noise_is_in_the_loss_and_not_in_the_reconstruction():
    network = BottleneckNetwork(nn.Identity(), nn.Identity(), noise=0.5)
    x = torch.randn(5000, 8)
    assert torch.equal(network(x), x)
    assert network.loss(x, torch.Generator().manual_seed(0)).item() == pytest.approx(0.25, rel=0.03)


@NETWORKS
def test_an_autoencoder_is_scored_as_the_lfdn_is(kind):
    scores = tiny(kind).fit(ID).all_scores(OOD)
    assert list(scores) == [("mfsim", "2..M"), ("mfsim", "all"), ("mse", "all")]


@NETWORKS
def test_an_autoencoder_is_trained_once_for_each_code_and_setting(kind, monkeypatch):
    trained = []
    train = module.Reconstructing._fit.__globals__["train_network"]
    monkeypatch.setitem(
        module.Reconstructing._fit.__globals__,
        "train_network",
        lambda *args, **options: trained.append(1) or train(*args, **options),
    )
    first = tiny(kind).fit(ID).ood_score(OOD)
    np.testing.assert_array_equal(tiny(kind).fit(ID).ood_score(OOD), first)
    assert len(trained) == 1
    changes = [{"latent": 3}, {"epochs": 1}, {"seed": 1}, {"lr": 2e-3}]
    changes += [{"width": 7}] * ("width" in TINY[kind]) + [{"noise": 0.3}] * (kind is DenoisingAutoEncoder)
    for count, change in enumerate(changes, start=2):
        assert not np.array_equal(tiny(kind, **change).fit(ID).ood_score(OOD), first)
        assert len(trained) == count
    monkeypatch.setattr(module, "code_hash", lambda *parts: f"other {parts}")
    tiny(kind).fit(ID)
    assert len(trained) == len(changes) + 2
    assert len(list((cache_folder() / "networks").iterdir())) == len(trained)


def test_autoencoders_of_two_kinds_do_not_share_a_file():
    for kind in (LinearAutoEncoder, BottleneckAutoEncoder, DenoisingAutoEncoder):
        tiny(kind).fit(ID)
    assert len(list((cache_folder() / "networks").iterdir())) == 3


# Size


def fitted(**attributes):
    detector = KNN(1)
    for name, value in ({"n_features_in_": 3} | attributes).items():
        setattr(detector, name, value)
    return detector


def test_size_counts_every_array_once():
    array, tensor = np.zeros((3, 4), np.float32), torch.zeros(5, dtype=torch.float64)
    assert size_in_bytes(fitted(a_=array, b_=tensor)) == 48 + 40
    assert size_in_bytes(fitted(a_={"x": [array, (tensor, array)]}, b_=array, other=np.zeros(9))) == 88
    assert size_in_bytes(fitted(a_=nn.Linear(3, 2))) == 4 * (6 + 2)
    assert size_in_bytes(fitted(a_=nn.BatchNorm1d(3))) == 4 * 4 * 3 + 8
    assert size_in_bytes(fitted(a_=np.array([array, None], dtype=object), b_="text", c_=7)) == 48
    with pytest.raises(NotFittedError):
        size_in_bytes(KNN())


def test_sizes_by_hand():
    assert size_in_bytes(KNN(5).fit(ID)) == 300 * 32 * 4
    assert size_in_bytes(Mahalanobis().fit(ID)) == (32 + 2 * 32 * 32) * 8  # covariance and precision
    assert size_in_bytes(tiny(LinearAutoEncoder).fit(ID)) == 4 * (2 * 4 * 32 + 4 + 32)
    by_hand = 4 * (2 * (32 * 8 + 8 * 8 + 8 * 4) + 4 * 8 + 4 + 32)
    assert size_in_bytes(tiny(BottleneckAutoEncoder).fit(ID)) == by_hand
    pca = PCAResidual(components=4).fit(ID)
    assert 8 * (32 + 4 * 32) <= size_in_bytes(pca) <= 8 * (32 + 4 * 32 + 4 * 4)
    forest = Forest(trees=3).fit(ID)
    states = [tree.tree_.__getstate__() for tree in forest.forest_.estimators_]
    trees = sum(state["nodes"].nbytes + state["values"].nbytes for state in states)
    assert trees < size_in_bytes(forest) < 3 * trees


# What all have in common


@KINDS
@pytest.mark.parametrize("train", ["one vector", "two vectors", "a constant", "few distinct vectors"])
def test_constant_and_duplicate_vectors_can_be_fitted(kind, train):
    x = {
        "one vector": ID[:1].repeat(60, axis=0),
        "two vectors": ID[:2].repeat(30, axis=0),
        "a constant": np.full((60, 32), 0.1, np.float32),
        "few distinct vectors": ID[np.arange(60) % 7],
    }[train]
    scores = tiny(kind).fit(x).ood_score(np.concatenate([x, FAR]))
    assert np.isfinite(scores).all()


@KINDS
def test_parameters_and_repeats(kind):
    detector = tiny(kind)
    parameters = detector.get_params()
    state = np.random.get_state()[1].copy()
    first = detector.fit(ID).ood_score(OOD)
    assert detector.get_params() == parameters
    for file in cache_folder().rglob("*.safetensors"):
        file.unlink()  # so that networks are trained again
    torch.manual_seed(5)
    expected = torch.random.get_rng_state()
    np.testing.assert_array_equal(clone(detector).fit(ID).ood_score(OOD), first)
    assert torch.equal(torch.random.get_rng_state(), expected)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    if "seed" in parameters and kind is not Mixture:  # whose optimum may be the same
        assert not np.array_equal(tiny(kind, seed=1).fit(ID).ood_score(OOD), first)
    with pytest.raises(NotFittedError):
        clone(detector).ood_score(OOD)


def test_the_mixtures_seed_reaches_sklearn():
    detector = tiny(Mixture, components=5, seed=6).fit(ID)
    again = GaussianMixture(**detector.mixture_.get_params()).fit(detector.pca_.transform(ID))
    assert detector.mixture_.random_state == 6
    np.testing.assert_array_equal(again.means_, detector.mixture_.means_)


@KINDS
def test_what_is_given_stays_as_it_is_and_chunks_change_nothing(kind, monkeypatch):
    x = ID.copy()
    x.flags.writeable = False
    detector = tiny(kind).fit(x)
    whole = detector.ood_score(x)
    np.testing.assert_array_equal(x, ID)
    monkeypatch.setattr(module, "CHUNK", 7)
    np.testing.assert_allclose(detector.ood_score(x), whole, rtol=1e-4, atol=1e-4)
    if "latent" not in TINY[kind]:
        np.testing.assert_allclose(tiny(kind).fit(x).ood_score(x), whole, rtol=1e-3, atol=1e-3)


WRONG = [
    (PCAResidual, "components", (0, 33, 2.5, "four")),
    (KernelPCAResidual, "components", (0, 41)),
    (KernelPCAResidual, "landmarks", (0, 1.5)),
    (KernelPCAResidual, "gamma", (0, -1.0, math.nan)),
    (Mixture, "components", (0, 301)),
    (Mixture, "principal", (0, -3)),
    (Forest, "trees", (0,)),
    *((Flow, name, (0, 1.5)) for name in ("principal", "transforms", "hidden", "epochs", "batch_size")),
    (Flow, "lr", (0, math.inf)),
    *((kind, "seed", (-1, 0.5)) for kind in TINY if kind is not PCAResidual),
    *((kind, "latent", (0, 32)) for kind in TINY if "latent" in TINY[kind]),
    (LinearAutoEncoder, "epochs", (0,)),
    (LinearAutoEncoder, "batch_size", (0,)),
    (BottleneckAutoEncoder, "width", (0,)),
    (BottleneckAutoEncoder, "lr", (0, math.nan)),
    (BottleneckAutoEncoder, "weight_decay", (-0.1,)),
    (DenoisingAutoEncoder, "noise", (-0.1, math.inf)),
]


@pytest.mark.parametrize(
    ("kind", "name", "value"), [(kind, name, value) for kind, name, values in WRONG for value in values]
)
def test_wrong_settings_are_refused(kind, name, value):
    with pytest.raises(UserError, match=f"{kind.__name__} was given {name}={value!r}; ") as error:
        tiny(kind, **{name: value}).fit(ID)
    assert one_sentence(error).endswith("needed.")
    assert not list(cache_folder().rglob("*.safetensors"))


def test_refusals_say_what_is_needed():
    def told(detector, x=ID):
        with pytest.raises(UserError) as error:
            detector.fit(x)
        return one_sentence(error)

    assert "from 1 to 20 (for 20 vectors of 32 features)" in told(PCAResidual(), ID[:20])
    assert "from 1 to 40 (for 40 landmarks)" in told(KernelPCAResidual(landmarks=40))
    assert "from 1 to 31 (fewer than the 32 features)" in told(LinearAutoEncoder(CHANNELS, latent=32))
    assert "a number above 0 is needed" in told(Flow(lr=0))
    assert "channels=(16, 15) needs (images, 31)" in told(tiny(LinearAutoEncoder, channels=(16, 15)))


def test_a_flow_that_diverges_says_so():
    with pytest.raises(UserError, match="lower lr"):
        tiny(Flow, lr=1e30).fit(ID)


# The table


def test_the_table():
    assert list(RIVALS) == [
        "mahalanobis", "knn", "pca", "kernel_pca", "mixture", "forest", "linear_ae", "ae", "denoising_ae",
        "vae", "flow",
    ]  # fmt: skip
    assert [row.name for row in RIVALS.values()] == list(RIVALS)
    assert {row.sees for row in RIVALS.values()} == {"ID train"}
    labels = {row.name: [label for label, _ in row.candidates] for row in RIVALS.values()}
    assert all(len(set(names)) == len(names) for names in labels.values())
    assert labels["mahalanobis"] == ["default"]
    assert labels["knn"] == ["k=1", "k=5", "k=50", "k=200"]
    assert labels["denoising_ae"] == ["noise=0.2, latent=128", "noise=0.5, latent=128"]


@pytest.mark.parametrize(("row", "build"), CANDIDATES)
def test_a_candidate_is_what_its_label_says(row, build):
    detector = build((3, 4), 7)
    parameters = detector.get_params()
    assert parameters.get("seed", 7) == 7
    assert tuple(parameters.get("channels", (3, 4))) == (3, 4)
    (label,) = (label for label, candidate in row.candidates if candidate is build)
    for part in label.split(", ") if label != "default" else []:
        name, value = part.split("=")
        assert str(parameters[name]) == value


@pytest.mark.parametrize(("row", "build"), CANDIDATES)
def test_a_candidate_puts_far_vectors_above_id(row, build):
    detector = build(CHANNELS, 0)
    detector.set_params(**(TINY | OTHERS)[type(detector)])
    detector.fit(ID)
    of_id, of_far = (detector.all_scores(x)[row.score] for x in (ID_TEST, FAR))
    assert of_id.dtype == of_far.dtype == np.float32
    assert np.isfinite(of_id).all()
    assert np.isfinite(of_far).all()
    assert auroc(of_id, of_far) > 0.95
    assert size_in_bytes(detector) > 0
