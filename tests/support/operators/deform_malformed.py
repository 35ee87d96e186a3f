"""Malformed calls of deformable convolutions, for property tests: every one is to be refused by name."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels import deform_conv2d, deform_conv2d_levels, use_backend
from kernels.deform_conv.cpu_plan import output_size

# Odd in every axis, so that no two of them can change places, nor stride and dilation.
_GEOMETRY = {"stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)}
_NO_PAIRS = (
    None, True, 1.0, "1", "same", 1j, torch.tensor(1), np.array([1, 2]), {}, {1, 2}, range(1, 3), [None, 1], (1, 1.5),
    (True, 2), ("1", 2), (torch.tensor(1), 2), [[1, 2]], (), (1,), (1, 2, 3), -1, (1, -1), 2**24 + 1, (1, 2**31),
    2**63, -(2**63), 10**30, (-(10**30), 1), torch.nan, torch.inf,
)  # fmt: skip


def _level(seed: int, height: int) -> dict[str, Tensor]:
    """A map of two images and four channels, and points of a 2x1 kernel."""
    generator = torch.Generator().manual_seed(seed)
    sizes = zip((height, 3), (2, 1), *_GEOMETRY.values(), strict=True)
    out = [output_size(*axis) for axis in sizes]
    shapes = {"input": (2, 4, height, 3), "offset": (2, 4, *out), "mask": (2, 2, *out)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _no_tensors(tensor: Tensor) -> list[Any]:
    """What a tensor of that many dimensions and of floating point is not."""
    # The other tensors are float32, next to which float64 is wrong under autocast, too.
    dtypes = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float64)
    wrong = [tensor.to(dtype) for dtype in dtypes]
    wrong += [tensor.to("meta"), tensor.to_sparse(), tensor.to_mkldnn(), tensor[None], tensor[0], tensor[..., 0]]
    return [*wrong, 2, 0.5, "tensor", tensor.numpy(), tensor.tolist(), (tensor,), {}, object()]


def _other_sizes(tensor: Tensor, axes: Iterable[int]) -> list[Tensor]:
    """One less, one more and none along an axis."""
    less = [tensor.narrow(axis, 0, tensor.shape[axis] - 1) for axis in axes]
    more = [torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis) for axis in axes]
    return [*less, *more, *(tensor.narrow(axis, 0, 0) for axis in axes)]


def _other_types(tensor: Tensor) -> list[Tensor]:
    return [tensor.to(dtype) for dtype in (torch.float16, torch.bfloat16)]


class Malformed(NamedTuple):
    """A function, arguments that it takes, changes it must refuse, and those it refuses but under autocast."""

    function: Callable
    good: dict[str, Any]
    wrong: list[dict[str, Any]]
    mixed: list[dict[str, Any]]


def malformed(levels: bool, seed: int) -> Malformed:
    """What is known to be wrong, for one of the two functions."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(2, 2, 2, 1, generator=generator), torch.randn(2, generator=generator)
    first, second = _level(seed, 3), _level(seed + 1, 5)
    wrong = [{name: value} for name in _GEOMETRY for value in _NO_PAIRS]
    # An output that is empty, or so large that nothing has its size; a stride of 0; a pair for the other axes.
    wrong += [{"stride": 0}, {"stride": (1, 0)}, {"dilation": (0, 1)}, {"dilation": 9}, {"padding": 2**24}]
    wrong += [{name: _GEOMETRY[name][::-1]} for name in ("stride", "padding")]
    wrong += [{"weight": x} for x in [*_no_tensors(weight), *_other_sizes(weight, range(4)), None, bias]]
    wrong += [{"bias": x} for x in [*_no_tensors(bias), *_other_sizes(bias, [0]), weight]]
    mixed = [{"weight": x} for x in _other_types(weight)] + [{"bias": x} for x in _other_types(bias)]
    for name, good in first.items():
        # A stride of 2 does not see one column more, and weights of another share could fit other channels.
        axes = (0, 2) if name == "input" else range(4)
        bad = [*_no_tensors(good), *_other_sizes(good, axes), good[:, :0], good[..., :0]]
        bad += [] if name == "mask" else [None]
        if levels:
            # Without a mask in one level only.
            bad = [[good, x] for x in (*bad, None)] + [[x, second[name]] for x in bad]
            bad += [good, good.numpy(), "list", 2, {}, object(), iter([good, second[name]]), [], [good], ()]
            bad += [[good, second[name], good], [second[name], good], [[good], [second[name]]]]
            bad += [] if name == "mask" else [None]
        wrong += [{f"{name}s" if levels else name: x} for x in bad]
        mixed += [{f"{name}s": [good, x]} if levels else {name: x} for x in _other_types(good)]
    settings = {"weight": weight, "bias": bias, **_GEOMETRY}
    if not levels:
        return Malformed(deform_conv2d, first | settings, wrong, mixed)
    good = {f"{name}s": [first[name], second[name]] for name in first}
    # Levels that are sound by themselves: one image more, two offset groups instead of one.
    wrong.append({f"{name}s": [first[name], second[name][:1]] for name in first})
    wrong.append({f"{name}s": [first[name], torch.cat([second[name]] * 2, 1)] for name in ("offset", "mask")})
    wrong.append({f"{name}s": [] for name in first})
    return Malformed(deform_conv2d_levels, good | settings, wrong, mixed)


class Call(NamedTuple):
    """A call to be refused."""

    function: Callable
    arguments: dict[str, Any]
    autocast: bool


@st.composite
def malformed_call(draw, levels: bool) -> Call:
    """Arguments of which one or two are wrong, or two have changed places; with autocast on or off."""
    function, good, wrong, mixed = malformed(levels, draw(st.integers(0, 2**20)))
    arguments, autocast = dict(good), draw(st.integers(0, 3)) == 0
    if draw(st.integers(0, 7)) == 0:
        first, second = draw(st.permutations(list(good)))[:2]
        arguments[first], arguments[second] = arguments[second], arguments[first]
        return Call(function, arguments, autocast)
    for change in draw(st.lists(st.sampled_from(wrong if autocast else [*wrong, *mixed]), min_size=1, max_size=2)):
        arguments |= change
    return Call(function, arguments, autocast)


def refusal(call: Call, backend: str) -> tuple[type, str]:
    """The error of a malformed call, which says early which argument it is about."""
    with use_backend(backend), torch.autocast("cpu", torch.float16, enabled=call.autocast):
        with pytest.raises((ValueError, TypeError)) as caught:
            call.function(**call.arguments)
    assert caught.type in (ValueError, TypeError)
    names = "|".join(name.removesuffix("s") for name in call.arguments if name != "bias")
    assert re.match(rf"(the output for )?({names}|bias)", str(caught.value)), str(caught.value)
    return caught.type, str(caught.value)
