import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from dlsr import features as module
from dlsr.cache import cache_folder, key
from dlsr.data import load_images, resize
from dlsr.errors import UserError
from dlsr.features import extract, layer_slices, layer_zscore, pick_device, read_batches
from dlsr.training import precision_of

from conftest import FakeEncoder, image_set, one_sentence, run_python, write_folder
from test_data import written

quiet = functools.partial(extract, progress=False)


def files_of_features():
    files = (cache_folder() / "features").iterdir()
    return [file for file in files if file.suffix != ".lock"]


# z0


def test_zscore_by_hand():
    raw = np.array([[1.0, 3.0, 2.0, 4.0, 9.0]], np.float32)
    z0 = layer_zscore(raw, (2, 3))
    assert layer_slices((2, 3)) == [slice(0, 2), slice(2, 5)]
    first = 1 / (2**0.5 + 1e-5)  # mean 2, deviations -1 and 1, unbiased variance 2
    second = 13**0.5 + 1e-5  # mean 5, deviations -3, -1, 4, unbiased variance 26 / 2
    by_hand = [[-first, first, -3 / second, -1 / second, 4 / second]]
    np.testing.assert_allclose(z0, by_hand, rtol=1e-6)
    assert z0.dtype == np.float32
    assert not layer_zscore(np.full((1, 3), 4.0), (3,)).any()
    raw, channels = np.random.RandomState(0).randn(20, 720), (24, 32, 56, 160, 448)
    np.testing.assert_allclose((layer_zscore(7 * raw + 3, channels) ** 2).sum(1), 715, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: layer_zscore(np.where(np.eye(5, 4), np.nan, 1), (2, 2)), "4 of 5 images"),
        (lambda: layer_zscore(np.where(np.eye(5, 4), -np.inf, 1), (2, 2)), "4 of 5 images"),
        (lambda: layer_zscore(np.ones((5, 4)), (2, 3)), r"\(5, 4\).*\(2, 3\)"),
        (lambda: quiet(image_set(), FakeEncoder()).raw("max"), "gap, grid14"),
        (lambda: quiet(image_set(), FakeEncoder(), device="gpu"), "device='gpu'"),
        (lambda: quiet(image_set(), FakeEncoder(), on_error="ignore"), "raise or skip"),
    ],
)
def test_what_makes_no_features_is_refused_in_one_sentence(call, told):
    with pytest.raises(UserError, match=told) as error:
        call()
    one_sentence(error)


# Extraction and the cache


def test_features_are_the_encoders_output_in_order_in_whole_float32(encoder, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    found = quiet(image_set(5), encoder, batch_size=2)
    assert torch.backends.cudnn.allow_tf32 is False
    alone = [quiet(image_set(5).take([i]), FakeEncoder()) for i in range(5)]
    assert found.values.shape == (5, 2, 12)
    np.testing.assert_allclose(found.values, np.concatenate([one.values for one in alone]))
    assert np.array_equal(found.raw(), found.values[:, 0])
    assert np.array_equal(found.raw("grid14"), found.values[:, 1])
    np.testing.assert_array_equal(found.z0("grid14"), layer_zscore(found.values[:, 1], (3, 4, 5)))
    assert (found.weights_sha256, found.device) == ("a" * 64, "cpu")
    assert (list(found.images.ids), list(found.images.labels)) == (image_set(5).ids, image_set(5).labels)


def test_a_second_call_reads_the_cache_by_memory_map_and_refuses_a_damaged_file(encoder, tmp_path):
    folder = write_folder(tmp_path / "photos")
    first = quiet(str(folder), encoder)
    second = quiet(load_images(folder), FakeEncoder(stop=None, after=0))  # it may not be called
    assert encoder.images == 6
    assert isinstance(second.values, np.memmap)
    assert np.array_equal(first.values, second.values)
    (file,) = files_of_features()
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="damaged") as error:
        quiet(folder, encoder)
    assert str(file) in one_sentence(error)


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({"encoder": FakeEncoder(sha256="b" * 64)}, True),
        ({"encoder": FakeEncoder(identity=("blocks.6.1",))}, True),  # of the same weights file
        ({"encoder": FakeEncoder(tag="another.in1k")}, True),
        ({"images": image_set(seed=1)}, True),
        ({"images": image_set().take([1, 0, 2, 3, 4, 5])}, True),
        ({"chain": [(3, 3), (224, 224)]}, True),
        ({"chain": [(3, 3, "box"), (224, 224)]}, True),
        ({"images": image_set(name="another")}, False),
        ({"chain": [(224, 224)]}, False),
        ({"batch_size": 2}, False),
    ],
)
def test_features_are_kept_by_what_they_are_made_from(changes, other, encoder):
    """What changes them makes the encoder see the six images again."""
    quiet(image_set(), FakeEncoder())
    changes = {"images": image_set(), "encoder": encoder} | changes
    quiet(**changes)
    assert changes["encoder"].images == 6 * other


def test_the_chain_changes_what_the_encoder_sees(encoder):
    images, chain = image_set(size=(30, 30)), [(4, 4), (224, 224)]
    native, smaller = quiet(images, encoder), quiet(images, encoder, chain=chain)
    assert np.abs(native.values - smaller.values).max() > 0.1
    by_hand = [np.asarray(resize(images.image(i), chain)) for i in range(len(images))]
    again = quiet(replace(images, source=by_hand), FakeEncoder())
    assert np.array_equal(again.values, smaller.values)


# Devices


def test_cuda_0_counts_as_cuda():
    assert [pick_device(d) for d in (None, "cuda:1", "cpu")] == ["cpu", "cuda:1", "cpu"]
    assert [precision_of(d) for d in ("cuda", "cuda:0", "cpu")] == ["bf16", "bf16", "float32"]


def test_features_of_cuda_0_and_cuda_share_a_key_and_those_of_the_cpu_have_another(monkeypatch):
    keys = []
    monkeypatch.setattr(module, "key", lambda **about: keys.append(key(**about)) or "same")
    quiet(image_set(), FakeEncoder())
    for device in ("cuda", "cuda:0", "cuda:1"):  # what the cache has is not computed
        quiet(image_set(), FakeEncoder(), device=device)
    assert keys[0] != keys[1] == keys[2] == keys[3]


@pytest.mark.parametrize("kind", ["pack", "folder"])
def test_batches_are_read_in_order_by_several_threads(kind, tmp_path):
    images = written(tmp_path, kind)
    expected = [np.array(images.image(i).resize((4, 3), 2)) for i in range(len(images))]
    for size, first in ((1, 0), (2, 0), (2, 3), (50, 1)):
        batches = list(read_batches(images, [(3, 4)], size, first=first))
        assert [row for rows, _ in batches for row in rows] == list(range(first, len(images)))
        assert all(len(rows) <= size for rows, _ in batches)
        pixels = [image for _, read in batches for image in read]
        np.testing.assert_array_equal(pixels, expected[first:])


# Two processes, and interruptions

EXTRACT = """
import os, signal
import numpy as np
from conftest import FakeEncoder, image_set
from dlsr.features import extract

def run(name, cache, after):
    os.environ["DLSR_CACHE"] = cache
    encoder = FakeEncoder(after=after, stop=lambda: os.kill(os.getpid(), signal.SIGKILL))
    images = image_set(1100, size=(4, 4))
    found = extract(images, encoder, backend="torch", progress=False)
    np.save(name, np.append(np.ravel(found.values), encoder.images))

processes = []
for arguments in (("one", "shared", -1), ("other", "shared", -1), ("never", "killed", 33)):
    processes.append(os.fork())
    if not processes[-1]:
        run(*arguments)
        os._exit(0)
ends = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
assert ends == [0, 0, -signal.SIGKILL], ends
"""


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Return a folder in which two processes extracted one set at once, and a third was killed."""
    folder = tmp_path_factory.mktemp("extracted")
    assert run_python(EXTRACT, folder) == 0
    return folder


def resumed_or_read(cache, monkeypatch):
    """Return the values of the processes' set by this cache, and how many images it lacked."""
    monkeypatch.setenv("DLSR_CACHE", str(cache))
    encoder = FakeEncoder()
    images = image_set(1100, size=(4, 4))
    return quiet(images, encoder, backend="torch").values, encoder.images


def test_two_processes_may_extract_one_set_at_the_same_time(extracted, tmp_path, monkeypatch):
    """Both succeed and agree, one of them does the work, and a later run agrees too."""
    one, other = (np.load(extracted / f"{name}.npy") for name in ("one", "other"))
    assert {one[-1], other[-1]} == {0, 1100}
    assert np.array_equal(one[:-1], other[:-1])
    later, lacked = resumed_or_read(extracted / "shared", monkeypatch)
    assert lacked == 0
    assert np.array_equal(np.ravel(later), one[:-1])
    alone, _ = resumed_or_read(tmp_path / "fresh", monkeypatch)
    assert np.array_equal(alone, later)


def test_a_killed_extraction_goes_on_to_the_identical_features(extracted, tmp_path, monkeypatch):
    """The process was killed after 528 images, without a chance to tidy up."""
    assert not list((extracted / "killed").rglob("*.npy"))
    resumed, lacked = resumed_or_read(extracted / "killed", monkeypatch)
    assert lacked == 1100 - 528
    assert np.array_equal(resumed, resumed_or_read(tmp_path / "fresh", monkeypatch)[0])


# Unreadable images


@pytest.fixture
def folder(tmp_path):
    """Return six images, of which 001.png and 004.png are cut short."""
    folder = write_folder(tmp_path / "photos")
    for name in ("001.png", "004.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
    return folder


def test_unreadable_images_stop_the_run_by_name_or_are_skipped(folder, encoder, capsys):
    """The cache does not make them be passed over in silence later."""
    for _ in range(2):
        with pytest.raises(UserError, match=r"001\.png") as error:
            quiet(folder, encoder)
        assert "skip" in one_sentence(error)
        found = quiet(folder, encoder, on_error="skip", batch_size=2)
        assert list(found.images.ids) == ["000.png", "002.png", "003.png", "005.png"]
        assert found.rows.tolist() == [0, 2, 3, 5]
        assert (len(found), found.values.shape) == (4, (4, 2, 12))
        assert "2 of 6 images of photos cannot be read, '001.png' first" in capsys.readouterr().err
    for file in folder.iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="6 of 6 images"):
        quiet(folder, encoder, on_error="skip")


def test_an_encoder_that_gives_no_numbers_is_told_from_unreadable_images(folder, encoder):
    encoder.map[1, 0, 0] = np.inf
    with pytest.raises(UserError, match=r"4 of 4 images of photos from '000\.png' on have NaN"):
        quiet(folder, encoder, on_error="skip")
