"""Test-time augmentation: an image is shown at several sizes and mirrored, and the detections are merged.

The detections of all views are put together in pixels of the original image and go through one more NMS within each
class, as the detectors do with the levels of their pyramid. The paper's last table tests so; it does not say with which
sizes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ablations.evaluation.detections import Detections
from kernels import batched_nms

IOU_THRESHOLD = 0.6
MAX_DETECTIONS = 100


def mirrored(boxes: Tensor, width: int) -> Tensor:
    """Boxes (K, 4) xyxy of a mirrored image of this width, in the image as it is."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack((width - x2, y1, width - x1, y2), 1)


def merge(views: Iterable[Detections]) -> Detections:
    """The 100 best detections of several views of one image, after NMS at IoU 0.6 within each class.

    Args:
        views: For each view `boxes` (K, 4) xyxy in pixels of the original image, `scores` (K,), `labels` (K,).

    Raises:
        ValueError: A view has masks, whose union is not defined here.
    """
    views = list(views)
    if any("masks" in view for view in views):
        raise ValueError("several views of an image cannot be merged for a detector with masks; test at one size")
    boxes = torch.cat([view["boxes"] for view in views])
    scores = torch.cat([view["scores"] for view in views])
    labels = torch.cat([view["labels"] for view in views])
    kept = batched_nms(boxes, scores, labels, IOU_THRESHOLD, MAX_DETECTIONS)
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}
