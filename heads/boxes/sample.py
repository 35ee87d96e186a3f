"""The random part of two-stage detectors: the losses see a sample of the candidates.

Everything random comes from torch's global generator, so a training step that seeds it is a pure function of its seed.
"""

import torch
from torch import Tensor

from heads import ranks
from heads.boxes.assign import BACKGROUND


def sample(matched: Tensor, count: int, positive_share: float) -> Tensor:
    """Draw a sample of each image's candidates: positive ones up to a limit, and background for the rest.

    Where there are no more than asked for, all are drawn.

    Args:
        matched: (N, A) int64, an assignment: `BACKGROUND`, another negative number for what takes no part, or the index
            of a box.
        count: Candidates to draw in each image.
        positive_share: Limit of the positive ones, as a fraction of `count`.

    Returns:
        (N, A) bool, whether a candidate was drawn.
    """
    keys = ranks.rand(len(matched), matched.shape[1], matched.device)
    chosen = torch.zeros_like(matched, dtype=torch.bool)
    room = torch.full((len(matched), 1), int(count * positive_share), device=matched.device)
    for group in (matched >= 0, matched == BACKGROUND):
        # 2 is more than any key.
        order = torch.where(group, keys, 2).topk(min(count, matched.shape[1]), largest=False).indices
        rank = torch.arange(order.shape[1], device=matched.device)
        chosen |= torch.zeros_like(chosen).scatter_(1, order, rank < room) & group
        room = count - chosen.sum(1, keepdim=True)
    return chosen
