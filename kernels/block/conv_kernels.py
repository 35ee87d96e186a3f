"""The deformable convolutions of a DyHead block, of all levels and branches, as one Triton kernel.

The kernel is `forward_kernel` of `kernels.deform_conv.kernels`, whose pieces it uses, with two differences. A program
looks up in a table which of the block's convolutions its tile belongs to, so that small levels fill the GPU together
with large ones. And it leaves the sums over its tile that the mean, the variance and the upsampled mean of the output
are made of, so that nobody reads the output for them.

Matrices and tables are those of `kernels.block.layout`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.block.layout import (
    BRANCH,
    HEIGHT,
    INPUT_ROW,
    OUT_HEIGHT,
    OUT_WIDTH,
    OUTPUT_ROW,
    PROBLEM_COLUMNS,
    STRIDE,
    TARGET_HEIGHT,
    TARGET_ROW,
    TARGET_WIDTH,
    WIDTH,
)
from kernels.block.sums import store_sums
from kernels.sampling.kernels import Pixels, Sample, find_corners, load_corners, mix_corners, tile_pixels

CHANNELS = tl.constexpr(27)
MASKS = tl.constexpr(18)


class Config(NamedTuple):
    """What is known at compilation.

    Attributes:
        C: Channels.
        CROP: Whether a coarser neighbour reads the top left corner of the level's offsets and masks.
        SIGMOID: Whether the masks are still to pass a sigmoid.
        TILE_H, TILE_W: The rectangle of pixels that a program works on.
        BLOCK_C, BLOCK_O: Input and output channels worked on at a time.
        REAL, INDEX, PRECISION: As in `kernels.deform_conv.kernels.Config`.
    """

    C: int
    CROP: bool
    SIGMOID: bool
    TILE_H: int
    TILE_W: int
    BLOCK_C: int
    BLOCK_O: int
    REAL: Any
    INDEX: Any
    PRECISION: Any


class Tables(NamedTuple):
    """The tables that say what a tile is made of (`kernels.block.layout`); see `locate_tile` for the last one."""

    problems: Any
    work: Any
    coarser_rows: Any


class Tile(NamedTuple):
    """What a tile of a convolution is made of.

    Attributes:
        row: The problem's row of the table.
        H, W: Height and width of the map it samples.
        source: First row of that map in the pyramid.
        stride: The convolution's.
        pixels: `Pixels` of the output.
        place: (PIXELS,) their rows of the sampled maps.
        predicted: (PIXELS,) their rows of the predictions.
    """

    row: Any
    H: Any
    W: Any
    source: Any
    stride: Any
    pixels: Pixels
    place: Any
    predicted: Any


@triton.jit
def locate_tile(tile, tables, K: tl.constexpr):
    """The `Tile` of a number.

    A pixel's offsets and mask are in the row of the pixel of the level it is for; those of a coarser neighbour in that
    of the same coordinates (CROP), or in a row of their own, `coarser_rows` after the row of the output.
    """
    entry = tables.work + tile * 3
    row = tables.problems + tl.load(entry) * PROBLEM_COLUMNS
    image, number = tl.load(entry + 1).to(tl.int64), tl.load(entry + 2)
    H, W = tl.load(row + HEIGHT), tl.load(row + WIDTH)
    HO, WO = tl.load(row + OUT_HEIGHT), tl.load(row + OUT_WIDTH)
    pixels = tile_pixels(number, HO, WO, K.TILE_H, K.TILE_W)
    place = tl.load(row + OUTPUT_ROW) + image * HO * WO + pixels.y * WO + pixels.x
    target_w = tl.load(row + TARGET_WIDTH)
    own = tl.load(row + TARGET_ROW) + image * tl.load(row + TARGET_HEIGHT) * target_w + pixels.y * target_w + pixels.x
    if not K.CROP:
        own = tl.where(tl.load(row + BRANCH) == 2, place + tables.coarser_rows, own)
    return Tile(row, H, W, tl.load(row + INPUT_ROW) + image * H * W, tl.load(row + STRIDE), pixels, place, own)


@triton.jit
def locate_sample(tap, predicted, tile, K: tl.constexpr):
    """The `Sample` of a tap; `predicted` points to the rows of the tile's pixels."""
    inside = tile.pixels.inside
    dy = tl.load(predicted + 2 * tap, mask=inside, other=0.0).to(K.REAL)
    dx = tl.load(predicted + (2 * tap + 1), mask=inside, other=0.0).to(K.REAL)
    mask = tl.load(predicted + (MASKS + tap), mask=inside, other=0.0).to(K.REAL)
    if K.SIGMOID:
        mask = 1 / (1 + tl.exp(-mask))
    y = (tile.pixels.y * tile.stride - 1 + tap // 3).to(K.REAL) + dy
    return Sample(y, (tile.pixels.x * tile.stride - 1 + tap % 3).to(K.REAL) + dx, mask)


@triton.jit
def locate_step(step, x, predicted, tile, K: tl.constexpr):
    """The `Values` of one tap and block of channels; `x` points to the map, `predicted` to the rows of the pixels."""
    c = step // 9 * K.BLOCK_C + tl.arange(0, K.BLOCK_C)
    sample = locate_sample(step % 9, predicted, tile, K)
    corners = find_corners(sample, tile.pixels.inside, tile.H, tile.W, K.INDEX)
    return load_corners(x, corners, c, c < K.C, K.C, K.C % K.BLOCK_C == 0)


@triton.jit
def forward_kernel(pyramid, predicted, weight, sampled, partial, axes, tables, K: tl.constexpr):
    """Grid (tiles, blocks of C). `predicted` is (rows, 27), `weight` (3, C, 9, C), `partial` (tiles, 3, C)."""
    tile = locate_tile(tl.program_id(0), tables, K)
    predicted += tile.predicted * CHANNELS
    x = pyramid + tile.source * K.C
    o = tl.program_id(1) * K.BLOCK_O + tl.arange(0, K.BLOCK_O)
    rows = weight + (tl.load(tile.row + BRANCH) * K.C + o) * (9 * K.C)
    total = tl.zeros((K.TILE_H * K.TILE_W, K.BLOCK_O), dtype=K.REAL)
    steps: tl.constexpr = 9 * ((K.C + K.BLOCK_C - 1) // K.BLOCK_C)
    values = locate_step(0, x, predicted, tile, K)
    for step in range(steps):
        samples = mix_corners(values, K.REAL).to(pyramid.dtype.element_ty)
        values = locate_step(tl.minimum(step + 1, steps - 1), x, predicted, tile, K)
        c = step // 9 * K.BLOCK_C + tl.arange(0, K.BLOCK_C)
        weights = tl.load(
            rows[None, :] + (step % 9 * K.C + c)[:, None], mask=(c < K.C)[:, None] & (o < K.C)[None, :], other=0.0
        )
        total = tl.dot(samples, weights, total, input_precision=K.PRECISION, out_dtype=K.REAL)
    # The statistics are those of what is stored, so that the normalised maps have mean 0 and variance 1.
    rounded = total.to(sampled.dtype.element_ty)
    inside = tile.pixels.inside
    tl.store(sampled + tile.place[:, None] * K.C + o[None, :], rounded, mask=inside[:, None] & (o < K.C)[None, :])
    store_sums(rounded.to(K.REAL), tile.pixels, partial, axes, tile.row, o, o < K.C, K.C, K.REAL)
