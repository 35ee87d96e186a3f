"""Assignment of ground-truth boxes to points, for detectors that have points instead of anchors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from heads.boxes.anchors import Grid
from heads.boxes.assign import BACKGROUND, box_chunks, sortable, stack_boxes
from heads.boxes.boxes import box_area, encode_distances


def assign_centre(
    points: Grid, boxes: list[Tensor], ranges: Sequence[tuple[float, float]], radius: float | None = 1.5
) -> Tensor:
    """The assignment of FCOS (Tian et al., 2019): a point is assigned the smallest box that it is allowed.

    A point is allowed a box if it lies inside (strictly) and the largest of its distances to the four sides is within
    the range of its level, ends included. With centre sampling it must also lie within `radius` strides of the box's
    centre, along both axes. Of equally small boxes the first wins. Everything is computed in float32.

    Args:
        points: One point per cell, A in all.
        boxes: For each of the N images (n_i, 4) x1, y1, x2, y2 in pixels; n_i may be 0.
        ranges: Least and largest distance of each level, in pixels.
        radius: Reach of centre sampling in strides; None lets all of a box count.

    Returns:
        (N, A) int64: the index of the assigned box in `torch.cat(boxes)`, or `BACKGROUND`.
    """
    stacked, first = stack_boxes(boxes)
    images, count = stacked.shape[:2]
    device, centres = stacked.device, points.centres
    least, largest = torch.tensor(ranges, device=device)[points.levels].unbind(-1)
    reach = None
    if radius is not None:
        reach = (radius * torch.tensor(points.strides, dtype=torch.float32, device=device))[points.levels][:, None]
    best = torch.full((images, len(centres)), torch.inf, device=device)
    index = torch.zeros((images, len(centres)), dtype=torch.long, device=device)
    for part in box_chunks(images, count, len(centres)):
        box = stacked[:, part, None]
        distance = encode_distances(box, centres)
        farthest = distance.amax(-1)
        if reach is not None:
            middle = (box[..., :2] + box[..., 2:]) * 0.5
            sides = torch.maximum(middle - reach, box[..., :2]), torch.minimum(middle + reach, box[..., 2:])
            distance = encode_distances(torch.cat(sides, -1), centres)
        seen = (distance.amin(-1) > 0) & (farthest >= least) & (farthest <= largest)
        # Of equal values `min` takes the first, on every device.
        area, local = torch.where(seen, box_area(box), torch.inf).min(1)
        index = torch.where(area < best, local + part.start, index)
        best = torch.minimum(best, area)
    return torch.where(best < torch.inf, index + first, BACKGROUND)


def assign_nearest(points: Grid, boxes: list[Tensor], scale: float = 4.0, valid_sizes: Tensor | None = None) -> Tensor:
    """The assignment of RepPoints' first stage (Yang et al., 2019): a box gets one point, the nearest of its level.

    A box of sides w, h belongs to the level of stride 2^k with k the mean of log2(w / scale) and log2(h / scale), cut
    to an integer, or to the first or last level. Distances are measured in sides of the box; a point that is nearest
    for several boxes is assigned the one at the least distance, the first of several, and the others get none.

    Args:
        points: One point per cell at offset 0, A in all; strides are powers of two that double from level to level.
        boxes: For each of the N images (n_i, 4) x1, y1, x2, y2 in pixels; n_i may be 0.
        scale: Side, in strides, of the smallest boxes of a level.
        valid_sizes: (N, L, 2) int64, rows and columns of each level that take part, counted from the upper left; None
            lets all points take part.

    Returns:
        (N, A) int64: the index of the assigned box in `torch.cat(boxes)`, or `BACKGROUND`.
    """
    device, num_points = points.centres.device, len(points.centres)
    counts = [len(b) for b in boxes]
    num_boxes = sum(counts)
    best = torch.full((len(boxes) * num_points,), torch.iinfo(torch.int64).max, device=device)
    if num_boxes == 0:
        return torch.full((len(boxes), num_points), BACKGROUND, device=device)
    box = torch.cat(boxes).float()
    image = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)], device=device)
    # A line has a side of 0, of which there is no logarithm.
    sides = (box[:, 2:] - box[:, :2]).clamp(min=1e-6)
    centre = (box[:, :2] + box[:, 2:]) * 0.5
    strides = torch.tensor(points.strides, device=device)
    coarseness = (sides / scale).log2().sum(1).mul(0.5).trunc().long()
    level = (coarseness - points.strides[0].bit_length() + 1).clamp(0, len(points.strides) - 1)

    sizes = torch.tensor(points.sizes, device=device)[level] if valid_sizes is None else valid_sizes[image, level]
    stride = strides[level][:, None]
    # In (column, row) order; a centre halfway between two points is given to the first of them.
    cell = (centre / stride - 0.5).ceil().long().clamp(min=0).minimum(sizes.flip(1) - 1)
    starts = torch.tensor([0, *points.counts[:-1]], device=device).cumsum(0)
    widths = torch.tensor([width for _, width in points.sizes], device=device)
    point = starts[level] + cell[:, 1] * widths[level] + cell[:, 0]

    # Per point the smallest key wins: least distance, then lowest box index. No two keys are equal.
    distance = ((cell * stride - centre) / sides).norm(dim=1)
    key = sortable(distance, torch.arange(num_boxes, device=device))
    best.scatter_reduce_(0, image * num_points + point, key, "amin")
    matched = torch.where(best == torch.iinfo(torch.int64).max, BACKGROUND, best & 0xFFFFFFFF)
    return matched.view(len(boxes), num_points)
