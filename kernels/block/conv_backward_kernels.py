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
from kernels.sampling.kernels import (
    add_corners,
    add_products,
    find_corners,
    load_gradient,
    mix_corners,
    no_products,
    point_gradients,
    tile_pixels,
)


@triton.jit
def backward_points_kernel(
    grad,
    pyramid,
    predicted,
    weight,
    grad_pyramid,
    partial,
    tables,
    sampled_rows,
    K: tl.constexpr,
    TO_PYRAMID: tl.constexpr,
):
    """Grid (tiles * 9,): what the samples of one tap give to their offsets and masks, and to the pyramid.

    `weight` is (3, 9, C, C), output channels last. `partial` is (27, Q) of type REAL, in the order of `predicted`: rows
    of that are used by several problems, and these are their parts. `grad_pyramid`, of type REAL, is added to.
    """
    # The taps of a tile run side by side: they read the same gradients and neighbouring pixels.
    tap = tl.program_id(0) % 9
    tile = locate_tile(tl.program_id(0) // 9, tables, K)
    inside = tile.pixels.inside
    pyramid += tile.source * K.C
    grad_pyramid += tile.source * K.C
    weight += tl.load(tile.row + BRANCH) * (9 * K.C * K.C)
    grad_rows = (grad + tile.place * K.C)[:, None]
    whole: tl.constexpr = K.BLOCK_O >= K.C
    if whole:
        o = tl.arange(0, K.BLOCK_O)
        gradient = load_gradient(grad_rows, o, inside, o < K.C)
    sample = locate_sample(tap, predicted + tile.predicted * CHANNELS, tile, K)
    corners = find_corners(sample, inside, tile.H, tile.W, K.INDEX)
    products = no_products(K.TILE_H * K.TILE_W, K.REAL)
    for block in range((K.C + K.BLOCK_C - 1) // K.BLOCK_C):
        c = block * K.BLOCK_C + tl.arange(0, K.BLOCK_C)
        column = tl.zeros((K.TILE_H * K.TILE_W, K.BLOCK_C), dtype=K.REAL)
        for start in range(0, K.C, K.BLOCK_O):
            o = start + tl.arange(0, K.BLOCK_O)
            if not whole:
                gradient = load_gradient(grad_rows, o, inside, o < K.C)
            weights = tl.load(
                weight + (tap * K.C + c)[None, :] * K.C + o[:, None],
                mask=(c < K.C)[None, :] & (o < K.C)[:, None],
                other=0.0,
            )
            column = tl.dot(gradient, weights, column, input_precision=K.PRECISION, out_dtype=K.REAL)
        products = add_products(products, column, pyramid, corners, c, c < K.C, K.C, K.C % K.BLOCK_C == 0, K.REAL)
        if TO_PYRAMID:
            add_corners(grad_pyramid, corners, column, c, c < K.C, K.C)
    down, right, along = point_gradients(products, sample, corners)
    if K.SIGMOID:
        along *= sample.mask * (1 - sample.mask)
    # Neighbouring pixels lie side by side: a whole row of `predicted` is never at hand.
    target = partial + tile.place
    tl.store(target + (2 * tap).to(tl.int64) * sampled_rows, down, mask=inside)
    tl.store(target + (2 * tap + 1).to(tl.int64) * sampled_rows, right, mask=inside)
    tl.store(target + (tap + MASKS).to(tl.int64) * sampled_rows, along, mask=inside)


@triton.jit
def backward_predicted_kernel(
    partial, grad_predicted, levels, work, sampled_rows, CROP: tl.constexpr, PIXELS: tl.constexpr
):
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
def _tile_step(number, step, pyramid, predicted, tables, K: tl.constexpr):
    """The `Values` of one step of a tile; then the rows of its pixels, and which of them exist."""
    tile = locate_tile(number, tables, K)
    values = locate_step(step, pyramid + tile.source * K.C, predicted + tile.predicted * CHANNELS, tile, K)
    return values, tile.place, tile.pixels.inside


@triton.jit
def backward_weight_kernel(grad, pyramid, predicted, partial, tables, splits, K: tl.constexpr, TILES: tl.constexpr):
    """Grid (9 * blocks of input channels, blocks of output channels, splits): a split sums over TILES of one branch.

    `splits` (splits, 2) int32 has the first tile of every split and the end of its branch's; `partial` is
    (splits, C, 9, C) of type REAL.
    """
    step = tl.program_id(0)
    o = tl.program_id(1) * K.BLOCK_O + tl.arange(0, K.BLOCK_O)
    first, end = tl.load(splits + tl.program_id(2) * 2), tl.load(splits + tl.program_id(2) * 2 + 1)
    total = tl.zeros((K.BLOCK_O, K.BLOCK_C), dtype=K.REAL)
    values, place, inside = _tile_step(first, step, pyramid, predicted, tables, K)
    for i in range(TILES):
        samples = mix_corners(values, K.REAL).to(pyramid.dtype.element_ty)
        # The last split of a branch may have fewer tiles: what it computes beyond them has no gradient.
        gradient = load_gradient((grad + place * K.C)[:, None], o, inside & (first + i < end), o < K.C)
        values, place, inside = _tile_step(tl.minimum(first + i + 1, end - 1), step, pyramid, predicted, tables, K)
        total = tl.dot(tl.trans(gradient), samples, total, input_precision=K.PRECISION, out_dtype=K.REAL)
    c = step // 9 * K.BLOCK_C + tl.arange(0, K.BLOCK_C)
    rows = partial + (tl.program_id(2).to(tl.int64) * K.C + o) * (9 * K.C)
    tl.store(rows[:, None] + (step % 9 * K.C + c)[None, :], total, mask=(o < K.C)[:, None] & (c < K.C)[None, :])


@triton.jit
def bins_kernel(
    predicted,
    keys,
    places,
    tables,
    level_bins,
    sampled_rows,
    bins,
    K: tl.constexpr,
    BIN_H: tl.constexpr,
    BIN_W: tl.constexpr,
):
    """Grid (tiles, 9): `store_samples` for one tap; `level_bins` (L,) int32 has the first of a level's bins.

    A sample's number is tap * Q + row, and a branch's taps follow those of the branch before: each has `bins`.
    """
    tap = tl.program_id(1)
    tile = locate_tile(tl.program_id(0), tables, K)
    sample = locate_sample(tap, predicted + tile.predicted * CHANNELS, tile, K)
    image = tl.load(tables.work + tl.program_id(0) * 3 + 1)
    first = (tl.load(tile.row + BRANCH) * 9 + tap) * bins + tl.load(level_bins + tl.load(tile.row + SOURCE))
    first += image * bins_along(tile.H, BIN_H) * bins_along(tile.W, BIN_W)
    number = tap.to(tl.int64) * sampled_rows + tile.place
    inside = tile.pixels.inside
    store_samples(keys, places, number, inside, sample, tile.H, tile.W, first, 27 * bins, BIN_H, BIN_W)


@triton.jit
def backward_pyramid_kernel(
    grad,
    weight,
    order,
    places,
    starts,
    grad_pyramid,
    levels,
    work,
    level_bins,
    sampled_rows,
    bins,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Grid (tiles of levels, blocks of C): the gradient of the pyramid, from the first TAPS of its 27 taps.

    `weight` is (3, 9, C, C), output channels last; `order`, `places` and `starts` are as in `collect`.
    """
    level, image, number = work_item(work)
    row = levels + level * LEVEL_COLUMNS
    H, W = tl.load(row), tl.load(row + 1)
    pixels = tile_pixels(number, H, W, K.TILE_H, K.TILE_W)
    across, pitch = tl.cdiv(W, K.TILE_W), bins_along(W, K.TILE_W)
    starts += tl.load(level_bins + level) + image * bins_along(H, K.TILE_H) * pitch
    starts += number // across * 2 * pitch + number % across * 2
    c = tl.program_id(1) * K.BLOCK_C + tl.arange(0, K.BLOCK_C)
    rows = tl.cast(sampled_rows, tl.int64)
    total = collect(
        grad, weight, order, places, starts, bins, pitch, rows, 0, pixels, c, c < K.C, K.C, K.C, TAPS, 9, ENTRIES, K
    )
    # The maps of the levels themselves are the first of the problems, in the order of the levels.
    place = tl.load(row + SAME_ROW) + image.to(tl.int64) * H * W + pixels.y * W + pixels.x
    pointers = grad_pyramid + place[:, None] * K.C + c[None, :]
    tl.store(pointers, total.to(grad_pyramid.dtype.element_ty), mask=pixels.inside[:, None] & (c < K.C)[None, :])
