"""What dense heads share: one row per anchor instead of maps by level, and the way from scores to detections."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def flatten_levels(maps: Sequence[Tensor], values: int) -> Tensor:
    """Feature maps as rows: L maps (N, a * values, H_l, W_l) to (N, A, values), in the order of `heads.boxes.anchors`.

    Channels are read anchor by anchor. Half precision becomes float32, in which losses and boxes are computed.
    """
    flat = torch.cat([m.flatten(2) for m in maps], 2)
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    batch, channels, cells = flat.shape
    if channels == values:
        return flat.transpose(1, 2).contiguous()
    return flat.view(batch, channels // values, values, cells).permute(0, 3, 1, 2).reshape(batch, -1, values)


def predict_rows(features: Sequence[Tensor], *predictors: nn.Conv2d, anchors: int = 1) -> tuple[Tensor, ...]:
    """Apply predictors that read the same maps as one convolution, and give the rows of each.

    Args:
        features: L maps (N, channels, H_l, W_l).
        predictors: convolutions with bias, of one kernel size and padding.
        anchors: per cell; a predictor's channels are read anchor by anchor.

    Returns:
        One (N, A, channels / anchors) a predictor, as `flatten_levels` gives them.
    """
    first = predictors[0]
    weight, bias = first.weight, first.bias
    if len(predictors) > 1:
        weight, bias = torch.cat([p.weight for p in predictors]), torch.cat([p.bias for p in predictors])
    maps = [F.conv2d(f, weight, bias, padding=first.padding) for f in features]
    channels = [len(p.bias) for p in predictors]
    if anchors == 1:
        return flatten_levels(maps, len(bias)).split(channels, -1)
    by_predictor = zip(*(m.split(channels, 1) for m in maps), strict=True)
    return tuple(flatten_levels(part, c // anchors) for part, c in zip(by_predictor, channels, strict=True))


def best_per_level(
    scores: Tensor, threshold: float, topk: int, counts: Sequence[int], rank: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Candidates of one image: anchor and class of every score above `threshold`, at most `topk` of them a level.

    Args:
        scores: (A, C) probabilities.
        threshold: strict.
        topk: per level, by `rank`; equal ones in the order of anchors, then classes.
        counts: anchors of each level, A in all.
        rank: (A, C) what the best are chosen by, or None for `scores`.

    Returns:
        (K,) int64 anchors and (K,) int64 classes, in the order of anchors, then classes.
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
    """Suppress, clip to the image, and drop boxes without area: one image's detections, by falling score.

    Args:
        boxes: (K, 4) in pixels.
        scores: (K,).
        labels: (K,) int64.
        size: (height, width) of the image.
        iou_threshold: of the suppression within a class.
        max_detections: the most that survive the suppression.
        clip_first: clip and drop before the suppression (mmdetection) or after it (detectron2).
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
