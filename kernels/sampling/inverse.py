"""Launching the gather of a map's gradient, which takes no atomics: bins, their index, the product over it."""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernels.runtime.launch import Launch, Launcher
from kernels.runtime.tiles import Table, Tiles, cdiv, family
from kernels.sampling import inverse_kernels
from kernels.sampling.inverse_kernels import Index
from kernels.sampling.launch import Maps, Shape, config, tiles_of
from kernels.sampling.plan_kernels import Plan

# Channels and outputs are worked on twice these at a time.
GATHER = Table(
    "convolution gather",
    {
        "16": Tiles(8, 16, 128, 64, 8, 1),
        "16 mma": Tiles(8, 8, 128, 32, 8, 1),
        "32": Tiles(8, 8, 128, 32, 8, 1),
        "exact": Tiles(4, 8, 32, 16, 4, 1),
    },
)
# The pixels of one program that finds the bins of samples.
_BINNED = (16, 16)


class Bins(NamedTuple):
    """The bins of some maps.

    Attributes:
        firsts: Of several maps (maps,) int32, the first of each among those of one tap.
        number: How many there are for one tap.
        first: The first of all.
        first_sample: The number of the maps' first sample.
    """

    firsts: Tensor | None
    number: int
    first: int
    first_sample: int


def bins_launch(x: Tensor, plan: Plan, keys: Tensor, bins: Bins, no_bin: int, shape: Shape, maps: Maps) -> Launch:
    """Write the bin of every sample; tensors as in `inverse_kernels.bins_kernel`."""
    tiles = tiles_of(GATHER, x, shape)
    tiling = maps.outputs(_BINNED)
    known = config(x, shape, maps, tiling, Tiles(*_BINNED, 16, 16, 4, 1))
    tensors = {"plan": plan, "keys": keys, "tables": tiling.tables, "first_bins": bins.firsts}
    numbers = {**tiling.sizes._asdict(), "rows": maps.sampled_rows, **_numbers(bins), "no_bin": no_bin}
    constants = {"K": known, "BIN_H": tiles.height, "BIN_W": tiles.width}
    grid = (tiling.number, shape.points)
    return Launch(inverse_kernels.bins_kernel, grid, tensors | numbers, constants, 4, 1, tables=("tables",))


def _numbers(bins: Bins) -> dict[str, int]:
    return {"first_sample": bins.first_sample, "first_bin": bins.first, "bins": bins.number}


def gather_launch(
    grad: Tensor, weight: Tensor, plan: Plan, index: Index, out: Tensor, bins: Bins, taps: int, shape: Shape, maps: Maps
) -> Launch:
    """Write the gradient of the maps without atomics; tensors as in `inverse_kernels.gather_kernel`."""
    tiles = tiles_of(GATHER, grad, shape)
    tiling = maps.inputs((tiles.height, tiles.width))
    wide = tiles.c * (2 if shape.span > tiles.c else 1)
    grid = (tiling.number, shape.channels * shape.groups // shape.span * cdiv(shape.span, wide))
    tensors = {"grad": grad, "weight": weight, "plan": plan, "index": index, "out": out, "tables": tiling.tables}
    numbers = {"H": tiling.sizes.H, "W": tiling.sizes.W, "rows": maps.sampled_rows, **_numbers(bins), "taps": taps}
    known = config(grad, shape, maps, tiling, tiles)
    # Rows of all images, and not of one, are found by their numbers.
    if maps.sampled_rows * shape.groups * shape.outputs >= 2**31:
        known = known._replace(INDEX=tl.int64)
    constants = {"K": known, "ENTRIES": entries(grad.dtype, grad.device)}
    arguments = tensors | {"first_bins": bins.firsts} | numbers
    kernel = inverse_kernels.gather_kernel
    return Launch(kernel, grid, arguments, constants, tiles.warps, tiles.stages, tables=("tables",))


run_bins, run_gather = Launcher(bins_launch), Launcher(gather_launch)


def entries(dtype: torch.dtype, device: torch.device) -> int:
    """How many samples the gather multiplies at a time, a third or more of those around a tile."""
    return 64 if dtype.itemsize == 2 and family(device) != "mma" else 32


def map_bins(height: int, width: int, tiles: Tiles) -> int:
    """How many bins an image of a map has."""
    return (2 * cdiv(height, tiles.height) + 1) * (2 * cdiv(width, tiles.width) + 1)


def index(keys: Tensor, bins: int) -> Index:
    """Sort samples by bin, those of one bin in the order of their numbers.

    Args:
        keys: (samples,) int32, the bin of every sample, or `bins` for one that is in none.
        bins: Number of bins.

    Raises:
        ValueError: There are 2**31 samples or more.
    """
    if len(keys) >= 2**31:
        raise ValueError(f"deterministic gradients need fewer than 2**31 samples, got {len(keys)}; pass fewer images")
    found = torch.sort(keys, stable=True)
    edges = torch.arange(bins + 1, dtype=torch.int32, device=keys.device)
    # Of a number of 64 bits a kernel reads the lower half.
    return Index(found.indices.view(torch.int32), torch.searchsorted(found.values, edges, out_int32=True))
