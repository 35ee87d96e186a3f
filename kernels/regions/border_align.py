"""BorderAlign (Qiu et al., ECCV 2020): the strongest response on each of the four borders of a box.

Forward: one bilinear sample per position and channel, then the first largest of each border. Backward: only the winning
sample of each border has a gradient, so four corners of one cell are written per output, not of all samples. Positions
are not differentiated: the boxes are where to look, not what is learned here.

On a GPU the corners are added atomically, in any order, unless PyTorch is told to use deterministic algorithms: then
the backward is the one in PyTorch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import resolve_backend
from kernels.runtime.checks import check_device, check_integer, check_tensor
from kernels.runtime.operator import Derivative, Implementation, Operator, signature

# Samples held at once in the forward: a quarter of a gigabyte in float32.
_SAMPLES = 2**26


def _positions(boxes: Tensor, pool_size: int) -> Tensor:
    """Where the borders of boxes (N, n, 4) are sampled: (N * 4, n, pool_size + 1, 2), x and y in cells."""
    first, last = boxes[..., :2], boxes[..., 2:]
    start = torch.stack([first, first, last, last], 1).flatten(0, 1)
    wide, high = ((last - first) / pool_size).unbind(-1)
    # In which direction a border is walked: the top from the left, the left one from the top, the bottom one from the
    # right, the right one from below. Not as a product with 1 and 0: a side that is not finite leaves the other alone.
    still = torch.zeros_like(wide)
    step = torch.stack([wide, still, still, high, -wide, still, still, -high], -1).unflatten(-1, (4, 2))
    step = step.transpose(1, 2).flatten(0, 1)
    order = torch.arange(pool_size + 1, dtype=boxes.dtype, device=boxes.device)[:, None]
    return start[:, :, None] + order * step[:, :, None]


def _inside(position: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether positions (..., 2) x, y are finite and within a cell of the map; of others, the samples are 0."""
    limit = position.new_tensor([size[1], size[0]])
    return ((position >= -1) & (position <= limit)).all(-1)


class _Corners(NamedTuple):
    """Around positions (N * 4, samples): four cells as numbers in a map, and how much each counts in the sample."""

    cells: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]


def _corners(position: Tensor, inside: Tensor, size: Sequence[int]) -> _Corners:
    height, width = size
    last = position.new_tensor([width - 1, height - 1])
    # Where nothing is read is a place that exists, too.
    position = position.masked_fill(~inside[..., None], 0).clamp(min=0).minimum(last)
    low = position.floor()
    x, y = (position - low).unbind(-1)
    high = (low + 1).minimum(last).long()
    low = low.long()
    cells = [row[..., 1] * width + column[..., 0] for row in (low, high) for column in (low, high)]
    return _Corners(tuple(cells), ((1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x))


def _sample(maps: Tensor, position: Tensor, inside: Tensor) -> Tensor:
    """Maps (N * 4, C, H, W) at positions (N * 4, n, samples, 2), 0 where not `inside`: (N * 4, C, n, samples)."""
    channels, count = maps.shape[1], position.shape[1]
    corners = _corners(position.flatten(1, 2), inside.flatten(1), maps.shape[2:])
    cells = maps.flatten(2)
    samples = (
        cells.gather(2, cell[:, None].expand(-1, channels, -1)) * weight[:, None]
        for cell, weight in zip(*corners, strict=True)
    )
    found = sum(samples, maps.new_zeros(()))
    return found.unflatten(2, (count, position.shape[2])).where(inside[:, None], 0)


def _sample_finite(maps: Tensor, position: Tensor, inside: Tensor) -> Tensor:
    """The same but for rounding, in one operation. It moves positions by that rounding, so that a cell whose share is 0
    is not read, or another one is: only for maps without a NaN or an infinity."""
    height, width = maps.shape[2:]
    # From cells to the -1…1 between the middles of the first and the last cell, which may be the same.
    scale = 2 / position.new_tensor([max(width - 1, 1), max(height - 1, 1)])
    position = position.masked_fill(~inside[..., None], 0) * scale - 1
    samples = F.grid_sample(maps, position, padding_mode="border", align_corners=True)
    return samples.mul_(inside[:, None])


def reference(features: Tensor, boxes: Tensor, pool_size: int = 10) -> Tensor:
    """The definition in differentiable plain PyTorch, in the type of `boxes`; shapes as in `border_align`."""
    images, channels, height, width = features.shape
    maps = features.to(boxes.dtype).reshape(images * 4, channels // 4, height, width)
    positions = _positions(boxes, pool_size)
    value = _sample(maps, positions, _inside(positions, (height, width))).max(-1).values
    return value.view(images, 4, channels // 4, boxes.shape[1]).permute(0, 2, 3, 1)


def _forward_torch(features: Tensor, boxes: Tensor, pool_size: int) -> tuple[Tensor, Tensor]:
    images, channels, height, width = features.shape
    if not images * channels * boxes.shape[1]:
        return _fake_forward(features, boxes, pool_size, "torch")
    # Each border of each image reads its own C channels.
    maps = features.to(boxes.dtype).reshape(images * 4, channels // 4, height, width)
    positions = _positions(boxes, pool_size)
    sample = _sample_finite if math.isfinite(maps.sum()) else _sample
    most = max(1, _SAMPLES // (images * channels * (pool_size + 1)))
    values, chosen = [], []
    for position in positions.split(most, 1):
        # Of equal values `max` takes the first, on every device.
        value, index = sample(maps, position, _inside(position, (height, width))).max(-1)
        values.append(value.to(features.dtype))
        chosen.append(index.to(torch.uint8))

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, -1).view(images, 4, channels // 4, boxes.shape[1]).permute(0, 2, 3, 1)

    return joined(values), joined(chosen)


def _backward_torch(grad: Tensor, chosen: Tensor, boxes: Tensor, shape: Sequence[int], pool_size: int) -> Tensor:
    images, channels, height, width = shape
    count, samples = boxes.shape[1], pool_size + 1
    result = boxes.new_zeros(images * channels, height * width)
    if not images * channels * count:
        return result.view(shape)
    # Cells and weights of all samples are few: they have no channels.
    position = _positions(boxes, pool_size).view(images * 4, count * samples, 2)
    inside = _inside(position, (height, width))
    # (N * 4, C * n): which of the samples won.
    won = chosen.permute(0, 3, 1, 2).reshape(images * 4, -1, count)
    won = (won + torch.arange(0, count * samples, samples, device=grad.device)).flatten(1)
    grad = grad.permute(0, 3, 1, 2).reshape(won.shape).to(boxes.dtype)
    if not grad.is_cpu or not math.isfinite(grad.sum()):
        # 0 × NaN is NaN, also where nothing was sampled. On a GPU a look at the numbers would wait for them.
        grad = grad.masked_fill(~inside.gather(1, won), 0)
    for cells, weights in zip(*_corners(position, inside, (height, width)), strict=True):
        value = (weights * inside).gather(1, won) * grad
        result.scatter_add_(1, cells.gather(1, won).view(len(result), count), value.view(len(result), count))
    return result.view(shape)


def _forward_triton(features: Tensor, boxes: Tensor, pool_size: int) -> tuple[Tensor, Tensor]:
    # Triton is looked for only where it is used: it is not installed on every system.
    from kernels.regions import border_align_kernels

    output, chosen = _fake_forward(features, boxes, pool_size, "triton")
    border_align_kernels.forward(output, chosen, features, boxes, pool_size)
    return output, chosen


def _backward_triton(grad: Tensor, chosen: Tensor, boxes: Tensor, shape: tuple[int, ...], pool_size: int) -> Tensor:
    if torch.are_deterministic_algorithms_enabled():
        result = _backward_torch(grad, chosen, boxes, shape, pool_size)
        return result.contiguous(memory_format=torch.channels_last)
    from kernels.regions import border_align_kernels

    return border_align_kernels.backward(grad, chosen, boxes, shape, pool_size)


def _fake_forward(features: Tensor, boxes: Tensor, pool_size: int, backend: str) -> tuple[Tensor, Tensor]:
    (images, channels), count = features.shape[:2], boxes.shape[1]

    def new(dtype: torch.dtype) -> Tensor:
        if backend == "torch":
            return features.new_empty(images, 4, channels // 4, count, dtype=dtype).permute(0, 2, 3, 1)
        return features.new_empty(images, count, 4, channels // 4, dtype=dtype).permute(0, 3, 1, 2)

    return new(features.dtype), new(torch.uint8)


def _fake_backward(
    grad: Tensor, chosen: Tensor, boxes: Tensor, shape: Sequence[int], pool_size: int, backend: str
) -> Tensor:
    memory_format = torch.contiguous_format if backend == "torch" else torch.channels_last
    return torch.empty(shape, dtype=boxes.dtype, device=boxes.device, memory_format=memory_format)


class _Saved(NamedTuple):
    dtype: torch.dtype
    shape: torch.Size
    settings: Sequence[Any]


def _save(arguments: Sequence[Any], results: Sequence[Tensor]) -> tuple[list[Tensor], _Saved]:
    features, boxes, *settings = arguments
    return [results[1], boxes], _Saved(features.dtype, features.shape, settings)


def _gradients(
    backward: Callable[..., Tensor],
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    saved: _Saved,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    found = backward(grads, grads[0], *tensors, saved.shape, *saved.settings)
    return [found.to(saved.dtype), None]


_operator = Operator(
    "border_align",
    Implementation(
        "(Tensor features, Tensor boxes, int pool_size, str backend) -> (Tensor, Tensor)",
        _forward_torch,
        _forward_triton,
        _fake_forward,
    ),
    Derivative(
        Implementation(
            "(Tensor grad, Tensor chosen, Tensor boxes, SymInt[] shape, int pool_size, str backend) -> Tensor",
            _backward_torch,
            _backward_triton,
            _fake_backward,
        ),
        _save,
        _gradients,
        results=1,
    ),
)


def _check(features: Any, boxes: Any) -> None:
    check_tensor("features", features, "(N, 4 * C, H, W)", 4)
    if features.shape[1] % 4 or features.shape[2] < 1 or features.shape[3] < 1:
        raise ValueError(f"features must be (N, 4 * C, H, W) with a cell or more, got shape {tuple(features.shape)}")
    check_tensor("boxes", boxes, "(N, n, 4)", 3)
    check_device("boxes", boxes, "features", features)
    if boxes.shape[0] != features.shape[0] or boxes.shape[2] != 4:
        raise ValueError(f"boxes must be ({features.shape[0]}, n, 4), got shape {tuple(boxes.shape)}")


def border_align(features: Tensor, boxes: Tensor, pool_size: int = 10) -> Tensor:
    """Maximum over `pool_size + 1` bilinear samples, evenly spaced from end to end, on each border of each box.

    A cell's value lies at its index, so the middle of the first cell is 0. Positions up to one cell outside read the
    nearest cell; those further out, and those that are not finite, are 0. A side of a box that is NaN or infinite
    spoils the three borders that it has a part in, not the one opposite.

    Args:
        features: (N, 4 * C, H, W): C channels for the top borders, then the left, bottom and right ones. Floating
            point; half precision is computed in float32.
        boxes: (N, n, 4) x1, y1, x2, y2 in cells, floating point, of the same or another type; not differentiated. N, C
            and n may be 0.
        pool_size: Steps along a border, from 1 to 255.

    Returns:
        (N, C, n, 4): top, left, bottom, right. It can be differentiated once, in `features`.

    Raises:
        TypeError: An argument is of a wrong Python type.
        ValueError: A shape, a type, a device or `pool_size` does not fit; the message names the argument.
        NotImplementedError: A second derivative is asked for.

    Source: Qiu et al., "BorderDet", ECCV 2020.

    Example:
        >>> import torch
        >>> from kernels import border_align
        >>> features = torch.arange(5.0).expand(1, 4, 5, 5)
        >>> border_align(features, torch.tensor([[[1.0, 1.0, 3.0, 3.0]]]))
        tensor([[[[3., 1., 3., 3.]]]])
    """
    _check(features, boxes)
    pool_size = check_integer("pool_size", pool_size, 1, 255)
    key = signature(features, boxes)
    positions = boxes.detach().to(torch.promote_types(features.dtype, torch.float32))
    output: Tensor = _operator(key, features, positions, pool_size, resolve_backend(features.device))[0]
    return output
