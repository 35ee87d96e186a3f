"""Launching the Triton kernels of the dynamic ReLU: layouts, blocks, memory.

A launch is prepared as data and run afterwards, so that the ahead-of-time compilation describes exactly what runs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.dynamic_relu import kernels
from kernels.runtime.launch import Launch, Launcher, real, triton_real
from kernels.runtime.tiles import cdiv, power_of_2

# Elements of a block.
_FORWARD_TILE = 4096
_BACKWARD_TILE = 2048
_WARPS, _STAGES = 4, 3
# Enough programs to fill any of the GPUs compiled for; past it a program takes more pixels and there are fewer sums.
_BACKWARD_PROGRAMS = 1024


def _rows(x: Tensor) -> kernels.Rows:
    """A map (N, C, H, W) as (N, H * W, C); a copy only where rows and columns are not one evenly spaced sequence."""
    stride_n, stride_c, stride_h, stride_w = x.stride()
    _, _, height, width = x.shape
    if width == 1:
        return kernels.Rows(x, stride_n, stride_h, stride_c)
    if height == 1 or stride_h == width * stride_w:
        return kernels.Rows(x, stride_n, stride_w, stride_c)
    return _rows(x.contiguous(memory_format=torch.channels_last if stride_c == 1 else torch.contiguous_format))


class _Blocks(NamedTuple):
    """How a map is cut: pixels and channels of a block, and how many blocks there are along each."""

    pixels: int
    channels: int
    along_pixels: int
    along_channels: int

    def constants(self, x: Tensor) -> dict[str, Any]:
        return {"BLOCK_P": self.pixels, "BLOCK_C": self.channels, "REAL": triton_real(x.dtype)}


def _blocks(elements: int, pixels: int, channels: int, pixels_innermost: bool) -> _Blocks:
    # The innermost dimension takes up to 256 elements, which is what a warp reads at once, the other one the rest.
    inner, outer = (pixels, channels) if pixels_innermost else (channels, pixels)
    inner = min(power_of_2(inner), 256)
    outer = min(power_of_2(outer), elements // inner)
    block_p, block_c = (inner, outer) if pixels_innermost else (outer, inner)
    return _Blocks(block_p, block_c, cdiv(pixels, block_p), cdiv(channels, block_c))


def forward_launch(output: Tensor, input: Tensor, coefficients: Tensor) -> Launch:
    n, channels, height, width = input.shape
    pixels = height * width
    x, y = _rows(input), _rows(output)
    blocks = _blocks(_FORWARD_TILE, pixels, channels, y.p == 1)
    arguments: dict[str, Any] = {"x": x, "y": y, "coefficients": coefficients.contiguous()}
    arguments |= {"pixels": pixels, "channels": channels, "tiles_p": blocks.along_pixels}
    grid = (n * blocks.along_pixels * blocks.along_channels,)
    return Launch(kernels.forward_kernel, grid, arguments, blocks.constants(input), _WARPS, _STAGES)


def backward_steps(grad_input: Tensor) -> tuple[_Blocks, int, int]:
    """The blocks of the backward, how many along the pixels one program sums over, and how many programs that makes."""
    n, channels, height, width = grad_input.shape
    blocks = _blocks(_BACKWARD_TILE, height * width, channels, _rows(grad_input).p == 1)
    tiles = blocks.along_pixels
    # From the shape alone, never from the device: the order of summation is then the same everywhere. A power of two,
    # so that few variants are compiled; a constant there, because Triton 3.6 interprets no other range under NumPy 2.4.
    steps = min(tiles, max(1, n * tiles * blocks.along_channels // _BACKWARD_PROGRAMS))
    steps = 2 ** (steps.bit_length() - 1)
    return blocks, steps, cdiv(tiles, steps)


def backward_launch(
    grad_input: Tensor, grad_output: Tensor, input: Tensor, coefficients: Tensor, partial: Tensor
) -> Launch:
    """`partial` (N, programs of `backward_steps`, 4, C) is what it sums for the coefficients."""
    n, channels, height, width = input.shape
    blocks, steps, chunks = backward_steps(grad_input)
    arguments: dict[str, Any] = {"grad_y": _rows(grad_output), "x": _rows(input), "grad_x": _rows(grad_input)}
    arguments |= {"coefficients": coefficients.contiguous(), "partial": partial}
    arguments |= {"pixels": height * width, "channels": channels, "chunks": chunks}
    constants = blocks.constants(input) | {"STEPS": steps}
    grid = (n * chunks * blocks.along_channels,)
    return Launch(kernels.backward_kernel, grid, arguments, constants, _WARPS, _STAGES)


_run_forward, _run_backward = Launcher(forward_launch), Launcher(backward_launch)


def forward(output: Tensor, input: Tensor, coefficients: Tensor) -> None:
    """Write the dynamic ReLU of `input` to `output`, which is contiguous or channels_last."""
    if input.numel():
        _run_forward(output, input, coefficients)


def backward(grad_input: Tensor, grad_output: Tensor, input: Tensor, coefficients: Tensor) -> Tensor:
    """Write the gradient of `input` to `grad_input` and return that of the coefficients."""
    if not input.numel():
        return torch.zeros_like(coefficients, memory_format=torch.contiguous_format)
    n, channels = input.shape[:2]
    shape = (n, backward_steps(grad_input)[2], 4, channels)
    partial = torch.empty(shape, dtype=real(input.dtype), device=input.device)
    _run_backward(grad_input, grad_output, input, coefficients, partial)
    return partial.sum(1).to(coefficients.dtype)
