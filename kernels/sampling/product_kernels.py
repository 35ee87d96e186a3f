"""Matrix products over bilinear samples that exist only in registers: convolutions whose taps lie anywhere.

Maps are channels last, so that a pixel is one run of channels. A program owns a rectangle of output pixels of an image.
Its products run over steps, a step being a tap and a block of input channels; taps are innermost, so that the pixels
around the rectangle stay in the L1 cache while all taps visit them. The pixels of the next step are loaded before the
product of this one and carried through the loop: left to itself, the compiler would copy them to shared memory past
the L1 cache. Where samples lie is what a plan says, `kernels.sampling.plan_kernels`.

In 16 bits the samples never pass through shared memory. A lane loads 8 channels, 16 bytes, of a pixel, but a tensor
core's operand wants pairs of channels from it that are 8 apart. A product is the same in any order of its inner index,
so the samples stay where they are, and the other matrix has its rows in the order in which they then are. The two rows
of pixels that a lane has are reordered likewise.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.sampling.maps import Sizes, locate_tile, tile_pixels
from kernels.sampling.plan_kernels import Plan, load_weights
from kernels.sampling.tile_sums import store_sums


class Config(NamedTuple):
    """What is known at compilation.

    Attributes:
        C, OUT: Input and output channels of one weight group, of which there are GROUPS.
        SHARE: Input channels of one offset group.
        SPAN: How many neighbouring input channels lie in one weight group and one offset group, and can share a block.
        TAPS: Of the weight.
        TABLED: Whether there is a table of several maps.
        THIN: Whether a map may have a single column.
        TILE_H, TILE_W: The rectangle of pixels that a program works on, PIXELS = TILE_H * TILE_W.
        BLOCK_C, BLOCK_O: Input and output channels worked on at a time.
        WARPS: Warps of a program.
        SWAPPED: Whether samples keep the order in which lanes have loaded them.
        TYPE: Of the tensors.
        PACKED: Whether that is a type of 16 bits, so that the weights of a sample are packed.
        MIX: Type in which a sample is summed up.
        REAL: Type of sums: float32, or float64 for float64 tensors.
        INDEX: Integer type of a place within one image; images are found by 64-bit pointers.
        PRECISION: Of the products of float32 tensors.
    """

    C: int
    OUT: int
    GROUPS: int
    SHARE: int
    SPAN: int
    TAPS: int
    TABLED: bool
    THIN: bool
    TILE_H: int
    TILE_W: int
    BLOCK_C: int
    BLOCK_O: int
    WARPS: int
    SWAPPED: bool
    TYPE: Any
    PACKED: bool
    MIX: Any
    REAL: Any
    INDEX: Any
    PRECISION: Any


class Values(NamedTuple):
    """What the map holds at the four pixels of some samples, (PIXELS, BLOCK_C), and their `Weights`, (PIXELS,)."""

    v00: Any
    v01: Any
    v10: Any
    v11: Any
    weights: Any


class Sums(NamedTuple):
    """Pointers for the statistics of what is made: (tiles, 3, C) to be written, and the weights in an upsampling."""

    partial: Any
    axes: Any


@triton.jit
def lane_pixels(K: tl.constexpr):
    """(PIXELS,) the numbers, within a tile, of the pixels in the order in which lanes load them."""
    number = tl.arange(0, K.TILE_H * K.TILE_W)
    if K.SWAPPED:
        number = number // 8 % K.WARPS * 16 + number // (8 * K.WARPS) * 8 + number % 8
    return number


@triton.jit
def operand_order(samples, K: tl.constexpr):
    """Samples (PIXELS, BLOCK_C) as lanes loaded them, in the order of a product: pixels by number, channels swapped."""
    if K.SWAPPED:
        split = tl.reshape(samples, (2, K.WARPS, 8, K.BLOCK_C // 32, 4, 4, 2))
        samples = tl.reshape(tl.permute(split, (1, 0, 2, 3, 5, 4, 6)), (K.TILE_H * K.TILE_W, K.BLOCK_C))
    return samples


@triton.jit
def lane_order(column, K: tl.constexpr):
    """The inverse of `operand_order`."""
    if K.SWAPPED:
        split = tl.reshape(column, (K.WARPS, 2, 8, K.BLOCK_C // 32, 4, 4, 2))
        column = tl.reshape(tl.permute(split, (1, 0, 2, 3, 5, 4, 6)), (K.TILE_H * K.TILE_W, K.BLOCK_C))
    return column


@triton.jit
def operand_channels(K: tl.constexpr):
    """(BLOCK_C,) the channels of a block in the order of a product."""
    c = tl.arange(0, K.BLOCK_C)
    if K.SWAPPED:
        c = c // 32 * 32 + c // 2 % 4 * 8 + c // 8 % 4 * 2 + c % 2
    return c


@triton.jit
def neighbours(tile, K: tl.constexpr):
    """From pixel p of a map to p + right and p + down, in elements."""
    stride: tl.constexpr = K.C * K.GROUPS
    right = stride
    if K.THIN:
        right = tl.where(tile.W > 1, stride, 0)
    return right, tl.where(tile.H > 1, tl.cast(tile.W, K.INDEX) * stride, 0)


@triton.jit
def load_pixels(x, tile, pixel, c, left, SPAN: tl.constexpr, K: tl.constexpr):
    """(PIXELS, channels) four times: channels c, of which `left` exist, of p, p + right, p + down, p + down + right."""
    right, down = neighbours(tile, K)
    first = x + (pixel.to(K.INDEX) * (K.C * K.GROUPS))[:, None] + c[None, :]
    second = first + down
    if K.SPAN % SPAN == 0:
        v00, v01, v10, v11 = tl.load(first), tl.load(first + right), tl.load(second), tl.load(second + right)
    else:
        there = (c < left)[None, :]
        v00, v01 = tl.load(first, mask=there, other=0.0), tl.load(first + right, mask=there, other=0.0)
        v10, v11 = tl.load(second, mask=there, other=0.0), tl.load(second + right, mask=there, other=0.0)
    return v00, v01, v10, v11


@triton.jit
def first_channel(number, K: tl.constexpr):
    """Of a block of a group, and how many channels are left of its span: blocks do not cross spans."""
    blocks: tl.constexpr = (K.SPAN + K.BLOCK_C - 1) // K.BLOCK_C
    within = number % blocks * K.BLOCK_C
    if blocks * K.BLOCK_C == K.SPAN:
        first = number * K.BLOCK_C
    else:
        first = number // blocks * K.SPAN + within
    return first, K.SPAN - within


@triton.jit
def load_weight(weight, row, columns, left, o, begin, K: tl.constexpr):
    """(BLOCK_C, BLOCK_O): outputs begin + o of channels row + columns, of which `left` exist, of a weight (., OUT).

    In 32 and 64 bits the weight is (OUT, .): a product of tf32 takes no other.
    """
    STEP: tl.constexpr = K.OUT if K.PACKED else 1
    PITCH: tl.constexpr = 1 if K.PACKED else K.TAPS * K.C
    pointers = weight + row * STEP + begin * PITCH + (columns * STEP)[:, None] + (o * PITCH)[None, :]
    if K.SPAN % K.BLOCK_C == 0 and K.OUT % K.BLOCK_O == 0:
        weights = tl.load(pointers)
    else:
        # Not what memory holds in the place of a weight that is not there.
        weights = tl.load(pointers, mask=(columns < left)[:, None] & (begin + o < K.OUT)[None, :], other=0.0)
    return weights


@triton.jit
def load_outputs(rows, o, begin, K: tl.constexpr):
    """(PIXELS, BLOCK_O): outputs begin + o of rows of the output's gradient."""
    if K.OUT % K.BLOCK_O == 0:
        gradient = tl.load(rows + begin + o[None, :])
    else:
        gradient = tl.load(rows + begin + o[None, :], mask=(begin + o < K.OUT)[None, :], other=0.0)
    return gradient


@triton.jit
def at_point(plan, point, rows, tile):
    """The `Plan` of a point of the tile's image, whose samples are numbered by output pixel."""
    first = tl.cast(point, tl.int64) * rows + tile.first
    return Plan(plan.pixels + first, plan.weights + first)


@triton.jit
def all_samples(rows, K: tl.constexpr):
    """How many samples a plan has."""
    return tl.cast(rows, tl.int64) * (K.C * K.GROUPS // K.SHARE * K.TAPS)


@triton.jit
def load_step(step, group, x, plan, rows, tile, pixel, inside, K: tl.constexpr):
    """The `Values` of one step of a weight group at output pixels; their weights are 0 where not `inside`, if given."""
    block, tap = step // K.TAPS, step % K.TAPS
    first, left = first_channel(block, K)
    first += group * K.C
    at = at_point(plan, first // K.SHARE * K.TAPS + tap, rows, tile)
    place, c = tl.load(at.pixels + pixel), tl.arange(0, K.BLOCK_C)
    v00, v01, v10, v11 = load_pixels(x + first, tile, place, c, left, K.BLOCK_C, K)
    return Values(v00, v01, v10, v11, load_weights(at, pixel, all_samples(rows, K), inside, K))


@triton.jit
def mix(k, K: tl.constexpr):
    """The samples (PIXELS, BLOCK_C) from `Values` k."""
    w = k.weights
    s = k.v00.to(K.MIX) * w.w00.to(K.MIX)[:, None]
    s = k.v01.to(K.MIX) * w.w01.to(K.MIX)[:, None] + s
    s = k.v10.to(K.MIX) * w.w10.to(K.MIX)[:, None] + s
    s = k.v11.to(K.MIX) * w.w11.to(K.MIX)[:, None] + s
    if not K.PACKED:
        # What is not sampled is zero, whatever pixels are near; in 16 bits that would be a sixth of the loop.
        sampled = (w.w00 != 0) | (w.w01 != 0) | (w.w10 != 0) | (w.w11 != 0)
        s = tl.where(sampled[:, None], s, 0.0)
    return s.to(K.TYPE)


@triton.jit
def output_pixels(tile, number, K: tl.constexpr):
    """(PIXELS,) numbers of a tile's pixels in their image, for one that does not exist that of another; which exist."""
    pixels = tile_pixels(tile.number, number, tile.HO, tile.WO, K.TILE_H, K.TILE_W)
    y, x = tl.minimum(pixels.y, tile.HO - 1), tl.minimum(pixels.x, tile.WO - 1)
    return y.to(K.INDEX) * tile.WO + x, pixels.inside


@triton.jit
def column_slice(x, number: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, SLICE: tl.constexpr):
    """(ROWS, SLICE): one of PARTS, up to four, slices of the columns of a matrix."""
    if PARTS == 4:
        one, two = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, 2 * SLICE)), (0, 2, 1)))
        part = column_slice(one if number < 2 else two, number % 2, ROWS, 2, SLICE)
    elif PARTS == 2:
        one, two = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, SLICE)), (0, 2, 1)))
        part = one if number == 0 else two
    else:
        part = x
    return part


@triton.jit(do_not_specialize=["H", "W", "HO", "WO", "rows"])
def forward_kernel(x, weight, bias, plan, out, sums, tables, H, W, HO, WO, rows, K: tl.constexpr):
    """Grid (tiles, GROUPS * blocks of OUT): `out` (rows, OUT*GROUPS).

    `x` is (pixels, C*GROUPS), `weight` (branches, GROUPS, TAPS, C, OUT), in 32 and 64 bits
    (branches, GROUPS, OUT, TAPS, C); `bias` may be None. Where K.TABLED there are
    `Sums` as well.
    """
    tile = locate_tile(tl.program_id(0), tables, Sizes(H, W, HO, WO), K)
    blocks: tl.constexpr = (K.OUT + K.BLOCK_O - 1) // K.BLOCK_O
    group = tl.program_id(1) // blocks
    begin, o = (tl.program_id(1) % blocks) * K.BLOCK_O, tl.arange(0, K.BLOCK_O)
    pixel, _ = output_pixels(tile, lane_pixels(K), K)
    x += tile.source * (K.C * K.GROUPS)
    weight += (tile.branch * K.GROUPS + group) * (K.TAPS * K.C * K.OUT)
    total = tl.zeros((K.TILE_H * K.TILE_W, K.BLOCK_O), dtype=K.REAL)
    steps: tl.constexpr = K.TAPS * (K.C // K.SPAN) * ((K.SPAN + K.BLOCK_C - 1) // K.BLOCK_C)
    order = operand_channels(K)
    values = load_step(0, group, x, plan, rows, tile, pixel, None, K)
    for step in range(steps):
        samples = mix(values, K)
        values = load_step(tl.minimum(step + 1, steps - 1), group, x, plan, rows, tile, pixel, None, K)
        first, left = first_channel(step // K.TAPS, K)
        weights = load_weight(weight, step % K.TAPS * K.C + first, order, left, o, begin, K)
        total = tl.dot(operand_order(samples, K), weights, total, input_precision=K.PRECISION, out_dtype=K.REAL)
    known = begin + o < K.OUT
    if bias is not None:
        total += tl.load(bias + group * K.OUT + begin + o, mask=known, other=0.0).to(K.REAL)[None, :]
    number = tl.arange(0, K.TILE_H * K.TILE_W)
    pixel, inside = output_pixels(tile, number, K)
    target = out + (tile.first + pixel) * (K.OUT * K.GROUPS) + group * K.OUT + begin
    tl.store(target[:, None] + o[None, :], total.to(K.TYPE), mask=inside[:, None] & known[None, :])
    if K.TABLED:
        pixels = tile_pixels(tile.number, number, tile.HO, tile.WO, K.TILE_H, K.TILE_W)
        # All at once they take more registers than there are.
        PARTS: tl.constexpr = 4 if K.BLOCK_O > 128 else 1
        SLICE: tl.constexpr = K.BLOCK_O // PARTS
        for part in tl.static_range(PARTS):
            # The statistics are those of what is stored, so that the normalised maps have mean 0 and variance 1.
            piece = column_slice(total, part, K.TILE_H * K.TILE_W, PARTS, SLICE).to(K.TYPE).to(K.REAL)
            c = begin + part * SLICE + tl.arange(0, SLICE)
            store_sums(piece, pixels, sums, tile.problem, c, c < K.OUT, K.OUT, K.REAL)
