import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from dlsr.evaluation import beside_paper, evaluate
from dlsr.plots import auroc_scale, comparison_table, figure, finish, show_table
from IPython.display import HTML


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
        (comparison_table, ["97.3", "SVHN: the first 30.", "ID: CIFAR-10. AUROC", "mean"]),
        (lambda both: comparison_table(both, "fpr95", caption="a < b"), ["a &lt; b", "&lt;own&gt;"]),
        (lambda both: comparison_table(both.drop(columns="paper")), ["MNIST", "MSE"]),
        (lambda both: show_table(pd.DataFrame({"x": [1.25, np.nan]}), "Caption"), ["1.2", "–"]),
    ],
    ids=["table", "FPR95", "no paper", "plain"],
)
def test_a_table_shows_what_it_is_given(draw, told, both):
    shown = draw(both)
    assert isinstance(shown, HTML)
    for part in told:
        assert part in shown.data
    assert "MNIST: ." not in shown.data  # a whole set has no note


def test_the_best_of_a_set_is_bold_and_the_fewer_are_the_columns(both):
    def first_column(table):
        return re.findall(r"<tr>\s*<td>(.*?)</td>", comparison_table(table).data)

    assert first_column(both) == ["SVHN", "MNIST", "mean"]
    one = both[both["ood"] == "svhn/test"]
    assert first_column(one) == ["MSE", "&lt;own&gt;"]
    values = one[one["metric"].eq("auroc") & one["versus"].eq("")]["value"].round(1)
    assert comparison_table(one).data.count("<b>") == (values == values.max()).sum()


def test_a_figure_is_shown_once_and_its_scale_tells_values_near_100_apart():
    drawn, ((axis,),) = figure(2)
    auroc_scale(axis)
    axis.scatter([60, 99, 99.9], [0, 1, 2])
    finish(drawn, "Title").canvas.draw()
    assert drawn.get_suptitle() == "Title" and not plt.get_fignums()
    left, middle, right = axis.transData.transform([[60, 0], [99, 0], [99.9, 0]])[:, 0]
    assert right - middle > 0.3 * (middle - left)
    assert not plt.rcParams["axes.spines.top"]
