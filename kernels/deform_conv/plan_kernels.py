"""The plan of a modulated deformable convolution from its offsets and masks, and their gradients.

A point is an offset group and a tap, numbered group * TAPS + tap. See `kernels.sampling.plan_kernels`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.sampling.plan_kernels import Sample, plan_gradients, store_plan


class Config(NamedTuple):
    """What is known at compilation.

    Attributes:
        TAPS, KW: Taps of the weight, and its width.
        GEOMETRY: Stride, padding and dilation of the convolution, each in y before x.
        BLOCK: Output pixels of a program.
        OFFSET_LAST, MASK_LAST: Whether the channels of offsets and masks, and of their gradients, come last in memory,
            or before the pixels.
        TYPE, PACKED, REAL: As in `kernels.sampling.product_kernels.Config`.
    """

    TAPS: int
    KW: int
    GEOMETRY: tuple[int, ...]
    BLOCK: int
    OFFSET_LAST: bool
    MASK_LAST: bool
    TYPE: Any
    PACKED: bool
    REAL: Any


class Pixels(NamedTuple):
    """(BLOCK,) output pixels: image, number in it, row and size of an image in 64 bits; y and x; and which exist."""

    image: Any
    number: Any
    row: Any
    size: Any
    y: Any
    x: Any
    known: Any


@triton.jit
def _pixels(HO, WO, rows, K: tl.constexpr):
    row = tl.program_id(0) * K.BLOCK + tl.arange(0, K.BLOCK)
    size = HO * WO
    number = row % size
    image = (row // size).to(tl.int64)
    return Pixels(image, number, row.to(tl.int64), tl.cast(size, tl.int64), number // WO, number % WO, row < rows)


@triton.jit
def _at(tensor, pixels, channel, CHANNELS, LAST: tl.constexpr):
    """Pointers to a channel of some pixels."""
    if LAST:
        place = pixels.row * CHANNELS + channel
    else:
        place = (pixels.image * CHANNELS + channel) * pixels.size + pixels.number
    return tensor + place


@triton.jit
def _sample(offset, mask, pixels, point, points, K: tl.constexpr):
    """The `Sample` of a point, of so many, at some pixels; without a mask that is 1."""
    place = _at(offset, pixels, 2 * point, 2 * points, K.OFFSET_LAST)
    dy = tl.load(place, mask=pixels.known, other=0.0).to(K.REAL)
    place = _at(offset, pixels, 2 * point + 1, 2 * points, K.OFFSET_LAST)
    dx = tl.load(place, mask=pixels.known, other=0.0).to(K.REAL)
    tap = point % K.TAPS
    y = (pixels.y * K.GEOMETRY[0] - K.GEOMETRY[2] + tap // K.KW * K.GEOMETRY[4]).to(K.REAL) + dy
    x = (pixels.x * K.GEOMETRY[1] - K.GEOMETRY[3] + tap % K.KW * K.GEOMETRY[5]).to(K.REAL) + dx
    if mask is None:
        factor = tl.where(pixels.known, 1.0, 0.0).to(K.REAL)
    else:
        factor = tl.load(_at(mask, pixels, point, points, K.MASK_LAST), mask=pixels.known, other=0.0).to(K.REAL)
    return Sample(y, x, factor)


@triton.jit(do_not_specialize=["H", "W", "HO", "WO", "rows"])
def plan_kernel(offset, mask, plan, H, W, HO, WO, rows, K: tl.constexpr):
    """Grid (blocks of rows, points): the `Plan` of offsets (N, 2 * points, HO, WO) and masks, which may be None."""
    pixels = _pixels(HO, WO, rows, K)
    point, points = tl.program_id(1), tl.num_programs(1)
    number = tl.cast(point, tl.int64) * rows + pixels.row
    sample = _sample(offset, mask, pixels, point, points, K)
    store_plan(plan, number, tl.cast(points, tl.int64) * rows, pixels.known, sample, H, W, K)


@triton.jit(do_not_specialize=["H", "W", "HO", "WO", "rows"])
def gradients_kernel(products, offset, mask, grad_offset, grad_mask, H, W, HO, WO, rows, K: tl.constexpr):
    """Grid (blocks of rows, points): gradients of offsets and masks, either of which may be None.

    `products` (samples, 4) are those of the plan's weights.
    """
    pixels = _pixels(HO, WO, rows, K)
    point, points = tl.program_id(1), tl.num_programs(1)
    number = tl.cast(point, tl.int64) * rows + pixels.row
    sample = _sample(offset, mask, pixels, point, points, K)
    grad = plan_gradients(products, number, pixels.known, sample, H, W)
    if grad_offset is not None:
        place = _at(grad_offset, pixels, 2 * point, 2 * points, K.OFFSET_LAST)
        tl.store(place, grad.y.to(K.TYPE), mask=pixels.known)
        place = _at(grad_offset, pixels, 2 * point + 1, 2 * points, K.OFFSET_LAST)
        tl.store(place, grad.x.to(K.TYPE), mask=pixels.known)
    if grad_mask is not None:
        tl.store(_at(grad_mask, pixels, point, points, K.MASK_LAST), grad.mask.to(K.TYPE), mask=pixels.known)
