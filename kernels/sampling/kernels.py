"""What the convolutions, single and of a block, share: pixels of a tile, samples, their corners, and their gradients.

Maps are channels last, so that the corner of a sample is one run of channels. H and W: height and width of the map that
is sampled. REAL: type of coordinates, weights and sums. INDEX: integer type of a place within one image. PIXELS and
BLOCK_C: pixels and channels that are worked on at a time. What belongs together travels as a NamedTuple, which costs no
instruction.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Pixels(NamedTuple):
    """(PIXELS,) coordinates of output pixels, and which of them exist."""

    y: Any
    x: Any
    inside: Any


class Sample(NamedTuple):
    """(PIXELS,) where a point samples the map, in pixels, and its mask."""

    y: Any
    x: Any
    mask: Any


class Corners(NamedTuple):
    """The four pixels around each sample, (PIXELS,): places in the map, weights, and which of them there are."""

    p00: Any
    p01: Any
    p10: Any
    p11: Any
    w00: Any
    w01: Any
    w10: Any
    w11: Any
    h00: Any
    h01: Any
    h10: Any
    h11: Any


class Values(NamedTuple):
    """What the map holds at the corners of each sample, (PIXELS, BLOCK_C), and the corners' weights, (PIXELS,)."""

    v00: Any
    v01: Any
    v10: Any
    v11: Any
    w00: Any
    w01: Any
    w10: Any
    w11: Any


class Products(NamedTuple):
    """(PIXELS,) the products of the sample's gradient with its four corners, summed over channels."""

    s00: Any
    s01: Any
    s10: Any
    s11: Any


@triton.jit
def tile_pixels(tile, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """The pixels of a tile of a map of height x width."""
    across = tl.cdiv(width, TILE_W)
    number = tl.arange(0, TILE_H * TILE_W)
    y = (tile // across) * TILE_H + number // TILE_W
    x = (tile % across) * TILE_W + number % TILE_W
    return Pixels(y, x, (y < height) & (x < width))


@triton.jit
def _neighbours(place, size):
    """The pixel at or before a coordinate; whether it and the next one are in the map; the distance from it."""
    low = tl.floor(place)
    first = low.to(tl.int32)
    return first, place >= 0, place < size - 1, place - low


@triton.jit
def find_corners(sample, inside, H, W, INDEX: tl.constexpr):
    """The `Corners` of samples; one of a pixel that is not `inside`, outside of the map or at NaN has none."""
    sampled = inside & (sample.y > -1) & (sample.y < H) & (sample.x > -1) & (sample.x < W)
    # What is not sampled, and need not be a number that an integer holds, goes above the map: it has no first line.
    y0, has_y0, has_y1, fy = _neighbours(tl.where(sampled, sample.y, -2.0), H)
    x0, has_x0, has_x1, fx = _neighbours(tl.where(sampled, sample.x, 0.0), W)
    has_y1 &= sampled
    wy0, wy1 = (1 - fy) * sample.mask, fy * sample.mask
    p00 = y0.to(INDEX) * W + x0
    return Corners(
        p00,
        p00 + 1,
        p00 + W,
        p00 + W + 1,
        wy0 * (1 - fx),
        wy0 * fx,
        wy1 * (1 - fx),
        wy1 * fx,
        has_y0 & has_x0,
        has_y0 & has_x1,
        has_y1 & has_x0,
        has_y1 & has_x1,
    )


@triton.jit
def load_rows(base, place, there, channels, known, STRIDE: tl.constexpr, EVEN: tl.constexpr):
    """(PIXELS, BLOCK_C): the channels of one pixel of the map for each row, zeros where there is none."""
    pointers = base + (place * STRIDE)[:, None] + channels[None, :]
    if EVEN:
        return tl.load(pointers, mask=there[:, None], other=0.0)
    return tl.load(pointers, mask=there[:, None] & known[None, :], other=0.0)


@triton.jit
def load_corners(x, k, channels, known, STRIDE: tl.constexpr, EVEN: tl.constexpr):
    """The `Values` of `Corners` k at some channels of the map, zeros where there is no corner."""
    return Values(
        load_rows(x, k.p00, k.h00, channels, known, STRIDE, EVEN),
        load_rows(x, k.p01, k.h01, channels, known, STRIDE, EVEN),
        load_rows(x, k.p10, k.h10, channels, known, STRIDE, EVEN),
        load_rows(x, k.p11, k.h11, channels, known, STRIDE, EVEN),
        k.w00,
        k.w01,
        k.w10,
        k.w11,
    )


@triton.jit
def mix_corners(k, REAL: tl.constexpr):
    """The samples (PIXELS, BLOCK_C) from `Values` k."""
    upper = k.v00.to(REAL) * k.w00[:, None] + k.v01.to(REAL) * k.w01[:, None]
    return upper + k.v10.to(REAL) * k.w10[:, None] + k.v11.to(REAL) * k.w11[:, None]


@triton.jit
def no_products(PIXELS: tl.constexpr, REAL: tl.constexpr):
    """`Products` of nothing yet."""
    zeros = tl.zeros((PIXELS,), dtype=REAL)
    return Products(zeros, zeros, zeros, zeros)


@triton.jit
def add_products(s, column, x, k, channels, known, STRIDE: tl.constexpr, EVEN: tl.constexpr, REAL: tl.constexpr):
    """`Products` s, and those of a column's gradient (PIXELS, BLOCK_C) with the map's channels at `Corners` k."""
    return Products(
        s.s00 + tl.sum(load_rows(x, k.p00, k.h00, channels, known, STRIDE, EVEN).to(REAL) * column, 1),
        s.s01 + tl.sum(load_rows(x, k.p01, k.h01, channels, known, STRIDE, EVEN).to(REAL) * column, 1),
        s.s10 + tl.sum(load_rows(x, k.p10, k.h10, channels, known, STRIDE, EVEN).to(REAL) * column, 1),
        s.s11 + tl.sum(load_rows(x, k.p11, k.h11, channels, known, STRIDE, EVEN).to(REAL) * column, 1),
    )


@triton.jit
def point_gradients(s, sample, k):
    """Gradients (PIXELS,) of dy, dx and the mask, from the `Products` s of samples whose `Corners` are k."""
    sampled = k.h00 | k.h01 | k.h10 | k.h11
    y, x = tl.where(sampled, sample.y, 0.0), tl.where(sampled, sample.x, 0.0)
    fy, fx = y - tl.floor(y), x - tl.floor(x)
    across0 = s.s01 - s.s00
    across1 = s.s11 - s.s10
    along0 = s.s00 + fx * across0
    along1 = s.s10 + fx * across1
    # What is not sampled has no gradient, though the mask, or the gradient of the sample, be NaN.
    down = tl.where(sampled, sample.mask * (along1 - along0), 0.0)
    right = tl.where(sampled, sample.mask * (across0 + fy * (across1 - across0)), 0.0)
    return down, right, along0 + fy * (along1 - along0)


@triton.jit
def load_gradient(rows, o, inside, known):
    """(PIXELS, BLOCK_O) of the output's gradient."""
    return tl.load(rows + o[None, :], mask=inside[:, None] & known[None, :], other=0.0)


@triton.jit
def add_corners(base, k, column, channels, known, STRIDE: tl.constexpr):
    """Add what a column's gradient (PIXELS, BLOCK_C) gives to the map at `Corners` k."""
    _add_rows(base, k.p00, k.w00, k.h00, column, channels, known, STRIDE)
    _add_rows(base, k.p01, k.w01, k.h01, column, channels, known, STRIDE)
    _add_rows(base, k.p10, k.w10, k.h10, column, channels, known, STRIDE)
    _add_rows(base, k.p11, k.w11, k.h11, column, channels, known, STRIDE)


@triton.jit
def _add_rows(base, place, factor, there, column, channels, known, STRIDE: tl.constexpr):
    """Add to the channels of one pixel of the map for each row; a row whose factor is zero is left out."""
    pointers = base + (place * STRIDE)[:, None] + channels[None, :]
    added = there & (factor != 0)
    tl.atomic_add(pointers, column * factor[:, None], mask=added[:, None] & known[None, :], sem="relaxed")
