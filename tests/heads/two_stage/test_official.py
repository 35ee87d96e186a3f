"""What detectron2's Faster R-CNN, which DyHead's authors released, does otherwise than mmdetection's, row by row."""

import numpy as np
import pytest
import torch

from heads.boxes.assign import BACKGROUND, IGNORED
from heads.two_stage.cascade_rcnn import CascadeRCNNHead
from heads.two_stage.faster_rcnn import FasterRCNNHead
from heads.two_stage.roi import levels_of
from heads.two_stage.rpn import RPNHead, RPNOutputs

# The anchors of the one cell of one level: wide, square, tall, of 512² each, centred on the corner.
WIDE, SQUARE, TALL = 0, 1, 2


def rpn(convention, **more):
    return RPNHead(16, strides=(64,), convention=convention, **more)


def outputs(logits=(0.0, 0.0, 0.0), deltas=None, sizes=((1, 1),)):
    logits = torch.tensor([logits])
    deltas = torch.zeros(*logits.shape, 4) if deltas is None else torch.tensor([deltas])
    return RPNOutputs(logits, deltas, sizes)


def target(*boxes):
    return [{"boxes": torch.tensor(boxes).view(-1, 4), "labels": torch.zeros(len(boxes), dtype=torch.int64)}]


@pytest.mark.parametrize(("convention", "value"), [("mmdet", IGNORED), ("official", BACKGROUND)])
def test_anchors_in_the_padding(convention, value):
    head, raw = rpn(convention), outputs((0.0,) * 12, sizes=((2, 2),))
    matched = head.match(head.grid(raw), target(), [(64, 50)])
    # The image fills the first cell of the first row; the padding of 32 pixels adds nothing to it.
    assert matched[0].tolist() == [BACKGROUND] * 3 + [value] * 9


@pytest.mark.parametrize(("convention", "found"), [("mmdet", BACKGROUND), ("official", 0)])
def test_a_box_that_overlaps_little_has_its_best_anchor(convention, found):
    head, raw = rpn(convention), outputs()
    matched = head.match(head.grid(raw), target([-90.0, -90.0, 90.0, 90.0]), [(64, 64)])
    # 180² inside 512²: an IoU of 0.12 with all three.
    assert matched[0].tolist() == [found] * 3


@pytest.mark.parametrize(("convention", "owner"), [("mmdet", 1), ("official", 0)])
def test_whose_an_anchor_is_that_two_boxes_like_best(convention, owner):
    head, raw = rpn(convention), outputs()
    boxes = [-256.0, -256.0, 256.0, 200.0], [-256.0, -256.0, 256.0, 0.0]
    # The square anchor covers the first by 0.89 and the second by 0.5, which no other anchor does better.
    assert head.match(head.grid(raw), target(*boxes), [(64, 64)])[0, SQUARE] == owner


@pytest.mark.parametrize(("convention", "count"), [("mmdet", 3), ("official", 40)])
def test_what_the_losses_are_divided_by(convention, count):
    head = rpn(convention, samples=40)
    raw = outputs((1.0, -2.0, 0.5), [[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 0]])
    box = target([-256.0, -256.0, 256.0, 256.0])
    losses = head.loss(raw, box, [(64, 64)], chosen=torch.ones(1, 3, dtype=torch.bool))
    # One positive, two background; the others' logits stand for no object.
    entropy = np.log1p(np.exp(2.0)) + np.log1p(np.exp(1.0)) + np.log1p(np.exp(0.5))
    assert losses["loss_rpn_cls"].item() == pytest.approx(entropy / count, rel=1e-6)
    assert losses["loss_rpn_bbox"].item() == pytest.approx(0.5 / count, rel=1e-6)


@pytest.mark.parametrize(("convention", "side"), [("mmdet", 512 * 16 / 1000), ("official", 512 * np.exp(-6.0))])
def test_how_small_a_proposal_can_be(convention, side):
    head = rpn(convention)
    raw = outputs((0.0, 9.0, 0.0), [[0, 0, 0, 0], [0.25, 0.25, -6.0, -6.0], [0, 0, 0, 0.0]])
    ((boxes, _),) = head.proposals(raw, [(1000, 1000)], 3, 1)
    want = 128 + side * np.array([[-0.5, -0.5, 0.5, 0.5]])
    np.testing.assert_allclose(boxes.numpy(), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("convention", "first", "score"), [("mmdet", WIDE, 1.0), ("official", TALL, 30.0)])
def test_the_best_of_proposals_whose_probabilities_are_1(convention, first, score):
    head = rpn(convention)
    raw = outputs((20.0, 1.0, 30.0))
    ((boxes, scores),) = head.proposals(raw, [(1000, 1000)], 1, 1)
    assert scores.tolist() == [score]
    np.testing.assert_allclose(boxes[0].numpy(), head.grid(raw).anchors[first].clamp(min=0).numpy())


@pytest.mark.parametrize(("convention", "label"), [("mmdet", 2), ("official", 1)])
def test_whose_a_region_is_that_two_boxes_like_best(convention, label):
    head = FasterRCNNHead(in_channels=16, num_classes=3, convention=convention)
    twice = torch.tensor([[0.0, 0, 40, 40], [0, 0, 40, 40]])
    regions = head.regions([torch.tensor([[0.0, 0, 40, 39]])], [{"boxes": twice, "labels": torch.tensor([1, 2])}])
    # The proposal is nobody's best: the boxes themselves are among the candidates.
    assert sorted(regions.labels.tolist()) == sorted([label, label, 1])


@pytest.mark.parametrize(("convention", "least"), [("mmdet", 16 / 1000), ("official", np.exp(-5.0))])
def test_how_small_a_detection_can_be(convention, least):
    head = FasterRCNNHead(in_channels=16, num_classes=3, convention=convention)
    box = head.coder.decode(torch.tensor([0.0, 0, -25, 25]), torch.tensor([0.0, 0, 100, 100]))
    # Deltas are in fifths of a logarithm, and from above both hold them.
    assert (box[2] - box[0]).item() == pytest.approx(100 * least, rel=1e-5)
    assert (box[3] - box[1]).item() == pytest.approx(100 * 1000 / 16, rel=1e-5)


def test_levels_are_counted_as_detectron2_counts():
    # One step below the border it is the last place of a logarithm that decides.
    steps = [step for step in range(-12, 4) if step != -1]
    near = [56 * 2**level * (1 + step * 2e-7) for level in range(4) for step in steps]
    side = torch.tensor([1.0, 3.0, 112.0, 500.0, 2000.0, 0.0, *near])
    boxes = torch.stack([side * 0, side * 0, side, side], 1)
    with np.errstate(divide="ignore"):
        exact = np.sqrt((side * side).numpy()) / np.float32(224)
        want = np.clip(np.floor(np.float32(4) + np.log2(exact)), 2, 5) - 2
    assert levels_of(boxes, 4, "official").tolist() == want.tolist()
    # The number next below the border counts as on it: three and a bit of nothing less is three in float32.
    next_below = torch.tensor([[0.0, 0, *[np.nextafter(np.float32(112), np.float32(0)).item()] * 2]])
    assert next_below[0, 2] < 112 and levels_of(next_below, 4, "official").tolist() == [1]
    # Half a millionth below the border is another level here than in mmdetection.
    below = torch.tensor([[0.0, 0, 111.99995, 111.99995]])
    assert levels_of(below, 4, "official").tolist() == [0] and levels_of(below, 4).tolist() == [1]


def test_pooling_follows_the_convention():
    maps = [torch.full((1, 16, 128 >> level, 128 >> level), float(level)) for level in range(5)]
    below = torch.tensor([[20.0, 20, 131.99995, 131.99995]])
    assert (below[0, 2] - below[0, 0]).item() < 112
    for convention, level in (("mmdet", 1.0), ("official", 0.0)):
        head = FasterRCNNHead(in_channels=16, num_classes=3, convention=convention)
        assert head.pool(head(maps, maps), [below]).unique().tolist() == [level]


def test_an_unknown_convention_is_refused():
    for make in (rpn, lambda name: FasterRCNNHead(in_channels=16, num_classes=3, convention=name)):
        with pytest.raises(ValueError, match="unknown convention 'detectron'; the conventions are mmdet, official"):
            make("detectron")


def test_other_detectors_have_mmdetections():
    head = CascadeRCNNHead(in_channels=16, num_classes=3)
    assert head.convention.level_rule == "mmdet" and head.rpn.convention.low_quality == "moves"
