"""Masks against mmdetection's vectors: pasting, targets, the head, the loss and its gradients, detections."""

import numpy as np
import pytest
import torch
from golden_box_heads import load_box_head, proposals_of, rois_of
from golden_scene import CLASSES, EDGES, IMAGES, STRIDES, difference, float32_loss, random_boxes, targets_of

from ablations.experiment.measure import count_gmacs, count_parameters
from heads import build_detector
from heads.two_stage.faster_rcnn import TwoStageOutputs
from heads.two_stage.mask_rcnn import MaskRCNNHead
from heads.two_stage.masks import MaskHead, mask_targets, paste, targets_from_bitmaps, targets_from_polygons
from heads.two_stage.roi import BoxHead

CONVOLUTIONS = {f"convs.{n}.conv": f"convs.{n}" for n in range(4)} | {
    "upsample": "upsample",
    "conv_logits": "mask_logits",
}


def lost(vectors: dict, key: str) -> float:
    return float32_loss(vectors, key)[key]


def unpacked(vectors: dict, key: str) -> np.ndarray:
    shape = vectors[f"{key}shape"]
    packed = np.unpackbits(vectors[f"{key}packed"], axis=-1)[:, : shape[1] * shape[2]]
    return packed.reshape(shape).astype(bool)


def polygons_of(vectors: dict, image: int | None = None) -> list[list[np.ndarray]]:
    """The stored polygons of the scene's first image, or of one of the RoI head's two."""
    found: dict[int, list] = {}
    for key in vectors:
        prefix, *numbers = key.split(".")
        if prefix == "poly" and (image is None or int(numbers.pop(0)) == image):
            found.setdefault(int(numbers[0]), []).append(vectors[key])
    return [found[number] for number in sorted(found)]


def test_pasting_is_mmdetections(golden):
    vectors = golden("pieces_masks")
    logits, labels = torch.from_numpy(vectors["mask_logits"]), torch.from_numpy(vectors["labels"])
    probabilities = logits[torch.arange(len(labels)), labels].sigmoid()
    boxes, size = torch.from_numpy(vectors["boxes"]), tuple(vectors["hw"].tolist())
    # The stored ones were interpolated in float32, at positions of up to 120 pixels.
    assert difference(paste(probabilities, boxes, size, None), vectors["pasted_soft"]) <= 1e-5
    hard = np.unpackbits(vectors["pasted_packed"], axis=-1)[:, : size[0] * size[1]].reshape(-1, *size).astype(bool)
    np.testing.assert_array_equal(paste(probabilities, boxes, size).numpy(), hard)
    for name in ("predict_norescale.", "predict_rescaled."):
        want = unpacked(vectors, name)
        boxes = torch.from_numpy(vectors[f"{name}boxes_in"])
        if name == "predict_rescaled.":
            scale = torch.tensor([want.shape[2] / size[1], want.shape[1] / size[0]])
            assert (scale != 1).any()
        np.testing.assert_array_equal(paste(probabilities, boxes, want.shape[1:]).numpy(), want)


def test_pasting_by_hand():
    """A box twice the mask's size: interpolation by quarters, fading to nothing over half a cell outside the box."""
    mask = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    soft = paste(mask, torch.tensor([[1.0, 0.0, 5.0, 4.0]]), (4, 6), None)[0]
    torch.testing.assert_close(soft[0], 0.75 * torch.tensor([0.25, 0.75, 0.75, 0.25, 0, 0]))
    torch.testing.assert_close(soft[3], 0.75 * torch.tensor([0.25, 0.75, 1, 1, 0.75, 0.25]))
    nothing = paste(mask.expand(2, 2, 2), torch.tensor([[2.0, 1.0, 2.0, 3.0], [2.5, 1.0, 2.5, 3.0]]), (4, 6))
    assert not nothing.any()
    assert paste(mask[:0], torch.zeros(0, 4), (4, 6)).shape == (0, 4, 6)


def test_targets_are_mmdetections(golden):
    vectors = golden("pieces_masks")
    rois, matched = torch.from_numpy(vectors["target.rois"]), torch.from_numpy(vectors["target.inds"])
    bitmaps = torch.from_numpy(unpacked(vectors, "bitmap_"))
    np.testing.assert_array_equal(targets_from_bitmaps(bitmaps, rois, matched).numpy(), vectors["target.bitmap"])
    polygons = polygons_of(vectors)
    np.testing.assert_array_equal(targets_from_polygons(polygons, rois, matched).numpy(), vectors["target.polygon"])


def head_and_outputs(vectors: dict, dtype: torch.dtype) -> tuple[MaskRCNNHead, TwoStageOutputs]:
    head = MaskRCNNHead(in_channels=16, num_classes=CLASSES)
    head.box, head.mask, head.samples = BoxHead(16, CLASSES, 24), MaskHead(16, CLASSES, 8), 512
    load_box_head(head.box, vectors, "param.bbox_head")
    with torch.no_grad():
        for theirs, ours in CONVOLUTIONS.items():
            for kind in ("weight", "bias"):
                stored = torch.from_numpy(vectors[f"param.mask_head.{theirs}.{kind}"])
                head.mask.get_parameter(f"{ours}.{kind}").copy_(stored)
    features = [torch.from_numpy(vectors[f"feat.{level}"]).to(dtype).requires_grad_() for level in range(4)]
    return head.to(dtype), TwoStageOutputs(features, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", ["full", "one_empty", "all_empty"])
def test_losses_and_gradients_are_mmdetections(golden, case, dtype):
    vectors = golden("maskrcnn_roihead_mmdet")
    head, outputs = head_and_outputs(vectors, dtype)
    targets = targets_of(vectors, case, dtype)
    for image, target in enumerate(targets):
        target["masks"] = polygons_of(vectors, image)[: len(target["boxes"])]
    regions = head.regions(proposals_of(vectors, dtype), targets)
    if case == "full":
        parts = regions.positives([len(t["boxes"]) for t in targets])
        np.testing.assert_array_equal(rois_of(parts[0]).numpy(), vectors["rois"][regions.positive.numpy()])
        np.testing.assert_array_equal(mask_targets(targets, *parts).numpy(), vectors["mask_targets"])
        logits = head.mask(head.pool(outputs, parts[0], 14))
        assert difference(logits[:4], vectors["mask_preds_first4"]) <= lost(vectors, "mask_preds_first4")
    losses = head.box_loss(outputs, regions) | {"loss_mask": head.mask_loss(outputs, regions, targets)}
    prefix = "" if case == "full" else f"{case}."
    # mmdetection rounds the mask loss to float32 in a run of float64 too.
    assert abs(losses["loss_mask"].item() - vectors[f"{prefix}loss_mask"]) <= lost(vectors, "loss_mask")
    sum(losses.values()).backward()
    assert all(p.grad is not None for part in (head.box, head.mask) for p in part.parameters())
    if case == "full":
        for level, feature in enumerate(outputs.features):
            # A level on which no box lies has no gradient.
            grad = torch.zeros_like(feature) if feature.grad is None else feature.grad
            assert difference(grad, vectors[f"grad.feat.{level}"]) <= lost(vectors, "grad.feat")
        for theirs, ours in CONVOLUTIONS.items():
            for kind in ("weight", "bias"):
                want = vectors[f"grad.param.mask_head.{theirs}.{kind}"]
                assert difference(head.mask.get_parameter(f"{ours}.{kind}").grad, want) <= lost(vectors, "grad.param")


@pytest.mark.parametrize("stored", ["default", "rescaled"])
def test_masks_of_detections_are_mmdetections(golden, stored):
    vectors = golden("maskrcnn_roihead_mmdet")
    head, outputs = head_and_outputs(vectors, torch.float32)
    head.proposals = lambda *_: proposals_of(vectors, torch.float32)
    for image, found in enumerate(head.predict(outputs, IMAGES)):
        want = unpacked(vectors, f"det_{stored}.{image}.masks_")
        assert difference(found["scores"], vectors[f"det_{stored}.{image}.scores"]) <= lost(vectors, "det")
        if stored == "default":
            got = found["masks"]
        else:
            boxes = torch.from_numpy(vectors[f"det_rescaled.{image}.bboxes"]).float()
            got = paste(found["mask_probabilities"], boxes, want.shape[1:])
        assert got.shape == want.shape and want.any()
        # A pixel whose probability is a rounding away from one half may fall on either side.
        assert (got.numpy() != want).mean() <= 1e-6


@pytest.mark.parametrize("name", EDGES)
def test_losses_are_finite_at_the_edges(name):
    generator = torch.Generator().manual_seed(2)
    head = MaskRCNNHead(in_channels=16, num_classes=3, strides=STRIDES)
    boxes = [
        random_boxes(b, 128, generator) if isinstance(b, int) else torch.tensor(b).reshape(-1, 4) for b in EDGES[name]
    ]
    features = [torch.randn(len(boxes), 16, 128 // s, 128 // s, generator=generator) for s in STRIDES]
    targets = [
        {
            "boxes": b,
            "labels": torch.zeros(len(b), dtype=torch.long),
            "masks": torch.ones(1, 128, 128, dtype=torch.uint8).expand(len(b), 128, 128),
        }
        for b in boxes
    ]
    losses = head.loss(head(features, features), targets, [(128, 128)] * len(boxes))
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values()), losses
    sum(losses.values()).backward()
    for parameter_name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
    for result in head.predict(head(features, features), [(128, 128)] * len(boxes)):
        assert result["masks"].shape == (len(result["boxes"]), 128, 128)


def test_around_roi_leaves_the_mask_head_alone():
    models = {
        p: build_detector("mask_rcnn", 3, "tiny", "LSC", 1, channels=16, placement=p) for p in ("trunk", "around_roi")
    }
    names = {p: {n for n, _ in m.head.mask.named_parameters()} for p, m in models.items()}
    assert names["trunk"] == names["around_roi"]
    assert models["around_roi"].head.box.task is not None


def test_r50_has_the_published_size():
    with torch.device("meta"):
        # torchvision's page of maskrcnn_resnet50_fpn: 44,401,393 parameters, with a box and a mask for the background
        # class. Its "GFLOPS" are those of an image without a detection, so of no mask.
        model = build_detector("mask_rcnn", 90, "resnet50", None)
        assert count_parameters(model) == 44_401_393 - 4 * (1024 + 1) - (256 + 1)
        model = build_detector("mask_rcnn", 80, "resnet50", None)
        # mmdetection's get_flops.py prints 44.17 M (its issue 4472): with the weights of the norms, which are frozen
        # here, and without stem and first stage, which are frozen there.
        assert count_parameters(model) + 53_120 - 225_344 == pytest.approx(44.17e6, abs=0.005e6)
        faster = build_detector("faster_rcnn", 80, "resnet50", None)
        image = [torch.empty(3, 800, 1333)]
        # No published figure was found. Four convolutions on 14×14, a transposed one and 80 masks on 28×28, for 100
        # detections.
        cells = 196 * (4 * 9 * 256 * 256 + 4 * 256 * 256) + 784 * 256 * 80
        assert count_gmacs(model, image) - count_gmacs(faster, image) == pytest.approx(100 * cells / 1e9, rel=1e-6)
