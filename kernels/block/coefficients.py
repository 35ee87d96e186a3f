"""The coefficients of a DyHead block's tail, from the means and variances of its sampled maps.

GroupNorm, scale attention, the mean over a level's maps and the coefficients of dynamic ReLU are a small computation on
(N, C) tensors: about thirty launches as PyTorch writes it, and as many backward. Here it is one launch forward and two
backward, the second of which adds up the gradients of the parameters, in the order of levels and images. The formulas
stand in `kernels.block.coefficients_kernels`.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.backend import INTERPRET
from kernels.block import coefficients_kernels as kernels
from kernels.block.layout import BRANCHES
from kernels.runtime.launch import Launch, steps, triton_real

# Lines of one program forward, elements of a block of a matrix, slots and columns of the sums over slots.
_LINES, _ELEMENTS, _SLOTS, _COLUMNS = (1024, 8192, 16, 256) if INTERPRET else (256, 2048, 16, 64)
_WARPS = 8
# The parameters by the kernels' names for them.
_NAMES = (
    *(f"{name}{branch}" for name in ("scale", "shift", "bias") for branch in range(BRANCHES)),
    *("gate", "gate_bias", "reduce", "reduce_bias", "expand", "expand_bias"),
)


class Saved(NamedTuple):
    """What backward needs; arithmetic is in the type of the statistics.

    Attributes:
        coefficients: (L, N, 8, C): A0, A1, A2, D, a1, b1, a2, b2; without a network (L, N, 4, C).
        pooled: (L, N, C), what the network of dynamic ReLU sees.
        statistics: (3, L, 3, N, C): means, variances, means after upsampling.
        share: (L, 3, 1, 1): one divided by the level's number of maps, 0 for a map it has not.
        parameters: GroupNorm's three scales and three shifts and the convolutions' three biases, (C,) each, for a level
            itself, its finer and its coarser neighbour; weight (1, C) and bias (1,) of the gate of scale attention;
            weight and bias of both layers of dynamic ReLU, (R, C), (R,), (4C, R), (4C,). They are of any floating type.
            The biases may be None, all three; so may the gate, for the plain mean, and the layers.
    """

    coefficients: Tensor
    pooled: Tensor
    statistics: Tensor
    share: Tensor
    parameters: tuple[Tensor | None, ...]


def forward(statistics: Tensor, share: Tensor, parameters: Sequence[Tensor | None], groups: int, eps: float) -> Saved:
    """The coefficients that the tail takes, with what backward needs.

    Args:
        statistics: (3, L, 3, N, C), float32 or float64.
        share: As in `Saved`, like `parameters`.
        parameters: The block's parameters, of any floating type.
        groups: Groups of the GroupNorms, a power of two.
        eps: What the GroupNorms add to the variances.
    """
    _, levels, _, batch, channels = statistics.shape
    coefficients = statistics.new_empty((levels, batch, 4 if parameters[-1] is None else 8, channels))
    pooled = statistics.new_empty((levels, batch, channels))
    saved = Saved(coefficients, pooled, statistics, share, tuple(parameters))
    forward_launch(saved, groups, eps).run()
    return saved


def backward(grad: Tensor, saved: Saved, groups: int, eps: float) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of statistics and parameters.

    Where a coefficient is, rounded, at an end of its range, the network gets no gradient for it. With one level the
    neighbours' parameters get none.

    Args:
        grad: Gradient of the coefficients, contiguous.
        saved: What `forward` returned.
        groups: Groups of the GroupNorms, a power of two.
        eps: What the GroupNorms add to the variances.
    """
    statistics, parameters = saved.statistics, saved.parameters
    _, levels, _, batch, channels = statistics.shape
    hidden = _hidden(parameters)
    columns = sums(channels, hidden)
    partial = statistics.new_empty((levels * batch, columns + (channels + hidden if hidden else 0)))
    grad_statistics = torch.empty_like(statistics)
    backward_launch((grad, grad_statistics), saved, partial, groups, eps).run()
    dtype = reduce(torch.promote_types, {x.dtype for x in parameters if x is not None})
    grads = statistics.new_empty(5 * channels * hidden + columns, dtype=dtype)
    parameters_launch(partial, grads, channels, hidden).run()

    # As the kernel has them: the two matrices, then the sums; here in the order of the parameters.
    sizes = [channels] * (3 * BRANCHES + 1) + ([4 * channels, hidden] if hidden else [0, 0]) + [1]
    expand, reduced, *vectors = grads.split([4 * channels * hidden, hidden * channels, *sizes])
    *norms_and_gate, expand_bias, reduce_bias, gate_bias = vectors
    found: list[Tensor | None] = [*norms_and_gate, gate_bias, reduced, reduce_bias, expand, expand_bias]
    if levels == 1:
        found = [None if _NAMES[i][-1] in "12" else x for i, x in enumerate(found)]
    return grad_statistics, [
        None if x is None or parameter is None else x.view(parameter.shape).to(parameter.dtype)
        for x, parameter in zip(found, parameters, strict=True)
    ]


def _hidden(parameters: Sequence[Tensor | None]) -> int:
    """R, or 0 without a network."""
    bias = parameters[-3]
    return 0 if bias is None else bias.shape[0]


def _common(saved: Saved) -> dict[str, Any]:
    """The arguments that forward and backward share."""
    statistics = saved.statistics
    _, levels, _, batch, channels = statistics.shape
    # Pointers must point somewhere, also where nothing is read.
    scales_shifts_biases, others = (
        [statistics if x is None else x.contiguous() for x in part]
        for part in (saved.parameters[: 3 * BRANCHES], saved.parameters[3 * BRANCHES :])
    )
    norms = {
        name: kernels.Norm(*scales_shifts_biases[branch::BRANCHES])
        for branch, name in enumerate(("same", "finer", "coarser"))
    }
    gate, network = kernels.Gate(*others[:2]), kernels.Network(*others[2:5])
    named = {"statistics": statistics, "share": saved.share, "gate": gate, "network": network, **norms}
    numbers = {"batch": batch, "stride": levels * BRANCHES * batch * channels}
    return {**named, **numbers, "coefficients": saved.coefficients, "pooled": saved.pooled}


def _config(saved: Saved, groups: int, eps: float, lines: int) -> kernels.Config:
    """What is known at compilation, for programs of so many lines."""
    channels, hidden = saved.statistics.shape[-1], _hidden(saved.parameters)
    span = triton.next_power_of_2(channels // groups)
    return kernels.Config(
        HAS_BIAS=saved.parameters[2 * BRANCHES] is not None,
        HAS_GATE=saved.parameters[3 * BRANCHES] is not None,
        KINDS=8 if hidden else 4,
        EPS=eps,
        C=channels,
        R=hidden,
        GROUPS=groups,
        SPAN=span,
        BLOCK_R=min(max(1, _ELEMENTS // (groups * span)), triton.next_power_of_2(max(1, hidden))),
        BLOCK_O=min(lines, triton.next_power_of_2(4 * channels)),
        REAL=triton_real(saved.statistics.dtype),
    )


def forward_launch(saved: Saved, groups: int, eps: float) -> Launch:
    levels, batch, kinds, channels = saved.coefficients.shape
    config = _config(saved, groups, eps, _LINES)
    expand_bias = saved.parameters[-1]
    arguments = _common(saved) | {"bias": saved.statistics if expand_bias is None else expand_bias.contiguous()}
    grid = (levels * batch, triton.cdiv(4 * channels, config.BLOCK_O) if kinds == 8 else 1)
    return Launch(kernels.forward_kernel, grid, arguments, {"K": config}, _WARPS)


def sums(channels: int, hidden: int) -> int:
    """Columns of a row of partial sums that are only to be added up."""
    return kernels.LINES.value * channels + (4 * channels + hidden if hidden else 0) + 1


def backward_launch(gradients: tuple[Tensor, Tensor], saved: Saved, partial: Tensor, groups: int, eps: float) -> Launch:
    """`gradients` are those of the coefficients, which are there, and of the statistics, which are to be written."""
    config = _config(saved, groups, eps, 4 * triton.next_power_of_2(saved.statistics.shape[-1]))
    arguments = _common(saved) | {"grad": gradients[0], "grad_statistics": gradients[1], "partial": partial}
    # Without the network there is little to share, and eight warps leave some bytes on the stack.
    warps = _WARPS if config.KINDS == 8 else max(1, groups * config.SPAN // 256)
    constants = {"K": config, "COLUMNS": partial.shape[1]}
    return Launch(kernels.backward_kernel, (partial.shape[0],), arguments, constants, warps)


def parameters_launch(partial: Tensor, grads: Tensor, channels: int, hidden: int) -> Launch:
    slots, columns = partial.shape
    blocks = [triton.cdiv(n, _COLUMNS) for n in (4 * channels, channels, hidden)]
    constants = {
        "C": channels,
        "R": hidden,
        "SUMS": sums(channels, hidden),
        "COLUMNS": columns,
        "MATRICES": 5 * channels * hidden,
        "STEPS": steps(slots, _SLOTS),
        "BLOCK_T": _SLOTS,
        "BLOCK": _COLUMNS,
        "REAL": triton_real(partial.dtype),
    }
    grid = ((blocks[0] + blocks[1]) * blocks[2] + triton.cdiv(sums(channels, hidden), _COLUMNS),)
    return Launch(kernels.parameters_kernel, grid, {"partial": partial, "grads": grads, "slots": slots}, constants)
