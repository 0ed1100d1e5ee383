"""`make pages` finds what a reader would see is wrong with a page, and says what it lacks."""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WIDE = "<div style='width: 2000px; height: 9px'>wide</div>"
TABLE = f"<table><tr><td>{WIDE}</td></tr></table>"
CLIP = "<div style='overflow: hidden'>"
PAGES = {
    "good": f"<div style='overflow-x: auto'>{TABLE}</div>",
    "overflowing": WIDE,
    "clipped": f"{CLIP}{TABLE}</div>",
    "too_wide_a_box": f"{CLIP}<div style='overflow-x: auto; width: 2000px'>{TABLE}</div></div>",
    "no_image": "<img src='nowhere.png'>",
    "failing": "<script>nothing()</script>",
    "from_afar": "<script src='https://example.org/x.js'></script>",
}
FAULTS = {
    "overflowing": "pixels wider than the window",
    "clipped": "table is",
    "too_wide_a_box": "table is",
    "no_image": "nowhere.png does not load",
    "failing": "nothing is not defined",
    "from_afar": "x.js does not load",
}


@pytest.fixture
def check_pages(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book")
    import check_pages

    return check_pages


def test_each_fault_is_found_and_a_good_page_passes(check_pages, tmp_path):
    pytest.importorskip("playwright", reason="the package playwright is not installed")
    browser = next(filter(None, map(shutil.which, check_pages.BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium is on the PATH")
    for name, body in PAGES.items():
        (tmp_path / f"{name}.html").write_text(f"<!DOCTYPE html><article>{body}</article>")
    (tmp_path / "index.html").write_text("<meta http-equiv='refresh' content='0; url=good.html'>")
    found = check_pages.faults(tmp_path, browser)
    for width in check_pages.WIDTHS:
        here = [line for line in found if f" at {width} pixels: " in line]
        assert {line.split(".html")[0] for line in here} == set(FAULTS)
        for name, fault in FAULTS.items():
            assert any(line.startswith(name) and fault in line for line in here), name


@pytest.mark.parametrize("missing", ["playwright", "browser", "book"])
def test_what_is_missing_is_said_in_one_sentence(check_pages, monkeypatch, tmp_path, missing):
    monkeypatch.setitem(sys.modules, "playwright", None if missing == "playwright" else object())
    monkeypatch.setattr(check_pages.shutil, "which", lambda name: missing != "browser" or None)
    with pytest.raises(SystemExit) as stopped:
        check_pages.main(tmp_path / "nowhere")
    assert "is missing" in str(stopped.value) and str(stopped.value).count("\n") == 0
