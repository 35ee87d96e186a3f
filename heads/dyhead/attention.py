"""The three attentions of DyHead as its authors released them, and their static counterparts.

A pyramid is a list of maps (N, C, H_l, W_l), finest level first. One block applies, in this order:

    S  every level samples itself and its two neighbours with deformable 3×3 convolutions:
       levels -> levels × neighbours
    L  every sampled map gets one weight in [0.5, 1], and the maps of a level are averaged:
       levels × neighbours -> levels
    C  every channel passes a piecewise linear function whose two slopes and offsets are
       computed from the pooled level (dynamic ReLU): levels -> levels

Sources: Dai et al., "Dynamic Head: Unifying Object Detection Heads with Attentions", CVPR 2021, and the code released
with it, which differs from the paper's formulas; those are in `heads/dyhead/paper.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.parameters import SpecialParameters
from kernels import deform_conv2d_levels, dynamic_relu
from kernels.block.parameters import COARSE_OFFSETS, coarser_offsets

GROUPS = 16
TAPS = 9


class Branch(nn.Module):
    """One 3×3 convolution, deformable or not, with its GroupNorm: the weights of one neighbour, shared by all levels.

    The released convolution has a bias before its GroupNorm, mmdetection's has none; `heads.load_released` adds it.

    Args:
        channels: C, a multiple of 16.
        stride: 2 for the finer neighbour, else 1.
    """

    bias: nn.Parameter | None

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.register_parameter("bias", None)
        self.norm = nn.GroupNorm(GROUPS, channels)
        bound = 1 / math.sqrt(TAPS * channels)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, maps: list[Tensor], offsets: list[Tensor] | None, masks: list[Tensor] | None) -> list[Tensor]:
        sampled = self.convolve(maps, offsets, masks, self.bias)
        # nn.GroupNorm refuses a group of a single value, which a 1×1 map at 16 channels has.
        return [torch.group_norm(x, GROUPS, self.norm.weight, self.norm.bias, self.norm.eps) for x in sampled]

    def convolve(
        self, maps: list[Tensor], offsets: list[Tensor] | None, masks: list[Tensor] | None, bias: Tensor | None
    ) -> list[Tensor]:
        """The convolution alone, of every map."""
        if offsets is None:
            return [F.conv2d(x, self.weight, bias, self.stride, padding=1) for x in maps]
        return deform_conv2d_levels(maps, offsets, self.weight, bias, self.stride, padding=1, masks=masks)


def offset_convolution(channels: int) -> nn.Conv2d:
    """The 3×3 convolution that predicts 18 offsets and 9 logits of the mask; it starts as zero.

    Its weight is channels last, as the kernels of a fused block read it fastest.
    """
    convolution = nn.Conv2d(channels, 3 * TAPS, 3, padding=1)
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    return convolution


class SpatialAttention(SpecialParameters):
    """S: each level gathers from itself, from the finer and from the coarser level, at positions it learned.

    The offsets (18 channels, dy and dx interleaved) and the mask (9 channels, through a sigmoid) come from the level
    being produced and serve all three of its neighbours. Switched off, the same three convolutions read the regular
    grid.

    Args:
        channels: C, a multiple of 16.
        coarse_offsets: How the offsets of a level (H, W) become those of its coarser neighbour (about H/2, W/2).
            `"crop"` takes the top left corner. `"prefix"` reads the first elements of the flattened tensor, as the
            released kernels do by mistake, and reproduces released checkpoints. `"resize"` interpolates bilinearly;
            offsets stay in pixels of the map that is sampled.
        learned: Whether the attention is on, with offsets and masks.

    Raises:
        ValueError: `coarse_offsets` is unknown, or `channels` is no multiple of 16.
    """

    offset_layers = ("offset",)

    def __init__(self, channels: int, coarse_offsets: str = "crop", *, learned: bool = True):
        super().__init__()
        if coarse_offsets not in COARSE_OFFSETS:
            raise ValueError(f"unknown coarse_offsets {coarse_offsets!r}; it is one of {', '.join(COARSE_OFFSETS)}")
        if channels % GROUPS:
            raise ValueError(f"channels must be a multiple of {GROUPS}, the groups of its GroupNorm; got {channels}")
        self.coarse_offsets = coarse_offsets
        self.from_finer = Branch(channels, stride=2)
        self.from_same = Branch(channels, stride=1)
        self.from_coarser = Branch(channels, stride=1)
        self.offset = offset_convolution(channels) if learned else None

    @property
    def branches(self) -> tuple[Branch, Branch, Branch]:
        """The branches of the same level, of the finer and of the coarser one."""
        return self.from_same, self.from_finer, self.from_coarser

    def positions(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Where learned attention samples, a level: offsets (N, 18, H_l, W_l) in pixels and masks (N, 9, H_l, W_l).

        The offsets are dy and dx interleaved, from the nine taps of the regular 3×3 grid.
        """
        assert self.offset is not None
        predicted = [self.offset(x) for x in features]
        return [p[:, : 2 * TAPS] for p in predicted], [p[:, 2 * TAPS :].sigmoid() for p in predicted]

    def forward(self, features: list[Tensor]) -> list[list[Tensor]]:
        """Sample every level's neighbours.

        Returns:
            For each level its sampled maps (N, C, H_l, W_l): same level, then finer, then coarser where they exist.
        """
        offsets = masks = coarse_offsets = coarse_masks = None
        if self.offset is not None:
            offsets, masks = self.positions(features)
            coarse_offsets, coarse_masks = (coarser_offsets(x, self.coarse_offsets) for x in (offsets, masks))

        sampled = [[x] for x in self.from_same(features, offsets, masks)]
        if len(features) == 1:
            return sampled
        # Ceil-halving pyramids give the stride-2 output exactly the size of the level it is for.
        finer = self.from_finer(features[:-1], offsets and offsets[1:], masks and masks[1:])
        coarser = self.from_coarser(features[1:], coarse_offsets, coarse_masks)
        for level, x in enumerate(finer, start=1):
            sampled[level].append(x)
        for level, x in enumerate(coarser):
            size = features[level].shape[-2:]
            sampled[level].append(F.interpolate(x, size=size, mode="bilinear", align_corners=True))
        return sampled


class ScaleAttention(nn.Module):
    """L: one weight per sampled map, from the map's average; the weighted maps of a level are averaged.

    Gate: global average pool → linear C→1 → ReLU → (x + 3) / 6 clamped to [0, 1], so it lies in [0.5, 1].
    Switched off, it is the plain mean.

    Args:
        channels: C.
        learned: Whether the attention is on.
    """

    def __init__(self, channels: int, *, learned: bool = True):
        super().__init__()
        self.gate = nn.Linear(channels, 1) if learned else None
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=0.01)
            nn.init.zeros_(self.gate.bias)

    def gates(self, sampled: list[list[Tensor]]) -> Tensor:
        """The learned weights (M, N, 1) of all M sampled maps, level by level in the order of `sampled`."""
        assert self.gate is not None
        # All pooled vectors pass the gate in one call: on small maps the number of calls is the cost.
        pooled = torch.stack([x.mean((2, 3)) for maps in sampled for x in maps])
        return F.hardsigmoid(F.relu(self.gate(pooled)))

    def forward(self, sampled: list[list[Tensor]]) -> list[Tensor]:
        """Fuse the sampled maps of each level: lists of (N, C, H_l, W_l) -> (N, C, H_l, W_l) per level."""
        if self.gate is None:
            return [sum(maps[1:], maps[0]) / len(maps) for maps in sampled]
        gates = self.gates(sampled)[..., None, None]
        fused = []
        for maps, weights in zip(sampled, gates.split([len(maps) for maps in sampled]), strict=True):
            weights = (weights / len(maps)).unbind()
            total = maps[0] * weights[0]
            for x, weight in zip(maps[1:], weights[1:], strict=True):
                total = torch.addcmul(total, x, weight)
            fused.append(total)
        return fused


class DynamicReLU(nn.Module):
    """Dynamic ReLU, max(a1·x + b1, a2·x + b2) per channel, and the network that computes its coefficients.

    Coefficient network: linear C→C/4 → ReLU → linear C/4→4C → hard sigmoid y, then a1 = 2y, b1 = y − 1/2, a2 = 2y − 1,
    b2 = y − 1/2. At y = 1/2, where training starts, it is a ReLU. Switched off, it is always an ordinary ReLU.

    A subclass chooses the averages that the coefficients are computed from: `TaskAttention`, `PaperTaskAttention`.

    Args:
        channels: C.
        learned: Whether the attention is on.
        reduction: C divided by the width of the network.
    """

    slope: Tensor
    shift: Tensor

    def __init__(self, channels: int, *, learned: bool = True, reduction: int = 4):
        super().__init__()
        self.learned = learned
        if not learned:
            return
        self.reduce = nn.Linear(channels, channels // reduction)
        self.expand = nn.Linear(channels // reduction, 4 * channels)
        for linear in (self.reduce, self.expand):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
        self.register_buffer("slope", torch.tensor([2.0, 1.0, 2.0, 1.0]).view(4, 1), persistent=False)
        self.register_buffer("shift", torch.tensor([0.0, -0.5, -1.0, -0.5]).view(4, 1), persistent=False)

    def coefficients(self, pooled: Tensor) -> Tensor:
        """(..., C) averages -> (..., 4, C) coefficients in the order a1, b1, a2, b2."""
        y = F.hardsigmoid(self.expand(F.relu(self.reduce(pooled))))
        return torch.addcmul(self.shift.to(y.dtype), y.unflatten(-1, (4, -1)), self.slope.to(y.dtype))

    def activate(self, x: Tensor) -> Tensor:
        """Activate one map (N, C, H, W), each image with coefficients from its average."""
        raise NotImplementedError


class TaskAttention(DynamicReLU):
    """C: dynamic ReLU of every level, with coefficients from the level's global average; one network for all."""

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Activate every level: (N, C, H_l, W_l) -> the same shapes."""
        if not self.learned:
            return [F.relu(x) for x in features]
        coefficients = self.coefficients(torch.stack([x.mean((2, 3)) for x in features]))
        return [dynamic_relu(x, c) for x, c in zip(features, coefficients.unbind(), strict=True)]

    def activate(self, x: Tensor) -> Tensor:
        return self([x])[0]
