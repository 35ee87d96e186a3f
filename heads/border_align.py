"""BorderAlign (Qiu et al., ECCV 2020): the strongest response on each of the four borders of a box.

Forward: one bilinear sample per position and channel, then the first largest of each border. Backward: only the winning
sample of each border has a gradient, so four corners of one cell are written per output, not of all samples. Positions
are not differentiated: the boxes are where to look, not what is learned here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Samples held at once in the forward: a quarter of a gigabyte in float32.
_SAMPLES = 2**26

# In which direction a border is walked, x and y: the top from the left, the left one from the top, the bottom one from
# the right, the right one from below.
_DIRECTIONS = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))


def _positions(boxes: Tensor, pool_size: int) -> Tensor:
    """Where the borders of boxes (N, n, 4) are sampled: (N * 4, n, pool_size + 1, 2), x and y in cells."""
    first, last = boxes[..., :2], boxes[..., 2:]
    start = torch.stack([first, first, last, last], 1).flatten(0, 1)
    step = ((last - first) / pool_size)[:, None] * boxes.new_tensor(_DIRECTIONS)[:, None]
    order = torch.arange(pool_size + 1, dtype=boxes.dtype, device=boxes.device)[:, None]
    return start[:, :, None] + order * step.flatten(0, 1)[:, :, None]


def _inside(position: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether positions (..., 2) x, y are within a cell of the map; beyond, the samples are 0."""
    limit = position.new_tensor([size[1], size[0]])
    return ((position >= -1) & (position <= limit)).all(-1)


class _BorderAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, boxes: Tensor, pool_size: int) -> Tensor:
        images, channels, height, width = features.shape
        count = boxes.shape[1]
        # Each border of each image reads its own C channels.
        maps = features.reshape(images * 4, channels // 4, height, width)
        positions = _positions(boxes, pool_size)
        # From cells to the -1…1 between the middles of the first and the last cell, which may be the same.
        scale = 2 / boxes.new_tensor([max(width - 1, 1), max(height - 1, 1)])
        most = max(1, _SAMPLES // (images * channels * (pool_size + 1)))
        values, chosen = [], []
        for position in positions.split(most, 1):
            samples = F.grid_sample(maps, position * scale - 1, padding_mode="border", align_corners=True)
            samples *= _inside(position, (height, width))[:, None]
            # Of equal values `max` takes the first, on every device.
            value, index = samples.max(-1)
            values.append(value)
            chosen.append(index.to(torch.uint8))
        ctx.save_for_backward(boxes, torch.cat(chosen, -1))
        ctx.pool_size, ctx.shape = pool_size, features.shape
        return torch.cat(values, -1).view(images, 4, channels // 4, count).permute(0, 2, 3, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        boxes, chosen = ctx.saved_tensors
        images, channels, height, width = ctx.shape
        count, samples = boxes.shape[1], ctx.pool_size + 1
        # Cells and weights of all samples are few: they have no channels.
        position = _positions(boxes, ctx.pool_size).view(images * 4, count * samples, 2)
        inside = _inside(position, (height, width))
        last = position.new_tensor([width - 1, height - 1])
        position = position.clamp(min=0).minimum(last)
        low = position.floor()
        x, y = (position - low).unbind(-1)
        high = (low + 1).minimum(last)
        # (N * 4, C * n): which of the samples won.
        won = (chosen + torch.arange(0, count * samples, samples, device=grad.device)).flatten(1)
        grad = grad.permute(0, 3, 1, 2).reshape(won.shape)
        result = grad.new_zeros(images * channels, height * width)
        for row, of_row in ((low, 1 - y), (high, y)):
            for column, of_column in ((low, 1 - x), (high, x)):
                cell = (row[..., 1] * width + column[..., 0]).long().gather(1, won)
                value = (of_row * of_column * inside).gather(1, won) * grad
                result.scatter_add_(1, cell.view(len(result), count), value.view(len(result), count))
        return result.view(ctx.shape), None, None


def border_align(features: Tensor, boxes: Tensor, pool_size: int = 10) -> Tensor:
    """Maximum over `pool_size + 1` bilinear samples, evenly spaced from end to end, on each border of each box.

    A cell's value lies at its index, so the middle of the first cell is 0. Positions up to one cell outside read the
    nearest cell, those further out are 0.

    Args:
        features: (N, 4 * C, H, W): C channels for the top borders, then the left, bottom and right ones. Half precision
            is computed in float32.
        boxes: (N, n, 4) x1, y1, x2, y2 in cells; not differentiated. n may be 0.
        pool_size: below 256.

    Returns:
        (N, C, n, 4): top, left, bottom, right. It can be differentiated once, in `features`.

    Raises:
        ValueError: a shape does not fit, or `pool_size` is out of range.
    """
    if features.ndim != 4 or features.shape[1] % 4:
        raise ValueError(f"features must be (N, 4 * C, H, W); got {tuple(features.shape)}")
    if boxes.ndim != 3 or boxes.shape[0] != features.shape[0] or boxes.shape[2] != 4:
        raise ValueError(f"boxes must be ({features.shape[0]}, n, 4); got {tuple(boxes.shape)}")
    if not 1 <= pool_size < 256:
        raise ValueError(f"pool_size must be within 1…255; got {pool_size}")
    exact = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    with torch.autocast(features.device.type, enabled=False):
        return _BorderAlign.apply(exact, boxes.detach().to(exact.dtype), pool_size).to(features.dtype)
