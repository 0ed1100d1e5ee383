"""The references that `speed.py` measures against; they stay as they are when the package changes.

`encode` is the path that the committed results were made by: PyTorch as it is, channels_last,
float32, batches of 32, with glibc told to keep large freed blocks. `released` works as the paper's
code does: in each epoch every image is encoded anew, in PyTorch's own memory order.
"""

import ctypes
import sys

import torch
from torch import nn


def keep_freed_blocks(keep: bool) -> None:
    """Let glibc keep freed blocks of up to 1 GiB, or give them back as it does by itself."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim, mmap = (1 << 30, 1 << 30) if keep else (64 << 20, 32 << 20)
        ctypes.CDLL(None).mallopt(-1, trim)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, mmap)  # M_MMAP_THRESHOLD


def pooled(maps: list[torch.Tensor]) -> torch.Tensor:
    """Return the maps of all layers by both poolings, (N, 2, c)."""
    grids = [
        nn.functional.interpolate(m, (14, 14), mode="bilinear", align_corners=True) for m in maps
    ]
    both = (torch.cat([m.mean(dim=(2, 3)) for m in kind], dim=1) for kind in (maps, grids))
    return torch.stack(list(both), dim=1)


@torch.inference_mode()
def encode(model: nn.Module, mean: torch.Tensor, std: torch.Tensor, pixels: torch.Tensor):
    """Return features, (N, 2, c), of (N, 224, 224, 3) uint8; the model is in channels_last."""
    return pooled(model(((pixels.float() - mean) / std).permute(0, 3, 1, 2)))


@torch.inference_mode()
def released(model: nn.Module, mean: torch.Tensor, std: torch.Tensor, pixels: torch.Tensor):
    """Return the same; the model and its input are in PyTorch's own order, (N, 3, 224, 224)."""
    x = ((pixels.float() - mean) / std).permute(0, 3, 1, 2).contiguous()
    return pooled(model(x))
