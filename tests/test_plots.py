import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from dlsr.evaluation import beside_paper, evaluate
from dlsr.plots import comparison_figure, comparison_table, show_table
from IPython.display import HTML
from matplotlib.figure import Figure


@pytest.fixture
def both():
    """Return results of two methods on two OOD sets, one of them a part, beside the paper's."""
    picks, sets = np.random.RandomState(0), np.repeat(["cifar10/test", "svhn/test", "mnist/test"], 30)
    scores = {name: picks.randn(90) + 9 * np.repeat(range(3), 30) for name in ("MSE", "<own>")}
    frame = pd.DataFrame({"set": sets, "image": "", "seed": 0} | scores)
    frame.attrs = {"about": {}, "partial": {"svhn/test": "the first 30", "mnist/test": ""}}
    table = evaluate(frame, id_test="cifar10/test", versus="MSE", draws=5)
    return beside_paper(table, "table 1")


@pytest.mark.parametrize(
    ("draw", "told"),
    [
        (lambda both: comparison_figure(both, title="Title"), ["MSE: SVHN", "MSE: mean"]),
        (lambda both: comparison_figure(both, title="Title", methods=["MSE"]), ["MSE: MNIST"]),
        (lambda both: comparison_figure(both.drop(columns="paper"), title="Title"), ["MSE: SVHN"]),
        (comparison_table, ["paper 97.3", "SVHN: the first 30.", "ID: CIFAR-10. AUROC", "mean"]),
        (lambda both: comparison_table(both, "fpr95", caption="a < b"), ["a &lt; b", "&lt;own&gt;"]),
        (lambda both: show_table(pd.DataFrame({"x": [1.25, np.nan]}), "Caption"), ["1.2", "–"]),
    ],
    ids=["figure", "one method", "no paper", "table", "FPR95", "plain"],
)
def test_it_can_be_drawn_and_shows_what_it_is_given(draw, told, both):
    shown = draw(both)
    if isinstance(shown, Figure):
        shown.canvas.draw()
        assert shown.get_suptitle() == "Title"
        assert not plt.get_fignums()  # so that no backend shows it twice
        (axis,), (low, high) = shown.axes, shown.axes[0].get_xlim()
        assert sum(low < tick < high for tick in axis.get_xticks()) > 1  # over a narrow range, too
        assert not axis.get_xticklabels(minor=True)
        text = " ".join(label.get_text() for label in axis.get_yticklabels())
    else:
        assert isinstance(shown, HTML)
        text = shown.data
    for part in told:
        assert part in text
    assert "MNIST: ." not in text  # a whole set has no note
    assert not plt.rcParams["axes.spines.top"]
