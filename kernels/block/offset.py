"""The convolution that predicts a block's offsets and masks, of all levels, as one function of the pyramid.

One launch writes the matrix that the deformable convolutions read. Its gradients are one launch for the pyramid and one
for weight and bias, whose partial sums are added in the order of pixels: the same bits every time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import INTERPRET
from kernels.block import offset_kernels as kernels
from kernels.block.layout import Layout
from kernels.runtime.launch import Launch, triton_real
from kernels.runtime.operator import differentiable_once
from kernels.runtime.tiles import Table, Tiles, fit, precision

# Of the backward tables, `o` is the block of columns of the unfolded gradient.
_FORWARD = Table(
    "block offsets forward",
    {"16": Tiles(8, 16, 64, 32, 4, 3), "32": Tiles(8, 16, 32, 32, 4, 3), "exact": Tiles(8, 8, 16, 32, 4, 2)},
)
_INPUT = Table(
    "block offsets backward input",
    {"16": Tiles(8, 16, 128, 64, 8, 2), "32": Tiles(8, 8, 256, 32, 8, 2), "exact": Tiles(4, 8, 32, 16, 4, 2)},
)
_WEIGHT = Table(
    "block offsets backward weight",
    {"16": Tiles(4, 8, 128, 128, 8, 2), "32": Tiles(4, 8, 256, 64, 8, 2), "exact": Tiles(4, 8, 32, 32, 4, 2)},
)
# Runs over which the sum of the weight's gradient is spread; the interpreter's time is that of its programs' number.
_RUNS = 4 if INTERPRET else 128


def predict(pyramid: Tensor, weight: Tensor, bias: Tensor, layout: Layout) -> Tensor:
    """An ordinary 3x3 convolution, stride 1, zeros around each level, of every level in one launch.

    Args:
        pyramid: (P, C), see `kernels.block.layout`.
        weight: (O, C, 3, 3) of any floating type; it is rounded to that of `pyramid`.
        bias: (O,).
        layout: Rows and tables of the pyramid.

    Returns:
        (P, O) in the type of `pyramid`. Sums are float32, or float64 for float64.
    """
    predicted: Tensor = _Predict.apply(pyramid, weight, bias, layout)
    return predicted


class _Predict(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pyramid: Tensor, weight: Tensor, bias: Tensor, layout: Layout) -> Tensor:
        outputs, channels = weight.shape[:2]
        packed = pyramid.new_empty((outputs, 3, 3, channels)).copy_(weight.permute(0, 2, 3, 1))
        predicted = pyramid.new_empty((layout.rows, outputs))
        _forward_launch(pyramid, packed, bias.contiguous(), predicted, layout).run()
        ctx.layout, ctx.types = layout, (weight.dtype, bias.dtype)
        ctx.save_for_backward(pyramid, packed)
        return predicted

    @staticmethod
    @differentiable_once("dyhead_block")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pyramid, packed = ctx.saved_tensors
        grad = grad.contiguous()
        grad_pyramid = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_pyramid = torch.empty_like(pyramid)
            _input_launch(grad, packed, grad_pyramid, ctx.layout).run()
        if any(ctx.needs_input_grad[1:]):
            sums = _backward_parameters(grad, pyramid, ctx.layout)
            grad_weight, grad_bias = (x.to(dtype) for x, dtype in zip(sums, ctx.types, strict=True))
        return grad_pyramid, grad_weight, grad_bias, None


def _tile_count(layout: Layout, tile: tuple[int, int]) -> int:
    return layout.batch * sum(triton.cdiv(h, tile[0]) * triton.cdiv(w, tile[1]) for h, w in layout.sizes)


def _common(x: Tensor, channels: int, outputs: int, layout: Layout) -> dict[str, Any]:
    return {
        "C": channels,
        "OUT": outputs,
        "REAL": triton_real(x.dtype),
        # Sums of several indices within an image must fit as well.
        "INDEX": tl.int32 if max(h * w for h, w in layout.sizes) * max(channels, outputs) < 2**30 else tl.int64,
        "PRECISION": precision(x.dtype, x.device),
    }


def _on_tiles(
    kernel: Any,
    x: Tensor,
    arguments: dict[str, Any],
    tiles: Tiles,
    blocks: dict[str, int],
    grid: int,
    layout: Layout,
) -> Launch:
    """A launch on the tiles of the levels, and `grid` blocks of channels; `x` is a matrix to take the type from."""
    outputs, _, _, channels = arguments["weight"].shape
    size = tiles.height, tiles.width
    tables = {"problems": layout.table, "work": layout.tiles(size)}
    constants = _common(x, channels, outputs, layout) | blocks | {"TILE_H": size[0], "TILE_W": size[1]}
    # The problems of the levels from themselves come first.
    return Launch(
        kernel, (_tile_count(layout, size), grid), {**arguments, **tables}, constants, tiles.warps, tiles.stages
    )


def _forward_launch(pyramid: Tensor, packed: Tensor, bias: Tensor, predicted: Tensor, layout: Layout) -> Launch:
    outputs, channels = packed.shape[0], packed.shape[3]
    tiles = fit(_FORWARD, pyramid.dtype, pyramid.device, channels, outputs)
    arguments = {"pyramid": pyramid, "weight": packed, "bias": bias, "predicted": predicted}
    blocks = {"BLOCK_C": tiles.c, "BLOCK_O": tiles.o}
    grid = triton.cdiv(outputs, tiles.o)
    return _on_tiles(kernels.forward_kernel, pyramid, arguments, tiles, blocks, grid, layout)


def _input_launch(grad: Tensor, packed: Tensor, grad_pyramid: Tensor, layout: Layout) -> Launch:
    outputs, channels = packed.shape[0], packed.shape[3]
    tiles = fit(_INPUT, grad.dtype, grad.device, channels, 9 * outputs)
    arguments = {"grad": grad, "weight": packed, "grad_pyramid": grad_pyramid}
    blocks = {"BLOCK_C": tiles.c, "BLOCK_K": tiles.o}
    grid = triton.cdiv(channels, tiles.c)
    return _on_tiles(kernels.backward_input_kernel, grad, arguments, tiles, blocks, grid, layout)


def _weight_launch(grad: Tensor, pyramid: Tensor, layout: Layout) -> Launch:
    """The launch lacks `partial`, whose length is the first number of its grid."""
    outputs, channels = grad.shape[1], pyramid.shape[1]
    tiles = fit(_WEIGHT, grad.dtype, grad.device, channels, 9 * outputs)
    pixels = tiles.height * tiles.width
    # A power of two, so that few sizes of maps need another compilation.
    steps = triton.next_power_of_2(triton.cdiv(triton.cdiv(layout.rows, pixels), _RUNS))
    work = layout.runs(steps * pixels)
    grid = len(work), triton.cdiv(9 * outputs, tiles.o), triton.cdiv(channels, tiles.c)
    constants = _common(grad, channels, outputs, layout)
    constants |= {"STEPS": steps, "PIXELS": pixels, "BLOCK_K": tiles.o, "BLOCK_C": tiles.c}
    arguments: dict[str, Any] = {"grad": grad, "pyramid": pyramid, "problems": layout.table, "work": work}
    return Launch(kernels.backward_weight_kernel, grid, arguments, constants, tiles.warps, tiles.stages)


def _backward_parameters(grad: Tensor, pyramid: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    outputs, channels = grad.shape[1], pyramid.shape[1]
    launch = _weight_launch(grad, pyramid, layout)
    partial = grad.new_empty((launch.grid[0], (9 * channels + 1) * outputs), dtype=layout.real)
    launch.arguments["partial"] = partial
    launch.run()
    weight, bias = partial.sum(0).split([9 * channels * outputs, outputs])
    return weight.view(3, 3, outputs, channels).permute(2, 3, 0, 1), bias


def launches(pyramid: Tensor, predicted: Tensor, layout: Layout) -> dict[str, Launch]:
    """All launches of forward and backward by name; nothing is run.

    Making them makes the tables that they look up. The matrices' shapes and types count and not what they hold, so they
    may be on the `meta` device.
    """
    packed = pyramid.new_empty(()).expand(predicted.shape[1], 3, 3, pyramid.shape[1])
    weight = _weight_launch(predicted, pyramid, layout)
    weight.arguments["partial"] = pyramid.new_empty(1, dtype=layout.real)
    return {
        "forward": _forward_launch(pyramid, packed, packed, predicted, layout),
        "backward input": _input_launch(predicted, packed, pyramid, layout),
        "backward weight": weight,
    }
