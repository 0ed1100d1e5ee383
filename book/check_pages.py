"""Check every built page as a reader sees it: on a desk and on a phone, without a network.

python book/check_pages.py _build/html

A page must not be wider than the window, no table, equation, code or image may be cut off without
a way to scroll to the rest, and nothing may fail to load or report an error. It needs Chromium and
the package playwright (`make pages` installs the package).
"""

import re
import shutil
import sys
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (1300, 390)  # pixels
CUT_OFF = """async () => {
  await window.MathJax?.startup?.promise;
  await document.fonts.ready;
  for (const details of document.querySelectorAll("details")) details.open = true;
  const found = [];
  const article = document.querySelector("article") ?? document.querySelector("main") ??
    document.body;
  const name = (node) => node.tagName.toLowerCase() +
    [...node.classList].map((one) => "." + one).join("");
  for (let box = article; box; box = box.parentElement) {
    const extra = box.scrollWidth - box.clientWidth;
    if (extra > 1 && getComputedStyle(box).display !== "inline")
      found.push(`${name(box)} is ${extra} pixels wider than the window leaves it`);
  }
  for (const node of article.querySelectorAll("table, mjx-math, pre, img, svg, canvas")) {
    if (!node.checkVisibility() || node.closest("mjx-assistive-mml")) continue;
    const what = name(node);
    if (node.tagName === "IMG" && !(node.complete && node.naturalWidth))
      found.push(`the image ${node.getAttribute("src").slice(0, 80)} does not load`);
    let inner = node.getBoundingClientRect();
    let left = inner.left, right = inner.left + Math.max(inner.width, node.scrollWidth);
    for (let box = node; box && box !== article.parentElement; box = box.parentElement) {
      const style = getComputedStyle(box), outer = box.getBoundingClientRect();
      if (style.display === "inline" || style.display === "contents") continue;
      if (["auto", "scroll"].includes(style.overflowX)) {
        [left, right] = [outer.left, outer.right];
      } else if (box !== node && (right > outer.right + 4 || left < outer.left - 4)) {
        const extra = Math.round(Math.max(right - outer.right, outer.left - left));
        found.push(`${what} is ${extra} pixels wider than ${name(box)}, and nothing scrolls`);
        break;
      }
    }
  }
  return [...new Set(found)];
}"""


def faults(folder: Path, browser: str) -> list[str]:
    """Return what is wrong with the pages below a folder, one sentence for each fault."""
    from playwright.sync_api import sync_playwright

    pages = [p for p in sorted(folder.resolve().rglob("*.html")) if "_static" not in p.parts]
    redirect = re.compile("http-equiv=.?refresh", re.IGNORECASE)
    pages = [p for p in pages if not redirect.search(p.read_text("utf-8"))]
    found: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for width in WIDTHS:
            size = {"width": width, "height": 900}
            context = chromium.new_context(viewport=size, offline=True)
            for path in pages:
                where = f"{path.relative_to(folder.resolve())} at {width} pixels: "
                page = context.new_page()
                seen: list[str] = []
                page.on("console", lambda m, s=seen: s.append(m.text) if m.type == "error" else 0)
                page.on("pageerror", lambda error, s=seen: s.append(str(error)))
                page.on("requestfailed", lambda r, s=seen: s.append(f"{r.url} does not load"))
                page.goto(path.as_uri(), wait_until="load")
                seen += page.evaluate(CUT_OFF)
                found += [where + text for text in dict.fromkeys(seen)]
                page.close()
            context.close()
        chromium.close()
    return found


def main(folder: Path) -> None:
    """Print the faults and exit with 1 if there are any, or say what is missing."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        sys.exit("The package playwright is missing; `make pages` installs it.")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"A browser is missing: none of {', '.join(BROWSERS)} is on the PATH.")
    if not folder.is_dir():
        sys.exit(f"{folder} is missing; `make book` builds it.")
    found = faults(folder, browser)
    print("\n".join(found) or "All pages fit, and everything on them loads.")
    sys.exit(bool(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
