"""The dynamic ReLU on its PyTorch path, and on a GPU where there is one: numbers, conventions, layouts, tracing."""

import json

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

from kernels import dynamic_relu
from kernels.bench.op import OPS, Shape, rounding
from kernels.dynamic_relu.operator import reference

OP = OPS["dynamic_relu"]
SHAPES = [
    Shape("one pixel", 3, 5, 1, 1),
    Shape("one channel", 2, 1, 4, 3),
    Shape("one row", 1, 16, 1, 9),
    Shape("one column", 2, 8, 7, 1),
    Shape("odd", 2, 33, 5, 7),
    Shape("many channels", 1, 300, 3, 5),
    Shape("many pixels", 2, 3, 40, 50),
]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def inputs(shape=SHAPES[4], dtype=torch.float32, device="cpu"):
    return OP.make_inputs(shape, dtype, device, seed=1)


def strided(x, layout):
    """The values of `x` in another memory layout."""
    if layout == "cropped":
        return F.pad(x, (1, 2, 0, 3))[:, :, :-3, 1:-2]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "every second channel":
        return x.repeat_interleave(2, 1)[:, ::2]
    return x.contiguous(memory_format=getattr(torch, layout))


LAYOUTS = ("channels_last", "contiguous_format", "cropped", "transposed", "every second channel")


def gradients(function, input, coefficients, cotangent):
    input, coefficients = input.detach().requires_grad_(), coefficients.detach().requires_grad_()
    return torch.autograd.grad(function(input, coefficients), (input, coefficients), cotangent)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_output_and_gradients(shape, dtype, poison):
    tensors = inputs(shape, dtype)
    errors, limits = OP.errors(OP.function, tensors), OP.limits(tensors, rounding(dtype, shape.height * shape.width))
    assert all(errors[name] <= limits[name] for name in limits), (errors, limits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, poison):
    tensors = inputs(dtype=torch.float64)
    input, coefficients = strided(tensors["input"].detach(), layout), tensors["coefficients"].detach()
    cotangent = torch.randn(input.shape[::-1], dtype=torch.float64).permute(3, 2, 1, 0)
    expected = gradients(reference, input, coefficients, cotangent)
    torch.testing.assert_close(dynamic_relu(input, coefficients), reference(input, coefficients))
    torch.testing.assert_close(gradients(dynamic_relu, input, coefficients, cotangent), expected)
    # A broadcast cotangent is what `sum().backward()` passes.
    cotangent = torch.ones((), dtype=torch.float64).expand(input.shape)
    expected = gradients(reference, input, coefficients, cotangent)
    torch.testing.assert_close(gradients(dynamic_relu, input, coefficients, cotangent), expected)


def test_the_output_keeps_channels_last():
    tensors = inputs()
    assert dynamic_relu(**tensors).is_contiguous(memory_format=torch.channels_last)
    tensors["input"] = tensors["input"].contiguous()
    assert dynamic_relu(**tensors).is_contiguous()


@pytest.mark.parametrize("name", ["dyrelu_c32", "dyrelu_c32_1x1", "dyrelu_c256"])
def test_with_its_coefficient_network_it_agrees_with_mmdetection(name, golden):
    file = golden(name)
    tolerance = {k: 10 * v for k, v in json.loads(str(file["meta"]))["max_abs_diff"]["fp32"].items()}
    tensors = {k.removeprefix("param."): torch.tensor(v) for k, v in file.items() if k == "x" or k.startswith("param.")}
    x, w1, b1, w2, b2 = (t.requires_grad_() for t in tensors.values())
    pooled = x.mean((2, 3))
    hidden = F.relu(F.linear(pooled, w1.flatten(1), b1))
    gates = F.hardsigmoid(F.linear(hidden, w2.flatten(1), b2)).unflatten(1, (4, -1)) - 0.5
    scale, centre = torch.tensor([2.0, 1.0, 2.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    y = dynamic_relu(x, gates * scale[:, None] + centre[:, None])
    torch.testing.assert_close(y.double(), torch.tensor(file["y"]).double(), rtol=0, atol=tolerance["y"])
    y.backward(torch.tensor(file["cot"]))
    for key, tensor in tensors.items():
        expected = torch.tensor(file["grad.x" if key == "x" else f"grad.param.{key}"]).double()
        limit = tolerance["gx" if key == "x" else "gp"]
        torch.testing.assert_close(tensor.grad.double(), expected, rtol=0, atol=limit, msg=lambda m, k=key: f"{k}: {m}")


def test_the_hard_sigmoid_of_the_coefficients_is_the_released_one(golden):
    file = {k: torch.tensor(v).double() for k, v in golden("hsigmoid").items() if k != "meta"}
    x = file["x"].requires_grad_()
    y = F.hardsigmoid(x)
    torch.testing.assert_close(y, file["official.y"])
    torch.testing.assert_close(torch.autograd.grad(y, x, file["cot"])[0], file["official.grad.x"])


def integers(*size):
    return torch.randint(-2, 3, size, generator=torch.Generator().manual_seed(len(size))).float()


def test_ties_are_split_in_half():
    # Products and sums of small integers are exact, so two lines meet where they should, a fifth of the time.
    input, coefficients, cotangent = integers(2, 6, 8, 8), integers(2, 4, 6), torch.randn(2, 6, 8, 8)
    a1, b1, a2, b2 = coefficients[..., None, None].unbind(1)
    tied = (a1 * input + b1 == a2 * input + b2) & (a1 != a2)
    assert tied.sum() > 50
    found = gradients(dynamic_relu, input, coefficients, cotangent)
    torch.testing.assert_close(found, gradients(reference, input, coefficients, cotangent))
    torch.testing.assert_close(found[0][tied], (cotangent * (a1 + a2) / 2)[tied])


def test_equal_lines_share_the_gradient_of_their_coefficients():
    coefficients = torch.tensor([0.3, 0.1, 0.3, 0.1]).view(1, 4, 1)
    _, found = gradients(dynamic_relu, torch.full((1, 1, 2, 2), 5.0), coefficients, torch.ones(1, 1, 2, 2))
    assert found.flatten().tolist() == [10, 2, 10, 2]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_spreads_as_in_the_definition(place, dtype, value):
    check_not_finite(place, value, dtype)


@pytest.mark.parametrize("name", INFINITIES)
def test_lines_that_meet_at_infinity(name):
    check_infinity(name)


@EXAMPLES
@given(call=malformed_call())
def test_malformed_calls_are_refused(call):
    refusal(call, "torch")


@EXAMPLES
@given(call=extreme_call([*DTYPES, torch.float32]))
def test_extreme_calls_are_the_definitions(call):
    check_extreme(call, "torch")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nan_reaches_the_output(device):
    coefficients = torch.zeros(1, 4, 2, device=device)
    coefficients[0, 3, 1] = torch.nan
    assert dynamic_relu(torch.ones(1, 2, 1, 1, device=device), coefficients).isnan().flatten().tolist() == [False, True]


def test_gradcheck():
    assert torch.autograd.gradcheck(dynamic_relu, tuple(inputs(Shape("tiny", 2, 3, 3, 2), torch.float64).values()))


def test_there_is_no_second_derivative():
    tensors = inputs()
    (gradient,) = torch.autograd.grad(dynamic_relu(**tensors).sum(), tensors["input"], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^dynamic_relu has no second derivative$"):
        gradient.sum().backward()


def test_an_empty_batch_and_an_empty_map():
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3)):
        input, coefficients = torch.empty(shape), torch.randn(shape[0], 4, 4)
        assert dynamic_relu(input, coefficients).shape == shape
        grad_input, grad_coefficients = gradients(dynamic_relu, input, coefficients, torch.empty(shape))
        assert grad_input.shape == shape
        assert torch.equal(grad_coefficients, torch.zeros_like(coefficients))


def test_autocast_and_mixed_precision_keep_the_input_dtype():
    tensors = inputs()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        input = tensors["input"].detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = dynamic_relu(input, tensors["coefficients"])
            grads = torch.autograd.grad(output.float().sum(), (input, tensors["coefficients"]))
        assert (output.dtype, grads[0].dtype, grads[1].dtype) == (dtype, dtype, torch.float32)
        expected = reference(input.double(), tensors["coefficients"].double())
        torch.testing.assert_close(output, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format", "cropped"])
def test_opcheck(layout, dtype):
    tensors = inputs(dtype=dtype)
    input, coefficients = strided(tensors["input"].detach(), layout).requires_grad_(), tensors["coefficients"]
    torch.library.opcheck(torch.ops.dyhead.dynamic_relu.default, (input, coefficients, "torch"))
    arguments = (input.detach(), input.detach(), coefficients.detach(), "torch")
    torch.library.opcheck(torch.ops.dyhead.dynamic_relu_backward.default, arguments)


def test_compile_and_export():
    class Module(torch.nn.Module):
        def forward(self, input, coefficients):
            return dynamic_relu(2 * input, coefficients)

    tensors = {name: x.detach() for name, x in inputs().items()}
    cotangent = torch.randn(tensors["input"].shape)
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    expected = gradients(Module(), **tensors, cotangent=cotangent)
    torch.testing.assert_close(gradients(compiled, **tensors, cotangent=cotangent), expected)
    batch, height = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("height", min=2, max=64)
    dynamic = {"input": {0: batch, 2: height}, "coefficients": {0: batch}}
    program = torch.export.export(Module(), (), tensors, dynamic_shapes=dynamic)
    assert [n for n in program.graph.nodes if n.target == torch.ops.dyhead.dynamic_relu.default]
    other = {name: x.detach() for name, x in inputs(Shape("other", 5, 33, 9, 7)).items()}
    torch.testing.assert_close(program.module()(**other), Module()(**other))


def test_meta_tensors():
    output = dynamic_relu(**inputs(device="meta"))
    assert output.shape == (2, 33, 5, 7)
    assert output.is_contiguous(memory_format=torch.channels_last)


BAD = {
    r"input must be \(N, C, H, W\), got shape \(2, 3, 4\)": {"input": torch.ones(2, 3, 4)},
    r"coefficients must be \(N, 4, C\) = \(2, 4, 3\) .*, got \(2, 3, 4\)": {"coefficients": torch.ones(2, 3, 4)},
    r"coefficients must be .*, got \(1, 4, 3\)": {"coefficients": torch.ones(1, 4, 3)},
    r"coefficients must be \(N, 4, C\), got shape \(2, 12\)": {"coefficients": torch.ones(2, 12)},
    "input must be floating point .*, got torch.int64": {"input": torch.ones(2, 3, 4, 4, dtype=torch.int64)},
    "coefficients must be floating point": {"coefficients": torch.ones(2, 4, 3, dtype=torch.float8_e5m2)},
    "coefficients must be on the device of input, cpu; it is on meta": {"coefficients": torch.ones(2, 4, 3).to("meta")},
    "input must be a dense tensor": {"input": torch.ones(2, 3, 4, 4).to_sparse()},
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_named(message):
    with pytest.raises(ValueError, match=message):
        dynamic_relu(**{"input": torch.ones(2, 3, 4, 4), "coefficients": torch.ones(2, 4, 3)} | BAD[message])


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match=r"coefficients must be a tensor .*, got list"):
        dynamic_relu(torch.ones(2, 3, 4, 4), [1.0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, Shape("P4", 2, 256, 50, 84)], ids=lambda shape: shape.name)
def test_triton_output_and_gradients(shape, dtype, poison):
    tensors = inputs(shape, dtype, "cuda")
    errors, limits = OP.errors(OP.function, tensors), OP.limits(tensors, rounding(dtype, shape.height * shape.width))
    assert all(errors[name] <= limits[name] for name in limits), (errors, limits)


@pytest.mark.gpu
def test_triton_gives_the_same_bits_twice_and_on_another_stream():
    tensors = inputs(Shape("P4", 8, 256, 50, 84), torch.bfloat16, "cuda")
    cotangent = torch.randn_like(tensors["input"])
    first = gradients(dynamic_relu, **tensors, cotangent=cotangent)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = gradients(dynamic_relu, **tensors, cotangent=cotangent)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_triton_beyond_2_to_the_31_elements(memory_format):
    input = torch.zeros((1, 16, 12000, 12000), dtype=torch.bfloat16, device="cuda").to(memory_format=memory_format)
    input[0, :, -1, -1] = torch.arange(16) - 8
    coefficients = torch.tensor([1.0, 0, -1, 0], device="cuda")[None, :, None].repeat(1, 1, 16).requires_grad_()
    output = dynamic_relu(input, coefficients)
    assert torch.equal(output[0, :, -1, -1], input[0, :, -1, -1].abs())
    (gradient,) = torch.autograd.grad(output[0, :, -1, -1].sum(), coefficients)
    expected = torch.arange(16.0) - 8
    assert torch.equal(gradient[0, 0].cpu(), expected.clamp(min=0))
    assert torch.equal(gradient[0, 2].cpu(), expected.clamp(max=0))
