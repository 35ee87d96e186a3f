"""`nms_mask`: for every class of every set what `nms` keeps of the boxes above the score."""

import pytest
import torch

from kernels import nms, nms_mask
from kernels.backend import resolve_backend

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def scene(sets, classes, count, seed=0, ties=False):
    generator = torch.Generator().manual_seed(seed)
    corner, side = (torch.rand(2, sets, count, 2, generator=generator) * 60).unbind()
    scores = torch.rand(sets, classes, count, generator=generator) - 0.5
    return torch.cat([corner, corner + side], -1), (scores * 10).round() / 10 if ties else scores


@pytest.mark.both_paths
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ties", [False, True])
def test_each_class_of_each_set_by_itself(ties, device):
    boxes, scores = (x.to(device) for x in scene(2, 3, 25, ties=ties))
    found = nms_mask(boxes, scores, 0.3, -0.2)
    assert found.shape == scores.shape and found.dtype == torch.bool and found.device == boxes.device
    wanted = torch.zeros_like(found)
    for part in range(2):
        for label in range(3):
            above = (scores[part, label] > -0.2).nonzero()[:, 0]
            wanted[part, label, above[nms(boxes[part, above], scores[part, label, above], 0.3)]] = True
    assert torch.equal(found, wanted)
    above = scores > -0.2
    assert (above & ~found).any() and found.any() and not (found & ~above).any()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing(shape):
    sets, _, count = shape
    assert nms_mask(torch.rand(sets, count, 4), torch.rand(shape), 0.5, 0.0).shape == shape


def test_nothing_above_the_score():
    boxes, scores = scene(2, 3, 5)
    assert not nms_mask(boxes, scores, 0.5, 0.5).any()


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        (r"boxes must be \(B, n, 4\), got shape \(2, 5, 3\)", {"boxes": torch.rand(2, 5, 3)}),
        (r"boxes must be \(B, n, 4\), got shape \(5, 4\)", {"boxes": torch.rand(5, 4)}),
        (
            r"scores must be \(2, C, 5\), one for each class of each box, got shape \(2, 3, 6\)",
            {"scores": torch.rand(2, 3, 6)},
        ),
        (
            r"scores must be \(2, C, 5\), one for each class of each box, got shape \(1, 3, 5\)",
            {"scores": torch.rand(1, 3, 5)},
        ),
        ("scores must be floating point", {"scores": torch.zeros(2, 3, 5, dtype=torch.int64)}),
        ("iou_threshold must be a number, got NaN", {"iou_threshold": float("nan")}),
        ("score_threshold must be a number, got NaN", {"score_threshold": float("nan")}),
    ],
)
def test_malformed_calls(message, wrong):
    boxes, scores = scene(2, 3, 5)
    with pytest.raises(ValueError, match=message):
        nms_mask(**{"boxes": boxes, "scores": scores, "iou_threshold": 0.5, "score_threshold": 0.0} | wrong)


def test_the_operator_and_programs_of_it():
    boxes, scores = scene(2, 3, 12)
    torch.library.opcheck(torch.ops.dyhead.nms_mask.default, (boxes, scores, 0.3, 0.0, resolve_backend(boxes.device)))

    class Module(torch.nn.Module):
        def forward(self, boxes, scores):
            return nms_mask(boxes, scores, 0.3, 0.0).sum(1)

    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(boxes, scores), Module()(boxes, scores))
    auto = torch.export.Dim.AUTO
    program = torch.export.export(Module(), (boxes, scores), dynamic_shapes=({0: auto, 1: auto}, {0: auto, 2: auto}))
    other = scene(4, 3, 30, seed=1)
    assert torch.equal(program.module()(*other), Module()(*other))
