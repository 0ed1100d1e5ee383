"""The latent feature diffusion network (LFDN): a residual MLP on feature vectors, given a timestep.

Source: section 3.2 of the paper and the released code's ``diffusionmodules/latent.py``.
"""

import math

import torch
from torch import nn

from dlsr.errors import UserError


def sinusoid(t: torch.Tensor, dimension: int) -> torch.Tensor:
    """Embed timesteps of shape (N,) as (N, dimension): cosines, then sines, with base 10,000."""
    half = dimension // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResidualBlock(nn.Module):
    """Compute x + Linear0(SiLU(GN(Linear(SiLU(GN(x))) + Linear(SiLU(emb))))).

    GroupNorm with one group is LayerNorm on vectors. In an LFDN, Linear0 starts at zero. Without a
    ``time_width`` there is no embedding.
    """

    def __init__(self, width: int, time_width: int = 0) -> None:
        super().__init__()
        self.into = nn.Sequential(nn.GroupNorm(1, width), nn.SiLU(), nn.Linear(width, width))
        if time_width:
            self.time = nn.Sequential(nn.SiLU(), nn.Linear(time_width, width))
        self.out = nn.Sequential(nn.GroupNorm(1, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: torch.Tensor, emb: torch.Tensor | None = None) -> torch.Tensor:
        h = self.into(x)
        return x + self.out(h if emb is None else h + self.time(emb))


class LFDN(nn.Module):
    """Predict z0 from z_t and t.

    ``features`` is c, the length of z0. The paper's size, a width of 1440 and 16 blocks, has 86.74
    million parameters at c = 720. Without a ``timestep`` it is the paper's autoencoder, "the LFDN
    network without the timestep embedding". Raises `UserError` for sizes below 1 or an odd width.
    """

    def __init__(
        self, features: int, *, width: int = 1440, blocks: int = 16, timestep: bool = True
    ) -> None:
        super().__init__()
        if min(features, blocks) < 1 or width < 2 or width % 2:
            raise UserError(
                f"features={features}, width={width} and blocks={blocks} were given; an LFDN needs "
                "features and blocks of at least 1 and an even width of at least 2."
            )
        self.features, self.width = features, width
        self.into = nn.Sequential(nn.SiLU(), nn.Linear(features, width))
        if timestep:
            layers = nn.Linear(width, features), nn.SiLU(), nn.Linear(features, features)
            self.time = nn.Sequential(*layers)
        time_width = features if timestep else 0
        self.blocks = nn.ModuleList(ResidualBlock(width, time_width) for _ in range(blocks))
        self.out = nn.Sequential(nn.GroupNorm(1, width), nn.SiLU(), nn.Linear(width, features))
        for part in (*self.blocks, self):  # a block starts as the identity, the network at 0
            nn.init.zeros_(part.out[-1].weight)
            nn.init.zeros_(part.out[-1].bias)

    def forward(self, z_t: torch.Tensor, t: torch.Tensor | None = None) -> torch.Tensor:
        """Return the predicted z0, (N, c), of z_t, (N, c), at 0-based timesteps t, (N,)."""
        x = self.into(z_t)
        emb = None if t is None else self.time(sinusoid(t, self.width))
        for block in self.blocks:
            x = block(x, emb)
        return self.out(x)
