"""The gradients of a block's deformable convolutions, of all levels and branches together, as Triton kernels.

They are the kernels of `kernels.deform_conv.kernels` that recompute the samples, over the tables of
`kernels.block.layout`. The pyramid's gradient is added up by atomics, or, by the kernels of
`kernels.deform_conv.inverse_kernels`, without; all other numbers are written by one program or summed in an order that
shapes alone decide.
"""

import triton
import triton.language as tl

from kernels.block.conv_kernels import CHANNELS, MASKS, locate_sample, locate_step, locate_tile
from kernels.block.layout import (
    BRANCH,
    COARSER_HEIGHT,
    COARSER_ROW,
    COARSER_WIDTH,
    FINER_ROW,
    LEVEL_COLUMNS,
    SAME_ROW,
    SOURCE,
)
from kernels.block.sums import work_item
from kernels.deform_conv.inverse_kernels import bins_along, collect, store_samples
from kernels.deform_conv.kernels import (
    add_rows,
    find_corners,
    load_gradient,
    load_rows,
    mix_corners,
    point_gradients,
    tile_pixels,
)


@triton.jit
def backward_points_kernel(
    grad, pyramid, predicted, weight, grad_pyramid, partial, problems, work, coarser_rows, sampled_rows,
    C: tl.constexpr, CROP: tl.constexpr, SIGMOID: tl.constexpr, TO_PYRAMID: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    REAL: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * 9,): what the samples of one tap give to their offsets and masks, and to the pyramid.

    `weight` is (3, 9, C, C), output channels last. `partial` is (27, Q) of type REAL, in the order of `predicted`: rows
    of that are used by several problems, and these are their parts. `grad_pyramid`, of type REAL, is added to.
    """
    # The taps of a tile run side by side: they read the same gradients and neighbouring pixels.
    tap = tl.program_id(0) % 9
    row, H, W, source, stride, ho, wo, inside, place, own = locate_tile(
        tl.program_id(0) // 9, problems, work, coarser_rows, CROP, TILE_H, TILE_W
    )
    pyramid += source * C
    grad_pyramid += source * C
    predicted += own * CHANNELS
    weight += tl.load(row + BRANCH) * (9 * C * C)
    grad_rows = (grad + place * C)[:, None]
    even: tl.constexpr = C % BLOCK_C == 0
    whole: tl.constexpr = BLOCK_O >= C
    if whole:
        o = tl.arange(0, BLOCK_O)
        gradient = load_gradient(grad_rows, o, inside, o < C)
    y, x, factor = locate_sample(tap, predicted, ho, wo, inside, stride, SIGMOID, REAL)
    p00, p01, p10, p11, w00, w01, w10, w11, h00, h01, h10, h11 = find_corners(y, x, factor, inside, H, W, INDEX)
    # The products of the sample's gradient with its four corners, over all channels.
    s00 = tl.zeros((TILE_H * TILE_W,), dtype=REAL)
    s01 = tl.zeros((TILE_H * TILE_W,), dtype=REAL)
    s10 = tl.zeros((TILE_H * TILE_W,), dtype=REAL)
    s11 = tl.zeros((TILE_H * TILE_W,), dtype=REAL)
    for block in range((C + BLOCK_C - 1) // BLOCK_C):
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        column = tl.zeros((TILE_H * TILE_W, BLOCK_C), dtype=REAL)
        for start in range(0, C, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            if not whole:
                gradient = load_gradient(grad_rows, o, inside, o < C)
            weights = tl.load(
                weight + (tap * C + c)[None, :] * C + o[:, None],
                mask=(c < C)[None, :] & (o < C)[:, None],
                other=0.0,
            )
            column = tl.dot(gradient, weights, column, input_precision=PRECISION, out_dtype=REAL)
        s00 += tl.sum(load_rows(pyramid, p00, h00, c, c < C, C, even).to(REAL) * column, 1)
        s01 += tl.sum(load_rows(pyramid, p01, h01, c, c < C, C, even).to(REAL) * column, 1)
        s10 += tl.sum(load_rows(pyramid, p10, h10, c, c < C, C, even).to(REAL) * column, 1)
        s11 += tl.sum(load_rows(pyramid, p11, h11, c, c < C, C, even).to(REAL) * column, 1)
        if TO_PYRAMID:
            add_rows(grad_pyramid, p00, w00, h00, column, c, c < C, C)
            add_rows(grad_pyramid, p01, w01, h01, column, c, c < C, C)
            add_rows(grad_pyramid, p10, w10, h10, column, c, c < C, C)
            add_rows(grad_pyramid, p11, w11, h11, column, c, c < C, C)
    down, right, along = point_gradients(s00, s01, s10, s11, y, x, factor, h00 | h01 | h10 | h11)
    if SIGMOID:
        along *= factor * (1 - factor)
    # Neighbouring pixels lie side by side: a whole row of `predicted` is never at hand.
    target = partial + place
    tl.store(target + (2 * tap).to(tl.int64) * sampled_rows, down, mask=inside)
    tl.store(target + (2 * tap + 1).to(tl.int64) * sampled_rows, right, mask=inside)
    tl.store(target + (tap + MASKS).to(tl.int64) * sampled_rows, along, mask=inside)


@triton.jit
def backward_predicted_kernel(
    partial, grad_predicted, levels, work, sampled_rows, CROP: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Grid (runs,): adds up what the problems of a level give to its rows of `predicted`, in the order of branches."""
    level, image, number = work_item(work)
    row = levels + level * LEVEL_COLUMNS
    H, W = tl.load(row), tl.load(row + 1)
    pixel = number * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, 32)
    known = (channel < CHANNELS)[None, :]
    inside = (pixel < H * W)[:, None] & known
    image = image.to(tl.int64)
    # The maps of the levels themselves are the first of the problems, in the order of the levels.
    place = tl.load(row + SAME_ROW) + image * H * W + pixel
    parts = partial + channel.to(tl.int64)[None, :] * sampled_rows
    total = tl.load(parts + place[:, None], mask=inside, other=0.0)
    finer = tl.load(row + FINER_ROW)
    other = finer + image * H * W + pixel
    total += tl.load(parts + other[:, None], mask=inside & (finer >= 0), other=0.0)
    if CROP:
        coarser, height, width = tl.load(row + COARSER_ROW), tl.load(row + COARSER_HEIGHT), tl.load(row + COARSER_WIDTH)
        y, x = pixel // W, pixel % W
        other = coarser + image * height * width + y * width + x
        corner = (coarser >= 0) & (y < height) & (x < width)
        total += tl.load(parts + other[:, None], mask=inside & corner[:, None], other=0.0)
    target = grad_predicted + place[:, None] * CHANNELS + channel[None, :]
    tl.store(target, total.to(grad_predicted.dtype.element_ty), mask=inside)


@triton.jit
def _tile_step(
    tile, step, pyramid, predicted, problems, work, coarser_rows,
    C: tl.constexpr, CROP: tl.constexpr, SIGMOID: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr, REAL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The corners of one step of a tile and their weights; then the rows of its pixels, and which of them exist."""
    _, H, W, source, stride, ho, wo, inside, place, own = locate_tile(
        tile, problems, work, coarser_rows, CROP, TILE_H, TILE_W
    )
    v00, v01, v10, v11, w00, w01, w10, w11 = locate_step(
        step, pyramid + source * C, predicted + own * CHANNELS, ho, wo, inside, stride, H, W,
        C, SIGMOID, BLOCK_C, REAL, INDEX,
    )  # fmt: skip
    return v00, v01, v10, v11, w00, w01, w10, w11, place, inside


@triton.jit
def backward_weight_kernel(
    grad, pyramid, predicted, partial, problems, work, splits, coarser_rows,
    C: tl.constexpr, CROP: tl.constexpr, SIGMOID: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, TILES: tl.constexpr,
    REAL: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (9 * blocks of input channels, blocks of output channels, splits): a split sums over TILES of one branch.

    `splits` (splits, 2) int32 has the first tile of every split and the end of its branch's; `partial` is
    (splits, C, 9, C) of type REAL.
    """
    step = tl.program_id(0)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    first, end = tl.load(splits + tl.program_id(2) * 2), tl.load(splits + tl.program_id(2) * 2 + 1)
    total = tl.zeros((BLOCK_O, BLOCK_C), dtype=REAL)
    v00, v01, v10, v11, w00, w01, w10, w11, place, inside = _tile_step(
        first, step, pyramid, predicted, problems, work, coarser_rows,
        C, CROP, SIGMOID, TILE_H, TILE_W, BLOCK_C, REAL, INDEX,
    )  # fmt: skip
    for i in range(TILES):
        samples = mix_corners(v00, v01, v10, v11, w00, w01, w10, w11, REAL).to(pyramid.dtype.element_ty)
        # The last split of a branch may have fewer tiles: what it computes beyond them has no gradient.
        gradient = load_gradient((grad + place * C)[:, None], o, inside & (first + i < end), o < C)
        v00, v01, v10, v11, w00, w01, w10, w11, place, inside = _tile_step(
            tl.minimum(first + i + 1, end - 1), step, pyramid, predicted, problems, work, coarser_rows,
            C, CROP, SIGMOID, TILE_H, TILE_W, BLOCK_C, REAL, INDEX,
        )  # fmt: skip
        total = tl.dot(tl.trans(gradient), samples, total, input_precision=PRECISION, out_dtype=REAL)
    c = step // 9 * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = partial + (tl.program_id(2).to(tl.int64) * C + o) * (9 * C)
    tl.store(rows[:, None] + (step % 9 * C + c)[None, :], total, mask=(o < C)[:, None] & (c < C)[None, :])


@triton.jit
def bins_kernel(
    predicted, keys, places, problems, work, level_bins, coarser_rows, sampled_rows, bins,
    CROP: tl.constexpr, SIGMOID: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BIN_H: tl.constexpr, BIN_W: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, 9): `store_samples` for one tap; `level_bins` (L,) int32 has the first of a level's bins.

    A sample's number is tap * Q + row, and a branch's taps follow those of the branch before: each has `bins`.
    """
    tap = tl.program_id(1)
    row, H, W, _, stride, ho, wo, inside, place, own = locate_tile(
        tl.program_id(0), problems, work, coarser_rows, CROP, TILE_H, TILE_W
    )
    y, x, factor = locate_sample(tap, predicted + own * CHANNELS, ho, wo, inside, stride, SIGMOID, REAL)
    image = tl.load(work + tl.program_id(0) * 3 + 1)
    first = (tl.load(row + BRANCH) * 9 + tap) * bins + tl.load(level_bins + tl.load(row + SOURCE))
    first += image * bins_along(H, BIN_H) * bins_along(W, BIN_W)
    sample = tap.to(tl.int64) * sampled_rows + place
    store_samples(keys, places, sample, inside, y, x, factor, H, W, first, 27 * bins, BIN_H, BIN_W)


@triton.jit
def backward_pyramid_kernel(
    grad, weight, order, places, starts, grad_pyramid, levels, work, level_bins, sampled_rows, bins,
    C: tl.constexpr, TAPS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, ENTRIES: tl.constexpr, REAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of levels, blocks of C): the gradient of the pyramid, from the first TAPS of its 27 taps.

    `weight` is (3, 9, C, C), output channels last; `order`, `places` and `starts` are as in `collect`.
    """
    level, image, number = work_item(work)
    row = levels + level * LEVEL_COLUMNS
    H, W = tl.load(row), tl.load(row + 1)
    i, j, inside = tile_pixels(number, H, W, TILE_H, TILE_W)
    across, pitch = tl.cdiv(W, TILE_W), bins_along(W, TILE_W)
    starts += tl.load(level_bins + level) + image * bins_along(H, TILE_H) * pitch
    starts += number // across * 2 * pitch + number % across * 2
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = collect(
        grad, weight, order, places, starts, bins, pitch, tl.cast(sampled_rows, tl.int64), 0, i, j, c, c < C,
        C, C, C, TAPS, 9, BLOCK_O, ENTRIES, REAL, PRECISION,
    )  # fmt: skip
    # The maps of the levels themselves are the first of the problems, in the order of the levels.
    place = tl.load(row + SAME_ROW) + image.to(tl.int64) * H * W + i * W + j
    pointers = grad_pyramid + place[:, None] * C + c[None, :]
    tl.store(pointers, total.to(grad_pyramid.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])
