"""BorderAlign against mmcv's vectors, against plain loops, and by its gradient."""

import importlib

import numpy as np
import pytest
import region_plain
import torch

from kernels import border_align, use_backend
from kernels.backend import INTERPRET, resolve_backend
from kernels.regions.border_align import reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def poisoned_kernels(request):
    if INTERPRET:
        request.getfixturevalue("poison")


def plain(features, boxes, pool_size):
    """Sample by sample, differentiable by itself."""
    images, channels, height, width = features.shape
    groups = features.view(images, 4, channels // 4, height, width)

    def sample(group, x, y):
        if x < -1 or x > width or y < -1 or y > height:
            return torch.zeros_like(group[:, 0, 0])
        x, y = min(max(x, 0.0), width - 1), min(max(y, 0.0), height - 1)
        x0, y0 = int(x), int(y)
        x1, y1, fx, fy = min(x0 + 1, width - 1), min(y0 + 1, height - 1), x - x0, y - y0
        top = group[:, y0, x0] * (1 - fx) + group[:, y0, x1] * fx
        return top * (1 - fy) + (group[:, y1, x0] * (1 - fx) + group[:, y1, x1] * fx) * fy

    def borders(image, x1, y1, x2, y2):
        steps = [i / pool_size for i in range(pool_size + 1)]
        lines = (
            [(x1 + t * (x2 - x1), y1) for t in steps],
            [(x1, y1 + t * (y2 - y1)) for t in steps],
            [(x2 - t * (x2 - x1), y2) for t in steps],
            [(x2, y2 - t * (y2 - y1)) for t in steps],
        )
        values = [torch.stack([sample(groups[image, b], *p) for p in line]) for b, line in enumerate(lines)]
        return torch.stack([v.max(0).values for v in values], -1)

    rows = [torch.stack([borders(image, *box) for box in boxes[image].tolist()], 1) for image in range(images)]
    return torch.stack(rows)


@pytest.mark.both_paths
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["small", "det"])
def test_values_and_gradients_are_mmcvs(golden, name, dtype, device):
    vectors = golden("pieces_border_align")
    x = torch.from_numpy(vectors[f"{name}.x"]).to(device, dtype).requires_grad_()
    boxes, cot = (torch.from_numpy(vectors[f"{name}.{key}"]).to(device, dtype) for key in ("boxes", "cot"))
    y = border_align(x, boxes, int(vectors[f"{name}.pool_size"]))
    (grad,) = torch.autograd.grad(y, x, cot)
    # Around 9, float32 rounds a position by 5e-7 cells each of four times, and neighbouring cells differ by up to 7.
    allowed = 1e-12 if dtype == torch.float64 else 1.4e-5
    for got, want in ((y, vectors[f"{name}.y"]), (grad, vectors[f"{name}.grad_x"])):
        assert tuple(got.shape) == want.shape
        assert np.abs(got.detach().cpu().double().numpy() - want).max() <= allowed


def random_case(height: int, width: int, count: int = 7):
    generator = torch.Generator().manual_seed(height * 100 + width)
    features = torch.randn(2, 12, height, width, generator=generator, dtype=torch.float64)
    corners = torch.rand(2, count, 4, generator=generator, dtype=torch.float64) * torch.tensor([width, height] * 2)
    # The order of corners is free, and some leave the map, by less and by more than a cell.
    boxes = corners * 1.6 - 0.4 * torch.tensor([width, height] * 2)
    return features, boxes


@pytest.mark.both_paths
@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 6), (4, 1), (1, 1)])
def test_values_and_gradients_equal_plain_loops(height, width):
    features, boxes = random_case(height, width)
    features.requires_grad_()
    got, want = border_align(features, boxes, 5), plain(features, boxes, 5)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    cot = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (grad,), (wanted,) = torch.autograd.grad(got, features, cot), torch.autograd.grad(want, features, cot)
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


def test_gradient_by_differences():
    features, boxes = random_case(4, 5, count=3)
    assert torch.autograd.gradcheck(lambda f: border_align(f, boxes, 3), features.requires_grad_())


def test_parts_give_the_whole(monkeypatch):
    # The package has a function of the same name as its module.
    module = importlib.import_module("kernels.regions.border_align")
    features, boxes = random_case(5, 7)
    whole = border_align(features, boxes)
    monkeypatch.setattr(module, "_SAMPLES", 2 * 12 * 11 * 3)
    assert torch.equal(border_align(features, boxes), whole)


@pytest.mark.both_paths
def test_of_equal_samples_the_first_has_the_gradient():
    features = torch.ones(1, 4, 3, 3, requires_grad=True)
    border_align(features, torch.tensor([[[0.0, 0.0, 2.0, 2.0]]])).sum().backward()
    # The top and left borders begin at the upper left, the bottom and right ones at the lower right.
    assert features.grad[0, :2, 0, 0].tolist() == [1.0, 1.0]
    assert features.grad[0, 2:, 2, 2].tolist() == [1.0, 1.0]
    assert features.grad.sum() == 4


@pytest.mark.both_paths
def test_no_boxes_half_precision_and_wrong_shapes():
    features = torch.randn(2, 8, 3, 3)
    assert border_align(features, torch.zeros(2, 0, 4)).shape == (2, 2, 0, 4)
    boxes = torch.tensor([[[0.3, 0.2, 1.7, 2.0]]]).expand(2, 1, 4)
    half = border_align(features.bfloat16(), boxes)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, border_align(features.bfloat16().float(), boxes).bfloat16())
    for arguments, message in (
        ((features[:, :6], boxes), "4 \\* C"),
        ((features, boxes[:1]), "n, 4"),
        ((features, boxes, 256), "255"),
        ((features, boxes.to("meta")), "device of features, cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            border_align(*arguments)


@pytest.mark.both_paths
@pytest.mark.parametrize("layout", ["channels last", "some channels", "transposed"])
def test_any_strides(layout):
    features, boxes = random_case(4, 5)
    strided = features.contiguous(memory_format=torch.channels_last)
    if layout == "some channels":
        strided = strided.repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last)[:, :12]
    elif layout == "transposed":
        strided = features.transpose(2, 3).contiguous().transpose(2, 3)

    def both(x):
        x = x.detach().requires_grad_()
        out = border_align(x, boxes, 4)
        cot = torch.arange(out.numel(), dtype=out.dtype).view(4, 7, 3, 2).permute(3, 2, 1, 0)
        return out, torch.autograd.grad(out, x, cot)[0]

    with use_backend("torch"):
        want = both(features)
    torch.testing.assert_close(both(strided), want, rtol=1e-12, atol=1e-12)


@pytest.mark.both_paths
def test_what_is_not_a_number_is_the_maximum():
    features = torch.zeros(1, 4, 3, 3)
    features[0, :, 0, 0] = torch.nan
    found = border_align(features, torch.tensor([[[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]]]), 2)
    assert found[0, 0, 0].isnan().tolist() == [True, True, False, False]
    assert not found[0, 0, 1].isnan().any()


@pytest.mark.both_paths
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", range(4))
def test_a_side_that_is_not_finite_spoils_the_three_borders_it_is_a_part_of(side, value):
    """The one opposite has other coordinates alone; other boxes have nothing to do with it."""
    features = torch.rand(1, 8, 4, 5, generator=torch.Generator().manual_seed(0)) + 1
    features.requires_grad_()
    whole = torch.tensor([[[1.0, 1.0, 3.0, 2.0]]]).repeat(1, 2, 1)
    boxes = whole.clone()
    boxes[0, 0, side] = value
    found, want = border_align(features, boxes, 2), border_align(features, whole, 2)
    # x1 has a part in top, left and bottom, y1 in top, left and right, x2 in top, bottom and right, y2 in the rest.
    opposite = {0: 3, 1: 2, 2: 1, 3: 0}[side]
    alone = torch.zeros(1, 2, 2, 4, dtype=torch.bool)
    alone[:, :, 1] = alone[:, :, 0, opposite] = True
    torch.testing.assert_close(found, want.where(alone, 0))
    # A gradient of NaN for what is 0 goes nowhere.
    cot = torch.ones_like(found).where(alone, torch.nan)
    (grad,) = torch.autograd.grad(found, features, cot)
    torch.testing.assert_close(grad, torch.autograd.grad(want, features, alone.float())[0])


@pytest.mark.both_paths
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_in_a_map_reaches_the_borders_that_read_it(value):
    """Also with a share of 0, 0 × ∞ being NaN, and not where a sample is outside."""
    features = torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features[1, :, 2, 3] = value
    # Row 2 as the one behind, but for the right border; then half of column 3; then beyond; then one border alone.
    boxes = [[3.0, 1, 4, 1], [2.5, 2, 2.5, 2], [4.0, 3, 5, 4], [torch.nan, 2, 3, 2]]
    out = border_align(features, torch.tensor([boxes, boxes], dtype=torch.float64), 1)
    spoiled = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    spoiled[1, 0, 0, :3] = spoiled[1, 0, 1] = spoiled[1, 0, 3, 3] = True
    assert torch.equal(~out.isfinite(), spoiled)
    assert out[1, 0, 0, :3].isnan().all()
    assert (out[1, 0, 1] == value).all() if value == value else out[1, 0, 1].isnan().all()


@pytest.mark.both_paths
def test_a_gradient_that_is_not_finite_reaches_the_cells_that_were_read():
    features = torch.rand(1, 4, 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = border_align(features, torch.tensor([[[1.5, 1.5, 1.5, 1.5], [9.0, 9, 9, 9]]]), 1)
    cot = torch.ones_like(out)
    cot[0, 0, 0, 2] = cot[0, 0, 1, 0] = torch.nan
    (grad,) = torch.autograd.grad(out, features, cot)
    spoiled = torch.zeros(1, 4, 4, 5, dtype=torch.bool)
    spoiled[0, 2, 1:3, 1:3] = True
    assert torch.equal(grad.isnan(), spoiled)


@pytest.mark.both_paths
def test_empty_in_every_way():
    features, boxes = torch.randn(2, 8, 3, 4, requires_grad=True), torch.ones(2, 3, 4)
    for x, of_x in ((features[:0], boxes[:0]), (features[:, :0], boxes), (features, boxes[:, :0])):
        out = border_align(x, of_x, 2)
        assert out.shape == (len(x), x.shape[1] // 4, of_x.shape[1], 4)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert grad.shape == x.shape and not grad.any()


def test_the_definition_is_plain_loops():
    features, boxes = random_case(4, 5)
    features.requires_grad_()
    out = reference(features, boxes, 3)
    cot = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(out, features, cot)
    want, wanted = region_plain.border_align(features.detach().numpy(), boxes.numpy(), 3, cot.numpy())
    torch.testing.assert_close(out.detach(), torch.from_numpy(want), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, torch.from_numpy(wanted), rtol=1e-12, atol=1e-12)


@pytest.mark.both_paths
def test_there_is_no_second_derivative():
    features, boxes = random_case(4, 5, count=3)
    out = border_align(features.requires_grad_(), boxes, 3)
    (grad,) = torch.autograd.grad(out.square().sum(), features, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^border_align has no second derivative$"):
        grad.sum().backward()


@pytest.mark.both_paths
def test_opcheck():
    features, boxes = random_case(4, 5, count=3)
    settings = (3, resolve_backend(features.device))
    torch.library.opcheck(torch.ops.dyhead.border_align.default, (features.requires_grad_(), boxes, *settings))
    out, chosen = torch.ops.dyhead.border_align(features.detach(), boxes, *settings)
    arguments = (out, chosen, boxes, list(features.shape), *settings)
    torch.library.opcheck(torch.ops.dyhead.border_align_backward.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compile_and_export(device):
    class Module(torch.nn.Module):
        def forward(self, features, boxes):
            return 2 * border_align(2 * features, boxes, 3)

    features, boxes = (x.to(device) for x in random_case(4, 5, count=3))
    features.requires_grad_()
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    found, want = compiled(features, boxes), Module()(features, boxes)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), features)[0] for y in (found, want)))
    dynamic = ({2: torch.export.Dim("height", min=2, max=64)}, {1: torch.export.Dim("count", min=2, max=4096)})
    program = torch.export.export(Module(), (features.detach(), boxes), dynamic_shapes=dynamic)
    other = tuple(x.to(device) for x in random_case(9, 5, count=8))
    torch.testing.assert_close(program.module()(*other), Module()(*other))


@pytest.mark.gpu
def test_gpu_agrees_with_cpu_and_its_bits_can_be_fixed():
    features, boxes = random_case(9, 11, 40)
    features.requires_grad_()
    on_gpu = features.detach().cuda().requires_grad_()
    want, got = border_align(features, boxes), border_align(on_gpu, boxes.cuda())
    torch.testing.assert_close(got.cpu(), want)
    (grad,) = torch.autograd.grad(want.sum(), features)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), on_gpu, retain_graph=True)[0].cpu(), grad)
    torch.use_deterministic_algorithms(True)
    try:
        once, again = (torch.autograd.grad(got.sum(), on_gpu, retain_graph=True)[0] for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(once, again)
    torch.testing.assert_close(once.cpu(), grad)


@pytest.mark.interpreter
def test_gradcheck():
    features, boxes = random_case(4, 5, count=3)
    assert torch.autograd.gradcheck(lambda f: border_align(f, boxes, 3), features.requires_grad_(), fast_mode=True)


@pytest.mark.interpreter
def test_several_blocks_of_boxes_and_channels():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 4 * 130, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    _, boxes = random_case(4, 5, 11)

    def both(backend):
        with use_backend(backend):
            out = border_align(features, boxes, 3)
        return out, torch.autograd.grad(out.square().sum(), features)[0]

    torch.testing.assert_close(both("triton"), both("torch"), rtol=1e-12, atol=1e-12)


@pytest.mark.interpreter
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
