"""The deformable convolutions of a DyHead block as one function of pyramid, predicted offsets and weights."""

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.block import conv_backward as block_conv_backward
from kernels.block.conv_kernels import forward_kernel
from kernels.block.layout import Layout, layout
from kernels.block.maps import Maps
from kernels.deform_conv import launch as single
from kernels.runtime.compile_spec import CompileSpec
from kernels.runtime.launch import Launch, real
from kernels.runtime.tiles import Table, Tiles, fit

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
        pyramid: (P, C), see `kernels.block.layout`.
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
        _launch(Maps(pyramid, predicted.contiguous(), sigmoid, crop, layout), packed, sampled, partial).run()
        ctx.mark_non_differentiable(partial)
        # Otherwise zeros would be made for the gradient that `partial` does not have.
        ctx.set_materialize_grads(False)
        return sampled, partial

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        pyramid, predicted, *weights = ctx.saved_tensors
        maps, wanted = Maps(pyramid, predicted.contiguous(), *ctx.settings), ctx.needs_input_grad
        grad_pyramid, grad_predicted, grad_weights = block_conv_backward.gradients(
            maps, grad.contiguous(), weights, to_pyramid=wanted[0], to_weights=any(wanted[5:])
        )
        return grad_pyramid, grad_predicted, None, None, None, *grad_weights


def _launch(maps: Maps, packed: Tensor, sampled: Tensor, partial: Tensor) -> Launch:
    tiles, size = maps.fit(_FORWARD), maps.layout.tile
    grid = (len(maps.layout.tiles(size)), triton.cdiv(maps.channels, tiles.o))
    tensors = {"weight": packed, "sampled": sampled, "partial": partial, "axes": maps.layout.axes}
    return maps.launch(forward_kernel, grid, size, tiles, **tensors)


def compile_specs() -> list[CompileSpec]:
    """The kernels as they run on the levels of 800x1333 pixels, batch 8, with 256 channels."""
    specs = []
    sizes = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        device = torch.device("meta")
        tiles = tile(dtype, device, 256)
        found = layout(sizes, 8, device, real(dtype), (tiles.height, tiles.width))
        pyramid, sampled = (torch.empty(n, 256, dtype=dtype, device=device) for n in (found.rows, found.sampled_rows))
        predicted = torch.empty(found.rows, 27, dtype=dtype, device=device)
        partial = torch.empty(1, 3, 256, dtype=real(dtype), device=device)
        maps = Maps(pyramid, predicted, True, True, found)
        launches = {"forward": _launch(maps, sampled, sampled, partial)}
        launches |= {f"backward {k}": x for k, x in block_conv_backward.compile_launches(maps, sampled).items()}
        for name, launch in launches.items():
            multiplies = "BLOCK_O" in launch.constants
            specs.append(launch.spec(f"block convolutions {name}", dtype, uses_dot=multiplies))
    return specs
