"""Feature pyramid network (Lin et al. 2017) with two extra levels: C3–C5 in, P3–P7 out."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class FPN(nn.Module):
    """Lateral 1×1 convolutions, nearest-neighbour top-down sums, 3×3 output convolutions, and P6, P7 by stride 2.

    P7 is convolved from P6. Every level is half the finer one, rounded up.

    Args:
        in_channels: Channels of C3, C4, C5.
        channels: Channels of every output level.
        relu_before_p7: ReLU between P6 and P7, as in detectron2's pyramid; mmdetection's ATSS has none.
        p6_from: What P6 is convolved from: P5's output, as in ATSS and FCOS, or C5, as in RetinaNet and RepPoints.
    """

    strides = (8, 16, 32, 64, 128)

    def __init__(
        self,
        in_channels: tuple[int, ...],
        channels: int = 256,
        relu_before_p7: bool = False,
        p6_from: Literal["p5", "c5"] = "p5",
    ):
        super().__init__()
        if p6_from not in ("p5", "c5"):
            raise ValueError(f"unknown p6_from {p6_from!r}; choose 'p5' or 'c5'")
        self.p6_from = p6_from
        self.relu_before_p7 = relu_before_p7
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        self.p6 = nn.Conv2d(channels if p6_from == "p5" else in_channels[-1], channels, 3, 2, 1)
        self.p7 = nn.Conv2d(channels, channels, 3, 2, 1)
        for conv in (*self.lateral, *self.output, self.p6, self.p7):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """C3, C4, C5 (N, C_l, H_l, W_l) -> P3 … P7 (N, C, H_l, W_l)."""
        maps = [conv(x) for conv, x in zip(self.lateral, features, strict=True)]
        for level in reversed(range(len(maps) - 1)):
            maps[level] = maps[level] + F.interpolate(maps[level + 1], size=maps[level].shape[-2:], mode="nearest")
        maps = [conv(x) for conv, x in zip(self.output, maps, strict=True)]
        p6 = self.p6(maps[-1] if self.p6_from == "p5" else features[-1])
        return [*maps, p6, self.p7(F.relu(p6) if self.relu_before_p7 else p6)]
