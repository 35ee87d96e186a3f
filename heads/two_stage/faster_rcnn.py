"""Faster R-CNN (Ren et al., 2015) on a feature pyramid (Lin et al., 2017).

Ingredients, as published (mmdetection 3.3's 1x configuration):
- P2–P6 with strides 4–64; the region proposal network of `heads/two_stage/rpn.py` on all of them;
- training: 2,000 candidates a level and 1,000 proposals an image; with the ground truth added, positive from IoU 0.5,
  every box at least its best candidate from 0.5; 512 regions an image, at most a quarter positive;
- RoIAlign to 7×7 on P2–P5, the level by the box's size, as many samples as cells; two layers of 1,024
  (`heads/two_stage/roi.py`);
- cross-entropy over classes and background, and L1 on class-specific deltas (weights 10, 10, 5, 5) of the positive
  regions, both divided by the number of regions;
- detections: 1,000 candidates a level and 1,000 proposals; probability above 0.05, NMS at IoU 0.5 within a class,
  100 boxes.

Where DyHead sits: `placement="trunk"`, between pyramid and region proposal network, as the authors released it; both
stages stay as they are. `placement="around_roi"`, the paper's Fig. 2(c): the task attention of the last block moves
behind RoIAlign and takes the place of the two layers; the flattened 7×7 bins go to the two linear layers that predict.
The baseline has nothing between pyramid and heads.

detectron2, in which DyHead's authors released a Faster R-CNN, differs in the details of the first stage's table and
in these of the second; `convention` selects one:

| detail                      | "mmdet" (mmdetection 3.3)                | "official" (detectron2)               |
|-----------------------------|------------------------------------------|---------------------------------------|
| a box's best candidate      | positive from 0.5, moves to that box     | keeps the box of its own best IoU     |
| width and height deltas     | clamped on both sides                    | clamped from above                    |
| level of a region           | from a side of 56, 1e-6 added to the     | from a side of 224, nothing added     |
|                             | quotient                                 |                                       |

The first row matters where two boxes are equal, and nowhere else, as the ground truth is among the candidates.
mmdetection itself has it so in Mask R-CNN; its Faster R-CNN does there what detectron2 does.

Deviations: at 256 channels of the pyramid all numbers are the published ones; below, the width of the layers and the
number of anchors in the first stage's sample fall with the channels, and the numbers of candidates, proposals and
regions with their square, down to 64 proposals and 32 regions, so that the second stage of a small model costs no more
than the rest of it. Boxes that clipping leaves without area are dropped. NMS compares labels instead of shifting boxes
by class. The sample is drawn from random keys (`heads/boxes/sample.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn

from heads.backbones.fpn import FPNFromC2
from heads.backbones.resnet import Backbone
from heads.boxes.boxes import DeltaCoder
from heads.boxes.fixed import FixedDetections
from heads.boxes.selection import ImageDetections
from heads.detector import Detector, PredictionHead
from heads.dyhead.attention import DynamicReLU
from heads.dyhead.dyhead import DyHead
from heads.targets import Target
from heads.two_stage.roi import (
    BINS,
    BoxHead,
    Regions,
    class_detections,
    class_detections_fixed,
    pool,
    pool_fixed,
    sample_regions,
)
from heads.two_stage.rpn import RPNHead, RPNOutputs

PLACEMENTS = ("trunk", "around_roi")


@dataclass(frozen=True, kw_only=True)
class RegionConvention:
    """The details in which the second stages of two releases differ, row by row as in the table above.

    Attributes:
        low_quality: What becomes of a box's best candidate, see `assign_max_iou`.
        delta_clamp: See `DeltaCoder`.
        level_rule: See `levels_of`.
    """

    low_quality: Literal["moves"] | None
    delta_clamp: Literal["both", "above"]
    level_rule: Literal["mmdet", "official"]


CONVENTIONS = {
    "mmdet": RegionConvention(low_quality="moves", delta_clamp="both", level_rule="mmdet"),
    "official": RegionConvention(low_quality=None, delta_clamp="above", level_rule="official"),
}


class TwoStageOutputs(NamedTuple):
    """What does not depend on proposals.

    Attributes:
        features: One map (N, C, H_l, W_l) a level of the pyramid, finest first.
        rpn: Predictions of the first stage.
    """

    features: list[Tensor]
    rpn: RPNOutputs


class TwoStageSettings(TypedDict, total=False):
    """The keyword arguments of `TwoStageHead` beside `in_channels`, with its defaults."""

    strides: Sequence[int]
    anchor_offset: float
    score_threshold: float
    iou_threshold: float
    max_detections: int


class TwoStageHead(PredictionHead[TwoStageOutputs]):
    """A region proposal network, and the numbers of boxes that pass between the two stages.

    Args:
        in_channels: Channels of the maps; with fewer than 256, fewer boxes pass, see the top of this file.
        strides: Pixels per cell of each level; the second stage does not use the last level.
        anchor_offset: See `RPNHead`.
        score_threshold: Class probability that a detection must exceed.
        iou_threshold: IoU above which NMS drops the lower of two boxes of a class.
        max_detections: The most detections of an image.
        convention: `"mmdet"` or `"official"`.

    Raises:
        ValueError: The convention is unknown.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        strides: Sequence[int] = (4, 8, 16, 32, 64),
        anchor_offset: float = 0.0,
        score_threshold: float = 0.05,
        iou_threshold: float = 0.5,
        max_detections: int = 100,
        convention: Literal["mmdet", "official"] = "mmdet",
    ):
        super().__init__()
        self.strides = tuple(strides)[:-1]
        self.rpn = RPNHead(
            in_channels, strides, anchor_offset=anchor_offset, samples=in_channels, convention=convention
        )
        self.convention = CONVENTIONS[convention]
        scale = (in_channels / 256) ** 2
        self.per_image = max(64, int(1000 * scale))
        # By `training`.
        self.per_level = {True: 2 * self.per_image, False: self.per_image}
        self.samples = max(32, int(512 * scale))
        self.positive_share = 0.25
        self.score_threshold = score_threshold
        self.iou_threshold = iou_threshold
        self.max_detections = max_detections

    def forward(self, features: list[Tensor], _: list[Tensor]) -> TwoStageOutputs:
        """Predict from the trunk's maps (N, C, H_l, W_l); the second list is for detectors with two towers."""
        return TwoStageOutputs(features, self.rpn(features))

    def proposals(self, outputs: TwoStageOutputs, image_sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Proposals, one (k, 4) an image in pixels, as many as training or evaluation takes."""
        proposals = self.rpn.proposals(outputs.rpn, image_sizes, self.per_level[self.training], self.per_image)
        return [boxes for boxes, _ in proposals]

    def proposals_fixed(self, outputs: TwoStageOutputs, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """As many proposals (N, P, 4) as evaluation takes at most, and which of them there are; see `RPNHead`."""
        return self.rpn.proposals_fixed(outputs.rpn, size, self.per_level[False], self.per_image)

    def pool_fixed(self, outputs: TwoStageOutputs, boxes: Tensor, bins: int = BINS) -> Tensor:
        """RoIAlign of boxes (N, P, 4): (N * P, C, bins, bins)."""
        features = outputs.features[: len(self.strides)]
        return pool_fixed(features, self.strides, boxes, bins, self.convention.level_rule)

    def pool(self, outputs: TwoStageOutputs, boxes: Sequence[Tensor], bins: int = BINS) -> Tensor:
        """RoIAlign of the boxes, one (r, 4) an image: (R, C, bins, bins)."""
        features = outputs.features[: len(self.strides)]
        return pool(features, self.strides, boxes, bins, self.convention.level_rule)

    def regions_of_a_full_image(self, outputs: TwoStageOutputs, count: int, bins: int = BINS) -> Tensor:
        """Pooled regions without content to count operations with: (N * count, C, bins, bins)."""
        images, channels = outputs.features[0].shape[:2]
        return outputs.features[0].new_zeros(images * count, channels, bins, bins)


class FasterRCNNHead(TwoStageHead):
    """Faster R-CNN's two stages; see the top of this file.

    Args:
        in_channels: Channels of the maps.
        num_classes: K, without background.
        task: Task attention in place of the two layers behind RoIAlign.
        convention: `"mmdet"` or `"official"`; the other two-stage detectors have mmdetection's alone.
        settings: See `TwoStageHead`.

    Raises:
        ValueError: The convention is unknown.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        task: DynamicReLU | None = None,
        convention: Literal["mmdet", "official"] = "mmdet",
        **settings: Unpack[TwoStageSettings],
    ):
        super().__init__(in_channels=in_channels, convention=convention, **settings)
        self.num_classes = num_classes
        self.box = BoxHead(in_channels, num_classes, 4 * in_channels, task)
        self.coder = DeltaCoder(stds=(0.1, 0.1, 0.2, 0.2), clamp=self.convention.delta_clamp)

    def regions(self, proposals: list[Tensor], targets: list[Target]) -> Regions:
        """Sample the regions that the second stage learns from. Arguments as in `sample_regions`."""
        return sample_regions(
            proposals,
            targets,
            threshold=0.5,
            low_quality=self.convention.low_quality,
            count=self.samples,
            positive_share=self.positive_share,
            background=self.num_classes,
        )

    def loss(
        self, outputs: TwoStageOutputs, targets: list[Target], image_sizes: list[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """The losses of both stages, to be summed.

        Args:
            outputs: What `forward` returned.
            targets: One dict an image: `boxes` (n, 4) xyxy in pixels, `labels` (n,) int64 below K; n may be 0.
            image_sizes: (height, width) of each image before padding.

        Returns:
            `loss_rpn_cls`, `loss_rpn_bbox`, `loss_cls`, `loss_bbox`: scalars.
        """
        regions = self.regions(self.proposals(outputs, image_sizes), targets)
        return self.rpn.loss(outputs.rpn, targets, image_sizes) | self.box_loss(outputs, regions)

    def box_loss(self, outputs: TwoStageOutputs, regions: Regions) -> dict[str, Tensor]:
        """`loss_cls` and `loss_bbox` of the second stage."""
        logits, deltas = self.box(self.pool(outputs, regions.boxes))
        classification, boxes = self.box.loss(logits, deltas, regions, self.coder)
        return {"loss_cls": classification, "loss_bbox": boxes}

    @torch.no_grad()
    def predict(self, outputs: TwoStageOutputs, image_sizes: list[tuple[int, int]]) -> list[ImageDetections]:
        """Detections, one dict an image, by falling score: `boxes` (K, 4) clipped, `scores` (K,), `labels` (K,)."""
        return self.detect(outputs, self.proposals(outputs, image_sizes), image_sizes)

    def detect(
        self, outputs: TwoStageOutputs, proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[ImageDetections]:
        """Detections from given proposals, for each image (k, 4)."""
        logits, deltas = self.box(self.pool(outputs, proposals))
        counts = [len(p) for p in proposals]
        limits = (self.score_threshold, self.iou_threshold, self.max_detections)
        return [
            class_detections(probability, delta, boxes, self.coder, size, *limits)
            for probability, delta, boxes, size in zip(
                logits.softmax(1).split(counts), deltas.split(counts), proposals, image_sizes, strict=True
            )
        ]

    @torch.no_grad()
    def predict_fixed(self, outputs: TwoStageOutputs, size: tuple[int, int]) -> FixedDetections:
        """Detections in tensors of fixed shapes; see `PredictionHead.predict_fixed`."""
        proposals, valid = self.proposals_fixed(outputs, size)
        logits, deltas = self.box(self.pool_fixed(outputs, proposals))
        shape = proposals.shape[:2]
        limits = (self.score_threshold, self.iou_threshold, self.max_detections)
        probabilities, deltas = logits.softmax(1).unflatten(0, shape), deltas.unflatten(0, shape)
        return class_detections_fixed(probabilities, deltas, proposals, valid, self.coder, size, *limits)

    def full_image(self, outputs: TwoStageOutputs) -> None:
        """Run the second stage on as many proposals as an image may have, to count its operations."""
        self.box(self.regions_of_a_full_image(outputs, self.per_image))


def two_stage(
    backbone: Backbone, channels: int, dyhead: DyHead | None, placement: str, make_head: Callable[..., TwoStageHead]
) -> Detector:
    """Put a two-stage detector together.

    Args:
        backbone: Backbone that returns C2 to C5 (`finest=2`).
        channels: Channels of the pyramid.
        dyhead: The trunk, or None for the baseline, which has none.
        placement: One of `PLACEMENTS`; see the top of this file.
        make_head: Called with `in_channels` and `task`, the task attention that moves behind RoIAlign, or None.

    Raises:
        ValueError: The placement is unknown, there is no block whose task attention could move, or the backbone does
            not begin with C2.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"unknown placement {placement!r}; the placements are {', '.join(PLACEMENTS)}")
    if len(backbone.channels) != 4:
        raise ValueError(
            f"a two-stage detector needs the maps C2 to C5: make the backbone with finest=2, not {backbone.finest}"
        )
    task = None
    if placement == "around_roi":
        if dyhead is None or not len(dyhead.blocks):
            raise ValueError(
                "placement 'around_roi' splits the last block of a DyHead: it needs attentions and depth >= 1"
            )
        dyhead, task = dyhead.split_last_task()
    head = make_head(in_channels=channels, task=task)
    return Detector(backbone, FPNFromC2(backbone.channels, channels), dyhead or nn.Identity(), head)


def faster_rcnn(
    backbone: Backbone, num_classes: int, channels: int, dyhead: DyHead | None, placement: str = "trunk"
) -> Detector:
    """Faster R-CNN; see the top of this file."""
    return two_stage(backbone, channels, dyhead, placement, partial(FasterRCNNHead, num_classes=num_classes))
