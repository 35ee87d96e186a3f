"""Modulated deformable convolution from stock PyTorch operators: the path that CPUs run.

Every map is copied once into a channels-last table with a border of zeros, all levels one below the other. A sample is
then four table rows, weighted and summed by `embedding_bag`, and the convolution is one matrix product. The border
makes bounds tests unnecessary: a coordinate outside (-1, size) is sent to a place whose four corners are zeros. The
weights are computed in pixels, so that integer coordinates are exact.

Words used here: a *point* is one (image, output pixel, tap, offset group); points are numbered in that order, level
after level. P is the number of output pixels of all levels and images, T of taps, G of offset groups, M = P*T*G of
points; K = T*C is the length of one row of the column matrix.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import threshold

from kernels.deform_conv.cpu_plan import Plan, plan_of

# Columns are made and consumed in pieces of this many elements, which stay in the cache.
PIECE = 1 << 20
# So many elements of the columns' gradients are held before they are added up: 24 MB, as freed blocks beyond 32 MB go
# back to the system, and getting pages anew costs as much as a tenth of all products.
HELD = 6 << 20


class Corners(NamedTuple):
    """Where the points sample, and how much of it they take."""

    row: Tensor  # (4M,) of the table, in the order (y0, x0), (y0, x1), (y1, x0), (y1, x1)
    weight: Tensor  # (4M,) bilinear weights times mask
    fraction: Tensor  # (2, M) distance from the upper left corner, y then x
    mask: Tensor | None  # (M,)


def _maps(table: Tensor, plan: Plan) -> list[Tensor]:
    """Views (N, G, C/G, H, W) of the places in the table (G*rows, C/G) that hold the pixels of each level."""
    table, above, views = table.view(plan.groups, plan.rows, -1), 0, []
    for height, width in plan.sizes:
        below = above + plan.batch * (height + 3) * (width + 3)
        level = table[:, above:below].view(plan.groups, plan.batch, height + 3, width + 3, -1)
        views.append(level[:, :, 1 : height + 1, 1 : width + 1].permute(1, 0, 4, 2, 3))
        above = below
    return views


def _points(values: Tensor, like: list[Tensor], plan: Plan) -> list[tuple[Tensor, Tensor]]:
    """Pairs of views of the same shape: a part of `values` (planes, M), and the tensor (N, G*T*planes, Ho, Wo)."""
    pairs, done = [], 0
    for tensor in like:
        view = torch.unflatten(tensor, 1, (plan.groups, -1, values.shape[0])).permute(3, 0, 4, 5, 2, 1)
        count = view[0].numel()
        pairs.append((values[:, done : done + count].view(view.shape), view))
        done += count
    return pairs


def _fill_table(inputs: list[Tensor], plan: Plan, dtype: torch.dtype) -> Tensor:
    channels = inputs[0].shape[1] // plan.groups
    table = inputs[0].new_zeros((plan.groups * plan.rows, channels), dtype=dtype)
    for x, view in zip(inputs, _maps(table, plan), strict=True):
        view.copy_(torch.unflatten(x, 1, (plan.groups, channels)))
    return table


def _places(offsets: list[Tensor], plan: Plan) -> Tensor:
    """Where the points sample (2, M): both coordinates are below `plan.high`, or nothing is sampled."""
    place = torch.empty_like(plan.start)
    for part, offset in _points(place, offsets, plan):
        part.copy_(offset)
    place += plan.start
    # Both ends of the open interval (-1, size) go to the zeros at `size`, which another row of zeros follows: at
    # exactly -1 nothing is sampled and the gradient is zero. So does what is not a number. The large number is one that
    # the minimum replaces.
    return torch.minimum(threshold(place.nan_to_num_(1e9), -1.0, 1e9), plan.high)


def _find_corners(offsets: list[Tensor], masks: list[Tensor], plan: Plan) -> Corners:
    place = _places(offsets, plan)
    low = place.floor()
    fraction = place.sub_(low)
    low = low.to(plan.pitch.dtype)
    upper = torch.addcmul(plan.origin, low[0], plan.pitch).add_(low[1])
    lower = upper + plan.pitch
    wy1, wx1 = fraction
    wy0, wx0 = 1 - fraction
    mask = None
    if masks:
        mask = place.new_empty((1, place.shape[1]))
        for part, source in _points(mask, masks, plan):
            part.copy_(source)
        mask = mask[0]
        wy0, wy1 = wy0 * mask, wy1 * mask
    index = upper.new_empty((upper.numel(), 4))
    weight = place.new_empty(index.shape)
    corners = ((upper, 0, wy0, wx0), (upper, 1, wy0, wx1), (lower, 0, wy1, wx0), (lower, 1, wy1, wx1))
    for number, (row, right, wy, wx) in enumerate(corners):
        torch.add(row, right, out=index[:, number])
        torch.mul(wy, wx, out=weight[:, number])
    return Corners(index.view(-1), weight.view(-1), fraction, mask)


@lru_cache(maxsize=8)
def _numbers(points: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each point's corners begin, and the last ones end (points + 1,); the points of corners (4*points,)."""
    owner = torch.arange(points, dtype=dtype, device=device).repeat_interleave(4)
    return torch.arange(0, 4 * points + 1, 4, dtype=dtype, device=device), owner


def _bags(table: Tensor, corners: Corners, points: slice) -> Tensor:
    """The columns (len(points), C/G) of a range of points."""
    ends, _ = _numbers(points.stop - points.start, corners.row.dtype, table.device)
    index, weight = (t[4 * points.start : 4 * points.stop] for t in (corners.row, corners.weight))
    return torch.embedding_bag(table, index, ends, False, 0, False, weight, True)[0]


def _pieces(pixels: slice, step: int) -> list[slice]:
    """A range in pieces of at most `step`, or of 1."""
    starts = range(pixels.start, pixels.stop, max(1, step))
    return [slice(start, min(start + starts.step, pixels.stop)) for start in starts]


def _points_of(pixels: slice, plan: Plan) -> slice:
    return slice(pixels.start * plan.fan, pixels.stop * plan.fan)


def _pack(weight: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(O, C/groups, kh, kw) -> (groups, O/groups, T*C/groups), the order of the columns."""
    return weight.to(dtype).permute(0, 2, 3, 1).reshape(groups, weight.shape[0] // groups, -1)


def _group(columns: Tensor, taps: int, groups: int) -> Tensor:
    """(p, T*C) -> (groups, p, T*C/groups)."""
    return columns.view(columns.shape[0], taps, groups, -1).permute(2, 0, 1, 3).reshape(groups, columns.shape[0], -1)


def _ungroup(columns: Tensor, taps: int, out: Tensor) -> None:
    """(groups, p, T*C/groups) -> (p, T*C)."""
    groups, pixels, _ = columns.shape
    view = out.view(pixels, taps, groups, -1)
    view.copy_(columns.view(groups, pixels, taps, -1).permute(1, 2, 0, 3))


def forward(
    outputs: list[Tensor],
    inputs: list[Tensor],
    offsets: list[Tensor],
    masks: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    *geometry: Sequence[int],
) -> None:
    """Write the output (N, O, Ho, Wo) of every level; arguments as in `kernels.deform_conv.operator`, checked there."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    plan = plan_of(inputs, offsets, weight, geometry, dtype)
    groups, taps = inputs[0].shape[1] // weight.shape[1], weight.shape[2] * weight.shape[3]
    packed = _pack(weight, groups, dtype)
    bias = None if bias is None else bias.to(dtype)
    table = _fill_table(inputs, plan, dtype)
    corners = _find_corners(offsets, masks, plan)
    rows = outputs[0].permute(0, 2, 3, 1)
    as_rows = len(outputs) == 1 and rows.dtype == dtype and rows.is_contiguous()
    shape = plan.origin.numel() // plan.fan, weight.shape[0]
    out = rows.view(shape) if as_rows else table.new_empty(shape)
    for pixels in _pieces(slice(0, len(out)), PIECE // (taps * inputs[0].shape[1])):
        columns = _bags(table, corners, _points_of(pixels, plan)).view(pixels.stop - pixels.start, -1)
        if groups > 1:
            product = torch.bmm(_group(columns, taps, groups), packed.transpose(1, 2)).transpose(0, 1).flatten(1)
            torch.add(product, 0 if bias is None else bias, out=out[pixels])
        elif bias is None:
            torch.mm(columns, packed[0].t(), out=out[pixels])
        else:
            torch.addmm(bias, columns, packed[0].t(), out=out[pixels])
    if not as_rows:
        for part, output in zip(_split(out, outputs), outputs, strict=True):
            output.copy_(part)


def _split(rows: Tensor, like: list[Tensor]) -> list[Tensor]:
    """(P, O) -> a view (N, O, Ho, Wo) for every level."""
    shapes = [(x.shape[0], x.shape[2], x.shape[3]) for x in like]
    parts = rows.split([batch * height * width for batch, height, width in shapes])
    return [part.view(*shape, -1).permute(0, 3, 1, 2) for part, shape in zip(parts, shapes, strict=True)]


def backward(
    results: list[list[Tensor]],
    grads: list[Tensor],
    inputs: list[Tensor],
    offsets: list[Tensor],
    masks: list[Tensor],
    weight: Tensor,
    *geometry: Sequence[int],
) -> None:
    """Write the gradients for `grads`, one (N, O, Ho, Wo) a level.

    `results` are five lists: for inputs, offsets, masks, weight and bias; an empty one is not wanted.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    to_inputs, to_offsets, to_masks, to_weight, to_bias = results
    plan = plan_of(inputs, offsets, weight, geometry, dtype)
    channels, taps = inputs[0].shape[1], weight.shape[2] * weight.shape[3]
    groups = channels // weight.shape[1]
    packed = _pack(weight, groups, dtype)
    table = _fill_table(inputs, plan, dtype)
    corners = _find_corners(offsets, masks, plan)
    rows = [x.permute(0, 2, 3, 1).reshape(-1, weight.shape[0]) for x in grads]
    grad = (rows[0] if len(rows) == 1 else torch.cat(rows)).to(dtype)
    needs_columns, needs_dots = bool(to_inputs or to_offsets or to_masks), bool(to_offsets or to_masks)
    held = max(1, HELD // (taps * channels))
    grad_columns = table.new_empty((min(held, len(grad)) if needs_columns else 0, taps * channels))
    dots = table.new_empty(corners.weight.shape if needs_dots else 0)
    grad_table = torch.zeros_like(table if to_inputs else table[:0])
    grad_weight = torch.zeros_like(packed if to_weight else packed[:0])
    for together in _pieces(slice(0, len(grad)), held):
        for pixels in _pieces(together, PIECE // (taps * channels)):
            piece, points = grad[pixels], _points_of(pixels, plan)
            grouped = piece.view(len(piece), groups, -1).transpose(0, 1)
            if to_weight:
                columns = _bags(table, corners, points).view(len(piece), -1)
                if groups > 1:
                    grad_weight.baddbmm_(grouped.transpose(1, 2), _group(columns, taps, groups))
                else:
                    grad_weight[0].addmm_(piece.t(), columns)
            if needs_columns:
                own = grad_columns[pixels.start - together.start : pixels.stop - together.start]
                if groups > 1:
                    _ungroup(torch.bmm(grouped, packed), taps, own)
                else:
                    torch.mm(piece, packed[0], out=own)
                if needs_dots:
                    dots[4 * points.start : 4 * points.stop] = _corner_dots(own, table, corners, points)
        if to_inputs:
            _add_to_table(grad_table, grad_columns, corners, _points_of(together, plan))
    if needs_dots:
        _write_point_gradients(dots, corners, offsets, plan, to_offsets, to_masks)
    if to_inputs:
        for target, view in zip(to_inputs, _maps(grad_table, plan), strict=True):
            torch.unflatten(target, 1, view.shape[1:3]).copy_(view)
    if to_weight:
        shape = (weight.shape[0], *weight.shape[2:], weight.shape[1])
        to_weight[0].copy_(grad_weight.view(shape).permute(0, 3, 1, 2))
    if to_bias:
        sums = [x.sum((0, 2, 3), dtype=dtype) for x in grads]
        to_bias[0].copy_(sum(sums[1:], sums[0]))


def _corner_dots(grad_columns: Tensor, table: Tensor, corners: Corners, points: slice) -> Tensor:
    """The product of every corner's row of the table with the gradient of its point's column."""
    count = points.stop - points.start
    ends, owner = _numbers(count, corners.row.dtype, table.device)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_columns.view(count, -1), table, corners.row[4 * points.start : 4 * points.stop], ends[:-1], owner, 0
    )


def _write_point_gradients(
    dots: Tensor,
    corners: Corners,
    offsets: list[Tensor],
    plan: Plan,
    to_offsets: list[Tensor],
    to_masks: list[Tensor],
) -> None:
    """Gradients of offsets and masks from those of the four corner weights."""
    dots = dots.view(-1, 2, 2).permute(1, 2, 0)
    y, x = corners.fraction
    # `out` keeps the points innermost; the layout of `dots` would make loops of two.
    across = torch.sub(dots[:, 1], dots[:, 0], out=torch.empty_like(corners.fraction))
    along = torch.addcmul(dots[:, 0], across, x, out=torch.empty_like(corners.fraction))
    down = along[1] - along[0]
    if to_masks:
        for part, target in _points(torch.addcmul(along[0], down, y)[None], to_masks, plan):
            target.copy_(part)
    if to_offsets:
        grad_place = torch.stack((down, torch.lerp(across[0], across[1], y)))
        if corners.mask is not None:
            grad_place *= corners.mask
        # A coordinate at which nothing is sampled has no gradient, though the mask or the output's gradient be NaN. On
        # a GPU a look at the numbers would wait for them.
        if not grad_place.is_cpu or not math.isfinite(grad_place.sum()):
            sampled = (_places(offsets, plan) < plan.high).all(0)
            grad_place = torch.where(sampled, grad_place, 0)
        for part, target in _points(grad_place, to_offsets, plan):
            target.copy_(part)


def _add_to_table(grad_table: Tensor, grad_columns: Tensor, corners: Corners, points: slice) -> None:
    """Add to every row of the table the gradients of the corners that lie on it, always in the same order."""
    rows, weight = (x[4 * points.start : 4 * points.stop] for x in (corners.row, corners.weight))
    first, last = 0, len(grad_table) - 1
    # On a GPU a look at the numbers would wait for them.
    if rows.is_cpu:
        first, last = (int(x) for x in rows.aminmax())
        rows = rows - first
    count = last - first + 1
    # Radix sort: short keys take half the time.
    order = torch.sort(rows.to(torch.int16) if count <= 2**15 else rows, stable=True).indices
    ends = torch.zeros(count + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=count), 0, out=ends[1:])
    columns = grad_columns.view(-1, grad_table.shape[1])
    weight = weight.index_select(0, order)
    sums = torch.embedding_bag(columns, order >> 2, ends, False, 0, False, weight, True)[0]
    grad_table[first : last + 1] += sums
