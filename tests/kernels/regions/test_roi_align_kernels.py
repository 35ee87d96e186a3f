"""RoIAlign's Triton kernels, interpreted: its vectors, and blocks of channels that are not full."""

import pytest
import torch
from region_vectors import check_vectors

from kernels import roi_align, use_backend


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("aligned", "ratio", "dtype"), [(True, 0, torch.float64), (False, 2, torch.float64), (False, 0, torch.float32)]
)
def test_values_and_gradients_are_mmcvs(golden, aligned, ratio, dtype, poison):
    check_vectors(golden("pieces_roi_align"), aligned, ratio, (3, 5), dtype)


@pytest.mark.interpreter
def test_gradcheck():
    x = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    boxes = [torch.tensor([[3.0, 1.0, 17.0, 30.0]]), torch.tensor([[-9.0, -9.0, 60.0, 60.0]])]
    assert torch.autograd.gradcheck(lambda x: roi_align(x, boxes, (2, 3), 0.125), x, fast_mode=True)


@pytest.mark.interpreter
def test_several_blocks_of_channels(poison):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 150, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    boxes = [torch.tensor([[1.0, 2.0, 22.0, 31.0], [0.0, 0.0, 9.0, 9.0]])]

    def both(backend):
        with use_backend(backend):
            out = roi_align(x, boxes, (2, 7), 0.125)
        return out, torch.autograd.grad(out.square().sum(), x)[0]

    torch.testing.assert_close(both("triton"), both("torch"), rtol=1e-12, atol=1e-12)


@pytest.mark.interpreter
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
