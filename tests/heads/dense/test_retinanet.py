"""RetinaNet against the vectors of mmdetection, by hand, and at its edges."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_scene import (
    CASES,
    CLASSES,
    EDGES,
    IMAGES,
    SIZES,
    STRIDES,
    assigned,
    check_detections,
    check_edges,
    difference,
    float32_loss,
    rows,
    targets_of,
)

from heads.boxes.anchors import Grid
from heads.dense.retinanet import RetinaNetHead, RetinaNetOutputs


def head(**changes) -> RetinaNetHead:
    return RetinaNetHead(**{"in_channels": 8, "num_classes": CLASSES, "strides": STRIDES} | changes)


def outputs_of(vectors: dict, dtype: torch.dtype, grad: bool = False) -> RetinaNetOutputs:
    return RetinaNetOutputs(
        rows(vectors, "raw.cls", CLASSES, dtype, grad), rows(vectors, "raw.reg", 4, dtype, grad), SIZES
    )


class StoredAnchors(RetinaNetHead):
    """Has the very anchors of the vectors, so that IoUs that tie there tie here."""

    anchors: torch.Tensor

    def grid(self, outputs: RetinaNetOutputs) -> Grid:
        ours = super().grid(outputs)
        return Grid(ours.sizes, ours.strides, ours.counts, self.anchors, ours.centres, ours.levels)


def stored(vectors: dict, case: str, dtype: torch.dtype = torch.float32) -> StoredAnchors:
    made = StoredAnchors(in_channels=8, num_classes=CLASSES, strides=STRIDES)
    made.anchors = torch.from_numpy(np.concatenate([vectors[f"{case}.anchors.{level}"] for level in range(5)]))
    made.anchors = made.anchors.to(dtype)
    return made


def test_anchors_are_the_released_ones(golden):
    vectors = golden("retinanet_mmdet")
    ours = head().grid(outputs_of(vectors, torch.float32)).anchors
    # Ours are rounded once, mmdetection's in several steps; the largest coordinates are near 1,000.
    assert difference(ours, stored(vectors, "full").anchors.numpy()) <= 1.3e-4


@pytest.mark.parametrize("case", CASES)
def test_targets_are_the_released_ones(golden, case):
    vectors = golden("retinanet_mmdet")
    model, targets = stored(vectors, case), targets_of(vectors, case)
    goal = model.targets(model.grid(outputs_of(vectors, torch.float32)), targets, IMAGES)
    want, valid = vectors[f"{case}.assigned_gt_inds"], vectors[f"{case}.valid_flags"]
    np.testing.assert_array_equal(np.where(valid, assigned(goal.matched, targets), -2), want)
    np.testing.assert_array_equal(goal.counted.numpy(), vectors[f"{case}.label_weights"] > 0)
    counted = goal.counted.numpy()
    np.testing.assert_array_equal(goal.labels.numpy()[counted], vectors[f"{case}.labels"][counted])
    assert (goal.labels[goal.matched < 0] == CLASSES).all()
    want = vectors[f"{case}.bbox_targets"].reshape(-1, 4)[goal.positive.numpy()]
    assert difference(goal.deltas, want) <= float32_loss(vectors, "bbox_targets")["bbox_targets"]
    assert model.normaliser(goal) == vectors[f"{case}.avg_factor"]


@pytest.mark.parametrize("case", CASES)
def test_our_own_anchors_differ_only_where_overlaps_tie(golden, case):
    vectors, targets = golden("retinanet_mmdet"), targets_of(golden("retinanet_mmdet"), case)
    model = head()
    goal = model.targets(model.grid(outputs_of(vectors, torch.float32)), targets, IMAGES)
    clear = vectors[f"{case}.valid_flags"] & ~vectors[f"{case}.ambiguous"]
    want = vectors[f"{case}.assigned_gt_inds"]
    np.testing.assert_array_equal(assigned(goal.matched, targets)[clear], want[clear])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_released_ones(golden, case, dtype):
    vectors = golden("retinanet_mmdet")
    allowed, scale = float32_loss(vectors, "loss_cls", "loss_bbox", "grad"), 1.0
    if dtype == torch.float64:
        allowed = {"loss_cls": 1e-10, "loss_bbox": 1e-10, "grad": 1.3e-7}
        factor = vectors[f"{case}.avg_factor"]
        # mmdetection adds this to every normaliser.
        scale = factor / (factor + np.finfo(np.float32).eps)
    raw = outputs_of(vectors, dtype, grad=True)
    losses = stored(vectors, case, dtype).loss(raw, targets_of(vectors, case, dtype), IMAGES)
    assert set(losses) == {"loss_cls", "loss_bbox"}
    for name, loss in losses.items():
        got = loss.item() * scale
        assert abs(got - vectors[f"{case}.{name}"].sum()) <= allowed[name] * max(1, abs(got)), name
    grads = torch.autograd.grad(sum(losses.values()), raw[:2])
    for kind, values, grad in zip(("cls", "reg"), (CLASSES, 4), grads, strict=True):
        want = rows(vectors, f"{case}.grad.{kind}", values, torch.float64).numpy()
        assert np.abs(want).max() > 0 or (kind == "reg" and case == "all_empty")
        assert difference(grad, want) <= allowed["grad"], kind


@pytest.mark.parametrize("test_set", ["default", "rescaled", "topk60"])
def test_detections_are_the_released_ones(golden, test_set):
    vectors = golden("retinanet_mmdet")
    changes = {"selection": replace(head().selection, per_level=60, most=25)} if test_set == "topk60" else {}
    check_detections(vectors, test_set, head(**changes).predict(outputs_of(vectors, torch.float32), IMAGES))


@pytest.mark.parametrize("convention", ["mmdet", "official"])
@pytest.mark.parametrize("name", EDGES)
def test_losses_are_finite_at_the_edges(name, convention):
    check_edges(head(num_classes=3, convention=convention), 8, name)


def test_each_task_reads_its_own_maps_anchor_by_anchor():
    torch.manual_seed(0)
    model = head(num_classes=3, strides=[8, 16])
    features = [torch.randn(2, 8, 3, 4), torch.randn(2, 8, 2, 2)]
    other = [f + 1 for f in features]
    same, mixed = model(features, features), model(other, features)
    torch.testing.assert_close(mixed.deltas, same.deltas)
    torch.testing.assert_close(mixed.logits, model(other, other).logits)
    # Row 9 · (4 · 1 + 2) + 5: the cell in row 1, column 2 of the first level, its sixth anchor.
    row = 9 * 6 + 5
    torch.testing.assert_close(same.logits[:, row], model.cls_score(features[0])[:, 15:18, 1, 2])
    torch.testing.assert_close(same.deltas[:, row], model.bbox_pred(features[0])[:, 20:24, 1, 2])
    assert same.sizes == ((3, 4), (2, 2)) and same.logits.shape == (2, 9 * 16, 3)


def test_the_official_convention_by_hand():
    """One box that is best for an anchor which overlaps another box more, in one cell of two square anchors."""
    arguments = {"num_classes": 2, "strides": [8], "scales_per_octave": 2, "ratios": [1.0]}
    models = {name: head(convention=name, **arguments) for name in ("mmdet", "official")}
    side = 32 * math.sqrt(2)
    # The anchors are 32 and 45.25 wide around the origin. Both boxes are best for the second one.
    boxes = torch.tensor([[-side / 2, -side / 2, side / 2, side / 2], [-20.0, -21.0, 21.0, 21.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([0, 1])}]
    raw = RetinaNetOutputs(torch.zeros(1, 2, 2), torch.zeros(1, 2, 4), ((1, 1),))
    goals = {name: m.targets(m.grid(raw), targets, [(8, 8)]) for name, m in models.items()}
    assert goals["mmdet"].matched.tolist() == [[1, 1]]
    assert goals["official"].matched.tolist() == [[1, 0]]
    # Two positives each; the official mean moves a tenth of the way from 100, every step.
    assert models["mmdet"].normaliser(goals["mmdet"]) == 2
    torch.testing.assert_close(models["official"].normaliser(goals["official"]), torch.tensor(90.2))
    torch.testing.assert_close(models["official"].normaliser(goals["official"]), torch.tensor(81.38))


def test_the_two_conventions_order_the_anchors_of_a_cell_differently():
    raw = RetinaNetOutputs(torch.zeros(1, 9, 2), torch.zeros(1, 9, 4), ((1, 1),))
    by_ratio, by_size = (head(strides=[8], convention=c).grid(raw).anchors for c in ("mmdet", "official"))
    assert not torch.equal(by_ratio, by_size)
    assert torch.equal(by_ratio[[0, 3, 6, 1, 4, 7, 2, 5, 8]], by_size)


def test_an_untrained_head_predicts_the_prior():
    zeros = [torch.zeros(1, 8, 2, 2) for _ in STRIDES]
    torch.testing.assert_close(head(prior=0.02)(zeros, zeros).logits.sigmoid(), torch.full((1, 180, CLASSES), 0.02))


def test_unknown_convention_lists_the_known_ones():
    with pytest.raises(ValueError, match="mmdet, official"):
        head(convention="torchvision")
