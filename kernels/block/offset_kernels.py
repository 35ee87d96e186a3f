"""The ordinary 3x3 convolution of a block, from C channels to few, of all levels in one launch, and its gradients.

Levels are rows of one matrix, `kernels.block.layout`; a level is found by its problem, that of the level from itself,
which has the level's number. The forward product runs over steps, a step being a tap and a block of input channels,
taps innermost. The pixels of the next step are loaded before the product of this one and carried through the loop, so
that they come from the L1 cache, where nine taps find them, and not past it.

Backward, OUT is too small for a product of its own. Both gradients are products with the unfolded gradient, in which
column k = tap * OUT + o of a pixel is the gradient of output o at the pixel that sees this one at that tap:

    gradient of the input = unfolded @ weight (9 OUT, C),    gradient of the weight = unfolded^T @ input (pixels, C)

Names as in `kernels.deform_conv.kernels`.
"""

import triton
import triton.language as tl

from kernels.block.layout import HEIGHT, INPUT_ROW, PROBLEM_COLUMNS, WIDTH
from kernels.block.sums import work_item
from kernels.sampling.kernels import tile_pixels


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
def forward_kernel(
    pyramid,
    weight,
    bias,
    predicted,
    problems,
    work,
    C: tl.constexpr,
    OUT: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    REAL: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles, blocks of OUT): `pyramid` is (P, C), `weight` (OUT, 9, C), `predicted` (P, OUT)."""
    level, image, number = work_item(work)
    H, W, first = _level(problems, level, image)
    pixels = tile_pixels(number, H, W, TILE_H, TILE_W)
    x = pyramid + first * C
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((TILE_H * TILE_W, BLOCK_O), dtype=REAL)
    steps: tl.constexpr = 9 * ((C + BLOCK_C - 1) // BLOCK_C)
    b_next = _neighbours(x, 0, pixels, H, W, C, BLOCK_C, INDEX)
    for step in range(steps):
        b_x = b_next
        b_next = _neighbours(x, tl.minimum(step + 1, steps - 1), pixels, H, W, C, BLOCK_C, INDEX)
        c = step // 9 * BLOCK_C + tl.arange(0, BLOCK_C)
        b_weight = tl.load(
            weight + o[None, :] * (9 * C) + (step % 9 * C + c)[:, None],
            mask=(c < C)[:, None] & (o < OUT)[None, :],
            other=0.0,
        )
        total = tl.dot(b_x, b_weight, total, input_precision=PRECISION, out_dtype=REAL)
    total += tl.load(bias + o, mask=o < OUT, other=0.0).to(REAL)[None, :]
    target = predicted + (first + pixels.y * W + pixels.x)[:, None] * OUT + o[None, :]
    tl.store(target, total.to(predicted.dtype.element_ty), mask=pixels.inside[:, None] & (o < OUT)[None, :])


@triton.jit
def _unfolded(grad, y, x, inside, k, H, W, OUT: tl.constexpr, INDEX: tl.constexpr):
    """(PIXELS, BLOCK_K): columns k of the unfolded gradient of some pixels."""
    tap = k // OUT
    yy = y[:, None] - (tap // 3 - 1)[None, :]
    xx = x[:, None] - (tap % 3 - 1)[None, :]
    there = inside[:, None] & (k < 9 * OUT)[None, :] & (yy >= 0) & (yy < H) & (xx >= 0) & (xx < W)
    return tl.load(grad + (yy.to(INDEX) * W + xx) * OUT + (k % OUT)[None, :], mask=there, other=0.0)


@triton.jit
def backward_input_kernel(
    grad,
    weight,
    grad_pyramid,
    problems,
    work,
    C: tl.constexpr,
    OUT: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REAL: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles, blocks of C): `grad` is (P, OUT), `weight` (OUT, 9, C), `grad_pyramid` (P, C)."""
    level, image, number = work_item(work)
    H, W, first = _level(problems, level, image)
    y, x, inside = tile_pixels(number, H, W, TILE_H, TILE_W)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((TILE_H * TILE_W, BLOCK_C), dtype=REAL)
    for step in range((9 * OUT + BLOCK_K - 1) // BLOCK_K):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        b_grad = _unfolded(grad + first * OUT, y, x, inside, k, H, W, OUT, INDEX)
        rows = weight + (k % OUT * 9 + k // OUT) * C
        b_weight = tl.load(rows[:, None] + c[None, :], mask=(k < 9 * OUT)[:, None] & (c < C)[None, :], other=0.0)
        total = tl.dot(b_grad, b_weight, total, input_precision=PRECISION, out_dtype=REAL)
    target = grad_pyramid + (first + y * W + x)[:, None] * C + c[None, :]
    tl.store(target, total.to(grad_pyramid.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])


@triton.jit
def backward_weight_kernel(
    grad,
    pyramid,
    partial,
    problems,
    work,
    C: tl.constexpr,
    OUT: tl.constexpr,
    STEPS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REAL: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (runs of STEPS * PIXELS, blocks of 9 OUT, blocks of C): sums over a run's pixels.

    A row of `partial` is the gradient of the weight (9, OUT, C), then that of the bias (OUT,), from one run.
    """
    level, image, number = work_item(work)
    H, W, first = _level(problems, level, image)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_K, BLOCK_C), dtype=REAL)
    sums = tl.zeros((BLOCK_K,), dtype=REAL)
    for step in range(STEPS):
        pixel = (number * STEPS + step) * PIXELS + tl.arange(0, PIXELS)
        inside = pixel < H * W
        b_grad = _unfolded(grad + first * OUT, pixel // W, pixel % W, inside, k, H, W, OUT, INDEX)
        rows = pyramid + (first + pixel) * C
        b_x = tl.load(rows[:, None] + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        sums += tl.sum(b_grad.to(REAL), 0)
        total = tl.dot(tl.trans(b_grad), b_x, total, input_precision=PRECISION, out_dtype=REAL)
    partial += tl.program_id(0).to(tl.int64) * (9 * OUT * C + OUT)
    tl.store(partial + k[:, None] * C + c[None, :], total, mask=(k < 9 * OUT)[:, None] & (c < C)[None, :])
    # At the tap in the middle every pixel sees itself.
    middle = (k // OUT == 4) & (tl.program_id(2) == 0)
    tl.store(partial + 9 * OUT * C + k % OUT, sums, mask=middle)
