"""What the Triton kernels that read maps between cells share: RoIAlign and BorderAlign."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def divide(a, b):
    """`a / b` as PyTorch rounds it; Triton's own division of float32 is an approximation."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def neighbours(position, length):
    """The two cells around positions on an axis, the share of the second, and whether they are at most a cell outside.

    A cell's value lies at its index. Positions before the first cell and beyond the last one read that cell.
    """
    inside = (position >= -1) & (position <= length)
    # Not a number becomes a place that exists, though nothing may be read there.
    place = tl.minimum(tl.maximum(tl.where(inside, position, 0.0), 0.0), length - 1.0)
    low = tl.floor(place)
    share = place - low
    low = low.to(tl.int32)
    return low, tl.minimum(low + 1, length - 1), share, inside


def channels_innermost(x: Tensor) -> Tensor:
    """(N, C, H, W) with a channel stride of 1 and rows that follow one another; a copy only where it must be one."""
    _, channels, _, width = x.shape
    if x.stride(1) == 1 and x.stride(3) >= channels and x.stride(2) == width * x.stride(3):
        return x
    # A map of one channel or one pixel counts as any layout, whatever its strides say.
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def accumulator(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros (N, C, H, W) to add gradients to, channels innermost, in the type of sums over tensors like `x`."""
    n, channels, height, width = shape
    zeros = x.new_zeros((n, height, width, channels), dtype=torch.promote_types(x.dtype, torch.float32))
    return zeros.permute(0, 3, 1, 2)
