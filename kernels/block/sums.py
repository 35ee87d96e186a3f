"""Reading rows of a matrix, and sums over them that are taken in an order that shapes alone decide.

Matrices and tables are those of `kernels.block.layout`; names are explained in `kernels.block.tail_kernels`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.block.layout import AXES, OUT_HEIGHT
from kernels.runtime.launch import Launch, steps, triton_real


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
def add_kernel(
    partial,
    total,
    bounds,
    SIZE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REAL: tl.constexpr,
):
    """Grid (blocks of SIZE, rows of `bounds`): the sum of some consecutive rows of `partial` (runs, SIZE), in order."""
    first, count = tl.load(bounds + tl.program_id(1) * 2), tl.load(bounds + tl.program_id(1) * 2 + 1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < SIZE
    s_total = tl.zeros((BLOCK_T, BLOCK_C), dtype=REAL)
    for step in range(STEPS):
        run = step * BLOCK_T + tl.arange(0, BLOCK_T)
        s_total += matrix_rows(partial, (first + run).to(tl.int64), run < count, c, known, SIZE, REAL)
    tl.store(total + tl.program_id(1) * SIZE + c, tl.sum(s_total, 0), mask=known)


def add_runs(partial: Tensor, bounds: Tensor, most: int, dtype: torch.dtype) -> Tensor:
    """Sums of consecutive rows, in an order that shapes alone decide.

    Args:
        partial: (rows, ...).
        bounds: (sums, 2) int32: the first row of every sum and how many it has.
        most: The largest number of rows of a sum.
        dtype: Type of the sums.

    Returns:
        (sums, ...) of type `dtype`.
    """
    total = partial.new_empty((len(bounds), *partial.shape[1:]), dtype=dtype)
    add_launch(partial, total, bounds, most).run()
    return total


def add_launch(partial: Tensor, total: Tensor, bounds: Tensor, most: int) -> Launch:
    """The launch of `add_runs`, which writes `total`."""
    size = partial[0].numel()
    block, rows = min(64, triton.next_power_of_2(size)), 32
    constants = {"SIZE": size, "STEPS": steps(most, rows), "BLOCK_T": rows, "BLOCK_C": block}
    constants["REAL"] = triton_real(partial.dtype)
    # The second axis of a grid ends at 65,535, which the blocks of a wide convolution's weight are beyond.
    grid = (triton.cdiv(size, block), len(bounds))
    return Launch(add_kernel, grid, {"partial": partial, "total": total, "bounds": bounds}, constants)
