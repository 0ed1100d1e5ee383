from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import FakeEncoder, image_set
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from test_results import MFSIM, MSE, SETS, VARIANT, VARIANTS
from test_results import scores as made_scores

from dlsr import plots, results
from dlsr.features import extract
from dlsr.metrics import bootstrap, fpr95


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


def comparison():
    """As `benchmarks.compare` gives it; the paper has no value for the last row."""
    return pd.DataFrame(
        {
            "score": ["mse", "mfsim", "lr"],
            "metric": ["auroc", "auroc", "fpr95"],
            "paper": [87.5, 85.6, np.nan],
            "measured": [86.0, 85.0, 57.0],
            "ci_low": [85.5, 84.0, 56.5],
            "ci_high": [86.5, 86.0, 58.0],
            "difference": [-1.5, -0.6, np.nan],
        }
    )


def test_measured_values_stand_beside_the_papers():
    figure = plots.paper_and_measured(comparison(), title="Paper")
    check(figure, "Paper")
    auroc, fpr95 = figure.axes
    assert "AUROC" in auroc.get_xlabel()
    assert "FPR95" in fpr95.get_xlabel()
    assert [text.get_text() for text in auroc.get_yticklabels()] == ["MSE", "MFsim"]
    assert auroc.get_yticks().tolist() == [1, 0]  # the first row on top
    assert [text.get_text() for text in fpr95.get_yticklabels()] == ["LR"]
    diamonds = next(c for c in auroc.collections if c.get_label() == "paper (quoted)").get_offsets()
    assert diamonds[0].tolist() == [87.5, 1]
    (points,) = auroc.containers
    assert points.lines[0].get_xydata().tolist() == [[86, 1], [85, 0]]
    bars = np.array(points.lines[2][0].get_segments())[:, :, 0]
    np.testing.assert_allclose(bars, [[85.5, 86.5], [84, 86]])
    bars = np.array(fpr95.containers[0].lines[2][0].get_segments())[:, :, 0]
    np.testing.assert_allclose(bars, [[56.5, 58]])
    assert set(legend(figure)) == {"measured here", "paper (quoted)"}


def test_the_comparison_as_a_table():
    table = plots.comparison_table(comparison())
    assert table.iloc[0].tolist() == ["MSE", "AUROC", 87.5, "86.0 [85.5, 86.5]", "-1.5"]
    assert table["difference"].isna().tolist() == [False, False, True]


def test_a_table_of_intervals_has_a_line_for_each_set_and_score(rows):
    table = plots.intervals_table(rows)
    assert list(table.columns) == ["OOD", "score", "AUROC, %", "FPR95, %"]
    assert table["score"].tolist() == ["MSE", "LR", "MFsim"] * 2
    assert table["OOD"].tolist() == ["near/test"] * 3 + ["far/test"] * 3
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
