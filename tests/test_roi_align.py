"""RoIAlign against mmcv's operator, forward and backward, and at its edges."""

import itertools

import numpy as np
import pytest
import torch

from heads import roi_align as module
from heads.roi_align import roi_align

SETTINGS = list(itertools.product((True, False), (0, 2), ((7, 7), (3, 5))))


def boxes_of(rois: np.ndarray, images: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(R, 5) rows image, x1, y1, x2, y2 as boxes by image, and the order that groups them so."""
    rois = torch.from_numpy(rois).to(dtype)
    order = rois[:, 0].argsort(stable=True)
    return [rois[rois[:, 0] == image, 1:] for image in range(images)], order


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("aligned", "ratio", "size"), SETTINGS)
def test_values_and_gradients_are_mmcvs(golden, aligned, ratio, size, dtype):
    vectors = golden("pieces_roi_align")
    key = f"aligned{int(aligned)}.sr{ratio}.{size[0]}x{size[1]}"
    x = torch.from_numpy(vectors["x"]).to(dtype).requires_grad_()
    boxes, order = boxes_of(vectors["rois"], len(x), dtype)
    y = roi_align(x, boxes, size, 0.125, ratio, aligned)
    (grad,) = torch.autograd.grad(y, x, torch.from_numpy(vectors[f"{key}.cot"]).to(dtype)[order])
    # Positions reach 20 cells; ten roundings of a float32 there.
    tolerance = 1e-12 if dtype == torch.float64 else 10 * 20 * 1.2e-7
    assert y.dtype == dtype
    assert np.abs(y.detach().numpy() - vectors[f"{key}.y"][order]).max() <= tolerance
    want = vectors[f"{key}.grad_x"]
    assert np.abs(grad.numpy() - want).max() <= tolerance * max(1, np.abs(want).max())


def test_chunks_change_nothing(golden, monkeypatch):
    vectors = golden("pieces_roi_align")
    x = torch.from_numpy(vectors["x"]).double().requires_grad_()
    boxes, _ = boxes_of(vectors["rois"], len(x), torch.float64)

    def both():
        y = roi_align(x, boxes, (7, 7), 0.125)
        return y, torch.autograd.grad(y.square().sum(), x)[0]

    whole = both()
    monkeypatch.setattr(module, "_CHUNK", 3 * 7 * 5 * 20)
    for a, b in zip(both(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_gradient_by_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    boxes = [torch.tensor([[3.0, 1.0, 17.0, 30.0], [-9.0, -9.0, 60.0, 60.0]]), torch.tensor([[8.0, 8.0, 8.5, 9.0]])]
    assert torch.autograd.gradcheck(lambda x: roi_align(x, boxes, (2, 3), 0.125), x)


def test_a_ramp_is_read_at_the_bins_centres():
    """Bilinear sampling is exact on a plane, and pixel centres lie at half-integers."""
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij")
    plane = (10 * (y + 0.5) + (x + 0.5))[None, None]
    out = roi_align(plane, [torch.tensor([[16.0, 24.0, 80.0, 56.0]])], (2, 4), 0.125)
    # In cells the box spans x 2…10 and y 3…7.
    want = 10 * torch.tensor([4.0, 6.0])[:, None] + torch.tensor([3.0, 5.0, 7.0, 9.0])
    torch.testing.assert_close(out[0, 0], want)


def test_no_box_gives_an_empty_result_that_can_be_differentiated():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    out = roi_align(x, [torch.zeros(0, 4)] * 2, (7, 7), 0.25)
    assert out.shape == (0, 3, 7, 7)
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_images_do_not_mix():
    x = torch.randn(3, 2, 8, 8)
    box = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    empty = box[:0]
    out = roi_align(x, [empty, box, empty], (3, 3), 0.125)
    torch.testing.assert_close(out, roi_align(x[1:2], [box], (3, 3), 0.125))


def test_half_precision_is_computed_in_float32():
    x = torch.randn(1, 2, 8, 8).bfloat16()
    box = [torch.tensor([[4.0, 4.0, 40.0, 40.0]])]
    with torch.autocast("cpu", torch.bfloat16):
        out = roi_align(x, box, (3, 3), 0.125)
    assert torch.equal(out, roi_align(x.float(), box, (3, 3), 0.125))


@pytest.mark.gpu
def test_gpu_agrees_with_cpu_and_with_itself(golden):
    vectors = golden("pieces_roi_align")
    x = torch.from_numpy(vectors["x"])
    boxes, _ = boxes_of(vectors["rois"], len(x), torch.float32)

    def both(device):
        features = x.to(device).requires_grad_()
        out = roi_align(features, [b.to(device) for b in boxes], (7, 7), 0.125)
        return out.detach().cpu(), torch.autograd.grad(out.square().sum(), features)[0].cpu()

    once, again = both("cuda"), both("cuda")
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    for a, b in zip(once, both("cpu"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
