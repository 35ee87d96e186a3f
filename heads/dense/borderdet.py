"""BorderDet (Qiu, Ma, Li, Liu, Sun, ECCV 2020): its prediction head, a second look at what FCOS predicts.

Ingredients, as published (the authors' code, `borderdet.res50.fpn.coco.800size.1x`):
- the improved FCOS of `heads/dense/fcos.py` with its towers, points, assignment and losses, all as they are there; the
  box loss is divided by at least 1;
- every point's box is looked at again along its borders: a 1×1 convolution, instance norm and ReLU make five groups of
  channels, `kernels/regions/border_align.py` takes the maximum of 11 samples on each border from a group of its own,
  the fifth is read at the point itself, and a 1×1 convolution with ReLU joins them. Classification has a branch of 256
  channels a group, boxes one of 128, at 256 channels of the pyramid; boxes are cut to the map and not differentiated;
- a box whose IoU with an object is at least 0.6 is positive: focal loss on its class and L1 on what its sides miss, in
  halves of the box's sides, both divided by the number of positives;
- detections: the root of probability × centerness above 0.05, score = root of (that root × border probability), the
  1,000 best of a level by it, NMS at IoU 0.6 within a class, 100 boxes, clipped after NMS.

DyHead replaces the FCOS towers; both branches read its maps.

Deviations: an image without boxes raises an error in the authors' code and is all background here. Instance norm of a
map of one cell gives 0; PyTorch's module refuses it. The convolutions of the branches start at the published variance
for the published 256 channels and keep the variance of a sum for fewer. NMS compares class labels instead of shifting
boxes by class.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.backbones.fpn import FPN
from heads.backbones.resnet import Backbone
from heads.boxes.anchors import Sizes, level_points
from heads.boxes.assign import assign_max_iou
from heads.boxes.boxes import clip_boxes, decode_distances
from heads.boxes.losses import sigmoid_focal_loss, smooth_l1_loss
from heads.boxes.matched import labels_of, positives_of
from heads.boxes.rows import bias_of, initialise_predictors, predict_rows
from heads.boxes.selection import Candidates, Selection
from heads.dense.fcos import RANGES, PointHead
from heads.dense.towers import ConvTowers
from heads.detector import Detector
from heads.dyhead.dyhead import DyHead
from heads.ranks import normaliser
from heads.targets import Target
from kernels import border_align


class BorderBranch(nn.Module):
    """Features of the borders of one box per cell.

    Args:
        channels: Channels of the map, in and out.
        border_channels: Channels in which each border, and the cell itself, is read.
        pool_size: Steps along a border, see `border_align`.
    """

    def __init__(self, channels: int, border_channels: int, pool_size: int = 10):
        super().__init__()
        self.border_channels = border_channels
        self.pool_size = pool_size
        # Four borders, then the cell itself.
        self.split = nn.Conv2d(channels, 5 * border_channels, 1)
        self.join = nn.Conv2d(5 * border_channels, channels, 1)
        for conv in (self.split, self.join):
            nn.init.normal_(conv.weight, std=0.01 * math.sqrt(256 / channels))
            nn.init.zeros_(bias_of(conv))

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        """Read the borders of the boxes.

        Args:
            features: (N, C, H, W).
            boxes: (N, H * W, 4), a box for each cell, in cells.

        Returns:
            (N, C, H, W).
        """
        # The instance norm; `nn.InstanceNorm2d` refuses maps of one cell.
        maps = torch.group_norm(self.split(features), 5 * self.border_channels, eps=1e-5).relu()
        borders = border_align(maps[:, : 4 * self.border_channels], boxes, self.pool_size)
        borders = borders.permute(0, 3, 1, 2).flatten(1, 2).unflatten(2, maps.shape[2:])
        return F.relu(self.join(torch.cat([borders, maps[:, 4 * self.border_channels :]], 1)), inplace=True)


class BorderDetOutputs(NamedTuple):
    """What the head predicts for a batch, one row per point: A points, levels in order, row by row.

    Attributes:
        logits, raw, centerness: What the first stage predicts, see `FCOSOutputs`.
        border_logits: (N, A, C) class logits of the box.
        border_deltas: (N, A, 4), by how much the sides miss, in `border_std` box sides.
        boxes: (N, A, 4), those of the first stage, in pixels, without gradient.
        sizes: (height, width) of each level's map.
    """

    logits: Tensor
    raw: Tensor
    centerness: Tensor
    border_logits: Tensor
    border_deltas: Tensor
    boxes: Tensor
    sizes: Sizes


# The published selection of detections.
SELECTION = Selection(iou_threshold=0.6, clip_first=False)


class BorderDetHead(PointHead[BorderDetOutputs]):
    """FCOS and a second stage that reads the borders of its boxes; see the top of this file.

    Args:
        in_channels: Channels of the trunk's maps.
        num_classes: Object classes C, without background.
        strides: Pixels per cell, by level.
        border_channels: Channels of the branch for classes and of that for boxes.
        pool_size: Steps along each border.
        border_iou: IoU from which a box of the first stage is positive.
        border_std: Unit of the second stage's deltas, in box sides.
        recipe, ranges, least_centerness, prior, focal_alpha, focal_gamma: See `PointHead`.
        selection: Which predictions become detections.
    """

    class_layers = ("cls_logits", "border_cls")

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        border_channels: tuple[int, int] = (256, 128),
        pool_size: int = 10,
        border_iou: float = 0.6,
        border_std: float = 0.5,
        recipe: Literal["improved", "plain"] = "improved",
        ranges: Sequence[tuple[float, float]] = RANGES,
        least_centerness: float = 1.0,
        prior: float = 0.01,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        selection: Selection = SELECTION,
    ):
        super().__init__(
            in_channels=in_channels,
            num_classes=num_classes,
            strides=strides,
            recipe=recipe,
            ranges=ranges,
            least_centerness=least_centerness,
            prior=prior,
            focal_alpha=focal_alpha,
            focal_gamma=focal_gamma,
            selection=selection,
        )
        self.border_iou, self.border_std = border_iou, border_std
        self.cls_branch = BorderBranch(in_channels, border_channels[0], pool_size)
        self.reg_branch = BorderBranch(in_channels, border_channels[1], pool_size)
        self.border_cls = nn.Conv2d(in_channels, self.num_classes, 1)
        self.border_reg = nn.Conv2d(in_channels, 4, 1)
        initialise_predictors(self.border_cls, self.border_reg, prior=prior)

    def forward(self, cls_features: list[Tensor], reg_features: list[Tensor]) -> BorderDetOutputs:
        """Predict from the trunk's maps (N, C, H_l, W_l); both lists may be the same one, as with DyHead."""
        first = self.predict_points(cls_features, reg_features)
        # Points without the cache of grids, which must not be filled while tensors are stand-ins that hold no numbers.
        points = level_points(first.sizes, self.strides, 0.5, first.raw.device)
        raw = first.raw.detach().split([p.shape[0] for p in points], 1)
        boxes, of_classes, of_boxes = [], [], []
        by_level = zip(cls_features, reg_features, raw, points, self.strides, strict=True)
        for for_classes, for_boxes, distances, point, stride in by_level:
            height, width = for_boxes.shape[2:]
            box = decode_distances(self.distances(distances, stride), point)
            cells = clip_boxes(box / stride, (height - 1, width - 1))
            boxes.append(box)
            of_classes.append(self.cls_branch(for_classes, cells))
            of_boxes.append(self.reg_branch(for_boxes, cells))
        (border_logits,) = predict_rows(of_classes, self.border_cls)
        (border_deltas,) = predict_rows(of_boxes, self.border_reg)
        return BorderDetOutputs(*first[:3], border_logits, border_deltas, torch.cat(boxes, 1), first.sizes)

    def border_targets(self, outputs: BorderDetOutputs, targets: list[Target]) -> tuple[Tensor, Tensor, Tensor]:
        """What the first stage's boxes learn.

        Returns:
            (N, A) int64 labels, C for background; (P,) int64 indices of the positive boxes; their deltas (P, 4).
        """
        boxes = [t["boxes"] for t in targets]
        matched = assign_max_iou(outputs.boxes, boxes, self.border_iou, self.border_iou, low_quality=None)
        labels = labels_of(matched, [t["labels"] for t in targets], background=self.num_classes)
        positive, target = positives_of(matched, boxes)
        box = outputs.boxes.flatten(0, 1)[positive]
        return labels, positive, (target - box) / self._unit(box)

    def _unit(self, boxes: Tensor) -> Tensor:
        sides = boxes[..., 2:] - boxes[..., :2]
        return torch.cat([sides, sides], -1) * self.border_std

    def loss(
        self, outputs: BorderDetOutputs, targets: list[Target], image_sizes: list[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """The five losses of a batch, to be summed: those of FCOS, and `loss_border_cls` and `loss_border_bbox`.

        Arguments as in `PointHead.loss`.
        """
        labels, positive, deltas = self.border_targets(outputs, targets)
        count = normaliser(len(positive), 1, outputs.logits)
        predicted = outputs.border_deltas.flatten(0, 1)[positive]
        return super().loss(outputs, targets, image_sizes) | {
            "loss_border_cls": sigmoid_focal_loss(outputs.border_logits, labels, normaliser=count, **self.focal),
            "loss_border_bbox": smooth_l1_loss(predicted, deltas, normaliser=count),
        }

    def candidates_of(self, outputs: BorderDetOutputs) -> Candidates:
        """See `DenseHead.candidates_of`."""
        counts = self.grid(outputs).counts
        first = (outputs.logits.sigmoid() * outputs.centerness.sigmoid()[..., None]).sqrt()
        both = first * outputs.border_logits.sigmoid()

        def read(image: int | Tensor, point: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
            box = outputs.boxes[image, point]
            box = box + outputs.border_deltas[image, point] * self._unit(box)
            return box, both[image, point, label].sqrt()

        return Candidates(first, counts, read, rank=both)


def borderdet(backbone: Backbone, num_classes: int, channels: int, dyhead: DyHead | None) -> Detector:
    """BorderDet; DyHead replaces the towers of its first stage."""
    head = BorderDetHead(
        in_channels=channels,
        num_classes=num_classes,
        strides=FPN.strides,
        border_channels=(channels, channels // 2),
    )
    fpn = FPN(backbone.channels, channels, relu_before_p7=True)
    return Detector(backbone, fpn, dyhead or ConvTowers(channels, bias=True), head)
