import numpy as np
import pytest
from dlsr.baselines import fit_gaussian, fit_knn
from dlsr.errors import UserError
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf

from conftest import easy_features, one_sentence

ID, OOD = easy_features(300)
BOTH = pytest.mark.parametrize("fit", [fit_knn, fit_gaussian])


def test_knn_is_the_distance_to_the_kth_normalised_neighbour():
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (ID, OOD))
    distances = np.sort(np.linalg.norm(test[:, None] - train, axis=2), axis=1)
    for k in (1, 5, 300):
        np.testing.assert_allclose(fit_knn(ID, k=k)(OOD), distances[:, k - 1], rtol=1e-4)


def test_knn_counts_neighbours_from_1_and_takes_50():
    angles = np.radians([10, 30, 60])
    train = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    scores = [fit_knn(train, k=k)(np.array([[1.0, 0.0]]))[0] for k in (1, 2, 3)]
    assert scores == pytest.approx(2 * np.sin(angles / 2), abs=1e-5)
    np.testing.assert_array_equal(fit_knn(ID)(OOD), fit_knn(ID, k=50)(OOD))


def test_the_gaussian_is_the_squared_distance_under_ledoit_wolf():
    inverse = np.linalg.inv(LedoitWolf().fit(ID.astype(np.float64)).covariance_)
    by_hand = [mahalanobis(x, ID.astype(np.float64).mean(0), inverse) ** 2 for x in OOD]
    np.testing.assert_allclose(fit_gaussian(ID)(OOD), by_hand, rtol=1e-5)


def test_the_gaussian_is_computed_in_float64():
    far = (1e4 + np.random.RandomState(0).randn(500, 3) * [1, 1, 0.01]).astype(np.float32)
    exact = LedoitWolf().fit(far.astype(np.float64)).mahalanobis(far.astype(np.float64))
    np.testing.assert_allclose(fit_gaussian(far)(far), exact, rtol=1e-5)


@BOTH
def test_a_fit_is_repeatable_and_leaves_its_vectors_alone(fit):
    x = ID.copy()
    x.flags.writeable = False  # as memory-mapped features are
    scores = fit(x)(OOD[:70])
    np.testing.assert_array_equal(x, ID)
    assert (scores.shape, scores.dtype) == ((70,), np.float32)
    np.testing.assert_array_equal(fit(ID)(OOD[:70]), scores)


@BOTH
def test_what_is_no_finite_matrix_of_the_fits_width_is_refused(fit):
    score, broken = fit(ID), ID.copy()
    broken[[3, 8], 5] = np.nan, np.inf
    for refused, told in ((broken, "2 of 300"), (OOD[:, :31], "31.*32 numbers"), (ID[0], "32")):
        with pytest.raises(UserError, match=told) as error:
            score(refused)
        one_sentence(error)
    for refused, told in ((broken, "2 of 300"), (ID[:1], "2 or more"), (ID[:, 0], "300")):
        with pytest.raises(UserError, match=told):
            fit(refused)


@pytest.mark.parametrize("k", [0, 301])
def test_a_neighbour_that_is_not_there_is_refused(k):
    with pytest.raises(UserError, match=f"k={k} was given for 300") as error:
        fit_knn(ID, k=k)
    one_sentence(error)
