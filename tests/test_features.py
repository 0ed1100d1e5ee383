import errno
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, FakeEncoder, image_set, one_sentence, write_folder

from dlsr import features as module
from dlsr.datasets import UserError, load_images
from dlsr.features import Features, extract, layer_slices, layer_zscore, load, replace_file


def quiet(images, encoder, **options):
    return extract(images, encoder, progress=False, **options)


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


# z0


def test_layer_slices():
    assert layer_slices((2, 3, 1)) == [slice(0, 2), slice(2, 5), slice(5, 6)]


def test_zscore_by_hand():
    raw = np.array([[1.0, 3.0, 2.0, 4.0, 9.0]], np.float32)
    z0 = layer_zscore(raw, (2, 3))
    first = 1 / (2**0.5 + 1e-5)  # mean 2, deviations -1 and 1, unbiased variance 2
    second = 13**0.5 + 1e-5  # mean 5, deviations -3, -1, 4, unbiased variance 26 / 2
    np.testing.assert_allclose(z0, [[-first, first, -3 / second, -1 / second, 4 / second]], rtol=1e-6)
    assert z0.dtype == np.float32


def test_the_squared_norm_is_the_sum_of_n_minus_1():
    channels = (24, 32, 56, 160, 448)
    raw = 5 + 3 * np.random.RandomState(0).randn(20, 720)
    z0 = layer_zscore(raw, channels)
    np.testing.assert_allclose((z0**2).sum(1), 715, rtol=1e-4)
    for layer in layer_slices(channels):
        np.testing.assert_allclose(z0[:, layer].mean(1), 0, atol=1e-6)


def test_zscore_does_not_see_a_layers_scale_and_offset():
    raw = np.random.RandomState(0).randn(4, 30)
    changed = np.concatenate([raw[:, :10] * 7 + 3, raw[:, 10:] * 0.5 - 1], axis=1)
    np.testing.assert_allclose(layer_zscore(raw, (10, 20)), layer_zscore(changed, (10, 20)), atol=1e-4)


def test_a_constant_layer_becomes_zeros():
    raw = np.array([[4.0, 4.0, 4.0, 1.0, 2.0]])
    assert layer_zscore(raw, (3, 2))[0, :3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_is_refused_with_a_count(bad):
    raw = np.random.RandomState(0).randn(5, 4)
    raw[[1, 3], 2] = bad
    with pytest.raises(UserError, match="2 of 5 images"):
        layer_zscore(raw, (2, 2))


def test_another_width_is_refused():
    with pytest.raises(UserError, match=r"4 columns.*\(2, 3\) need 5"):
        layer_zscore(np.zeros((1, 4)), (2, 3))


def test_poolings_are_told_apart(encoder):
    features = quiet(image_set(), encoder)
    assert np.array_equal(features.raw("gap"), features.values[:, 0])
    assert np.array_equal(features.raw("grid14"), features.values[:, 1])
    assert not np.array_equal(features.raw("gap"), features.raw("grid14"))
    np.testing.assert_array_equal(features.z0("grid14"), layer_zscore(features.values[:, 1], (3, 4, 5)))
    with pytest.raises(UserError, match="gap, grid14"):
        features.raw("max")


# The cache


def test_a_second_call_reads_the_cache_by_memory_map(encoder):
    first = quiet(image_set(), encoder)
    second = quiet(image_set(), encoder)
    assert encoder.images == 6
    assert isinstance(second.values, np.memmap)
    assert second.values.shape == (6, 2, 12)
    assert second.values.dtype == np.float32
    assert np.array_equal(first.values, second.values)
    assert second.ids == [f"image{i}" for i in range(6)]
    assert second.labels == ["0", "1"] * 3
    assert second.channels == (3, 4, 5)
    assert second.images_per_second > 0


def test_features_are_the_models_output_in_order(encoder):
    features = quiet(image_set(5), encoder, batch_size=2)
    alone = [quiet(image_set(5).take(np.array([i])), FakeEncoder(), batch_size=1) for i in range(5)]
    np.testing.assert_allclose(features.values, np.concatenate([one.values for one in alone]), rtol=1e-6)


def test_the_key_tells_weights_images_and_chain(encoder):
    base = quiet(image_set(), encoder).key
    others = [
        quiet(image_set(), FakeEncoder(sha256="b" * 64)).key,
        quiet(image_set(seed=1), encoder).key,
        quiet(image_set(), encoder, protocol="matched", id_size=(3, 3)).key,
        replace(base, encoder="another.in1k"),
        replace(base, layers=(1, 2)),
        replace(base, transform_version=base.transform_version + 1),
    ]
    folders = {key.folder() for key in (base, *others)}
    assert len(folders) == 7
    assert encoder.images == 18


def test_the_key_does_not_tell_a_sets_name(encoder):
    assert quiet(image_set(name="a"), encoder).key == quiet(image_set(name="b"), encoder).key
    assert encoder.images == 6


def test_a_set_of_the_id_size_is_the_same_in_both_protocols(encoder):
    native = quiet(image_set(), encoder)
    matched = quiet(image_set(), encoder, protocol="matched", id_size=(6, 5))
    assert native.key == matched.key
    assert encoder.images == 6


def test_matched_changes_what_the_model_sees(encoder):
    native = quiet(image_set(size=(30, 30)), encoder)
    matched = quiet(image_set(size=(30, 30)), encoder, protocol="matched", id_size=(4, 4))
    assert np.abs(native.values - matched.values).max() > 0.1


def test_a_subset_takes_its_rows_from_the_whole_set(encoder):
    images = image_set(20)
    whole = quiet(images, encoder)
    part = images.subset(7)
    features = quiet(part, encoder)
    assert encoder.images == 20
    assert features.ids == part.ids
    assert features.labels == part.labels
    assert np.array_equal(features.values, whole.values[part.rows])
    assert np.array_equal(features.rows, np.arange(7))


def test_a_subset_alone_is_extracted_alone(encoder):
    part = image_set(20).subset(7)
    assert quiet(part, encoder).ids == part.ids
    assert encoder.images == 7


def test_an_unknown_on_error_is_refused(encoder):
    with pytest.raises(UserError, match="raise, skip"):
        quiet(image_set(), encoder, on_error="ignore")


# Interruptions


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "PART", 4)


def interrupted(images, batches):
    """Parts of 4 in batches of 2, killed after so many batches."""
    with pytest.raises(KeyboardInterrupt):
        quiet(images, FakeEncoder(fail_after=batches), batch_size=2)


def test_a_killed_run_leaves_nothing_that_looks_finished_and_is_resumed(small_parts, encoder, monkeypatch):
    images = image_set(10)
    interrupted(images, 3)  # the first part and half of the second
    folders = list((module.cache_folder() / "features").iterdir())
    assert len(folders) == 1
    assert not (folders[0] / "features.json").exists()
    resumed = quiet(images, encoder, batch_size=2)
    assert encoder.images == 6
    monkeypatch.setenv("DLSR_CACHE", "fresh")
    np.testing.assert_array_equal(resumed.values, quiet(images, FakeEncoder(), batch_size=2).values)
    assert sorted(p.name for p in folders[0].iterdir()) == ["features.json", "features.npy", "rows.npy"]


def test_a_part_cut_short_is_done_again(small_parts, encoder):
    images = image_set(10)
    interrupted(images, 4)
    parts = sorted((module.cache_folder() / "features").rglob("*.npz"))
    assert len(parts) == 2
    parts[0].write_bytes(parts[0].read_bytes()[:-30])
    features = quiet(images, encoder, batch_size=2)
    assert encoder.images == 6  # the first part and the third
    assert len(features) == 10


@pytest.mark.parametrize("name", ["features.npy", "rows.npy", "features.json"])
def test_a_finished_file_cut_short_is_refused(name, encoder):
    folder = quiet(image_set(), encoder).key.folder()
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    with pytest.raises(UserError, match="cut short or damaged") as error:
        quiet(image_set(), encoder)
    text = one_sentence(error)
    assert "Delete that folder" in text
    assert str(folder) in text


def test_a_full_disk_loses_no_finished_part(small_parts, encoder, monkeypatch):
    images = image_set(10)
    calls = itertools.count()
    savez = np.savez
    monkeypatch.setattr(
        module.np, "savez", lambda *a, **k: savez(*a, **k) if next(calls) < 2 else disk_full()
    )
    with pytest.raises(UserError, match="No space left") as error:
        quiet(images, FakeEncoder(), batch_size=2)
    assert "DLSR_CACHE" in one_sentence(error)
    monkeypatch.setattr(module.np, "savez", savez)
    assert len(quiet(images, encoder, batch_size=2)) == 10
    assert encoder.images == 2


def test_a_disk_full_at_the_last_file_loses_nothing(small_parts, encoder, monkeypatch):
    images = image_set(10)
    with monkeypatch.context() as patched:
        patched.setattr(module.np.lib.format, "open_memmap", disk_full)
        with pytest.raises(UserError, match="No space left"):
            quiet(images, FakeEncoder(), batch_size=2)
    assert len(quiet(images, encoder, batch_size=2)) == 10
    assert encoder.images == 0


def test_replace_file_leaves_the_old_file_when_writing_fails(tmp_path):
    file = tmp_path / "new" / "file.txt"
    replace_file(file, lambda path: path.write_text("old"))

    def fail(path):
        path.write_text("half")
        disk_full()

    with pytest.raises(UserError, match=r"file\.txt could not be written .*No space") as error:
        replace_file(file, fail)
    one_sentence(error)
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


# Unreadable images


@pytest.fixture
def folder(tmp_path):
    """Six images, of which 001.png and 004.png are cut short."""
    folder = write_folder(tmp_path / "photos")
    for name in ("001.png", "004.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
    return folder


def test_an_unreadable_image_stops_the_run_by_name(folder, encoder):
    with pytest.raises(UserError, match=r"001\.png") as error:
        quiet(load_images(folder), encoder)
    one_sentence(error)


def test_an_image_that_vanished_is_told_by_name(tmp_path, encoder):
    images = load_images(write_folder(tmp_path / "photos", 3))
    (tmp_path / "photos" / "001.png").unlink()
    with pytest.raises(UserError, match=r"001\.png"):
        images.image(1)
    with pytest.raises(UserError, match=r"001\.png"):
        quiet(images, encoder)


def test_unreadable_images_may_be_skipped_and_are_counted(folder, encoder, capsys):
    features = quiet(load_images(folder), encoder, on_error="skip", batch_size=2)
    assert features.ids == ["000.png", "002.png", "003.png", "005.png"]
    assert features.rows.tolist() == [0, 2, 3, 5]
    assert len(features.values) == 4
    told = capsys.readouterr().out
    assert "2 of the 6" in told
    assert "001.png, 004.png" in told


def test_skipped_images_are_not_passed_over_in_silence_later(folder, encoder, capsys):
    for _ in range(2):
        quiet(load_images(folder), encoder, on_error="skip")
        assert "2 of the 6" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"2 of the 6 images .*001\.png") as error:
        quiet(load_images(folder), encoder, on_error="raise")
    one_sentence(error)


def test_a_subset_without_the_skipped_images_comes_from_the_cache(folder, encoder):
    images = load_images(folder)
    quiet(images, encoder, on_error="skip")
    features = quiet(images.take(np.array([2, 5])), encoder)
    assert features.ids == ["002.png", "005.png"]
    assert encoder.images == 4
    with pytest.raises(UserError, match=r"004\.png"):
        quiet(images.take(np.array([2, 4])), encoder)


def test_a_folder_of_only_unreadable_images_is_refused(tmp_path, encoder):
    folder = write_folder(tmp_path / "photos", 3)
    for file in folder.iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="None of the 3 images"):
        quiet(load_images(folder), encoder, on_error="skip")
    with pytest.raises(UserError, match="None of the 3 images"):
        quiet(load_images(folder), encoder, on_error="skip")


def test_load_wants_shapes_that_agree(encoder):
    features = quiet(image_set(), encoder)
    np.save(features.key.folder() / "rows.npy", np.arange(5))
    with pytest.raises(UserError, match="shapes disagree"):
        load(features.key, image_set())


def test_take_leaves_what_belongs_to_the_extraction(encoder):
    features = quiet(image_set(), encoder)
    part = features.take(np.array([1, 4]))
    assert isinstance(part, Features)
    assert (part.key, part.channels, part.device) == (features.key, features.channels, features.device)
    assert part.ids == ["image1", "image4"]


# Other code


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """The hash of a file that stands in the package's place."""
    monkeypatch.setattr(module, "__file__", str(tmp_path / "features.py"))

    def hash_of(source, *parts):
        (tmp_path / "file.py").write_text(source, "utf-8")
        return module.code_hash.__wrapped__(*(parts or ["file"]))

    return hash_of


PLAIN = """import os


class Box:
    def open(self, key):
        return key + 1


def shut(box, text="# no comment"):
    return text
"""
TOLD = '''"""What the file is."""

import os  # for nothing


class Box:
    """A box.

    In two paragraphs.
    """

    # a comment – with a dash

    def open(self, key):
        """Open it."""
        return key + 1   # one more



def shut(box, text="# no comment"):

    return text
'''


def test_comments_docstrings_and_empty_lines_do_not_change_the_codes_hash(hashed):
    assert len(hashed(PLAIN)) == 12
    assert hashed(PLAIN) == hashed(TOLD) == hashed(PLAIN)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("key + 1", "key + 2"),
        ("# no comment", "# another"),
        ("import os", "import io"),
        ("    return text", "    return  text"),
    ],
)
def test_any_code_changes_the_codes_hash(old, new, hashed):
    assert hashed(PLAIN.replace(old, new)) != hashed(PLAIN)
    assert hashed(TOLD.replace(old, new)) == hashed(PLAIN.replace(old, new))


def test_one_function_is_hashed_alone(hashed):
    before = hashed(PLAIN, "file.shut"), hashed(PLAIN, "file.Box"), hashed(PLAIN)
    changed = PLAIN.replace("key + 1", "key + 2")
    after = hashed(changed, "file.shut"), hashed(changed, "file.Box"), hashed(changed)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]
    assert hashed(TOLD, "file.Box") == before[1]
    assert hashed(PLAIN, "file.shut", "file.Box") not in before


def test_the_parts_of_the_features_code_are_there():
    """A name that is not in its file would silently stand for all of it."""
    for part in module.CODE:
        file, _, name = part.partition(".")
        assert not name or f"def {name}(" in (ROOT / "dlsr" / f"{file}.py").read_text("utf-8")


def recorded(features):
    return json.loads((features.key.folder() / "features.json").read_text())


def made_by_other_code(features):
    file = features.key.folder() / "features.json"
    file.write_text(json.dumps(recorded(features) | {"code": "0" * 12}))


class Turned(FakeEncoder):
    """The same weights' file, but other values."""

    def build(self):
        model = super().build()
        model.weights = -model.weights
        return model


def test_features_of_this_code_are_not_checked(encoder):
    first = quiet(image_set(12), encoder)
    assert recorded(first)["code"] == module.code_hash(*module.CODE)
    assert np.array_equal(quiet(image_set(12), Turned()).values, first.values)


@pytest.mark.parametrize("n", [3, 12])
def test_features_of_other_code_are_kept_where_it_gives_the_same(n, encoder):
    """Of the first images alone, and once."""
    first = quiet(image_set(n), encoder)
    about = recorded(first)
    made_by_other_code(first)
    again = quiet(image_set(n), encoder)
    assert encoder.images == n + min(n, module.SPOT_CHECK)
    assert np.array_equal(again.values, first.values)
    assert recorded(first) == about
    quiet(image_set(n), encoder)
    assert encoder.images == n + min(n, module.SPOT_CHECK)


def test_features_without_a_record_of_their_code_are_checked(encoder):
    first = quiet(image_set(), encoder)
    about = recorded(first)
    (first.key.folder() / "features.json").write_text(
        json.dumps({name: value for name, value in about.items() if name != "code"})
    )
    quiet(image_set(), encoder)
    assert recorded(first) == about


def test_features_of_other_code_are_extracted_again_where_it_gives_others(encoder, capsys):
    first = quiet(image_set(12), encoder)
    values = np.array(first.values)
    made_by_other_code(first)
    other = Turned()
    again = quiet(image_set(12), other)
    assert other.images == module.SPOT_CHECK + 12
    np.testing.assert_allclose(again.values, -values, rtol=1e-5)
    assert recorded(again)["code"] == module.code_hash(*module.CODE)
    assert "extracted again" in capsys.readouterr().out
    assert np.array_equal(quiet(image_set(12), other).values, again.values)
    assert other.images == module.SPOT_CHECK + 12


def test_the_whole_sets_features_are_checked_before_a_subset_is_taken(encoder):
    images = image_set(20)
    made_by_other_code(quiet(images, encoder))
    part = images.subset(7)
    again = quiet(part, Turned())
    alone = quiet(image_set(20, name="b").take(part.rows), Turned(sha256="b" * 64))
    np.testing.assert_allclose(again.values, alone.values, rtol=1e-5)


def test_skipped_images_are_passed_over_in_the_check(folder, encoder):
    """The first that could be read are looked at."""
    first = quiet(load_images(folder), encoder, on_error="skip")
    about = recorded(first)
    made_by_other_code(first)
    assert quiet(load_images(folder), encoder, on_error="skip").rows.tolist() == [0, 2, 3, 5]
    assert recorded(first) == about
    assert encoder.images == 4 + 4
