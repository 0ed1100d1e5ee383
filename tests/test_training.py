import signal
from functools import partial

import numpy as np
import pytest
import torch
from dlsr import training as module
from dlsr.cache import cache_folder
from dlsr.diffusion import noise_schedule
from dlsr.errors import UserError
from dlsr.lfdn import LFDN
from dlsr.training import TrainingState, diffusion_loss, ema_decay, run_epoch, streams, train

from conftest import Rule, easy_features, one_sentence, run_python

TINY = {"width": 8, "blocks": 1, "epochs": 12, "lr": 1e-2, "batch_size": 8}
Z0 = easy_features(30, channels=(4, 4))[0]
BUILD = partial(LFDN, 8, width=8, blocks=1)


def quiet(z0=Z0, **changes):
    return train(z0, **TINY | {"device": "cpu", "progress": False} | changes)


def same(one, other):
    weights = other.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())


@pytest.fixture
def losses(monkeypatch):
    """Return the batches that a loss was computed of; number ``losses.stop`` interrupts."""

    class Losses(list):
        stop = -1

    seen, whole = Losses(), module.diffusion_loss

    def listen(network, z0, t, noise):
        if len(seen) == seen.stop:
            raise KeyboardInterrupt
        seen.append(z0)
        return whole(network, z0, t, noise)

    monkeypatch.setattr(module, "diffusion_loss", listen)
    return seen


# Loss, moving average, one step


def test_the_loss_by_hand():
    """f = z_t + t on two images of two numbers."""
    z0 = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    noise = torch.tensor([[0.2, 0.4], [-0.6, 1.0]])
    t = torch.tensor([0, 99])
    loss = diffusion_loss(Rule(lambda z, t: z + t[:, None]), z0, t, noise).item()
    alpha_bar, errors = noise_schedule().tolist(), []
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        a = alpha_bar[int(t[i])]
        z_t = a**0.5 * float(z0[i, j]) + (1 - a) ** 0.5 * float(noise[i, j])
        errors.append((float(z0[i, j]) - z_t - int(t[i])) ** 2)
    assert loss == pytest.approx(sum(errors) / 4, rel=1e-5)
    assert diffusion_loss(Rule(lambda z, t: z0), z0, t, noise) == 0


def noisy_loss(network, z0, draws):
    """Return the loss of training: timesteps are drawn first, then noise."""
    t = torch.randint(100, (len(z0),), generator=draws)
    return diffusion_loss(network, z0, t, torch.randn(z0.shape, generator=draws))


def test_an_epoch_is_adamw_on_the_loss_and_its_moving_average():
    """A twin takes torch's plain AdamW on the same draws, and averages in float64."""
    rates = {"lr": 1e-2, "weight_decay": 1e-4}
    state, twin = (TrainingState(BUILD, 0, "cpu", **rates) for _ in range(2))
    x, batches = torch.from_numpy(Z0), torch.arange(30).split(8)
    run_epoch(state, x, batches, noisy_loss, ema_decay)
    optimizer = torch.optim.AdamW(twin.network.parameters(), **rates, foreach=False)
    averaged = {name: value.double() for name, value in twin.network.state_dict().items()}
    total = 0.0
    for n, rows in enumerate(batches, start=1):
        loss = noisy_loss(twin.network, x[rows], twin.draws[-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(rows) / 30  # weighted by the batches' sizes
        decay = min(0.9999, (1 + n) / (10 + n))
        for name, value in twin.network.state_dict().items():
            averaged[name] = decay * averaged[name] + (1 - decay) * value.double()
    assert state.losses == [pytest.approx(total, rel=1e-4)]
    for name, value in state.network.state_dict().items():
        torch.testing.assert_close(value, twin.network.state_dict()[name], atol=1e-5, rtol=1e-4)
    for name, value in state.last.state_dict().items():
        torch.testing.assert_close(value.double(), averaged[name], atol=1e-5, rtol=1e-4)
    assert same(state.first, state.last)
    run_epoch(state, x, batches, noisy_loss, ema_decay)
    assert not same(state.first, state.last)  # it stays the first epoch's


def test_an_epoch_takes_every_image_once_in_another_order(losses):
    quiet(epochs=2)
    assert [len(batch) for batch in losses] == [8, 8, 8, 6] * 2
    first, second = (torch.cat(losses[i : i + 4]).tolist() for i in (0, 4))
    assert sorted(first) == sorted(second) == sorted(Z0.tolist())
    assert first != second != Z0.tolist() != first


# Seeds


def test_the_seeds_of_the_streams_are_pinned():
    """Another mapping gives other networks from the same seed: it may change once, with seeding."""
    assert streams(0) == [4334430513956379144, 2440950710608614359, 8226343694796210948]
    assert streams(1) == [4215923173971654960, 2021340933837429789, 637987770806161565]


def test_weights_order_and_noise_come_from_separate_streams_of_one_seed():
    weights, order, noise = streams(3)
    state = TrainingState(BUILD, 3, "cpu", lr=1e-2)
    assert [draws.initial_seed() for draws in state.draws] == [order, noise]
    torch.manual_seed(weights)
    assert same(BUILD(), state.network)
    assert len({*streams(0), *streams(1), weights, order, noise}) == 9


def test_training_is_repeatable_and_the_seed_matters(monkeypatch):
    before, first, other = torch.get_rng_state(), quiet(), quiet(seed=1)
    assert same(first.first, quiet(epochs=1).last)
    assert not first.last.training
    assert torch.equal(before, torch.get_rng_state())  # the global state is untouched
    assert first.losses[-1] < 0.9 * first.losses[0] != 0.9 * other.losses[0]
    check_fresh(first, monkeypatch)


# The cache


def test_a_finished_network_is_only_read_and_a_damaged_one_is_refused_by_name(losses):
    first, trained = quiet(), len(losses)
    again = quiet(Z0.copy(), device="cpu")
    assert len(losses) == trained == 12 * 4
    assert same(first.last, again.last)
    assert same(first.first, again.first)
    assert (first.losses, first.seconds) == (again.losses, again.seconds)
    (file,) = (cache_folder() / "networks").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="damaged") as error:
        quiet()
    assert str(file) in one_sentence(error)


def test_networks_are_kept_by_settings_and_content(losses):
    changes = {"lr": 2e-2, "epochs": 3, "seed": 1, "width": 10, "weight_decay": 0, "z0": Z0 + 1e-6}
    for name, value in changes.items():
        quiet(epochs=2)
        losses.clear()
        quiet(**{"epochs": 2, name: value})
        assert losses, name


def check_fresh(resumed, monkeypatch):
    monkeypatch.setenv("DLSR_CACHE", "fresh")
    whole = quiet()
    assert resumed.losses == whole.losses
    assert same(resumed.first, whole.first)
    assert same(resumed.last, whole.last)


@pytest.mark.parametrize("epochs", [0, 4, 5, 11])
def test_an_interrupted_training_goes_on_to_the_identical_networks(epochs, losses, monkeypatch):
    losses.stop = 4 * epochs + 2
    with pytest.raises(KeyboardInterrupt):
        quiet()
    losses.stop = -1
    losses.clear()
    resumed = quiet()
    assert len(losses) == 4 * (12 - epochs // 5 * 5)
    check_fresh(resumed, monkeypatch)


KILLED = """
import os, signal
from test_training import module, quiet

whole, calls = module.diffusion_loss, []

def deadly(*arguments):
    calls.append(1)
    if len(calls) == 4 * 7 + 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*arguments)

module.diffusion_loss = deadly
quiet()
"""


def test_a_killed_training_goes_on_to_the_identical_networks(tmp_path, losses, monkeypatch):
    """The process was killed in the eighth epoch, without a chance to tidy up."""
    assert run_python(KILLED, tmp_path) == -signal.SIGKILL
    resumed = quiet()
    assert len(losses) == 4 * 7
    check_fresh(resumed, monkeypatch)


# What is refused


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_size": 31}, r"\(30, 8\).*: 31.*at least a batch"),
        ({"z0": np.vstack([Z0, np.full((2, 8), np.nan)])}, "2 of 32"),
        ({"z0": Z0[0]}, r"shape \(8,\)"),
        *(({name: 0}, f"'{name}': 0") for name in ("epochs", "batch_size", "lr")),
        *(({name: -1}, f"'{name}': -1") for name in ("weight_decay", "seed")),
        ({"width": 7}, "even width"),
        ({"lr": 1e30}, "lower lr"),
        ({"device": "gpu"}, "device='gpu'"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_in_one_sentence(changes, told):
    with pytest.raises(UserError, match=told) as error:
        quiet(**changes)
    one_sentence(error)
    assert not list((cache_folder() / "networks").glob("*.safetensors"))
