"""A block of DyHead in each formulation, and how a stack of blocks runs on a pyramid.

A block is three attentions in a row. A letter that is missing replaces its attention by the static counterpart: L by
the plain mean (released) or the identity (paper), S by an ordinary 3×3 convolution, C by ReLU. Shapes never change.

Both classes have one interface, and `DyHead` picks one by the formulation's name: the constructor takes what either
needs, `stack` applies blocks to a pyramid, and `unfused_reason` says why blocks run as separate operators.
"""

from torch import Tensor, nn

from heads.dyhead import fused
from heads.dyhead.attention import ScaleAttention, SpatialAttention, TaskAttention
from heads.dyhead.paper import PaperScaleAttention, PaperSpatialAttention, PaperTaskAttention, from_median, to_median
from kernels import dyhead_blocks


class ReleasedBlock(nn.Module):
    """S, L, C on a list of maps, finest level first, as the authors' code computes it.

    Args:
        channels: C, a multiple of 16.
        attentions: Subset of the letters L, S, C.
        coarse_offsets: See `SpatialAttention`.
        levels: Not used; a block serves any number of levels.
    """

    # The identity in a block whose task attention is applied elsewhere.
    task: TaskAttention | nn.Identity

    def __init__(self, channels: int, attentions: str = "LSC", coarse_offsets: str = "crop", levels: int = 5):
        super().__init__()
        self.spatial = SpatialAttention(channels, coarse_offsets, learned="S" in attentions)
        self.scale = ScaleAttention(channels, learned="L" in attentions)
        self.task = TaskAttention(channels, learned="C" in attentions)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """A list of (N, C, H_l, W_l) -> a list of the same shapes."""
        return self.task(self.scale(self.spatial(features)))

    @staticmethod
    def stack(blocks: nn.ModuleList, features: list[Tensor]) -> list[Tensor]:
        """Apply blocks to a list of (N, C, H_l, W_l): in a few launches for all levels where that is possible."""
        if ReleasedBlock.unfused_reason(blocks, features) is None:
            return dyhead_blocks(features, [fused.parameters(block) for block in blocks])
        for block in blocks:
            features = block(features)
        return features

    @staticmethod
    def unfused_reason(blocks: nn.ModuleList, features: list[Tensor]) -> str | None:
        """Why the blocks run as separate operators on these levels; None where they are fused."""
        return fused.reason_against(blocks, features)


class PaperBlock(nn.Module):
    """L, S, C on one tensor of all levels, as the paper writes it (`heads/dyhead/paper.py`).

    Args:
        channels: C, a multiple of 16.
        attentions: Subset of the letters L, S, C.
        coarse_offsets: Not used; all levels have one size.
        levels: Number of pyramid levels.
    """

    # The identity in a block whose task attention is applied elsewhere.
    task: PaperTaskAttention | nn.Identity

    def __init__(self, channels: int, attentions: str = "LSC", coarse_offsets: str = "crop", levels: int = 5):
        super().__init__()
        self.scale = PaperScaleAttention(levels, learned="L" in attentions)
        self.spatial = PaperSpatialAttention(channels, levels, learned="S" in attentions)
        self.task = PaperTaskAttention(channels, learned="C" in attentions)

    def forward(self, stacked: Tensor) -> Tensor:
        """(N, L, C, H, W) -> (N, L, C, H, W)."""
        return self.task(self.spatial(self.scale(stacked)))

    @staticmethod
    def stack(blocks: nn.ModuleList, features: list[Tensor]) -> list[Tensor]:
        """Apply blocks to a list of (N, C, H_l, W_l), resized to the median level before and back behind them."""
        stacked = to_median(features)
        for block in blocks:
            stacked = block(stacked)
        return from_median(stacked, [x.shape[-2:] for x in features])

    @staticmethod
    def unfused_reason(blocks: nn.ModuleList, features: list[Tensor]) -> str | None:
        """Why the blocks run as separate operators: there are no fused kernels for them."""
        return "the paper's formulation has no fused kernels"


BLOCKS: dict[str, type[ReleasedBlock] | type[PaperBlock]] = {"released": ReleasedBlock, "paper": PaperBlock}
