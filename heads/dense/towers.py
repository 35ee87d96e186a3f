"""The convolution towers that are the trunk of a one-stage detector without DyHead, and the scale its heads learn."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from heads.boxes.anchors import Sizes
from heads.dyhead.dyhead import DyHead


class Scale(nn.Module):
    """One learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class LevelScales(nn.ModuleList):
    """A learned factor for each level of a pyramid."""

    def __init__(self, levels: int):
        super().__init__(Scale() for _ in range(levels))

    def rows(self, sizes: Sizes) -> Tensor:
        """The factor of every cell: (sum of H_l * W_l, 1) for levels of these (height, width)."""
        scales = [cast(Scale, scale).scale for scale in self]
        return torch.cat([s.expand(h * w) for s, (h, w) in zip(scales, sizes, strict=True)])[:, None]


class ConvTowers(nn.Module):
    """3×3 convolutions with ReLU for each of two tasks, shared by all levels; `DyHead` replaces them.

    ATSS and FCOS have four with GroupNorm (4,722,688 parameters at 256 channels in mmdetection, 4,724,736 with `bias`
    in the official codes), RepPoints three with GroupNorm, RetinaNet four without.

    Args:
        channels: Channels of the pyramid.
        depth: Convolutions of a tower.
        norm: Whether a GroupNorm follows every convolution.
        groups: Groups of the GroupNorms; None keeps the 8 channels per group that 32 groups are at 256 channels.
        bias: Whether convolutions before a GroupNorm have a bias; those without a GroupNorm always do.
    """

    def __init__(self, channels: int, depth: int = 4, norm: bool = True, groups: int | None = None, bias: bool = False):
        super().__init__()
        groups = math.gcd(channels, min(32, max(1, channels // 8))) if groups is None else groups

        def tower() -> nn.Sequential:
            layers: list[nn.Module] = []
            for _ in range(depth):
                conv = nn.Conv2d(channels, channels, 3, padding=1, bias=bias or not norm)
                if norm:
                    # 0.01 at the published 256 channels. Before a GroupNorm the scale sets the effective learning rate,
                    # so narrower towers start with the same variance of a sum over their inputs.
                    nn.init.normal_(conv.weight, std=0.01 * math.sqrt(256 / channels))
                else:
                    # By the published 0.01 only a third of the signal, and of the gradient, passes a convolution.
                    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)
                layers += [conv, *([nn.GroupNorm(groups, channels)] if norm else []), nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        self.classification = tower()
        self.regression = tower()

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Apply both towers to maps (N, C, H_l, W_l).

        Returns:
            Maps of the same shapes for classification, and others for boxes and the rest.
        """
        return [self.classification(f) for f in features], [self.regression(f) for f in features]


class DyHeadBeforeTowers(nn.Module):
    """DyHead with a detector's towers behind it: the trunk of the authors' RetinaNet, and of mmdetection's.

    Args:
        dyhead: What comes first.
        towers: What reads its maps.
    """

    def __init__(self, dyhead: DyHead, towers: ConvTowers):
        super().__init__()
        self.dyhead = dyhead
        self.towers = towers

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (N, C, H_l, W_l), finest first -> as many for classification, and as many for boxes."""
        return self.towers(self.dyhead(features))
