"""From class probabilities and boxes of all anchors to the detections of an image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor

from heads.boxes.boxes import clip_boxes
from kernels import batched_nms


class ImageDetections(TypedDict):
    """What a detector finds in one image, by falling score.

    Attributes:
        boxes: (K, 4) x1, y1, x2, y2 in pixels, clipped to the image.
        scores: (K,) in 0 … 1.
        labels: (K,) int64.
        masks: (K, height, width) bool, of detectors with masks.
        mask_probabilities: (K, 28, 28), the masks before they are pasted into the image.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: NotRequired[Tensor]
    mask_probabilities: NotRequired[Tensor]


# Image, anchors (K,) and classes (K,) of its candidates -> their boxes (K, 4) in pixels and scores (K,). Or of all N
# images (N, 1), (N, K) and (N, K) -> (N, K, 4) and (N, K).
ReadCandidates = Callable[[int | Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Candidates(NamedTuple):
    """What a dense head predicts for N images, and how it is read; A anchors, C classes.

    Attributes:
        probabilities: (N, A, C), what `score_threshold` is compared with.
        counts: Anchors of each level; they sum to A.
        read: Gives boxes and scores of chosen candidates, which alone need decoding.
        rank: (N, A, C), what the best of a level are chosen by; None for `probabilities`.
    """

    probabilities: Tensor
    counts: Sequence[int]
    read: ReadCandidates
    rank: Tensor | None = None

    @property
    def order(self) -> Tensor:
        """(N, A, C), what the best of a level are chosen by."""
        return self.probabilities if self.rank is None else self.rank


@dataclass(frozen=True)
class Selection:
    """Which of a dense head's predictions become detections; detectors differ in these numbers alone.

    Attributes:
        score_threshold: Class probability that a candidate must exceed.
        per_level: The most candidates of a level that go into NMS.
        iou_threshold: IoU above which NMS drops the lower of two boxes of a class.
        most: The most detections of an image.
        clip_first: Whether boxes are clipped to the image, and dropped where nothing is left of them, before NMS
            (mmdetection) or after it (detectron2).
    """

    score_threshold: float = 0.05
    per_level: int = 1000
    iou_threshold: float = 0.5
    most: int = 100
    clip_first: bool = True

    def detections(self, candidates: Candidates, image_sizes: Sequence[tuple[int, int]]) -> list[ImageDetections]:
        """Select the candidates of each image, decode them, and apply NMS.

        Args:
            candidates: Of N images.
            image_sizes: (height, width) of each image before padding.

        Returns:
            The detections of each image, by falling score.
        """
        probabilities, counts, read, _ = candidates
        results = []
        for image, (values, order, size) in enumerate(zip(probabilities, candidates.order, image_sizes, strict=True)):
            anchor, label = best_per_level(values, self.score_threshold, self.per_level, counts, order)
            boxes, scores = read(image, anchor, label)
            results.append(
                detections(boxes, scores, label, size, self.iou_threshold, self.most, clip_first=self.clip_first)
            )
        return results


def best_per_level(
    scores: Tensor, threshold: float, topk: int, counts: Sequence[int], rank: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Candidates of one image: anchor and class of every score above a threshold, limited by level.

    Args:
        scores: (A, C) probabilities.
        threshold: What a score must exceed.
        topk: The most candidates of a level, by `rank`; equal ones in the order of anchors, then classes.
        counts: Anchors of each level; they sum to A.
        rank: (A, C), what the best are chosen by; None for `scores`.

    Returns:
        (K,) int64 anchors and (K,) int64 classes, in the order of anchors, then classes.

    Example:
        >>> import torch
        >>> from heads.boxes.selection import best_per_level
        >>> best_per_level(torch.tensor([[0.1, 0.9], [0.6, 0.2]]), 0.5, 10, counts=[1, 1])
        (tensor([0, 1]), tensor([1, 0]))
    """
    classes = scores.shape[1]
    index = (scores > threshold).flatten().nonzero()[:, 0]
    if len(index) > topk:
        value = (scores if rank is None else rank).flatten()[index]
        ends = torch.tensor(counts).cumsum(0) * classes
        # One transfer for all levels: how many of the candidates each level holds.
        held = torch.searchsorted(index, ends.to(index.device)).diff(prepend=index.new_zeros(1)).tolist()
        index = torch.cat(
            [
                part if len(part) <= topk else part[v.argsort(descending=True, stable=True)[:topk].sort().values]
                for part, v in zip(index.split(held), value.split(held), strict=True)
            ]
        )
    return index // classes, index % classes


def detections(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    iou_threshold: float,
    max_detections: int,
    clip_first: bool,
) -> ImageDetections:
    """Apply NMS to the candidates of one image, clip them to it, and drop boxes without area.

    Args:
        boxes: (K, 4) in pixels.
        scores: (K,).
        labels: (K,) int64; boxes of different labels do not meet in NMS.
        size: (height, width) of the image.
        iou_threshold: IoU above which NMS drops the lower of two boxes.
        max_detections: The most boxes that survive NMS.
        clip_first: Whether to clip and drop before NMS (mmdetection) or after it (detectron2).

    Returns:
        The image's detections, by falling score.
    """
    clipped = clip_boxes(boxes, size)
    if clip_first:
        boxes = clipped
        keep = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1).nonzero()[:, 0]
        keep = keep[batched_nms(boxes[keep], scores[keep], labels[keep], iou_threshold, max_detections)]
    else:
        keep = batched_nms(boxes, scores, labels, iou_threshold, max_detections)
        keep = keep[((clipped[keep, 2:] - clipped[keep, :2]) > 0).all(1)]
    return {"boxes": clipped[keep], "scores": scores[keep], "labels": labels[keep]}
