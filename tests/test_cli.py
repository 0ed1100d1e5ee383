import io
import json
import os
import subprocess
import sys
from pathlib import Path

import dlsr
import numpy as np
import pandas as pd
import pytest
import torch
from dlsr import cli
from dlsr.cli import main
from dlsr.detector import DLSRDetector
from PIL import Image
from torch import nn

from conftest import ROOT, easy_features, write_folder

SMALL = ["--width", "16", "--blocks", "1", "--epochs", "2"]


class FakeEncoder(nn.Module):
    """A fixed linear map of a few pixels, with an encoder's attributes; it counts its images."""

    def __init__(self):
        super().__init__()
        self.name, self.channels, self.weights_sha256 = "fake", (3, 4, 5), "a" * 64
        self.about, self.images = {"tag": "fake", "layers": None, "identity": ()}, 0
        self.map = torch.randn((2, 27, 12), generator=torch.Generator().manual_seed(1))

    def forward(self, pixels):
        self.images += len({image.numpy().tobytes() for image in pixels})  # a batch is padded
        x = pixels[:, 37::75, 37::75].reshape(len(pixels), 27).float() / 255
        return torch.einsum("np,kpc->nkc", x, self.map)


@pytest.fixture(autouse=True)
def encoder(monkeypatch):
    """The encoder that every command gets when it asks for `fake`."""
    fake, real = FakeEncoder(), dlsr.create_encoder
    choose = lambda name, **_: fake if name == "fake" else real(name)  # noqa: E731
    monkeypatch.setattr("dlsr.encoders.create_encoder", choose)
    return fake


@pytest.fixture
def photos(tmp_path):
    return write_folder(tmp_path / "photos", 40, size=(12, 12))


@pytest.fixture
def detector(photos, tmp_path):
    assert fit(photos, tmp_path / "detector") == 0
    return tmp_path / "detector"


def fit(photos, out, *more):
    return main(["fit", str(photos), "--out", str(out), "--encoder", "fake", *SMALL, *more])


def refused(capsys, *arguments):
    """The sentence on stderr of a command that ends with a user's mistake."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    *_, line = [one for one in captured.err.splitlines() if one.startswith("dlsr: ")]
    return line


# Fit, score, info


@pytest.mark.parametrize("method", ["", "gaussian", "knn", "mse", "mfsim"])
def test_fit_score_and_info(method, photos, tmp_path, capsys, encoder):
    file, csv = tmp_path / "detector", tmp_path / "new" / "scores.csv"
    assert fit(photos, file, *(["--method", method] if method else [])) == 0
    loaded = DLSRDetector.load(file)
    assert loaded.method == (method or "gaussian")
    out = capsys.readouterr().out
    n = loaded.n_calibration_
    assert f"Fitted on 40 images, of which {n} calibrate" in out
    assert n == (4 if loaded.method in ("mse", "mfsim") else 40)
    assert main(["info", str(file)]) == 0
    out = capsys.readouterr().out
    for told in (loaded.method, "fake", "a" * 64, "40", dlsr.__version__, torch.__version__):
        assert told in out
    others = write_folder(tmp_path / "others", 7, seed=5)
    assert main(["score", str(file), str(others), "--csv", str(csv)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    table = pd.read_csv(csv)
    assert list(table.columns) == ["image", "ood_score", "p_value", "verdict", "reason"]
    assert sorted(table["image"]) == [f"{i:03d}.png" for i in range(7)]
    assert table["p_value"].is_monotonic_increasing
    called = table["verdict"] == "OOD"
    assert f"7 images: {called.sum()} OOD, {7 - called.sum()} ID, 0 unreadable" in captured.err
    assert ("cannot support 5 %; the finest is 20 %" in captured.err) == (n == 4)
    z0, table = dlsr.extract(others, encoder, progress=False).z0(), table.sort_values("image")
    np.testing.assert_array_equal(called.sort_index()[table.index], loaded.predict(z0) == -1)
    np.testing.assert_array_equal(table["p_value"], loaded.p_values(z0))
    np.testing.assert_allclose(table["ood_score"], loaded.ood_score(z0), rtol=1e-6)
    assert encoder.images == 47


def test_score_without_csv_prints_the_most_ood_first(photos, detector, capsys):
    capsys.readouterr()
    assert main(["score", str(detector), str(photos)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["image", "ood_score", "p_value", "verdict", "reason"]
    values = [float(line.split()[2]) for line in lines]
    assert len(values) == 40
    assert values == sorted(values)


def test_csv_and_json_go_to_stdout_and_all_else_to_stderr(photos, detector, capsys):
    capsys.readouterr()
    assert main(["score", str(detector), str(photos), "--csv", "-"]) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert main(["score", str(detector), str(photos), "--json"]) == 0
    rows = pd.DataFrame(json.loads(capsys.readouterr().out))
    assert rows.columns.tolist() == table.columns.tolist()
    assert rows["image"].tolist() == table["image"].tolist()
    assert not Path("-").exists()


def test_what_is_called_ood_follows_the_rate(photos, detector, tmp_path, capsys):
    others, csv = write_folder(tmp_path / "others", 30, seed=5), str(tmp_path / "s.csv")
    command = ["score", str(detector), str(others), "--csv", csv, "--overwrite"]
    for rate in (0.5, 0.01):
        assert main([*command, "--flag-rate", str(rate)]) == 0
        table = pd.read_csv(csv)
        assert ((table["verdict"] == "OOD") == (table["p_value"] <= rate)).all()
    assert "40 familiar images cannot support 1 %; the finest is 2.4 %" in capsys.readouterr().err
    assert main([*command, "--fdr", "0.9"]) == 0
    table = pd.read_csv(csv)
    expected = dlsr.benjamini_hochberg(table["p_value"].to_numpy(), 0.9)
    assert ((table["verdict"] == "OOD") == expected).all()
    assert main([*command, "--fdr", "0.01"]) == 0
    assert "74 of 30 must have the smallest p-value" in capsys.readouterr().err
    assert "5.0 was given as --flag-rate" in refused(capsys, *command, "--flag-rate", "5")


def test_every_file_that_is_not_scored_is_a_row_with_a_reason(photos, detector, tmp_path, capsys):
    (photos / "003.png").write_bytes(b"no image")
    (photos / "004.heic").write_bytes(b"no image")
    (photos / "005.svg").write_text("<svg/>")
    nan = np.full((9, 9), np.nan, np.float32)
    Image.fromarray(nan).save(photos / "006.tif")
    for hidden in ("._007.png", ".hidden.png", "__MACOSX/a.png", ".thumbnails/a.png", "notes.txt"):
        (photos / hidden).parent.mkdir(exist_ok=True)
        (photos / hidden).write_bytes(b"?")
    capsys.readouterr()
    assert main(["score", str(detector), str(photos), "--csv", str(tmp_path / "s.csv")]) == 0
    told = capsys.readouterr().err
    assert "4 hidden files, 1 other files of" in told
    assert "43 images: " in told and "4 unreadable" in told
    table = pd.read_csv(tmp_path / "s.csv")
    lost = table[table["verdict"] == "unreadable"].set_index("image")
    assert len(table) == 43
    assert lost[["ood_score", "p_value"]].isna().all(axis=None)
    assert table["reason"].notna().sum() == 4
    for name, reason in (
        ("003.png", "no image of a format"), ("004.heic", "dlsr[heic]"), ("005.svg", "not read"),
        ("006.tif", "NaN"),
    ):  # fmt: skip
        assert reason in lost.loc[name, "reason"]
    assert fit(photos, tmp_path / "again") == 0
    captured = capsys.readouterr()
    assert "Fitted on 39 images" in captured.out
    assert "003.png" in captured.err
    for path in photos.glob("0*.png"):
        path.write_bytes(b"no image")
    (photos / "006.tif").unlink()
    assert main(["score", str(detector), str(photos), "--csv", str(tmp_path / "t.csv")]) == 2
    assert (pd.read_csv(tmp_path / "t.csv")["verdict"] == "unreadable").all()
    assert "No image of photos can be read; 000.png: " in refused(
        capsys, "fit", photos, "--out", tmp_path / "third", "--encoder", "fake"
    )


def test_a_name_is_no_formula_and_a_limit_of_pixels_can_be_lifted(
    photos, detector, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    for name in ("=1+1.png", "+1.png", "-1.png", "@1.png"):
        (photos / name).write_bytes((photos / "000.png").read_bytes())
    csv, command = tmp_path / "s.csv", ["score", str(detector), str(photos), "--overwrite", "--csv"]
    for limit, unreadable in (("100", 44), ("143", 44), ("144", 0)):
        status = main([*command, str(csv), "--max-pixels", limit])
        assert status == (2 if unreadable else 0)
        assert (pd.read_csv(csv)["verdict"] == "unreadable").sum() == unreadable
    names = set(pd.read_csv(csv)["image"])
    assert {"'=1+1.png", "'+1.png", "'-1.png", "'@1.png"} <= names


def test_few_images_and_copies_are_told_at_the_fit(tmp_path, capsys, encoder):
    few, out = write_folder(tmp_path / "few", 10), tmp_path / "out"
    command = ("fit", few, "--out", out, "--encoder", "fake")
    assert "10 different images were given; 20 or more" in refused(capsys, *command)
    assert fit(few, out, "--force") == 0
    assert "10 familiar images cannot support 5 %; the finest is 9.1 %" in capsys.readouterr().err
    for i in range(40):
        (few / f"copy{i}.png").write_bytes((few / "000.png").read_bytes())
    assert "10 different images" in refused(capsys, *command, "--overwrite")
    assert fit(few, out, "--force", "--overwrite") == 0
    assert "40 images are copies of others" in capsys.readouterr().err
    for i in range(1, 10):
        (few / f"00{i}.png").unlink()
    told = refused(capsys, *command, "--overwrite", "--force")
    assert "minimum of 2" in told or "3 vectors or more" in told


def test_a_network_gets_500_updates(photos, tmp_path):
    assert fit(photos, tmp_path / "detector", "--method", "mse") == 0
    assert DLSRDetector.load(tmp_path / "detector").epochs == 500


@pytest.mark.parametrize("rate", [[], ["--fdr", "0.5"]])
def test_a_report_says_the_rule_and_shows_every_image(rate, photos, detector, tmp_path, capsys):
    report = tmp_path / "report.html"
    command = ["score", str(detector), str(photos), "--html", str(report), *rate]
    assert main(command) == 0
    rule = capsys.readouterr().err.strip().splitlines()[-1].split("OOD means ")[1].rstrip(".")
    text = report.read_text("utf-8")
    assert rule.replace("<", "&lt;") in text and "000.png" in text
    assert text.count("data:image/jpeg") == 40
    assert "is there already" in refused(capsys, *command)


def test_a_report_on_a_cluster_is_refused(photos, detector, tmp_path, capsys):
    command = ["score", detector, photos, "--csv", tmp_path / "x.csv", "--engine", "ray"]
    assert "--html" in refused(capsys, *command, "--html", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only there a name may be any bytes")
def test_a_name_that_is_no_text_is_written_all_the_same(photos, detector, tmp_path):
    name = os.fsencode(photos) + b"/caf\xe9.png"
    with Path(os.fsdecode(name)).open("wb") as file:
        Image.new("RGB", (9, 9)).save(file, "PNG")
    assert main(["score", str(detector), str(photos), "--csv", str(tmp_path / "s.csv")]) == 0
    assert r"caf\udce9.png" in set(pd.read_csv(tmp_path / "s.csv")["image"])


# Sets


def test_the_help_has_the_numbers_of_the_benchmark():
    rows = pd.read_csv(ROOT / "benchmarks" / "own_folders.csv").query("size == 50")
    means = rows.groupby(["method", "task"])["auroc"].mean().groupby("method").mean() / 100
    for method in ("gaussian", "knn k=2", "mse", "mfsim"):
        assert f"{means[method]:.3f}" in cli.METHOD


# Mistakes and interruptions


def test_mistakes_are_one_sentence(photos, tmp_path, detector, capsys, encoder):
    out, fake = ("--out", tmp_path / "out"), ("--encoder", "fake")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere.csv")
    encoder.images = 0
    for told, *command in (
        ("vgg99", "fit", photos, *out, "--encoder", "vgg99"),
        ("nowhere", "fit", tmp_path / "nowhere", *out, *fake),
        ("empty", "fit", tmp_path / "empty", *out, *fake),
        ("no plain file", "fit", photos, "--out", tmp_path, *fake),
        ("no plain file", "score", detector, photos, "--csv", tmp_path),
        ("no plain file", "score", detector, photos, "--csv", tmp_path / "link"),
        ("no plain file", "score", detector, photos, "--csv", "/dev/null"),
        ("no plain file", "fit", photos, "--out", photos, *fake),
        ("by --overwrite", "fit", photos, "--out", detector, *fake),
        ("by --overwrite", "score", detector, photos, "--csv", photos / "000.png"),
        ("closed or no folder", "score", detector, photos, "--csv", detector / "s.csv"),
        ("not dlsr's", "score", tmp_path, photos),
        ("not dlsr's", "info", photos / "000.png"),
    ):
        assert told in refused(capsys, *command)
    assert encoder.images == 0
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "link").is_symlink()


def test_another_encoders_features_are_refused(photos, detector, tmp_path, capsys, encoder):
    encoder.weights_sha256, encoder.images = "b" * 64, 0
    assert "other weights than at the fit" in refused(capsys, "score", detector, photos)
    assert encoder.images == 0
    silent = DLSRDetector((3, 4, 5)).fit(easy_features(60, channels=(3, 4, 5))[0])
    silent.save(tmp_path / "silent")
    assert "does not say its encoder" in refused(capsys, "score", tmp_path / "silent", photos)


def test_an_interruption_is_one_sentence(photos, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dlsr.features.extract", interrupt)
    assert fit(photos, tmp_path / "out") == 130
    assert "dlsr: interrupted" in capsys.readouterr().err


def test_a_warning_is_one_line_and_the_hook_is_put_back(photos, tmp_path, monkeypatch, capsys):
    show, load = cli.warnings.showwarning, dlsr.load_images

    def warn(*arguments):
        cli.warnings.warn("another sha256", stacklevel=1)
        return load(*arguments)

    monkeypatch.setattr("dlsr.data.load_images", warn)
    assert fit(photos, tmp_path / "out") == 0
    assert "\ndlsr: another sha256\n" in f"\n{capsys.readouterr().err}"
    assert cli.warnings.showwarning is show


def run(*command, **options):
    command = [sys.executable, "-c", *command]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_a_reader_that_leaves_early_ends_the_command_quietly(detector):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dlsr.cli", "info", str(detector)]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_ctrl_c_while_libraries_are_imported_is_one_sentence():
    program = (
        "import builtins, sys, dlsr.cli; real = builtins.__import__\n"
        "def slow(name, *rest):\n"
        "    if name == 'torch': raise KeyboardInterrupt\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = slow; sys.exit(dlsr.cli.main(['info', 'detector']))"
    )
    ended = run(program)
    assert ended.returncode == 130
    assert ended.stderr.startswith("dlsr: interrupted") and ended.stderr.count("\n") == 1


MEASURE = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL, check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / (1 if sys.platform == "linux" else 1024))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no resource module")
@pytest.mark.parametrize("command", [("-m", "dlsr.cli", "--help"), ("-c", "import dlsr")])
def test_a_start_takes_half_a_second_of_a_core_and_200_mb(command):
    seconds, kilobytes = map(float, run(MEASURE, *command).stdout.split())
    assert seconds < 0.5
    assert kilobytes < 200_000


def test_help_and_version(capsys):
    for option, told in (("--help", "the Gaussian was 0.947"), ("--version", dlsr.__version__)):
        with pytest.raises(SystemExit, match="0"):
            main([option])
        assert told in " ".join(capsys.readouterr().out.split())
