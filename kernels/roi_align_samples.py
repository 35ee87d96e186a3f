"""Where RoIAlign samples a map, and the operator written out sample by sample, in plain PyTorch.

Of a box that reaches beyond the map only the samples on the map are visited; the others count in the mean, as numbers.
So the work is bounded by the map, however large the box.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    """The samples of R boxes along one axis, in cells.

    Attributes:
        first: (R, bins), of each bin the first one.
        spacing: (R,), from one to the next; negative where a box is inverted.
        samples: (R,), how many a bin has. Floating point: there may be more than an integer holds.
        adaptive: whether there are as many as a bin has cells, so that more than one lie over half a cell apart.
    """

    first: Tensor
    spacing: Tensor
    samples: Tensor
    adaptive: bool


class Samples(NamedTuple):
    """S samples on the map: number of the box times bins plus bin, the cells before and behind, the latter's share."""

    bin: Tensor
    low: Tensor
    high: Tensor
    share: Tensor


def axis_of(first: Tensor, last: Tensor, bins: int, sampling_ratio: int, aligned: bool) -> Axis:
    """The samples of boxes that span (R,) `first` to `last`; those whose size is not finite have none."""
    size = last - first
    finite = size.isfinite()
    if aligned:
        first = first - 0.5
    else:
        size = size.clamp(min=1)
    first, size = first.where(finite, 0), size.where(finite, 0)
    step = size / bins
    # A box without size has no samples.
    samples = step.ceil().clamp(min=0) if sampling_ratio == 0 else finite.to(step.dtype) * sampling_ratio
    spacing = step / samples.clamp(min=1)
    bin = torch.arange(bins, device=first.device)
    return Axis(first[:, None] + bin * step[:, None] + 0.5 * spacing[:, None], spacing, samples, sampling_ratio == 0)


def numbers_on_map(axis: Axis, length: int) -> tuple[Tensor, Tensor]:
    """(R, bins): of each bin's samples the first that may lie on a map of `length` cells, and how many from there on.

    One too many on either side, for rounding. The counts are whole numbers in floating point.
    """
    samples = axis.samples[:, None]
    # With hardly any spacing all samples lie at one place.
    still = (axis.spacing.abs() < 1e-30)[:, None]
    density = 1 / axis.spacing[:, None].masked_fill(still, 1)
    one, other = (-1 - axis.first) * density, (length - axis.first) * density
    begin = (torch.minimum(one, other).floor() - 1).masked_fill(still, 0).clamp(min=0)
    end = torch.minimum((torch.maximum(one, other).ceil() + 2).where(~still, samples), samples)
    count = (end - begin).clamp(min=0)
    # Numbers beyond those that the type tells apart are no longer bounded by the map of themselves.
    return begin, count.clamp(max=2 * length + 8) if axis.adaptive else count


def samples_on_map(axis: Axis, length: int) -> Samples:
    """The samples at most a cell outside of a map of `length` cells; those beyond its ends read the last cell there."""
    begin, count = numbers_on_map(axis, length)
    number = torch.arange(int(count.max()) if count.numel() else 0, device=begin.device)
    position = axis.first[..., None] + (begin[..., None] + number) * axis.spacing[:, None, None]
    known = (position >= -1) & (position <= length) & (number < count[..., None])
    bin = known.flatten(0, 1).nonzero()[:, 0]
    position = position[known].clamp(0, length - 1)
    low = position.floor()
    share = position - low
    low = low.long()
    return Samples(bin, low, (low + 1).clamp(max=length - 1), share)


class _Box(NamedTuple):
    """One box's samples along y and x, and how many a bin has of both together, as a number (1,)."""

    y: Samples
    x: Samples
    count: Tensor


def _box(box: Tensor, output_size: Sequence[int], size: Sequence[int], sampling_ratio: int, aligned: bool) -> _Box:
    y = axis_of(box[:, 1], box[:, 3], output_size[0], sampling_ratio, aligned)
    x = axis_of(box[:, 0], box[:, 2], output_size[1], sampling_ratio, aligned)
    count = (y.samples * x.samples).clamp(min=1)
    return _Box(samples_on_map(y, size[0]), samples_on_map(x, size[1]), count)


def _corners(box: _Box, width: int):
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
        output_size: bins (P, Q).
        sampling_ratio, aligned: as in `roi_align`.

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
            samples = sum(cells[:, at] * weight for at, weight in _corners(place, width))
            rows = samples.new_zeros(channels, output_size[0], samples.shape[2]).index_add(1, place.y.bin, samples)
            pooled = pooled.index_add(2, place.x.bin, rows) / place.count
        out.append(pooled[None])
    return torch.cat(out)


def reference_backward(
    grad: Tensor, boxes: Tensor, size: Sequence[int], sampling_ratio: int = 0, aligned: bool = True
) -> Tensor:
    """What the boxes (R, 4) of one image give its features (C, H, W), for a gradient (R, C, P, Q)."""
    total = grad.new_zeros(grad.shape[1], size[0] * size[1])
    for share, box in zip(grad, boxes.split(1), strict=True):
        place = _box(box, grad.shape[2:], size, sampling_ratio, aligned)
        share = (share / place.count)[:, place.y.bin[:, None], place.x.bin]
        for cells, weight in _corners(place, size[1]):
            total.index_add_(1, cells.flatten(), (share * weight).flatten(1))
    return total.view(-1, *size)
