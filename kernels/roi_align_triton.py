"""The Triton kernels of RoIAlign, and what launches them.

A program computes a row of bins of one box: all samples of a bin one after the other, all bins of the row at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compile_spec import CompileSpec
from kernels.launch import Launch, real, triton_real
from kernels.sample_triton import accumulator, channels_innermost, divide, neighbours

# Bins times channels of a program.
_TILE = 1024


@triton.jit
def _axis(first, last, bins, RATIO: tl.constexpr, ALIGNED: tl.constexpr):
    """Of one axis of a box, in cells: the start, the step from bin to bin, and the samples of a bin."""
    size = last - first
    if ALIGNED:
        first -= 0.5
    else:
        size = tl.maximum(size, 1.0)
    # A number of bins of 1 is compiled in and no tensor, so it has no method `to`.
    step = divide(size, tl.cast(bins, size.dtype))
    if RATIO > 0:
        samples = tl.full((), RATIO, tl.int32)
    else:
        # A box without size has no samples, nor has one that is not finite.
        samples = tl.where((step > 0) & (step < float("inf")), tl.ceil(step), 0.0).to(tl.int32)
    return first, step, samples


@triton.jit
def _place(roi, boxes, ends, images, p, P, Q, RATIO: tl.constexpr, ALIGNED: tl.constexpr, IMAGES: tl.constexpr,
           BLOCK_Q: tl.constexpr):  # fmt: skip
    """The box's image, and of y and x: the first sample of the program's bins, the spacing, the number of samples."""
    o_n = tl.arange(0, IMAGES)
    image = tl.sum((tl.load(ends + o_n, mask=o_n < images, other=roi + 1) <= roi).to(tl.int64), 0)
    x1, y1 = tl.load(boxes + roi * 4), tl.load(boxes + roi * 4 + 1)
    x2, y2 = tl.load(boxes + roi * 4 + 2), tl.load(boxes + roi * 4 + 3)
    y, step_y, samples_y = _axis(y1, y2, P, RATIO, ALIGNED)
    x, step_x, samples_x = _axis(x1, x2, Q, RATIO, ALIGNED)
    spacing_y = divide(step_y, tl.maximum(samples_y, 1).to(y.dtype))
    spacing_x = divide(step_x, tl.maximum(samples_x, 1).to(x.dtype))
    y += p * step_y + 0.5 * spacing_y
    x += tl.arange(0, BLOCK_Q).to(x.dtype) * step_x + 0.5 * spacing_x
    return image, y, spacing_y, samples_y, x, spacing_x, samples_x


@triton.jit
def _load(row, column, c, stride_w, known):
    return tl.load(row + (column * stride_w)[:, None] + c[None, :], mask=known, other=0.0)


@triton.jit
def forward_kernel(
    x, boxes, ends, out, images, H, W, C, P, Q, stride_n, stride_h, stride_w,
    RATIO: tl.constexpr, ALIGNED: tl.constexpr, IMAGES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Grid (R * P, blocks of C). `x` is (N, H, W, C) through its strides, `boxes` (R, 4) in cells, of type REAL.

    `ends` (N,) is where the boxes of each image end; `out` is (R, P, Q, C), of type REAL.
    """
    roi, p = (tl.program_id(0) // P).to(tl.int64), tl.program_id(0) % P
    image, y, spacing_y, samples_y, b_x, spacing_x, samples_x = _place(
        roi, boxes, ends, images, p, P, Q, RATIO, ALIGNED, IMAGES, BLOCK_Q
    )
    q, c = tl.arange(0, BLOCK_Q), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    wanted = (q < Q)[:, None] & (c < C)[None, :]
    x += image * stride_n
    total = tl.zeros((BLOCK_Q, BLOCK_C), dtype=REAL)
    i = 0
    while i < samples_y:
        top, bottom, down, inside_y = neighbours(y + i * spacing_y, H)
        upper, lower = x + top * stride_h, x + bottom * stride_h
        if inside_y:
            j = 0
            while j < samples_x:
                left, right, across, inside_x = neighbours(b_x + j * spacing_x, W)
                known = wanted & inside_x[:, None]
                across = across[:, None]
                above = _load(upper, left, c, stride_w, known).to(REAL) * (1 - across)
                above += _load(upper, right, c, stride_w, known).to(REAL) * across
                below = _load(lower, left, c, stride_w, known).to(REAL) * (1 - across)
                below += _load(lower, right, c, stride_w, known).to(REAL) * across
                total += above * (1 - down) + below * down
                j += 1
        i += 1
    total *= divide(tl.full((), 1.0, REAL), tl.maximum(samples_y * samples_x, 1).to(REAL))
    tl.store(out + ((roi * P + p) * Q + q)[:, None] * C + c[None, :], total, mask=wanted)


@triton.jit
def backward_kernel(
    grad, boxes, ends, grad_x, images, H, W, C, P, Q, stride_n, stride_h, stride_w,
    RATIO: tl.constexpr, ALIGNED: tl.constexpr, IMAGES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Grid as in `forward_kernel`. `grad` is (R, P, Q, C); `grad_x` (N, H, W, C), of type REAL, is added to."""
    roi, p = (tl.program_id(0) // P).to(tl.int64), tl.program_id(0) % P
    image, y, spacing_y, samples_y, b_x, spacing_x, samples_x = _place(
        roi, boxes, ends, images, p, P, Q, RATIO, ALIGNED, IMAGES, BLOCK_Q
    )
    q, c = tl.arange(0, BLOCK_Q), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    wanted = (q < Q)[:, None] & (c < C)[None, :]
    share = tl.load(grad + ((roi * P + p) * Q + q)[:, None] * C + c[None, :], mask=wanted, other=0.0).to(REAL)
    share *= divide(tl.full((), 1.0, REAL), tl.maximum(samples_y * samples_x, 1).to(REAL))
    grad_x += image * stride_n
    i = 0
    while i < samples_y:
        top, bottom, down, inside_y = neighbours(y + i * spacing_y, H)
        upper, lower = grad_x + top * stride_h, grad_x + bottom * stride_h
        if inside_y:
            j = 0
            while j < samples_x:
                left, right, across, inside_x = neighbours(b_x + j * spacing_x, W)
                known = wanted & inside_x[:, None]
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


def _launch(kernel, maps: dict[str, Tensor], results: dict[str, Tensor], x, boxes, ends, output_size, ratio, aligned):
    """`x` is the one of the tensors that is (N, C, H, W)."""
    _, channels, height, width = x.shape
    p, q = output_size
    block_q = triton.next_power_of_2(q)
    block_c = min(triton.next_power_of_2(channels), max(1, _TILE // block_q))
    numbers = {"images": len(ends), "H": height, "W": width, "C": channels, "P": p, "Q": q}
    strides = {"stride_n": x.stride(0), "stride_h": x.stride(2), "stride_w": x.stride(3)}
    constants = {
        "RATIO": ratio,
        "ALIGNED": aligned,
        "IMAGES": triton.next_power_of_2(len(ends)),
        "BLOCK_Q": block_q,
        "BLOCK_C": block_c,
        "REAL": triton_real(x.dtype),
    }
    grid = (len(boxes) * p, triton.cdiv(channels, block_c))
    return Launch(kernel, grid, maps | {"boxes": boxes, "ends": ends} | results | numbers | strides, constants)


def forward(output: Tensor, features: Tensor, boxes: Tensor, ends: Tensor, ratio: int, aligned: bool) -> None:
    """Write RoIAlign of `features` (N, C, H, W) to `output` (R, C, P, Q), channels last; boxes (R, 4) in cells."""
    if not output.numel():
        return
    x = channels_innermost(features)
    size = output.shape[2:]
    _launch(forward_kernel, {"x": x}, {"out": output}, x, boxes, ends, size, ratio, aligned).run()


def backward(grad: Tensor, boxes: Tensor, ends: Tensor, shape: tuple[int, ...], ratio: int, aligned: bool) -> Tensor:
    """The gradient of the features (N, C, H, W) for `grad` (R, C, P, Q): a sum of atomic additions, in any order."""
    result = accumulator(grad, shape)
    if not grad.numel():
        return result
    rows = grad.permute(0, 2, 3, 1).contiguous()
    size = grad.shape[2:]
    _launch(backward_kernel, {"grad": rows}, {"grad_x": result}, result, boxes, ends, size, ratio, aligned).run()
    return result


def compile_specs() -> list[CompileSpec]:
    """The kernels as they run on P2 of 800x1333 pixels, 256 channels: 7x7 bins of 512 boxes for each of 8 images."""
    specs = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):

        def new(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        x = new(8, 200, 336, 256).permute(0, 3, 1, 2)
        boxes, ends = new(4096, 4, dtype=real(dtype)), new(8, dtype=torch.int32)
        rows = new(4096, 7, 7, 256, dtype=real(dtype))
        gradient = new(8, 200, 336, 256, dtype=real(dtype)).permute(0, 3, 1, 2)
        size = (7, 7)
        launch = _launch(forward_kernel, {"x": x}, {"out": rows}, x, boxes, ends, size, 0, True)
        specs.append(launch.spec("roi_align forward", dtype))
        # Gradients have the type of the output, which is float32 for all three.
        if dtype == torch.float32:
            launch = _launch(
                backward_kernel, {"grad": rows}, {"grad_x": gradient}, gradient, boxes, ends, size, 0, True
            )
            specs.append(launch.spec("roi_align backward", dtype))
    return specs
