"""The Triton kernels of the tail of a DyHead block, all levels in one launch each.

    m = A_same * same + A_finer * finer + A_coarser * upsampled(coarser) + D,    out = max(a1 * m + b1, a2 * m + b2)

with eight coefficients for each level, image and channel, and what leads to them: the mean and the variance of every
channel of every sampled map, and its mean after upsampling. The way back reads the maps once for the sums that the
gradients of the coefficients are, and once for the gradients of the maps.

Matrices and tables are those of `kernels.block.layout`. Names: `place` is a row of a matrix, counted in 64 bits,
`pixel` the number of a pixel in its image, `b_` a block of values, `s_` one of sums, REAL the type of sums and
coefficients. KINDS counts the coefficients: with 4 there is no a1, b1, a2, b2, and `out` is max(m, 0) or, where not
RECTIFIED, m.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.block.coefficients_kernels import add_parameters
from kernels.block.sums import channel_block, clear, matrix_rows, work_item
from kernels.sampling.maps import (
    AXES,
    BRANCH,
    COARSER_AXES,
    COARSER_HEIGHT,
    COARSER_ROW,
    COARSER_WIDTH,
    FINER_ROW,
    LEVEL,
    LEVEL_COLUMNS,
    OUT_HEIGHT,
    OUT_WIDTH,
    OUTPUT_ROW,
    PROBLEM_COLUMNS,
    SAME_ROW,
    TARGET_HEIGHT,
    TARGET_ROW,
    TARGET_WIDTH,
    tile_pixels,
)
from kernels.sampling.product_kernels import Sums
from kernels.sampling.tile_sums import store_sums

LEVEL_HEIGHT = tl.constexpr(0)
LEVEL_WIDTH = tl.constexpr(1)


class Axes(NamedTuple):
    """`axes` and `firsts` of `kernels.block.layout`."""

    weights: Any
    firsts: Any


class Added(NamedTuple):
    """`sums` and `grads` of `add_parameters`."""

    sums: Any
    grads: Any


@triton.jit
def _between(number, scale, size):
    """The two points around a target's place and the distance from the first."""
    place = number * scale
    low = tl.minimum(place.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), place - low


@triton.jit
def _maps(sampled, axes, row, image, pixel, inside, c, known, C: tl.constexpr, REAL: tl.constexpr):
    """The level's three sampled maps at some pixels, the coarser one upsampled; zero for a map the level has not."""
    height, width = tl.load(row + LEVEL_HEIGHT), tl.load(row + LEVEL_WIDTH)
    same, finer, coarser = tl.load(row + SAME_ROW), tl.load(row + FINER_ROW), tl.load(row + COARSER_ROW)
    place = image.to(tl.int64) * height * width + pixel
    b_same = matrix_rows(sampled, same + place, inside, c, known, C, REAL)
    b_finer = matrix_rows(sampled, finer + place, inside & (finer >= 0), c, known, C, REAL)
    coarse_h, coarse_w = tl.load(row + COARSER_HEIGHT), tl.load(row + COARSER_WIDTH)
    scales = axes + tl.load(row + COARSER_AXES)
    y0, y1, fy = _between((pixel // width).to(REAL), tl.load(scales), coarse_h)
    x0, x1, fx = _between((pixel % width).to(REAL), tl.load(scales + 1), coarse_w)
    first = coarser + image.to(tl.int64) * coarse_h * coarse_w
    there = inside & (coarser >= 0)
    b_up = matrix_rows(sampled, first + y0 * coarse_w + x0, there, c, known, C, REAL) * ((1 - fy) * (1 - fx))[:, None]
    b_up += matrix_rows(sampled, first + y0 * coarse_w + x1, there, c, known, C, REAL) * ((1 - fy) * fx)[:, None]
    b_up += matrix_rows(sampled, first + y1 * coarse_w + x0, there, c, known, C, REAL) * (fy * (1 - fx))[:, None]
    b_up += matrix_rows(sampled, first + y1 * coarse_w + x1, there, c, known, C, REAL) * (fy * fx)[:, None]
    return b_same, b_finer, b_up


@triton.jit
def _coefficient(coefficients, kind, c, known, C: tl.constexpr):
    return tl.load(coefficients + kind * C + c, mask=known, other=0.0)[None, :]


@triton.jit(do_not_specialize=["batch"])
def forward_kernel(
    sampled,
    coefficients,
    out,
    axes,
    levels,
    work,
    batch,
    C: tl.constexpr,
    KINDS: tl.constexpr,
    RECTIFIED: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REAL: tl.constexpr,
):
    """Grid (runs of PIXELS, blocks of C). `coefficients` is (L, N, KINDS, C), `out` (P, C)."""
    level, image, number = work_item(work)
    c, known = channel_block(C, BLOCK_C)
    row = levels + level * LEVEL_COLUMNS
    pixels = tl.load(row + LEVEL_HEIGHT) * tl.load(row + LEVEL_WIDTH)
    pixel = number * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    b_same, b_finer, b_up = _maps(sampled, axes, row, image, pixel, inside, c, known, C, REAL)
    coefficients += (level * batch + image) * (KINDS * C)
    b_m = b_same * _coefficient(coefficients, 0, c, known, C) + b_finer * _coefficient(coefficients, 1, c, known, C)
    b_m += b_up * _coefficient(coefficients, 2, c, known, C) + _coefficient(coefficients, 3, c, known, C)
    # A NaN must reach the loss, as it does through torch.maximum.
    if KINDS == 8:
        b_first = _coefficient(coefficients, 4, c, known, C) * b_m + _coefficient(coefficients, 5, c, known, C)
        b_second = _coefficient(coefficients, 6, c, known, C) * b_m + _coefficient(coefficients, 7, c, known, C)
        b_m = tl.maximum(b_first, b_second, propagate_nan=tl.PropagateNan.ALL)
    elif RECTIFIED:
        b_m = tl.maximum(b_m, 0.0, propagate_nan=tl.PropagateNan.ALL)
    # The level's maps from itself begin where the level begins: both matrices have it first.
    place = tl.load(row + SAME_ROW) + image.to(tl.int64) * pixels + pixel
    target = out + place[:, None] * C + c[None, :]
    tl.store(target, b_m.to(out.dtype.element_ty), mask=inside[:, None] & known[None, :])


@triton.jit(do_not_specialize=["batch", "pixels_a_run"])
def backward_sums_kernel(
    grad,
    sampled,
    coefficients,
    grad_m,
    partial,
    axes,
    levels,
    work,
    batch,
    pixels_a_run,
    C: tl.constexpr,
    KINDS: tl.constexpr,
    RECTIFIED: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REAL: tl.constexpr,
):
    """Grid (runs of pixels, blocks of C): the gradient of m, and sums over a run's pixels, PIXELS at a time.

    `grad` is (P, C), `grad_m` (P, C), `partial` (runs, KINDS, C): gradients of the coefficients from one run.
    """
    level, image, number = work_item(work)
    c, known = channel_block(C, BLOCK_C)
    row = levels + level * LEVEL_COLUMNS
    pixels = tl.load(row + LEVEL_HEIGHT) * tl.load(row + LEVEL_WIDTH)
    coefficients += (level * batch + image) * (KINDS * C)
    b_same_factor = _coefficient(coefficients, 0, c, known, C)
    b_finer_factor = _coefficient(coefficients, 1, c, known, C)
    b_up_factor = _coefficient(coefficients, 2, c, known, C)
    b_shift = _coefficient(coefficients, 3, c, known, C)
    s_same = tl.zeros((PIXELS, BLOCK_C), dtype=REAL)
    s_finer = tl.zeros((PIXELS, BLOCK_C), dtype=REAL)
    s_up = tl.zeros((PIXELS, BLOCK_C), dtype=REAL)
    s_first = tl.zeros((PIXELS, BLOCK_C), dtype=REAL)
    s_first_m = tl.zeros((PIXELS, BLOCK_C), dtype=REAL)
    s_second = tl.zeros((PIXELS, BLOCK_C), dtype=REAL)
    s_second_m = tl.zeros((PIXELS, BLOCK_C), dtype=REAL)
    # Triton 3.6 interprets no `range` up to a run-time number under NumPy 2.4.
    start = number * pixels_a_run
    end = tl.minimum(start + pixels_a_run, pixels)
    while start < end:
        pixel = start + tl.arange(0, PIXELS)
        inside = pixel < end
        b_same, b_finer, b_up = _maps(sampled, axes, row, image, pixel, inside, c, known, C, REAL)
        place = tl.load(row + SAME_ROW) + image.to(tl.int64) * pixels + pixel
        b_grad = matrix_rows(grad, place, inside, c, known, C, REAL)
        b_m = b_same * b_same_factor + b_finer * b_finer_factor + b_up * b_up_factor + b_shift
        if KINDS == 8:
            b_a1 = _coefficient(coefficients, 4, c, known, C)
            b_a2 = _coefficient(coefficients, 6, c, known, C)
            b_b = _coefficient(coefficients, 5, c, known, C) - _coefficient(coefficients, 7, c, known, C)
            b_d = (b_a1 - b_a2) * b_m + b_b
            b_grad = tl.where(b_d == 0, b_grad * 0.5, b_grad)
            b_first = tl.where(b_d < 0, 0.0, b_grad)
            b_second = tl.where(b_d > 0, 0.0, b_grad)
            s_first += b_first
            s_first_m += b_first * b_m
            s_second += b_second
            s_second_m += b_second * b_m
            b_grad = b_first * b_a1 + b_second * b_a2
        else:
            if RECTIFIED:
                b_grad = tl.where(b_m <= 0, 0.0, b_grad)
            s_first += b_grad
        target = grad_m + place[:, None] * C + c[None, :]
        tl.store(target, b_grad.to(grad_m.dtype.element_ty), mask=inside[:, None] & known[None, :])
        s_same += b_grad * b_same
        s_finer += b_grad * b_finer
        s_up += b_grad * b_up
        start += PIXELS
    target = partial + tl.program_id(0).to(tl.int64) * (KINDS * C) + c
    tl.store(target, tl.sum(s_same, 0), mask=known)
    tl.store(target + C, tl.sum(s_finer, 0), mask=known)
    tl.store(target + 2 * C, tl.sum(s_up, 0), mask=known)
    b_first = tl.sum(s_first, 0)
    if KINDS == 8:
        b_second = tl.sum(s_second, 0)
        b_a1 = tl.load(coefficients + 4 * C + c, mask=known, other=0.0)
        b_a2 = tl.load(coefficients + 6 * C + c, mask=known, other=0.0)
        # The sum of the gradient of m needs no sum of its own.
        tl.store(target + 3 * C, b_first * b_a1 + b_second * b_a2, mask=known)
        tl.store(target + 4 * C, tl.sum(s_first_m, 0), mask=known)
        tl.store(target + 5 * C, b_first, mask=known)
        tl.store(target + 6 * C, tl.sum(s_second_m, 0), mask=known)
        tl.store(target + 7 * C, b_second, mask=known)
    else:
        tl.store(target + 3 * C, b_first, mask=known)


@triton.jit(do_not_specialize=["batch", "slots", "span", "adders"])
def backward_maps_kernel(
    grad_m,
    sampled,
    coefficients,
    statistics,
    grad_statistics,
    grad_sampled,
    axes,
    problems,
    work,
    parameters,
    batch,
    slots,
    span,
    adders,
    C: tl.constexpr,
    R: tl.constexpr,
    KINDS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
    REAL: tl.constexpr,
):
    """Grid (adders, then runs of PIXELS of the sampled maps; blocks of C): the gradient of the sampled maps.

    `statistics` and `grad_statistics` are (3, slots, C): mean, variance, upsampled mean; a slot is a level, a branch
    and an image. A pixel of a coarser neighbour gathers from the span * span target pixels that may take of it.

    The adders make the gradients of the parameters.
    """
    # They wait for the same launch as the runs, and are too few for one of their own.
    if tl.program_id(0) < adders:
        if tl.program_id(1) == 0:
            add_parameters(tl.program_id(0), parameters.sums, parameters.grads, slots // 3, C, R, KINDS, BLOCK_A, REAL)
    else:
        problem, image, number = work_item(work - adders * 3)
        c, known = channel_block(C, BLOCK_C)
        row = problems + problem * PROBLEM_COLUMNS
        height, width = tl.load(row + OUT_HEIGHT), tl.load(row + OUT_WIDTH)
        target_h, target_w = tl.load(row + TARGET_HEIGHT), tl.load(row + TARGET_WIDTH)
        level, branch = tl.load(row + LEVEL), tl.load(row + BRANCH)
        pixel = number * PIXELS + tl.arange(0, PIXELS)
        inside = pixel < height * width
        y, x = pixel // width, pixel % width
        first = tl.load(row + TARGET_ROW) + image.to(tl.int64) * target_h * target_w
        start = tl.load(row + AXES)
        share = tl.load(axes.weights + start + 2 + y, mask=inside, other=0.0)
        share *= tl.load(axes.weights + start + 2 + height + x, mask=inside, other=0.0)
        if branch == 2:
            scale_y, scale_x = tl.load(axes.weights + start), tl.load(axes.weights + start + 1)
            top = tl.load(axes.firsts + start + 2 + y, mask=inside, other=0)
            left = tl.load(axes.firsts + start + 2 + height + x, mask=inside, other=0)
            b_grad = tl.zeros((PIXELS, BLOCK_C), dtype=REAL)
            down = 0
            while down < span:
                target_y = top + down
                y0, y1, fy = _between(target_y.to(REAL), scale_y, height)
                factor_y = tl.where(y0 == y, 1 - fy, 0.0) + tl.where(y1 == y, fy, 0.0)
                across = 0
                while across < span:
                    target_x = left + across
                    x0, x1, fx = _between(target_x.to(REAL), scale_x, width)
                    factor = factor_y * (tl.where(x0 == x, 1 - fx, 0.0) + tl.where(x1 == x, fx, 0.0))
                    taken = inside & (target_y < target_h) & (target_x < target_w) & (factor != 0)
                    b_target = matrix_rows(grad_m, first + target_y * target_w + target_x, taken, c, known, C, REAL)
                    b_grad += b_target * factor[:, None]
                    across += 1
                down += 1
        else:
            b_grad = matrix_rows(grad_m, first + pixel, inside, c, known, C, REAL)
        place = tl.load(row + OUTPUT_ROW) + image.to(tl.int64) * height * width + pixel
        b_value = matrix_rows(sampled, place, inside, c, known, C, REAL)
        slot = ((level * 3 + branch) * batch + image) * C
        b_mean = _coefficient(statistics + slot, 0, c, known, C)
        b_by_mean = _coefficient(grad_statistics + slot, 0, c, known, C)
        b_by_variance = _coefficient(grad_statistics + slot, slots, c, known, C)
        b_by_pooled = _coefficient(grad_statistics + slot, 2 * slots, c, known, C)
        count = (height * width).to(REAL)
        b_grad *= _coefficient(coefficients + (level * batch + image) * (KINDS * C), branch, c, known, C)
        b_grad += (b_by_mean + 2 * b_by_variance * (b_value - b_mean)) / count
        b_grad += b_by_pooled * (share / (target_h * target_w).to(REAL))[:, None]
        target = grad_sampled + place[:, None] * C + c[None, :]
        tl.store(target, b_grad.to(grad_sampled.dtype.element_ty), mask=inside[:, None] & known[None, :])


@triton.jit(do_not_specialize=["count"])
def statistics_kernel(
    sampled,
    partial,
    axes,
    problems,
    work,
    counters,
    count,
    C: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REAL: tl.constexpr,
):
    """Grid (tiles of the sampled maps, blocks of C): `partial` (tiles, 3, C), for maps that come without it.

    The counters are those of a later launch, see `clear`.
    """
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        clear(counters, count)
    problem, image, number = work_item(work)
    c, known = channel_block(C, BLOCK_C)
    row = problems + problem * PROBLEM_COLUMNS
    height, width = tl.load(row + OUT_HEIGHT), tl.load(row + OUT_WIDTH)
    pixels = tile_pixels(number, tl.arange(0, TILE_H * TILE_W), height, width, TILE_H, TILE_W)
    place = tl.load(row + OUTPUT_ROW) + image.to(tl.int64) * height * width + pixels.y * width + pixels.x
    b_value = matrix_rows(sampled, place, pixels.inside, c, known, C, REAL)
    store_sums(b_value, pixels, Sums(partial, axes), row, c, known, C, REAL)
