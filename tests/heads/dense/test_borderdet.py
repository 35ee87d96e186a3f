"""BorderDet against the vectors of the authors' code, by hand, and at its edges."""

import numpy as np
import pytest
import torch
from golden_scene import (
    CLASSES,
    EDGES,
    IMAGES,
    SIZES,
    STRIDES,
    check_edges,
    difference,
    float32_loss,
    rows,
    targets_of,
)

from heads.boxes.boxes import clip_boxes
from heads.dense.borderdet import BorderBranch, BorderDetHead, BorderDetOutputs
from heads.dense.towers import ConvTowers

# The authors' names of what the head predicts, and columns of each.
KINDS = {"cls": CLASSES, "reg": 4, "ctr": 1, "border_cls": CLASSES, "border_reg": 4}
LOSSES = {
    "loss_cls": "loss_cls",
    "loss_bbox": "loss_box_reg",
    "loss_centerness": "loss_centerness",
    "loss_border_cls": "loss_border_cls",
    "loss_border_bbox": "loss_border_reg",
}
CASES = ("full", "no_ties")


def head(**changes) -> BorderDetHead:
    return BorderDetHead(**{"in_channels": 32, "num_classes": CLASSES, "strides": STRIDES} | changes)


def loaded(vectors: dict, dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter], BorderDetHead]:
    """Towers and head with the authors' weights, and what became of each of their parameters."""
    towers, model = ConvTowers(32, depth=2, groups=32, bias=True).to(dtype), head().to(dtype)
    layers = {"cls_subnet": towers.classification, "bbox_subnet": towers.regression}
    modules = {
        "cls_score": model.cls_logits,
        "bbox_pred": model.bbox_pred,
        "centerness": model.centerness,
        "border_cls_score": model.border_cls,
        "border_bbox_pred": model.border_reg,
    }
    branches = {"border_cls_subnet": model.cls_branch, "border_bbox_subnet": model.reg_branch}
    places = {}
    for key in (k for k in vectors if k.startswith("param.")):
        first, *rest = key.removeprefix("param.head.").split(".")
        if first in layers:
            place = getattr(layers[first][int(rest[0])], rest[1]), slice(None)
        elif first == "scales":
            place = model.scales[int(rest[0])].scale, None
        elif first in branches and rest[0] == "border_conv":
            place = getattr(branches[first].join, rest[2]), slice(None)
        elif first in branches:
            borders = 4 * branches[first].border_channels
            part = slice(borders) if rest[0] == "ltrb_conv" else slice(borders, None)
            place = getattr(branches[first].split, rest[2]), part
        else:
            place = getattr(modules[first], rest[0]), slice(None)
        places[key.removeprefix("param.")] = place
        with torch.no_grad():
            place[0][place[1]] = torch.from_numpy(vectors[key]).to(dtype)
    return towers, places, model


def outputs_of(vectors: dict, dtype: torch.dtype, grad: bool = False) -> BorderDetOutputs:
    """What the authors' head predicts. Its distances are in pixels; the ReLU leaves them as they are."""
    cls, reg, ctr, border_cls, border_reg = (rows(vectors, f"out.{kind}", v, dtype) for kind, v in KINDS.items())
    strides = torch.tensor(STRIDES).repeat_interleave(torch.tensor([h * w for h, w in SIZES]))[:, None]
    leaves = [t.requires_grad_(grad) for t in (cls, reg / strides, ctr[..., 0], border_cls, border_reg)]
    return BorderDetOutputs(*leaves, torch.from_numpy(vectors["out.pre_boxes"]).to(dtype), SIZES)


@pytest.mark.parametrize("case", CASES)
def test_border_targets_are_the_released_ones(golden, case):
    vectors = golden("borderdet_official")
    labels, positive, deltas = head().border_targets(outputs_of(vectors, torch.float32), targets_of(vectors, case))
    np.testing.assert_array_equal(labels.numpy(), vectors[f"{case}.gt_border_classes"])
    assert len(positive) == 7
    want = vectors[f"{case}.gt_border_deltas"].reshape(-1, 4)[positive.numpy()]
    (tolerance,) = float32_loss(vectors, f"{case}.gt_border_deltas").values()
    assert difference(deltas, want) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_towers_and_head_give_the_released_maps_and_boxes(golden, dtype):
    vectors = golden("borderdet_official")
    towers, _, model = loaded(vectors, dtype)
    features = [torch.from_numpy(vectors[f"feat.{level}"]).to(dtype) for level in range(5)]
    with torch.no_grad():
        outputs = model(*towers(features))
    keys = [f"out.{kind}" for kind in KINDS] + ["out.pre_boxes"]
    allowed = float32_loss(vectors, *keys) if dtype == torch.float32 else dict.fromkeys(keys, 1e-10)
    strides = model.row_strides(model.grid(outputs))
    distances = model.distances(outputs.raw, strides)
    ours = (outputs.logits, distances, outputs.centerness[..., None], outputs.border_logits, outputs.border_deltas)
    for (kind, values), got in zip(KINDS.items(), ours, strict=True):
        want = rows(vectors, f"out.{kind}", values, torch.float64).numpy()
        assert difference(got, want) <= allowed[f"out.{kind}"], kind
    assert difference(outputs.boxes, vectors["out.pre_boxes"]) <= allowed["out.pre_boxes"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_released_ones(golden, case, dtype):
    vectors = golden("borderdet_official")
    allowed = float32_loss(vectors, *(f"{case}.{name}" for name in LOSSES.values()), f"{case}.grad")
    if dtype == torch.float64:
        # The guards of the GIoU are not the same, and some gradients are stored in float32.
        allowed = dict.fromkeys(allowed, 1e-9) | {f"{case}.grad": 1e-8}
    raw = outputs_of(vectors, dtype, grad=True)
    losses = head().loss(raw, targets_of(vectors, case, dtype), IMAGES)
    assert set(losses) == set(LOSSES)
    for ours, theirs in LOSSES.items():
        got = losses[ours].item()
        assert abs(got - vectors[f"{case}.{theirs}"]) <= allowed[f"{case}.{theirs}"] * max(1, abs(got)), ours
    grads = torch.autograd.grad(losses["loss_border_cls"] + losses["loss_border_bbox"], raw[3:5])
    for kind, grad in zip(("border_cls", "border_reg"), grads, strict=True):
        want = rows(vectors, f"{case}.grad.{kind}", KINDS[kind], torch.float64).numpy()
        assert np.abs(want).max() > 0
        assert difference(grad, want) <= allowed[f"{case}.grad"], kind


def test_gradients_of_features_and_parameters_are_the_released_ones(golden):
    """From the five losses back through both stages, BorderAlign and the towers."""
    vectors = golden("borderdet_official")
    towers, places, model = loaded(vectors, torch.float64)
    features = [torch.from_numpy(vectors[f"feat.{level}"]).double().requires_grad_() for level in range(5)]
    losses = model.loss(model(*towers(features)), targets_of(vectors, "full", torch.float64), IMAGES)
    sum(losses.values()).backward()
    got = {f"gradfeat.{level}": f.grad for level, f in enumerate(features)}
    got |= {f"gradparam.{key}": parameter.grad[part] for key, (parameter, part) in places.items()}
    assert len(got) == len(
        [key for key in vectors if key.startswith("full.gradfeat") or key.startswith("full.gradparam")]
    )
    for key, grad in got.items():
        want = vectors[f"full.{key}"]
        # Stored in float32.
        assert difference(grad.reshape(want.shape), want) <= 1e-7 * max(1.0, np.abs(want).max()), key


def test_detections_are_the_released_ones(golden):
    vectors = golden("borderdet_official")
    results = head().predict(outputs_of(vectors, torch.float32), IMAGES)
    (tolerance,) = float32_loss(vectors, "det_default").values()
    for image, got in enumerate(results):
        boxes, scores, labels = (vectors[f"det_default.{image}.{k}"] for k in ("bboxes", "scores", "labels"))
        # The stored ones are not yet clipped.
        boxes = clip_boxes(torch.from_numpy(boxes), IMAGES[image]).numpy()
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
        np.testing.assert_array_equal(got["labels"].numpy(), labels[inside])
        assert difference(got["boxes"], boxes[inside]) <= tolerance
        assert difference(got["scores"], scores[inside]) <= tolerance


def test_the_box_loss_is_divided_by_at_least_one():
    """One box with a single point in it, off its centre; FCOS divides by the centerness alone."""
    model = head(in_channels=8, border_channels=(8, 4), num_classes=1)
    targets = [{"boxes": torch.tensor([[17.0, 10.0, 25.0, 18.0]]), "labels": torch.tensor([0])}]
    zeros = [torch.zeros(1, 8, 64 // s, 64 // s) for s in (8, 16, 32, 64, 64)]
    torch.nn.init.constant_(model.bbox_pred.bias, 0.5)
    outputs = model(zeros, zeros)
    goal = model.targets(model.grid(outputs), targets)
    # The point is (20, 12): 3 and 2 pixels from the nearer sides, 5 and 6 from the others.
    central = torch.tensor([3 / 5 * 2 / 6]).sqrt()
    torch.testing.assert_close(goal.centerness, central)
    got = model.loss(outputs, targets, [(64, 64)])["loss_bbox"]
    model.least_centerness = 1e-6
    torch.testing.assert_close(got, model.loss(outputs, targets, [(64, 64)])["loss_bbox"] * central[0])


def test_one_map_for_both_tasks_gives_what_two_copies_give():
    torch.manual_seed(0)
    model = head(in_channels=8, num_classes=3, border_channels=(8, 4))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    features = [torch.randn(2, 8, -(-96 // s), -(-64 // s)) for s in STRIDES]
    once, twice = model(features, features), model(features, [f.clone() for f in features])
    for a, b in zip(once[:6], twice[:6], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not once.boxes.requires_grad


def test_a_branch_reads_each_border_in_channels_of_its_own():
    """A map that is its row number: the top and bottom of a box from row 1 to row 3 read their own rows."""
    branch = BorderBranch(1, 1)
    for parameter in branch.parameters():
        torch.nn.init.ones_(parameter)
    rows_of_map = torch.arange(5.0).view(1, 1, 5, 1).expand(1, 1, 5, 4)
    boxes = torch.tensor([[0.0, 1.0, 3.0, 3.0]]).expand(1, 20, 4)
    # Before the ReLU: normalised, (row - 2) / std, whose negative half is cut.
    z = (rows_of_map[0, 0] - 2) / (2 + 1e-5) ** 0.5
    top, left, bottom, right = 0.0, z[3, 0], z[3, 0], z[3, 0]
    torch.testing.assert_close(branch(rows_of_map, boxes)[0, 0], top + left + bottom + right + z.clamp(min=0) + 1)


@pytest.mark.parametrize("name", EDGES)
def test_losses_are_finite_at_the_edges(name):
    check_edges(head(in_channels=8, num_classes=3, border_channels=(8, 4)), 8, name)


def test_an_untrained_head_predicts_the_prior():
    model = head(in_channels=8, prior=0.02, border_channels=(8, 4))
    zeros = [torch.zeros(1, 8, 2, 2) for _ in STRIDES]
    outputs = model(zeros, zeros)
    for logits in (outputs.logits, outputs.border_logits):
        torch.testing.assert_close(logits.sigmoid(), torch.full((1, 20, CLASSES), 0.02))
