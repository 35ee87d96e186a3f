"""What a cell will cost where none of its kind has run: parameters, multiply-adds, and memory of its training.

Tensors without memory go through its detector, so nothing is computed and a large one costs a second. Blocks are alike:
a detector of many costs what it does with one, and for each further one what a second one costs a DyHead by itself.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ablations.data.loader import resized
from ablations.data.split import Dataset
from ablations.experiment.experiment import build
from ablations.experiment.precision import autocast
from ablations.grid import Cell
from heads.dyhead.dyhead import DyHead
from kernels import use_backend

# Numbers beside each trained one, by optimiser: its gradient, and what the optimiser remembers of it.
BESIDE = {"sgd": 2, "adamw": 3}
# The first block is counted within a detector that has all attentions, and exchanged for another one.
WHOLE = "LSC"


@dataclass(frozen=True)
class Cost:
    """What a detector or a block costs.

    Attributes:
        parameters, trained: Numbers of them.
        macs: Multiply-adds of a pass.
        saved: Bytes that the backward pass needs of the forward one.
    """

    parameters: int
    trained: int
    macs: float
    saved: int

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        """This and another cost that many times."""
        return Cost(
            self.parameters + times * other.parameters,
            self.trained + times * other.trained,
            self.macs + times * other.macs,
            self.saved + times * other.saved,
        )


class Estimate(NamedTuple):
    """What a cell will cost.

    Attributes:
        params_M: Millions of parameters.
        GMACs: 10^9 multiply-adds of an image in evaluation, as rows have them.
        memory_MB: Weights, gradients, the optimiser's memory and what the backward pass needs of the forward one, in
            10^6 bytes. Losses, workspaces and what an allocator leaves unused come on top.
    """

    params_M: float
    GMACs: float
    memory_MB: float


def estimate(cell: Cell, data: Dataset) -> Estimate:
    """Estimate a cell on its data: the first image of val as it is tested, the largest of train as it is trained on.

    Args:
        cell: Any cell.
        data: What it will be trained and tested on.
    """
    classes = len(data.train.category_ids)
    tested = shape(data.val.images[0].width, data.val.images[0].height, cell.test_size[0], cell.max_size)
    sizes = {(image.width, image.height) for image in data.train.images}
    trained = max((shape(*size, max(cell.image_size), cell.max_size) for size in sizes), key=math.prod)
    test = total(cell, classes, 1, tested)
    train = total(cell, classes, cell.batch_size // cell.accumulate, trained)
    memory = 4 * (train.parameters + BESIDE[cell.optimizer] * train.trained) + train.saved
    return Estimate(test.parameters / 1e6, test.macs / 1e9, memory / 1e6)


@cache
def shape(width: int, height: int, short_side: int, max_size: int) -> tuple[int, int]:
    """Height and width of an image as it is shown."""
    width, height = resized(width, height, short_side, max_size)
    return height, width


def total(cell: Cell, classes: int, images: int, size: tuple[int, int]) -> Cost:
    """The cost of a pass of that many images of (height, width) pixels through the cell's detector."""
    kind = replace(cell, seed=0, depth=cell.depth and 1)
    if cell.depth is None or cell.attentions is None:
        return whole(kind, classes, images, size)[0]
    if cell.placement != "trunk":
        cost, maps = whole(kind, classes, images, size)
    else:
        full = replace(kind, attentions=WHOLE, coarse_offsets=None)
        cost, maps = whole(full, classes, images, size)
        cost = cost.plus(blocks(full, maps), -1).plus(blocks(kind, maps))
    further = blocks(replace(kind, depth=2), maps).plus(blocks(kind, maps), -1)
    return cost.plus(further, cell.depth - 1)


Maps = tuple[tuple[int, ...], ...]


@cache
def whole(cell: Cell, classes: int, images: int, size: tuple[int, int]) -> tuple[Cost, Maps]:
    """The cost of a whole detector, and the shapes of its pyramid's maps."""
    maps: Maps = ()

    def note(module: nn.Module, inputs: tuple[list[Tensor]]) -> None:
        nonlocal maps
        maps = tuple(tuple(x.shape) for x in inputs[0])

    def pass_through(model: Any) -> Any:
        model.trunk.register_forward_pre_hook(note)
        outputs = model.raw(model.batch([torch.empty(3, *size)] * images))
        model.head.full_image(outputs)
        return outputs

    def make() -> nn.Module:
        model = build(cell, classes, None)
        if cell.weights != "none":
            model.backbone.freeze(cell.frozen)  # type: ignore[operator]  # any of `BACKBONES` has it
        return model.train()

    return counted(make, pass_through, cell.precision), maps


@cache
def blocks(cell: Cell, maps: Maps) -> Cost:
    """The cost of a cell's DyHead by itself on maps of these shapes."""

    def make() -> nn.Module:
        return DyHead(
            cell.channels,
            cell.depth or 0,
            cell.attentions or "",
            cell.formulation or "released",
            cell.coarse_offsets or "crop",
            len(maps),
        )

    def pass_through(model: Any) -> Any:
        # What follows keeps what it is given, as the layers of a prediction head do.
        return [y.square() for y in model([torch.empty(shape, requires_grad=True) for shape in maps])]

    return counted(make, pass_through, cell.precision)


def counted(make: Callable[[], nn.Module], call: Callable[[Any], Any], precision: str) -> Cost:
    """The cost of `call` on what `make` makes."""
    counter = FlopCounterMode(display=False)
    with torch.device("meta"):
        model = make()
    parameters = list(model.parameters())
    with torch.device("cpu") as device, use_backend("torch"), FakeTensorMode(), saved_bytes() as saved, counter:
        # Made elsewhere and swapped: a detector that copies a module of its own would copy the mode with the tensors.
        model._apply(lambda value: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype))
        own = {id_of(value) for value in [*model.parameters(), *model.buffers()]}
        with autocast(device, precision):
            call(model)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    kept = sum(storage.nbytes() for number, storage in saved.items() if number not in own)
    return Cost(sum(parameter.numel() for parameter in parameters), trained, counter.get_total_flops() / 2, kept)


@contextmanager
def saved_bytes() -> Iterator[dict[int, torch.UntypedStorage]]:
    """The storages that are saved for a backward pass, each once."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(value: Tensor) -> Tensor:
        storages[id_of(value)] = value.untyped_storage()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield storages


def id_of(value: Tensor) -> int:
    """The same number for tensors that share their memory."""
    return value.untyped_storage()._cdata
