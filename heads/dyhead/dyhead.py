"""DyHead: any subset of scale (L), spatial (S) and task (C) attention, in the released or the paper's formulation."""

import copy
from typing import cast

from torch import Tensor, nn

from heads.dyhead.attention import DynamicReLU
from heads.dyhead.blocks import BLOCKS

ATTENTIONS = ("", "L", "S", "C", "LS", "LC", "SC", "LSC")
FORMULATIONS = tuple(BLOCKS)


def canonical(attentions: str) -> str:
    """Put the letters of a subset of L, S, C in the order LSC.

    Raises:
        ValueError: A letter is unknown or repeated.
    """
    ordered = "".join(letter for letter in "LSC" if letter in attentions)
    if len(ordered) != len(attentions):
        raise ValueError(f"attentions {attentions!r} is not a subset of the letters L, S and C")
    return ordered


class DyHead(nn.Module):
    """A stack of DyHead blocks on a feature pyramid (Dai et al., "Dynamic Head", CVPR 2021).

    Args:
        channels: C of every level, a multiple of 16.
        depth: Number of blocks.
        attentions: Subset of the letters L (scale), S (spatial), C (task); `""` switches all three off.
        formulation: `"released"`, what the authors' code computes, or `"paper"`, what the paper writes
            (`heads/dyhead/paper.py`).
        coarse_offsets: `"crop"`, `"prefix"` or `"resize"`: how a level's offsets serve its coarser neighbour, whose map
            is smaller. Checkpoints of the authors and of mmdetection were trained with `"prefix"`.
        levels: Number of pyramid levels; only the paper's formulation needs to know it beforehand.

    Raises:
        ValueError: An argument is none of the named values, or `channels` is no multiple of 16.

    Example:
        >>> import torch
        >>> from heads import DyHead
        >>> head = DyHead(channels=16, depth=2, attentions="LSC")
        >>> pyramid = [torch.rand(1, 16, *size) for size in ((16, 24), (8, 12), (4, 6))]
        >>> [tuple(x.shape) for x in head(pyramid)]
        [(1, 16, 16, 24), (1, 16, 8, 12), (1, 16, 4, 6)]
    """

    def __init__(
        self,
        channels: int = 256,
        depth: int = 6,
        attentions: str = "LSC",
        formulation: str = "released",
        coarse_offsets: str = "crop",
        levels: int = 5,
    ):
        super().__init__()
        if formulation not in BLOCKS:
            raise ValueError(f"unknown formulation {formulation!r}; it is one of {', '.join(FORMULATIONS)}")
        self.attentions = canonical(attentions)
        self.formulation = formulation
        block = BLOCKS[formulation]
        self.blocks = nn.ModuleList(block(channels, self.attentions, coarse_offsets, levels) for _ in range(depth))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Apply the blocks to a pyramid.

        Args:
            features: One (N, C, H_l, W_l) a level, finest first, float32, float64 or a half-precision type.

        Returns:
            A list of the same shapes.
        """
        return BLOCKS[self.formulation].stack(self.blocks, features)

    def unfused_reason(self, features: list[Tensor]) -> str | None:
        """Why these levels go through the separate operators; None where each block is a few launches for all levels.

        Both ways give the same numbers. Hooks of modules inside the blocks are called by the separate operators only.
        """
        return BLOCKS[self.formulation].unfused_reason(self.blocks, features)

    def split_last_task(self) -> tuple["DyHead", DynamicReLU]:
        """Take the task attention out of the last block, for a detector that applies it behind RoIAlign.

        Returns:
            A copy of this DyHead without it, and a copy of the attention; this DyHead stays as it is.

        Raises:
            ValueError: There is no block.
        """
        if not self.blocks:
            raise ValueError("a DyHead of depth 0 has no task attention")
        trunk = copy.deepcopy(self)
        last = trunk.blocks[-1]
        task, last.task = cast(DynamicReLU, last.task), nn.Identity()
        return trunk, task
