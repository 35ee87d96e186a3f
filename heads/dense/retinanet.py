"""RetinaNet (Lin, Goyal, Girshick, He, Dollár, ICCV 2017): its prediction head; `heads/dense/towers.py` has its towers.

Ingredients, as published:
- nine anchors per cell: sides of 4 strides times 1, 2^(1/3) and 2^(2/3), at ratios 1:2, 1:1 and 2:1;
- an anchor is positive from IoU 0.5, background below 0.4, ignored in between; every box has at least its best anchor;
- P6 convolved from C5; towers of four 3×3 convolutions with ReLU and no norm for each task; 3×3 predictors;
- focal loss (alpha 0.25, gamma 2, prior 0.01) and L1 on the box deltas, both divided by the number of positives;
- detections: class probability above 0.05, the 1,000 best of a level, suppression at IoU 0.5 within a class, 100 boxes.

The paper has smooth L1; both releases with which DyHead was compared train with plain L1, and so does this file. They
differ in details, which `convention` selects:

| detail                      | "mmdet" (mmdetection 3.3)                | "official" (DynamicHead, detectron2)  |
|-----------------------------|------------------------------------------|---------------------------------------|
| order of a cell's anchors   | by ratio, then size                      | by size, then ratio                   |
| anchors in the padding      | take no part                             | are background                        |
| a box's best anchor         | moves to that box                        | keeps the box of its own best IoU     |
| losses divided by           | sum over images of max(positives, 1)     | running mean of the batch's positives |
| width and height deltas     | clamped on both sides                    | clamped from above                    |
| boxes clipped to the image  | before suppression                       | after suppression                     |

The running mean starts at 100 and keeps nine tenths of itself a step. Both centre anchors on the corner of their cells
(offset 0). The official pyramid has a ReLU between P6 and P7, and the official RetinaNet with DyHead keeps the four
convolutions of each tower behind it; here DyHead takes their place, as the paper says.

Deviations: the towers start by He's rule (He et al., ICCV 2015), not with the published standard deviation of 0.01. By
that, no more than a seventieth of the signal passes an untrained tower, which has no norm to restore it, and the losses
stand still for about a hundred steps: nothing of 90,000, but a fifth of a short schedule. A box that overlaps no anchor
gets none; both releases give it every anchor that overlaps it not at all. Suppression compares class labels instead of
shifting boxes by class, and the 1.2e-7 that mmdetection adds to every normaliser is left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from heads.backbones.fpn import FPN
from heads.backbones.resnet import ResNet
from heads.boxes.anchors import Grid, Sizes, anchor_grid, cell_anchors, outside_padding
from heads.boxes.assign import IGNORED, assign_max_iou
from heads.boxes.boxes import DeltaCoder
from heads.boxes.losses import sigmoid_focal_loss, smooth_l1_loss
from heads.boxes.selection import best_per_level, detections, predict_rows
from heads.dense.towers import ConvTowers
from heads.detector import Detector, PredictionHead
from heads.dyhead.dyhead import DyHead


@dataclass(frozen=True)
class Convention:
    """The details in which the two releases differ, row by row as in the table above."""

    anchor_order: Literal["ratio", "size"]
    padding_is_background: bool
    low_quality: Literal["moves", "keeps"]
    running_normaliser: bool
    delta_clamp: Literal["both", "above"]
    clip_first: bool


CONVENTIONS = {
    "mmdet": Convention("ratio", False, "moves", False, "both", True),
    "official": Convention("size", True, "keeps", True, "above", False),
}


class RetinaNetOutputs(NamedTuple):
    """What the head predicts for a batch, one row per anchor: levels in order, row by row, anchor by anchor.

    Attributes:
        logits: (N, A, C) class logits.
        deltas: (N, A, 4) dx, dy, dw, dh.
        sizes: (height, width) of each level's map.
    """

    logits: Tensor
    deltas: Tensor
    sizes: Sizes


class RetinaNetTargets(NamedTuple):
    """What a batch is trained towards; P anchors of the batch are positive.

    Attributes:
        matched: (N, A) int64, index into the batch's boxes, `BACKGROUND` or `IGNORED`.
        labels: (N, A) int64, C for background.
        positive: (P,) int64, indices into the N * A anchors.
        deltas: (P, 4).
        counted: (N, A) bool, which anchors the classification counts.
    """

    matched: Tensor
    labels: Tensor
    positive: Tensor
    deltas: Tensor
    counted: Tensor


class RetinaNetHead(PredictionHead):
    """Predicts class and box for nine anchors per cell; see the top of this file.

    Args:
        in_channels: of the trunk's maps.
        num_classes: C, without background.
        strides: pixels per cell, by level.
        convention: "mmdet" or "official".
        anchor_offset: where in its cell an anchor is centred, in cells.
        anchor_scale: side of the smallest square anchor in strides.
        scales_per_octave: sizes of anchors between one such side and the next.
        ratios: of an anchor's height to its width.
        positive_iou, negative_iou: of the assignment.
        pad_divisor: of "mmdet"'s rule for anchors in the padding, see `outside_padding`.
        prior: class probability that an untrained head predicts.
        focal_alpha, focal_gamma: of the focal loss.
        score_threshold: class probability that a candidate must exceed.
        candidates_per_level: the most that a level sends into suppression.
        iou_threshold: of the suppression.
        max_detections: per image.

    Raises:
        ValueError: the convention is unknown.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        convention: Literal["mmdet", "official"] = "mmdet",
        anchor_offset: float = 0.0,
        anchor_scale: float = 4.0,
        scales_per_octave: int = 3,
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        positive_iou: float = 0.5,
        negative_iou: float = 0.4,
        pad_divisor: int = 32,
        prior: float = 0.01,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        score_threshold: float = 0.05,
        candidates_per_level: int = 1000,
        iou_threshold: float = 0.5,
        max_detections: int = 100,
    ):
        super().__init__()
        if convention not in CONVENTIONS:
            raise ValueError(f"unknown convention {convention!r}; the conventions are {', '.join(CONVENTIONS)}")
        self.convention = CONVENTIONS[convention]
        self.num_classes = num_classes
        self.strides = tuple(strides)
        sizes = [anchor_scale * 2 ** (i / scales_per_octave) for i in range(scales_per_octave)]
        order = self.convention.anchor_order
        self.cells = [cell_anchors([size * stride for size in sizes], ratios, order) for stride in strides]
        self.anchors_per_cell = len(self.cells[0])
        self.anchor_offset = anchor_offset
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.pad_divisor = pad_divisor
        self.focal = {"alpha": focal_alpha, "gamma": focal_gamma}
        self.score_threshold = score_threshold
        self.candidates_per_level = candidates_per_level
        self.iou_threshold = iou_threshold
        self.max_detections = max_detections
        self.coder = DeltaCoder(clamp=self.convention.delta_clamp)
        if self.convention.running_normaliser:
            self.register_buffer("running_positives", torch.tensor(100.0))

        self.cls_score = nn.Conv2d(in_channels, self.anchors_per_cell * num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(in_channels, self.anchors_per_cell * 4, 3, padding=1)
        for predictor in (self.cls_score, self.bbox_pred):
            nn.init.normal_(predictor.weight, std=0.01)
            nn.init.zeros_(predictor.bias)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior) / prior))

    def forward(self, cls_features: list[Tensor], reg_features: list[Tensor]) -> RetinaNetOutputs:
        """Predict from the trunk's maps (N, C, H_l, W_l); both lists may be the same one, as with DyHead."""
        anchors = self.anchors_per_cell
        if cls_features is reg_features:
            logits, deltas = predict_rows(reg_features, self.cls_score, self.bbox_pred, anchors=anchors)
        else:
            (logits,) = predict_rows(cls_features, self.cls_score, anchors=anchors)
            (deltas,) = predict_rows(reg_features, self.bbox_pred, anchors=anchors)
        return RetinaNetOutputs(logits, deltas, tuple((f.shape[2], f.shape[3]) for f in reg_features))

    def grid(self, outputs: RetinaNetOutputs) -> Grid:
        """The anchors of `outputs`, in the order of its rows."""
        return anchor_grid(outputs.sizes, self.strides, self.cells, self.anchor_offset, outputs.deltas.device)

    def targets(self, grid: Grid, targets: list[dict], image_sizes: list[tuple[int, int]]) -> RetinaNetTargets:
        """Assign boxes to anchors. Arguments as in `loss`."""
        boxes, device = [t["boxes"] for t in targets], grid.anchors.device
        valid = None
        if not self.convention.padding_is_background:
            _, valid = outside_padding(grid, image_sizes, self.pad_divisor)
        matched = assign_max_iou(
            grid.anchors,
            boxes,
            self.positive_iou,
            self.negative_iou,
            low_quality=self.convention.low_quality,
            valid=valid,
        )
        counted = matched != IGNORED
        if valid is not None:
            counted &= valid
        background = torch.tensor([self.num_classes], device=device)
        # Neither kind of anchor without a box may read a box's label: both read the last entry, background.
        labels = torch.cat([*(t["labels"] for t in targets), background])[matched.clamp(min=-1)]
        flat = matched.flatten()
        positive = (flat >= 0).nonzero()[:, 0]
        anchors = grid.anchors[positive % matched.shape[1]]
        deltas = self.coder.encode(torch.cat(boxes)[flat[positive]], anchors)
        return RetinaNetTargets(matched, labels, positive, deltas, counted)

    def normaliser(self, goal: RetinaNetTargets) -> Tensor:
        """What both losses are divided by; the official running mean moves with every call."""
        if not self.convention.running_normaliser:
            return (goal.matched >= 0).sum(1).clamp(min=1).sum()
        self.running_positives.mul_(0.9).add_(0.1 * max(len(goal.positive), 1))
        return self.running_positives.clone()

    def loss(
        self, outputs: RetinaNetOutputs, targets: list[dict], image_sizes: list[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """The two losses of a batch, to be summed.

        Args:
            outputs: of `forward`.
            targets: one dict an image: `boxes` (n, 4) xyxy in pixels, `labels` (n,) int64 below C; n may be 0.
            image_sizes: (height, width) of each image before padding.

        Returns:
            `loss_cls`, `loss_bbox`: scalars.
        """
        goal = self.targets(self.grid(outputs), targets, image_sizes)
        normaliser = self.normaliser(goal)
        predicted = outputs.deltas.flatten(0, 1)[goal.positive]
        return {
            "loss_cls": sigmoid_focal_loss(
                outputs.logits, goal.labels, normaliser=normaliser, weight=goal.counted, **self.focal
            ),
            "loss_bbox": smooth_l1_loss(predicted, goal.deltas, normaliser=normaliser),
        }

    @torch.no_grad()
    def predict(self, outputs: RetinaNetOutputs, image_sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Detections, one dict an image, by falling score.

        Args:
            outputs: of `forward`.
            image_sizes: (height, width) of each image before padding.

        Returns:
            `boxes` (K, 4) xyxy in pixels, clipped to the image; `scores` (K,); `labels` (K,) int64.
        """
        grid, results = self.grid(outputs), []
        for scores, deltas, size in zip(outputs.logits.sigmoid(), outputs.deltas, image_sizes, strict=True):
            anchor, label = best_per_level(scores, self.score_threshold, self.candidates_per_level, grid.counts)
            boxes = self.coder.decode(deltas[anchor], grid.anchors[anchor])
            results.append(
                detections(
                    boxes,
                    scores[anchor, label],
                    label,
                    size,
                    self.iou_threshold,
                    self.max_detections,
                    self.convention.clip_first,
                )
            )
        return results


def retinanet(body: ResNet, num_classes: int, channels: int, dyhead: DyHead | None) -> Detector:
    """RetinaNet as mmdetection trains it; DyHead takes the place of both towers."""
    head = RetinaNetHead(in_channels=channels, num_classes=num_classes, strides=FPN.strides)
    return Detector(body, FPN(body.channels, channels, p6_from="c5"), dyhead or ConvTowers(channels, norm=False), head)
