"""Which pixels a program of the sampling kernels works on, of one map or of all maps of a block.

A product has a row for every output pixel, image by image; a *tile* is a rectangle of the output pixels of one image.
With one map, tiles are numbered image by image. With several, which are the problems of a grouped matrix product, a
program looks up in a table which problem its tile belongs to, so that small maps fill a GPU together with large ones.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Columns of the table of problems.
BRANCH = tl.constexpr(0)
LEVEL = tl.constexpr(1)
STRIDE = tl.constexpr(2)
HEIGHT = tl.constexpr(3)
WIDTH = tl.constexpr(4)
OUT_HEIGHT = tl.constexpr(5)
OUT_WIDTH = tl.constexpr(6)
INPUT_ROW = tl.constexpr(7)
OUTPUT_ROW = tl.constexpr(8)
# Size of the level that the problem is for, and its first row in the pyramid, which is that of its offsets as well.
TARGET_HEIGHT = tl.constexpr(9)
TARGET_WIDTH = tl.constexpr(10)
TARGET_ROW = tl.constexpr(11)
AXES = tl.constexpr(12)
FIRST_TILE = tl.constexpr(13)
TILES = tl.constexpr(14)
# The level that is sampled.
SOURCE = tl.constexpr(15)
PROBLEM_COLUMNS = tl.constexpr(16)

# Columns of the table of levels; a row of -1 says that the level has no such neighbour.
SAME_ROW = tl.constexpr(2)
FINER_ROW = tl.constexpr(3)
COARSER_ROW = tl.constexpr(4)
COARSER_HEIGHT = tl.constexpr(5)
COARSER_WIDTH = tl.constexpr(6)
COARSER_AXES = tl.constexpr(7)
LEVEL_COLUMNS = tl.constexpr(8)


class Sizes(NamedTuple):
    """Heights and widths of a single map and of its output; whole numbers that no kernel is compiled for."""

    H: Any
    W: Any
    HO: Any
    WO: Any


class Tables(NamedTuple):
    """Several maps: the table of problems, and (tiles, 3): problem, image and number of every tile."""

    problems: Any
    work: Any


class Levels(NamedTuple):
    """Several maps that are sampled: the table of levels, and (tiles, 3): level, image and number of every tile."""

    levels: Any
    work: Any


class Pixels(NamedTuple):
    """(PIXELS,) coordinates of output pixels, and which of them exist."""

    y: Any
    x: Any
    inside: Any


class Tile(NamedTuple):
    """Where a tile lies.

    Attributes:
        number: Of the tile in its image.
        HO, WO: Height and width of the output.
        H, W: Height and width of the map that is sampled.
        first: Row of the first output pixel of the tile's image, 64 bits.
        source: Row of the first pixel of the map that is sampled, 64 bits.
        image: Its image, 64 bits.
        branch: Which of several weights the tile is multiplied with.
        level: Which of several maps is sampled.
        problem: Pointer to the problem's row of the table, if there is one.
    """

    number: Any
    HO: Any
    WO: Any
    H: Any
    W: Any
    first: Any
    source: Any
    image: Any
    branch: Any
    level: Any
    problem: Any


class Map(NamedTuple):
    """Where a tile of a map that is sampled lies; names as in `Tile`.

    Attributes:
        top, left: Coordinates of its first pixel.
        reciprocal: Of the width, for `divided`.
        first: Row of the first pixel of the tile's image, 64 bits.
    """

    number: Any
    top: Any
    left: Any
    H: Any
    W: Any
    reciprocal: Any
    first: Any
    image: Any
    level: Any


@triton.jit
def locate_tile(tile, tables, sizes, K: tl.constexpr):
    """The `Tile` of a number, from `Tables` where K.TABLED, else from the `Sizes` of a single map."""
    if K.TABLED:
        entry = tables.work + tile * 3
        problem = tables.problems + tl.load(entry) * PROBLEM_COLUMNS
        image, number = tl.load(entry + 1).to(tl.int64), tl.load(entry + 2)
        H, W = tl.load(problem + HEIGHT), tl.load(problem + WIDTH)
        HO, WO = tl.load(problem + OUT_HEIGHT), tl.load(problem + OUT_WIDTH)
        first = tl.load(problem + OUTPUT_ROW) + image * HO * WO
        source = tl.load(problem + INPUT_ROW) + image * H * W
        branch, level = tl.load(problem + BRANCH), tl.load(problem + SOURCE)
    else:
        H, W, HO, WO = sizes
        tiles = tl.cdiv(HO, K.TILE_H) * tl.cdiv(WO, K.TILE_W)
        image, number = (tile // tiles).to(tl.int64), tile % tiles
        first, source = image * HO * WO, image * H * W
        branch, level, problem = 0, 0, 0
    return Tile(number, HO, WO, H, W, first, source, image, branch, level, problem)


@triton.jit
def locate_map(tile, tables, sizes, K: tl.constexpr):
    """The `Map` of a number, from `Levels` where K.TABLED, else from the `Sizes` of a single map."""
    if K.TABLED:
        entry = tables.work + tile * 3
        level, image, number = tl.load(entry), tl.load(entry + 1).to(tl.int64), tl.load(entry + 2)
        row = tables.levels + level * LEVEL_COLUMNS
        H, W = tl.load(row), tl.load(row + 1)
        first = tl.load(row + SAME_ROW) + image * H * W
    else:
        H, W = sizes.H, sizes.W
        tiles = tl.cdiv(H, K.TILE_H) * tl.cdiv(W, K.TILE_W)
        image, number = (tile // tiles).to(tl.int64), tile % tiles
        first, level = image * H * W, 0
    across = tl.cdiv(W, K.TILE_W)
    reciprocal = (tl.cast((1 << 32) - 1, tl.int64) // W).to(tl.uint32)
    return Map(number, number // across * K.TILE_H, number % across * K.TILE_W, H, W, reciprocal, first, image, level)


@triton.jit
def divided(number, by, reciprocal):
    """number // by, where `reciprocal` is (2**32 - 1) // by; there is no instruction for a division."""
    quotient = tl.umulhi(number.to(tl.uint32), reciprocal).to(tl.int32)
    return tl.where(number - quotient * by >= by, quotient + 1, quotient)


@triton.jit
def tile_pixels(tile, number, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """The `Pixels` of some numbers within a tile of a map of height x width."""
    across = tl.cdiv(width, TILE_W)
    y = (tile // across) * TILE_H + number // TILE_W
    x = (tile % across) * TILE_W + number % TILE_W
    return Pixels(y, x, (y < height) & (x < width))
