import io
from dataclasses import replace

import numpy as np
import pytest
from dlsr.data import ImageSet, load_images, registry
from dlsr.errors import UserError
from dlsr.features import extract
from dlsr.study import protocol as module
from dlsr.study.protocol import (
    CLASSES,
    DEMO,
    PROTOCOLS,
    RESOLUTIONS,
    Data,
    OODSet,
    overlaps,
    pick,
    split,
    standardiser,
    take,
)
from PIL import Image

from conftest import FakeEncoder, encoded, image_set, one_sentence, write_folder

ID_SIZE, LARGE = (8, 8), (20, 30)
NEAR = OODSet("demo", "near", "near", "digits_8_9/test", "near", "development")
FAR = OODSet("demo", "far", "far", "photo_patches/test", "far", "report")
NUMBERS = {"held_out": 4, "n_ood": 9, "n_filters": 5, "n_control": 4, "n_control_fit": 6}
SMALL = replace(DEMO, encoder="fake", sets=(NEAR, FAR), **NUMBERS)


# The split and the sets


@pytest.mark.parametrize(("n", "held_out"), [(50_000, 5000), (721, 240), (10, 2), (11, 5), (9, 8)])
def test_a_split_covers_all_rows_once(n, held_out):
    parts = split(n, held_out)
    sizes = {name: len(rows) for name, rows in parts.items()}
    half = held_out // 2
    assert sizes == {"fit": n - held_out, "calibration": half, "development": held_out - half}
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(n))
    assert all(np.array_equal(rows, np.sort(rows)) for rows in parts.values())


def test_split_and_pick_are_the_same_on_every_machine():
    parts = split(20, 6)
    assert parts["calibration"].tolist() == [1, 18, 19]
    assert parts["development"].tolist() == [8, 10, 17]
    rows = np.arange(100, 140)
    assert pick(rows, 5).tolist() == [104, 110, 120, 122, 125]
    assert np.array_equal(pick(rows, 40), rows)
    assert np.array_equal(pick(rows, 41), rows)


def test_the_halves_of_cifar100_are_drawn_and_share_no_class():
    groups = CLASSES["superclasses"]
    assert {len(names) for names in groups.values()} == {5}
    drawn = {sorted(groups)[i] for i in np.random.RandomState(0).permutation(20)[:10]}
    assert set(CLASSES["development_superclasses"]) == drawn
    halves = {ood.stage: ood for ood in PROTOCOLS["pack"][0].sets if "cifar100" in ood.name}
    assert set(halves["development"].classes.split(";")) == drawn
    labels = [set(ood.labels) for ood in halves.values()]
    assert [len(part) for part in labels] == [50, 50]
    assert not labels[0] & labels[1]


@pytest.mark.parametrize("protocol", [one for each in PROTOCOLS.values() for one in each])
def test_no_image_is_in_two_sets(protocol):
    sets = protocol.sets
    assert {one.dataset for one in sets} <= set(registry())
    assert not {protocol.id_train, protocol.id_test} & {one.dataset for one in sets}
    assert len({one.name for one in sets}) == len(sets)
    for one in sets:
        for other in sets:
            if one != other and one.dataset == other.dataset:
                assert one.labels and not set(one.labels) & set(other.labels)
    for stage in ("development", "report"):
        assert {one.group for one in protocol.of(stage)} == {"near", "far"}


def test_overlapping_classes_by_the_committed_list():
    labels = np.array(["apple", "wolf", "pickup_truck", "bear"])
    assert overlaps("cifar100/test", labels).tolist() == [False, True, True, False]
    assert not overlaps("svhn/test", labels).any()
    reported = {ood.dataset for ood in PROTOCOLS["pack"][0].of("report")}
    assert set(CLASSES["overlap"]) <= reported


@pytest.mark.real_data("DLSR_DATA")
def test_the_lists_are_of_classes_that_the_images_have():
    for ood in PROTOCOLS["pack"][0].sets:
        assert set(ood.labels) <= set(load_images(ood.dataset).labels)
    for name, classes in CLASSES["overlap"].items():
        assert set(classes) <= set(load_images(name).labels)


# Images and features


def with_pixels(images, pixels):
    """Return the same set with some of its pixels replaced."""
    source = [pixels.get(i, images.source[i]) for i in range(len(images))]
    return replace(images, source=source)


@pytest.fixture
def sets(monkeypatch):
    """Noise: ID of 8x8, near OOD of the same size, far OOD of another."""
    sets = {
        "digits/train": image_set(12, seed=0, size=ID_SIZE, name="train"),
        "digits/test": image_set(7, seed=1, size=ID_SIZE, name="test"),
        "digits_8_9/test": image_set(15, seed=2, size=ID_SIZE, name="near"),
        "photo_patches/test": image_set(14, seed=3, size=LARGE, name="far"),
    }
    monkeypatch.setattr(module, "load_images", sets.__getitem__)
    monkeypatch.setattr(module, "create_encoder", lambda name: FakeEncoder())
    return sets


def seen(images, *sizes, resample="BILINEAR", jpeg=False):
    """Return the encoder's features of images that are first resized or compressed by hand."""
    pixels = []
    for i in range(len(images)):
        image = images.image(i)
        if jpeg:
            image = Image.open(io.BytesIO(encoded(image, "JPEG", quality=75)))
        for height, width in sizes:
            image = image.resize((width, height), Image.Resampling[resample])
        pixels.append(np.asarray(image))
    by_hand = ImageSet(images.name, images.ids, images.labels, pixels, sizes[-1] if sizes else None)
    return extract(by_hand, FakeEncoder(), progress=False).values


def test_id_images_are_left_out_of_ood_sets(sets):
    same = {2: sets["digits/train"].source[11], 7: sets["digits/test"].source[0]}
    sets["digits_8_9/test"] = with_pixels(sets["digits_8_9/test"], same)
    data = Data(SMALL)
    names = [f"image{i}" for i in range(15) if i not in same]
    assert list(data.ood_images(NEAR).ids) == names
    odd = replace(NEAR, classes="1")
    assert list(data.ood_images(odd).ids) == [f"image{i}" for i in (1, 3, 5, 9, 11, 13)]
    far = with_pixels(sets["photo_patches/test"], {4: sets["digits/test"].source[3]})
    sets["photo_patches/test"] = replace(far, size=None)
    assert "image4" not in Data(replace(SMALL, n_ood=99)).ood_images(FAR).ids


def test_far_sets_are_bounded_and_resized(sets):
    data, rows = Data(SMALL), pick(np.arange(14), 9)
    far = sets["photo_patches/test"].take(rows)
    few = far.take(pick(np.arange(9), 5))
    wanted = {
        "native": seen(far),
        "matched": seen(far, ID_SIZE),
        "bicubic": seen(few, ID_SIZE, resample="BICUBIC"),
        "box": seen(few, ID_SIZE, resample="BOX"),
    }
    assert tuple(wanted) == RESOLUTIONS
    for resolution, values in wanted.items():
        np.testing.assert_allclose(data.ood(FAR, resolution).values, values, atol=1e-5)
    assert np.abs(wanted["native"] - wanted["matched"]).max() > 0.01
    assert np.abs(wanted["box"] - wanted["bicubic"]).max() > 0.01


def test_a_set_of_the_id_size_is_the_same_at_every_resolution(sets):
    data = Data(SMALL)
    native = data.ood(NEAR, "native")
    assert len(native) == 15
    np.testing.assert_array_equal(native.values, data.ood(NEAR, "matched").values)
    for resolution in ("bicubic", "box"):
        few = data.ood(NEAR, resolution)
        np.testing.assert_allclose(few.values, native.values[pick(np.arange(15), 5)], atol=1e-5)


def test_controls_alter_the_same_pick_of_id_images(sets):
    data, images = Data(SMALL), sets["digits/test"].take(pick(np.arange(7), 4))
    for control, sizes in {"": (), "half": ((4, 4),), "double": ((16, 16),)}.items():
        features = data.altered("test", control)
        np.testing.assert_allclose(features.values, seen(images, *sizes), atol=1e-5)
        assert list(features.images.ids) == list(images.ids)
    jpeg = data.altered("test", "jpeg")
    assert list(jpeg.images.ids) == list(images.ids)
    np.testing.assert_allclose(jpeg.values, seen(images, jpeg=True), atol=1e-5)
    fitted = data.altered("fit", "half")
    rows = pick(data.split["fit"], 6)
    assert list(fitted.images.ids) == [f"image{i}" for i in rows]


def test_take_of_a_skipped_row_raises_instead_of_returning_its_neighbour(tmp_path):
    folder = write_folder(tmp_path / "photos")
    for name in ("001.png", "004.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
    found = extract(folder, FakeEncoder(), on_error="skip", progress=False)
    part = take(found, [5, 2])
    assert list(part.images.ids) == ["005.png", "002.png"]
    assert np.array_equal(part.values, found.values[[3, 1]])
    assert np.array_equal(np.asarray(part.images.image(0)), np.asarray(found.images.image(3)))
    assert take(part, [1]).images.ids == ["002.png"]  # counted anew
    for rows in ([1], [2, 4], [6], [-1]):
        with pytest.raises(UserError, match="skipped") as error:
            take(found, rows)
        one_sentence(error)


def test_the_parts_of_the_id_set(sets):
    data = Data(SMALL)
    whole = seen(sets["digits/train"])
    for part, rows in data.split.items():
        np.testing.assert_allclose(data.id_part(part).values, whole[rows], atol=1e-6)
    np.testing.assert_allclose(data.id_part("test").values, seen(sets["digits/test"]), atol=1e-6)
    raw = standardiser(data.id_part("fit"))(data.id_part("fit"))
    assert raw.dtype == np.float32
    np.testing.assert_allclose(raw.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(raw.std(axis=0), 1, atol=1e-4)
