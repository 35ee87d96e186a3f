"""Modulated deformable convolution in Triton: matrix products over samples that exist only in registers.

Maps are read channels last, so that the corner of a sample is one run of channels. A program owns a rectangle of output
pixels of one image. Its products run over steps, a step being a tap and a block of input channels; taps are innermost,
so that the pixels around the rectangle stay in the L1 cache while all taps visit them. The corners of the next step are
loaded before the product of this one and carried through the loop: left to itself, the compiler would copy them to
shared memory past the L1 cache.

A point is an offset group and a tap, numbered group * TAPS + tap. What belongs together travels as a NamedTuple: it
costs no instruction.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.sampling.kernels import (
    Sample,
    add_corners,
    add_products,
    find_corners,
    load_corners,
    load_gradient,
    mix_corners,
    no_products,
    point_gradients,
    tile_pixels,
)


class Config(NamedTuple):
    """What is known at compilation.

    Attributes:
        C, OUT: Input and output channels of one weight group, of which there are GROUPS.
        SHARE: Input channels of one offset group.
        SPAN: How many neighbouring input channels lie in one weight group and one offset group, and can share a block.
        KW, TAPS: Width of the weight, and width times height.
        GEOMETRY: Stride, padding and dilation of the convolution, each in y before x.
        HAS_MASK: Whether there is a mask; without one it is 1.
        TILE_H, TILE_W: The rectangle of pixels that a program works on, PIXELS = TILE_H * TILE_W.
        BLOCK_C, BLOCK_O: Input and output channels worked on at a time.
        REAL: Type of coordinates, weights of corners and sums: float32, or float64 for float64 tensors.
        INDEX: Integer type of a place within one image; images are found by 64-bit pointers.
        PRECISION: Of the products of float32 tensors.
    """

    C: int
    OUT: int
    GROUPS: int
    SHARE: int
    SPAN: int
    KW: int
    TAPS: int
    GEOMETRY: tuple[int, ...]
    HAS_MASK: bool
    TILE_H: int
    TILE_W: int
    BLOCK_C: int
    BLOCK_O: int
    REAL: Any
    INDEX: Any
    PRECISION: Any


class Strided(NamedTuple):
    """A tensor (N, C, H, W) of any strides: its pointer, and the strides in elements."""

    pointer: Any
    n: Any
    c: Any
    h: Any
    w: Any


class Predictions(NamedTuple):
    """Pointers (PIXELS,) to channel 0 of the offsets and masks of some pixels, and from one channel to the next."""

    offset: Any
    offset_c: Any
    mask: Any
    mask_c: Any


@triton.jit
def predictions(offset, mask, image, pixels, K: tl.constexpr):
    """The `Predictions` of some pixels of one image, or of an image each; `offset` and `mask` are `Strided`."""
    y, x = pixels.y.to(K.INDEX), pixels.x.to(K.INDEX)
    offsets = offset.pointer + image * offset.n + y * offset.h + x * offset.w
    masks = mask.pointer + image * mask.n + y * mask.h + x * mask.w
    return Predictions(offsets, offset.c, masks, mask.c)


@triton.jit
def locate_point(predicted, pixels, point, K: tl.constexpr):
    """The `Sample` of a point at some pixels."""
    tap = point % K.TAPS
    channel = point.to(K.INDEX)
    dy = tl.load(predicted.offset + 2 * channel * predicted.offset_c, mask=pixels.inside, other=0.0).to(K.REAL)
    dx = tl.load(predicted.offset + (2 * channel + 1) * predicted.offset_c, mask=pixels.inside, other=0.0).to(K.REAL)
    y = (pixels.y * K.GEOMETRY[0] - K.GEOMETRY[2] + tap // K.KW * K.GEOMETRY[4]).to(K.REAL) + dy
    x = (pixels.x * K.GEOMETRY[1] - K.GEOMETRY[3] + tap % K.KW * K.GEOMETRY[5]).to(K.REAL) + dx
    if K.HAS_MASK:
        mask = tl.load(predicted.mask + channel * predicted.mask_c, mask=pixels.inside, other=0.0).to(K.REAL)
    else:
        mask = tl.where(pixels.inside, 1.0, 0.0).to(K.REAL)
    return Sample(y, x, mask)


@triton.jit
def locate_step(step, group, x, predicted, pixels, H, W, K: tl.constexpr):
    """The `Values` of one step of a weight group."""
    c, known = locate_block(step // K.TAPS, K.SPAN, K.BLOCK_C)
    first = group * K.C + c
    span = group * K.C + step // K.TAPS // tl.cdiv(K.SPAN, K.BLOCK_C) * K.SPAN
    sample = locate_point(predicted, pixels, span // K.SHARE * K.TAPS + step % K.TAPS, K)
    corners = find_corners(sample, pixels.inside, H, W, K.INDEX)
    return load_corners(x, corners, first, known, K.C * K.GROUPS, K.SPAN % K.BLOCK_C == 0)


@triton.jit
def locate_block(number, SPAN: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels of a block, counted from the group's first, and which of them exist: blocks do not cross spans."""
    blocks: tl.constexpr = (SPAN + BLOCK_C - 1) // BLOCK_C
    within = (number % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return (number // blocks) * SPAN + within, within < SPAN


@triton.jit
def forward_kernel(x, weight, bias, H, W, HO, WO, offset, mask, out, K: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Grid (images * tiles, GROUPS * blocks of OUT).

    `x` is (N, H, W, C*GROUPS), `weight` (GROUPS, OUT, TAPS, C); `offset`, `mask` and `out` are `Strided`.
    """
    tiles = tl.cdiv(HO, K.TILE_H) * tl.cdiv(WO, K.TILE_W)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    blocks: tl.constexpr = (K.OUT + K.BLOCK_O - 1) // K.BLOCK_O
    group = tl.program_id(1) // blocks
    o = (tl.program_id(1) % blocks) * K.BLOCK_O + tl.arange(0, K.BLOCK_O)
    pixels = tile_pixels(tl.program_id(0) % tiles, HO, WO, K.TILE_H, K.TILE_W)
    x += image * H * W * (K.C * K.GROUPS)
    predicted = predictions(offset, mask, image, pixels, K)
    rows = weight + (group * K.OUT + o) * (K.TAPS * K.C)
    total = tl.zeros((K.TILE_H * K.TILE_W, K.BLOCK_O), dtype=K.REAL)
    steps: tl.constexpr = K.TAPS * (K.C // K.SPAN) * ((K.SPAN + K.BLOCK_C - 1) // K.BLOCK_C)
    values = locate_step(0, group, x, predicted, pixels, H, W, K)
    for step in range(steps):
        samples = mix_corners(values, K.REAL).to(x.dtype.element_ty)
        values = locate_step(tl.minimum(step + 1, steps - 1), group, x, predicted, pixels, H, W, K)
        c, known = locate_block(step // K.TAPS, K.SPAN, K.BLOCK_C)
        # Not a row of weights that is not there, whatever memory holds in its place.
        weights = tl.load(
            rows[None, :] + (step % K.TAPS * K.C + c)[:, None], mask=known[:, None] & (o < K.OUT)[None, :], other=0.0
        )
        total = tl.dot(samples, weights, total, input_precision=K.PRECISION, out_dtype=K.REAL)
    if HAS_BIAS:
        total += tl.load(bias + group * K.OUT + o, mask=o < K.OUT, other=0.0).to(K.REAL)[None, :]
    high, wide = pixels.y.to(K.INDEX), pixels.x.to(K.INDEX)
    pointers = out.pointer + image * out.n + (high * out.h + wide * out.w)[:, None]
    pointers += ((group * K.OUT + o).to(K.INDEX) * out.c)[None, :]
    tl.store(pointers, total.to(out.pointer.dtype.element_ty), mask=pixels.inside[:, None] & (o < K.OUT)[None, :])


@triton.jit
def backward_points_kernel(
    grad,
    x,
    offset,
    mask,
    weight,
    grad_x,
    grad_offset,
    grad_mask,
    H,
    W,
    HO,
    WO,
    K: tl.constexpr,
    TO_X: tl.constexpr,
    TO_OFFSET: tl.constexpr,
    TO_MASK: tl.constexpr,
):
    """Grid (images * tiles * points of a pixel,): gradients of one point's offset and mask, and its part of the map's.

    `grad` is (N, HO, WO, OUT*GROUPS), `x` (N, H, W, C*GROUPS), `weight` (GROUPS, TAPS, C, OUT). `grad_x`, of type REAL,
    is added to; every element of `grad_offset` and `grad_mask`, which are `Strided`, is written by one program.
    """
    tiles = tl.cdiv(HO, K.TILE_H) * tl.cdiv(WO, K.TILE_W)
    # The points of a tile run side by side: they read the same gradients and neighbouring pixels.
    points: tl.constexpr = K.C * K.GROUPS // K.SHARE * K.TAPS
    point = tl.program_id(0) % points
    tap = point % K.TAPS
    tile = tl.program_id(0) // points
    image = (tile // tiles).to(tl.int64)
    pixels = tile_pixels(tile % tiles, HO, WO, K.TILE_H, K.TILE_W)
    inside = pixels.inside
    high, wide = pixels.y.to(K.INDEX), pixels.x.to(K.INDEX)
    sample = locate_point(predictions(offset, mask, image, pixels, K), pixels, point, K)
    corners = find_corners(sample, inside, H, W, K.INDEX)
    x += image * H * W * (K.C * K.GROUPS)
    grad_x += image * H * W * (K.C * K.GROUPS)
    grad += image * HO * WO * (K.OUT * K.GROUPS)
    grad_rows = grad + ((high * WO + wide) * (K.OUT * K.GROUPS))[:, None]
    products = no_products(K.TILE_H * K.TILE_W, K.REAL)
    whole: tl.constexpr = K.GROUPS == 1 and K.BLOCK_O >= K.OUT
    if whole:
        o = tl.arange(0, K.BLOCK_O)
        gradient = load_gradient(grad_rows, o, inside, o < K.OUT)
    for block in range((K.SHARE // K.SPAN) * ((K.SPAN + K.BLOCK_C - 1) // K.BLOCK_C)):
        within, known = locate_block(block, K.SPAN, K.BLOCK_C)
        channel = point // K.TAPS * K.SHARE + within
        # All channels of a block lie in one weight group.
        group = (point // K.TAPS * K.SHARE + block // tl.cdiv(K.SPAN, K.BLOCK_C) * K.SPAN) // K.C
        column = tl.zeros((K.TILE_H * K.TILE_W, K.BLOCK_C), dtype=K.REAL)
        for start in range(0, K.OUT, K.BLOCK_O):
            o = start + tl.arange(0, K.BLOCK_O)
            if not whole:
                gradient = load_gradient(grad_rows, group * K.OUT + o, inside, o < K.OUT)
            weights = tl.load(
                weight + ((group * K.TAPS + tap) * K.C + channel - group * K.C)[None, :] * K.OUT + o[:, None],
                mask=known[None, :] & (o < K.OUT)[:, None],
                other=0.0,
            )
            column = tl.dot(gradient, weights, column, input_precision=K.PRECISION, out_dtype=K.REAL)
        if TO_OFFSET or TO_MASK:
            products = add_products(
                products, column, x, corners, channel, known, K.C * K.GROUPS, K.SPAN % K.BLOCK_C == 0, K.REAL
            )
        if TO_X:
            add_corners(grad_x, corners, column, channel, known, K.C * K.GROUPS)
    down, right, along = point_gradients(products, sample, corners)
    if TO_OFFSET:
        target = grad_offset.pointer + image * grad_offset.n + high * grad_offset.h + wide * grad_offset.w
        target += (2 * point).to(K.INDEX) * grad_offset.c
        tl.store(target, down.to(grad_offset.pointer.dtype.element_ty), mask=inside)
        tl.store(target + grad_offset.c, right.to(grad_offset.pointer.dtype.element_ty), mask=inside)
    if TO_MASK:
        target = grad_mask.pointer + image * grad_mask.n + high * grad_mask.h + wide * grad_mask.w
        target += point.to(K.INDEX) * grad_mask.c
        tl.store(target, along.to(grad_mask.pointer.dtype.element_ty), mask=inside)


@triton.jit
def _tile_step(tile, step, group, x, offset, mask, H, W, HO, WO, K: tl.constexpr):
    """`locate_step` for one of the tiles of all images."""
    tiles = tl.cdiv(HO, K.TILE_H) * tl.cdiv(WO, K.TILE_W)
    image = (tile // tiles).to(tl.int64)
    pixels = tile_pixels(tile % tiles, HO, WO, K.TILE_H, K.TILE_W)
    base = x + image * H * W * (K.C * K.GROUPS)
    return locate_step(step, group, base, predictions(offset, mask, image, pixels, K), pixels, H, W, K)


@triton.jit
def backward_weight_kernel(grad, x, offset, mask, partial, H, W, HO, WO, tiles, K: tl.constexpr, TILES: tl.constexpr):
    """Grid (steps of a weight group, GROUPS * blocks of OUT, splits): a split sums over TILES tiles of all images.

    `grad` is (N, HO, WO, OUT*GROUPS), `x` (N, H, W, C*GROUPS), `partial` (splits, GROUPS, OUT, TAPS, C) of type REAL;
    `offset` and `mask` are `Strided`.
    """
    step = tl.program_id(0)
    blocks: tl.constexpr = (K.OUT + K.BLOCK_O - 1) // K.BLOCK_O
    group = tl.program_id(1) // blocks
    o = (tl.program_id(1) % blocks) * K.BLOCK_O + tl.arange(0, K.BLOCK_O)
    split = tl.program_id(2)
    per_image = tl.cdiv(HO, K.TILE_H) * tl.cdiv(WO, K.TILE_W)
    total = tl.zeros((K.BLOCK_O, K.BLOCK_C), dtype=K.REAL)
    values = _tile_step(split * TILES, step, group, x, offset, mask, H, W, HO, WO, K)
    for i in range(TILES):
        tile = split * TILES + i
        samples = mix_corners(values, K.REAL).to(x.dtype.element_ty)
        values = _tile_step(tl.minimum(tile + 1, tiles - 1), step, group, x, offset, mask, H, W, HO, WO, K)
        pixels = tile_pixels(tile % per_image, HO, WO, K.TILE_H, K.TILE_W)
        image = (tile // per_image).to(tl.int64)
        rows = grad + (image * HO * WO + pixels.y.to(K.INDEX) * WO + pixels.x) * (K.OUT * K.GROUPS)
        # The last split may have fewer tiles: what it computes beyond them has no gradient.
        gradient = load_gradient(rows[:, None], group * K.OUT + o, pixels.inside & (tile < tiles), o < K.OUT)
        total = tl.dot(tl.trans(gradient), samples, total, input_precision=K.PRECISION, out_dtype=K.REAL)
    c, known = locate_block(step // K.TAPS, K.SPAN, K.BLOCK_C)
    rows = partial + ((split.to(tl.int64) * K.GROUPS + group) * K.OUT + o) * (K.TAPS * K.C)
    tl.store(rows[:, None] + (step % K.TAPS * K.C + c)[None, :], total, mask=(o < K.OUT)[:, None] & known[None, :])
