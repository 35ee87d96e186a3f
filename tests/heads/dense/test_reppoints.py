"""RepPoints against the vectors of mmdetection, by hand, and at its edges."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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

from heads.dense.reppoints import RepPointsHead, RepPointsOutputs, points_to_boxes
from heads.dense.towers import ConvTowers
from kernels import deform_conv2d

EPS = float(np.finfo(np.float32).eps)


def head(**changes) -> RepPointsHead:
    return RepPointsHead(**{"in_channels": 8, "num_classes": CLASSES, "strides": STRIDES} | changes)


def stored(vectors: dict, dtype: torch.dtype = torch.float32, **changes) -> RepPointsHead:
    model = head(**changes).to(dtype)
    with torch.no_grad():
        model.transfer.copy_(torch.from_numpy(vectors["moment_transfer"]))
    return model


def outputs_of(vectors: dict, dtype: torch.dtype, grad: bool = False) -> RepPointsOutputs:
    kinds = {"cls": CLASSES, "init": 18, "refine": 18}
    return RepPointsOutputs(*(rows(vectors, f"raw.{kind}", v, dtype, grad) for kind, v in kinds.items()), SIZES)


def test_boxes_of_points_are_the_released_ones(golden):
    vectors = golden("reppoints_mmdet")
    points = torch.from_numpy(vectors["p2b.pts"]).double().requires_grad_()
    transfer = torch.from_numpy(vectors["moment_transfer"]).double().requires_grad_()
    boxes = points_to_boxes(points, transfer)
    assert difference(boxes, vectors["p2b.moment.yfirst.bbox"]) <= 1e-12
    grads = torch.autograd.grad(boxes, (points, transfer), torch.from_numpy(vectors["p2b.cot"]).double())
    assert difference(grads[0], vectors["p2b.moment.yfirst.grad_pts"]) <= 1e-12
    # The share of the gradient that is learned from belongs to the head here.
    assert difference(grads[1] * 0.01, vectors["p2b.moment.yfirst.grad_transfer"]) <= 1e-12


def test_points_in_one_place_have_a_gradient():
    points = torch.ones(1, 18, requires_grad=True)
    boxes = points_to_boxes(points, torch.zeros(2))
    assert boxes.tolist() == [[1.0, 1.0, 1.0, 1.0]]
    boxes.sum().backward()
    assert points.grad.isfinite().all()


def test_boxes_of_maps_are_the_released_ones(golden):
    vectors = golden("reppoints_mmdet")
    model, raw = stored(vectors, torch.float64), outputs_of(vectors, torch.float64)
    boxes = model.boxes(raw.second, torch.zeros(2).double(), torch.ones(1).double())
    assert difference(boxes, rows(vectors, "points2bbox_refine", 4, torch.float64).numpy()) <= 1e-12


@pytest.mark.parametrize("case", CASES)
def test_targets_are_the_released_ones(golden, case):
    vectors = golden("reppoints_mmdet")
    model, raw, targets = stored(vectors), outputs_of(vectors, torch.float32), targets_of(vectors, case)
    grid = model.grid(raw)
    points = np.concatenate([vectors[f"{case}.points.{level}"] for level in range(5)])
    np.testing.assert_array_equal(torch.cat([grid.centres, model.row_strides(grid)], 1).numpy(), points[:, :3])
    first, second, labels, counted = model.targets(grid, raw, targets, IMAGES)
    valid = vectors[f"{case}.valid_flags"]
    for stage, name in ((first, "init"), (second, "refine")):
        got = np.where(valid, assigned(stage.matched, targets), -2)
        np.testing.assert_array_equal(got, vectors[f"{case}.{name}.assigned_gt_inds"])
        want = vectors[f"{case}.{name}.bbox_gt"].reshape(-1, 4)[stage.positive.numpy()]
        np.testing.assert_array_equal(stage.boxes.numpy(), want)
        assert stage.normaliser == vectors[f"{case}.{name}.avg_factor"]
    weights = vectors[f"{case}.refine.label_weights"] > 0
    np.testing.assert_array_equal(counted.numpy(), weights)
    assert (labels[second.matched < 0] == CLASSES).all()
    np.testing.assert_array_equal(labels.numpy()[weights], vectors[f"{case}.refine.labels"][weights])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_released_ones(golden, case, dtype):
    vectors = golden("reppoints_mmdet")
    names = {"loss_cls": "loss_cls", "loss_first": "loss_pts_init", "loss_second": "loss_pts_refine"}
    allowed = float32_loss(vectors, *names.values(), "grad")
    scale = dict.fromkeys(names, 1.0)
    if dtype == torch.float64:
        allowed = dict.fromkeys(names.values(), 1e-10) | {"grad": 1.3e-7}
        # mmdetection adds an epsilon to what it divides by.
        for name, stage in {"loss_cls": "refine", "loss_first": "init", "loss_second": "refine"}.items():
            factor = vectors[f"{case}.{stage}.avg_factor"]
            scale[name] = factor / (factor + EPS)
    model, raw = stored(vectors, dtype), outputs_of(vectors, dtype, grad=True)
    losses = model.loss(raw, targets_of(vectors, case, dtype), IMAGES)
    assert set(losses) == set(names)
    for ours, theirs in names.items():
        got = losses[ours].item() * scale[ours]
        assert abs(got - vectors[f"{case}.{theirs}"].sum()) <= allowed[theirs] * max(1, abs(got)), ours
    *grads, transfer = torch.autograd.grad(sum(losses.values()), [*raw[:3], model.transfer])
    for kind, values, grad in zip(("cls", "init", "refine"), (CLASSES, 18, 18), grads, strict=True):
        want = rows(vectors, f"{case}.grad.{kind}", values, torch.float64).numpy()
        assert np.abs(want).max() > 0 or (kind != "cls" and case == "all_empty")
        assert difference(grad, want) <= allowed["grad"], kind
    assert difference(transfer, vectors[f"{case}.grad.moment_transfer"]) <= allowed["grad"]


@pytest.mark.parametrize("test_set", ["default", "rescaled"])
def test_detections_are_the_released_ones(golden, test_set):
    vectors = golden("reppoints_mmdet")
    check_detections(vectors, test_set, stored(vectors).predict(outputs_of(vectors, torch.float32), IMAGES))


@pytest.mark.parametrize("shared", [False, True], ids=["two maps", "one map"])
def test_towers_and_head_give_the_released_maps(golden, shared):
    """mmdetection's whole head, whose towers have no GroupNorm in these vectors."""
    vectors = golden("reppoints_mmdet")
    towers = ConvTowers(32, depth=3, norm=False).double()
    model = head(in_channels=32, strides=STRIDES[:2]).double()
    state = {k.removeprefix("head.param."): torch.from_numpy(v).double() for k, v in vectors.items() if "param" in k}
    layers = {"cls_convs": towers.classification, "reg_convs": towers.regression}
    modules = {
        "reppoints_cls_out": model.cls_out,
        "reppoints_pts_init_conv": model.first_conv,
        "reppoints_pts_init_out": model.first_out,
        "reppoints_pts_refine_out": model.second_out,
    }
    weights = {
        "moment_transfer": model.transfer,
        "reppoints_cls_conv.weight": model.cls_weight,
        "reppoints_pts_refine_conv.weight": model.second_weight,
    }
    with torch.no_grad():
        for key, value in state.items():
            first, *rest = key.split(".")
            if key in weights:
                weights[key].copy_(value)
            elif first in layers:
                getattr(layers[first][2 * int(rest[0])], rest[2]).copy_(value)
            else:
                getattr(modules[first], rest[0]).copy_(value)
        features = [torch.from_numpy(vectors[f"head.feat.{level}"]).double() for level in range(2)]
        of_classes, of_points = towers(features)
        if shared:
            # One trunk for both: what two copies of it give.
            outputs, want = model(of_points, of_points), model(of_points, [f.clone() for f in of_points])
            for got, other in zip(outputs[:3], want[:3], strict=True):
                torch.testing.assert_close(got, other, rtol=1e-10, atol=1e-12)
            return
        outputs = model(of_classes, of_points)
    for kind, got in zip(("cls", "init", "refine"), outputs[:3], strict=True):
        maps = [torch.from_numpy(vectors[f"head.train.{kind}.{level}"]) for level in range(2)]
        want = torch.cat([m.flatten(2).mT for m in maps], 1).numpy()
        assert difference(got, want) <= 1e-10, kind
    maps = [torch.from_numpy(vectors[f"head.eval.bbox.{level}"]) for level in range(2)]
    want = torch.cat([m.flatten(2).mT for m in maps], 1).numpy()
    boxes = model.boxes(outputs.second, torch.zeros(2).double(), torch.ones(1).double())
    assert difference(boxes, want) <= 1e-10


def test_a_tenth_of_the_second_stages_gradient_reaches_the_points():
    torch.manual_seed(0)
    model = head(strides=[8], num_classes=2).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = [torch.randn(1, 8, 5, 5).double()]
    logits = model(features, features).logits
    (got,) = torch.autograd.grad(logits.sum(), model.first_out.bias)
    # The same without the shares: the deformable convolution by itself.
    first = model.first_out(model.first_conv(features[0]).relu())
    hidden = deform_conv2d(features[0], first - model.taps, model.cls_weight, padding=1)
    plain = model.cls_out(hidden.relu())
    torch.testing.assert_close(logits[0], plain[0].flatten(1).mT)
    (want,) = torch.autograd.grad(plain.sum(), model.first_out.bias)
    assert want.abs().max() > 0
    torch.testing.assert_close(got, 0.1 * want)


@pytest.mark.parametrize("name", EDGES)
def test_losses_are_finite_at_the_edges(name):
    check_edges(head(num_classes=3), 8, name)


def test_an_untrained_head_predicts_the_prior():
    zeros = [torch.zeros(1, 8, 2, 2) for _ in STRIDES]
    torch.testing.assert_close(head(prior=0.02)(zeros, zeros).logits.sigmoid(), torch.full((1, 20, CLASSES), 0.02))


def test_the_stages_start_by_keeping_the_size_of_a_signal():
    torch.manual_seed(0)
    model, x = head(in_channels=64), torch.randn(1, 64, 24, 24)
    for weight in (model.first_conv.weight, model.cls_weight, model.second_weight):
        assert 0.7 < F.conv2d(x, weight, padding=1).relu().square().mean().sqrt() < 1.4
