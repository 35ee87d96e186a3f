"""Parameters and multiply-adds of the R-50 baselines of the dense detectors, by hand and beside published figures."""

import pytest
import torch

from ablations.experiment.measure import count_gmacs, count_parameters
from heads import build_detector

# ResNet-50 without its classifier has 23,508,032 parameters, of which 53,120 belong to norms that are constants here.
BACKBONE = 23_508_032 - 53_120
# The pyramid of an image of 800 × 1333, padded to 800 × 1344.
CELLS = (100 * 168, 50 * 84, 25 * 42, 13 * 21, 7 * 11)


def conv(inputs: int, outputs: int, kernel: int) -> int:
    """Weights of a convolution."""
    return inputs * outputs * kernel * kernel


TOWER = 256 * 256 * 9
# Weights that are applied at every cell of the pyramid, and parameters besides: biases, norms, scales.
TRUNK_AND_HEAD = {
    "atss": (8 * TOWER + conv(256, 85, 1), 8 * 512 + 85 + 5),
    "retinanet": (8 * TOWER + conv(256, 9 * 84, 3), 8 * 256 + 9 * 84),
    "fcos": (8 * TOWER + conv(256, 85, 3), 8 * 512 + 85 + 5),
    # Six convolutions of the towers, three of the stages, and their outputs.
    "reppoints": (9 * TOWER + conv(256, 80 + 18 + 18, 1), 6 * 512 + 256 + 116 + 2),
    # FCOS with biases, and in two branches a convolution each to five groups of channels and back.
    "borderdet": (
        8 * TOWER + conv(256, 85, 3) + 2 * conv(256, 5 * (256 + 128), 1) + conv(256, 84, 1),
        8 * 768 + 85 + 5 + 5 * (256 + 128) + 2 * 256 + 84,
    ),
}
P6_FROM_C5 = ("retinanet", "reppoints")


def built(name: str):
    with torch.device("meta"):
        return build_detector(name, 80, "resnet50", None)


@pytest.mark.parametrize("name", TRUNK_AND_HEAD)
def test_cost_of_a_baseline(name):
    model = built(name)
    weights, besides = TRUNK_AND_HEAD[name]
    inputs = 2048 if name in P6_FROM_C5 else 256
    lateral = [conv(c, 256, 1) for c in (512, 1024, 2048)]
    extra = [conv(inputs, 256, 3), TOWER]
    pyramid = sum(lateral) + 3 * TOWER + sum(extra) + 8 * 256
    assert count_parameters(model) == BACKBONE + pyramid + weights + besides

    gmacs = count_gmacs(model, [torch.empty(3, 800, 1333, device="meta")])
    per_level = [lateral[0] + TOWER, lateral[1] + TOWER, lateral[2] + TOWER, *extra]
    by_hand = sum(cells * (own + weights) for cells, own in zip(CELLS, per_level, strict=True)) / 1e9
    # What is left is the backbone: 4.09 at 224 × 224, and for 800 × 1344 by the area.
    assert gmacs - by_hand == pytest.approx(4.087 * 800 * 1344 / 224**2, rel=0.01)


def test_retinanet_costs_what_mmdetection_prints():
    """37.74 M parameters that are trained, with the stem and first stage frozen, and 239.32 GFLOPs at 1280 × 800."""
    model = built("retinanet")
    frozen = sum(p.numel() for part in (model.backbone.conv1, model.backbone.layer1) for p in part.parameters())
    # The norms of the other stages train there: all but 128 and 2,816 of the 53,120.
    norms = 53_120 - 128 - 2 * (3 * (64 + 64 + 256) + 256)
    assert (count_parameters(model) - frozen + norms) / 1e6 == pytest.approx(37.74, abs=0.005)
    # Its counter takes norms and biases too.
    gmacs = count_gmacs(model, [torch.empty(3, 800, 1280, device="meta")])
    assert gmacs == pytest.approx(239.32, rel=0.004)
