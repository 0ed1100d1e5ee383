import errno
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import Rule, easy_features, one_sentence
from safetensors.torch import load_file, save_file

from dlsr import training as module
from dlsr.datasets import UserError
from dlsr.diffusion import noise_schedule
from dlsr.training import (
    TrainingSettings,
    _Run,
    checkpoint_file,
    diffusion_loss,
    ema_decay,
    read_checkpoint,
    train,
)

TINY = TrainingSettings(width=8, blocks=1, epochs=4, lr=1e-2, batch_size=8)
Z0 = easy_features(30, channels=(4, 4))[0]


def quiet(settings=TINY, z0=Z0, **options):
    return train(z0, settings, device="cpu", progress=False, **options)


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


# Loss and moving average


def test_the_loss_by_hand():
    """f = z_t + t on two images of two numbers."""
    z0 = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    noise = torch.tensor([[0.2, 0.4], [-0.6, 1.0]])
    t = torch.tensor([0, 99])
    loss = diffusion_loss(Rule(lambda z, t: z + t[:, None]), z0, t, noise).item()
    alpha_bar, errors = noise_schedule().tolist(), []
    for i in range(2):
        for j in range(2):
            a = alpha_bar[int(t[i])]
            z_t = a**0.5 * float(z0[i, j]) + (1 - a) ** 0.5 * float(noise[i, j])
            errors.append((float(z0[i, j]) - z_t - int(t[i])) ** 2)
    assert loss == pytest.approx(sum(errors) / 4, rel=1e-5)


def test_a_network_that_knows_z0_has_no_loss():
    z0 = torch.randn(3, 5)
    assert diffusion_loss(Rule(lambda z, t: z0), z0, torch.tensor([0, 5, 99]), torch.randn(3, 5)) == 0


@pytest.mark.parametrize(
    ("updates", "decay"),
    [(1, 2 / 11), (2, 3 / 12), (90, 91 / 100), (89_989, 89_990 / 89_999), (10**6, 0.9999)],
)
def test_ema_decay(updates, decay):
    assert ema_decay(updates) == pytest.approx(decay, rel=1e-12)


def test_the_moving_average_against_a_twin():
    run = _Run(Z0, TINY, "cpu")
    twin = {name: value.double() for name, value in weights(run.network).items()}
    for n in range(1, 6):
        run.step(run.z0[:8])
        decay = min(0.9999, (1 + n) / (10 + n))
        for name, value in run.network.state_dict().items():
            twin[name] = decay * twin[name] + (1 - decay) * value.double()
    for name, value in run.ema.state_dict().items():
        torch.testing.assert_close(value.double(), twin[name], atol=1e-6, rtol=1e-5)
    assert not same(run.ema, run.network)


def test_a_step_is_adamw_on_the_loss():
    """A twin with torch's plain AdamW, on the same draws."""
    run = _Run(Z0, TINY, "cpu")
    twin = _Run(Z0, TINY, "cpu").network
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=1e-4, foreach=False)
    picks = torch.Generator().manual_seed(TINY.seed)
    for _ in range(3):
        loss = run.step(run.z0[:8])
        t = torch.randint(100, (8,), generator=picks)
        noise = torch.randn((8, 8), generator=picks)
        expected = diffusion_loss(twin, run.z0[:8], t, noise)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_an_epoch_takes_every_image_once(monkeypatch):
    run, seen = _Run(Z0, TINY, "cpu"), []

    def step(z0):
        seen.append(z0)
        return z0.new_tensor(float(len(z0)))

    monkeypatch.setattr(run, "step", step)
    run.epoch()
    assert [len(batch) for batch in seen] == [8, 8, 8, 6]
    rows = torch.cat(seen)
    assert not torch.equal(rows, run.z0)
    assert {tuple(row) for row in rows.tolist()} == {tuple(row) for row in run.z0.tolist()}
    assert run.losses == [pytest.approx((3 * 8 * 8 + 6 * 6) / 30)]  # weighted by the batches' sizes


# What training gives


def test_the_loss_falls():
    z0 = easy_features(300)[0]
    losses = quiet(TrainingSettings(width=32, blocks=2, epochs=12, lr=3e-3, batch_size=64), z0).losses
    assert len(losses) == 12
    assert losses[0] == pytest.approx(1, abs=0.25)  # a silent network leaves z0's own variance
    assert losses[-1] < 0.5 * losses[0]


def test_training_is_repeatable_and_the_seed_matters():
    first, again, other = quiet(), quiet(), quiet(replace(TINY, seed=1))
    assert first.losses == again.losses
    assert same(first.network, again.network)
    assert first.losses != other.losses
    assert not same(first.network, other.network)


def test_the_first_epochs_network_is_the_average_after_one_epoch():
    whole = quiet()
    one = quiet(replace(TINY, epochs=1))
    assert same(whole.first_epoch, one.network)
    assert same(one.first_epoch, one.network)
    assert not same(whole.first_epoch, whole.network)


def test_the_network_is_the_average_and_ready_to_use():
    run = _Run(Z0, TINY, "cpu")
    for _ in range(4):
        run.epoch()
    trained = quiet()
    assert same(trained.network, run.ema)
    assert not trained.network.training
    assert not any(parameter.requires_grad for parameter in trained.network.parameters())
    assert trained.vectors_per_second > 0
    assert trained.settings == TINY


def test_the_global_random_state_is_untouched():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    quiet()
    assert torch.equal(before, torch.get_rng_state())


# Checkpoints


class Killed(Exception):
    pass


def killed_after(monkeypatch, epochs, file, *, every=1):
    """A run that dies while it is in the epoch after so many."""
    whole = _Run.epoch

    def epoch(run):
        if len(run.losses) == epochs:
            run.step(run.z0[:8])
            raise Killed
        whole(run)

    with monkeypatch.context() as patched:
        patched.setattr(_Run, "epoch", epoch)
        with pytest.raises(Killed):
            quiet(checkpoint=file, checkpoint_every=every)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_run_cut_off_goes_on_to_the_identical_result(epochs, tmp_path, monkeypatch):
    file = tmp_path / "new" / "network.safetensors"
    killed_after(monkeypatch, epochs, file)
    counted = []
    whole = _Run.epoch
    monkeypatch.setattr(_Run, "epoch", lambda run: (counted.append(1), whole(run)))
    resumed, expected = quiet(checkpoint=file), quiet()
    assert len(counted) == (4 - epochs) + 4
    assert resumed.losses == expected.losses
    assert same(resumed.network, expected.network)
    assert same(resumed.first_epoch, expected.first_epoch)


def test_a_checkpoint_may_be_rarer_than_an_epoch(tmp_path, monkeypatch):
    file = tmp_path / "network.safetensors"
    killed_after(monkeypatch, 3, file, every=2)
    assert len(read_checkpoint(file)[0]["losses"]) == 2
    assert same(quiet(checkpoint=file).network, quiet().network)


def test_a_finished_checkpoint_is_only_read(tmp_path, monkeypatch):
    file = tmp_path / "network.safetensors"
    first = quiet(checkpoint=file)
    content, changed = file.read_bytes(), file.stat().st_mtime_ns
    monkeypatch.setattr(_Run, "epoch", lambda run: pytest.fail("it trained again"))
    read = quiet(checkpoint=file)
    assert same(read.network, first.network)
    assert same(read.first_epoch, first.first_epoch)
    assert read.losses == first.losses
    assert read.vectors_per_second is None
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (content, changed)
    assert list(tmp_path.glob("*.safetensors")) == [file]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_checkpoint_cut_short_is_refused(share, tmp_path):
    file = tmp_path / "network.safetensors"
    quiet(checkpoint=file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(UserError, match="cut short or damaged") as error:
        quiet(checkpoint=file)
    assert str(file) in one_sentence(error)


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "network.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(module, "CHECKPOINT_VERSION", 99)
        quiet(checkpoint=file)
    with pytest.raises(UserError, match=r"another version \(format 99"):
        quiet(checkpoint=file)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "network.safetensors")
    with pytest.raises(UserError, match="another version"):
        quiet(checkpoint=tmp_path / "network.safetensors")


@pytest.mark.parametrize("change", [{"lr": 2e-2}, {"epochs": 9}, {"seed": 1}, {"width": 10}], ids=str)
def test_a_checkpoint_of_other_settings_is_refused(change, tmp_path):
    file = tmp_path / "network.safetensors"
    quiet(checkpoint=file)
    with pytest.raises(UserError, match="other settings or features"):
        quiet(replace(TINY, **change), checkpoint=file)


def test_a_checkpoint_of_other_features_is_refused(tmp_path):
    file = tmp_path / "network.safetensors"
    quiet(checkpoint=file)
    changed = Z0.copy()
    changed[3, 3] += 1e-6
    with pytest.raises(UserError, match="other settings or features"):
        quiet(z0=changed, checkpoint=file)


def test_a_checkpoint_begun_on_another_device_is_refused_or_resumed(tmp_path, monkeypatch):
    """CUDA's generator has a state of 16 bytes, the CPU's of 5,056."""
    file = tmp_path / "network.safetensors"
    killed_after(monkeypatch, 2, file)
    about = {"dlsr": module.json.dumps(read_checkpoint(file)[0])}
    save_file(load_file(file) | {"draws": torch.zeros(16, dtype=torch.uint8)}, file, about)
    try:
        assert len(quiet(checkpoint=file).losses) == 4
    except UserError as error:
        assert "device" in str(error)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "network.safetensors"
    killed_after(monkeypatch, 2, file)
    content = file.read_bytes()

    def disk_full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "save_file", disk_full)
        with pytest.raises(UserError, match="No space left") as error:
            quiet(checkpoint=file)
    assert "DLSR_CACHE" in one_sentence(error)
    assert file.read_bytes() == content
    assert list(tmp_path.glob("*safetensors")) == [file]
    assert same(quiet(checkpoint=file).network, quiet().network)


def test_the_checkpoints_place_follows_from_settings_and_features(tmp_path):
    file = checkpoint_file(Z0, TINY)
    assert file.parent == tmp_path / "cache" / "networks"
    assert file == checkpoint_file(Z0.copy(), replace(TINY))
    others = {checkpoint_file(Z0, replace(TINY, seed=1)), checkpoint_file(Z0 + 1, TINY)}
    assert len(others | {file}) == 3


def test_a_network_of_other_code_is_not_taken(monkeypatch):
    file, asked = checkpoint_file(Z0, TINY), []
    monkeypatch.setattr(module, "code_hash", lambda *parts: asked.extend(parts) or "changed")
    assert checkpoint_file(Z0, TINY) != file
    assert {"lfdn", "diffusion", "training"} <= set(asked)


# What is refused


def test_fewer_images_than_a_batch_are_refused():
    with pytest.raises(UserError, match=r"30 images .*one batch of 31"):
        quiet(replace(TINY, batch_size=31))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_features_are_refused_with_a_count(bad):
    z0 = Z0.copy()
    z0[[2, 5], 1] = bad
    with pytest.raises(UserError, match="2 of 30"):
        quiet(z0=z0)


def test_features_of_one_image_are_refused():
    with pytest.raises(UserError, match=r"shape \(8,\)"):
        quiet(z0=Z0[0])


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch_size": 0}, {"lr": 0}, {"weight_decay": -1}, {"seed": -1}], ids=str
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        replace(TINY, **wrong)


def test_a_loss_that_blows_up_is_reported(tmp_path):
    file = tmp_path / "network.safetensors"
    with pytest.raises(UserError, match="lower lr") as error:
        quiet(replace(TINY, lr=1e30), checkpoint=file)
    one_sentence(error)
    assert not file.exists()


def test_the_papers_settings_are_the_defaults():
    assert TrainingSettings() == TrainingSettings(1440, 16, 150, 1e-4, 1e-4, 128, 0)
