"""Modulated deformable convolution (DCNv2): reference, custom operator with gradients, public functions.

The operator of Zhu et al., "Deformable ConvNets v2", 2019: a convolution whose taps sample the input bilinearly, each
at its regular place plus an offset, times a mask. Conventions, where public implementations differ or say nothing:

- The map is surrounded by zeros, and sampling is bilinear up to them: a coordinate in (-1, 0) still sees pixel 0.
- At a coordinate of exactly -1 or exactly the size the sample is zero and so is the gradient of the offset, as in mmcv
  and the released DyHead. torchvision has a one-sided derivative there. Zero offsets meet it at every padded border.
- At integer coordinates the gradient of the offset is the right-hand derivative, as in mmcv and torchvision.
- At a coordinate that is NaN or infinite nothing is sampled. What is not sampled is zero, and the offset has no
  gradient there.
- Any other NaN or infinity spreads as in `reference`, but in Triton:
  - A sample less than a pixel outside of the map, or on its last row or column, also sees the second one from the edge,
    with weight 0; 0 times NaN is NaN.
  - In 16 bits what is not sampled sees the map's first two rows or columns with weight 0. In 32 and 64 bits it is zero,
    whatever the map holds, and so is a sample whose mask is 0.
  - The mask of what is not sampled has a gradient of 0, though that of the output be infinite.
  - From a gradient, mask or weight that is not finite the input's gradient is NaN or infinite in some pixels around the
    sample that have no share in it (with deterministic algorithms), or not in those whose share is 0 (without).
- Products of 16-bit numbers are summed in float32 and rounded once. In Triton a sample's four are summed in the type of
  the map, which rounds each, but for bfloat16 on AMD's GPUs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.backend import resolve_backend
from kernels.deform_conv import cpu
from kernels.deform_conv.checks import (
    SINGLE,
    Geometry,
    check_alike,
    check_geometry,
    check_level,
    check_lists,
    check_weight,
    level_names,
)
from kernels.runtime.checks import remembered
from kernels.runtime.operator import Derivative, Implementation, Operator, signature


def reference(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """`deform_conv2d` spelled out in differentiable PyTorch, for tests; arguments alike, but pairs instead of ints.

    In 16 bits every step is rounded to the type, except that coordinates are float32, without which two pixels of a
    large map would be the same, and that PyTorch adds up the products of the weight in float32.
    """
    batch, channels, height, width = input.shape
    kernel = weight.shape[2:]
    taps = kernel[0] * kernel[1]
    groups = channels // weight.shape[1]
    out_height, out_width = offset.shape[2:]
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32)).unflatten(1, (-1, taps, 2))
    tap = torch.arange(taps, device=input.device).view(-1, 1, 1)
    rows = torch.arange(out_height, device=input.device).view(-1, 1)
    cols = torch.arange(out_width, device=input.device)
    y = offset[:, :, :, 0] + (rows * stride[0] - padding[0] + tap // kernel[1] * dilation[0])
    x = offset[:, :, :, 1] + (cols * stride[1] - padding[1] + tap % kernel[1] * dilation[1])
    # What lies outside, or is not a number, is moved to where no pixel is: nothing of it is read or differentiated.
    sampled = (y > -1) & (y < height) & (x > -1) & (x < width)
    y, x = torch.where(sampled, y, height), torch.where(sampled, x, width)
    low_y, low_x = y.detach().floor(), x.detach().floor()
    # (N, offset groups, channels of a group, H*W), and (N, offset groups, 1, T*Ho*Wo) for each corner
    pixels = input.reshape(batch, offset.shape[1], -1, height * width)
    columns = pixels.new_zeros(())
    for corner_y, weight_y in ((low_y, 1 - (y - low_y)), (low_y + 1, y - low_y)):
        for corner_x, weight_x in ((low_x, 1 - (x - low_x)), (low_x + 1, x - low_x)):
            inside = (corner_y >= 0) & (corner_y < height) & (corner_x >= 0) & (corner_x < width)
            place = torch.where(inside, corner_y * width + corner_x, 0).long().flatten(2).unsqueeze(2)
            values = pixels.gather(3, place.expand(-1, -1, pixels.shape[2], -1))
            values = torch.where(inside.flatten(2).unsqueeze(2), values, 0)
            columns = columns + values * (weight_y * weight_x).to(input.dtype).flatten(2).unsqueeze(2)
    if mask is not None:
        columns = columns * mask.unflatten(1, (-1, taps)).flatten(2).unsqueeze(2)
    # The channels of all offset groups together, then parted by weight group: (N, groups, C/groups * T, Ho*Wo)
    columns = columns.reshape(batch, groups, weight.shape[1] * taps, -1)
    out = weight.reshape(groups, weight.shape[0] // groups, -1) @ columns
    out = out.reshape(batch, weight.shape[0], out_height, out_width)
    return out if bias is None else out + bias.view(-1, 1, 1)


def _new_outputs(inputs: Sequence[Tensor], offsets: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """Memory for the outputs: channels last where the input is."""
    outputs = []
    for x, offset in zip(inputs, offsets, strict=True):
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        memory_format = torch.channels_last if last else torch.contiguous_format
        shape = (x.shape[0], weight.shape[0], offset.shape[2], offset.shape[3])
        outputs.append(torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format))
    return outputs


def _new_gradients(
    inputs: Sequence[Tensor], offsets: Sequence[Tensor], masks: Sequence[Tensor], weight: Tensor, needs: Sequence[bool]
) -> list[list[Tensor]]:
    """Memory for the gradients: of inputs, offsets, masks, weight and bias, each a list, empty where not needed."""
    kinds = (inputs, offsets, masks, [weight], [weight.new_empty(weight.shape[0])])
    return [[torch.empty_like(x) for x in kind] if need else [] for kind, need in zip(kinds, needs, strict=True)]


def _forward(write: Callable[..., None], arguments: Sequence[Any]) -> list[Tensor]:
    inputs, offsets, _, weight = arguments[:4]
    outputs = _new_outputs(inputs, offsets, weight)
    if inputs[0].shape[0] > 0:
        write(outputs, *arguments)
    return outputs


def _backward(write: Callable[..., None], grads: list[Tensor], arguments: Sequence[Any]) -> list[Tensor]:
    *arguments, needs = arguments
    inputs, offsets, masks, weight, *_ = arguments
    results = _new_gradients(inputs, offsets, masks, weight, needs)
    flat = [result for kind in results for result in kind]
    if inputs[0].shape[0] > 0:
        write(results, grads, *arguments)
    else:
        for result in flat:
            result.zero_()
    return flat


def _forward_torch(*arguments: Any) -> list[Tensor]:
    return _forward(cpu.forward, arguments)


def _forward_triton(*arguments: Any) -> list[Tensor]:
    # Triton is looked for only where it is used: it is not installed on every system.
    from kernels.deform_conv import launch

    return _forward(launch.forward, arguments)


def _backward_torch(grads: list[Tensor], *arguments: Any) -> list[Tensor]:
    return _backward(cpu.backward, grads, arguments)


def _backward_triton(grads: list[Tensor], *arguments: Any) -> list[Tensor]:
    from kernels.deform_conv import launch

    return _backward(launch.backward, grads, arguments)


def _fake_forward(
    inputs: Sequence[Tensor], offsets: Sequence[Tensor], masks: Sequence[Tensor], weight: Tensor, *settings: Any
) -> list[Tensor]:
    return _new_outputs(inputs, offsets, weight)


def _fake_backward(grads: list[Tensor], *arguments: Any) -> list[Tensor]:
    inputs, offsets, masks, weight, *_, needs, _ = arguments
    return [result for kind in _new_gradients(inputs, offsets, masks, weight, needs) for result in kind]


# A deformable convolution counts as the dense convolution of its shape, the way PyTorch counts one.
def _flops(inputs: Any, offsets: Sequence[torch.Size], masks: Any, weight: torch.Size, *settings: Any) -> int:
    return sum(2 * n * h * w * weight.numel() for n, _, h, w in offsets)


def _backward_flops(grads: Any, *arguments: Any) -> int:
    # One product for the samples, which the gradients of input, offset and mask share, and one for the weight.
    needs = arguments[-1]
    return (any(needs[:3]) + bool(needs[3])) * _flops(*arguments)


class _Saved(NamedTuple):
    levels: int
    settings: Sequence[Any]


def _save(arguments: Sequence[Any], outputs: Sequence[Tensor]) -> tuple[list[Tensor | None], _Saved]:
    inputs, offsets, masks, weight, _, *settings = arguments
    return [weight, *inputs, *offsets, *masks], _Saved(len(inputs), settings)


def _gradients(
    backward: Callable[..., list[Tensor]],
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    saved: _Saved,
    wanted: list[bool],
) -> list[list[Tensor] | None]:
    weight, *others = tensors
    levels, (*settings, backend) = saved
    inputs, offsets, masks = others[:levels], others[levels : 2 * levels], others[2 * levels :]
    found = iter(backward(grads, list(grads), inputs, offsets, masks, weight, *settings, wanted, backend))
    counts = (levels, levels, len(masks), 1, 1)
    return [[next(found) for _ in range(n)] if need else None for need, n in zip(wanted, counts, strict=True)]


_TENSORS = "Tensor[] inputs, Tensor[] offsets, Tensor[] masks, Tensor weight"
_GEOMETRY = "int[] stride, int[] padding, int[] dilation"
_operator = Operator(
    "deform_conv2d",
    Implementation(
        f"({_TENSORS}, Tensor? bias, {_GEOMETRY}, str backend) -> Tensor[]",
        _forward_torch,
        _forward_triton,
        _fake_forward,
        _flops,
    ),
    Derivative(
        Implementation(
            f"(Tensor[] grads, {_TENSORS}, {_GEOMETRY}, bool[] needs, str backend) -> Tensor[]",
            _backward_torch,
            _backward_triton,
            _fake_backward,
            _backward_flops,
        ),
        _save,
        _gradients,
    ),
    casts=True,
)


@remembered
def _check(
    input: Any, offset: Any, mask: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any
) -> Geometry:
    check_weight(weight, bias)
    geometry = check_geometry(stride, padding, dilation)
    check_level(SINGLE, input, offset, mask, weight, geometry)
    return geometry


@remembered
def _check_levels(
    inputs: Any, offsets: Any, masks: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any
) -> Geometry:
    check_lists(inputs, offsets, masks)
    check_weight(weight, bias)
    geometry = check_geometry(stride, padding, dilation)
    for level, (x, offset) in enumerate(zip(inputs, offsets, strict=True)):
        check_level(level_names(level), x, offset, masks[level] if masks else None, weight, geometry)
    check_alike(inputs, offsets)
    return geometry


def _row(lists: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """What is in lists, one after the other, and their lengths; of what is no list, itself and -1."""
    row: list[Any] = []
    lengths = []
    for value in lists:
        is_list = isinstance(value, list | tuple)
        row += value if is_list else [value]
        lengths.append(len(value) if is_list else -1)
    return row, lengths


def _key(tensors: Sequence[Any], settings: Sequence[Any]) -> Any:
    """By which the check of a call is remembered: its signature, and its settings where those are whole numbers."""
    seen = signature(*tensors)
    if seen is None:
        return None
    whole = []
    for value in settings:
        if type(value) in (list, tuple):
            value = tuple(value)
            if not all(type(x) is int for x in value):
                return None
        # Not a bool, which is equal to a whole number.
        elif type(value) is not int:
            return None
        whole.append(value)
    return seen, *whole


def _call(
    key: Any,
    inputs: list[Tensor],
    offsets: list[Tensor],
    masks: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
) -> list[Tensor]:
    outputs: list[Tensor] = _operator(
        key, inputs, offsets, masks, weight, bias, *geometry, resolve_backend(weight.device)
    )
    return outputs


def deform_conv2d_levels(
    inputs: Sequence[Tensor],
    offsets: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    masks: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """`deform_conv2d` of maps that share everything but their size, such as the levels of a pyramid, in one call.

    Args:
        inputs: One (N, C, H_l, W_l) a level, of the same N, C, dtype and device.
        offsets: One a level, as in `deform_conv2d`.
        weight: As in `deform_conv2d`, for all levels.
        bias: As in `deform_conv2d`, for all levels.
        stride: As in `deform_conv2d`, for all levels.
        padding: As in `deform_conv2d`, for all levels.
        dilation: As in `deform_conv2d`, for all levels.
        masks: One a level, as in `deform_conv2d`, or None.

    Returns:
        One (N, O, Ho_l, Wo_l) a level: what `deform_conv2d` returns for each, up to float rounding.

    Raises:
        TypeError: As in `deform_conv2d`.
        ValueError: As in `deform_conv2d`, or the lists differ in length or the levels in batch, channels or groups.

    Example:
        >>> import torch
        >>> from kernels import deform_conv2d_levels
        >>> sizes = ((8, 8), (4, 4))
        >>> pyramid, offsets = ([torch.zeros(2, c, *size) for size in sizes] for c in (16, 18))
        >>> out = deform_conv2d_levels(pyramid, offsets, torch.randn(32, 16, 3, 3), padding=1)
        >>> [tuple(x.shape) for x in out]
        [(2, 32, 8, 8), (2, 32, 4, 4)]
    """
    tensors, lengths = _row((inputs, offsets, masks))
    key = _key((*tensors, weight, bias), (*lengths, stride, padding, dilation))
    geometry = _check_levels(key, inputs, offsets, masks, weight, bias, stride, padding, dilation)
    return _call(key, list(inputs), list(offsets), list(masks or ()), weight, bias, geometry)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution, modulated if a mask is given; arguments and layouts of `torchvision.ops.deform_conv2d`.

    T = kh * kw taps, G offset groups (as many as the channels of `offset` say), groups = C / weight.shape[1]. All
    tensors have one dtype (float16, bfloat16, float32, float64; autocast converts them) and one device. Every argument
    that is a tensor has a gradient, and there is no second derivative. The output is channels last where the input is.

    Args:
        input: (N, C, H, W), any strides; N may be 0.
        offset: (N, G * T * 2, Ho, Wo) in pixels of the input: for each offset group and tap its dy, then its dx.
        weight: (O, C / groups, kh, kw).
        bias: (O,), or None.
        stride: Pixels of the input from one output pixel to the next, an int or a pair for height and width.
        padding: Rows and columns of zeros on each side, an int or a pair.
        dilation: Pixels of the input from one tap to the next, an int or a pair.
        mask: (N, G * T, Ho, Wo), a factor for every sample, or None for ones.

    Returns:
        (N, O, Ho, Wo).

    Raises:
        TypeError: An argument is of a wrong Python type.
        ValueError: A shape, dtype or device does not fit the others; the message names it and what it must be.
        NotImplementedError: A second derivative is asked for.

    Source: Zhu et al., "Deformable ConvNets v2", CVPR 2019, Eq. 1.

    Example:
        Without offsets it is an ordinary convolution.

        >>> import torch
        >>> from kernels import deform_conv2d
        >>> x, weight = torch.randn(2, 16, 8, 8), torch.randn(32, 16, 3, 3)
        >>> out = deform_conv2d(x, torch.zeros(2, 18, 8, 8), weight, padding=1)
        >>> torch.allclose(out, torch.nn.functional.conv2d(x, weight, padding=1), atol=1e-4)
        True
    """
    key = _key((input, offset, mask, weight, bias), (stride, padding, dilation))
    geometry = _check(key, input, offset, mask, weight, bias, stride, padding, dilation)
    return _call(key, [input], [offset], [] if mask is None else [mask], weight, bias, geometry)[0]
