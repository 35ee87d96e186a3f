"""RetinaNet (Lin, Goyal, Girshick, He, Dollár, ICCV 2017): its prediction head; `heads/dense/towers.py` has its towers.

Ingredients, as published:
- nine anchors per cell: sides of 4 strides times 1, 2^(1/3) and 2^(2/3), at ratios 1:2, 1:1 and 2:1;
- an anchor is positive from IoU 0.5, background below 0.4, ignored in between; every box has at least its best anchor;
- P6 convolved from C5; towers of four 3×3 convolutions with ReLU and no norm for each task; 3×3 predictors;
- focal loss (alpha 0.25, gamma 2, prior 0.01) and L1 on the box deltas, both divided by the number of positives;
- detections: class probability above 0.05, the 1,000 best of a level, NMS at IoU 0.5 within a class, 100 boxes.

The paper has smooth L1; both releases with which DyHead was compared train with plain L1, and so does this file. They
differ in details, which `convention` selects:

| detail                      | "mmdet" (mmdetection 3.3)                | "official" (DynamicHead, detectron2)  |
|-----------------------------|------------------------------------------|---------------------------------------|
| order of a cell's anchors   | by ratio, then size                      | by size, then ratio                   |
| anchors in the padding      | take no part                             | are background                        |
| a box's best anchor         | moves to that box                        | keeps the box of its own best IoU     |
| losses divided by           | sum over images of max(positives, 1)     | running mean of the batch's positives |
| width and height deltas     | clamped on both sides                    | clamped from above                    |
| boxes clipped to the image  | before NMS                               | after NMS                             |

The running mean starts at 100 and keeps nine tenths of itself a step. Both centre anchors on the corner of their cells
(offset 0). The official pyramid has a ReLU between P6 and P7, and the official RetinaNet with DyHead keeps the four
convolutions of each tower behind it, as `build_released` does (`heads/released/layouts.py`); here DyHead replaces them,
as the paper says.

Deviations: the towers start by He's rule (He et al., ICCV 2015), not with the published standard deviation of 0.01. By
that, no more than a seventieth of the signal passes an untrained tower, which has no norm to restore it, and the losses
stand still for about a hundred steps: nothing of 90,000, but a fifth of a short schedule. A box that overlaps no anchor
gets none; both releases give it every anchor that overlaps it not at all. NMS compares class labels instead of shifting
boxes by class, and the 1.2e-7 that mmdetection adds to every normaliser is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from heads.backbones.fpn import FPN
from heads.backbones.resnet import Backbone
from heads.boxes.anchors import Grid, Sizes, anchor_grid, cell_anchors, outside_padding
from heads.boxes.assign import IGNORED, assign_max_iou
from heads.boxes.boxes import DeltaCoder
from heads.boxes.losses import Focal, sigmoid_focal_loss, smooth_l1_loss
from heads.boxes.matched import labels_of, positives_of
from heads.boxes.rows import initialise_predictors, predict_rows
from heads.boxes.selection import Candidates, Selection
from heads.dense.head import DenseHead
from heads.dense.towers import ConvTowers
from heads.detector import Detector
from heads.dyhead.dyhead import DyHead
from heads.ranks import normaliser
from heads.targets import Target


@dataclass(frozen=True, kw_only=True)
class RetinaNetConvention:
    """The details in which the two releases differ, row by row as in the table above.

    Attributes:
        anchor_order: What varies slowest among a cell's anchors, see `cell_anchors`.
        padding_is_background: Whether anchors in the padding are background; else they take no part.
        low_quality: What becomes of a box's best anchor, see `assign_max_iou`.
        running_normaliser: Whether losses are divided by a running mean of the batch's positives; else by the sum over
            images of max(positives, 1).
        delta_clamp: See `DeltaCoder`.
        selection: The published numbers of the selection of detections.
    """

    anchor_order: Literal["ratio", "size"]
    padding_is_background: bool
    low_quality: Literal["moves", "keeps"]
    running_normaliser: bool
    delta_clamp: Literal["both", "above"]
    selection: Selection


CONVENTIONS = {
    "mmdet": RetinaNetConvention(
        anchor_order="ratio",
        padding_is_background=False,
        low_quality="moves",
        running_normaliser=False,
        delta_clamp="both",
        selection=Selection(iou_threshold=0.5, clip_first=True),
    ),
    "official": RetinaNetConvention(
        anchor_order="size",
        padding_is_background=True,
        low_quality="keeps",
        running_normaliser=True,
        delta_clamp="above",
        selection=Selection(iou_threshold=0.5, clip_first=False),
    ),
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


class RetinaNetHead(DenseHead[RetinaNetOutputs]):
    """Predicts class and box for nine anchors per cell; see the top of this file.

    Args:
        in_channels: Channels of the trunk's maps.
        num_classes: Object classes C, without background.
        strides: Pixels per cell, by level.
        convention: `"mmdet"` or `"official"`.
        anchor_offset: Where in its cell an anchor is centred, in cells.
        anchor_scale: Side of the smallest square anchor in strides.
        scales_per_octave: Sizes of anchors between one such side and its double.
        ratios: Ratios of an anchor's height to its width.
        positive_iou, negative_iou: IoU from which an anchor is positive, and below which it is background.
        pad_divisor: Divisor of the rule of `"mmdet"` for anchors in the padding, see `outside_padding`.
        prior: Class probability that an untrained head predicts.
        focal_alpha, focal_gamma: Constants of the focal loss.
        selection: Which predictions become detections; None for the convention's published numbers.

    Raises:
        ValueError: The convention is unknown.
    """

    class_layers = ("cls_score",)
    running_positives: Tensor

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
        selection: Selection | None = None,
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
        self.focal: Focal = {"alpha": focal_alpha, "gamma": focal_gamma}
        self.selection = selection or self.convention.selection
        self.coder = DeltaCoder(clamp=self.convention.delta_clamp)
        if self.convention.running_normaliser:
            self.register_buffer("running_positives", torch.tensor(100.0))

        self.cls_score = nn.Conv2d(in_channels, self.anchors_per_cell * num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(in_channels, self.anchors_per_cell * 4, 3, padding=1)
        initialise_predictors(self.cls_score, self.bbox_pred, prior=prior)

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

    def targets(self, grid: Grid, targets: list[Target], image_sizes: list[tuple[int, int]]) -> RetinaNetTargets:
        """Assign boxes to anchors. Arguments as in `loss`."""
        boxes = [t["boxes"] for t in targets]
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
        labels = labels_of(matched, [t["labels"] for t in targets], background=self.num_classes)
        positive, target = positives_of(matched, boxes)
        deltas = self.coder.encode(target, grid.anchors[positive % matched.shape[1]])
        return RetinaNetTargets(matched, labels, positive, deltas, counted)

    def normaliser(self, goal: RetinaNetTargets) -> Tensor | int | float:
        """What both losses are divided by; the official running mean moves with every call."""
        if not self.convention.running_normaliser:
            return normaliser((goal.matched >= 0).sum(1).clamp(min=1).sum(), 1, goal.matched)
        positives = normaliser(len(goal.positive), 1, goal.matched)
        self.running_positives.mul_(0.9).add_(0.1 * positives)
        return self.running_positives.clone()

    def loss(
        self, outputs: RetinaNetOutputs, targets: list[Target], image_sizes: list[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """The two losses of a batch, to be summed.

        Args:
            outputs: What `forward` returned.
            targets: One dict an image: `boxes` (n, 4) xyxy in pixels, `labels` (n,) int64 below C; n may be 0.
            image_sizes: (height, width) of each image before padding.

        Returns:
            `loss_cls`, `loss_bbox`: scalars.
        """
        goal = self.targets(self.grid(outputs), targets, image_sizes)
        count = self.normaliser(goal)
        predicted = outputs.deltas.flatten(0, 1)[goal.positive]
        return {
            "loss_cls": sigmoid_focal_loss(
                outputs.logits, goal.labels, normaliser=count, weight=goal.counted, **self.focal
            ),
            "loss_bbox": smooth_l1_loss(predicted, goal.deltas, normaliser=count),
        }

    def candidates_of(self, outputs: RetinaNetOutputs) -> Candidates:
        """See `DenseHead.candidates_of`."""
        grid, probabilities = self.grid(outputs), outputs.logits.sigmoid()

        def read(image: int | Tensor, anchor: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
            boxes = self.coder.decode(outputs.deltas[image, anchor], grid.anchors[anchor])
            return boxes, probabilities[image, anchor, label]

        return Candidates(probabilities, grid.counts, read)


def retinanet(backbone: Backbone, num_classes: int, channels: int, dyhead: DyHead | None) -> Detector:
    """RetinaNet as mmdetection trains it; DyHead replaces both towers."""
    head = RetinaNetHead(in_channels=channels, num_classes=num_classes, strides=FPN.strides)
    fpn = FPN(backbone.channels, channels, p6_from="c5")
    return Detector(backbone, fpn, dyhead or ConvTowers(channels, norm=False), head)
