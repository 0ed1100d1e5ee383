"""The latent feature diffusion network (LFDN): a residual MLP on feature vectors, given a timestep."""

import math

import torch
from torch import nn

from dlsr.datasets import UserError


def sinusoid(t: torch.Tensor, dimension: int) -> torch.Tensor:
    """Timestep embedding (N,) -> (N, dimension): cosines, then sines, base 10,000."""
    half = dimension // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero(linear: nn.Linear) -> nn.Linear:
    """The same layer with all weights zero, so that a block starts as the identity."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class ResidualBlock(nn.Module):
    """x + Linear0(SiLU(GN(Linear(SiLU(GN(x))) + Linear(SiLU(emb)))))."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.into = nn.Sequential(nn.GroupNorm(1, width), nn.SiLU(), nn.Linear(width, width))
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(time_width, width))
        self.out = nn.Sequential(nn.GroupNorm(1, width), nn.SiLU(), zero(nn.Linear(width, width)))

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return x + self.out(self.into(x) + self.time(emb))


class LFDN(nn.Module):
    """Predicts z0 from z_t (the paper's LFDN; released code ``diffusionmodules/latent.py``).

    ``features`` is c, the length of z0. The paper's size, width 1440 and 16 blocks, has 86.74
    million parameters at c = 720. GroupNorm with one group is LayerNorm on vectors.
    """

    def __init__(self, features: int, *, width: int = 1440, blocks: int = 16) -> None:
        super().__init__()
        if min(features, blocks) < 1 or width < 2 or width % 2:
            raise UserError(
                f"An LFDN needs features and blocks of at least 1 and an even width of at least 2; "
                f"it was given features={features}, width={width}, blocks={blocks}."
            )
        self.features, self.width = features, width
        self.into = nn.Sequential(nn.SiLU(), nn.Linear(features, width))
        self.time = nn.Sequential(nn.Linear(width, features), nn.SiLU(), nn.Linear(features, features))
        self.blocks = nn.ModuleList(ResidualBlock(width, features) for _ in range(blocks))
        self.out = nn.Sequential(nn.GroupNorm(1, width), nn.SiLU(), zero(nn.Linear(width, features)))

    def forward(self, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """(N, c) and (N,) 0-based timesteps -> predicted z0 of (N, c)."""
        x = self.into(z_t)
        emb = self.time(sinusoid(t, self.width))
        for block in self.blocks:
            x = block(x, emb)
        return self.out(x)
