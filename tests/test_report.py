"""The report holds what it is given, whatever that is, and stays small."""

import re

import numpy as np
import pandas as pd
import pytest
from dlsr.errors import UserError
from dlsr.report import strangest, write_report
from PIL import Image

from conftest import image_set, random_pixels

EVIL = "<script>alert('x')</script> & \"quoted\".png"


def table(n=6, *, out=True):
    """Return n scored rows, the last the strangest, and one that was not scored."""
    p_values = np.linspace(1, 0.01, n)
    rows = pd.DataFrame({"image": [f"{i:05d}.png" for i in range(n)], "ood_score": np.arange(1.0, n + 1)})
    rows = rows.assign(p_value=p_values, reason="")
    rows["verdict"] = np.where(p_values <= 0.05, "OOD", "ID")
    if out:
        rows.loc[-1] = ["broken<1>.jpg", np.nan, np.nan, "is cut <short>", ""]
    return rows


def noise(i):
    """Return image i, which JPEG hardly compresses."""
    return Image.fromarray(random_pixels(1, seed=i, size=(120, 160))[0])


def written(path, rows, picture=noise, **options):
    """Write a report and return its text."""
    options = {"rule": "p <= 0.05", "limit": 0.05, "familiar_scores": np.arange(1.0, 21)} | options
    write_report(path, rows, picture, **options)
    return path.read_text("utf-8")


def test_the_strangest_come_first_and_the_unscored_never():
    rows = table()
    rows.loc[2, "p_value"] = rows.loc[5, "p_value"]  # as strange, but for the score
    assert strangest(rows, 3) == [5, 2, 4]
    assert len(strangest(rows)) == 6


def test_it_holds_what_it_is_given(tmp_path):
    rows, familiar = table(), image_set(4, name="known")
    text = written(
        tmp_path / "new" / "report.html", rows, title="My photographs",
        familiar=familiar, nearest=(np.full((6, 2), 0.75), np.tile([0, 3], (6, 1))),
        heat=np.zeros((6, 14, 14)), shares=np.tile([0.3, 0.7], (6, 1)),
        typical=np.array([0.6, 0.4]), settings={"encoder": "lite <0>"},
    )  # fmt: skip
    places = [text.index(f"<bdi>{name}</bdi>") for name in rows["image"][:6][::-1]]
    assert places == sorted(places)
    assert "<b>1 of 6 images are called OOD</b>" in text and "1 file was" in " ".join(text.split())
    for part in (
        "My photographs",
        "OOD means p &lt;= 0.05.",
        "About 5 % of the familiar",
        "broken&lt;1&gt;.jpg",
        "is cut &lt;short&gt;",
        "lite &lt;0&gt;",
    ):
        assert part in text
    assert text.count("image0") == 12 and text.count("image3") == 12 and "image1" not in text
    assert text.count('width: 30.0%"') == 6 and text.count('left: 60.0%"') == 6
    assert text.count("data:image/jpeg;base64,") == 6 * (2 + 2)
    assert "The other images" not in text


def test_only_what_is_given_is_shown(tmp_path):
    text = written(tmp_path / "r.html", table(out=False), shown=2)
    assert text.count("<img") == 2 and "4 images, without pictures" in text
    for part in ("Not scored", "Settings", "Layer 1", "Nearest familiar", "Colour shows", "A bar is"):
        assert part not in text


def test_it_opens_without_a_network_and_runs_no_code(tmp_path):
    rows = table()
    rows["image"] = EVIL
    rows["reason"] = EVIL
    text = written(tmp_path / "r.html", rows, shown=3, title=EVIL, settings={EVIL: EVIL})
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.search(r"(src|href)=\"(?!data:|#)|url\(|@import|https?:", text)
    assert "default-src 'none'" in text


def test_names_of_any_bytes_are_written(tmp_path):
    familiar = image_set(2)
    familiar.ids[0] = "caf\udce9.png"
    near = (np.ones((6, 1)), np.zeros((6, 1), int))
    assert "caf\\udce9.png" in written(tmp_path / "r.html", table(), familiar=familiar, nearest=near)


def test_heat_is_drawn_where_it_is(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("dlsr.report._uri", lambda image: drawn.append(np.array(image)) or "data:,")
    heat = np.zeros((1, 14, 14))
    heat[0, 2, 11] = 5
    written(tmp_path / "r.html", table(), lambda i: Image.new("RGB", (28, 56), "grey"), shown=1, heat=heat)
    plain, warm = drawn
    assert plain.shape == (160, 80, 3)  # the aspect ratio stays
    apart = np.abs(warm.astype(int) - plain).sum(2)
    y, x = np.unravel_index(apart.argmax(), apart.shape)
    assert abs(y - 2.5 * 160 / 14) < 8 and abs(x - 11.5 * 80 / 14) < 8
    assert apart[80:].max() == 0


def test_images_that_are_gone_or_very_long_stop_nothing(tmp_path):
    def picture(i):
        if i == 5:
            raise UserError("gone")
        return Image.new("RGB", (3000, 1))

    assert written(tmp_path / "r.html", table(), picture).count("can no longer be read") == 1


@pytest.mark.parametrize("scores", [[-3.0, -1.0, 2.0], [5.0, 5.0, 5.0], [1e-3, 1.0, 1e6]])
def test_the_histogram_draws_any_scores(tmp_path, scores):
    rows = table(3, out=False).assign(ood_score=scores)
    text = written(tmp_path / "r.html", rows, familiar_scores=np.array(scores))
    assert text.count("<rect") >= 2 and "nan" not in text
    assert (", logarithmic" in text) == (scores[0] == 1e-3)
    left = float(re.search(r"left: ([\d.]+)%", text)[1])
    assert 0 <= left <= 100


def test_a_bar_stands_where_its_scores_are(tmp_path):
    rows = table(2, out=False).assign(ood_score=[10.0, 14.0])
    text = written(tmp_path / "r.html", rows, familiar_scores=np.array([10.0, 12.0, 14.8]), limit=0.5)
    above, below = ([int(x) for x in re.findall(r'<rect x="(\d+)"', part)] for part in svgs(text))
    assert above == [0, 20, 47] and below == [0, 40]
    assert float(re.search(r"left: ([\d.]+)%", text)[1]) == pytest.approx(100 * 2 / 4.8, abs=0.01)


def svgs(text):
    """Return the two drawings of the histogram."""
    return re.findall(r"<svg.*?</svg>", text, re.DOTALL)


def test_without_a_threshold_none_is_drawn(tmp_path):
    text = written(tmp_path / "r.html", table(), limit=0)
    assert "dashed" not in text.split("</style>")[1] and "No score is called OOD" in text


def test_without_any_scored_image_it_says_what_was_skipped(tmp_path):
    text = written(tmp_path / "r.html", table().loc[[-1]])
    assert "0 of 0 images" in text and "is cut &lt;short&gt;" in text


def test_ten_thousand_images_stay_under_30_mb(tmp_path):
    rows, n = table(10_000), 500
    text = written(
        tmp_path / "r.html", rows, lambda i: noise(0), familiar=image_set(3, size=(64, 64)),
        nearest=(np.ones((n, 3)), np.tile([0, 1, 2], (n, 1))), heat=np.ones((n, 14, 14)),
        shares=np.full((n, 5), 0.2), typical=np.full(5, 0.2),
    )  # fmt: skip
    assert (tmp_path / "r.html").stat().st_size < 30e6
    assert all(text.count(f"<bdi>{name}</bdi>") == 1 for name in rows["image"][:10_000:997])
    assert "9,500 images, without pictures" in text


def test_wrong_lengths_are_refused(tmp_path):
    with pytest.raises(UserError, match="5 explanations were given for 6"):
        written(tmp_path / "r.html", table(), heat=np.zeros((5, 14, 14)))


def test_it_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "r.html"
    path.write_text("older")

    def stop(i):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(path, table(), stop)
    assert path.read_text() == "older"
    assert written(path, table()).rstrip().endswith("</html>")
    assert [file.name for file in tmp_path.glob("*.html")] == ["r.html"]
    with pytest.raises(UserError, match="could not be written"):
        written(path / "below.html", table())
