"""The feature pyramid of two-stage detectors (Lin et al. 2017): C2–C5 in, P2–P6 out."""

import torch.nn.functional as F
from torch import Tensor, nn


class FPNFromC2(nn.Module):
    """Lateral 1×1 convolutions, nearest-neighbour top-down sums, and 3×3 output convolutions.

    P6 is every second cell of P5. Every level is half the finer one, rounded up.

    Args:
        in_channels: Channels of C2, C3, C4, C5.
        channels: Channels of every output level.
    """

    strides = (4, 8, 16, 32, 64)

    def __init__(self, in_channels: tuple[int, ...], channels: int = 256):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        for conv in (*self.lateral, *self.output):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """C2 … C5 (N, C_l, H_l, W_l) -> P2 … P6 (N, C, H_l, W_l)."""
        maps = [conv(x) for conv, x in zip(self.lateral, features, strict=True)]
        for level in reversed(range(len(maps) - 1)):
            maps[level] = maps[level] + F.interpolate(maps[level + 1], size=maps[level].shape[-2:], mode="nearest")
        maps = [conv(x) for conv, x in zip(self.output, maps, strict=True)]
        return [*maps, F.max_pool2d(maps[-1], 1, 2)]
