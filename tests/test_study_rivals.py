"""Scores by diffusion from other papers, against closed forms under Gaussians."""

import numpy as np
import pytest
import torch
from dlsr.diffusion import fixed_noise, noise_schedule
from dlsr.study.rivals import (
    by_timestep,
    eigen_score,
    fit_dte,
    fit_dte_nearest,
    scoped,
    standardised_sum,
    surprise,
)
from dlsr.study.scores import LinearDenoiser
from scipy.stats import norm
from sklearn.metrics.pairwise import euclidean_distances

from conftest import Rule

PICKS = np.random.RandomState(0)
MEAN, ROOT = PICKS.randn(6), PICKS.randn(6, 6)
COVARIANCE = ROOT @ ROOT.T / 6
X = PICKS.multivariate_normal(MEAN, COVARIANCE, 30).astype(np.float32)
TS = (1, 10, 100)


def alpha_bar(t):
    return float(noise_schedule().double()[t - 1])


def noisy(t, draw=0):
    a, noise = alpha_bar(t), fixed_noise(draw + 1, 6).double().numpy()[draw]
    return np.sqrt(a) * X + np.sqrt(1 - a) * noise


# EigenScore


@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_eigenvalues_of_a_linear_denoiser_are_the_posterior_covariances(count):
    found = eigen_score(LinearDenoiser(MEAN, COVARIANCE), TS, count=count, steps=300)(X)
    for column, t in zip(found.T, TS, strict=True):
        noise = (1 - alpha_bar(t)) / alpha_bar(t)
        posterior = np.linalg.inv(np.linalg.inv(COVARIANCE) + np.eye(6) / noise)
        expected = np.sort(np.linalg.eigvalsh(posterior))[::-1][:count].sum()
        np.testing.assert_allclose(column, expected, rtol=1e-3)


def test_the_eigenvalues_of_a_denoiser_that_is_not_linear_differ_by_vector():
    found = eigen_score(Rule(lambda z, t: torch.sin(z)), [10], count=1, steps=200)(X)[:, 0]
    slope = np.abs(np.cos(noisy(10))).max(axis=1)
    np.testing.assert_allclose(found, (1 - alpha_bar(10)) / alpha_bar(10) ** 0.5 * slope, rtol=0.02)


def test_standardised_values_are_summed():
    held_out = np.array([[0.0, 1], [2, 5]])
    values = np.array([[1.0, 3], [3, 5]])
    assert standardised_sum(held_out)(values).tolist() == pytest.approx([0, 3])


# SCOPED


@pytest.mark.parametrize("t", TS)
def test_the_ratio_under_a_gaussian_is_its_closed_form(t):
    variances, a = np.diag(COVARIANCE), alpha_bar(t)  # probes of ±1 are exact on a diagonal
    spread = a * variances + 1 - a
    score = (noisy(t) - np.sqrt(a) * MEAN) / spread
    expected = (score**2).sum(axis=1) / (1 / spread).sum()
    denoiser = LinearDenoiser(MEAN, np.diag(variances))
    np.testing.assert_allclose(scoped(denoiser, [t])(X)[:, 0], expected, rtol=2e-3)


def test_many_probes_find_the_trace_of_a_full_covariance():
    a = alpha_bar(50)
    precision = np.linalg.inv(a * COVARIANCE + (1 - a) * np.eye(6))
    score = (noisy(50) - np.sqrt(a) * MEAN) @ precision
    expected = (score**2).sum(axis=1) / np.trace(precision)
    one, many = (
        np.abs(scoped(LinearDenoiser(MEAN, COVARIANCE), [50], probes=n)(X)[:, 0] / expected - 1)
        for n in (1, 2000)
    )
    assert many.max() < 0.03 < one.max()


def test_the_surprise_is_two_sided_and_the_largest_over_timesteps():
    held_out = np.random.RandomState(0).randn(4000, 2) * [1, 10] + [5, 0]
    score = surprise(held_out)
    assert score([[5, 0]])[0] < min(score([[1, 0]])[0], score([[9, 0]])[0])
    apart = np.array([[5, 20], [5, -20.0]])
    expected = -norm(0, 10 * np.sqrt(1 + 4000**-0.4)).logpdf(20)
    width = held_out.std(axis=0)[0] * 4000**-0.2  # densities are of values in kernel widths
    np.testing.assert_allclose(score(apart), expected - np.log(10 * width), atol=0.3)
    assert np.isfinite(score([[1e4, -1e5]])).all()


# What both share


def test_noise_is_averaged_over_and_is_the_same_for_every_vector():
    of_one = lambda denoise, z_t, a: denoise(z_t).sum(1)  # noqa: E731
    network = Rule(lambda z, t: z**2 + t[:, None])
    found = by_timestep(network, of_one, [10, 60], 2)(X)
    for column, t in zip(found.T, (10, 60), strict=True):
        by_draw = [(noisy(t, draw) ** 2).sum(axis=1) + 6 * (t - 1) for draw in (0, 1)]
        np.testing.assert_allclose(column, np.mean(by_draw, axis=0), rtol=1e-4)
    np.testing.assert_array_equal(by_timestep(network, of_one, [10, 60], 2)(X[3:5]), found[3:5])


# DTE


def test_the_nearest_vectors_estimate_the_variance_of_noise():
    test = X[:5] + 0.1
    squared = np.sort(euclidean_distances(test, X, squared=True), axis=1)[:, :3].mean(axis=1)
    np.testing.assert_allclose(fit_dte_nearest(X, k=3)(test), squared / 6, rtol=1e-3)
    picks = np.random.RandomState(1)
    far = 10 * picks.randn(50, 400).astype(np.float32)
    for std in (0.5, 1.5):
        noise = std * picks.randn(50, 400)
        assert fit_dte_nearest(far, k=1)(far + noise).mean() == pytest.approx(std**2, rel=0.05)


def test_the_classifier_gives_larger_times_to_noisier_vectors():
    picks = np.random.RandomState(2)
    spread = np.array([1.0, 1, 1] + [0.01] * 17)
    x, test = ((picks.randn(n, 20) * spread).astype(np.float32) for n in (600, 100))
    score = fit_dte(x, epochs=25, lr=2e-3, device="cpu")
    noise = picks.randn(100, 20)
    means = [score(test + std * noise).mean() for std in (0, 0.2, 0.5, 0.8)]
    assert np.diff(means).min() > 0.1
    assert 0 <= means[0] < 0.5 < 3.5 < means[-1] <= 6
    again = fit_dte(x, epochs=25, lr=2e-3, device="cpu")(test)
    np.testing.assert_array_equal(again, score(test))
