import hashlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import one_sentence, random_pixels
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import nn

from dlsr import encoders
from dlsr.datasets import UserError, resize
from dlsr.encoders import (
    PRESETS,
    FrozenEncoder,
    gap,
    get_encoder,
    grid14,
    in_order,
    weights_folders,
)

TINY = "test_resnet.r160_in1k"  # timm's own model for tests
LITE0 = "tf_efficientnet_lite0.in1k"


def save_weights(file, tag=TINY, *, seed=0):
    """Weights of a whole timm model, as the hub has them."""
    torch.manual_seed(seed)
    model = timm.create_model(tag, pretrained=False)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    return model.eval()


# Choice and files


def test_an_unknown_encoder_names_the_presets():
    with pytest.raises(UserError, match="'efficientnet_b44'") as error:
        get_encoder("efficientnet_b44")
    assert all(name in one_sentence(error) for name in PRESETS)


def test_an_unknown_tag_of_a_known_model_is_refused():
    with pytest.raises(UserError, match="nonsense"):
        get_encoder("resnet18.nonsense")


def test_presets_and_full_tags_are_found():
    assert get_encoder("efficientnet_b4").tag == "tf_efficientnet_b4.aa_in1k"
    assert get_encoder("resnet50").layers == (1, 2, 3)
    assert get_encoder(TINY).tag == TINY


def test_a_weights_file_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"no weights file nowhere\.pth"):
        get_encoder(TINY, weights="nowhere.pth")


def test_a_named_weights_file_that_is_missing_says_what_to_put_where(tmp_path):
    with pytest.raises(UserError, match=r"efficientnet_b4_without_last_block\.safetensors") as error:
        get_encoder("efficientnet_b4_without_last_block").weights_sha256()
    text = one_sentence(error)
    assert "DLSR_WEIGHTS" in text
    assert str(tmp_path / "cache" / "weights") in text


def test_weights_are_looked_for_in_the_named_folder_first(monkeypatch, tmp_path):
    monkeypatch.setenv("DLSR_WEIGHTS", str(tmp_path / "mine"))
    assert weights_folders() == [tmp_path / "mine", tmp_path / "cache" / "weights"]
    for folder in weights_folders():
        folder.mkdir(parents=True)
        (folder / f"{TINY}.safetensors").write_bytes(folder.name.encode())
    assert get_encoder(TINY).weights_file() == tmp_path / "mine" / f"{TINY}.safetensors"
    assert get_encoder(TINY).weights_sha256() == hashlib.sha256(b"mine").hexdigest()


def test_without_the_hub_there_are_no_weights_and_never_random_ones(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(encoders, "hf_hub_download", unreachable)
    for step in (get_encoder(TINY).weights_sha256, get_encoder(TINY).build):
        with pytest.raises(UserError, match="the model hub did not give them") as error:
            step()
        text = one_sentence(error)
        assert f"timm/{TINY}" in text
        assert f"{TINY}.safetensors" in text


def test_with_the_hub_its_file_is_loaded(monkeypatch, tmp_path):
    model = save_weights(tmp_path / "model.safetensors")
    asked = []

    def download(repository, file, **_):
        asked.append((repository, file))
        return str(tmp_path / "model.safetensors")

    monkeypatch.setattr(encoders, "hf_hub_download", download)
    built = get_encoder(TINY).build()
    assert set(asked) == {(f"timm/{TINY}", "model.safetensors")}
    loaded = built.model.state_dict()["layer1.0.conv1.weight"]
    assert torch.equal(loaded, model.state_dict()["layer1.0.conv1.weight"])


@pytest.mark.parametrize("left", [0, 1, 1000, -10])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_weights_file_cut_short_is_refused(suffix, left, tmp_path):
    file = tmp_path / f"weights{suffix}"
    model = timm.create_model(TINY, pretrained=False)
    save = save_file if suffix == ".safetensors" else torch.save
    save({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(UserError, match=f"weights{suffix}") as error:
        get_encoder(TINY, weights=file).build()
    one_sentence(error)


def test_a_file_of_something_else_is_refused(tmp_path):
    model = timm.create_model(TINY, pretrained=False)
    for content in (model, [1, 2]):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(UserError, match=r"weights\.pth") as error:
            get_encoder(TINY, weights=tmp_path / "weights.pth").build()
        one_sentence(error)


def test_weights_in_a_checkpoint_are_found(tmp_path):
    model = timm.create_model(TINY, pretrained=False)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    built = get_encoder(TINY, weights=tmp_path / "weights.pth").build().model
    assert torch.equal(next(built.parameters()), next(model.parameters()))


def test_weights_of_another_model_are_refused(tmp_path):
    save_weights(tmp_path / "weights.safetensors", "test_efficientnet.r160_in1k")
    with pytest.raises(UserError, match=r"weights\.safetensors") as error:
        get_encoder(TINY, weights=tmp_path / "weights.safetensors").build()
    assert TINY in one_sentence(error)


def test_weights_of_other_shapes_are_refused(tmp_path):
    weights = timm.create_model(TINY, pretrained=False).state_dict()
    weights["layer1.0.conv1.weight"] = torch.zeros(1, 2, 3, 3)
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"weights\.safetensors") as error:
        get_encoder(TINY, weights=tmp_path / "weights.safetensors").build()
    assert TINY in one_sentence(error)


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    weights = timm.create_model(TINY, pretrained=False).state_dict()
    del weights["layer1.0.conv1.weight"]
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 tensors .*layer1\.0\.conv1\.weight"):
        get_encoder(TINY, weights=tmp_path / "weights.safetensors").build()


def test_layers_that_the_model_has_not_are_refused(tmp_path):
    save_weights(tmp_path / f"{TINY}.safetensors")
    encoder = encoders.Encoder("own", TINY, layers=(0, 9), file=str(tmp_path / f"{TINY}.safetensors"))
    with pytest.raises(UserError, match="layers"):
        encoder.build()


@pytest.mark.parametrize("tag", [TINY, "test_efficientnet.r160_in1k", "test_convnext.r160_in1k"])
def test_any_convolutional_timm_model_loads_the_hubs_weights(tag, tmp_path):
    """timm renames some models' modules when it cuts them for features."""
    save_weights(tmp_path / "weights.safetensors", tag)
    built = get_encoder(tag, weights=tmp_path / "weights.safetensors").build()
    values = built(torch.from_numpy(random_pixels(2, size=(224, 224))))
    assert values.shape == (2, 2, sum(built.channels))
    assert torch.isfinite(values).all()
    assert (values[0] - values[1]).abs().max() > 0


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("efficientnet_b4", (24, 32, 56, 160, 448)),
        ("efficientnet_b4_without_last_block", (24, 32, 56, 160, 448)),
        ("resnet50", (256, 512, 1024)),
        ("efficientnet_lite0", (16, 24, 40, 112, 320)),
    ],
)
def test_the_layers_widths_need_no_weights(name, channels):
    assert get_encoder(name).channels() == channels


def test_in_order_wants_equal_shapes():
    given = {"a": torch.zeros(2), "b": torch.ones(3)}
    renamed = in_order(given, {"x": torch.empty(2), "y": torch.empty(3)})
    assert list(renamed) == ["x", "y"]
    assert renamed["y"] is given["b"]
    with pytest.raises(UserError, match="shapes"):
        in_order(given, {"x": torch.empty(3), "y": torch.empty(2)})


# Pooling


def test_gap_is_the_mean_of_every_map():
    maps = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    by_hand = [[float(np.mean(channel.numpy())) for channel in image] for image in maps]
    assert gap(maps).tolist() == by_hand


def bilinear_at(row, place):
    """A row of values read between its points."""
    left = min(int(place), len(row) - 2)
    return row[left] * (1 - (place - left)) + row[left + 1] * (place - left)


def test_grid14_of_a_14x14_map_is_gap():
    maps = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(grid14(maps), gap(maps))


@pytest.mark.parametrize("side", [7, 28, 112])
def test_grid14_reads_14_points_with_aligned_corners(side):
    row = np.random.RandomState(0).rand(side)
    points = [bilinear_at(row, i * (side - 1) / 13) for i in range(14)]
    maps = torch.from_numpy(row).float().expand(1, 1, side, side)
    assert grid14(maps).item() == pytest.approx(np.mean(points), abs=1e-5)
    assert grid14(maps.mT).item() == pytest.approx(np.mean(points), abs=1e-5)


def test_grid14_differs_from_gap_on_large_maps():
    row = torch.zeros(112)
    row[1::2] = 1  # the sampled points do not see all columns
    maps = row.expand(1, 1, 112, 112)
    assert gap(maps).item() == pytest.approx(0.5)
    assert abs(grid14(maps).item() - 0.5) < 0.5
    ramp = torch.arange(112.0).expand(1, 1, 112, 112)
    assert grid14(ramp).item() == pytest.approx(55.5, abs=1e-4)


class Stages(nn.Module):
    """Two maps, one of them channels-last, as some transformers give."""

    class feature_info:
        @staticmethod
        def channels():
            return [3, 2]

    def forward(self, x):
        return [x, x[:, :2, ::8, ::8].permute(0, 2, 3, 1)]


def test_the_encoder_standardises_pools_and_stacks():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
    pixels = torch.from_numpy(random_pixels(2, size=(224, 224)))
    values = FrozenEncoder(Stages(), mean=mean, std=std)(pixels)
    assert values.dtype == torch.float32
    assert values.shape == (2, 2, 5)
    x = (pixels.double().numpy() / 255 - mean) / std
    np.testing.assert_allclose(values[:, 0, :3], x.mean((1, 2)), atol=1e-4)
    np.testing.assert_allclose(values[:, 0, 3:], x[:, ::8, ::8, :2].mean((1, 2)), atol=1e-4)
    maps = torch.from_numpy(x).float().permute(0, 3, 1, 2)
    torch.testing.assert_close(values[:, 1, :3], grid14(maps), atol=1e-4, rtol=0)


# Real networks


@pytest.fixture(scope="module")
def lite0():
    return get_encoder("efficientnet_lite0").build()


@pytest.fixture(scope="module")
def whole_lite0():
    """timm's classifier with the same packaged weights."""
    model = timm.create_model(LITE0, pretrained=False)
    file = PRESETS["efficientnet_lite0"].weights_file()
    weights = torch.load(file, map_location="cpu", weights_only=True)
    model.load_state_dict(in_order(weights, model.state_dict()))
    return model.eval()


@pytest.fixture(scope="module")
def photos():
    """sklearn's china.jpg and flower.jpg as the encoder sees them."""
    images = [resize(Image.fromarray(photo), [(224, 224)]) for photo in load_sample_images().images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def test_lite0_reads_five_layers(lite0, photos):
    assert lite0.channels == (16, 24, 40, 112, 320)
    values = lite0(photos)
    assert values.shape == (2, 2, 512)
    assert not any(parameter.requires_grad for parameter in lite0.parameters())
    assert not lite0.training


def test_lite0_names_the_sample_photographs(whole_lite0, photos):
    with torch.inference_mode():
        classes = whole_lite0(((photos / 255 - 0.5) / 0.5).permute(0, 3, 1, 2))
    china, flower = classes.topk(5).indices.tolist()
    assert {449, 975} & set(china)  # boathouse, lakeside
    assert flower[0] == 985  # daisy


def test_lite0s_features_are_the_classifiers_own(lite0, whole_lite0, photos):
    """The last layer is what the classifier computes before its head, so the weights are in place."""
    seen = {}
    whole_lite0.blocks.register_forward_hook(lambda module, given, output: seen.update(last=output))
    with torch.inference_mode():
        whole_lite0(((photos / 255 - 0.5) / 0.5).permute(0, 3, 1, 2))
        values = lite0(photos)
    torch.testing.assert_close(values[:, 0, -320:], gap(seen["last"]), atol=1e-4, rtol=1e-3)


def test_lite0_gives_the_same_for_one_image_and_for_two(lite0, photos):
    torch.testing.assert_close(lite0(photos)[1:], lite0(photos[1:]), atol=1e-4, rtol=1e-3)


@pytest.mark.real_data("DLSR_WEIGHTS")
def test_b4_without_its_last_block_has_the_papers_layers(photos):
    encoder = get_encoder("efficientnet_b4_without_last_block")
    if not Path(encoder.weights_file()).is_file():
        pytest.skip("the weights are not in DLSR_WEIGHTS")
    built = encoder.build()
    assert built.channels == (24, 32, 56, 160, 448)
    assert sum(built.channels) == 720
    assert isinstance(built.model.blocks[6][1], nn.Identity)
    values = built(photos[:1])
    assert values.shape == (1, 2, 720)
    assert values.std() > 0
