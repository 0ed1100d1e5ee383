"""Training the LFDN on unlabelled z0: checkpoints, exact resume, and both networks that LR needs."""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from dlsr.datasets import UserError, cache_folder
from dlsr.diffusion import T, add_noise, noise_schedule
from dlsr.features import check_finite, code_hash, pick_device, replace_file
from dlsr.lfdn import LFDN

CHECKPOINT_VERSION = 1
EMA_DECAY = 0.9999
CODE = ("lfdn", "diffusion", "training")  # what a trained network depends on, beside its data


@dataclass(frozen=True)
class TrainingSettings:
    """The paper's hyper-parameters as defaults. ``seed`` fixes weights, order, timesteps and noise."""

    width: int = 1440
    blocks: int = 16
    epochs: int = 150
    lr: float = 1e-4
    weight_decay: float = 1e-4
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or self.lr <= 0 or self.weight_decay < 0 or self.seed < 0:
            raise UserError(
                "Training needs epochs and batch_size of at least 1, lr above 0, weight_decay and seed "
                f"of at least 0; it was given {self}."
            )


@dataclass
class Trained:
    """EMA networks after the last and after the first epoch, and how the loss fell.

    ``losses`` is the mean training loss of every epoch; ``vectors_per_second`` counts feature
    vectors through training, and is None where all came from a checkpoint.
    """

    network: LFDN
    first_epoch: LFDN
    losses: list[float]
    settings: TrainingSettings | None
    vectors_per_second: float | None = None
    device: str = "cpu"


def ema_decay(updates: int) -> float:
    """min(0.9999, (1 + n) / (10 + n)) for the n-th update, counted from 1 (released ``ema.py``)."""
    return min(EMA_DECAY, (1 + updates) / (10 + updates))


def diffusion_loss(
    network: nn.Module, z0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Mean over dimensions of (z0 - LFDN(z_t, t))^2, with t 0-based in 0..T-1."""
    alpha_bar = noise_schedule().to(z0.device)[t][:, None]
    return ((z0 - network(add_noise(z0, alpha_bar, noise), t)) ** 2).mean()


def checkpoint_file(z0: np.ndarray, settings: TrainingSettings) -> Path:
    """Where the cache keeps the network of these features, settings and code: none is trained twice."""
    digest = hashlib.sha256(as_json(asdict(settings)).encode())
    digest.update(_sha256(z0).encode())
    digest.update(code_hash(*CODE).encode())
    return cache_folder() / "networks" / f"{digest.hexdigest()[:20]}.safetensors"


def train(
    z0: np.ndarray,
    settings: TrainingSettings | None = None,
    *,
    checkpoint: Path | None = None,
    checkpoint_every: int = 5,
    device: str | None = None,
    progress: bool = True,
) -> Trained:
    """Train an LFDN on (N, c) float32 vectors.

    With ``checkpoint``, the state is written there every ``checkpoint_every`` epochs and a run that
    was cut off goes on from it, on a CPU with the identical result; a finished one is only read.
    The last, smaller batch of an epoch is used too. On CUDA the forward pass runs in bfloat16.
    """
    settings = settings or TrainingSettings()
    z0 = _checked(z0, settings)
    device = pick_device(device)
    run = _Run(z0, settings, device)
    if checkpoint is not None and checkpoint.is_file():
        run.restore(checkpoint)
    todo = range(len(run.losses), settings.epochs)
    began = time.perf_counter()
    with tqdm(
        total=settings.epochs, initial=todo.start, unit="epoch", desc="LFDN", disable=not progress
    ) as bar:
        for epoch in todo:
            run.epoch()
            bar.update()
            bar.set_postfix(loss=f"{run.losses[-1]:.4f}")
            last = epoch + 1 == settings.epochs
            if checkpoint is not None and (last or (epoch + 1) % checkpoint_every == 0):
                run.save(checkpoint, finished=last)
    seconds = time.perf_counter() - began
    return Trained(
        run.ema.eval(),
        run.first.eval(),
        run.losses,
        settings,
        len(todo) * len(z0) / seconds if len(todo) else None,
        device,
    )


class _Run:
    """All that changes while training, so that it can be written and read back whole."""

    def __init__(self, z0: np.ndarray, settings: TrainingSettings, device: str) -> None:
        self.settings, self.device = settings, device
        self.data_sha256 = _sha256(z0)
        self.z0 = torch.from_numpy(z0).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.network, self.ema, self.first = (
                LFDN(z0.shape[1], width=settings.width, blocks=settings.blocks) for _ in range(3)
            )
        self.ema.load_state_dict(self.network.state_dict())
        for network in (self.network, self.ema, self.first):
            network.to(device)
        for network in (self.ema, self.first):
            network.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.draws = torch.Generator(device).manual_seed(settings.seed)
        self.updates = 0
        self.losses: list[float] = []

    def epoch(self) -> None:
        order = torch.randperm(len(self.z0), generator=self.draws, device=self.device)
        total = torch.zeros((), device=self.device)
        for rows in order.split(self.settings.batch_size):
            total += self.step(self.z0[rows]) * len(rows)
        self.losses.append(total.item() / len(order))
        if not math.isfinite(self.losses[-1]):
            raise UserError(
                f"The training loss became {self.losses[-1]} in epoch {len(self.losses)}; lower lr "
                f"(it is {self.settings.lr})."
            )
        if len(self.losses) == 1:
            self.first.load_state_dict(self.ema.state_dict())

    def step(self, z0: torch.Tensor) -> torch.Tensor:
        t = torch.randint(T, (len(z0),), generator=self.draws, device=self.device)
        noise = torch.randn(z0.shape, generator=self.draws, device=self.device)
        autocast = torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()
        with autocast:
            loss = diffusion_loss(self.network, z0, t, noise)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.updates += 1
        with torch.no_grad():
            weight = 1 - ema_decay(self.updates)
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.network.parameters()), weight)
        return loss.detach()

    def save(self, file: Path, *, finished: bool) -> None:
        tensors = flattened({"ema": self.ema, "first": self.first})
        if not finished:
            tensors |= flattened({"network": self.network})
            tensors["draws"] = self.draws.get_state()
            for i, state in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
        about = {
            "version": CHECKPOINT_VERSION,
            "settings": asdict(self.settings),
            "data_sha256": self.data_sha256,
            "updates": self.updates,
            "losses": self.losses,
        }
        replace_file(file, lambda path: save_file(tensors, path, {"dlsr": as_json(about)}))

    def restore(self, file: Path) -> None:
        about, tensors = read_checkpoint(file)
        if about["settings"] != asdict(self.settings) or about["data_sha256"] != self.data_sha256:
            raise UserError(
                f"The checkpoint {file} is of other settings or features ({about['settings']}, "
                f"now {asdict(self.settings)}). Name another file or delete it."
            )
        self.updates, self.losses = about["updates"], about["losses"]
        for name in ("network", "ema", "first"):
            if weights := weights_of(name, tensors):
                getattr(self, name).load_state_dict(weights)
        if "draws" in tensors:
            try:
                self.draws.set_state(tensors["draws"])
            except RuntimeError as error:
                raise UserError(
                    f"The checkpoint {file} was begun on another device than {self.device}; go on there, "
                    "or delete it to train from the start."
                ) from error
            state: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith("optimizer."):
                    _, i, name = key.split(".")
                    state.setdefault(int(i), {})[name] = value
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def flattened(networks: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The weights of several networks in one dict, each under its name and a dot."""
    return {f"{name}.{k}": v for name, network in networks.items() for k, v in network.state_dict().items()}


def weights_of(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One network's weights out of what `flattened` gave."""
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def as_json(content: dict) -> str:
    """JSON, with numpy's numbers as numbers."""
    return json.dumps(content, indent=1, default=lambda number: number.item())


def read_checkpoint(file: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """What a checkpoint says of itself, and its tensors; `UserError` where it is damaged or foreign."""
    try:
        with safe_open(file, "pt") as content:
            about = json.loads((content.metadata() or {}).get("dlsr", "{}"))
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"The checkpoint {file} is cut short or damaged ({error}). Delete it to train from the start."
        ) from error
    if about.get("version") != CHECKPOINT_VERSION:
        raise UserError(
            f"The checkpoint {file} was made by another version (format {about.get('version')}, this is "
            f"{CHECKPOINT_VERSION}). Use that version, or delete it to train from the start."
        )
    return about, tensors


def _checked(z0: np.ndarray, settings: TrainingSettings) -> np.ndarray:
    z0 = np.ascontiguousarray(z0, dtype=np.float32)
    if z0.ndim != 2:
        raise UserError(f"Features of shape {z0.shape} were given; (images, features) is needed.")
    check_finite(z0)
    if len(z0) < settings.batch_size:
        raise UserError(
            f"{len(z0)} images were given to train on, fewer than one batch of {settings.batch_size}; "
            "give more images or a smaller batch_size."
        )
    return z0


def _sha256(z0: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(z0).view(np.uint8)).hexdigest()
