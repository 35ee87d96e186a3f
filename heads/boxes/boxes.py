"""Boxes as `(..., 4)` tensors of x1, y1, x2, y2 in pixels: areas, overlaps, clipping, and the two box coders.

A box covers `[x1, x2) x [y1, y2)`: its width is `x2 - x1`, with no `+ 1` anywhere. The functions of two boxes broadcast
like any elementwise operator.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# The largest |log(width ratio)| that a delta may ask for: 1000 pixels from an anchor of 16.
MAX_LOG_RATIO = math.log(1000 / 16)


def box_area(boxes: Tensor) -> Tensor:
    """Width times height of `(..., 4)` boxes, as `(...)`."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    return width * height


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    width, height = sides.clamp(min=0).unbind(-1)
    return width * height


def iou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Intersection over union, in [0, 1].

    Args:
        a, b: (..., 4) boxes that broadcast.
        eps: The least that a union counts as, in square pixels.

    Returns:
        (...).

    Example:
        >>> import torch
        >>> from heads.boxes.boxes import iou
        >>> iou(torch.tensor([[0.0, 0, 4, 4], [9, 9, 10, 10]]), torch.tensor([0.0, 0, 4, 8]))
        tensor([0.5000, 0.0000])
    """
    shared = _intersection(a, b)
    return shared / (box_area(a) + box_area(b) - shared).clamp(min=eps)


def giou(a: Tensor, b: Tensor, eps: float = 1e-6, eps_rule: Literal["max", "add"] = "max") -> Tensor:
    """Generalised IoU (Rezatofighi et al., 2019), in [-1, 1].

    IoU minus the fraction of the smallest enclosing box that the union leaves empty.

    Args:
        a, b: (..., 4) boxes that broadcast.
        eps: Guard of the two divisions, in square pixels.
        eps_rule: `"max"` raises union and enclosing area to at least `eps` (mmdetection); `"add"` adds it to both
            (the official DyHead repository).

    Returns:
        (...).
    """
    shared = _intersection(a, b)
    union = box_area(a) + box_area(b) - shared
    sides = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    width, height = sides.unbind(-1)
    enclosing = width * height
    if eps_rule == "max":
        union, enclosing = union.clamp(min=eps), enclosing.clamp(min=eps)
    else:
        union, enclosing = union + eps, enclosing + eps
    # shared / union - (enclosing - union) / enclosing, with one operation less.
    return shared / union + union / enclosing - 1


def pairwise_giou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """`giou` of every box of `a` (n, 4) with every box of `b` (m, 4), as (n, m)."""
    return giou(a[..., :, None, :], b[..., None, :, :], eps)


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Clip boxes to an image: x into [0, width], y into [0, height], inclusive.

    Args:
        boxes: (..., 4) in pixels.
        size: (height, width) of the image.
    """
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(-1)
    x1, x2 = x1.clamp(0, width), x2.clamp(0, width)
    y1, y2 = y1.clamp(0, height), y2.clamp(0, height)
    return torch.stack([x1, y1, x2, y2], -1)


@dataclass(frozen=True)
class DeltaCoder:
    """Boxes as offsets from anchors (R-CNN, Girshick et al., 2014): centre shift in anchor sides, log of side ratios.

    A stored delta is `(delta - means) / stds`; detectron2's `weights` are `1 / stds`.

    Attributes:
        means: Means of dx, dy, dw, dh.
        stds: Standard deviations of dx, dy, dw, dh.
        clamp: What keeps `exp` in range when decoding. `"both"` holds dw and dh within ±log(1000 / 16) (mmdetection),
            `"above"` bounds them from above only (detectron2).

    Raises:
        ValueError: `clamp` is unknown.

    Example:
        >>> import torch
        >>> from heads.boxes.boxes import DeltaCoder
        >>> coder, anchor = DeltaCoder(), torch.tensor([0.0, 0, 10, 10])
        >>> deltas = coder.encode(torch.tensor([5.0, 0, 15, 10]), anchor)
        >>> deltas.tolist()
        [0.5, 0.0, 0.0, 0.0]
        >>> coder.decode(deltas, anchor).tolist()
        [5.0, 0.0, 15.0, 10.0]
    """

    means: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    clamp: Literal["both", "above"] = "both"

    def __post_init__(self) -> None:
        if self.clamp not in ("both", "above"):
            raise ValueError(f"unknown clamp {self.clamp!r}; choose 'both' (mmdetection) or 'above' (detectron2)")

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Deltas `(..., 4)` that lead from `anchors` to `boxes`; both need positive sides."""
        anchor_sides = anchors[..., 2:] - anchors[..., :2]
        sides = boxes[..., 2:] - boxes[..., :2]
        anchor_centres = anchors[..., :2] + anchors[..., 2:]
        centres = boxes[..., :2] + boxes[..., 2:]
        deltas = torch.cat([(centres - anchor_centres) * 0.5 / anchor_sides, torch.log(sides / anchor_sides)], -1)
        if any(self.means):
            deltas = deltas - deltas.new_tensor(self.means)
        return deltas if self.stds == (1.0, 1.0, 1.0, 1.0) else deltas / deltas.new_tensor(self.stds)

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Boxes `(..., 4)` from `deltas` and `anchors`, which broadcast. Not clipped; see `clip_boxes`."""
        if self.stds != (1.0, 1.0, 1.0, 1.0):
            deltas = deltas * deltas.new_tensor(self.stds)
        if any(self.means):
            deltas = deltas + deltas.new_tensor(self.means)
        anchor_sides = anchors[..., 2:] - anchors[..., :2]
        lowest = -MAX_LOG_RATIO if self.clamp == "both" else None
        half = anchor_sides * (deltas[..., 2:].clamp(lowest, MAX_LOG_RATIO).exp() * 0.5)
        centres = (anchors[..., :2] + anchors[..., 2:]) * 0.5 + anchor_sides * deltas[..., :2]
        return torch.cat([centres - half, centres + half], -1)


def encode_distances(boxes: Tensor, points: Tensor) -> Tensor:
    """Distances `(..., 4)` left, top, right, bottom from `points` (..., 2) to the sides of `boxes` (FCOS)."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)


def decode_distances(distances: Tensor, points: Tensor) -> Tensor:
    """Boxes `(..., 4)` from `points` (..., 2) and the distances of `encode_distances`. Not clipped."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], -1)


def centerness_of(distances: Tensor) -> Tensor:
    """How central a point is in the box whose sides are at `distances` (..., 4) > 0 from it, in (0, 1] (FCOS).

    The root of the product, over both axes, of the shorter distance by the longer one.
    """
    before, after = distances[..., :2], distances[..., 2:]
    return (torch.minimum(before, after) / torch.maximum(before, after)).prod(-1).sqrt()
