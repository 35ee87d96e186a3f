"""The operators in 16 bits as a GPU executes them, forward and backward, against float64."""

from dataclasses import replace

import pytest
import torch
from deform_conv_cases import CASES, Case, check, check_sample
from half_precision import check_half

from kernels import batched_nms, border_align, deform_conv2d, dynamic_relu, nms, roi_align, use_backend
from kernels.bench.op import OPS, Shape, rounding

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
# Several programs in every direction, and not a whole number of tiles.
SEVERAL = Case("several", "", batch=2, channels=20, outputs=18, size=(5, 17))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaf(x, dtype, other, layout="contiguous_format"):
    """The numbers of `x` in `dtype` as a tensor of type `other`."""
    rounded = x.detach().to(dtype).to("cuda", other, memory_format=getattr(torch, layout))
    return rounded.requires_grad_()


@HALVES
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
def test_deform_conv2d(masked, dtype, algorithms):
    case = replace(SEVERAL, masked=masked)

    def run(other):
        # Where rounding moves a coordinate across a pixel, the gradient is another: odd sixteenths never come near.
        inputs = case.inputs(torch.float64)
        inputs["offset"] = ((8 * inputs["offset"]).floor() + 0.5).div(8).clamp(-8, 8)
        inputs = {name: leaf(x, dtype, other) for name, x in inputs.items() if x is not None}
        return [deform_conv2d(**inputs, **case.geometry)], inputs

    check_half(run, dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_geometries_of_deform_conv2d(case):
    check(deform_conv2d, case, torch.bfloat16, "cuda")


@HALVES
def test_no_error_of_deform_conv2d_is_larger_than_a_plain_chains(dtype):
    op = OPS["deform_conv2d"]
    tensors = op.make_inputs(Shape("", 1, 64, 8, 17), dtype, "cuda", 0)
    errors, limits = op.errors(op.function, tensors), op.limits(tensors, rounding(dtype, 9 * 64))
    assert [name for name, error in errors.items() if not error <= limits[name]] == [], (errors, limits)


@HALVES
def test_a_sample_loses_less_than_in_a_plain_chain(dtype):
    check_sample(dtype, "cuda")


@HALVES
@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
def test_dynamic_relu(layout, dtype):
    def run(other):
        x, lines = leaf(random(2, 33, 9, 7), dtype, other, layout), leaf(random(2, 4, 33, seed=1), dtype, other)
        return [dynamic_relu(x, lines)], {"input": x, "coefficients": lines}

    check_half(run, dtype)


def boxes(*shape, largest):
    corner = (largest * torch.rand(*shape, 2, generator=torch.Generator().manual_seed(1))).round(decimals=1)
    return torch.cat([corner - 1, corner + largest / 2], -1).to("cuda")


@HALVES
@pytest.mark.parametrize("settings", [(2, True), (0, False)], ids=str)
def test_roi_align(settings, dtype, algorithms):
    def run(other):
        features = leaf(random(2, 20, 9, 11), dtype, other)
        return [roi_align(features, list(boxes(2, 3, largest=64.0)), (3, 4), 0.125, *settings)], {"features": features}

    check_half(run, dtype)


@HALVES
def test_border_align(dtype, algorithms):
    def run(other):
        features = leaf(random(2, 24, 9, 11), dtype, other)
        return [border_align(features, boxes(2, 5, largest=8.0), 4)], {"features": features}

    check_half(run, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_nms(dtype):
    # More boxes than a word of suppressed ones has bits, and scores that tie.
    found = boxes(150, largest=16.0).to(dtype)
    scores = random(150).mul(4).round().to("cuda", dtype)
    labels = torch.arange(150, device="cuda") % 3
    kept = nms(found, scores, 0.7), batched_nms(found, scores, labels, 0.7, max_output=20)
    with use_backend("torch"):
        expected = nms(found, scores, 0.7), batched_nms(found, scores, labels, 0.7, max_output=20)
    assert [x.tolist() for x in kept] == [x.tolist() for x in expected]
    assert 20 < len(kept[0]) < 140
