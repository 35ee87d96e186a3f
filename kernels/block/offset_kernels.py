"""The ordinary 3x3 convolution of a block, from C channels to few, of all levels in one launch, and its gradients.

Levels are rows of one matrix, `kernels.block.layout`; a level is found by its problem, that of the level from itself,
which has the level's number. The forward product runs over steps, a step being a tap and a block of input channels,
taps innermost. The pixels of the next step are loaded before the product of this one and carried through the loop, so
that they come from the L1 cache, where nine taps find them, and not past it.

Backward, OUT is too small for a product of its own. Both gradients are products with the unfolded gradient, in which
column k = tap * OUT + o of a pixel is the gradient of output o at the pixel that sees this one at that tap:

    gradient of the input = unfolded @ weight (9 OUT, C),    gradient of the weight = unfolded^T @ input (pixels, C)

Names as in `kernels.sampling.product_kernels`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.block.plan_kernels import plan_pixels
from kernels.block.sums import clear, sum_rows, work_item
from kernels.sampling.maps import HEIGHT, INPUT_ROW, PROBLEM_COLUMNS, WIDTH, tile_pixels
from kernels.sampling.pack_kernels import pack_piece


class Config(NamedTuple):
    """What is known at compilation of the forward kernel.

    Attributes:
        C, OUT: Input and output channels.
        TILE_H, TILE_W, BLOCK_C, BLOCK_O: Pixels and channels of a program and a step.
        CROP, SIGMOID: True; as in `kernels.block.plan_kernels.Config`, like TYPE and PACKED.
        REAL, INDEX, PRECISION: As in `kernels.sampling.product_kernels.Config`.
    """

    C: int
    OUT: int
    TILE_H: int
    TILE_W: int
    BLOCK_C: int
    BLOCK_O: int
    CROP: bool
    SIGMOID: bool
    TYPE: Any
    PACKED: bool
    REAL: Any
    INDEX: Any
    PRECISION: Any


class Layer(NamedTuple):
    """Weight (OUT, C, 3, 3) and bias (OUT,) of the convolution, or their gradients, with their strides in elements."""

    weight: Any
    bias: Any
    o: Any
    c: Any
    y: Any
    x: Any
    bias_o: Any


@triton.jit
def _level(problems, level, image):
    """Height, width and first row of a level of an image."""
    row = problems + level * PROBLEM_COLUMNS
    H, W = tl.load(row + HEIGHT), tl.load(row + WIDTH)
    return H, W, tl.load(row + INPUT_ROW) + image.to(tl.int64) * H * W


@triton.jit
def _neighbours(x, step, pixels, H, W, C: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr):
    """(PIXELS, BLOCK_C): what the pixels see at one tap of one block of channels."""
    tap = step % 9
    c = step // 9 * BLOCK_C + tl.arange(0, BLOCK_C)
    y, xx = pixels.y + tap // 3 - 1, pixels.x + tap % 3 - 1
    there = pixels.inside & (y >= 0) & (y < H) & (xx >= 0) & (xx < W)
    place = y.to(INDEX) * W + xx
    return tl.load(x + (place * C)[:, None] + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def _weights(layer, tap, o, c):
    """Pointers to the weights of some outputs and inputs at some taps."""
    return layer.weight + o * layer.o + c * layer.c + tap // 3 * layer.y + tap % 3 * layer.x


@triton.jit(do_not_specialize=["count", "packers", "sampled_rows"])
def forward_kernel(
    pyramid,
    layer,
    predicted,
    problems,
    work,
    counters,
    count,
    plan,
    levels,
    sampled_rows,
    packing,
    packers,
    K: tl.constexpr,
):
    """Grid (packers, then tiles; blocks of OUT): `pyramid` is (P, C), `predicted` (P, OUT), `layer` a `Layer`.

    The counters are those of a later launch, see `clear`. `plan` is what the predictions say where the convolutions
    sample, or None; `packing` are the convolutions' weights, or None.
    """
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        clear(counters, count)
    # Few programs and no launch of their own: they run beside the tiles.
    if tl.program_id(0) < packers:
        if packing is not None:
            pack_piece(packing, tl.program_id(0), K.C, K.PACKED)
    else:
        level, image, number = work_item(work - packers * 3)
        H, W, first = _level(problems, level, image)
        pixels = tile_pixels(number, tl.arange(0, K.TILE_H * K.TILE_W), H, W, K.TILE_H, K.TILE_W)
        x = pyramid + first * K.C
        o = tl.program_id(1) * K.BLOCK_O + tl.arange(0, K.BLOCK_O)
        total = tl.zeros((K.TILE_H * K.TILE_W, K.BLOCK_O), dtype=K.REAL)
        steps: tl.constexpr = 9 * ((K.C + K.BLOCK_C - 1) // K.BLOCK_C)
        b_next = _neighbours(x, 0, pixels, H, W, K.C, K.BLOCK_C, K.INDEX)
        for step in range(steps):
            b_x = b_next
            b_next = _neighbours(x, tl.minimum(step + 1, steps - 1), pixels, H, W, K.C, K.BLOCK_C, K.INDEX)
            c = step // 9 * K.BLOCK_C + tl.arange(0, K.BLOCK_C)
            places = _weights(layer, step % 9, o[None, :], c[:, None])
            b_weight = tl.load(places, mask=(c < K.C)[:, None] & (o < K.OUT)[None, :], other=0.0).to(b_x.dtype)
            total = tl.dot(b_x, b_weight, total, input_precision=K.PRECISION, out_dtype=K.REAL)
        b_bias = tl.load(layer.bias + o * layer.bias_o, mask=o < K.OUT, other=0.0)
        # As wide as the sum, but rounded to the type of the pyramid first, as autocast rounds a parameter.
        total += b_bias.to(pyramid.dtype.element_ty).to(K.REAL)[None, :]
        target = predicted + (first + pixels.y * W + pixels.x)[:, None] * K.OUT + o[None, :]
        known = pixels.inside[:, None] & (o < K.OUT)[None, :]
        tl.store(target, total.to(predicted.dtype.element_ty), mask=known)
        if plan is not None:
            # Every thread reads what others of this program have stored.
            tl.debug_barrier()
            plan_pixels(predicted, plan, levels, level, image, pixels.y, pixels.x, pixels.inside, sampled_rows, 0, K)


@triton.jit
def _unfolded(grad, y, x, inside, k, H, W, OUT: tl.constexpr, INDEX: tl.constexpr):
    """(PIXELS, BLOCK_K): columns k of the unfolded gradient of some pixels."""
    tap = k // OUT
    yy = y[:, None] - (tap // 3 - 1)[None, :]
    xx = x[:, None] - (tap % 3 - 1)[None, :]
    there = inside[:, None] & (k < 9 * OUT)[None, :] & (yy >= 0) & (yy < H) & (xx >= 0) & (xx < W)
    return tl.load(grad + (yy.to(INDEX) * W + xx) * OUT + (k % OUT)[None, :], mask=there, other=0.0)


@triton.jit
def _add_runs(partial, runs, layer, block, C: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr):
    """BLOCK columns of `partial`, see `backward_weight_kernel`, added up and put where they belong."""
    size: tl.constexpr = 9 * OUT * C
    i = block * BLOCK + tl.arange(0, BLOCK)
    total = sum_rows(partial, runs, size + OUT, i, i < size + OUT, 16, REAL)
    k = i // C
    target = _weights(layer, k // OUT, k % OUT, i % C)
    tl.store(target, total.to(layer.weight.dtype.element_ty), mask=i < size)
    target = layer.bias + (i - size) * layer.bias_o
    tl.store(target, total.to(layer.bias.dtype.element_ty), mask=(i >= size) & (i < size + OUT))


@triton.jit(do_not_specialize=["runs", "adders"])
def backward_input_kernel(
    grad,
    layer,
    others,
    grad_pyramid,
    partial,
    runs,
    grad_layer,
    adders,
    problems,
    work,
    C: tl.constexpr,
    OUT: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    REAL: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (adders, then tiles; blocks of C): the gradient of the pyramid; besides, the sum of another launch's pieces.

    `grad` is (P, OUT), `others` (P, C) is added, `grad_pyramid` is (P, C), `partial` (runs, 9 * OUT * C + OUT).
    """
    # Few programs and no launch of their own: they run beside the tiles.
    if tl.program_id(0) < adders:
        block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        _add_runs(partial, runs, grad_layer, block, C, OUT, BLOCK_S, REAL)
    else:
        level, image, number = work_item(work - adders * 3)
        H, W, first = _level(problems, level, image)
        y, x, inside = tile_pixels(number, tl.arange(0, TILE_H * TILE_W), H, W, TILE_H, TILE_W)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        total = tl.zeros((TILE_H * TILE_W, BLOCK_C), dtype=REAL)
        for step in range((9 * OUT + BLOCK_K - 1) // BLOCK_K):
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            b_grad = _unfolded(grad + first * OUT, y, x, inside, k, H, W, OUT, INDEX)
            places = _weights(layer, (k // OUT)[:, None], (k % OUT)[:, None], c[None, :])
            b_weight = tl.load(places, mask=(k < 9 * OUT)[:, None] & (c < C)[None, :], other=0.0).to(b_grad.dtype)
            total = tl.dot(b_grad, b_weight, total, input_precision=PRECISION, out_dtype=REAL)
        place = (first + y * W + x)[:, None] * C + c[None, :]
        known = inside[:, None] & (c < C)[None, :]
        total += tl.load(others + place, mask=known, other=0.0).to(REAL)
        tl.store(grad_pyramid + place, total.to(grad_pyramid.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["pixels_a_run"])
def backward_weight_kernel(
    grad,
    pyramid,
    partial,
    pixels_a_run,
    problems,
    work,
    C: tl.constexpr,
    OUT: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REAL: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (runs of pixels, blocks of 9 OUT, blocks of C): sums over a run's pixels, PIXELS at a time.

    A row of `partial` is the gradient of the weight (9, OUT, C), then that of the bias (OUT,), from one run.
    """
    level, image, number = work_item(work)
    H, W, first = _level(problems, level, image)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    grad += first * OUT
    rows = pyramid + first * C
    total = tl.zeros((BLOCK_K, BLOCK_C), dtype=REAL)
    sums = tl.zeros((BLOCK_K,), dtype=REAL)
    start = number * pixels_a_run
    end = tl.minimum(start + pixels_a_run, H * W)
    pixel = start + tl.arange(0, PIXELS)
    b_next = _unfolded(grad, pixel // W, pixel % W, pixel < end, k, H, W, OUT, INDEX)
    # The compiler loads nothing ahead in a loop of unknown length, so the gradient that is gathered next is carried.
    while start < end:
        b_grad = b_next
        place = rows + pixel.to(INDEX)[:, None] * C + c[None, :]
        b_x = tl.load(place, mask=(pixel < end)[:, None] & (c < C)[None, :], other=0.0)
        start += PIXELS
        pixel += PIXELS
        b_next = _unfolded(grad, pixel // W, pixel % W, pixel < end, k, H, W, OUT, INDEX)
        sums += tl.sum(b_grad.to(REAL), 0)
        total = tl.dot(tl.trans(b_grad), b_x, total, input_precision=PRECISION, out_dtype=REAL)
    partial += tl.program_id(0).to(tl.int64) * (9 * OUT * C + OUT)
    tl.store(partial + k[:, None] * C + c[None, :], total, mask=(k < 9 * OUT)[:, None] & (c < C)[None, :])
    # At the tap in the middle every pixel sees itself.
    middle = (k // OUT == 4) & (tl.program_id(2) == 0)
    tl.store(partial + 9 * OUT * C + k % OUT, sums, mask=middle)
