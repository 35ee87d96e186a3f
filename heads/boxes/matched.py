"""What an assignment, indices into the boxes of a batch, says that the anchors are to learn."""

from collections.abc import Sequence

import torch
from torch import Tensor


def labels_of(matched: Tensor, labels: Sequence[Tensor], background: int) -> Tensor:
    """The class that each anchor is to predict.

    Args:
        matched: int64 of any shape: an index into the batch's boxes, or `BACKGROUND` or `IGNORED`.
        labels: For each image (n_i,) int64; n_i may be 0.
        background: The label of an anchor without a box, assigned or ignored.

    Returns:
        int64 of the shape of `matched`.

    Example:
        >>> import torch
        >>> from heads.boxes.matched import labels_of
        >>> labels_of(torch.tensor([[1, -1], [2, -2]]), [torch.tensor([5, 6]), torch.tensor([7])], background=80)
        tensor([[ 6, 80],
                [ 7, 80]])
    """
    # Background stands behind all labels, where an index of -1 reads it.
    return torch.cat([*labels, torch.tensor([background], device=matched.device)])[matched.clamp(min=-1)]


def positives_of(matched: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The anchors that have a box, and those boxes.

    Args:
        matched: (N, A) int64: an index into the batch's boxes, or a negative number.
        boxes: For each of the N images (n_i, 4); n_i may be 0.

    Returns:
        (P,) int64 indices into the N * A anchors, and (P, 4) the box of each.
    """
    flat = matched.flatten()
    positive = (flat >= 0).nonzero()[:, 0]
    return positive, torch.cat(list(boxes))[flat[positive]]
