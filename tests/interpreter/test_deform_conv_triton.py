"""The Triton kernels of deform_conv2d, interpreted: golden vectors, odd shapes, gradients, layouts, determinism."""

import pytest
import torch
import triton.language as tl
from deform_conv_cases import CASES, Case, check, check_golden, check_sample, gradients
from torch.library import opcheck

from kernels import deform_conv2d, deform_conv2d_levels, use_backend
from kernels.bench.op import OPS, Shape, rounding
from kernels.deform_conv.operator import reference
from kernels.runtime.launch import Launch
from kernels.sampling import launch as sampling_launch

# The interpreter's time is that of the number of programs; these are the files that need few.
FILES = ["k1_p0", "s1_groups2_dil2", "s1_zero", "s2_dg1", "s2_far_dg2", "tiny_1x1", "tiny_2x2"]
PLAIN, OP = CASES[0], OPS["deform_conv2d"]


@pytest.fixture(autouse=True)
def triton_backend(poison):
    assert torch.empty(1).isnan()
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("file", FILES)
def test_mmcv_gives_the_same_numbers(golden, file):
    check_golden(deform_conv2d, golden(f"mdc_{file}"), torch.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_odd_shapes_follow_float64(case):
    check(deform_conv2d, case, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", [PLAIN, CASES[9]], ids=lambda case: case.id)
def test_lower_precisions(case, dtype):
    check(deform_conv2d, case, dtype)


@pytest.mark.parametrize(("channels", "size", "seed"), [(64, (16, 16), 0), (64, (16, 16), 1), (96, (11, 13), 2)])
def test_in_16_bits_no_error_is_larger_than_a_plain_chains(channels, size, seed, launches):
    """Where samples stay in the order in which lanes have loaded them, as on a GPU."""
    tensors = OP.make_inputs(Shape("", 1, channels, *size), torch.float16, "cpu", seed)
    errors, limits = OP.errors(OP.function, tensors), OP.limits(tensors, rounding(torch.float16, 9 * channels))
    assert [name for name, error in errors.items() if not error <= limits[name]] == [], (errors, limits)
    swapped = [x.constants["K"].SWAPPED for x in launches if x.kernel.__name__ in ("forward_kernel", "samples_kernel")]
    assert len(swapped) > 1 and all(swapped)


def test_a_sample_loses_less_than_in_a_plain_chain():
    check_sample(torch.float16)


def test_gradcheck():
    case = Case("", "", batch=1, channels=2, outputs=2, size=(1, 2), kernel=(1, 2), padding=(0, 0), groups=2)
    inputs = case.inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda *leaves: deform_conv2d(**dict(zip(inputs, leaves, strict=True)), **case.geometry), list(inputs.values())
    )


@pytest.fixture
def launches(monkeypatch):
    """Every launch that is run."""
    found, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (found.append(self), run(self)))
    return found


def test_many_splits_of_the_weight_gradient(launches, monkeypatch):
    monkeypatch.setattr(sampling_launch, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(sampling_launch, "_WAVES", 1)
    case = Case("", "", batch=5, channels=1, outputs=2, size=(17, 3), kernel=(1, 1), padding=(0, 0))
    check(deform_conv2d, case, torch.float64)
    # Ten tiles in three splits of four: the first ends with an image, the last is not full.
    assert [x.grid for x in launches if x.kernel.__name__ == "weight_kernel"] == [(1, 1, 3)]


def test_64_bit_places_within_an_image(launches, monkeypatch):
    monkeypatch.setattr(sampling_launch.Single, "largest", 2**31)
    check(deform_conv2d, CASES[9], torch.float64)
    assert {getattr(launch.constants.get("K"), "INDEX", tl.int64) for launch in launches} == {tl.int64}


@pytest.mark.parametrize("size", [(3, 1), (1, 3), (1, 1)], ids=["column", "line", "pixel"])
def test_nothing_behind_a_map_is_read(size):
    case = Case("", "", batch=1, channels=4, outputs=2, size=size)
    inputs = case.inputs(torch.float32)
    memory = torch.full((2 * 4 * 3,), torch.nan)
    x = memory[: inputs["input"].numel()].view(1, *size, 4).permute(0, 3, 1, 2)
    x.copy_(inputs["input"].detach())
    found = gradients(deform_conv2d, inputs | {"input": x.requires_grad_()}, case.geometry)
    torch.testing.assert_close(found, gradients(reference, inputs, case.geometry), rtol=1e-5, atol=1e-5)


def test_layouts():
    inputs = PLAIN.inputs(torch.float64)
    expected = gradients(reference, inputs, PLAIN.geometry)
    last = {k: x.detach().contiguous(memory_format=torch.channels_last) for k, x in inputs.items() if x.dim() == 4}
    found = gradients(deform_conv2d, inputs | last, PLAIN.geometry)
    assert found["output"].is_contiguous(memory_format=torch.channels_last)
    assert found["offset"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected)
    wide = {
        k: inputs[k].detach().repeat(1, 2, 1, 2)[:, 1::2, :, 7:].copy_(inputs[k]) for k in ("input", "offset", "mask")
    }
    torch.testing.assert_close(gradients(deform_conv2d, inputs | wide, PLAIN.geometry), expected)


def test_far_and_infinite_offsets():
    inputs = PLAIN.inputs(torch.float32)
    with torch.no_grad():
        inputs["offset"][0, :, 0, 0] = torch.tensor([1e30, -1e30, torch.inf, -torch.inf, 3e9, -3e9]).repeat(3)
    found = gradients(deform_conv2d, inputs, PLAIN.geometry)
    with use_backend("torch"):
        expected = gradients(deform_conv2d, inputs, PLAIN.geometry)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["output"][0, :, 0, 0], inputs["bias"].detach())


def test_only_the_gradients_asked_for():
    case = Case("", "", batch=1, channels=2, outputs=2, size=(2, 3), kernel=(1, 2), padding=(0, 1))
    inputs = case.inputs(torch.float64)
    expected = gradients(reference, inputs, case.geometry)
    cotangent = torch.randn(expected["output"].shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for name in inputs:
        leaves = {k: x.detach() for k, x in inputs.items()}
        leaves[name].requires_grad_()
        deform_conv2d(**leaves, **case.geometry).backward(cotangent)
        torch.testing.assert_close(leaves[name].grad, expected[name])


def test_deterministic_algorithms_need_no_atomics(launches):
    torch.use_deterministic_algorithms(True)
    try:
        check(deform_conv2d, CASES[9], torch.float64)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [launch.arguments["grad_x"] for launch in launches if "grad_x" in launch.arguments] == [None]


def test_levels_and_empty_batches():
    cases = [Case("", "", batch=1, channels=2, outputs=3, size=size) for size in ((3, 4), (1, 1))]
    inputs = [case.inputs(torch.float64, seed) for seed, case in enumerate(cases)]
    x, offset, mask = ([each[name] for each in inputs] for name in ("input", "offset", "mask"))
    weight, bias = inputs[0]["weight"], inputs[0]["bias"]
    found = deform_conv2d_levels(x, offset, weight, bias, padding=1, masks=mask)
    with use_backend("torch"):
        expected = deform_conv2d_levels(x, offset, weight, bias, padding=1, masks=mask)
    leaves = [*x, *offset, *mask, weight, bias]
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad([y.sin().sum() for y in ys], leaves) for ys in (found, expected)]
    torch.testing.assert_close(*grads)
    empty = Case("", "", batch=0).inputs(torch.float64)
    deform_conv2d(**empty, padding=1).sum().backward()
    assert not empty["weight"].grad.any()


def test_opcheck():
    inputs = Case("", "", batch=1, channels=2, outputs=2, size=(2, 2), kernel=(1, 1)).inputs(torch.float32)
    lists = [[inputs[name]] for name in ("input", "offset", "mask")]
    settings = (inputs["weight"], inputs["bias"], [1, 1], [1, 1], [1, 1], "triton")
    opcheck(torch.ops.dyhead.deform_conv2d.default, (*lists, *settings))
