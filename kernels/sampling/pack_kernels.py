"""Weights in the order in which the products read them, and their gradients in the order of the weights."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.sampling.tile_sums import sum_rows

# Channels and outputs of one program.
SIDE = tl.constexpr(64)


class Packing(NamedTuple):
    """What is packed, and where to.

    Attributes:
        first, second, third: Weights (O, C, 3, 3) of a block's branches, of any floating type.
        o, c, y, x: Their strides in elements.
        packed: (3, 9, C, O) in the type of the maps, which is how backward reads it, and in 16 bits forward as well.
        forward: (3, O, 9, C) in the type of the maps, how forward reads it in 32 and 64 bits.
    """

    first: Any
    second: Any
    third: Any
    o: Any
    c: Any
    y: Any
    x: Any
    packed: Any
    forward: Any


@triton.jit
def pack_piece(p, number, C: tl.constexpr, PACKED: tl.constexpr):
    """One of 27 * ceil(C / SIDE)**2 pieces of a `Packing`, for programs that run beside those of another kernel."""
    across: tl.constexpr = (C + SIDE - 1) // SIDE
    matrix = number // (across * across)
    branch, tap = matrix // 9, matrix % 9
    o = number // across % across * SIDE + tl.arange(0, SIDE)
    c = number % across * SIDE + tl.arange(0, SIDE)
    weight = tl.where(branch == 0, p.first, tl.where(branch == 1, p.second, p.third))
    known = (o < C)[:, None] & (c < C)[None, :]
    pointers = weight + (o * p.o)[:, None] + (c * p.c)[None, :] + tap // 3 * p.y + tap % 3 * p.x
    piece = tl.load(pointers, mask=known, other=0.0).to(p.packed.dtype.element_ty)
    tl.store(p.packed + matrix * (C * C) + (c * C)[None, :] + o[:, None], piece, mask=known)
    if not PACKED:
        tl.store(p.forward + ((branch * C + o) * 9 + tap)[:, None] * C + c[None, :], piece, mask=known)


class Weights(NamedTuple):
    """Up to three weights (O, C, kh, kw) of one type and shape, and their strides in elements."""

    first: Any
    second: Any
    third: Any
    o: Any
    c: Any
    y: Any
    x: Any


@triton.jit(do_not_specialize=["splits"])
def sum_kernel(
    partial,
    target,
    bounds,
    splits,
    OUT: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    KW: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """Grid (blocks of elements, weights): the sums of parts (splits, OUT, TAPS, C) of the gradients of `Weights`.

    `bounds` (weights, 2) has the first part of each and how many there are; without it all are of one weight.
    """
    SIZE: tl.constexpr = OUT * TAPS * C
    branch = tl.program_id(1)
    if bounds is not None:
        partial += tl.load(bounds + branch * 2).to(tl.int64) * SIZE
        splits = tl.load(bounds + branch * 2 + 1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = sum_rows(partial, splits, SIZE, i, i < SIZE, 16, REAL)
    weight = tl.where(branch == 0, target.first, tl.where(branch == 1, target.second, target.third))
    o, tap, c = i // (TAPS * C), i // C % TAPS, i % C
    place = weight + o.to(tl.int64) * target.o + c * target.c + tap // KW * target.y + tap % KW * target.x
    tl.store(place, total.to(weight.dtype.element_ty), mask=i < SIZE)
