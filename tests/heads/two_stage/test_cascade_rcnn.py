"""Cascade R-CNN's stages against mmdetection's vectors, and at the edges."""

import json

import numpy as np
import pytest
import torch
from golden_box_heads import load_box_head, proposals_of, rois_of
from golden_scene import CLASSES, EDGES, IMAGES, STRIDES, check_edges, difference, float32_loss, targets_of

from ablations.experiment.measure import count_gmacs, count_parameters
from heads import build_detector
from heads.two_stage.cascade_rcnn import WEIGHTS, CascadeRCNNHead
from heads.two_stage.faster_rcnn import TwoStageOutputs
from heads.two_stage.roi import BoxHead


def lost(vectors: dict, key: str) -> float:
    return float32_loss(vectors, key)[key]


def head_and_outputs(vectors: dict, dtype: torch.dtype) -> tuple[CascadeRCNNHead, TwoStageOutputs]:
    head = CascadeRCNNHead(in_channels=16, num_classes=CLASSES)
    head.stages = torch.nn.ModuleList(BoxHead(16, CLASSES, 24, class_agnostic=True) for _ in range(3))
    head.samples = 512
    for stage, box in enumerate(head.stages):
        load_box_head(box, vectors, f"param.bbox_head.{stage}")
    features = [torch.from_numpy(vectors[f"feat.{level}"]).to(dtype).requires_grad_() for level in range(4)]
    return head.to(dtype), TwoStageOutputs(features, None)


def watched(head: CascadeRCNNHead) -> list[dict]:
    """What each stage learned from and said, filled in while a loss is computed."""
    notes = []

    def regions(stage, proposals, targets):
        found = type(head).regions(head, stage, proposals, targets)
        notes.append({"regions": found})
        return found

    def note(_, __, output):
        for value in output:
            value.retain_grad()
        notes[-1] |= {"logits": output[0], "deltas": output[1]}

    head.regions = regions
    for stage in head.stages:
        stage.register_forward_hook(note)
    return notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", ["full", "one_empty", "all_empty"])
def test_stages_are_mmdetections(golden, case, dtype):
    vectors = golden("cascade_roihead_mmdet")
    head, outputs = head_and_outputs(vectors, dtype)
    notes = watched(head)
    losses = head.cascade_loss(outputs, proposals_of(vectors, dtype), targets_of(vectors, case, dtype), IMAGES)
    sum(losses.values()).backward()
    prefix = "" if case == "full" else f"{case}."
    for stage, note in enumerate(notes):
        name = f"s{stage}"
        stored = f"{prefix}{name}"
        regions = note["regions"]
        labels = vectors[f"{stored}.labels"]
        np.testing.assert_array_equal(regions.labels.numpy(), labels)
        assert difference(rois_of(regions.boxes), vectors[f"{stored}.rois"]) <= lost(vectors, f"{name}.rois") + 1e-12
        deltas = head.coders[stage].encode(regions.targets, torch.cat(regions.boxes)[regions.positive])
        want = vectors[f"{stored}.bbox_targets"][labels < CLASSES]
        assert difference(deltas, want) <= lost(vectors, f"{name}.bbox_targets")
        for kind in ("loss_cls", "loss_bbox"):
            loss = losses[f"{name}.{kind}"].item()
            assert abs(loss - vectors[f"{stored}.{kind}"]) <= lost(vectors, f"{name}.{kind}") * max(1, loss), kind
        grad = note["logits"].grad
        assert difference(grad, vectors[f"{stored}.grad.cls_score"]) <= lost(vectors, f"{name}.grad.cls_score")
        if case != "all_empty":
            grad = note["deltas"].grad[:, 0]
            assert difference(grad, vectors[f"{stored}.grad.bbox_pred"]) <= lost(vectors, f"{name}.grad.bbox_pred")
        if case == "full":
            assert difference(note["logits"], vectors[f"{name}.cls_score"]) <= lost(vectors, f"{name}.cls_score")
            parts = [vectors[f"{name}.sampling.{image}.pos_is_gt"].astype(bool) for image in range(2)]
            np.testing.assert_array_equal(regions.given[regions.positive].numpy(), np.concatenate(parts))
            if stage < 2:
                passed = head.refine(stage, note["deltas"], regions.boxes, IMAGES)
                given = regions.given.split([len(b) for b in passed])
                for image, (boxes, own) in enumerate(zip(passed, given, strict=True)):
                    want = vectors[f"{name}.refined.{image}"]
                    assert difference(boxes[~own], want) <= lost(vectors, f"{name}.refined")
    assert len(notes) == 3
    if case == "full":
        for level, feature in enumerate(outputs.features):
            grad = torch.zeros_like(feature) if feature.grad is None else feature.grad
            assert difference(grad, vectors[f"grad.feat.{level}"]) <= lost(vectors, "grad.feat")
        for stage, box in enumerate(head.stages):
            for theirs, ours in (("shared_fcs.0", "fc1"), ("fc_reg", "bbox_pred")):
                want = vectors[f"grad.param.bbox_head.{stage}.{theirs}.weight"]
                assert difference(box.get_parameter(f"{ours}.weight").grad, want) <= lost(vectors, "grad.param")


@pytest.mark.parametrize("stored", ["default", "rescaled"])
def test_detections_are_mmdetections(golden, stored):
    vectors = golden("cascade_roihead_mmdet")
    head, outputs = head_and_outputs(vectors, torch.float32)
    proposals = proposals_of(vectors, torch.float32)
    with torch.no_grad():
        boxes, deltas, logits = head.cascade(outputs, proposals, IMAGES)
        found = head.detect(outputs, proposals, IMAGES)
    start = 0
    scene = json.loads(str(vectors["meta"]))["scene"]
    for image, got in enumerate(found):
        rows = slice(start, start + len(boxes[image]))
        start = rows.stop
        assert difference(boxes[image], vectors[f"test.final_rois.{image}"][:, 1:]) <= lost(vectors, "test.final_rois")
        want = vectors[f"test.mean_cls_score.{image}"]
        assert difference(logits.mean(0)[rows], want) <= lost(vectors, "test.mean_cls_score")
        want = vectors[f"test.last_bbox_pred.{image}"]
        assert difference(deltas[rows, 0], want) <= lost(vectors, "test.last_bbox_pred")
        scale = 1 / torch.tensor(scene["scale_factor_wh"][image] * 2) if stored == "rescaled" else 1
        np.testing.assert_array_equal(got["labels"].numpy(), vectors[f"det_{stored}.{image}.labels"])
        assert difference(got["boxes"] * scale, vectors[f"det_{stored}.{image}.bboxes"]) <= lost(vectors, "det")
        assert difference(got["scores"], vectors[f"det_{stored}.{image}.scores"]) <= lost(vectors, "det")


@pytest.mark.parametrize("name", EDGES)
def test_losses_are_finite_at_the_edges(name):
    check_edges(CascadeRCNNHead(in_channels=16, num_classes=3, strides=STRIDES), 16, name)


def test_probabilities_may_be_averaged_instead(golden):
    vectors = golden("cascade_roihead_mmdet")
    head, outputs = head_and_outputs(vectors, torch.float32)
    proposals = proposals_of(vectors, torch.float32)
    head.average, head.score_threshold, head.iou_threshold, head.max_detections = "probabilities", 0.0, 1.1, 10**6
    with torch.no_grad():
        _, _, logits = head.cascade(outputs, proposals, IMAGES)
        found = head.detect(outputs, proposals, IMAGES)
    for image, mean in enumerate(logits.softmax(2).mean(0)[:, :-1].split([len(p) for p in proposals])):
        torch.testing.assert_close(found[image]["scores"], mean.flatten().sort(descending=True).values)
    with pytest.raises(ValueError, match="'logits' or 'probabilities'"):
        CascadeRCNNHead(in_channels=16, num_classes=3, average="scores")


def test_broken_deltas_do_not_crash():
    head = CascadeRCNNHead(in_channels=16, num_classes=3, strides=STRIDES)
    for stage in head.stages:
        torch.nn.init.constant_(stage.bbox_pred.bias, torch.nan)
    features = [torch.randn(1, 16, 128 // s, 128 // s) for s in STRIDES]
    targets = [{"boxes": torch.tensor([[10.0, 10, 60, 90]]), "labels": torch.tensor([1])}]
    losses = head.loss(head(features, features), targets, [(128, 128)])
    assert losses["s0.loss_bbox"].isnan()


def test_each_stage_has_its_own_task_attention():
    model = build_detector("cascade_rcnn", 3, "tiny", "LSC", 1, channels=16, placement="around_roi")
    tasks = [stage.task for stage in model.head.stages]
    assert len({id(task.expand.weight) for task in tasks}) == len(tasks) == len(WEIGHTS)
    assert isinstance(model.trunk.blocks[-1].task, torch.nn.Identity)


def test_r50_has_the_expected_size():
    """No published count was found: Faster R-CNN's, with three box heads instead of one, each with one box."""
    with torch.device("meta"):
        cascade, faster = (build_detector(name, 80, "resnet50", None) for name in ("cascade_rcnn", "faster_rcnn"))
        hidden = 256 * 49 * 1024 + 1024 * 1024 + 2 * 1024
        stage, single = hidden + (81 + 4) * 1025, hidden + (81 + 320) * 1025
        assert count_parameters(cascade) - count_parameters(faster) == 3 * stage - single
        hidden = 256 * 49 * 1024 + 1024 * 1024
        stage, single = hidden + (81 + 4) * 1024, hidden + (81 + 320) * 1024
        image = [torch.empty(3, 800, 1333)]
        difference = count_gmacs(cascade, image) - count_gmacs(faster, image)
        assert difference == pytest.approx(1000 * (3 * stage - single) / 1e9, rel=1e-6)
