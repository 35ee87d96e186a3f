"""Reading rows of a matrix, and sums over them that are taken in an order that shapes alone decide.

Matrices and tables are those of `kernels.block.layout`; names are explained in `kernels.block.tail_kernels`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.block.layout import (
    AXES,
    FIRST_TILE,
    OUT_HEIGHT,
    OUT_WIDTH,
    PROBLEM_COLUMNS,
    TARGET_HEIGHT,
    TARGET_WIDTH,
    TILES,
)
from kernels.runtime.launch import Launch, triton_real


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
def store_sums(b_value, pixels, partial, axes, row, c, known, C: tl.constexpr, REAL: tl.constexpr):
    """Of one tile of a sampled map: the sum, the squared distances from the tile's mean, the sum after upsampling."""
    inside = pixels.inside
    b_value = tl.where(inside[:, None], b_value, 0.0)
    count = tl.sum(inside.to(REAL), 0)
    b_sum = tl.sum(b_value, 0)
    b_distance = tl.where(inside[:, None], b_value - (b_sum / count)[None, :], 0.0)
    start = tl.load(row + AXES) + 2
    share = tl.load(axes + start + pixels.y, mask=inside, other=0.0)
    share *= tl.load(axes + start + tl.load(row + OUT_HEIGHT) + pixels.x, mask=inside, other=0.0)
    target = partial + tl.program_id(0).to(tl.int64) * (3 * C) + c
    tl.store(target, b_sum, mask=known)
    tl.store(target + C, tl.sum(b_distance * b_distance, 0), mask=known)
    tl.store(target + 2 * C, tl.sum(b_value * share[:, None], 0), mask=known)


@triton.jit
def sum_rows(matrix, rows, pitch, i, known, BLOCK_T: tl.constexpr, REAL: tl.constexpr):
    """Columns i of `rows` rows, `pitch` elements apart, added up, BLOCK_T at a time: an order that shapes decide."""
    s_total = tl.zeros((BLOCK_T, i.shape[0]), dtype=REAL)
    # Triton 3.6 interprets no `range` up to a run-time number under NumPy 2.4.
    first = 0
    while first < rows:
        row = first + tl.arange(0, BLOCK_T)
        place = matrix + row.to(tl.int64)[:, None] * pitch + i[None, :]
        # Nobody reads it twice, and other programs of the same launch may have written it, see `is_last`.
        s_total += tl.load(place, mask=(row < rows)[:, None] & known[None, :], other=0.0, cache_modifier=".cg")
        first += BLOCK_T
    return tl.sum(s_total, 0)


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


@triton.jit(do_not_specialize=["size"])
def add_kernel(partial, total, bounds, size, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, REAL: tl.constexpr):
    """Grid (blocks of columns, rows of `bounds`): the sum of some consecutive rows of `partial` (runs, size)."""
    first, count = tl.load(bounds + tl.program_id(1) * 2), tl.load(bounds + tl.program_id(1) * 2 + 1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = partial + first.to(tl.int64) * size
    tl.store(
        total + tl.program_id(1) * size + c, sum_rows(rows, count, size, c, c < size, BLOCK_T, REAL), mask=c < size
    )


def add_runs(partial: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of consecutive rows, in an order that shapes alone decide.

    Args:
        partial: (rows, ...).
        bounds: (sums, 2) int32: the first row of every sum and how many it has.
        dtype: Type of the sums.

    Returns:
        (sums, ...) of type `dtype`.
    """
    total = partial.new_empty((len(bounds), *partial.shape[1:]), dtype=dtype)
    add_launch(partial, total, bounds).run()
    return total


def add_launch(partial: Tensor, total: Tensor, bounds: Tensor) -> Launch:
    """The launch of `add_runs`, which writes `total`."""
    size = partial[0].numel()
    block = min(64, triton.next_power_of_2(size))
    constants = {"BLOCK_T": 32, "BLOCK_C": block, "REAL": triton_real(partial.dtype)}
    # The second axis of a grid ends at 65,535, which the blocks of a wide convolution's weight are beyond.
    grid = (triton.cdiv(size, block), len(bounds))
    return Launch(add_kernel, grid, {"partial": partial, "total": total, "bounds": bounds, "size": size}, constants)
