"""The Triton kernels of BorderAlign, and what launches them.

A program takes one of the four borders of some boxes and some of its channels.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.regions.bilinear_kernels import accumulator, channels_innermost, divide, neighbours
from kernels.runtime.launch import Launch, Launcher, triton_real

# Boxes times channels of a program, and the most channels.
_TILE = 1024
_CHANNELS = 128


@triton.jit
def _border(boxes, count, POOL: tl.constexpr, BLOCK_B: tl.constexpr):
    """The image and the border of a program, its boxes, and where on x and y they begin and how far a step goes."""
    blocks = tl.cdiv(count, BLOCK_B)
    border = (tl.program_id(0) // blocks) % 4
    image = (tl.program_id(0) // blocks // 4).to(tl.int64)
    box = tl.program_id(0) % blocks * BLOCK_B + tl.arange(0, BLOCK_B)
    pointers = boxes + (image * count + box) * 4
    x1, y1 = tl.load(pointers, mask=box < count, other=0.0), tl.load(pointers + 1, mask=box < count, other=0.0)
    x2, y2 = tl.load(pointers + 2, mask=box < count, other=0.0), tl.load(pointers + 3, mask=box < count, other=0.0)
    steps = tl.full((), POOL, x1.dtype)
    wide, high = divide(x2 - x1, steps), divide(y2 - y1, steps)
    # The top is walked from the left, the left one from the top, the bottom one back from the right, the right one up.
    x, y = tl.where(border < 2, x1, x2), tl.where(border < 2, y1, y2)
    step_x = tl.where(border == 0, wide, tl.where(border == 2, -wide, 0.0))
    step_y = tl.where(border == 1, high, tl.where(border == 3, -high, 0.0))
    return image, border, box, x, y, step_x, step_y


@triton.jit
def _corners(x, y, H, W, stride_h, stride_w):
    """Offsets of the four cells around each position, the shares of the right and of the lower ones, and is it read?"""
    left, right, across, inside_x = neighbours(x, W)
    top, bottom, down, inside_y = neighbours(y, H)
    upper, lower = top.to(tl.int64) * stride_h, bottom.to(tl.int64) * stride_h
    left, right = left.to(tl.int64) * stride_w, right.to(tl.int64) * stride_w
    return upper + left, upper + right, lower + left, lower + right, across, down, inside_x & inside_y


@triton.jit
def _load(x, place, c, known):
    return tl.load(x + place[:, None] + c[None, :], mask=known, other=0.0)


@triton.jit
def _largest(
    x,
    c,
    wanted,
    b_x,
    b_y,
    step_x,
    step_y,
    H,
    W,
    stride_h,
    stride_w,
    POOL: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REAL: tl.constexpr,
):
    """The largest sample of each box and channel, and its number; EXACT also where a cell is infinite."""
    best = tl.full((BLOCK_B, BLOCK_C), float("-inf"), REAL)
    winner = tl.zeros((BLOCK_B, BLOCK_C), dtype=tl.int32)
    for i in range(POOL + 1):
        p00, p01, p10, p11, across, down, inside = _corners(
            b_x + i * step_x, b_y + i * step_y, H, W, stride_h, stride_w
        )
        across, down = across[:, None], down[:, None]
        known = wanted & inside[:, None]
        v00, v01 = _load(x, p00, c, known).to(REAL), _load(x, p01, c, known).to(REAL)
        v10, v11 = _load(x, p10, c, known).to(REAL), _load(x, p11, c, known).to(REAL)
        # Between equal cells this is exactly their value, so that the first of equal samples is found.
        above, below = v00 + across * (v01 - v00), v10 + across * (v11 - v10)
        sample = above + down * (below - above)
        if EXACT:
            weighted = (v00 * (1 - across) + v01 * across) * (1 - down) + (v10 * (1 - across) + v11 * across) * down
            sample = tl.where(tl.abs(sample) < float("inf"), sample, weighted)
        # As in PyTorch, what is not a number is larger than all numbers.
        larger = (sample > best) | ((sample != sample) & (best == best))
        best = tl.where(larger, sample, best)
        winner = tl.where(larger, i, winner)
    return best, winner


@triton.jit
def forward_kernel(
    x,
    boxes,
    out,
    chosen,
    count,
    H,
    W,
    C,
    stride_n,
    stride_h,
    stride_w,
    POOL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REAL: tl.constexpr,
):
    """Grid (N * 4 * blocks of boxes, blocks of C). `x` is (N, H, W, 4 * C) through its strides.

    `boxes` (N, n, 4) are in cells, of type REAL; `out` and `chosen` are (N, n, 4, C).
    """
    image, border, box, b_x, b_y, step_x, step_y = _border(boxes, count, POOL, BLOCK_B)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    wanted = (box < count)[:, None] & (c < C)[None, :]
    x += image * stride_n + border * C
    best, winner = _largest(
        x, c, wanted, b_x, b_y, step_x, step_y, H, W, stride_h, stride_w, POOL, False, BLOCK_B, BLOCK_C, REAL
    )
    # An infinity less an infinity is none: where anything came out as NaN, it is looked at again, and exactly.
    if tl.max((best != best).to(tl.int32)) > 0:
        best, winner = _largest(
            x, c, wanted, b_x, b_y, step_x, step_y, H, W, stride_h, stride_w, POOL, True, BLOCK_B, BLOCK_C, REAL
        )
    pointers = ((image * count + box) * 4 + border)[:, None] * C + c[None, :]
    tl.store(out + pointers, best.to(out.dtype.element_ty), mask=wanted)
    tl.store(chosen + pointers, winner.to(tl.uint8), mask=wanted)


@triton.jit
def backward_kernel(
    grad,
    chosen,
    boxes,
    grad_x,
    count,
    H,
    W,
    C,
    stride_n,
    stride_h,
    stride_w,
    POOL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REAL: tl.constexpr,
):
    """Grid as in `forward_kernel`. `grad` is (N, n, 4, C); `grad_x` (N, H, W, 4 * C), of type REAL, is added to."""
    image, border, box, b_x, b_y, step_x, step_y = _border(boxes, count, POOL, BLOCK_B)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    wanted = (box < count)[:, None] & (c < C)[None, :]
    pointers = ((image * count + box) * 4 + border)[:, None] * C + c[None, :]
    share = tl.load(grad + pointers, mask=wanted, other=0.0).to(REAL)
    i = tl.load(chosen + pointers, mask=wanted, other=0).to(REAL)
    p00, p01, p10, p11, across, down, inside = _corners(
        b_x[:, None] + i * step_x[:, None], b_y[:, None] + i * step_y[:, None], H, W, stride_h, stride_w
    )
    known = wanted & inside
    grad_x += image * stride_n + border * C + c[None, :]
    upper, lower = share * (1 - down), share * down
    tl.atomic_add(grad_x + p00, upper * (1 - across), mask=known, sem="relaxed")
    tl.atomic_add(grad_x + p01, upper * across, mask=known, sem="relaxed")
    tl.atomic_add(grad_x + p10, lower * (1 - across), mask=known, sem="relaxed")
    tl.atomic_add(grad_x + p11, lower * across, mask=known, sem="relaxed")


def _launch(kernel, tensors: dict[str, Tensor], x: Tensor, boxes: Tensor, pool_size: int) -> Launch:
    """`x` is the one of the tensors that is (N, 4 * C, H, W)."""
    images, channels, height, width = x.shape
    count, channels = boxes.shape[1], channels // 4
    block_c = min(triton.next_power_of_2(channels), _CHANNELS)
    block_b = min(triton.next_power_of_2(count), _TILE // block_c)
    numbers = {"count": count, "H": height, "W": width, "C": channels}
    strides = {"stride_n": x.stride(0), "stride_h": x.stride(2), "stride_w": x.stride(3)}
    constants = {"POOL": pool_size, "BLOCK_B": block_b, "BLOCK_C": block_c, "REAL": triton_real(x.dtype)}
    grid = (images * 4 * triton.cdiv(count, block_b), triton.cdiv(channels, block_c))
    # On NVIDIA a thread then loads 16 bytes at a time. With more of float32, Triton 3.6 spills on sm_100.
    warps = 4 if x.dtype.itemsize == 2 else 8
    return Launch(kernel, grid, tensors | {"boxes": boxes} | numbers | strides, constants, warps)


def forward_launch(x: Tensor, out: Tensor, chosen: Tensor, boxes: Tensor, pool_size: int) -> Launch:
    """`x` has its channels innermost; `out` and `chosen` are written."""
    return _launch(forward_kernel, {"x": x, "out": out, "chosen": chosen}, x, boxes, pool_size)


def backward_launch(grad: Tensor, chosen: Tensor, grad_x: Tensor, boxes: Tensor, pool_size: int) -> Launch:
    """`grad` is contiguous as (N, n, 4, C); `grad_x` is added to."""
    return _launch(backward_kernel, {"grad": grad, "chosen": chosen, "grad_x": grad_x}, grad_x, boxes, pool_size)


_run_forward, _run_backward = Launcher(forward_launch), Launcher(backward_launch)


def forward(output: Tensor, chosen: Tensor, features: Tensor, boxes: Tensor, pool_size: int) -> None:
    """Write the maxima and which samples they are; both (N, C, n, 4), in memory (N, n, 4, C)."""
    if not output.numel():
        return
    _run_forward(channels_innermost(features), output, chosen, boxes.contiguous(), pool_size)


def backward(grad: Tensor, chosen: Tensor, boxes: Tensor, shape: tuple[int, ...], pool_size: int) -> Tensor:
    """The gradient of the features (N, 4 * C, H, W), a sum of atomic additions, in any order."""
    result = accumulator(boxes, shape)
    if not grad.numel():
        return result
    _run_backward(grad.permute(0, 2, 3, 1).contiguous(), chosen, result, boxes.contiguous(), pool_size)
    return result
