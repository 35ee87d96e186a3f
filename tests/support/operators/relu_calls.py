"""Calls of the dynamic ReLU: with a NaN or an infinity in one place, malformed ones, and extreme ones to be checked."""

import re
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from poisoned import LAYOUTS, Buffers
from torch import Tensor

from kernels import dynamic_relu, use_backend
from kernels.dynamic_relu.operator import reference

PLACES = ("input", "a1", "b1", "a2", "b2", "cotangent")
NOT_FINITE = (torch.nan, torch.inf, -torch.inf)


def gradients(function, input: Tensor, coefficients: Tensor, cotangent: Tensor) -> list[Tensor]:
    """The output, and both gradients for the cotangent."""
    input, coefficients = input.detach().requires_grad_(), coefficients.detach().requires_grad_()
    output = function(input, coefficients)
    return [output.detach(), *torch.autograd.grad(output, (input, coefficients), cotangent)]


def definition(input: Tensor, coefficients: Tensor, cotangent: Tensor) -> list[Tensor]:
    """`gradients` of the definition in float64.

    Where an infinity is drawn, the sign of the difference of slopes and intercepts says which line is the larger: that
    is what an operator reads, and infinities may cancel in it and not in the lines, or the other way around.
    """
    x, lines, grad = input.double(), coefficients.double(), cotangent.double()
    expected = gradients(reference, x, lines, grad)
    if not (x.isinf().any() or lines.isinf().any()):
        return expected
    a1, b1, a2, b2 = lines[..., None, None].unbind(1)
    d = (a1 - a2) * x + (b1 - b2)
    shares = [torch.where(d == 0, 0.5, torch.where(other < 0, 0, 1.0)) * torch.ones_like(d) for other in (d, -d)]
    first, second = (torch.where(share == 0, 0, grad * share) for share in shares)
    y1, y2 = a1 * x + b1, a2 * x + b2
    found = first * a1 + second * a2
    alike = ((y1 > y2) == (d > 0)) & ((y1 < y2) == (d < 0)) & ((y1 == y2) == (d == 0))
    assert torch.equal(found[alike].nan_to_num(7, 8, 9), expected[1][alike].nan_to_num(7, 8, 9))
    sums = [(each * by).sum((2, 3)) for each in (first, second) for by in (x, torch.ones_like(x))]
    return [expected[0], found, torch.stack(sums, 1)]


def check_not_finite(place: str, value: float, dtype: torch.dtype) -> None:
    """One of `NOT_FINITE` in one of `PLACES` reaches what it should; numbers are exact, and some lines meet."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"input": (2, 3, 2, 3), "coefficients": (2, 4, 3), "cotangent": (2, 3, 2, 3)}
    values = {n: torch.randint(-2, 3, s, generator=generator).to(dtype) for n, s in shapes.items()}
    if place in ("input", "cotangent"):
        values[place][0, 1, 1, 0] = value
    else:
        values["coefficients"][0, PLACES.index(place) - 1, 1] = value
    found, expected = gradients(dynamic_relu, **values), definition(**values)
    # An infinite intercept of the smaller line reaches nothing.
    assert place[0] == "b" or not all(x.isfinite().all() for x in expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=0, atol=0, equal_nan=True)


# The slopes and intercepts of two lines, x, and how many halves of the gradient the first and the second are given.
INFINITIES = {
    "a larger slope at infinity": ((2, 0, 1, 0), torch.inf, (2, 0)),
    "equal slopes at infinity": ((1, 0, 1, 0), torch.inf, (2, 2)),
    "a slope of 0 at infinity": ((0, 0, 1, 0), torch.inf, (0, 2)),
    "one infinite slope": ((torch.inf, 0, 1, 0), 1.0, (2, 0)),
    "two infinite slopes": ((torch.inf, 0, torch.inf, 0), 1.0, (2, 2)),
    "infinite slopes of both signs": ((-torch.inf, 0, torch.inf, 0), 1.0, (0, 2)),
    "an infinite slope at 0": ((1, 0, -torch.inf, 0), 0.0, (2, 2)),
    "two infinite intercepts": ((0, -torch.inf, 0, -torch.inf), 1.0, (2, 2)),
    "a slope against an intercept": ((torch.inf, 0, 0, torch.inf), 1.0, (2, 2)),
}


def check_infinity(name: str) -> None:
    """Who is given the gradient in one of `INFINITIES`."""
    lines, x, halves = INFINITIES[name]
    input, coefficients = torch.full((1, 1, 1, 1), x), torch.tensor(lines).float().view(1, 4, 1)
    output, grad_input, found = gradients(dynamic_relu, input, coefficients, torch.full((1, 1, 1, 1), 2.0))
    assert found[0, 1::2, 0].tolist() == list(halves)
    wanted = definition(input, coefficients, torch.full((1, 1, 1, 1), 2.0))
    torch.testing.assert_close([output.double(), grad_input.double(), found.double()], wanted, equal_nan=True)


def _no_tensors(wanted: Tensor) -> list[list[Any]]:
    """What such a tensor is not: another Python type, another type of numbers, of other dimensions, or elsewhere."""
    dtypes = (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2, torch.float8_e4m3fn)
    return [
        [None, 2, 0.5, True, "tensor", wanted.numpy(), wanted.tolist(), (wanted,), {}, [], object()],
        [wanted.to(dtype) for dtype in dtypes],
        [wanted[None], wanted[..., 0], wanted.sum()],
        [wanted.to("meta"), wanted.to_sparse(), torch.nested.nested_tensor(list(wanted))],
    ]


@st.composite
def malformed_call(draw) -> dict[str, Any]:
    """Arguments of which one is wrong, or both are, or that do not fit together or have changed places."""
    n, c, h, w = (draw(st.integers(1, 3)) for _ in range(4))
    good = {"input": torch.ones(n, c, h, w), "coefficients": torch.ones(n, 4, c)}
    which = draw(st.sampled_from(["input", "coefficients", "both", "shapes", "shapes"]))
    if which == "shapes":
        # What holds nothing is checked all the same.
        shapes = [(n + 1, 4, c), (n, 4, c + 1), (n, 3, c), (n, 5, c), (n, 0, c), (0, 4, c), (n, 4, 0), (n, c + 4, 4)]
        wrong = [good | {"coefficients": torch.ones(shape)} for shape in shapes]
        wrong += [good | {"input": good["input"][:0]}, good | {"input": good["input"][:, :0]}]
        wrong.append({"input": good["coefficients"], "coefficients": good["input"]})
        return draw(st.sampled_from(wrong))
    for name in good:
        if which in (name, "both"):
            # Of both, the device is right: they might be on the same wrong one, and fit.
            ways = _no_tensors(good[name])[: 3 if which == "both" else 4]
            good[name] = draw(st.sampled_from(draw(st.sampled_from(ways))))
    return good


def refusal(arguments: dict[str, Any], backend: str) -> tuple[type, str]:
    """The error of a malformed call, which begins with the name of an argument."""
    with use_backend(backend), pytest.raises((ValueError, TypeError)) as caught:
        dynamic_relu(**arguments)
    assert caught.type in (ValueError, TypeError)
    assert re.match(r"(input|coefficients) must be ", str(caught.value)), caught.value
    return caught.type, str(caught.value)


class Extreme(NamedTuple):
    """An extreme call, and the layouts of its tensors."""

    values: dict[str, Tensor]
    layouts: list[str]


@st.composite
def extreme_call(draw, dtypes: list[torch.dtype]) -> Extreme:
    """Maps of nothing and more, numbers of any size, small integers whose lines meet, NaN and infinities anywhere."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    n, c, h, w = (draw(st.sampled_from(sizes)) for sizes in ([0, 1, 1, 2], [0, 1, 2, 3, 5], [0, 1, 2, 3], [1, 2, 3]))
    of_input, of_coefficients = draw(st.sampled_from(dtypes)), draw(st.sampled_from(dtypes))
    kinds = {"input": of_input, "coefficients": of_coefficients, "cotangent": of_input}
    shapes = {"input": (n, c, h, w), "coefficients": (n, 4, c), "cotangent": (n, c, h, w)}
    whole = draw(st.booleans())
    values = {}
    for name, shape in shapes.items():
        random = torch.randint(-2, 3, shape, generator=generator) if whole else torch.randn(shape, generator=generator)
        values[name] = random.double()
    # One at most is large or tiny: of two the float64 definition itself would lose the smaller.
    half = torch.float16 in (of_input, of_coefficients)
    sized = [2.0**15, -(2.0**15), 2.0**-20, 0.0, -0.0] if half else [2.0**40, -(2.0**40), 2.0**-40, 2.0**-140]
    numbers = [draw(st.sampled_from(sized)), *draw(st.lists(st.sampled_from(NOT_FINITE), max_size=3))]
    for number in numbers:
        place = draw(st.sampled_from(list(values)))
        if count := values[place].numel():
            values[place].view(-1)[draw(st.integers(0, count - 1))] = number
    values = {name: x.to(kinds[name]) for name, x in values.items()}
    return Extreme(values, [draw(st.sampled_from(LAYOUTS)) for _ in values])


def check_extreme(case: Extreme, backend: str) -> None:
    """A call in buffers of poison, forward and backward, against the definition in float64."""
    buffers = Buffers()
    placed = {
        name: buffers.place(x.requires_grad_(name != "cotangent"), layout)
        for (name, x), layout in zip(case.values.items(), case.layouts, strict=True)
    }
    with use_backend(backend), buffers.guarded():
        output = dynamic_relu(placed["input"], placed["coefficients"])
        grads = torch.autograd.grad(output, (placed["input"], placed["coefficients"]), placed["cotangent"])
    assert buffers.intact()
    values = {name: x.detach() for name, x in case.values.items()}
    # What the operator rounds first: coefficients to the type of sums.
    work = torch.promote_types(values["input"].dtype, torch.float32)
    exact = definition(**values | {"coefficients": values["coefficients"].to(work)})
    x, lines, grad = (values[n].double().nan_to_num(0, 0, 0).abs() for n in ("input", "coefficients", "cotangent"))
    a1, b1, a2, b2 = lines[..., None, None].unbind(1)
    of_slopes, of_intercepts = (grad * x).sum((2, 3)), grad.sum((2, 3))
    # What cancels in a sum is lost from it.
    sizes = [(a1 + a2) * x + b1 + b2, (a1 + a2) * grad, torch.stack([of_slopes, of_intercepts] * 2, 1)]
    for name, found, want, size in zip(("output", *values), (output.detach(), *grads), exact, sizes, strict=False):
        assert found.dtype == values["input" if name == "output" else name].dtype and found.shape == want.shape, name
        info = torch.finfo(found.dtype)
        slack = 8 * torch.finfo(work).eps * size + info.eps * want.abs().nan_to_num(0, 0, 0) + info.smallest_normal
        rounded = want.to(found.dtype)
        same = (found == rounded) | (found.isnan() & rounded.isnan())
        close = same | ((found.double() - want).abs() <= slack)
        assert close.all(), (name, found[~close], want[~close])
