"""RoIAlign (He et al., 2017): a fixed number of bins from the part of a feature map that a box covers.

A bin's value is the mean of bilinear samples on a regular grid inside it. In PyTorch: bilinear weights, the test for
samples outside the map, and the mean are all products of a factor in y and a factor in x, so the whole operator is two
matrix products a box: `rows (P, H) @ map (H, W) @ columns (W, Q)`, the same for every channel. The backward is the
transposed products, so it has no atomic additions and gives the same bits on every run, on a GPU as well.

In Triton samples are read where they lie, and the backward adds atomically what they get, unless PyTorch is told to use
deterministic algorithms: then the backward is the one in PyTorch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import resolve_backend

# Elements of the product between the two matrix products that are alive at a time.
_CHUNK = 1 << 26


def _weights(
    boxes: Tensor, output_size: Sequence[int], size: Sequence[int], sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """How much each row and each column of a map counts in each bin of boxes (R, 4): (R, P, H) and (R, Q, W)."""
    start, extent = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    if aligned:
        start = start - 0.5
    else:
        extent = extent.clamp(min=1)
    rows = _axis_weights(start[:, 1], extent[:, 1], output_size[0], size[0], sampling_ratio)
    columns = _axis_weights(start[:, 0], extent[:, 0], output_size[1], size[1], sampling_ratio)
    return rows, columns


def _axis_weights(start: Tensor, size: Tensor, bins: int, length: int, sampling_ratio: int) -> Tensor:
    """How much each of the `length` cells of one axis counts in each bin of R boxes: (R, bins, length).

    Args:
        start, size: (R,) in cells.
    """
    step = size / bins
    samples = step.ceil().clamp(min=0) if sampling_ratio == 0 else torch.full_like(step, sampling_ratio)
    # A box without size has no samples; its bins are 0. One that is not finite must not decide how many there are.
    samples = samples.nan_to_num(0, 0, 0)
    spacing = (step / samples.clamp(min=1))[:, None]
    first = start[:, None] + torch.arange(bins, device=start.device) * step[:, None] + 0.5 * spacing
    cells = torch.arange(length, device=start.device, dtype=start.dtype)
    weights = start.new_zeros(len(start), bins, length)
    # Sample by sample, and not all at once: a thin box may have fifty of them in a bin.
    for number in range(int(samples.max()) if len(samples) else 0):
        position = first + number * spacing
        counts = (position >= -1) & (position <= length) & (number < samples[:, None])
        distance = (position.clamp(0, length - 1)[..., None] - cells).abs_()
        weights += (1 - distance).clamp_(min=0).mul_(counts[..., None])
    return weights / samples.clamp(min=1)[:, None, None]


def _forward_torch(features: Tensor, rows: Tensor, columns: Tensor, counts: Sequence[int]) -> Tensor:
    """`out[r, c] = rows[r] @ features[image of r, c] @ columns[r]ᵀ`, with nothing kept that grows with boxes × map."""
    n, channels, height, width = features.shape
    (boxes, p, _), q = rows.shape, columns.shape[1]
    maps = features.permute(0, 2, 1, 3).reshape(n, height, channels * width)
    out = features.new_empty(boxes, p * channels, q)
    for image, part in _parts(counts, p * channels * width):
        across = rows[part].reshape(-1, height) @ maps[image]
        torch.bmm(across.view(-1, p * channels, width), columns[part].mT, out=out[part])
    return out.view(boxes, p, channels, q).transpose(1, 2)


def _backward_torch(grad: Tensor, rows: Tensor, columns: Tensor, counts: Sequence[int], shape: Sequence[int]) -> Tensor:
    n, channels, height, width = shape
    p, q = rows.shape[1], columns.shape[1]
    grad = grad.transpose(1, 2).reshape(-1, p * channels, q)
    total = grad.new_zeros(n, height, channels * width)
    for image, part in _parts(counts, p * channels * width):
        across = torch.bmm(grad[part], columns[part]).view(-1, channels * width)
        total[image].addmm_(rows[part].reshape(-1, height).mT, across)
    return total.view(n, height, channels, width).transpose(1, 2)


def _parts(counts: tuple[int, ...], elements: int):
    """(image, slice of the boxes) pairs in order, each small enough for `_CHUNK`."""
    most = max(1, _CHUNK // max(1, elements))
    end = 0
    for image, count in enumerate(counts):
        start, end = end, end + count
        for first in range(start, end, most):
            yield image, slice(first, min(first + most, end))


def _ends(counts: Sequence[int], device: torch.device) -> Tensor:
    """Where the boxes of each image end, (N,) int32."""
    return torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)


def _forward(features, boxes, counts, output_size, sampling_ratio, aligned, backend) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and for the backward what PyTorch has made of the boxes."""
    if backend == "torch":
        features = features.to(boxes.dtype)
        rows, columns = _weights(boxes, output_size, features.shape[2:], sampling_ratio, aligned)
        return _forward_torch(features, rows, columns, counts), rows, columns
    # Triton is looked for only where it is used: it is not installed on every system.
    from kernels import roi_align_triton

    outputs = _fake_forward(features, boxes, counts, output_size, sampling_ratio, aligned, backend)
    roi_align_triton.forward(outputs[0], features, boxes, _ends(counts, boxes.device), sampling_ratio, aligned)
    return outputs


def _backward(grad, boxes, rows, columns, counts, shape, sampling_ratio, aligned, backend) -> Tensor:
    if backend == "torch":
        return _backward_torch(grad, rows, columns, counts, shape)
    if torch.are_deterministic_algorithms_enabled():
        rows, columns = _weights(boxes, grad.shape[2:], shape[2:], sampling_ratio, aligned)
        total = _backward_torch(grad, rows, columns, counts, shape)
        return total.contiguous(memory_format=torch.channels_last)
    from kernels import roi_align_triton

    return roi_align_triton.backward(grad, boxes, _ends(counts, boxes.device), shape, sampling_ratio, aligned)


def _fake_forward(features, boxes, counts, output_size, sampling_ratio, aligned, backend):
    count, (p, q), (_, channels, height, width) = boxes.shape[0], output_size, features.shape
    if backend == "torch":
        out = boxes.new_empty(count, p, channels, q).transpose(1, 2)
        return out, boxes.new_empty(count, p, height), boxes.new_empty(count, q, width)
    out = boxes.new_empty(count, p, q, channels).permute(0, 3, 1, 2)
    return out, boxes.new_empty(0), boxes.new_empty(0)


def _fake_backward(grad, boxes, rows, columns, counts, shape, sampling_ratio, aligned, backend) -> Tensor:
    n, channels, height, width = shape
    if backend == "torch":
        return grad.new_empty(n, height, channels, width).transpose(1, 2)
    return grad.new_empty(n, height, width, channels).permute(0, 3, 1, 2)


class _RoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, features, boxes, *settings):
        with torch._C._AutoDispatchBelowAutograd():
            outputs = torch.ops.dyhead.roi_align.default.redispatch(keyset, features, boxes, *settings)
        ctx.settings, ctx.dtype, ctx.shape = settings, features.dtype, features.shape
        ctx.save_for_backward(boxes, *outputs[1:])
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 8
        counts, _, sampling_ratio, aligned, backend = ctx.settings
        found = torch.ops.dyhead.roi_align_backward.default(
            grad, *ctx.saved_tensors, counts, ctx.shape, sampling_ratio, aligned, backend
        )
        return None, found.to(ctx.dtype), *[None] * 6


def _differentiate(keyset, features, *others):
    below = keyset & torch._C._after_autograd_keyset
    if torch.is_grad_enabled() and features.requires_grad:
        return _RoIAlign.apply(below, features, *others)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.dyhead.roi_align.default.redispatch(below, features, *others)


_library = torch.library.Library("dyhead", "FRAGMENT")
_library.define(
    "roi_align(Tensor features, Tensor boxes, SymInt[] counts, SymInt[] output_size, int sampling_ratio, bool aligned, "
    "str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "roi_align_backward(Tensor grad, Tensor boxes, Tensor rows, Tensor columns, SymInt[] counts, SymInt[] shape, "
    "int sampling_ratio, bool aligned, str backend) -> Tensor"
)
for _key in ("CPU", "CUDA"):
    _library.impl("roi_align", _forward, _key)
    _library.impl("roi_align_backward", _backward, _key)
torch.library.register_fake("dyhead::roi_align", _fake_forward, lib=_library)
torch.library.register_fake("dyhead::roi_align_backward", _fake_backward, lib=_library)
_library.impl("roi_align", _differentiate, "Autograd", with_keyset=True)


def roi_align(
    features: Tensor,
    boxes: list[Tensor],
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Pool the part of a map under each box to `output_size` bins.

    Args:
        features: (N, C, H, W); half precision is computed in float32.
        boxes: for each of the N images (r_i, 4) x1, y1, x2, y2 in pixels; they are not differentiated.
        output_size: bins (P, Q) along y and x.
        spatial_scale: cells per pixel.
        sampling_ratio: samples of a bin along each axis; 0 takes as many as the bin has cells, rounded up.
        aligned: pixel centres lie at half-integers, and a box may be of any size. Without it boxes are not shifted by
            half a cell, and at least one cell wide and high, as in Detectron's first version.

    Returns:
        (sum r_i, C, P, Q), image by image. Samples more than a cell outside the map count as 0.

    Raises:
        ValueError: boxes and features are on different devices.
    """
    if any(b.device != features.device for b in boxes):
        raise ValueError(f"boxes must be on the features' device, {features.device}")
    dtype = torch.promote_types(features.dtype, torch.float32)
    corners = torch.cat(boxes).detach().to(dtype) * spatial_scale
    # Not `len`, which would be a constant to torch.export.
    counts, backend = [b.shape[0] for b in boxes], resolve_backend(features.device)
    with torch.autocast(features.device.type, enabled=False):
        op = torch.ops.dyhead.roi_align.default
        return op(features, corners, counts, output_size, sampling_ratio, aligned, backend)[0]
