"""The noise schedule, the forward process, and three samplers that lead from z_t back to z0.

A sampler is a function ``sampler(network, z0, *, t, noise)`` that noises z0 up to timestep t and
returns its reconstruction. ``network(z_t, t)`` predicts z0 and takes 0-based timesteps. ``noise``
has shape (K, c), the same K draws for every image, or (N, K, c), and is always passed in. If every
image meets the same noise, its score does not depend on other images.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from dlsr.errors import UserError

T = 100  # steps of the schedule
BETA_FIRST, BETA_LAST = 0.0015, 0.0195  # the paper does not state beta; the released code has these
Network = Callable[[Tensor, Tensor], Tensor]


@lru_cache
def noise_schedule(device: str | torch.device = "cpu") -> Tensor:
    """Return alpha_bar, (T,) float32: the cumulative product of 1 - beta, beta linear in its root.

    The last value is 0.41: even at t = T, 64 % of the amplitude of z0 is left. Source: released
    code, ``diffusionmodules/util.py``.
    """
    beta = torch.linspace(BETA_FIRST**0.5, BETA_LAST**0.5, T, dtype=torch.float64) ** 2
    return torch.cumprod(1 - beta, dim=0).float().to(device)


def add_noise(z0: Tensor, alpha_bar_t: Tensor, noise: Tensor) -> Tensor:
    """Return z_t = sqrt(alpha_bar_t) z0 + sqrt(1 - alpha_bar_t) noise (the forward process)."""
    return alpha_bar_t.sqrt() * z0 + (1 - alpha_bar_t).sqrt() * noise


def predict_eps(z_t: Tensor, predicted: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Return the noise that z_t contains if ``predicted`` is its z0."""
    return (z_t / alpha_bar_t.sqrt() - predicted) / (1 / alpha_bar_t - 1).sqrt()


def fixed_noise(draws: int, features: int, *, seed: int = 0) -> Tensor:
    """Return one seeded draw of noise, (draws, features) float32, for all images alike."""
    return torch.randn((draws, features), generator=torch.Generator().manual_seed(seed))


def ddim_released(network: Network, z0: Tensor, *, t: int, noise: Tensor) -> Tensor:
    """Reconstruct z0 step for step as the released code does, its index shift included.

    ``noise`` holds t + 1 draws: one to noise z0, then one for each step (eta = 1). Noising and
    network use alpha_bar[t], but the step uses alpha_bar[t - 1] and alpha_bar[t - 2]. So the step
    at t = 1 is the identity, and from t = 1 the network has no influence at all. The code returns
    the last x, not the predicted z0.
    """
    alpha_bar = noise_schedule(z0.device)
    x = add_noise(z0, alpha_bar[t], noise[..., 0, :])
    for draw, step in enumerate(range(t, 0, -1), start=1):
        now, before = alpha_bar[step - 1], alpha_bar[max(step - 2, 0)]
        eps = predict_eps(x, network(x, z0.new_full((len(z0),), step)), alpha_bar[step])
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        sigma = ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
        x = before.sqrt() * x0 + (1 - before - sigma**2).sqrt() * eps + sigma * noise[..., draw, :]
    return x


def ddim(network: Network, z0: Tensor, *, t: int, noise: Tensor, strides: Sequence = ()) -> Tensor:
    """Reconstruct z0 by the paper's equations: noise to t, then DDIM back to 0 in ``strides``.

    ``strides`` sum to t; if empty they are those of `random_strides` with seed 0. ``noise`` holds
    one draw. The paper states no eta; 0 is taken. Here t counts from 1, and alpha_bar_0 = 1.
    """
    alpha_bar = torch.cat([torch.ones(1, device=z0.device), noise_schedule(z0.device)])
    x = add_noise(z0, alpha_bar[t], noise[..., 0, :])
    for stride in strides or random_strides(t, seed=0):
        predicted = network(x, z0.new_full((len(z0),), t - 1))
        eps = predict_eps(x, predicted, alpha_bar[t])
        t -= stride
        x = add_noise(predicted, alpha_bar[t], eps)
    return x


def one_step(network: Network, z0: Tensor, *, t: int, noise: Tensor) -> Tensor:
    """Return the z0 predicted from z_t, averaged over all draws of ``noise``; t counts from 1."""
    alpha_bar_t, times = noise_schedule(z0.device)[t - 1], z0.new_full((len(z0),), t - 1)
    draws = [network(add_noise(z0, alpha_bar_t, eps), times) for eps in noise.unbind(-2)]
    return torch.stack(draws).mean(0)


def random_strides(t: int, *, seed: int) -> list[int]:
    """Return strides from t to 0, each "randomly selected from {1..t}" of what t is then."""
    picks = np.random.RandomState(seed % 2**32)
    strides = []
    while sum(strides) < t:
        strides.append(int(picks.randint(1, t - sum(strides) + 1)))
    return strides


@torch.inference_mode()
def in_batches(network: Module, x: np.ndarray, function=None, batch_size=1024) -> np.ndarray:
    """Return ``function(batch)``, or ``network(batch)`` if it is None, of all rows of x, (N, c).

    It is computed batch after batch, in float32 on the network's device.
    """
    device, function = next(network.parameters()).device, function or network
    batches = torch.from_numpy(np.array(x, dtype=np.float32, order="C")).split(batch_size)
    return torch.cat([function(batch.to(device)).cpu() for batch in batches]).numpy()


def reconstruct(
    network: Module, z0: np.ndarray, sampler: Callable = ddim_released, *, t: int = 3, noise: Tensor
) -> np.ndarray:
    """Reconstruct z0, (N, c), batch by batch on the network's device.

    ``noise`` is (K, c), as `fixed_noise` draws it: K is t + 1 for `ddim_released`, 1 for `ddim`
    and any number for `one_step`. Returns (N, c) float32. Raises `UserError` if draws are missing
    or t is outside of the schedule, past whose end the released code would read at t = T.
    """
    largest, draws = (T - 1, t + 1) if sampler is ddim_released else (T, 1)
    if not 1 <= t <= largest:
        raise UserError(f"t={t} was given; this sampler needs a whole number from 1 to {largest}.")
    if len(noise) < draws:
        raise UserError(f"{len(noise)} draws of noise were given; t={t} needs {draws} or more.")
    return in_batches(network, z0, lambda z: sampler(network, z, t=t, noise=noise.to(z.device)))
