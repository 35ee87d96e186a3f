"""deform_conv2d on the PyTorch path: golden vectors, odd shapes, gradients, the operator's registration, bad input."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from deform_conv_cases import CASES, NAMES, Case, check, check_golden, gradients
from torch.library import opcheck

from kernels import deform_conv2d, deform_conv2d_levels
from kernels.deform_conv import cpu as deform_conv_cpu
from kernels.deform_conv import cpu_plan as deform_conv_plan
from kernels.deform_conv.operator import reference

FILES = [
    "c256_o32_10x14",
    "c32_20x28",
    "k1_p0",
    "s1_dg1",
    "s1_dg2",
    "s1_groups2_dil2",
    "s1_int",
    "s1_nobias",
    "s1_zero",
    "s2_dg1",
    "s2_dg2_even",
    "s2_far_dg2",
    "s2_zero",
    "tiny_1x1",
    "tiny_2x2",
]
PLAIN = CASES[0]


def arguments(case: Case = PLAIN, dtype=torch.float64, **geometry):
    return case.inputs(dtype) | case.geometry | geometry


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [deform_conv2d, reference], ids=["operator", "reference"])
@pytest.mark.parametrize("file", FILES)
def test_mmcv_gives_the_same_numbers(golden, file, function, dtype):
    check_golden(function, golden(f"mdc_{file}"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_offsets_of_a_larger_map_read_as_a_flat_prefix(golden, dtype):
    """The released DyHead reads a larger map's offsets as if they were the smaller map's: a view can say so."""

    def prefix(input, offset, weight, bias, mask, **geometry):
        def flat(x):
            shape = torch.Size((x.shape[1], *input.shape[2:]))
            return x.flatten(1)[:, : shape.numel()].unflatten(1, shape)

        return deform_conv2d(input, flat(offset), weight, bias, mask=flat(mask), **geometry)

    check_golden(prefix, golden("mdc_prefix_3x4_off5x7"), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_odd_shapes_follow_float64(case, dtype):
    check(deform_conv2d, case, dtype)


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_no_element_is_left_unwritten(case, poisoned):
    assert torch.empty(3).isnan().all()
    check(deform_conv2d, case, torch.float32)


@pytest.mark.parametrize("case", [PLAIN, CASES[4], CASES[9]], ids=lambda case: case.id)
def test_pieces_change_nothing(case, monkeypatch):
    monkeypatch.setattr(deform_conv_cpu, "PIECE", 100)
    monkeypatch.setattr(deform_conv_cpu, "HELD", 300)
    monkeypatch.setattr(deform_conv_plan, "KEPT_POINTS", 0)
    check(deform_conv2d, case, torch.float64)


@pytest.mark.parametrize("function", [deform_conv2d, reference], ids=["operator", "reference"])
def test_gradcheck(function):
    case = Case("tiny", "", batch=2, channels=4, outputs=4, size=(3, 2), kernel=(2, 3), groups=2, offset_groups=2)
    inputs = case.inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda *leaves: function(**dict(zip(inputs, leaves, strict=True)), **case.geometry), list(inputs.values())
    )


def test_zero_offsets_are_an_ordinary_convolution():
    inputs = arguments(dtype=torch.float32) | {"mask": None}
    inputs["offset"] = torch.zeros_like(inputs["offset"])
    expected = F.conv2d(inputs["input"], inputs["weight"], inputs["bias"], padding=1)
    torch.testing.assert_close(deform_conv2d(**inputs), expected, rtol=1e-5, atol=1e-5)


def test_integer_offsets_copy_pixels_exactly():
    x = torch.rand(1, 1, 100, 168)
    offset = torch.tensor([2.0, -3.0]).view(1, 2, 1, 1).expand(1, 2, 100, 168)
    y = deform_conv2d(x, offset, torch.ones(1, 1, 1, 1))
    assert torch.equal(y[:, :, :98, 3:], x[:, :, 2:, :-3])
    assert not y[:, :, 98:].any() and not y[:, :, :, :3].any()


@pytest.mark.parametrize("place", [-1.0, 4.0])
def test_exactly_at_the_border_the_offset_has_no_gradient(place):
    """There mmcv's gradient is zero and torchvision's is one-sided; a hair inside, it is not zero."""

    def gradient(y):
        offset = torch.tensor([y, 1.0], dtype=torch.float64).view(1, 2, 1, 1).repeat(1, 1, 4, 4).requires_grad_()
        x = 1 + torch.arange(16, dtype=torch.float64).view(1, 1, 4, 4)
        out = deform_conv2d(x, offset, torch.ones(1, 1, 1, 1, dtype=torch.float64))
        (found,) = torch.autograd.grad(out[0, 0, 0, 0], offset)
        return found[0, 0, 0, 0].item()

    assert gradient(place) == 0
    assert abs(gradient(place * (1 - 1e-9))) > 1


def test_far_and_unreal_offsets_sample_nothing():
    inputs = arguments(dtype=torch.float32)
    unreal = torch.zeros(2, 18, 5, 7, dtype=torch.bool)
    with torch.no_grad():
        inputs["offset"][0, :, 0, 0] = torch.tensor([1e30, -1e30, torch.inf, -torch.inf, 3e9, -3e9]).repeat(3)
        # The dy of tap 0 and the dx of tap 1: the rest of these pixels is sampled.
        inputs["offset"][0, 0, 2, 2] = inputs["offset"][0, 3, 3, 3] = torch.nan
        unreal[0, :, 0, 0] = unreal[0, :2, 2, 2] = unreal[0, 2:4, 3, 3] = True
    masked = {name: inputs[name] for name in NAMES} | {
        "offset": inputs["offset"].detach().masked_fill(unreal, 0).requires_grad_(),
        "mask": inputs["mask"].detach().masked_fill(unreal[:, ::2], 0).requires_grad_(),
    }
    found = gradients(deform_conv2d, {name: inputs[name] for name in NAMES}, PLAIN.geometry)
    expected = gradients(deform_conv2d, masked, PLAIN.geometry)
    for name in ("output", "input", "weight", "bias"):
        torch.testing.assert_close(found[name], expected[name])
    assert not found["offset"][unreal].any() and not found["mask"][unreal[:, ::2]].any()
    torch.testing.assert_close(found["offset"][~unreal], expected["offset"][~unreal])
    assert torch.equal(found["mask"][~unreal[:, ::2]], expected["mask"][~unreal[:, ::2]])


def test_what_is_outside_is_not_read():
    """A map of NaN: samples outside are 0, in the definition too."""
    case = Case("", "", size=(4, 4), masked=False, biased=False)
    inputs = case.inputs(torch.float64)
    inputs["input"] = torch.full_like(inputs["input"], torch.nan)
    inputs["offset"] = torch.full_like(inputs["offset"], 50.0)
    for function in (deform_conv2d, reference):
        out = function(inputs["input"], inputs["offset"], inputs["weight"], **case.geometry)
        assert not out.any(), function


def test_levels_in_one_call_equal_single_calls():
    settings = {"channels": 4, "outputs": 6, "groups": 2, "offset_groups": 2}
    cases = [Case("", "", size=size, **settings) for size in ((9, 4), (1, 1), (2, 5))]
    inputs = [case.inputs(torch.float64, seed) for seed, case in enumerate(cases)]
    x, offset, mask = ([each[name] for each in inputs] for name in ("input", "offset", "mask"))
    weight, bias = inputs[0]["weight"], inputs[0]["bias"]
    leaves = [*x, *offset, *mask, weight, bias]
    together = deform_conv2d_levels(x, offset, weight, bias, padding=1, masks=mask)
    singly = [deform_conv2d(*pair, weight, bias, padding=1, mask=m) for *pair, m in zip(x, offset, mask, strict=True)]
    assert len({y.untyped_storage().data_ptr() for y in together}) == len(together)
    cotangents = [torch.randn_like(y) for y in singly]
    found = [*together, *torch.autograd.grad(together, leaves, cotangents)]
    expected = [*singly, *torch.autograd.grad(singly, leaves, cotangents)]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_map_of_more_rows_than_a_short_key_counts():
    case = Case("large", "", batch=1, channels=1, outputs=1, size=(190, 190), kernel=(1, 1), padding=(0, 0))
    check(deform_conv2d, case, torch.float32)


def test_only_the_gradients_asked_for():
    inputs = arguments()
    expected = gradients(deform_conv2d, {name: inputs[name] for name in NAMES}, PLAIN.geometry)
    cotangent = torch.randn(expected["output"].shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for name in NAMES:
        fixed = {k: x.detach() if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
        fixed[name].requires_grad_()
        deform_conv2d(**fixed).backward(cotangent)
        torch.testing.assert_close(fixed[name].grad, expected[name])


def test_a_second_derivative_is_refused():
    inputs = arguments()
    (grad,) = torch.autograd.grad(deform_conv2d(**inputs).sum(), inputs["input"], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^deform_conv2d has no second derivative$"):
        (inputs["input"] + grad).sum().backward()


def test_strides_do_not_matter():
    inputs = arguments(Case("", "", channels=4, outputs=4))
    expected = deform_conv2d(**inputs)
    assert expected.is_contiguous()
    x = inputs["input"].detach()
    for layout in (x.contiguous(memory_format=torch.channels_last), x.repeat(1, 2, 1, 2)[:, ::2, :, 7:].copy_(x)):
        torch.testing.assert_close(deform_conv2d(**inputs | {"input": layout}), expected)
    last = {k: v.to(memory_format=torch.channels_last) for k, v in inputs.items() if k in ("input", "offset", "mask")}
    y = deform_conv2d(**inputs | last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)
    spread = inputs["offset"][:1, :, :1, :1].expand_as(inputs["offset"])
    torch.testing.assert_close(
        deform_conv2d(**inputs | {"offset": spread}), deform_conv2d(**inputs | {"offset": spread.contiguous()})
    )


def test_an_empty_batch_has_empty_outputs_and_zero_gradients():
    inputs = arguments(Case("", "", batch=0))
    y = deform_conv2d(**inputs)
    assert y.shape == (0, 5, 5, 7)
    y.sum().backward()
    assert inputs["input"].grad.shape == (0, 6, 5, 7)
    assert not inputs["weight"].grad.any() and not inputs["bias"].grad.any()


def test_the_same_bits_twice():
    case = Case("", "", batch=4, channels=32, outputs=32, size=(16, 16))
    first, second = (gradients(deform_conv2d, case.inputs(torch.float32), case.geometry) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inference_mode_leaves_nothing_unusable_behind():
    case = Case("", "", size=(6, 11))
    with torch.inference_mode():
        deform_conv2d(**arguments(case))
    deform_conv2d(**arguments(case)).sum().backward()


def operator_arguments():
    inputs = [case.inputs(torch.float32, seed) for seed, case in enumerate((PLAIN, Case("", "", size=(1, 2))))]
    lists = [[each[name] for each in inputs] for name in ("input", "offset", "mask")]
    return (*lists, inputs[0]["weight"], inputs[0]["bias"], [1, 1], [1, 1], [1, 1], "torch")


def test_opcheck():
    opcheck(torch.ops.dyhead.deform_conv2d.default, operator_arguments())


def test_opcheck_of_the_backward():
    x, offset, mask, weight, _, *settings, backend = operator_arguments()
    grads = [torch.randn(t.shape[0], weight.shape[0], *t.shape[2:]) for t in x]
    values = [[t.detach() for t in level] for level in (grads, x, offset, mask)]
    for needs in ([True] * 5, [False, True, False, True, False]):
        opcheck(torch.ops.dyhead.deform_conv2d_backward.default, (*values, weight.detach(), *settings, needs, backend))


def test_compiles_into_one_graph():
    inputs = arguments(dtype=torch.float32)
    leaves = [inputs[name] for name in NAMES]
    compiled = torch.compile(lambda **named: deform_conv2d(**named).sin(), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(**inputs).sum(), leaves)
    expected = torch.autograd.grad(deform_conv2d(**inputs).sin().sum(), leaves)
    torch.testing.assert_close(found, expected)


class Layer(torch.nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    def forward(self, input, offset, mask):
        return deform_conv2d(input, offset, self.weight, self.bias, padding=1, mask=mask)


def test_exports_with_dynamic_sizes():
    inputs = arguments(dtype=torch.float32)
    layer = Layer(inputs["weight"].detach(), inputs["bias"].detach())
    auto = torch.export.Dim.AUTO
    values = tuple(inputs[name].detach() for name in ("input", "offset", "mask"))
    program = torch.export.export(layer, values, dynamic_shapes=[{0: auto, 2: auto, 3: auto}] * 3)
    other = Case("", "", batch=3, size=(4, 9)).inputs(torch.float32)
    values = tuple(other[name].detach() for name in ("input", "offset", "mask"))
    torch.testing.assert_close(program.module()(*values), layer(*values))


def test_autocast_casts_everything_together():
    inputs = arguments(dtype=torch.float32)
    inputs["offset"] = inputs["offset"].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = deform_conv2d(**inputs)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    rounded = {name: inputs[name].detach().bfloat16().requires_grad_() for name in NAMES}
    expected = deform_conv2d(**rounded, padding=1)
    expected.float().sum().backward()
    # Sums in float32 inside, although autocast would have its own matrix products in bfloat16.
    assert torch.equal(y, expected)
    for name in NAMES:
        assert inputs[name].grad.dtype == inputs[name].dtype
        assert torch.equal(inputs[name].grad.bfloat16(), rounded[name].grad), name


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    NESTED = torch.nested.nested_tensor([torch.zeros(6, 5, 7)] * 2)
BAD = {
    r"input must be \(N, C, H, W\), got shape \(6, 5, 7\)": {"input": torch.zeros(6, 5, 7)},
    r"weight must be \(O, C / groups, kh, kw\), got shape": {"weight": torch.zeros(5, 6, 3)},
    "and not empty": {"weight": torch.zeros(0, 6, 3, 3)},
    "bias must be of weight's type, torch.float16, got": {"weight": torch.zeros(5, 6, 3, 3, dtype=torch.float16)},
    "weight must be floating point": {"weight": torch.zeros(5, 6, 3, 3, dtype=torch.int64)},
    "does not fit input of 6 channels": {"weight": torch.zeros(5, 4, 3, 3)},
    "does not fit input of 0 channels": {"input": torch.zeros(2, 0, 5, 7)},
    "groups that divides C and O": {"weight": torch.zeros(5, 3, 3, 3)},
    "needs 18 times the number of offset groups": {"offset": torch.zeros(2, 20, 5, 7)},
    "must divide the 6 channels of input": {"offset": torch.zeros(2, 72, 5, 7)},
    r"offset must have shape \(2, 18, 5, 7\)": {"offset": torch.zeros(2, 18, 5, 6)},
    r"mask must have shape \(2, 9, 5, 7\)": {"mask": torch.zeros(2, 18, 5, 7)},
    r"bias must be \(5,\)": {"bias": torch.zeros(6)},
    "bias must be of weight's type, torch.float32, got torch.float64": {"bias": torch.zeros(5, dtype=torch.float64)},
    "would be empty": {"dilation": 9},
    "stride must be within 1…16777216, got 0": {"stride": 0},
    "padding must be within 0…16777216, got -2": {"padding": (1, -2)},
    "padding must be .* got 3 numbers": {"padding": (1, 2, 3)},
    "stride must be within": {"stride": 2**70},
    "mask must be on the device of weight, cpu; it is on meta": {"mask": torch.zeros(2, 9, 5, 7, device="meta")},
    "input must be a dense tensor .* the layout torch.sparse_coo": {"input": torch.zeros(2, 6, 5, 7).to_sparse()},
    "input must be a dense tensor .* a nested one": {"input": NESTED},
}
BAD_TYPES = {
    "weight must be a tensor .*, got None": {"weight": None},
    "offset must be a tensor .*, got list": {"offset": [0.0]},
    "input must be a tensor .*, got ndarray": {"input": np.zeros((2, 6, 5, 7), np.float32)},
    "dilation must be a whole number, got float 1.5": {"dilation": 1.5},
    "stride must be a whole number, got bool True": {"stride": (1, True)},
    "padding must be a whole number, got str": {"padding": "same"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        deform_conv2d(**arguments(dtype=torch.float32) | BAD[message])


@pytest.mark.parametrize("message", BAD_TYPES)
def test_arguments_of_a_wrong_type_are_named(message):
    with pytest.raises(TypeError, match=message):
        deform_conv2d(**arguments(dtype=torch.float32) | BAD_TYPES[message])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"offset": torch.zeros(2, 18, 5, 7, dtype=torch.int64)}, "offset must be floating point"),
        ({"mask": torch.ones(2, 9, 5, 7, dtype=torch.float64)}, "mask must be of weight's type, torch.float32, got"),
    ],
)
def test_autocast_converts_neither_integers_nor_float64(wrong, message):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=message):
        deform_conv2d(**arguments(dtype=torch.float32) | wrong)


def test_levels_that_do_not_belong_together():
    x, y = (Case("", "", batch=n).inputs(torch.float32) for n in (1, 2))
    with pytest.raises(ValueError, match=r"inputs\[1\] has another batch"):
        deform_conv2d_levels([x["input"], y["input"]], [x["offset"], y["offset"]], x["weight"], padding=1)
    with pytest.raises(ValueError, match="offsets must be as many as inputs, 2, got 1"):
        deform_conv2d_levels([x["input"]] * 2, [x["offset"]], x["weight"], padding=1)
    with pytest.raises(ValueError, match="masks must be as many as inputs, 1, got 2"):
        deform_conv2d_levels([x["input"]], [x["offset"]], x["weight"], padding=1, masks=[x["mask"]] * 2)
    with pytest.raises(ValueError, match=r"offsets\[1\] must have shape"):
        deform_conv2d_levels([x["input"]] * 2, [x["offset"], y["offset"]], x["weight"], padding=1)
    with pytest.raises(ValueError, match="inputs must be a list with one tensor a level, got none"):
        deform_conv2d_levels([], [], x["weight"])
    with pytest.raises(TypeError, match=r"inputs must be a list .* got Tensor"):
        deform_conv2d_levels(x["input"], [x["offset"]], x["weight"])
