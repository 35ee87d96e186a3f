"""Modulated deformable convolution (DCNv2): reference, custom operator with gradients, public functions.

The operator of Zhu et al., "Deformable ConvNets v2", 2019: a convolution whose taps sample the input bilinearly, each
at its regular place plus an offset, times a mask. Conventions, where public implementations differ or say nothing:

- The map is surrounded by zeros, and sampling is bilinear up to them: a coordinate in (-1, 0) still sees pixel 0.
- At a coordinate of exactly -1 or exactly the size the sample is zero and so is the gradient of the offset, as in mmcv
  and the released DyHead. torchvision has a one-sided derivative there. Zero offsets meet it at every padded border.
- At integer coordinates the gradient of the offset is the right-hand derivative, as in mmcv and torchvision.
- At a coordinate that is NaN or infinite nothing is sampled. What is not sampled is zero, whatever pixels are near it,
  and the offset has no gradient there.
- Any other NaN or infinity spreads as in `reference`. The input's gradient in Triton is the exception: from a gradient,
  mask or weight that is not finite it is NaN or infinite in some pixels around the sample that have no share in it
  (with deterministic algorithms), or not in those whose share is 0 (without).
- Products of 16-bit numbers are summed in float32 and rounded once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backend import resolve_backend
from kernels.deform_conv import cpu as deform_conv_cpu
from kernels.deform_conv.checks import (
    SINGLE,
    check_alike,
    check_geometry,
    check_level,
    check_lists,
    check_weight,
    level_names,
)


def reference(input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None) -> Tensor:
    """`deform_conv2d` spelled out in differentiable PyTorch, for tests; arguments alike, but pairs instead of ints."""
    batch, channels, height, width = input.shape
    kernel = weight.shape[2:]
    taps = kernel[0] * kernel[1]
    groups = channels // weight.shape[1]
    out_height, out_width = offset.shape[2:]
    offset = offset.unflatten(1, (-1, taps, 2))
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
    columns = 0
    for corner_y, weight_y in ((low_y, 1 - (y - low_y)), (low_y + 1, y - low_y)):
        for corner_x, weight_x in ((low_x, 1 - (x - low_x)), (low_x + 1, x - low_x)):
            inside = (corner_y >= 0) & (corner_y < height) & (corner_x >= 0) & (corner_x < width)
            place = torch.where(inside, corner_y * width + corner_x, 0).long().flatten(2).unsqueeze(2)
            values = pixels.gather(3, place.expand(-1, -1, pixels.shape[2], -1))
            values = torch.where(inside.flatten(2).unsqueeze(2), values, 0)
            columns = columns + values * (weight_y * weight_x).flatten(2).unsqueeze(2)
    if mask is not None:
        columns = columns * mask.unflatten(1, (-1, taps)).flatten(2).unsqueeze(2)
    # The channels of all offset groups together, then parted by weight group: (N, groups, C/groups * T, Ho*Wo)
    columns = columns.reshape(batch, groups, weight.shape[1] * taps, -1)
    out = weight.reshape(groups, weight.shape[0] // groups, -1) @ columns
    out = out.reshape(batch, weight.shape[0], out_height, out_width)
    return out if bias is None else out + bias.view(-1, 1, 1)


_library = torch.library.Library("dyhead", "FRAGMENT")
_library.define(
    "deform_conv2d(Tensor[] inputs, Tensor[] offsets, Tensor[] masks, Tensor weight, Tensor? bias, "
    "int[] stride, int[] padding, int[] dilation, str backend) -> Tensor[]"
)
_library.define(
    "deform_conv2d_backward(Tensor[] grads, Tensor[] inputs, Tensor[] offsets, Tensor[] masks, Tensor weight, "
    "int[] stride, int[] padding, int[] dilation, bool[] needs, str backend) -> Tensor[]"
)


def _new_outputs(inputs: list[Tensor], offsets: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Memory for the outputs: channels last where the input is."""
    outputs = []
    for x, offset in zip(inputs, offsets, strict=True):
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        memory_format = torch.channels_last if last else torch.contiguous_format
        shape = (x.shape[0], weight.shape[0], offset.shape[2], offset.shape[3])
        outputs.append(torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format))
    return outputs


def _new_gradients(inputs, offsets, masks, weight, needs) -> list[list[Tensor]]:
    """Memory for the gradients: of inputs, offsets, masks, weight and bias, each a list, empty where not needed."""
    kinds = (inputs, offsets, masks, [weight], [weight.new_empty(weight.shape[0])])
    return [[torch.empty_like(x) for x in kind] if need else [] for kind, need in zip(kinds, needs, strict=True)]


def _forward(inputs, offsets, masks, weight, bias, stride, padding, dilation, backend):
    outputs = _new_outputs(inputs, offsets, weight)
    if inputs[0].shape[0] > 0:
        module = _implementation(backend)
        module.forward(outputs, inputs, offsets, masks, weight, bias, stride, padding, dilation)
    return outputs


def _backward(grads, inputs, offsets, masks, weight, stride, padding, dilation, needs, backend):
    results = _new_gradients(inputs, offsets, masks, weight, needs)
    if inputs[0].shape[0] > 0:
        module = _implementation(backend)
        module.backward(results, grads, inputs, offsets, masks, weight, stride, padding, dilation)
    else:
        for kind in results:
            for result in kind:
                result.zero_()
    return [result for kind in results for result in kind]


def _implementation(backend: str):
    if backend == "torch":
        return deform_conv_cpu
    # Triton is looked for only where it is used: it is not installed on every system.
    from kernels.deform_conv import launch as deform_conv_launch

    return deform_conv_launch


class _DeformConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, settings, levels, weight, bias, *tensors):
        inputs, offsets, masks = _part(tensors, levels)
        ctx.settings, ctx.levels = settings, levels
        ctx.save_for_backward(weight, *tensors)
        with torch._C._AutoDispatchBelowAutograd():
            op = torch.ops.dyhead.deform_conv2d.default
            return tuple(op.redispatch(keyset, inputs, offsets, masks, weight, bias, *settings))

    @staticmethod
    def backward(ctx, *grads):
        weight, *tensors = ctx.saved_tensors
        inputs, offsets, masks = _part(tensors, ctx.levels)
        levels, wanted = ctx.levels, ctx.needs_input_grad
        kinds = (wanted[5 : 5 + levels], wanted[5 + levels : 5 + 2 * levels], wanted[5 + 2 * levels :])
        needs = [any(kind) for kind in kinds] + [wanted[3], wanted[4]]
        *settings, backend = ctx.settings
        found = torch.ops.dyhead.deform_conv2d_backward.default(
            list(grads), inputs, offsets, masks, weight, *settings, needs, backend
        )
        found = iter(found)
        counts = (levels, levels, len(masks), 1, 1)
        parts = [
            [next(found) if need else None for _ in range(count)] for need, count in zip(needs, counts, strict=True)
        ]
        return None, None, None, parts[3][0], parts[4][0], *parts[0], *parts[1], *parts[2]


class _NotAgain(torch.autograd.Function):
    """The backward as a step of a graph, which says what it cannot do instead of counting as a constant."""

    @staticmethod
    def forward(ctx, run, *tensors):
        return tuple(run())

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("deform_conv2d has no second derivative")


def _part(tensors: Sequence[Tensor], levels: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return list(tensors[:levels]), list(tensors[levels : 2 * levels]), list(tensors[2 * levels :])


def _differentiate(keyset, inputs, offsets, masks, weight, bias, *settings):
    below = keyset & torch._C._after_autograd_keyset
    tensors = (*inputs, *offsets, *masks)
    leaves = (weight, *tensors) if bias is None else (weight, bias, *tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in leaves):
        return list(_DeformConv2d.apply(below, settings, len(inputs), weight, bias, *tensors))
    with torch._C._AutoDispatchBelowAutograd():
        op = torch.ops.dyhead.deform_conv2d.default
        return op.redispatch(below, inputs, offsets, masks, weight, bias, *settings)


def _differentiate_backward(keyset, grads, inputs, offsets, masks, weight, *settings):
    below = keyset & torch._C._after_autograd_keyset

    def run():
        with torch._C._AutoDispatchBelowAutograd():
            op = torch.ops.dyhead.deform_conv2d_backward.default
            return op.redispatch(below, grads, inputs, offsets, masks, weight, *settings)

    tensors = (*grads, *inputs, *offsets, *masks, weight)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return list(_NotAgain.apply(run, *tensors))
    return run()


def _autocast(device: str):
    """Kernels for the autocast key of a device: one precision for all that come in, and none of it inside."""
    off = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def cast(value):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
            return value.to(torch.get_autocast_dtype(device))
        return [cast(x) for x in value] if isinstance(value, list) else value

    def forward(*arguments):
        arguments = [cast(x) for x in arguments]
        with torch._C._ExcludeDispatchKeyGuard(off):
            return torch.ops.dyhead.deform_conv2d.default(*arguments)

    def backward(*arguments):
        with torch._C._ExcludeDispatchKeyGuard(off):
            return torch.ops.dyhead.deform_conv2d_backward.default(*arguments)

    return forward, backward


def _fake_forward(inputs, offsets, masks, weight, *settings):
    return _new_outputs(inputs, offsets, weight)


def _fake_backward(grads, inputs, offsets, masks, weight, stride, padding, dilation, needs, backend):
    return [result for kind in _new_gradients(inputs, offsets, masks, weight, needs) for result in kind]


_library.impl("deform_conv2d", _forward, "CompositeExplicitAutograd")
_library.impl("deform_conv2d_backward", _backward, "CompositeExplicitAutograd")
_library.impl("deform_conv2d", _differentiate, "Autograd", with_keyset=True)
_library.impl("deform_conv2d_backward", _differentiate_backward, "Autograd", with_keyset=True)
for _device in ("cpu", "cuda"):
    for _name, _kernel in zip(("deform_conv2d", "deform_conv2d_backward"), _autocast(_device), strict=True):
        _library.impl(_name, _kernel, f"Autocast{_device.upper()}")
torch.library.register_fake("dyhead::deform_conv2d", _fake_forward, lib=_library)
torch.library.register_fake("dyhead::deform_conv2d_backward", _fake_backward, lib=_library)


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
        inputs: one (N, C, H_l, W_l) a level, of the same N, C, dtype and device.
        offsets: one a level, as in `deform_conv2d`.
        masks: one a level, or None.

    Returns:
        One (N, O, Ho_l, Wo_l) a level: what `deform_conv2d` returns for each, up to float rounding.

    Raises:
        TypeError, ValueError: as in `deform_conv2d`, or the lists differ in length or the levels in batch, channels or
            groups.
    """
    check_lists(inputs, offsets, masks)
    check_weight(weight, bias)
    geometry = check_geometry(stride, padding, dilation)
    for level, (x, offset) in enumerate(zip(inputs, offsets, strict=True)):
        check_level(level_names(level), x, offset, masks[level] if masks else None, weight, geometry)
    check_alike(inputs, offsets)
    return _call(list(inputs), list(offsets), list(masks or ()), weight, bias, *geometry)


def _call(inputs, offsets, masks, weight, bias, *geometry) -> list[Tensor]:
    backend = resolve_backend(weight.device)
    return torch.ops.dyhead.deform_conv2d(inputs, offsets, masks, weight, bias, *geometry, backend)


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
    that is a tensor has a gradient. The output is channels last where the input is.

    Args:
        input: (N, C, H, W), any strides; N may be 0.
        offset: (N, G * T * 2, Ho, Wo) in pixels of the input: for each offset group and tap its dy, then its dx.
        weight: (O, C / groups, kh, kw).
        bias: (O,), or None.
        stride, padding, dilation: an int, or a pair for height and width.
        mask: (N, G * T, Ho, Wo), a factor for every sample, or None for ones.

    Returns:
        (N, O, Ho, Wo).

    Raises:
        TypeError: an argument is of a wrong Python type.
        ValueError: a shape, dtype or device does not fit the others; the message names it and what it must be.
    """
    check_weight(weight, bias)
    geometry = check_geometry(stride, padding, dilation)
    check_level(SINGLE, input, offset, mask, weight, geometry)
    return _call([input], [offset], [] if mask is None else [mask], weight, bias, *geometry)[0]
