"""The gradients of the matrix products over bilinear samples: of the samples, of their map, of the weight.

They read the plan that forward read and load the pixels again. The gradient of a sample is the result of a product, of
which a lane has pairs of channels; it is multiplied with pixels as lanes load them, so the weight's rows are in the
order that `kernels.sampling.product_kernels` explains. Names as there.
"""

import triton
import triton.language as tl

from kernels.sampling.maps import Sizes, locate_tile
from kernels.sampling.plan_kernels import load_weights
from kernels.sampling.product_kernels import (
    all_samples,
    at_point,
    column_slice,
    first_channel,
    lane_order,
    lane_pixels,
    load_outputs,
    load_pixels,
    load_step,
    mix,
    neighbours,
    operand_channels,
    output_pixels,
)


@triton.jit
def _load_transposed(weight, row, columns, left, o, begin, K: tl.constexpr):
    """(BLOCK_O, BLOCK_C): the transpose of outputs begin + o of channels row + columns of a weight (., OUT)."""
    pointers = weight + row * K.OUT + begin + (columns * K.OUT)[None, :] + o[:, None]
    if K.SPAN % K.BLOCK_C == 0 and K.OUT % K.BLOCK_O == 0:
        weights = tl.load(pointers)
    else:
        weights = tl.load(pointers, mask=(columns < left)[None, :] & (begin + o < K.OUT)[:, None], other=0.0)
    return weights


@triton.jit
def _lane_sums(values, column, K: tl.constexpr):
    """(PIXELS, lanes of a pixel): sums over the channels that a lane has."""
    products = values.to(K.REAL) * column
    SLICE: tl.constexpr = products.shape[1]
    EACH: tl.constexpr = 8 if K.PACKED else 4
    return tl.sum(tl.reshape(products, (K.TILE_H * K.TILE_W, SLICE // EACH, EACH)), 2)


@triton.jit
def _add_pixels(grad_x, tile, pixel, inside, w, piece, left, K: tl.constexpr):
    """Add what a slice of a column's gradient gives to the map at the four pixels of samples, whose `Weights` are w."""
    COLUMNS: tl.constexpr = piece.shape[1]
    if K.SWAPPED:
        # A lane has 8 channels, an addition takes 4: first the lower ones of all lanes, then the upper ones.
        split = tl.permute(tl.reshape(piece, (piece.shape[0], COLUMNS // 8, 2, 4)), (0, 1, 3, 2))
        lower, upper = tl.split(split)
        c = tl.arange(0, COLUMNS // 2)
        c = c // 4 * 8 + c % 4
        lower = tl.reshape(lower, (piece.shape[0], COLUMNS // 2))
        upper = tl.reshape(upper, (piece.shape[0], COLUMNS // 2))
        _add_channels(grad_x, tile, pixel, inside, w, lower, c, left, K)
        _add_channels(grad_x + 4, tile, pixel, inside, w, upper, c, left - 4, K)
    else:
        _add_channels(grad_x, tile, pixel, inside, w, piece, tl.arange(0, COLUMNS), left, K)


@triton.jit
def _add_channels(grad_x, tile, pixel, inside, w, piece, c, left, K: tl.constexpr):
    right, down = neighbours(tile, K)
    first = grad_x + (pixel.to(K.INDEX) * (K.C * K.GROUPS))[:, None] + c[None, :]
    known = inside[:, None] & (c < left)[None, :]
    second = first + down
    _add_pixel(first, w.w00.to(K.REAL), piece, known)
    _add_pixel(first + right, w.w01.to(K.REAL), piece, known)
    _add_pixel(second, w.w10.to(K.REAL), piece, known)
    _add_pixel(second + right, w.w11.to(K.REAL), piece, known)


@triton.jit
def _add_pixel(pointers, w, piece, known):
    tl.atomic_add(pointers, piece * w[:, None], mask=known & (w != 0)[:, None], sem="relaxed")


@triton.jit(do_not_specialize=["H", "W", "HO", "WO", "rows", "each"])
def samples_kernel(
    grad,
    x,
    weight,
    plan,
    products,
    grad_x,
    tables,
    H,
    W,
    HO,
    WO,
    rows,
    each,
    K: tl.constexpr,
):
    """Grid (tiles, splits of the points): the gradients of samples, and from them those of weights and map.

    A program takes `each` points. `grad` is (rows, OUT*GROUPS), `x` (pixels, C*GROUPS), `weight` (branches, GROUPS,
    TAPS, C, OUT); `products` (samples, 4), of type REAL, are the gradients of the plan's weights; `grad_x`, of type
    REAL, is added to. Either may be None.
    """
    PIXELS: tl.constexpr = K.TILE_H * K.TILE_W
    SLICE: tl.constexpr = 32 if K.BLOCK_C > 32 else K.BLOCK_C
    LANES: tl.constexpr = SLICE // (8 if K.PACKED else 4)
    points: tl.constexpr = K.C * K.GROUPS // K.SHARE * K.TAPS
    blocks: tl.constexpr = K.SHARE // K.SPAN * ((K.SPAN + K.BLOCK_C - 1) // K.BLOCK_C)
    whole: tl.constexpr = K.GROUPS == 1 and K.BLOCK_O >= K.OUT
    tile = locate_tile(tl.program_id(0), tables, Sizes(H, W, HO, WO), K)
    pixel, inside = output_pixels(tile, lane_pixels(K), K)
    x += tile.source * (K.C * K.GROUPS)
    if grad_x is not None:
        grad_x += tile.source * (K.C * K.GROUPS)
    weight += tile.branch * (K.GROUPS * K.TAPS * K.C * K.OUT)
    natural, _ = output_pixels(tile, tl.arange(0, PIXELS), K)
    gradients = (grad + (tile.first + natural) * (K.OUT * K.GROUPS))[:, None]
    order, c, o = operand_channels(K), tl.arange(0, SLICE), tl.arange(0, K.BLOCK_O)
    if whole:
        gradient = load_outputs(gradients, o, 0, K)
    s00 = tl.zeros((PIXELS, LANES), dtype=K.REAL)
    s01, s10, s11 = s00, s00, s00
    begin = tl.program_id(1) * each
    for step in range(begin * blocks, tl.minimum(begin + each, points) * blocks):
        point, block = step // blocks, step % blocks
        at = at_point(plan, point, rows, tile)
        place = tl.load(at.pixels + pixel)
        first, left = first_channel(block, K)
        first += point // K.TAPS * K.SHARE
        # All channels of a block lie in one weight group.
        group = first // K.C
        row = (group * K.TAPS + point % K.TAPS - group) * K.C + first
        if whole:
            weights = _load_transposed(weight, row, order, left, o, 0, K)
            column = tl.dot(gradient, weights, input_precision=K.PRECISION, out_dtype=K.REAL)
        else:
            column = tl.zeros((PIXELS, K.BLOCK_C), dtype=K.REAL)
            for start in range(0, K.OUT, K.BLOCK_O):
                gradient = load_outputs(gradients + group * K.OUT, o, start, K)
                weights = _load_transposed(weight, row, order, left, o, start, K)
                column = tl.dot(gradient, weights, column, input_precision=K.PRECISION, out_dtype=K.REAL)
        column = lane_order(column, K)
        for part in tl.static_range(K.BLOCK_C // SLICE):
            piece = column_slice(column, part, PIXELS, K.BLOCK_C // SLICE, SLICE)
            start = first + part * SLICE
            if products is not None:
                v00, v01, v10, v11 = load_pixels(x + start, tile, place, c, left - part * SLICE, K.BLOCK_C, K)
                s00 += _lane_sums(v00, piece, K)
                s01 += _lane_sums(v01, piece, K)
                s10 += _lane_sums(v10, piece, K)
                s11 += _lane_sums(v11, piece, K)
            if grad_x is not None:
                w = load_weights(at, pixel, all_samples(rows, K), None, K)
                _add_pixels(grad_x + start, tile, place, inside, w, piece, left - part * SLICE, K)
        if products is not None:  # noqa: SIM102
            # A condition of its own: the first one is decided at compilation.
            if block == blocks - 1:
                sums = tl.join(tl.join(tl.sum(s00, 1), tl.sum(s10, 1)), tl.join(tl.sum(s01, 1), tl.sum(s11, 1)))
                target = products + (tl.cast(point, tl.int64) * rows + tile.first) * 4
                target += (pixel * 4)[:, None] + tl.arange(0, 4)[None, :]
                tl.store(target, tl.reshape(sums, (PIXELS, 4)), mask=inside[:, None])
                s00 = tl.zeros((PIXELS, LANES), dtype=K.REAL)
                s01, s10, s11 = s00, s00, s00


@triton.jit(do_not_specialize=["H", "W", "HO", "WO", "rows", "each", "tiles"])
def weight_kernel(grad, x, plan, partial, tables, splits, H, W, HO, WO, rows, each, tiles, K: tl.constexpr):
    """Grid (steps, GROUPS * blocks of OUT, splits): the weight's gradient from `each` tiles, `partial` (splits, ...).

    `grad` is (rows, OUT*GROUPS), `x` (pixels, C*GROUPS), `partial` (splits, GROUPS, OUT, TAPS, C) of type REAL. Of one
    map there are `tiles` tiles; of several `splits` (splits, 2) has every split's first tile and its branch's end.
    """
    step = tl.program_id(0)
    blocks: tl.constexpr = (K.OUT + K.BLOCK_O - 1) // K.BLOCK_O
    group = tl.program_id(1) // blocks
    start, o = (tl.program_id(1) % blocks) * K.BLOCK_O, tl.arange(0, K.BLOCK_O)
    if K.TABLED:
        begin = tl.load(splits + tl.program_id(2) * 2)
        end = tl.minimum(begin + each, tl.load(splits + tl.program_id(2) * 2 + 1))
    else:
        begin = tl.program_id(2) * each
        end = tl.minimum(begin + each, tiles)
    total = tl.zeros((K.BLOCK_O, K.BLOCK_C), dtype=K.REAL)
    number = tl.arange(0, K.TILE_H * K.TILE_W)
    tile = locate_tile(begin, tables, Sizes(H, W, HO, WO), K)
    pixel, inside = output_pixels(tile, number, K)
    values = load_step(step, group, x + tile.source * (K.C * K.GROUPS), plan, rows, tile, pixel, inside, K)
    for i in range(begin, end):
        # What is not inside has samples of 0.
        samples = mix(values, K)
        first = grad + tile.first * (K.OUT * K.GROUPS) + group * K.OUT
        gradient = load_outputs(first + (pixel * (K.OUT * K.GROUPS))[:, None], o, start, K)
        tile = locate_tile(tl.minimum(i + 1, end - 1), tables, Sizes(H, W, HO, WO), K)
        pixel, inside = output_pixels(tile, number, K)
        values = load_step(step, group, x + tile.source * (K.C * K.GROUPS), plan, rows, tile, pixel, inside, K)
        total = tl.dot(tl.trans(gradient), samples, total, input_precision=K.PRECISION, out_dtype=K.REAL)
    c = tl.arange(0, K.BLOCK_C)
    first, left = first_channel(step // K.TAPS, K)
    target = partial + ((tl.program_id(2).to(tl.int64) * K.GROUPS + group) * K.OUT + start + o) * (K.TAPS * K.C)
    target = target[:, None] + (step % K.TAPS * K.C + first + c)[None, :]
    tl.store(target, total, mask=(start + o < K.OUT)[:, None] & (c < left)[None, :])
