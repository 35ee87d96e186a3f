"""What the CPU's path of a deformable convolution knows from shapes alone; words as in `kernels.deform_conv.cpu`."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# Constants of larger problems are built on every call: making them costs little there, keeping them much.
KEPT_POINTS = 1 << 18
# Height and width.
Pair = tuple[int, int]


class Plan(NamedTuple):
    """What depends on shapes alone."""

    sizes: tuple[Pair, ...]  # (H, W) of every level
    batch: int
    groups: int  # offset groups
    fan: int  # points of one output pixel
    rows: int  # table rows of one offset group
    start: Tensor  # (2, M) where a point samples at offset zero, y then x
    high: Tensor  # (2, M) the map's size, y then x
    pitch: Tensor  # (M,) table rows between two lines of the map
    origin: Tensor  # (M,) table row of the map's pixel (0, 0)


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Length of a convolution's output along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _level_points(
    size: Pair, batch: int, groups: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every point of a level: coordinates at offset zero (2, M), image (M,) and offset group (M,), all integer."""
    axes = zip(size, kernel, stride, padding, dilation, strict=True)
    height, width = (output_size(*axis) for axis in axes)
    lengths = (batch, height, width, kernel[0], kernel[1], groups)
    image, y, x, tap_y, tap_x, group = torch.meshgrid(*(torch.arange(n, device=device) for n in lengths), indexing="ij")
    y = y * stride[0] - padding[0] + tap_y * dilation[0]
    x = x * stride[1] - padding[1] + tap_x * dilation[1]
    return torch.stack((y, x)).view(2, -1), image.reshape(-1), group.reshape(-1)


def _build_plan(
    sizes: tuple[Pair, ...],
    batch: int,
    groups: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    dtype: torch.dtype,
    device: torch.device,
) -> Plan:
    pitches = [width + 3 for _, width in sizes]
    areas = [(height + 3) * pitch for (height, _), pitch in zip(sizes, pitches, strict=True)]
    rows = batch * sum(areas)
    integer = torch.int32 if groups * rows < 2**31 else torch.int64
    levels, above = [], 0
    for size, pitch, area in zip(sizes, pitches, areas, strict=True):
        start, image, group = _level_points(size, batch, groups, kernel, stride, padding, dilation, device)
        origin = group * rows + above + image * area + pitch + 1
        above += batch * area
        high = torch.tensor(size, device=device, dtype=dtype)[:, None].expand_as(start)
        levels.append((start.to(dtype), high, torch.full_like(origin, pitch, dtype=integer), origin.to(integer)))
    start, high, line, origin = (torch.cat(parts, -1) for parts in zip(*levels, strict=True))
    fan = kernel[0] * kernel[1] * groups
    return Plan(sizes, batch, groups, fan, rows, start, high, line, origin)


_keep_plan = lru_cache(maxsize=32)(_build_plan)


def plan_of(
    inputs: Sequence[Tensor],
    offsets: Sequence[Tensor],
    weight: Tensor,
    geometry: Sequence[Sequence[int]],
    dtype: torch.dtype,
) -> Plan:
    """The plan of a call with these tensors; those of small calls are kept."""
    kernel = _pair(weight.shape[2:])
    groups = offsets[0].shape[1] // (2 * kernel[0] * kernel[1])
    build = _keep_plan if sum(offset.numel() for offset in offsets) <= 2 * KEPT_POINTS else _build_plan
    sizes = tuple(_pair(x.shape[2:]) for x in inputs)
    stride, padding, dilation = (_pair(axes) for axes in geometry)
    return build(sizes, inputs[0].shape[0], groups, kernel, stride, padding, dilation, dtype, inputs[0].device)


def _pair(numbers: Sequence[int]) -> Pair:
    height, width = numbers
    return height, width
