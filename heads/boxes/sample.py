"""The random part of two-stage detectors: of all the candidates that an assignment speaks of, the losses see a few.

Everything random comes from torch's global generator, so a training step that seeds it is a pure function of its seed.
"""

import torch
from torch import Tensor

from heads.boxes.assign import BACKGROUND


def sample(matched: Tensor, count: int, positive_share: float) -> Tensor:
    """Draw up to `count` candidates an image, at most `positive_share` of them positive, the rest background.

    Where there are no more than asked for, all are taken.

    Args:
        matched: (N, A) int64, an assignment: `BACKGROUND`, another negative number for what takes no part, or the index
            of a box.

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
