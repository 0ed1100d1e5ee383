import hashlib
import urllib.error
import warnings
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision.datasets
from conftest import encoded, image_set, one_sentence, random_pixels, write_folder
from PIL import Image, features
from sklearn.datasets import load_digits

from dlsr import datasets
from dlsr.datasets import (
    DATASETS,
    ImageSet,
    UserError,
    cache_folder,
    data_folder,
    from_folder,
    from_parquet,
    load_images,
    resize,
    resize_chain,
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


@pytest.mark.real_data("DLSR_DATA")
def test_the_real_pack_holds_cifar10_as_registered():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = load_images("cifar10/test")
    assert len(images) == 10_000
    assert images.image(9_999).size == (32, 32)
    assert len(set(images.labels)) == 10
