"""The transformer of DETR (Carion et al., 2020): positions added to queries and keys, norms behind the sums."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from heads.ranks import Dropout, dropout


def padding_mask(
    sizes: Sequence[tuple[int, int]], padded: tuple[int, int], cells: tuple[int, int], device: torch.device | str
) -> Tensor:
    """Which cells of a map hold nothing but padding: (N, h, w) bool.

    Args:
        sizes: (height, width) of each image.
        padded: (height, width) of the batch.
        cells: (h, w) of the map; a cell is padding where the pixel in its upper left corner is.
        device: Device of the result.
    """
    inside = []
    for axis in (0, 1):
        corner = torch.arange(cells[axis], device=device) * padded[axis] // cells[axis]
        sides = [size[axis] for size in sizes]
        inside.append(corner < (torch.tensor(sides, device=device)[:, None] if len(sides) > 1 else sides[0]))
    rows, columns = (x.view(len(sizes), -1) for x in inside)
    return ~(rows[:, :, None] & columns[:, None, :])


def sine_positions(mask: Tensor, channels: int) -> Tensor:
    """Sines and cosines of each cell's position in its image, y in the first half of the channels and x in the second.

    The last row and column that are no padding are at 2π.

    Args:
        mask: (N, h, w) bool, true in the padding.
        channels: Channels of the positions, a multiple of 4.

    Returns:
        (N, h, w, channels) float32.
    """
    inside = (~mask).float()
    frequency = 10000 ** (torch.arange(0, channels // 2, 2, device=mask.device) / (channels // 2))
    halves = []
    for axis in (1, 2):
        position = inside.cumsum(axis)
        last = position.select(axis, -1).unsqueeze(axis)
        angle = (position / (last + 1e-6) * (2 * math.pi))[..., None] / frequency
        halves.append(torch.stack([angle.sin(), angle.cos()], -1).flatten(-2))
    return torch.cat(halves, -1)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017), as matrix products that a counter of operations sees."""

    def __init__(self, channels: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, Q, C) from queries (N, Q, C), keys and values (N, T, C); `mask` (N, T): keys left out."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None], -torch.inf)
        weights = dropout(scores.softmax(-1), self.dropout, self.training)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """Two linear layers with a ReLU between them."""

    def __init__(self, channels: int, hidden: int, dropout: float):
        super().__init__(nn.Linear(channels, hidden), nn.ReLU(), Dropout(dropout), nn.Linear(hidden, channels))


class EncoderLayer(nn.Module):
    """Self-attention of tokens, then two linear layers, a norm behind each."""

    def __init__(self, channels: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.attention = Attention(channels, heads, dropout)
        self.feed = FeedForward(channels, hidden, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """(N, T, C) -> (N, T, C)."""
        placed = x + positions
        x = self.norms[0](x + self.dropout(self.attention(placed, placed, x, mask)))
        return self.norms[1](x + self.dropout(self.feed(x)))


class DecoderLayer(nn.Module):
    """Self-attention of queries, attention to the tokens, then two linear layers, a norm behind each."""

    def __init__(self, channels: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.among = Attention(channels, heads, dropout)
        self.across = Attention(channels, heads, dropout)
        self.feed = FeedForward(channels, hidden, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, queries: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """(N, Q, C) -> (N, Q, C); `queries` are the positions of the Q."""
        placed = x + queries
        x = self.norms[0](x + self.dropout(self.among(placed, placed, x)))
        x = self.norms[1](x + self.dropout(self.across(x + queries, tokens + positions, tokens, mask)))
        return self.norms[2](x + self.dropout(self.feed(x)))


def xavier(module: nn.Module) -> None:
    """DETR's initial weights: Xavier's for all matrices, zero for the biases of linear layers."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
