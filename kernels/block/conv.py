"""The deformable convolutions of a DyHead block, of all levels and branches, and their gradients, in a few launches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.block import conv_backward_kernels
from kernels.block.conv_kernels import Config, Tables, forward_kernel
from kernels.block.layout import BRANCHES, Layout
from kernels.block.parameters import TAPS
from kernels.block.sums import add_runs
from kernels.deform_conv.inverse import index, map_bins
from kernels.deform_conv.launch import FORWARD
from kernels.runtime.launch import Launch, triton_real
from kernels.runtime.tiles import Table, Tiles, fit, precision

# In 16 bits a tile of 128 pixels spills on NVIDIA: a thread's 128 sums, and the sums for the statistics on top.
_FORWARD = Table("block convolutions forward", FORWARD | {"16": Tiles(8, 8, 32, 256, 8, 3)})
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

# Programs over which the sums of the weights' gradients are spread, at most: some waves of the largest GPUs.
_WEIGHT_PROGRAMS = 1024
_PREDICTED_PIXELS = 64
# Samples that `collect` multiplies at a time.
_ENTRIES = 32
# The pixels of one program that finds the bins of samples.
_BINNED = (16, 16)


def tile(dtype: torch.dtype, device: torch.device, channels: int) -> Tiles:
    """The tile of the convolution, which the layout must have too."""
    return fit(_FORWARD, dtype, device, channels, channels)


@dataclass(frozen=True)
class Maps:
    """What the convolutions read: maps, offsets and masks as `convolve` takes them."""

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

    def launch(self, kernel: Any, grid: tuple[int, ...], size: tuple[int, int], tiles: Tiles, **others: Any) -> Launch:
        """The launch of a kernel whose programs sample tiles of `size`.

        Args:
            kernel: One of the block's convolution kernels.
            grid: Numbers of programs.
            size: Height and width of a tile in pixels.
            tiles: Blocks of channels, warps and stages.
            others: Arguments besides those that many of these kernels take, by the kernel's names for them; in capitals
                what is known at compilation.
        """
        layout, dtype = self.layout, self.pyramid.dtype
        # From a row of a coarser neighbour's map to the row of its predictions.
        tables = Tables(layout.table, layout.tiles(size), layout.rows - layout.coarser_row)
        config = Config(
            C=self.channels,
            CROP=self.crop,
            SIGMOID=self.sigmoid,
            TILE_H=size[0],
            TILE_W=size[1],
            BLOCK_C=tiles.c,
            BLOCK_O=tiles.o,
            REAL=triton_real(dtype),
            # Sums of several indices within an image must fit as well.
            INDEX=tl.int32 if max(h * w for h, w in layout.sizes) * self.channels < 2**30 else tl.int64,
            PRECISION=precision(dtype, self.pyramid.device),
        )
        common = {
            "pyramid": self.pyramid,
            "predicted": self.predicted,
            "tables": tables,
            "sampled_rows": layout.sampled_rows,
        }
        values = {name: value for name, value in common.items() if name in kernel.arg_names} | others
        arguments = {name: value for name, value in values.items() if name.islower()}
        constants = {name: value for name, value in values.items() if name.isupper()}
        return Launch(kernel, grid, arguments, {"K": config, **constants}, tiles.warps, tiles.stages)


def convolve(
    pyramid: Tensor, predicted: Tensor, weights: Sequence[Tensor], sigmoid: bool, crop: bool, layout: Layout
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Every deformable convolution of a block, in one launch.

    Args:
        pyramid: (P, C), see `kernels.block.layout`.
        predicted: (P, 27) of the same type: 18 offsets and 9 masks of every pixel. Without `crop`, one more row for
            every pixel of the coarser neighbours' maps, which read these rows and not those of the level.
        weights: (C, C, 3, 3) for a level itself, its finer and its coarser neighbour.
        sigmoid: Whether the masks are still to pass a sigmoid.
        crop: Whether a coarser neighbour reads the top left corner of the level's offsets and masks.
        layout: Rows and tables of the pyramid.

    Returns:
        The sampled maps (Q, C), without the convolutions' biases; (tiles, 3, C), partial sums for the statistics of
        `kernels.block.tail`; and what `gradients` needs.
    """
    # Packed at every call: a copy kept for the next one would miss what is written to a parameter's `.data`.
    packed = torch.stack([w.permute(0, 2, 3, 1) for w in weights]).to(pyramid.dtype)
    channels = pyramid.shape[1]
    sampled = pyramid.new_empty((layout.sampled_rows, channels))
    partial = pyramid.new_empty((len(layout.tiles()), 3, channels), dtype=layout.real)
    maps = Maps(pyramid, predicted.contiguous(), sigmoid, crop, layout)
    _forward_launch(maps, packed, sampled, partial).run()
    return sampled, partial, (pyramid, maps.predicted, *weights)


def _forward_launch(maps: Maps, packed: Tensor, sampled: Tensor, partial: Tensor) -> Launch:
    tiles, size = maps.fit(_FORWARD), maps.layout.tile
    grid = (len(maps.layout.tiles(size)), triton.cdiv(maps.channels, tiles.o))
    tensors = {"weight": packed, "sampled": sampled, "partial": partial, "axes": maps.layout.axes}
    return maps.launch(forward_kernel, grid, size, tiles, **tensors)


def gradients(
    grad: Tensor,
    saved: Sequence[Tensor],
    sigmoid: bool,
    crop: bool,
    layout: Layout,
    to_pyramid: bool,
    to_weights: bool,
) -> tuple[Tensor | None, Tensor, Sequence[Tensor | None]]:
    """Gradients of `convolve`.

    Args:
        grad: (Q, C), the gradient of its output, contiguous.
        saved: What it returned for this.
        sigmoid, crop, layout: Its arguments.
        to_pyramid: Whether the gradient of the pyramid is wanted.
        to_weights: Whether those of the weights are wanted.

    Returns:
        Gradients of pyramid, predictions and weights. That of the pyramid is a sum of atomic additions, in any order
        and not yet rounded to the pyramid's type, unless PyTorch is told to use deterministic algorithms; with one
        level there are no neighbours, and their weights get no gradient, not one of zeros.
    """
    pyramid, predicted, *weights = saved
    maps = Maps(pyramid, predicted, sigmoid, crop, layout)
    packed = torch.stack([w.permute(2, 3, 1, 0) for w in weights]).to(grad.dtype)
    atomic = to_pyramid and not torch.are_deterministic_algorithms_enabled()
    grad_pyramid = torch.zeros_like(pyramid, dtype=layout.real) if atomic else None
    grad_predicted = _points(maps, grad, packed, grad_pyramid)
    if to_pyramid and not atomic:
        grad_pyramid = _pyramid(maps, grad, packed)
    return grad_pyramid, grad_predicted, _weights(maps, grad, weights) if to_weights else [None] * BRANCHES


def _points_launch(maps: Maps, grad: Tensor, packed: Tensor, grad_pyramid: Tensor | None, partial: Tensor) -> Launch:
    tiles = maps.fit(_POINTS if grad_pyramid is None else _POINTS_AND_PYRAMID)
    size = tiles.height, tiles.width
    return maps.launch(
        conv_backward_kernels.backward_points_kernel,
        (len(maps.layout.tiles(size)) * TAPS,),
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
    arguments: dict[str, Any] = {"partial": partial, "grad_predicted": grad_predicted, "levels": layout.levels}
    arguments |= {"work": work, "sampled_rows": layout.sampled_rows}
    constants = {"CROP": crop, "PIXELS": _PREDICTED_PIXELS}
    return Launch(conv_backward_kernels.backward_predicted_kernel, (len(work),), arguments, constants)


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
        order: The samples' numbers, as in `kernels.deform_conv.inverse.Index`.
        starts: Where in `order` every bin begins, as there.
        places: (9 * Q, 3), y, x and mask of every sample.
        level_bins: (L,) int32, the first bin of every level.
        bins: The number of bins of one tap.
    """

    order: Tensor
    starts: Tensor
    places: Tensor
    level_bins: Tensor
    bins: int


def _bins_launch(maps: Maps, keys: Tensor, places: Tensor, level_bins: Tensor, bins: int) -> Launch:
    tiles, tensors = maps.fit(_PYRAMID), {"keys": keys, "places": places, "level_bins": level_bins}
    grid = (len(maps.layout.tiles(_BINNED)), TAPS)
    sizes = {"BIN_H": tiles.height, "BIN_W": tiles.width}
    return maps.launch(conv_backward_kernels.bins_kernel, grid, _BINNED, tiles, **tensors, bins=bins, **sizes)


def _level_bins(maps: Maps) -> tuple[Tensor, int]:
    """The first bin of every level, (L,) int32, and the number of bins of one tap."""
    tiles = maps.fit(_PYRAMID)
    counts = tuple(map_bins(*size, tiles) for size in maps.layout.sizes)
    return maps.layout.level_starts(counts), maps.layout.batch * sum(counts)


def _invert(maps: Maps) -> _Inverse:
    layout, device = maps.layout, maps.predicted.device
    level_bins, bins = _level_bins(maps)
    samples = TAPS * layout.sampled_rows
    keys = torch.empty(samples, dtype=torch.int32, device=device)
    places = torch.empty((samples, 3), dtype=layout.real, device=device)
    _bins_launch(maps, keys, places, level_bins, bins).run()
    return _Inverse(*index(keys, BRANCHES * TAPS * bins), places, level_bins, bins)


def _pyramid_launches(maps: Maps, grad: Tensor, packed: Tensor, inverse: _Inverse, target: Tensor) -> list[Launch]:
    """Those of the finest level, which no finer one samples and which is most of the pyramid, and of the others."""
    tiles, count = maps.fit(_PYRAMID), len(maps.layout.sizes)
    size = tiles.height, tiles.width
    tensors = {"grad": grad, "weight": packed, "grad_pyramid": target, "levels": maps.layout.levels}
    launches = []
    for levels, branches in ((range(1), min(count, BRANCHES - 1)), (range(1, count), BRANCHES))[: min(count, 2)]:
        work = maps.layout.level_tiles(size, levels)
        grid = (len(work), triton.cdiv(maps.channels, tiles.c))
        constants = {"TAPS": branches * TAPS, "ENTRIES": _ENTRIES}
        others = tensors | constants | inverse._asdict()
        launches.append(
            maps.launch(conv_backward_kernels.backward_pyramid_kernel, grid, size, tiles, work=work, **others)
        )
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
    steps, blocks = TAPS * triton.cdiv(maps.channels, tiles.c), triton.cdiv(maps.channels, tiles.o)
    splits = max(1, _WEIGHT_PROGRAMS // (steps * blocks))
    # A power of two, so that few sizes of maps need another compilation.
    count = triton.next_power_of_2(triton.cdiv(len(maps.layout.tiles(size)), splits))
    splits, bounds = maps.layout.splits(size, count)
    grid = (steps, blocks, len(splits))
    launch = maps.launch(
        conv_backward_kernels.backward_weight_kernel, grid, size, tiles, grad=grad, splits=splits, TILES=count
    )
    return launch, bounds


def _weights(maps: Maps, grad: Tensor, weights: Sequence[Tensor]) -> list[Tensor | None]:
    launch, bounds = _weight_launch(maps, grad)
    channels = maps.channels
    partial = grad.new_empty((launch.grid[-1], channels, TAPS, channels), dtype=maps.layout.real)
    launch.arguments["partial"] = partial
    launch.run()
    total = add_runs(partial, bounds, dtype=weights[0].dtype)
    grads = [x.view(channels, 3, 3, channels).permute(0, 3, 1, 2) for x in total]
    return [*grads, *[None] * (BRANCHES - len(grads))]


def launches(pyramid: Tensor, predicted: Tensor, sampled: Tensor, layout: Layout) -> dict[str, Launch]:
    """All launches of forward and backward by name, deterministic ones included; nothing is run.

    Making them makes the tables that they look up. The matrices' shapes and types count and not what they hold, so they
    may be on the `meta` device.
    """
    maps = Maps(pyramid, predicted, True, True, layout)
    partial = torch.empty((16, 3), dtype=layout.real, device=sampled.device)
    keys, order = (torch.empty(16, dtype=kind, device=sampled.device) for kind in (torch.int32, torch.int64))
    weight, _ = _weight_launch(maps, sampled)
    weight.arguments["partial"] = partial
    level_bins, bins = _level_bins(maps)
    inverse = _Inverse(order, keys, partial, level_bins, bins)
    levels = _pyramid_launches(maps, sampled, sampled, inverse, pyramid)
    return {
        "forward": _forward_launch(maps, sampled, sampled, partial),
        "backward points": _points_launch(maps, sampled, sampled, None, partial),
        "backward points and pyramid": _points_launch(maps, sampled, sampled, partial, partial),
        "backward predicted": _predicted_launch(partial, predicted, maps.crop, layout),
        "backward bins": _bins_launch(maps, keys, partial, level_bins, bins),
        **dict(zip(("backward finest level", "backward other levels"), levels, strict=False)),
        "backward weight": weight,
    }
