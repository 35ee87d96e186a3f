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
from torch import Tensor

from kernels.backend import INTERPRET
from kernels.block import coefficients
from kernels.block import tail_kernels as kernels
from kernels.block.layout import TABLES, Layout
from kernels.runtime.launch import Launch, Launcher, multiprocessors, triton_real
from kernels.runtime.tiles import cdiv, power_of_2

# Elements of one program. The interpreter's time is that of its programs' number, hardly of their size.
_FORWARD, _SUMS, _MAPS = (8192, 4096, 8192) if INTERPRET else (2048, 1024, 2048)
# Programs that sum over pixels, as many as a multiprocessor runs at once; rows and columns of a matrix that one program
# adds up.
_SUMS_PROGRAMS, _ADDED = 3, 256 if INTERPRET else 32


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


def counters(layout: Layout) -> Tensor:
    """(L * N,) int32, not yet zeroed: what `forward` takes."""
    return torch.empty(len(layout.sizes) * layout.batch, dtype=torch.int32, device=layout.device)


def forward(
    sampled: Tensor,
    partial: Tensor,
    parameters: Sequence[Tensor | None],
    settings: Settings,
    counters: Tensor,
    layout: Layout,
) -> tuple[Tensor, coefficients.Saved]:
    """Normalise, upsample and weight the sampled maps of every level, add them up, and activate the sum.

    Args:
        sampled: (Q, C), see `kernels.block.layout`; convolutions without their biases.
        partial: (tiles, 3, C) as the convolution leaves it, the sums for the statistics.
        parameters: As in `kernels.block.coefficients.Saved`.
        settings: Which activation, and how to normalise.
        counters: Of `counters`, zeroed by an earlier launch.
        layout: Rows and tables of the pyramid.

    Returns:
        (P, C) in the type of `sampled`, and what `backward` needs besides `sampled`.
    """
    saved = coefficients.forward(partial, parameters, settings.groups, settings.eps, counters, layout)
    out = sampled.new_empty((layout.rows, sampled.shape[1]))
    _run_forward(sampled, saved.coefficients, out, settings.rectified, layout)
    return out, saved


def backward(
    grad: Tensor, sampled: Tensor, saved: coefficients.Saved, settings: Settings, layout: Layout, to_sampled: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of `forward`.

    A tie of the two lines of dynamic ReLU gives half of the gradient to each, as in `kernels.dynamic_relu`.

    Args:
        grad: (P, C), the gradient of its output, contiguous.
        sampled, settings, layout: Its arguments.
        saved: What it returned for this.
        to_sampled: Whether the gradient of `sampled` is wanted.

    Returns:
        The gradients of `sampled`, (Q, C), and of the parameters.
    """
    grad_m, partial = backward_sums(grad, sampled, saved.coefficients, settings.rectified, layout)
    bounds = layout.run_bounds(_pixels_a_run(sampled, layout))
    grad_statistics, sums = coefficients.backward(partial, bounds, saved, settings.groups, settings.eps, layout)
    return backward_maps(grad_m, sampled, saved, grad_statistics, sums, layout, to_sampled)


def _block_c(channels: int) -> int:
    return min(256, power_of_2(channels))


def _pixels(channels: int, elements: int) -> int:
    """Pixels of a block of so many elements."""
    return max(1, elements // _block_c(channels))


def _common(sampled: Tensor, layout: Layout) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Arguments and constants that the kernels over pixels have in common, and the number of blocks of channels."""
    channels = sampled.shape[1]
    block = _block_c(channels)
    constants = {"C": channels, "BLOCK_C": block, "REAL": triton_real(sampled.dtype)}
    return {"sampled": sampled, "axes": layout.axes}, constants, cdiv(channels, block)


def _statistics_launch(sampled: Tensor, partial: Tensor, counters: Tensor, layout: Layout) -> Launch:
    arguments, constants, _ = _common(sampled, layout)
    constants |= {"BLOCK_C": min(32, constants["BLOCK_C"]), "TILE_H": layout.tile[0], "TILE_W": layout.tile[1]}
    work = layout.tiles()
    grid = (len(work), cdiv(sampled.shape[1], constants["BLOCK_C"]))
    arguments |= {"partial": partial, "problems": layout.table, "work": work}
    arguments |= {"counters": counters, "count": counters.numel()}
    return Launch(kernels.statistics_kernel, grid, arguments, constants, tables=TABLES)


def statistics(sampled: Tensor, counters: Tensor, layout: Layout) -> Tensor:
    """The sums of every tile of the sampled maps, (tiles, 3, C), that `forward` takes; its counters are zeroed."""
    partial = sampled.new_empty((len(layout.tiles()), 3, sampled.shape[1]), dtype=layout.real)
    _run_statistics(sampled, partial, counters, layout)
    return partial


def _forward_launch(sampled: Tensor, coefficients: Tensor, out: Tensor, rectified: bool, layout: Layout) -> Launch:
    arguments, constants, blocks = _common(sampled, layout)
    pixels = _pixels(sampled.shape[1], _FORWARD)
    work = layout.runs(pixels)
    arguments |= {"coefficients": coefficients, "out": out}
    arguments |= {"levels": layout.levels, "work": work, "batch": layout.batch}
    constants |= {"KINDS": coefficients.shape[2], "RECTIFIED": rectified, "PIXELS": pixels}
    return Launch(kernels.forward_kernel, (len(work), blocks), arguments, constants, tables=TABLES)


def _pixels_a_run(sampled: Tensor, layout: Layout) -> int:
    """Pixels over which one program sums: as many as give the multiprocessors about the same to do."""
    channels = sampled.shape[1]
    pixels = _pixels(channels, _SUMS)
    runs = max(1, _SUMS_PROGRAMS * multiprocessors(sampled.device) // cdiv(channels, _block_c(channels)))
    return cdiv(cdiv(layout.rows, pixels), runs) * pixels


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
    pixels_a_run = _pixels_a_run(sampled, layout)
    work = layout.runs(pixels_a_run)
    arguments |= {"grad": grad, "coefficients": coefficients, "grad_m": grad_m, "partial": partial}
    arguments |= {"levels": layout.levels, "work": work, "batch": layout.batch, "pixels_a_run": pixels_a_run}
    constants |= {"KINDS": coefficients.shape[2], "RECTIFIED": rectified, "PIXELS": _pixels(sampled.shape[1], _SUMS)}
    return Launch(kernels.backward_sums_kernel, (len(work), blocks), arguments, constants, tables=TABLES)


def backward_sums(
    grad: Tensor, sampled: Tensor, coefficients: Tensor, rectified: bool, layout: Layout
) -> tuple[Tensor, Tensor]:
    """The gradient of m, (P, C), and that of the coefficients in pieces, (runs, KINDS, C)."""
    grad_m = torch.empty_like(grad)
    runs = len(layout.runs(_pixels_a_run(sampled, layout)))
    partial = coefficients.new_empty((runs, *coefficients.shape[2:]))
    _run_sums(grad, sampled, coefficients, grad_m, partial, rectified, layout)
    return grad_m, partial


def _maps_launch(
    grad_m: Tensor,
    sampled: Tensor,
    lines: Tensor,
    statistics: tuple[Tensor, Tensor],
    added: tuple[Tensor, Tensor],
    grad_sampled: Tensor | None,
    hidden: int,
    layout: Layout,
) -> Launch:
    """`statistics` and their gradients; sums that are `added` up, and where to. No programs without `grad_sampled`."""
    arguments, constants, blocks = _common(sampled, layout)
    channels = sampled.shape[1]
    pixels = _pixels(channels, _MAPS)
    work = layout.sampled_runs(pixels)
    matrices = sum(cdiv(n, _ADDED) for n in (4 * channels, channels)) * cdiv(hidden, _ADDED)
    adders = matrices + cdiv(coefficients.sums(channels, hidden), _ADDED)
    arguments |= {"grad_m": grad_m, "coefficients": lines, "statistics": statistics[0]}
    arguments |= {"grad_statistics": statistics[1], "problems": layout.table, "work": work}
    arguments |= {"axes": kernels.Axes(layout.axes, layout.firsts), "parameters": kernels.Added(*added)}
    arguments |= {"grad_sampled": sampled if grad_sampled is None else grad_sampled}
    arguments |= {"batch": layout.batch, "slots": len(layout.slots), "span": layout.span, "adders": adders}
    constants |= {"KINDS": lines.shape[2], "R": hidden, "PIXELS": pixels, "BLOCK_A": _ADDED}
    grid = (adders + (0 if grad_sampled is None else len(work)), blocks)
    return Launch(kernels.backward_maps_kernel, grid, arguments, constants, tables=TABLES)


_run_statistics, _run_forward, _run_sums, _run_maps = (
    Launcher(make) for make in (_statistics_launch, _forward_launch, _sums_launch, _maps_launch)
)


def backward_maps(
    grad_m: Tensor,
    sampled: Tensor,
    saved: coefficients.Saved,
    grad_statistics: Tensor,
    sums: Tensor,
    layout: Layout,
    to_sampled: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of the sampled maps, (Q, C), and of the parameters; the last step of `backward`."""
    grad_sampled = torch.empty_like(sampled) if to_sampled else None
    grads = coefficients.empty_gradients(saved)
    both, added = (saved.statistics, grad_statistics), (sums, grads)
    _run_maps(grad_m, sampled, saved.coefficients, both, added, grad_sampled, saved.hidden, layout)
    return grad_sampled, coefficients.split_gradients(grads, saved)


def launches(pyramid: Tensor, sampled: Tensor, layout: Layout, kinds: int, rectified: bool) -> dict[str, Launch]:
    """All launches of forward and backward by name, those of `kernels.block.coefficients` left out; nothing is run.

    Making them makes the tables that they look up. The matrices' shapes and types count and not what they hold, so they
    may be on the `meta` device; `kinds` and `rectified` are the kernels' constants.
    """
    levels, batch, channels = len(layout.sizes), layout.batch, sampled.shape[1]
    one = sampled.new_empty((), dtype=layout.real)
    layout.run_bounds(_pixels_a_run(sampled, layout))
    statistics, lines = one.expand(3, levels, 3, batch, channels), one.expand(levels, batch, kinds, channels)
    maps = lines, (statistics, statistics), (one, one), sampled, channels // 4 if kinds == 8 else 0
    return {
        "statistics": _statistics_launch(sampled, one, counters(layout), layout),
        "tail forward": _forward_launch(sampled, lines, pyramid, rectified, layout),
        "tail backward sums": _sums_launch(pyramid, sampled, lines, pyramid, one, rectified, layout),
        "tail backward maps": _maps_launch(pyramid, sampled, *maps, layout),
    }
