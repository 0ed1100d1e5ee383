import math

import numpy as np
import pytest
import torch
from conftest import Rule

from dlsr.datasets import UserError
from dlsr.diffusion import (
    Reconstruction,
    T,
    add_noise,
    implied_noise,
    noise_schedule,
    one_step,
    paper,
    random_strides,
    reconstruct,
    released,
    released_shares,
)

SILENT = Rule(lambda z, t: torch.zeros_like(z))
MODES = [("released", 3, 1), ("paper", 20, 1), ("one_step", 3, 1), ("one_step", 50, 4)]


def schedule_by_hand():
    """alpha_bar in plain floats."""
    first, last = math.sqrt(0.0015), math.sqrt(0.0195)
    values, product = [], 1.0
    for i in range(100):
        product *= 1 - (first + (last - first) * i / 99) ** 2
        values.append(product)
    return values


ALPHA_BAR = schedule_by_hand()


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The schedule and noising


def test_the_schedule_by_hand():
    alpha_bar = noise_schedule()
    assert alpha_bar.shape == (T,) == (100,)
    assert alpha_bar.dtype == torch.float32
    assert alpha_bar[0].item() == pytest.approx(1 - 0.0015, abs=1e-7)
    assert alpha_bar[-1].item() == pytest.approx(0.4117, abs=5e-5)
    assert alpha_bar.tolist() == pytest.approx(ALPHA_BAR, abs=1e-6)
    assert (alpha_bar.diff() < 0).all()


def test_the_schedules_first_values():
    """beta_1 = ((98 sqrt(0.0015) + sqrt(0.0195)) / 99)^2 and so on."""
    betas = [
        ((98 * 0.0387298335 + 0.1396424004) / 99) ** 2,
        ((97 * 0.0387298335 + 2 * 0.1396424004) / 99) ** 2,
    ]
    third = 0.9985 * (1 - betas[0]) * (1 - betas[1])
    assert noise_schedule()[2].item() == pytest.approx(third, abs=1e-6)


def test_noising_by_hand_and_back():
    z0, noise, alpha_bar = torch.tensor([[3.0]]), torch.tensor([[2.0]]), torch.tensor(0.64)
    z_t = add_noise(z0, alpha_bar, noise)
    assert z_t.item() == pytest.approx(0.8 * 3 + 0.6 * 2)
    assert implied_noise(z_t, z0, alpha_bar).item() == pytest.approx(2, abs=1e-5)


# As released


def released_by_hand(rule, z0, n, noise):
    """The released code's steps for one number, in plain floats."""
    x = math.sqrt(ALPHA_BAR[n]) * z0 + math.sqrt(1 - ALPHA_BAR[n]) * noise[0]
    for step, t in enumerate(range(n, 0, -1), start=1):
        e = (x / math.sqrt(ALPHA_BAR[t]) - rule(x, t)) / math.sqrt(1 / ALPHA_BAR[t] - 1)
        a = ALPHA_BAR[t - 1]
        a_before = ALPHA_BAR[t - 2] if t >= 2 else ALPHA_BAR[0]
        x0 = (x - math.sqrt(1 - a) * e) / math.sqrt(a)
        sigma = math.sqrt((1 - a_before) / (1 - a) * (1 - a / a_before))
        x = math.sqrt(a_before) * x0 + math.sqrt(1 - a_before - sigma**2) * e + sigma * noise[step]
    return x


@pytest.mark.parametrize("n", [1, 2, 3, 10, 99])
def test_released_step_for_step(n):
    def rule(x, t):
        return 0.3 * x + 0.01 * t

    noise = draws(2, n + 1, 1)
    z0 = torch.tensor([[0.7], [-1.2]])
    seen = released(lambda x, t: rule(x, t[:, None]), z0, n=n, noise=noise)
    by_hand = [released_by_hand(rule, float(z0[i]), n, noise[i, :, 0].tolist()) for i in range(2)]
    assert seen[:, 0].tolist() == pytest.approx(by_hand, abs=2e-4)


def test_at_n_1_the_network_has_no_influence():
    z0, noise = draws(4, 8), draws(4, 2, 8, seed=1)
    silent = released(SILENT, z0, n=1, noise=noise)
    loud = released(lambda z, t: 10 * z + 5, z0, n=1, noise=noise)
    torch.testing.assert_close(silent, loud, atol=1e-4, rtol=0)
    noised = add_noise(z0, noise_schedule()[1], noise[:, 0])
    torch.testing.assert_close(silent, noised, atol=1e-5, rtol=0)


def test_at_n_2_the_network_has_influence():
    z0, noise = draws(4, 8), draws(4, 3, 8, seed=1)
    difference = released(SILENT, z0, n=2, noise=noise) - released(lambda z, t: z, z0, n=2, noise=noise)
    assert difference.abs().mean() > 0.1


LEAKS = {2: 0.585, 3: 0.409, 4: 0.312, 5: 0.250, 8: 0.151, 10: 0.117, 20: 0.048, 50: 0.010}


@pytest.mark.parametrize(("n", "share"), LEAKS.items())
def test_the_share_of_the_original_that_leaks(n, share):
    """With a silent network and no noise, what is left of z0 = 1 is its share."""
    left = released(SILENT, torch.ones(1, 1), n=n, noise=torch.zeros(1, n + 1, 1))
    assert left.item() == pytest.approx(share, abs=6e-4)


def test_the_noise_left_at_n_3():
    """The reconstruction is linear in the noises: the responses to each alone add in squares."""
    unit = torch.eye(4)[:, :, None]
    responses = released(SILENT, torch.zeros(4, 1), n=3, noise=unit)
    assert responses.square().sum().sqrt().item() == pytest.approx(0.0473, abs=5e-5)


@pytest.mark.parametrize(("n", "share"), LEAKS.items())
def test_released_shares_are_the_reconstructions(n, share):
    """Against what comes out of many images whose network is silent."""
    leak, std = released_shares(n)
    assert leak == pytest.approx(share, abs=6e-4)
    seen = released(SILENT, torch.full((4000, 1), 2.0), n=n, noise=draws(4000, n + 1, 1))
    assert seen.mean().item() == pytest.approx(2 * leak, abs=0.1 * std)
    assert seen.std().item() == pytest.approx(std, rel=0.05)


def test_the_shares_at_n_3():
    """0.41 z0 + 0.18 f(x3, 3) + 0.41 f(x2, 2), and nothing of f(x1, 1)."""
    shares = [
        released(lambda z, t, at=at: (t == at).float()[:, None], torch.zeros(1, 1), n=3,
                 noise=torch.zeros(1, 4, 1)).item()
        for at in (3, 2, 1)
    ]  # fmt: skip
    assert shares == pytest.approx([0.18, 0.41, 0.0], abs=0.006)
    assert sum(shares) == pytest.approx(1 - LEAKS[3], abs=2.5e-3)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 50, 99])
def test_the_shares_sum_to_1(n):
    """A network that returns the true z0 gives, without noise, z0 back but for 0.2 %."""
    z0 = draws(3, 5)
    seen = released(lambda z, t: z0, z0, n=n, noise=torch.zeros(3, n + 1, 5))
    torch.testing.assert_close(seen, z0, atol=1e-5, rtol=2e-3)


# The equations as printed


@pytest.mark.parametrize("strides", [[1], [3], [1, 1, 1], [60, 39, 1], [100]])
def test_with_the_true_z0_the_papers_way_gives_it_back(strides):
    z0 = draws(3, 5)
    seen = paper(lambda z, t: z0, z0, strides=strides, noise=draws(3, 1, 5, seed=1))
    torch.testing.assert_close(seen, z0, atol=1e-5, rtol=1e-5)


def test_the_papers_way_by_hand():
    """Two strides, 2 and 1, from t = 3: one number, plain floats."""

    def rule(x, t):
        return 0.3 * x + 0.01 * t

    a3, a1 = ALPHA_BAR[2], ALPHA_BAR[0]
    x = math.sqrt(a3) * 0.7 + math.sqrt(1 - a3) * 0.5
    f = rule(x, 2)
    e = (x - math.sqrt(a3) * f) / math.sqrt(1 - a3)
    x = math.sqrt(a1) * f + math.sqrt(1 - a1) * e
    by_hand = rule(x, 0)
    seen = paper(
        lambda z, t: rule(z, t[:, None]),
        torch.tensor([[0.7]]),
        strides=[2, 1],
        noise=torch.tensor([[[0.5]]]),
    )
    assert seen.item() == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("t", [1, 2, 3, 25, 100])
def test_strides_lead_from_t_to_0_and_are_fixed_by_the_seed(t):
    for seed in range(20):
        strides = random_strides(t, seed=seed)
        assert sum(strides) == t
        assert min(strides) >= 1
        assert strides == random_strides(t, seed=seed)
    assert t < 3 or len({tuple(random_strides(t, seed=seed)) for seed in range(20)}) > 1


# One step


def test_one_step_averages_its_draws():
    z0, noise = draws(3, 5), draws(3, 4, 5, seed=1)
    rule = Rule(lambda z, t: z**2 + t[:, None])
    singles = [one_step(rule, z0, t=7, noise=noise[:, [k]]) for k in range(4)]
    torch.testing.assert_close(one_step(rule, z0, t=7, noise=noise), sum(singles) / 4)


@pytest.mark.parametrize("t", [1, 3, 100])
def test_one_step_by_hand(t):
    seen = one_step(
        lambda z, times: 2 * z + times[:, None],
        torch.tensor([[0.7]]),
        t=t,
        noise=torch.tensor([[[0.5]]]),
    )
    a = ALPHA_BAR[t - 1]
    assert seen.item() == pytest.approx(2 * (math.sqrt(a) * 0.7 + math.sqrt(1 - a) * 0.5) + t - 1, abs=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("mode", "t"),
    [("released", 0), ("released", 100), ("paper", 0), ("paper", 101), ("one_step", 0), ("one_step", 101)],
)
def test_timesteps_out_of_range_are_refused(mode, t):
    with pytest.raises(UserError, match=f"t={t} was given; {mode} takes a whole number in 1"):
        Reconstruction(mode, t=t)


@pytest.mark.parametrize("t", [1.5, "3", None])
def test_a_timestep_is_a_whole_number(t):
    with pytest.raises(UserError, match="whole number"):
        Reconstruction(t=t)


@pytest.mark.parametrize(("mode", "largest"), [("released", 99), ("paper", 100), ("one_step", 100)])
def test_the_largest_timestep_works(mode, largest):
    z0 = np.ones((2, 16), np.float32)
    assert np.isfinite(reconstruct(SILENT, z0, Reconstruction(mode, t=largest))).all()


@pytest.mark.parametrize("mode", ["released", "paper"])
def test_several_draws_are_for_one_step_only(mode):
    with pytest.raises(UserError, match="noise_draws=2"):
        Reconstruction(mode, noise_draws=2)
    assert Reconstruction("one_step", noise_draws=2).noises == 2


def test_no_draw_is_refused():
    with pytest.raises(UserError, match="noise_draws=0"):
        Reconstruction("one_step", noise_draws=0)


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="released, paper, one_step"):
        Reconstruction("ddpm")


# Batches and seeds


@pytest.mark.parametrize("width", [16, 5, 50])
@pytest.mark.parametrize(("mode", "t", "k"), MODES)
def test_batches_change_nothing(mode, t, k, width):
    z0 = np.random.RandomState(0).randn(23, width).astype(np.float32)
    how, rule = Reconstruction(mode, t, k), Rule(lambda z, t: 0.5 * z)
    whole = reconstruct(rule, z0, how)
    assert whole.shape == z0.shape
    assert whole.dtype == np.float32
    for size in (1, 7, 16):
        np.testing.assert_allclose(reconstruct(rule, z0, how, batch_size=size), whole, atol=1e-6)
    np.testing.assert_allclose(reconstruct(rule, z0[:3], how), whole[:3], atol=1e-6)


@pytest.mark.parametrize(("mode", "t", "k"), MODES)
def test_the_seed_fixes_everything(mode, t, k):
    z0 = np.random.RandomState(0).randn(8, 16).astype(np.float32)
    how, rule = Reconstruction(mode, t, k), Rule(lambda z, t: torch.tanh(z))
    first = reconstruct(rule, z0, how, seed=1)
    torch.manual_seed(7)
    np.testing.assert_array_equal(first, reconstruct(rule, z0, how, seed=1))
    assert np.abs(first - reconstruct(rule, z0, how, seed=2)).max() > 1e-4


def test_the_noise_is_standard_normal_and_another_for_each_image():
    z0 = np.zeros((400, 32), np.float32)
    noised = reconstruct(Rule(lambda z, t: z), z0, Reconstruction("one_step", t=100))
    noise = noised / math.sqrt(1 - ALPHA_BAR[99])
    assert noise.mean() == pytest.approx(0, abs=0.05)
    assert noise.std() == pytest.approx(1, abs=0.03)
    assert len(np.unique(noise[:, 0])) == 400


@pytest.mark.parametrize("mode", ["released", "paper", "one_step"])
def test_a_seed_may_be_large(mode):
    """As the sum of a 32-bit hash and an offset is."""
    z0 = np.ones((2, 16), np.float32)
    assert np.isfinite(reconstruct(SILENT, z0, Reconstruction(mode), seed=2**32 + 5)).all()


def test_the_default_is_the_released_way_at_3():
    z0 = np.random.RandomState(0).randn(4, 16).astype(np.float32)
    network = Rule(lambda z, t: 0.5 * z)
    np.testing.assert_array_equal(
        reconstruct(network, z0), reconstruct(network, z0, Reconstruction("released", 3))
    )


def test_no_images_give_no_reconstructions():
    assert reconstruct(SILENT, np.empty((0, 5), np.float32)).shape == (0, 5)
