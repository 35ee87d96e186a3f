"""A whole DyHead block for all levels of a pyramid: reference, public functions.

The block of Dai et al., "Dynamic Head: Unifying Object Detection Heads with Attentions", CVPR 2021, as its authors
released it. Every level samples itself and its two neighbours with deformable 3×3 convolutions, whose offsets and masks
it predicts; a GroupNorm follows each; every sampled map gets one weight, and the weighted maps of a level are averaged;
a dynamic ReLU ends the block. `reference` is the definition. On a GPU the same is a few launches for all levels
together, `kernels.block.launch`: between the convolutions and one elementwise kernel stands a small computation on
(N, C) tensors, because everything else depends on the maps only through their means and variances.

Convolutions are in the type of the maps, everything after them is in float32 (float64 for float64), and the output is
rounded once. A group of a single value is normalised like any other.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import INTERPRET, resolve_backend, without_autocast
from kernels.block.parameters import (
    STRIDES,
    TAPS,
    BlockParameters,
    check_features,
    check_parameters,
    coarser_offsets,
    pyramid_mismatch,
)
from kernels.deform_conv.operator import deform_conv2d_levels
from kernels.dynamic_relu.operator import dynamic_relu


def reference(features: Sequence[Tensor], block: BlockParameters) -> list[Tensor]:
    """One block spelled out with the public operators of this package and PyTorch's, differentiable by autograd.

    Args:
        features: One (N, C, H_l, W_l) a level, finest first.
        block: Tensors of any floating type; they are rounded to that of the maps, or of what comes after the
            convolutions.

    Returns:
        One (N, C, H_l, W_l) a level.
    """
    dtype, real = features[0].dtype, torch.promote_types(features[0].dtype, torch.float32)

    def of_groups(branch: int, x: Tensor) -> Tensor:
        """A convolution's output with its bias, normalised."""
        x, bias = x.to(real), block.biases[branch]
        if bias is not None:
            x = x + bias.to(real)[:, None, None]
        # F.group_norm refuses a group of a single value.
        scale, shift = block.norm_weights[branch].to(real), block.norm_biases[branch].to(real)
        return torch.group_norm(x, block.groups, scale, shift, block.eps)

    def linear(x: Tensor, layer: Sequence[Tensor]) -> Tensor:
        weight, bias = layer
        return F.linear(x, weight.to(real), bias.to(real))

    same, finer, coarser = _convolutions(features, block, dtype)
    sampled = [[of_groups(0, x)] for x in same]
    for maps, x in zip(sampled[1:], finer, strict=True):
        maps.append(of_groups(1, x))
    for maps, x in zip(sampled[:-1], coarser, strict=True):
        maps.append(F.interpolate(of_groups(2, x), maps[0].shape[2:], mode="bilinear", align_corners=True))

    outputs = []
    for maps in sampled:
        if block.gate is not None:
            gates = [F.hardsigmoid(F.relu(linear(x.mean((2, 3)), block.gate))) for x in maps]
            maps = [x * gate[..., None, None] for x, gate in zip(maps, gates, strict=True)]
        m = torch.stack(maps).sum(0) / len(maps)
        if block.dynamic_relu is not None:
            hidden = F.relu(linear(m.mean((2, 3)), block.dynamic_relu[:2]))
            y = F.hardsigmoid(linear(hidden, block.dynamic_relu[2:]))
            y0, y1, y2, y3 = y.chunk(4, 1)
            m = dynamic_relu(m, torch.stack([2 * y0, y1 - 0.5, 2 * y2 - 1, y3 - 0.5], 1))
        elif block.relu:
            m = F.relu(m)
        outputs.append(m.to(dtype))
    return outputs


def _convolutions(features: Sequence[Tensor], block: BlockParameters, dtype: torch.dtype) -> list[list[Tensor]]:
    """What every level samples of itself, of its finer, and of its coarser neighbour, in the neighbour's size."""
    inputs = features, features[:-1], features[1:]
    weights = [weight.to(dtype) for weight in block.weights]
    if block.offset is None:
        return [
            [F.conv2d(x, weight, None, stride, padding=1) for x in maps]
            for maps, weight, stride in zip(inputs, weights, STRIDES, strict=True)
        ]
    weight, bias = (x.to(dtype) for x in block.offset)
    predicted = [F.conv2d(x, weight, bias, padding=1) for x in features]
    offsets, masks = [x[:, : 2 * TAPS] for x in predicted], [x[:, 2 * TAPS :].sigmoid() for x in predicted]
    # Offsets and masks are those of the level that is made, whatever it samples.
    coarse_offsets, coarse_masks = (coarser_offsets(x, block.coarse_offsets) for x in (offsets, masks))
    samples = (offsets, masks), (offsets[1:], masks[1:]), (coarse_offsets, coarse_masks)
    return [
        deform_conv2d_levels(x, offsets, weight, None, stride, padding=1, masks=masks) if x else []
        for x, (offsets, masks), weight, stride in zip(inputs, samples, weights, STRIDES, strict=True)
    ]


def unfused_reason(features: Sequence[Tensor]) -> str | None:
    """Why a block on these levels is made of separate operators; None where it is a few launches for all levels.

    Args:
        features: One (N, C, H_l, W_l) a level, finest first.
    """
    device = features[0].device
    if not (device.type == "cuda" or (device.type == "cpu" and INTERPRET)) or resolve_backend(device) != "triton":
        return f"tensors on the device {device.type!r} take the plain PyTorch path; kernels.use_backend selects another"
    if torch.compiler.is_compiling():
        return "torch.compile traces the separate operators"
    if any(x.shape[:2] != features[0].shape[:2] or x.device != device or x.numel() == 0 for x in features):
        return "the levels differ in batch, channels or device, or are empty"
    return pyramid_mismatch([x.shape[2:] for x in features])


def dyhead_blocks(features: Sequence[Tensor], blocks: Sequence[BlockParameters]) -> list[Tensor]:
    """A stack of DyHead blocks; see `dyhead_block`. On a GPU the levels stay one matrix from block to block.

    The first call on some shapes and types copies tables to the GPU, those of backward included. A CUDA graph cannot
    capture that, so call once before a capture; kernels that were never launched are compiled when they first are.

    Args:
        features: One (N, C, H_l, W_l) a level, finest first.
        blocks: The parameters of every block, in the order in which they are applied.

    Returns:
        One (N, C, H_l, W_l) a level; channels last, where blocks ran fused.

    Raises:
        TypeError, ValueError: As in `dyhead_block`.
    """
    check_features(features)
    if not isinstance(blocks, list | tuple):
        raise TypeError(f"blocks must be a list of kernels.BlockParameters, got {type(blocks).__name__}")
    for i, parameters in enumerate(blocks):
        check_parameters(f"blocks[{i}]", parameters, features[0])
    return _run(features, blocks)


def dyhead_block(features: Sequence[Tensor], parameters: BlockParameters) -> list[Tensor]:
    """Deformable convolutions, scale attention and dynamic ReLU of one DyHead block, for all levels of a pyramid.

    All tensors have one device and one dtype (float16, bfloat16, float32, float64); under autocast they may have
    several dtypes, and maps are rounded to autocast's. Levels and parameters all have a gradient; with one level, the
    parameters of its neighbours have none.

    Args:
        features: One (N, C, H_l, W_l) a level, finest first; every level has half the height and width of the one
            before, rounded up. Any strides; N may be 0.
        parameters: Weights and settings, with what is switched off left out.

    Returns:
        One (N, C, H_l, W_l) a level.

    Raises:
        TypeError: An argument is of a wrong Python type.
        ValueError: A shape, dtype, device or setting does not fit the others; the message names it and what it must be.
        NotImplementedError: A second derivative is asked for, on a GPU.

    Example:
        >>> import torch
        >>> from kernels import BlockParameters, dyhead_block
        >>> ones, zeros = (torch.ones(16),) * 3, (torch.zeros(16),) * 3
        >>> parameters = BlockParameters(
        ...     weights=tuple(torch.randn(3, 16, 16, 3, 3)),
        ...     norm_weights=ones,
        ...     norm_biases=zeros,
        ...     offset=(torch.zeros(27, 16, 3, 3), torch.zeros(27)),
        ... )
        >>> features = [torch.randn(2, 16, 10, 7), torch.randn(2, 16, 5, 4)]
        >>> [tuple(x.shape) for x in dyhead_block(features, parameters)]
        [(2, 16, 10, 7), (2, 16, 5, 4)]
    """
    check_features(features)
    check_parameters("parameters", parameters, features[0])
    return _run(features, [parameters])


def _run(features: Sequence[Tensor], blocks: Sequence[BlockParameters]) -> list[Tensor]:
    device = features[0].device
    resolve_backend(device)
    if blocks and unfused_reason(features) is None:
        # Triton is looked for only where it is used: it is not installed on every system.
        from kernels.block import launch

        return launch.forward(features, blocks)
    levels = list(features)
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        levels = [x.to(torch.get_autocast_dtype(device.type)) for x in levels]
    with without_autocast(device):
        for parameters in blocks:
            levels = reference(levels, parameters)
    return levels
