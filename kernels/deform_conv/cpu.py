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
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import threshold

from kernels.deform_conv.plan import Plan, plan_of

# Columns are made and consumed in pieces of this many elements, which stay in the cache.
PIECE = 1 << 20
# The backward holds the gradients of all columns of the images it works on; it takes as many images as this allows.
LONGEST = 1 << 26


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


def _bags(table: Tensor, corners: Corners, plan: Plan, points: slice) -> Tensor:
    """The columns (len(points), C/G) of a range of points."""
    ends = plan.first[: points.stop - points.start + 1]
    index, weight = (t[4 * points.start : 4 * points.stop] for t in (corners.row, corners.weight))
    return torch.embedding_bag(table, index, ends, False, 0, False, weight, True)[0]


def _pieces(plan: Plan, row: int) -> list[tuple[slice, slice]]:
    """Ranges of output pixels to work on together, each with the range of its points; `row` is K."""
    pixels, step = plan.origin.numel() // plan.fan, max(1, PIECE // row)
    ranges = [(start, min(start + step, pixels)) for start in range(0, pixels, step)]
    return [(slice(start, stop), slice(start * plan.fan, stop * plan.fan)) for start, stop in ranges]


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
    out = table.new_empty((plan.origin.numel() // plan.fan, weight.shape[0]))
    for pixels, points in _pieces(plan, taps * inputs[0].shape[1]):
        columns = _bags(table, corners, plan, points).view(pixels.stop - pixels.start, -1)
        if groups > 1:
            product = torch.bmm(_group(columns, taps, groups), packed.transpose(1, 2)).transpose(0, 1).flatten(1)
            torch.add(product, 0 if bias is None else bias, out=out[pixels])
        elif bias is None:
            torch.mm(columns, packed[0].t(), out=out[pixels])
        else:
            torch.addmm(bias, columns, packed[0].t(), out=out[pixels])
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
    pixels = sum(offset.shape[2] * offset.shape[3] for offset in offsets)
    step = max(1, LONGEST // (pixels * inputs[0].shape[1] * weight.shape[2] * weight.shape[3]))
    images = _Images(to_inputs, to_offsets, to_masks, grads, inputs, offsets, masks)
    batch, grad_weight = inputs[0].shape[0], weight.new_empty(0)
    for start in range(0, batch, step):
        some = images
        if step < batch:
            some = _Images(*([x[start : start + step] for x in tensors] for tensors in images))
        part = _backward_images(some, weight, geometry, dtype, bool(to_weight))
        grad_weight = part if start == 0 else grad_weight + part
    if to_weight:
        shape = (weight.shape[0], *weight.shape[2:], weight.shape[1])
        to_weight[0].copy_(grad_weight.view(shape).permute(0, 3, 1, 2))
    if to_bias:
        sums = [grad.sum((0, 2, 3), dtype=dtype) for grad in grads]
        to_bias[0].copy_(sum(sums[1:], sums[0]))


class _Images(NamedTuple):
    """What belongs to some images: where their gradients go, and what those come from; a tensor for each level."""

    to_inputs: list[Tensor]
    to_offsets: list[Tensor]
    to_masks: list[Tensor]
    grads: list[Tensor]
    inputs: list[Tensor]
    offsets: list[Tensor]
    masks: list[Tensor]


def _backward_images(
    images: _Images, weight: Tensor, geometry: Sequence[Sequence[int]], dtype: torch.dtype, needs_weight: bool
) -> Tensor:
    """Write the gradients of some images; return that of the packed weight, or nothing in a tensor."""
    to_inputs, to_offsets, to_masks, grads, inputs, offsets, masks = images
    plan = plan_of(inputs, offsets, weight, geometry, dtype)
    channels, taps = inputs[0].shape[1], weight.shape[2] * weight.shape[3]
    groups = channels // weight.shape[1]
    packed = _pack(weight, groups, dtype)
    table = _fill_table(inputs, plan, dtype)
    corners = _find_corners(offsets, masks, plan)
    grad = torch.cat([g.permute(0, 2, 3, 1).reshape(-1, weight.shape[0]) for g in grads]).to(dtype)
    needs_columns, needs_dots = bool(to_inputs or to_offsets or to_masks), bool(to_offsets or to_masks)
    grad_columns = table.new_empty((grad.shape[0] if needs_columns else 0, taps * channels))
    dots = table.new_empty(corners.weight.shape if needs_dots else 0)
    grad_weight = torch.zeros_like(packed if needs_weight else packed[:0])
    for pixels, points in _pieces(plan, taps * channels):
        piece = grad[pixels]
        grouped = piece.view(len(piece), groups, -1).transpose(0, 1)
        if needs_weight:
            columns = _bags(table, corners, plan, points).view(len(piece), -1)
            if groups > 1:
                grad_weight.baddbmm_(grouped.transpose(1, 2), _group(columns, taps, groups))
            else:
                grad_weight[0].addmm_(piece.t(), columns)
        if needs_columns:
            if groups > 1:
                _ungroup(torch.bmm(grouped, packed), taps, grad_columns[pixels])
            else:
                torch.mm(piece, packed[0], out=grad_columns[pixels])
        if needs_dots:
            dots[4 * points.start : 4 * points.stop] = _corner_dots(grad_columns[pixels], table, corners, plan, points)
    if needs_dots:
        _write_point_gradients(dots, corners, offsets, plan, to_offsets, to_masks)
    if to_inputs:
        summed = _sum_into_table(grad_columns.view(-1, channels // plan.groups), corners, plan)
        for target, view in zip(to_inputs, _maps(summed, plan), strict=True):
            torch.unflatten(target, 1, view.shape[1:3]).copy_(view)
    return grad_weight


def _corner_dots(grad_columns: Tensor, table: Tensor, corners: Corners, plan: Plan, points: slice) -> Tensor:
    """The product of every corner's row of the table with the gradient of its point's column."""
    count = points.stop - points.start
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_columns.view(count, -1),
        table,
        corners.row[4 * points.start : 4 * points.stop],
        plan.first[:count],
        plan.owner[: 4 * count],
        0,
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


def _sum_into_table(grad_columns: Tensor, corners: Corners, plan: Plan) -> Tensor:
    """Gradient of the table: of every row, the sum over the corners that lie on it, always in the same order."""
    rows = plan.groups * plan.rows
    # Radix sort: short keys take half the time.
    keys = corners.row.to(torch.int16) if rows < 2**15 else corners.row
    order = torch.sort(keys, stable=True).indices
    ends = torch.zeros(rows + 1, dtype=torch.int64, device=keys.device)
    torch.cumsum(torch.bincount(corners.row, minlength=rows), 0, out=ends[1:])
    weight = corners.weight.index_select(0, order)
    return torch.embedding_bag(grad_columns, order >> 2, ends, False, 0, False, weight, True)[0]
