"""The block as the paper writes it: W(F) = π_C(π_S(π_L(F)·F)·F)·F on one tensor F ∈ R^{L×S×C}.

The paper resizes every level to the median level, stacks them, and applies L, then S, then C. Taken literally it is not
a program yet; our reading, and why:

- π_L(F) = σ(f(mean over S and C of F)), σ(x) = clamp((x + 1)/2, 0, 1). `f` is "approximated by a 1×1 convolution": the
  pooled tensor has one number a level, so the levels are its channels, L→L. Figure 2 puts a ReLU behind it.
- π_S sums over levels and over 9 positions and divides by L, yet blocks stack on L maps. The level axis is kept and the
  1/L mean left out. Offsets and mask come from the median level and serve all levels; w_{l,k} is a C×C matrix for each
  level and position, as in a deformable convolution, which the formula's scalars abbreviate.
- A GroupNorm(16) follows, which the formula does not show and the released code has; without it blocks do not stack.
- π_C pools over L×S, so one set of coefficients serves all levels.

Levels are resized once before the first block and once after the last one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.dyhead.attention import GROUPS, TAPS, DynamicReLU, offset_convolution
from heads.parameters import SpecialParameters
from kernels import deform_conv2d, dynamic_relu


def to_median(features: list[Tensor]) -> Tensor:
    """Resize every level (N, C, H_l, W_l) to the median level's size and stack them: (N, L, C, H, W)."""
    size = features[len(features) // 2].shape[-2:]
    return torch.stack([resize(x, size) for x in features], dim=1)


def from_median(stacked: Tensor, sizes: list[torch.Size]) -> list[Tensor]:
    """Undo `to_median`: (N, L, C, H, W) -> one (N, C, H_l, W_l) for each of the L sizes."""
    return [resize(x, size) for x, size in zip(stacked.unbind(1), sizes, strict=True)]


def resize(x: Tensor, size: torch.Size) -> Tensor:
    """Average down, interpolate up: a map loses nothing by the one and invents nothing by the other."""
    if x.shape[-2:] == size:
        return x
    if x.shape[-2] >= size[0] and x.shape[-1] >= size[1]:
        return F.adaptive_avg_pool2d(x, (size[0], size[1]))
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class PaperScaleAttention(nn.Module):
    """π_L: one weight in [0.5, 1] per level, from the averages of all levels. Switched off, it is the identity.

    Args:
        levels: L.
        learned: Whether the attention is on.
    """

    def __init__(self, levels: int, *, learned: bool = True):
        super().__init__()
        self.mix = nn.Linear(levels, levels) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C, H, W) -> (N, L, C, H, W)."""
        if self.mix is None:
            return x
        return x * self.gates(x)[:, :, None, None, None]

    def gates(self, x: Tensor) -> Tensor:
        """The learned weights (N, L) of the levels of x (N, L, C, H, W)."""
        assert self.mix is not None
        # clamp((v + 1) / 2, 0, 1) is the hard sigmoid of 3v; the ReLU in front leaves [0.5, 1].
        return F.hardsigmoid(3 * F.relu(self.mix(x.mean((2, 3, 4)))))


class PaperSpatialAttention(SpecialParameters):
    """π_S: a deformable 3×3 convolution per level, all with the median level's offsets and mask, then GroupNorm(16).

    Switched off, the same convolutions read the regular grid.

    Args:
        channels: C, a multiple of 16.
        levels: L.
        learned: Whether the attention is on, with offsets and a mask.
    """

    offset_layers = ("offset",)

    def __init__(self, channels: int, levels: int, *, learned: bool = True):
        super().__init__()
        self.levels = levels
        self.weight = nn.Parameter(torch.empty(levels * channels, channels, 3, 3))
        self.norm = nn.GroupNorm(GROUPS * levels, levels * channels)
        bound = (TAPS * channels) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        self.offset = offset_convolution(channels) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C, H, W) -> (N, L, C, H, W)."""
        # Levels become groups of one grouped convolution: one offset serves them all, and each has its own weights.
        maps = x.flatten(1, 2)
        if self.offset is None:
            sampled = F.conv2d(maps, self.weight, padding=1, groups=self.levels)
        else:
            offset, mask = self.positions(x)
            sampled = deform_conv2d(maps, offset, self.weight, padding=1, mask=mask)
        return self.norm(sampled).view_as(x)

    def positions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where learned attention samples on all levels: offsets (N, 18, H, W) in pixels and a mask (N, 9, H, W)."""
        assert self.offset is not None
        predicted = self.offset(x[:, self.levels // 2])
        return predicted[:, : 2 * TAPS], predicted[:, 2 * TAPS :].sigmoid()


class PaperTaskAttention(DynamicReLU):
    """π_C: dynamic ReLU with one set of coefficients for all levels, pooled over L×S. Switched off, it is a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C, H, W) -> (N, L, C, H, W)."""
        if not self.learned:
            return F.relu(x)
        coefficients = self.coefficients(x.mean((1, 3, 4)))
        n, levels, channels, height, width = x.shape
        flat = x.transpose(1, 2).reshape(n, channels, levels * height, width)
        return dynamic_relu(flat, coefficients).view(n, channels, levels, height, width).transpose(1, 2)

    def activate(self, x: Tensor) -> Tensor:
        return self(x[:, None])[:, 0]
