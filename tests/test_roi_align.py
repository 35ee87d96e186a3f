"""RoIAlign against mmcv's operator, forward and backward, and at its edges."""

import importlib
import itertools

import numpy as np
import pytest
import torch

from kernels import roi_align, use_backend
from kernels.backend import resolve_backend

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SETTINGS = list(itertools.product((True, False), (0, 2), ((7, 7), (3, 5))))


def boxes_of(rois: np.ndarray, images: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(R, 5) rows image, x1, y1, x2, y2 as boxes by image, and the order that groups them so."""
    rois = torch.from_numpy(rois).to(dtype)
    order = rois[:, 0].argsort(stable=True)
    return [rois[rois[:, 0] == image, 1:] for image in range(images)], order


def check_vectors(vectors, aligned, ratio, size, dtype, device="cpu"):
    key = f"aligned{int(aligned)}.sr{ratio}.{size[0]}x{size[1]}"
    x = torch.from_numpy(vectors["x"]).to(device, dtype).requires_grad_()
    boxes, order = boxes_of(vectors["rois"], len(x), dtype)
    y = roi_align(x, [b.to(device) for b in boxes], size, 0.125, ratio, aligned)
    (grad,) = torch.autograd.grad(y, x, torch.from_numpy(vectors[f"{key}.cot"])[order].to(device, dtype))
    # Positions reach 20 cells; ten roundings of a float32 there.
    tolerance = 1e-12 if dtype == torch.float64 else 10 * 20 * 1.2e-7
    assert y.dtype == dtype
    assert np.abs(y.detach().cpu().numpy() - vectors[f"{key}.y"][order]).max() <= tolerance
    want = vectors[f"{key}.grad_x"]
    assert np.abs(grad.cpu().numpy() - want).max() <= tolerance * max(1, np.abs(want).max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("aligned", "ratio", "size"), SETTINGS)
def test_values_and_gradients_are_mmcvs(golden, aligned, ratio, size, dtype, device):
    check_vectors(golden("pieces_roi_align"), aligned, ratio, size, dtype, device)


def test_chunks_change_nothing(golden, monkeypatch):
    # The package has a function of the same name as its module.
    module = importlib.import_module("kernels.roi_align")
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


def test_boxes_thinner_than_a_pixel_outside_and_not_finite():
    """A plane is sampled exactly, so a bin is its value at the mean of its samples. Boxes do not harm one another."""
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    boxes = torch.tensor(
        [
            [16.0, 16.0, 16.2, 40.0],
            [24.0, 8.0, 24.0, 40.0],
            [900.0, 900.0, 950.0, 950.0],
            [torch.nan, 8.0, 24.0, 40.0],
            [8.0, 8.0, torch.inf, 40.0],
        ]
    )
    out = roi_align((10 * y + x)[None, None], [boxes], (2, 2), 0.125)
    thin = 10 * torch.tensor([[2.25], [3.75]]) + torch.tensor([2.00625, 2.01875]) - 0.5
    torch.testing.assert_close(out[0, 0], thin)
    assert not out[1:3].any()


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "some channels", "transposed", "one image for all"])
def test_any_strides(layout):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 6, 5, generator=generator, dtype=torch.float64)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "some channels":
        x = x.repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last)[:, 1:4]
    elif layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "one image for all":
        x = x[:1].expand(2, -1, -1, -1)
    boxes = [torch.tensor([[3.0, 1.0, 17.0, 30.0]]), torch.tensor([[8.0, 8.0, 38.0, 39.0]])]
    cot = torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64)

    def both(x):
        x = x.detach().requires_grad_()
        out = roi_align(x, boxes, (2, 2), 0.125)
        return out, torch.autograd.grad(out, x, cot.transpose(0, 1).contiguous().transpose(0, 1))[0]

    with use_backend("torch"):
        want = both(x.contiguous())
    torch.testing.assert_close(both(x), want, rtol=1e-13, atol=1e-13)


def test_a_gradient_of_half_precision_has_its_type():
    x = torch.randn(1, 2, 8, 8).half().requires_grad_()
    out = roi_align(x, [torch.tensor([[4.0, 4.0, 40.0, 40.0]])], (2, 2), 0.125)
    assert out.dtype == torch.float32
    assert torch.autograd.grad(out.sum(), x)[0].dtype == torch.float16


def test_there_is_no_second_derivative():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    out = roi_align(x, [torch.tensor([[4.0, 4.0, 20.0, 20.0]])], (2, 2), 0.125)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_opcheck():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=generator)
    boxes = torch.tensor([[0.3, 0.1, 2.1, 3.2], [1.0, 1.0, 2.0, 3.0], [-1.0, 0.0, 4.0, 2.0]])
    settings = (2, True, resolve_backend(x.device))
    torch.library.opcheck(torch.ops.dyhead.roi_align.default, (x.requires_grad_(), boxes, None, [1, 2], [2, 3], *settings))
    out, rows, columns = torch.ops.dyhead.roi_align(x.detach(), boxes, None, [1, 2], [2, 3], *settings)
    arguments = (out, boxes, None, rows, columns, [1, 2], list(x.shape), *settings)
    torch.library.opcheck(torch.ops.dyhead.roi_align_backward.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compile_and_export(device):
    class Module(torch.nn.Module):
        def forward(self, x, first, second):
            return 2 * roi_align(2 * x, [first, second], (2, 3), 0.125)

    x = torch.randn(2, 3, 6, 5, device=device).requires_grad_()
    boxes = [torch.rand(n, 4, device=device) * 20 + torch.tensor([0, 0, 20, 20], device=device) for n in (3, 4)]
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    found, want = compiled(x, *boxes), Module()(x, *boxes)
    torch.testing.assert_close(found, want)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, want)]
    torch.testing.assert_close(*grads)
    count = torch.export.Dim("count", min=2, max=4096)
    shapes = ({2: torch.export.Dim("height", min=2, max=64)}, None, {0: count})
    program = torch.export.export(Module(), (x.detach(), *boxes), dynamic_shapes=shapes)
    other = (torch.randn(2, 3, 9, 5, device=device), boxes[0], boxes[1].repeat(2, 1))
    torch.testing.assert_close(program.module()(*other), Module()(*other))


@pytest.mark.gpu
def test_deterministic_algorithms_give_the_same_bits(golden):
    vectors = golden("pieces_roi_align")
    x = torch.from_numpy(vectors["x"]).cuda().requires_grad_()
    boxes = [b.cuda() for b in boxes_of(vectors["rois"], len(x), torch.float32)[0]]
    torch.use_deterministic_algorithms(True)
    try:
        once, again = (torch.autograd.grad(roi_align(x, boxes, (7, 7), 0.125).square().sum(), x)[0] for _ in range(2))
        check_vectors(vectors, True, 0, (7, 7), torch.float32, "cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(once, again)


@pytest.mark.gpu
def test_the_pytorch_path_runs_on_a_gpu_too(golden):
    with use_backend("torch"):
        check_vectors(golden("pieces_roi_align"), True, 0, (7, 7), torch.float64, "cuda")


def test_boxes_on_another_device_are_refused():
    with pytest.raises(ValueError, match="device of features, cpu"):
        roi_align(torch.zeros(1, 1, 2, 2), [torch.zeros(1, 4, device="meta")], (1, 1), 1.0)
