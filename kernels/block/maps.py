"""What the convolution kernels of a block have in common: the maps they sample, and how they are launched."""

from dataclasses import dataclass
from typing import Any

import triton.language as tl
from torch import Tensor

from kernels.block.layout import Layout
from kernels.runtime.launch import Launch, triton_real
from kernels.runtime.tiles import Table, Tiles, fit, precision


@dataclass(frozen=True)
class Maps:
    """What is sampled, and where; see `kernels.block_conv.convolve`."""

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
        """Of a kernel whose programs sample tiles of `size`.

        `others` are tensors and numbers by the kernel's names for them, and in capitals what is known at compilation,
        besides what many of these kernels take.
        """
        layout, dtype = self.layout, self.pyramid.dtype
        common = {
            "pyramid": self.pyramid,
            "predicted": self.predicted,
            "problems": layout.table,
            "work": layout.tiles(size),
            # From a row of the sampled maps to the row of predictions that a coarser neighbour has for itself.
            "coarser_rows": layout.rows - layout.coarser_row,
            "sampled_rows": layout.sampled_rows,
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
        values = {name: value for name, value in common.items() if name in kernel.arg_names} | others
        arguments = {name: value for name, value in values.items() if name.islower()}
        constants = {name: value for name, value in values.items() if name.isupper()}
        return Launch(kernel, grid, arguments, constants, tiles.warps, tiles.stages)
