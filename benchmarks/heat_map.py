"""Whether a heat map finds what is strange in an image; writes ``heat_map.csv`` and ``.png``.

    python benchmarks/heat_map.py

Into each of 100 images a patch of 64x64 of its 224x224 pixels is pasted, at a random place, from
an image of another class. It is found if the highest of the 14x14 positions of the heat map lies in
it; chance is the patch's share of the image. Familiar are up to 100 other images of the same class,
or, which is harder, 100 other images of all classes, of which the patch's class is one. The way is
chosen on textures, by ``same class``, and reported on scenes.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.neighbors import NearestNeighbors

import dlsr
from dlsr import explain, plots
from dlsr.data import INPUT_SIZE, ImageSet, resize

PATCH, IMAGES, FAMILIAR = 64, 100, 100
SETS = ("textures/test", "scenes/test")


def pasted(images: ImageSet, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray, ImageSet]:
    """Return the rows of 100 images, where a patch begins in each, and the images with patches."""
    labels = np.asarray(images.labels)
    by_class = [draws.permutation(np.flatnonzero(labels == name)) for name in sorted(set(labels))]
    each = -(-IMAGES // len(by_class))
    rows = np.concatenate([rows[:each] for rows in by_class])
    rows = np.sort(draws.permutation(rows)[:IMAGES])
    pixels, corners = [], draws.integers(0, INPUT_SIZE[0] - PATCH + 1, (IMAGES, 2))
    for row, (top, left) in zip(rows, corners, strict=True):
        other = draws.choice(np.flatnonzero(labels != labels[row]))
        whole, patch = (np.array(resize(images.image(i), (INPUT_SIZE,))) for i in (row, other))
        y, x = draws.integers(0, INPUT_SIZE[0] - PATCH + 1, 2)
        whole[top : top + PATCH, left : left + PATCH] = patch[y : y + PATCH, x : x + PATCH]
        pixels.append(whole)
    names = [images.ids[row] for row in rows]
    return rows, corners, ImageSet("pasted", names, labels[rows].tolist(), pixels, INPUT_SIZE)


def one_gaussian(familiar: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Return heat maps as `dlsr.explain` makes them."""
    vectors = explain.sample_positions([familiar], len(familiar))
    return explain.heat_maps([new], explain.fit_positions(vectors))


def gaussian_per_position(familiar: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Return the distances to a Gaussian of each position."""
    maps = np.zeros(new.shape[:3], np.float32)
    for y, x in np.ndindex(maps.shape[1:]):
        maps[:, y, x] = dlsr.fit_gaussian(familiar[:, y, x])(new[:, y, x])
    return maps


def nearest_position(familiar: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Return the distances to the nearest of 10,000 familiar positions, channels of variance 1."""
    vectors = explain.sample_positions([familiar], len(familiar)).reshape(-1, familiar.shape[-1])
    scale = vectors.std(axis=0) + 1e-5
    neighbours = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(vectors / scale)
    return neighbours.kneighbors((new / scale).reshape(-1, len(scale)))[0].reshape(new.shape[:3])


def is_found(maps: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Return whether the highest position's middle lies in the patch, (N,)."""
    cell = INPUT_SIZE[0] / maps.shape[1]
    places = np.stack(np.unravel_index(maps.reshape(len(maps), -1).argmax(1), maps.shape[1:]), 1)
    offsets = (places + 0.5) * cell - corners
    return ((offsets >= 0) & (offsets < PATCH)).all(axis=1)


def measure(key: str, encoder) -> list[dict]:
    """Return one row for each way, maps and choice of familiar images."""
    draws, images = np.random.default_rng(0), dlsr.load_images(key)
    rows, corners, new_images = pasted(images, draws)
    others = draws.permutation(np.setdiff1d(range(len(images)), rows))
    labels, new_labels = np.asarray(images.labels), np.asarray(new_images.labels)
    by_class = {name: others[labels[others] == name][:FAMILIAR] for name in sorted(set(new_labels))}
    groups = {
        "same class": [(by_class[name], new_labels == name) for name in by_class],
        "all classes": [(others[:FAMILIAR], np.full(IMAGES, True))],
    }
    vectors = partial(explain.position_vectors, encoder)
    new = np.concatenate(list(vectors(new_images)))
    ways = {
        "one Gaussian": one_gaussian, "Gaussian per position": gaussian_per_position,
        "nearest position": nearest_position,
    }  # fmt: skip
    width = encoder.channels[-2]
    columns = {"14x14": slice(width), "7x7": slice(width, None), "both": slice(None)}
    table = []
    for group, parts in groups.items():
        found = {(way, maps): np.zeros(IMAGES, bool) for way in ways for maps in columns}
        for familiar, which in parts:
            known = np.concatenate(list(vectors(images.take(familiar))))
            for way, maps in found:
                heat = ways[way](known[..., columns[maps]], new[which][..., columns[maps]])
                found[way, maps][which] = is_found(heat, corners[which])
        n = int(np.median([len(familiar) for familiar, _ in parts]))
        for (way, maps), hits in found.items():
            about = {"set": key, "familiar": group, "n_familiar": n, "way": way, "maps": maps}
            table.append(about | {"images": IMAGES, "found": hits.mean()})
            print(*table[-1].values(), flush=True)
    return table


def draw(table: pd.DataFrame, file: Path) -> None:
    """Draw the share found by each way, with the chosen one and chance marked."""
    rows = table[table["familiar"] == "same class"]
    names = rows[["way", "maps"]].drop_duplicates().agg(", ".join, axis=1)[::-1].tolist()
    drawn, ((axis,),) = plots.figure(3.4)
    for key, marker, colour in zip(SETS, "os", ("0.6", "C0"), strict=True):
        of_set = rows[rows["set"] == key]
        heights = [names.index(f"{row.way}, {row.maps}") for row in of_set.itertuples()]
        axis.plot(100 * of_set["found"], heights, marker, color=colour, label=key.split("/")[0])
    chosen = rows[rows["chosen"]].iloc[0]
    labels = [f"{n} (chosen)" if n == f"{chosen.way}, {chosen.maps}" else n for n in names]
    axis.set(yticks=range(len(names)), yticklabels=labels, xlim=(0, 100))
    axis.set(xlabel="patches found, %")
    axis.axvline(100 * table["chance"].iloc[0], color="0.3", linestyle="--")
    axis.text(100 * table["chance"].iloc[0] + 1, len(names) - 1, "chance", va="center")
    axis.legend(loc="lower center", ncols=2, bbox_to_anchor=(0.5, 1), frameon=False)
    best = rows[rows["chosen"] & (rows["set"] == SETS[1])]["found"].iloc[0]
    plots.finish(drawn, f"The heat map finds {100 * best:.0f} % of the patches in scenes")
    drawn.savefig(file, metadata={"Software": None})


def main() -> None:
    """Measure, choose on textures, and write the table and the figure."""
    torch.set_num_threads(1)
    encoder = dlsr.create_encoder("efficientnet_lite0")
    table = pd.DataFrame([row for key in SETS for row in measure(key, encoder)])
    table["chance"] = PATCH**2 / np.prod(INPUT_SIZE)
    of_choice = table[(table["set"] == SETS[0]) & (table["familiar"] == "same class")]
    best = of_choice.loc[of_choice["found"].idxmax()]
    table["chosen"] = (table["way"] == best["way"]) & (table["maps"] == best["maps"])
    file = Path(__file__).with_suffix(".csv")
    table.to_csv(file, index=False, float_format="%.4g", lineterminator="\n")
    draw(table, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
