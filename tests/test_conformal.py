import numpy as np
import pytest
from dlsr.conformal import (
    assign_folds,
    benjamini_hochberg,
    cross_conformal,
    fewest_discoveries,
    flag_limit,
    stream_alarm,
    stream_p_values,
)
from dlsr.errors import UserError

from conftest import one_sentence


def test_folds_have_equal_sizes():
    for n, folds, sizes in ((30, 10, [3] * 10), (7, 3, [2, 2, 3]), (4, 10, [1] * 4)):
        found = assign_folds(n, folds, 0)
        assert sorted(np.bincount(found)) == sizes
        assert not np.array_equal(found, assign_folds(n, folds, 1)) or n == 4


def test_cross_conformal_p_values_by_hand():
    """Ties count as at least as high; each fold's images are compared by its own model."""
    held_out = [np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0])]
    scores = [np.array([0.0, 2.0, 9.0]), np.array([20.0, 5.0, 99.0])]
    np.testing.assert_array_equal(cross_conformal(scores, held_out), [5 / 6, 5 / 6, 1 / 6])


@pytest.mark.parametrize("folds", [1, 5])
def test_a_rate_holds_on_exchangeable_scores(folds):
    """With independent scores the share of p <= a is at most a; 3 standard errors are allowed."""
    picks = np.random.RandomState(0)
    for n in (30, 99):
        for rate in (0.05, 0.2):
            shares = []
            for _ in range(400):
                familiar, new = picks.randn(n), picks.randn(50)
                held_out = np.array_split(familiar, folds)
                shares.append((cross_conformal([new] * folds, held_out) <= rate).mean())
            assert np.mean(shares) <= rate + 3 * np.std(shares) / 20


def test_what_few_images_can_say():
    assert flag_limit(30, 0.01) == 0
    assert flag_limit(19, 0.05) == 1 / 20
    assert flag_limit(99, 0.29) == 29 / 100
    assert flag_limit(99, 0.299) == 29 / 100
    assert (fewest_discoveries(99, 50, 0.1), fewest_discoveries(30, 50, 0.01)) == (5, 162)


def test_false_discoveries_are_few():
    """A tenth of the images is OOD; of those that are called so, 10 % at most are familiar."""
    picks, shares, found = np.random.RandomState(0), [], []
    for _ in range(200):
        p = cross_conformal([np.append(picks.randn(90), picks.randn(10) + 6)], [picks.randn(300)])
        called = benjamini_hochberg(p, 0.1)
        shares.append(called[:90].sum() / max(called.sum(), 1))
        found.append(called[90:].mean())
    assert np.mean(shares) <= 0.1 + 3 * np.std(shares) / np.sqrt(200)
    assert np.mean(found) > 0.9
    with pytest.raises(UserError, match="0 was given as q") as error:
        benjamini_hochberg(p, 0)
    one_sentence(error)
    assert fewest_discoveries(300, 100, 0.1) == 4
    for ones, called in ((3, False), (4, True)):
        p = np.where(np.arange(100) < ones, 1 / 301, 1.0)
        assert benjamini_hochberg(p, 0.1).any() == called


def test_smoothed_p_values_of_a_stream_are_uniform_and_follow_the_images_before():
    picks = np.random.RandomState(0)
    p = stream_p_values(picks.randint(5, size=4000), picks.randint(5, size=50), seed=1)
    assert np.abs(np.quantile(p, [0.05, 0.25, 0.5, 0.75]) - [0.05, 0.25, 0.5, 0.75]).max() < 0.03
    assert np.abs(np.corrcoef(p[:-1], p[1:])[0, 1]) < 0.05
    first, *_, last = stream_p_values(np.full(200, 9.0), np.zeros(20))
    assert first <= 1 / 21
    assert last > 0.01  # by then 9 is familiar


def test_an_alarm_is_rare_without_a_change_and_fast_after_one():
    picks, alarms, delays = np.random.RandomState(0), [], []
    for seed in range(400):
        p = stream_p_values(picks.randn(300), picks.randn(50), seed=seed)
        alarms.append(stream_alarm(p, threshold=20)[0] is not None)
    assert np.mean(alarms) <= 1 / 20
    for seed in range(20):
        stream = np.append(picks.randn(300), picks.randn(60) + 4)
        first, wealth = stream_alarm(stream_p_values(stream, picks.randn(50), seed=seed))
        delays.append(first - 300)
        assert wealth.shape == (360,) and (wealth[:first] < 100).all()
    assert 0 <= np.median(delays) < 15
    assert stream_alarm(np.array([]))[0] is None
    for wrong in ({"threshold": 1}, {"jump": 0}):
        with pytest.raises(UserError):
            stream_alarm(np.array([0.5]), **wrong)
