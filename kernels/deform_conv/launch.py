"""Launching the Triton kernels of the modulated deformable convolution: layouts, tiles, memory, and what is compiled.

A launch is prepared as data and run afterwards, so that the ahead-of-time compilation describes exactly what runs.
"""

from collections.abc import Sequence
from functools import reduce

import torch
import triton
from torch import Tensor

from kernels.deform_conv import inverse as deform_conv_inverse
from kernels.deform_conv import kernels
from kernels.deform_conv.level import Level, strided
from kernels.runtime.launch import Launch, Launcher, real
from kernels.runtime.tiles import Table, Tiles

# Chosen without a GPU: large ones that Triton 3.6 and 3.7 compile for sm_80, sm_90, sm_100 and gfx942 without a spill.
FORWARD = Table(
    "deform_conv2d forward",
    {"16": Tiles(8, 16, 32, 256, 8, 3), "32": Tiles(8, 8, 16, 256, 8, 3), "exact": Tiles(4, 8, 16, 32, 4, 2)},
)
POINTS = Table(
    "deform_conv2d backward points",
    {"16": Tiles(8, 8, 64, 256, 8, 1), "32": Tiles(4, 8, 32, 256, 8, 1), "exact": Tiles(4, 8, 16, 32, 4, 1)},
)
WEIGHT = Table(
    "deform_conv2d backward weight",
    {"16": Tiles(8, 8, 64, 256, 8, 2), "32": Tiles(4, 8, 64, 256, 8, 1), "exact": Tiles(4, 8, 16, 32, 4, 1)},
)
# For more output channels than a program holds, or several weight groups: the gradients come in pieces.
_POINTS_PIECES = Table(
    "deform_conv2d backward points in pieces",
    POINTS | {"16": Tiles(8, 8, 64, 64, 8, 2), "32": Tiles(4, 8, 32, 64, 4, 2)},
)

# Programs over which the sum of the weight's gradient is spread: some waves of the largest GPUs.
_WEIGHT_PROGRAMS = 512


def levels(
    inputs: Sequence[Tensor],
    offsets: Sequence[Tensor],
    masks: Sequence[Tensor],
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> list[Level]:
    """The maps of a call; `masks` may be empty."""
    every: Sequence[Tensor | None] = masks or [None] * len(inputs)
    geometry = tuple(stride), tuple(padding), tuple(dilation)
    return [
        Level(x.permute(0, 2, 3, 1).contiguous(), offset, mask, weight, *geometry)
        for x, offset, mask in zip(inputs, offsets, every, strict=True)
    ]


def forward_launch(level: Level, packed: Tensor, bias: Tensor | None, out: Tensor) -> Launch:
    config, tiles = level.config(FORWARD, out)
    arguments = level.arguments() | {"weight": packed, "bias": packed if bias is None else bias, "out": strided(out)}
    grid = (level.tile_count(tiles), level.groups * triton.cdiv(config.OUT, tiles.o))
    constants = {"K": config, "HAS_BIAS": bias is not None}
    return Launch(kernels.forward_kernel, grid, arguments, constants, tiles.warps, tiles.stages)


def points_launch(
    level: Level, packed: Tensor, grad: Tensor, to_x: Tensor | None, to_offset: Tensor | None, to_mask: Tensor | None
) -> Launch:
    whole = level.groups == 1 and level.weight.shape[0] <= POINTS["32"].o
    others = (t for t in (grad, to_offset, to_mask) if t is not None)
    config, tiles = level.config(POINTS if whole else _POINTS_PIECES, *others)
    # Pointers must point somewhere, also where nothing is written.
    arguments = level.arguments() | {
        "grad": grad,
        "weight": packed,
        "grad_x": grad if to_x is None else to_x,
        "grad_offset": strided(level.offset if to_offset is None else to_offset),
        "grad_mask": strided(level.offset if to_mask is None else to_mask),
    }
    wanted = {"TO_X": to_x is not None, "TO_OFFSET": to_offset is not None, "TO_MASK": to_mask is not None}
    points = level.offset.shape[1] // 2
    grid = (level.tile_count(tiles) * points,)
    return Launch(kernels.backward_points_kernel, grid, arguments, {"K": config, **wanted}, tiles.warps, tiles.stages)


def weight_launch(level: Level, grad: Tensor) -> Launch:
    """The launch lacks `partial`, whose length is the last number of its grid."""
    config, tiles = level.config(WEIGHT, grad)
    steps = level.taps * (config.C // config.SPAN) * triton.cdiv(config.SPAN, tiles.c)
    blocks = level.groups * triton.cdiv(config.OUT, tiles.o)
    count = level.tile_count(tiles)
    # A power of two, so that few sizes of maps need another compilation.
    per_split = triton.next_power_of_2(triton.cdiv(count, max(1, _WEIGHT_PROGRAMS // (steps * blocks))))
    arguments = level.arguments() | {"grad": grad, "tiles": count}
    grid = (steps, blocks, triton.cdiv(count, per_split))
    constants = {"K": config, "TILES": per_split}
    return Launch(kernels.backward_weight_kernel, grid, arguments, constants, tiles.warps, tiles.stages)


_run_forward, _run_points = Launcher(forward_launch), Launcher(points_launch)


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
    packed = weight.permute(0, 2, 3, 1).contiguous()
    bias = None if bias is None else bias.contiguous()
    for level, out in zip(levels(inputs, offsets, masks, weight, stride, padding, dilation), outputs, strict=True):
        _run_forward(level, packed, bias, out)


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
    it is that of `kernels.deform_conv.inverse`.
    """
    to_inputs, to_offsets, to_masks, to_weight, to_bias = results
    maps = levels(inputs, offsets, masks, weight, stride, padding, dilation)
    rows = [grad.permute(0, 2, 3, 1).contiguous() for grad in grads]
    packed = weight.unflatten(0, (maps[0].groups, -1)).permute(0, 3, 4, 2, 1).contiguous()
    if to_inputs and torch.are_deterministic_algorithms_enabled():
        deform_conv_inverse.input_gradients(to_inputs, rows, maps, packed)
        to_inputs = []
    if to_inputs or to_offsets or to_masks:
        none: list[Tensor | None] = [None] * len(maps)
        for i, (level, grad) in enumerate(zip(maps, rows, strict=True)):
            to_x = torch.zeros_like(level.x, dtype=real(weight.dtype)) if to_inputs else None
            _run_points(level, packed, grad, to_x, (to_offsets or none)[i], (to_masks or none)[i])
            if to_x is not None:
                to_inputs[i].copy_(to_x.permute(0, 3, 1, 2))
    if to_weight:
        launches = [weight_launch(level, grad) for level, grad in zip(maps, rows, strict=True)]
        counts = [launch.grid[-1] for launch in launches]
        partial = torch.empty((sum(counts), weight.numel()), dtype=real(weight.dtype), device=weight.device)
        for launch, part in zip(launches, partial.split(counts), strict=True):
            launch.arguments["partial"] = part
            launch.run()
        packed = partial.sum(0).view(weight.shape[0], *weight.shape[2:], weight.shape[1])
        to_weight[0].copy_(packed.permute(0, 3, 1, 2))
    if to_bias:
        sums = (grad.sum((0, 1, 2), dtype=real(weight.dtype)) for grad in rows)
        to_bias[0].copy_(reduce(torch.add, sums))
