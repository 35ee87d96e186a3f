"""The outputs of dense heads as rows, and how their last layers start."""

import math

import pytest
import torch
from torch import nn

from heads.boxes.rows import bias_of, flatten_levels, initialise_predictors, predict_rows
from heads.dense.towers import LevelScales
from heads.precision import at_least_float32


def test_rows_go_cell_by_cell_and_anchor_by_anchor():
    """Two anchors with three values each, on two levels."""
    maps = [torch.randn(2, 6, 2, 3), torch.randn(2, 6, 1, 2)]
    want = [
        m[:, 3 * anchor : 3 * anchor + 3, y, x]
        for m in maps
        for y in range(m.shape[2])
        for x in range(m.shape[3])
        for anchor in range(2)
    ]
    assert torch.equal(flatten_levels(maps, 3), torch.stack(want, 1))


@pytest.mark.parametrize("anchors", [1, 2])
def test_predictors_together_say_what_each_says_alone(anchors):
    maps = [torch.randn(2, 5, 2, 3).double(), torch.randn(2, 5, 1, 2).double()]
    predictors = [nn.Conv2d(5, anchors * values, 3, padding=1).double() for values in (3, 4)]
    together = predict_rows(maps, *predictors, anchors=anchors)
    for predictor, values, rows in zip(predictors, (3, 4), together, strict=True):
        torch.testing.assert_close(rows, flatten_levels([predictor(m) for m in maps], values), rtol=0, atol=1e-12)


def test_an_untrained_predictor_says_the_prior_and_draws_weights_in_order():
    layers = [nn.Conv2d(64, 32, 3) for _ in range(2)]
    torch.manual_seed(0)
    initialise_predictors(*layers, prior=0.02)
    torch.manual_seed(0)
    for layer in layers:
        assert torch.equal(layer.weight, torch.empty_like(layer.weight).normal_(std=0.01))
    assert layers[0].bias.tolist() == pytest.approx([-math.log(0.98 / 0.02)] * 32)
    assert not layers[1].bias.any()


def test_a_layer_without_bias_is_named():
    with pytest.raises(ValueError, match=r"Conv2d\(2, 3.*must have a bias"):
        bias_of(nn.Conv2d(2, 3, 1, bias=False))


def test_each_level_has_its_factor():
    scales = LevelScales(2)
    assert list(scales.state_dict()) == ["0.scale", "1.scale"]
    scales[1].scale.data.fill_(5)
    assert scales.rows(((1, 2), (1, 1))).tolist() == [[1], [1], [5]]


def test_half_precision_and_nothing_else_is_left():
    for dtype, want in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32)):
        assert at_least_float32(torch.ones(2, dtype=dtype)).dtype == want
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(2, dtype=dtype)
        assert at_least_float32(x) is x
