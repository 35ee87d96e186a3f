"""A stack of DyHead blocks as Triton launches for all levels at once, the pyramid as one matrix from block to block.

A block is three functions: `predict` the offsets and masks, `convolve` all deformable convolutions, and the `tail`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.block import conv, offset
from kernels.block import tail as block_tail
from kernels.block.layout import Layout, join, layout
from kernels.block.parameters import STRIDES, TAPS, BlockParameters, coarser_offsets
from kernels.runtime.launch import real
from kernels.runtime.tiles import type_class


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
    tile = conv.tile(dtype, device, channels)
    sizes = tuple((x.shape[2], x.shape[3]) for x in features)
    tables = layout(sizes, batch, device, real(dtype), (tile.height, tile.width))
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
    sampled, partial = _sample(pyramid, block, tables)
    biases: Sequence[Tensor | None] = block.biases
    if any(bias is not None for bias in biases):
        biases = [torch.zeros_like(block.norm_weights[i]) if bias is None else bias for i, bias in enumerate(biases)]
    gate, network = block.gate or (None,) * 2, block.dynamic_relu or (None,) * 4
    parameters = *block.norm_weights, *block.norm_biases, *biases, *gate, *network
    settings = block_tail.Settings(block.relu, block.groups, block.eps)
    return block_tail.tail(sampled, partial, parameters, settings, tables)


def _sample(pyramid: Tensor, block: BlockParameters, tables: Layout) -> tuple[Tensor, Tensor | None]:
    """The sampled maps, without the convolutions' biases, and the sums for their statistics where they are known."""
    if block.offset is None:
        levels = tables.split(pyramid)
        maps = []
        for inputs, weight, stride in zip((levels, levels[:-1], levels[1:]), block.weights, STRIDES, strict=True):
            maps += [F.conv2d(x, weight, None, stride, padding=1) for x in inputs]
        return join(maps), None
    weight, bias = block.offset
    predicted = offset.predict(pyramid, weight, bias, tables)
    crop = block.coarse_offsets == "crop"
    # Offsets and masks of a coarser neighbour that are no corner of the level's get rows of their own.
    if not crop:
        offsets, masks = predicted[:, : 2 * TAPS], predicted[:, 2 * TAPS :].sigmoid()
        coarser = [coarser_offsets(tables.split(x), block.coarse_offsets) for x in (offsets, masks)]
        levels = tables.split(torch.cat([offsets, masks], 1))
        predicted = join(levels + [torch.cat(pair, 1) for pair in zip(*coarser, strict=True)])
    return conv.convolve(pyramid, predicted, block.weights, crop, crop, tables)
