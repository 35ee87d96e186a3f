"""RoIAlign against mmcv's operator, forward and backward, and at its edges."""

import importlib
import itertools

import pytest
import region_plain
import torch
from poisoned import Buffers
from region_vectors import boxes_of, check_vectors

from kernels import roi_align, use_backend
from kernels.backend import resolve_backend
from kernels.regions.roi_align_samples import reference, reference_backward

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SETTINGS = list(itertools.product((True, False), (0, 2), ((7, 7), (3, 5))))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("aligned", "ratio", "size"), SETTINGS)
def test_values_and_gradients_are_mmcvs(golden, aligned, ratio, size, dtype, device):
    check_vectors(golden("pieces_roi_align"), aligned, ratio, size, dtype, device)


def test_chunks_change_nothing(golden, monkeypatch):
    # The package has a function of the same name as its module.
    module = importlib.import_module("kernels.regions.roi_align")
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


@pytest.mark.both_paths
def test_a_ramp_is_read_at_the_bins_centres():
    """Bilinear sampling is exact on a plane, and pixel centres lie at half-integers."""
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij")
    plane = (10 * (y + 0.5) + (x + 0.5))[None, None]
    out = roi_align(plane, [torch.tensor([[16.0, 24.0, 80.0, 56.0]])], (2, 4), 0.125)
    # In cells the box spans x 2…10 and y 3…7.
    want = 10 * torch.tensor([4.0, 6.0])[:, None] + torch.tensor([3.0, 5.0, 7.0, 9.0])
    torch.testing.assert_close(out[0, 0], want)


@pytest.mark.both_paths
def test_no_box_gives_an_empty_result_that_can_be_differentiated():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    out = roi_align(x, [torch.zeros(0, 4)] * 2, (7, 7), 0.25)
    assert out.shape == (0, 3, 7, 7)
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.both_paths
def test_images_do_not_mix():
    x = torch.randn(3, 2, 8, 8)
    box = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    empty = box[:0]
    out = roi_align(x, [empty, box, empty], (3, 3), 0.125)
    torch.testing.assert_close(out, roi_align(x[1:2], [box], (3, 3), 0.125))


@pytest.mark.both_paths
def test_half_precision_is_computed_in_float32():
    x = torch.randn(1, 2, 8, 8).bfloat16()
    box = [torch.tensor([[4.0, 4.0, 40.0, 40.0]])]
    with torch.autocast("cpu", torch.bfloat16):
        out = roi_align(x, box, (3, 3), 0.125)
    assert torch.equal(out, roi_align(x.float(), box, (3, 3), 0.125))


@pytest.mark.both_paths
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


@pytest.mark.both_paths
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


@pytest.mark.both_paths
def test_a_gradient_of_half_precision_has_its_type():
    x = torch.randn(1, 2, 8, 8).half().requires_grad_()
    out = roi_align(x, [torch.tensor([[4.0, 4.0, 40.0, 40.0]])], (2, 2), 0.125)
    assert out.dtype == torch.float32
    assert torch.autograd.grad(out.sum(), x)[0].dtype == torch.float16


@pytest.mark.both_paths
def test_there_is_no_second_derivative():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    out = roi_align(x, [torch.tensor([[4.0, 4.0, 20.0, 20.0]])], (2, 2), 0.125)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^roi_align has no second derivative$"):
        grad.sum().backward()


@pytest.mark.both_paths
def test_opcheck():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=generator)
    boxes = torch.tensor([[0.3, 0.1, 2.1, 3.2], [1.0, 1.0, 2.0, 3.0], [-1.0, 0.0, 4.0, 2.0]])
    settings = (2, True, resolve_backend(x.device))
    torch.library.opcheck(
        torch.ops.dyhead.roi_align.default, (x.requires_grad_(), boxes, None, [1, 2], [2, 3], *settings)
    )
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


def by_rows(boxes: list[torch.Tensor], order: list[int]) -> torch.Tensor:
    """Lists as (K, 5) rows in another order."""
    rows = [torch.cat([torch.full((len(b), 1), float(i), dtype=b.dtype), b], 1) for i, b in enumerate(boxes)]
    return torch.cat(rows)[order]


@pytest.mark.both_paths
def test_rows_are_pooled_in_the_order_given():
    x = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    boxes = [torch.tensor([[3.0, 1, 17, 30], [8, 8, 38, 39]]), torch.tensor([[0.0, 0, 30, 9]])]
    order = [2, 0, 1]
    found, want = roi_align(x, by_rows(boxes, order), 2, 0.125), roi_align(x, boxes, (2, 2), 0.125)[order]
    torch.testing.assert_close(found, want, rtol=0, atol=0)
    cot = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, cot)[0] for y in (found, want)), rtol=1e-14, atol=1e-14)


@pytest.mark.both_paths
def test_a_row_of_no_image_is_0_and_reads_nothing():
    """Nor does it write: around the map lies poison. A fraction is dropped, but not from below 0."""
    number = torch.tensor([torch.nan, -1.0, -0.5, 2.0, 1e30, torch.inf, -torch.inf, 1.75, -0.0])
    buffers = Buffers()
    x = buffers.place(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_())
    rows = buffers.place(torch.cat([number[:, None], torch.tensor([[0.0, 0, 3, 3]]).expand(9, 4)], 1))
    with buffers.guarded():
        out = roi_align(x, rows, 2)
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out).index_fill(0, torch.arange(7), torch.nan))
    assert buffers.intact()
    assert not out[:7].any()
    torch.testing.assert_close(out[7:], roi_align(x, [rows[:1, 1:]] * 2, 2)[[1, 0]])
    assert grad.isfinite().all() and grad.any()


@pytest.mark.both_paths
def test_defaults_are_torchvisions_but_for_aligned():
    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[1.0, 2.0, 6.5, 7.0]])
    want = roi_align(x, [box], (3, 3), 1.0, 0, True)
    for found in (roi_align(x, (box,), 3), roi_align(x, [box.double()], [3, 3], 1, -1), roi_align(x, [box.half()], 3)):
        assert torch.equal(found, want)


@pytest.mark.both_paths
@pytest.mark.parametrize("ratio", [0, 1])
def test_samples_exactly_a_cell_outside_count_and_no_others(ratio):
    """A box of one cell has one sample, where it begins; the map is two cells, of 1 and 3."""
    x = torch.tensor([[1.0, 3.0], [1.0, 3.0]])[None, None]
    wanted = {-1.0: 1, -1.001: 0, 2.0: 3, 2.001: 0, 0.5: 2}
    boxes = torch.tensor([[start, 0.0, start + 1, 1.0] for start in wanted])
    for features, own in ((x, boxes), (x.mT, boxes[:, [1, 0, 3, 2]])):
        out = roi_align(features, [own], 1, 1.0, ratio)
        torch.testing.assert_close(out.flatten(), torch.tensor([float(want) for want in wanted.values()]))


@pytest.mark.both_paths
def test_empty_in_every_way():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    box = torch.tensor([[0.0, 0.0, 3.0, 3.0]])
    cases = {
        "no images": (x[:0], [], (0, 3)),
        "no images, rows": (x[:0], torch.cat([torch.zeros(1, 1), box], 1), (1, 3)),
        "no channels": (x[:, :0], [box, box], (2, 0)),
        "no rows": (x, torch.zeros(0, 5), (0, 3)),
        "no boxes": (x, [box[:0], box[:0]], (0, 3)),
    }
    for name, (features, boxes, shape) in cases.items():
        out = roi_align(features, boxes, 2)
        assert out.shape == (*shape, 2, 2), name
        assert not out.any(), name
        (grad,) = torch.autograd.grad(out.sum(), features)
        assert grad.shape == features.shape and not grad.any(), name


def test_refusals():
    x, box = torch.zeros(2, 3, 4, 4), torch.zeros(1, 4)
    for arguments, kind, message in (
        ((x, [box]), ValueError, "boxes must be 2 tensors, one for each image, got 1"),
        ((x, [box] * 3), ValueError, "boxes must be 2 tensors, one for each image, got 3"),
        ((x, box), ValueError, r"boxes must be \(K, 5\), the number .*, got shape \(1, 4\)"),
        ((x, [box, box.long()]), ValueError, r"boxes\[1\] must be floating point .*, got torch.int64"),
        ((x, [box, box.tolist()]), TypeError, r"boxes\[1\] must be a tensor \(r, 4\), got list"),
        ((x, None), TypeError, "boxes must be a list of tensors"),
        ((x[..., :0], [box, box]), ValueError, "features must be .* with a cell or more"),
        ((x[0], [box]), ValueError, r"features must be \(N, C, H, W\), got shape \(3, 4, 4\)"),
    ):
        with pytest.raises(kind, match=message):
            roi_align(*arguments, 2)
    for scale in (0, -1.0, torch.inf):
        with pytest.raises(ValueError, match="spatial_scale must be finite and greater than 0"):
            roi_align(x, [box, box], 2, scale)


def test_a_call_on_the_meta_device_has_its_shape():
    x = torch.zeros(2, 3, 4, 4, device="meta")
    assert roi_align(x, [torch.zeros(2, 4, device="meta")] * 2, (2, 3)).shape == (4, 3, 2, 3)


def test_the_definition_is_plain_loops():
    """The one that the operator falls back on, forward and backward, and by autograd."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    boxes = 6 * torch.rand(3, 4, generator=generator, dtype=torch.float64) - 1
    cot = torch.randn(3, 2, 2, 3, generator=generator, dtype=torch.float64)
    for ratio, aligned in ((0, True), (0, False), (2, True)):
        out = reference(x, boxes, [1, 1, 1], (2, 3), ratio, aligned)
        (grad,) = torch.autograd.grad(out, x, cot)
        want, wanted = region_plain.roi_align(
            x.detach().numpy(), boxes.numpy(), [1, 1, 1], (2, 3), ratio, aligned, cot.numpy()
        )
        torch.testing.assert_close(out.detach(), torch.from_numpy(want), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, torch.from_numpy(wanted), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(reference_backward(cot, boxes, (5, 4), ratio, aligned), grad[1])


@pytest.mark.both_paths
def test_opcheck_of_rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=generator)
    boxes = torch.tensor([[0.3, 0.1, 2.1, 3.2], [1.0, 1.0, 2.0, 3.0], [-1.0, 0.0, 4.0, 2.0]])
    images = torch.tensor([1, -1, 0], dtype=torch.int32)
    settings = (2, True, resolve_backend(x.device))
    torch.library.opcheck(
        torch.ops.dyhead.roi_align.default, (x.requires_grad_(), boxes, images, [], [2, 3], *settings)
    )
    out, rows, columns = torch.ops.dyhead.roi_align(x.detach(), boxes, images, [], [2, 3], *settings)
    arguments = (out, boxes, images, rows, columns, [], list(x.shape), *settings)
    torch.library.opcheck(torch.ops.dyhead.roi_align_backward.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compile_and_export_of_rows(device):
    class Module(torch.nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, x, rows):
            with torch.autocast(x.device.type, torch.bfloat16):
                return roi_align(x, rows, 2, self.scale)

    x = torch.randn(2, 3, 6, 5, device=device).requires_grad_()
    rows = torch.tensor([[1.0, 0, 0, 20, 20], [0, 8, 8, 30, 39], [7, 0, 0, 9, 9]], device=device)
    for scale in (0.125, 0.25):
        found = torch.compile(Module(scale), fullgraph=True, backend="aot_eager")(x, rows)
        want = Module(scale)(x, rows)
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, want)))
    shapes = ({0: torch.export.Dim("images", max=64)}, {0: torch.export.Dim("count", max=4096)})
    program = torch.export.export(Module(0.125), (x.detach(), rows), dynamic_shapes=shapes)
    other = torch.randn(4, 3, 6, 5, device=device), rows.repeat(2, 1)
    torch.testing.assert_close(program.module()(*other), Module(0.125)(*other))
