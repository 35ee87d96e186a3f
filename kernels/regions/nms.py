"""Non-maximum suppression: exact, greedy, the same result on every device, on both paths and in every run.

Boxes are taken by falling score; a box is kept unless its IoU with a box kept earlier exceeds the threshold (strictly,
with no `+ 1` in the sides). Equal scores are taken in the order of their indices. IoU and threshold are compared in the
precision of the boxes: float64 for float64, float32 for all others.

In PyTorch the overlaps of a block of boxes are one matrix, computed where the boxes lie. The greedy walk itself is
sequential, so it runs on the host, over rows packed into Python integers: one step per *kept* box, whatever the block
holds. On a GPU that costs one transfer per block. Blocks follow the score order, so a limit on the output ends the work
early. In Triton both steps are kernels, and the host waits once, for the number of boxes that are kept.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.backend import resolve_backend
from kernels.runtime.checks import INTEGER, check_device, check_integer, check_number, check_tensor
from kernels.runtime.operator import Implementation, Operator, signature

# Boxes per overlap matrix. Small where the matrix itself is the cost, large where the transfer is.
_BLOCK_CPU = 128
_BLOCK_GPU = 2048
# The Triton path holds all overlaps at once, one bit each: 128 MB for this many boxes. More go in blocks, in PyTorch.
_MOST_TRITON = 2**15


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, max_output: int | None = None) -> Tensor:
    """Indices of the boxes that greedy NMS keeps, by falling score.

    Args:
        boxes: (n, 4) x1, y1, x2, y2, floating point.
        scores: (n,), floating point, of the same or another type. NaN comes first, as `torch.argsort` has it.
        iou_threshold: A box is dropped when its IoU with a kept box is greater than this number, in the precision of
            the boxes.
        max_output: Stop after this many kept boxes; `None` keeps all.

    Returns:
        (k,) int64. Boxes without area never suppress one another (their IoU, 0 / 0, exceeds nothing). A box whose area
        is not finite, as with any coordinate that is not, suppresses nothing and is suppressed by nothing.

    Raises:
        TypeError: An argument is of a wrong Python type.
        ValueError: A shape, a type, a device or a number does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> from kernels import nms
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.0], [5.0, 5.0, 9.0, 9.0]])
        >>> nms(boxes, torch.tensor([0.7, 0.9, 0.8]), iou_threshold=0.5)
        tensor([1, 2])
    """
    return _nms(boxes, scores, None, iou_threshold, max_output)


def batched_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_output: int | None = None
) -> Tensor:
    """`nms` in which only boxes of the same label suppress one another.

    Labels are compared, not added to the coordinates as a shift: that usual trick rounds the boxes of high labels.

    Args:
        boxes: (n, 4), as in `nms`.
        scores: (n,), as in `nms`.
        labels: (n,) integers of any type.
        iou_threshold: As in `nms`.
        max_output: As in `nms`.

    Returns:
        (k,) int64, as `nms`.

    Raises:
        TypeError: As in `nms`.
        ValueError: As in `nms`.

    Example:
        >>> import torch
        >>> from kernels import batched_nms
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]]).repeat(3, 1)
        >>> batched_nms(boxes, torch.tensor([0.7, 0.9, 0.8]), torch.tensor([1, 1, 2]), iou_threshold=0.5)
        tensor([1, 2])
    """
    check_tensor("labels", labels, "(n,)", 1, INTEGER)
    return _nms(boxes, scores, labels, iou_threshold, max_output)


def _nms(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou_threshold: float, max_output: int | None) -> Tensor:
    check_tensor("boxes", boxes, "(n, 4)", 2)
    if boxes.shape[1] != 4:
        raise ValueError(f"boxes must be (n, 4), got shape {tuple(boxes.shape)}")
    if boxes.device.type == "meta":
        raise ValueError("boxes must have values, which decide how many are kept; they are on the meta device")
    check_tensor("scores", scores, "(n,)", 1)
    _check_count("scores", scores, boxes)
    if labels is not None:
        _check_count("labels", labels, boxes)
    iou_threshold = check_number("iou_threshold", iou_threshold)
    if max_output is not None:
        max_output = check_integer("max_output", max_output, 0, 2**63 - 1)
    key = signature(boxes, scores, labels)
    kept: Tensor = _operator(
        key, boxes.detach(), scores.detach(), labels, iou_threshold, max_output, resolve_backend(boxes.device)
    )
    return kept


def _check_count(name: str, values: Tensor, boxes: Tensor) -> None:
    check_device(name, values, "boxes", boxes)
    if values.shape[0] != boxes.shape[0]:
        raise ValueError(f"{name} must be ({boxes.shape[0]},), one for each box, got shape {tuple(values.shape)}")


def _forward(
    greedy: Callable[[Tensor, Tensor, Tensor | None, float, int], Tensor],
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    iou_threshold: float,
    max_output: int | None,
) -> Tensor:
    order = scores.argsort(descending=True, stable=True)
    limit = len(order) if max_output is None else min(max_output, len(order))
    if limit == 0:
        return order[:0]
    if boxes.dtype != torch.float64:
        # A number that float32 does not hold becomes an infinity, not an error.
        iou_threshold = ctypes.c_float(iou_threshold).value
    return greedy(boxes, order, labels, iou_threshold, limit)


def forward_torch(*arguments: Any) -> Tensor:
    """`batched_nms` in PyTorch, without checks."""
    return _forward(_greedy, *arguments)


def forward_triton(boxes: Tensor, *others: Any) -> Tensor:
    """`batched_nms` in Triton, without checks."""
    # Triton is looked for only where it is used: it is not installed on every system.
    from kernels.regions import nms_kernels

    return _forward(_greedy if len(boxes) > _MOST_TRITON else nms_kernels.greedy, boxes, *others)


def _greedy(boxes: Tensor, order: Tensor, labels: Tensor | None, iou_threshold: float, limit: int) -> Tensor:
    # Columns of x1, y1, x2, y2, area, and the label where there is one: (5 or 6, n), contiguous along the boxes.
    sorted_boxes = boxes[order].to(torch.promote_types(boxes.dtype, torch.float32)).t().contiguous()
    sorted_labels = None if labels is None else labels[order]
    area = (sorted_boxes[2] - sorted_boxes[0]) * (sorted_boxes[3] - sorted_boxes[1])
    # Infinite becomes NaN, and with it every IoU, which exceeds nothing: such a box has no part in anything.
    area += area - area

    def overlaps(rows: Tensor | slice, columns: slice) -> np.ndarray:
        """Which boxes of `rows` suppress which of `columns`, one bit each, packed along the columns."""
        x1, y1, x2, y2 = sorted_boxes[:, rows, None]
        u1, v1, u2, v2 = sorted_boxes[:, columns]
        shared = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp_(min=0)
        shared *= (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp_(min=0)
        union = (area[rows, None] + area[columns]).sub_(shared)
        suppress = shared.div_(union) > iou_threshold
        if sorted_labels is not None:
            suppress &= sorted_labels[rows, None] == sorted_labels[columns]
        return np.packbits(suppress.cpu().numpy(), axis=1, bitorder="little")

    block = _BLOCK_CPU if boxes.device.type == "cpu" else _BLOCK_GPU
    kept: list[int] = []
    for start in range(0, len(order), block):
        stop = min(start + block, len(order))
        columns = slice(start, stop)
        alive = (1 << (stop - start)) - 1
        if kept:
            earlier = torch.tensor(kept, device=boxes.device)
            alive &= ~int.from_bytes(np.bitwise_or.reduce(overlaps(earlier, columns), axis=0).tobytes(), "little")
        rows = overlaps(columns, columns)
        while alive:
            # The lowest set bit is the best box left. Bits below it are settled, so clearing them again is harmless.
            lowest = alive & -alive
            index = lowest.bit_length() - 1
            kept.append(start + index)
            if len(kept) == limit:
                return order[torch.tensor(kept, device=boxes.device)]
            alive &= ~(int.from_bytes(rows[index].tobytes(), "little") | lowest)
    return order[torch.tensor(kept, device=boxes.device)]


def _fake(boxes: Tensor, scores: Tensor, *others: Any) -> Tensor:
    return scores.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


_operator = Operator(
    "nms",
    Implementation(
        "(Tensor boxes, Tensor scores, Tensor? labels, float iou_threshold, SymInt? max_output, str backend) -> Tensor",
        forward_torch,
        forward_triton,
        _fake,
    ),
)
