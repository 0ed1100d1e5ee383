"""Training on unlabelled vectors, with exact resume; LR needs two networks, so both are kept.

Source: section 3.2 and appendix of the paper; the moving average is the released code's
``ema.py``.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dlsr.backends import check_precision
from dlsr.cache import array_sha256, cache_folder, key, locked, read_tensors, write_tensors
from dlsr.diffusion import T, add_noise, noise_schedule
from dlsr.errors import UserError
from dlsr.features import check_finite, pick_device
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
    losses: list[float]
    seconds: float


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
    precision: str = "", device: str | None = None, progress: bool = True,
) -> Networks:  # fmt: skip
    """Minimise a loss over x, (N, c), by AdamW, or read the networks that were trained so before.

    ``build()`` makes the network, which ``name`` and ``size`` tell from others. ``decay`` is that
    of the moving average at each update; 0 keeps the network itself. ``seed`` fixes initial
    weights, batch order and noise. The state is kept in the cache every five epochs; a run that
    was cut off goes on from there, on a CPU with the identical result. The loss is computed in
    ``precision``, by default that of `precision_of`. Raises `UserError` for settings that make no
    sense, NaN in x, too few vectors, or a loss that is not finite.
    """
    x, device = np.ascontiguousarray(x, dtype=np.float32), pick_device(device)
    settings = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
    settings |= {"lr": lr, "weight_decay": weight_decay}
    _check(x, settings)
    made_of = {"name": name, "size": dict(size), "x": array_sha256(x), "version": VERSION}
    made_on = {"device": torch.device(device).type, "precision": precision or precision_of(device)}
    check_precision(made_on["precision"], torch.device(device))
    file = cache_folder() / "networks" / f"{key(**settings, **made_of, **made_on)}.safetensors"
    with locked(file):
        if not file.is_file():
            how = (build, loss, decay, made_on["precision"], device, name if progress else "")
            _train_to(file, x, *how, **settings)
    about, tensors = read_tensors(file)
    with torch.random.fork_rng(devices=[]):  # the initial weights are replaced
        networks = nn.ModuleDict({"last": build(), "first": build()})
    networks.load_state_dict(tensors)
    networks.to(device).eval().requires_grad_(False)
    return Networks(**networks, losses=about["losses"], seconds=about["seconds"])


def precision_of(device: str | torch.device) -> str:
    """Return the precision in which a loss is computed on a device: on CUDA it is bfloat16."""
    return "bf16" if torch.device(device).type == "cuda" else "float32"


def streams(seed: int) -> list[int]:
    """Return independent seeds of initial weights, batch order and noise (``seeding`` v1)."""
    children = np.random.SeedSequence(seed).spawn(3)
    return [int(child.generate_state(1, np.uint64)[0] >> 1) for child in children]


class TrainingState(nn.Module):
    """Everything that changes in training, so that it can be written and read back whole."""

    def __init__(self, build: Callable, seed: int, device: str, **rates: float) -> None:
        super().__init__()
        weights, *others = streams(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(weights)
            self.network = build().to(device)
        self.last, self.first = (deepcopy(self.network).requires_grad_(False) for _ in range(2))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), **rates, fused=True)
        self.draws = [torch.Generator(device).manual_seed(other) for other in others]
        self.updates, self.losses, self.seconds = 0, [], 0.0

    def write(self, file: Path, *, finished: bool) -> None:
        """Write the state into a file; of a finished training only what is returned."""
        tensors = self.last.state_dict(prefix="last.") | self.first.state_dict(prefix="first.")
        if not finished:
            tensors |= self.network.state_dict(prefix="network.")
            tensors |= {f"draws.{i}": draws.get_state() for i, draws in enumerate(self.draws)}
            for i, moments in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
        names = ("updates", "losses", "seconds")
        write_tensors(file, tensors, {name: getattr(self, name) for name in names})

    def read(self, file: Path) -> None:
        """Become the state that was written into a file."""
        about, tensors = read_tensors(file)
        vars(self).update(about)
        for i, draws in enumerate(self.draws):
            draws.set_state(tensors.pop(f"draws.{i}"))
        content, names = self.optimizer.state_dict(), ("step", "exp_avg", "exp_avg_sq")
        for i in content["param_groups"][0]["params"]:
            content["state"][i] = {name: tensors.pop(f"optimizer.{i}.{name}") for name in names}
        self.optimizer.load_state_dict(content)
        self.load_state_dict(tensors)


def run_epoch(
    state: TrainingState, x: Tensor, batches: Iterable[Tensor], loss: Loss, decay: Callable,
    precision: str = "float32",
) -> None:  # fmt: skip
    """Take one step for each batch of rows of x, all rows once, and note the epoch's mean loss.

    After the first epoch, ``state.last`` is copied to ``state.first``. Raises `UserError` if the
    loss is not finite.
    """
    total, autocast = torch.zeros((), device=x.device), precision == "bf16"
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
    state.losses.append(total.item() / len(x))
    if not np.isfinite(state.losses[-1]):
        raise UserError(f"The loss became {state.losses[-1]} in training; lower lr.")
    if len(state.losses) == 1:
        state.first.load_state_dict(state.last.state_dict())


def _train_to(
    file, x, build, loss, decay, precision, device, title, *, epochs, batch_size, seed, **rates
) -> None:
    """Train from the start or from the checkpoint beside ``file``; write the finished networks."""
    state, x = TrainingState(build, seed, device, **rates), torch.tensor(x, device=device)
    checkpoint = file.with_suffix(".partial")
    if checkpoint.is_file():
        state.read(checkpoint)
    todo = range(len(state.losses) + 1, epochs + 1)
    for epoch in tqdm(todo, unit="epoch", desc=title, disable=not title):
        began = time.perf_counter()
        order = torch.randperm(len(x), generator=state.draws[0], device=x.device)
        batches = order.split(batch_size)  # the smaller last one too
        run_epoch(state, x, batches, loss, decay, precision)
        state.seconds += time.perf_counter() - began
        if epoch % CHECKPOINT_EVERY == 0:
            state.write(checkpoint, finished=False)
    state.write(file, finished=True)
    checkpoint.unlink(missing_ok=True)


def _check(x: np.ndarray, settings: Mapping[str, float]) -> None:
    positive = min(settings[name] for name in ("epochs", "batch_size", "lr")) > 0
    least = settings["batch_size"] if positive and x.ndim == 2 else np.inf
    if len(x) < least or min(settings["weight_decay"], settings["seed"]) < 0:
        raise UserError(
            f"Vectors of shape {x.shape} and {settings} were given; training needs (images, "
            "features), at least a batch, and settings above 0, or weight_decay and seed of 0."
        )
    check_finite(x)
