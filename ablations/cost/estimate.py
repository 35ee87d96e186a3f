"""What a cell will cost where none of its kind has run: parameters, operations, and memory of its training.

Tensors without memory go through its detector, so nothing is computed and a large one costs a second. Blocks are alike:
a detector of many costs what it does with one, and for each further one what a second one costs a DyHead by itself.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ablations.data.loader import Loader, resized
from ablations.data.split import Dataset, Split, sizes
from ablations.experiment.experiment import build
from ablations.experiment.precision import autocast
from ablations.grid import Cell
from heads.detector import DIVISOR
from heads.dyhead.dyhead import DyHead
from kernels import use_backend

# Numbers beside each trained one, by optimiser: its gradient, and what the optimiser remembers of it.
BESIDE = {"sgd": 2, "adamw": 3}
# The first block is counted within a detector that has all attentions, and exchanged for another one.
WHOLE = "LSC"
# Fields of a cell that a pass of given images does not depend on, so that cells which differ in them are counted once.
UNSEEN: dict[str, Any] = {
    **dict.fromkeys(("data", "data_fingerprint", "train_fingerprint", "optimizer"), ""),
    **dict.fromkeys(("seed", "steps", "batch_size", "accumulate"), 0),
    **dict.fromkeys(("image_size", "test_size"), ()),
    "test_flip": False,
}
# Of so many training steps the mean of what their images are padded to is taken.
STEPS = 200


@dataclass(frozen=True)
class Cost:
    """What a detector or a block costs.

    Attributes:
        parameters, trained: Numbers of them.
        macs: Multiply-adds of a forward pass.
        saved: Bytes that the backward pass needs of the forward one.
        backward: Multiply-adds of the backward pass, which ends at what is frozen.
    """

    parameters: int
    trained: int
    macs: float
    saved: int
    backward: float

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        """This and another cost that many times."""
        return Cost(
            self.parameters + times * other.parameters,
            self.trained + times * other.trained,
            self.macs + times * other.macs,
            self.saved + times * other.saved,
            self.backward + times * other.backward,
        )


class Estimate(NamedTuple):
    """What a cell will cost.

    Attributes:
        params_M: Millions of parameters.
        GMACs: 10^9 multiply-adds of an image in evaluation, as rows have them.
        memory_MB: Weights, gradients, the optimiser's memory and what the backward pass needs of the forward one, in
            10^6 bytes. Losses, workspaces and what an allocator leaves unused come on top.
        training: Floating-point operations of all steps, forward and backward, two a multiply-add, on images of the
            mean size that they are padded to. Losses and the optimiser's step come on top. Too many where a backbone is
            frozen as a whole, whose maps a process keeps.
        evaluation: Those of all images of val, each as often as it is shown. NMS and metrics come on top.
    """

    params_M: float
    GMACs: float
    memory_MB: float
    training: float
    evaluation: float


def estimate(cell: Cell, data: Dataset) -> Estimate:
    """Estimate a cell on its data.

    Memory is that of the largest image of train. GMACs are those of the first image of val as it is tested. Operations
    are counted on the same two images and taken to be in proportion to the pixels that a batch is padded to, which they
    are but for what a second stage does with its proposals and a transformer with all pairs of positions.

    Args:
        cell: Any cell.
        data: What it will be trained and tested on.
    """
    classes = len(data.train.category_ids)
    tested = shape(data.val.images[0].width, data.val.images[0].height, cell.test_size[0], cell.max_size)
    trained = largest(data.train, max(cell.image_size), cell.max_size)
    # Multiply-adds are the same in every precision, and without autocast there are fewer operators to go through.
    test = total(replace(cell, precision="fp32"), classes, 1, tested)
    part = cell.batch_size // cell.accumulate
    train = total(cell, classes, part, trained)
    memory = 4 * (train.parameters + BESIDE[cell.optimizer] * train.trained) + train.saved
    # Of an image of these sizes, and how many images of them all that will be shown come to.
    each = (train.macs + train.backward) / part
    shown = cell.steps * cell.batch_size * trained_pixels(data.train, cell) / pixels(trained)
    views = sum(evaluated_pixels(data.val, cell.batch_size, side, cell.max_size) for side in cell.test_size)
    views *= 1 + cell.test_flip
    training, evaluation = 2 * each * shown, 2 * test.macs * views / pixels(tested)
    return Estimate(test.parameters / 1e6, test.macs / 1e9, memory / 1e6, training, evaluation)


def pixels(extent: Iterable[int]) -> int:
    """Pixels of an image of (height, width) with its padding."""
    return math.prod(-(-side // DIVISOR) * DIVISOR for side in extent)


@cache
def largest(split: Split, short_side: int, max_size: int) -> tuple[int, int]:
    """Height and width of the largest image of a split as it is shown."""
    different = np.unique(sizes(split.images), axis=0).tolist()
    return max((shape(*size, short_side, max_size) for size in different), key=math.prod)


def trained_pixels(split: Split, cell: Cell) -> float:
    """The mean number of pixels that an image of a cell's training is padded to, over its first steps."""
    return _trained_pixels(split, cell.batch_size, cell.accumulate, cell.image_size, cell.max_size)


@cache
def _trained_pixels(split: Split, batch: int, parts: int, short_sides: tuple[int, ...], max_size: int) -> float:
    # Which images come together is the loader's own draw; of their sides any draw will do.
    loader, generator = Loader(split, batch, 0, short_sides, max_size), np.random.default_rng(0)
    declared, found = sizes(split.images), []
    for step in range(STEPS):
        chosen, sides = declared[loader.indices(step)].tolist(), generator.choice(short_sides, batch).tolist()
        shown = [shape(*size, side, max_size) for size, side in zip(chosen, sides, strict=True)]
        found += [pixels(extent) for extent in np.array(shown).reshape(parts, -1, 2).max(1).tolist()]
    return sum(found) / len(found)


@cache
def evaluated_pixels(split: Split, batch: int, short_side: int, max_size: int) -> int:
    """The number of pixels that all images of a split are padded to in batches of so many, as evaluation shows them."""
    shapes = [shape(*size, short_side, max_size) for size in sizes(split.images).tolist()]
    batches = [shapes[start : start + batch] for start in range(0, len(shapes), batch)]
    return sum(len(shown) * pixels(map(max, zip(*shown, strict=True))) for shown in batches)


@cache
def shape(width: int, height: int, short_side: int, max_size: int) -> tuple[int, int]:
    """Height and width of an image as it is shown."""
    width, height = resized(width, height, short_side, max_size)
    return height, width


def total(cell: Cell, classes: int, images: int, size: tuple[int, int]) -> Cost:
    """The cost of a pass of that many images of (height, width) pixels through the cell's detector."""
    kind = replace(cell, depth=cell.depth and 1, **UNSEEN)
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

    return counted(make, pass_through, cell.precision, backward=True), maps


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

    cost = counted(make, pass_through, cell.precision, backward=False)
    # All of it is trained, and what it is given needs its gradient: each product has two of its size in backward.
    return replace(cost, backward=2 * cost.macs)


def counted(make: Callable[[], nn.Module], call: Callable[[Any], Any], precision: str, backward: bool) -> Cost:
    """The cost of `call` on what `make` makes, and of its backward pass if that is asked for."""
    counter = FlopCounterMode(display=False)
    with torch.device("meta"):
        model = make()
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    with torch.device("cpu") as device, use_backend("torch"), FakeTensorMode(), counter:
        # Made elsewhere and swapped: a detector that copies a module of its own would copy the mode with the tensors.
        model._apply(lambda value: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype))
        own = {id_of(value) for value in [*model.parameters(), *model.buffers()]}
        with saved_bytes() as saved, autocast(device, precision):
            outputs = call(model)
        macs = counter.get_total_flops() / 2
        kept = sum(storage.nbytes() for number, storage in saved.items() if number not in own)
        if backward:
            learnt = [value for value in tree_leaves(outputs) if isinstance(value, Tensor) and value.requires_grad]
            torch.autograd.backward(learnt, [torch.empty_like(value) for value in learnt])
    every = sum(parameter.numel() for parameter in parameters)
    return Cost(every, trained, macs, kept, counter.get_total_flops() / 2 - macs)


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
