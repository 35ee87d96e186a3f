"""BorderAlign's Triton kernels, interpreted: the tests of its PyTorch path, and blocks that are not full."""

# Imported tests run here as well, under the interpreter.
# ruff: noqa: F401

import pytest
import torch
from test_border_align import (
    random_case,
    test_a_gradient_that_is_not_finite_reaches_the_cells_that_were_read,
    test_a_side_that_is_not_finite_spoils_the_three_borders_it_is_a_part_of,
    test_any_strides,
    test_empty_in_every_way,
    test_no_boxes_half_precision_and_wrong_shapes,
    test_of_equal_samples_the_first_has_the_gradient,
    test_opcheck,
    test_there_is_no_second_derivative,
    test_values_and_gradients_are_mmcvs,
    test_values_and_gradients_equal_plain_loops,
    test_what_is_not_a_number_is_the_maximum,
    test_what_is_not_finite_in_a_map_reaches_the_borders_that_read_it,
)

from kernels import border_align, use_backend


@pytest.fixture(autouse=True)
def triton_backend(poison):
    with use_backend("triton"):
        yield


def test_gradcheck():
    features, boxes = random_case(4, 5, count=3)
    assert torch.autograd.gradcheck(lambda f: border_align(f, boxes, 3), features.requires_grad_(), fast_mode=True)


def test_several_blocks_of_boxes_and_channels():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 4 * 130, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    _, boxes = random_case(4, 5, 11)

    def both(backend):
        with use_backend(backend):
            out = border_align(features, boxes, 3)
        return out, torch.autograd.grad(out.square().sum(), features)[0]

    torch.testing.assert_close(both("triton"), both("torch"), rtol=1e-12, atol=1e-12)


def test_deterministic_algorithms_take_the_backward_in_pytorch():
    features, boxes = random_case(4, 5)
    features.requires_grad_()
    with use_backend("torch"):
        (want,) = torch.autograd.grad(border_align(features, boxes, 4).sum(), features)
    torch.use_deterministic_algorithms(True)
    try:
        (found,) = torch.autograd.grad(border_align(features, boxes, 4).sum(), features)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found, want)
