"""The detections of a batch as tensors of fixed shapes, which a compiled or exported graph can have.

`heads.boxes.selection` takes exactly the candidates that exceed a threshold, image by image; their number is known when
they have been counted. Here every image has as many candidates as a level may give, those that are none are marked, and
the result is filled up. Both find the same detections in the same order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from heads.boxes.boxes import clip_boxes
from heads.boxes.selection import Candidates, Selection
from kernels import nms_mask

# Below any score, which may be a logit, for what is no candidate; and between that and every score.
NONE, LEAST = -3e38, -1e38


class FixedDetections(NamedTuple):
    """Detections of N images of one size, by falling score, each image filled up to M with what is none.

    Attributes:
        boxes: (N, M, 4) x1, y1, x2, y2 in pixels, clipped to the image; 0 where there is none.
        scores: (N, M) in 0 … 1; 0 where there is none.
        labels: (N, M) int64; -1 where there is none.
        masks: (N, M, 28, 28) probabilities inside the box, of detectors with masks; else None.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None


def image_index(like: Tensor) -> Tensor:
    """(N, 1) int64, the number of each of N images, to index rows of a batch with."""
    return torch.arange(like.shape[0], device=like.device)[:, None]


def least(most: int, count: int) -> int:
    """The smaller of two numbers, of which one may be a symbol."""
    number: int = torch.sym_min(most, count)
    return number


def best_of(scores: Tensor, most: int) -> Tensor:
    """(N, m) int64: the `most` best of scores (N, K) by falling score, equal ones in their order; fewer if K is."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, : least(most, scores.shape[1])]


def one_hot_scores(scores: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(N, K) scores and labels -> (N, classes, K): the score in its label's row, `NONE` in the others."""
    rows = torch.arange(classes, device=labels.device)[:, None]
    return torch.where(labels[:, None] == rows, scores[:, None], NONE)


def whole(boxes: Tensor, least_side: float = 0.0) -> Tensor:
    """(...) bool: which boxes (..., 4) exceed a side in width and height."""
    return (boxes[..., 2:] - boxes[..., :2] > least_side).all(-1)


def filled(boxes: Tensor, scores: Tensor, labels: Tensor, most: int) -> FixedDetections:
    """The best of what is kept.

    Args:
        boxes: (N, K, 4) in pixels, clipped.
        scores: (N, K), `NONE` for what is not kept.
        labels: (N, K) int64.
        most: The most detections of an image.
    """
    image, best = image_index(scores), best_of(scores, most)
    scores = scores[image, best]
    found = scores > LEAST
    return FixedDetections(
        torch.where(found[..., None], boxes[image, best], 0.0),
        torch.where(found, scores, 0.0),
        torch.where(found, labels[image, best], -1),
    )


def fixed_detections(candidates: Candidates, selection: Selection, size: tuple[int, int]) -> FixedDetections:
    """What `Selection.detections` finds, for images of one size.

    Args:
        candidates: A dense head's predictions.
        selection: Which of them become detections.
        size: (height, width) of the images, ints or symbols.
    """
    probabilities, rank = candidates.probabilities, candidates.order
    classes, image = probabilities.shape[2], image_index(probabilities)
    # Below every rank, which is a product of probabilities.
    rank = torch.where(probabilities > selection.score_threshold, rank, NONE).flatten(1)
    best, start = [], 0
    for count in candidates.counts:
        of_level = rank[:, start * classes : (start + count) * classes]
        # In the order of anchors, then classes, so that NMS takes equal scores in that order.
        part = of_level.topk(least(selection.per_level, count * classes), 1).indices.sort(1).values
        best.append(part + start * classes)
        start = start + count
    index = torch.cat(best, 1)
    anchor, label = index // classes, index % classes
    taken = rank[image, index] > LEAST
    boxes, scores = candidates.read(image, anchor, label)
    clipped = clip_boxes(boxes, size)
    if selection.clip_first:
        boxes, taken = clipped, taken & whole(clipped)
    scores = torch.where(taken, scores, NONE)
    kept = nms_mask(boxes, one_hot_scores(scores, label, classes), selection.iou_threshold, LEAST).any(1)
    scores = torch.where(kept, scores, NONE)
    if not selection.clip_first:
        # What clipping empties has taken its place among the most.
        best_now = best_of(scores, selection.most)
        clipped, label, scores = clipped[image, best_now], label[image, best_now], scores[image, best_now]
        scores = torch.where(whole(clipped), scores, NONE)
    return filled(clipped, scores, label, selection.most)
