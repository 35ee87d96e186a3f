"""RoIAlign's Triton kernels, interpreted: the tests of its PyTorch path, and blocks of channels that are not full."""

# Imported tests run here as well, under the interpreter.
# ruff: noqa: F401

import pytest
import test_roi_align_far as far_cases
import torch
from test_roi_align import (
    check_vectors,
    test_a_gradient_of_half_precision_has_its_type,
    test_a_ramp_is_read_at_the_bins_centres,
    test_a_row_of_no_image_is_0_and_reads_nothing,
    test_any_strides,
    test_boxes_thinner_than_a_pixel_outside_and_not_finite,
    test_defaults_are_torchvisions_but_for_aligned,
    test_empty_in_every_way,
    test_half_precision_is_computed_in_float32,
    test_images_do_not_mix,
    test_no_box_gives_an_empty_result_that_can_be_differentiated,
    test_opcheck,
    test_opcheck_of_rows,
    test_rows_are_pooled_in_the_order_given,
    test_samples_exactly_a_cell_outside_count_and_no_others,
    test_there_is_no_second_derivative,
)
from test_roi_align_far import (
    test_a_box_of_1e9_pixels_is_its_share_of_the_map,
    test_a_gradient_that_is_not_finite_reaches_the_cells_that_were_read,
    test_what_is_not_finite_in_a_map_reaches_the_bins_that_read_it,
)

from kernels import roi_align, use_backend


@pytest.fixture(autouse=True)
def triton_backend():
    with use_backend("triton"):
        yield


@pytest.mark.parametrize(
    ("aligned", "ratio", "dtype"), [(True, 0, torch.float64), (False, 2, torch.float64), (False, 0, torch.float32)]
)
def test_values_and_gradients_are_mmcvs(golden, aligned, ratio, dtype, poison):
    check_vectors(golden("pieces_roi_align"), aligned, ratio, (3, 5), dtype)


def test_gradcheck():
    x = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    boxes = [torch.tensor([[3.0, 1.0, 17.0, 30.0]]), torch.tensor([[-9.0, -9.0, 60.0, 60.0]])]
    assert torch.autograd.gradcheck(lambda x: roi_align(x, boxes, (2, 3), 0.125), x, fast_mode=True)


def test_several_blocks_of_channels(poison):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 150, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    boxes = [torch.tensor([[1.0, 2.0, 22.0, 31.0], [0.0, 0.0, 9.0, 9.0]])]

    def both(backend):
        with use_backend(backend):
            out = roi_align(x, boxes, (2, 7), 0.125)
        return out, torch.autograd.grad(out.square().sum(), x)[0]

    torch.testing.assert_close(both("triton"), both("torch"), rtol=1e-12, atol=1e-12)


def test_deterministic_algorithms_take_the_backward_in_pytorch():
    x = torch.randn(1, 3, 6, 6, requires_grad=True)
    boxes = [torch.tensor([[1.0, 2.0, 42.0, 31.0]])]
    with use_backend("torch"):
        (want,) = torch.autograd.grad(roi_align(x, boxes, (2, 2), 0.125).sum(), x)
    torch.use_deterministic_algorithms(True)
    try:
        (found,) = torch.autograd.grad(roi_align(x, boxes, (2, 2), 0.125).sum(), x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found, want)


@pytest.mark.parametrize(
    ("value", "side", "ratio", "aligned"),
    [
        (torch.nan, 0, 0, False),
        (torch.nan, 3, 3, True),
        (torch.inf, 2, 0, True),
        (-torch.inf, 1, 3, False),
        (3e38, 0, 0, False),
    ],
)
def test_a_box_that_is_not_finite_is_0_and_harms_no_other(value, side, ratio, aligned):
    far_cases.test_a_box_that_is_not_finite_is_0_and_harms_no_other(value, side, ratio, aligned)


def test_boxes_with_more_samples_than_an_integer_holds_are_finite():
    far_cases.test_boxes_of_any_size_are_finite(1.5e6, torch.float32)
