"""A stack of DyHead blocks as Triton launches for all levels at once, the pyramid as one matrix from block to block.

A block is three functions: `offset` predicts offsets and masks, `conv` makes all deformable convolutions, and `tail`
the rest. They are one step of autograd's graph, so that backward hands gradients from one to the other as they are:
the pyramid's is rounded once, and nobody adds two of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.block import coefficients, conv, offset
from kernels.block import tail as block_tail
from kernels.block.layout import Layout, join, layout
from kernels.block.parameters import STRIDES, TAPS, BlockParameters, coarser_offsets
from kernels.runtime.launch import real
from kernels.runtime.operator import differentiable_once
from kernels.runtime.tiles import type_class
from kernels.sampling import launch as sampling
from kernels.sampling.plan_kernels import Plan


def forward(features: Sequence[Tensor], blocks: Sequence[BlockParameters]) -> list[Tensor]:
    """`kernels.dyhead_blocks` on a GPU or the interpreter; arguments are checked."""
    device = features[0].device
    if torch.is_autocast_enabled(device.type):
        features = [x.to(torch.get_autocast_dtype(device.type)) for x in features]
    tables = _tables(features)
    pyramid = join(features)
    for block in blocks:
        pyramid = _block(pyramid, block, tables)
    return tables.split(pyramid)


def _tables(features: Sequence[Tensor]) -> Layout:
    """The layout of these levels with all tables that forward and backward look up."""
    batch, channels, dtype, device = *features[0].shape[:2], features[0].dtype, features[0].device
    tile = conv.tile(features[0])
    sizes = tuple((x.shape[2], x.shape[3]) for x in features)
    tables = layout(sizes, batch, device, real(dtype), tile)
    kind = dtype, channels, type_class(dtype, device)
    if kind not in tables.complete:
        # Tables made in inference mode could not be part of a graph later on.
        with torch.inference_mode(False):
            one = torch.empty((), dtype=dtype, device=device)
            pyramid, sampled = one.expand(tables.rows, channels), one.expand(tables.sampled_rows, channels)
            predicted = one.expand(tables.rows, 3 * TAPS)
            offset.launches(pyramid, predicted, tables)
            conv.launches(pyramid, predicted, sampled, tables)
            block_tail.launches(pyramid, sampled, tables, kinds=8, rectified=False)
        tables.complete.add(kind)
    return tables


def _block(pyramid: Tensor, block: BlockParameters, tables: Layout) -> Tensor:
    biases: Sequence[Tensor | None] = block.biases
    if any(bias is not None for bias in biases):
        biases = [torch.zeros_like(block.norm_weights[i]) if bias is None else bias for i, bias in enumerate(biases)]
    gate, network = block.gate or (None,) * 2, block.dynamic_relu or (None,) * 4
    parameters = *block.norm_weights, *block.norm_biases, *biases, *gate, *network
    settings = block_tail.Settings(block.relu, block.groups, block.eps)
    output: Tensor
    if block.offset is None:
        output = _Tail.apply(_plain(pyramid, block, tables), settings, tables, *parameters)
    else:
        tensors = *block.offset, *block.weights, *parameters
        output = _Block.apply(pyramid, block.coarse_offsets, settings, tables, *tensors)
    return output


def _plain(pyramid: Tensor, block: BlockParameters, tables: Layout) -> Tensor:
    """The sampled maps of ordinary convolutions, without their biases, which PyTorch makes."""
    levels = tables.split(pyramid)
    maps = []
    for inputs, weight, stride in zip((levels, levels[:-1], levels[1:]), block.weights, STRIDES, strict=True):
        maps += [F.conv2d(x, weight, None, stride, padding=1) for x in inputs]
    return join(maps)


def _points(predicted: Tensor, mode: str, tables: Layout) -> Tensor:
    """Offsets and masks where no coarser neighbour reads a corner of the level's: it gets rows of its own."""
    offsets, masks = predicted[:, : 2 * TAPS], predicted[:, 2 * TAPS :].sigmoid()
    coarser = [coarser_offsets(tables.split(x), mode) for x in (offsets, masks)]
    levels = tables.split(torch.cat([offsets, masks], 1))
    return join(levels + [torch.cat(pair, 1) for pair in zip(*coarser, strict=True)])


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sampled: Tensor, settings: block_tail.Settings, tables: Layout, *parameters: Tensor | None
    ) -> Tensor:
        counters = block_tail.counters(tables)
        partial = block_tail.statistics(sampled, counters, tables)
        output, saved = block_tail.forward(sampled, partial, parameters, settings, counters, tables)
        ctx.settings, ctx.tables = settings, tables
        ctx.save_for_backward(sampled, *saved[:-1], *parameters)
        return output

    @staticmethod
    @differentiable_once("dyhead_block")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sampled, lines, pooled, statistics, *parameters = ctx.saved_tensors
        saved = coefficients.Saved(lines, pooled, statistics, tuple(parameters))
        grad_sampled, grads = block_tail.backward(
            grad.contiguous(), sampled, saved, ctx.settings, ctx.tables, ctx.needs_input_grad[0]
        )
        return grad_sampled, None, None, *grads


class _Block(torch.autograd.Function):
    """Parameters are weight and bias of the offsets, the three weights of the convolutions, and those of the tail."""

    @staticmethod
    def forward(
        ctx: Any, pyramid: Tensor, mode: str, settings: block_tail.Settings, tables: Layout, *parameters: Tensor
    ) -> Tensor:
        crop = mode == "crop"
        counters = block_tail.counters(tables)
        plan = sampling.new_plan(pyramid, TAPS * tables.sampled_rows)
        packing = offset.packing(parameters[2:5], pyramid)
        predicted = offset.forward(
            pyramid, parameters[0], parameters[1], counters, tables, plan if crop else None, packing
        )
        points = conv.Points(predicted if crop else _points(predicted, mode, tables), crop, crop)
        if not crop:
            conv.run_plan(points, plan, tables)
        sampled, partial = conv.forward(pyramid, plan, packing.forward, tables)
        output, saved = block_tail.forward(sampled, partial, parameters[5:], settings, counters, tables)
        ctx.mode, ctx.settings, ctx.tables = mode, settings, tables
        convolved = predicted, points.matrix, *plan, packing.packed
        ctx.save_for_backward(pyramid, sampled, *convolved, *saved[:-1], *parameters)
        return output

    @staticmethod
    @differentiable_once("dyhead_block")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pyramid, sampled, predicted, matrix, pixels, factors, weights, *others = ctx.saved_tensors
        lines, pooled, statistics, *parameters = others
        saved = coefficients.Saved(lines, pooled, statistics, tuple(parameters[5:]))
        wanted, crop, tables = ctx.needs_input_grad, ctx.mode == "crop", ctx.tables
        to_pyramid, to_offset, to_weights = wanted[0], any(wanted[4:6]), any(wanted[6:9])
        grad_sampled, grads = block_tail.backward(
            grad.contiguous(), sampled, saved, ctx.settings, tables, to_pyramid or to_offset or to_weights
        )
        if grad_sampled is None:
            return *(None,) * 9, *grads
        plan, points = Plan(pixels, factors), conv.Points(matrix, crop, crop)
        grad_pyramid, grad_points = conv.backward(grad_sampled, pyramid, points, plan, weights, tables, to_pyramid)
        grad_weights: list[Tensor | None] = [None] * 3
        if to_weights:
            grad_weights = conv.backward_weights(grad_sampled, pyramid, plan, parameters[2:5], tables)
        if not crop:
            with torch.enable_grad():
                leaf = predicted.detach().requires_grad_()
                rearranged = _points(leaf, ctx.mode, tables)
            grad_points = torch.autograd.grad(rearranged, leaf, grad_points)[0].contiguous()
        grad_pyramid, *grad_offset = offset.backward(
            grad_points, pyramid, parameters[0], parameters[1], grad_pyramid, to_offset, tables
        )
        return grad_pyramid, None, None, None, *grad_offset, *grad_weights, *grads
