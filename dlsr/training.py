"""Training on unlabelled vectors, with exact resume; LR needs two networks, so both are kept.

Source: section 3.2 and appendix of the paper; the moving average is the released code's
``ema.py``.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dlsr.cache import array_sha256, cache_folder, key, locked, read_tensors, write_tensors
from dlsr.diffusion import T, add_noise, noise_schedule
from dlsr.errors import UserError
from dlsr.features import check_finite, device_kind, pick_device
from dlsr.lfdn import LFDN

VERSION = 1  # raise it when the same settings give other networks
CHECKPOINT_EVERY = 5  # epochs
Loss = Callable[[nn.Module, Tensor, torch.Generator], Tensor]  # of a network, a batch and draws


@dataclass
class Networks:
    """What training returns.

    ``last`` and ``first`` are the networks after the last and after the first epoch, of an LFDN
    their moving averages (EMA); ``losses`` is the mean training loss of each epoch; ``seconds`` is
    what the training took when it was done, also where the networks come from the cache.
    """

    last: nn.Module
    first: nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    device: str = "cpu"


def train(z0: np.ndarray, *, width: int = 1440, blocks: int = 16, **options: object) -> Networks:
    """Train an LFDN on z0, (N, c) float32, or read the one that was trained so before.

    ``options`` are those of `fit_network`; the defaults of both are the paper's.
    """
    size = {"width": width, "blocks": blocks}
    build = partial(LFDN, z0.shape[-1], **size)
    return fit_network(z0, build, _noisy_loss, name="LFDN", size=size, decay=ema_decay, **options)


def ema_decay(updates: int) -> float:
    """Return min(0.9999, (1 + n) / (10 + n)) for the n-th update, counted from 1."""
    return min(0.9999, (1 + updates) / (10 + updates))


def diffusion_loss(network: nn.Module, z0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return the mean over images and dimensions of (z0 - LFDN(z_t, t))^2; t is in 0..T-1."""
    z_t = add_noise(z0, noise_schedule(z0.device)[t][:, None], noise)
    return ((z0 - network(z_t, t)) ** 2).mean()


def _noisy_loss(network: nn.Module, z0: Tensor, draws: torch.Generator) -> Tensor:
    t = torch.randint(T, (len(z0),), generator=draws, device=z0.device)
    noise = torch.randn(z0.shape, generator=draws, device=z0.device)
    return diffusion_loss(network, z0, t, noise)


def fit_network(
    x: np.ndarray, build: Callable[[], nn.Module], loss: Loss, *, name: str, size: Mapping,
    epochs: int = 150, lr: float = 1e-4, weight_decay: float = 1e-4, batch_size: int = 128,
    seed: int = 0, decay: Callable[[int], float] = lambda updates: 0.0,
    device: str | None = None, progress: bool = True,
) -> Networks:  # fmt: skip
    """Minimise a loss over x, (N, c), by AdamW, or read the networks that were trained so before.

    ``build()`` makes the network, which ``name`` and ``size`` tell from others. ``decay`` is that
    of the moving average at each update; 0 keeps the network itself. ``seed`` fixes initial
    weights, batch order and noise. The state is kept in the cache every five epochs; a run that
    was cut off goes on from there, on a CPU with the identical result. On CUDA the loss is
    computed in bfloat16. Raises `UserError` for settings that make no sense, NaN in x, too few
    vectors, or a loss that is not finite.
    """
    x, device = np.ascontiguousarray(x, dtype=np.float32), pick_device(device)
    rates = {"lr": lr, "weight_decay": weight_decay}
    settings = {"epochs": epochs, "batch_size": batch_size, "seed": seed} | rates
    _check(x, settings)
    settings |= {"name": name, "size": dict(size), "x": array_sha256(x), "version": VERSION}
    settings |= {"device": device_kind(device), "precision": precision_of(device)}
    file = cache_folder() / "networks" / f"{key(**settings)}.safetensors"
    with locked(file):
        if not file.is_file():
            state = new_state(build, seed, device, **rates)
            _train_to(file, state, x, loss, decay, epochs, batch_size, name if progress else "")
    about, tensors = read_tensors(file)
    with torch.random.fork_rng(devices=[]):  # the initial weights are replaced
        networks = [build() for _ in range(2)]
    for network, part in zip(networks, ("last", "first"), strict=True):
        network.load_state_dict(weights_of(part, tensors))
        network.to(device).eval().requires_grad_(False)
    return Networks(*networks, about["losses"], about["seconds"], device)


def precision_of(device: str) -> str:
    """Return the precision in which a loss is computed on a device."""
    return "bf16" if device_kind(device) == "cuda" else "float32"


def streams(seed: int) -> list[int]:
    """Return independent seeds of initial weights, batch order and noise (``seeding`` v1)."""
    children = np.random.SeedSequence(seed).spawn(3)
    return [int(child.generate_state(1, np.uint64)[0] >> 1) for child in children]


@dataclass
class TrainingState(Networks):
    """Everything that changes in training, so that it can be written and read back whole."""

    network: nn.Module = None
    optimizer: torch.optim.Optimizer = None
    draws: tuple[torch.Generator, ...] = ()  # of batch order and of noise
    updates: int = 0


def new_state(build: Callable, seed: int, device: str, **rates: float) -> TrainingState:
    """Return the state before the first epoch."""
    weights, *others = streams(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(weights)
        network = build().to(device)
    last, first = (deepcopy(network).requires_grad_(False) for _ in range(2))
    optimizer = torch.optim.AdamW(network.parameters(), **rates, fused=True)
    draws = tuple(torch.Generator(device).manual_seed(other) for other in others)
    parts = {"network": network, "optimizer": optimizer, "draws": draws}
    return TrainingState(last, first, device=device, **parts)


def run_epoch(
    state: TrainingState, x: Tensor, batches: Iterable[Tensor], loss: Loss, decay: Callable,
) -> None:  # fmt: skip
    """Take one step for each batch of rows of x, and note the epoch's mean loss.

    After the first epoch, ``state.last`` is copied to ``state.first``. Raises `UserError` if the
    loss is not finite.
    """
    total, seen = torch.zeros((), device=x.device), 0
    autocast = precision_of(state.device) == "bf16"
    for rows in batches:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            value = loss(state.network, x[rows], state.draws[-1])
        state.optimizer.zero_grad()
        value.backward()
        state.optimizer.step()
        state.updates += 1
        with torch.no_grad():
            averaged, current = list(state.last.parameters()), list(state.network.parameters())
            torch._foreach_lerp_(averaged, current, 1 - decay(state.updates))
        total += value.detach() * len(rows)
        seen += len(rows)
    state.losses.append(total.item() / seen)
    if not math.isfinite(state.losses[-1]):
        raise UserError(f"The loss became {state.losses[-1]} in training; lower lr.")
    if len(state.losses) == 1:
        state.first.load_state_dict(state.last.state_dict())


def _train_to(file, state, x, loss, decay, epochs, batch_size, title) -> None:
    """Train from the start or from the checkpoint beside ``file``; write the finished networks."""
    checkpoint, x = file.with_suffix(".partial"), torch.tensor(x, device=state.device)
    if checkpoint.is_file():
        _restore(checkpoint, state)
    todo = range(len(state.losses) + 1, epochs + 1)
    for epoch in tqdm(todo, unit="epoch", desc=title, disable=not title):
        began = time.perf_counter()
        order = torch.randperm(len(x), generator=state.draws[0], device=x.device)
        run_epoch(state, x, order.split(batch_size), loss, decay)  # the smaller last batch too
        state.seconds += time.perf_counter() - began
        about = {name: getattr(state, name) for name in ("updates", "losses", "seconds")}
        finished = {name: getattr(state, name).state_dict() for name in ("last", "first")}
        if epoch == epochs:
            write_tensors(file, flattened(finished), about)
        elif epoch % CHECKPOINT_EVERY == 0:
            moments = state.optimizer.state_dict()["state"]
            resumable = {f"optimizer.{i}": values for i, values in moments.items()}
            resumable["draws"] = {str(i): g.get_state() for i, g in enumerate(state.draws)}
            resumable |= finished | {"network": state.network.state_dict()}
            write_tensors(checkpoint, flattened(resumable), about)
    checkpoint.unlink(missing_ok=True)


def _restore(checkpoint: Path, state: TrainingState) -> None:
    """Bring a new state to where the checkpoint was written."""
    about, tensors = read_tensors(checkpoint)
    vars(state).update(about)
    for name in ("network", "last", "first"):
        getattr(state, name).load_state_dict(weights_of(name, tensors))
    for i, draws in enumerate(state.draws):
        draws.set_state(tensors[f"draws.{i}"])
    groups = state.optimizer.state_dict()["param_groups"]
    moments = {i: weights_of(f"optimizer.{i}", tensors) for i in groups[0]["params"]}
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def flattened(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of several networks in one dict, under the network's name and a dot."""
    return {f"{name}.{k}": v for name, tensors in parts.items() for k, v in tensors.items()}


def weights_of(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return one network's tensors out of what `flattened` returned."""
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _check(x: np.ndarray, settings: Mapping[str, float]) -> None:
    if x.ndim != 2 or len(x) < settings["batch_size"]:
        raise UserError(
            f"Vectors of shape {x.shape} were given; training needs (images, features) and at "
            f"least a batch of {settings['batch_size']}: give more or a smaller batch_size."
        )
    check_finite(x)
    positive = min(settings[name] for name in ("epochs", "batch_size", "lr")) > 0
    if not positive or min(settings["weight_decay"], settings["seed"]) < 0:
        raise UserError(f"{settings} was given; weight_decay and seed may be 0, the others not.")
