"""Assignment against the published algorithm written as plain loops."""

import pytest
import torch

from heads.boxes import assign
from heads.boxes.anchors import anchor_grid, cell_anchors
from heads.boxes.assign import assign_atss, assign_max_iou
from heads.boxes.boxes import iou

STRIDES = (8, 16, 32, 64, 128)


def plain_atss(anchors, counts, boxes, valid, topk=9):
    """The published algorithm for one image, box by box over all anchors, in float64."""
    anchors, boxes = anchors.double(), boxes.double()
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    ious = iou(anchors[:, None], boxes)
    best, matched = torch.full((len(anchors),), -1.0, dtype=torch.float64), torch.full((len(anchors),), -1)
    for k, box in enumerate(boxes):
        distance = ((centres - (box[:2] + box[2:]) / 2) ** 2).sum(1)
        candidates, start = [], 0
        for count in counts:
            at = torch.arange(start, start + count)[valid[start : start + count]]
            candidates.append(at[distance[at].argsort(stable=True)[:topk]])
            start += count
        candidates = torch.cat(candidates)
        threshold = ious[candidates, k].mean() + ious[candidates, k].std()
        for a in candidates.tolist():
            inside = min(*(centres[a] - box[:2]).tolist(), *(box[2:] - centres[a]).tolist()) > 0.01
            if ious[a, k] >= threshold and inside and ious[a, k] > best[a]:
                best[a], matched[a] = ious[a, k], k
    return matched


def random_boxes(count: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    side = torch.exp(torch.rand(count, 2, generator=generator) * 4 + 1.5)
    return torch.cat([centre - side / 2, centre + side / 2], 1)


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize(
    ("sizes", "topk"),
    [
        (((16, 16), (8, 8), (4, 4), (2, 2), (1, 1)), 9),
        # Strips, where the candidates of a level lie in one row or column.
        (((1, 40), (1, 20), (1, 10), (1, 5), (1, 3)), 9),
        (((23, 2), (12, 1), (6, 1), (3, 1), (2, 1)), 9),
        (((19, 25), (10, 13)), 4),
        (((13, 17), (7, 9), (4, 5)), 30),
    ],
)
def test_assignment_equals_the_plain_algorithm(sizes, topk, offset):
    generator = torch.Generator().manual_seed(0)
    strides = STRIDES[: len(sizes)]
    grid = anchor_grid(sizes, strides, [cell_anchors([8 * s]) for s in strides], offset)
    height, width = 8 * sizes[0][0], 8 * sizes[0][1]
    counts = [0, 1, 40, 15]
    # Some boxes overhang the image, so that anchors centred on its border can be positive too.
    boxes = [random_boxes(n, height, width, generator) for n in counts]
    valid_sizes = torch.tensor([[[-(-h * k // 4), -(-w * k // 4)] for h, w in sizes] for k in (4, 4, 3, 2)])
    matched = assign_atss(grid, boxes, topk, valid_sizes)
    for image in range(len(counts)):
        valid = torch.cat(
            [
                ((torch.arange(h) < vh)[:, None] & (torch.arange(w) < vw)).flatten()
                for (h, w), (vh, vw) in zip(sizes, valid_sizes[image].tolist(), strict=True)
            ]
        )
        want = plain_atss(grid.anchors, grid.counts, boxes[image], valid, topk)
        first = sum(counts[:image])
        assert torch.equal(matched[image], torch.where(want >= 0, want + first, -1))
    assert (matched >= 0).any()
    # All levels whole is the same as saying nothing about it.
    whole = torch.tensor([sizes] * len(boxes))
    assert torch.equal(assign_atss(grid, boxes, topk, whole), assign_atss(grid, boxes, topk))


def test_equally_near_anchors_are_taken_in_order():
    """A box centred on a corner of four cells: their centres are equally near, and so are their overlaps."""
    grid = anchor_grid([(4, 4)], [8], [cell_anchors([16])], 0.5)
    box = torch.tensor([[8.0, 8.0, 24.0, 24.0]])
    for topk, chosen in ((2, [5, 6]), (4, [5, 6, 9, 10])):
        assert (assign_atss(grid, [box], topk) >= 0).nonzero()[:, 1].tolist() == chosen
    twice = assign_atss(grid, [box.repeat(2, 1)], topk=4)
    assert set(twice[twice >= 0].tolist()) == {0}


def plain_max_iou(anchors, boxes, positive, negative, least, low_quality, valid):
    """The thresholds for one image, anchor by anchor, then box by box."""
    ious = iou(anchors[:, None], boxes)
    ious[~valid] = -1
    matched = []
    for row in ious.tolist():
        best = max(row, default=-1)
        matched.append(row.index(best) if best >= positive else -1 if best < negative else -2)
    own = [row.index(max(row)) if row else -1 for row in ious.tolist()]
    for k in range(len(boxes) if low_quality else 0):
        top = ious[:, k].max().item()
        for a in range(len(anchors)):
            if 0 < top == ious[a, k].item() and top >= least:
                matched[a] = k if low_quality == "moves" else own[a]
    return torch.tensor(matched)


@pytest.mark.parametrize("pairs", [2**24, 5000], ids=["at once", "in parts"])
@pytest.mark.parametrize("low_quality", ["moves", "keeps", None])
@pytest.mark.parametrize("by_image", [False, True], ids=["shared", "by image"])
def test_max_iou_equals_plain_loops(by_image, low_quality, pairs, monkeypatch):
    monkeypatch.setattr(assign, "_PAIRS", pairs)
    generator = torch.Generator().manual_seed(0)
    grid = anchor_grid([(8, 9), (4, 5)], [8, 16], [cell_anchors([4 * s, 6 * s], (0.5, 1.0)) for s in (8, 16)], 0.0)
    counts = [3, 0, 11, 1]
    boxes = [random_boxes(n, 64, 72, generator) for n in counts]
    # Twice the same box, near to an anchor: a tie at every anchor. And one that no anchor touches.
    boxes[2][1] = boxes[2][4] = grid.anchors[200]
    boxes[2][7] += 1000
    anchors = grid.anchors
    if by_image:
        anchors = anchors + 3 * torch.randn(4, 1, 4, generator=generator)
    valid = torch.rand(4, len(grid.anchors), generator=generator) < 0.9
    arguments = {"positive": 0.5, "negative": 0.4, "least": 0.3, "low_quality": low_quality}
    matched = assign_max_iou(anchors, boxes, **arguments, valid=valid)
    kinds = set()
    for image, n in enumerate(counts):
        own = anchors[image] if by_image else anchors
        want = plain_max_iou(own, boxes[image], **arguments, valid=valid[image])
        kinds |= set(want.clamp(max=0).tolist())
        assert torch.equal(matched[image], torch.where(want >= 0, want + sum(counts[:image]), want))
        assert (matched[image][~valid[image]] == -1).all() and n == len(boxes[image])
    assert kinds == {-2, -1, 0}


def test_an_overlap_at_a_threshold():
    """The anchor is 8 × 8; the boxes are a half of it, a quarter, and a hair less than that."""
    grid = anchor_grid([(1, 1)], [8], [cell_anchors([8])], 0.5)
    for box, want in (([0.0, 0, 8, 4], 0), ([0.0, 0, 8, 3.99], -2), ([0.0, 0, 4, 4], -2), ([0.0, 0, 4, 3.99], -1)):
        matched = assign_max_iou(grid.anchors, [torch.tensor([box])], 0.5, 0.25, low_quality=None)
        assert matched.tolist() == [[want]]
    # An own best counts from `least` on.
    for least, want in ((0.5, 0), (0.501, -2)):
        matched = assign_max_iou(grid.anchors, [torch.tensor([[0.0, 0, 8, 4]])], 0.6, 0.25, least)
        assert matched.tolist() == [[want]]


def test_a_box_that_no_anchor_overlaps_gets_none():
    grid = anchor_grid([(2, 2)], [8], [cell_anchors([8])], 0.5)
    boxes = [torch.tensor([[100.0, 100.0, 120.0, 120.0], [4.0, 4.0, 4.0, 9.0]])]
    assert (assign_max_iou(grid.anchors, boxes, 0.5, 0.4) == -1).all()
