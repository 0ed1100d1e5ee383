import hashlib
import io
import os
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision.datasets
from dlsr import data
from dlsr.data import ImageSet, from_parquet, load_images, registry, resize
from dlsr.errors import UserError
from dlsr.features import extract
from PIL import Image

from conftest import FakeEncoder, encoded, image_set, one_sentence, random_pixels, write_folder

FULL, CIFAR = (224, 224), (32, 32)


def one_image(content):
    return ImageSet("set", ["the-name.png"], [""], [content])


def as_rgb(pixels, form="PNG", **options):
    """Return what a reader gets of an image that was written to a file."""
    image = one_image(encoded(pixels, form, **options)).image(0)
    assert image.mode == "RGB"
    return np.asarray(image)


def pixels_of(images):
    return np.stack([np.asarray(images.image(i)) for i in range(len(images))])


# Folders, and what is refused


def test_a_folder_is_read_in_order_with_its_folders_as_labels(tmp_path):
    write_folder(tmp_path / "set" / "b", 2)
    write_folder(tmp_path / "set" / "a", 1, seed=1)
    (tmp_path / "set" / "a" / "000.png").rename(tmp_path / "set" / "a" / "Z.PNG")
    (tmp_path / "set" / "b" / "._000.png").write_bytes(b"of another system")
    (tmp_path / "set" / "readme.txt").write_text("not an image")
    images = load_images(tmp_path / "set")
    assert images.ids == ["a/Z.PNG", "b/000.png", "b/001.png"]
    assert images.labels == ["a", "b", "b"]
    assert (images.name, images.size, images.partial) == ("set", None, "")
    assert np.array_equal(np.asarray(images.image(1)), random_pixels(2)[0])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: load_images("cifar11/test"), "'cifar11/test' is neither"),
        (lambda: load_images(""), "'' is neither"),
        (lambda: load_images("given"), "2 other files, none of them an image"),
        (lambda: one_image(b"no image").image(0), r"the-name\.png"),
        (lambda: one_image(Path("gone.png")).image(0), r"the-name\.png.*gone"),
        (lambda: from_parquet(Path("given/no_image"), name=""), "no_image is not a readable"),
        (lambda: from_parquet(Path("given/no_struct"), name=""), "no_struct is not a readable"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(call, told):
    Path("given").mkdir()
    pq.write_table(pa.table({"pixels": [1]}), "given/no_image")
    pq.write_table(pa.table({"image": [b"no struct"], "label": ["a"]}), "given/no_struct")
    with pytest.raises(UserError, match=told) as error:
        call()
    one_sentence(error)


def test_what_is_left_out_of_a_folder_is_counted(tmp_path):
    folder = write_folder(tmp_path / "photos", 2)
    for name in ("._a.png", ".hid.png", ".thumbnails/a.png", "__MACOSX/a.png", "Thumbs.db", "raw"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"?")
    (folder / "linked").symlink_to(tmp_path, target_is_directory=True)
    images = load_images(folder)
    assert images.ids == ["000.png", "001.png"]
    expected = {"4 hidden files", "2 other files", "1 linked or closed folders"}
    assert set(images.left_out.split(", ")) == expected


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"


def test_what_is_not_read_has_a_reason_and_starts_no_interpreter(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("interpreted"))
    (tmp_path / "set").mkdir()
    for name in ("a.eps", "b.png", "c.pdf", "d.svg", "e.NEF", "f.HEIC"):
        (tmp_path / "set" / name).write_bytes(EPS)
    Image.fromarray(np.full((9, 9), np.inf, np.float32)).save(tmp_path / "set" / "g.tif")
    images = load_images(tmp_path / "set")
    kind = "files of its kind are not read; save it as PNG or JPEG"
    reasons = dict(zip(images.ids, [images.attempt(i)[1] for i in range(7)], strict=True))
    assert [reasons[name] for name in ("a.eps", "c.pdf", "d.svg", "e.NEF")] == [kind] * 4
    assert "no image of a format" in reasons["b.png"]
    assert "pip install 'dlsr[heic]'" in reasons["f.HEIC"]
    assert "NaN or infinite" in reasons["g.tif"]


@pytest.mark.parametrize("form", ["HEIF", "AVIF"])
def test_photos_of_phones_are_read_where_a_decoder_is(form):
    if form not in data.formats():
        pytest.skip("there is no decoder")
    pixels = np.full((40, 60, 3), 100, np.uint8)
    assert np.abs(as_rgb(pixels, form).astype(int) - 100).max() < 8


def test_the_limit_of_pixels_and_a_decoder_are_part_of_what_a_set_is(tmp_path, monkeypatch):
    images = load_images(write_folder(tmp_path / "photos", 2, size=(20, 20)))
    before = images.sha256
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "it has more than 200 pixels; see --max-pixels" in images.attempt(0)[1]
    assert replace(images).sha256 != before
    monkeypatch.undo()
    hashes = set()
    for known in (["PNG"], ["PNG", "HEIF"]):
        monkeypatch.setattr(data, "formats", lambda known=known: known)
        hashes.add(replace(images, ids=["000.heic", "001.png"]).sha256)
    assert len(hashes) == 2


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"])
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_readable_or_refused_by_name(form):
    """The file is cut short at many places, and has a few bytes changed."""
    whole, picks = encoded(random_pixels(1, size=(16, 16))[0], form), np.random.RandomState(0)
    refused = []
    for i in range(100):
        content = np.frombuffer(whole[: i * len(whole) // 40], np.uint8).copy()
        if i >= 40:
            content[picks.randint(len(whole), size=3)] = picks.randint(256, size=3)
        try:
            assert one_image(content.tobytes()).image(0).mode == "RGB"
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 5
    assert all("the-name.png" in text and "skip" in text for text in refused)


# Colours and orientation

PALETTE = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
PALETTE.putpalette([255, 0, 0, 0, 0, 255])
CLEAR = np.array([[[200, 0, 0, 0], [200, 0, 0, 51], [200, 0, 0, 255]]], np.uint8)


@pytest.mark.parametrize(
    ("pixels", "options", "seen"),
    [
        (np.array([[7, 90]], np.uint8), {}, [[7] * 3, [90] * 3]),
        (np.array([[True, False]]), {}, [[255] * 3, [0] * 3]),
        # A fifth of the colour on white is 0.2 x (200, 0, 0) + 0.8 x 255.
        (CLEAR, {}, [[255] * 3, [244, 204, 204], [200, 0, 0]]),
        (Image.fromarray(np.array([[[0, 0], [0, 255]]], np.uint8), "LA"), {}, [[255] * 3, [0] * 3]),
        (PALETTE, {}, [[255, 0, 0], [0, 0, 255]]),
        (PALETTE, {"transparency": 0}, [[255, 255, 255], [0, 0, 255]]),
        (np.array([[256, 25700, 65535]], np.uint16), {}, [[1] * 3, [100] * 3, [255] * 3]),
    ],
)
def test_every_kind_of_image_becomes_rgb_on_white(pixels, options, seen):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    assert as_rgb(image, **options)[0].tolist() == seen


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("tag", "turn"), [(1, None), (3, "ROTATE_180"), (6, "ROTATE_270"), (8, "ROTATE_90")])
def test_an_image_is_turned_as_its_exif_tag_says(form, tag, turn):
    """A camera held upright writes lying pixels and tag 6."""
    pixels, exif = random_pixels(1, size=(24, 16))[0], Image.Exif()
    exif[0x0112] = tag
    lying = Image.fromarray(as_rgb(pixels, form))
    turned = lying.transpose(Image.Transpose[turn]) if turn else lying
    assert turned.size == ((24, 16) if tag > 4 else (16, 24))
    assert np.array_equal(as_rgb(pixels, form, exif=exif), np.asarray(turned))


def test_a_pick_is_the_same_in_every_call_and_on_every_machine(tmp_path):
    folder = write_folder(tmp_path / "photos", 10)
    images, chosen = load_images(folder), load_images(folder, n=4)
    assert chosen.ids == ["002.png", "004.png", "008.png", "009.png"]
    assert np.array_equal(pixels_of(chosen), pixels_of(images)[[2, 4, 8, 9]])
    assert load_images(folder, n=4, seed=1).ids != chosen.ids
    assert len(load_images(folder, n=5000)) == len(load_images(folder, n=0)) == 10
    again = image_set(9).take([7, 3, 5]).take([2, 0])
    assert (again.ids, again.labels, again.size) == (["image5", "image7"], ["1", "1"], (6, 5))
    assert np.array_equal(pixels_of(again), random_pixels(9)[[5, 7]])


def write_pack(file, n=5, *, seed=0, per_group=2):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = random_pixels(n, seed=seed)
    rows = [{"bytes": encoded(p), "path": f"{i}.png"} for i, p in enumerate(pixels)]
    table = pa.table({"image": rows, "label": [str(i % 2) for i in range(n)]})
    pq.write_table(table, file, row_group_size=per_group)
    return pixels


def written(place, kind, *, seed=0, seconds=1):
    """Return a set of five images in files of a given time."""
    path = place / kind
    if kind == "pack":
        write_pack(path, seed=seed)
    for file in [path] if kind == "pack" else write_folder(path, 5, seed=seed).iterdir():
        os.utime(file, (seconds, seconds))
    return from_parquet(path, name="pack") if kind == "pack" else load_images(path)


@pytest.mark.parametrize("kind", ["folder", "pack"])
def test_hashes_are_kept_and_a_changed_file_is_noticed(kind, tmp_path, monkeypatch):
    """A second start reads no image; other images under the same name give other features."""
    reads, read, get = [], Path.read_bytes, data.ParquetImages.__getitem__
    listen = lambda get: lambda one, *row: reads.append(row) or get(one, *row)  # noqa: E731
    monkeypatch.setattr(Path, "read_bytes", listen(read))
    monkeypatch.setattr(data.ParquetImages, "__getitem__", listen(get))
    hashes, values = [], []
    for seed, seconds in ((0, 1), (1, 2), (0, 3)):
        images = written(tmp_path, kind, seed=seed, seconds=seconds)
        hashes.append(images.sha256)
        assert len(reads) == 5
        assert replace(images).sha256 == hashes[-1]
        assert len(reads) == 5
        values.append(extract(images, FakeEncoder(), progress=False).raw())
        reads.clear()
    assert hashes[0] == hashes[2] != hashes[1]
    assert np.array_equal(values[0], values[2])
    assert np.abs(values[0] - values[1]).max() > 0.1


def test_resizing_goes_step_by_step_as_height_and_width_and_averages_all_pixels():
    image = Image.fromarray(random_pixels(1, size=(40, 30))[0])
    small = image.resize((4, 8), Image.Resampling.BOX)
    twice = small.resize((224, 224), Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(resize(image, [(8, 4, "box"), FULL])), np.asarray(twice))
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)  # becomes grey, not a sample
    small = np.asarray(resize(Image.fromarray(board), [(8, 8)]))
    assert np.abs(small.astype(int) - 127).max() <= 3


# Packs, and folders of registered sets


@pytest.fixture
def register(monkeypatch, tmp_path):
    """Return a function that changes a registered set's row; DLSR_DATA is a folder of its own."""
    monkeypatch.setenv("DLSR_DATA", str(tmp_path / "data"))

    def change(key, **changes):
        monkeypatch.setitem(registry(), key, SimpleNamespace(**vars(registry()[key]) | changes))
        return data.data_folder() / f"{key}.parquet"

    return change


@pytest.mark.parametrize(("per_group", "groups"), [(1, [4, 0, 3, 1, 2]), (2, [2, 0, 1, 0, 1]), (5, [0])])
def test_a_pack_is_read_back_and_an_image_costs_its_row_group_at_most(
    register, per_group, groups, monkeypatch
):
    asked, read = [], pq.ParquetFile.iter_batches
    spy = lambda *one, **options: asked.extend(options["row_groups"]) or read(*one, **options)  # noqa: E731
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    pixels = write_pack(register("cifar10/test", images=5, size=(6, 5)), per_group=per_group)
    images, order = load_images("cifar10/test"), [4, 0, 3, 1, 2]
    assert images.ids == [f"{i}.png" for i in range(5)]
    assert (images.name, images.size, images.labels) == ("cifar10/test", (6, 5), list("01010"))
    assert np.array_equal(pixels_of(images.take(order)), pixels[order])
    assert asked == groups


@pytest.mark.parametrize("per_group", [100, 4200])
def test_a_pack_over_2_gib_is_read(per_group, tmp_path):
    """The file is small, because zeros compress; Arrow refuses to join such a column."""
    file, size = tmp_path / "large.parquet", 1 << 19
    cells = [[{"bytes": bytes([i]) + bytes(size), "path": str(i)}] for i in range(2)]
    common, last = map(pa.array, cells)
    column = pa.chunked_array([common] * 4199 + [last])
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    table = pa.table({"image": column, "label": ["a"] * 4200})
    pq.write_table(table, file, row_group_size=per_group, **options)
    images = from_parquet(file, name="large")
    assert len(images) * size > 2**31
    assert images.ids == ["0"] * 4199 + ["1"]
    for i in (0, 4199):
        assert (images.source[i][0], len(images.source[i])) == (int(images.ids[i]), size + 1)


@pytest.mark.parametrize(("here", "partial"), [(5, "5 of 9"), (9, ""), (4, None)])
def test_a_pack_needs_its_count_or_the_published_one(here, partial, register):
    about = {"images": 5, "size": (6, 5), "whole": 9, "partial": "5 of 9"}
    write_pack(register("cifar10/test", **about), here)
    if partial is None:
        with pytest.raises(UserError, match="cifar10/test has 4 images here; 5 or 9 are needed"):
            load_images("cifar10/test")
    else:
        assert load_images("cifar10/test").partial == partial
        assert load_images("cifar10/test", n=2).partial.endswith(f"a pick of 2 of {here} images")


def test_a_folder_may_stand_for_a_registered_set(register):
    """It is whole, needs the published count, and has the registered size only if it does."""
    file = register("cifar10/test", images=5, size=(6, 5), whole=9, partial="5 of 9")
    folder = write_folder(file.with_suffix("") / "cat", 5)
    with pytest.raises(UserError, match="has 5 images here; 9 are needed"):
        load_images("cifar10/test")
    for size, known in (((6, 5), (6, 5)), ((12, 10), None)):
        write_folder(folder, 9, size=size)
        images = load_images("cifar10/test")
        assert (images.name, images.labels, images.partial) == ("cifar10/test", ["cat"] * 9, "")
        assert images.size == known


def unreachable(*_, **__):
    raise OSError("no route to the host")


@pytest.mark.parametrize("key", ["cifar10/test", "lsun_resize/test", "imagenet100/train"])
def test_a_missing_set_says_where_to_put_it_and_what_needs_no_data(key, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", unreachable)
    monkeypatch.setattr("dlsr.downloads.download_and_extract_archive", unreachable)
    with pytest.raises(UserError, match=f"The image set {key} is not here") as error:
        load_images(key)
    text = one_sentence(error)
    assert f"$DLSR_DATA/{key}/<class>/" in text
    assert "'demo' needs no data" in text
    assert (f"$DLSR_DATA/{key}.parquet" in text) is key.startswith("cifar")
    assert ("no route" in text) is not key.startswith("imagenet")


# Downloads


class FakeCIFAR10(list):
    """torchvision's class: it fails the first time, then has three images."""

    asked, targets = [], torch.tensor([1, 0, 1])

    def __init__(self, root, *, train, download):
        super().__init__((Image.fromarray(pixels), 1) for pixels in random_pixels(3))
        self.asked.append((Path(root), train, download))
        if len(self.asked) == 1:
            raise RuntimeError("Dataset not found or corrupted.")


def test_a_set_of_torchvision_is_asked_for_until_it_is_whole(register, monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
    register("cifar10/train", images=3, size=(6, 5))
    with pytest.raises(UserError, match=r"could not be downloaded .*corrupted"):
        load_images("cifar10/train")
    for _ in range(2):
        images = load_images("cifar10/train")
        assert (images.labels, images.size) == (["1", "0", "1"], (6, 5))
        assert np.array_equal(pixels_of(images), random_pixels(3))
    place = tmp_path / "cache" / "torchvision" / "cifar10"
    assert FakeCIFAR10.asked == [(place, True, download) for download in (True, True, False)]


PIXELS = random_pixels(4, seed=5, size=CIFAR)
FILES = {
    "top/images/b/2.png": encoded(PIXELS[2]),
    "top/images/a/0.png": encoded(PIXELS[0]),
    "./top/images/a/1.png": encoded(PIXELS[1]),
    "top/images/a/._1.png": b"of another system",
    "top/images/a/empty.png": b"",
    "top/images/readme.txt": b"not an image",
    "top/other/3.png": encoded(PIXELS[3]),
}
ABOUT = {"folder": "top/images", "pattern": "*.png", "images": 3}


def archive_of(files, name="set.tar.gz"):
    buffer = io.BytesIO()
    if name == "set.zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            for file, content in files.items():
                archive.writestr(file, content)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for file, content in files.items():
            member = tarfile.TarInfo(file)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def put(register):
    """Return a function that registers a set's archive and puts the file where it is looked for."""

    def put(content, key="lsun_resize/test", *, name="set.tar.gz", **changes):
        url, md5 = f"https://host.example/place/{name}?dl=1", hashlib.md5(content).hexdigest()
        file = register(key, **{"url": url, "md5": md5, "whole": 0} | changes)
        file = file.parents[1] / "downloads" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file

    return put


@pytest.mark.parametrize("name", ["set.tar.gz", "set.zip"])
def test_an_archive_is_got_and_unpacked_once_and_its_set_is_read(name, put, monkeypatch):
    """It may lie there, or is downloaded."""
    content, asked = archive_of(FILES, name), []
    file = put(content, name=name, **ABOUT)

    def download(url, file):
        asked.append(url)
        Path(file).write_bytes(content)

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", download)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
    for place in ("given", "downloaded"):
        monkeypatch.setenv("DLSR_CACHE", place)
        for _ in range(2):
            images = load_images("lsun_resize/test")
            assert images.name == "lsun_resize/test"
            assert images.ids == ["a/0.png", "a/1.png", "b/2.png"]
            assert (images.labels, images.size) == (["a", "a", "b"], CIFAR)
            assert np.array_equal(pixels_of(images), PIXELS[:3])
            file.unlink(missing_ok=True)  # the second time it is not needed
    assert asked == [f"https://host.example/place/{name}?dl=1"]


ARCHIVES = [key for key, row in registry().items() if row.url]
LAYOUTS = """notMNIST_small/A/a.png tiny-imagenet-200/val/images/val_b.JPEG LSUN/test/c.png
LSUN_resize/LSUN_resize/d.png iSUN/iSUN_patches/e.jpeg SUN/images/f.jpg iNaturalist/images/g.jpg"""


@pytest.mark.parametrize(("key", "layout"), [*zip(ARCHIVES, LAYOUTS.split(), strict=True)])
def test_a_published_archive_is_read_in_its_layout(key, layout, put):
    put(archive_of(dict.fromkeys(LAYOUTS.split(), encoded(PIXELS[0]))), key, images=1)
    assert [Path(name).name for name in load_images(key).ids] == [Path(layout).name]


@pytest.mark.parametrize(
    ("cut", "changes", "told"),
    [
        (None, {"md5": "0" * 32}, "could not be downloaded"),
        (-200, {}, "could not be downloaded"),
        (None, {"images": 4}, "has 3 images here; 4 are needed"),
        (None, {"folder": "top/none"}, "none of them an image"),
    ],
)
def test_an_archive_of_something_else_is_refused(cut, changes, told, put, monkeypatch):
    def no_network(url, place):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
    file = put(archive_of(FILES)[:cut], **ABOUT | changes)
    for _ in range(2):  # what is left of it is not taken for the set later
        with pytest.raises(UserError, match=told) as error:
            load_images("lsun_resize/test")
        one_sentence(error)
    assert file.is_file()
