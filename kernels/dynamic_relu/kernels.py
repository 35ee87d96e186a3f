"""The Triton kernels of the dynamic ReLU, what launches them, and what compiles them without a GPU.

Names: `i_` index, `o_` offsets, `m_` mask, `b_` a block of values; `n` image, `p` pixel (rows and columns of the map as
one), `c` channel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.runtime.compile_spec import CompileSpec


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
    STEPS: tl.constexpr,
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
    # A chunk is STEPS tiles, `chunks` apart: programs that run together then read neighbouring pixels.
    for _ in range(STEPS):
        m_pc = (o_p < pixels)[:, None] & m_c[None, :]
        o_grad_y = i_n * grad_y_stride_n + o_p[:, None] * grad_y_stride_p + o_c[None, :] * grad_y_stride_c
        o_x = i_n * x_stride_n + o_p[:, None] * x_stride_p + o_c[None, :] * x_stride_c
        o_grad_x = i_n * grad_x_stride_n + o_p[:, None] * grad_x_stride_p + o_c[None, :] * grad_x_stride_c
        b_grad_y = tl.load(grad_y + o_grad_y, mask=m_pc, other=0.0).to(DTYPE)
        b_x = tl.load(x + o_x, mask=m_pc, other=0.0).to(DTYPE)
        b_d = (b_a1 - b_a2) * b_x + (b_b1 - b_b2)
        # Where the difference is NaN both lines get all of the gradient, as from torch.maximum.
        b_grad_y = tl.where(b_d == 0, b_grad_y * 0.5, b_grad_y)
        b_first = tl.where(b_d < 0, 0.0, b_grad_y)
        b_second = tl.where(b_d > 0, 0.0, b_grad_y)
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


def _flat_strides(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """`x` and its strides as (N, H * W, C); a copy only where rows and columns are not one evenly spaced sequence."""
    stride_n, stride_c, stride_h, stride_w = x.stride()
    _, _, height, width = x.shape
    if width == 1:
        return x, (stride_n, stride_h, stride_c)
    if height == 1 or stride_h == width * stride_w:
        return x, (stride_n, stride_w, stride_c)
    return _flat_strides(x.contiguous(memory_format=torch.channels_last if stride_c == 1 else torch.contiguous_format))


def _block(elements: int, pixels: int, channels: int, pixels_innermost: bool) -> dict[str, int]:
    # The innermost dimension takes up to 256 elements, which is what a warp reads at once, the other one the rest.
    inner, outer = (pixels, channels) if pixels_innermost else (channels, pixels)
    inner = min(triton.next_power_of_2(inner), 256)
    outer = min(triton.next_power_of_2(outer), elements // inner)
    return dict(zip(("BLOCK_P", "BLOCK_C"), (inner, outer) if pixels_innermost else (outer, inner), strict=True))


def forward(output: Tensor, input: Tensor, coefficients: Tensor) -> None:
    """Write the dynamic ReLU of `input` to `output`, which is contiguous or channels_last."""
    if input.numel() == 0:
        return
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
            DTYPE=_TRITON_DTYPE[torch.promote_types(input.dtype, torch.float32)],
            num_warps=_NUM_WARPS,
            **block,
        )


def backward(grad_input: Tensor, grad_output: Tensor, input: Tensor, coefficients: Tensor) -> Tensor:
    """Write the gradient of `input` to `grad_input` and return that of the coefficients."""
    if input.numel() == 0:
        return torch.zeros_like(coefficients, memory_format=torch.contiguous_format)
    n, channels, height, width = input.shape
    pixels = height * width
    dtype = torch.promote_types(input.dtype, torch.float32)
    grad_y, grad_y_strides = _flat_strides(grad_output)
    x, x_strides = _flat_strides(input)
    _, grad_x_strides = _flat_strides(grad_input)
    block = _block(_BACKWARD_TILE, pixels, channels, grad_x_strides[1] == 1)
    tiles_p, tiles_c = triton.cdiv(pixels, block["BLOCK_P"]), triton.cdiv(channels, block["BLOCK_C"])
    # From the shape alone, never from the device: the order of summation is then the same everywhere. A power of two,
    # so that few variants are compiled; a constant there, because Triton 3.6 interprets no other range under NumPy 2.4.
    steps = min(tiles_p, max(1, n * tiles_p * tiles_c // _BACKWARD_PROGRAMS))
    steps = 2 ** (steps.bit_length() - 1)
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
            STEPS=steps,
            DTYPE=_TRITON_DTYPE[dtype],
            num_warps=_NUM_WARPS,
            **block,
        )
    return partial.sum(1).to(coefficients.dtype)


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

    def spec(name, kernel, elements, tensors, partial, counters, **more):
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
            constexprs=constexprs | block | more | {f"{t}_stride_{inner}": 1 for t in tensors},
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
            ("chunks", "tiles_c"),
            STEPS=16,
        ),
    ]
