"""The plan of bilinear samples, for each a pixel of the map and four weights; and the gradients of what it is made of.

A sample at (y, x) is a weighted sum of the pixels p, p + right, p + down and p + down + right of its map. Turned
around, a bilinear weight is a tent: the share of line i is 1 - |y - i| where that is positive. So the first of the two
lines may be moved into the map, and the tents are the weights there too: none of the four pixels is ever outside, and
the zeros around the map are weights of 0. A map of a single line has `down` = 0, one of a single column `right` = 0.

Geometry, offsets and masks end here: the matrix products read plans. A sample is numbered point * rows + row, a point
being an offset group and a tap, and a row an output pixel.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Plan(NamedTuple):
    """Pointers to a plan.

    Attributes:
        pixels: (samples,) int32, the number of pixel p within its map.
        weights: For 16-bit maps (samples,) int64, the weights of p, p + right, p + down and p + down + right in their
            type, lowest bits first; otherwise (4, samples) float32 or float64.
    """

    pixels: Any
    weights: Any


class Sample(NamedTuple):
    """Where some samples lie in their map, in pixels, and their masks."""

    y: Any
    x: Any
    mask: Any


class Weights(NamedTuple):
    """The weights of the four pixels of some samples."""

    w00: Any
    w01: Any
    w10: Any
    w11: Any


class Axis(NamedTuple):
    """Along one axis: the first of two lines in the map, its weight and the next one's, and what these change by.

    Attributes:
        first: int32.
        w0, w1: Weights.
        d0, d1: Derivatives of the weights by the coordinate, right-hand ones where it is an integer.
        sampled: Whether anything is sampled.
    """

    first: Any
    w0: Any
    w1: Any
    d0: Any
    d1: Any
    sampled: Any


@triton.jit
def along(place, size):
    """The `Axis` of coordinates in a map of `size` lines."""
    sampled = (place > -1) & (place < size)
    # What is not sampled, and need not be a number that an integer holds, goes where both tents are 0.
    place = tl.where(sampled, place, -2.0)
    low = tl.minimum(tl.maximum(tl.floor(place), 0.0), tl.maximum(size - 2, 0))
    t = place - low
    second = size > 1
    w0, w1 = tl.maximum(1 - tl.abs(t), 0.0), tl.where(second, tl.maximum(1 - tl.abs(t - 1), 0.0), 0.0)
    d0 = tl.where(sampled & (t < 1), tl.where(t < 0, 1.0, -1.0), 0.0)
    d1 = tl.where(sampled & second & (t >= 0), tl.where(t < 1, 1.0, -1.0), 0.0)
    return Axis(low.to(tl.int32), w0, w1, d0, d1, sampled)


@triton.jit
def store_plan(plan, number, samples, known, sample, H, W, K: tl.constexpr):
    """Write the plan of some samples of a map of H x W pixels.

    Args:
        plan: `Plan` for `samples` samples, 64 bits.
        number, known: Numbers of the samples, 64 bits, and which of them exist.
        sample: `Sample`, coordinates and masks.
        K: A constant with TYPE and PACKED, as in `kernels.sampling.product_kernels.Config`.
    """
    y, x = along(sample.y, H), along(sample.x, W)
    mask = tl.where(y.sampled & x.sampled, sample.mask, 0.0)
    w00, w01, w10, w11 = y.w0 * x.w0 * mask, y.w0 * x.w1 * mask, y.w1 * x.w0 * mask, y.w1 * x.w1 * mask
    tl.store(plan.pixels + number, y.first * W + x.first, mask=known)
    if K.PACKED:
        packed = _bits(w00, 0, K.TYPE) | _bits(w01, 16, K.TYPE) | _bits(w10, 32, K.TYPE) | _bits(w11, 48, K.TYPE)
        tl.store(plan.weights + number, packed, mask=known)
    else:
        tl.store(plan.weights + number, w00, mask=known)
        tl.store(plan.weights + samples + number, w01, mask=known)
        tl.store(plan.weights + 2 * samples + number, w10, mask=known)
        tl.store(plan.weights + 3 * samples + number, w11, mask=known)


@triton.jit
def _bits(weight, shift: tl.constexpr, TYPE: tl.constexpr):
    return (weight.to(TYPE).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF) << shift


@triton.jit
def _unpacked(packed, shift: tl.constexpr, TYPE: tl.constexpr):
    return ((packed >> shift) & 0xFFFF).to(tl.int16).to(TYPE, bitcast=True)


@triton.jit
def load_weights(plan, number, samples, inside, K: tl.constexpr):
    """The `Weights` of samples, in the type of the plan; 0 where not `inside`, if given."""
    other = None if inside is None else 0
    if K.PACKED:
        packed = tl.load(plan.weights + number, mask=inside, other=other)
        w00, w01 = _unpacked(packed, 0, K.TYPE), _unpacked(packed, 16, K.TYPE)
        w10, w11 = _unpacked(packed, 32, K.TYPE), _unpacked(packed, 48, K.TYPE)
    else:
        weights = plan.weights + number
        w00 = tl.load(weights, mask=inside, other=other)
        w01 = tl.load(weights + samples, mask=inside, other=other)
        w10 = tl.load(weights + 2 * samples, mask=inside, other=other)
        w11 = tl.load(weights + 3 * samples, mask=inside, other=other)
    return Weights(w00, w01, w10, w11)


@triton.jit
def load_pairs(plan, number, samples, there, K: tl.constexpr):
    """What `select_line` takes: the weights of some samples, 0 where not `there`, packed if they are of 16 bits."""
    if K.PACKED:
        packed = tl.load(plan.weights + number, mask=there, other=0)
        weights = packed.to(tl.int32), (packed >> 32).to(tl.int32)
    else:
        weights = load_weights(plan, number, samples, there, K)
    return weights


@triton.jit
def select_line(weights, upper, lower, K: tl.constexpr):
    """Weights of the left and the right pixel on the `upper` or the `lower` line of some samples, 0 on any other."""
    if K.PACKED:
        pair = tl.where(upper, weights[0][None, :, None, None], tl.where(lower, weights[1][None, :, None, None], 0))
        west = (pair & 0xFFFF).to(tl.int16).to(K.TYPE, bitcast=True)
        east = (pair >> 16).to(tl.int16).to(K.TYPE, bitcast=True)
    else:
        w00, w01 = weights.w00[None, :, None, None], weights.w01[None, :, None, None]
        w10, w11 = weights.w10[None, :, None, None], weights.w11[None, :, None, None]
        west, east = tl.where(upper, w00, tl.where(lower, w10, 0.0)), tl.where(upper, w01, tl.where(lower, w11, 0.0))
    return west, east


@triton.jit
def plan_gradients(products, number, known, sample, H, W):
    """Gradients of y, x and mask of samples (B,), a `Sample`, from those of the weights, `products` (samples, 4)."""
    four = tl.load(products + (4 * number)[:, None] + tl.arange(0, 4)[None, :], mask=known[:, None], other=0.0)
    west, east = tl.split(tl.reshape(four, (four.shape[0], 2, 2)))
    s00, s10 = tl.split(west)
    s01, s11 = tl.split(east)
    y, x = along(sample.y, H), along(sample.x, W)
    upper, lower = x.w0 * s00 + x.w1 * s01, x.w0 * s10 + x.w1 * s11
    left, right = y.w0 * s00 + y.w1 * s10, y.w0 * s01 + y.w1 * s11
    # What is not sampled has no gradient, though the mask, or the gradient of the sample, be NaN.
    sampled = y.sampled & x.sampled
    grad_y = tl.where(sampled, sample.mask * (y.d0 * upper + y.d1 * lower), 0.0)
    grad_x = tl.where(sampled, sample.mask * (x.d0 * left + x.d1 * right), 0.0)
    return Sample(grad_y, grad_x, tl.where(sampled, y.w0 * upper + y.w1 * lower, 0.0))
