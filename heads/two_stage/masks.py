"""Masks of regions (Mask R-CNN, He et al., 2017): the head that predicts them, their targets, pasting into images."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.precision import at_least_float32
from heads.targets import Target
from kernels import roi_align

# Bins of a region that the mask head sees, and the side of the masks that it predicts.
MASK_BINS = 14
SIDE = 28
# Pixels of all pasted masks together that are computed at a time.
_CHUNK = 1 << 25


class MaskHead(nn.Module):
    """Four 3×3 convolutions with ReLU, one 2×2 transposed one that doubles the side, and one mask for every class.

    Args:
        in_channels: Channels of the pooled regions.
        num_classes: K, without background.
        width: Channels of the convolutions; None for `in_channels`.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int | None = None):
        super().__init__()
        width = width or in_channels
        self.convs = nn.ModuleList(nn.Conv2d(i, width, 3, padding=1) for i in (in_channels, width, width, width))
        self.upsample = nn.ConvTranspose2d(width, width, 2, 2)
        self.mask_logits = nn.Conv2d(width, num_classes, 1)
        for layer in (*self.convs, self.upsample, self.mask_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Tensor) -> Tensor:
        """(R, C, 14, 14) -> logits (R, K, 28, 28)."""
        # RoIAlign gives float32, also of maps in half precision.
        x = regions.to(self.mask_logits.weight.dtype)
        for conv in self.convs:
            x = F.relu(conv(x), inplace=True)
        return at_least_float32(self.mask_logits(F.relu(self.upsample(x), inplace=True)))


def targets_from_bitmaps(masks: Tensor, boxes: Tensor, matched: Tensor) -> Tensor:
    """Masks of objects inside boxes as 28×28 cells: those that RoIAlign finds at least half covered.

    Args:
        masks: (n, H, W) of 0 and 1, any type, of one image.
        boxes: (P, 4) in pixels.
        matched: (P,) int64, the object of each box.

    Returns:
        (P, 28, 28) float32 of 0 and 1.
    """
    order = matched.argsort(stable=True)
    groups = list(boxes[order].split(torch.bincount(matched, minlength=len(masks)).tolist()))
    cells = roi_align(masks[:, None].to(boxes.dtype), groups, (SIDE, SIDE), 1.0)
    return (cells[order.argsort(), 0] >= 0.5).float()


def targets_from_polygons(polygons: Sequence[Sequence[np.ndarray]], boxes: Tensor, matched: Tensor) -> Tensor:
    """The same from polygons, drawn by COCO's own rules in a grid of 28×28 that is laid over each box.

    Args:
        polygons: One list an object of (2m,) arrays x, y, x, y, … in pixels.
        boxes, matched: As for `targets_from_bitmaps`.

    Returns:
        (P, 28, 28) float32 of 0 and 1.

    Raises:
        ImportError: pycocotools, which draws them, is not installed.
    """
    try:
        from pycocotools import mask as rle
    except ImportError as error:
        raise ImportError(
            "masks given as polygons are drawn by pycocotools: pip install 'dyhead-lab[ablations]', or give bitmaps"
        ) from error
    cells = np.zeros((len(boxes), SIDE, SIDE), np.float32)
    for cell, (x1, y1, x2, y2), index in zip(cells, boxes.double().tolist(), matched.tolist(), strict=True):
        corner, scale = np.array([x1, y1]), SIDE / np.maximum([x2 - x1, y2 - y1], 0.1)
        outlines = [((np.reshape(p, (-1, 2)) - corner) * scale).ravel() for p in polygons[index]]
        cell[:] = rle.decode([rle.merge(rle.frPyObjects(outlines, SIDE, SIDE))])[..., 0]
    return torch.from_numpy(cells).to(boxes.device)


def mask_targets(targets: Sequence[Target], boxes: Sequence[Tensor], matched: Sequence[Tensor]) -> Tensor:
    """Mask targets of a batch, image by image.

    Args:
        targets: One dict an image with `masks`: a tensor (n, H, W), or a list of polygons for each of n objects.
        boxes: One (p_i, 4) an image, in pixels.
        matched: One (p_i,) int64 an image, index of an object of that image.

    Returns:
        (P, 28, 28) float32 of 0 and 1.
    """
    pieces = []
    for target, b, m in zip(targets, boxes, matched, strict=True):
        masks = target["masks"]
        if not len(b):
            pieces.append(b.new_zeros(0, SIDE, SIDE))
        elif isinstance(masks, Tensor):
            pieces.append(targets_from_bitmaps(masks, b, m))
        else:
            pieces.append(targets_from_polygons(masks, b, m))
    return torch.cat(pieces)


def paste(probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float | None = 0.5) -> Tensor:
    """Masks of boxes as masks of the whole image, by bilinear interpolation; outside the box all is 0.

    Args:
        probabilities: (K, h, w); its cells cover the box evenly.
        boxes: (K, 4) in pixels; they may leave the image.
        size: (height, width) of the image.
        threshold: Probability from which a pixel belongs to the object; None returns the interpolated probabilities.

    Returns:
        (K, height, width) bool, or floating point without a threshold.
    """
    rows = _pixel_weights(boxes[:, 1], boxes[:, 3], size[0], probabilities.shape[1])
    columns = _pixel_weights(boxes[:, 0], boxes[:, 2], size[1], probabilities.shape[2])
    pasted = boxes.new_zeros(len(boxes), *size, dtype=probabilities.dtype if threshold is None else torch.bool)
    step = max(1, _CHUNK // (size[0] * size[1]))
    for first in range(0, len(boxes), step):
        part = slice(first, first + step)
        soft = rows[part] @ (probabilities[part] @ columns[part].mT)
        pasted[part] = soft if threshold is None else soft >= threshold
    return pasted


def _pixel_weights(start: Tensor, end: Tensor, pixels: int, cells: int) -> Tensor:
    """How much each of the `cells` between `start` and `end` (K,) counts at each pixel's centre: (K, pixels, cells)."""
    centre = torch.arange(pixels, device=start.device, dtype=start.dtype) + 0.5
    position = (centre - start[:, None]) / (end - start)[:, None] * cells - 0.5
    cell = torch.arange(cells, device=start.device, dtype=start.dtype)
    # A box without width has its pixels at infinity or nowhere.
    return (1 - (position[..., None] - cell).abs()).clamp_(min=0).nan_to_num_(0)
