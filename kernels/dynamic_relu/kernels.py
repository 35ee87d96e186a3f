"""The Triton kernels of the dynamic ReLU.

Names: `i_` index, `o_` offsets, `m_` mask, `b_` a block of values; `n` image, `p` pixel (rows and columns of the map as
one), `c` channel.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """A map as (N, P, C): its pointer, and the strides in elements."""

    pointer: Any
    n: Any
    p: Any
    c: Any


@triton.jit
def _tile(tiles_p, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    tiles_c = tl.cdiv(channels, BLOCK_C)
    # Channel tiles are innermost, so that programs that run together read neighbouring memory in channels_last.
    i_program = tl.program_id(0)
    i_c = i_program % tiles_c
    i_p = (i_program // tiles_c) % tiles_p
    i_n = i_program // (tiles_c * tiles_p)
    # 64 bits from here on: an image of a large map alone may hold more than 2^31 elements.
    o_p = i_p.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = i_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return i_n.to(tl.int64), i_p.to(tl.int64), o_p, o_c


@triton.jit
def _offsets(rows, i_n, o_p, o_c):
    return i_n * rows.n + o_p[:, None] * rows.p + o_c[None, :] * rows.c


@triton.jit
def _load_coefficients(coefficients, i_n, o_c, channels, REAL: tl.constexpr):
    base = coefficients + i_n * 4 * channels + o_c
    m_c = o_c < channels
    b_a1 = tl.load(base, mask=m_c, other=0.0).to(REAL)
    b_b1 = tl.load(base + channels, mask=m_c, other=0.0).to(REAL)
    b_a2 = tl.load(base + 2 * channels, mask=m_c, other=0.0).to(REAL)
    b_b2 = tl.load(base + 3 * channels, mask=m_c, other=0.0).to(REAL)
    return b_a1[None, :], b_b1[None, :], b_a2[None, :], b_b2[None, :]


@triton.jit
def forward_kernel(
    x, coefficients, y, pixels, channels, tiles_p, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, REAL: tl.constexpr
):
    """Grid (images * blocks of pixels * blocks of channels,). `x` and `y` are `Rows`, `coefficients` (N, 4, C)."""
    i_n, _, o_p, o_c = _tile(tiles_p, channels, BLOCK_P, BLOCK_C)
    m_pc = (o_p < pixels)[:, None] & (o_c < channels)[None, :]
    b_a1, b_b1, b_a2, b_b2 = _load_coefficients(coefficients, i_n, o_c, channels, REAL)
    o_x, o_y = _offsets(x, i_n, o_p, o_c), _offsets(y, i_n, o_p, o_c)
    b_x = tl.load(x.pointer + o_x, mask=m_pc, other=0.0).to(REAL)
    # A NaN in either line must reach the loss, as it does through torch.maximum.
    b_y = tl.maximum(b_a1 * b_x + b_b1, b_a2 * b_x + b_b2, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y.pointer + o_y, b_y.to(y.pointer.dtype.element_ty), mask=m_pc)


@triton.jit
def backward_kernel(
    grad_y,
    x,
    coefficients,
    grad_x,
    partial,
    pixels,
    channels,
    chunks,
    STEPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REAL: tl.constexpr,
):
    """Grid (images * chunks * blocks of channels,): the gradient of x, and sums over the pixels of one chunk.

    `grad_y`, `x` and `grad_x` are `Rows`, `coefficients` is (N, 4, C), `partial` (N, chunks, 4, C).
    """
    i_n, i_chunk, o_p, o_c = _tile(chunks, channels, BLOCK_P, BLOCK_C)
    m_c = o_c < channels
    b_a1, b_b1, b_a2, b_b2 = _load_coefficients(coefficients, i_n, o_c, channels, REAL)
    sum_a1 = tl.zeros((BLOCK_P, BLOCK_C), dtype=REAL)
    sum_b1 = tl.zeros((BLOCK_P, BLOCK_C), dtype=REAL)
    sum_a2 = tl.zeros((BLOCK_P, BLOCK_C), dtype=REAL)
    sum_b2 = tl.zeros((BLOCK_P, BLOCK_C), dtype=REAL)
    # A chunk is STEPS tiles, `chunks` apart: programs that run together then read neighbouring pixels.
    for _ in range(STEPS):
        m_pc = (o_p < pixels)[:, None] & m_c[None, :]
        o_grad_y, o_x = _offsets(grad_y, i_n, o_p, o_c), _offsets(x, i_n, o_p, o_c)
        o_grad_x = _offsets(grad_x, i_n, o_p, o_c)
        b_grad_y = tl.load(grad_y.pointer + o_grad_y, mask=m_pc, other=0.0).to(REAL)
        b_x = tl.load(x.pointer + o_x, mask=m_pc, other=0.0).to(REAL)
        b_d = (b_a1 - b_a2) * b_x + (b_b1 - b_b2)
        # Where the difference is NaN both lines get all of the gradient, as from torch.maximum.
        b_grad_y = tl.where(b_d == 0, b_grad_y * 0.5, b_grad_y)
        b_first = tl.where(b_d < 0, 0.0, b_grad_y)
        b_second = tl.where(b_d > 0, 0.0, b_grad_y)
        b_grad_x = b_first * b_a1 + b_second * b_a2
        tl.store(grad_x.pointer + o_grad_x, b_grad_x.to(grad_x.pointer.dtype.element_ty), mask=m_pc)
        sum_a1 += b_first * b_x
        sum_b1 += b_first
        sum_a2 += b_second * b_x
        sum_b2 += b_second
        o_p += chunks * BLOCK_P
    o_partial = (i_n * chunks + i_chunk) * 4 * channels + o_c
    tl.store(partial + o_partial, tl.sum(sum_a1, 0), mask=m_c)
    tl.store(partial + o_partial + channels, tl.sum(sum_b1, 0), mask=m_c)
    tl.store(partial + o_partial + 2 * channels, tl.sum(sum_a2, 0), mask=m_c)
    tl.store(partial + o_partial + 3 * channels, tl.sum(sum_b2, 0), mask=m_c)
