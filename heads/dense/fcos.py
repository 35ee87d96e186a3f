"""FCOS (Tian, Shen, Chen, He, ICCV 2019): its prediction head; `heads/dense/towers.py` has its towers.

Ingredients, as published:
- one point in the middle of every cell, which predicts its distances to the four sides of a box, and no anchors;
- a point learns the smallest box it lies in, if the farthest side is 0…64, 64…128, 128…256, 256…512 or 512…∞ pixels
  away, by level;
- towers of four 3×3 convolutions with GroupNorm and ReLU for each task, 3×3 predictors, a learned scale by level; P6
  convolved from P5, and a ReLU before P7;
- focal loss (alpha 0.25, gamma 2, prior 0.01) and cross-entropy of centerness, divided by the number of positives; box
  loss weighted by centerness, divided by its sum;
- detections: class probability above 0.05, the 1,000 best of a level, score = probability × centerness, NMS within a
  class, 100 boxes.

DyHead's paper starts from 38.8 AP, which is not the first paper's FCOS but the authors' later one. `recipe` selects:

| detail                      | "improved" (the default)                 | "plain" (the first paper)             |
|-----------------------------|------------------------------------------|---------------------------------------|
| centre sampling             | within 1.5 strides of the box's centre   | none                                  |
| distances                   | in strides, not below 0 by a ReLU        | in pixels, exponential                |
| box loss                    | 1 - GIoU                                 | -log IoU                              |
| centerness is predicted from| the regression tower                     | the classification tower              |
| NMS at IoU                  | 0.6                                      | 0.5                                   |

Both follow mmdetection 3.3 (`fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco` and the same without
the suffixes), in which points in the padding are background.

Deviations: the authors' own code ranks the candidates of a level by probability × centerness and takes the root of that
product as the score; mmdetection does neither. NMS compares class labels instead of shifting boxes by class. The 1.2e-7
that mmdetection adds to every normaliser is left out, and overlaps are computed in pixels, not in strides, which
matters to the guard of their divisions alone. Towers of fewer than 256 channels start with the published variance of a
sum, not of a weight (`heads/dense/towers.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from heads.backbones.fpn import FPN
from heads.backbones.resnet import Backbone
from heads.boxes.anchors import Grid, Sizes, point_grid
from heads.boxes.assign_points import assign_centre
from heads.boxes.boxes import centerness_of, decode_distances, encode_distances
from heads.boxes.losses import Focal, centerness_loss, giou_loss, iou_loss, sigmoid_focal_loss
from heads.boxes.matched import labels_of, positives_of
from heads.boxes.rows import initialise_predictors, predict_rows
from heads.boxes.selection import Candidates, Selection
from heads.dense.head import DenseHead
from heads.dense.towers import ConvTowers, LevelScales
from heads.detector import Detector
from heads.dyhead.dyhead import DyHead
from heads.ranks import normaliser
from heads.targets import Target

# Distances to the farthest side, in pixels, that a level is for.
RANGES = ((-1.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, math.inf))


@dataclass(frozen=True, kw_only=True)
class FCOSRecipe:
    """The details in which the two recipes differ, row by row as in the table above.

    Attributes:
        centre_radius: How far from a box's centre its points may lie, in strides; None for no limit.
        in_strides: Whether distances are predicted in strides, cut at 0; else in pixels, as logarithms.
        box_loss: `"giou"` for 1 - GIoU, `"iou"` for -log IoU.
        centerness_from: The tower that centerness is predicted from.
        selection: The published numbers of the selection of detections.
    """

    centre_radius: float | None
    in_strides: bool
    box_loss: Literal["giou", "iou"]
    centerness_from: Literal["regression", "classification"]
    selection: Selection


RECIPES = {
    "improved": FCOSRecipe(
        centre_radius=1.5,
        in_strides=True,
        box_loss="giou",
        centerness_from="regression",
        selection=Selection(iou_threshold=0.6, clip_first=True),
    ),
    "plain": FCOSRecipe(
        centre_radius=None,
        in_strides=False,
        box_loss="iou",
        centerness_from="classification",
        selection=Selection(iou_threshold=0.5, clip_first=True),
    ),
}


class FCOSOutputs(NamedTuple):
    """What the head predicts for a batch, one row per point: A points, levels in order, row by row.

    Attributes:
        logits: (N, A, C) class logits.
        raw: (N, A, 4) what `distances` makes left, top, right and bottom of; scaled.
        centerness: (N, A) logits.
        sizes: (height, width) of each level's map.
    """

    logits: Tensor
    raw: Tensor
    centerness: Tensor
    sizes: Sizes


class PointOutputs(Protocol):
    """What FCOS predicts and trains, and what heads that build on FCOS predict among other things."""

    @property
    def logits(self) -> Tensor: ...
    @property
    def raw(self) -> Tensor: ...
    @property
    def centerness(self) -> Tensor: ...
    @property
    def sizes(self) -> Sizes: ...


Outputs = TypeVar("Outputs", bound=PointOutputs)


class FCOSTargets(NamedTuple):
    """What a batch is trained towards; P points of the batch are positive.

    Attributes:
        matched: (N, A) int64, index into the batch's boxes, or `BACKGROUND`.
        labels: (N, A) int64, C for background.
        positive: (P,) int64, indices into the N * A points.
        distances: (P, 4) left, top, right, bottom in pixels.
        strides: (P, 1) pixels per cell.
        centerness: (P,) in (0, 1].
    """

    matched: Tensor
    labels: Tensor
    positive: Tensor
    distances: Tensor
    strides: Tensor
    centerness: Tensor


class PointHead(DenseHead[Outputs]):
    """The layers, the targets and the losses of FCOS, for heads that predict what FCOS does, and maybe more.

    Args:
        in_channels: Channels of the trunk's maps.
        num_classes: Object classes C, without background.
        strides: Pixels per cell, by level.
        recipe: `"improved"` or `"plain"`.
        ranges: Least and largest distance, in pixels, that each level learns.
        least_centerness: The least that the box loss is divided by.
        prior: Class probability that an untrained head predicts.
        focal_alpha, focal_gamma: Constants of the focal loss.
        selection: Which predictions become detections; None for the recipe's published numbers.

    Raises:
        ValueError: The recipe is unknown, or there is not one range for each stride.
    """

    class_layers: ClassVar[tuple[str, ...]] = ("cls_logits",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        recipe: Literal["improved", "plain"] = "improved",
        ranges: Sequence[tuple[float, float]] = RANGES,
        least_centerness: float = 1e-6,
        prior: float = 0.01,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        selection: Selection | None = None,
    ):
        super().__init__()
        if recipe not in RECIPES:
            raise ValueError(f"unknown recipe {recipe!r}; the recipes are {', '.join(RECIPES)}")
        if len(ranges) != len(strides):
            raise ValueError(f"{len(strides)} strides need as many ranges; got {len(ranges)}")
        self.recipe = RECIPES[recipe]
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.ranges = tuple(ranges)
        self.least_centerness = least_centerness
        self.focal: Focal = {"alpha": focal_alpha, "gamma": focal_gamma}
        self.selection = selection or self.recipe.selection

        self.cls_logits = nn.Conv2d(in_channels, num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(in_channels, 1, 3, padding=1)
        self.scales = LevelScales(len(strides))
        initialise_predictors(self.cls_logits, self.bbox_pred, self.centerness, prior=prior)

    def predict_points(self, cls_features: list[Tensor], reg_features: list[Tensor]) -> FCOSOutputs:
        """Predict class, distances and centerness; arguments as in `FCOSHead.forward`."""
        sizes = tuple((f.shape[2], f.shape[3]) for f in reg_features)
        if cls_features is reg_features:
            logits, raw, centerness = predict_rows(reg_features, self.cls_logits, self.bbox_pred, self.centerness)
        elif self.recipe.centerness_from == "regression":
            (logits,) = predict_rows(cls_features, self.cls_logits)
            raw, centerness = predict_rows(reg_features, self.bbox_pred, self.centerness)
        else:
            logits, centerness = predict_rows(cls_features, self.cls_logits, self.centerness)
            (raw,) = predict_rows(reg_features, self.bbox_pred)
        return FCOSOutputs(logits, raw * self.scales.rows(sizes), centerness[..., 0], sizes)

    def grid(self, outputs: PointOutputs) -> Grid:
        """The points of `outputs`, in the order of its rows."""
        return point_grid(outputs.sizes, self.strides, 0.5, outputs.raw.device)

    def row_strides(self, grid: Grid) -> Tensor:
        """(A, 1) float32, pixels per cell of every point."""
        return torch.tensor(grid.strides, dtype=torch.float32, device=grid.centres.device)[grid.levels, None]

    def distances(self, raw: Tensor, strides: Tensor | int) -> Tensor:
        """Left, top, right, bottom in pixels: (..., 4) of a raw prediction (..., 4) and strides (..., 1), or one."""
        return raw.relu() * strides if self.recipe.in_strides else raw.exp()

    def targets(self, grid: Grid, targets: list[Target]) -> FCOSTargets:
        """Assign boxes to points. Targets as in `loss`."""
        boxes = [t["boxes"] for t in targets]
        matched = assign_centre(grid, boxes, self.ranges, self.recipe.centre_radius)
        labels = labels_of(matched, [t["labels"] for t in targets], background=self.num_classes)
        positive, target = positives_of(matched, boxes)
        cell = positive % matched.shape[1]
        distances = encode_distances(target, grid.centres[cell])
        strides = self.row_strides(grid)[cell]
        return FCOSTargets(matched, labels, positive, distances, strides, centerness_of(distances))

    def loss(self, outputs: Outputs, targets: list[Target], image_sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
        """The three losses of a batch, to be summed.

        Args:
            outputs: What `forward` returned.
            targets: One dict an image: `boxes` (n, 4) xyxy in pixels, `labels` (n,) int64 below C; n may be 0.
            image_sizes: (height, width) of each image before padding; the padding is background like the rest.

        Returns:
            `loss_cls`, `loss_bbox`, `loss_centerness`: scalars.
        """
        goal = self.targets(self.grid(outputs), targets)
        count = normaliser(len(goal.positive), 1, outputs.logits)
        raw = outputs.raw.flatten(0, 1)[goal.positive]
        # The overlap of two boxes around the same point, wherever that lies.
        origin = goal.distances.new_zeros(1, 2)
        predicted = decode_distances(self.distances(raw, goal.strides), origin)
        wanted = decode_distances(goal.distances, origin)
        box_loss = giou_loss if self.recipe.box_loss == "giou" else iou_loss
        return {
            "loss_cls": sigmoid_focal_loss(outputs.logits, goal.labels, normaliser=count, **self.focal),
            "loss_bbox": box_loss(
                predicted,
                wanted,
                weight=goal.centerness,
                normaliser=normaliser(goal.centerness.sum(), self.least_centerness, outputs.logits),
            ),
            "loss_centerness": centerness_loss(
                outputs.centerness.flatten()[goal.positive], goal.centerness, normaliser=count
            ),
        }


class FCOSHead(PointHead[FCOSOutputs]):
    """Predicts class, distances and centerness for one point per cell; see the top of this file.

    Arguments are those of `PointHead`.

    Example:
        >>> import torch
        >>> from heads.dense.fcos import FCOSHead
        >>> head = FCOSHead(in_channels=8, num_classes=3, strides=(8, 16), ranges=((0, 64), (64, 512)))
        >>> maps = [torch.randn(2, 8, 4, 6), torch.randn(2, 8, 2, 3)]
        >>> outputs = head(maps, maps)
        >>> outputs.logits.shape
        torch.Size([2, 30, 3])
        >>> len(head.predict(outputs, [(32, 48), (30, 40)]))
        2
    """

    def forward(self, cls_features: list[Tensor], reg_features: list[Tensor]) -> FCOSOutputs:
        """Predict from the trunk's maps (N, C, H_l, W_l); both lists may be the same one, as with DyHead."""
        return self.predict_points(cls_features, reg_features)

    def candidates_of(self, outputs: FCOSOutputs) -> Candidates:
        """See `DenseHead.candidates_of`."""
        grid = self.grid(outputs)
        strides = self.row_strides(grid)
        probabilities, centerness = outputs.logits.sigmoid(), outputs.centerness.sigmoid()

        def read(image: int | Tensor, point: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
            distances = self.distances(outputs.raw[image, point], strides[point])
            boxes = decode_distances(distances, grid.centres[point])
            return boxes, probabilities[image, point, label] * centerness[image, point]

        return Candidates(probabilities, grid.counts, read)


def fcos(backbone: Backbone, num_classes: int, channels: int, dyhead: DyHead | None) -> Detector:
    """FCOS by its improved recipe; DyHead replaces both towers."""
    head = FCOSHead(in_channels=channels, num_classes=num_classes, strides=FPN.strides)
    fpn = FPN(backbone.channels, channels, relu_before_p7=True)
    return Detector(backbone, fpn, dyhead or ConvTowers(channels), head)
