import json
from collections import Counter

import dlsr
import numpy as np
import pandas as pd
import pytest
import torch
from dlsr.diffusion import fixed_noise, noise_schedule, one_step, reconstruct
from dlsr.study import scores as module
from dlsr.study.scores import (
    Denoised,
    LinearDenoiser,
    error,
    formula,
    fuse,
    fused,
    gaussian,
    hidden,
    neighbours,
    predict_noise_free,
    residual_gaussian,
    untrained,
)
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf

from conftest import ROOT, Rule, easy_features

CHANNELS = (5, 4, 3, 6, 7)
SIZES = {"fitted": 150, "calibration": 60, "test": 40}


class Counting(Rule):
    """A fixed linear map in a network's place; it counts the vectors by timestep."""

    def __init__(self, share=0.5):
        super().__init__(self.answer)
        self.share, self.seen = share, Counter()
        picks = np.random.RandomState(3)
        self.map = torch.tensor(picks.randn(25, 25) / 5, dtype=torch.float32)

    def answer(self, z_t, t):
        assert len(set(t.tolist())) == 1
        self.seen[int(t[0]) + 1] += len(z_t)
        return self.share * z_t @ self.map


def vectors(name):
    return easy_features(SIZES[name], seed=len(name), channels=CHANNELS)[0]


@pytest.fixture
def network():
    return Counting()


@pytest.fixture
def sets(network):
    """Fitted, calibration and test images of ID, under one network."""
    return [Denoised(vectors(name), CHANNELS, network) for name in SIZES]


@pytest.fixture(scope="module")
def trained():
    options = {"width": 16, "blocks": 1, "epochs": 3, "lr": 1e-3, "batch_size": 32}
    return dlsr.train(vectors("fitted"), **options, device="cpu", progress=False)


def by_layer(squared):
    parts = np.split(squared, np.cumsum(CHANNELS)[:-1], axis=1)
    return np.stack([part.mean(axis=1) for part in parts], axis=1)


# What stands in the network's place


def noise_to_signal(t):
    alpha_bar = float(noise_schedule().double()[t - 1])
    return (1 - alpha_bar) / alpha_bar


def affine(denoiser, t, c):
    """Return the matrix and offset of a denoiser, as of z_t over the root of alpha_bar."""
    share = noise_schedule()[t - 1].double().sqrt()
    points = torch.cat([torch.zeros(1, c), torch.eye(c)]).double() * share
    found = denoiser(points, torch.full((c + 1,), t - 1)).double().numpy()
    return (found[1:] - found[0]).T, found[0]


@pytest.mark.parametrize("t", [1, 10, 100])
def test_the_linear_denoiser_is_the_closed_form(t):
    picks = np.random.RandomState(0)
    mean, root = picks.randn(6), picks.randn(6, 6)
    covariance, s2 = root @ root.T / 6, noise_to_signal(t)
    matrix, offset = affine(LinearDenoiser(mean, covariance), t, 6)
    by_hand = covariance @ np.linalg.inv(covariance + s2 * np.eye(6))
    np.testing.assert_allclose(matrix, by_hand, atol=1e-5)
    np.testing.assert_allclose(offset, mean - by_hand @ mean, atol=1e-5)


def test_the_linear_denoiser_denoises_what_it_was_fitted_on():
    picks = np.random.RandomState(0)
    mean, root = picks.randn(6), picks.randn(6, 6)
    covariance, s2 = root @ root.T / 6, noise_to_signal(100)
    z0 = picks.multivariate_normal(mean, covariance, 4000).astype(np.float32)
    denoiser = LinearDenoiser.fit(z0)
    noise = torch.tensor(picks.randn(4000, 1, 6), dtype=torch.float32)
    z = torch.from_numpy(z0)
    predicted = one_step(denoiser, z, t=100, noise=noise)
    assert predicted.dtype == torch.float32
    best = s2 * np.trace(covariance @ np.linalg.inv(covariance + s2 * np.eye(6)))
    assert ((z - predicted) ** 2).sum(dim=1).mean().item() == pytest.approx(best, rel=0.05)
    both = denoiser(torch.ones(2, 6), torch.tensor([0, 99]))  # each vector has its own t
    alone = denoiser(torch.ones(1, 6), torch.tensor([99]))
    np.testing.assert_array_equal(both[1:], alone)


def test_an_untrained_network_predicts_exactly_zero():
    before = torch.get_rng_state()
    network = untrained(25, width=8, blocks=2)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(p.requires_grad for p in network.parameters())
    for t in (1, 100):
        assert not predict_noise_free(network, vectors("test"), t=t).any()
    other = untrained(25, width=8, blocks=2, seed=1)
    assert not torch.equal(network.into[1].weight, other.into[1].weight)


def test_hidden_activations_are_what_the_output_layers_read(trained):
    z0 = vectors("test")
    with torch.inference_mode():
        predicted = trained.last.out(torch.from_numpy(hidden(trained.last, z0, t=10))).numpy()
    free = predict_noise_free(trained.last, z0, t=10)
    np.testing.assert_allclose(predicted, free, rtol=1e-5, atol=1e-6)
    linear = LinearDenoiser.fit(z0)
    np.testing.assert_array_equal(hidden(linear, z0), predict_noise_free(linear, z0, t=10))


# Arrays


def test_residuals_by_hand_and_each_made_once(network, sets):
    test = sets[2]
    predicted = 0.5 * float(noise_schedule()[24].sqrt()) * test.z0 @ network.map.numpy()
    for _ in range(2):
        np.testing.assert_allclose(test.predicted((25, 0)), predicted, atol=1e-5)
        squared = (test.z0 - predicted) ** 2
        np.testing.assert_allclose(test.errors((25, 0)), by_layer(squared), rtol=1e-4)
    assert network.seen == {25: SIZES["test"]}
    draws = [test.residual((25, draw)) for draw in (1, 2)]
    for draw, found in enumerate(draws):
        noise = fixed_noise(module.DRAWS, 25)[draw : draw + 1]
        back = reconstruct(network, test.z0, one_step, t=25, noise=noise)
        np.testing.assert_allclose(found, test.z0 - back, atol=1e-6)
    assert np.abs(draws[0] - draws[1]).max() > 0.01


# Scores


def score(fit, sets):
    return fit(*sets[:2])(sets[2])


def test_errors_are_squared_residuals_over_features_or_layers(sets):
    squared = sets[2].residual((10, 0)) ** 2
    for layers, by_hand in (
        (None, squared.mean(axis=1)),
        ([3], by_layer(squared)[:, 3]),
        ([0, 4], by_layer(squared)[:, [0, 4]].mean(axis=1)),
    ):
        found = score(error((10, 0), layers=layers), sets)
        np.testing.assert_allclose(found, by_hand, rtol=1e-5)


def test_errors_are_averaged_by_their_weights(sets):
    keys = (10, 0), (50, 1), (50, 2)
    parts = np.stack([(sets[2].residual(key) ** 2).mean(axis=1) for key in keys])
    np.testing.assert_allclose(score(error(*keys), sets), parts.mean(axis=0), rtol=1e-5)
    found = score(error(*keys, weights=[3, 1, 4]), sets)
    np.testing.assert_allclose(found, (3 * parts[0] + parts[1] + 4 * parts[2]) / 8, rtol=1e-5)


def distances(known, test):
    found = LedoitWolf().fit(known.astype(np.float64))
    inverse = np.linalg.inv(found.covariance_)
    return [mahalanobis(x, found.location_, inverse) ** 2 for x in test]


@pytest.mark.parametrize(
    ("on", "layers", "columns"),
    [
        ("sample", None, slice(None)),
        ("calibration", None, slice(None)),
        ("sample", [1, 3], [5, 6, 7, 8, *range(12, 18)]),
    ],
)
def test_the_residual_gaussian_is_scipys_distance(sets, on, layers, columns):
    keys = (10, 0), (50, 0)
    known = sets[1] if on == "calibration" else sets[0]
    by_hand = [distances(*(x.residual(k)[:, columns] for x in (known, sets[2]))) for k in keys]
    found = score(residual_gaussian(*keys, layers=layers, on=on), sets)
    np.testing.assert_allclose(found, np.mean(by_hand, axis=0), rtol=1e-4)


def test_the_gaussian_on_z0_sees_all_fitted_images(sets, monkeypatch):
    monkeypatch.setattr(module, "GAUSSIAN_IMAGES", 50)
    whole = score(gaussian(lambda x: x.z0, on="fitted"), sets)
    np.testing.assert_allclose(whole, distances(sets[0].z0, sets[2].z0), rtol=1e-4)
    few = score(gaussian(lambda x: x.z0), sets)
    np.testing.assert_allclose(few, distances(sets[0].sample().z0, sets[2].z0), rtol=1e-4)


@pytest.mark.parametrize("k", [1, 7, 9999])
@pytest.mark.parametrize("name", ["z0", "residual"])
def test_neighbours_are_at_the_kth_distance_of_directions(sets, name, k):
    array = {"z0": lambda x: x.z0, "residual": lambda x: x.residual((10, 0))}[name]
    a, b = (array(x) / np.linalg.norm(array(x), axis=1, keepdims=True) for x in (sets[2], sets[0]))
    apart = np.linalg.norm(a[:, None] - b[None], axis=2)
    by_hand = np.sort(apart, axis=1)[:, min(k, SIZES["fitted"]) - 1]
    np.testing.assert_allclose(score(neighbours(array, k=k), sets), by_hand, atol=1e-3)


@pytest.mark.parametrize("weights", [None, (1, 3)])
@pytest.mark.parametrize("logs", [True, False])
def test_a_fusion_is_the_mean_of_standardised_scores(weights, logs):
    picks = np.random.RandomState(0)
    held_out, test = (picks.lognormal(size=(n, 2)) for n in (60, 40))
    parts = [lambda x, i=i: 1000**i * x[:, i] for i in (0, 1)]  # the scale of a part is no matter
    found = fuse(parts, held_out, weights=weights, logs=logs)
    scale = np.log if logs else np.asarray
    standard = (scale(test) - scale(held_out).mean(axis=0)) / scale(held_out).std(axis=0)
    np.testing.assert_allclose(found(test), np.average(standard, axis=1, weights=weights))
    assert found(held_out).mean() == pytest.approx(0, abs=1e-9)
    assert np.isfinite(fuse(parts, -held_out)(test)).all()


def test_fusions_share_their_parts(sets):
    fits = Counter()

    def part(fitted, calibration):
        fits["fit"] += 1
        return lambda x: fits.update(["score"]) or x.errors((10, 0))[:, 0]

    alone = formula(lambda x: x.errors((10, 0))[:, 1])
    both = [score(fused(part, alone, weights=w), sets) for w in ([1, 1], [1, 2])]
    assert fits == {"fit": 1, "score": 2}  # of calibration and test images
    assert np.abs(both[0] - both[1]).max() > 0.01


# The search's ideas, which stand in the page's cells


@pytest.fixture(scope="module")
def page():
    """What the cells of page 43 define that are tagged as ideas."""
    notebook = json.loads((ROOT / "notebooks" / "43_search.ipynb").read_text("utf-8"))
    names = {name: getattr(module, name) for name in dir(module)}
    names |= {"np": np, "dlsr": dlsr}
    cells = [c for c in notebook["cells"] if "ideas" in c["metadata"].get("tags", [])]
    assert len(cells) == 2
    for cell in cells:
        exec("".join(cell["source"]), names)
    return names


def test_the_ideas_are_those_of_the_committed_log(page):
    file = ROOT / "results" / "comparison" / "search-efficientnet_b4_without_last_block.csv"
    log = pd.read_csv(file).query("kind == 'variant'")
    committed = log.groupby("idea")["name"].unique().map(set).to_dict()
    papers = [name for idea in committed if "paper" in idea for name in committed[idea]]
    assert set(papers) == set(page["PAPER"])
    ideas = {idea: set(scores) for idea, scores in page["IDEAS"].items()}
    for network, idea in (
        ("small", "a smaller LFDN"),
        ("standardised", "features standardised over the training set"),
    ):
        ideas[idea] = {f"{name}, {network} LFDN" for name in page["BY_OTHER_NETWORKS"]}
    assert ideas == {idea: names for idea, names in committed.items() if "paper" not in idea}


def test_every_idea_scores_finitely_and_what_is_far_away_higher(page, trained):
    outside = 3 * easy_features(40, seed=5, channels=CHANNELS)[1]
    arrays = [*map(vectors, SIZES), outside]
    fitted, held_out, near, far = (Denoised(z0, CHANNELS, trained.last, trained.first) for z0 in arrays)
    tried = {n: fit for scores in page["IDEAS"].values() for n, fit in scores.items()}
    for name, fit in (page["PAPER"] | tried).items():
        found = fit(fitted, held_out)
        values = found(near), found(far)
        for part in values:
            assert part.shape == (40,)
            assert np.isfinite(part).all(), name
        if not name.startswith(("MFsim", "kNN", "LR")):  # directions, or two networks' difference
            assert np.median(values[1]) > np.median(values[0]), name


def test_scores_of_the_page_by_hand(page, sets):
    key, test = (10, 0), sets[2]
    ends = np.cumsum(CHANNELS)
    parts = [
        (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        for a, b in zip(
            np.split(test.z0, ends[:-1], axis=1),
            np.split(test.predicted(key), ends[:-1], axis=1),
            strict=True,
        )
    ]
    found = score(page["cosine_error"](key, [1, 2]), sets)
    np.testing.assert_allclose(found, -(parts[1] + parts[2]) / 2, rtol=1e-4)
    logs = [np.log(by_layer(x.residual(key) ** 2)) for x in sets[1:]]
    standard = (logs[1] - logs[0].mean(axis=0)) / logs[0].std(axis=0)
    for over in (np.mean, np.max):
        found = score(page["calibrated_layers"](key, over=over), sets)
        np.testing.assert_allclose(found, over(standard, axis=1), atol=1e-3)
    found = score(page["error_profile"](key), sets)
    np.testing.assert_allclose(found, distances(*logs), rtol=1e-2)
    by_hand = [1 / noise_to_signal(t - 1) - 1 / noise_to_signal(t) for t in (2, 3, 50, 100)]
    np.testing.assert_allclose(page["likelihood_weights"]((2, 3, 50, 100)), by_hand, rtol=1e-9)
