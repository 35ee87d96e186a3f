"""The coefficients of a DyHead block's tail, from the sums that the convolutions leave of their outputs.

GroupNorm, scale attention, the mean over a level's maps and the coefficients of dynamic ReLU are a small computation on
(N, C) tensors: about thirty launches as PyTorch writes it, and as many backward. Here it is one launch forward, which
merges the sums of the tiles first, and one backward. What that leaves for the parameters is added up, in the order of
levels and images, beside another launch of `kernels.block.tail`. The formulas stand in
`kernels.block.coefficients_kernels`.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.backend import INTERPRET
from kernels.block import coefficients_kernels as kernels
from kernels.block.layout import BRANCHES, TABLES, Layout
from kernels.runtime.launch import Launch, Launcher, triton_real
from kernels.runtime.tiles import cdiv, power_of_2

# Elements of a block of a matrix; tiles and channels of the sums that are merged at a time.
_ELEMENTS, _MERGED = (8192 if INTERPRET else 2048), (64, 32)
_WARPS = 8


class Saved(NamedTuple):
    """What backward needs; arithmetic is in the type of the statistics.

    Attributes:
        coefficients: (L, N, 8, C): A0, A1, A2, D, a1, b1, a2, b2; without a network (L, N, 4, C).
        pooled: (L, N, C), what the network of dynamic ReLU sees.
        statistics: (3, L, 3, N, C): mean, biased variance and mean after upsampling of every level, branch and image;
            zeros for maps that do not exist.
        parameters: GroupNorm's three scales and three shifts and the convolutions' three biases, (C,) each, for a level
            itself, its finer and its coarser neighbour; weight (1, C) and bias (1,) of the gate of scale attention;
            weight and bias of both layers of dynamic ReLU, (R, C), (R,), (4C, R), (4C,). They are of any floating type.
            The biases may be None, all three; so may the gate, for the plain mean, and the layers.
    """

    coefficients: Tensor
    pooled: Tensor
    statistics: Tensor
    parameters: tuple[Tensor | None, ...]

    @property
    def hidden(self) -> int:
        """R, or 0 without a network."""
        bias = self.parameters[-3]
        return 0 if bias is None else bias.shape[0]


def forward(
    partial: Tensor, parameters: Sequence[Tensor | None], groups: int, eps: float, counters: Tensor, layout: Layout
) -> Saved:
    """The coefficients that the tail takes, with what backward needs.

    Args:
        partial: (tiles, 3, C), the sums of every tile as the convolution leaves them, float32 or float64.
        parameters: As in `Saved`.
        groups: Groups of the GroupNorms, a power of two.
        eps: What the GroupNorms add to the variances.
        counters: (L * N,) int32, zeroed by an earlier launch.
        layout: Rows and tables of the pyramid.
    """
    levels, batch, channels = len(layout.sizes), layout.batch, partial.shape[2]
    coefficients = partial.new_empty((levels, batch, 4 if parameters[-1] is None else 8, channels))
    pooled = partial.new_empty((levels, batch, channels))
    statistics = partial.new_empty((3, levels, BRANCHES, batch, channels))
    saved = Saved(coefficients, pooled, statistics, tuple(parameters))
    _run_forward(partial, saved, groups, eps, counters, layout)
    return saved


def backward(
    partial: Tensor, bounds: Tensor, saved: Saved, groups: int, eps: float, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Gradients of the statistics, and the sums that those of the parameters are made of.

    Where a coefficient is, rounded, at an end of its range, the network gets no gradient for it.

    Args:
        partial: (runs, KINDS, C): the gradient of the coefficients in pieces.
        bounds: (L * N, 2) int32: the first piece of every level and image, and how many there are.
        saved: What `forward` returned.
        groups: Groups of the GroupNorms, a power of two.
        eps: What the GroupNorms add to the variances.
        layout: Rows and tables of the pyramid.
    """
    grad_statistics = torch.empty_like(saved.statistics)
    rows, columns = len(layout.sizes) * layout.batch, sums(saved.statistics.shape[-1], saved.hidden)
    factors = saved.statistics.shape[-1] + saved.hidden if saved.hidden else 0
    found = partial.new_empty((rows, columns + factors))
    _run_backward(partial, bounds, saved, grad_statistics, found, groups, eps, layout)
    return grad_statistics, found


def sums(channels: int, hidden: int) -> int:
    """Columns of a row of sums that are only to be added up; `hidden` as in `Saved`."""
    return kernels.LINES.value * channels + (4 * channels + hidden if hidden else 0) + 1


def empty_gradients(saved: Saved) -> Tensor:
    """Memory for the gradients of the parameters as `kernels.add_parameters` writes them."""
    dtype = reduce(torch.promote_types, {x.dtype for x in saved.parameters if x is not None})
    channels, hidden = saved.statistics.shape[-1], saved.hidden
    return saved.statistics.new_empty(5 * channels * hidden + sums(channels, hidden), dtype=dtype)


def split_gradients(grads: Tensor, saved: Saved) -> list[Tensor | None]:
    """The gradients of the parameters out of that memory; with one level the neighbours' parameters get none."""
    channels, hidden = saved.statistics.shape[-1], saved.hidden
    # As the kernel has them: the two matrices, then the sums; here in the order of the parameters.
    sizes = [channels] * (3 * BRANCHES + 1) + ([4 * channels, hidden] if hidden else [0, 0]) + [1]
    expand, reduced, *vectors = grads.split([4 * channels * hidden, hidden * channels, *sizes])
    *norms_and_gate, expand_bias, reduce_bias, gate_bias = vectors
    found: list[Tensor | None] = [*norms_and_gate, gate_bias, reduced, reduce_bias, expand, expand_bias]
    if saved.statistics.shape[1] == 1:
        found = [None if kernels.Parameters._fields[i][-1] in "12" else x for i, x in enumerate(found)]
    return [
        None if x is None or parameter is None else x.view(parameter.shape).to(parameter.dtype)
        for x, parameter in zip(found, saved.parameters, strict=True)
    ]


def _common(saved: Saved, layout: Layout) -> dict[str, Any]:
    """The arguments that forward and backward share."""
    # Pointers must point somewhere, also where nothing is read.
    tensors = [saved.statistics if x is None else x.contiguous() for x in saved.parameters]
    return {
        "statistics": saved.statistics,
        "coefficients": saved.coefficients,
        "pooled": saved.pooled,
        "share": layout.share,
        "parameters": kernels.Parameters(*tensors),
        "batch": layout.batch,
    }


def _config(saved: Saved, groups: int, eps: float, layout: Layout) -> kernels.Config:
    """What is known at compilation."""
    channels, hidden = saved.statistics.shape[-1], saved.hidden
    span = power_of_2(channels // groups)
    return kernels.Config(
        HAS_BIAS=saved.parameters[2 * BRANCHES] is not None,
        HAS_GATE=saved.parameters[3 * BRANCHES] is not None,
        KINDS=8 if hidden else 4,
        EPS=eps,
        C=channels,
        R=hidden,
        GROUPS=groups,
        SPAN=span,
        BLOCK_R=min(max(1, _ELEMENTS // (groups * span)), power_of_2(max(1, hidden))),
        BLOCK_O=power_of_2(4 * channels),
        TILE_H=layout.tile[0],
        TILE_W=layout.tile[1],
        BLOCK_T=_MERGED[0],
        BLOCK_C=min(_MERGED[1], power_of_2(channels)),
        REAL=triton_real(saved.statistics.dtype),
    )


def forward_launch(partial: Tensor, saved: Saved, groups: int, eps: float, counters: Tensor, layout: Layout) -> Launch:
    config = _config(saved, groups, eps, layout)
    arguments = _common(saved, layout) | {"partial": partial, "counters": counters}
    arguments |= {"problems": layout.table, "slots": layout.slots}
    grid = (len(layout.slots), cdiv(config.C, config.BLOCK_C))
    return Launch(kernels.forward_kernel, grid, arguments, {"K": config}, _WARPS, tables=TABLES)


def backward_launch(
    partial: Tensor,
    bounds: Tensor,
    saved: Saved,
    grad_statistics: Tensor,
    found: Tensor,
    groups: int,
    eps: float,
    layout: Layout,
) -> Launch:
    config = _config(saved, groups, eps, layout)
    arguments = _common(saved, layout) | {"partial": partial, "bounds": bounds, "sums": found}
    arguments |= {"grad_statistics": grad_statistics, "stride": saved.statistics[0].numel()}
    # Without the network there is little to share, and eight warps leave some bytes on the stack.
    warps = _WARPS if config.KINDS == 8 else max(1, groups * config.SPAN // 256)
    grid = (len(layout.sizes) * layout.batch,)
    return Launch(kernels.backward_kernel, grid, arguments, {"K": config}, warps, tables=TABLES)


_run_forward, _run_backward = Launcher(forward_launch), Launcher(backward_launch)
