"""RoIAlign (He et al., 2017): a fixed number of bins from the part of a feature map that a box covers.

A bin's value is the mean of bilinear samples on a regular grid inside it. In PyTorch: bilinear weights, the test for
samples outside the map, and the mean are all products of a factor in y and a factor in x, so the whole operator is two
matrix products a box: `rows (P, H) @ map (H, W) @ columns (W, Q)`, the same for every channel. The backward is the
transposed products, so it has no atomic additions over the boxes.

The products read all cells of a map, and 0 × NaN is NaN. So where a result is not finite it is computed again, for the
images that are to blame, sample by sample (`kernels/regions/roi_align_samples.py`).

In Triton samples are read where they lie, and the backward adds atomically what they get, unless PyTorch is told to use
deterministic algorithms: then the backward is the one in PyTorch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.backend import resolve_backend
from kernels.regions.roi_align_samples import cells_of, grid_of, reference, reference_backward
from kernels.runtime.checks import (
    check_device,
    check_flag,
    check_integer,
    check_number,
    check_pair,
    check_tensor,
    kind_of,
)
from kernels.runtime.operator import Derivative, Implementation, Operator, signature

# Elements of the product between the two matrix products that are alive at a time.
_CHUNK = 1 << 26
# The most bins along an axis, and samples of a bin: beyond any use, and far from where numbers of elements overflow.
_MOST = 2**15


def _weights(
    boxes: Tensor, output_size: Sequence[int], size: Sequence[int], sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """How much each row and each column of a map counts in each bin of boxes (R, 4): (R, P, H) and (R, Q, W)."""
    grid = grid_of(boxes, output_size, size, sampling_ratio, aligned)
    cells = cells_of(grid)
    weights = boxes.new_zeros(*grid.first.shape, grid.longest)
    start = torch.arange(0, weights.numel(), grid.longest, device=boxes.device).view(*grid.first.shape, 1)
    # One dimension: deterministic algorithms have no other on a GPU.
    for cell, share in ((cells.low, 1 - cells.share), (cells.high, cells.share)):
        weights.view(-1).scatter_add_(0, (start + cell).view(-1), (share * cells.known).view(-1))
    samples = grid.samples.clamp(min=1)[..., None]
    (p, q), (height, width) = output_size, size
    return weights[1, :, :p, :height] / samples[1], weights[0, :, :q, :width] / samples[0]


def _pool(features: Tensor, boxes: Tensor, rows: Tensor, columns: Tensor, counts: Sequence[int], *how: Any) -> Tensor:
    """`out[r, c] = rows[r] @ features[image of r, c] @ columns[r]ᵀ`, with nothing kept that grows with boxes × map.

    Boxes are grouped by image; those beyond the counts are of none. The result is (R, P, C, Q).
    """
    n, channels, height, width = features.shape
    (count, p, _), q = rows.shape, columns.shape[1]
    if not count * channels:
        return features.new_empty(count, p, channels, q)
    maps = features.permute(0, 2, 1, 3).reshape(n, height, channels * width)
    out = features.new_empty(count, p * channels, q)
    out[sum(counts) :] = 0
    for image, part in _parts(counts, p * channels * width):
        across = rows[part].reshape(-1, height) @ maps[image]
        torch.bmm(across.view(-1, p * channels, width), columns[part].mT, out=out[part])
    out = out.view(count, p, channels, q)
    if not math.isfinite(out.sum()):
        for image, part in _parts(counts, p * channels * width):
            if not math.isfinite(out[part].sum()):
                own = boxes[part]
                out[part] = reference(features, own, [image] * len(own), (p, q), *how).transpose(1, 2)
    return out


def _unpool(
    grad: Tensor,
    boxes: Tensor,
    rows: Tensor,
    columns: Tensor,
    counts: Sequence[int],
    shape: Sequence[int],
    *how: Any,
) -> Tensor:
    n, channels, height, width = shape
    p, q = rows.shape[1], columns.shape[1]
    total = grad.new_zeros(n, height, channels * width)
    if not grad.numel():
        return total.view(n, height, channels, width).transpose(1, 2)
    products = grad.transpose(1, 2).reshape(-1, p * channels, q)
    exact = not math.isfinite(grad.sum())
    for image, part in _parts(counts, p * channels * width):
        if exact and not math.isfinite(grad[part].sum()):
            found = reference_backward(grad[part], boxes[part], (height, width), *how)
            total[image].view(height, channels, width).add_(found.transpose(0, 1))
        else:
            across = torch.bmm(products[part], columns[part]).view(-1, channels * width)
            total[image].addmm_(rows[part].reshape(-1, height).mT, across)
    return total.view(n, height, channels, width).transpose(1, 2)


def _parts(counts: Sequence[int], elements: int) -> Iterator[tuple[int, slice]]:
    """(image, slice of the boxes) pairs in order, each small enough for `_CHUNK`."""
    most = max(1, _CHUNK // max(1, elements))
    end = 0
    for image, count in enumerate(counts):
        start, end = end, end + count
        for first in range(start, end, most):
            yield image, slice(first, min(first + most, end))


def _grouped(images: Tensor, n: int) -> tuple[Tensor, list[int]]:
    """The order that groups boxes by the numbers (R,) of their images, those of none last; how many an image has."""
    image = images.long().where((images >= 0) & (images < n), n)
    return image.argsort(stable=True), image.bincount(minlength=n + 1).tolist()[:n]


def _images(images: Tensor | None, counts: Sequence[int], boxes: Tensor) -> Tensor:
    """The number of each box's image, (R,) int32; nothing waits for a GPU."""
    if images is not None:
        return images
    repeats = torch.tensor(counts, dtype=torch.int32).to(boxes.device, non_blocking=True)
    numbers = torch.arange(len(counts), dtype=torch.int32, device=boxes.device)
    return numbers.repeat_interleave(repeats, output_size=boxes.shape[0])


def _forward_torch(
    features: Tensor,
    boxes: Tensor,
    images: Tensor | None,
    counts: Sequence[int],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and for the backward what PyTorch has made of the boxes, grouped by image."""
    features, order, how = features.to(boxes.dtype), None, (sampling_ratio, aligned)
    if images is not None:
        order, counts = _grouped(images, features.shape[0])
        boxes = boxes[order]
    rows, columns = _weights(boxes, output_size, features.shape[2:], *how)
    out = _pool(features, boxes, rows, columns, counts, *how)
    return (out if order is None else out[order.argsort()]).transpose(1, 2), rows, columns


def _forward_triton(
    features: Tensor,
    boxes: Tensor,
    images: Tensor | None,
    counts: Sequence[int],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # Triton is looked for only where it is used: it is not installed on every system.
    from kernels.regions import roi_align_kernels

    how = sampling_ratio, aligned
    outputs = _fake_forward(features, boxes, images, counts, output_size, *how, "triton")
    roi_align_kernels.forward(outputs[0], features, boxes, _images(images, counts, boxes), *how)
    return outputs


def _backward_torch(
    grad: Tensor,
    boxes: Tensor,
    images: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    counts: Sequence[int],
    shape: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    if images is not None:
        order, counts = _grouped(images, shape[0])
        grad, boxes = grad[order], boxes[order]
    return _unpool(grad, boxes, rows, columns, counts, shape, sampling_ratio, aligned)


def _backward_triton(
    grad: Tensor,
    boxes: Tensor,
    images: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    counts: Sequence[int],
    shape: tuple[int, ...],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    how = sampling_ratio, aligned
    if not torch.are_deterministic_algorithms_enabled():
        from kernels.regions import roi_align_kernels

        return roi_align_kernels.backward(grad, boxes, _images(images, counts, boxes), shape, *how)
    if images is not None:
        order, counts = _grouped(images, shape[0])
        grad, boxes = grad[order], boxes[order]
    rows, columns = _weights(boxes, grad.shape[2:], shape[2:], *how)
    total = _unpool(grad, boxes, rows, columns, counts, shape, *how)
    return total.contiguous(memory_format=torch.channels_last)


def _fake_forward(
    features: Tensor,
    boxes: Tensor,
    images: Tensor | None,
    counts: Sequence[int],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    count, (p, q), (_, channels, height, width) = boxes.shape[0], output_size, features.shape
    if backend == "torch":
        out = boxes.new_empty(count, p, channels, q).transpose(1, 2)
        return out, boxes.new_empty(count, p, height), boxes.new_empty(count, q, width)
    out = boxes.new_empty(count, p, q, channels).permute(0, 3, 1, 2)
    return out, boxes.new_empty(0), boxes.new_empty(0)


def _fake_backward(grad: Tensor, *arguments: Any) -> Tensor:
    (n, channels, height, width), backend = arguments[5], arguments[-1]
    if backend == "torch":
        return grad.new_empty(n, height, channels, width).transpose(1, 2)
    return grad.new_empty(n, height, width, channels).permute(0, 3, 1, 2)


class _Saved(NamedTuple):
    dtype: torch.dtype
    shape: torch.Size
    settings: Sequence[Any]


def _save(arguments: Sequence[Any], results: Sequence[Tensor]) -> tuple[list[Tensor | None], _Saved]:
    features, boxes, images, counts, _, *settings = arguments
    return [boxes, images, *results[1:]], _Saved(features.dtype, features.shape, (counts, *settings))


def _gradients(
    backward: Callable[..., Tensor],
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor | None],
    saved: _Saved,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    counts, *settings = saved.settings
    found = backward(grads, grads[0], *tensors, counts, saved.shape, *settings)
    return [found.to(saved.dtype), None, None]


_operator = Operator(
    "roi_align",
    Implementation(
        "(Tensor features, Tensor boxes, Tensor? images, SymInt[] counts, SymInt[] output_size, int sampling_ratio, "
        "bool aligned, str backend) -> (Tensor, Tensor, Tensor)",
        _forward_torch,
        _forward_triton,
        _fake_forward,
    ),
    Derivative(
        Implementation(
            "(Tensor grad, Tensor boxes, Tensor? images, Tensor rows, Tensor columns, SymInt[] counts, "
            "SymInt[] shape, int sampling_ratio, bool aligned, str backend) -> Tensor",
            _backward_torch,
            _backward_triton,
            _fake_backward,
        ),
        _save,
        _gradients,
        results=1,
    ),
)


def roi_align(
    features: Tensor,
    boxes: Sequence[Tensor] | Tensor,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Pool the part of a map under each box to `output_size` bins.

    Takes what `torchvision.ops.roi_align` takes; there `aligned` is False unless given.

    Args:
        features: (N, C, H, W), floating point; half precision is computed in float32.
        boxes: For each of the N images (r_i, 4) x1, y1, x2, y2 in pixels, or for all of them (K, 5) with the number of
            the image in front, floating point, of the same type as the features or another one; they are not
            differentiated. The number loses its fraction, and of an image that does not exist (NaN, below 0, N and
            above) a box is 0. So is a box with a coordinate or a size that is not finite.
        output_size: Bins (P, Q) along y and x, or one number for both.
        spatial_scale: Cells per pixel.
        sampling_ratio: Samples of a bin along each axis; 0 or less takes as many as the bin has cells, rounded up.
        aligned: Pixel centres lie at half-integers, and a box may be of any size. Without it boxes are not shifted by
            half a cell, and at least one cell wide and high, as in Detectron's first version.

    Returns:
        (sum r_i, C, P, Q), image by image, or (K, C, P, Q) in the order given. Samples more than a cell outside the map
        count as 0; they cost nothing, so a box may be of any size. It can be differentiated once, in `features`.

    Raises:
        TypeError: An argument is of a wrong Python type.
        ValueError: A shape, a type, a device or a number does not fit; the message names the argument.
        NotImplementedError: A second derivative is asked for.

    Source: He et al., "Mask R-CNN", ICCV 2017, section 3.

    Example:
        >>> import torch
        >>> from kernels import roi_align
        >>> features = torch.arange(4.0).expand(1, 1, 4, 4)
        >>> roi_align(features, [torch.tensor([[8.0, 8.0, 24.0, 24.0]])], (1, 2), spatial_scale=1 / 8)
        tensor([[[[1., 2.]]]])
    """
    check_tensor("features", features, "(N, C, H, W)", 4)
    n = features.shape[0]
    if features.shape[2] < 1 or features.shape[3] < 1:
        raise ValueError(f"features must be (N, C, H, W) with a cell or more, got shape {tuple(features.shape)}")
    _check_boxes(boxes, features)
    output_size = check_pair("output_size", output_size, 1, _MOST)
    spatial_scale = check_number("spatial_scale", spatial_scale)
    if not 0 < spatial_scale < math.inf:
        raise ValueError(f"spatial_scale must be finite and greater than 0, got {spatial_scale}")
    sampling_ratio = max(check_integer("sampling_ratio", sampling_ratio, -_MOST, _MOST), 0)
    check_flag("aligned", aligned)
    key = signature(features, *([boxes] if isinstance(boxes, Tensor) else boxes))
    dtype = torch.promote_types(features.dtype, torch.float32)
    if isinstance(boxes, Tensor):
        # Never to a smaller type, in which a number could be rounded to the next.
        image = boxes[:, 0].detach().to(torch.promote_types(boxes.dtype, torch.float32))
        images, counts = torch.where((image >= 0) & (image < n), image, -1).to(torch.int32), []
        corners = boxes[:, 1:]
    else:
        # Not `len`, which would be a constant to torch.export.
        images, counts = None, [b.shape[0] for b in boxes]
        corners = torch.cat(list(boxes)) if boxes else features.new_zeros(0, 4)
    corners = corners.detach().to(dtype) * spatial_scale
    settings = counts, output_size, sampling_ratio, aligned, resolve_backend(features.device)
    output: Tensor = _operator(key, features, corners, images, *settings)[0]
    return output


def _check_boxes(boxes: Sequence[Tensor] | Tensor, features: Tensor) -> None:
    if isinstance(boxes, Tensor):
        check_tensor("boxes", boxes, "(K, 5)", 2)
        check_device("boxes", boxes, "features", features)
        if boxes.shape[1] != 5:
            raise ValueError(
                f"boxes must be (K, 5), the number of the image in front, or a list of (r, 4) for each image, "
                f"got shape {tuple(boxes.shape)}"
            )
        return
    if not isinstance(boxes, list | tuple):
        raise TypeError(f"boxes must be a list of tensors (r, 4) or one tensor (K, 5), got {kind_of(boxes)}")
    if len(boxes) != features.shape[0]:
        raise ValueError(f"boxes must be {features.shape[0]} tensors, one for each image, got {len(boxes)}")
    for number, own in enumerate(boxes):
        name = f"boxes[{number}]"
        check_tensor(name, own, "(r, 4)", 2)
        check_device(name, own, "features", features)
        if own.shape[1] != 4:
            raise ValueError(f"{name} must be (r, 4), got shape {tuple(own.shape)}")
