"""Overlaps and coders against mmdetection's vectors, grids against their definition."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from heads.boxes.anchors import anchor_grid, cell_anchors, point_grid
from heads.boxes.boxes import (
    DeltaCoder,
    box_area,
    clip_boxes,
    decode_distances,
    encode_distances,
    giou,
    iou,
    pairwise_giou,
)

IMAGE = (128, 160)
CODERS = {
    "rpn": DeltaCoder(),
    "rcnn": DeltaCoder(stds=(0.1, 0.1, 0.2, 0.2)),
    "cascade3": DeltaCoder(stds=(0.033, 0.033, 0.067, 0.067)),
}


def double(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).double()


def assert_close(got: torch.Tensor, want: np.ndarray, atol: float = 1e-12):
    torch.testing.assert_close(got.double(), double(want), rtol=1e-12, atol=atol)


def pairwise_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return iou(a[:, None], b)


@pytest.mark.parametrize(("kind", "aligned", "pairwise"), [("iou", iou, pairwise_iou), ("giou", giou, pairwise_giou)])
def test_overlaps(golden, kind, aligned, pairwise):
    vectors = golden("pieces_losses")
    a, b = double(vectors["a"]), double(vectors["b"])
    assert_close(aligned(a, b), vectors[f"overlaps.{kind}.aligned"])
    assert_close(pairwise(a, b), vectors[f"overlaps.{kind}.pair"])
    assert pairwise(a, b[:0]).shape == (len(a), 0)


def test_giou_by_hand():
    a, b = torch.tensor([0.0, 0, 4, 4]), torch.tensor([2.0, 0, 8, 4])
    # 8 shared of 32, in an enclosing box of 32; then apart by one: enclosing 36, of which 4 are empty.
    assert giou(a, b).item() == pytest.approx(0.25)
    apart = giou(a, torch.tensor([5.0, 0, 9, 4]))
    assert apart.item() == pytest.approx(-4 / 36)
    assert giou(a, b, eps=8.0, eps_rule="add").item() == pytest.approx(8 / 40)
    assert box_area(b).item() == 24


@pytest.mark.parametrize("name", CODERS)
def test_delta_coder(golden, name):
    vectors, coder = golden("pieces_coders"), CODERS[name]
    priors, gts = double(vectors["priors"]), double(vectors["gts"])
    deltas = double(vectors["deltas"]).requires_grad_()
    assert_close(coder.encode(gts, priors), vectors[f"delta.{name}.encode"])
    assert_close(coder.decode(coder.encode(gts, priors), priors), vectors["gts"], atol=1e-10)
    boxes = coder.decode(deltas, priors)
    assert_close(boxes, vectors[f"delta.{name}.decode_noshape"])
    clipped = clip_boxes(boxes, IMAGE)
    assert_close(clipped, vectors[f"delta.{name}.decode"])
    (grad,) = torch.autograd.grad(clipped, deltas, double(vectors["cot"]))
    assert_close(grad, vectors[f"delta.{name}.grad"])


def test_delta_coder_with_boxes_by_class(golden):
    vectors = golden("pieces_coders")
    deltas = double(vectors["deltas_multi"]).view(40, 3, 4)
    boxes = CODERS["rcnn"].decode(deltas, double(vectors["priors"])[:, None])
    want = double(vectors["delta.multi.decode"]).view(40, 3, 4)
    torch.testing.assert_close(clip_boxes(boxes, IMAGE), want, rtol=1e-12, atol=1e-12)


def test_delta_coder_with_means():
    coder = DeltaCoder(means=(0.1, -0.2, 0.3, 0.4), stds=(0.5, 0.5, 2.0, 2.0))
    anchor, box = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[5.0, 4, 25, 14]])
    # Centre from (5, 10) to (15, 9), sides from (10, 20) to (20, 10).
    want = [(1 - 0.1) / 0.5, (-0.05 + 0.2) / 0.5, (np.log(2) - 0.3) / 2, (-np.log(2) - 0.4) / 2]
    np.testing.assert_allclose(coder.encode(box, anchor)[0], want, rtol=1e-6)
    torch.testing.assert_close(coder.decode(coder.encode(box, anchor), anchor), box)


def test_the_clamps_of_the_two_releases():
    anchor = torch.tensor([[0.0, 0, 16, 16]])
    deltas = torch.tensor([[0.0, 0, 50, -50]])
    width, height = (DeltaCoder().decode(deltas, anchor)[0, 2:] - DeltaCoder().decode(deltas, anchor)[0, :2]).tolist()
    assert (width, height) == (pytest.approx(1000, rel=1e-5), pytest.approx(0.256, rel=1e-4))
    above = DeltaCoder(clamp="above").decode(deltas, anchor)[0]
    assert (above[2] - above[0]).item() == pytest.approx(1000, rel=1e-5)
    assert (above[3] - above[1]).item() == 0
    with pytest.raises(ValueError, match="mmdetection"):
        DeltaCoder(clamp="below")


def test_distance_coder(golden):
    vectors = golden("pieces_coders")
    points, distances = double(vectors["points"]), double(vectors["dists"]).requires_grad_()
    assert_close(encode_distances(double(vectors["gts"]), points), vectors["dist.encode"])
    boxes = decode_distances(distances, points)
    assert_close(boxes, vectors["dist.noclip.decode"])
    clipped = clip_boxes(boxes, IMAGE)
    assert_close(clipped, vectors["dist.clip.decode"])
    for kind, out in (("noclip", boxes), ("clip", clipped)):
        (grad,) = torch.autograd.grad(out, distances, double(vectors["cot"]), retain_graph=True)
        assert_close(grad, vectors[f"dist.{kind}.grad"])


def test_cell_anchors_of_retinanet_and_their_order():
    sizes, ratios = [4 * 2 ** (i / 3) for i in range(3)], (0.5, 1.0, 2.0)
    by_ratio, by_size = cell_anchors(sizes, ratios), cell_anchors(sizes, ratios, order="size")
    assert len(by_ratio) == 9 and sorted(by_ratio) == sorted(by_size)
    for index, (ratio, size) in enumerate((r, s) for r in ratios for s in sizes):
        x1, y1, x2, y2 = by_ratio[index]
        assert (x1, y1) == (-x2, -y2)
        assert (y2 - y1) / (x2 - x1) == pytest.approx(ratio)
        assert (y2 - y1) * (x2 - x1) == pytest.approx(size**2)
    assert [by_size.index(a) for a in by_ratio] == [0, 3, 6, 1, 4, 7, 2, 5, 8]


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_grid_lists_levels_then_rows_then_columns_then_anchors(offset):
    sizes, strides = ((2, 3), (1, 2)), (8, 16)
    cells = [cell_anchors([s], (0.5, 2.0)) for s in strides]
    grid = anchor_grid(sizes, strides, cells, offset)
    want = [
        (x0 + (x + offset) * stride, y0 + (y + offset) * stride, x1 + (x + offset) * stride, y1 + (y + offset) * stride)
        for (height, width), stride, cell in zip(sizes, strides, cells, strict=True)
        for y in range(height)
        for x in range(width)
        for x0, y0, x1, y1 in cell
    ]
    np.testing.assert_allclose(grid.anchors.numpy(), want, rtol=0, atol=2e-6)
    np.testing.assert_allclose(grid.centres.numpy(), (grid.anchors[:, :2] + grid.anchors[:, 2:]) / 2, atol=1e-6)
    assert grid.counts == (12, 4)
    points = point_grid(sizes, strides, offset).centres
    np.testing.assert_array_equal(points[:4].numpy() / 8 - offset, [[0, 0], [1, 0], [2, 0], [0, 1]])
    assert points.shape == (8, 2) and points[-1].tolist() == [(1 + offset) * 16, offset * 16]


def test_grids_are_made_once():
    cells = [cell_anchors([32])]
    first = anchor_grid([(4, 4)], [8], cells, 0.5)
    assert anchor_grid([torch.Size((4, 4))], (8,), cells, 0.5) is first
    assert anchor_grid([(4, 4)], [8], cells, 0.0) is not first


def test_a_grid_asked_for_among_stand_ins_is_a_real_one_for_the_next_caller():
    cells = [cell_anchors([48])]
    with torch.device("meta"):
        assert anchor_grid([(3, 5)], [8], cells, 0.5).anchors.device.type == "cpu"
    # Fake tensors have no shape that depends on values, so no grid is made of them; then none is remembered either.
    with FakeTensorMode(), suppress(RuntimeError):
        anchor_grid([(5, 3)], [8], cells, 0.5)
    assert type(anchor_grid([(5, 3)], [8], cells, 0.5).anchors) is torch.Tensor
