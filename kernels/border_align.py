"""BorderAlign (Qiu et al., ECCV 2020): the strongest response on each of the four borders of a box.

Forward: one bilinear sample per position and channel, then the first largest of each border. Backward: only the winning
sample of each border has a gradient, so four corners of one cell are written per output, not of all samples. Positions
are not differentiated: the boxes are where to look, not what is learned here.

On a GPU the corners are added atomically, in any order, unless PyTorch is told to use deterministic algorithms: then
the backward is the one in PyTorch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import resolve_backend

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


def _forward_torch(features: Tensor, boxes: Tensor, pool_size: int) -> tuple[Tensor, Tensor]:
    images, channels, height, width = features.shape
    # Each border of each image reads its own C channels.
    maps = features.to(boxes.dtype).reshape(images * 4, channels // 4, height, width)
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
        values.append(value.to(features.dtype))
        chosen.append(index.to(torch.uint8))
    return tuple(
        torch.cat(x, -1).view(images, 4, channels // 4, boxes.shape[1]).permute(0, 2, 3, 1) for x in (values, chosen)
    )


def _backward_torch(grad: Tensor, chosen: Tensor, boxes: Tensor, shape: Sequence[int], pool_size: int) -> Tensor:
    images, channels, height, width = shape
    count, samples = boxes.shape[1], pool_size + 1
    # Cells and weights of all samples are few: they have no channels.
    position = _positions(boxes, pool_size).view(images * 4, count * samples, 2)
    inside = _inside(position, (height, width))
    last = position.new_tensor([width - 1, height - 1])
    position = position.clamp(min=0).minimum(last)
    low = position.floor()
    x, y = (position - low).unbind(-1)
    high = (low + 1).minimum(last)
    # (N * 4, C * n): which of the samples won.
    won = chosen.permute(0, 3, 1, 2).reshape(images * 4, -1, count)
    won = (won + torch.arange(0, count * samples, samples, device=grad.device)).flatten(1)
    grad = grad.permute(0, 3, 1, 2).reshape(won.shape).to(boxes.dtype)
    result = grad.new_zeros(images * channels, height * width)
    for row, of_row in ((low, 1 - y), (high, y)):
        for column, of_column in ((low, 1 - x), (high, x)):
            cell = (row[..., 1] * width + column[..., 0]).long().gather(1, won)
            value = (of_row * of_column * inside).gather(1, won) * grad
            result.scatter_add_(1, cell.view(len(result), count), value.view(len(result), count))
    return result.view(shape)


def _forward(features: Tensor, boxes: Tensor, pool_size: int, backend: str) -> tuple[Tensor, Tensor]:
    """The maxima, and for the backward which samples they are."""
    if backend == "torch":
        return _forward_torch(features, boxes, pool_size)
    # Triton is looked for only where it is used: it is not installed on every system.
    from kernels import border_align_triton

    output, chosen = _fake_forward(features, boxes, pool_size, backend)
    border_align_triton.forward(output, chosen, features, boxes, pool_size)
    return output, chosen


def _backward(grad, chosen, boxes, shape, pool_size, backend) -> Tensor:
    if backend == "torch":
        return _backward_torch(grad, chosen, boxes, shape, pool_size)
    if torch.are_deterministic_algorithms_enabled():
        result = _backward_torch(grad, chosen, boxes, shape, pool_size)
        return result.contiguous(memory_format=torch.channels_last)
    from kernels import border_align_triton

    return border_align_triton.backward(grad, chosen, boxes, shape, pool_size)


def _fake_forward(features: Tensor, boxes: Tensor, pool_size: int, backend: str) -> tuple[Tensor, Tensor]:
    (images, channels), count = features.shape[:2], boxes.shape[1]

    def new(dtype):
        if backend == "torch":
            return features.new_empty(images, 4, channels // 4, count, dtype=dtype).permute(0, 2, 3, 1)
        return features.new_empty(images, count, 4, channels // 4, dtype=dtype).permute(0, 3, 1, 2)

    return new(features.dtype), new(torch.uint8)


def _fake_backward(grad, chosen, boxes, shape, pool_size, backend) -> Tensor:
    memory_format = torch.contiguous_format if backend == "torch" else torch.channels_last
    return torch.empty(shape, dtype=boxes.dtype, device=boxes.device, memory_format=memory_format)


class _BorderAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, features, boxes, *settings):
        with torch._C._AutoDispatchBelowAutograd():
            output, chosen = torch.ops.dyhead.border_align.default.redispatch(keyset, features, boxes, *settings)
        ctx.settings, ctx.dtype, ctx.shape = settings, features.dtype, features.shape
        ctx.save_for_backward(chosen, boxes)
        ctx.mark_non_differentiable(chosen)
        ctx.set_materialize_grads(False)
        return output, chosen

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 5
        found = torch.ops.dyhead.border_align_backward.default(grad, *ctx.saved_tensors, ctx.shape, *ctx.settings)
        return None, found.to(ctx.dtype), None, None, None


def _differentiate(keyset, features, *others):
    below = keyset & torch._C._after_autograd_keyset
    if torch.is_grad_enabled() and features.requires_grad:
        return _BorderAlign.apply(below, features, *others)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.dyhead.border_align.default.redispatch(below, features, *others)


_library = torch.library.Library("dyhead", "FRAGMENT")
_library.define("border_align(Tensor features, Tensor boxes, int pool_size, str backend) -> (Tensor, Tensor)")
_library.define(
    "border_align_backward(Tensor grad, Tensor chosen, Tensor boxes, SymInt[] shape, int pool_size, str backend) "
    "-> Tensor"
)
for _key in ("CPU", "CUDA"):
    _library.impl("border_align", _forward, _key)
    _library.impl("border_align_backward", _backward, _key)
_library.impl("border_align", _differentiate, "Autograd", with_keyset=True)
torch.library.register_fake("dyhead::border_align", _fake_forward, lib=_library)
torch.library.register_fake("dyhead::border_align_backward", _fake_backward, lib=_library)


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
        ValueError: a shape or a device does not fit, or `pool_size` is out of range.
    """
    if boxes.device != features.device:
        raise ValueError(f"boxes must be on the features' device, {features.device}; they are on {boxes.device}")
    if features.ndim != 4 or features.shape[1] % 4:
        raise ValueError(f"features must be (N, 4 * C, H, W); got {tuple(features.shape)}")
    if boxes.ndim != 3 or boxes.shape[0] != features.shape[0] or boxes.shape[2] != 4:
        raise ValueError(f"boxes must be ({features.shape[0]}, n, 4); got {tuple(boxes.shape)}")
    if not 1 <= pool_size < 256:
        raise ValueError(f"pool_size must be within 1…255; got {pool_size}")
    positions = boxes.detach().to(torch.promote_types(features.dtype, torch.float32))
    with torch.autocast(features.device.type, enabled=False):
        op = torch.ops.dyhead.border_align.default
        return op(features, positions, pool_size, resolve_backend(features.device))[0]
