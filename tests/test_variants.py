from collections import Counter
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import Rule, easy_features, one_sentence
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf

from dlsr import variants as module
from dlsr.datasets import UserError
from dlsr.diffusion import Reconstruction, noise_schedule, reconstruct
from dlsr.scores import all_scores
from dlsr.training import Trained, TrainingSettings, train
from dlsr.variants import (
    T_GRID,
    VARIANTS,
    Bank,
    CalibratedLayers,
    ErrorProfile,
    Errors,
    Fusion,
    Gaussian,
    HiddenGaussian,
    LinearDenoiser,
    Neighbours,
    Papers,
    ResidualGaussian,
    Variant,
    free,
    hidden,
    likelihood_weights,
    noise_free,
    noisy,
    untrained,
    without_network,
)

CHANNELS = (5, 4, 3, 6, 7)
SIZES = {"fitted": 150, "calibration": 60, "test": 40}


class Counting(Rule):
    """A fixed linear map in a network's place; it counts the vectors by timestep."""

    def __init__(self, share=0.5):
        super().__init__(self.answer)
        self.share, self.seen = share, Counter()
        self.map = torch.tensor(np.random.RandomState(3).randn(25, 25) / 5, dtype=torch.float32)

    def answer(self, z_t, t):
        assert len(set(t.tolist())) == 1
        self.seen[int(t[0]) + 1] += len(z_t)
        return self.share * z_t @ self.map[: z_t.shape[1], : z_t.shape[1]]


def vectors(place):
    return easy_features(SIZES[place], seed=len(place), channels=CHANNELS)[0]


@pytest.fixture
def network():
    return Counting()


@pytest.fixture
def banks(network):
    """Fitted, calibration and test images of ID, under one network."""
    return [Bank(network, vectors(place), CHANNELS, name=place) for place in SIZES]


@pytest.fixture(scope="module")
def trained():
    settings = TrainingSettings(width=16, blocks=1, epochs=3, lr=1e-3, batch_size=32)
    return train(vectors("fitted"), settings, device="cpu", progress=False)


def by_layer(squared):
    ends = np.cumsum(CHANNELS)
    return np.stack(
        [squared[:, end - n : end].mean(axis=1) for n, end in zip(CHANNELS, ends, strict=True)], axis=1
    )


# What stands in the network's place


def gaussian(c=6, *, seed=0):
    picks = np.random.RandomState(seed)
    root = picks.randn(c, c)
    return picks.randn(c), root @ root.T / c


def noise_to_signal(t):
    alpha_bar = float(noise_schedule().double()[t - 1])
    return (1 - alpha_bar) / alpha_bar


def affine(denoiser, t, c):
    """The matrix and offset of a denoiser, as of z_t over the root of alpha_bar."""
    share = noise_schedule()[t - 1].double().sqrt()
    points = torch.cat([torch.zeros(1, c), torch.eye(c)]).double() * share
    found = denoiser(points, torch.full((c + 1,), t - 1)).double().numpy()
    return (found[1:] - found[0]).T, found[0]


@pytest.mark.parametrize("t", [1, 10, 100])
def test_the_linear_denoiser_is_the_closed_form(t):
    mean, covariance = gaussian()
    matrix, offset = affine(LinearDenoiser(mean, covariance), t, 6)
    by_hand = covariance @ np.linalg.inv(covariance + noise_to_signal(t) * np.eye(6))
    np.testing.assert_allclose(matrix, by_hand, atol=1e-5)
    np.testing.assert_allclose(offset, mean - by_hand @ mean, atol=1e-5)


@pytest.mark.parametrize("t", [10, 100])
def test_no_other_linear_denoiser_has_a_smaller_error(t):
    mean, covariance = gaussian()
    matrix, offset = affine(LinearDenoiser(mean, covariance), t, 6)

    def error(matrix, offset):
        left = np.eye(6) - matrix
        spread = left @ covariance @ left.T + noise_to_signal(t) * matrix @ matrix.T
        return np.trace(spread) + ((left @ mean - offset) ** 2).sum()

    picks, least = np.random.RandomState(1), error(matrix, offset)
    for _ in range(30):
        assert error(matrix + 0.05 * picks.randn(6, 6), offset) > least
        assert error(matrix, offset + 0.05 * picks.randn(6)) > least


def test_the_linear_denoiser_denoises_what_it_was_fitted_on():
    """On drawn vectors too, its error is below that of shrinking all directions alike."""
    mean, covariance = gaussian()
    picks = np.random.RandomState(0)
    z0 = picks.multivariate_normal(mean, covariance, 4000).astype(np.float32)
    denoiser = LinearDenoiser.fit(z0)
    np.testing.assert_allclose(denoiser.mean, z0.mean(axis=0), rtol=1e-4)
    predicted = reconstruct(denoiser, z0, Reconstruction("one_step", t=100))
    assert predicted.dtype == np.float32
    error = ((z0 - predicted) ** 2).sum(axis=1).mean()
    s2 = noise_to_signal(100)
    best = s2 * np.trace(covariance @ np.linalg.inv(covariance + s2 * np.eye(6)))
    assert error == pytest.approx(best, rel=0.05)
    shares = np.linspace(0, 1, 21)
    assert best < min((1 - a) ** 2 * np.trace(covariance) + a**2 * 6 * s2 for a in shares)


def test_the_linear_denoiser_takes_each_vectors_own_t():
    mean, covariance = gaussian()
    denoiser, z = LinearDenoiser(mean, covariance), torch.ones(2, 6)
    both = denoiser(z, torch.tensor([0, 99]))
    np.testing.assert_array_equal(both[:1], denoiser(z[:1], torch.tensor([0])))
    np.testing.assert_array_equal(both[1:], denoiser(z[1:], torch.tensor([99])))


def test_an_untrained_network_predicts_exactly_zero():
    before = torch.get_rng_state()
    network = untrained(sum(CHANNELS), width=8, blocks=2)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(p.requires_grad for p in network.parameters())
    z0 = vectors("test")
    for t in (1, 100):
        assert not noise_free(network, z0, t=t).any()
    assert not reconstruct(network, z0, Reconstruction("one_step", t=10)).any()
    same, other = (untrained(sum(CHANNELS), width=8, blocks=2, seed=seed) for seed in (0, 1))
    assert torch.equal(network.into[1].weight, same.into[1].weight)
    assert not torch.equal(network.into[1].weight, other.into[1].weight)


@pytest.mark.parametrize("batch_size", [7, 1024])
def test_without_noise_the_network_is_given_the_shrunk_z0(trained, batch_size):
    z0 = vectors("test")
    for t in (1, 25, 100):
        alpha_bar = float(noise_schedule()[t - 1])
        with torch.inference_mode():
            by_hand = trained.network(torch.tensor(z0) * alpha_bar**0.5, torch.full((len(z0),), t - 1))
        found = noise_free(trained.network, z0, t=t, batch_size=batch_size)
        np.testing.assert_allclose(found, by_hand, atol=1e-5)
    assert noise_free(trained.network, z0[:0], t=1).shape == (0, sum(CHANNELS))


# Banks


def test_each_residual_is_made_once(network, banks):
    bank = banks[2]
    for _ in range(2):
        bank.residual((10, 0))
        bank.predicted((10, 0))
        bank.layer_errors((10, 0))
        Errors(free(10)).score(bank)
        ResidualGaussian(free(10)).fit(*banks[:2]).score(bank)
        Neighbours("residual", 5, (10, 0)).fit(*banks[:2]).score(bank)
    assert network.seen == {10: SIZES["test"] + SIZES["fitted"]}
    bank.residual((10, 1))
    bank.residual((10, 2))
    assert network.seen == {10: 3 * SIZES["test"] + SIZES["fitted"]}


def test_residual_and_prediction_make_up_z0(network, banks):
    bank = banks[2]
    predicted = 0.5 * float(noise_schedule()[24].sqrt()) * bank.z0 @ network.map.numpy()
    np.testing.assert_allclose(bank.predicted((25, 0)), predicted, atol=1e-5)
    np.testing.assert_allclose(bank.residual((25, 0)), bank.z0 - predicted, atol=1e-5)
    np.testing.assert_allclose(bank.layer_errors((25, 0)), by_layer(bank.residual((25, 0)) ** 2), rtol=1e-5)


def test_noise_is_repeatable_and_a_sets_own(network):
    z0 = vectors("test")
    one, same, other = (Bank(network, z0, CHANNELS, name=name).residual((10, 1)) for name in "aab")
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01
    draws = [Bank(network, z0, CHANNELS, name="a").residual((10, draw)) for draw in (1, 2)]
    assert np.abs(draws[0] - draws[1]).max() > 0.01
    without = [Bank(network, z0, CHANNELS, name=name).residual((10, 0)) for name in "ab"]
    np.testing.assert_array_equal(*without)


def test_under_another_denoiser_only_what_no_network_enters_is_kept(network, banks):
    bank = banks[2]
    bank.once("plain", lambda: 1, plain=True)
    bank.once("own", lambda: 1)
    bank.residual((10, 0))
    other = bank.under(Counting(0.0))
    assert other.once("plain", lambda: 2, plain=True) == 1
    assert other.once("own", lambda: 2) == 2
    assert other.once("later", lambda: 2, plain=True) == bank.once("later", lambda: 3, plain=True)
    np.testing.assert_array_equal(other.residual((10, 0)), bank.z0)
    assert np.abs(bank.residual((10, 0)) - bank.z0).max() > 0.1
    assert (other.name, other.channels) == (bank.name, bank.channels)
    assert other.z0 is bank.z0


def test_neighbours_of_z0_are_looked_up_once_for_all_denoisers(banks, monkeypatch):
    fits = []
    monkeypatch.setattr(
        module.KNN, "fit", lambda knn, x, fit=module.KNN.fit: (fits.append(x), fit(knn, x))[1]
    )
    others = [bank.under(Counting(0.9)) for bank in banks]
    for part in (Neighbours("z0", 5), Gaussian()):
        values = [part.fit(*some[:2]).score(some[2]) for some in (banks, others)]
        np.testing.assert_array_equal(*values)
    assert len(fits) == 1
    of_residuals = [
        Neighbours("residual", 5, (50, 0)).fit(*some[:2]).score(some[2]) for some in (banks, others)
    ]
    assert len(fits) == 3
    assert np.isfinite(of_residuals).all()


def test_the_sample_is_a_seeded_pick(network, monkeypatch):
    bank = Bank(network, vectors("fitted"), CHANNELS, name="fitted")
    np.testing.assert_array_equal(bank.sample.z0, bank.z0)
    monkeypatch.setattr(module, "GAUSSIAN_IMAGES", 20)
    one, other = (Bank(network, vectors("fitted"), CHANNELS, name="fitted").sample for _ in range(2))
    rows = np.sort(np.random.RandomState(0).permutation(SIZES["fitted"])[:20])
    np.testing.assert_array_equal(one.z0, bank.z0[rows])
    np.testing.assert_array_equal(one.residual((10, 1)), other.residual((10, 1)))


def test_the_papers_scores_need_a_trained_network(network, trained):
    z0 = vectors("test")
    with pytest.raises(UserError, match="trained LFDN") as error:
        _ = Bank(network, z0, CHANNELS).papers
    assert one_sentence(error)
    bank = Bank(trained, z0, CHANNELS, name="test")
    again = Bank(trained, z0, CHANNELS, name="test")
    assert set(bank.papers) == set(all_scores(trained, z0, CHANNELS))
    for name, layers in (("mse", "all"), ("lr", "all"), ("mfsim", "2..M"), ("mfsim", "all")):
        found = Papers(name, layers).fit(bank, bank).score(bank)
        np.testing.assert_array_equal(found, again.papers[name, layers])


# Scores


def test_errors_are_squared_residuals_over_features_or_layers(banks):
    bank = banks[2]
    squared = bank.residual((10, 0)) ** 2
    for layers, by_hand in (
        (None, squared.mean(axis=1)),
        ((0, 1, 2, 3, 4), by_layer(squared).mean(axis=1)),
        ((3,), by_layer(squared)[:, 3]),
        ((0, 4), by_layer(squared)[:, [0, 4]].mean(axis=1)),
    ):
        np.testing.assert_allclose(Errors(free(10), layers).score(bank), by_hand, rtol=1e-5)


def test_errors_are_averaged_over_keys_by_their_weights(banks):
    bank = banks[2]
    keys = (*free(10), *noisy(50, draws=2))
    parts = np.stack([(bank.residual(key) ** 2).mean(axis=1) for key in keys])
    np.testing.assert_allclose(Errors(keys).score(bank), parts.mean(axis=0), rtol=1e-5)
    weighted = Errors(keys, weights=(3, 1, 4)).score(bank)
    np.testing.assert_allclose(weighted, (3 * parts[0] + parts[1] + 4 * parts[2]) / 8, rtol=1e-5)


def test_cosine_errors_are_minus_the_similarity_of_the_layers(banks):
    bank, key = banks[2], (10, 1)
    predicted = bank.predicted(key)
    ends = np.cumsum(CHANNELS)

    def cosine(m):
        a, b = (x[:, ends[m] - CHANNELS[m] : ends[m]] for x in (bank.z0, predicted))
        return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    found = Errors((key,), (1, 2), cosine=True).score(bank)
    np.testing.assert_allclose(found, -(cosine(1) + cosine(2)) / 2, rtol=1e-4)


@pytest.mark.parametrize(
    ("held_out", "layers", "columns"),
    [(False, None, slice(None)), (True, None, slice(None)), (False, (1, 3), [5, 6, 7, 8, *range(12, 18)])],
)
def test_the_residual_gaussian_is_scipys_distance(banks, held_out, layers, columns):
    fitted, calibration, test = banks
    keys = free(10, 50)
    score = ResidualGaussian(keys, held_out=held_out, layers=layers).fit(fitted, calibration).score(test)
    by_hand = []
    for key in keys:
        learned = (calibration if held_out else fitted).residual(key)[:, columns].astype(np.float64)
        found = LedoitWolf().fit(learned)
        inverse = np.linalg.inv(found.covariance_)
        by_hand.append(
            [mahalanobis(x, found.location_, inverse) ** 2 for x in test.residual(key)[:, columns]]
        )
    np.testing.assert_allclose(score, np.mean(by_hand, axis=0), rtol=1e-5)


def test_the_feature_gaussian_is_that_of_an_untrained_networks_residual(banks):
    """Which predicts 0, so that its residual is z0."""
    without = [bank.under(untrained(sum(CHANNELS), width=8, blocks=1)) for bank in banks]
    of_residual = ResidualGaussian(free(10)).fit(*without[:2]).score(without[2])
    np.testing.assert_allclose(Gaussian().fit(*banks[:2]).score(banks[2]), of_residual, rtol=1e-6)


@pytest.mark.parametrize(("of", "key"), [("z0", (1, 0)), ("predicted", (50, 0)), ("residual", (10, 0))])
@pytest.mark.parametrize("k", [1, 7, 9999])
def test_neighbours_are_at_the_kth_distance_of_directions(banks, of, key, k):
    def directions(bank):
        x = {"z0": bank.z0, "predicted": bank.predicted(key), "residual": bank.residual(key)}[of]
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    fitted, calibration, test = banks
    apart = np.linalg.norm(directions(test)[:, None] - directions(fitted)[None], axis=2)
    by_hand = np.sort(apart, axis=1)[:, min(k, SIZES["fitted"]) - 1]
    found = Neighbours(of, k, key).fit(fitted, calibration).score(test)
    np.testing.assert_allclose(found, by_hand, atol=1e-3)


def test_calibrated_layers_have_mean_0_and_std_1_on_the_calibration_images(banks):
    fitted, calibration, test = banks
    keys = free(10, 50)
    score = CalibratedLayers(keys).fit(fitted, calibration)

    def logs(bank):
        return np.log(np.mean([by_layer(bank.residual(key) ** 2) for key in keys], axis=0))

    mean, std = logs(calibration).mean(axis=0), logs(calibration).std(axis=0)
    standard = (logs(test) - mean) / std
    np.testing.assert_allclose(score.score(test), standard.mean(axis=1), atol=1e-4)
    largest = CalibratedLayers(keys, largest=True).fit(fitted, calibration)
    np.testing.assert_allclose(largest.score(test), standard.max(axis=1), atol=1e-4)
    one = Bank(Counting(), calibration.z0[:, :5], (5,), name="calibration")
    alone = CalibratedLayers(keys).fit(one, one).score(one)
    assert alone.mean() == pytest.approx(0, abs=1e-4)
    assert alone.std() == pytest.approx(1, abs=1e-4)


def test_the_error_profile_is_the_distance_of_log_errors(banks):
    fitted, calibration, test = banks
    keys = free(10, 50)

    def profile(bank):
        return np.log(np.hstack([by_layer(bank.residual(key) ** 2) for key in keys])).astype(np.float64)

    gaussian = LedoitWolf().fit(profile(calibration))
    inverse = np.linalg.inv(gaussian.covariance_)
    by_hand = [mahalanobis(x, gaussian.location_, inverse) ** 2 for x in profile(test)]
    found = ErrorProfile(keys).fit(fitted, calibration).score(test)
    np.testing.assert_allclose(found, by_hand, rtol=1e-2)


class Given:
    """A score whose values are given by a bank's name."""

    def __init__(self, values, factor=1.0):
        self.values, self.factor = values, factor

    def fit(self, fitted, calibration):
        return self

    def score(self, bank):
        return self.factor * self.values[bank.name]

    def cost(self, features, parameters, fitted):
        return 7.0


def given(seed, factor=1.0):
    picks = np.random.RandomState(seed)
    return Given({place: picks.lognormal(seed, 1 + seed, n) for place, n in SIZES.items()}, factor)


@pytest.mark.parametrize("weights", [None, (1, 3)])
@pytest.mark.parametrize("logs", [True, False])
def test_a_fusion_is_the_mean_of_standardised_scores(banks, weights, logs):
    fitted, calibration, test = banks
    parts = given(0), given(1)
    scale = np.log if logs else np.asarray

    def standard(part):
        known = scale(part.score(calibration))
        return (scale(part.score(test)) - known.mean()) / known.std()

    fusion = Fusion(parts, weights, logs).fit(fitted, calibration)
    by_hand = np.average([standard(part) for part in parts], axis=0, weights=weights)
    np.testing.assert_allclose(fusion.score(test), by_hand, rtol=1e-9)
    assert fusion.score(calibration).mean() == pytest.approx(0, abs=1e-9)
    alone = Fusion(parts[:1], logs=logs).fit(fitted, calibration).score(calibration)
    assert alone.std() == pytest.approx(1)
    assert fusion.cost(1, 1, 1) == 14


@pytest.mark.parametrize("logs", [True, False])
def test_a_fusion_does_not_depend_on_the_scale_of_a_part(banks, logs):
    one, scaled = (
        Fusion((given(0), given(1, factor)), logs=logs).fit(*banks[:2]).score(banks[2])
        for factor in (1, 1000)
    )
    np.testing.assert_allclose(one, scaled, rtol=1e-6)


def test_a_fusion_takes_logarithms_of_zeros_and_negative_values(banks):
    part = Given({place: np.linspace(-1, 1, n) for place, n in SIZES.items()})
    assert np.isfinite(Fusion((part,)).fit(*banks[:2]).score(banks[2])).all()


# Costs


def test_costs_are_passes_of_the_network_and_what_comes_after():
    c, p, n = 720, 1_000_000, 45_000

    def cost(score):
        return score.cost(c, p, n)

    assert [cost(Papers(name)) for name in ("mse", "mfsim", "lr")] == [3 * p, 3 * p, 6 * p]
    assert cost(Errors(noisy(*T_GRID, draws=2))) == 12 * p
    assert cost(ResidualGaussian(free(3, 25, 100))) == 3 * (p + c**2)
    assert cost(ErrorProfile(free(*T_GRID))) == 6 * p
    assert cost(CalibratedLayers(free(10))) == p
    assert cost(Gaussian()) == c**2
    assert cost(Neighbours("z0", 5)) == n * c
    assert cost(Neighbours("residual", 5, (10, 0))) == n * c + p
    assert cost(Fusion((Errors(free(10)), Neighbours("z0", 50)))) == p + n * c


def test_the_passes_that_costs_count_are_those_that_are_made(network, banks):
    fitted, calibration, test = banks
    for score in (Errors(noisy(3, 10, draws=2)), ResidualGaussian(free(1, 50)), CalibratedLayers(free(25))):
        score.fit(fitted, calibration)
        network.seen.clear()
        score.score(test)
        assert sum(network.seen.values()) == score.cost(0, 1, 0) * len(test)


# The search's list


def test_without_the_network_z0_itself_is_scored():
    error, knn, plain = Errors(free(10)), Neighbours("z0", 50), Gaussian()
    for score in (error, CalibratedLayers(free(10)), Papers("mse"), Fusion((error, Papers("mse")))):
        assert without_network(score) is None
    for of in ("residual", "predicted", "hidden", "z0"):
        assert without_network(Neighbours(of, 5, (10, 0))) == Neighbours("z0", 5, (10, 0))
    residual = ResidualGaussian(free(10))  # under an untrained network the residual is z0
    assert without_network(residual) == residual
    assert without_network(HiddenGaussian(10)) == without_network(plain) == plain
    fusion = Fusion((error, residual, Neighbours("hidden", 50)), weights=(1, 2, 3), logs=False)
    assert without_network(fusion) == Fusion((residual, knn), weights=(2, 3), logs=False)


def test_hidden_activations_are_what_the_last_layers_read(network, banks):
    _, _, test = banks
    trained = test.network
    if not hasattr(trained, "out"):
        trained = untrained(len(test.z0[0]), width=8, blocks=1)
    found = hidden(trained, test.z0, t=10)
    with torch.inference_mode():
        predicted = trained.out(torch.from_numpy(found)).numpy()
    np.testing.assert_allclose(predicted, noise_free(trained, test.z0, t=10), rtol=1e-5, atol=1e-6)
    linear = LinearDenoiser.fit(test.z0)
    np.testing.assert_array_equal(hidden(linear, test.z0, t=10), noise_free(linear, test.z0, t=10))


def test_likelihood_weights_are_differences_of_the_signal_to_noise_ratio():
    def snr(t):
        return 1 / noise_to_signal(t)

    ts = (2, 3, 50, 100)
    by_hand = [snr(t - 1) - snr(t) for t in ts]
    np.testing.assert_allclose(likelihood_weights(ts), by_hand, rtol=1e-9)
    assert min(likelihood_weights(range(2, 101))) > 0


def test_keys_by_hand():
    assert free(3, 10) == ((3, 0), (10, 0))
    assert noisy(3, 10, draws=2) == ((3, 1), (3, 2), (10, 1), (10, 2))


def test_the_papers_scores_are_among_the_variants_by_their_titles():
    papers = {name: v.score for name, v in VARIANTS.items() if v.idea.startswith("the paper's")}
    assert papers == {
        "MSE": Papers("mse"), "LR": Papers("lr"), "MFsim": Papers("mfsim", "2..M"),
        "MFsim, all layers": Papers("mfsim"),
    }  # fmt: skip
    assert {v.network for v in VARIANTS.values()} == {"base", "small", "standardised"}
    assert len(VARIANTS) == len({(repr(v.score), v.network) for v in VARIANTS.values()})


NO_LARGER_FAR_AWAY = ("MFsim", "kNN", "LR")  # of directions, or of two networks' difference


@pytest.fixture(scope="module")
def places(trained):
    """ID images; and vectors that are far away."""
    inside = vectors("test")
    outside = 3 * easy_features(40, seed=5, channels=CHANNELS)[1]
    sets = {place: vectors(place) for place in ("fitted", "calibration")} | {"in": inside, "out": outside}
    return {place: Bank(trained, z0, CHANNELS, name=place) for place, z0 in sets.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_scores_finitely_and_what_is_far_away_higher(name, places):
    variant = VARIANTS[name]
    assert isinstance(variant, Variant)
    score = deepcopy(variant.score).fit(places["fitted"], places["calibration"])
    inside, outside = score.score(places["in"]), score.score(places["out"])
    for values in (inside, outside):
        assert values.shape == (40,)
        assert np.isfinite(values).all()
    assert score.cost(sum(CHANNELS), 1000, 150) > 0
    if not name.startswith(NO_LARGER_FAR_AWAY):
        assert np.median(outside) > np.median(inside)


def test_a_bank_of_a_trained_network_keeps_it(trained):
    bank = Bank(trained, vectors("test"), CHANNELS)
    assert isinstance(bank.trained, Trained)
    assert isinstance(bank.sample.trained, Trained)
    assert len(bank) == SIZES["test"]
