"""Feature pyramid networks (Lin et al., CVPR 2017): C3–C5 in, P3–P7 out, or C2–C5 in, P2–P6 out."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class TopDown(nn.Module):
    """Lateral 1×1 convolutions, nearest-neighbour top-down sums, and 3×3 output convolutions.

    Args:
        in_channels: Channels of the backbone's maps, finest first.
        channels: Channels of every output level.
    """

    def __init__(self, in_channels: tuple[int, ...], channels: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)

    def initialise(self) -> None:
        """Draw the weights of all convolutions by Xavier's rule, once a pyramid has made all of them."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def merge(self, features: list[Tensor]) -> list[Tensor]:
        """Maps (N, C_l, H_l, W_l) of the backbone -> as many levels (N, C, H_l, W_l)."""
        maps = [conv(x) for conv, x in zip(self.lateral, features, strict=True)]
        for level in reversed(range(len(maps) - 1)):
            maps[level] = maps[level] + F.interpolate(maps[level + 1], size=maps[level].shape[-2:], mode="nearest")
        return [conv(x) for conv, x in zip(self.output, maps, strict=True)]


class FPN(TopDown):
    """The pyramid of one-stage detectors: P6 and P7 by 3×3 convolutions with stride 2.

    P7 is convolved from P6. Every level is half the finer one, rounded up.

    Args:
        in_channels: Channels of C3, C4, C5.
        channels: Channels of every output level.
        relu_before_p7: Whether a ReLU stands between P6 and P7, as in detectron2; mmdetection's ATSS has none.
        p6_from: Input of P6's convolution: P5's output, as in ATSS and FCOS, or C5, as in RetinaNet and RepPoints.

    Raises:
        ValueError: `p6_from` is unknown.

    Example:
        >>> import torch
        >>> from heads.backbones.fpn import FPN
        >>> fpn = FPN((4, 6, 8), channels=16)
        >>> features = [torch.rand(1, c, *size) for c, size in ((4, (20, 13)), (6, (10, 7)), (8, (5, 4)))]
        >>> [tuple(x.shape) for x in fpn(features)]
        [(1, 16, 20, 13), (1, 16, 10, 7), (1, 16, 5, 4), (1, 16, 3, 2), (1, 16, 2, 1)]
    """

    strides = (8, 16, 32, 64, 128)

    def __init__(
        self,
        in_channels: tuple[int, ...],
        channels: int = 256,
        relu_before_p7: bool = False,
        p6_from: Literal["p5", "c5"] = "p5",
    ):
        super().__init__(in_channels, channels)
        if p6_from not in ("p5", "c5"):
            raise ValueError(f"unknown p6_from {p6_from!r}; choose 'p5' or 'c5'")
        self.p6_from = p6_from
        self.relu_before_p7 = relu_before_p7
        self.p6 = nn.Conv2d(channels if p6_from == "p5" else in_channels[-1], channels, 3, 2, 1)
        self.p7 = nn.Conv2d(channels, channels, 3, 2, 1)
        self.initialise()

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """C3, C4, C5 (N, C_l, H_l, W_l) -> P3 … P7 (N, C, H_l, W_l)."""
        maps = self.merge(features)
        p6 = self.p6(maps[-1] if self.p6_from == "p5" else features[-1])
        return [*maps, p6, self.p7(F.relu(p6) if self.relu_before_p7 else p6)]


class FPNFromC2(TopDown):
    """The pyramid of two-stage detectors: P6 is every second cell of P5.

    Every level is half the finer one, rounded up.

    Args:
        in_channels: Channels of C2, C3, C4, C5.
        channels: Channels of every output level.
    """

    strides = (4, 8, 16, 32, 64)

    def __init__(self, in_channels: tuple[int, ...], channels: int = 256):
        super().__init__(in_channels, channels)
        self.initialise()

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """C2 … C5 (N, C_l, H_l, W_l) -> P2 … P6 (N, C, H_l, W_l)."""
        maps = self.merge(features)
        return [*maps, F.max_pool2d(maps[-1], 1, 2)]
