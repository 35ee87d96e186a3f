"""The gradients of a block's deformable convolutions, of all levels and branches together, in a few launches."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels.block import conv_backward_kernels as kernels
from kernels.block.layout import BRANCHES, Layout
from kernels.block.maps import Maps
from kernels.block.tail import add_runs
from kernels.deform_conv.inverse import index, map_bins
from kernels.runtime.launch import Launch
from kernels.runtime.tiles import Table, Tiles

# Chosen without a GPU: large, and compiled by Triton 3.6 and 3.7 for all targets without a spill.
_POINTS = Table(
    "block convolutions backward points",
    {"16": Tiles(8, 16, 64, 256, 8, 1), "32": Tiles(8, 8, 64, 256, 8, 1), "exact": Tiles(4, 8, 16, 32, 4, 1)},
)
# The addresses of the additions take registers.
_POINTS_AND_PYRAMID = Table(
    "block convolutions backward points and pyramid",
    _POINTS | {"16": Tiles(8, 8, 64, 256, 8, 1), "32": Tiles(8, 8, 32, 256, 8, 1)},
)
_PYRAMID = Table(
    "block convolutions backward pyramid",
    {"16": Tiles(8, 16, 256, 64, 8, 2), "32": Tiles(8, 8, 256, 64, 8, 2), "exact": Tiles(4, 8, 32, 16, 4, 2)},
)
_WEIGHT = Table(
    "block convolutions backward weight",
    {"16": Tiles(4, 8, 128, 256, 8, 2), "32": Tiles(4, 8, 128, 256, 8, 1), "exact": Tiles(4, 8, 16, 32, 4, 1)},
)

_TAPS = 9
# Programs over which the sums of the weights' gradients are spread, at most: some waves of the largest GPUs.
_WEIGHT_PROGRAMS = 1024
_PREDICTED_PIXELS = 64
# How many samples `collect` multiplies at a time.
_ENTRIES = 32
# The pixels of one program that finds the bins of samples.
_BINNED = (16, 16)


def gradients(
    maps: Maps, grad: Tensor, weights: list[Tensor], to_pyramid: bool, to_weights: bool
) -> tuple[Tensor | None, Tensor, list[Tensor | None]]:
    """Gradients of `convolve`.

    Args:
        maps: its arguments; predictions are contiguous.
        grad: (Q, C), the gradient of its output, contiguous.
        weights: (C, C, 3, 3) for a level itself, its finer and its coarser neighbour.
        to_pyramid, to_weights: whether these are wanted.

    Returns:
        Gradients of pyramid, predictions and weights. That of the pyramid is a sum of atomic additions, in any order,
        unless PyTorch is told to use deterministic algorithms; with one level there are no neighbours, and their
        weights get no gradient, not one of zeros.
    """
    packed = torch.stack([w.permute(2, 3, 1, 0) for w in weights]).to(grad.dtype)
    atomic = to_pyramid and not torch.are_deterministic_algorithms_enabled()
    grad_pyramid = torch.zeros_like(maps.pyramid, dtype=maps.layout.real) if atomic else None
    grad_predicted = _points(maps, grad, packed, grad_pyramid)
    if to_pyramid and not atomic:
        grad_pyramid = _pyramid(maps, grad, packed)
    if to_pyramid:
        grad_pyramid = grad_pyramid.to(maps.pyramid.dtype)
    return grad_pyramid, grad_predicted, _weights(maps, grad, weights) if to_weights else [None] * BRANCHES


def _points_launch(maps: Maps, grad: Tensor, packed: Tensor, grad_pyramid: Tensor | None, partial: Tensor) -> Launch:
    tiles = maps.fit(_POINTS if grad_pyramid is None else _POINTS_AND_PYRAMID)
    size = tiles.height, tiles.width
    return maps.launch(
        kernels.backward_points_kernel,
        (len(maps.layout.tiles(size)) * _TAPS,),
        size,
        tiles,
        grad=grad,
        weight=packed,
        partial=partial,
        # A pointer must point somewhere, also where nothing is written.
        grad_pyramid=partial if grad_pyramid is None else grad_pyramid,
        TO_PYRAMID=grad_pyramid is not None,
    )


def _predicted_launch(partial: Tensor, grad_predicted: Tensor, crop: bool, layout: Layout) -> Launch:
    work = layout.runs(_PREDICTED_PIXELS)
    arguments = {"partial": partial, "grad_predicted": grad_predicted, "levels": layout.levels, "work": work}
    arguments |= {"sampled_rows": layout.sampled_rows}
    constants = {"CROP": crop, "PIXELS": _PREDICTED_PIXELS}
    return Launch(kernels.backward_predicted_kernel, (len(work),), arguments, constants)


def _points(maps: Maps, grad: Tensor, packed: Tensor, grad_pyramid: Tensor | None) -> Tensor:
    """The gradient of the predictions; that of the pyramid is added to `grad_pyramid` if there is one."""
    layout = maps.layout
    partial = grad.new_empty((maps.predicted.shape[1], layout.sampled_rows), dtype=layout.real)
    _points_launch(maps, grad, packed, grad_pyramid, partial).run()
    grad_predicted = torch.empty_like(maps.predicted)
    _predicted_launch(partial, grad_predicted, maps.crop, layout).run()
    if not maps.crop:
        grad_predicted[layout.rows :] = partial[:, layout.coarser_row :].T
    return grad_predicted


class _Inverse(NamedTuple):
    """The samples of a block by the bins they lie in; names are those of the kernels' arguments.

    Attributes:
        order, starts: as in `kernels.deform_conv_inverse.Index`.
        places: (9 * Q, 3), y, x and mask of every sample.
        level_bins: (L,) int32, the first bin of every level.
        bins: how many there are for one tap.
    """

    order: Tensor
    starts: Tensor
    places: Tensor
    level_bins: Tensor
    bins: int


def _bins_launch(maps: Maps, keys: Tensor, places: Tensor, level_bins: Tensor, bins: int) -> Launch:
    tiles, tensors = maps.fit(_PYRAMID), {"keys": keys, "places": places, "level_bins": level_bins}
    grid = (len(maps.layout.tiles(_BINNED)), _TAPS)
    sizes = {"BIN_H": tiles.height, "BIN_W": tiles.width}
    return maps.launch(kernels.bins_kernel, grid, _BINNED, tiles, **tensors, bins=bins, **sizes)


def _invert(maps: Maps) -> _Inverse:
    layout, tiles, device = maps.layout, maps.fit(_PYRAMID), maps.predicted.device
    counts = tuple(map_bins(*size, tiles) for size in layout.sizes)
    level_bins, bins = layout.level_starts(counts), layout.batch * sum(counts)
    samples = _TAPS * layout.sampled_rows
    keys = torch.empty(samples, dtype=torch.int32, device=device)
    places = torch.empty((samples, 3), dtype=layout.real, device=device)
    _bins_launch(maps, keys, places, level_bins, bins).run()
    return _Inverse(*index(keys, BRANCHES * _TAPS * bins), places, level_bins, bins)


def _pyramid_launches(maps: Maps, grad: Tensor, packed: Tensor, inverse: _Inverse, target: Tensor) -> list[Launch]:
    """Of the finest level, which no finer one samples and which is most of the pyramid, and of the others."""
    tiles, count = maps.fit(_PYRAMID), len(maps.layout.sizes)
    size = tiles.height, tiles.width
    tensors = {"grad": grad, "weight": packed, "grad_pyramid": target, "levels": maps.layout.levels}
    launches = []
    for levels, branches in ((range(1), min(count, BRANCHES - 1)), (range(1, count), BRANCHES))[: min(count, 2)]:
        work = maps.layout.level_tiles(size, levels)
        grid = (len(work), triton.cdiv(maps.channels, tiles.c))
        constants = {"TAPS": branches * _TAPS, "ENTRIES": _ENTRIES}
        others = tensors | constants | inverse._asdict()
        launches.append(maps.launch(kernels.backward_pyramid_kernel, grid, size, tiles, work=work, **others))
    return launches


def _pyramid(maps: Maps, grad: Tensor, packed: Tensor) -> Tensor:
    """The gradient of the pyramid, the same bits every time."""
    target = torch.empty_like(maps.pyramid)
    for launch in _pyramid_launches(maps, grad, packed, _invert(maps), target):
        launch.run()
    return target


def _weight_launch(maps: Maps, grad: Tensor) -> tuple[Launch, Tensor]:
    """The launch lacks `partial`, whose length is the last number of its grid; with it the `bounds` of its sums."""
    tiles = maps.fit(_WEIGHT)
    size = tiles.height, tiles.width
    steps, blocks = _TAPS * triton.cdiv(maps.channels, tiles.c), triton.cdiv(maps.channels, tiles.o)
    splits = max(1, _WEIGHT_PROGRAMS // (steps * blocks))
    # A power of two, so that few sizes of maps need another compilation.
    count = triton.next_power_of_2(triton.cdiv(len(maps.layout.tiles(size)), splits))
    splits, bounds = maps.layout.splits(size, count)
    grid = (steps, blocks, len(splits))
    launch = maps.launch(kernels.backward_weight_kernel, grid, size, tiles, grad=grad, splits=splits, TILES=count)
    return launch, bounds


def _weights(maps: Maps, grad: Tensor, weights: list[Tensor]) -> list[Tensor | None]:
    launch, bounds = _weight_launch(maps, grad)
    channels = maps.channels
    partial = grad.new_empty((launch.grid[-1], channels, _TAPS, channels), dtype=maps.layout.real)
    launch.arguments["partial"] = partial
    launch.run()
    total = add_runs(partial, bounds, most=launch.grid[-1], dtype=weights[0].dtype)
    found = [x.view(channels, 3, 3, channels).permute(0, 3, 1, 2) for x in total]
    return found + [None] * (BRANCHES - len(found))


def compile_launches(maps: Maps, sampled: Tensor) -> dict[str, Launch]:
    """The kernels by name, as they run on such maps, which may be on the `meta` device; `sampled` is (Q, C)."""
    layout = maps.layout
    partial = torch.empty(16, 3, dtype=layout.real, device=sampled.device)
    keys, order = (torch.empty(16, dtype=kind, device=sampled.device) for kind in (torch.int32, torch.int64))
    weight, _ = _weight_launch(maps, sampled)
    weight.arguments["partial"] = partial
    inverse = _Inverse(order, keys, partial, keys, 2**16)
    finest, others = _pyramid_launches(maps, sampled, sampled, inverse, maps.pyramid)
    return {
        "points": _points_launch(maps, sampled, sampled, None, partial),
        "points and pyramid": _points_launch(maps, sampled, sampled, partial, partial),
        "predicted": _predicted_launch(partial, maps.predicted, maps.crop, layout),
        "bins": _bins_launch(maps, keys, partial, keys, 2**16),
        "finest level": finest,
        "other levels": others,
        "weight": weight,
    }
