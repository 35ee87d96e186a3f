"""Where RoIAlign samples a map, and the operator written out sample by sample, in plain PyTorch.

Of a box that reaches beyond the map only the samples on the map are visited; the others count in the mean, as numbers.
So the work is bounded by the map, however large the box.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """The samples of R boxes along x and along y, in cells. The axes come first, x before y.

    Attributes:
        first: (2, R, B), of each bin the first sample. B is the larger number of bins; beyond the other it is no bin.
        spacing: (2, R, 1), from one to the next; negative where a box is inverted.
        samples: (2, R, 1), how many a bin has. Floating point: there may be more than an integer holds.
        length: (2, 1, 1), of the map.
        adaptive: Whether there are as many as a bin has cells, so that more than one lie over half a cell apart.
        longest: The larger length.
    """

    first: Tensor
    spacing: Tensor
    samples: Tensor
    length: Tensor
    adaptive: bool
    longest: int


class Cells(NamedTuple):
    """Of all visited samples, (2, R, B, K): the cells before and behind, the latter's share; is it on the map?"""

    low: Tensor
    high: Tensor
    share: Tensor
    known: Tensor


def grid_of(boxes: Tensor, output_size: Sequence[int], size: Sequence[int], sampling_ratio: int, aligned: bool) -> Grid:
    """The samples of boxes (R, 4) on a map of (height, width); along an axis that is not finite there are none."""
    p, q = output_size
    start, extent = boxes[:, :2].t()[..., None], (boxes[:, 2:] - boxes[:, :2]).t()[..., None]
    lost = extent - extent != 0
    if aligned:
        start = start - 0.5
    else:
        extent = extent.clamp(min=1)
    start, extent = start.masked_fill(lost, 0), extent.masked_fill(lost, 0)
    step = extent / (p if p == q else boxes.new_tensor([[[q]], [[p]]]))
    # A box without size has no samples.
    samples = step.ceil().clamp_(min=0) if sampling_ratio == 0 else (~lost).to(step.dtype) * sampling_ratio
    spacing = step / samples.clamp(min=1)
    bin = torch.arange(max(p, q), device=boxes.device)
    length = boxes.new_tensor([[[size[1]]], [[size[0]]]])
    first = start + bin * step + 0.5 * spacing
    return Grid(first, spacing, samples, length, sampling_ratio == 0, max(size))


def numbers_on_map(grid: Grid) -> tuple[Tensor, Tensor]:
    """(2, R, B): of each bin's samples the first that may lie on the map, and how many from there on.

    A few too many on either side, for rounding. The counts are whole numbers in floating point.
    """
    # Without spacing all samples lie at one place, on the map or not.
    density = grid.spacing.reciprocal().clamp_(-1e30, 1e30)
    one, other = (-2 - grid.first) * density, (grid.length + 1 - grid.first) * density
    begin = (torch.minimum(one, other).floor_() - 1).clamp_(0, 1e30)
    end = torch.minimum(torch.maximum(one, other).ceil_() + 2, grid.samples)
    # The map holds no more, whatever rounding makes of numbers beyond those that the type tells apart.
    return begin, (end - begin).clamp_(0, 2 * grid.longest + 8 if grid.adaptive else None)


def cells_of(grid: Grid) -> Cells:
    """Where to read the samples at most a cell outside of the map; those beyond its ends read the last cell there."""
    begin, count = numbers_on_map(grid)
    number = torch.arange(int(count.max()) if count.numel() else 0, device=begin.device)
    position = grid.first[..., None] + (begin[..., None] + number) * grid.spacing[..., None]
    length = grid.length[..., None]
    known = (position >= -1) & (position <= length) & (number < count[..., None])
    last = length - 1
    position = torch.minimum(position.clamp_(min=0), last)
    low = position.floor()
    return Cells(low.long(), torch.minimum(low + 1, last).long(), position.sub_(low), known)


class _Axis(NamedTuple):
    """One box's samples on the map along one axis, (S,): their bins, the cells around them, the share of the second."""

    bin: Tensor
    low: Tensor
    high: Tensor
    share: Tensor


class _Box(NamedTuple):
    """One box's samples along y and x, and how many a bin has of both together, as a number (1,)."""

    y: _Axis
    x: _Axis
    samples: Tensor


def _box(box: Tensor, output_size: Sequence[int], size: Sequence[int], sampling_ratio: int, aligned: bool) -> _Box:
    grid = grid_of(box, output_size, size, sampling_ratio, aligned)
    cells = Cells(*(x[:, 0] for x in cells_of(grid)))

    def axis(number: int, bins: int) -> _Axis:
        known = cells.known[number, :bins]
        return _Axis(known.nonzero()[:, 0], *(x[number, :bins][known] for x in cells[:3]))

    return _Box(axis(1, output_size[0]), axis(0, output_size[1]), grid.samples.prod(0)[0].clamp(min=1))


def _corners(box: _Box, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(cells as numbers in the map, weights), each (S_y, S_x), of the four corners of all samples."""
    for row, down in ((box.y.low, 1 - box.y.share), (box.y.high, box.y.share)):
        for column, across in ((box.x.low, 1 - box.x.share), (box.x.high, box.x.share)):
            yield row[:, None] * width + column, down[:, None] * across


def reference(
    features: Tensor,
    boxes: Tensor,
    images: Sequence[int],
    output_size: Sequence[int],
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """The definition, box by box, in the type of `boxes`; differentiable in the features.

    Args:
        features: (N, C, H, W).
        boxes: (R, 4) in cells.
        images: R numbers; those of no image give 0.
        output_size: Bins (P, Q).
        sampling_ratio: As in `roi_align`.
        aligned: As in `roi_align`.

    Returns:
        (R, C, P, Q)
    """
    n, channels, height, width = features.shape
    out = [boxes.new_zeros(0, channels, *output_size)]
    for image, box in zip(images, boxes.split(1), strict=True):
        pooled = boxes.new_zeros(channels, *output_size)
        if 0 <= image < n:
            cells = features[image].to(boxes.dtype).flatten(1)
            place = _box(box, output_size, (height, width), sampling_ratio, aligned)
            first, *others = (cells[:, at] * weight for at, weight in _corners(place, width))
            samples = sum(others, first)
            rows = samples.new_zeros(channels, output_size[0], samples.shape[2]).index_add(1, place.y.bin, samples)
            pooled = pooled.index_add(2, place.x.bin, rows) / place.samples
        out.append(pooled[None])
    return torch.cat(out)


def reference_backward(
    grad: Tensor, boxes: Tensor, size: Sequence[int], sampling_ratio: int = 0, aligned: bool = True
) -> Tensor:
    """What the boxes (R, 4) of one image give its features (C, H, W), for a gradient (R, C, P, Q)."""
    total = grad.new_zeros(grad.shape[1], size[0] * size[1])
    for share, box in zip(grad, boxes.split(1), strict=True):
        place = _box(box, grad.shape[2:], size, sampling_ratio, aligned)
        share = (share / place.samples)[:, place.y.bin[:, None], place.x.bin]
        for cells, weight in _corners(place, size[1]):
            total.index_add_(1, cells.flatten(), (share * weight).flatten(1))
    return total.view(-1, *size)
