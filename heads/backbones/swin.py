"""Swin Transformer (Liu et al., ICCV 2021) as a backbone, with the state-dict keys of the authors' ImageNet release.

Ingredients, as published: 4×4 patches; four stages of blocks, each window attention and a two-layer perceptron behind
LayerNorms; windows of 7 (Swin-T) or 12 (Swin-L) cells, moved by half a window in every second block; a learned bias
for each relative position and head; stages joined by merging 2×2 cells. As in the authors' detectors, images and maps
of any size are padded at the bottom and right, to whole patches, windows and 2×2 cells, and each map that leaves the
backbone passes a LayerNorm of its own (`norm1` … `norm3`), which the ImageNet weights do not have.

Deviation: no stochastic depth (the paper drops 0.1 to 0.3 of the blocks in training).
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.parameters import SpecialParameters

# Added to the score of two cells of a moved window that are not neighbours in the image; exp(-100) is nothing.
FAR = -100.0


def windows(x: Tensor, side: int) -> Tensor:
    """(N, H, W, C) -> (N, windows, side * side, C), windows row by row; H and W are multiples of `side`."""
    n, height, width, channels = x.shape
    x = x.view(n, height // side, side, width // side, side, channels).transpose(2, 3)
    return x.reshape(n, -1, side * side, channels)


def unwindows(x: Tensor, side: int, height: int, width: int) -> Tensor:
    """The inverse of `windows`."""
    n, channels = x.shape[0], x.shape[-1]
    x = x.view(n, height // side, width // side, side, side, channels).transpose(2, 3)
    return x.reshape(n, height, width, channels)


def far_pairs(height: int, width: int, side: int, shift: int, device: torch.device) -> Tensor:
    """(windows, 1, T, T): `FAR` for cells that the roll by `shift` brought into one window from opposite borders."""

    def parts(length: int) -> Tensor:
        cell = torch.arange(length, device=device)
        return (cell >= length - side).long() + (cell >= length - shift).long()

    part = parts(height)[:, None] * 3 + parts(width)
    part = windows(part[None, :, :, None], side)[0, :, :, 0]
    return FAR * (part[:, None, :, None] != part[:, None, None, :])


class WindowAttention(SpecialParameters):
    """Self-attention of the T = side² cells of each window: (N, windows, T, C) in and out."""

    position_biases = ("relative_position_bias_table",)
    pair: Tensor

    def __init__(self, channels: int, heads: int, side: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        dy, dx = (c.flatten()[:, None] - c.flatten() + side - 1 for c in (y, x))
        # Index of the pair of cells (query, key) in the table; derived, so it is not saved.
        self.register_buffer("pair", dy * (2 * side - 1) + dx, persistent=False)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, far: Tensor | None) -> Tensor:
        bias = self.relative_position_bias_table[self.pair].permute(2, 0, 1)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5)
        bias = (bias if far is None else bias + far).to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(out.transpose(2, 3).flatten(3))


class MLP(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Window attention and perceptron, each added to its input: (N, H, W, C) in and out."""

    def __init__(self, channels: int, heads: int, side: int, shift: int):
        super().__init__()
        self.side, self.shift = side, shift
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, side)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = MLP(channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        inner = F.pad(self.norm1(x), (0, 0, 0, -width % self.side, 0, -height % self.side))
        tall, wide = inner.shape[1:3]
        far = None
        if self.shift:
            inner = inner.roll((-self.shift, -self.shift), (1, 2))
            far = far_pairs(tall, wide, self.side, self.shift, x.device)
        inner = unwindows(self.attn(windows(inner, self.side), far), self.side, tall, wide)
        if self.shift:
            inner = inner.roll((self.shift, self.shift), (1, 2))
        x = x + inner[:, :height, :width]
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """(N, H, W, C) -> (N, H / 2, W / 2, 2 C), rounded up: each 2×2 cells, column by column, to one."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
        return self.reduction(self.norm(x))


class PatchEmbed(nn.Module):
    """(N, 3, H, W) -> (N, H / 4, W / 4, C), rounded up."""

    def __init__(self, channels: int):
        super().__init__()
        self.proj = nn.Conv2d(3, channels, 4, 4)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks of one resolution, and the merging that leads to the next stage unless this is the last."""

    def __init__(self, channels: int, depth: int, heads: int, side: int, last: bool):
        super().__init__()
        self.blocks = nn.Sequential(*(SwinBlock(channels, heads, side, i % 2 * (side // 2)) for i in range(depth)))
        self.downsample = None if last else PatchMerging(channels)


class Swin(nn.Module):
    """The transformer without its classifier.

    Args:
        width: Channels of the first stage; each further stage has twice as many.
        depths: Blocks in each of the four stages.
        heads: Attention heads in each stage.
        side: Cells along a window.
        finest: The first map that `forward` returns: 3 for C3, or 2 for C2, for pyramids that begin with it.

    Raises:
        ValueError: `finest` is neither 2 nor 3.

    Attributes:
        channels: Channels of the maps that `forward` returns.
        unused_keys: Regular expression of the keys of an ImageNet release that a backbone has no use for.
        fresh_keys: Regular expression of the backbone's keys that an ImageNet release does not have.
    """

    unused_keys = r"(head|norm)\..*|.*\.relative_position_index|.*\.attn_mask"
    fresh_keys = r"norm\d\..*"

    def __init__(self, width: int, depths: tuple[int, ...], heads: tuple[int, ...], side: int, *, finest: int = 3):
        super().__init__()
        check_finest(finest)
        self.patch_embed = PatchEmbed(width)
        channels = tuple(width * 2**stage for stage in range(4))
        settings = zip(channels, depths, heads, strict=True)
        self.layers = nn.ModuleList(Stage(*setting, side, stage == 3) for stage, setting in enumerate(settings))
        # C2's norm comes last: optimisers know parameters by their number.
        for stage in (1, 2, 3, 0)[: 6 - finest]:
            self.add_module(f"norm{stage}", nn.LayerNorm(channels[stage]))
        self.finest = finest
        self.channels = channels[finest - 2 :]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> C3, C4, C5 of strides 8, 16, 32, and C2 of stride 4 before them where `finest` is 2."""
        x, maps = self.patch_embed(x), []
        for index, stage in enumerate(cast(list[Stage], self.layers)):
            x = stage.blocks(x)
            if index >= self.finest - 2:
                maps.append(self.get_submodule(f"norm{index}")(x).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def freeze(self, stages: int) -> None:
        """Stop training the patches' embedding and the first `stages` stages."""
        for module in (self.patch_embed, *self.layers[:stages]):
            module.requires_grad_(False)


def swin_t(*, finest: int = 3) -> Swin:
    """Swin-T with random weights; `finest` as in `Swin`."""
    return Swin(96, (2, 2, 6, 2), (3, 6, 12, 24), 7, finest=finest)


def swin_l(*, finest: int = 3) -> Swin:
    """Swin-L with windows of 12, as its detectors use it, with random weights; `finest` as in `Swin`."""
    return Swin(192, (2, 2, 18, 2), (6, 12, 24, 48), 12, finest=finest)


def check_finest(finest: int) -> None:
    """Refuse any other map than C2 or C3 as the finest of a backbone with a ValueError."""
    if finest not in (2, 3):
        raise ValueError(f"finest must be 3, for C3, or 2, for C2, got {finest!r}")
