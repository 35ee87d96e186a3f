"""Extreme calls of deformable convolutions, for property tests, and what becomes of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import lcm
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from poisoned import LAYOUTS, Buffers
from torch import Tensor

from kernels import deform_conv2d, deform_conv2d_levels, use_backend
from kernels.deform_conv.cpu_plan import output_size
from kernels.deform_conv.operator import reference


class Extreme(NamedTuple):
    """An extreme call, as numbers in float64: one of everything a level, but the weight and the bias."""

    dtype: torch.dtype
    inputs: list[Tensor]
    offsets: list[Tensor]
    masks: list[Tensor]  # or none
    weight: Tensor
    bias: Tensor | None
    cotangents: list[Tensor]
    geometry: dict[str, tuple[int, int]]
    layouts: list[str]  # of inputs, offsets, masks, weight, bias and cotangents
    inverse: bool  # whether the backward runs deterministic algorithms


_BAD = (torch.nan, torch.inf, -torch.inf)


def _points(draw, generator, batch, groups, kernel, size, out, geometry) -> Tensor:
    """Offsets (N, G * T * 2, Ho, Wo) to odd sixteenths in and around the map, some to where nothing is sampled.

    At sixteenths no rounding moves a sample across a pixel, where the gradient of the offset jumps.
    """
    # Of more than one tap, seen from all of an axis: the places at offset zero.
    starts = []
    for axis in range(2):
        stride, padding, dilation = (pair[axis] for pair in geometry.values())
        starts.append(torch.arange(out[axis])[None] * stride - padding + torch.arange(kernel[axis])[:, None] * dilation)
    taps = kernel[0] * kernel[1]
    offsets = []
    for axis in range(2):
        shape = (batch, groups, taps, *out)
        sixteenths = torch.randint(-8 * 2, 8 * (size[axis] + 1), shape, generator=generator)
        place = (2 * sixteenths + 1).double() / 16
        edges = [-1.0, float(size[axis])]
        special = [*_BAD, *edges, *edges, 1e30, -1e30, 1e4, -1e4]
        count = place.numel()
        if count:
            every = draw(st.sampled_from([0, 0, 0, 0, 0, 0, 0, 1, 2]))
            numbers = range(0, count, every) if every else draw(st.lists(st.integers(0, count - 1), max_size=3))
            for number in numbers:
                place.view(-1)[number] = draw(st.sampled_from(special)) if not every else special[number % 11]
        start = starts[axis]
        if axis == 0:
            start = start.repeat_interleave(kernel[1], 0)[:, :, None]
        else:
            start = start.repeat(kernel[0], 1)[:, None, :]
        offsets.append(place - start)
    return torch.stack(offsets, 3).flatten(1, 3)


def _spoil(draw, tensor: Tensor) -> None:
    """One element that is not finite."""
    if tensor.numel():
        place = tuple(draw(st.integers(0, size - 1)) for size in tensor.shape)
        tensor[place] = draw(st.sampled_from(_BAD))


@st.composite
def extreme_call(draw, levels: bool, dtypes: list[torch.dtype], few: bool = False) -> Extreme:
    """Maps of one pixel and more, no images, groups of either kind, far and unreal offsets, NaN and infinities.

    Args:
        levels: one to three maps, or one.
        dtypes: to choose from.
        few: little of what costs the interpreter a program: images, taps, groups, levels.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def pair(low, high):
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    dtype = draw(st.sampled_from(dtypes))
    batch = draw(st.sampled_from([1] * 9 + [2, 0] if few else [1, 1, 2, 2, 0]))
    grouped = [(2, 1), (1, 2), (2, 2), (3, 2), (2, 3)]
    groups, offset_groups = draw(st.sampled_from([(1, 1)] * 12 + grouped[:3] if few else [(1, 1)] * 3 + grouped))
    channels = lcm(groups, offset_groups) * draw(st.integers(1, 2))
    outputs = groups * draw(st.integers(1, 2))
    kernel = draw(st.sampled_from([(1, 1)] * 5 + [(1, 2), (2, 1)] if few else [(1, 1), (1, 2), (2, 1), (2, 2)]))
    geometry = {"stride": pair(1, 4), "padding": pair(0, 4), "dilation": pair(1, 4)}
    least = [
        max(1, d * (k - 1) + 1 - 2 * p)
        for k, p, d in zip(kernel, geometry["padding"], geometry["dilation"], strict=True)
    ]
    masked, biased = draw(st.booleans()), draw(st.booleans())
    inputs, offsets, masks, cotangents = [], [], [], []
    for _ in range(draw(st.integers(1, 2 if few else 3)) if levels else 1):
        # Maps of 1x1, and others with an interior.
        more = (0, 0) if draw(st.integers(0, 3)) == 0 else pair(0, 3)
        size = tuple(low + extra for low, extra in zip(least, more, strict=True))
        out = [output_size(*axis) for axis in zip(size, kernel, *geometry.values(), strict=True)]
        inputs.append(random(batch, channels, *size))
        offsets.append(_points(draw, generator, batch, offset_groups, kernel, size, out, geometry))
        if masked:
            masks.append(random(batch, offsets[-1].shape[1] // 2, *out).sigmoid())
        cotangents.append(random(batch, outputs, *out))
    weight = random(outputs, channels // groups, *kernel)
    bias = random(outputs) if biased else None
    spoiled = draw(st.lists(st.sampled_from(["input", "mask", "weight", "bias", "cotangent"]), max_size=2))
    for name in spoiled if draw(st.booleans()) else ():
        if name == "input":
            _spoil(draw, draw(st.sampled_from(inputs)))
        elif name == "mask" and masked:
            _spoil(draw, draw(st.sampled_from(masks)))
        elif name == "weight":
            _spoil(draw, weight)
        elif name == "bias" and biased:
            _spoil(draw, bias)
        elif name == "cotangent":
            _spoil(draw, draw(st.sampled_from(cotangents)))
    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in range(6)]
    return Extreme(
        dtype, inputs, offsets, masks, weight, bias, cotangents, geometry, layouts, inverse=draw(st.booleans())
    )


@contextmanager
def deterministic(on: bool = True) -> Iterator[None]:
    """PyTorch's deterministic algorithms, and those of the Triton kernels with them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _names(case: Extreme) -> list[str]:
    """Of the outputs and the gradients, in their order."""
    kinds = ("output", "input", "offset", "mask")
    counts = (len(case.inputs), len(case.inputs), len(case.offsets), len(case.masks))
    names = [f"{kind} {level}" for kind, count in zip(kinds, counts, strict=True) for level in range(count)]
    return [*names, "weight"] + ["bias"] * (case.bias is not None)


def _definition(case: Extreme, dtype: torch.dtype, change: Callable[[Tensor], Tensor] = lambda x: x) -> list[Tensor]:
    """The reference's outputs and gradients on the numbers as the call has them, as float64."""

    def leaf(x):
        return change(x.to(case.dtype)).to(dtype).requires_grad_()

    inputs, masks = ([leaf(x) for x in kind] for kind in (case.inputs, case.masks))
    offsets = [x.to(case.dtype).to(dtype).requires_grad_() for x in case.offsets]
    weight, bias = leaf(case.weight), None if case.bias is None else leaf(case.bias)
    leaves = [*inputs, *offsets, *masks, weight, *([] if bias is None else [bias])]
    if not len(inputs[0]):
        return [*(x.double() for x in case.cotangents), *(torch.zeros_like(x) for x in leaves)]
    outputs = [
        reference(x, offset, weight, bias, **case.geometry, mask=mask)
        for x, offset, mask in zip(inputs, offsets, masks or [None] * len(inputs), strict=True)
    ]
    cotangents = [change(x.to(case.dtype)).to(dtype) for x in case.cotangents]
    return [x.detach().double() for x in (*outputs, *torch.autograd.grad(outputs, leaves, cotangents))]


def _found(case: Extreme, backend: str, levels: bool) -> list[Tensor]:
    """Outputs and gradients in buffers of poison."""
    buffers = Buffers()

    def place(number, tensor):
        return buffers.place(tensor.to(case.dtype).requires_grad_(), case.layouts[number])

    inputs, offsets, masks = ([place(i, x) for x in kind] for i, kind in enumerate(case[1:4]))
    weight, bias = place(3, case.weight), None if case.bias is None else place(4, case.bias)
    leaves = [*inputs, *offsets, *masks, weight, *([] if bias is None else [bias])]
    cotangents = [place(5, x).detach() for x in case.cotangents]
    with use_backend(backend), buffers.guarded():
        if levels:
            outputs = deform_conv2d_levels(inputs, offsets, weight, bias, **case.geometry, masks=masks or None)
        else:
            (x, offset, mask) = (inputs[0], offsets[0], masks[0] if masks else None)
            outputs = [deform_conv2d(x, offset, weight, bias, **case.geometry, mask=mask)]
        with deterministic(case.inverse):
            grads = torch.autograd.grad(outputs, leaves, cotangents)
    assert buffers.intact()
    return [x.detach() for x in (*outputs, *grads)]


def _sound(case: Extreme) -> Tensor:
    """(N,) whether everything that is multiplied for an image is finite."""
    finite = [x.to(case.dtype).isfinite().flatten(1).all(1) for x in (*case.inputs, *case.masks, *case.cotangents)]
    return torch.stack(finite).all(0) & case.weight.isfinite().all()


def check_extreme(case: Extreme, backend: str, levels: bool) -> None:
    """A call, forward and backward, against the reference.

    Not finite is what the reference has so: which of NaN and the infinities is a matter of the order of sums. The rest
    may lose twice what the reference does in the same precision, and a few roundings of the largest sum of magnitudes,
    as sums of a few numbers may cancel. In Triton an image with a pixel, weight, mask or cotangent that is not finite
    is an exception: a pixel that has the weight 0 in a sample may be multiplied with it or not, see the operator's
    conventions.
    """
    expected, plain = _definition(case, torch.float64), _definition(case, case.dtype)
    sums = _definition(case, torch.float64, lambda x: x.abs().nan_to_num(0, 0, 0))
    found, few = _found(case, backend, levels), 64 if case.dtype == torch.float64 else 4
    # A difference of pixels is at most twice the largest, for every weight and gradient.
    largest = [
        max((x.abs().nan_to_num(0, 0, 0).max().item() for x in kind if x.numel()), default=1)
        for kind in (case.inputs, case.masks, case.cotangents)
    ]
    span = 2 * largest[0] * largest[1] * largest[2] * case.weight.abs().nan_to_num(0, 0, 0).sum().item()
    for name, ours, value, same, magnitude in zip(_names(case), found, expected, plain, sums, strict=True):
        assert ours.dtype == case.dtype and ours.shape == value.shape, name
        ours = ours.double()
        wrong = ours.isfinite() != value.isfinite()
        if backend == "triton":
            sound = _sound(case)
            wrong &= sound.view(-1, 1, 1, 1) if wrong.dim() == 4 and name != "weight" else sound.all()
        wrong = wrong.nonzero().tolist()
        assert not wrong, f"{name}: {ours[tuple(wrong[0])]} at {wrong[0]} of {wrong}, not {value[tuple(wrong[0])]}"
        scale = span if name.startswith("offset") else magnitude.max().item() if magnitude.numel() else 0
        lost = torch.where(value.isfinite() & same.isfinite(), same - value, 0).abs()
        error = torch.where(value.isfinite() & ours.isfinite(), ours - value, 0).abs()
        error, lost = (x.max().item() if x.numel() else 0 for x in (error, lost))
        limit = 2 * lost + few * torch.finfo(case.dtype).eps * scale
        assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g}"


def _exact(masked: bool) -> dict[str, Tensor]:
    """Two images, numbers whose sums no order rounds, and every sample in the map."""
    generator = torch.Generator().manual_seed(11)

    def whole(*shape):
        return torch.randint(1, 5, shape, generator=generator).double()

    tensors = {
        "input": whole(2, 2, 5, 5),
        "offset": torch.randint(0, 8, (2, 4, 3, 2), generator=generator).double() / 8 + 1 / 16,
        "weight": whole(2, 2, 1, 2),
        "bias": whole(2),
        "mask": whole(2, 2, 3, 2) / 4 if masked else torch.ones(2, 2, 3, 2, dtype=torch.float64),
    }
    return tensors


def _results(function: Callable, tensors: dict[str, Tensor], masked: bool) -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items() if masked or name != "mask"}
    output = function(**leaves)
    cotangent = torch.randint(1, 5, output.shape, generator=torch.Generator().manual_seed(3)).double()
    return {"output": output.detach()} | dict(
        zip(leaves, torch.autograd.grad(output, list(leaves.values()), cotangent), strict=True)
    )


UNREAL = _BAD
AXES = {"dy": (0,), "dx": (1,), "both": (0, 1)}
_TAP, _SPOT = 1, (1, 0)


@cache
def _clean(function: Callable, masked: bool, inverse: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What it gives with every sample, and without one of image 1."""
    tensors = _exact(masked)
    without = tensors | {"mask": tensors["mask"].clone()}
    without["mask"][(1, _TAP, *_SPOT)] = 0
    with deterministic(inverse):
        return _results(function, tensors, masked), _results(function, without, True)


def check_unreal(
    function: Callable, value: float, axes: tuple[int, ...], masked: bool = True, inverse: bool = False
) -> None:
    """An offset of image 1 that is no place: a tap that is not there, and nothing else, whatever the order of sums.

    `function` takes and returns what `deform_conv2d` does, without a mask if not `masked`; `inverse` is for
    deterministic algorithms.
    """
    unreal = _exact(masked)
    for axis in axes:
        unreal["offset"][(1, 2 * _TAP + axis, *_SPOT)] = value
    before, after = _clean(function, masked, inverse)
    with deterministic(inverse):
        found = _results(function, unreal, masked)
    places = (1, slice(2 * _TAP, 2 * _TAP + 2), *_SPOT)
    for name in found:
        if name not in ("weight", "bias"):
            assert torch.equal(found[name][0], before[name][0]), name
    for name in ("output", "input", "weight", "bias"):
        assert torch.equal(found[name], after[name]), name
    # It did something before.
    assert not torch.equal(found["output"][1], before["output"][1])
    assert not found["offset"][places].any()
    for name, own in (("offset", places), ("mask", (1, _TAP, *_SPOT))):
        if name in found:
            expected = after[name].clone()
            expected[own] = 0
            assert torch.equal(found[name], expected), name


def second_of_two_levels(input, offset, weight, bias, mask=None) -> Tensor:
    """`deform_conv2d` by `deform_conv2d_levels`, next to a level of zeros."""
    zeros = [None if x is None else torch.zeros_like(x) for x in (input, offset, mask)]
    masks = None if mask is None else [zeros[2], mask]
    return deform_conv2d_levels([zeros[0], input], [zeros[1], offset], weight, bias, stride=(2, 2), masks=masks)[1]


def alone(input, offset, weight, bias, mask=None) -> Tensor:
    """`deform_conv2d` at every other pixel."""
    return deform_conv2d(input, offset, weight, bias, stride=2, mask=mask)


def defined(input, offset, weight, bias, mask=None) -> Tensor:
    """The reference of the same."""
    return reference(input, offset, weight, bias, stride=(2, 2), mask=mask)
