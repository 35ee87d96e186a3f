"""Sums over rows in an order that shapes alone decide, and what a tile adds to the statistics of its map."""

import triton
import triton.language as tl

from kernels.sampling.maps import AXES, OUT_HEIGHT


@triton.jit
def store_sums(b_value, pixels, sums, row, c, known, C: tl.constexpr, REAL: tl.constexpr):
    """Of one tile of a sampled map: the sum, the squared distances from the tile's mean, the sum after upsampling."""
    inside = pixels.inside
    b_value = tl.where(inside[:, None], b_value, 0.0)
    count = tl.sum(inside.to(REAL), 0)
    b_sum = tl.sum(b_value, 0)
    b_distance = tl.where(inside[:, None], b_value - (b_sum / count)[None, :], 0.0)
    start = tl.load(row + AXES) + 2
    share = tl.load(sums.axes + start + pixels.y, mask=inside, other=0.0)
    share *= tl.load(sums.axes + start + tl.load(row + OUT_HEIGHT) + pixels.x, mask=inside, other=0.0)
    target = sums.partial + tl.program_id(0).to(tl.int64) * (3 * C) + c
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
