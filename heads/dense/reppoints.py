"""RepPoints (Yang, Liu, Hu, Wang, Lin, ICCV 2019): its prediction head; `heads/dense/towers.py` has its towers.

Ingredients, as published:
- an object is nine points. The first stage predicts them as offsets from the corner of every cell, in strides; the
  second reads the features there, by deformable convolutions whose taps are the points, and moves the points once more;
- a box comes from points by moments: mean ± standard deviation times two learned factors, one across, one down;
- first stage: each box has the one nearest point of its level, and smooth L1 (beta 0.11), weight 0.5; second stage: the
  first stage's boxes are assigned by IoU, positive from 0.5, background below 0.4, smooth L1, weight 1, and focal loss
  (alpha 0.25, gamma 2, prior 0.01); coordinates are in four strides; each stage is divided by its own positives;
- a tenth of the second stage's gradient reaches the offsets of the first, and the learned factors learn a hundredth as
  fast as the rest;
- P6 convolved from C5; towers of three 3×3 convolutions with GroupNorm and ReLU for each task;
- detections: class probability above 0.05, the 1,000 best of a level, NMS at IoU 0.5 within a class, 100 boxes.

The details are mmdetection 3.3's (`reppoints-moment_r50_fpn-gn_head-gn_1x_coco`), where the authors' code lives on.
DyHead replaces the towers; both stages read its maps.

Deviations: the pyramid has no GroupNorm, as in all other detectors here. A box that overlaps no box of the first stage
gets none in the second; mmdetection gives it every one that overlaps it not at all. The 3×3 convolutions of the head
start by He's rule (He et al., ICCV 2015), not with the published standard deviation of 0.01, by which a third of the
signal passes each; in a short schedule the second stage waits for the first. Towers of fewer than 256 channels start
with the published variance of a sum, not of a weight (`heads/dense/towers.py`). NMS compares class labels instead of
shifting boxes by class, and the 1.2e-7 that mmdetection adds to every normaliser is left out.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.backbones.fpn import FPN
from heads.backbones.resnet import Backbone
from heads.boxes.anchors import Grid, Sizes, outside_padding, point_grid
from heads.boxes.assign import IGNORED, assign_max_iou
from heads.boxes.assign_points import assign_nearest
from heads.boxes.losses import Focal, sigmoid_focal_loss, smooth_l1_loss
from heads.boxes.matched import labels_of, positives_of
from heads.boxes.rows import bias_of, flatten_levels
from heads.boxes.selection import Candidates, Selection
from heads.dense.head import DenseHead
from heads.dense.towers import ConvTowers
from heads.detector import Detector
from heads.dyhead.dyhead import DyHead
from heads.ranks import normaliser
from heads.targets import Target
from kernels import deform_conv2d_levels

# The taps of a 3×3 convolution, y and x of each, row by row: where its nine points would be without offsets.
_TAPS = [float(c) for y in (-1, 0, 1) for x in (-1, 0, 1) for c in (y, x)]


# The published selection of detections.
SELECTION = Selection(iou_threshold=0.5, clip_first=True)


def points_to_boxes(points: Tensor, transfer: Tensor) -> Tensor:
    """Boxes (..., 4) x1, y1, x2, y2 of sets of points (..., 2 * P), y and x of each: the mean ± spread of each set.

    Args:
        points: (..., 2 * P), y and x of each point, P of them at least 2.
        transfer: (2,) logarithms of the half width and half height of a box in (unbiased) standard deviations.

    Returns:
        (..., 4).
    """
    xy = points.unflatten(-1, (-1, 2)).flip(-1)
    mean = xy.mean(-2)
    # The norm, unlike a root, has a gradient where all points are one.
    std = torch.linalg.vector_norm(xy - mean[..., None, :], dim=-2) / math.sqrt(xy.shape[-2] - 1)
    half = std * transfer.exp()
    return torch.cat([mean - half, mean + half], -1)


class RepPointsOutputs(NamedTuple):
    """What the head predicts for a batch, one row per cell: A cells, levels in order, row by row.

    Attributes:
        logits: (N, A, C) class logits.
        first: (N, A, 18) offsets of nine points from the corner of the cell, y and x of each, in strides.
        second: (N, A, 18) the same after the second stage.
        sizes: (height, width) of each level's map.
    """

    logits: Tensor
    first: Tensor
    second: Tensor
    sizes: Sizes


class StageTargets(NamedTuple):
    """What one stage is trained towards; P cells of the batch are positive.

    Attributes:
        matched: (N, A) int64, index into the batch's boxes, `BACKGROUND` or `IGNORED`.
        positive: (P,) int64, indices into the N * A cells.
        boxes: (P, 4) in pixels.
        normaliser: What the losses of the stage are divided by.
    """

    matched: Tensor
    positive: Tensor
    boxes: Tensor
    normaliser: Tensor | int | float


class RepPointsHead(DenseHead[RepPointsOutputs]):
    """Predicts class and two sets of nine points for every cell; see the top of this file.

    Args:
        in_channels: Channels of the trunk's maps, and between the two layers of each stage.
        num_classes: Object classes C, without background.
        strides: Pixels per cell, by level; powers of two that double from level to level.
        base_scale: Unit of the box losses, and side of the smallest boxes of a level, in strides.
        gradient_share: Factor of the second stage's gradient where it reaches the first stage's offsets.
        transfer_share: Factor of the gradient of the learned factors of the moments.
        positive_iou, negative_iou: IoU from which a cell is positive in the second stage, and below which it is
            background.
        beta: Where the smooth L1 losses become linear.
        first_weight: Weight of the first stage's box loss.
        pad_divisor: Divisor of the rule for cells in the padding, see `outside_padding`.
        prior: Class probability that an untrained head predicts.
        focal_alpha, focal_gamma: Constants of the focal loss.
        selection: Which predictions become detections.
    """

    class_layers = ("cls_out",)
    taps: Tensor

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        base_scale: float = 4.0,
        gradient_share: float = 0.1,
        transfer_share: float = 0.01,
        positive_iou: float = 0.5,
        negative_iou: float = 0.4,
        beta: float = 0.11,
        first_weight: float = 0.5,
        pad_divisor: int = 32,
        prior: float = 0.01,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        selection: Selection = SELECTION,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.base_scale = base_scale
        self.gradient_share, self.transfer_share = gradient_share, transfer_share
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.beta, self.first_weight = beta, first_weight
        self.pad_divisor = pad_divisor
        self.focal: Focal = {"alpha": focal_alpha, "gamma": focal_gamma}
        self.selection = selection

        self.first_conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.first_out = nn.Conv2d(in_channels, 18, 1)
        # Weights of deformable convolutions, which have no bias.
        self.cls_weight = nn.Parameter(torch.empty(in_channels, in_channels, 3, 3))
        self.cls_out = nn.Conv2d(in_channels, num_classes, 1)
        self.second_weight = nn.Parameter(torch.empty(in_channels, in_channels, 3, 3))
        self.second_out = nn.Conv2d(in_channels, 18, 1)
        self.transfer = nn.Parameter(torch.zeros(2))
        self.register_buffer("taps", torch.tensor(_TAPS).view(1, 18, 1, 1), persistent=False)
        for weight in (self.first_conv.weight, self.cls_weight, self.second_weight):
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
        for out in (self.first_out, self.cls_out, self.second_out):
            nn.init.normal_(out.weight, std=0.01)
            nn.init.zeros_(bias_of(out))
        nn.init.zeros_(bias_of(self.first_conv))
        nn.init.constant_(bias_of(self.cls_out), -math.log((1 - prior) / prior))

    def forward(self, cls_features: list[Tensor], reg_features: list[Tensor]) -> RepPointsOutputs:
        """Predict from the trunk's maps (N, C, H_l, W_l); both lists may be the same one, as with DyHead."""
        first = [self.first_out(F.relu(self.first_conv(f), inplace=True)) for f in reg_features]
        held = [x.detach() for x in first]
        offsets = [torch.lerp(h, x, self.gradient_share) - self.taps for h, x in zip(held, first, strict=True)]
        if cls_features is reg_features:
            # Both convolutions sample the same places of the same maps.
            weight = torch.cat([self.cls_weight, self.second_weight])
            hidden = [h.chunk(2, 1) for h in deform_conv2d_levels(reg_features, offsets, weight, padding=1)]
            of_classes, of_points = ([pair[i] for pair in hidden] for i in (0, 1))
        else:
            of_classes = deform_conv2d_levels(cls_features, offsets, self.cls_weight, padding=1)
            of_points = deform_conv2d_levels(reg_features, offsets, self.second_weight, padding=1)
        logits = [self.cls_out(F.relu(h)) for h in of_classes]
        second = [self.second_out(F.relu(h)) + x for h, x in zip(of_points, held, strict=True)]
        return RepPointsOutputs(
            flatten_levels(logits, self.num_classes),
            flatten_levels(first, 18),
            flatten_levels(second, 18),
            tuple((f.shape[2], f.shape[3]) for f in reg_features),
        )

    def grid(self, outputs: RepPointsOutputs) -> Grid:
        """The corners of the cells of `outputs`, in the order of its rows."""
        return point_grid(outputs.sizes, self.strides, 0.0, outputs.first.device)

    def row_strides(self, grid: Grid) -> Tensor:
        """(A, 1) float32, pixels per cell of every row."""
        return torch.tensor(grid.strides, dtype=torch.float32, device=grid.centres.device)[grid.levels, None]

    def boxes(self, points: Tensor, corners: Tensor, strides: Tensor) -> Tensor:
        """Boxes (..., 4) in pixels of offsets (..., 18), corners of cells (..., 2) and their strides (..., 1)."""
        transfer = torch.lerp(self.transfer.detach(), self.transfer, self.transfer_share)
        return points_to_boxes(points, transfer.to(points.dtype)) * strides + torch.cat([corners, corners], -1)

    def _stage(self, matched: Tensor, boxes: list[Tensor]) -> StageTargets:
        count = normaliser((matched >= 0).sum(1).clamp(min=1).sum(), 1, matched)
        return StageTargets(matched, *positives_of(matched, boxes), count)

    def targets(
        self, grid: Grid, outputs: RepPointsOutputs, targets: list[Target], image_sizes: list[tuple[int, int]]
    ) -> tuple[StageTargets, StageTargets, Tensor, Tensor]:
        """Assign boxes to the cells of both stages. Arguments as in `loss`.

        Returns:
            The targets of both stages; (N, A) int64 labels, C for background; (N, A) bool, which the classification
            counts.
        """
        boxes = [t["boxes"] for t in targets]
        valid_sizes, valid = outside_padding(grid, image_sizes, self.pad_divisor)
        first = self._stage(assign_nearest(grid, boxes, self.base_scale, valid_sizes), boxes)
        with torch.no_grad():
            proposals = self.boxes(outputs.first, grid.centres, self.row_strides(grid))
        matched = assign_max_iou(proposals, boxes, self.positive_iou, self.negative_iou, valid=valid)
        labels = labels_of(matched, [t["labels"] for t in targets], background=self.num_classes)
        counted = matched != IGNORED
        if valid is not None:
            counted &= valid
        return first, self._stage(matched, boxes), labels, counted

    def loss(
        self, outputs: RepPointsOutputs, targets: list[Target], image_sizes: list[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """The three losses of a batch, to be summed.

        Args:
            outputs: What `forward` returned.
            targets: One dict an image: `boxes` (n, 4) xyxy in pixels, `labels` (n,) int64 below C; n may be 0.
            image_sizes: (height, width) of each image before padding.

        Returns:
            `loss_cls`, `loss_first`, `loss_second`: scalars.
        """
        grid = self.grid(outputs)
        first, second, labels, counted = self.targets(grid, outputs, targets, image_sizes)
        strides = self.row_strides(grid)

        def box_loss(points: Tensor, stage: StageTargets) -> Tensor:
            cell = stage.positive % len(strides)
            unit = self.base_scale * strides[cell]
            boxes = self.boxes(points.flatten(0, 1)[stage.positive], grid.centres[cell], strides[cell])
            return smooth_l1_loss(boxes / unit, stage.boxes / unit, normaliser=stage.normaliser, beta=self.beta)

        return {
            "loss_cls": sigmoid_focal_loss(
                outputs.logits, labels, normaliser=second.normaliser, weight=counted, **self.focal
            ),
            "loss_first": self.first_weight * box_loss(outputs.first, first),
            "loss_second": box_loss(outputs.second, second),
        }

    def candidates_of(self, outputs: RepPointsOutputs) -> Candidates:
        """See `DenseHead.candidates_of`."""
        grid, probabilities = self.grid(outputs), outputs.logits.sigmoid()
        strides = self.row_strides(grid)

        def read(image: int | Tensor, cell: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
            boxes = self.boxes(outputs.second[image, cell], grid.centres[cell], strides[cell])
            return boxes, probabilities[image, cell, label]

        return Candidates(probabilities, grid.counts, read)


def reppoints(backbone: Backbone, num_classes: int, channels: int, dyhead: DyHead | None) -> Detector:
    """RepPoints with moments; DyHead replaces both towers, before the two stages."""
    head = RepPointsHead(in_channels=channels, num_classes=num_classes, strides=FPN.strides)
    fpn = FPN(backbone.channels, channels, p6_from="c5")
    return Detector(backbone, fpn, dyhead or ConvTowers(channels, depth=3), head)
