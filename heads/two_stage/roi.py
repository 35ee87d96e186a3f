"""The second stage of two-stage detectors: sampling of regions, RoIAlign by level, box head, and detections."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.boxes.assign import IGNORED, assign_max_iou
from heads.boxes.boxes import DeltaCoder, clip_boxes
from heads.boxes.fixed import NONE, FixedDetections, filled, image_index, whole
from heads.boxes.losses import smooth_l1_loss
from heads.boxes.matched import labels_of
from heads.boxes.sample import sample
from heads.boxes.selection import ImageDetections, detections
from heads.dyhead.attention import DynamicReLU
from heads.precision import at_least_float32
from heads.ranks import normaliser
from heads.targets import Target
from kernels import nms_mask, roi_align

BINS = 7
# Boxes whose sqrt(area) is less than twice this many pixels are pooled from the finest level.
_FINEST_SIDE = 56


class Regions(NamedTuple):
    """The boxes of a batch that a second stage learns from: by image, first the positive ones, then background.

    Attributes:
        boxes: One (r_i, 4) an image, in pixels; R boxes in all.
        labels: (R,) int64, K for background.
        positive: (P,) int64, indices into the R boxes.
        targets: (P, 4), the ground truth of the positive boxes.
        matched: (P,) int64, index of that ground truth in the whole batch.
        given: (R,) bool, whether a box is the ground truth itself, which is added to the candidates.
    """

    boxes: list[Tensor]
    labels: Tensor
    positive: Tensor
    targets: Tensor
    matched: Tensor
    given: Tensor

    def positives(self, counts: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """The positive boxes of each image and their ground truth.

        Args:
            counts: Number of boxes of the ground truth of each image.

        Returns:
            One (p_i, 4) an image, in pixels, and one (p_i,) int64 an image, indices into the image's ground truth.
        """
        sizes = torch.tensor([len(b) for b in self.boxes], device=self.positive.device)
        image = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)[self.positive]
        first = torch.tensor([0, *counts[:-1]], device=sizes.device).cumsum(0)
        per_image = torch.bincount(image, minlength=len(sizes)).tolist()
        boxes = torch.cat(self.boxes)[self.positive]
        return list(boxes.split(per_image)), list((self.matched - first[image]).split(per_image))


def sample_regions(
    proposals: Sequence[Tensor],
    targets: Sequence[Target],
    threshold: float,
    low_quality: Literal["moves"] | None,
    count: int,
    positive_share: float,
    background: int,
) -> Regions:
    """Match ground truth and proposals with the ground truth, and draw up to `count` an image.

    Args:
        proposals: One (k_i, 4) an image, in pixels.
        targets: One dict an image with `boxes` (n_i, 4) and `labels` (n_i,); n_i may be 0.
        threshold: IoU from which a candidate is positive.
        low_quality: See `assign_max_iou`.
        count: Most regions of an image.
        positive_share: Most of them that may be positive, as a fraction of `count`.
        background: Label of the background.
    """
    candidates = [torch.cat([t["boxes"], p]) for t, p in zip(targets, proposals, strict=True)]
    stacked = nn.utils.rnn.pad_sequence(candidates, batch_first=True)
    counts = torch.tensor([len(c) for c in candidates], device=stacked.device)
    valid = torch.arange(stacked.shape[1], device=stacked.device) < counts[:, None]
    truth = [t["boxes"] for t in targets]
    assigned = assign_max_iou(stacked, truth, threshold, threshold, threshold, low_quality, valid)
    chosen = sample(assigned.masked_fill(~valid, IGNORED), count, positive_share)

    # Positive ones first within an image, each group in the order of the candidates.
    is_positive = assigned >= 0
    image, column = (chosen & is_positive).nonzero(as_tuple=True)
    other_image, other_column = (chosen & ~is_positive).nonzero(as_tuple=True)
    order = torch.cat([image, other_image]).argsort(stable=True)
    images, columns = torch.cat([image, other_image])[order], torch.cat([column, other_column])[order]
    matched = assigned[image, column]
    given = torch.tensor([len(b) for b in truth], device=stacked.device)
    return Regions(
        boxes=list(stacked[images, columns].split(torch.bincount(images, minlength=len(truth)).tolist())),
        labels=labels_of(assigned[images, columns], [t["labels"] for t in targets], background),
        positive=(order < len(image)).nonzero()[:, 0],
        targets=torch.cat(truth)[matched],
        matched=matched,
        given=columns < given[images],
    )


def levels_of(boxes: Tensor, levels: int, rule: Literal["mmdet", "official"] = "mmdet") -> Tensor:
    """Level of each of (R, 4) boxes: floor(log2(sqrt(area) / 56)), 0 for the finest (Lin et al., CVPR 2017, eq. 1).

    Args:
        boxes: In pixels.
        levels: How many there are.
        rule: Where rounding puts boxes whose quotient is some millionths below a power of two: `"mmdet"` adds 1e-6 to
            it, `"official"` (detectron2) counts levels from a side of 224, as the equation is written.
    """
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    side = (width * height).sqrt()
    if rule == "mmdet":
        level = (side / _FINEST_SIDE + 1e-6).log2().floor()
    else:
        level = (4 + (side / (4 * _FINEST_SIDE)).log2()).floor() - 2
    return level.clamp(0, levels - 1).long()


def pool(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Sequence[Tensor],
    bins: int,
    rule: Literal["mmdet", "official"] = "mmdet",
) -> Tensor:
    """RoIAlign of each box on the level that `levels_of` gives it.

    Args:
        features: One map (N, C, H_l, W_l) a level, finest first.
        strides: Pixels per cell of each level.
        boxes: One (r_i, 4) an image, in pixels.
        bins: Bins of a region along each side.
        rule: See `levels_of`.

    Returns:
        (sum r_i, C, bins, bins), image by image.
    """
    images = len(boxes)
    batch = torch.cat(list(boxes))
    counts = torch.tensor([len(b) for b in boxes], device=batch.device)
    image = torch.arange(images, device=batch.device).repeat_interleave(counts)
    key = levels_of(batch, len(features), rule) * images + image
    order = key.argsort(stable=True)
    groups = batch[order].split(torch.bincount(key, minlength=len(features) * images).tolist())
    pieces = []
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        of_level = list(groups[level * images : (level + 1) * images])
        # A batch without boxes is pooled from the last level, so that the result has a gradient.
        if any(len(b) for b in of_level) or (not len(batch) and feature is features[-1]):
            pieces.append(roi_align(feature, of_level, (bins, bins), 1 / stride))
    return torch.cat(pieces)[order.argsort()]


def pool_fixed(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    bins: int,
    rule: Literal["mmdet", "official"] = "mmdet",
) -> Tensor:
    """`pool` for boxes (N, P, 4), as many of each image: (N * P, C, bins, bins), in a graph of fixed shapes.

    Every level is asked for all boxes. Those of other levels are in no image, cost next to nothing, and are 0.
    """
    image = image_index(boxes).expand(boxes.shape[:2]).flatten().to(boxes.dtype)
    batch = boxes.flatten(0, 1)
    levels = levels_of(batch, len(features), rule)
    pooled = [
        roi_align(feature, torch.cat([torch.where(levels == level, image, -1.0)[:, None], batch], 1), bins, 1 / stride)
        for level, (feature, stride) in enumerate(zip(features, strides, strict=True))
    ]
    return torch.stack(pooled).sum(0)


class BoxHead(nn.Module):
    """Class and box of every pooled region.

    Two fully connected layers with ReLU, then one linear layer for the classes and one for the boxes. `task` replaces
    the two layers: the paper's Fig. 2(c) puts the task attention of DyHead in their place.

    Args:
        in_channels: C of the pooled regions.
        num_classes: K, without background.
        hidden: Outputs of the two layers; 1,024 at 256 channels.
        task: Task attention that replaces the two layers.
        class_agnostic: Whether there is one box for all classes instead of one for each.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        hidden: int,
        task: DynamicReLU | None = None,
        class_agnostic: bool = False,
    ):
        super().__init__()
        inputs = in_channels * BINS * BINS
        self.num_classes = num_classes
        self.task = task
        self.fc1 = nn.Linear(inputs, hidden) if task is None else None
        self.fc2 = nn.Linear(hidden, hidden) if task is None else None
        self.cls_score = nn.Linear(inputs if task else hidden, num_classes + 1)
        self.bbox_pred = nn.Linear(inputs if task else hidden, 4 if class_agnostic else 4 * num_classes)
        for layer in (self.fc1, self.fc2):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, 7, 7) -> logits (R, K + 1), background last, and deltas (R, K, 4), or (R, 1, 4) class-agnostic."""
        # RoIAlign gives float32, also of maps in half precision.
        regions = regions.to(self.cls_score.weight.dtype)
        x = (regions if self.task is None else self.task.activate(regions)).flatten(1)
        for layer in (self.fc1, self.fc2):
            if layer is not None:
                x = F.relu(layer(x))
        logits, deltas = at_least_float32(self.cls_score(x)), at_least_float32(self.bbox_pred(x))
        return logits, deltas.unflatten(1, (-1, 4))

    def loss(
        self, logits: Tensor, deltas: Tensor, regions: Regions, coder: DeltaCoder, beta: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and (smooth) L1 of the positive regions' deltas, both divided by the number of regions."""
        count = normaliser(len(logits), 1, logits)
        classification = F.cross_entropy(logits, regions.labels, reduction="sum") / count
        column = 0 if deltas.shape[1] == 1 else regions.labels[regions.positive]
        goals = coder.encode(regions.targets, torch.cat(regions.boxes)[regions.positive])
        return classification, smooth_l1_loss(deltas[regions.positive, column], goals, normaliser=count, beta=beta)


def class_detections(
    probabilities: Tensor,
    deltas: Tensor,
    boxes: Tensor,
    coder: DeltaCoder,
    size: tuple[int, int],
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
) -> ImageDetections:
    """Detections of one image from a `BoxHead`'s predictions.

    Args:
        probabilities: (R, K + 1), background last.
        deltas: (R, K, 4), or (R, 1, 4) class-agnostic.
        boxes: (R, 4) in pixels, to which the deltas are applied.
        coder: Decodes deltas to boxes.
        size: (height, width) of the image.
        score_threshold: Class probability that a detection must exceed.
        iou_threshold: IoU above which NMS drops the lower of two boxes of a class.
        max_detections: The most detections of the image.
    """
    region, label = (probabilities[:, :-1] > score_threshold).nonzero(as_tuple=True)
    column = label if deltas.shape[1] > 1 else 0
    decoded = coder.decode(deltas[region, column], boxes[region])
    scores = probabilities[region, label]
    return detections(decoded, scores, label, size, iou_threshold, max_detections, clip_first=True)


def class_detections_fixed(
    probabilities: Tensor,
    deltas: Tensor,
    boxes: Tensor,
    valid: Tensor,
    coder: DeltaCoder,
    size: tuple[int, int],
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
) -> FixedDetections:
    """`class_detections` of N images of one size, in tensors of fixed shapes.

    Args:
        probabilities: (N, P, K + 1), background last.
        deltas: (N, P, K, 4), or (N, P, 1, 4) class-agnostic.
        boxes: (N, P, 4) in pixels, to which the deltas are applied.
        valid: (N, P) bool, which of the boxes there are.
        coder, size, score_threshold, iou_threshold, max_detections: As for `class_detections`.
    """
    decoded = clip_boxes(coder.decode(deltas, boxes[:, :, None]), size)
    # (N, P, K), in which a class-agnostic box is that of every class.
    exists = whole(decoded) & valid[..., None]
    scores = torch.where(exists, probabilities[..., :-1], NONE)
    # To NMS the boxes of a class are a set of their own where every class has its own.
    sets, by_class = decoded.transpose(1, 2).flatten(0, 1), scores.transpose(1, 2)
    parts = by_class if deltas.shape[2] == 1 else by_class.flatten(0, 1)[:, None]
    kept = nms_mask(sets, parts, iou_threshold, score_threshold).view(by_class.shape)
    # In the order of regions, then classes.
    scores = torch.where(kept, by_class, NONE).transpose(1, 2)
    labels = torch.arange(scores.shape[2], device=scores.device).expand(scores.shape)
    each = decoded.expand(*scores.shape, 4)
    return filled(each.flatten(1, 2), scores.flatten(1), labels.flatten(1), max_detections)
