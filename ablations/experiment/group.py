"""The processes that train one cell together: a rank on each GPU, or on a CPU a process each for trying it out.

Every rank builds the same model, takes its share of each step's images, and steps with the mean of all ranks' gradients
(`torch.nn.parallel.DistributedDataParallel`), whose losses are normalised over the whole batch (`heads/ranks.py`). Rank
0 alone reads and writes files; what the others need of them it sends.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ablations.data.batch import Share

T = TypeVar("T")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Group:
    """This process among those that work on a cell; by default it is alone.

    Attributes:
        rank: Its number, from 0.
        ranks: How many there are. More than one have a process group, which sends tensors of a CPU by gloo.
    """

    rank: int = 0
    ranks: int = 1

    def share(self, parts: int = 1) -> Share:
        """Which images of a step in so many parts, and which batches of an evaluation, are this rank's."""
        return Share(self.rank, self.ranks, parts)

    def together(self, model: nn.Module) -> nn.Module:
        """A model whose backward pass leaves the mean of all ranks' gradients."""
        if self.ranks == 1:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def apart(self, model: nn.Module) -> AbstractContextManager[object]:
        """While in it, gradients of a model of `together` are added up on each rank alone."""
        return nullcontext() if self.ranks == 1 else cast(DistributedDataParallel, model).no_sync()

    def alike(self, model: nn.Module) -> None:
        """Give every rank's model the parameters and buffers of rank 0's."""
        if self.ranks > 1:
            for value in (*model.parameters(), *model.buffers()):
                dist.broadcast(value.data, src=0)

    def mean(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means over all ranks of scalars that every rank has by the same names: the losses of the whole batch."""
        if self.ranks == 1:
            return dict(losses)
        values = torch.stack([loss.detach().float() for _, loss in sorted(losses.items())])
        dist.all_reduce(values)
        return dict(zip(sorted(losses), (values / self.ranks).unbind(), strict=True))

    def first(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on every rank; it is called there alone. Tensors in it are on the CPU."""
        return self.send(make()) if self.rank == 0 else self.receive()

    def send(self, value: T) -> T:
        """Give a value to the other ranks, which `receive` it; called by rank 0."""
        if self.ranks > 1:
            dist.broadcast_object_list([value], src=0, device=torch.device("cpu"))
        return value

    def receive(self) -> Any:
        """What rank 0 sends next."""
        values = [None]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on rank 0; nothing on the others."""
        if self.ranks == 1:
            return [value]
        values: list[Any] | None = [None] * self.ranks if self.rank == 0 else None
        dist.gather_object(value, values, dst=0)
        return values or []


ALONE = Group()


def with_batch_norm_of_all_ranks(model: Model, group: Group, device: torch.device) -> Model:
    """`model` with a BatchNorm that is trained taking its statistics from the images of all ranks.

    Raises:
        ValueError: There is such a norm on a CPU, for which PyTorch has no `SyncBatchNorm`.
    """
    if group.ranks == 1 or not trained_batch_norms(model):
        return model
    if device.type == "cpu":
        raise ValueError(NO_BATCH_NORM)
    return cast(Model, nn.SyncBatchNorm.convert_sync_batchnorm(model))


def trained_batch_norms(model: nn.Module) -> list[nn.Module]:
    """Every BatchNorm that takes its statistics from the images that it is trained on; leaves `model` in training."""
    return [m for m in model.train().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]


NO_BATCH_NORM = (
    "the backbone trains BatchNorm, whose statistics would be of each rank's images alone: on a CPU PyTorch has no "
    "SyncBatchNorm; take one process, a --backbone with frozen norms (resnet18, say), or --weights of a frozen one"
)


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that another rank is gone, and nothing of this one."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "closed by peer"))
