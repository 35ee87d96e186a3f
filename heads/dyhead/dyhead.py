"""DyHead: any subset of scale (L), spatial (S) and task (C) attention, in the released or the paper's formulation."""

from torch import Tensor, nn

from heads.dyhead import fused
from heads.dyhead.attention import ScaleAttention, SpatialAttention, TaskAttention
from heads.dyhead.paper import PaperScaleAttention, PaperSpatialAttention, PaperTaskAttention, from_median, to_median
from kernels import dyhead_blocks

ATTENTIONS = ("", "L", "S", "C", "LS", "LC", "SC", "LSC")
FORMULATIONS = ("released", "paper")


def canonical(attentions: str) -> str:
    """Put the letters of a subset of L, S, C in the order LSC.

    Raises:
        ValueError: A letter is unknown or repeated.
    """
    ordered = "".join(letter for letter in "LSC" if letter in attentions)
    if len(ordered) != len(attentions):
        raise ValueError(f"attentions {attentions!r} is not a subset of the letters L, S and C")
    return ordered


class DyHeadBlock(nn.Module):
    """One block: three attentions in a row, each replaced by its static counterpart where it is switched off.

    L → plain mean (released) or identity (paper), S → ordinary 3×3 convolution, C → ReLU: shapes never change.

    Args:
        channels: C, a multiple of 16.
        attentions: Subset of the letters L, S, C, as `canonical` returns it.
        formulation: `"released"`: lists of maps, order S, L, C. `"paper"`: (N, L, C, H, W), order L, S, C.
        coarse_offsets: See `SpatialAttention`; the paper's formulation has no use for it.
        levels: Number of pyramid levels, which the paper's formulation has weights for.
    """

    def __init__(
        self,
        channels: int,
        attentions: str = "LSC",
        formulation: str = "released",
        coarse_offsets: str = "crop",
        levels: int = 5,
    ):
        super().__init__()
        if formulation not in FORMULATIONS:
            raise ValueError(f"unknown formulation {formulation!r}; it is one of {', '.join(FORMULATIONS)}")
        self.formulation = formulation
        if formulation == "released":
            self.spatial = SpatialAttention(channels, coarse_offsets, static="S" not in attentions)
            self.scale = ScaleAttention(channels, static="L" not in attentions)
            self.task = TaskAttention(channels, static="C" not in attentions)
        else:
            self.scale = PaperScaleAttention(levels, static="L" not in attentions)
            self.spatial = PaperSpatialAttention(channels, levels, static="S" not in attentions)
            self.task = PaperTaskAttention(channels, static="C" not in attentions)

    def forward(self, x: list[Tensor] | Tensor) -> list[Tensor] | Tensor:
        """Shapes in are shapes out: a list of (N, C, H_l, W_l), or one (N, L, C, H, W) for the paper's formulation."""
        if self.formulation == "released":
            return self.task(self.scale(self.spatial(x)))
        return self.task(self.spatial(self.scale(x)))


class DyHead(nn.Module):
    """A stack of DyHead blocks on a feature pyramid.

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
        self.attentions = canonical(attentions)
        self.formulation = formulation
        block = (channels, self.attentions, formulation, coarse_offsets, levels)
        self.blocks = nn.ModuleList(DyHeadBlock(*block) for _ in range(depth))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Apply the blocks to a list of (N, C, H_l, W_l), finest level first; returns a list of the same shapes."""
        if self.unfused_reason(features) is None:
            return dyhead_blocks(features, [fused.parameters(block) for block in self.blocks])
        sizes = [x.shape[-2:] for x in features]
        x = features if self.formulation == "released" else to_median(features)
        for block in self.blocks:
            x = block(x)
        return x if self.formulation == "released" else from_median(x, sizes)

    def unfused_reason(self, features: list[Tensor]) -> str | None:
        """Why these levels go through the separate operators; None where each block is a few launches for all levels.

        Both ways give the same numbers. Hooks of modules inside the blocks are called by the separate operators only.
        """
        if self.formulation != "released":
            return "the paper's formulation has no fused kernels"
        return fused.reason_against(self.blocks, features)
