import csv
import hashlib
import inspect
import io
import stat
import tarfile
import urllib.error
import urllib.request
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
import torch
import torchvision.datasets
from conftest import encoded, image_set, one_sentence, random_pixels, write_folder
from PIL import Image, features
from sklearn.datasets import load_digits

from dlsr import datasets
from dlsr.datasets import (
    DATASETS,
    LOADERS,
    Archive,
    ImageSet,
    UserError,
    cache_folder,
    data_folder,
    download,
    from_folder,
    from_parquet,
    load_images,
    partial_reason,
    pixel_hashes,
    recompressed,
    resize,
    resize_chain,
    resized,
    sets_here,
)


def one_image(content):
    return ImageSet("set", ["the-name.png"], [""], lambda i: content)


def as_rgb(pixels, form="PNG", **options):
    """What a reader gets of an image that was written to a file."""
    image = one_image(encoded(pixels, form, **options)).image(0)
    assert image.mode == "RGB"
    return np.asarray(image)


# Places


def test_cache_and_data_follow_the_environment(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    assert data_folder() == tmp_path / "cache" / "data"
    monkeypatch.setenv("DLSR_DATA", str(tmp_path / "elsewhere"))
    assert data_folder() == tmp_path / "elsewhere"


# Names and folders


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="'cifar11/test'") as error:
        load_images("cifar11/test")
    assert all(key in one_sentence(error) for key in DATASETS)


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is empty") as error:
        load_images(tmp_path / "empty")
    assert "empty" in one_sentence(error)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "table.csv").write_text("1,2")
    with pytest.raises(UserError, match="2 files, none of them an image"):
        from_folder(tmp_path)


def test_a_folder_is_read_in_order_with_its_folders_as_labels(tmp_path):
    write_folder(tmp_path / "set" / "b", 2)
    write_folder(tmp_path / "set" / "a", 1, seed=1)
    (tmp_path / "set" / "a" / "000.png").rename(tmp_path / "set" / "a" / "Z.PNG")
    (tmp_path / "set" / "readme.txt").write_text("not an image")
    images = load_images(tmp_path / "set")
    assert images.ids == ["a/Z.PNG", "b/000.png", "b/001.png"]
    assert images.labels == ["a", "b", "b"]
    assert images.size is None
    assert np.array_equal(np.asarray(images.image(1)), random_pixels(2)[0])


# Reading one image


def damaged(whole):
    """The file cut short at many places, and with a few bytes changed."""
    yield from (whole[:cut] for cut in np.linspace(0, len(whole) - 1, 40).astype(int))
    picks = np.random.RandomState(0)
    for _ in range(60):
        content = bytearray(whole)
        for place in picks.randint(len(whole), size=3):
            content[place] = picks.randint(256)
        yield bytes(content)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "AVIF"])
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_readable_or_refused_by_name(form):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    whole = encoded(random_pixels(1, size=(16, 16))[0], form)
    assert one_image(whole).image(0).size == (16, 16)
    refused = 0
    for content in damaged(whole):
        try:
            assert one_image(content).image(0).mode == "RGB"
        except UserError as error:
            refused += 1
            assert "the-name.png" in str(error)
            assert "skip" in str(error)
    assert refused > 5


def test_a_text_file_with_an_image_suffix_is_refused_by_name():
    with pytest.raises(UserError, match=r"the-name\.png") as error:
        one_image(b"not an image").image(0)
    one_sentence(error)


def test_grey_becomes_three_equal_channels():
    grey = np.arange(30, dtype=np.uint8).reshape(6, 5)
    assert np.array_equal(as_rgb(grey), np.repeat(grey[:, :, None], 3, axis=2))
    assert np.array_equal(np.asarray(one_image(grey).image(0))[:, :, 1], grey)


def test_black_and_white_becomes_0_and_255():
    bits = np.array([[True, False], [False, True]])
    assert np.array_equal(as_rgb(Image.fromarray(bits))[:, :, 2], [[255, 0], [0, 255]])


def test_transparency_is_laid_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = [0, 51, 255]  # clear, a fifth, opaque
    seen = as_rgb(rgba)
    assert seen[0, 0].tolist() == [255, 255, 255]
    assert seen[0, 1].tolist() == [244, 204, 204]  # 0.2 x (200, 0, 0) + 0.8 x 255
    assert seen[0, 2].tolist() == [200, 0, 0]


def test_grey_with_alpha_is_laid_on_white():
    pixels = np.array([[[0, 0], [0, 255]]], np.uint8)
    assert as_rgb(Image.fromarray(pixels, "LA"))[0].tolist() == [[255] * 3, [0] * 3]


def test_a_palette_colour_that_is_transparent_becomes_white():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert as_rgb(image)[0].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert as_rgb(image, transparency=0)[0].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_16_bit_grey_is_scaled_and_keeps_its_mean():
    pixels = np.random.RandomState(0).randint(0, 65536, (20, 20)).astype(np.uint16)
    seen = as_rgb(pixels)
    assert seen.dtype == np.uint8
    assert np.abs(seen[:, :, 0] - pixels / 65535 * 255).max() <= 0.5
    assert seen.mean() == pytest.approx(pixels.mean() / 65535 * 255, abs=0.1)


def test_a_dark_16_bit_image_stays_dark():
    assert as_rgb(np.full((4, 4), 256, np.uint16)).max() <= 1
    assert as_rgb(np.full((4, 4), 255, np.uint16)).max() <= 1


def test_an_image_of_one_pixel_is_an_image():
    assert as_rgb(np.array([[[1, 2, 3]]], np.uint8)).tolist() == [[[1, 2, 3]]]
    tiny = resize(one_image(np.array([[[1, 2, 3]]], np.uint8)).image(0), [(224, 224)])
    assert np.array_equal(np.unique(np.asarray(tiny).reshape(-1, 3), axis=0), [[1, 2, 3]])


# Subsets and the image list


def test_a_subset_is_the_same_in_every_call_and_another_for_another_seed():
    images = image_set(40)
    chosen = images.subset(10)
    assert chosen.ids == images.subset(10).ids == images.subset(10, seed=0).ids
    assert chosen.ids != images.subset(10, seed=1).ids
    assert len(set(chosen.ids)) == 10
    assert list(chosen.rows) == sorted(chosen.rows)
    assert chosen.ids == [images.ids[i] for i in chosen.rows]
    assert chosen.labels == [images.labels[i] for i in chosen.rows]
    assert np.array_equal(chosen.read(3), images.read(chosen.rows[3]))
    assert chosen.whole is images


def test_a_subset_is_pinned_over_machines():
    assert image_set(10).subset(4).ids == ["image2", "image4", "image8", "image9"]


@pytest.mark.parametrize("n", [0, -1, 7])
def test_a_subset_larger_than_the_set_or_empty_is_refused(n):
    with pytest.raises(UserError, match=f"n={n} .*it has 6"):
        image_set(6).subset(n)


def test_load_images_takes_a_subset():
    assert len(load_images("digits/test", n=5)) == 5
    assert load_images("digits/test", n=5, seed=3).ids == load_images("digits/test").subset(5, seed=3).ids


def test_the_image_lists_hash_tells_content_and_order():
    images = image_set(4)
    assert images.sha256 == image_set(4, name="another").sha256
    assert images.sha256 != image_set(4, seed=1).sha256
    assert images.sha256 != images.take(np.array([1, 0, 2, 3])).sha256
    by_hand = hashlib.sha256(
        b"".join(hashlib.sha256(images.read(i).tobytes()).digest() for i in range(4))
    ).hexdigest()
    assert images.sha256 == by_hand


# Resizing

FULL, CIFAR = (224, 224), (32, 32)


@pytest.mark.parametrize(
    ("protocol", "size", "id_size", "chain"),
    [
        ("native", CIFAR, CIFAR, (FULL,)),
        ("native", None, CIFAR, (FULL,)),
        ("native", None, None, (FULL,)),
        ("matched", CIFAR, CIFAR, (FULL,)),
        ("matched", (64, 64), CIFAR, (CIFAR, FULL)),
        ("matched", None, CIFAR, (CIFAR, FULL)),
        ("matched", (109, 89), (54, 44), ((54, 44), FULL)),
    ],
)
def test_resize_chain(protocol, size, id_size, chain):
    assert resize_chain(protocol, size=size, id_size=id_size) == chain


def test_matched_needs_the_id_size():
    with pytest.raises(UserError, match="vary in size"):
        resize_chain("matched", size=CIFAR, id_size=None)


def test_an_unknown_protocol_is_refused():
    with pytest.raises(UserError, match="native, matched"):
        resize_chain("blurred", size=CIFAR, id_size=CIFAR)


def test_resize_goes_step_by_step_as_height_and_width():
    image = one_image(random_pixels(1, size=(40, 30))[0]).image(0)
    assert resize(image, [(8, 4)]).size == (4, 8)
    small = image.resize((4, 8), Image.Resampling.BILINEAR)
    twice = np.asarray(resize(image, [(8, 4), FULL]))
    assert np.array_equal(twice, np.asarray(small.resize((224, 224), Image.Resampling.BILINEAR)))


def test_shrinking_averages_all_pixels():
    """Antialiased: a fine checkerboard becomes grey, not a sample of it."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = np.asarray(resize(Image.fromarray(board), [(8, 8)]))
    assert np.abs(small.astype(int) - 127).max() <= 3


# Altered images


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "box"])
def test_resized_images_are_pillows(name):
    images = image_set(3, size=(12, 10))
    small = resized(images, (4, 6), filter=name)
    assert (small.size, len(small)) == ((4, 6), 3)
    assert (small.ids, small.labels) == (images.ids, images.labels)
    for i in range(3):
        by_pillow = images.image(i).resize((6, 4), Image.Resampling[name.upper()])
        assert np.array_equal(np.asarray(small.image(i)), np.asarray(by_pillow))


def test_resized_images_are_those_of_the_matched_protocol():
    images = image_set(2, size=(12, 10))
    twice = resize(images.image(0), [(4, 4), FULL])
    assert np.array_equal(np.asarray(resize(resized(images, (4, 4)).image(0), [FULL])), np.asarray(twice))


def test_filters_give_image_lists_of_their_own():
    images = image_set(3, size=(12, 10))
    lists = [resized(images, (4, 6), filter=name) for name in ("bilinear", "bicubic", "box")]
    assert len({one.sha256 for one in (*lists, images, resized(images, (6, 4)))}) == 5
    assert len({one.name for one in lists}) == 3
    assert resized(images, (12, 10)).sha256 == images.sha256
    assert all(one.whole is None for one in lists)  # none takes the features of the images as they were


def test_an_unknown_filter_is_refused():
    with pytest.raises(UserError, match=r"filter='nearest'.* bilinear, bicubic, box") as error:
        resized(image_set(1), (4, 4), filter="nearest")
    assert one_sentence(error)


def test_a_resized_image_that_cannot_be_read_is_named():
    with pytest.raises(UserError, match=r"the-name\.png"):
        resized(one_image(b"no image"), (4, 4)).image(0)


@pytest.mark.parametrize("quality", [10, 75])
def test_recompressed_images_are_a_jpegs(quality):
    images = image_set(2, size=(16, 16))
    again = recompressed(images, quality=quality)
    assert (again.size, again.ids, again.labels) == (images.size, images.ids, images.labels)
    pixels = as_rgb(images.read(1), "JPEG", quality=quality)
    assert np.array_equal(np.asarray(again.image(1)), pixels)
    assert again.read(1)[:2] == b"\xff\xd8"
    assert again.sha256 != images.sha256


def test_a_lower_quality_loses_more():
    image = load_images("photo_patches/test").subset(5)
    before, *after = (
        np.stack([np.asarray(one.image(i)).astype(int) for i in range(5)])
        for one in (image, recompressed(image, quality=90), recompressed(image, quality=10))
    )
    near, far = (np.abs(pixels - before).mean() for pixels in after)
    assert 0 < near < far


def test_pixel_hashes_are_of_pixels_however_they_are_stored():
    pixels = random_pixels(1)[0]
    stored = [pixels, encoded(pixels), encoded(pixels, "BMP"), encoded(pixels, "TIFF")]
    images = ImageSet("set", list("abcd"), [""] * 4, stored.__getitem__)
    assert len(set(pixel_hashes(images))) == 1
    grey = np.full((4, 4), 90, np.uint8)
    forms = ImageSet("set", ["L", "RGB"], [""] * 2, [grey, np.stack([grey] * 3, -1)].__getitem__)
    assert len(set(pixel_hashes(forms))) == 1


def test_pixel_hashes_tell_pixels_and_shapes_apart():
    pixels = random_pixels(1, size=(6, 4))[0]
    changed = pixels.copy()
    changed[0, 0, 0] ^= 1
    stored = [pixels, changed, pixels.reshape(4, 6, 3), pixels[::-1]]
    images = ImageSet("set", list("abcd"), [""] * 4, stored.__getitem__)
    hashes = pixel_hashes(images)
    assert len(set(hashes)) == 4
    assert pixel_hashes(images.take(np.array([2, 0]))) == [hashes[2], hashes[0]]


# The demo's sets


def test_demo_sets_have_the_registered_counts_and_sizes():
    for key, row in DATASETS.items():
        if row.source == "scikit-learn":
            images = load_images(key)
            assert len(images) == len(images.labels) == row.images
            assert images.name == key
            assert images.image(0).size == row.size[::-1]


def test_digit_splits_are_disjoint_and_cover_all_digits():
    train, test, unseen = (load_images(key).ids for key in ("digits/train", "digits/test", "digits_8_9/test"))
    assert not set(train) & set(test)
    assert len(set(train) | set(test) | set(unseen)) == len(train) + len(test) + len(unseen) == 1797


def test_digits_are_the_labelled_images():
    bunch = load_digits()
    for key, digits in (("digits/train", range(8)), ("digits/test", range(8)), ("digits_8_9/test", (8, 9))):
        images = load_images(key)
        assert images.labels == [str(bunch.target[int(i)]) for i in images.ids]
        assert set(images.labels) == {str(d) for d in digits}
        pixels = bunch.images[int(images.ids[7])] * 255 / 16
        assert np.abs(np.asarray(images.image(7))[:, :, 0] - pixels).max() <= 0.5


def test_photo_patches_are_grey_8x8_cuts_of_two_photographs():
    images = load_images("photo_patches/test")
    patches = np.stack([images.read(i) for i in range(len(images))])
    assert patches.shape == (400, 8, 8)
    assert patches.dtype == np.uint8
    assert sorted(set(images.labels)) == ["china", "flower"]
    assert patches.std() > 20
    assert images.sha256 == load_images("photo_patches/test").sha256


# Packs and downloads


def write_pack(file, n=5):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = random_pixels(n)
    rows = [{"bytes": encoded(p), "path": f"{i}.png"} for i, p in enumerate(pixels)]
    pq.write_table(pa.table({"image": rows, "label": [str(i % 2) for i in range(n)]}), file)
    return pixels


@pytest.fixture
def pack(monkeypatch, tmp_path):
    """A registered set of 5 images, written into DLSR_DATA."""
    folder = tmp_path / "data"
    monkeypatch.setenv("DLSR_DATA", str(folder))
    file = folder / "cifar10" / "test.parquet"
    pixels = write_pack(file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    row = replace(DATASETS["cifar10/test"], images=5, size=(6, 5), sha256=sha256)
    monkeypatch.setitem(datasets.DATASETS, "cifar10/test", row)
    return file, pixels


def test_a_pack_is_read_back(pack):
    _, pixels = pack
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = load_images("cifar10/test")
    assert images.ids == [f"{i}.png" for i in range(5)]
    assert images.labels == ["0", "1", "0", "1", "0"]
    assert images.size == (6, 5)
    assert all(np.array_equal(np.asarray(images.image(i)), pixels[i]) for i in range(5))


def test_a_pack_of_another_count_is_refused(pack):
    write_pack(pack[0], 4)
    with (
        pytest.warns(UserWarning, match="sha256"),
        pytest.raises(UserError, match="has 4 images here; the whole set has 5"),
    ):
        load_images("cifar10/test")


def test_a_pack_of_other_content_warns(pack, monkeypatch):
    row = datasets.DATASETS["cifar10/test"]
    monkeypatch.setitem(datasets.DATASETS, "cifar10/test", replace(row, sha256="0" * 64))
    with pytest.warns(UserWarning, match="sha256"):
        assert len(load_images("cifar10/test")) == 5


def test_a_registered_set_may_lie_there_as_a_folder(pack):
    pack[0].unlink()
    write_folder(pack[0].parent / "test", 5)
    assert load_images("cifar10/test").ids == [f"{i:03d}.png" for i in range(5)]


def test_a_damaged_pack_is_refused_by_its_name(pack):
    file, _ = pack
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"test\.parquet") as error:
        load_images("cifar10/test")
    one_sentence(error)


@pytest.mark.parametrize(
    "columns",
    [
        {"pixels": [1]},
        {"image": [b"bytes"], "label": ["a"]},
        {"image": [{"bytes": b"bytes"}], "label": ["a"]},
    ],
    ids=["no image column", "image is no struct", "no path"],
)
def test_a_table_that_is_no_pack_is_refused(columns, tmp_path):
    pq.write_table(pa.table(columns), tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"other\.parquet") as error:
        from_parquet(tmp_path / "other.parquet", name="other")
    one_sentence(error)


@pytest.mark.parametrize(
    "failure", [urllib.error.URLError("no route"), RuntimeError("File not found or corrupted.")]
)
def test_a_missing_set_that_cannot_be_downloaded_says_where_to_put_it(failure, monkeypatch):
    def cifar10(*_, **__):
        raise failure

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", cifar10)
    with pytest.raises(UserError, match="could not download it") as error:
        load_images("cifar10/test")
    text = one_sentence(error)
    assert "cifar10/test.parquet" in text
    assert "DLSR_DATA" in text


def test_a_missing_set_is_downloaded_into_the_cache(monkeypatch, tmp_path):
    asked = {}

    class Source:
        classes, targets = ("plane", "car"), [1, 0, 1]

        def __init__(self, root, *, train, download):
            asked.update(root=root, train=train, download=download)

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return Image.fromarray(random_pixels(3)[i]), self.targets[i]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Source)
    row = replace(DATASETS["cifar10/train"], images=3)
    monkeypatch.setitem(datasets.DATASETS, "cifar10/train", row)
    images = load_images("cifar10/train")
    assert asked == {"root": tmp_path / "cache" / "torchvision", "train": True, "download": True}
    assert images.labels == ["car", "plane", "car"]
    assert np.array_equal(np.asarray(images.image(2)), random_pixels(3)[2])


def test_a_pack_or_the_published_count_is_accepted(pack, monkeypatch):
    def registered(**changes):
        monkeypatch.setitem(datasets.DATASETS, "cifar10/test", replace(row, **changes))

    row = replace(datasets.DATASETS["cifar10/test"], partial="5 of 9 images", whole=9)
    registered()
    assert len(load_images("cifar10/test")) == 5
    assert partial_reason("cifar10/test") == "5 of 9 images"
    registered(images=4, whole=5)  # a file of the whole set
    assert len(load_images("cifar10/test")) == 5
    assert partial_reason("cifar10/test") == ""
    registered(images=4, whole=9)
    with pytest.raises(UserError, match=r"has 5 images here; the whole set has 9 .*data pack 4"):
        load_images("cifar10/test")


def test_a_folder_is_never_partial_and_needs_the_published_count(pack, monkeypatch):
    pack[0].unlink()
    row = replace(datasets.DATASETS["cifar10/test"], partial="5 of 9 images", whole=9)
    monkeypatch.setitem(datasets.DATASETS, "cifar10/test", row)
    folder = write_folder(pack[0].parent / "test", 5)
    with pytest.raises(UserError, match="has 5 images here; the whole set has 9"):
        load_images("cifar10/test")
    write_folder(folder, 9)
    assert len(load_images("cifar10/test")) == 9
    assert partial_reason("cifar10/test") == partial_reason(str(folder)) == ""


def test_a_folder_of_another_size_does_not_claim_the_packs(pack):
    pack[0].unlink()
    folder = write_folder(pack[0].parent / "test", 5, size=(12, 10))
    assert load_images("cifar10/test").size is None
    write_folder(folder, 5)
    assert load_images("cifar10/test").size == (6, 5)
    (folder / "000.png").write_bytes(b"unreadable")
    assert load_images("cifar10/test").size is None


def test_a_set_of_unknown_count_is_not_counted(monkeypatch, tmp_path):
    monkeypatch.setenv("DLSR_DATA", str(tmp_path / "data"))
    write_folder(tmp_path / "data" / "imagenet100" / "train" / "n01440764", 3)
    images = load_images("imagenet100/train")
    assert images.name == "imagenet100/train"
    assert images.labels == ["n01440764"] * 3


def test_sets_here_are_those_that_need_no_download(pack, tmp_path):
    built_in = [key for key, row in DATASETS.items() if row.source == "scikit-learn"]
    assert sets_here() == [*built_in, "cifar10/test"]
    write_folder(tmp_path / "data" / "sun" / "test", 1)
    write_folder(tmp_path / "cache" / "data" / "isun" / "test", 1)
    assert set(sets_here()) == {*built_in, "cifar10/test", "sun/test", "isun/test"}


@pytest.mark.parametrize("get", [load_images, download])
def test_a_set_without_an_address_says_where_to_put_it_and_what_is_here(get, pack):
    with pytest.raises(UserError, match="no address") as error:
        get("imagenet100/train")
    text = one_sentence(error)
    assert "$DLSR_DATA/imagenet100/train/<class>/*.JPEG" in text
    assert str(data_folder()) in text
    assert f"Here are: {', '.join(sets_here())}; `dlsr sets --download NAME` gets others." in text
    assert "cifar10/test, " not in text.replace(", ".join(sets_here()), "")


def test_download_takes_registered_names_alone(tmp_path):
    assert download("digits/test").ids == load_images("digits/test").ids
    with pytest.raises(UserError, match="no known image set") as error:
        download(str(tmp_path))
    assert "cifar10/test" in one_sentence(error)


# torchvision's classes

TORCHVISION_ROWS = [row for row in DATASETS.values() if row.torchvision]


@pytest.mark.parametrize("row", TORCHVISION_ROWS, ids=lambda row: row.key)
def test_torchvision_has_the_classes_and_takes_the_arguments(row):
    signature = inspect.signature(getattr(torchvision.datasets, row.torchvision))
    for options in LOADERS[row.torchvision].calls[row.split]:
        signature.bind("root", **options, download=True)


def test_every_set_that_can_be_downloaded_is_in_one_way():
    assert {row.torchvision for row in TORCHVISION_ROWS} == set(LOADERS)
    for row in DATASETS.values():
        assert not (row.torchvision and row.archive)


def read_back(monkeypatch, key, n):
    """The set as it is read where it has n images, checked as the encoder needs it."""
    monkeypatch.setitem(datasets.DATASETS, key, replace(DATASETS[key], images=n, whole=0))
    images = download(key)
    assert len(images) == len(images.ids) == len(images.labels) == n
    assert len(set(images.ids)) == n
    for i in range(n):
        assert images.image(i).mode == "RGB"
        assert isinstance(images.labels[i], str)
        assert images.read(i).dtype == np.uint8
    return images


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision's own classes, on files made here: their checksums are not asked for."""
    for kind in ("SVHN", "Omniglot", "Places365", "CelebA"):
        monkeypatch.setattr(getattr(torchvision.datasets, kind), "_check_integrity", lambda *_: True)
    monkeypatch.setattr(torchvision.datasets.SVHN, "download", lambda _: None)
    return cache_folder() / "torchvision"


def test_svhn_is_read_from_torchvisions_file(unchecked, monkeypatch):
    pixels = random_pixels(3, size=(32, 32))
    unchecked.mkdir(parents=True)
    scipy.io.savemat(
        unchecked / "test_32x32.mat", {"X": pixels.transpose(1, 2, 3, 0), "y": np.array([[10], [3], [1]])}
    )
    images = read_back(monkeypatch, "svhn/test", 3)
    assert images.labels == ["0", "3", "1"]
    assert images.size == (32, 32)
    assert all(np.array_equal(np.asarray(images.image(i)), pixels[i]) for i in range(3))
    assert "svhn/test" in sets_here()


def test_mnists_kin_are_read_from_torchvisions_files(monkeypatch):
    raw = cache_folder() / "torchvision" / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = random_pixels(2, size=(28, 28))[..., 0]
    for kind in ("train", "t10k"):
        (raw / f"{kind}-images-idx3-ubyte").write_bytes(
            np.array([2051, 2, 28, 28], ">i4").tobytes() + pixels.tobytes()
        )
        (raw / f"{kind}-labels-idx1-ubyte").write_bytes(np.array([2049, 2], ">i4").tobytes() + b"\1\0")
    images = read_back(monkeypatch, "kmnist/test", 2)
    assert images.labels == [torchvision.datasets.KMNIST.classes[i] for i in (1, 0)]
    assert np.array_equal(np.asarray(images.image(1))[..., 2], pixels[1])


def test_textures_are_all_three_parts_of_torchvisions_folder(monkeypatch):
    folder = cache_folder() / "torchvision" / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for i, split in enumerate(("train", "val", "test")):
        write_folder(folder / "images" / split, 1, seed=i)
        (folder / "images" / split / "000.png").rename(folder / "images" / split / f"{split}_0.png")
        (folder / "labels" / f"{split}1.txt").write_text(f"{split}/{split}_0.png\n")
    images = read_back(monkeypatch, "textures/test", 3)
    assert images.ids == ["train/train_0.png", "val/val_0.png", "test/test_0.png"]
    assert images.labels == ["train", "val", "test"]
    assert np.array_equal(np.asarray(images.image(2)), random_pixels(1, seed=2)[0])


def test_omniglot_is_read_from_torchvisions_folder(unchecked, monkeypatch):
    folder = unchecked / "omniglot-py" / "images_evaluation"
    write_folder(folder / "Atlantean" / "character01", 2)
    write_folder(folder / "Tengwar" / "character01", 1)
    images = read_back(monkeypatch, "omniglot/test", 3)
    assert images.labels == ["Atlantean/character01"] * 2 + ["Tengwar/character01"]
    assert images.ids[2] == "Tengwar/character01/000.png"


def test_places365_is_read_from_torchvisions_folder(unchecked, monkeypatch):
    write_folder(unchecked / "val_256", 2)
    (unchecked / "categories_places365.txt").write_text("/z/zoo 0\n/a/airfield 1\n")
    (unchecked / "places365_val.txt").write_text("000.png 1\n001.png 0\n")
    images = read_back(monkeypatch, "places365/val", 2)
    assert images.ids == ["000.png", "001.png"]
    assert images.labels == ["/a/airfield", "/z/zoo"]


def test_celeba_is_read_from_torchvisions_folder(unchecked, monkeypatch):
    folder = unchecked / "celeba"
    write_folder(folder / "img_align_celeba", 3)
    tables = {
        "list_eval_partition.txt": [[0], [2], [2]],
        "identity_CelebA.txt": [[7], [8], [9]],
        "list_bbox_celeba.txt": [[0, 0, 5, 6]] * 3,
        "list_landmarks_align_celeba.txt": [[1, 2]] * 3,
        "list_attr_celeba.txt": [[1, -1]] * 3,
    }
    for name, rows in tables.items():
        with (folder / name).open("w", newline="") as file:
            table = csv.writer(file, delimiter=" ")
            if name.split("_")[1] in ("bbox", "landmarks", "attr"):
                table.writerows([[3], ["head"]])
            table.writerows([f"{i:03d}.png", *row] for i, row in enumerate(rows))
    images = read_back(monkeypatch, "celeba/test", 2)
    assert images.ids == ["001.png", "002.png"]
    assert images.labels == ["8", "9"]
    assert images.size is None  # the pack's images have half the size


def test_torchvision_is_asked_to_download_until_it_has_the_set(monkeypatch):
    asked = []

    def svhn(root, *, split, download):
        asked.append((split, download))
        if len(asked) in (1, 4):
            raise RuntimeError("Dataset not found or corrupted.")
        return SimpleTorchvision()

    class SimpleTorchvision:
        labels = torch.tensor([1, 0]).numpy()

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return Image.fromarray(random_pixels(2)[i]), 0

    monkeypatch.setattr(torchvision.datasets, "SVHN", svhn)
    monkeypatch.setitem(datasets.DATASETS, "svhn/test", replace(DATASETS["svhn/test"], whole=2))
    for outcome in (False, True, True, False, True):
        if outcome:
            assert load_images("svhn/test").labels == ["1", "0"]
        else:
            with pytest.raises(UserError, match="could not download it"):
                load_images("svhn/test")
        assert ("svhn/test" in sets_here()) is outcome
    assert [fetch for _, fetch in asked] == [True, True, False, False, True]
    assert {split for split, _ in asked} == {"test"}


# Archives


def tar_of(files, *, links=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return buffer.getvalue()


def zip_of(files, *, links=()):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for name, target in links:
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, target)
    return buffer.getvalue()


MAKERS = {"set.tar.gz": tar_of, "set.zip": zip_of}
PIXELS = random_pixels(4, seed=5, size=(32, 32))
FILES = {
    "top/": b"",
    "top/images/b/2.png": encoded(PIXELS[2]),
    "top/images/a/0.png": encoded(PIXELS[0]),
    "./top/images/a/1.png": encoded(PIXELS[1]),
    "top/images/a/._1.png": b"of another system",
    "top/images/a/empty.png": b"",
    "top/images/readme.txt": b"not an image",
    "top/other/3.png": encoded(PIXELS[3]),
}


class Server:
    """Stands for the network: one file, served whole or in part."""

    def __init__(self, content, *, ranges=True, cut=None, failure=None):
        self.content, self.ranges, self.cut, self.failure = content, ranges, cut, failure
        self.requests = []

    def __call__(self, request, *, timeout):
        assert 1 <= timeout <= 120
        self.requests.append((request.full_url, request.get_header("Range")))
        if self.failure:
            raise self.failure
        asked = request.get_header("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        if start and start >= len(self.content):
            raise urllib.error.HTTPError(request.full_url, 416, "Range Not Satisfiable", {}, None)
        body = io.BytesIO(self.content[start : self.cut])
        body.status = 206 if start else 200
        body.headers = {"Content-Length": str(len(self.content) - start)}
        return body


@pytest.fixture
def archive(monkeypatch, tmp_path):
    """Registers an archive as lsun_resize/test, and gives the server that has it."""
    monkeypatch.setenv("DLSR_DATA", str(tmp_path / "data"))

    def register(content=None, *, name="set.tar.gz", images=3, labels="", **server):
        content = MAKERS[name](FILES) if content is None else content
        md5 = hashlib.md5(content).hexdigest()
        kept = Archive(f"https://host.example/place/{name}?dl=1", md5, "top/images", "*.png", labels)
        row = replace(DATASETS["lsun_resize/test"], images=images, archive=kept)
        monkeypatch.setitem(datasets.DATASETS, row.key, row)
        served = Server(content, **server)
        monkeypatch.setattr(urllib.request, "urlopen", served)
        return served

    return register


def downloads():
    return cache_folder() / "downloads"


def all_files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def check_lsun(images):
    assert images.name == "lsun_resize/test"
    assert images.ids == ["a/0.png", "a/1.png", "b/2.png"]
    assert images.labels == ["a", "a", "b"]
    assert images.size == (32, 32)
    assert all(np.array_equal(np.asarray(images.image(i)), PIXELS[i]) for i in range(3))


@pytest.mark.parametrize("name", MAKERS)
def test_an_archive_is_downloaded_once_and_only_its_set_is_kept(name, archive, tmp_path):
    server = archive(name=name)
    assert "lsun_resize/test" not in sets_here()
    check_lsun(load_images("lsun_resize/test"))
    assert server.requests == [(f"https://host.example/place/{name}?dl=1", None)]
    assert all_files(tmp_path / "cache") == {
        f"data/lsun_resize/test/{x}" for x in ("a/0.png", "a/1.png", "b/2.png")
    }
    assert "lsun_resize/test" in sets_here()
    check_lsun(download("lsun_resize/test"))
    assert len(server.requests) == 1


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_broken_download_goes_on_where_the_server_can(ranges, archive):
    server = archive(cut=1000, ranges=ranges)
    with pytest.raises(UserError, match="broke at 1,000 of") as error:
        load_images("lsun_resize/test")
    assert "host.example" in one_sentence(error)
    assert all_files(downloads()) == {"set.tar.gz.part"}
    server.cut = None
    check_lsun(load_images("lsun_resize/test"))
    assert [asked for _, asked in server.requests] == [None, "bytes=1000-"]


def test_a_part_longer_than_the_file_is_replaced(archive):
    server = archive()
    downloads().mkdir(parents=True)
    (downloads() / "set.tar.gz.part").write_bytes(b"x" * (len(server.content) + 1))
    check_lsun(load_images("lsun_resize/test"))
    assert [asked for _, asked in server.requests] == [f"bytes={len(server.content) + 1}-", None]


def test_a_download_with_another_checksum_is_put_aside(archive):
    server = archive()
    right, server.content = server.content, b"<html>Too many downloads</html>"
    with pytest.raises(UserError, match="md5") as error:
        load_images("lsun_resize/test")
    text = one_sentence(error)
    for part in (hashlib.md5(server.content).hexdigest(), hashlib.md5(right).hexdigest(), "set.tar.gz.wrong"):
        assert part in text
    assert (downloads() / "set.tar.gz.wrong").read_bytes() == server.content
    assert all_files(downloads()) == {"set.tar.gz.wrong"}
    server.content = right
    check_lsun(load_images("lsun_resize/test"))


@pytest.mark.parametrize(
    "failure", [urllib.error.URLError("no route"), TimeoutError("timed out"), ConnectionResetError("reset")]
)
def test_a_host_that_fails_is_named_with_the_way_by_hand(failure, archive):
    archive(failure=failure)
    with pytest.raises(UserError, match="could not be downloaded") as error:
        load_images("lsun_resize/test")
    text = one_sentence(error)
    assert "https://host.example/place/set.tar.gz" in text
    assert "$DLSR_DATA/downloads/set.tar.gz" in text
    assert "$DLSR_DATA/lsun_resize/test/" in text
    assert ".parquet" not in text
    assert str(data_folder()) in text
    assert ", ".join(sets_here()) in text


def test_an_archive_put_there_by_hand_is_used_and_left(archive):
    server = archive(failure=OSError("no network"))
    file = data_folder() / "downloads" / "set.tar.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"another file")
    with pytest.raises(UserError, match=r"set\.tar\.gz has the md5") as error:
        load_images("lsun_resize/test")
    assert hashlib.md5(server.content).hexdigest() in one_sentence(error)
    file.write_bytes(server.content)
    check_lsun(load_images("lsun_resize/test"))
    assert file.read_bytes() == server.content
    assert server.requests == []


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("evil", ["../evil.png", "top/images/../../../evil.png", "/evil.png", "C:\\evil.png"])
def test_an_archive_that_writes_outside_its_folder_is_refused(evil, name, archive, tmp_path):
    archive(MAKERS[name]({**FILES, evil: FILES["top/images/a/0.png"]}), name=name)
    with pytest.raises(UserError, match="outside") as error:
        load_images("lsun_resize/test")
    assert "evil.png" in one_sentence(error)
    assert all_files(tmp_path) == {f"cache/downloads/{name}"}
    assert not Path("/evil.png").exists()


@pytest.mark.parametrize("name", MAKERS)
def test_a_link_in_an_images_place_is_refused(name, archive, tmp_path):
    (tmp_path / "secret.png").write_bytes(FILES["top/images/a/0.png"])
    archive(MAKERS[name](FILES, links=[("top/images/z.png", str(tmp_path / "secret.png"))]), name=name)
    with pytest.raises(UserError, match=r"link or device as top/images/z\.png"):
        load_images("lsun_resize/test")
    assert all_files(tmp_path) == {f"cache/downloads/{name}", "secret.png"}


@pytest.mark.parametrize("name", MAKERS)
def test_a_linked_folder_leads_nowhere(name, archive, tmp_path):
    """A link before the files that would go through it: no link is ever made."""
    outside = tmp_path / "outside"
    outside.mkdir()
    files = {"top/images/a/0.png": FILES["top/images/a/0.png"]}
    archive(MAKERS[name](files, links=[("top/images/a", str(outside))]), name=name, images=1)
    assert load_images("lsun_resize/test").ids == ["a/0.png"]
    assert list(outside.iterdir()) == []


def test_an_archive_of_another_count_is_refused_and_not_taken_later(archive, tmp_path):
    archive(images=4)
    for _ in range(2):
        with pytest.raises(UserError, match=r"holds 3 images .*the whole set has 4") as error:
            load_images("lsun_resize/test")
        one_sentence(error)
    assert all_files(tmp_path) == {"cache/downloads/set.tar.gz"}


@pytest.mark.parametrize("name", MAKERS)
def test_a_damaged_archive_is_refused_by_name(name, archive, tmp_path):
    archive(MAKERS[name](FILES)[:-200], name=name)
    with pytest.raises(UserError, match=f"{name} is damaged") as error:
        load_images("lsun_resize/test")
    one_sentence(error)
    assert all_files(tmp_path) == {f"cache/downloads/{name}"}


@pytest.mark.parametrize("name", MAKERS)
def test_labels_come_from_the_file_that_lists_them(name, archive):
    files = {
        "top/images/0.png": encoded(PIXELS[0]),
        "top/notes.txt": b"1.png\tn02\t0\t32\n0.png\tn01\t5\t6\nnone.png\tn03\n",
        "top/images/1.png": encoded(PIXELS[1]),
        "top/images/2.png": encoded(PIXELS[2]),
    }
    archive(MAKERS[name](files), name=name, labels="top/notes.txt")
    images = load_images("lsun_resize/test")
    assert images.ids == ["2.png", "n01/0.png", "n02/1.png"]
    assert images.labels == [".", "n01", "n02"]
    assert np.array_equal(np.asarray(images.image(2)), PIXELS[1])


@pytest.mark.parametrize("line", [b"0.png ../../..", b"../0.png a"])
def test_labels_that_lead_outside_are_refused(line, archive, tmp_path):
    files = {"top/images/0.png": encoded(PIXELS[0]), "top/notes.txt": line}
    archive(tar_of(files), labels="top/notes.txt")
    with pytest.raises(UserError, match="outside"):
        load_images("lsun_resize/test")
    assert all_files(tmp_path) == {"cache/downloads/set.tar.gz"}


def test_every_archive_has_an_address_a_checksum_and_a_name_of_its_own():
    archives = [row.archive for row in DATASETS.values() if row.archive]
    assert len({a.file for a in archives}) == len({a.md5 for a in archives}) == len(archives) == 7
    for a in archives:
        assert a.url.startswith("https://")
        assert len(a.md5) == 32
        assert a.file.endswith((".tar.gz", ".zip"))


LAYOUTS = [
    ("lsun_crop/test", "LSUN/test/test_0000001.png"),
    ("lsun_resize/test", "LSUN_resize/LSUN_resize/0.jpg"),
    ("isun/test", "iSUN/iSUN_patches/1.jpeg"),
    ("sun/test", "SUN/images/sun_a.jpg"),
    ("inaturalist/test", "iNaturalist/images/a.jpg"),
    ("notmnist/test", "notMNIST_small/A/Q3==.png"),
    ("tiny_imagenet/val", "tiny-imagenet-200/val/images/val_0.JPEG"),
]


@pytest.mark.parametrize(("key", "image"), LAYOUTS)
def test_the_published_layouts_are_found(key, image, monkeypatch):
    others = {"elsewhere/1.png": b"x", "tiny-imagenet-200/test/images/test_0.JPEG": b"x"}
    row = DATASETS[key]
    files = {image: encoded(PIXELS[0], "PNG"), **others}
    if row.archive.labels:
        files[row.archive.labels] = b"val_0.JPEG\tn0344\t0\t32\t44\t62\n"
    content = MAKERS["set.zip" if row.archive.file.endswith(".zip") else "set.tar.gz"](files)
    kept = replace(row.archive, md5=hashlib.md5(content).hexdigest())
    monkeypatch.setitem(datasets.DATASETS, key, replace(row, images=1, whole=0, archive=kept))
    monkeypatch.setattr(urllib.request, "urlopen", Server(content))
    images = download(key)
    assert images.name == key
    assert images.ids[0].endswith(Path(image).name)
    assert images.labels == [{"notmnist": "A", "tiny_imagenet": "n0344"}.get(row.name, ".")]


@pytest.mark.real_data("DLSR_DATA")
def test_the_real_pack_holds_cifar10_as_registered():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = load_images("cifar10/test")
    assert len(images) == 10_000
    assert images.image(9_999).size == (32, 32)
    assert len(set(images.labels)) == 10
