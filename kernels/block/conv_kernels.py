"""The deformable convolutions of a DyHead block, of all levels and branches, as one Triton kernel.

The kernel is `forward_kernel` of `kernels.deform_conv.kernels`, whose pieces it uses, with two differences. A program
looks up in a table which of the block's convolutions its tile belongs to, so that small levels fill the GPU together
with large ones. And it leaves the sums over its tile that the mean, the variance and the upsampled mean of the output
are made of, so that nobody reads the output for them.

Matrices and tables are those of `kernels.block.layout`.
"""

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
from kernels.deform_conv.kernels import find_corners, load_rows, mix_corners, tile_pixels

CHANNELS = tl.constexpr(27)
MASKS = tl.constexpr(18)


@triton.jit
def locate_tile(tile, problems, work, coarser_rows, CROP: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """What a tile is made of.

    Its problem's row of the table; height, width and first row of the map it samples, and the stride; its pixels'
    coordinates, and which of them exist; their rows of the sampled maps, and of the predictions. A pixel's offsets and
    mask are in the row of the pixel of the level it is for; those of a coarser neighbour in that of the same
    coordinates (CROP), or in a row of their own, `coarser_rows` after the row of the output.
    """
    entry = work + tile * 3
    row = problems + tl.load(entry) * PROBLEM_COLUMNS
    image, number = tl.load(entry + 1).to(tl.int64), tl.load(entry + 2)
    H, W = tl.load(row + HEIGHT), tl.load(row + WIDTH)
    HO, WO = tl.load(row + OUT_HEIGHT), tl.load(row + OUT_WIDTH)
    ho, wo, inside = tile_pixels(number, HO, WO, TILE_H, TILE_W)
    place = tl.load(row + OUTPUT_ROW) + image * HO * WO + ho * WO + wo
    target_w = tl.load(row + TARGET_WIDTH)
    own = tl.load(row + TARGET_ROW) + image * tl.load(row + TARGET_HEIGHT) * target_w + ho * target_w + wo
    if not CROP:
        own = tl.where(tl.load(row + BRANCH) == 2, place + coarser_rows, own)
    return row, H, W, tl.load(row + INPUT_ROW) + image * H * W, tl.load(row + STRIDE), ho, wo, inside, place, own


@triton.jit
def locate_sample(tap, predicted, ho, wo, inside, stride, SIGMOID: tl.constexpr, REAL: tl.constexpr):
    """Where a tap samples, y and x, and its mask; `predicted` points to the rows of the pixels."""
    dy = tl.load(predicted + 2 * tap, mask=inside, other=0.0).to(REAL)
    dx = tl.load(predicted + (2 * tap + 1), mask=inside, other=0.0).to(REAL)
    factor = tl.load(predicted + (MASKS + tap), mask=inside, other=0.0).to(REAL)
    if SIGMOID:
        factor = 1 / (1 + tl.exp(-factor))
    return (ho * stride - 1 + tap // 3).to(REAL) + dy, (wo * stride - 1 + tap % 3).to(REAL) + dx, factor


@triton.jit
def locate_step(
    step, x, predicted, ho, wo, inside, stride, H, W,
    C: tl.constexpr, SIGMOID: tl.constexpr, BLOCK_C: tl.constexpr, REAL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The corners (PIXELS, BLOCK_C) of one tap and block of channels, and their weights (PIXELS,)."""
    c = step // 9 * BLOCK_C + tl.arange(0, BLOCK_C)
    y, xx, factor = locate_sample(step % 9, predicted, ho, wo, inside, stride, SIGMOID, REAL)
    p00, p01, p10, p11, w00, w01, w10, w11, h00, h01, h10, h11 = find_corners(y, xx, factor, inside, H, W, INDEX)
    even: tl.constexpr = C % BLOCK_C == 0
    v00 = load_rows(x, p00, h00, c, c < C, C, even)
    v01 = load_rows(x, p01, h01, c, c < C, C, even)
    v10 = load_rows(x, p10, h10, c, c < C, C, even)
    v11 = load_rows(x, p11, h11, c, c < C, C, even)
    return v00, v01, v10, v11, w00, w01, w10, w11


@triton.jit
def forward_kernel(
    pyramid, predicted, weight, sampled, partial, axes, problems, work, coarser_rows,
    C: tl.constexpr, CROP: tl.constexpr, SIGMOID: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, REAL: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, blocks of C). `predicted` is (rows, 27), `weight` (3, C, 9, C), `partial` (tiles, 3, C)."""
    row, H, W, source, stride, ho, wo, inside, place, own = locate_tile(
        tl.program_id(0), problems, work, coarser_rows, CROP, TILE_H, TILE_W
    )
    predicted += own * CHANNELS
    x = pyramid + source * C
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = weight + (tl.load(row + BRANCH) * C + o) * (9 * C)
    total = tl.zeros((TILE_H * TILE_W, BLOCK_O), dtype=REAL)
    steps: tl.constexpr = 9 * ((C + BLOCK_C - 1) // BLOCK_C)
    v00, v01, v10, v11, w00, w01, w10, w11 = locate_step(
        0, x, predicted, ho, wo, inside, stride, H, W, C, SIGMOID, BLOCK_C, REAL, INDEX
    )
    for step in range(steps):
        samples = mix_corners(v00, v01, v10, v11, w00, w01, w10, w11, REAL).to(pyramid.dtype.element_ty)
        v00, v01, v10, v11, w00, w01, w10, w11 = locate_step(
            tl.minimum(step + 1, steps - 1), x, predicted, ho, wo, inside, stride, H, W,
            C, SIGMOID, BLOCK_C, REAL, INDEX,
        )  # fmt: skip
        c = step // 9 * BLOCK_C + tl.arange(0, BLOCK_C)
        weights = tl.load(
            rows[None, :] + (step % 9 * C + c)[:, None], mask=(c < C)[:, None] & (o < C)[None, :], other=0.0
        )
        total = tl.dot(samples, weights, total, input_precision=PRECISION, out_dtype=REAL)
    # The statistics are those of what is stored, so that the normalised maps have mean 0 and variance 1.
    rounded = total.to(sampled.dtype.element_ty)
    tl.store(sampled + place[:, None] * C + o[None, :], rounded, mask=inside[:, None] & (o < C)[None, :])
    store_sums(rounded.to(REAL), inside, ho, wo, partial, axes, row, o, o < C, C, REAL)
