"""The trunk of a detector without DyHead."""

import pytest
import torch

from heads.dense.towers import ConvTowers


def test_towers_have_the_published_number_of_parameters():
    count = [sum(p.numel() for p in ConvTowers(256, bias=bias).parameters()) for bias in (False, True)]
    assert count == [4_722_688, 4_724_736]
    assert [m.num_groups for m in ConvTowers(256).modules() if isinstance(m, torch.nn.GroupNorm)] == [32] * 8


def test_towers_keep_the_shapes():
    features = [torch.randn(2, 24, 5, 7), torch.randn(2, 24, 3, 4)]
    for maps in ConvTowers(24)(features):
        assert [m.shape for m in maps] == [f.shape for f in features]


def test_towers_without_norm_have_biases_and_no_groups():
    """RetinaNet's: four convolutions a task, 256 · 256 · 9 + 256 parameters each."""
    towers = ConvTowers(256, norm=False)
    assert sum(p.numel() for p in towers.parameters()) == 8 * (256 * 256 * 9 + 256)
    assert not any(isinstance(m, torch.nn.GroupNorm) for m in towers.modules())
    assert sum(p.numel() for p in ConvTowers(256, depth=3).parameters()) == 6 * (256 * 256 * 9 + 512)


@pytest.mark.parametrize("channels", [64, 256])
def test_towers_without_norm_start_by_keeping_the_size_of_a_signal(channels):
    """By convolutions that start at 0.01 less than a fiftieth would come through."""
    torch.manual_seed(0)
    (x,), (y,) = ConvTowers(channels, norm=False)([torch.randn(1, channels, 24, 24)])
    for out in (x, y):
        assert 0.5 < out.square().mean().sqrt() < 2
