from dataclasses import replace

import numpy as np
import pytest
from conftest import FakeEncoder, image_set, one_sentence

from dlsr import comparison as module
from dlsr.comparison import (
    CONTROLS,
    DEMO_SETS,
    DEVELOPMENT,
    FAR,
    NEAR,
    PACK_SETS,
    REPORT,
    STUDIES,
    VIEWS,
    Data,
    OODSet,
    Study,
    lists,
    pick,
    rows_of,
    split,
    superclasses,
)
from dlsr.datasets import DATASETS, UserError, load_images, recompressed, resized
from dlsr.training import TrainingSettings

# The split


@pytest.mark.parametrize(("n", "held_out"), [(50_000, 5000), (721, 240), (10, 2), (11, 5), (9, 8)])
def test_a_split_covers_all_rows_once(n, held_out):
    found = split(n, held_out)
    parts = (found.fit, found.calibration, found.development)
    assert [len(part) for part in parts] == [n - held_out, held_out // 2, held_out - held_out // 2]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))
    assert all(np.array_equal(part, np.sort(part)) for part in parts)


def test_a_split_is_the_same_in_every_call_and_on_every_machine():
    one, same, other = split(20, 6), split(20, 6, seed=0), split(20, 6, seed=1)
    assert (one.calibration.tolist(), one.development.tolist()) == ([1, 18, 19], [8, 10, 17])
    assert np.array_equal(one.fit, same.fit)
    assert not np.array_equal(one.fit, other.fit)


@pytest.mark.parametrize("held_out", [-1, 0, 1, 10, 11])
def test_a_split_that_leaves_a_part_empty_is_refused(held_out):
    with pytest.raises(UserError, match=rf"held_out={held_out} of 10 .*2\.\.9"):
        split(10, held_out)


# The committed lists


def test_cifar100_has_20_superclasses_of_5_classes():
    groups = lists()["superclasses"]
    assert len(groups) == 20
    assert {len(names) for names in groups.values()} == {5}
    assert len({name for names in groups.values() for name in names}) == 100


def test_development_has_the_first_ten_superclasses_of_numpys_permutation():
    groups = sorted(lists()["superclasses"])
    drawn = {groups[i] for i in np.random.RandomState(0).permutation(20)[:10]}
    assert set(lists()["development_superclasses"]) == drawn
    assert len(lists()["development_superclasses"]) == 10


def test_the_halves_of_cifar100_share_no_class():
    halves = [set(superclasses(development=development)) for development in (True, False)]
    assert [len(half) for half in halves] == [50, 50]
    assert not halves[0] & halves[1]
    for group, names in lists()["superclasses"].items():
        assert set(names) <= halves[group not in lists()["development_superclasses"]]


def test_overlapping_classes_are_classes_of_their_sets():
    overlap = lists()["overlap"]
    assert set(overlap) <= {ood.dataset for ood in PACK_SETS if ood.stage == REPORT}
    assert set(overlap["cifar100/test"]) <= set(superclasses(development=True)) | set(
        superclasses(development=False)
    )
    id_classes = {
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    }  # fmt: skip
    for kinds in overlap.values():
        for kind in kinds.values():
            assert set(kind.partition(" (")[0].split(", ")) <= id_classes


@pytest.mark.real_data("DLSR_DATA")
def test_the_lists_are_of_classes_that_the_images_have():
    labels = {name: set(load_images(name).labels) for name in lists()["overlap"]}
    assert labels["cifar100/test"] == {name for half in module.CLASSES.values() for name in half}
    for name, kinds in lists()["overlap"].items():
        assert set(kinds) <= labels[name]


# The registry


@pytest.mark.parametrize("sets", [PACK_SETS, DEMO_SETS], ids=["pack", "demo"])
def test_no_image_is_in_both_stages(sets):
    assert len({ood.name for ood in sets}) == len(sets)
    for one in sets:
        for other in sets:
            if one != other and one.dataset == other.dataset:
                assert one.classes
                assert not set(one.classes) & set(other.classes)
    for stage in (DEVELOPMENT, REPORT):
        assert {ood.group for ood in sets if ood.stage == stage} == {NEAR, FAR}


def test_studies_are_of_registered_sets():
    for studies in STUDIES.values():
        for study in studies:
            assert {ood.dataset for ood in study.sets} <= set(DATASETS)
            assert not {study.id_train, study.id_test} & {ood.dataset for ood in study.sets}
            assert study.id_size == DATASETS[study.id_test].size
            assert {one for stage in (DEVELOPMENT, REPORT) for one in study.of(stage)} == set(study.sets)
    first, *others = STUDIES["pack"]
    assert all(study.sets == first.sets for study in others)


# Picks and rows


def test_a_pick_is_seeded_and_in_order():
    rows = np.arange(100, 140)
    assert pick(rows, 5).tolist() == [104, 110, 120, 122, 125]
    assert np.array_equal(pick(rows, 12), pick(rows, 12))
    assert set(pick(rows, 12)) <= set(rows)
    for n in (40, 41):
        assert np.array_equal(pick(rows, n), rows)


def test_rows_of_classes():
    images = replace(image_set(6), labels=list("abcabc"))
    assert rows_of(images, ("c", "a")).tolist() == [0, 2, 3, 5]
    assert rows_of(images, ()).tolist() == list(range(6))
    with pytest.raises(UserError, match="noise has no images of the classes d, e") as error:
        rows_of(images, ("e", "a", "d"))
    assert one_sentence(error)


# Data

ID_SIZE, LARGE = (8, 8), (20, 30)
NEAR_SET = OODSet("near", "near", "digits_8_9/test", NEAR, DEVELOPMENT)
FAR_SET = OODSet("far", "far", "photo_patches/test", FAR, REPORT)
STUDY = Study(
    "fake",
    (NEAR_SET, FAR_SET),
    TrainingSettings(width=8, blocks=1, epochs=1),
    "digits/train",
    "digits/test",
    held_out=4,
    n_ood=9,
    n_filters=5,
    n_control=4,
    n_control_fit=6,
)


def with_pixels(images, pixels):
    """The same set with some of its pixels replaced."""
    return replace(images, read=lambda i: pixels.get(i, images.read(i)))


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
    monkeypatch.setattr(module, "get_encoder", lambda name: FakeEncoder())
    return sets


def data(study=STUDY):
    return Data(study, progress=False)


def test_images_that_are_id_images_are_left_out(sets):
    near = sets["digits_8_9/test"]
    same = {2: sets["digits/train"].read(11), 7: sets["digits/test"].read(0)}
    sets["digits_8_9/test"] = with_pixels(near, same)
    found = data()
    assert found.same_as_id("digits_8_9/test").tolist() == [2, 7]
    assert found.rows(NEAR_SET).tolist() == [i for i in range(15) if i not in same]
    assert found.rows(replace(NEAR_SET, name="odd", classes=("1",))).tolist() == [1, 3, 5, 9, 11, 13]


def test_images_of_unknown_size_are_compared_too(sets):
    far = with_pixels(sets["photo_patches/test"], {4: sets["digits/test"].read(3)})
    sets["photo_patches/test"] = replace(far, size=None)
    assert data().same_as_id("photo_patches/test").tolist() == [4]


def test_images_of_another_size_are_no_id_images(sets, monkeypatch):
    def refuse(images):
        raise AssertionError("no pixel needs to be compared")

    monkeypatch.setattr(module, "pixel_hashes", refuse)
    assert not len(data().same_as_id("photo_patches/test"))


def test_far_sets_are_bounded_and_near_ones_whole(sets):
    found = data(replace(STUDY, n_ood=9))
    assert np.array_equal(found.rows(FAR_SET), pick(np.arange(14), 9))
    assert found.rows(NEAR_SET).tolist() == list(range(15))


def test_the_matched_view_of_a_set_of_the_id_size_is_the_native_one(sets):
    found = data()
    native, matched = (found.of_ood(NEAR_SET, view) for view in VIEWS[:2])
    np.testing.assert_array_equal(native.values, matched.values)
    picked = pick(np.arange(15), 5)
    for view in VIEWS[2:]:
        few = found.of_ood(NEAR_SET, view)
        np.testing.assert_allclose(few.values, native.values[picked], atol=1e-5)
        assert few.ids == [native.ids[i] for i in picked]


def encoded_as(images):
    """Features of an image set as it is."""
    return module.extract(images, FakeEncoder(), progress=False).values


def test_views_bring_images_to_the_id_size_by_their_filter(sets):
    found, rows = data(), pick(np.arange(14), 9)
    far = sets["photo_patches/test"].take(rows)
    views = {view: found.of_ood(FAR_SET, view) for view in VIEWS}
    assert [len(views[view]) for view in VIEWS] == [9, 9, 5, 5]
    few = pick(rows, 5)
    for view, wanted in {
        "native": far,
        "matched": resized(far, ID_SIZE),
        "matched, bicubic": resized(sets["photo_patches/test"].take(few), ID_SIZE, filter="bicubic"),
        "matched, box": resized(sets["photo_patches/test"].take(few), ID_SIZE, filter="box"),
    }.items():
        np.testing.assert_allclose(views[view].values, encoded_as(wanted), atol=1e-5)
        assert list(views[view].ids) == list(wanted.ids)
    assert np.abs(views["native"].values - views["matched"].values).max() > 0.01
    assert np.abs(views["matched, box"].values - views["matched, bicubic"].values).max() > 0.01


def test_controls_alter_the_same_pick_of_id_images(sets):
    found = data()
    images = sets["digits/test"].take(pick(np.arange(7), 4))
    for control, wanted in {
        "": images,
        "half": resized(images, (4, 4)),
        "double": resized(images, (16, 16)),
        "jpeg": recompressed(images, quality=75),
    }.items():
        features = found.of_control("digits/test", control)
        np.testing.assert_allclose(features.values, encoded_as(wanted), atol=1e-5)
        assert list(features.ids) == list(images.ids)
    assert set(CONTROLS) == {"half", "double", "jpeg"}


def test_controls_are_fitted_on_images_that_are_fitted_on(sets):
    found = data()
    half = found.of_control("digits/train", "half")
    rows = pick(found.split.fit, 6)
    assert list(half.ids) == [sets["digits/train"].ids[i] for i in rows]
    assert not set(rows) & {*found.split.calibration, *found.split.development}


def test_a_set_is_loaded_once(sets, monkeypatch):
    loaded = []
    monkeypatch.setattr(module, "load_images", lambda name: (loaded.append(name), sets[name])[1])
    found = data()
    for _ in range(2):
        found.rows(NEAR_SET)
        found.rows(FAR_SET)
        found.of_id("digits/train")
    assert sorted(loaded) == sorted(sets)


def test_the_demos_sets_are_there():
    """Without features: its images, its split, and that digits are no patches of photographs."""
    (study,) = STUDIES["demo"]
    found = data(study)
    assert len(found.split.fit) == 721 - 240
    by_name = {ood.name: len(found.rows(ood)) for ood in study.sets}
    assert by_name == {"digit_8": 174, "china": 200, "digit_9": 180, "flower": 200}
    for ood in study.sets:
        assert set(found.images(ood.dataset).take(found.rows(ood)).labels) == set(ood.classes)
        assert found.images(ood.dataset).size == study.id_size
    assert study.n_control_fit <= len(found.split.fit)
    assert resized(found.images(study.id_test), (4, 4)).image(0).size == (4, 4)
