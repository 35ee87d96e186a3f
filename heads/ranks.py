"""What ranks that share a batch have to know of each other for their losses to be those of the whole batch.

A loss is a sum over elements divided by a count. `DistributedDataParallel` takes the mean of the ranks' gradients, so
each rank divides its sum by the mean of the ranks' counts: the mean of the ranks' losses is then the sum over all
elements divided by the count of all. What is drawn for the images of a batch is drawn for the images of all ranks, in
their order, by every rank, which takes its own: with equal seeds and on a CPU the draws are those of one process.

Without an initialised process group, and with one rank, everything here is the plain operation.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def ranks() -> int:
    """How many processes share a batch; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def normaliser(count: Tensor | int | float, least: float, like: Tensor) -> Tensor | int | float:
    """What a loss is divided by: the count, `least` at least; of several ranks the mean of that of all.

    Args:
        count: A number or a scalar tensor, not differentiated.
        least: The least that the count of the whole batch is taken for.
        like: A tensor on the device of the losses.
    """
    if ranks() == 1:
        return count.clamp(min=least) if isinstance(count, Tensor) else max(count, least)
    # A scalar tensor does not raise the precision of the losses.
    total = torch.as_tensor(count, device=like.device).detach().to(torch.float64, copy=True)
    dist.all_reduce(total)
    return total.clamp_(min=least) / ranks()


def rand(images: int, columns: int, device: torch.device) -> Tensor:
    """(images, columns) uniform in [0, 1): a row for each image of this rank; ranks may differ in their columns."""
    if ranks() == 1:
        return torch.rand(images, columns, device=device)
    most = torch.tensor(columns, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return _own(torch.rand(ranks() * images, int(most), device=device), images)[:, :columns]


def dropout(x: Tensor, share: float, training: bool) -> Tensor:
    """`torch.nn.functional.dropout` of (N, ...), N the images of this rank."""
    if ranks() == 1 or not training:
        return F.dropout(x, share, training)
    kept = x.new_empty(ranks() * len(x), *x.shape[1:]).bernoulli_(1 - share).div_(1 - share)
    return x * _own(kept, len(x))


class Dropout(nn.Module):
    """`dropout` as a layer.

    Args:
        share: Of the elements that are dropped in training.
    """

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> the same shape."""
        return dropout(x, self.share, self.training)


def _own(rows: Tensor, images: int) -> Tensor:
    start = dist.get_rank() * images
    return rows[start : start + images]
