"""FCOS against the vectors of mmdetection and of BorderDet (whose first stage is the improved FCOS), and by hand."""

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
    check_detections,
    check_edges,
    difference,
    float32_loss,
    rows,
    targets_of,
)

from heads.dense.fcos import FCOSHead, FCOSOutputs
from heads.dense.towers import ConvTowers

EPS = np.finfo(np.float32).eps


def head(**changes) -> FCOSHead:
    return FCOSHead(**{"in_channels": 8, "num_classes": CLASSES, "strides": STRIDES} | changes)


def outputs_of(vectors: dict, dtype: torch.dtype, grad: bool = False, kind: str = "raw") -> FCOSOutputs:
    maps = [rows(vectors, f"{kind}.{name}", v, dtype, grad) for name, v in (("cls", CLASSES), ("reg", 4), ("ctr", 1))]
    return FCOSOutputs(maps[0], maps[1], maps[2][..., 0], SIZES)


def row_strides(dtype: torch.dtype) -> torch.Tensor:
    counts = torch.tensor([h * w for h, w in SIZES])
    return torch.tensor(STRIDES).repeat_interleave(counts)[:, None].to(dtype)


def of_borderdet(vectors: dict, dtype: torch.dtype, grad: bool = False) -> tuple[FCOSHead, FCOSOutputs]:
    """Its first stage: the distances there are in pixels already, which the ReLU leaves as they are."""
    outputs = outputs_of(vectors, dtype, kind="out")
    raw = outputs.raw / row_strides(dtype)
    outputs = FCOSOutputs(outputs.logits, raw, outputs.centerness, SIZES)
    if grad:
        outputs = FCOSOutputs(*(t.detach().requires_grad_() for t in outputs[:3]), SIZES)
    return head(least_centerness=1.0), outputs


def check_targets(vectors: dict, case: str, goal, labels: str, distances: str, centerness: str, tolerance: float):
    np.testing.assert_array_equal(goal.labels.numpy(), vectors[f"{case}.{labels}"])
    at = goal.positive.numpy()
    want = vectors[f"{case}.{distances}"].reshape(-1, 4)[at]
    np.testing.assert_array_equal(goal.distances.numpy(), want)
    assert difference(goal.centerness, vectors[f"{case}.{centerness}"].reshape(-1)[at]) <= tolerance


@pytest.mark.parametrize("case", CASES)
def test_plain_targets_are_the_released_ones(golden, case):
    vectors, model = golden("fcos_mmdet_plain"), head(recipe="plain")
    grid = model.grid(outputs_of(vectors, torch.float32))
    points = np.concatenate([vectors[f"{case}.points.{level}"] for level in range(5)])
    np.testing.assert_array_equal(grid.centres.numpy(), points)
    goal = model.targets(grid, targets_of(vectors, case))
    (tolerance,) = float32_loss(vectors, "centerness_targets").values()
    check_targets(vectors, case, goal, "labels", "bbox_targets", "centerness_targets", tolerance)


@pytest.mark.parametrize("case", ["full", "no_ties"])
def test_improved_targets_are_borderdets(golden, case):
    vectors = golden("borderdet_official")
    model, raw = of_borderdet(vectors, torch.float32)
    goal = model.targets(model.grid(raw), targets_of(vectors, case))
    (tolerance,) = float32_loss(vectors, f"{case}.gt_centerness").values()
    check_targets(vectors, case, goal, "gt_classes", "gt_shifts_deltas", "gt_centerness", tolerance)
    # Centre sampling has something to leave out.
    plain = head(recipe="plain")
    assert len(plain.targets(model.grid(raw), targets_of(vectors, case)).positive) > 2 * len(goal.positive)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_plain_losses_and_gradients_are_the_released_ones(golden, case, dtype):
    vectors = golden("fcos_mmdet_plain")
    names = ("loss_cls", "loss_bbox", "loss_centerness")
    allowed, model = float32_loss(vectors, *names, "grad"), head(recipe="plain")
    raw = outputs_of(vectors, dtype, grad=True)
    losses = model.loss(raw, targets_of(vectors, case, dtype), IMAGES)
    scale = dict.fromkeys(names, 1.0)
    if dtype == torch.float64:
        # mmdetection adds an epsilon to what it divides by, in float32, and sums the centerness in float32.
        allowed = {"loss_cls": 1e-10, "loss_bbox": 6e-8, "loss_centerness": 1e-10, "grad": 1.3e-7}
        positives = max((vectors[f"{case}.labels"] < CLASSES).sum(), 1)
        scale |= dict.fromkeys(("loss_cls", "loss_centerness"), positives / float(np.float32(positives) + EPS))
    assert set(losses) == set(names)
    for name, loss in losses.items():
        got = loss.item() * scale[name]
        assert abs(got - vectors[f"{case}.{name}"]) <= allowed[name] * max(1, abs(got)), name
    grads = torch.autograd.grad(sum(losses.values()), raw[:3])
    for kind, values, grad in zip(("cls", "reg", "ctr"), (CLASSES, 4, 1), grads, strict=True):
        want = rows(vectors, f"{case}.grad.{kind}", values, torch.float64).numpy()
        assert np.abs(want).max() > 0 or (kind != "cls" and case == "all_empty")
        assert difference(grad.reshape(want.shape), want) <= allowed["grad"], kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", ["full", "no_ties"])
def test_improved_losses_and_gradients_are_borderdets(golden, case, dtype):
    vectors = golden("borderdet_official")
    model, raw = of_borderdet(vectors, dtype, grad=True)
    names = {"loss_cls": "loss_cls", "loss_bbox": "loss_box_reg", "loss_centerness": "loss_centerness"}
    allowed = float32_loss(vectors, *(f"{case}.{name}" for name in names.values()), f"{case}.grad")
    if dtype == torch.float64:
        # The guards of the GIoU are not the same, and some gradients are stored in float32.
        allowed = dict.fromkeys(allowed, 1e-9) | {f"{case}.grad": 1e-8}
    losses = model.loss(raw, targets_of(vectors, case, dtype), IMAGES)
    for ours, theirs in names.items():
        got = losses[ours].item()
        assert abs(got - vectors[f"{case}.{theirs}"]) <= allowed[f"{case}.{theirs}"] * max(1, abs(got)), ours
    grads = torch.autograd.grad(sum(losses.values()), raw[:3])
    for kind, values, grad in zip(("cls", "reg", "ctr"), (CLASSES, 4, 1), grads, strict=True):
        want = rows(vectors, f"{case}.grad.{kind}", values, torch.float64).numpy()
        got = grad.reshape(want.shape)
        if kind == "reg":
            # Where a distance is 0 the gradient before the ReLU is 0 too.
            got, want = got / row_strides(dtype), np.where(raw.raw.detach() > 0, want, 0)
        assert np.abs(want).max() > 0
        assert difference(got, want) <= allowed[f"{case}.grad"], kind


@pytest.mark.parametrize("test_set", ["default", "rescaled", "topk60"])
def test_detections_are_the_released_ones(golden, test_set):
    vectors = golden("fcos_mmdet_plain")
    changes = (
        {"selection": replace(head(recipe="plain").selection, per_level=60, most=25)} if test_set == "topk60" else {}
    )
    model = head(recipe="plain", **changes)
    check_detections(vectors, test_set, model.predict(outputs_of(vectors, torch.float32), IMAGES))


def test_towers_and_head_give_the_released_maps(golden):
    """mmdetection's whole head on three levels, whose convolutions precede a GroupNorm of 32 groups."""
    vectors = golden("fcos_mmdet_plain")
    towers = ConvTowers(32, groups=32).double()
    model = head(in_channels=32, recipe="plain", strides=STRIDES[2:], ranges=[(0, 64)] * 3).double()
    state = {k.removeprefix("head.param."): torch.from_numpy(v).double() for k, v in vectors.items() if "param" in k}
    layers = {"cls_convs": towers.classification, "reg_convs": towers.regression}
    with torch.no_grad():
        for key, value in state.items():
            first, *rest = key.split(".")
            if first in layers:
                # Convolution, norm, ReLU; four times.
                layer = layers[first][3 * int(rest[0]) + (rest[1] == "gn")]
                getattr(layer, rest[2]).copy_(value)
            elif first == "scales":
                model.scales[int(rest[0]) - 2].scale.copy_(value)
            else:
                ours = {"conv_cls": "cls_logits", "conv_reg": "bbox_pred", "conv_centerness": "centerness"}[first]
                getattr(getattr(model, ours), rest[0]).copy_(value)
        features = [torch.from_numpy(vectors[f"head.feat.{level}"]).double() for level in (2, 3, 4)]
        outputs = model(*towers(features))
    for kind, got in zip(("cls", "reg", "ctr"), outputs[:3], strict=True):
        maps = [torch.from_numpy(vectors[f"head.train.{kind}.{level}"]) for level in (2, 3, 4)]
        want = torch.cat([m.flatten(2).mT for m in maps], 1).numpy()
        got = model.distances(got, torch.ones(1)) if kind == "reg" else got
        assert difference(got.reshape(want.shape), want) <= 1e-10, kind


def test_improved_centerness_is_read_from_the_boxes_maps():
    torch.manual_seed(0)
    features = [torch.randn(2, 8, 3, 4), torch.randn(2, 8, 2, 2)]
    other = [f + 1 for f in features]
    for recipe, same_as in (("improved", "boxes"), ("plain", "classes")):
        model = head(num_classes=3, strides=[8, 16], ranges=[(0, 64)] * 2, recipe=recipe)
        same, mixed = model(features, features), model(other, features)
        torch.testing.assert_close(mixed.raw, same.raw)
        torch.testing.assert_close(mixed.logits, model(other, other).logits)
        want = same if same_as == "boxes" else model(other, other)
        torch.testing.assert_close(mixed.centerness, want.centerness)
        assert not torch.allclose(mixed.logits, same.logits)


def test_one_detection_by_hand():
    """A single level of 4 × 4 cells, silent but for the cell in row 1, column 2, whose point is (20, 12)."""
    logits = torch.full((1, 16, 1), -20.0)
    logits[0, 6] = 0.0
    raw = FCOSOutputs(logits, torch.tensor([1.0, 2.0, -1.0, 0.5]).expand(1, 16, 4), torch.zeros(1, 16), ((4, 4),))
    result = head(num_classes=1, strides=[8], ranges=[(0, 64)]).predict(raw, [(32, 32)])[0]
    # One stride to the left, two up, none to the right, half a stride down; clipped at the top.
    assert result["boxes"].shape == (1, 4)
    torch.testing.assert_close(result["boxes"], torch.tensor([[12.0, 0.0, 20.0, 16.0]]))
    torch.testing.assert_close(result["scores"], torch.tensor([0.25]))
    result = head(num_classes=1, strides=[8], ranges=[(0, 64)], recipe="plain").predict(raw, [(32, 32)])[0]
    e = math.e
    want = torch.tensor([[20 - e, 12 - e**2, 20 + 1 / e, 12 + e**0.5]])
    torch.testing.assert_close(result["boxes"], want)


@pytest.mark.parametrize("recipe", ["improved", "plain"])
@pytest.mark.parametrize("name", EDGES)
def test_losses_are_finite_at_the_edges(name, recipe):
    check_edges(head(num_classes=3, recipe=recipe), 8, name)


def test_an_untrained_head_predicts_the_prior():
    zeros = [torch.zeros(1, 8, 2, 2) for _ in STRIDES]
    torch.testing.assert_close(head(prior=0.02)(zeros, zeros).logits.sigmoid(), torch.full((1, 20, CLASSES), 0.02))


def test_unknown_recipe_and_missing_ranges():
    with pytest.raises(ValueError, match="improved, plain"):
        head(recipe="best")
    with pytest.raises(ValueError, match="2 strides"):
        head(strides=[8, 16])
