"""Mask R-CNN (He, Gkioxari, Dollár, Girshick, ICCV 2017): Faster R-CNN (`heads/two_stage/faster_rcnn.py`) and a mask.

Ingredients, beside Faster R-CNN's:
- RoIAlign of the positive regions to 14×14; four 3×3 convolutions, a transposed one, 28×28 logits for each class;
- binary cross-entropy of the mask of the region's class, the mean over all cells of the positive regions;
- detections: the mask of the detected class, interpolated into the image, from probability 0.5 on.

Masks to learn from are bitmaps, cut out by RoIAlign, as mmdetection does by default, or polygons, drawn at 28×28, as
detectron2 does; the two differ in a few cells along the edges.

DyHead sits where it does in Faster R-CNN. With `placement="around_roi"` the mask head stays as it is, behind its own
RoIAlign: the paper's Fig. 2(c) shows classes and boxes only.

Deviations: those of Faster R-CNN; the convolutions are as wide as the pyramid, 256 in the published one.
"""

from functools import partial
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from heads.backbones.resnet import Backbone
from heads.boxes.fixed import FixedDetections
from heads.boxes.selection import ImageDetections
from heads.detector import Detector
from heads.dyhead.dyhead import DyHead
from heads.ranks import normaliser
from heads.targets import Target
from heads.two_stage.faster_rcnn import FasterRCNNHead, TwoStageOutputs, TwoStageSettings, two_stage
from heads.two_stage.masks import MASK_BINS, MaskHead, mask_targets, paste
from heads.two_stage.roi import Regions


class MaskRCNNHead(FasterRCNNHead):
    """Faster R-CNN's head with masks; see the top of this file. Arguments as for `FasterRCNNHead`."""

    needs_masks = True

    def __init__(self, *, in_channels: int, num_classes: int, **settings: Unpack[TwoStageSettings]):
        super().__init__(in_channels=in_channels, num_classes=num_classes, **settings)
        self.mask = MaskHead(in_channels, num_classes)

    def loss(
        self, outputs: TwoStageOutputs, targets: list[Target], image_sizes: list[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """The losses of Faster R-CNN and `loss_mask`; targets have `masks` (`heads.two_stage.masks.mask_targets`)."""
        regions = self.regions(self.proposals(outputs, image_sizes), targets)
        losses = self.rpn.loss(outputs.rpn, targets, image_sizes) | self.box_loss(outputs, regions)
        return losses | {"loss_mask": self.mask_loss(outputs, regions, targets)}

    def mask_loss(self, outputs: TwoStageOutputs, regions: Regions, targets: list[Target]) -> Tensor:
        """Binary cross-entropy of the positive regions' masks."""
        boxes, matched = regions.positives([len(t["boxes"]) for t in targets])
        logits = self.mask(self.pool(outputs, boxes, MASK_BINS))
        logits = logits[torch.arange(len(logits), device=logits.device), regions.labels[regions.positive]]
        goals = mask_targets(targets, boxes, matched).to(logits.dtype)
        count = normaliser(logits.numel(), 1, logits)
        return F.binary_cross_entropy_with_logits(logits, goals, reduction="sum") / count

    @torch.no_grad()
    def predict(self, outputs: TwoStageOutputs, image_sizes: list[tuple[int, int]]) -> list[ImageDetections]:
        """Detections as Faster R-CNN's, with `masks` (K, height, width) bool of the image's size.

        `mask_probabilities` (K, 28, 28) are the same before `heads.two_stage.masks.paste`, for images of another size.
        """
        results = super().predict(outputs, image_sizes)
        logits = self.mask(self.pool(outputs, [r["boxes"] for r in results], MASK_BINS))
        labels = torch.cat([r["labels"] for r in results])
        probabilities = logits[torch.arange(len(logits), device=logits.device), labels].sigmoid()
        for result, masks, size in zip(
            results, probabilities.split([len(r["boxes"]) for r in results]), image_sizes, strict=True
        ):
            result |= {"masks": paste(masks, result["boxes"], size), "mask_probabilities": masks}
        return results

    @torch.no_grad()
    def predict_fixed(self, outputs: TwoStageOutputs, size: tuple[int, int]) -> FixedDetections:
        """Faster R-CNN's, with `masks` (N, M, 28, 28) before they are pasted; see `PredictionHead.predict_fixed`."""
        found = super().predict_fixed(outputs, size)
        logits = self.mask(self.pool_fixed(outputs, found.boxes, MASK_BINS))
        label = found.labels.flatten().clamp(min=0)
        masks = logits[torch.arange(label.shape[0], device=label.device), label].sigmoid()
        return found._replace(masks=masks.unflatten(0, found.labels.shape))

    def full_image(self, outputs: TwoStageOutputs) -> None:
        """As in Faster R-CNN, and masks for as many detections as an image may have."""
        super().full_image(outputs)
        self.mask(self.regions_of_a_full_image(outputs, self.max_detections, MASK_BINS))


def mask_rcnn(
    backbone: Backbone, num_classes: int, channels: int, dyhead: DyHead | None, placement: str = "trunk"
) -> Detector:
    """Mask R-CNN; see the top of this file."""
    return two_stage(backbone, channels, dyhead, placement, partial(MaskRCNNHead, num_classes=num_classes))
