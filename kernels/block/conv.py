"""The deformable convolutions of a DyHead block, of all levels and branches, and their gradients, in a few launches.

They are the products of `kernels.sampling`, whose tiles are found by the tables of `kernels.block.layout`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.block import plan_kernels
from kernels.block.layout import BRANCHES, TABLES, Layout
from kernels.block.parameters import TAPS
from kernels.block.plan_kernels import Config
from kernels.runtime.launch import Launch, Launcher, triton_real
from kernels.sampling import inverse
from kernels.sampling import launch as sampling
from kernels.sampling.inverse import Bins
from kernels.sampling.inverse_kernels import Index
from kernels.sampling.launch import Shape
from kernels.sampling.plan_kernels import Plan
from kernels.sampling.product_kernels import Sums

# Pixels of one program that makes or differentiates a plan.
_PIXELS = 128


class Points(NamedTuple):
    """Offsets and masks of a block, and how they are read.

    Attributes:
        matrix: (P, 27): 18 offsets and 9 masks of every pixel, contiguous. Without `crop`, one more row for every pixel
            of the coarser neighbours' maps, which read these rows and not those of the level.
        sigmoid: Whether the masks are still to pass a sigmoid.
        crop: Whether a coarser neighbour reads the upper left corner of the level's offsets and masks.
    """

    matrix: Tensor
    sigmoid: bool
    crop: bool

    def config(self) -> Config:
        dtype = self.matrix.dtype
        kind = sampling.TYPES[dtype], dtype.itemsize == 2, triton_real(dtype)
        return Config(self.crop, self.sigmoid, *kind)


def shape(channels: int) -> Shape:
    """Of the convolutions' weights."""
    return Shape(channels, channels, 1, channels, TAPS)


def tile(x: Tensor) -> tuple[int, int]:
    """Height and width of the convolution's tiles for maps like x, which the layout must have too."""
    tiles = sampling.tiles_of(sampling.FORWARD, x, shape(x.shape[1]))
    return tiles.height, tiles.width


def _points_launch(kernel: Any, programs: int, tensors: dict[str, Any], points: Points, layout: Layout) -> Launch:
    work = layout.runs(_PIXELS)
    arguments = tensors | {"points": points.matrix, "levels": layout.levels, "work": work}
    arguments |= {"sampled_rows": layout.sampled_rows, "coarser_points": layout.rows - layout.coarser_row}
    constants = {"K": points.config(), "PIXELS": _PIXELS}
    return Launch(kernel, (len(work), programs), arguments, constants, 4, 1, tables=TABLES)


def _plan_launch(points: Points, plan: Plan, layout: Layout) -> Launch:
    return _points_launch(plan_kernels.plan_kernel, 1, {"plan": plan}, points, layout)


def _gradients_launch(products: Tensor, points: Points, grad_points: Tensor, layout: Layout) -> Launch:
    tensors = {"products": products, "grad_points": grad_points}
    return _points_launch(plan_kernels.gradients_kernel, TAPS, tensors, points, layout)


run_plan, _run_gradients = Launcher(_plan_launch), Launcher(_gradients_launch)


def forward(pyramid: Tensor, plan: Plan, weights: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Every deformable convolution of a block, in one launch.

    Args:
        pyramid: (P, C), see `kernels.block.layout`.
        plan: Of all samples.
        weights: Of a level itself, its finer and its coarser neighbour: a `Packing.forward`.
        layout: Rows and tables of the pyramid.

    Returns:
        The sampled maps (Q, C), without the convolutions' biases; (tiles, 3, C), partial sums for the statistics of
        `kernels.block.tail`.
    """
    channels = pyramid.shape[1]
    sampled = pyramid.new_empty((layout.sampled_rows, channels))
    partial = pyramid.new_empty((len(layout.tiles()), 3, channels), dtype=layout.real)
    sums = Sums(partial, layout.axes)
    sampling.run_forward(pyramid, weights, None, plan, sampled, sums, shape(channels), layout)
    return sampled, partial


def backward(
    grad: Tensor, pyramid: Tensor, points: Points, plan: Plan, weights: Tensor, layout: Layout, to_pyramid: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of `forward` for pyramid and points.

    Args:
        grad: (Q, C), the gradient of its output, contiguous.
        pyramid, plan, layout: Its arguments.
        points: Which the plan is of.
        weights: The same in the order of backward: a `Packing.packed`.
        to_pyramid: Whether the gradient of the pyramid is wanted.

    Returns:
        That of the pyramid is a sum of atomic additions, in any order and not yet rounded to the pyramid's type, unless
        PyTorch is told to use deterministic algorithms: then it is gathered by an inverse index.
    """
    atomic = to_pyramid and not torch.are_deterministic_algorithms_enabled()
    grad_pyramid = torch.zeros_like(pyramid, dtype=layout.real) if atomic else None
    products = pyramid.new_empty((TAPS * layout.sampled_rows, 4), dtype=layout.real)
    of = shape(pyramid.shape[1])
    sampling.run_samples(grad, pyramid, weights, plan, products, grad_pyramid, of, layout)
    grad_points = torch.empty_like(points.matrix)
    _run_gradients(products, points, grad_points, layout)
    if to_pyramid and not atomic:
        grad_pyramid = _gathered(grad, pyramid, plan, weights, layout)
    return grad_pyramid, grad_points


def _bins(pyramid: Tensor, layout: Layout) -> Bins:
    tiles = sampling.tiles_of(inverse.GATHER, pyramid, shape(pyramid.shape[1]))
    counts = tuple(inverse.map_bins(*size, tiles) for size in layout.sizes)
    return Bins(layout.level_starts(counts), layout.batch * sum(counts), 0, 0)


def _gathered(grad: Tensor, pyramid: Tensor, plan: Plan, weights: Tensor, layout: Layout) -> Tensor:
    """The gradient of the pyramid, the same bits every time."""
    of, taps, bins = shape(pyramid.shape[1]), BRANCHES * TAPS, _bins(pyramid, layout)
    keys = torch.empty(TAPS * layout.sampled_rows, dtype=torch.int32, device=grad.device)
    inverse.run_bins(pyramid, plan, keys, bins, taps * bins.number, of, layout)
    found, target = inverse.index(keys, taps * bins.number), torch.empty_like(pyramid)
    inverse.run_gather(grad, weights, plan, found, target, bins, taps, of, layout)
    return target


def _parts(pyramid: Tensor, layout: Layout) -> tuple[tuple[Tensor, Tensor, int], Tensor]:
    """Memory for what is to be added up, with its splits and how many tiles each has; the `bounds` of the sums."""
    of = shape(pyramid.shape[1])
    tiles, _, _ = sampling.weight_steps(pyramid, of)
    size = tiles.height, tiles.width
    each = sampling.weight_splits(pyramid, of, len(layout.tiles(size)))
    splits, bounds = layout.splits(size, each)
    partial = pyramid.new_empty((len(splits), of.outputs, TAPS, of.channels), dtype=layout.real)
    return (partial, splits, each), bounds


def backward_weights(
    grad: Tensor, pyramid: Tensor, plan: Plan, weights: Sequence[Tensor], layout: Layout
) -> list[Tensor | None]:
    """Gradients of `forward` for the three weights (C, C, 3, 3), in the type of theirs.

    With one level there are no neighbours, and their weights get no gradient, not one of zeros.
    """
    parts, bounds = _parts(pyramid, layout)
    sampling.run_weight(grad, pyramid, plan, *parts, shape(pyramid.shape[1]), layout)
    grads = tuple(torch.empty_like(weights[0]) for _ in range(len(bounds)))
    sampling.run_sum(parts[0], grads, bounds)
    return [*grads, *[None] * (BRANCHES - len(grads))]


def launches(pyramid: Tensor, matrix: Tensor, sampled: Tensor, layout: Layout) -> dict[str, Launch]:
    """All launches of forward and backward by name, deterministic ones included; nothing is run.

    Making them makes the tables that they look up. The matrices' shapes and types count and not what they hold, so they
    may be on the `meta` device.
    """
    of, points = shape(pyramid.shape[1]), Points(matrix, True, True)
    plan, found = sampling.new_plan(pyramid, 1), Index(*(pyramid.new_empty(1, dtype=torch.int32) for _ in range(2)))
    partial = pyramid.new_empty((16, 3), dtype=layout.real)
    sums = Sums(partial, layout.axes)
    bins = _bins(pyramid, layout)
    parts, bounds = _parts(pyramid, layout)
    weight = pyramid.new_empty((of.outputs, of.channels, 3, 3)).to(memory_format=torch.channels_last)
    rest = of, layout
    return {
        "plan": _plan_launch(points, plan, layout),
        "forward": sampling.forward_launch(pyramid, sampled, None, plan, sampled, sums, *rest),
        "backward samples": sampling.samples_launch(sampled, pyramid, sampled, plan, partial, None, *rest),
        "backward samples and map": sampling.samples_launch(sampled, pyramid, sampled, plan, partial, partial, *rest),
        "backward points": _gradients_launch(partial, points, matrix, layout),
        "backward bins": inverse.bins_launch(pyramid, plan, found.order, bins, bins.number, *rest),
        "backward gather": inverse.gather_launch(sampled, sampled, plan, found, pyramid, bins, BRANCHES * TAPS, *rest),
        "backward weight": sampling.weight_launch(sampled, pyramid, plan, *parts, *rest),
        "backward weight sum": sampling.sum_launch(parts[0], (weight,), bounds),
    }
