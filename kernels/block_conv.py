"""The deformable convolutions of a DyHead block as one function of pyramid, predicted offsets and weights."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import block_conv_backward_triton, block_conv_triton
from kernels import deform_conv_launch as single
from kernels.block_layout import BRANCHES, Layout, layout
from kernels.block_tail import add_runs
from kernels.compile_spec import CompileSpec
from kernels.launch import Launch, real, triton_real
from kernels.tiles import Table, Tiles, fit, precision

OFFSETS = 18

# In 16 bits a tile of 128 pixels spills on NVIDIA: a thread's 128 sums, and the sums for the statistics on top.
_FORWARD = Table("block convolutions forward", single.FORWARD | {"16": Tiles(8, 8, 32, 256, 8, 3)})
# Chosen without a GPU, like those of the single convolution: large, and compiled for all targets without a spill.
_POINTS = Table(
    "block convolutions backward points",
    {"16": Tiles(8, 16, 64, 256, 8, 1), "32": Tiles(8, 8, 64, 256, 8, 1), "exact": Tiles(4, 8, 16, 32, 4, 1)},
)
# The addresses of the additions take registers.
_POINTS_AND_PYRAMID = Table(
    "block convolutions backward points and pyramid",
    _POINTS | {"16": Tiles(8, 8, 64, 256, 8, 1), "32": Tiles(8, 8, 32, 256, 8, 1)},
)
_WEIGHT = Table(
    "block convolutions backward weight",
    {"16": Tiles(4, 8, 128, 256, 8, 2), "32": Tiles(4, 8, 128, 256, 8, 1), "exact": Tiles(4, 8, 16, 32, 4, 1)},
)

# Programs over which the sums of the weights' gradients are spread, at most: some waves of the largest GPUs.
_WEIGHT_PROGRAMS = 1024
_PREDICTED_PIXELS = 64


def tile(dtype: torch.dtype, device: torch.device, channels: int) -> Tiles:
    """The tile of the convolution, which the layout must have too."""
    return fit(_FORWARD, dtype, device, channels, channels)


def convolve(
    pyramid: Tensor, predicted: Tensor, weights: list[Tensor], sigmoid: bool, crop: bool, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Every deformable convolution of a block, in one launch.

    Args:
        pyramid: (P, C), see `kernels.block_layout`.
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
        _forward_launch(_Maps(pyramid, predicted.contiguous(), sigmoid, crop, layout), packed, sampled, partial).run()
        ctx.mark_non_differentiable(partial)
        return sampled, partial

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        pyramid, predicted, *weights = ctx.saved_tensors
        maps, grad = _Maps(pyramid, predicted.contiguous(), *ctx.settings), grad.contiguous()
        grad_pyramid, grad_predicted = _backward_points(maps, grad, weights, ctx.needs_input_grad[0])
        grad_weights = _backward_weights(maps, grad, weights) if any(ctx.needs_input_grad[5:]) else [None] * BRANCHES
        return grad_pyramid, grad_predicted, None, None, None, *grad_weights


@dataclass(frozen=True)
class _Maps:
    """What is sampled and where; arguments of `convolve`."""

    pyramid: Tensor
    predicted: Tensor
    sigmoid: bool
    crop: bool
    layout: Layout

    @property
    def channels(self) -> int:
        return self.pyramid.shape[1]

    def fit(self, table: Table) -> Tiles:
        return fit(table, self.pyramid.dtype, self.pyramid.device, self.channels, self.channels)

    def launch(
        self, kernel, grid: tuple[int, ...], tiles: Tiles, size: tuple[int, int], arguments: dict, constants: dict
    ) -> Launch:
        """Of a kernel that works on tiles of `size`, with what all of them need."""
        layout, dtype = self.layout, self.pyramid.dtype
        arguments = arguments | {"pyramid": self.pyramid, "predicted": self.predicted}
        arguments |= {"problems": layout.table, "work": layout.tiles(size)}
        arguments |= {"coarser_rows": layout.rows - layout.coarser_row}
        constants = constants | {
            "C": self.channels,
            "CROP": self.crop,
            "SIGMOID": self.sigmoid,
            "TILE_H": size[0],
            "TILE_W": size[1],
            "BLOCK_C": tiles.c,
            "BLOCK_O": tiles.o,
            "REAL": triton_real(dtype),
            # Sums of several places within an image must fit as well.
            "INDEX": tl.int32 if max(h * w for h, w in layout.sizes) * self.channels < 2**30 else tl.int64,
            "PRECISION": precision(dtype, self.pyramid.device),
        }
        return Launch(kernel, grid, arguments, constants, tiles.warps, tiles.stages)


def _forward_launch(maps: _Maps, packed: Tensor, sampled: Tensor, partial: Tensor) -> Launch:
    tiles, size = maps.fit(_FORWARD), maps.layout.tile
    grid = (len(maps.layout.tiles(size)), triton.cdiv(maps.channels, tiles.o))
    arguments = {"weight": packed, "sampled": sampled, "partial": partial, "axes": maps.layout.axes}
    return maps.launch(block_conv_triton.forward_kernel, grid, tiles, size, arguments, {})


def _points_launch(maps: _Maps, grad: Tensor, packed: Tensor, grad_pyramid: Tensor | None, partial: Tensor) -> Launch:
    tiles = maps.fit(_POINTS if grad_pyramid is None else _POINTS_AND_PYRAMID)
    size = tiles.height, tiles.width
    arguments = {"grad": grad, "weight": packed, "partial": partial, "sampled_rows": maps.layout.sampled_rows}
    # A pointer must point somewhere, also where nothing is written.
    arguments["grad_pyramid"] = partial if grad_pyramid is None else grad_pyramid
    constants = {"TO_PYRAMID": grad_pyramid is not None}
    grid = (len(maps.layout.tiles(size)) * 9,)
    return maps.launch(block_conv_backward_triton.backward_points_kernel, grid, tiles, size, arguments, constants)


def _predicted_launch(partial: Tensor, grad_predicted: Tensor, crop: bool, layout: Layout) -> Launch:
    work = layout.runs(_PREDICTED_PIXELS)
    arguments = {"partial": partial, "grad_predicted": grad_predicted, "levels": layout.levels, "work": work}
    arguments |= {"sampled_rows": layout.sampled_rows}
    constants = {"CROP": crop, "PIXELS": _PREDICTED_PIXELS}
    return Launch(block_conv_backward_triton.backward_predicted_kernel, (len(work),), arguments, constants)


def _weight_launch(maps: _Maps, grad: Tensor) -> tuple[Launch, Tensor]:
    """The launch lacks `partial`, whose length is the last number of its grid; with it the `bounds` of its sums."""
    tiles = maps.fit(_WEIGHT)
    size = tiles.height, tiles.width
    steps, blocks = 9 * triton.cdiv(maps.channels, tiles.c), triton.cdiv(maps.channels, tiles.o)
    splits = max(1, _WEIGHT_PROGRAMS // (steps * blocks))
    # A power of two, so that few sizes of maps need another compilation.
    count = triton.next_power_of_2(triton.cdiv(len(maps.layout.tiles(size)), splits))
    splits, bounds = maps.layout.splits(size, count)
    grid = (steps, blocks, len(splits))
    arguments = {"grad": grad, "splits": splits}
    kernel = block_conv_backward_triton.backward_weight_kernel
    return maps.launch(kernel, grid, tiles, size, arguments, {"TILES": count}), bounds


def _backward_points(
    maps: _Maps, grad: Tensor, weights: list[Tensor], to_pyramid: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the pyramid, if wanted, and of the predictions."""
    pyramid, layout = maps.pyramid, maps.layout
    packed = torch.stack([w.permute(2, 3, 1, 0) for w in weights]).to(pyramid.dtype)
    partial = pyramid.new_empty((maps.predicted.shape[1], layout.sampled_rows), dtype=layout.real)
    atomic = to_pyramid and not torch.are_deterministic_algorithms_enabled()
    grad_pyramid = torch.zeros_like(pyramid, dtype=layout.real) if atomic else None
    _points_launch(maps, grad, packed, grad_pyramid, partial).run()
    grad_predicted = torch.empty_like(maps.predicted)
    _predicted_launch(partial, grad_predicted, maps.crop, layout).run()
    if not maps.crop:
        grad_predicted[layout.rows :] = partial[:, layout.coarser_row :].T
    if to_pyramid and not atomic:
        grad_pyramid = _ordered_pyramid(maps, grad, weights)
    return None if grad_pyramid is None else grad_pyramid.to(pyramid.dtype), grad_predicted


def _ordered_pyramid(maps: _Maps, grad: Tensor, weights: list[Tensor]) -> Tensor:
    """The gradient of the pyramid, the same bits every time: branch by branch through `deform_conv2d`."""
    layout, pyramid = maps.layout, maps.pyramid
    offset, mask = maps.predicted[:, :OFFSETS], maps.predicted[:, OFFSETS:]
    mask = mask.sigmoid() if maps.sigmoid else mask
    total = torch.zeros_like(pyramid, dtype=layout.real)
    for branch, weight in enumerate(weights):
        problems = [(i, p) for i, p in enumerate(layout.problems) if p.branch == branch]
        if not problems:
            continue
        grads = [layout.sampled(grad, i) for i, _ in problems]
        inputs = [layout.source(pyramid, p) for _, p in problems]
        points = ([layout.predicted(matrix, i, maps.crop) for i, _ in problems] for matrix in (offset, mask))
        stride = [problems[0][1].stride] * 2
        found = torch.ops.dyhead.deform_conv2d_backward.default(
            grads, inputs, *points, weight.to(pyramid.dtype), stride, [1, 1], [1, 1], [True] + [False] * 4, "triton"
        )
        for (_, problem), part in zip(problems, found, strict=True):
            layout.source(total, problem).add_(part)
    return total


def _backward_weights(maps: _Maps, grad: Tensor, weights: list[Tensor]) -> list[Tensor | None]:
    launch, bounds = _weight_launch(maps, grad)
    channels = maps.channels
    partial = grad.new_empty((launch.grid[-1], channels, 9, channels), dtype=maps.layout.real)
    launch.arguments["partial"] = partial
    launch.run()
    total = add_runs(partial, bounds, most=launch.grid[-1], dtype=weights[0].dtype)
    # Without neighbours, with one level, their branches' weights get no gradient, not one of zeros.
    found = [x.view(channels, 3, 3, channels).permute(0, 3, 1, 2) for x in total]
    return found + [None] * (BRANCHES - len(found))


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
        maps = _Maps(pyramid, predicted, True, True, found)
        launches = {"forward": _forward_launch(maps, sampled, sampled, partial)}
        launches["backward points and pyramid"] = _points_launch(maps, sampled, sampled, partial, partial)
        launches["backward points"] = _points_launch(maps, sampled, sampled, None, partial)
        launches["backward weight"] = _weight_launch(maps, sampled)[0]
        launches["backward weight"].arguments["partial"] = partial
        specs += [launch.spec(f"block convolutions {k}", dtype, uses_dot=True) for k, launch in launches.items()]
        last = _predicted_launch(partial, predicted, True, found)
        specs.append(last.spec("block convolutions backward predicted", dtype))
    return specs
