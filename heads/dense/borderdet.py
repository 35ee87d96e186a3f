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
  1,000 best of a level by it, suppression at IoU 0.6 within a class, 100 boxes, clipped after the suppression.

DyHead takes the place of the FCOS towers; both branches read its maps.

Deviations: an image without boxes raises an error in the authors' code and is all background here. Instance norm of a
map of one cell gives 0; PyTorch's module refuses it. The convolutions of the branches start at the published variance
for the published 256 channels and keep the variance of a sum for fewer. Suppression compares class labels instead of
shifting boxes by class.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.backbones.fpn import FPN
from heads.backbones.resnet import ResNet
from heads.boxes.anchors import Sizes, level_points
from heads.boxes.assign import assign_max_iou
from heads.boxes.boxes import decode_distances
from heads.boxes.losses import sigmoid_focal_loss, smooth_l1_loss
from heads.boxes.selection import best_per_level, detections, predict_rows
from heads.dense.fcos import FCOSHead
from heads.dense.towers import ConvTowers
from heads.detector import Detector
from heads.dyhead.dyhead import DyHead
from kernels import border_align


class BorderBranch(nn.Module):
    """Features of the borders of one box per cell.

    Args:
        channels: of the map that comes and goes.
        border_channels: that each border, and the cell itself, is read in.
        pool_size: see `border_align`.
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
            nn.init.zeros_(conv.bias)

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        """Maps (N, C, H, W) and, in cells, a box (N, H * W, 4) for each cell -> (N, C, H, W)."""
        # The instance norm; `nn.InstanceNorm2d` refuses maps of one cell.
        maps = torch.group_norm(self.split(features), 5 * self.border_channels, eps=1e-5).relu()
        borders = border_align(maps[:, : 4 * self.border_channels], boxes, self.pool_size)
        borders = borders.permute(0, 3, 1, 2).reshape(len(maps), -1, *maps.shape[2:])
        return F.relu(self.join(torch.cat([borders, maps[:, 4 * self.border_channels :]], 1)), inplace=True)


class BorderDetOutputs(NamedTuple):
    """What the head predicts for a batch, one row per point: A points, levels in order, row by row.

    Attributes:
        logits, raw, centerness: of the first stage, see `FCOSOutputs`.
        border_logits: (N, A, C) class logits of the box.
        border_deltas: (N, A, 4) by how much the sides miss, in `border_std` box sides.
        boxes: (N, A, 4) of the first stage, in pixels, without gradient.
        sizes: (height, width) of each level's map.
    """

    logits: Tensor
    raw: Tensor
    centerness: Tensor
    border_logits: Tensor
    border_deltas: Tensor
    boxes: Tensor
    sizes: Sizes


class BorderDetHead(FCOSHead):
    """FCOS and a second stage that reads the borders of its boxes; see the top of this file.

    Args:
        in_channels: of the trunk's maps.
        border_channels: of the branch for classes and of that for boxes.
        pool_size: steps along each border.
        border_iou: from which a box of the first stage is positive.
        border_std: box sides that are the unit of the second stage's deltas.
        **settings: of `FCOSHead`.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        border_channels: tuple[int, int] = (256, 128),
        pool_size: int = 10,
        border_iou: float = 0.6,
        border_std: float = 0.5,
        prior: float = 0.01,
        **settings,
    ):
        super().__init__(in_channels=in_channels, prior=prior, **{"least_centerness": 1.0} | settings)
        self.border_iou, self.border_std = border_iou, border_std
        self.cls_branch = BorderBranch(in_channels, border_channels[0], pool_size)
        self.reg_branch = BorderBranch(in_channels, border_channels[1], pool_size)
        self.border_cls = nn.Conv2d(in_channels, self.num_classes, 1)
        self.border_reg = nn.Conv2d(in_channels, 4, 1)
        for predictor in (self.border_cls, self.border_reg):
            nn.init.normal_(predictor.weight, std=0.01)
            nn.init.zeros_(predictor.bias)
        nn.init.constant_(self.border_cls.bias, -math.log((1 - prior) / prior))

    def forward(self, cls_features: list[Tensor], reg_features: list[Tensor]) -> BorderDetOutputs:
        """Predict from the trunk's maps (N, C, H_l, W_l); both lists may be the same one, as with DyHead."""
        first = super().forward(cls_features, reg_features)
        # Points without the cache of grids, which must not be filled while tensors are stand-ins that hold no numbers.
        points = level_points(first.sizes, self.strides, 0.5, first.raw.device)
        raw = first.raw.detach().split([len(p) for p in points], 1)
        boxes, of_classes, of_boxes = [], [], []
        by_level = zip(cls_features, reg_features, raw, points, self.strides, strict=True)
        for for_classes, for_boxes, distances, point, stride in by_level:
            height, width = for_boxes.shape[2:]
            box = decode_distances(self.distances(distances, stride), point)
            cells = (box / stride).clamp(min=0).minimum(box.new_tensor([width - 1, height - 1] * 2))
            boxes.append(box)
            of_classes.append(self.cls_branch(for_classes, cells))
            of_boxes.append(self.reg_branch(for_boxes, cells))
        (border_logits,) = predict_rows(of_classes, self.border_cls)
        (border_deltas,) = predict_rows(of_boxes, self.border_reg)
        return BorderDetOutputs(*first[:3], border_logits, border_deltas, torch.cat(boxes, 1), first.sizes)

    def border_targets(self, outputs: BorderDetOutputs, targets: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
        """What the first stage's boxes learn: labels (N, A), the indices of positive ones, their deltas."""
        boxes = [t["boxes"] for t in targets]
        matched = assign_max_iou(outputs.boxes, boxes, self.border_iou, self.border_iou, low_quality=None)
        background = torch.tensor([self.num_classes], device=matched.device)
        # An index of -1 reads the last entry: background.
        labels = torch.cat([*(t["labels"] for t in targets), background])[matched]
        flat = matched.flatten()
        positive = (flat >= 0).nonzero()[:, 0]
        box = outputs.boxes.flatten(0, 1)[positive]
        return labels, positive, (torch.cat(boxes)[flat[positive]] - box) / self._unit(box)

    def _unit(self, boxes: Tensor) -> Tensor:
        sides = boxes[..., 2:] - boxes[..., :2]
        return torch.cat([sides, sides], -1) * self.border_std

    def loss(
        self, outputs: BorderDetOutputs, targets: list[dict], image_sizes: list[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """The five losses of a batch, to be summed: those of FCOS, and `loss_border_cls` and `loss_border_bbox`.

        Arguments as in `FCOSHead.loss`.
        """
        labels, positive, deltas = self.border_targets(outputs, targets)
        normaliser = max(len(positive), 1)
        predicted = outputs.border_deltas.flatten(0, 1)[positive]
        return super().loss(outputs, targets, image_sizes) | {
            "loss_border_cls": sigmoid_focal_loss(outputs.border_logits, labels, normaliser=normaliser, **self.focal),
            "loss_border_bbox": smooth_l1_loss(predicted, deltas, normaliser=normaliser),
        }

    @torch.no_grad()
    def predict(self, outputs: BorderDetOutputs, image_sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Detections, one dict an image, by falling score.

        Args:
            outputs: of `forward`.
            image_sizes: (height, width) of each image before padding.

        Returns:
            `boxes` (K, 4) xyxy in pixels, clipped to the image; `scores` (K,); `labels` (K,) int64.
        """
        counts = self.grid(outputs).counts
        first = (outputs.logits.sigmoid() * outputs.centerness.sigmoid()[..., None]).sqrt()
        both = first * outputs.border_logits.sigmoid()
        results = []
        for image, size in enumerate(image_sizes):
            point, label = best_per_level(
                first[image], self.score_threshold, self.candidates_per_level, counts, both[image]
            )
            box = outputs.boxes[image, point]
            box = box + outputs.border_deltas[image, point] * self._unit(box)
            score = both[image, point, label].sqrt()
            results.append(
                detections(box, score, label, size, self.iou_threshold, self.max_detections, clip_first=False)
            )
        return results


def borderdet(body: ResNet, num_classes: int, channels: int, dyhead: DyHead | None) -> Detector:
    """BorderDet; DyHead takes the place of the towers of its first stage."""
    head = BorderDetHead(
        in_channels=channels,
        num_classes=num_classes,
        strides=FPN.strides,
        border_channels=(channels, channels // 2),
    )
    fpn = FPN(body.channels, channels, relu_before_p7=True)
    return Detector(body, fpn, dyhead or ConvTowers(channels, bias=True), head)
