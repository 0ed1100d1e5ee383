import re
from functools import partial
from html import unescape

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import FakeEncoder, image_set
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from test_results import MFSIM, MSE, SETS, VARIANT, VARIANTS
from test_results import scores as made_scores

from dlsr import plots, results
from dlsr.benchmarks import CELLS
from dlsr.features import extract
from dlsr.metrics import bootstrap, fpr95
from dlsr.results import AVERAGE


@pytest.fixture(autouse=True)
def the_look_is_put_back():
    with plt.rc_context():
        yield


@pytest.fixture
def scores():
    return made_scores()


@pytest.fixture(scope="module")
def rows():
    """Results of the three headline scores, one seed."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(results, "bootstrap", partial(bootstrap, draws=10))
        variants = [VARIANT | {"score": "mse"}, VARIANT | {"score": "lr"}, VARIANTS[1]]
        return results.summarise([made_scores(variants=variants)], id_set="id/test")


def panels(figure):
    return [axis for axis in figure.axes if axis.axison]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def check(figure, title):
    """One figure with its title that can be drawn, and that no backend will show twice."""
    assert isinstance(figure, Figure)
    assert figure.get_suptitle() == title
    assert not plt.get_fignums()
    figure.canvas.draw()


def test_image_grid_shows_every_image_under_its_label():
    images = image_set(6, size=(8, 8))
    sets = {"ID": (images, [0, 1, 2]), "OOD": (images, [5, 4])}
    labels = {"ID": ["a", "b", "c"], "OOD": ["d", "e"]}
    figure = plots.image_grid(sets, title="Images", labels=labels)
    check(figure, "Images")
    assert len(figure.axes) == 6
    shown = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in shown] == ["a", "b", "c", "d", "e"]
    assert np.array_equal(shown[4].images[0].get_array(), images.read(4))
    assert {text.get_text() for axis in figure.axes for text in axis.texts} == {"ID", "OOD"}
    assert not panels(figure)


def test_image_grid_without_labels():
    figure = plots.image_grid({"ID": (image_set(2), [0, 1])}, title="Images")
    check(figure, "Images")
    assert [axis.get_title() for axis in figure.axes] == ["", ""]


def test_layer_maps_have_a_panel_a_layer_and_a_point_an_image():
    features = {
        name: extract(image_set(n, seed=n), FakeEncoder((3, 4, 5)), progress=False)
        for name, n in {"digits/test": 8, "digits_8_9/test": 6}.items()
    }
    figure = plots.layer_maps(features, pooling="gap", title="Layers")
    check(figure, "Layers")
    assert [axis.get_title() for axis in figure.axes] == [
        f"layer {m}\n{width} channels" for m, width in ((1, 3), (2, 4), (3, 5))
    ]
    for axis in figure.axes:
        assert [len(points.get_offsets()) for points in axis.collections] == [8, 6]
    assert legend(figure) == ["digits 0-7", "digits 8 and 9"]


def test_the_training_curve_draws_every_loss_by_epoch():
    figure = plots.training_curve({"seed 0": [1.0, 0.5, 0.2], "seed 1": [0.9, 0.4, 0.3]}, title="Loss")
    check(figure, "Loss")
    (axis,) = figure.axes
    assert [line.get_xydata().tolist() for line in axis.lines] == [
        [[1, 1.0], [2, 0.5], [3, 0.2]],
        [[1, 0.9], [2, 0.4], [3, 0.3]],
    ]
    assert axis.get_xlabel() == "epoch"
    assert "loss" in axis.get_ylabel()
    assert axis.get_yscale() == "log"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["seed 0", "seed 1"]


def test_histograms_have_a_panel_a_score_and_a_line_at_the_threshold(scores):
    figure = plots.score_histograms(scores, [MSE, MFSIM], title="Scores")
    check(figure, "Scores")
    assert [axis.get_title() for axis in figure.axes] == ["MSE", "MFsim"]
    for axis, column in zip(figure.axes, (MSE, MFSIM), strict=True):
        dashed = [line for line in axis.lines if line.get_linestyle() == "--"]
        assert dashed[0].get_xdata()[0] == pytest.approx(np.quantile(scores.of("id/test", column), 0.95))
        assert "larger = more OOD" in axis.get_xlabel()
        assert len(axis.collections) == len(SETS)
    assert legend(figure) == list(SETS)


def test_roc_curves_have_a_panel_an_ood_set_and_meet_fpr95(scores):
    figure = plots.roc_curves(scores, [MSE, MFSIM], title="ROC")
    check(figure, "ROC")
    assert [axis.get_title() for axis in figure.axes] == ["OOD: near/test", "OOD: far/test"]
    for axis, ood in zip(figure.axes, list(SETS)[1:], strict=True):
        assert "OOD accepted" in axis.get_xlabel()
        curves = [line for line in axis.lines if line.get_label() in ("MSE", "MFsim")]
        assert [line.get_label() for line in curves] == ["MSE", "MFsim"]
        accepted_ood, accepted_id = curves[0].get_data()
        assert (accepted_ood[0], accepted_id[0], accepted_ood[-1], accepted_id[-1]) == (0, 0, 100, 100)
        at_95 = accepted_ood[accepted_id >= 95].min()
        assert at_95 == pytest.approx(100 * fpr95(scores.of("id/test", MSE), scores.of(ood, MSE)))
    assert figure.axes[0].get_ylabel() == "ID accepted, %"


# Paper and measured side by side

CELL = {
    "setting": "", "id": "cifar10/test", "ood": "svhn/test", "line": "MSE", "same": True, "metric": "auroc",
    "paper": 87.5, "measured": 86.0, "ci_low": 85.5, "ci_high": 86.5, "seed_low": 86.0, "seed_high": 86.0,
    "partial": "", "why": "",
}  # fmt: skip


def at(value):
    """A measured value with an interval of two points."""
    return {"measured": value, "ci_low": value - 1, "ci_high": value + 1}


NOTHING = {name: np.nan for name in ("measured", "ci_low", "ci_high", "seed_low", "seed_high", "partial")}


def compared(*changes):
    """As `benchmarks.compare` gives it: a cell for each of the changes."""
    table = pd.DataFrame([CELL | change for change in changes])
    difference = (table["measured"] - table["paper"]).where(table["same"])
    return table.assign(difference=difference)[CELLS]


def missing(why="not in the data pack", **changes):
    return NOTHING | {"why": why} | changes


def tags(html, tag):
    """What stands in all elements of this kind."""
    return re.findall(rf"<{tag}>(.*?)</{tag}>", unescape(html.data), re.DOTALL)


def only_cell(**changes):
    (_, content) = tags(plots.comparison_tables(compared(changes)), "td")
    return content


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, '<span class="worse">-1.5</span>'),
        ({"paper": 84.0}, '<span class="better">+2.0</span>'),
        ({"paper": 86.4}, '<span class="">-0.4</span>'),
        ({"paper": 85.5}, '<span class="">+0.5</span>'),  # the interval's end belongs to it
        ({"metric": "fpr95"}, '<span class="better">-1.5</span>'),
        ({"metric": "fpr95", "paper": 84.0}, '<span class="worse">+2.0</span>'),
        ({"metric": "fpr95", "paper": 86.4}, '<span class="">-0.4</span>'),
    ],
    ids=str,
)
def test_a_difference_has_its_colour_by_the_interval_and_the_metric(changes, shown):
    paper = changes.get("paper", 87.5)
    assert only_cell(**changes) == (
        "<b>86.0</b> <span class='beside'>[85.5, 86.5]</span><br>"
        f"<span class='beside'>paper {paper:.1f}, {shown}</span>"
    )


def test_the_seeds_range_stands_there_where_they_differ():
    assert "<span class='beside'>[85.5, 86.5]; seeds 85.0–87.0</span>" in only_cell(
        seed_low=85.0, seed_high=87.0
    )
    assert "seeds" not in only_cell(seed_high=86.0 + 1e-9)  # the mean of one, in other digits


def test_no_difference_from_values_on_other_features():
    html = plots.comparison_tables(compared({"line": "kNN", "same": False}))
    name, content = tags(html, "td")
    assert name == "kNN"
    assert content.endswith("<span class='beside'>paper 87.5<sup>a</sup></span>")
    assert tags(html, "li") == ["<sup>a</sup> The paper's value is of other features or another classifier."]


def test_no_difference_from_a_mean_over_other_sets():
    table = compared({}).assign(difference=np.nan)
    content = tags(plots.comparison_tables(table), "td")[1]
    assert content.endswith("<span class='beside'>paper 87.5</span>")


def test_a_dash_stands_for_nothing():
    assert only_cell(**missing(paper=np.nan)) == "–"
    assert only_cell(**missing()) == "–<br><span class='beside'>paper 87.5</span>"
    assert only_cell(paper=np.nan) == "<b>86.0</b> <span class='beside'>[85.5, 86.5]</span>"


def test_letters_lead_to_notes():
    few = {"partial": "cifar10/train: half; svhn/test: fewer than <10>"}
    html = plots.comparison_tables(compared(
        few,
        few | {"line": "kNN", "same": False},
        few | {"line": "kNN", "same": False, "metric": "fpr95"},
        missing(ood="isun/test"),
        missing(ood="isun/test", line="kNN", same=False),
        missing(ood="isun/test", line="kNN", same=False, metric="fpr95"),
        {"ood": AVERAGE}, {"ood": AVERAGE, "line": "kNN", "same": False},
    ))  # fmt: skip
    notes = dict(re.findall(r"<sup>(.)</sup> (.*)", "\n".join(tags(html, "li"))))
    assert "&lt;10&gt;" in html.data
    above, below = html.data.split('<ul class="notes">')
    used = re.findall(r"<sup>(.)</sup>", above)
    assert sorted(notes) == sorted(set(used)) == ["a", "b", "c", "d", "e"]
    assert len(tags(html, "li")) == below.count("<sup>") == 5
    assert len(set(notes.values())) == 5
    letter = {text: key for key, text in notes.items()}
    other = letter["The paper's value is of other features or another classifier."]
    half, little = letter["CIFAR-10: half"], letter["SVHN: fewer than <10>"]
    isun = letter["Not measured: not in the data pack."]
    assert used.count(other) == 5  # of every kNN
    heads = tags(html, "th")
    svhn = f"SVHN<sup>{half}</sup> <sup>{little}</sup>"
    first = ["", svhn, f"iSUN<sup>{isun}</sup>", f"mean<sup>{letter[plots.MEAN_NOTE]}</sup>"]
    assert heads == [*first, *first[:3]]  # in the second table nothing has a mean


def test_the_mean_stands_only_beside_measured_ones():
    alone = missing("fewer than two sets", ood=AVERAGE, paper=90.0)
    html = plots.comparison_tables(compared({}, {"ood": AVERAGE}, {"id": "celeba/test"},
                                            alone | {"id": "celeba/test"}))  # fmt: skip
    assert [re.sub("<.*", "", head) for head in tags(html, "th")] == ["", "SVHN", "mean", "", "SVHN"]
    assert "fewer than two sets" not in html.data
    assert "paper 90.0" not in html.data


def test_a_table_for_each_id_set_and_metric_with_a_line_for_each_setting():
    html = plots.comparison_tables(compared(
        {"setting": "single"}, {"setting": "multi"}, {"setting": "multi", "line": "LR"},
        {"metric": "fpr95"}, {"id": "celeba/test", "setting": "Lite0"},
    ))  # fmt: skip
    assert tags(html, "b")[:1] == ["ID: CIFAR-10. AUROC, %: higher is better."]
    captions = re.findall(r"<p><b>(.*?)</b></p>", html.data)
    assert captions == [
        "ID: CIFAR-10. AUROC, %: higher is better.",
        "ID: CIFAR-10. FPR95, %: lower is better.",
        "ID: CelebA. AUROC, %: higher is better. Lite0.",
    ]
    assert tags(html, "td")[::2] == ["single: MSE", "multi: MSE", "multi: LR", "MSE", "MSE"]
    assert html.data.count('class="dataframe table comparison"') == 3


def test_settings_scored_on_other_sets_have_a_table_of_their_own():
    html = plots.comparison_tables(compared({}, {"ood": "isun/test"}, {"setting": "Lite0"}))
    assert [re.sub("<.*", "", head) for head in tags(html, "th")] == ["", "SVHN", "iSUN", "", "SVHN"]
    assert len(tags(html, "td")) == 3 + 2


def dots(container):
    """Places of an error bar's points, and the ends of its bars along their axis."""
    along = 0 if container.has_xerr else 1
    bars = np.array([s[:, along] for s in container.lines[2][0].get_segments() if len(s)])
    return container.lines[0].get_xydata(), bars


def diamonds(axis):
    """Where the paper's values are drawn, a list a scatter; those without a value are not."""
    drawn = [np.ma.filled(c.get_offsets().astype(float), np.nan) for c in axis.collections
             if isinstance(c, PathCollection)]  # fmt: skip
    return [[tuple(xy) for xy in offsets if not np.isnan(xy).any()] for offsets in drawn]


def tick_labels(axis, which="y"):
    return [text.get_text() for text in getattr(axis, f"get_{which}ticklabels")()]


def test_measured_values_stand_beside_the_papers_a_panel_an_id_set_and_metric():
    table = compared(
        {}, {"ood": "textures/test", "measured": 96.0, "ci_low": 95.0, "ci_high": 98.0, "paper": 97.0},
        missing(ood="isun/test"), {"ood": AVERAGE} | at(50.0),
        {"line": "kNN", "same": False} | at(80.0),
        *(missing(line="kNN", same=False, ood=ood) for ood in ("textures/test", "isun/test")),
        {"setting": "Lite0"} | at(10.0),
        {"metric": "fpr95", "paper": np.nan}, {"id": "celeba/test", "ood": "sun/test"},
    )  # fmt: skip
    figure = plots.paper_and_measured(table, title="Paper")
    check(figure, "Paper")
    auroc, fpr95, faces = panels(figure)  # the fourth place stays empty
    assert [axis.get_xlabel().split(",")[0] for axis in panels(figure)] == ["AUROC", "FPR95", "AUROC"]
    assert [axis.get_title() for axis in panels(figure)] == ["ID: CIFAR-10", "ID: CIFAR-10", "ID: CelebA"]
    assert tick_labels(auroc) == ["SVHN", "Textures"]  # iSUN was not measured
    assert auroc.get_yticks().tolist() == [0, -1]
    assert [tick_labels(axis) for axis in (fpr95, faces)] == [["SVHN"], ["SUN"]]
    (mse, mse_bars), (knn, knn_bars) = map(dots, auroc.containers)
    assert mse[:, 0].tolist() == [86, 96]
    np.testing.assert_allclose(mse_bars, [[85.5, 86.5], [95, 98]])
    assert knn[0, 0] == 80
    assert np.isnan(knn[1, 0])
    np.testing.assert_allclose(knn_bars[0], [79, 81])
    assert np.round(mse[:, 1]).tolist() == [0, -1]  # each beside its set's tick, MSE above kNN
    assert (mse[:, 1] > knn[:, 1]).all()
    ours, others, *_ = diamonds(auroc)
    assert ours == [(87.5, mse[0, 1]), (97.0, mse[1, 1])]
    assert others == []
    assert not any(diamonds(fpr95))
    assert legend(figure) == ["MSE", "kNN", "paper (quoted)"]


def test_where_nothing_was_measured_the_papers_values_are_drawn_alone():
    figure = plots.paper_and_measured(compared(missing(), missing(ood="isun/test", paper=70.0)), title="None")
    check(figure, "None")
    (axis,) = figure.axes
    assert tick_labels(axis) == ["SVHN", "iSUN"]
    assert diamonds(axis)[0] == [(87.5, 0), (70.0, -1)]
    assert axis.get_title() == ""  # one ID set needs no name


def test_one_pair_of_sets_has_a_row_a_score_and_a_panel_a_metric():
    table = compared(
        {}, {"line": "MFsim", "paper": 85.6} | at(85.0),
        {"line": "LR", "metric": "fpr95", "paper": np.nan, "measured": 57.0, "ci_low": 56.5, "ci_high": 58.0},
    )  # fmt: skip
    figure = plots.near_comparison(table, title="Paper")
    check(figure, "Paper")
    auroc, fpr95 = figure.axes
    assert "AUROC" in auroc.get_xlabel()
    assert "FPR95" in fpr95.get_xlabel()
    assert tick_labels(auroc) == ["MSE", "MFsim"]
    assert auroc.get_yticks().tolist() == [1, 0]  # the first row on top
    assert tick_labels(fpr95) == ["LR"]
    assert diamonds(auroc) == [[(87.5, 1), (85.6, 0)]]
    assert diamonds(fpr95) == [[]]
    points, bars = dots(auroc.containers[0])
    assert points.tolist() == [[86, 1], [85, 0]]
    np.testing.assert_allclose(bars, [[85.5, 86.5], [84, 86]])
    np.testing.assert_allclose(dots(fpr95.containers[0])[1], [[56.5, 58]])
    assert set(legend(figure)) == {"measured here", "paper (quoted)"}


def test_a_measured_value_beside_the_papers_in_a_sentence():
    (cell, demo) = (row for _, row in compared({}, {"paper": np.nan}).iterrows())
    assert plots.beside(cell) == "86.0 % (paper: 87.5 %)"
    assert plots.beside(demo) == "86.0 %"


# Figures of single items


def test_mfsim_after_the_first_and_the_last_epoch():
    variants = [VARIANTS[1], VARIANTS[1] | {"score": "mfsim_first_epoch"}, VARIANT]
    made = made_scores(variants=variants)
    made.table["mfsim_first_epoch/2..M/released/t3/k1"] += 100
    made = results.SetScores(made.table, made.columns, made.about | {"losses": [1.0, 0.5, 0.2]})
    figure = plots.first_and_last_epoch(made, MFSIM, title="Epochs")
    check(figure, "Epochs")
    assert [axis.get_title() for axis in figure.axes] == ["after epoch 1", "after epoch 3"]
    for axis, column in zip(figure.axes, ("mfsim_first_epoch/2..M/released/t3/k1", MFSIM), strict=True):
        assert len(axis.collections) == len(SETS)
        x = np.concatenate([area.get_paths()[0].vertices[:, 0] for area in axis.collections])
        assert (x.min(), x.max()) == pytest.approx((made.table[column].min(), made.table[column].max()))
    assert legend(figure) == list(SETS)


def steps():
    """Of two reconstructions, in no order; `released` stops before t = 100."""
    names = ["metric", "reconstruction", "score", "t", "value", "ci_low", "ci_high"]
    made = [
        (metric, mode, score, t, base + t / 10, base - 1, base + 12)
        for metric, base in (("auroc", 60.0), ("fpr95", 30.0))
        for mode, ts in (("released", (10, 1)), ("paper", (100, 1, 10)))
        for score in ("mse", "mfsim")
        for t in ts
    ]
    return pd.DataFrame(made, columns=names)


def test_scores_over_timesteps():
    figure = plots.over_timesteps(steps(), title="Steps")
    check(figure, "Steps")
    assert [axis.get_title() for axis in figure.axes] == ["released", "paper", "", ""]
    assert [axis.get_ylabel() for axis in figure.axes] == ["AUROC, %", "", "FPR95, %", ""]
    for axis, base, ts in zip(figure.axes, (60, 60, 30, 30), ([1, 10], [1, 10, 100]) * 2, strict=True):
        mse, lr, mfsim = axis.lines
        assert [line.get_label() for line in axis.lines] == ["MSE", "LR", "MFsim"]
        assert mse.get_xydata().tolist() == mfsim.get_xydata().tolist() == [[t, base + t / 10] for t in ts]
        assert len(lr.get_xydata()) == 0
        y = axis.collections[0].get_paths()[0].vertices[:, 1]
        assert (y.min(), y.max()) == (base - 1, base + 12)
        assert axis.get_xscale() == "log"
        assert axis.get_xticks().tolist() == [1, 10, 100]
    assert tick_labels(figure.axes[-1], "x") == ["1", "10", "100"]
    assert legend(figure) == ["MSE", "LR", "MFsim"]


def test_the_table_of_timesteps_says_what_is_not_possible():
    table = plots.timesteps_table(steps())
    assert list(table.columns) == ["reconstruction", "score", "t = 1", "t = 10", "t = 100"]
    table = table.set_index(["reconstruction", "score"])
    assert set(table.index) == {(mode, score) for mode in ("released", "paper") for score in ("MSE", "MFsim")}
    assert table.loc[("released", "MSE")].tolist() == [
        "60.1 [59.0, 72.0]", "61.0 [59.0, 72.0]", "not possible",
    ]  # fmt: skip
    assert table.loc[("paper", "MFsim"), "t = 100"] == "70.0 [59.0, 72.0]"


def test_the_last_layer_alone_beside_all():
    mean = {"ood": AVERAGE}
    single, multi = mean | {"setting": "single"}, mean | {"setting": "multi"}
    table = compared(
        single, single | {"line": "MFsim", "measured": 70.0, "ci_low": 68.0, "ci_high": 71.0, "paper": 75.0},
        multi | {"paper": np.nan}, multi | at(90.0) | {"line": "MFsim"},
        {"setting": "single"} | at(10.0), single | {"metric": "fpr95"} | at(20.0),
        {"id": "celeba/test", "setting": "multi", "ood": "textures/test"} | at(99.0),
    )  # fmt: skip
    figure = plots.one_or_all_layers(table, title="Layers")
    check(figure, "Layers")
    assert [axis.get_title() for axis in figure.axes] == ["ID: CIFAR-10", "ID: CelebA"]
    cifar, faces = figure.axes
    assert tick_labels(cifar, "x") == ["MSE", "MFsim"]
    assert [box.get_label() for box in cifar.containers] == ["last layer alone", "all layers"]
    (one, bars), (every, _) = map(dots, cifar.containers)
    np.testing.assert_allclose(one, [[-0.15, 86], [0.85, 70]])
    np.testing.assert_allclose(bars, [[85.5, 86.5], [68, 71]])
    np.testing.assert_allclose(every, [[0.15, 86], [1.15, 90]])
    np.testing.assert_allclose(diamonds(cifar)[0], [(-0.15, 87.5), (0.85, 75)])
    np.testing.assert_allclose(diamonds(cifar)[1], [(1.15, 87.5)])
    assert dots(faces.containers[0])[0][:, 1].tolist() == [99]  # the one set that was measured
    assert legend(figure) == ["last layer alone", "all layers", "paper (quoted)"]


def test_sizes_of_the_lfdn_in_their_order():
    small, large = {"setting": "8x720"}, {"setting": "16x1440"}
    sizes = compared(
        small | {"paper": np.nan}, small | {"line": "LR", "measured": 70.0, "ci_low": 69.0, "ci_high": 72.0},
        large, large | at(80.0) | {"line": "LR", "paper": 82.0},
    )  # fmt: skip
    figure = plots.lfdn_sizes(sizes.assign(size=sizes["setting"]), title="Sizes")
    check(figure, "Sizes")
    (axis,) = figure.axes
    assert tick_labels(axis, "x") == ["8x720", "16x1440"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["MSE", "LR"]
    (mse, _), (lr, bars) = map(dots, axis.containers)
    assert mse[:, 1].tolist() == [86, 86]
    assert lr[:, 1].tolist() == [70, 80]
    np.testing.assert_allclose(bars[0], [69, 72])
    assert np.round(mse[:, 0]).tolist() == np.round(lr[:, 0]).tolist() == [0, 1]
    assert [[xy[1] for xy in line] for line in diamonds(axis)] == [[87.5], [87.5, 82]]
    assert diamonds(axis)[1][1][0] == lr[1, 0]


def test_each_layers_share_has_a_panel_an_id_set():
    columns = ["ID", "layer", "alone", "left out", "all"]
    made = [("A", "1", 55, 70, 72), ("A", "2", 65, 60, 72), ("B", "1", 50, 90, 95), ("B", "2", 85, 51, 95)]
    figure = plots.layer_shares(pd.DataFrame(made, columns=columns), title="Shares")
    check(figure, "Shares")
    assert [axis.get_title() for axis in figure.axes] == ["ID: A", "ID: B"]
    drawn = [[line.get_ydata() for line in axis.lines] for axis in figure.axes]
    assert [[list(y) for y in panel] for panel in drawn] == [
        [[55, 65], [70, 60], [72, 72]],
        [[50, 85], [90, 51], [95, 95]],
    ]
    assert legend(figure) == ["this layer alone", "all but this layer"]


# Coverage and results


def items():
    return pd.DataFrame(
        {
            "item": ["01_a", "02_b"], "title": ["Table 1", "Table 2"], "profile": "pack", "measured": [3, 0],
            "cells": [12, 7], "date": ["2026-01-31", ""], "state": ["up to date", "not run"],
        }
    )  # fmt: skip


def test_coverage_as_a_table():
    table = plots.coverage_table(items())
    assert list(table.columns) == ["item", "what", "measured", "when", "state"]
    assert table.to_numpy().tolist() == [
        ["01_a", "Table 1", "3 of 12", "2026-01-31", "up to date"],
        ["02_b", "Table 2", "0 of 7", "–", "not run"],
    ]


def test_coverage_as_bars():
    figure = plots.coverage_bars(items(), title="Coverage")
    check(figure, "Coverage")
    (axis,) = figure.axes
    whole, measured = axis.containers
    assert [bar.get_width() for bar in whole] == [12, 7]
    assert [bar.get_width() for bar in measured] == [3, 0]
    assert [(bar.get_y() + bar.get_height() / 2) for bar in measured] == pytest.approx([1, 0])
    assert dict(zip(axis.get_yticks(), tick_labels(axis), strict=True)) == {1: "01_a", 0: "02_b"}
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["not measured", "measured"]


def test_browsable_rows_are_the_headline_ones(rows):
    main = rows[(rows["seed"] == "mean") & (rows["versus"] == "") & rows["metric"].isin(["auroc", "fpr95"])]
    plain = {"method": "knn", "reconstruction": "", "t": 0, "width": 0, "score": "knn", "layers": "all"}
    hidden = [{"t": 10}, {"reconstruction": "paper"}, {"layers": "2"}, {"score": "mfsim_first_epoch"}]
    table = plots.browsable(
        pd.concat([
            rows, main.head(1).assign(id="cifar10/test", encoder="efficientnet_b4", **plain),
            *(main.assign(**change) for change in hidden),
        ])
    )  # fmt: skip
    assert len(table) == len(main) + 1 == 3 * 3 * 2 + 1  # two sets and their mean
    assert set(table["score"]) == {"mse all", "lr all", "mfsim 2..M", "knn all"}
    assert set(table["metric"]) == {"AUROC", "FPR95"}
    assert set(table["LFDN"]) == {"1x8, 2", "–"}
    last = table.iloc[-1]
    assert (last["item"], last["ID"], last["encoder"], last["method"]) == (
        "08_near_ood", "CIFAR-10", "b4", "knn",
    )  # fmt: skip
    one = main.iloc[0]
    assert table["value"].iloc[0] == plots.with_interval(one["value"], one["ci_low"], one["ci_high"])


# Tables of one item


def test_a_table_of_intervals_has_a_line_for_each_set_and_score(rows):
    table = plots.intervals_table(rows)
    assert list(table.columns) == ["OOD", "score", "AUROC, %", "FPR95, %"]
    assert table["score"].tolist() == ["MSE", "LR", "MFsim"] * 3
    assert table["OOD"].tolist() == ["near/test"] * 3 + ["far/test"] * 3 + ["average"] * 3
    one = rows.query("ood == 'far/test' and metric == 'fpr95' and seed == 'mean' and score == 'lr'").iloc[0]
    assert table["FPR95, %"][4] == plots.with_interval(one["value"], one["ci_low"], one["ci_high"])


def test_a_table_of_settings_has_a_line_for_each_and_a_column_a_score(rows):
    near = rows[rows["ood"] == "near/test"]
    table = plots.settings_table(pd.concat([near, near.assign(width=16, value=50.0)]))
    assert len(table) == 2
    assert set(table["LFDN"]) == {"1x8, 2 epochs", "1x16, 2 epochs"}
    assert set(table["reconstruction"]) == {"released, t = 3"}
    assert {"MSE", "LR", "MFsim 2..M"} <= set(table.columns)
    assert table.set_index("LFDN")["MSE"]["1x16, 2 epochs"].startswith("50.0 [")


CHANGES = [
    {"protocol": "matched"},
    {"pooling": "grid14"},
    {"n_train": 99},
    {"ood": "far/test"},
    {"profile": "paper"},
    {"weights_sha256": "b" * 64},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_table_of_settings_tells_all_settings_apart(change, rows):
    """A second run of the same item in another protocol must not stop its notebook."""
    near = rows[rows["ood"] == "near/test"]
    assert len(plots.settings_table(pd.concat([near, near.assign(**change)]))) == 2


def test_a_figure_is_saved_among_the_books_images(tmp_path):
    path = plots.save(plots.training_curve({"a": [1.0, 0.5]}, title="Loss"), "loss.png")
    assert path == tmp_path / "here" / "book" / "images" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["loss.png"]


def test_layer_bars_show_each_layer_of_each_score():
    table = pd.DataFrame(
        {
            "layer": ["1", "2", "1", "2"],
            "score": ["mse", "mse", "mfsim", "mfsim"],
            "value": [60.0, 70.0, 65.0, 75.0],
            "ci_low": [59.0, 69.0, 64.0, 74.0],
            "ci_high": [61.0, 71.0, 66.0, 76.0],
        }
    )
    figure = plots.layer_bars(table, title="Layers")
    check(figure, "Layers")
    (axis,) = figure.axes
    assert axis.get_xticks().tolist() == [1, 2]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["MSE", "MFsim"]
    values = [box.lines[0].get_ydata().tolist() for box in axis.containers]
    assert values == [[60, 70], [65, 75]]
    assert axis.get_ylabel() == "AUROC, %"


def test_a_sets_colour_is_that_of_its_role_in_every_figure(scores):
    assert plots._colour("cifar10/test") == plots._colour("digits/test") == plots.COLOURS["id"]
    assert plots._colour("cifar100/test") == plots.COLOURS["near"]
    assert len({to_rgb(colour) for colour in plots.COLOURS.values()}) == 3


def test_set_names():
    assert plots.set_name("cifar10/test") == "CIFAR-10"
    assert plots.set_name("my photos") == "my photos"


def test_a_table_has_one_decimal_and_a_dash_for_nothing():
    html = plots.show_table(pd.DataFrame({"AUROC": [87.54, np.nan], "row": ["MSE", "x"]})).data
    assert "87.5" in html
    assert "87.54" not in html
    assert "–" in html
    assert "NaN" not in html
    assert 'class="dataframe table"' in html


def test_a_value_with_its_interval():
    assert plots.with_interval(86.21, 85.66, 86.74) == "86.2 [85.7, 86.7]"


@pytest.mark.parametrize("value", [87.5, "86.2 [85.7, 86.7]"])
def test_glue_keeps_a_value_for_other_pages(value, monkeypatch):
    kept = []
    monkeypatch.setattr(plots, "display", lambda data, **options: kept.append((data, options)))
    plots.glue("auroc", value)
    ((data, options),) = kept
    assert data == {"application/papermill.record/text/plain": repr(value)}
    assert options["raw"] is True
    assert options["metadata"]["scrapbook"]["name"] == "auroc"
