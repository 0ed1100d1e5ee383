"""Noise schedule, noising, and the three ways back from z_t to a reconstruction of z0.

Everything is float32 and takes its noise as an argument, so that each step can be checked by hand.
``network(z_t, t)`` predicts z0 and takes 0-based timesteps, as it was trained.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from dlsr.datasets import UserError

T = 100  # steps of the schedule
BETA_FIRST, BETA_LAST = 0.0015, 0.0195  # not in the paper; from the released code
Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def noise_schedule() -> torch.Tensor:
    """alpha_bar, (T,) float32, 0-based: cumulative product of 1 - beta, beta linear in its root.

    The last value is 0.41: even at t = T, 64 % of the amplitude is left. Source: released code,
    ``diffusionmodules/util.py``; the paper does not state beta.
    """
    beta = torch.linspace(BETA_FIRST**0.5, BETA_LAST**0.5, T, dtype=torch.float64) ** 2
    return torch.cumprod(1 - beta, dim=0).float()


def add_noise(z0: torch.Tensor, alpha_bar_t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """z_t = sqrt(alpha_bar_t) z0 + sqrt(1 - alpha_bar_t) noise (the forward process)."""
    return alpha_bar_t.sqrt() * z0 + (1 - alpha_bar_t).sqrt() * noise


def implied_noise(z_t: torch.Tensor, predicted: torch.Tensor, alpha_bar_t: torch.Tensor) -> torch.Tensor:
    """The noise that z_t holds if ``predicted`` is its z0."""
    return (z_t / alpha_bar_t.sqrt() - predicted) / (1 / alpha_bar_t - 1).sqrt()


def released(network: Network, z0: torch.Tensor, *, n: int, noise: torch.Tensor) -> torch.Tensor:
    """Step for step what the released code does, its index shift included (``ddim.py``).

    ``noise`` is (N, n + 1, c): the noising, then one draw a step (eta = 1). Noising and the network
    use ``alpha_bar[t]``, the step uses ``alpha_bar[t - 1]`` and ``alpha_bar[t - 2]``; hence the step
    at t = 1 is the identity, and at n = 1 the network has no influence. Returns the last x, not
    the predicted z0.
    """
    alpha_bar = noise_schedule().to(z0.device)
    x = add_noise(z0, alpha_bar[n], noise[:, 0])
    for step, t in enumerate(range(n, 0, -1), start=1):
        i = t - 1
        now, before = alpha_bar[i], alpha_bar[max(i - 1, 0)]
        e = implied_noise(x, network(x, _times(z0, t)), alpha_bar[t])
        x0 = (x - (1 - now).sqrt() * e) / now.sqrt()
        sigma = ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
        x = before.sqrt() * x0 + (1 - before - sigma**2).sqrt() * e + sigma * noise[:, step]
    return x


def released_shares(n: int) -> tuple[float, float]:
    """How much of z0 itself, and noise of which std, `released` returns from n, whatever the network.

    The rest, 1 minus the first share, is the network's answers. At n = 3: 0.41 and 0.0473.
    """
    with torch.inference_mode():
        share = released(_silent_network, torch.ones(1, 1), n=n, noise=torch.zeros(1, n + 1, 1))
        noise = torch.eye(n + 1)[:, :, None]
        responses = released(_silent_network, torch.zeros(n + 1, 1), n=n, noise=noise)
    return share.item(), responses.square().sum().sqrt().item()


def paper(network: Network, z0: torch.Tensor, *, strides: Sequence[int], noise: torch.Tensor) -> torch.Tensor:
    """The equations as printed: noise to t, then DDIM back to 0 in the given strides.

    ``strides`` sum to t (see `random_strides`); ``noise`` is (N, 1, c). The paper gives no eta:
    0 is taken. t is 1-based, alpha_bar_0 = 1.
    """
    alpha_bar = torch.cat([torch.ones(1), noise_schedule()]).to(z0.device)
    t = sum(strides)
    x = add_noise(z0, alpha_bar[t], noise[:, 0])
    for stride in strides:
        predicted = network(x, _times(z0, t - 1))
        e = implied_noise(x, predicted, alpha_bar[t])
        t -= stride
        x = add_noise(predicted, alpha_bar[t], e)
    return x


def one_step(network: Network, z0: torch.Tensor, *, t: int, noise: torch.Tensor) -> torch.Tensor:
    """The z0 predicted from z_t, averaged over the K draws of ``noise`` (N, K, c); t is 1-based."""
    alpha_bar = noise_schedule().to(z0.device)
    times = _times(z0, t - 1)
    draws = [network(add_noise(z0, alpha_bar[t - 1], eps), times) for eps in noise.unbind(1)]
    return torch.stack(draws).mean(0)


def random_strides(t: int, *, seed: int) -> list[int]:
    """Strides from t to 0, each "randomly selected from {1..t}" with t the step then reached."""
    picks = np.random.RandomState(seed % 2**32)
    strides = []
    while t > 0:
        strides.append(int(picks.randint(1, t + 1)))
        t -= strides[-1]
    return strides


@dataclass(frozen=True)
class Reconstruction:
    """How to reconstruct: ``mode``, the timestep ``t`` (the released code's n), draws of noise.

    ``noise_draws`` is K of `one_step`; the other modes take one path an image.
    """

    mode: str = "released"
    t: int = 3
    noise_draws: int = 1

    def __post_init__(self) -> None:
        if self.mode not in LARGEST_T:
            raise UserError(f"Reconstruction {self.mode!r} is unknown; choose one of {', '.join(LARGEST_T)}.")
        if not isinstance(self.t, int) or not 1 <= self.t <= LARGEST_T[self.mode]:
            raise UserError(
                f"t={self.t!r} was given; {self.mode} takes a whole number in 1..{LARGEST_T[self.mode]}."
            )
        if self.noise_draws < 1 or (self.noise_draws > 1 and self.mode != "one_step"):
            raise UserError(
                f"noise_draws={self.noise_draws} was given; it is at least 1, "
                "and more than 1 only in one_step."
            )

    @property
    def columns(self) -> dict[str, str | int]:
        """The settings by their names in the results."""
        return {"reconstruction": self.mode, "t": self.t, "noise_draws": self.noise_draws}

    @property
    def noises(self) -> int:
        """Draws of noise an image needs."""
        return {"released": self.t + 1, "paper": 1, "one_step": self.noise_draws}[self.mode]


LARGEST_T = {"released": T - 1, "paper": T, "one_step": T}  # n = 100 reads past the schedule's end


@torch.inference_mode()
def reconstruct(
    network: torch.nn.Module,
    z0: np.ndarray,
    how: Reconstruction | None = None,
    *,
    seed: int = 0,
    stride_seed: int = 0,
    batch_size: int = 1024,
    progress: bool = False,
) -> np.ndarray:
    """(N, c) reconstructions of z0, float32, on the network's device.

    ``seed`` fixes the noise, drawn on the CPU image by image, so that it is the same on every
    device; ``stride_seed`` the strides of `paper`, which all that is compared should share.
    """
    how = how or Reconstruction()
    device = next(network.parameters()).device
    draws = torch.Generator().manual_seed(seed)
    strides = random_strides(how.t, seed=stride_seed)
    parts = []
    for start in tqdm(range(0, len(z0), batch_size), desc=f"{how.mode}, t = {how.t}", disable=not progress):
        batch = torch.from_numpy(np.ascontiguousarray(z0[start : start + batch_size], dtype=np.float32))
        noise = _noise(len(batch), how.noises, batch.shape[1], draws).to(device)
        z = batch.to(device)
        if how.mode == "released":
            z = released(network, z, n=how.t, noise=noise)
        elif how.mode == "paper":
            z = paper(network, z, strides=strides, noise=noise)
        else:
            z = one_step(network, z, t=how.t, noise=noise)
        parts.append(z.cpu().numpy())
    return np.concatenate(parts) if parts else np.empty_like(z0)


def _noise(images: int, draws: int, features: int, generator: torch.Generator) -> torch.Tensor:
    """(images, draws, features), an image's own whatever the batch: torch fills blocks of 16."""
    numbers = draws * features
    blocks = torch.randn((images, -(-numbers // 16) * 16), generator=generator)
    return blocks[:, :numbers].reshape(images, draws, features)


def _silent_network(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(z_t)


def _times(z: torch.Tensor, t: int) -> torch.Tensor:
    return torch.full((len(z),), t, device=z.device)
