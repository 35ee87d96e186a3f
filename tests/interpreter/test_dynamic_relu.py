"""The Triton kernels of the dynamic ReLU, interpreted: numbers, conventions, layouts, many tiles."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from relu_calls import (
    INFINITIES,
    NOT_FINITE,
    PLACES,
    check_extreme,
    check_infinity,
    check_not_finite,
    extreme_call,
    malformed_call,
    refusal,
)

from kernels import dynamic_relu, use_backend
from kernels.bench.op import OPS, Shape, rounding
from kernels.dynamic_relu.operator import reference

# The package has a function of the same name as its folder.
launch = importlib.import_module("kernels.dynamic_relu.launch")
OP = OPS["dynamic_relu"]
# Every one ends in the middle of a tile, in one direction or both; the last two take several tiles.
SHAPES = [
    Shape("one pixel", 3, 5, 1, 1),
    Shape("one channel", 2, 1, 4, 3),
    Shape("odd", 2, 33, 5, 7),
    Shape("many channels", 1, 300, 3, 5),
    Shape("many pixels", 1, 3, 40, 50),
]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def triton_backend():
    with use_backend("triton"):
        yield


def inputs(shape=SHAPES[2], dtype=torch.float32):
    return OP.make_inputs(shape, dtype, "cpu", seed=1)


def gradients(function, input, coefficients, cotangent):
    input, coefficients = input.detach().requires_grad_(), coefficients.detach().requires_grad_()
    return torch.autograd.grad(function(input, coefficients), (input, coefficients), cotangent)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_output_and_gradients(shape, dtype, layout, poison):
    tensors = inputs(shape, dtype)
    tensors["input"] = tensors["input"].detach().contiguous(memory_format=getattr(torch, layout))
    errors, limits = OP.errors(OP.function, tensors), OP.limits(tensors, rounding(dtype, shape.height * shape.width))
    assert all(errors[name] <= limits[name] for name in limits), (errors, limits)


@pytest.mark.parametrize("programs", [1, 3, 7])
def test_chunks_of_several_tiles(programs, monkeypatch, poison):
    monkeypatch.setattr(launch, "_BACKWARD_PROGRAMS", programs)
    for layout in (torch.channels_last, torch.contiguous_format):
        tensors = inputs(Shape("chunks", 2, 20, 41, 31), torch.float64)
        tensors["input"] = tensors["input"].detach().contiguous(memory_format=layout)
        errors = OP.errors(OP.function, tensors)
        assert max(errors.values()) < 1e-13, errors


@pytest.mark.parametrize("layout", ["cropped", "transposed", "every second channel"])
def test_any_strides(layout, poison):
    tensors = {name: x.detach() for name, x in inputs(dtype=torch.float64).items()}
    input, coefficients = tensors["input"], tensors["coefficients"].transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "cropped":
        input = F.pad(input, (1, 2, 0, 3))[:, :, :-3, 1:-2]
    elif layout == "transposed":
        input = input.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        input = input.repeat_interleave(2, 1)[:, ::2]
    torch.testing.assert_close(dynamic_relu(input, coefficients), reference(input, coefficients))
    for cotangent in (torch.randn(input.shape[::-1]).permute(3, 2, 1, 0), torch.ones(()).expand(input.shape)):
        expected = gradients(reference, input, coefficients, cotangent.double())
        torch.testing.assert_close(gradients(dynamic_relu, input, coefficients, cotangent.double()), expected)


def test_ties_are_split_in_half():
    generator = torch.Generator().manual_seed(0)
    input, coefficients = (torch.randint(-2, 3, s, generator=generator).float() for s in ((2, 6, 8, 8), (2, 4, 6)))
    cotangent = torch.randn(2, 6, 8, 8)
    expected = gradients(reference, input, coefficients, cotangent)
    torch.testing.assert_close(gradients(dynamic_relu, input, coefficients, cotangent), expected)


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_what_is_not_finite_spreads_as_in_the_definition(place, dtype, value):
    check_not_finite(place, value, dtype)


@pytest.mark.parametrize("name", INFINITIES)
def test_lines_that_meet_at_infinity(name):
    check_infinity(name)


@EXAMPLES
@given(call=malformed_call())
def test_malformed_calls_are_refused_alike_on_both_paths(call):
    assert refusal(call, "triton") == refusal(call, "torch")


@EXAMPLES
@given(call=extreme_call([*DTYPES[:3], torch.float32]))
def test_extreme_calls_are_the_definitions(call):
    check_extreme(call, "triton")


def test_nan_reaches_the_output():
    coefficients = torch.zeros(1, 4, 2)
    coefficients[0, 3, 1] = torch.nan
    assert dynamic_relu(torch.ones(1, 2, 1, 1), coefficients).isnan().flatten().tolist() == [False, True]


def test_gradcheck():
    assert torch.autograd.gradcheck(dynamic_relu, tuple(inputs(Shape("tiny", 2, 3, 3, 2), torch.float64).values()))


def test_opcheck():
    tensors = inputs()
    torch.library.opcheck(torch.ops.dyhead.dynamic_relu.default, (*tensors.values(), "triton"))
    detached = [x.detach() for x in tensors.values()]
    arguments = (detached[0], *detached, "triton")
    torch.library.opcheck(torch.ops.dyhead.dynamic_relu_backward.default, arguments)


def test_an_empty_batch():
    input, coefficients = torch.empty(0, 4, 3, 3), torch.randn(0, 4, 4)
    assert dynamic_relu(input, coefficients).shape == (0, 4, 3, 3)
    assert gradients(dynamic_relu, input, coefficients, torch.empty(0, 4, 3, 3))[1].shape == (0, 4, 4)


def test_the_same_bits_twice():
    tensors = inputs(Shape("several tiles", 2, 33, 25, 20))
    cotangent = torch.randn(2, 33, 25, 20)
    first, second = (gradients(dynamic_relu, **tensors, cotangent=cotangent) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
