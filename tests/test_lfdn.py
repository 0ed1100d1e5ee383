import math

import pytest
import torch
from dlsr.errors import UserError
from dlsr.lfdn import LFDN, sinusoid
from torch import nn

from conftest import one_sentence


def test_the_papers_size():
    with torch.device("meta"):
        network = LFDN(720)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert (round(millions, 2), len(network.blocks)) == (86.74, 16)


def test_a_new_network_says_zero_and_a_new_block_is_the_identity():
    network = LFDN(6, width=8, blocks=2)
    assert torch.count_nonzero(network(torch.randn(5, 6), torch.arange(5))) == 0
    x = torch.randn(5, 8)
    for block in network.blocks:
        assert torch.equal(block(x, torch.randn(5, 6)), x)


def test_sinusoid_by_hand():
    values = sinusoid(torch.tensor([0, 3, 99]), 6)
    for row, t in zip(values.tolist(), (0, 3, 99), strict=True):
        angles = [t * 10_000 ** (-i / 3) for i in range(3)]
        by_hand = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert row == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("wrong", [{"width": 7}, {"width": 0}, {"width": -2}, {"blocks": 0}, {"features": 0}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(UserError, match="even width") as error:
        LFDN(**{"features": 4, "width": 8, "blocks": 1} | wrong)
    one_sentence(error)


def filled(network):
    """Return the same network without zero weights, so that all of it has an effect."""
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws) / 2)
    return network


def test_the_network_follows_the_formula():
    """h = Linear(SiLU(GN(x))) + Linear(SiLU(emb)); x + Linear0(SiLU(GN(h))), written out again."""
    network = filled(LFDN(3, width=4, blocks=2))
    z, t, silu = torch.randn(5, 3), torch.tensor([0, 1, 50, 98, 99]), nn.functional.silu

    def norm(group, x):  # a GroupNorm of one group is a LayerNorm
        return nn.functional.layer_norm(x, (4,), group.weight, group.bias)

    def linear(layer, x):
        return x @ layer.weight.T + layer.bias

    x = linear(network.into[1], silu(z))
    emb = linear(network.time[2], silu(linear(network.time[0], sinusoid(t, 4))))
    for block in network.blocks:
        h = linear(block.into[2], silu(norm(block.into[0], x)))
        h = h + linear(block.time[1], silu(emb))
        x = x + linear(block.out[2], silu(norm(block.out[0], h)))
    expected = linear(network.out[2], silu(norm(network.out[0], x)))
    torch.testing.assert_close(network(z, t), expected)


def test_without_the_timestep_it_is_the_papers_autoencoder():
    """It is "a 16-layer linear network": 8 blocks of two, one layer before them and one after."""
    network = filled(LFDN(3, width=4, blocks=8, timestep=False))
    linear = [part for part in network.modules() if isinstance(part, nn.Linear)]
    assert len(linear) == 16 + 2
    x = torch.randn(5, 3)
    h = network.into(x)
    for block in network.blocks:
        h = h + block.out(block.into(h))
    torch.testing.assert_close(network(x), network.out(h))
