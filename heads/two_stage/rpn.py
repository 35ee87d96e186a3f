"""The region proposal network of Faster R-CNN (Ren, He, Girshick, Sun, 2015), as FPN uses it.

Ingredients, as published (mmdetection 3.3's configuration):
- three anchors per cell, eight strides wide, of ratios 1:2, 1:1, 2:1, on P2–P6; a shared 3×3 convolution with ReLU;
- positive from IoU 0.7, background below 0.3, and every box's best anchors from 0.3; 256 sampled an image, at most half
  of them positive; anchors in the padding take no part;
- binary cross-entropy and L1 on deltas, both divided by the sum over images of max(positives, 1) + max(negatives, 1);
- proposals: the best of every level by score, decoded and clipped, those without area dropped, NMS at IoU 0.7 within
  a level, the best of an image; no score is too low.

detectron2, in which DyHead's authors released a Faster R-CNN, differs in details; `convention` selects one:

| detail                      | "mmdet" (mmdetection 3.3)                    | "official" (detectron2)               |
|-----------------------------|----------------------------------------------|---------------------------------------|
| anchors in the padding      | take no part                                 | are background                        |
| a box's best anchors        | from IoU 0.3, move to that box               | from any IoU, keep the box of their   |
|                             |                                              | own best IoU                          |
| losses divided by           | max(positives, 1) + max(negatives, 1), summed| 256 times the images                  |
| width and height deltas     | clamped on both sides                        | clamped from above                    |
| proposals ranked by         | probability                                  | logit                                 |

Deviations: the sample is drawn for the whole batch at once from random keys, not by permuting; the 1.2e-7 that
mmdetection adds to every normaliser is left out; NMS compares levels instead of shifting boxes by level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.boxes.anchors import Grid, Sizes, anchor_grid, cell_anchors, outside_padding
from heads.boxes.assign import IGNORED, assign_max_iou
from heads.boxes.boxes import DeltaCoder, clip_boxes
from heads.boxes.fixed import LEAST, NONE, best_of, image_index, least, one_hot_scores, whole
from heads.boxes.losses import smooth_l1_loss
from heads.boxes.rows import predict_rows
from heads.boxes.sample import sample
from heads.ranks import normaliser
from heads.targets import Target
from kernels import batched_nms, nms_mask


@dataclass(frozen=True, kw_only=True)
class RPNConvention:
    """The details in which the two releases differ, row by row as in the table above.

    Attributes:
        padding_is_background: Whether anchors in the padding are background; else they take no part.
        least: IoU from which a box has its best anchors.
        low_quality: What becomes of a box's best anchors, see `assign_max_iou`.
        fixed_normaliser: Whether losses are divided by the most anchors that may be sampled; else by those that are.
        delta_clamp: See `DeltaCoder`.
        rank_by_logit: Whether proposals are ranked by logit; else by probability, of which large ones are equal.
    """

    padding_is_background: bool
    least: float
    low_quality: Literal["moves", "keeps"]
    fixed_normaliser: bool
    delta_clamp: Literal["both", "above"]
    rank_by_logit: bool


CONVENTIONS = {
    "mmdet": RPNConvention(
        padding_is_background=False,
        least=0.3,
        low_quality="moves",
        fixed_normaliser=False,
        delta_clamp="both",
        rank_by_logit=False,
    ),
    "official": RPNConvention(
        padding_is_background=True,
        least=0.0,
        low_quality="keeps",
        fixed_normaliser=True,
        delta_clamp="above",
        rank_by_logit=True,
    ),
}


class RPNOutputs(NamedTuple):
    """One row per anchor: A anchors, levels in order, row by row, ratio by ratio.

    Attributes:
        logits: (N, A), of the anchor being an object.
        deltas: (N, A, 4) dx, dy, dw, dh.
        sizes: (height, width) of each level's map.
    """

    logits: Tensor
    deltas: Tensor
    sizes: Sizes


class RPNHead(nn.Module):
    """Predicts for every anchor whether it is an object, and the object's box; see the top of this file.

    Args:
        in_channels: Channels of the maps.
        strides: Pixels per cell of each level.
        anchor_scale: Side of a square anchor in strides.
        ratios: Height to width of the anchors of a cell.
        anchor_offset: Centre of an anchor in its cell, in cells: 0 (mmdetection) or 0.5.
        pad_divisor: See `outside_padding`.
        samples: Anchors of an image that the losses see.
        least_side: Pixels that a proposal must exceed in width and height.
        iou_threshold: IoU above which NMS drops the lower of two proposals of a level.
        convention: `"mmdet"` or `"official"`.

    Raises:
        ValueError: The convention is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int] = (4, 8, 16, 32, 64),
        *,
        anchor_scale: float = 8.0,
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        anchor_offset: float = 0.0,
        pad_divisor: int = 32,
        samples: int = 256,
        least_side: float = 0.0,
        iou_threshold: float = 0.7,
        convention: Literal["mmdet", "official"] = "mmdet",
    ):
        super().__init__()
        if convention not in CONVENTIONS:
            raise ValueError(f"unknown convention {convention!r}; the conventions are {', '.join(CONVENTIONS)}")
        self.convention = CONVENTIONS[convention]
        self.strides = tuple(strides)
        self.cells = [cell_anchors([anchor_scale * stride], ratios) for stride in strides]
        self.anchor_offset = anchor_offset
        self.pad_divisor = pad_divisor
        self.samples = samples
        self.least_side = least_side
        self.iou_threshold = iou_threshold
        self.coder = DeltaCoder(clamp=self.convention.delta_clamp)
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.objectness = nn.Conv2d(in_channels, len(ratios), 1)
        self.bbox_pred = nn.Conv2d(in_channels, 4 * len(ratios), 1)
        for layer in (self.conv, self.objectness, self.bbox_pred):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, features: list[Tensor]) -> RPNOutputs:
        """Predict from maps (N, C, H_l, W_l)."""
        hidden = [F.relu(self.conv(f), inplace=True) for f in features]
        logits, deltas = predict_rows(hidden, self.objectness, self.bbox_pred, anchors=len(self.cells[0]))
        return RPNOutputs(logits[..., 0], deltas, tuple((f.shape[2], f.shape[3]) for f in features))

    def grid(self, outputs: RPNOutputs) -> Grid:
        """The anchors of `outputs`, in the order of its rows."""
        return anchor_grid(outputs.sizes, self.strides, self.cells, self.anchor_offset, outputs.deltas.device)

    def match(self, grid: Grid, targets: list[Target], image_sizes: list[tuple[int, int]]) -> Tensor:
        """(N, A) int64: for each anchor the index of a box in the whole batch, or `BACKGROUND`, or `IGNORED`."""
        rule, valid = self.convention, None
        if not rule.padding_is_background:
            _, valid = outside_padding(grid, image_sizes, self.pad_divisor)
        boxes = [t["boxes"] for t in targets]
        matched = assign_max_iou(grid.anchors, boxes, 0.7, 0.3, rule.least, rule.low_quality, valid)
        return matched if valid is None else matched.masked_fill_(~valid, IGNORED)

    def loss(
        self,
        outputs: RPNOutputs,
        targets: list[Target],
        image_sizes: list[tuple[int, int]],
        chosen: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`loss_rpn_cls` and `loss_rpn_bbox`, to be summed.

        Args:
            outputs: What `forward` returned.
            targets: One dict an image with `boxes` (n, 4) xyxy in pixels; n may be 0.
            image_sizes: (height, width) of each image before padding.
            chosen: (N, A) bool, the sampled anchors; None samples them.

        Returns:
            Two scalars by name.
        """
        grid = self.grid(outputs)
        matched = self.match(grid, targets, image_sizes)
        if chosen is None:
            chosen = sample(matched, self.samples, 0.5)
        positive = chosen & (matched >= 0)
        counts = torch.stack([positive.sum(1), (chosen & ~positive).sum(1)])
        sampled = self.samples * len(matched) if self.convention.fixed_normaliser else counts.clamp(min=1).sum()
        count = normaliser(sampled, 1, outputs.logits)
        image, anchor = positive.nonzero(as_tuple=True)
        boxes = torch.cat([t["boxes"] for t in targets])[matched[image, anchor]]
        return {
            "loss_rpn_cls": F.binary_cross_entropy_with_logits(
                outputs.logits, positive.to(outputs.logits.dtype), chosen.to(outputs.logits.dtype), reduction="sum"
            )
            / count,
            "loss_rpn_bbox": smooth_l1_loss(
                outputs.deltas[image, anchor],
                self.coder.encode(boxes, grid.anchors[anchor]),
                normaliser=count,
            ),
        }

    @torch.no_grad()
    def proposals(
        self, outputs: RPNOutputs, image_sizes: list[tuple[int, int]], per_level: int, per_image: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Proposals by falling score.

        Args:
            outputs: What `forward` returned.
            image_sizes: (height, width) of each image before padding.
            per_level: The most candidates of a level that go into NMS.
            per_image: The most proposals of an image.

        Returns:
            For each image (k, 4) boxes in pixels, clipped to the image, and their (k,) scores: probabilities, or the
            logits where the convention ranks by them.
        """
        boxes, scores, levels = self.best(outputs, per_level)
        limits = torch.tensor([(w, h, w, h) for h, w in image_sizes], device=boxes.device, dtype=boxes.dtype)
        boxes = torch.minimum(boxes.clamp(min=0), limits[:, None])
        results = []
        for box, score, level, inside in zip(boxes, scores, levels, whole(boxes, self.least_side), strict=True):
            box, score = box[inside], score[inside]
            keep = batched_nms(box, score, level[inside], self.iou_threshold, per_image)
            results.append((box[keep], score[keep]))
        return results

    def proposals_fixed(
        self, outputs: RPNOutputs, size: tuple[int, int], per_level: int, per_image: int
    ) -> tuple[Tensor, Tensor]:
        """The same for images of one (height, width), in tensors of fixed shapes.

        Returns:
            (N, P, 4) boxes by falling score, and (N, P) bool, which of them are proposals; the others fill up.
        """
        boxes, scores, levels = self.best(outputs, per_level)
        boxes = clip_boxes(boxes, size)
        scores = torch.where(whole(boxes, self.least_side), scores, NONE)
        by_level = one_hot_scores(scores, levels, len(self.strides))
        kept = nms_mask(boxes, by_level, self.iou_threshold, LEAST).any(1)
        scores = torch.where(kept, scores, NONE)
        image, best = image_index(scores), best_of(scores, per_image)
        return boxes[image, best], scores[image, best] > LEAST

    def best(self, outputs: RPNOutputs, per_level: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best anchors of each level, K of an image: boxes (N, K, 4), not clipped, scores and levels (N, K)."""
        grid = self.grid(outputs)
        scores = outputs.logits if self.convention.rank_by_logit else outputs.logits.sigmoid()
        best, start = [], 0
        for count in grid.counts:
            part = scores[:, start : start + count]
            # Back in the order of anchors, so that equal scores are dropped by NMS in that order.
            best.append(part.topk(least(per_level, count), 1).indices.sort(1).values + start)
            start += count
        anchor = torch.cat(best, 1)
        image = image_index(anchor)
        boxes = self.coder.decode(outputs.deltas[image, anchor], grid.anchors[anchor])
        return boxes, scores[image, anchor], grid.levels[anchor]
