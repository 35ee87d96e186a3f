"""Dynamic ReLU (Chen et al., ECCV 2020): the larger of two lines per channel, whose coefficients depend on the image.

    y[n, c, h, w] = max(a1[n, c] * x + b1[n, c], a2[n, c] * x + b2[n, c]),    x = input[n, c, h, w]

One convention holds on every path. Arithmetic and sums are float32 (float64 for a float64 input). Which line is the
larger is read from the sign of d = (a1 - a2) x + (b1 - b2); the gradient goes to the first line where d > 0, to the
second where d < 0, half to each where d = 0 and all of it to both where d is NaN, as `torch.maximum` splits it. Only
where infinities cancel in the lines and not in d, or the other way around, `torch.maximum` splits it otherwise.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.backend import resolve_backend
from kernels.runtime.checks import check_device, check_tensor, remembered
from kernels.runtime.operator import Derivative, Implementation, Operator, signature


def reference(input: Tensor, coefficients: Tensor) -> Tensor:
    """The definition in plain PyTorch, differentiable by autograd; shapes and order as in `dynamic_relu`."""
    a1, b1, a2, b2 = coefficients[..., None, None].unbind(1)
    return torch.maximum(a1 * input + b1, a2 * input + b2)


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    # `Tensor.to` costs as much as an operator on a tiny tensor, also where there is nothing to convert.
    return x if x.dtype == dtype else x.to(dtype)


def _line(x: Tensor, slope: Tensor, intercept: Tensor) -> Tensor:
    # addcmul is one pass, but runs scalar code when the innermost dimension is broadcast, as it is in NCHW.
    if x.stride(1) == 1:
        return torch.addcmul(intercept, x, slope)
    return torch.mul(x, slope).add_(intercept)


def _write_output(output: Tensor, input: Tensor, coefficients: Tensor) -> None:
    dtype = torch.promote_types(input.dtype, torch.float32)
    a1, b1, a2, b2 = _to(coefficients, dtype)[..., None, None].unbind(1)
    if input.dtype == dtype:
        torch.maximum(_line(input, a1, b1), _line(input, a2, b2), out=output)
    else:
        x = input.to(dtype)
        output.copy_(torch.maximum(_line(x, a1, b1), _line(x, a2, b2)))


def _write_gradient(grad_input: Tensor, grad_output: Tensor, input: Tensor, coefficients: Tensor) -> Tensor:
    dtype = torch.promote_types(input.dtype, torch.float32)
    lines, x = _to(coefficients, dtype), _to(input, dtype)
    if input.is_cpu:
        found = _backward_finite(grad_input, grad_output, x, lines)
        # What is not finite in any of the arguments is not finite in one of these, which are few, nor in their product.
        if math.isfinite(torch.dot(found.view(-1), lines.reshape(-1))):
            return _to(found, coefficients.dtype)
    return _backward_any(grad_input, grad_output, x, lines).to(coefficients.dtype)


def _backward_finite(grad_input: Tensor, grad_output: Tensor, x: Tensor, lines: Tensor) -> Tensor:
    """For finite numbers; `x` and `lines`, the coefficients, are in the type of sums, as is what is returned."""
    # A hand-written chain of whole-tensor calls in four buffers: small maps cost by the number of calls, large ones by
    # fresh memory. On a CPU `where`, `heaviside` and comparisons are many times slower than `sign`.
    a1, b1, a2, b2 = lines[..., None, None].unbind(1)
    sign = _line(x, a1 - a2, b1 - b2).sign_()
    half = _to(grad_output, x.dtype) * 0.5
    first = torch.addcmul(half, half, sign)
    second = torch.addcmul(half, half, sign, value=-1, out=sign)
    product, pixels = half, (2, 3)
    grad_a1 = torch.mul(first, x, out=product).sum(pixels)
    grad_a2 = torch.mul(second, x, out=product).sum(pixels)
    grad_lines = torch.stack([grad_a1, first.sum(pixels), grad_a2, second.sum(pixels)], 1)
    second.mul_(a2)
    if grad_input.dtype == x.dtype:
        torch.mul(first, a1, out=grad_input).add_(second)
    else:
        grad_input.copy_(first.mul_(a1).add_(second))
    return grad_lines


def _backward_any(grad_input: Tensor, grad_output: Tensor, x: Tensor, lines: Tensor) -> Tensor:
    """`_backward_finite` for any numbers."""
    a1, b1, a2, b2 = lines[..., None, None].unbind(1)
    difference = _line(x, a1 - a2, b1 - b2)
    grad = grad_output.to(x.dtype)
    grad = torch.where(difference == 0, grad * 0.5, grad)
    first, second = grad.masked_fill(difference < 0, 0), grad.masked_fill(difference > 0, 0)
    grad_input.copy_(first * a1 + second * a2)
    sums = (first * x, first, second * x, second)
    return torch.stack([each.sum((2, 3)) for each in sums], 1)


def _empty_output(input: Tensor) -> Tensor:
    last = input.stride(1) == 1
    return torch.empty_like(input, memory_format=torch.channels_last if last else torch.contiguous_format)


def _forward_torch(input: Tensor, coefficients: Tensor) -> Tensor:
    output = _empty_output(input)
    _write_output(output, input, coefficients)
    return output


def _forward_triton(input: Tensor, coefficients: Tensor) -> Tensor:
    # Triton is looked for only where it is used: it is not installed on every system.
    from kernels.dynamic_relu import launch

    output = _empty_output(input)
    launch.forward(output, input, coefficients)
    return output


def _backward_torch(grad_output: Tensor, input: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    grad_input = _empty_output(input)
    return grad_input, _write_gradient(grad_input, grad_output, input, coefficients)


def _backward_triton(grad_output: Tensor, input: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    from kernels.dynamic_relu import launch

    grad_input = _empty_output(input)
    return grad_input, launch.backward(grad_input, grad_output, input, coefficients)


def _fake_forward(input: Tensor, coefficients: Tensor, backend: str) -> Tensor:
    return _empty_output(input)


def _fake_backward(grad_output: Tensor, input: Tensor, coefficients: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _empty_output(input), torch.empty_like(coefficients, memory_format=torch.contiguous_format)


def _save(arguments: Sequence[Any], results: Sequence[Tensor]) -> tuple[list[Tensor], str]:
    input, coefficients, backend = arguments
    return [input, coefficients], backend


def _gradients(
    backward: Callable[..., Sequence[Tensor]],
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    backend: str,
    wanted: Sequence[bool],
) -> Sequence[Tensor]:
    return backward(grads, *grads, *tensors, backend)


_operator = Operator(
    "dynamic_relu",
    Implementation(
        "(Tensor input, Tensor coefficients, str backend) -> Tensor",
        _forward_torch,
        _forward_triton,
        _fake_forward,
    ),
    Derivative(
        Implementation(
            "(Tensor grad_output, Tensor input, Tensor coefficients, str backend) -> (Tensor, Tensor)",
            _backward_torch,
            _backward_triton,
            _fake_backward,
        ),
        _save,
        _gradients,
    ),
)


@remembered
def _check(input: Any, coefficients: Any) -> None:
    check_tensor("input", input, "(N, C, H, W)", 4)
    check_tensor("coefficients", coefficients, "(N, 4, C)", 3)
    check_device("coefficients", coefficients, "input", input)
    batch, channels, _, _ = input.shape
    if coefficients.shape != (batch, 4, channels):
        raise ValueError(
            f"coefficients must be (N, 4, C) = {(batch, 4, channels)} for this input, got {tuple(coefficients.shape)}"
        )


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
        TypeError: An argument is no tensor.
        ValueError: A shape, a type or a device does not fit; the message names the argument.
        NotImplementedError: A second derivative is asked for.

    Source: Chen et al., "Dynamic ReLU", ECCV 2020, Eq. 3 with K = 2; Dai et al., "Dynamic Head", CVPR 2021, Eq. 5.

    Example:
        With the lines x and 0 it is an ordinary ReLU.

        >>> import torch
        >>> from kernels import dynamic_relu
        >>> x, lines = torch.randn(2, 16, 8, 8), torch.zeros(2, 4, 16)
        >>> lines[:, 0] = 1
        >>> torch.equal(dynamic_relu(x, lines), x.relu())
        True
    """
    key = signature(input, coefficients)
    _check(key, input, coefficients)
    output: Tensor = _operator(key, input, coefficients, resolve_backend(input.device))
    return output
