"""The Triton kernels of RoIAlign, and what launches them.

A program computes a row of bins of one box: all samples of a bin one after the other, all bins of the row at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.regions.bilinear_kernels import accumulator, channels_innermost, divide, neighbours
from kernels.runtime.launch import Launch, Launcher, triton_real

# Bins times channels of a program.
_TILE = 1024


@triton.jit
def _axis(first, last, bins, RATIO: tl.constexpr, ALIGNED: tl.constexpr):
    """Of one axis of a box, in cells: the start, the step from bin to bin, the samples of a bin and their spacing.

    Samples are counted in floating point: there may be more than an integer holds.
    """
    size = last - first
    finite = tl.abs(size) < float("inf")
    if ALIGNED:
        first -= 0.5
    else:
        size = tl.maximum(size, 1.0)
    # A box whose size is not finite has no samples, nor has one without size.
    first, size = tl.where(finite, first, 0.0), tl.where(finite, size, 0.0)
    # A number of bins of 1 is compiled in and no tensor, so it has no method `to`.
    step = divide(size, tl.cast(bins, size.dtype))
    if RATIO > 0:
        samples = tl.where(finite, tl.full((), RATIO, step.dtype), 0.0)
    else:
        samples = tl.maximum(tl.ceil(step), 0.0)
    return first, step, samples, divide(step, tl.maximum(samples, 1.0))


@triton.jit
def _on_map(first, spacing, samples, length, RATIO: tl.constexpr):
    """The number of the first sample that may lie on the map, and how many do from there on.

    As `numbers_on_map` in `kernels/regions/roi_align_samples.py` has it: the others are not visited.
    """
    density = divide(tl.full((), 1.0, spacing.dtype), tl.where(tl.abs(spacing) < 1e-30, 1e-30, spacing))
    one, other = (-2 - first) * density, (length + 1 - first) * density
    begin = tl.minimum(tl.maximum(tl.floor(tl.minimum(one, other)) - 1, 0.0), 1e30)
    end = tl.minimum(tl.ceil(tl.maximum(one, other)) + 2, samples)
    count = tl.maximum(end - begin, 0.0)
    if RATIO == 0:
        count = tl.minimum(count, 2.0 * length + 8)
    return begin, count.to(tl.int32)


@triton.jit
def _place(roi, boxes, images, N, p, H, W, P, Q, RATIO: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The box's image, what a sample counts, and of y and x: the program's bins' first samples, the spacing, and which.

    A box of no image has no samples.
    """
    image = tl.load(images + roi)
    x1, y1 = tl.load(boxes + roi * 4), tl.load(boxes + roi * 4 + 1)
    x2, y2 = tl.load(boxes + roi * 4 + 2), tl.load(boxes + roi * 4 + 3)
    y, step_y, samples_y, spacing_y = _axis(y1, y2, P, RATIO, ALIGNED)
    x, step_x, samples_x, spacing_x = _axis(x1, x2, Q, RATIO, ALIGNED)
    y += p * step_y + 0.5 * spacing_y
    q = tl.arange(0, BLOCK_Q)
    x += q.to(x.dtype) * step_x + 0.5 * spacing_x
    begin_y, count_y = _on_map(y, spacing_y, samples_y, H, RATIO)
    begin_x, count_x = _on_map(x, spacing_x, samples_x, W, RATIO)
    count_y = tl.where((image >= 0) & (image < N), count_y, 0)
    count_x = tl.max(tl.where(q < Q, count_x, 0), 0)
    part = divide(tl.full((), 1.0, y.dtype), tl.maximum(samples_y * samples_x, 1.0))
    return image.to(tl.int64), part, y, spacing_y, begin_y, count_y, x, spacing_x, begin_x, count_x, samples_x


@triton.jit
def _load(row, column, c, stride_w, known):
    return tl.load(row + (column * stride_w)[:, None] + c[None, :], mask=known, other=0.0)


@triton.jit
def forward_kernel(
    x,
    boxes,
    images,
    out,
    N,
    H,
    W,
    C,
    P,
    Q,
    stride_n,
    stride_h,
    stride_w,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REAL: tl.constexpr,
):
    """Grid (R * P, blocks of C). `x` is (N, H, W, C) through its strides, `boxes` (R, 4) in cells, of type REAL.

    `images` (R,) are numbers of images, others than 0…N - 1 for none; `out` is (R, P, Q, C), of type REAL.
    """
    roi, p = (tl.program_id(0) // P).to(tl.int64), tl.program_id(0) % P
    image, part, y, spacing_y, begin_y, count_y, b_x, spacing_x, begin_x, count_x, samples_x = _place(
        roi, boxes, images, N, p, H, W, P, Q, RATIO, ALIGNED, BLOCK_Q
    )
    q, c = tl.arange(0, BLOCK_Q), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    wanted = (q < Q)[:, None] & (c < C)[None, :]
    x += image * stride_n
    total = tl.zeros((BLOCK_Q, BLOCK_C), dtype=REAL)
    i = 0
    while i < count_y:
        top, bottom, down, inside_y = neighbours(y + (begin_y + i) * spacing_y, H)
        upper, lower = x + top.to(tl.int64) * stride_h, x + bottom.to(tl.int64) * stride_h
        if inside_y:
            j = 0
            while j < count_x:
                number = begin_x + j
                left, right, across, inside_x = neighbours(b_x + number * spacing_x, W)
                known = wanted & (inside_x & (number < samples_x))[:, None]
                across = across[:, None]
                above = _load(upper, left, c, stride_w, known).to(REAL) * (1 - across)
                above += _load(upper, right, c, stride_w, known).to(REAL) * across
                below = _load(lower, left, c, stride_w, known).to(REAL) * (1 - across)
                below += _load(lower, right, c, stride_w, known).to(REAL) * across
                total += above * (1 - down) + below * down
                j += 1
        i += 1
    tl.store(out + ((roi * P + p) * Q + q)[:, None] * C + c[None, :], total * part, mask=wanted)


@triton.jit
def backward_kernel(
    grad,
    boxes,
    images,
    grad_x,
    N,
    H,
    W,
    C,
    P,
    Q,
    stride_n,
    stride_h,
    stride_w,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REAL: tl.constexpr,
):
    """Grid as in `forward_kernel`. `grad` is (R, P, Q, C); `grad_x` (N, H, W, C), of type REAL, is added to."""
    roi, p = (tl.program_id(0) // P).to(tl.int64), tl.program_id(0) % P
    image, part, y, spacing_y, begin_y, count_y, b_x, spacing_x, begin_x, count_x, samples_x = _place(
        roi, boxes, images, N, p, H, W, P, Q, RATIO, ALIGNED, BLOCK_Q
    )
    q, c = tl.arange(0, BLOCK_Q), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    wanted = (q < Q)[:, None] & (c < C)[None, :]
    share = tl.load(grad + ((roi * P + p) * Q + q)[:, None] * C + c[None, :], mask=wanted, other=0.0).to(REAL)
    share *= part
    grad_x += image * stride_n
    i = 0
    while i < count_y:
        top, bottom, down, inside_y = neighbours(y + (begin_y + i) * spacing_y, H)
        upper, lower = grad_x + top.to(tl.int64) * stride_h, grad_x + bottom.to(tl.int64) * stride_h
        if inside_y:
            j = 0
            while j < count_x:
                number = begin_x + j
                left, right, across, inside_x = neighbours(b_x + number * spacing_x, W)
                known = wanted & (inside_x & (number < samples_x))[:, None]
                first, second = share * (1 - across)[:, None], share * across[:, None]
                _add(upper, left, c, stride_w, first * (1 - down), known)
                _add(upper, right, c, stride_w, second * (1 - down), known)
                _add(lower, left, c, stride_w, first * down, known)
                _add(lower, right, c, stride_w, second * down, known)
                j += 1
        i += 1


@triton.jit
def _add(row, column, c, stride_w, value, known):
    tl.atomic_add(row + (column * stride_w)[:, None] + c[None, :], value, mask=known, sem="relaxed")


def _launch(kernel, tensors: dict[str, Tensor], x, out, boxes, images, ratio, aligned) -> Launch:
    """`x` and `out` are those of the tensors that are (N, C, H, W) and (R, C, P, Q)."""
    n, channels, height, width = x.shape
    p, q = out.shape[2:]
    # Offsets within a row have 32 bits: with 64, registers spill.
    if width * x.stride(3) >= 2**31:
        raise ValueError(f"features must have rows of fewer than 2**31 elements, got shape {tuple(x.shape)}")
    block_q = triton.next_power_of_2(q)
    block_c = min(triton.next_power_of_2(channels), max(1, _TILE // block_q))
    numbers = {"N": n, "H": height, "W": width, "C": channels, "P": p, "Q": q}
    strides = {"stride_n": x.stride(0), "stride_h": x.stride(2), "stride_w": x.stride(3)}
    constants = {
        "RATIO": ratio,
        "ALIGNED": aligned,
        "BLOCK_Q": block_q,
        "BLOCK_C": block_c,
        "REAL": triton_real(x.dtype),
    }
    grid = (len(boxes) * p, triton.cdiv(channels, block_c))
    return Launch(kernel, grid, tensors | {"boxes": boxes, "images": images} | numbers | strides, constants)


def forward_launch(x: Tensor, out: Tensor, boxes: Tensor, images: Tensor, ratio: int, aligned: bool) -> Launch:
    """`x` has its channels innermost; `out`, (R, C, P, Q), is written."""
    return _launch(forward_kernel, {"x": x, "out": out}, x, out, boxes, images, ratio, aligned)


def backward_launch(grad: Tensor, grad_x: Tensor, boxes: Tensor, images: Tensor, ratio: int, aligned: bool) -> Launch:
    """`grad`, (R, C, P, Q), has its channels innermost; `grad_x` is added to."""
    return _launch(backward_kernel, {"grad": grad, "grad_x": grad_x}, grad_x, grad, boxes, images, ratio, aligned)


_run_forward, _run_backward = Launcher(forward_launch), Launcher(backward_launch)


def forward(output: Tensor, features: Tensor, boxes: Tensor, images: Tensor, ratio: int, aligned: bool) -> None:
    """Write RoIAlign of `features` (N, C, H, W) to `output` (R, C, P, Q), channels last.

    Boxes (R, 4) are in cells, images (R,) int32 the numbers of theirs.
    """
    if not output.numel():
        return
    _run_forward(channels_innermost(features), output, boxes, images, ratio, aligned)


def backward(grad: Tensor, boxes: Tensor, images: Tensor, shape: tuple[int, ...], ratio: int, aligned: bool) -> Tensor:
    """The gradient of the features (N, C, H, W) for `grad` (R, C, P, Q): a sum of atomic additions, in any order."""
    result = accumulator(grad, shape)
    if not grad.numel():
        return result
    grad = grad.contiguous(memory_format=torch.channels_last)
    _run_backward(grad, result, boxes, images, ratio, aligned)
    return result
