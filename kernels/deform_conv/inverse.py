"""The input's gradient of deformable convolutions without atomics: the same bits in every run.

Three steps: a kernel finds the bin of every sample, `index` sorts the samples by bin, and a second implicit matrix
product gathers, for tiles of input pixels, the gradients of the samples around them; see
`kernels.deform_conv.inverse_kernels`. Nothing as large as a column matrix is stored: for every sample 12 bytes for its
place and mask, 4 for its key, 12 for the sorted keys and their order, and what `torch.sort` needs while it runs.

The pieces serve any set of maps and rows. To invert the taps of several convolutions over several maps at once: number
all (tap, map, image, bin) in this order, where a map of H x W pixels has (2 * ceil(H / tile height) + 1) *
(2 * ceil(W / tile width) + 1) bins an image, row by row; let a kernel call `store_samples` for every sample; call
`index`; let another call `collect` for every tile.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels.deform_conv import inverse_kernels as kernels
from kernels.deform_conv.level import Level, strided
from kernels.runtime.launch import Launch, real
from kernels.runtime.tiles import Table, Tiles, type_class

# Chosen without a GPU: Triton 3.6 and 3.7 compile them for sm_80, sm_90, sm_100 and gfx942 without a spill.
GATHER = Table(
    "deform_conv2d inverse gather",
    {"16": Tiles(8, 16, 256, 64, 8, 2), "32": Tiles(8, 16, 256, 32, 8, 2), "exact": Tiles(4, 8, 32, 16, 4, 2)},
)
_BLOCK = 256


class Index(NamedTuple):
    """Samples by bin.

    Attributes:
        order: (samples,) int64, their numbers.
        starts: (bins + 1,), where in `order` every bin begins; int32, for 2**31 samples and more int64.
    """

    order: Tensor
    starts: Tensor


def index(keys: Tensor, bins: int) -> Index:
    """Sort samples by bin, those of one bin in the order of their numbers.

    Args:
        keys: (samples,) int32, the bin of every sample, or `bins` for one that is in none.
        bins: Number of bins.
    """
    found = torch.sort(keys, stable=True)
    edges = torch.arange(bins + 1, dtype=torch.int32, device=keys.device)
    starts = torch.searchsorted(found.values, edges, out_int32=len(keys) < 2**31)
    return Index(found.indices, starts)


def entries(dtype: torch.dtype, device: torch.device) -> int:
    """How many samples `collect` multiplies at a time, a third or more of those around a tile."""
    return 32 if type_class(dtype, device) == "exact" else 64


def map_bins(height: int, width: int, tiles: Tiles) -> int:
    """How many bins an image of a map has."""
    return (2 * triton.cdiv(height, tiles.height) + 1) * (2 * triton.cdiv(width, tiles.width) + 1)


def _bin_launch(level: Level, keys: Tensor, places: Tensor, firsts: dict[str, int], no_bin: int) -> Launch:
    config, _ = level.config(GATHER)
    images, points, height, width = level.x.shape[0], level.offset.shape[1] // 2, *level.offset.shape[2:]
    arguments = level.arguments() | {"keys": keys, "places": places, "images": images, "no_bin": no_bin} | firsts
    del arguments["x"]
    grid = (triton.cdiv(images * height * width, _BLOCK), points)
    return Launch(kernels.bin_kernel, grid, arguments, {"K": config, "BLOCK": _BLOCK}, 4, 1)


def _gather_launch(
    level: Level, packed: Tensor, grad: Tensor, found: Index, places: Tensor, firsts: dict[str, int], target: Tensor
) -> Launch:
    config, tiles = level.config(GATHER)
    images, height, width, channels = level.x.shape
    arguments = {"grad": grad, "weight": packed, "out": strided(target), "H": height, "W": width, **firsts}
    arguments |= {"order": found.order, "starts": found.starts, "places": places}
    arguments |= {"rows": grad.shape[:3].numel(), "bins": images * map_bins(height, width, tiles)}
    blocks = channels // config.SPAN * triton.cdiv(config.SPAN, tiles.c)
    grid = (images * triton.cdiv(height, tiles.height) * triton.cdiv(width, tiles.width), blocks)
    constants = {"K": config, "ENTRIES": entries(grad.dtype, grad.device)}
    return Launch(kernels.gather_kernel, grid, arguments, constants, tiles.warps, tiles.stages)


def input_gradients(targets: list[Tensor], grads: list[Tensor], levels: list[Level], packed: Tensor) -> None:
    """Write the gradients (N, C, H, W) of the inputs of all levels.

    Args:
        targets: One a level, of any strides.
        grads: Gradients of the outputs, (N, Ho, Wo, O), contiguous.
        levels: Maps, offsets and masks.
        packed: The weight as (groups, T, C / groups, O / groups), contiguous, in the inputs' type.
    """
    firsts, samples, bins = [], 0, 0
    for level in levels:
        firsts.append({"first_sample": samples, "first_bin": bins})
        samples += level.offset.numel() // 2
        images, height, width, _ = level.x.shape
        bins += images * level.offset.shape[1] // 2 * map_bins(height, width, level.config(GATHER)[1])
    keys = torch.empty(samples, dtype=torch.int32, device=packed.device)
    places = torch.empty((samples, 3), dtype=real(packed.dtype), device=packed.device)
    for level, first in zip(levels, firsts, strict=True):
        _bin_launch(level, keys, places, first, bins).run()
    found = index(keys, bins)
    for level, first, grad, target in zip(levels, firsts, grads, targets, strict=True):
        _gather_launch(level, packed, grad, found, places, first, target).run()


def compile_launches(level: Level, packed: Tensor, grad: Tensor) -> tuple[Launch, Launch]:
    """The kernels, bins and gather, as they run on such a level, whose tensors may be on the `meta` device."""
    keys, order = (torch.empty(16, dtype=kind, device=grad.device) for kind in (torch.int32, torch.int64))
    places = torch.empty((16, 3), dtype=real(grad.dtype), device=grad.device)
    firsts, target = {"first_sample": 0, "first_bin": 0}, level.x.permute(0, 3, 1, 2)
    gather = _gather_launch(level, packed, grad, Index(order, keys), places, firsts, target)
    return _bin_launch(level, keys, places, firsts, 2**20), gather
