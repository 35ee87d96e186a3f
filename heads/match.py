"""Two-stage detectors' choice of what to learn from: candidates matched with boxes by IoU, and a random sample of them.

Everything random comes from torch's global generator, so a training step that seeds it is a pure function of its seed.
"""

import torch
from torch import Tensor

from heads.boxes import pairwise_iou

BACKGROUND, IGNORED = -1, -2


def match_boxes(
    candidates: Tensor,
    boxes: Tensor,
    positive: float,
    negative: float,
    least: float,
    low_quality: bool,
) -> Tensor:
    """Max-IoU assignment of one image's boxes to candidates (Faster R-CNN, Ren et al., 2015).

    A candidate answers for the box it overlaps most, if by at least `positive`; below `negative` it is background. With
    `low_quality` every box also gets all candidates that tie for its own best overlap, if that reaches `least`; among
    boxes that want the same candidate so, the last wins. Computed in float32; other ties go to the first box.

    Args:
        candidates: (A, 4) x1, y1, x2, y2.
        boxes: (n, 4); n may be 0.

    Returns:
        (A,) int64: index of a box, `BACKGROUND` or `IGNORED`.
    """
    if len(boxes) == 0:
        return torch.full((len(candidates),), BACKGROUND, device=candidates.device)
    overlap = pairwise_iou(boxes.float(), candidates.float())
    best, index = overlap.max(0)
    matched = torch.where(best >= positive, index, torch.where(best < negative, BACKGROUND, IGNORED))
    if low_quality and len(candidates):
        highest = overlap.amax(1, keepdim=True)
        wanted = (overlap == highest) & (highest >= least)
        last = torch.where(wanted, torch.arange(len(boxes), device=boxes.device)[:, None], -1).amax(0)
        matched = torch.where(last >= 0, last, matched)
    return matched


def sample(matched: Tensor, count: int, positive_share: float) -> Tensor:
    """Draw up to `count` candidates an image, at most `positive_share` of them positive, the rest background.

    Where there are no more than asked for, all are taken.

    Args:
        matched: (N, A) int64, what `match_boxes` gave, images padded with `IGNORED`.

    Returns:
        (N, A) bool.
    """
    keys = torch.rand(matched.shape, device=matched.device)
    chosen = torch.zeros_like(matched, dtype=torch.bool)
    room = torch.full((len(matched), 1), int(count * positive_share), device=matched.device)
    for group in (matched >= 0, matched == BACKGROUND):
        # 2 is more than any key.
        order = torch.where(group, keys, 2).topk(min(count, matched.shape[1]), largest=False).indices
        rank = torch.arange(order.shape[1], device=matched.device)
        chosen |= torch.zeros_like(chosen).scatter_(1, order, rank < room) & group
        room = count - chosen.sum(1, keepdim=True)
    return chosen
