"""One HTML file that shows scored images, the strangest first; it opens without a network."""

import base64
import io
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment
from PIL import Image

from dlsr.cache import replace_file
from dlsr.data import ImageSet
from dlsr.errors import UserError

SHOWN, SIDE, BINS = 500, 160, 48  # images with pictures, their longer side, bars of a histogram
HEAT = (240, 70, 0)  # the colour of strange positions


def strangest(rows: pd.DataFrame, n: int = SHOWN) -> list:
    """Return the index of the n strangest scored rows, by p-value and then by score."""
    return in_order(rows).dropna(subset="ood_score").index[:n].tolist()


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows, the strangest first and the unscored last."""
    return rows.sort_values(["p_value", "ood_score"], ascending=[True, False], kind="stable")


def write_report(
    path: str | Path, rows: pd.DataFrame, picture: Callable[[object], Image.Image], *,
    rule: str, limit: float, familiar_scores: np.ndarray, familiar: ImageSet | None = None,
    nearest: tuple[np.ndarray, np.ndarray] | None = None, heat: np.ndarray | None = None,
    shares: np.ndarray | None = None, typical: np.ndarray | None = None,
    settings: Mapping[str, object] | None = None, title: str = "Scored images", shown: int = SHOWN,
) -> None:  # fmt: skip
    """Write the report of ``rows``: image, ood_score, p_value, verdict and reason.

    A row without a score was not scored, and its reason says why. ``rule`` says what OOD means,
    such as "p <= 0.05", and ``limit`` is the largest p-value that is OOD, or 0 if none can be;
    ``familiar_scores`` are of familiar images that were not fitted on. The rows of `strangest`
    have pictures, by ``picture`` of a row's index, and the arrays are of these, in this order:
    ``heat``, (N, h, w), is 1 where familiar images hardly get; ``shares``, (N, M), are the layers'
    in the score, and ``typical``, (M,), the mean of images called ID; ``nearest`` are similarities
    and rows in ``familiar``, (N, k) each. Raises `UserError` if one has another length, or if the
    file cannot be written.
    """
    ordered = in_order(rows).dropna(subset="ood_score")
    index, beside, cards = ordered.index[:shown].tolist(), nearest or (), []
    given = [len(part) for part in (heat, shares, *beside) if part is not None]
    if wrong := set(given) - {len(index)}:
        raise UserError(f"{min(wrong)} explanations were given for {len(index)} shown images.")
    # In the order of the set, in which a pack is read quickest.
    by_row = sorted(enumerate(index), key=itemgetter(1))
    pictures = {i: _pictures(picture, i, heat, n) for n, i in by_row}
    used = np.unique(nearest[1]).tolist() if nearest else []
    near = {row: (familiar.ids[row], _pictures(familiar.image, row, side=64)) for row in used}
    for n, row in enumerate(ordered.loc[index].itertuples()):
        pair = [] if shares is None else [shares[n], shares[n] if typical is None else typical]
        layers = (100 * np.transpose(pair)).tolist()
        neighbours = zip(*(part[n].tolist() for part in beside), strict=True)
        neighbours = [(similarity, *near[i]) for similarity, i in neighbours]
        cards.append((row, pictures[row.Index], layers, neighbours))
    content = _render(
        title=title, cards=cards, rows=rows, ordered=ordered, settings=settings or {},
        rule=rule, limit=limit, has_heat=heat is not None, has_typical=typical is not None,
        histogram=_histogram(np.asarray(familiar_scores), ordered["ood_score"], limit),
    )  # fmt: skip
    replace_file(Path(path), lambda file: file.write_bytes(content))


def _render(**content: object) -> bytes:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = Path(__file__).with_suffix(".html").read_text("utf-8")
    html = environment.from_string(template).render(**content)
    return html.encode("utf-8", "backslashreplace")  # a file's name need not be UTF-8


def _pictures(picture, i, heat=None, place=0, side=SIDE) -> list[str]:
    """Return an image, and with its heat map, as data URIs; none if it cannot be read now."""
    try:
        image = picture(i).convert("RGB")
    except (UserError, OSError):
        return []
    scale = side / max(image.size)
    image = image.resize([max(1, round(scale * length)) for length in image.size])
    return [_uri(image)] + ([] if heat is None else [_uri(_heated(image, heat[place]))])


def _heated(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """Return a grey image with colour where the heat is above 1, the stronger the higher it is."""
    strength = Image.fromarray(np.asarray(heat, np.float32)).resize(image.size, 3)  # bicubic
    strength = 0.9 * (1 - np.exp(1 - np.maximum(np.array(strength)[..., None], 1)))
    grey = np.array(image.convert("L"), np.float32)[..., None]
    return Image.fromarray((grey + strength * (np.float32(HEAT) - grey)).astype(np.uint8))


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _histogram(familiar: np.ndarray, new: pd.Series, limit: float) -> dict:
    """Return bars of both, the highest 1, their ends, and where the threshold is, in percent."""
    threshold = float(np.quantile(familiar, 1 - limit))
    both = np.concatenate([familiar, new]).astype(float)
    low, high = both.min(), both.max()
    is_log = low > 0 and high > 5 * low
    scale = np.log if is_log else np.asarray
    start, width = scale(low), max(scale(high) - scale(low), 1e-12)
    bars = []
    for scores in (familiar, new):
        counts, _ = np.histogram((scale(scores) - start) / width, BINS, (0, 1))
        bars.append((counts / max(counts.max(), 1)).tolist())
    at = 100 * float((scale(threshold) - start) / width)
    ends = {"low": low, "high": high, "log": is_log, "threshold": threshold}
    return {"familiar": bars[0], "new": bars[1], "at": at} | ends
