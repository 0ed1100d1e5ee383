import itertools
import math

import numpy as np
import pytest
import torch
from dlsr import diffusion
from dlsr.diffusion import ddim, ddim_released, fixed_noise, noise_schedule, one_step, reconstruct
from dlsr.errors import UserError
from dlsr.lfdn import LFDN

from conftest import Rule, easy_features, one_sentence

SILENT = Rule(lambda z, t: torch.zeros_like(z))
SAMPLERS = [(ddim_released, 3, 4), (ddim, 20, 1), (one_step, 3, 1), (one_step, 50, 4)]


betas = [(math.sqrt(0.0015) + (math.sqrt(0.0195) - math.sqrt(0.0015)) * i / 99) ** 2 for i in range(100)]
ALPHA_BAR = [math.prod(1 - beta for beta in betas[: i + 1]) for i in range(100)]


def affine(x, t):
    """Return what a made network predicts, of numbers and of tensors."""
    return 0.3 * x + 0.01 * (t[:, None] if isinstance(t, torch.Tensor) else t)


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The schedule and noising


def test_the_schedule_and_noising_by_hand():
    alpha_bar = noise_schedule()
    assert (alpha_bar.shape, alpha_bar.dtype) == ((diffusion.T,), torch.float32)
    assert alpha_bar.tolist() == pytest.approx(ALPHA_BAR, abs=1e-6)
    assert alpha_bar[[0, -1]].tolist() == pytest.approx([1 - 0.0015, 0.4117], abs=5e-5)
    z0, noise, alpha_bar = torch.tensor([[3.0]]), torch.tensor([[2.0]]), torch.tensor(0.64)
    z_t = diffusion.add_noise(z0, alpha_bar, noise)
    assert z_t.item() == pytest.approx(0.8 * 3 + 0.6 * 2)
    assert diffusion.predict_eps(z_t, z0, alpha_bar).item() == pytest.approx(2, abs=1e-5)


# As released


def released_by_hand(z0, t, noise):
    """Return the result of the released code's steps for one number, in plain floats."""
    x = math.sqrt(ALPHA_BAR[t]) * z0 + math.sqrt(1 - ALPHA_BAR[t]) * noise[0]
    for draw, step in enumerate(range(t, 0, -1), start=1):
        e = (x / math.sqrt(ALPHA_BAR[step]) - affine(x, step)) / math.sqrt(1 / ALPHA_BAR[step] - 1)
        a = ALPHA_BAR[step - 1]
        a_before = ALPHA_BAR[step - 2] if step >= 2 else ALPHA_BAR[0]
        x0 = (x - math.sqrt(1 - a) * e) / math.sqrt(a)
        sigma = math.sqrt((1 - a_before) / (1 - a) * (1 - a / a_before))
        x = math.sqrt(a_before) * x0 + math.sqrt(1 - a_before - sigma**2) * e + sigma * noise[draw]
    return x


@pytest.mark.parametrize("t", [1, 2, 3, 10, 99])
def test_released_step_for_step(t):
    noise, z0 = draws(2, t + 1, 1), torch.tensor([[0.7], [-1.2]])
    seen = ddim_released(affine, z0, t=t, noise=noise)
    by_hand = [released_by_hand(float(z0[i]), t, noise[i, :, 0].tolist()) for i in (0, 1)]
    assert seen[:, 0].tolist() == pytest.approx(by_hand, abs=2e-4)


def test_at_t_1_the_network_has_no_influence_and_at_t_2_it_has():
    z0, noise, loud = draws(4, 8), draws(4, 3, 8, seed=1), Rule(lambda z, t: 10 * z + 5)
    noised = diffusion.add_noise(z0, noise_schedule()[1], noise[:, 0])
    for network in (SILENT, loud):
        seen = ddim_released(network, z0, t=1, noise=noise)
        torch.testing.assert_close(seen, noised, atol=1e-4, rtol=0)
    one, other = (ddim_released(network, z0, t=2, noise=noise) for network in (SILENT, loud))
    assert (one - other).abs().mean() > 0.1


@pytest.mark.parametrize(("t", "share", "std"), [(2, 0.585, 0.049), (3, 0.409, 0.047), (50, 0.010, 0.046)])
def test_a_share_of_z0_and_of_noise_comes_back_whatever_the_network_says(t, share, std):
    alone = torch.eye(t + 2)  # z0, and each draw of noise
    back = ddim_released(SILENT, alone[:, :1], t=t, noise=alone[:, 1:, None])
    assert (back[0].item(), back[1:].norm().item()) == pytest.approx((share, std), abs=6e-4)


# The equations as printed, and one step


def test_the_papers_equations_by_hand():
    """Two strides, 2 and 1, from t = 3: one number, plain floats."""
    a3, a1 = ALPHA_BAR[2], ALPHA_BAR[0]
    x = math.sqrt(a3) * 0.7 + math.sqrt(1 - a3) * 0.5
    f = affine(x, 2)
    e = (x - math.sqrt(a3) * f) / math.sqrt(1 - a3)
    x = math.sqrt(a1) * f + math.sqrt(1 - a1) * e
    z0, noise = torch.tensor([[0.7]]), torch.tensor([[0.5]])
    seen = ddim(affine, z0, t=3, strides=[2, 1], noise=noise).item()
    assert seen == pytest.approx(affine(x, 0), abs=1e-5)


def test_strides_lead_from_t_to_0_and_are_fixed_by_the_seed():
    for t, seed in itertools.product((1, 2, 3, 25, 100), (*range(20), 2**32 + 5)):
        strides = diffusion.random_strides(t, seed=seed)
        assert (sum(strides), min(strides) >= 1) == (t, True)
        assert strides == diffusion.random_strides(t, seed=seed)


@pytest.mark.parametrize("t", [1, 3, 100])
def test_one_step_is_the_mean_over_its_draws_by_hand(t):
    z0, noise, a = torch.tensor([[0.7]]), torch.tensor([[0.5], [-0.1]]), ALPHA_BAR[t - 1]
    square = Rule(lambda z, t: affine(z, t) ** 2)
    z_t = [math.sqrt(a) * 0.7 + math.sqrt(1 - a) * eps for eps in (0.5, -0.1)]
    by_hand = sum(affine(z, t - 1) ** 2 for z in z_t) / 2
    assert one_step(square, z0, t=t, noise=noise).item() == pytest.approx(by_hand, abs=1e-5)


# Noise, batches and positions


def test_noise_is_one_seeded_draw_for_all_images():
    noise = fixed_noise(50, 400, seed=1)
    assert (noise.shape, noise.dtype) == ((50, 400), torch.float32)
    torch.manual_seed(7)
    assert torch.equal(noise, fixed_noise(50, 400, seed=1))
    assert not torch.equal(noise, fixed_noise(50, 400, seed=2))
    assert (noise.mean().item(), noise.std().item()) == pytest.approx((0, 1), abs=0.03)


@pytest.fixture(scope="module")
def network():
    """Return an LFDN whose every weight has an effect."""
    model, picks = LFDN(32, width=16, blocks=2), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=picks) / 4)
    return model.eval()


@pytest.mark.parametrize(("sampler", "t", "k"), SAMPLERS)
def test_an_images_reconstruction_depends_on_neither_position_nor_company(network, sampler, t, k):
    """The images are reordered, alone, and in batches of other sizes."""
    z0, noise = easy_features(23)[0], fixed_noise(k, 32)

    def back(x):
        return reconstruct(network, x, sampler, t=t, noise=noise)

    whole, order = back(z0), np.random.RandomState(0).permutation(23)
    assert (whole.shape, whole.dtype) == (z0.shape, np.float32)
    assert np.abs(whole - z0).max() > 0.01
    if sampler is ddim_released:
        np.testing.assert_array_equal(reconstruct(network, z0, noise=noise), whole)  # the default
    np.testing.assert_allclose(back(z0[order]), whole[order], atol=1e-6)
    np.testing.assert_allclose(np.concatenate([back(z0[[i]]) for i in range(23)]), whole, atol=1e-6)
    for size in (1, 7, 16):
        found = diffusion.in_batches(network.into, z0, batch_size=size)
        np.testing.assert_allclose(found, network.into(torch.tensor(z0)).detach(), atol=1e-6)
    other = reconstruct(network, z0, sampler, t=t, noise=fixed_noise(k, 32, seed=1))
    assert np.abs(other - whole).max() > 1e-4


def test_the_native_and_the_matched_view_of_an_image_meet_the_same_noise():
    """A network that returns its input shows the noise; it is the same in every set and row."""
    native, matched = easy_features(9)
    noise, show, a = fixed_noise(1, 32), Rule(lambda z, t: z), ALPHA_BAR[20 - 1]
    for view in (native, matched[::-1]):
        z_t = reconstruct(show, view, one_step, t=20, noise=noise)
        met = (z_t - math.sqrt(a) * view) / math.sqrt(1 - a)
        np.testing.assert_allclose(met, noise.expand(9, -1), atol=1e-4)


@pytest.mark.parametrize(("sampler", "largest"), [(ddim_released, 99), (ddim, 100), (one_step, 100)])
def test_timesteps_out_of_range_and_missing_noise_are_refused(sampler, largest):
    z0, noise = np.ones((2, 16), np.float32), fixed_noise(101, 16)
    assert np.isfinite(reconstruct(SILENT, z0, sampler, t=largest, noise=noise)).all()
    for t in (0, -1, largest + 1):
        with pytest.raises(UserError, match=f"t={t} was given; .* from 1 to {largest}") as error:
            reconstruct(SILENT, z0, sampler, t=t, noise=noise)
        one_sentence(error)
    with pytest.raises(UserError, match=r"^0 draws of noise were given; t=1 needs [12] or more\.$"):
        reconstruct(SILENT, z0, sampler, t=1, noise=noise[:0])
