"""ATSS (Zhang, Chi, Yao, Lei, Li, CVPR 2020): its prediction head; `heads/dense/towers.py` has its towers.

Ingredients, as published:
- one square anchor per cell, eight strides wide; 9 candidates per level, IoU threshold mean + standard deviation;
- towers of four 3×3 convolutions with GroupNorm and ReLU for classification, four more for boxes and centerness;
- focal loss (alpha 0.25, gamma 2, prior 0.01), 2 × GIoU loss weighted by centerness, cross-entropy of centerness;
- a learned scale on each level's box deltas; deltas with weights 10, 10, 5, 5;
- detections: class probability above 0.05, the 1,000 best of a level, score = probability × centerness (no root),
  NMS at IoU 0.6 within a class, 100 boxes.

Two releases of ATSS with DyHead differ in details that move losses and detections; `convention` selects one:

| detail                      | "mmdet" (mmdetection 3.3)                | "official" (DynamicHead, detectron2)  |
|-----------------------------|------------------------------------------|---------------------------------------|
| anchors in the padding      | take no part                             | are background                        |
| classification divided by   | sum over images of max(positives, 1)     | max(positives of the batch, 1)        |
| box loss divided by         | max(sum of centerness targets, 1)        | sum of centerness targets             |
| GIoU's guard                | union and enclosing area at least 1e-6   | 1e-7 added to both                    |
| width and height deltas     | clamped on both sides                    | clamped from above                    |
| the 1,000 best of a level by| class probability                        | class probability × centerness        |
| boxes clipped to the image  | before NMS                               | after NMS                             |

They also differ in settings that have arguments of their own: the official model centres anchors in their cells
(`anchor_offset=0.5`, as does mmdetection's "r50-caffe" DyHead configuration) and predicts with 1×1 convolutions;
mmdetection's ATSS and its "r50" DyHead configuration use offset 0 and 3×3 convolutions. `build_detector("atss")`
follows "mmdet" with the anchors and predictors of the official model.

Deviations: an image without boxes raises an error in the official code and is all background here. NMS compares class
labels instead of shifting boxes by class, and ties go by order (see `kernels/regions/nms.py`, `heads/boxes/assign.py`).
Targets stay boxes; the official code encodes and decodes them. mmdetection's pad_shape is recomputed from the image's
size, and the 1.2e-7 it adds to every normaliser is left out. Towers of fewer than 256 channels start with the published
variance of a sum, not of a weight (`heads/dense/towers.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from heads.backbones.fpn import FPN
from heads.backbones.resnet import Backbone
from heads.boxes.anchors import Grid, Sizes, anchor_grid, cell_anchors, outside_padding
from heads.boxes.assign import assign_atss
from heads.boxes.boxes import DeltaCoder, centerness_of, encode_distances
from heads.boxes.losses import Focal, centerness_loss, giou_loss, sigmoid_focal_loss
from heads.boxes.matched import labels_of, positives_of
from heads.boxes.rows import initialise_predictors, predict_rows
from heads.boxes.selection import Candidates, Selection
from heads.dense.head import DenseHead
from heads.dense.towers import ConvTowers, LevelScales
from heads.detector import Detector
from heads.dyhead.dyhead import DyHead
from heads.ranks import normaliser
from heads.targets import Target


@dataclass(frozen=True, kw_only=True)
class ATSSConvention:
    """The details in which the two releases differ, row by row as in the table above.

    Attributes:
        padding_is_background: Whether anchors in the padding are background; else they take no part.
        empty_images_count: Whether the classification loss is divided by the sum over images of max(positives, 1); else
            by max(positives of the batch, 1).
        least_centerness: The least that the box loss is divided by.
        giou_eps, giou_eps_rule: See `giou`.
        delta_clamp: See `DeltaCoder`.
        rank_by_product: Whether the best of a level are chosen by class probability × centerness; else by class
            probability.
        selection: The published numbers of the selection of detections.
    """

    padding_is_background: bool
    empty_images_count: bool
    least_centerness: float
    giou_eps: float
    giou_eps_rule: Literal["max", "add"]
    delta_clamp: Literal["both", "above"]
    rank_by_product: bool
    selection: Selection


CONVENTIONS = {
    "mmdet": ATSSConvention(
        padding_is_background=False,
        empty_images_count=True,
        least_centerness=1.0,
        giou_eps=1e-6,
        giou_eps_rule="max",
        delta_clamp="both",
        rank_by_product=False,
        selection=Selection(iou_threshold=0.6, clip_first=True),
    ),
    "official": ATSSConvention(
        padding_is_background=True,
        empty_images_count=False,
        # The smallest normal number stands for "not clamped": it only turns 0 / 0 of a batch without boxes into 0.
        least_centerness=torch.finfo(torch.float32).tiny,
        giou_eps=1e-7,
        giou_eps_rule="add",
        delta_clamp="above",
        rank_by_product=True,
        selection=Selection(iou_threshold=0.6, clip_first=False),
    ),
}


class ATSSOutputs(NamedTuple):
    """What the head predicts for a batch, one row per anchor: A anchors, levels in order, row by row.

    Attributes:
        logits: (N, A, C) class logits.
        deltas: (N, A, 4) dx, dy, dw, dh, scaled.
        centerness: (N, A) logits.
        sizes: (height, width) of each level's map.
    """

    logits: Tensor
    deltas: Tensor
    centerness: Tensor
    sizes: Sizes


class ATSSTargets(NamedTuple):
    """What a batch is trained towards; P anchors of the batch are positive.

    Attributes:
        matched: (N, A) int64, index into the batch's boxes, or -1.
        labels: (N, A) int64, C for background.
        positive: (P,) int64, indices into the N * A anchors.
        anchors: (P, 4) of the positive ones.
        boxes: (P, 4).
        centerness: (P,) in [0, 1].
        valid: (N, A) bool, which anchors count; None for all.
    """

    matched: Tensor
    labels: Tensor
    positive: Tensor
    anchors: Tensor
    boxes: Tensor
    centerness: Tensor
    valid: Tensor | None


class ATSSHead(DenseHead[ATSSOutputs]):
    """Predicts class, box and centerness for one anchor per cell; see the top of this file.

    Args:
        in_channels: Channels of the trunk's maps.
        num_classes: Object classes C, without background.
        strides: Pixels per cell, by level.
        kernel_size: Side of the predictors' kernels, odd.
        convention: `"mmdet"` or `"official"`.
        anchor_offset: Where in its cell an anchor is centred, in cells.
        anchor_scale: Side of an anchor in strides.
        candidates: Anchors of a level that the assignment considers for a box.
        pad_divisor: Divisor of the rule of `"mmdet"` for anchors in the padding, its `pad_size_divisor`; see
            `outside_padding`.
        prior: Class probability that an untrained head predicts.
        focal_alpha, focal_gamma: Constants of the focal loss.
        box_weight: Weight of the GIoU loss.
        selection: Which predictions become detections; None for the convention's published numbers.

    Raises:
        ValueError: The convention is unknown.
    """

    class_layers = ("cls_logits",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        kernel_size: int = 1,
        convention: Literal["mmdet", "official"] = "mmdet",
        anchor_offset: float = 0.5,
        anchor_scale: float = 8.0,
        candidates: int = 9,
        pad_divisor: int = 32,
        prior: float = 0.01,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        box_weight: float = 2.0,
        selection: Selection | None = None,
    ):
        super().__init__()
        if convention not in CONVENTIONS:
            raise ValueError(f"unknown convention {convention!r}; the conventions are {', '.join(CONVENTIONS)}")
        self.convention = CONVENTIONS[convention]
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.cells = [cell_anchors([anchor_scale * stride]) for stride in strides]
        self.anchor_offset = anchor_offset
        self.candidates = candidates
        self.pad_divisor = pad_divisor
        self.focal: Focal = {"alpha": focal_alpha, "gamma": focal_gamma}
        self.box_weight = box_weight
        self.selection = selection or self.convention.selection
        self.coder = DeltaCoder(stds=(0.1, 0.1, 0.2, 0.2), clamp=self.convention.delta_clamp)

        padding = kernel_size // 2
        self.cls_logits = nn.Conv2d(in_channels, num_classes, kernel_size, padding=padding)
        self.bbox_pred = nn.Conv2d(in_channels, 4, kernel_size, padding=padding)
        self.centerness = nn.Conv2d(in_channels, 1, kernel_size, padding=padding)
        self.scales = LevelScales(len(strides))
        initialise_predictors(self.cls_logits, self.bbox_pred, self.centerness, prior=prior)

    def forward(self, cls_features: list[Tensor], reg_features: list[Tensor]) -> ATSSOutputs:
        """Predict from the trunk's maps (N, C, H_l, W_l); both lists may be the same one, as with DyHead."""
        sizes = tuple((f.shape[2], f.shape[3]) for f in reg_features)
        # One convolution does the work of those that read the same map.
        if cls_features is reg_features:
            logits, deltas, centerness = predict_rows(reg_features, self.cls_logits, self.bbox_pred, self.centerness)
        else:
            (logits,) = predict_rows(cls_features, self.cls_logits)
            deltas, centerness = predict_rows(reg_features, self.bbox_pred, self.centerness)
        return ATSSOutputs(logits, deltas * self.scales.rows(sizes), centerness[..., 0], sizes)

    def grid(self, outputs: ATSSOutputs) -> Grid:
        """The anchors of `outputs`, in the order of its rows."""
        return anchor_grid(outputs.sizes, self.strides, self.cells, self.anchor_offset, outputs.deltas.device)

    def targets(self, grid: Grid, targets: list[Target], image_sizes: list[tuple[int, int]]) -> ATSSTargets:
        """Assign boxes to anchors. Arguments as in `loss`."""
        boxes = [t["boxes"] for t in targets]
        valid_sizes = valid = None
        if not self.convention.padding_is_background:
            valid_sizes, valid = outside_padding(grid, image_sizes, self.pad_divisor)
        matched = assign_atss(grid, boxes, self.candidates, valid_sizes)
        labels = labels_of(matched, [t["labels"] for t in targets], background=self.num_classes)
        positive, target = positives_of(matched, boxes)
        cell = positive % matched.shape[1]
        central = centerness_of(encode_distances(target, grid.centres[cell]))
        return ATSSTargets(matched, labels, positive, grid.anchors[cell], target, central, valid)

    def loss(
        self, outputs: ATSSOutputs, targets: list[Target], image_sizes: list[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """The three losses of a batch, to be summed.

        Args:
            outputs: What `forward` returned.
            targets: One dict an image: `boxes` (n, 4) xyxy in pixels, `labels` (n,) int64 below C; n may be 0.
            image_sizes: (height, width) of each image before padding.

        Returns:
            `loss_cls`, `loss_bbox`, `loss_centerness`: scalars.
        """
        rule, grid = self.convention, self.grid(outputs)
        goal = self.targets(grid, targets, image_sizes)
        per_image = (goal.matched >= 0).sum(1).clamp(min=1)
        positives = per_image.sum() if rule.empty_images_count else len(goal.positive)
        count = normaliser(positives, 1, outputs.logits)
        predicted = self.coder.decode(outputs.deltas.flatten(0, 1)[goal.positive], goal.anchors)
        return {
            "loss_cls": sigmoid_focal_loss(
                outputs.logits, goal.labels, normaliser=count, weight=goal.valid, **self.focal
            ),
            "loss_bbox": self.box_weight
            * giou_loss(
                predicted,
                goal.boxes,
                weight=goal.centerness,
                normaliser=normaliser(goal.centerness.sum(), rule.least_centerness, outputs.logits),
                eps=rule.giou_eps,
                eps_rule=rule.giou_eps_rule,
            ),
            "loss_centerness": centerness_loss(
                outputs.centerness.flatten()[goal.positive], goal.centerness, normaliser=count
            ),
        }

    def candidates_of(self, outputs: ATSSOutputs) -> Candidates:
        """See `DenseHead.candidates_of`."""
        rule, grid = self.convention, self.grid(outputs)
        probabilities, centerness = outputs.logits.sigmoid(), outputs.centerness.sigmoid()

        def read(image: int | Tensor, anchor: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
            boxes = self.coder.decode(outputs.deltas[image, anchor], grid.anchors[anchor])
            return boxes, probabilities[image, anchor, label] * centerness[image, anchor]

        rank = probabilities * centerness[..., None] if rule.rank_by_product else None
        return Candidates(probabilities, grid.counts, read, rank)


def atss(backbone: Backbone, num_classes: int, channels: int, dyhead: DyHead | None) -> Detector:
    """ATSS; DyHead replaces both towers. Either is followed by the 1×1 predictors of the authors' code."""
    head = ATSSHead(in_channels=channels, num_classes=num_classes, strides=FPN.strides)
    return Detector(backbone, FPN(backbone.channels, channels), dyhead or ConvTowers(channels), head)
