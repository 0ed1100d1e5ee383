import math

import numpy as np
import pytest
import torch
from conftest import Rule, easy_features

from dlsr.datasets import UserError
from dlsr.diffusion import Reconstruction, reconstruct
from dlsr.scores import all_scores, check_choice, lr, mfsim, mfsim_by_layer, mse, mse_by_layer
from dlsr.training import Trained

# Two images in layers of 2, 1 and 2 numbers
CHANNELS = (2, 1, 2)
Z = np.array([[3.0, 4.0, 2.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0, 1.0]], np.float32)
R = np.array([[4.0, 3.0, -1.0, 1.0, 1.0], [1.0, 0.0, 5.0, -1.0, -1.0]], np.float32)
COSINES = [[24 / 25, -1.0, 1 / math.sqrt(2)], [1.0, 1.0, -1.0]]


def test_mse_by_hand():
    assert mse(Z, R).tolist() == pytest.approx([(1 + 1 + 9 + 0 + 1) / 5, (16 + 4 + 4) / 5])


def test_mse_of_each_layer_by_hand():
    by_hand = [[1.0, 9.0, 0.5], [0.0, 16.0, 4.0]]
    np.testing.assert_allclose(mse_by_layer(Z, R, CHANNELS), by_hand)


def test_mfsim_by_hand_on_both_choices_of_layers():
    by_hand = -np.array(COSINES)
    np.testing.assert_allclose(mfsim_by_layer(Z, R, CHANNELS), by_hand, atol=1e-6)
    np.testing.assert_allclose(mfsim(Z, R, CHANNELS, layers="all"), by_hand.mean(1), atol=1e-6)
    np.testing.assert_allclose(mfsim(Z, R, CHANNELS, layers="2..M"), by_hand[:, 1:].mean(1), atol=1e-6)
    np.testing.assert_array_equal(mfsim(Z, R, CHANNELS), mfsim(Z, R, CHANNELS, layers="2..M"))


def test_mfsim_is_best_for_the_same_and_worst_for_the_opposite():
    z0 = np.random.RandomState(0).randn(4, 20)
    assert mfsim(z0, 3 * z0, (10, 10)) == pytest.approx(-1)
    assert mfsim(z0, -z0, (10, 10)) == pytest.approx(1)


def test_a_vector_of_zeros_has_no_direction():
    assert mfsim_by_layer(np.zeros((1, 2)), np.ones((1, 2)), (2,)).tolist() == [[0]]


def test_on_z0_a_cosine_is_pearsons_correlation():
    z0, other = easy_features(5)
    seen = mfsim_by_layer(z0, other, (16, 16))
    by_hand = [-np.corrcoef(a[:16], b[:16])[0, 1] for a, b in zip(z0, other, strict=True)]
    np.testing.assert_allclose(seen[:, 0], by_hand, atol=1e-5)


def test_lr_is_the_first_networks_error_minus_the_lasts():
    z0 = np.zeros((1, 2))
    first, last = np.array([[3.0, 0.0]]), np.array([[1.0, 0.0]])
    assert lr(z0, first, last).tolist() == [4.5 - 0.5]
    assert lr(z0, last, first).tolist() == [0.5 - 4.5]


@pytest.mark.parametrize(
    ("score", "layers", "channels", "told"),
    [
        ("mfsim", "2..M", (5,), "at least two layers"),
        ("likelihood", "all", (2, 3), "mse, lr, mfsim"),
        ("mfsim", "1..M", (2, 3), "2..M, all"),
        ("mse", "last", (2, 3), "2..M, all"),
    ],
)
def test_impossible_choices_are_refused(score, layers, channels, told):
    with pytest.raises(UserError, match=told):
        check_choice(score, layers, channels)


def test_one_layer_is_refused_by_2_to_m_only():
    with pytest.raises(UserError, match="at least two layers"):
        mfsim(Z, R, (5,))
    check_choice("mse", "2..M", (5,))
    assert mfsim(Z, R, (5,), layers="all").shape == (2,)


@pytest.fixture
def trained():
    return Trained(Rule(lambda z, t: 0.5 * z), Rule(lambda z, t: 0 * z), [1.0], None)


def test_all_scores_by_their_names(trained):
    z0 = easy_features(7, channels=(8, 4, 4))[0]
    how = Reconstruction("one_step", t=20, noise_draws=2)
    scores = all_scores(trained, z0, (8, 4, 4), how, seed=3)
    layers = [(score, str(m)) for score in ("mse", "lr", "mfsim") for m in (1, 2, 3)]
    assert set(scores) == {
        ("mse", "all"), ("lr", "all"), ("mfsim", "all"), ("mfsim", "2..M"), *layers,
        ("mse_first_epoch", "all"), ("mfsim_first_epoch", "all"), ("mfsim_first_epoch", "2..M"),
    }  # fmt: skip
    assert next(iter(scores)) == ("mse", "all")  # which the others are compared with
    assert all(values.shape == (7,) and values.dtype == np.float32 for values in scores.values())

    last = reconstruct(trained.network, z0, how, seed=3)
    np.testing.assert_allclose(scores["mse", "all"], mse(z0, last), rtol=1e-6)
    np.testing.assert_allclose(scores["mse", "2"], mse(z0[:, 8:12], last[:, 8:12]), rtol=1e-6)
    np.testing.assert_allclose(scores["mfsim", "all"], mfsim(z0, last, (8, 4, 4), layers="all"), rtol=1e-6)
    np.testing.assert_allclose(scores["mfsim", "2..M"], mfsim(z0, last, (8, 4, 4)), rtol=1e-6)
    by_layer = mfsim_by_layer(z0, last, (8, 4, 4))
    np.testing.assert_allclose(scores["mfsim", "3"], by_layer[:, 2], rtol=1e-6)
    lr_by_layer = [scores["lr", str(m)] for m in (1, 2, 3)]
    np.testing.assert_allclose(
        np.average(lr_by_layer, axis=0, weights=(8, 4, 4)), scores["lr", "all"], atol=1e-6
    )
    np.testing.assert_allclose(scores["mse", "all"] + scores["lr", "all"], 1, atol=0.2)  # a silent first


def test_the_first_epochs_scores_are_its_own_networks():
    """LR is the difference of the two MSEs; a first network that returns its input is nearly right."""
    z0 = easy_features(7)[0]
    trained = Trained(Rule(lambda z, t: 0 * z), Rule(lambda z, t: z), [1.0], None)
    scores = all_scores(trained, z0, (16, 16), Reconstruction("one_step", t=1))
    first, last = scores["mse_first_epoch", "all"], scores["mse", "all"]
    np.testing.assert_allclose(scores["lr", "all"], first - last, atol=1e-6)
    np.testing.assert_allclose(first, 0.0015, rtol=1)  # the noise of the first step
    np.testing.assert_allclose(last, 1, atol=0.1)
    for layers in ("all", "2..M"):
        assert scores["mfsim_first_epoch", layers] == pytest.approx(-1, abs=0.01)
        assert scores["mfsim", layers].tolist() == [0] * 7  # of a network that is silent


def test_the_first_epochs_mfsim_takes_the_chosen_layers(trained):
    """The layers are turned apart: on layer 1 the first network gives the opposite."""
    z0 = easy_features(7, channels=(8, 4, 4))[0]
    turned = torch.tensor([-1.0] * 8 + [1.0] * 8)
    one = Trained(trained.network, Rule(lambda z, t: turned * z), [1.0], None)
    scores = all_scores(one, z0, (8, 4, 4), Reconstruction("one_step", t=1))
    assert scores["mfsim_first_epoch", "2..M"] == pytest.approx(-1, abs=0.02)
    assert scores["mfsim_first_epoch", "all"] == pytest.approx(-1 / 3, abs=0.02)


def test_lrs_networks_get_noise_of_their_own(trained):
    z0 = easy_features(7)[0]
    twins = Trained(trained.network, trained.network, [1.0], None)
    assert np.abs(all_scores(twins, z0, (16, 16))["lr", "all"]).min() > 0


def test_all_scores_of_a_single_layer(trained):
    z0 = np.random.RandomState(0).randn(3, 16).astype(np.float32)
    assert set(all_scores(trained, z0, (16,))) == {
        ("mse", "all"), ("lr", "all"), ("mfsim", "all"), ("mse", "1"), ("lr", "1"), ("mfsim", "1"),
        ("mse_first_epoch", "all"), ("mfsim_first_epoch", "all"),
    }  # fmt: skip


def test_scores_follow_the_seed(trained):
    z0 = easy_features(7)[0]
    one, same, other = (all_scores(trained, z0, (16, 16), seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one["mse", "all"], same["mse", "all"])
    assert not np.array_equal(one["mse", "all"], other["mse", "all"])
    assert torch.is_grad_enabled()
