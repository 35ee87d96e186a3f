"""The convolution that predicts a block's offsets and masks, of all levels, and its gradients.

One launch writes the matrix that the deformable convolutions read. Backward is one launch for the weight and the bias,
in pieces of the pyramid, and one that makes the gradient of the pyramid and adds those pieces up, in their order: the
same bits every time.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from kernels.backend import INTERPRET
from kernels.block import offset_kernels as kernels
from kernels.block.layout import TABLES, Layout
from kernels.runtime.launch import Launch, Launcher, multiprocessors, triton_real
from kernels.runtime.tiles import Table, Tiles, cdiv, fit, precision
from kernels.sampling.launch import TYPES, new_plan
from kernels.sampling.pack_kernels import SIDE, Packing
from kernels.sampling.plan_kernels import Plan

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
# Programs that make the weight's gradient, for each multiprocessor, and columns of their sums that one program adds up.
# The interpreter's time is that of its programs' number.
_WEIGHT_PROGRAMS, _COLUMNS = 2, 2048 if INTERPRET else 128


def forward(
    pyramid: Tensor,
    weight: Tensor,
    bias: Tensor,
    counters: Tensor,
    layout: Layout,
    plan: Plan | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """An ordinary 3x3 convolution, stride 1, zeros around each level, of every level in one launch.

    Args:
        pyramid: (P, C), see `kernels.block.layout`.
        weight: (O, C, 3, 3) of any floating type and strides; it is rounded to the type of `pyramid`. The kernel reads
            it where it is, fastest in `torch.channels_last`.
        bias: (O,), like `weight`.
        counters: int32, contiguous; they are zeroed for a later launch.
        layout: Rows and tables of the pyramid.
        plan: Where to write the plan of the samples that 18 offsets and 9 masks, in front of a sigmoid, ask for.
        packing: Weights to be packed by the same launch.

    Returns:
        (P, O) in the type of `pyramid`. Sums are float32, or float64 for float64.
    """
    predicted = pyramid.new_empty((layout.rows, len(weight)))
    _run_forward(pyramid, weight, bias, predicted, counters, plan, packing, layout)
    return predicted


def backward(
    grad: Tensor,
    pyramid: Tensor,
    weight: Tensor,
    bias: Tensor,
    others: Tensor | None,
    to_parameters: bool,
    layout: Layout,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`, the same bits every time.

    Args:
        grad: (P, O), contiguous, in the type of `pyramid`.
        pyramid, weight, bias: As in `forward`.
        others: (P, C), contiguous, of any floating type: what the pyramid's gradient has from elsewhere. The sum is
            rounded once. None if the pyramid needs no gradient.
        to_parameters: Whether weight and bias need one.
        layout: Rows and tables of the pyramid.

    Returns:
        The gradients of pyramid, weight and bias, each in the type and, where dense, the strides of what it is for.
    """
    grad_pyramid = None if others is None else torch.empty_like(pyramid)
    gradients = (torch.empty_like(weight), torch.empty_like(bias)) if to_parameters else None
    partial = None
    if to_parameters:
        outputs, channels = weight.shape[:2]
        runs = len(layout.runs(_pixels_a_run(grad, channels, layout)))
        partial = grad.new_empty((runs, (9 * channels + 1) * outputs), dtype=layout.real)
        _run_weight(grad, pyramid, partial, layout)
    if others is not None or to_parameters:
        _run_input(grad, weight, others, grad_pyramid, partial, gradients, layout)
    return grad_pyramid, *(gradients or (None, None))


def packing(weights: Sequence[Tensor], x: Tensor) -> Packing:
    """What packs the three weights (C, C, 3, 3) of a block's convolutions, with memory for them in the type of x."""
    if len({weight.stride() for weight in weights}) > 1 or len({weight.dtype for weight in weights}) > 1:
        weights = [weight.to(x.dtype, memory_format=torch.channels_last) for weight in weights]
    channels = weights[0].shape[1]
    packed = x.new_empty((3, 9, channels, channels))
    forward = packed if x.dtype.itemsize == 2 else x.new_empty((3, channels, 9, channels))
    (first, second, third), (o, c, y, x_) = weights, weights[0].stride()
    return Packing(first, second, third, o, c, y, x_, packed, forward)


def _tile_count(layout: Layout, tile: tuple[int, int]) -> int:
    return layout.batch * sum(cdiv(h, tile[0]) * cdiv(w, tile[1]) for h, w in layout.sizes)


def _common(x: Tensor, channels: int, outputs: int, layout: Layout) -> dict[str, Any]:
    return {
        "C": channels,
        "OUT": outputs,
        "REAL": triton_real(x.dtype),
        # Sums of several indices within an image must fit as well.
        "INDEX": tl.int32 if max(h * w for h, w in layout.sizes) * max(channels, outputs) < 2**30 else tl.int64,
        "PRECISION": precision(x.dtype, x.device),
    }


def _layer(weight: Tensor, bias: Tensor) -> kernels.Layer:
    o, c, y, x = weight.stride()
    return kernels.Layer(weight, bias, o, c, y, x, bias.stride(0))


def _forward_launch(
    pyramid: Tensor,
    weight: Tensor,
    bias: Tensor,
    predicted: Tensor,
    counters: Tensor,
    plan: Plan | None,
    packing: Packing | None,
    layout: Layout,
) -> Launch:
    outputs, channels = weight.shape[:2]
    tiles = fit(_FORWARD, pyramid.dtype, pyramid.device, channels, outputs)
    size = tiles.height, tiles.width
    packers = 0 if packing is None else 27 * cdiv(channels, SIDE.value) ** 2
    # The problems of the levels from themselves come first.
    arguments: dict[str, Any] = {"pyramid": pyramid, "layer": _layer(weight, bias)}
    arguments |= {"predicted": predicted, "problems": layout.table, "work": layout.tiles(size)}
    arguments |= {"counters": counters, "count": counters.numel(), "packing": packing, "packers": packers}
    arguments |= {"plan": plan, "levels": layout.levels, "sampled_rows": layout.sampled_rows}
    config = kernels.Config(
        **_common(pyramid, channels, outputs, layout),
        TILE_H=size[0],
        TILE_W=size[1],
        BLOCK_C=tiles.c,
        BLOCK_O=tiles.o,
        CROP=True,
        SIGMOID=True,
        TYPE=TYPES[pyramid.dtype],
        PACKED=pyramid.dtype.itemsize == 2,
    )
    grid = (packers + _tile_count(layout, size), cdiv(outputs, tiles.o))
    return Launch(kernels.forward_kernel, grid, arguments, {"K": config}, tiles.warps, tiles.stages, tables=TABLES)


def _input_launch(
    grad: Tensor,
    weight: Tensor,
    others: Tensor | None,
    grad_pyramid: Tensor | None,
    partial: Tensor | None,
    gradients: tuple[Tensor, Tensor] | None,
    layout: Layout,
) -> Launch:
    """Without `others` there are no programs for the pyramid, without `partial` none for weight and bias."""
    outputs, channels = weight.shape[:2]
    tiles = fit(_INPUT, grad.dtype, grad.device, channels, 9 * outputs)
    size, blocks = (tiles.height, tiles.width), cdiv(channels, tiles.c)
    adders = 0 if partial is None else cdiv((9 * channels + 1) * outputs, _COLUMNS * blocks)
    grad_weight, grad_bias = gradients or (weight, weight)
    # Pointers must point somewhere, also where nothing is read or written.
    arguments: dict[str, Any] = {"grad": grad, "layer": _layer(weight, weight)}
    arguments |= {"others": grad if others is None else others}
    arguments |= {"grad_pyramid": grad if grad_pyramid is None else grad_pyramid}
    arguments |= {"partial": grad if partial is None else partial, "runs": 0 if partial is None else len(partial)}
    arguments |= {"grad_layer": _layer(grad_weight, grad_bias), "adders": adders}
    arguments |= {"problems": layout.table, "work": layout.tiles(size)}
    constants = _common(grad, channels, outputs, layout)
    constants |= {"TILE_H": size[0], "TILE_W": size[1], "BLOCK_C": tiles.c, "BLOCK_K": tiles.o, "BLOCK_S": _COLUMNS}
    grid = (adders + (0 if others is None else _tile_count(layout, size)), blocks)
    kernel = kernels.backward_input_kernel
    return Launch(kernel, grid, arguments, constants, tiles.warps, tiles.stages, tables=TABLES)


def _weight_tiles(grad: Tensor, channels: int) -> tuple[Tiles, tuple[int, int]]:
    """Those of the weight's gradient, and programs of its grid along the last two axes."""
    tiles = fit(_WEIGHT, grad.dtype, grad.device, channels, 9 * grad.shape[1])
    return tiles, (cdiv(9 * grad.shape[1], tiles.o), cdiv(channels, tiles.c))


def _pixels_a_run(grad: Tensor, channels: int, layout: Layout) -> int:
    """Pixels that one program of the weight's gradient sums over."""
    tiles, blocks = _weight_tiles(grad, channels)
    pixels = tiles.height * tiles.width
    runs = max(1, _WEIGHT_PROGRAMS * multiprocessors(grad.device) // (blocks[0] * blocks[1]))
    return cdiv(cdiv(layout.rows, pixels), runs) * pixels


def _weight_launch(grad: Tensor, pyramid: Tensor, partial: Tensor, layout: Layout) -> Launch:
    channels = pyramid.shape[1]
    tiles, blocks = _weight_tiles(grad, channels)
    pixels_a_run = _pixels_a_run(grad, channels, layout)
    work = layout.runs(pixels_a_run)
    constants = _common(grad, channels, grad.shape[1], layout)
    constants |= {"PIXELS": tiles.height * tiles.width, "BLOCK_K": tiles.o, "BLOCK_C": tiles.c}
    arguments: dict[str, Any] = {"grad": grad, "pyramid": pyramid, "partial": partial}
    arguments |= {"pixels_a_run": pixels_a_run, "problems": layout.table, "work": work}
    grid, kernel = (len(work), *blocks), kernels.backward_weight_kernel
    return Launch(kernel, grid, arguments, constants, tiles.warps, tiles.stages, tables=TABLES)


_run_forward, _run_input, _run_weight = (Launcher(make) for make in (_forward_launch, _input_launch, _weight_launch))


def launches(pyramid: Tensor, predicted: Tensor, layout: Layout) -> dict[str, Launch]:
    """All launches of forward and backward by name; nothing is run.

    Making them makes the tables that they look up. The matrices' shapes and types count and not what they hold, so they
    may be on the `meta` device.
    """
    outputs, channels = predicted.shape[1], pyramid.shape[1]
    weight = torch.empty(
        (outputs, channels, 3, 3), dtype=pyramid.dtype, device="meta", memory_format=torch.channels_last
    )
    bias, partial = pyramid.new_empty(1).expand(outputs), pyramid.new_empty(1, 1, dtype=layout.real)
    counters = pyramid.new_empty(1, dtype=torch.int32).expand(len(layout.sizes) * layout.batch)
    extras = new_plan(pyramid, 1), packing([weight] * 3, pyramid)
    return {
        "forward": _forward_launch(pyramid, weight, bias, predicted, counters, *extras, layout),
        "backward input": _input_launch(predicted, weight, partial, pyramid, partial, (weight, bias), layout),
        "backward weight": _weight_launch(predicted, pyramid, partial, layout),
    }
