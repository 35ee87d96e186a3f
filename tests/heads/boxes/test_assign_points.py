"""Assignment of points against the published algorithms written as plain loops."""

import math

import pytest
import torch

from heads.boxes import assign
from heads.boxes.anchors import point_grid
from heads.boxes.assign_points import assign_centre, assign_nearest

STRIDES = (8, 16, 32)
SIZES = ((9, 12), (5, 6), (3, 3))
RANGES = ((-1.0, 16.0), (16.0, 32.0), (32.0, math.inf))


def random_boxes(count: int, generator: torch.Generator) -> torch.Tensor:
    """Some overhang the image; sides and positions are whole pixels, so that ranges and areas are met exactly."""
    centre = (torch.rand(count, 2, generator=generator) * torch.tensor([96, 72])).round()
    half = torch.exp(torch.rand(count, 2, generator=generator) * 2.5 + 1).round()
    return torch.cat([centre - half, centre + half], 1)


def plain_centre(boxes, radius):
    """For one image, level by level, point by point, box by box."""
    matched = []
    for (height, width), stride, (least, largest) in zip(SIZES, STRIDES, RANGES, strict=True):
        for y, x in ((y, x) for y in range(height) for x in range(width)):
            px, py = (x + 0.5) * stride, (y + 0.5) * stride
            best, index = math.inf, -1
            for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
                sides = px - x1, py - y1, x2 - px, y2 - py
                inside = min(sides) > 0
                if radius is not None:
                    off = max(abs(px - (x1 + x2) / 2), abs(py - (y1 + y2) / 2))
                    inside = inside and off < radius * stride
                area = (x2 - x1) * (y2 - y1)
                if inside and least <= max(sides) <= largest and area < best:
                    best, index = area, k
            matched.append(index)
    return torch.tensor(matched)


@pytest.mark.parametrize("pairs", [2**24, 1500], ids=["at once", "in parts"])
@pytest.mark.parametrize("radius", [None, 1.5])
def test_centre_assignment_equals_plain_loops(radius, pairs, monkeypatch):
    monkeypatch.setattr(assign, "_PAIRS", pairs)
    generator = torch.Generator().manual_seed(0)
    counts = [4, 0, 15, 1]
    boxes = [random_boxes(n, generator) for n in counts]
    # Equal boxes, one of equal area, and one so that a point is exactly 16 pixels from its farthest side.
    boxes[2][5] = boxes[2][2]
    boxes[2][6:10] = torch.tensor([[4.0, 4, 44, 24], [4, 4, 24, 44], [30, 30, 31, 31], [36, 20, 60, 40]])
    # The point (24, 24) of the second level is 16 pixels from its right and lower sides.
    boxes[3][0] = torch.tensor([16.0, 16, 40, 40])
    matched = assign_centre(point_grid(SIZES, STRIDES, 0.5), boxes, RANGES, radius)
    for image in range(len(counts)):
        want = plain_centre(boxes[image], radius)
        assert torch.equal(matched[image], torch.where(want >= 0, want + sum(counts[:image]), -1))
    assert len(matched.unique()) > 12


def test_a_box_of_nobodys_size_is_background():
    """A line has no inside."""
    boxes = [torch.tensor([[12.0, 0.0, 12.0, 72.0]])]
    assert (assign_centre(point_grid(SIZES, STRIDES, 0.5), boxes, RANGES) == -1).all()


def plain_nearest(boxes, valid, scale=4.0):
    """For one image, box by box over all points of its level."""
    points, level_of = [], []
    for level, ((height, width), stride) in enumerate(zip(SIZES, STRIDES, strict=True)):
        points += [(x * stride, y * stride) for y in range(height) for x in range(width)]
        level_of += [level] * height * width
    best, matched = [math.inf] * len(points), [-1] * len(points)
    for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        w, h = max(x2 - x1, 1e-6), max(y2 - y1, 1e-6)
        level = int((math.log2(w / scale) + math.log2(h / scale)) / 2) - 3
        level = min(max(level, 0), len(STRIDES) - 1)
        cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
        distance = {
            i: math.hypot((x - cx) / w, (y - cy) / h)
            for i, (x, y) in enumerate(points)
            if level_of[i] == level and valid[i]
        }
        nearest = min(distance, key=distance.get)
        if distance[nearest] < best[nearest]:
            best[nearest], matched[nearest] = distance[nearest], k
    return torch.tensor(matched)


@pytest.mark.parametrize("whole", [True, False])
def test_nearest_assignment_equals_plain_loops(whole):
    generator = torch.Generator().manual_seed(1)
    counts = [4, 0, 25, 1]
    boxes = [random_boxes(n, generator) for n in counts]
    boxes[0][0] = torch.tensor([10.0, 10, 10, 50])
    # Centred halfway between points, and one that does not reach the grid at all.
    boxes[0][1:3] = torch.tensor([[8.0, 8, 16, 16], [500, 400, 540, 460]])
    # Twice the same: the first gets the point.
    boxes[2][3] = boxes[2][1]
    sizes = torch.tensor([SIZES] * 4)
    if not whole:
        sizes[1:] = (sizes[1:] * 3 / 4).ceil().long()
    matched = assign_nearest(point_grid(SIZES, STRIDES, 0.0), boxes, 4.0, None if whole else sizes)
    for image in range(len(counts)):
        valid = torch.cat(
            [
                ((torch.arange(h) < vh)[:, None] & (torch.arange(w) < vw)).flatten()
                for (h, w), (vh, vw) in zip(SIZES, sizes[image].tolist(), strict=True)
            ]
        )
        want = plain_nearest(boxes[image], valid)
        assert torch.equal(matched[image], torch.where(want >= 0, want + sum(counts[:image]), -1)), image
    assert len(matched.unique()) > 18


def test_no_box_at_all():
    grid = point_grid(SIZES, STRIDES, 0.0)
    none = [torch.zeros(0, 4)] * 2
    assert (assign_nearest(grid, none) == -1).all() and (assign_centre(grid, none, RANGES) == -1).all()
