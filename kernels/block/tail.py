"""The tail of a DyHead block: from the convolutions' outputs of all levels to the block's output, as one function.

GroupNorm, upsampling, scale attention, the mean over a level's maps and the dynamic ReLU are, for one image and
channel, two lines of a linear combination of pixels, with coefficients that depend on the maps only through three
numbers of each: its mean, its variance, and its mean after upsampling. Forward takes these statistics, computes the
coefficients from them (`kernels.block.coefficients`, on (N, C) tensors), and applies them:

    m = A0 * same + A1 * finer + A2 * upsampled coarser + D,    output = max(a1 * m + b1, a2 * m + b2)

Backward takes the same steps in reverse: the gradient of m and those of the coefficients, then those of the statistics
and the parameters, then those of the maps, to which m and the statistics both lead. Sums are float32 (float64 for
float64 maps), taken in an order that shapes alone decide.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.backend import INTERPRET
from kernels.block import coefficients
from kernels.block import tail_kernels as kernels
from kernels.block.layout import Layout
from kernels.block.sums import add_launch, add_runs
from kernels.runtime.launch import Launch, steps, triton_real
from kernels.runtime.operator import differentiable_once

# Elements of one program. The interpreter's time is that of its programs' number, hardly of their size.
_FORWARD, _SUMS, _MAPS = (8192, 4096, 8192) if INTERPRET else (2048, 1024, 2048)
_SUMS_STEPS = 2 if INTERPRET else 16
_MERGED = 64


class Settings(NamedTuple):
    """What a tail is besides its tensors.

    Attributes:
        rectified: Without dynamic ReLU, whether an ordinary one is applied, whose gradient at 0 is 0.
        groups: Groups of the GroupNorms, a power of two.
        eps: What the GroupNorms add to the variances.
    """

    rectified: bool
    groups: int
    eps: float


def tail(
    sampled: Tensor, partial: Tensor | None, parameters: Sequence[Tensor | None], settings: Settings, layout: Layout
) -> Tensor:
    """Normalise, upsample and weight the sampled maps of every level, add them up, and activate the sum.

    A tie of the two lines of dynamic ReLU gives half of the gradient to each, as in `kernels.dynamic_relu`.

    Args:
        sampled: (Q, C), see `kernels.block.layout`; convolutions without their biases.
        partial: (tiles, 3, C) as the convolution leaves it, the sums for the statistics; None to compute them.
        parameters: As in `kernels.block.coefficients.Saved`.
        settings: Which activation, and how to normalise.
        layout: Rows and tables of the pyramid.

    Returns:
        (P, C) in the type of `sampled`.
    """
    output: Tensor = _Tail.apply(sampled, partial, settings, layout, *parameters)
    return output


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        sampled: Tensor,
        partial: Tensor | None,
        settings: Settings,
        layout: Layout,
        *parameters: Tensor | None,
    ) -> Tensor:
        rectified, groups, eps = settings
        merged = merge(statistics(sampled, layout) if partial is None else partial, layout)
        saved = coefficients.forward(merged, layout.share, parameters, groups, eps)
        ctx.settings, ctx.layout = settings, layout
        ctx.save_for_backward(sampled, *saved[:-1], *parameters)
        return _forward(sampled, saved.coefficients, rectified, layout)

    @staticmethod
    @differentiable_once("dyhead_block")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rectified, groups, eps), layout = ctx.settings, ctx.layout
        sampled, lines, pooled, merged, share, *parameters = ctx.saved_tensors
        saved = coefficients.Saved(lines, pooled, merged, share, tuple(parameters))
        grad_m, grad_coefficients = backward_sums(grad.contiguous(), sampled, saved.coefficients, rectified, layout)
        grad_statistics, grads = coefficients.backward(grad_coefficients, saved, groups, eps)
        grad_sampled = None
        if ctx.needs_input_grad[0]:
            grad_sampled = _backward_maps(grad_m, sampled, saved, grad_statistics, layout)
        return grad_sampled, None, None, None, *grads


def _block_c(channels: int) -> int:
    return min(256, triton.next_power_of_2(channels))


def _pixels(channels: int, elements: int) -> int:
    """Pixels of a block of so many elements."""
    return max(1, elements // _block_c(channels))


def _common(sampled: Tensor, layout: Layout) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Arguments and constants that the kernels over pixels have in common, and the number of blocks of channels."""
    channels = sampled.shape[1]
    block = _block_c(channels)
    constants = {"C": channels, "BLOCK_C": block, "REAL": triton_real(sampled.dtype)}
    return {"sampled": sampled, "axes": layout.axes}, constants, triton.cdiv(channels, block)


def _statistics_launch(sampled: Tensor, partial: Tensor, layout: Layout) -> Launch:
    arguments, constants, _ = _common(sampled, layout)
    constants |= {"BLOCK_C": min(32, constants["BLOCK_C"]), "TILE_H": layout.tile[0], "TILE_W": layout.tile[1]}
    work = layout.tiles()
    grid = (len(work), triton.cdiv(sampled.shape[1], constants["BLOCK_C"]))
    arguments |= {"partial": partial, "problems": layout.table, "work": work}
    return Launch(kernels.statistics_kernel, grid, arguments, constants)


def statistics(sampled: Tensor, layout: Layout) -> Tensor:
    """The sums of every tile of the sampled maps, (tiles, 3, C), that `merge` takes."""
    partial = sampled.new_empty((len(layout.tiles()), 3, sampled.shape[1]), dtype=layout.real)
    _statistics_launch(sampled, partial, layout).run()
    return partial


def _merge_launch(partial: Tensor, statistics: Tensor, layout: Layout) -> Launch:
    block = min(32, _block_c(partial.shape[2]))
    grid = (len(layout.slots), triton.cdiv(partial.shape[2], block))
    arguments = {"partial": partial, "statistics": statistics, "problems": layout.table, "slots": layout.slots}
    constants = {
        "C": partial.shape[2],
        "STEPS": steps(layout.most_tiles, _MERGED),
        "TILE_H": layout.tile[0],
        "TILE_W": layout.tile[1],
        "BLOCK_T": _MERGED,
        "BLOCK_C": block,
        "REAL": triton_real(partial.dtype),
    }
    return Launch(kernels.merge_kernel, grid, {**arguments, "count": len(layout.slots)}, constants)


def merge(partial: Tensor, layout: Layout) -> Tensor:
    """Mean, biased variance and mean after upsampling of every channel of every sampled map.

    Returns:
        (3, L, 3, N, C), float32 or float64: kind, level, branch, image, channel; zeros for maps that do not exist.
    """
    merged = partial.new_empty((3, len(layout.sizes), 3, layout.batch, partial.shape[2]))
    _merge_launch(partial, merged, layout).run()
    return merged


def _forward_launch(sampled: Tensor, coefficients: Tensor, out: Tensor, rectified: bool, layout: Layout) -> Launch:
    arguments, constants, blocks = _common(sampled, layout)
    pixels = _pixels(sampled.shape[1], _FORWARD)
    work = layout.runs(pixels)
    arguments |= {"coefficients": coefficients, "out": out, "levels": layout.levels, "work": work}
    constants |= {"KINDS": coefficients.shape[2], "RECTIFIED": rectified, "PIXELS": pixels}
    return Launch(kernels.forward_kernel, (len(work), blocks), arguments | {"batch": layout.batch}, constants)


def _forward(sampled: Tensor, coefficients: Tensor, rectified: bool, layout: Layout) -> Tensor:
    out = sampled.new_empty((layout.rows, sampled.shape[1]))
    _forward_launch(sampled, coefficients, out, rectified, layout).run()
    return out


def _sums_launch(
    grad: Tensor,
    sampled: Tensor,
    coefficients: Tensor,
    grad_m: Tensor,
    partial: Tensor,
    rectified: bool,
    layout: Layout,
) -> Launch:
    arguments, constants, blocks = _common(sampled, layout)
    pixels = _pixels(sampled.shape[1], _SUMS)
    work = layout.runs(pixels * _SUMS_STEPS)
    arguments |= {"grad": grad, "coefficients": coefficients, "grad_m": grad_m, "partial": partial}
    arguments |= {"levels": layout.levels, "work": work, "batch": layout.batch}
    constants |= {"KINDS": coefficients.shape[2], "RECTIFIED": rectified, "STEPS": _SUMS_STEPS, "PIXELS": pixels}
    return Launch(kernels.backward_sums_kernel, (len(work), blocks), arguments, constants)


def _sums_bounds(channels: int, layout: Layout) -> tuple[Tensor, int]:
    """The runs of every level and image, as `add_runs` takes them, and how many one of them has at most."""
    pixels = _pixels(channels, _SUMS) * _SUMS_STEPS
    return layout.run_bounds(pixels), max(triton.cdiv(h * w, pixels) for h, w in layout.sizes)


def backward_sums(
    grad: Tensor, sampled: Tensor, coefficients: Tensor, rectified: bool, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Gradients of m, (P, C), and of the coefficients."""
    pixels = _pixels(sampled.shape[1], _SUMS) * _SUMS_STEPS
    grad_m = torch.empty_like(grad)
    partial = coefficients.new_empty((len(layout.runs(pixels)), *coefficients.shape[2:]))
    _sums_launch(grad, sampled, coefficients, grad_m, partial, rectified, layout).run()
    total = add_runs(partial, *_sums_bounds(sampled.shape[1], layout), dtype=coefficients.dtype)
    return grad_m, total.view_as(coefficients)


def _maps_launch(
    grad_m: Tensor,
    sampled: Tensor,
    coefficients: Tensor,
    statistics: Tensor,
    grad_statistics: Tensor,
    grad_sampled: Tensor,
    layout: Layout,
) -> Launch:
    arguments, constants, blocks = _common(sampled, layout)
    pixels = _pixels(sampled.shape[1], _MAPS)
    work = layout.sampled_runs(pixels)
    arguments |= {"grad_m": grad_m, "coefficients": coefficients, "statistics": statistics}
    arguments |= {"grad_statistics": grad_statistics, "grad_sampled": grad_sampled, "firsts": layout.firsts}
    arguments |= {"problems": layout.table, "work": work, "batch": layout.batch, "slots": len(layout.slots)}
    constants |= {"KINDS": coefficients.shape[2], "SPAN": layout.span, "PIXELS": pixels}
    return Launch(kernels.backward_maps_kernel, (len(work), blocks), arguments, constants)


def _backward_maps(
    grad_m: Tensor, sampled: Tensor, saved: coefficients.Saved, grad_statistics: Tensor, layout: Layout
) -> Tensor:
    """The gradient of the sampled maps, (Q, C)."""
    grad_sampled = torch.empty_like(sampled)
    tensors = grad_m, sampled, saved.coefficients, saved.statistics, grad_statistics, grad_sampled
    _maps_launch(*tensors, layout).run()
    return grad_sampled


def launches(pyramid: Tensor, sampled: Tensor, layout: Layout, kinds: int, rectified: bool) -> dict[str, Launch]:
    """All launches of forward and backward by name, those of `kernels.block.coefficients` left out; nothing is run.

    Making them makes the tables that they look up. The matrices' shapes and types count and not what they hold, so they
    may be on the `meta` device; `kinds` and `rectified` are the kernels' constants.
    """
    levels, batch, channels = len(layout.sizes), layout.batch, sampled.shape[1]
    one = sampled.new_empty((), dtype=layout.real)
    partial, statistics = one.expand(1, 3, channels), one.expand(3, levels, 3, batch, channels)
    lines, sums = one.expand(levels, batch, kinds, channels), one.expand(1, kinds, channels)
    return {
        "statistics": _statistics_launch(sampled, partial, layout),
        "merge": _merge_launch(partial, statistics, layout),
        "tail forward": _forward_launch(sampled, lines, pyramid, rectified, layout),
        "tail backward sums": _sums_launch(pyramid, sampled, lines, pyramid, sums, rectified, layout),
        "add": add_launch(sums, lines, *_sums_bounds(channels, layout)),
        "tail backward maps": _maps_launch(pyramid, sampled, lines, statistics, statistics, sampled, layout),
    }
