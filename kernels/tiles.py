"""How large the pieces of the convolution kernels are, and how they multiply."""

from dataclasses import dataclass

import torch
import triton

from kernels.backend import INTERPRET


@dataclass(frozen=True)
class Tiles:
    """Sizes of a program: output pixels, input and output channels, warps, stages of the pipeline."""

    height: int
    width: int
    c: int
    o: int
    warps: int
    stages: int


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """How products of float32 are made: as PyTorch's own convolutions are told to make them."""
    if dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision != "tf32":
        return "ieee"
    if torch.version.hip and not torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx94"):
        return "ieee"
    return "tf32"


def fit(table: dict[str, Tiles], dtype: torch.dtype, device: torch.device, span: int, o: int) -> Tiles:
    """The tiles of a table for tensors of `dtype`, no larger than `span` input and `o` output channels need.

    The table's keys are "16" for 16-bit tensors, "32" for products of float32 on tensor cores, and "exact" for float64,
    and for float32 where its products must not be rounded and the tensor cores would.
    """
    if dtype.itemsize == 2:
        tiles = table["16"]
    elif INTERPRET or precision(dtype, device) == "tf32" or (torch.version.hip and dtype == torch.float32):
        tiles = table["32"]
    else:
        tiles = table["exact"]
    # A product needs at least 16 of each.
    c, o = (min(most, max(16, triton.next_power_of_2(size))) for most, size in ((tiles.c, span), (tiles.o, o)))
    # The interpreter's time is that of its programs' number, hardly of their size.
    height, width = (16, 16) if INTERPRET else (tiles.height, tiles.width)
    return Tiles(height, width, c, o, tiles.warps, tiles.stages)
