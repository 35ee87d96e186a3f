"""Small kernels that ask the GPU one question each about gathering; they are measured, and nothing else uses them."""

import triton
import triton.language as tl


@triton.jit
def _corners(step, x, base, shares, rows, row, W, C: tl.constexpr, TAPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """What the map holds at the four corners of each sample (PIXELS, BLOCK_C), and their shares (PIXELS,)."""
    tap = step % TAPS
    c = step // TAPS * BLOCK_C + tl.arange(0, BLOCK_C)
    place = tap * rows + row
    upper = x + (tl.load(base + place) * C)[:, None] + c[None, :]
    lower = upper + W * C
    corner = TAPS * rows
    return (
        tl.load(upper),
        tl.load(upper + C),
        tl.load(lower),
        tl.load(lower + C),
        tl.load(shares + place),
        tl.load(shares + corner + place),
        tl.load(shares + 2 * corner + place),
        tl.load(shares + 3 * corner + place),
    )


@triton.jit
def gather_product_kernel(
    x,
    base,
    shares,
    weight,
    out,
    rows,
    W,
    C: tl.constexpr,
    OUT: tl.constexpr,
    TAPS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PACKED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (rows / PIXELS,): the products of samples with a weight, as a deformable convolution's main loop has them.

    `x` is (pixels, C), `base` (TAPS, rows) the first corner of each sample, `shares` (4, TAPS, rows) of its corners,
    `weight` (TAPS, C, OUT), `out` (rows, OUT). PACKED: corners are mixed in the type of `x`, and not in float32. EARLY:
    the corners of the next step are loaded before the barrier that the product waits for, and not behind the product.
    """
    row = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    o = tl.arange(0, OUT)
    total = tl.zeros((PIXELS, OUT), dtype=tl.float32)
    steps: tl.constexpr = TAPS * (C // BLOCK_C)
    real: tl.constexpr = x.dtype.element_ty if PACKED else tl.float32
    v00, v01, v10, v11, w00, w01, w10, w11 = _corners(0, x, base, shares, rows, row, W, C, TAPS, BLOCK_C)
    for step in range(steps):
        samples = v00.to(real) * w00.to(real)[:, None] + v01.to(real) * w01.to(real)[:, None]
        samples += v10.to(real) * w10.to(real)[:, None] + v11.to(real) * w11.to(real)[:, None]
        samples = samples.to(x.dtype.element_ty)
        then = tl.minimum(step + 1, steps - 1)
        if EARLY:
            v00, v01, v10, v11, w00, w01, w10, w11 = _corners(then, x, base, shares, rows, row, W, C, TAPS, BLOCK_C)
        c = step // TAPS * BLOCK_C + tl.arange(0, BLOCK_C)
        weights = tl.load(weight + step % TAPS * C * OUT + c[:, None] * OUT + o[None, :])
        total = tl.dot(samples, weights, total)
        if not EARLY:
            v00, v01, v10, v11, w00, w01, w10, w11 = _corners(then, x, base, shares, rows, row, W, C, TAPS, BLOCK_C)
    tl.store(out + row[:, None] * OUT + o[None, :], total.to(out.dtype.element_ty))


@triton.jit
def scatter_add_kernel(target, place, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows,): adds ones to PARTS runs of BLOCK float32 numbers of `target`, numbered in `place` (rows, PARTS)."""
    run = tl.arange(0, BLOCK)
    for part in range(PARTS):
        start = tl.load(place + tl.program_id(0) * PARTS + part).to(tl.int64) * BLOCK
        tl.atomic_add(target + start + run, tl.full((BLOCK,), 1.0, dtype=tl.float32), sem="relaxed")
