"""What a deformable convolution asks of its arguments; see `kernels/runtime/checks.py`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.deform_conv.cpu_plan import output_size
from kernels.runtime.checks import check_device, check_pair, check_tensor, kind_of

# Stride, padding and dilation, each in y and x.
Geometry = tuple[list[int], list[int], list[int]]


class Names(NamedTuple):
    """What a level's tensors are called in a message."""

    input: str
    offset: str
    mask: str


# Beyond it, float32 does not hold every coordinate of a pixel.
_MOST = 2**24

SINGLE = Names("input", "offset", "mask")


def level_names(level: int) -> Names:
    """The names of one of several levels."""
    return Names(f"inputs[{level}]", f"offsets[{level}]", f"masks[{level}]")


def check_lists(inputs: Any, offsets: Any, masks: Any) -> None:
    """Lists with one tensor a level each, of which there is one or more."""
    for name, value in (("inputs", inputs), ("offsets", offsets), ("masks", masks)):
        if not isinstance(value, list | tuple) and not (value is None and name == "masks"):
            raise TypeError(f"{name} must be a list with one tensor a level, got {kind_of(value)}")
    if not inputs:
        raise ValueError("inputs must be a list with one tensor a level, got none")
    for name, value in (("offsets", offsets), ("masks", masks)):
        if value is not None and len(value) != len(inputs):
            raise ValueError(f"{name} must be as many as inputs, {len(inputs)}, got {len(value)}")
    for level, mask in enumerate(masks or ()):
        if mask is None:
            raise TypeError(f"masks[{level}] must be a tensor, as those of all levels or none must be, got None")


def check_weight(weight: Any, bias: Any) -> None:
    """(O, C / groups, kh, kw) with an element or more, and (O,) of the same kind or None."""
    check_tensor("weight", weight, "(O, C / groups, kh, kw)", 4)
    if not weight.numel():
        raise ValueError(f"weight must be (O, C / groups, kh, kw) and not empty, got shape {tuple(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias, "(O,)", 1)
        _check_kind("bias", bias, weight)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias must be ({weight.shape[0]},), one for each output, got shape {tuple(bias.shape)}")


def check_geometry(stride: Any, padding: Any, dilation: Any) -> Geometry:
    """Stride, padding and dilation in y and x."""
    return (
        check_pair("stride", stride, 1, _MOST),
        check_pair("padding", padding, 0, _MOST),
        check_pair("dilation", dilation, 1, _MOST),
    )


def check_level(
    names: Names,
    x: Any,
    offset: Any,
    mask: Any,
    weight: Tensor,
    geometry: Geometry,
) -> None:
    """The map of a level, its offsets and its masks or None, for a weight that `check_weight` has passed."""
    check_tensor(names.input, x, "(N, C, H, W)", 4)
    _check_kind(names.input, x, weight)
    check_tensor(names.offset, offset, "(N, G * T * 2, Ho, Wo)", 4)
    _check_kind(names.offset, offset, weight)
    if mask is not None:
        check_tensor(names.mask, mask, "(N, G * T, Ho, Wo)", 4)
        _check_kind(names.mask, mask, weight)
    batch, channels, height, width = x.shape
    outputs, share, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    if not channels or channels % share or outputs % (channels // share):
        raise ValueError(
            f"weight {tuple(weight.shape)} does not fit {names.input} of {channels} channels: it must be "
            "(O, C / groups, kh, kw), with a number of groups that divides C and O"
        )
    groups = offset.shape[1] // (2 * taps)
    if not groups or offset.shape[1] != groups * 2 * taps or channels % groups:
        raise ValueError(
            f"{names.offset} has {offset.shape[1]} channels; a {kernel[0]}x{kernel[1]} kernel needs {2 * taps} times "
            f"the number of offset groups, which must divide the {channels} channels of {names.input}"
        )
    out = [output_size(*axis) for axis in zip((height, width), kernel, *geometry, strict=True)]
    if not height or not width or out[0] < 1 or out[1] < 1:
        raise ValueError(f"the output for {names.input} of {height}x{width} would be empty")
    expected = (batch, groups * 2 * taps, *out)
    if tuple(offset.shape) != expected:
        raise ValueError(f"{names.offset} must have shape {expected}, got {tuple(offset.shape)}")
    if mask is not None:
        expected = (batch, groups * taps, *out)
        if tuple(mask.shape) != expected:
            raise ValueError(f"{names.mask} must have shape {expected}, got {tuple(mask.shape)}")


def check_alike(inputs: Sequence[Tensor], offsets: Sequence[Tensor]) -> None:
    """Levels share batch, channels and offset groups."""
    for level in range(1, len(inputs)):
        if inputs[level].shape[:2] != inputs[0].shape[:2] or offsets[level].shape[1] != offsets[0].shape[1]:
            raise ValueError(
                f"inputs[{level}] has another batch, number of channels or offset groups than inputs[0]: "
                f"{tuple(inputs[level].shape)} and {tuple(offsets[level].shape)} against {tuple(inputs[0].shape)} and "
                f"{tuple(offsets[0].shape)}"
            )


def _check_kind(name: str, tensor: Tensor, weight: Tensor) -> None:
    check_device(name, tensor, "weight", weight)
    if tensor.dtype != weight.dtype:
        # Autocast brings all of them to one type, but for float64, which it leaves as it is.
        cast = not weight.is_meta and torch.is_autocast_enabled(weight.device.type)
        if not cast or torch.float64 in (tensor.dtype, weight.dtype):
            raise ValueError(f"{name} must be of weight's type, {weight.dtype}, got {tensor.dtype}")
