"""ATSS against the vectors of mmdetection and of the official code, by hand, and at its edges."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_scene import difference, float32_loss

from heads.boxes.boxes import clip_boxes
from heads.boxes.rows import flatten_levels
from heads.dense.atss import ATSSHead, ATSSOutputs

STRIDES = (8, 16, 32, 64, 128)
SIZES = ((16, 20), (8, 10), (4, 5), (2, 3), (1, 2))
IMAGES = [(128, 160), (88, 120)]
CLASSES = 20

# The released heads: file of vectors and the arguments that make ours the same.
RELEASED = {
    "atss_mmdet_dyheadcfg": {"convention": "mmdet", "kernel_size": 1, "anchor_offset": 0.5},
    "atss_mmdet_plain": {"convention": "mmdet", "kernel_size": 3, "anchor_offset": 0.0},
    "atss_official": {"convention": "official", "kernel_size": 1, "anchor_offset": 0.5},
}
# The official code raises an error for an image without boxes, so it has no vectors of the empty cases.
CASES = [
    (name, case)
    for name in RELEASED
    for case in ("full", "one_empty", "all_empty", "no_ties")
    if name != "atss_official" or "empty" not in case
]


def released_head(name: str, **changes) -> ATSSHead:
    return ATSSHead(in_channels=32, num_classes=CLASSES, strides=STRIDES, **RELEASED[name] | changes)


def outputs_of(vectors: dict, dtype: torch.dtype, grad: bool = False) -> ATSSOutputs:
    def rows(kind: str, values: int) -> torch.Tensor:
        maps = [torch.from_numpy(vectors[f"raw.{kind}.{level}"]).to(dtype) for level in range(5)]
        return flatten_levels(maps, values).requires_grad_(grad)

    return ATSSOutputs(rows("cls", CLASSES), rows("reg", 4), rows("ctr", 1)[..., 0], SIZES)


def targets_of(vectors: dict, case: str, dtype: torch.dtype = torch.float32) -> list[dict]:
    return [
        {
            "boxes": torch.from_numpy(vectors[f"{case}.gt_bboxes.{image}"]).to(dtype).reshape(-1, 4),
            "labels": torch.from_numpy(vectors[f"{case}.gt_labels.{image}"]),
        }
        for image in range(2)
    ]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_anchors_and_targets_are_the_released_ones(golden, name, case):
    vectors = golden(name)
    head, targets = released_head(name), targets_of(vectors, case)
    grid = head.grid(outputs_of(vectors, torch.float32))
    want = np.concatenate([vectors[f"{case}.anchors.{level}"] for level in range(5)])
    np.testing.assert_array_equal(grid.anchors.numpy(), want)

    goal = head.targets(grid, targets, IMAGES)
    if name == "atss_official":
        np.testing.assert_array_equal((goal.labels.numpy() + 1) % (CLASSES + 1), vectors[f"{case}.labels_official"])
        assert goal.valid is None
    else:
        first = torch.tensor([0, len(targets[0]["boxes"])])[:, None]
        index = torch.where(goal.matched >= 0, goal.matched - first + 1, 0)
        want = vectors[f"{case}.assigned_gt_inds"]
        np.testing.assert_array_equal(np.where(want == -2, -2, index.numpy()), want)
        np.testing.assert_array_equal(goal.valid.numpy(), vectors[f"{case}.valid_flags"])
        labels = np.where(vectors[f"{case}.valid_flags"], vectors[f"{case}.labels"], CLASSES)
        np.testing.assert_array_equal(goal.labels.numpy(), labels)

    at = goal.positive.numpy()
    if name == "atss_official":
        tolerance = float32_loss(vectors, "reg_targets")["reg_targets"]
        deltas = head.coder.encode(goal.boxes, goal.anchors)
        assert difference(deltas, vectors[f"{case}.reg_targets"].reshape(-1, 4)[at]) <= tolerance
    else:
        np.testing.assert_array_equal(goal.boxes.numpy(), vectors[f"{case}.bbox_targets"].reshape(-1, 4)[at])
    tolerance = float32_loss(vectors, "centerness_targets")["centerness_targets"]
    centerness = vectors[f"{case}.centerness_targets"].reshape(-1)
    # Some files list the positive anchors only.
    assert difference(goal.centerness, centerness if len(centerness) == len(at) else centerness[at]) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_losses_and_gradients_are_the_released_ones(golden, name, case, dtype):
    vectors = golden(name)
    official = name == "atss_official"
    box, centerness = ("loss_box_reg", "loss_ctr") if official else ("loss_bbox", "loss_centerness")
    allowed = float32_loss(vectors, "loss_cls", box, centerness, "grad")
    scale = dict.fromkeys(allowed, 1.0)
    if dtype == torch.float64:
        # The gradients of some cases are stored in float32.
        allowed = dict.fromkeys(allowed, 1e-11) | {"grad": 1.3e-7}
        if not official:
            # mmdetection sums the centerness targets in float32, and adds an epsilon to what it divides by.
            allowed[box] = 6e-8
            eps, factor = np.finfo(np.float32).eps, vectors[f"{case}.avg_factor"]
            scale = {"loss_cls": factor / (factor + eps), box: 1 / (1 + eps), centerness: factor / (factor + eps)}
    raw = outputs_of(vectors, dtype, grad=True)
    # In float64 the anchors stay as they are deployed, in float32.
    losses = released_head(name).loss(raw, targets_of(vectors, case, dtype), IMAGES)
    assert set(losses) == {"loss_cls", "loss_bbox", "loss_centerness"}
    for ours, theirs in {"loss_cls": "loss_cls", "loss_bbox": box, "loss_centerness": centerness}.items():
        got = losses[ours].item() * scale[theirs]
        assert abs(got - vectors[f"{case}.{theirs}"].sum()) <= allowed[theirs] * max(1, abs(got)), ours

    grads = torch.autograd.grad(sum(losses.values()), raw[:3])
    for kind, values, grad in zip(("cls", "reg", "ctr"), (CLASSES, 4, 1), grads, strict=True):
        maps = [torch.from_numpy(vectors[f"{case}.grad.{kind}.{level}"]) for level in range(5)]
        want = flatten_levels(maps, values).numpy()
        assert np.abs(want).max() > 0 or (kind != "cls" and case == "all_empty")
        assert difference(grad.reshape(want.shape), want) <= allowed["grad"], kind


@pytest.mark.parametrize("test_set", ["default", "topk60"])
@pytest.mark.parametrize("name", RELEASED)
def test_detections_are_the_released_ones(golden, name, test_set):
    vectors = golden(name)
    changes = (
        {"selection": replace(released_head(name).selection, per_level=60, most=25)} if test_set == "topk60" else {}
    )
    results = released_head(name, **changes).predict(outputs_of(vectors, torch.float32), IMAGES)
    tolerance = float32_loss(vectors, f"det_{test_set}")[f"det_{test_set}"]
    for image, got in enumerate(results):
        boxes, scores, labels = (vectors[f"det_{test_set}.{image}.{k}"] for k in ("bboxes", "scores", "labels"))
        if name == "atss_official":
            # The stored ones of the official head are not yet clipped.
            boxes = clip_boxes(torch.from_numpy(boxes), IMAGES[image]).numpy()
            inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
            boxes, scores, labels = boxes[inside], scores[inside], labels[inside]
        np.testing.assert_array_equal(got["labels"].numpy(), labels)
        assert difference(got["boxes"], boxes) <= tolerance
        assert difference(got["scores"], scores) <= tolerance
        assert got["boxes"].dtype == got["scores"].dtype == torch.float32


@pytest.mark.parametrize("name", RELEASED)
def test_detections_in_the_size_of_the_original_image(golden, name):
    vectors = golden(name)
    stored = "postprocessed" if name == "atss_official" else "rescaled"
    scene = json.loads(str(vectors["meta"]))["scene"]
    tolerance = float32_loss(vectors, f"det_{stored}")[f"det_{stored}"]
    for image, got in enumerate(released_head(name).predict(outputs_of(vectors, torch.float32), IMAGES)):
        if name == "atss_official":
            (height, width), (h, w) = scene["ori_shape"][image], IMAGES[image]
            scale = torch.tensor([width / w, height / h] * 2)
        else:
            scale = 1 / torch.tensor(scene["scale_factor_wh"][image] * 2)
        np.testing.assert_array_equal(got["labels"].numpy(), vectors[f"det_{stored}.{image}.labels"])
        assert difference(got["boxes"] * scale, vectors[f"det_{stored}.{image}.bboxes"]) <= tolerance
        assert difference(got["scores"], vectors[f"det_{stored}.{image}.scores"]) <= tolerance


def test_the_two_conventions_do_not_give_the_same_detections(golden):
    """Nothing here may pass by ignoring the argument."""
    raw = outputs_of(golden("atss_official"), torch.float32)
    mmdet, official = (released_head(n).predict(raw, IMAGES) for n in ("atss_mmdet_dyheadcfg", "atss_official"))
    assert not torch.equal(mmdet[0]["scores"], official[0]["scores"])


def random_boxes(count: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    side = torch.exp(torch.rand(count, 2, generator=generator) * 4 + 1)
    return clip_boxes(torch.cat([centre - side / 2, centre + side / 2], 1), (height, width))


def random_batch(classes: int = 5, images: int = 8, boxes: int = 6, side: int = 128):
    generator = torch.Generator().manual_seed(1)
    head = ATSSHead(in_channels=16, num_classes=classes, strides=STRIDES)
    features = [torch.randn(images, 16, -(-side // s), -(-side // s), generator=generator) for s in STRIDES]
    targets = [
        {
            "boxes": random_boxes(boxes, side, side, generator),
            "labels": torch.randint(classes, (boxes,), generator=generator),
        }
        for _ in range(images)
    ]
    return head, features, targets, [(side, side)] * images


@pytest.mark.parametrize("convention", ["mmdet", "official"])
@pytest.mark.parametrize(
    "boxes",
    [
        pytest.param([[]], id="no box"),
        pytest.param([[], [[10.0, 10.0, 60.0, 90.0]]], id="one image without"),
        pytest.param([[[30.2, 5.0, 30.5, 120.0]], [[4.0, 64.0, 100.0, 64.001]]], id="thinner than a pixel"),
        pytest.param([[[50.0, 50.0, 50.0, 80.0]]], id="no area"),
        pytest.param([[[0.0, 0.0, 128.0, 128.0]] * 3], id="the same box three times"),
        pytest.param([1500, 2], id="1500 boxes"),
    ],
)
def test_losses_are_finite_at_the_edges(boxes, convention):
    generator = torch.Generator().manual_seed(2)
    boxes = [
        random_boxes(b, 128, 128, generator) if isinstance(b, int) else torch.tensor(b).reshape(-1, 4) for b in boxes
    ]
    head = ATSSHead(in_channels=8, num_classes=3, strides=STRIDES, convention=convention)
    features = [torch.randn(len(boxes), 8, 128 // s, 128 // s, generator=generator) for s in STRIDES]
    targets = [{"boxes": b, "labels": torch.zeros(len(b), dtype=torch.long)} for b in boxes]
    losses = head.loss(head(features, features), targets, [(128, 128)] * len(boxes))
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_one_map_for_both_tasks_gives_what_two_copies_give():
    head, features, _, _ = random_batch()
    torch.nn.init.normal_(head.centerness.bias)
    for level, scale in enumerate(head.scales):
        torch.nn.init.constant_(scale.scale, 1 + level / 4)
    once, twice = head(features, features), head(features, [f.clone() for f in features])
    for a, b in zip(once[:3], twice[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    # Each level by the plain layers, to see that the rows are in order and the scale meets the deltas only.
    start = 0
    for level, f in enumerate(features):
        rows = slice(start, start + f.shape[2] * f.shape[3])
        start = rows.stop
        deltas = head.bbox_pred(f).flatten(2).mT * (1 + level / 4)
        torch.testing.assert_close(once.deltas[:, rows], deltas, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(once.logits[:, rows], head.cls_logits(f).flatten(2).mT, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(once.centerness[:, rows], head.centerness(f).flatten(1), rtol=1e-6, atol=1e-7)
    assert start == once.logits.shape[1]


def test_an_untrained_head_predicts_the_prior():
    head = ATSSHead(in_channels=4, num_classes=7, strides=STRIDES, prior=0.02)
    zeros = [torch.zeros(1, 4, 2, 2) for _ in STRIDES]
    torch.testing.assert_close(head(zeros, zeros).logits.sigmoid(), torch.full((1, 20, 7), 0.02))


def test_a_step_has_the_same_bits_twice():
    def gradients():
        torch.manual_seed(0)
        head, features, targets, sizes = random_batch()
        sum(head.loss(head(features, features), targets, sizes).values()).backward()
        return [p.grad for p in head.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_training_after_a_prediction_in_inference_mode():
    """The cached anchors must not be inference tensors."""
    head, features, targets, sizes = random_batch(side=96)
    with torch.inference_mode():
        head.predict(head(features, features), sizes)
        head.loss(head(features, features), targets, sizes)
    sum(head.loss(head(features, features), targets, sizes).values()).backward()


def test_half_precision_maps_give_float32_losses_and_boxes():
    head, features, targets, sizes = random_batch()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(features, features)
        losses = head.loss(outputs, targets, sizes)
    assert outputs.logits.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert head.predict(outputs, sizes)[0]["boxes"].dtype == torch.float32


def test_no_candidate_gives_empty_detections():
    head, features, _, sizes = random_batch()
    torch.nn.init.constant_(head.cls_logits.bias, -20)
    result = head.predict(head(features, features), sizes)
    assert len(result) == len(sizes)
    assert result[0]["boxes"].shape == (0, 4)
    assert result[0]["scores"].shape == result[0]["labels"].shape == (0,)


def one_anchor_outputs(probability: float, deltas: list[float]) -> ATSSOutputs:
    """A single level of 4×4 cells, silent but for the cell in row 1, column 2, which is sure of its centerness."""
    logits = torch.full((1, 16, 1), -20.0)
    logits[0, 6] = torch.logit(torch.tensor(probability))
    return ATSSOutputs(logits, torch.tensor(deltas).expand(1, 16, 4), torch.full((1, 16), 20.0), ((4, 4),))


def test_one_detection_by_hand():
    head = ATSSHead(in_channels=4, num_classes=1, strides=[8], anchor_scale=2.0)
    # The anchor is 16 wide around (20, 12): a tenth of 16 per unit to the right and down, sides by a fifth's power.
    result = head.predict(one_anchor_outputs(0.051, [5.0, -2.5, 5 * math.log(2), 0.0]), [(32, 31)])[0]
    torch.testing.assert_close(result["boxes"], torch.tensor([[12.0, 0.0, 31.0, 16.0]]))
    torch.testing.assert_close(result["scores"], torch.tensor([0.051]))
    assert head.predict(one_anchor_outputs(0.049, [0.0] * 4), [(32, 32)])[0]["boxes"].shape == (0, 4)


def test_only_mmdetection_bounds_small_boxes():
    raw = one_anchor_outputs(0.9, [0.0, 0.0, -600.0, -600.0])
    for convention, boxes in (("mmdet", 1), ("official", 0)):
        head = ATSSHead(in_channels=4, num_classes=1, strides=[8], convention=convention)
        assert len(head.predict(raw, [(32, 32)])[0]["boxes"]) == boxes


@pytest.mark.parametrize(("convention", "least"), [("mmdet", 1.0), ("official", 0.0)])
def test_what_the_box_loss_is_divided_by(convention, least):
    """One box with its centre between two anchors, so that the centerness targets sum to less than one."""
    head = ATSSHead(in_channels=4, num_classes=1, strides=[8], convention=convention, anchor_scale=2.0)
    targets = [{"boxes": torch.tensor([[17.0, 10.0, 30.0, 18.0]]), "labels": torch.tensor([0])}]
    raw = one_anchor_outputs(0.5, [0.0] * 4)
    goal = head.targets(head.grid(raw), targets, [(32, 32)])
    assert goal.positive.tolist() == [6, 7]
    centerness = torch.tensor([3 / 10 * 2 / 6, 2 / 11 * 2 / 6]).sqrt()
    torch.testing.assert_close(goal.centerness, centerness)
    assert centerness.sum() < 1
    # The anchors, 16 by 16, share 11 by 8 and 10 by 8 with the box; 18 by 16 and 19 by 16 hold both.
    union = torch.tensor([256 + 104 - 88, 256 + 104 - 80])
    overlap = torch.tensor([88, 80]) / union - (torch.tensor([288, 304]) - union) / torch.tensor([288, 304])
    want = 2 * (centerness * (1 - overlap)).sum() / centerness.sum().clamp(min=least)
    torch.testing.assert_close(head.loss(raw, targets, [(32, 32)])["loss_bbox"], want)


def test_each_task_reads_its_own_maps():
    head, features, _, _ = random_batch()
    other = [f + 1 for f in features]
    same, mixed = head(features, features), head(other, features)
    torch.testing.assert_close(mixed.deltas, same.deltas)
    torch.testing.assert_close(mixed.logits, head(other, other).logits)
    assert not torch.allclose(mixed.logits, same.logits)


def test_unknown_convention_lists_the_known_ones():
    with pytest.raises(ValueError, match="mmdet, official"):
        ATSSHead(in_channels=8, num_classes=2, convention="torchvision")


@pytest.mark.gpu
@pytest.mark.parametrize("name", RELEASED)
def test_gpu_agrees_with_cpu(golden, name):
    vectors, head = golden(name), released_head(name)
    raw, targets = outputs_of(vectors, torch.float32), targets_of(vectors, "full")
    on_gpu = ATSSOutputs(*(t.cuda() for t in raw[:3]), SIZES)
    gpu_targets = [{k: v.cuda() for k, v in t.items()} for t in targets]
    grid, gpu_grid = head.grid(raw), head.grid(on_gpu)
    assert torch.equal(grid.anchors, gpu_grid.anchors.cpu())
    matched, gpu_matched = head.targets(grid, targets, IMAGES), head.targets(gpu_grid, gpu_targets, IMAGES)
    assert torch.equal(matched.matched, gpu_matched.matched.cpu())
    losses, gpu_losses = head.loss(raw, targets, IMAGES), head.loss(on_gpu, gpu_targets, IMAGES)
    for key, loss in losses.items():
        torch.testing.assert_close(gpu_losses[key].cpu(), loss, rtol=1e-5, atol=1e-6)
    for want, got in zip(head.predict(raw, IMAGES), head.predict(on_gpu, IMAGES), strict=True):
        assert torch.equal(got["labels"].cpu(), want["labels"])
        torch.testing.assert_close(got["boxes"].cpu(), want["boxes"], rtol=0, atol=1e-4)
