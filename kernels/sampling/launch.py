"""Launching the matrix products over bilinear samples: tiles, and what is known at compilation.

A launch is prepared as data and run afterwards, so that the ahead-of-time compilation describes exactly what runs. What
a kernel needs is a plan, matrices, the shape of the weight, and where its tiles are: a `Tiling`, which a single map and
the layout of a block make in their own ways.
"""

from dataclasses import dataclass
from math import gcd
from typing import Any, NamedTuple, Protocol

import torch
import triton.language as tl
from torch import Tensor

from kernels.backend import INTERPRET
from kernels.runtime.launch import Launch, Launcher, multiprocessors, triton_real
from kernels.runtime.tiles import Table, Tiles, cdiv, fit, packs, precision
from kernels.sampling import gradient_kernels, pack_kernels, product_kernels
from kernels.sampling.maps import Levels, Sizes, Tables
from kernels.sampling.pack_kernels import Weights
from kernels.sampling.plan_kernels import Plan
from kernels.sampling.product_kernels import Config, Sums

# Chosen without a GPU: what Triton 3.7 compiles for all targets without a spill, and what its loops were counted to be.
FORWARD = Table(
    "convolution",
    {
        "16": Tiles(8, 16, 32, 256, 8, 3),
        "16 mfma": Tiles(8, 8, 32, 256, 8, 2),
        "32": Tiles(8, 8, 16, 256, 8, 3),
        "exact": Tiles(4, 8, 16, 32, 4, 2),
    },
)
SAMPLES = Table(
    "convolution samples",
    {
        "16": Tiles(8, 8, 128, 256, 4, 1),
        "16 mma": Tiles(8, 8, 64, 256, 4, 1),
        "16 mfma": Tiles(8, 8, 32, 256, 4, 1),
        "32": Tiles(4, 8, 32, 256, 8, 1),
        "exact": Tiles(4, 8, 16, 32, 4, 1),
    },
)
# The addresses of the additions take registers. For more outputs than a program holds, or several weight groups, the
# gradients come in pieces.
SAMPLES_AND_MAP = Table("convolution samples and map", SAMPLES | {"16": Tiles(8, 8, 64, 256, 4, 1)})
SAMPLES_IN_PIECES = Table(
    "convolution samples in pieces",
    SAMPLES_AND_MAP | {"16": Tiles(8, 8, 64, 64, 4, 2), "32": Tiles(4, 8, 32, 64, 4, 2)},
)
WEIGHT = Table(
    "convolution weight",
    {"16": Tiles(8, 8, 64, 256, 8, 2), "32": Tiles(4, 8, 64, 256, 8, 1), "exact": Tiles(4, 8, 16, 32, 4, 1)},
)
# How many programs a multiprocessor should have one after the other where a sum is spread over programs.
_WAVES = 4


TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


class Shape(NamedTuple):
    """Of a weight: input and output channels of a weight group, weight groups, channels of an offset group, taps."""

    channels: int
    outputs: int
    groups: int
    share: int
    taps: int

    @property
    def points(self) -> int:
        """Samples of an output pixel."""
        return self.channels * self.groups // self.share * self.taps

    @property
    def span(self) -> int:
        """Neighbouring channels of one weight group and one offset group."""
        return gcd(self.channels, self.share)


class Tiling(NamedTuple):
    """Where the tiles of a launch are.

    Attributes:
        tables: Of several maps, else None.
        sizes: Of a single map; zeros for several.
        number: Of tiles.
    """

    tables: Tables | Levels | None
    sizes: Sizes
    number: int


class Maps(Protocol):
    """The maps that are sampled, and those that are made.

    Attributes:
        sampled_rows: Pixels of all maps and images that are made.
        largest: Pixels of the largest map of an image, sampled or made.
        thin: Whether a sampled map has a single column.
    """

    @property
    def sampled_rows(self) -> int: ...

    @property
    def largest(self) -> int: ...

    @property
    def thin(self) -> bool: ...

    def outputs(self, size: tuple[int, int]) -> Tiling:
        """The tiles of the maps that are made."""

    def inputs(self, size: tuple[int, int]) -> Tiling:
        """The tiles of the maps that are sampled."""


@dataclass(frozen=True)
class Single:
    """One map of a batch as `Maps`."""

    batch: int
    sizes: Sizes

    @property
    def sampled_rows(self) -> int:
        return self.batch * self.sizes.HO * self.sizes.WO

    @property
    def largest(self) -> int:
        return max(self.sizes.H * self.sizes.W, self.sizes.HO * self.sizes.WO)

    @property
    def thin(self) -> bool:
        return self.sizes.W == 1

    def outputs(self, size: tuple[int, int]) -> Tiling:
        return self._tiling(self.sizes.HO, self.sizes.WO, size)

    def inputs(self, size: tuple[int, int]) -> Tiling:
        return self._tiling(self.sizes.H, self.sizes.W, size)

    def _tiling(self, height: int, width: int, size: tuple[int, int]) -> Tiling:
        return Tiling(None, self.sizes, self.batch * cdiv(height, size[0]) * cdiv(width, size[1]))


def new_plan(x: Tensor, samples: int) -> Plan:
    """Memory for the plan of so many samples of maps like x."""
    pixels = torch.empty(samples, dtype=torch.int32, device=x.device)
    if x.dtype.itemsize == 2:
        return Plan(pixels, torch.empty(samples, dtype=torch.int64, device=x.device))
    return Plan(pixels, torch.empty((4, samples), dtype=x.dtype, device=x.device))


def packed(weight: Tensor, groups: int) -> Tensor:
    """A weight (O, C, kh, kw), of all groups, as `product_kernels.forward_kernel` reads it."""
    if weight.dtype.itemsize == 2:
        return transposed(weight, groups)
    return weight.permute(0, 2, 3, 1).contiguous()


def transposed(weight: Tensor, groups: int) -> Tensor:
    """A weight (O, C, kh, kw), of all groups, as (groups, taps, C, O / groups), as the other kernels read it."""
    return weight.unflatten(0, (groups, -1)).permute(0, 3, 4, 2, 1).contiguous()


def tiles_of(table: Table, x: Tensor, shape: Shape) -> Tiles:
    """The tiles of a kernel for maps of the type of x."""
    return fit(table, x.dtype, x.device, shape.span, shape.outputs)


def config(x: Tensor, shape: Shape, maps: Maps, tiling: Tiling, tiles: Tiles) -> Config:
    """What is known at compilation of a kernel for maps of the type of x."""
    packed = x.dtype.itemsize == 2
    far = maps.largest * shape.groups * max(shape.channels, shape.outputs)
    return Config(
        C=shape.channels,
        OUT=shape.outputs,
        GROUPS=shape.groups,
        SHARE=shape.share,
        SPAN=shape.span,
        TAPS=shape.taps,
        TABLED=tiling.tables is not None,
        THIN=maps.thin,
        TILE_H=tiles.height,
        TILE_W=tiles.width,
        BLOCK_C=tiles.c,
        BLOCK_O=tiles.o,
        WARPS=tiles.warps,
        SWAPPED=packed and tiles.height * tiles.width == 16 * tiles.warps and tiles.c % 32 == 0,
        TYPE=TYPES[x.dtype],
        PACKED=packed,
        MIX=TYPES[x.dtype] if packs(x.dtype, x.device) else triton_real(x.dtype),
        REAL=triton_real(x.dtype),
        # Sums of several places must fit as well.
        INDEX=tl.int32 if far < 2**30 else tl.int64,
        PRECISION=precision(x.dtype, x.device),
    )


def _launch(
    kernel: Any, grid: tuple[int, ...], known: Config, tiles: Tiles, tiling: Tiling, maps: Maps, others: dict[str, Any]
) -> Launch:
    where = {"tables": tiling.tables, **tiling.sizes._asdict(), "rows": maps.sampled_rows}
    return Launch(kernel, grid, others | where, {"K": known}, tiles.warps, tiles.stages, tables=("tables",))


def forward_launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, out: Tensor, sums: Sums | None, shape: Shape, maps: Maps
) -> Launch:
    """Write the products `out` (rows, outputs of all groups); tensors as in `product_kernels.forward_kernel`."""
    tiles = tiles_of(FORWARD, x, shape)
    tiling = maps.outputs((tiles.height, tiles.width))
    grid = (tiling.number, shape.groups * cdiv(shape.outputs, tiles.o))
    tensors = {"x": x, "weight": weight, "bias": bias, "plan": plan, "out": out, "sums": sums}
    known = config(x, shape, maps, tiling, tiles)
    return _launch(product_kernels.forward_kernel, grid, known, tiles, tiling, maps, tensors)


def samples_launch(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    plan: Plan,
    products: Tensor | None,
    grad_x: Tensor | None,
    shape: Shape,
    maps: Maps,
) -> Launch:
    """Write the gradients of the plan's weights and add that of x; tensors as in `gradient_kernels.samples_kernel`."""
    table = SAMPLES if grad_x is None else SAMPLES_AND_MAP
    if shape.groups > 1 or shape.outputs > 256:
        table = SAMPLES_IN_PIECES
    tiles = tiles_of(table, x, shape)
    tiling = maps.outputs((tiles.height, tiles.width))
    # Where tiles are few, their points are spread over programs.
    splits = min(shape.points, max(1, 2 * multiprocessors(x.device) // tiling.number))
    each = cdiv(shape.points, splits)
    grid = (tiling.number, cdiv(shape.points, each))
    tensors = {"grad": grad, "x": x, "weight": weight, "plan": plan, "products": products, "grad_x": grad_x}
    known = config(x, shape, maps, tiling, tiles)
    return _launch(gradient_kernels.samples_kernel, grid, known, tiles, tiling, maps, tensors | {"each": each})


def weight_steps(x: Tensor, shape: Shape) -> tuple[Tiles, int, int]:
    """The tiles of the weight's gradient, and programs of its grid along the first two axes."""
    tiles = tiles_of(WEIGHT, x, shape)
    steps = shape.taps * (shape.channels // shape.span) * cdiv(shape.span, tiles.c)
    return tiles, steps, shape.groups * cdiv(shape.outputs, tiles.o)


def weight_splits(x: Tensor, shape: Shape, count: int) -> int:
    """How many tiles, of `count`, a program of the weight's gradient sums over."""
    _, steps, blocks = weight_steps(x, shape)
    return cdiv(count, max(1, _WAVES * multiprocessors(x.device) // (steps * blocks)))


def weight_launch(
    grad: Tensor, x: Tensor, plan: Plan, partial: Tensor, splits: Tensor | None, each: int, shape: Shape, maps: Maps
) -> Launch:
    """Write the parts of the weight's gradient; tensors as in `gradient_kernels.weight_kernel`."""
    tiles, steps, blocks = weight_steps(x, shape)
    tiling = maps.outputs((tiles.height, tiles.width))
    known = config(x, shape, maps, tiling, tiles)
    others = {"grad": grad, "x": x, "plan": plan, "partial": partial, "splits": splits}
    others |= {"each": each, "tiles": tiling.number}
    grid = (steps, blocks, len(partial))
    return _launch(gradient_kernels.weight_kernel, grid, known, tiles, tiling, maps, others)


def sum_launch(partial: Tensor, targets: tuple[Tensor, ...], bounds: Tensor | None) -> Launch:
    """Write the sums of `partial` (splits, O, taps, C) to gradients of up to three weights, (O, C, kh, kw) each.

    The weights have the same strides; `bounds` are as in `pack_kernels.sum_kernel`.
    """
    three = (*targets, *[targets[0]] * (3 - len(targets)))
    splits, outputs, taps, channels = partial.shape
    block = 2048 if INTERPRET else 128
    grid = (cdiv(outputs * taps * channels, block), 1 if bounds is None else len(bounds))
    constants = {"OUT": outputs, "C": channels, "TAPS": taps, "KW": targets[0].shape[3], "BLOCK": block}
    constants |= {"REAL": triton_real(partial.dtype)}
    tensors = {"partial": partial, "target": Weights(*three, *targets[0].stride()), "bounds": bounds}
    return Launch(pack_kernels.sum_kernel, grid, tensors | {"splits": splits}, constants, 4, 1)


run_forward, run_samples, run_weight, run_sum = (
    Launcher(make) for make in (forward_launch, samples_launch, weight_launch, sum_launch)
)
