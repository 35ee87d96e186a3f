"""What the attentions of a trained DyHead do with one image, read from its own modules block by block."""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from heads.detector import Detector
from heads.dyhead.attention import TaskAttention
from heads.dyhead.blocks import PaperBlock, ReleasedBlock
from heads.dyhead.dyhead import DyHead
from heads.dyhead.paper import to_median
from kernels.block.parameters import coarser_offsets

TAPS = 9


class Samples(NamedTuple):
    """Where one output pixel samples one map.

    Attributes:
        neighbour: `"same"`, `"finer"` or `"coarser"` level; `"all"` where the position serves every level.
        points: (9, 2) x and y in pixels of the image that the detector was shown.
        mask: (9,) weights in 0 … 1.
    """

    neighbour: str
    points: Tensor
    mask: Tensor


class Block(NamedTuple):
    """What one block does with one image of L levels.

    Attributes:
        stages: Name and, for each level, the mean |activation| over channels (H_l, W_l): `"in"` first, then behind
            each attention in the order of the formulation. Behind the released S it is the mean over the sampled maps.
        gates: For each level the weights that L gives: of the same, the finer and the coarser level as far as they
            exist (released), or one (paper); None without L.
        slopes: For each level, or once for all (paper), a1 and a2 of each channel (2, C); None without C.
        offsets, masks: Of S for each level, or once for all (paper): (18, H, W) and (9, H, W); None without S.
        coarse: Offsets and masks that serve the coarser neighbour of each level that has one; empty in the paper's.
    """

    stages: list[tuple[str, list[Tensor]]]
    gates: list[list[float]] | None
    slopes: list[Tensor] | None
    offsets: list[Tensor] | None
    masks: list[Tensor] | None
    coarse: list[tuple[Tensor, Tensor]]


class Probe(NamedTuple):
    """What all blocks do with one image.

    Attributes:
        blocks: One a block.
        strides: Of each level of the pyramid: pixels of the shown image from one position to the next.
        released: Whether the formulation is the released one; the paper's has every level in the size of the median.
    """

    blocks: list[Block]
    strides: list[float]
    released: bool

    def stride(self, level: int) -> float:
        """Pixels of the shown image from one position of a level's maps inside the blocks to the next."""
        return self.strides[level if self.released else len(self.strides) // 2]


@torch.inference_mode()
def probe(model: Detector, image: Tensor) -> Probe:
    """Run a detector on one image and its DyHead once more, attention by attention.

    Args:
        model: In evaluation mode, with a DyHead.
        image: (3, H, W) as the detector takes it.

    Raises:
        ValueError: There is no DyHead.
    """
    head = next((module for module in model.modules() if isinstance(module, DyHead)), None)
    if head is None:
        raise ValueError("the detector has no DyHead to look into")
    taken: list[list[Tensor]] = []
    handle = head.register_forward_pre_hook(lambda _, arguments: taken.append(arguments[0]))
    try:
        model([image])
    finally:
        handle.remove()
    features, height = taken[0], model.batch([image]).shape[-2]
    # Sizes halve from level to level, rounded up, so that only the finest one tells a stride.
    strides, blocks = [height / features[0].shape[-2] * 2**level for level in range(len(features))], []
    if head.formulation == "paper":
        stacked = to_median(features)
        for block in head.blocks:
            stacked, seen = _paper(cast(PaperBlock, block), stacked)
            blocks.append(seen)
        return Probe(blocks, strides, released=False)
    for block in head.blocks:
        features, seen = _released(cast(ReleasedBlock, block), features)
        blocks.append(seen)
    return Probe(blocks, strides, released=True)


def _released(block: ReleasedBlock, features: list[Tensor]) -> tuple[list[Tensor], Block]:
    spatial, scale, task = block.spatial, block.scale, block.task
    sampled = spatial(features)
    fused = scale(sampled)
    done = task(fused)
    stages = [("in", _magnitude(features))]
    stages.append(("S", [torch.stack(_magnitude(maps)).mean(0) for maps in sampled]))
    stages += [("L", _magnitude(fused)), ("C", _magnitude(done))]
    gates = slopes = offsets = masks = None
    coarse: list[tuple[Tensor, Tensor]] = []
    if scale.gate is not None:
        values = iter(scale.gates(sampled)[:, 0, 0].tolist())
        gates = [[next(values) for _ in maps] for maps in sampled]
    if isinstance(task, TaskAttention) and task.learned:
        coefficients = task.coefficients(torch.stack([x.mean((2, 3)) for x in fused]))
        slopes = [each[0, [0, 2]] for each in coefficients]
    if spatial.offset is not None:
        predicted = spatial.positions(features)
        offsets, masks = ([x[0] for x in part] for part in predicted)
        smaller = [coarser_offsets(part, spatial.coarse_offsets) for part in predicted]
        coarse = [(offset[0], mask[0]) for offset, mask in zip(*smaller, strict=True)]
    return done, Block(stages, gates, slopes, offsets, masks, coarse)


def _paper(block: PaperBlock, stacked: Tensor) -> tuple[Tensor, Block]:
    scaled = block.scale(stacked)
    sampled = block.spatial(scaled)
    done = block.task(sampled)
    steps = (("in", stacked), ("L", scaled), ("S", sampled), ("C", done))
    stages = [(name, list(x[0].abs().mean(1).unbind())) for name, x in steps]
    gates = slopes = offsets = masks = None
    if block.scale.mix is not None:
        gates = [[gate] for gate in block.scale.gates(stacked)[0].tolist()]
    if not isinstance(block.task, torch.nn.Identity) and block.task.learned:
        slopes = [block.task.coefficients(sampled.mean((1, 3, 4)))[0, [0, 2]]]
    if block.spatial.offset is not None:
        offsets, masks = ([x[0]] for x in block.spatial.positions(scaled))
    return done, Block(stages, gates, slopes, offsets, masks, [])


def _magnitude(maps: list[Tensor]) -> list[Tensor]:
    return [x[0].abs().mean(0) for x in maps]


def samples(seen: Probe, number: int, level: int, x: float, y: float) -> list[Samples]:
    """Where S of one block samples for the output pixel that lies at a point of the image.

    Args:
        seen: What `probe` returned.
        number: Of the block, from 0.
        level: Of the output pixel; 0 in the paper's formulation, where all share it.
        x, y: The point in pixels of the shown image.

    Returns:
        One entry a map that is sampled; empty without S, or where the point lies outside the level.
    """
    block, stride = seen.blocks[number], seen.stride(level)
    if block.offsets is None or block.masks is None:
        return []
    column, row = int(x // stride), int(y // stride)
    height, width = block.offsets[level].shape[-2:]
    if not (0 <= row < height and 0 <= column < width):
        return []
    offset, mask = block.offsets[level][:, row, column], block.masks[level][:, row, column]
    if not seen.released:
        return [Samples("all", _points(offset, row, column, 1, stride), mask)]
    found = [Samples("same", _points(offset, row, column, 1, stride), mask)]
    if level > 0:
        # The convolution of the finer map has stride 2 and this level's offsets.
        found.append(Samples("finer", _points(offset, row, column, 2, seen.strides[level - 1]), mask))
    if level < len(block.coarse):
        # Its result is interpolated with aligned corners; shown is the nearest of the positions that are mixed.
        offsets, masks = block.coarse[level]
        rows, columns = offsets.shape[-2:]
        row = round(row * (rows - 1) / max(1, height - 1))
        column = round(column * (columns - 1) / max(1, width - 1))
        points = _points(offsets[:, row, column], row, column, 1, seen.strides[level + 1])
        found.append(Samples("coarser", points, masks[:, row, column]))
    return found


def _points(offset: Tensor, row: int, column: int, step: int, stride: float) -> Tensor:
    """(9, 2) x and y in image pixels of the taps of a 3×3 convolution with padding 1, moved by offsets (18,)."""
    dy, dx = offset.view(TAPS, 2).unbind(1)
    taps = torch.arange(TAPS)
    ys = row * step + taps // 3 - 1 + dy
    xs = column * step + taps % 3 - 1 + dx
    # Positions count pixel centres.
    return (torch.stack([xs, ys], 1) + 0.5) * stride
