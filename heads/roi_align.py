"""RoIAlign (He et al., 2017): a fixed number of bins from the part of a feature map that a box covers.

A bin's value is the mean of bilinear samples on a regular grid inside it. Bilinear weights, the test for samples
outside the map, and the mean are all products of a factor in y and a factor in x, so the whole operator is two matrix
products a box: `rows (P, H) @ map (H, W) @ columns (W, Q)`, the same for every channel. The backward is the transposed
products, so it has no atomic additions and gives the same bits on every run, on a GPU as well.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of the product between the two matrix products that are alive at a time.
_CHUNK = 1 << 26


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
    """
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    corners = torch.cat(boxes).detach().to(features.dtype) * spatial_scale
    start, size = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if aligned:
        start = start - 0.5
    else:
        size = size.clamp(min=1)
    rows = _axis_weights(start[:, 1], size[:, 1], output_size[0], features.shape[2], sampling_ratio)
    columns = _axis_weights(start[:, 0], size[:, 0], output_size[1], features.shape[3], sampling_ratio)
    with torch.autocast(features.device.type, enabled=False):
        return _RoIAlign.apply(features, rows, columns, tuple(len(b) for b in boxes))


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


class _RoIAlign(torch.autograd.Function):
    """`out[r, c] = rows[r] @ features[image of r, c] @ columns[r]ᵀ`, with nothing kept that grows with boxes × map."""

    @staticmethod
    def forward(ctx, features: Tensor, rows: Tensor, columns: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(rows, columns)
        ctx.counts, ctx.shape = counts, features.shape
        n, channels, height, width = features.shape
        (boxes, p, _), q = rows.shape, columns.shape[1]
        maps = features.permute(0, 2, 1, 3).reshape(n, height, channels * width)
        out = features.new_empty(boxes, p, channels, q)
        for image, part in _parts(counts, p * channels * width):
            across = rows[part].reshape(-1, height) @ maps[image]
            product = torch.bmm(across.view(-1, p * channels, width), columns[part].mT)
            out[part] = product.view(-1, p, channels, q)
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rows, columns = ctx.saved_tensors
        n, channels, height, width = ctx.shape
        p, q = rows.shape[1], columns.shape[1]
        grad = grad.transpose(1, 2).reshape(-1, p * channels, q)
        total = grad.new_zeros(n, height, channels * width)
        for image, part in _parts(ctx.counts, p * channels * width):
            across = torch.bmm(grad[part], columns[part]).view(-1, channels * width)
            total[image].addmm_(rows[part].reshape(-1, height).mT, across)
        return total.view(n, height, channels, width).transpose(1, 2), None, None, None


def _parts(counts: tuple[int, ...], elements: int):
    """(image, slice of the boxes) pairs in order, each small enough for `_CHUNK`."""
    most = max(1, _CHUNK // max(1, elements))
    end = 0
    for image, count in enumerate(counts):
        start, end = end, end + count
        for first in range(start, end, most):
            yield image, slice(first, min(first + most, end))
