import itertools
import time

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from dlsr.datasets import UserError
from dlsr.metrics import (
    METRICS,
    aupr_in,
    aupr_out,
    auroc,
    bootstrap,
    fpr95,
    fpr95_ood_positive,
    interval,
)

TWENTY = np.arange(1.0, 21)  # ID scores 1..20: 19 is the threshold that accepts 95 %


def scores(n_id=80, n_ood=60, shift=1.0, seed=0, digits=None):
    picks = np.random.RandomState(seed)
    pair = picks.randn(n_id), picks.randn(n_ood) + shift
    return pair if digits is None else tuple(part.round(digits) for part in pair)


# FPR95


def test_fpr95_by_hand():
    """Accepted are the scores up to 19; of the OOD images 3 of 8 lie there."""
    ood = np.array([5.0, 18.5, 19.0, 19.5, 20.0, 21.0, 30.0, 40.0])
    assert fpr95(TWENTY, ood) == 3 / 8


def test_fpr95_the_other_way_by_hand():
    """95 % of 20 OOD images are flagged from the second lowest on; 4 of 5 ID images lie there."""
    ood = np.arange(101.0, 121)
    assert fpr95_ood_positive(np.array([100.0, 102.0, 103.0, 200.0, 110.0]), ood) == 4 / 5


def test_the_positive_class_matters():
    """One ID image far out among the OOD ones, and one OOD image far in."""
    id_scores, ood_scores = np.append(np.zeros(9), 9.0), np.ones(10)
    assert fpr95(id_scores, ood_scores) == 1
    assert fpr95_ood_positive(id_scores, ood_scores) == 0.1


def test_perfect_and_hopeless():
    low, high = TWENTY, TWENTY + 100
    assert [METRICS[m](low, high) for m in ("auroc", "fpr95", "fpr95_ood_positive")] == [1, 0, 0]
    assert [METRICS[m](high, low) for m in ("auroc", "fpr95", "fpr95_ood_positive")] == [0, 1, 1]
    assert aupr_in(low, high) == aupr_out(low, high) == 1


@pytest.mark.parametrize("n", [*range(1, 61), 100, 999, 1000, 10_000])
def test_the_threshold_accepts_at_least_95_percent_and_no_more_than_needed(n):
    """An OOD score on every ID score: the share accepted is the smallest k / n of at least 0.95."""
    id_scores = np.random.RandomState(0).permutation(n).astype(np.float64)
    assert round(fpr95(id_scores, id_scores) * n) == -(-95 * n // 100)


# AUROC and AUPR


@pytest.mark.parametrize("digits", [None, 1, 0])
def test_auroc_counts_pairs_and_ties_by_half(digits):
    id_scores, ood_scores = scores(digits=digits)
    wins = sum((b > a) + 0.5 * (b == a) for a, b in itertools.product(id_scores, ood_scores))
    assert auroc(id_scores, ood_scores) == pytest.approx(wins / (80 * 60))


def test_auroc_of_equal_scores_is_a_half():
    assert auroc(np.ones(5), np.ones(7)) == 0.5


def test_aupr_by_hand():
    """From the highest score: OOD, ID, OOD, ID, ID. From the lowest: ID, ID, OOD, ID, OOD."""
    id_scores, ood_scores = np.array([1.0, 2.0, 4.0]), np.array([3.0, 5.0])
    assert aupr_out(id_scores, ood_scores) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert aupr_in(id_scores, ood_scores) == pytest.approx((1 / 1 + 2 / 2 + 3 / 4) / 3)


def test_aupr_is_sklearns():
    id_scores, ood_scores = scores(n_id=90, n_ood=30, digits=1)
    both = np.concatenate([id_scores, ood_scores])
    ood = np.repeat([0, 1], [90, 30])
    assert aupr_out(id_scores, ood_scores) == pytest.approx(average_precision_score(ood, both))
    assert aupr_in(id_scores, ood_scores) == pytest.approx(average_precision_score(1 - ood, -both))


def test_only_the_order_counts():
    id_scores, ood_scores = scores()
    for metric in METRICS.values():
        assert metric(np.exp(id_scores), np.exp(ood_scores)) == metric(id_scores, ood_scores)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("id_scores", "ood_scores", "told"),
    [
        ([1.0, np.nan], [2.0], "1 of 2 ID scores"),
        ([1.0], [np.inf, -np.inf, 1.0], "2 of 3 OOD scores"),
        ([], [1.0], "ID scores have shape"),
        ([1.0], [], "OOD scores have shape"),
        ([[1.0]], [1.0], "ID scores have shape"),
    ],
)
def test_scores_that_are_none_are_refused(name, id_scores, ood_scores, told):
    with pytest.raises(UserError, match="scores"):
        METRICS[name](np.array(id_scores), np.array(ood_scores))
    with pytest.raises(UserError, match=told):
        bootstrap([(np.array(id_scores), np.array(ood_scores))])


# Intervals


@pytest.mark.parametrize("digits", [None, 0])
def test_the_bootstrap_against_plain_resampling(digits):
    pairs = [scores(40, 33, seed=seed, digits=digits) for seed in (0, 1)]
    values = bootstrap(pairs, draws=25, seed=5)
    id_picks, ood_picks = (np.random.default_rng([5, part]) for part in (0, 1))
    for draw in range(25):
        i, j = id_picks.integers(40, size=40), ood_picks.integers(33, size=33)
        for row, (id_scores, ood_scores) in enumerate(pairs):
            again = id_scores[i], ood_scores[j]
            assert values["auroc"][row, draw] == pytest.approx(auroc(*again), abs=1e-12)
            assert values["fpr95"][row, draw] == pytest.approx(fpr95(*again), abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_the_interval_holds_the_value_and_is_as_wide_as_theory_says(shift):
    pair = scores(300, 200, shift=shift)
    values = bootstrap([pair], draws=400)
    for name in ("auroc", "fpr95"):
        low, high = interval(values[name][0])
        assert low <= METRICS[name](*pair) <= high
        assert 0 <= low < high <= 1
    if shift == 0:  # the variance of AUROC without effect is (n + m + 1) / (12 n m)
        assert values["auroc"].std() == pytest.approx((501 / (12 * 300 * 200)) ** 0.5, rel=0.15)


def test_identical_scores_differ_by_nothing_in_every_draw():
    pair = scores()
    values = bootstrap([pair, tuple(np.exp(part) for part in pair)], draws=50)
    assert not (values["auroc"][0] - values["auroc"][1]).any()
    assert not (values["fpr95"][0] - values["fpr95"][1]).any()


def test_pairing_makes_a_difference_narrower():
    id_scores, ood_scores = scores(300, 300)
    picks = np.random.RandomState(9)
    near = id_scores + 0.05 * picks.randn(300), ood_scores + 0.05 * picks.randn(300)
    a, b = bootstrap([(id_scores, ood_scores), near], draws=200)["auroc"]
    assert (a - b).std() < 0.3 * a.std()


def test_the_bootstrap_follows_its_seed():
    one, same, other = (bootstrap([scores()], draws=9, seed=seed)["auroc"] for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_every_ood_set_meets_the_same_draws_of_id():
    """Against OOD scores that are all the same, AUROC depends on the draws of ID alone."""
    id_scores, _ = scores()
    few, many = (bootstrap([(id_scores, np.full(n, 0.5))], draws=30)["auroc"] for n in (7, 90))
    np.testing.assert_allclose(few, many, rtol=1e-12)
    assert few.std() > 0


def test_pairs_of_other_images_are_refused():
    with pytest.raises(UserError, match="same images"):
        bootstrap([scores(10, 10), scores(10, 11)])


def test_two_thousand_draws_are_quick():
    began = time.perf_counter()
    values = bootstrap([scores(200, 200)])
    assert values["auroc"].shape == (1, 2000)
    assert time.perf_counter() - began < 10


def test_interval_by_hand():
    assert interval(np.arange(101.0)) == pytest.approx((2.5, 97.5))
    assert interval(np.arange(101.0), level=0.5) == pytest.approx((25, 75))
