"""The deformable convolutions of a DyHead block as one function of pyramid, predicted offsets and weights."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import block_conv_triton as kernels
from kernels import deform_conv_launch as single
from kernels.block_layout import BRANCHES, Layout, layout
from kernels.compile_spec import CompileSpec
from kernels.launch import Launch, real, triton_real
from kernels.tiles import Table, Tiles, fit, precision

OFFSETS = 18

# In 16 bits a tile of 128 pixels spills on NVIDIA: a thread's 128 sums, and the sums for the statistics on top.
_FORWARD = Table("block convolutions forward", single.FORWARD | {"16": Tiles(8, 8, 32, 256, 8, 3)})


def tile(dtype: torch.dtype, device: torch.device, channels: int) -> Tiles:
    """The tile of the convolution, which the layout must have too."""
    return fit(_FORWARD, dtype, device, channels, channels)


def convolve(
    pyramid: Tensor, predicted: Tensor, weights: list[Tensor], sigmoid: bool, crop: bool, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Every deformable convolution of a block, in one launch.

    Args:
        pyramid: (P, C), see `kernels.block_layout`.
        predicted: (P, 27) of the same type: 18 offsets and 9 masks of every pixel. Without `crop`, one more row for
            every pixel of the coarser neighbours' maps, which read their own and not those of the level they are for.
        weights: (C, C, 3, 3) for a level itself, its finer and its coarser neighbour.
        sigmoid: the masks are in front of their sigmoid.

    Returns:
        (Q, C), and (tiles, 3, C) for `kernels.block_tail.statistics`, which has no gradient.
    """
    return _Convolve.apply(pyramid, predicted, sigmoid, crop, layout, *weights)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pyramid, predicted, sigmoid, crop, layout, *weights):
        ctx.settings = sigmoid, crop, layout
        ctx.save_for_backward(pyramid, predicted, *weights)
        # Packed at every call: a copy kept for the next one would miss what is written to a parameter's `.data`.
        packed = torch.stack([w.permute(0, 2, 3, 1) for w in weights]).to(pyramid.dtype)
        channels = pyramid.shape[1]
        sampled = pyramid.new_empty((layout.sampled_rows, channels))
        partial = pyramid.new_empty((len(layout.tiles()), 3, channels), dtype=layout.real)
        _forward_launch(pyramid, predicted.contiguous(), packed, sampled, partial, sigmoid, crop, layout).run()
        ctx.mark_non_differentiable(partial)
        return sampled, partial

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        pyramid, predicted, *weights = ctx.saved_tensors
        sigmoid, crop, layout = ctx.settings
        grad_pyramid, grad_predicted, grad_weights = _backward(grad, pyramid, predicted, weights, sigmoid, crop, layout)
        return grad_pyramid, grad_predicted, None, None, None, *grad_weights


def _forward_launch(pyramid, predicted, packed, sampled, partial, sigmoid, crop, layout: Layout) -> Launch:
    channels = pyramid.shape[1]
    tiles = tile(pyramid.dtype, pyramid.device, channels)
    work = layout.tiles()
    arguments = {"pyramid": pyramid, "predicted": predicted, "weight": packed, "sampled": sampled, "partial": partial}
    arguments |= {"axes": layout.axes, "problems": layout.table, "work": work}
    arguments |= {"coarser_rows": layout.rows - layout.coarser_row}
    constants = {
        "C": channels,
        "CROP": crop,
        "SIGMOID": sigmoid,
        "TILE_H": layout.tile[0],
        "TILE_W": layout.tile[1],
        "BLOCK_C": tiles.c,
        "BLOCK_O": tiles.o,
        "REAL": triton_real(pyramid.dtype),
        # Sums of several places within an image must fit as well.
        "INDEX": tl.int32 if max(h * w for h, w in layout.sizes) * channels < 2**30 else tl.int64,
        "PRECISION": precision(pyramid.dtype, pyramid.device),
    }
    grid = (len(work), triton.cdiv(channels, tiles.o))
    return Launch(kernels.forward_kernel, grid, arguments, constants, tiles.warps, tiles.stages)


def _backward(grad, pyramid, predicted, weights, sigmoid, crop, layout: Layout):
    """Branch by branch through the kernels of `deform_conv2d`."""
    offset, mask = predicted[:, :OFFSETS], predicted[:, OFFSETS:]
    mask = mask.sigmoid() if sigmoid else mask
    grad_pyramid, grad_offset, grad_mask = (torch.zeros_like(x, dtype=layout.real) for x in (pyramid, offset, mask))
    grad_weights = []
    for branch, weight in zip(range(BRANCHES), weights, strict=True):
        problems = [(i, p) for i, p in enumerate(layout.problems) if p.branch == branch]
        if not problems:
            grad_weights.append(None)
            continue

        def maps(matrix, problems=problems):
            return [layout.source(matrix, p) for _, p in problems]

        def own(matrix, problems=problems):
            return [layout.predicted(matrix, i, crop) for i, _ in problems]

        grads = [layout.sampled(grad, i) for i, _ in problems]
        stride = [problems[0][1].stride] * 2
        arguments = (grads, maps(pyramid), own(offset), own(mask), weight.to(pyramid.dtype), stride, [1, 1], [1, 1])
        needs = [True, True, True, True, False]
        found = torch.ops.dyhead.deform_conv2d_backward.default(*arguments, needs, "triton")
        count = len(problems)
        for targets, parts in (
            (maps(grad_pyramid), found[:count]),
            (own(grad_offset), found[count : 2 * count]),
            (own(grad_mask), found[2 * count : 3 * count]),
        ):
            for target, part in zip(targets, parts, strict=True):
                target += part
        grad_weights.append(found[-1].to(weight.dtype))
    if sigmoid:
        grad_mask *= mask * (1 - mask)
    grad_predicted = torch.cat([grad_offset, grad_mask], 1)
    return grad_pyramid.to(pyramid.dtype), grad_predicted.to(predicted.dtype), grad_weights


def compile_specs() -> list[CompileSpec]:
    """The kernel as it runs on the levels of 800x1333 pixels, batch 8, with 256 channels."""
    specs = []
    sizes = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        device = torch.device("meta")
        tiles = tile(dtype, device, 256)
        found = layout(sizes, 8, device, real(dtype), (tiles.height, tiles.width))
        pyramid, sampled = (torch.empty(n, 256, dtype=dtype, device=device) for n in (found.rows, found.sampled_rows))
        predicted = torch.empty(found.rows, 27, dtype=dtype, device=device)
        partial = torch.empty(1, 3, 256, dtype=real(dtype), device=device)
        launch = _forward_launch(pyramid, predicted, sampled, sampled, partial, True, True, found)
        specs.append(launch.spec("block convolutions forward", dtype, uses_dot=True))
    return specs
