"""The records of the operators: what they count, and that their checks can fail."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import deform_conv2d, use_backend
from kernels.bench.op import OPS, Shape, pyramid, rounding

SHAPE = Shape("odd", 2, 6, 5, 7)
DEFORM_CONV2D, DYNAMIC_RELU = OPS["deform_conv2d"], OPS["dynamic_relu"]
ROUNDED_ONCE = replace(DEFORM_CONV2D, steps_rounded=False, tolerance=1)


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def inputs(op, device="cpu", dtype=torch.float32):
    return op.make_inputs(SHAPE, dtype, device, seed=0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_deformable_convolution_counts_as_a_dense_one(device):
    tensors = inputs(DEFORM_CONV2D, device)
    dense = counted(lambda: F.conv2d(tensors["input"], tensors["weight"], padding=1))
    assert dense == 2 * 2 * 5 * 7 * 6 * 6 * 3 * 3
    assert counted(lambda: DEFORM_CONV2D.function(**tensors)) == dense == DEFORM_CONV2D.flops(tensors, "forward")
    both = counted(lambda: DEFORM_CONV2D.function(**tensors).sum().backward())
    assert both == 3 * dense == DEFORM_CONV2D.flops(tensors, "both")


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_flops_of_a_strided_grouped_convolution_on_fake_tensors(backend):
    # Nothing runs on fake tensors, so the count of the Triton path needs no GPU.
    with FakeTensorMode(), use_backend("auto"):
        input, weight = torch.empty(2, 6, 9, 11), torch.empty(8, 3, 3, 3)
        offset, mask = torch.empty(2, 2 * 18, 5, 6), torch.empty(2, 2 * 9, 5, 6)
        arguments = ([input], [offset], [mask], weight, None, [2, 2], [1, 1], [1, 1], backend)
        expected = counted(lambda: F.conv2d(input, weight, stride=2, padding=1, groups=2))
        assert counted(lambda: torch.ops.dyhead.deform_conv2d(*arguments)) == expected == 2 * 2 * 5 * 6 * 8 * 3 * 9


def test_only_the_products_of_wanted_gradients_count():
    tensors = {name: x.detach() for name, x in inputs(DEFORM_CONV2D).items()}
    forward = DEFORM_CONV2D.flops(tensors, "forward")
    for wanted in ("weight", "offset", "input"):
        leaves = tensors | {wanted: tensors[wanted].clone().requires_grad_()}
        assert counted(lambda leaves=leaves: DEFORM_CONV2D.function(**leaves).sum().backward()) == 2 * forward


def test_the_dynamic_relu_is_counted_as_elementwise():
    tensors = inputs(DYNAMIC_RELU)
    assert counted(lambda: DYNAMIC_RELU.function(**tensors).sum().backward()) == 0
    assert DYNAMIC_RELU.flops(tensors, "forward") == 4 * 2 * 6 * 5 * 7


def test_bytes_are_those_of_every_operand_once():
    tensors = inputs(DYNAMIC_RELU, dtype=torch.bfloat16)
    output = DYNAMIC_RELU.function(**tensors)
    map_bytes, coefficient_bytes = 2 * 2 * 6 * 5 * 7, 2 * 2 * 4 * 6
    assert DYNAMIC_RELU.bytes_moved(tensors, output, "forward") == 2 * map_bytes + coefficient_bytes
    assert DYNAMIC_RELU.bytes_moved(tensors, output, "backward") == 3 * map_bytes + 2 * coefficient_bytes
    assert DYNAMIC_RELU.bytes_moved(tensors, output, "both") == 5 * map_bytes + 3 * coefficient_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_operator_and_record_agree(op, dtype):
    tensors = inputs(op, dtype=dtype)
    errors, limits = op.errors(op.function, tensors), op.limits(tensors, rounding(dtype, 9 * SHAPE.channels))
    assert errors.keys() == {"output", *tensors}
    assert all(errors[name] <= limits[name] for name in errors), (errors, limits)


def test_an_error_in_one_gradient_is_seen():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 1.001 * gradient

    def wrong(offset, **others):
        return deform_conv2d(offset=Wrong.apply(offset), padding=1, **others)

    tensors = inputs(DEFORM_CONV2D)
    errors, limits = DEFORM_CONV2D.errors(wrong, tensors), DEFORM_CONV2D.limits(tensors, 1e-5)
    assert [name for name in errors if errors[name] > limits[name]] == ["offset"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_limits_of_16_bits_are_those_of_a_chain_in_the_type(dtype):
    tensors = inputs(DEFORM_CONV2D, dtype=dtype)
    limits = DEFORM_CONV2D.limits(tensors, 0)
    assert limits == DEFORM_CONV2D.errors(DEFORM_CONV2D.reference, tensors)
    # More than a rounding of every result, and far less than half a pixel.
    once = ROUNDED_ONCE.limits(tensors, 0)
    shifted = DEFORM_CONV2D.errors(lambda offset, **rest: DEFORM_CONV2D.function(offset=offset + 0.5, **rest), tensors)
    for name, limit in limits.items():
        assert once[name] <= limit < shifted[name] / 4, name
    assert set(DEFORM_CONV2D.limits(tensors, 1).values()) == {1}


def test_the_pyramid_is_that_of_800_by_1333():
    assert [(s.name, s.height, s.width) for s in pyramid(1)][:2] == [("P3", 100, 168), ("P4", 50, 84)]
    assert [s.height for s in pyramid(1)] == [100, 50, 25, 13, 7]
    assert [s.width for s in pyramid(1)] == [168, 84, 42, 21, 11]


def test_no_rounding_moves_a_sample_of_a_benchmark_across_a_pixel():
    # Where it did, the gradient of the offset would be another one, and the check of a large map could say nothing.
    offset = DEFORM_CONV2D.make_inputs(Shape("large", 1, 2, 100, 168), torch.float32, "cpu", 0)["offset"]
    assert torch.equal(offset, offset.bfloat16().float()) and torch.equal(offset, offset.half().float())
    assert (offset - offset.round()).abs().min() == 1 / 16
    assert 1.9 < offset.std() < 2.1
