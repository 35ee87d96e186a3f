"""Dynamic ReLU (Chen et al., ECCV 2020): the larger of two lines per channel, whose coefficients depend on the image.

    y[n, c, h, w] = max(a1[n, c] * x + b1[n, c], a2[n, c] * x + b2[n, c]),    x = input[n, c, h, w]

One convention holds on every path. Arithmetic and sums are float32 (float64 for a float64 input). Which line is the
larger is read from the sign of d = (a1 - a2) x + (b1 - b2); the gradient goes to the first line where d > 0, to the
second where d < 0, and half to each where d = 0, as `torch.maximum` splits it.

Names in the kernels: `i_` index, `o_` offsets, `m_` mask, `b_` a block of values; `n` image, `p` pixel (rows and
columns of the map as one), `c` channel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import resolve_backend
from kernels.compile_spec import CompileSpec


def dynamic_relu_reference(input: Tensor, coefficients: Tensor) -> Tensor:
    """The definition in plain PyTorch, differentiable by autograd; shapes and order as in `dynamic_relu`."""
    a1, b1, a2, b2 = coefficients[..., None, None].unbind(1)
    return torch.maximum(a1 * input + b1, a2 * input + b2)


def _line(x: Tensor, slope: Tensor, intercept: Tensor) -> Tensor:
    # addcmul is one pass, but runs scalar code when the innermost dimension is broadcast, as it is in NCHW.
    if x.stride(1) == 1:
        return torch.addcmul(intercept, x, slope)
    return torch.mul(x, slope).add_(intercept)


def _torch_forward(input: Tensor, coefficients: Tensor) -> Tensor:
    dtype = _accumulate_dtype(input)
    a1, b1, a2, b2 = coefficients.to(dtype)[..., None, None].unbind(1)
    x = input if input.dtype == dtype else input.to(dtype)
    first = _line(x, a1, b1)
    output = _empty_output(input)
    if input.dtype == dtype:
        return torch.maximum(first, _line(x, a2, b2), out=output)
    return output.copy_(torch.maximum(first, _line(x, a2, b2), out=first))


def _torch_backward(grad_output: Tensor, input: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    # A hand-written chain of whole-tensor calls in four buffers: small maps cost by the number of calls, large ones by
    # fresh memory. On a CPU `where`, `heaviside` and comparisons are many times slower than `sign`.
    dtype = _accumulate_dtype(input)
    a1, b1, a2, b2 = coefficients.to(dtype)[..., None, None].unbind(1)
    x = input if input.dtype == dtype else input.to(dtype)
    sign = _line(x, a1 - a2, b1 - b2).sign_()
    half = grad_output.to(dtype) * 0.5
    first = torch.addcmul(half, half, sign)
    second = torch.addcmul(half, half, sign, value=-1, out=sign)
    product, pixels = half, (2, 3)
    grad_a1 = torch.mul(first, x, out=product).sum(pixels)
    grad_a2 = torch.mul(second, x, out=product).sum(pixels)
    grad_coefficients = torch.stack([grad_a1, first.sum(pixels), grad_a2, second.sum(pixels)], 1)
    second.mul_(a2)
    grad_input = _empty_output(input)
    if input.dtype == dtype:
        torch.mul(first, a1, out=grad_input).add_(second)
    else:
        grad_input.copy_(first.mul_(a1).add_(second))
    return grad_input, grad_coefficients.to(coefficients.dtype)


@triton.jit
def _tile(tiles_p, tiles_c, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
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
def _load_coefficients(coefficients, i_n, o_c, channels, DTYPE: tl.constexpr):
    base = coefficients + i_n * 4 * channels + o_c
    m_c = o_c < channels
    b_a1 = tl.load(base, mask=m_c, other=0.0).to(DTYPE)
    b_b1 = tl.load(base + channels, mask=m_c, other=0.0).to(DTYPE)
    b_a2 = tl.load(base + 2 * channels, mask=m_c, other=0.0).to(DTYPE)
    b_b2 = tl.load(base + 3 * channels, mask=m_c, other=0.0).to(DTYPE)
    return b_a1[None, :], b_b1[None, :], b_a2[None, :], b_b2[None, :]


@triton.jit
def _forward_kernel(
    x,  # (N, P, C) through its strides
    coefficients,  # (N, 4, C) contiguous
    y,  # (N, P, C) through its strides
    pixels,
    channels,
    x_stride_n,
    x_stride_p,
    x_stride_c,
    y_stride_n,
    y_stride_p,
    y_stride_c,
    tiles_p,
    tiles_c,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
):
    i_n, _, o_p, o_c = _tile(tiles_p, tiles_c, BLOCK_P, BLOCK_C)
    m_pc = (o_p < pixels)[:, None] & (o_c < channels)[None, :]
    b_a1, b_b1, b_a2, b_b2 = _load_coefficients(coefficients, i_n, o_c, channels, DTYPE)
    o_x = i_n * x_stride_n + o_p[:, None] * x_stride_p + o_c[None, :] * x_stride_c
    o_y = i_n * y_stride_n + o_p[:, None] * y_stride_p + o_c[None, :] * y_stride_c
    b_x = tl.load(x + o_x, mask=m_pc, other=0.0).to(DTYPE)
    # A NaN in either line must reach the loss, as it does through torch.maximum.
    b_y = tl.maximum(b_a1 * b_x + b_b1, b_a2 * b_x + b_b2, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + o_y, b_y.to(y.dtype.element_ty), mask=m_pc)


@triton.jit
def _backward_kernel(
    grad_y,  # (N, P, C) through its strides
    x,  # (N, P, C) through its strides
    coefficients,  # (N, 4, C) contiguous
    grad_x,  # (N, P, C) through its strides
    partial,  # (N, chunks, 4, C) contiguous: sums over the pixels of one chunk
    pixels,
    channels,
    grad_y_stride_n,
    grad_y_stride_p,
    grad_y_stride_c,
    x_stride_n,
    x_stride_p,
    x_stride_c,
    grad_x_stride_n,
    grad_x_stride_p,
    grad_x_stride_c,
    chunks,
    tiles_c,
    steps,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
):
    i_n, i_chunk, o_p, o_c = _tile(chunks, tiles_c, BLOCK_P, BLOCK_C)
    m_c = o_c < channels
    b_a1, b_b1, b_a2, b_b2 = _load_coefficients(coefficients, i_n, o_c, channels, DTYPE)
    sum_a1 = tl.zeros((BLOCK_P, BLOCK_C), dtype=DTYPE)
    sum_b1 = tl.zeros((BLOCK_P, BLOCK_C), dtype=DTYPE)
    sum_a2 = tl.zeros((BLOCK_P, BLOCK_C), dtype=DTYPE)
    sum_b2 = tl.zeros((BLOCK_P, BLOCK_C), dtype=DTYPE)
    # A chunk is `steps` tiles, `chunks` apart: programs that run together then read neighbouring pixels.
    for _ in range(steps):
        m_pc = (o_p < pixels)[:, None] & m_c[None, :]
        o_grad_y = i_n * grad_y_stride_n + o_p[:, None] * grad_y_stride_p + o_c[None, :] * grad_y_stride_c
        o_x = i_n * x_stride_n + o_p[:, None] * x_stride_p + o_c[None, :] * x_stride_c
        o_grad_x = i_n * grad_x_stride_n + o_p[:, None] * grad_x_stride_p + o_c[None, :] * grad_x_stride_c
        b_grad_y = tl.load(grad_y + o_grad_y, mask=m_pc, other=0.0).to(DTYPE)
        b_x = tl.load(x + o_x, mask=m_pc, other=0.0).to(DTYPE)
        b_d = (b_a1 - b_a2) * b_x + (b_b1 - b_b2)
        b_share = tl.where(b_d > 0, 1.0, tl.where(b_d < 0, 0.0, 0.5)).to(DTYPE)
        b_first = b_grad_y * b_share
        b_second = b_grad_y - b_first
        b_grad_x = b_first * b_a1 + b_second * b_a2
        tl.store(grad_x + o_grad_x, b_grad_x.to(grad_x.dtype.element_ty), mask=m_pc)
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


_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
_FORWARD_TILE = 4096
_BACKWARD_TILE = 2048
_NUM_WARPS = 4
# Enough programs to fill any of the GPUs compiled for; past it a program takes more pixels and there are fewer sums.
_BACKWARD_PROGRAMS = 1024


def _accumulate_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _memory_format(input: Tensor) -> torch.memory_format:
    return torch.channels_last if input.stride(1) == 1 else torch.contiguous_format


def _empty_output(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=_memory_format(input))


def _flat_strides(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """`x` and its strides as (N, H * W, C); a copy only where rows and columns are not one evenly spaced sequence."""
    stride_n, stride_c, stride_h, stride_w = x.stride()
    _, _, height, width = x.shape
    if width == 1:
        return x, (stride_n, stride_h, stride_c)
    if height == 1 or stride_h == width * stride_w:
        return x, (stride_n, stride_w, stride_c)
    return _flat_strides(x.contiguous(memory_format=_memory_format(x)))


def _block(elements: int, pixels: int, channels: int, pixels_innermost: bool) -> dict[str, int]:
    # The innermost dimension takes up to 256 elements, which is what a warp reads at once, the other one the rest.
    inner, outer = (pixels, channels) if pixels_innermost else (channels, pixels)
    inner = min(triton.next_power_of_2(inner), 256)
    outer = min(triton.next_power_of_2(outer), elements // inner)
    return dict(zip(("BLOCK_P", "BLOCK_C"), (inner, outer) if pixels_innermost else (outer, inner), strict=True))


def _triton_forward(input: Tensor, coefficients: Tensor) -> Tensor:
    output = _empty_output(input)
    if input.numel() == 0:
        return output
    n, channels, height, width = input.shape
    pixels = height * width
    x, x_strides = _flat_strides(input)
    _, y_strides = _flat_strides(output)
    block = _block(_FORWARD_TILE, pixels, channels, y_strides[1] == 1)
    tiles_p, tiles_c = triton.cdiv(pixels, block["BLOCK_P"]), triton.cdiv(channels, block["BLOCK_C"])
    with torch.cuda.device_of(input):
        _forward_kernel[(n * tiles_p * tiles_c,)](
            x,
            coefficients.contiguous(),
            output,
            pixels,
            channels,
            *x_strides,
            *y_strides,
            tiles_p,
            tiles_c,
            DTYPE=_TRITON_DTYPE[_accumulate_dtype(input)],
            num_warps=_NUM_WARPS,
            **block,
        )
    return output


def _triton_backward(grad_output: Tensor, input: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    grad_input = _empty_output(input)
    if input.numel() == 0:
        return grad_input, torch.zeros_like(coefficients, memory_format=torch.contiguous_format)
    n, channels, height, width = input.shape
    pixels = height * width
    dtype = _accumulate_dtype(input)
    grad_y, grad_y_strides = _flat_strides(grad_output)
    x, x_strides = _flat_strides(input)
    _, grad_x_strides = _flat_strides(grad_input)
    block = _block(_BACKWARD_TILE, pixels, channels, grad_x_strides[1] == 1)
    tiles_p, tiles_c = triton.cdiv(pixels, block["BLOCK_P"]), triton.cdiv(channels, block["BLOCK_C"])
    # From the shape alone, never from the device: the order of summation is then the same everywhere.
    steps = min(tiles_p, max(1, n * tiles_p * tiles_c // _BACKWARD_PROGRAMS))
    chunks = triton.cdiv(tiles_p, steps)
    partial = torch.empty((n, chunks, 4, channels), dtype=dtype, device=input.device)
    with torch.cuda.device_of(input):
        _backward_kernel[(n * chunks * tiles_c,)](
            grad_y,
            x,
            coefficients.contiguous(),
            grad_input,
            partial,
            pixels,
            channels,
            *grad_y_strides,
            *x_strides,
            *grad_x_strides,
            chunks,
            tiles_c,
            steps,
            DTYPE=_TRITON_DTYPE[dtype],
            num_warps=_NUM_WARPS,
            **block,
        )
    return grad_input, partial.sum(1).to(coefficients.dtype)


def _forward(input: Tensor, coefficients: Tensor, backend: str) -> Tensor:
    return (_triton_forward if backend == "triton" else _torch_forward)(input, coefficients)


def _backward(grad_output: Tensor, input: Tensor, coefficients: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return (_triton_backward if backend == "triton" else _torch_backward)(grad_output, input, coefficients)


def _forward_fake(input: Tensor, coefficients: Tensor, backend: str) -> Tensor:
    return _empty_output(input)


def _backward_fake(grad_output: Tensor, input: Tensor, coefficients: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _empty_output(input), torch.empty_like(coefficients, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    input, coefficients, ctx.backend = inputs
    ctx.save_for_backward(input, coefficients)


def _autograd_backward(ctx, grad_output: Tensor):
    gradients = torch.ops.dyhead.dynamic_relu_backward(grad_output, *ctx.saved_tensors, ctx.backend)
    return *gradients, None


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError("dynamic_relu is differentiable only once; use dynamic_relu_reference for higher derivatives")


# Registered through the library itself: `torch.library.custom_op` costs a third more per call and backward on a CPU.
_library = torch.library.Library("dyhead", "FRAGMENT")
_library.define("dynamic_relu(Tensor input, Tensor coefficients, str backend) -> Tensor")
_library.define(
    "dynamic_relu_backward(Tensor grad_output, Tensor input, Tensor coefficients, str backend) -> (Tensor, Tensor)"
)
for _key in ("CPU", "CUDA"):
    _library.impl("dynamic_relu", _forward, _key)
    _library.impl("dynamic_relu_backward", _backward, _key)
torch.library.register_fake("dyhead::dynamic_relu", _forward_fake, lib=_library)
torch.library.register_fake("dyhead::dynamic_relu_backward", _backward_fake, lib=_library)
torch.library.register_autograd("dyhead::dynamic_relu", _autograd_backward, setup_context=_save, lib=_library)
torch.library.register_autograd("dyhead::dynamic_relu_backward", _no_second_derivative, lib=_library)


def dynamic_relu(input: Tensor, coefficients: Tensor) -> Tensor:
    """The larger of two lines per image and channel: `max(a1 * x + b1, a2 * x + b2)`.

    Differentiable once in both arguments. Ties give half of the gradient to each line. The result is deterministic.

    Args:
        input: (N, C, H, W), floating point, any strides; channels_last is the fast layout.
        coefficients: (N, 4, C), floating point, in the order a1, b1, a2, b2. May have another precision than `input`.

    Returns:
        (N, C, H, W) in the dtype of `input`, also under autocast: channels_last where the channels of `input` are
        innermost, contiguous otherwise.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit.

    Source: Chen et al., "Dynamic ReLU", ECCV 2020, Eq. 3 with K = 2; Dai et al., "Dynamic Head", CVPR 2021, Eq. 5.
    """
    if input.dim() != 4 or coefficients.shape != (input.shape[0], 4, input.shape[1]):
        raise ValueError(
            f"dynamic_relu takes input (N, C, H, W) and coefficients (N, 4, C), "
            f"got {tuple(input.shape)} and {tuple(coefficients.shape)}"
        )
    if not (input.is_floating_point() and coefficients.is_floating_point() and input.device == coefficients.device):
        raise ValueError(
            f"dynamic_relu takes floating-point tensors on one device, got input {input.dtype} on {input.device} and "
            f"coefficients {coefficients.dtype} on {coefficients.device}"
        )
    return torch.ops.dyhead.dynamic_relu(input, coefficients, resolve_backend(input.device))


def compile_specs() -> list[CompileSpec]:
    """The kernels as they run on 256 channels, in both memory layouts and every precision."""
    return [
        spec
        for dtype in ("fp32", "fp16", "bf16", "fp64")
        for layout in ("channels_last", "contiguous")
        for spec in _compile_specs(dtype, layout)
    ]


def _compile_specs(dtype: str, layout: str) -> list[CompileSpec]:
    tensor, accumulator = f"*{dtype}", "fp64" if dtype == "fp64" else "fp32"
    pixels, channels = 16800, 256
    inner, outer = ("c", "p") if layout == "channels_last" else ("p", "c")
    constexprs = {"DTYPE": tl.float64 if dtype == "fp64" else tl.float32}

    def spec(name, kernel, elements, tensors, partial, counters):
        strides = {f"{t}_stride_{d}": "i32" for t in tensors for d in "npc" if d != inner}
        block = _block(elements, pixels, channels, inner == "p")
        return CompileSpec(
            name=f"dynamic_relu {name} {layout}",
            kernel=kernel,
            signature={t: tensor for t in tensors}
            | {"coefficients": tensor}
            | partial
            | dict.fromkeys(("pixels", "channels", *counters), "i32")
            | strides,
            constexprs=constexprs | block | {f"{t}_stride_{inner}": 1 for t in tensors},
            num_warps=_NUM_WARPS,
            num_stages=3,
            dtype=dtype,
            divisible=("pixels", "channels", *(f"{t}_stride_{d}" for t in tensors for d in ("n", outer))),
        )

    return [
        spec("forward", _forward_kernel, _FORWARD_TILE, ("x", "y"), {}, ("tiles_p", "tiles_c")),
        spec(
            "backward",
            _backward_kernel,
            _BACKWARD_TILE,
            ("grad_y", "x", "grad_x"),
            {"partial": f"*{accumulator}"},
            ("chunks", "tiles_c", "steps"),
        ),
    ]
