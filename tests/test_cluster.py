"""Scoring on Ray Data: the bits of one process, whatever the workers, and no row lost."""

import os
import signal
import sys
from functools import partial

import dlsr
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from dlsr import cluster
from dlsr.cli import main
from dlsr.data import INPUT_SIZE
from pyarrow import parquet

from conftest import ROOT, FakeEncoder, encoded, one_sentence, random_pixels, write_folder

ABOUT = {"encoder": "fake", "weights_sha256": "a" * 64}


@pytest.fixture(scope="module")
def two_cpus():
    """Start Ray with two CPUs; the processes that it starts find the package and these tests."""
    ray = pytest.importorskip("ray", reason="the extra dlsr[ray] is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        options = {"include_dashboard": False, "logging_level": "error", "log_to_driver": False}
        ray.init("local", num_cpus=2, object_store_memory=150 << 20, **options)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray
        ray.shutdown()


def fake(name):
    assert name == "fake"
    return FakeEncoder()


def killed_once(flag, name):
    """Return an encoder whose process is killed at its second batch, the first time."""

    def stop():
        try:
            flag.touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    return FakeEncoder(after=1, stop=stop)


@pytest.fixture
def fitted(tmp_path, encoder):
    """Return a folder of 300 images, of which one is corrupt, a detector's file, and the truth."""
    folder = write_folder(tmp_path / "images", 300)
    (folder / "007.png").write_bytes(b"no image")
    features = dlsr.extract(folder, encoder, on_error="skip", progress=False)
    detector = dlsr.DLSRDetector(features.channels).fit(features.z0())
    detector.save(tmp_path / "detector", about=ABOUT)
    paths = [str(folder / name) for name in features.images.ids]
    z0 = features.z0()
    values = {"score": detector.ood_score(z0), "p_value": detector.p_values(z0)}
    truth = pd.DataFrame(values, paths)
    truth["verdict"] = np.where(detector.predict(z0) == -1, "OOD", "ID")
    return folder, tmp_path / "detector", truth.assign(z0=list(features.z0()))


# With Ray


def test_killed_worker_costs_no_row_and_no_bit(two_cpus, fitted, tmp_path):
    folder, _, truth = fitted
    create = partial(killed_once, tmp_path / "killed")
    rows = cluster.extract_images(folder, "fake", workers=2, create=create)  # on all CPUs
    found = checked(rows.to_pandas(), truth, folder / "007.png")
    assert (tmp_path / "killed").exists()
    np.testing.assert_array_equal(np.stack(found["z0"]), np.stack(truth["z0"]))


def test_more_workers_than_cpus_write_the_scores_of_one_process(
    two_cpus, fitted, tmp_path, monkeypatch, capsys
):
    folder, detector, truth = fitted
    files, pack, target = sorted(folder.iterdir()), tmp_path / "pack", tmp_path / "scores.csv"
    images = [{"bytes": file.read_bytes(), "path": str(file)} for file in files]
    pack.mkdir()
    table = pa.table({"image": images, "label": ["?"] * len(files)})
    parquet.write_table(table, pack / "0.parquet", row_group_size=50)
    monkeypatch.setattr(cluster, "score_images", partial(cluster.score_images, create=fake))
    command = ["score", str(detector), str(pack), "--engine", "ray", "--workers", "3"]
    assert main(command) == 2
    assert "--csv" in capsys.readouterr().err
    assert main([*command, "--csv", str(target), "--fdr", "0.1"]) == 2
    assert not target.exists()
    assert main([*command, "--csv", str(target)]) == 0
    assert "1 images are unreadable" in capsys.readouterr().err
    rows = pd.read_csv(target, dtype={"score": np.float32})
    found = checked(rows, truth, folder / "007.png")
    assert list(rows.columns) == ["path", "score", "p_value", "verdict", "reason"]
    np.testing.assert_array_equal(found["score"], truth["score"])
    np.testing.assert_array_equal(found["p_value"], truth["p_value"])
    assert found["verdict"].tolist() == truth["verdict"].tolist()


def checked(rows, truth, corrupt):
    """Return the rows in the order of the truth, after each image was found there once."""
    rows = rows.set_index("path")
    assert sorted(rows.index) == sorted([*truth.index, str(corrupt)])
    lost = rows.loc[str(corrupt)]
    assert "no image of a format" in lost["reason"]
    assert lost.get("verdict", "unreadable") == "unreadable"
    assert pd.isna(lost.get("score", lost.get("z0")))
    assert rows.loc[truth.index, "reason"].isna().all()
    return rows.loc[truth.index]


# Without Ray


def worker(encoder, *, size=8, detector=None):
    return cluster._Worker("fake", lambda name: encoder, detector, size, 1, 0)


def test_the_encoder_sees_full_batches_only():
    seen = []

    class Spy(FakeEncoder):
        def __call__(self, pixels):
            seen.append(len(pixels))
            return super().__call__(pixels)

    files = [encoded(pixels) for pixels in random_pixels(11)]
    table = pa.table({"path": [str(i) for i in range(11)], "bytes": files})
    encode = worker(Spy())
    parts = [encode(cluster._pixels(table.slice(at, 8))) for at in (0, 8)]
    assert seen == [8, 8]
    assert [len(part) for part in parts] == [8, 3]
    alone = worker(FakeEncoder(), size=1)(cluster._pixels(table.slice(9, 1)))
    assert alone["z0"][0] == parts[1]["z0"][1]


def test_an_own_path_replaces_that_of_the_image():
    image = {"bytes": encoded(random_pixels(1)[0]), "path": "inner"}
    rows = cluster._pixels(pa.table({"image": [image, None], "path": ["outer", "empty"]}))
    assert rows["path"].tolist() == ["outer", "empty"]
    assert [reason != "" for reason in rows["reason"]] == [False, True]
    assert rows["pixels"].shape == (2, *INPUT_SIZE, 3)
    assert worker(FakeEncoder())(rows)["z0"].null_count == 1


def test_weights_other_than_at_the_fit_are_refused(fitted):
    detector = dlsr.DLSRDetector.load(fitted[1])
    with pytest.raises(dlsr.UserError) as error:
        worker(FakeEncoder(sha256="b" * 64), detector=detector)
    assert "other weights" in one_sentence(error)


def test_a_detector_without_its_encoder_is_refused(fitted, tmp_path):
    dlsr.DLSRDetector.load(fitted[1]).save(tmp_path / "other", about={"images": 3})
    with pytest.raises(dlsr.UserError) as error:
        cluster.score_images(fitted[0], tmp_path / "other")
    assert "does not say its encoder" in one_sentence(error)


def test_without_ray_one_sentence_says_what_to_install(fitted, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(dlsr.UserError) as error:
        cluster.score_images(*fitted[:2])
    assert "pip install 'dlsr[ray]'" in one_sentence(error)


def test_a_worker_sets_its_number_of_threads():
    before = torch.get_num_threads()
    try:
        cluster._Worker("fake", fake, None, 8, 3, 0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
