"""Launching the Triton kernels of the modulated deformable convolution: layouts, memory, and what is launched.

Forward plans the samples and multiplies; backward plans them again, which costs less than keeping the plan. Nothing as
large as a column matrix is stored: a sample has 12 bytes in 16 bits, 20 in float32, and 16 more for its gradients.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.deform_conv import plan_kernels
from kernels.deform_conv.plan_kernels import Config
from kernels.runtime.launch import Launch, Launcher, real, triton_real
from kernels.runtime.tiles import cdiv
from kernels.sampling import inverse
from kernels.sampling import launch as sampling
from kernels.sampling.inverse import Bins
from kernels.sampling.launch import Shape, Single
from kernels.sampling.maps import Sizes
from kernels.sampling.plan_kernels import Plan

# Output pixels of one program that plans.
_BLOCK = 256


class Geometry(NamedTuple):
    """Stride, padding and dilation in y and x, and the width of the weight."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    width: int


class Level(NamedTuple):
    """One map of a call as the kernels read it."""

    x: Tensor  # (N, H, W, C), contiguous
    offset: Tensor  # contiguous or channels last, as the mask
    mask: Tensor | None
    shape: Shape
    geometry: Geometry
    maps: Single

    @property
    def samples(self) -> int:
        return self.shape.points * self.maps.sampled_rows


def levels(
    inputs: Sequence[Tensor],
    offsets: Sequence[Tensor],
    masks: Sequence[Tensor],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[Level]:
    """The maps of a call; `masks` may be empty."""
    every: Sequence[Tensor | None] = masks or [None] * len(inputs)
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), weight.shape[3])
    found = []
    for x, offset, mask in zip(inputs, offsets, every, strict=True):
        batch, channels, height, width = x.shape
        taps, groups = weight.shape[2] * weight.shape[3], channels // weight.shape[1]
        share = channels * 2 * taps // offset.shape[1]
        shape = Shape(weight.shape[1], weight.shape[0] // groups, groups, share, taps)
        maps = Single(batch, Sizes(height, width, offset.shape[2], offset.shape[3]))
        mask = None if mask is None else _dense(mask)
        found.append(Level(x.permute(0, 2, 3, 1).contiguous(), _dense(offset), mask, shape, geometry, maps))
    return found


def _last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _dense(tensor: Tensor) -> Tensor:
    """The tensor in a layout that the kernels read: contiguous, or channels last."""
    return tensor if _last(tensor) else tensor.contiguous()


def _plan_config(offset: Tensor, mask: Tensor | None, shape: Shape, geometry: Geometry) -> Config:
    return Config(
        TAPS=shape.taps,
        KW=geometry.width,
        GEOMETRY=(*geometry.stride, *geometry.padding, *geometry.dilation),
        BLOCK=_BLOCK,
        OFFSET_LAST=_last(offset),
        MASK_LAST=mask is not None and _last(mask),
        TYPE=sampling.TYPES[offset.dtype],
        PACKED=offset.dtype.itemsize == 2,
        REAL=triton_real(offset.dtype),
    )


def _points_launch(kernel: Any, tensors: dict[str, Any], config: Config, shape: Shape, maps: Single) -> Launch:
    arguments = tensors | {**maps.sizes._asdict(), "rows": maps.sampled_rows}
    return Launch(kernel, (cdiv(maps.sampled_rows, _BLOCK), shape.points), arguments, {"K": config}, 4, 1)


def plan_launch(
    offset: Tensor, mask: Tensor | None, plan: Plan, shape: Shape, geometry: Geometry, maps: Single
) -> Launch:
    """Offsets and masks are dense, see `Level`."""
    tensors, config = {"offset": offset, "mask": mask, "plan": plan}, _plan_config(offset, mask, shape, geometry)
    return _points_launch(plan_kernels.plan_kernel, tensors, config, shape, maps)


def gradients_launch(
    products: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    grad_offset: Tensor | None,
    grad_mask: Tensor | None,
    shape: Shape,
    geometry: Geometry,
    maps: Single,
) -> Launch:
    """The gradients have the strides of what they are for."""
    tensors = {"products": products, "offset": offset, "mask": mask, "grad_offset": grad_offset, "grad_mask": grad_mask}
    config = _plan_config(offset, mask, shape, geometry)
    return _points_launch(plan_kernels.gradients_kernel, tensors, config, shape, maps)


_plan, _gradients = Launcher(plan_launch), Launcher(gradients_launch)


def planned(level: Level) -> Plan:
    """The plan of a level's samples."""
    plan = sampling.new_plan(level.x, level.samples)
    _plan(level.offset, level.mask, plan, level.shape, level.geometry, level.maps)
    return plan


def forward(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    offsets: Sequence[Tensor],
    masks: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    """Write the output (N, O, Ho, Wo) of every level; arguments as in `kernels.deform_conv.operator`, checked there."""
    bias = None if bias is None else bias.contiguous()
    maps = levels(inputs, offsets, masks, weight, stride, padding, dilation)
    packed = sampling.packed(weight, maps[0].shape.groups)
    for level, out in zip(maps, outputs, strict=True):
        rows = out.permute(0, 2, 3, 1)
        # An output that is not channels last is made so first.
        target = rows if rows.is_contiguous() else torch.empty(rows.shape, dtype=out.dtype, device=out.device)
        sampling.run_forward(level.x, packed, bias, planned(level), target, None, level.shape, level.maps)
        if target is not rows:
            rows.copy_(target)


def backward(
    results: Sequence[list[Tensor]],
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    offsets: Sequence[Tensor],
    masks: Sequence[Tensor],
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    """Write the gradients for `grads`, one (N, O, Ho, Wo) a level.

    `results` are five lists: for inputs, offsets, masks, weight and bias; an empty one is not wanted. The gradient of
    the inputs is a sum of atomic additions, in any order, unless PyTorch is told to use deterministic algorithms: then
    it is gathered by an inverse index, `kernels.sampling.inverse_kernels`.
    """
    to_inputs, to_offsets, to_masks, to_weight, to_bias = results
    maps = levels(inputs, offsets, masks, weight, stride, padding, dilation)
    rows = [grad.permute(0, 2, 3, 1).contiguous() for grad in grads]
    plans = [planned(level) for level in maps] if to_inputs or to_offsets or to_masks or to_weight else []
    if to_inputs or to_offsets or to_masks:
        transposed = sampling.transposed(weight, maps[0].shape.groups)
        gathered = bool(to_inputs) and torch.are_deterministic_algorithms_enabled()
        none: list[Tensor | None] = [None] * len(maps)
        for i, (level, plan, grad) in enumerate(zip(maps, plans, rows, strict=True)):
            to_x = None if gathered or not to_inputs else torch.zeros_like(level.x, dtype=real(weight.dtype))
            _backward_samples(level, plan, transposed, grad, to_x, (to_offsets or none)[i], (to_masks or none)[i])
            if to_x is not None:
                to_inputs[i].copy_(to_x.permute(0, 3, 1, 2))
        if gathered:
            _gather_inputs(maps, plans, transposed, rows, to_inputs)
    if to_weight:
        _backward_weight(to_weight[0], maps, plans, rows)
    if to_bias:
        sums = (grad.sum((0, 1, 2), dtype=real(weight.dtype)) for grad in rows)
        to_bias[0].copy_(reduce(torch.add, sums))


def _backward_samples(
    level: Level,
    plan: Plan,
    weight: Tensor,
    grad: Tensor,
    to_x: Tensor | None,
    to_offset: Tensor | None,
    to_mask: Tensor | None,
) -> None:
    """Gradients of offsets and masks; that of the map is added to `to_x`."""
    wanted = to_offset is not None or to_mask is not None
    if not wanted and to_x is None:
        return
    products = torch.empty((level.samples, 4), dtype=real(grad.dtype), device=grad.device) if wanted else None
    sampling.run_samples(grad, level.x, weight, plan, products, to_x, level.shape, level.maps)
    if products is not None:
        # Where a result has other strides than what the kernel reads, it is copied.
        of_offset, of_mask = _like(to_offset, level.offset), _like(to_mask, level.mask)
        rest = level.shape, level.geometry, level.maps
        _gradients(products, level.offset, level.mask, of_offset, of_mask, *rest)
        for result, made in ((to_offset, of_offset), (to_mask, of_mask)):
            if result is not None and made is not None and made is not result:
                result.copy_(made)


def _like(result: Tensor | None, read: Tensor | None) -> Tensor | None:
    if result is None or read is None or result.stride() == read.stride():
        return result
    return torch.empty_like(read)


def _gather_inputs(
    maps: list[Level], plans: list[Plan], weight: Tensor, rows: list[Tensor], targets: list[Tensor]
) -> None:
    """The inputs' gradients without atomics, by one index of all levels: the same bits in every run."""
    places, samples, bins = [], 0, 0
    for level in maps:
        batch, height, width, _ = level.x.shape
        number = batch * inverse.map_bins(height, width, sampling.tiles_of(inverse.GATHER, weight, level.shape))
        places.append(Bins(None, number, bins, samples))
        samples, bins = samples + level.samples, bins + level.shape.points * number
    keys = torch.empty(samples, dtype=torch.int32, device=weight.device)
    for level, plan, place in zip(maps, plans, places, strict=True):
        inverse.run_bins(level.x, plan, keys, place, bins, level.shape, level.maps)
    index = inverse.index(keys, bins)
    for level, plan, place, grad, target in zip(maps, plans, places, rows, targets, strict=True):
        last = target.permute(0, 2, 3, 1)
        out = last if last.is_contiguous() else torch.empty_like(level.x)
        inverse.run_gather(grad, weight, plan, index, out, place, level.shape.taps, level.shape, level.maps)
        if out is not last:
            last.copy_(out)


def _backward_weight(target: Tensor, maps: list[Level], plans: list[Plan], rows: list[Tensor]) -> None:
    tiles, _, _ = sampling.weight_steps(maps[0].x, maps[0].shape)
    counts = [level.maps.outputs((tiles.height, tiles.width)).number for level in maps]
    each = sampling.weight_splits(maps[0].x, maps[0].shape, sum(counts))
    splits = [cdiv(count, each) for count in counts]
    outputs, channels = target.shape[:2]
    parts = (sum(splits), outputs, maps[0].shape.taps, channels)
    partial = torch.empty(parts, dtype=real(target.dtype), device=target.device)
    for level, plan, grad, part in zip(maps, plans, rows, partial.split(splits), strict=True):
        sampling.run_weight(grad, level.x, plan, part, None, each, level.shape, level.maps)
    sampling.run_sum(partial, (target,), None)
