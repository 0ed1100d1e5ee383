import math

import numpy as np
import pytest
from dlsr.errors import UserError
from dlsr.scores import lr, mfsim, mfsim_by_layer, mse, mse_by_layer

from conftest import one_sentence

# Two images in layers of 2, 1 and 2 numbers
CHANNELS = (2, 1, 2)
Z = np.array([[3.0, 4.0, 2.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0, 1.0]], np.float32)
R = np.array([[4.0, 3.0, -1.0, 1.0, 1.0], [1.0, 0.0, 5.0, -1.0, -1.0]], np.float32)
COSINES = np.array([[24 / 25, -1.0, 1 / math.sqrt(2)], [1.0, 1.0, -1.0]])


def test_mse_by_hand():
    assert mse(Z, R).tolist() == pytest.approx([(1 + 1 + 9 + 0 + 1) / 5, (16 + 4 + 4) / 5])
    np.testing.assert_allclose(mse_by_layer(Z, R, CHANNELS), [[1.0, 9.0, 0.5], [0.0, 16.0, 4.0]])
    assert mse(Z, R).dtype == np.float32


@pytest.mark.parametrize(
    ("layers", "columns"), [("all", [0, 1, 2]), ("2..M", [1, 2]), ([3], [2]), ((1, 3), [0, 2])]
)
def test_mfsim_by_hand_on_every_choice_of_layers(layers, columns):
    np.testing.assert_allclose(mfsim_by_layer(Z, R, CHANNELS), -COSINES, atol=1e-6)
    seen = mfsim(Z, R, CHANNELS, layers=layers)
    np.testing.assert_allclose(seen, -COSINES[:, columns].mean(1), atol=1e-6)


def test_mfsim_takes_layers_2_to_m_or_the_only_one_and_is_lowest_for_the_same():
    np.testing.assert_array_equal(mfsim(Z, R, CHANNELS), mfsim(Z, R, CHANNELS, layers="2..M"))
    np.testing.assert_array_equal(mfsim(Z, R, (5,)), mfsim(Z, R, (5,), layers="all"))
    assert mfsim(Z, 3 * Z, (2, 3)) == pytest.approx(-1)
    assert mfsim(Z, -Z, (2, 3)) == pytest.approx(1)
    assert mfsim_by_layer(np.zeros((1, 2)), np.ones((1, 2)), (2,)).tolist() == [[0]]


def test_lr_is_the_first_networks_error_minus_the_lasts():
    z0, first, last = np.zeros((1, 2)), np.array([[3.0, 0.0]]), np.array([[1.0, 0.0]])
    assert lr(z0, first, last).tolist() == [4.5 - 0.5]


@pytest.mark.parametrize("layers", ["1..M", "last", "", [0], [4], [1, 9], []])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(UserError, match=r"'all', '2\.\.M' or numbers from 1 to 3") as error:
        mfsim(Z, R, CHANNELS, layers=layers)
    one_sentence(error)
