"""Cascade R-CNN (Cai, Vasconcelos, CVPR 2018) on a feature pyramid.

Ingredients, as published (mmdetection 3.3's configuration):
- the first stage of Faster R-CNN (`heads/two_stage/faster_rcnn.py`), then three second stages, each on the boxes that
  the one before it has refined; a region is positive from IoU 0.5, 0.6, 0.7, and a box may end without any region;
- one box for all classes, deltas with standard deviations 0.1 and 0.2, then a half, then a third of that; smooth L1
  with beta 1; the stages' losses weigh 1, 0.5, 0.25;
- the ground truth is added to the candidates of every stage, and not passed on by it; refined boxes are clipped;
- detections: boxes of the last stage, with class scores averaged over the three stages: `average="logits"` averages
  before the softmax (mmdetection), `"probabilities"` after it (the paper, detectron2).

DyHead sits where it does in Faster R-CNN; with `placement="around_roi"` each stage has a task attention of its own in
place of its two layers.

Deviations: those of Faster R-CNN.
"""

import copy
from functools import partial
from typing import Literal, Unpack, cast

import torch
from torch import Tensor, nn

from heads.backbones.resnet import Backbone
from heads.boxes.boxes import DeltaCoder, clip_boxes
from heads.boxes.fixed import FixedDetections
from heads.boxes.selection import ImageDetections
from heads.detector import Detector
from heads.dyhead.attention import DynamicReLU
from heads.dyhead.dyhead import DyHead
from heads.targets import Target
from heads.two_stage.faster_rcnn import TwoStageHead, TwoStageOutputs, TwoStageSettings, two_stage
from heads.two_stage.roi import BoxHead, Regions, class_detections, class_detections_fixed, sample_regions

THRESHOLDS = (0.5, 0.6, 0.7)
WEIGHTS = (1.0, 0.5, 0.25)
STDS = ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))


class CascadeRCNNHead(TwoStageHead):
    """A region proposal network and three second stages in a row; see the top of this file.

    Args:
        in_channels: Channels of the maps.
        num_classes: K, without background.
        task: Task attention of which each stage gets a copy in place of its two layers.
        average: Whether a detection's score is the mean of the stages' logits or of their probabilities.
        settings: See `TwoStageHead`.

    Raises:
        ValueError: `average` is unknown.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        task: DynamicReLU | None = None,
        average: Literal["logits", "probabilities"] = "logits",
        **settings: Unpack[TwoStageSettings],
    ):
        super().__init__(in_channels=in_channels, **settings)
        if average not in ("logits", "probabilities"):
            raise ValueError(f"unknown average {average!r}; choose 'logits' or 'probabilities'")
        self.average = average
        self.num_classes = num_classes
        self.stages = nn.ModuleList(
            BoxHead(in_channels, num_classes, 4 * in_channels, copy.deepcopy(task), class_agnostic=True)
            for _ in THRESHOLDS
        )
        self.coders = [DeltaCoder(stds=(centre, centre, side, side)) for centre, side in STDS]

    def regions(self, stage: int, proposals: list[Tensor], targets: list[Target]) -> Regions:
        """Sample the regions that a stage learns from. Arguments as in `sample_regions`."""
        return sample_regions(
            proposals,
            targets,
            threshold=THRESHOLDS[stage],
            low_quality=None,
            count=self.samples,
            positive_share=self.positive_share,
            background=self.num_classes,
        )

    def refine(
        self, stage: int, deltas: Tensor, boxes: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """Decode a stage's deltas (R, 1, 4) to boxes for the next stage, clipped to the image."""
        parts = deltas.detach()[:, 0].split([len(b) for b in boxes])
        # Training stops at a loss that is not finite, but only after the stages to come have seen such boxes.
        return [
            clip_boxes(self.coders[stage].decode(d, b), size).nan_to_num(0)
            for d, b, size in zip(parts, boxes, image_sizes, strict=True)
        ]

    def loss(
        self, outputs: TwoStageOutputs, targets: list[Target], image_sizes: list[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """The losses of all stages, weighted, to be summed. Arguments as in `FasterRCNNHead.loss`.

        Returns:
            `loss_rpn_cls`, `loss_rpn_bbox`, and `s0.loss_cls`, `s0.loss_bbox` and so on for each stage: scalars.
        """
        losses = self.rpn.loss(outputs.rpn, targets, image_sizes)
        return losses | self.cascade_loss(outputs, self.proposals(outputs, image_sizes), targets, image_sizes)

    def cascade_loss(
        self,
        outputs: TwoStageOutputs,
        proposals: list[Tensor],
        targets: list[Target],
        image_sizes: list[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """The second stages' losses from given proposals, for each image (k, 4)."""
        losses: dict[str, Tensor] = {}
        stages = cast(list[BoxHead], self.stages)
        for number, (stage, coder, weight) in enumerate(zip(stages, self.coders, WEIGHTS, strict=True)):
            regions = self.regions(number, proposals, targets)
            logits, deltas = stage(self.pool(outputs, regions.boxes))
            classification, boxes = stage.loss(logits, deltas, regions, coder, beta=1.0)
            losses |= {f"s{number}.loss_cls": weight * classification, f"s{number}.loss_bbox": weight * boxes}
            if stage is not self.stages[-1]:
                proposals = self.refine(number, deltas, regions.boxes, image_sizes)
                given = regions.given.split([len(b) for b in proposals])
                proposals = [b[~g] for b, g in zip(proposals, given, strict=True)]
        return losses

    @torch.no_grad()
    def predict(self, outputs: TwoStageOutputs, image_sizes: list[tuple[int, int]]) -> list[ImageDetections]:
        """Detections, one dict an image, by falling score: `boxes` (K, 4) clipped, `scores` (K,), `labels` (K,)."""
        return self.detect(outputs, self.proposals(outputs, image_sizes), image_sizes)

    def detect(
        self, outputs: TwoStageOutputs, proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[ImageDetections]:
        """Detections from given proposals, for each image (k, 4)."""
        boxes, deltas, logits = self.cascade(outputs, proposals, image_sizes)
        probabilities = self.averaged(logits)
        counts = [len(b) for b in boxes]
        limits = (self.score_threshold, self.iou_threshold, self.max_detections)
        return [
            class_detections(probability, delta, b, self.coders[-1], size, *limits)
            for probability, delta, b, size in zip(
                probabilities.split(counts), deltas.split(counts), boxes, image_sizes, strict=True
            )
        ]

    def averaged(self, logits: Tensor) -> Tensor:
        """Logits of all stages (3, R, K + 1) -> probabilities (R, K + 1)."""
        return logits.mean(0).softmax(1) if self.average == "logits" else logits.softmax(2).mean(0)

    @torch.no_grad()
    def predict_fixed(self, outputs: TwoStageOutputs, size: tuple[int, int]) -> FixedDetections:
        """Detections in tensors of fixed shapes; see `PredictionHead.predict_fixed`."""
        boxes, valid = self.proposals_fixed(outputs, size)
        shape, all_logits = boxes.shape[:2], []
        for number, stage in enumerate(self.stages):
            logits, deltas = stage(self.pool_fixed(outputs, boxes))
            all_logits.append(logits)
            deltas = deltas.unflatten(0, shape)
            if stage is not self.stages[-1]:
                boxes = clip_boxes(self.coders[number].decode(deltas[:, :, 0], boxes), size).nan_to_num(0)
        probabilities = self.averaged(torch.stack(all_logits)).unflatten(0, shape)
        limits = (self.score_threshold, self.iou_threshold, self.max_detections)
        return class_detections_fixed(probabilities, deltas, boxes, valid, self.coders[-1], size, *limits)

    def cascade(
        self, outputs: TwoStageOutputs, proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Run all stages.

        Returns:
            The boxes that the last stage refines, one (k, 4) an image; its deltas (R, 1, 4); and the logits of all
            stages (3, R, K + 1).
        """
        all_logits = []
        for number, stage in enumerate(self.stages):
            logits, deltas = stage(self.pool(outputs, proposals))
            all_logits.append(logits)
            if stage is not self.stages[-1]:
                proposals = self.refine(number, deltas, proposals, image_sizes)
        return proposals, deltas, torch.stack(all_logits)

    def full_image(self, outputs: TwoStageOutputs) -> None:
        """Compute what the stages compute for as many proposals as an image may have, to count operations."""
        regions = self.regions_of_a_full_image(outputs, self.per_image)
        for stage in self.stages:
            stage(regions)


def cascade_rcnn(
    backbone: Backbone, num_classes: int, channels: int, dyhead: DyHead | None, placement: str = "trunk"
) -> Detector:
    """Cascade R-CNN; see the top of this file."""
    return two_stage(backbone, channels, dyhead, placement, partial(CascadeRCNNHead, num_classes=num_classes))
