"""One map of a deformable convolution as its kernels read it."""

from math import gcd
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.deform_conv.kernels import Config, Strided
from kernels.runtime.launch import triton_real
from kernels.runtime.tiles import Table, Tiles, fit, precision


def strided(tensor: Tensor) -> Strided:
    """A tensor (N, C, H, W) as an argument of a kernel."""
    return Strided(tensor, *tensor.stride())


def _extent(tensor: Tensor) -> int:
    """The farthest element of an image from its first."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


class Level(NamedTuple):
    """One map as the kernels read it."""

    x: Tensor  # (N, H, W, C), contiguous
    offset: Tensor
    mask: Tensor | None
    weight: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def groups(self) -> int:
        return self.x.shape[3] // self.weight.shape[1]

    @property
    def taps(self) -> int:
        return self.weight.shape[2] * self.weight.shape[3]

    def arguments(self) -> dict[str, Any]:
        """What all kernels read, by their names for it."""
        # Pointers must point somewhere, also where nothing is read.
        mask = self.offset if self.mask is None else self.mask
        _, height, width, _ = self.x.shape
        sizes = {"H": height, "W": width, "HO": self.offset.shape[2], "WO": self.offset.shape[3]}
        return {"x": self.x, "offset": strided(self.offset), "mask": strided(mask), **sizes}

    def config(self, table: Table, *others: Tensor) -> tuple[Config, Tiles]:
        """What is known at compilation; `others` are tensors (N, ., Ho, Wo) that the kernel reads or writes besides."""
        c, o, channels = self.weight.shape[1], self.weight.shape[0] // self.groups, self.x.shape[3]
        share = channels * 2 * self.taps // self.offset.shape[1]
        far = max(_extent(t) for t in (self.x, self.offset, self.mask, *others) if t is not None)
        tiles = fit(table, self.x.dtype, self.x.device, gcd(c, share), o)
        config = Config(
            C=c,
            OUT=o,
            GROUPS=self.groups,
            SHARE=share,
            SPAN=gcd(c, share),
            KW=self.weight.shape[3],
            TAPS=self.taps,
            GEOMETRY=(*self.stride, *self.padding, *self.dilation),
            HAS_MASK=self.mask is not None,
            TILE_H=tiles.height,
            TILE_W=tiles.width,
            BLOCK_C=tiles.c,
            BLOCK_O=tiles.o,
            REAL=triton_real(self.x.dtype),
            # Twice an offset's channel, and sums of several places, must fit as well.
            INDEX=tl.int32 if far < 2**30 else tl.int64,
            PRECISION=precision(self.x.dtype, self.x.device),
        )
        return config, tiles

    def tile_count(self, tiles: Tiles) -> int:
        height, width = self.offset.shape[2:]
        return self.x.shape[0] * triton.cdiv(height, tiles.height) * triton.cdiv(width, tiles.width)
