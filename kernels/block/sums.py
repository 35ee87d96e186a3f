"""Reading rows of a matrix, and sums over them that are taken in an order that shapes alone decide.

Matrices and tables are those of `kernels.block.layout`; names are explained in `kernels.block.tail_kernels`.
"""

import triton
import triton.language as tl

from kernels.sampling.maps import (
    FIRST_TILE,
    OUT_HEIGHT,
    OUT_WIDTH,
    PROBLEM_COLUMNS,
    TARGET_HEIGHT,
    TARGET_WIDTH,
    TILES,
)
from kernels.sampling.tile_sums import sum_rows


@triton.jit
def work_item(work):
    """Problem or level, image and number of what this program is to do."""
    base = work + tl.program_id(0) * 3
    return tl.load(base), tl.load(base + 1), tl.load(base + 2)


@triton.jit
def channel_block(C: tl.constexpr, BLOCK_C: tl.constexpr):
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, c < C


@triton.jit
def matrix_rows(matrix, place, inside, c, known, C: tl.constexpr, REAL: tl.constexpr):
    """(pixels, BLOCK_C) of a matrix; zero where there is nothing."""
    return tl.load(matrix + place[:, None] * C + c[None, :], mask=inside[:, None] & known[None, :], other=0.0).to(REAL)


@triton.jit
def merge_sums(
    partial,
    statistics,
    problems,
    slots,
    C: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REAL: tl.constexpr,
):
    """Mean, variance and upsampled mean of one map, (3, programs, C), from what `store_sums` left; zeros for no map.

    Variances of tiles are merged through their means (Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm
    for Computing Sample Variances", 1979); sums of squares would cancel.
    """
    slot = tl.program_id(0)
    c, known = channel_block(C, BLOCK_C)
    problem, image = tl.load(slots + slot * 2), tl.load(slots + slot * 2 + 1)
    row = problems + tl.maximum(problem, 0) * PROBLEM_COLUMNS
    height, width, tiles = tl.load(row + OUT_HEIGHT), tl.load(row + OUT_WIDTH), tl.load(row + TILES)
    tiles = tl.where(problem < 0, 0, tiles)
    first = (tl.load(row + FIRST_TILE) + image * tiles).to(tl.int64)
    partial += first * (3 * C)
    pixels = (height * width).to(REAL)
    b_mean = sum_rows(partial, tiles, 3 * C, c, known, BLOCK_T, REAL) / pixels
    b_pooled = sum_rows(partial + 2 * C, tiles, 3 * C, c, known, BLOCK_T, REAL)
    s_squares = tl.zeros((BLOCK_T, BLOCK_C), dtype=REAL)
    across = tl.cdiv(width, TILE_W)
    start = 0
    while start < tiles:
        tile = start + tl.arange(0, BLOCK_T)
        there = tile < tiles
        size = tl.minimum(height - tile // across * TILE_H, TILE_H)
        size *= tl.minimum(width - tile % across * TILE_W, TILE_W)
        size = tl.where(there, size, 1).to(REAL)[:, None]
        b_distance = matrix_rows(partial, tile * 3, there, c, known, C, REAL) / size - b_mean[None, :]
        b_squares = matrix_rows(partial, tile * 3 + 1, there, c, known, C, REAL)
        s_squares += tl.where(there[:, None], b_squares + size * b_distance * b_distance, 0.0)
        start += BLOCK_T
    stride = tl.num_programs(0) * C
    target = statistics + slot * C + c
    tl.store(target, b_mean, mask=known)
    tl.store(target + stride, tl.sum(s_squares, 0) / pixels, mask=known)
    target_pixels = tl.load(row + TARGET_HEIGHT) * tl.load(row + TARGET_WIDTH)
    tl.store(target + 2 * stride, b_pooled / target_pixels.to(REAL), mask=known)


@triton.jit
def clear(counters, count):
    """Zero the `count` counters of a later launch; one program of this launch calls it."""
    first = 0
    while first < count:
        i = first + tl.arange(0, 128)
        tl.store(counters + i, tl.zeros((128,), dtype=tl.int32), mask=i < count)
        first += 128


@triton.jit
def is_last(counter, count):
    """Whether this program is the last of `count` that get here, each after storing its part of something.

    The last one may then load all parts, from the L2 cache (`cache_modifier=".cg"`): the L1 cache of a multiprocessor
    does not see what others write. `counter` was zeroed by an earlier launch.
    """
    # What the other threads of this program have stored comes before the addition, which one thread makes.
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
