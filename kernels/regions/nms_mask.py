"""`nms` of many sets of boxes at once, as a mask: its shape does not depend on what is kept.

What decides how many boxes are kept stands in the tensors, so the indices that `nms` returns have a length that no
program knows beforehand. A mask has the shape of the scores. `torch.export` and ONNX, whose NonMaxSuppression this is,
need no guess about it.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.backend import resolve_backend
from kernels.regions.nms import forward_torch, forward_triton
from kernels.runtime.checks import check_device, check_number, check_tensor
from kernels.runtime.operator import Implementation, Operator, signature


def nms_mask(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float) -> Tensor:
    """Which boxes of each class of each set greedy NMS keeps.

    Args:
        boxes: (B, n, 4) x1, y1, x2, y2, floating point: n boxes of each of B sets, which all classes share.
        scores: (B, C, n), floating point, of the same or another type.
        iou_threshold: As in `nms`.
        score_threshold: Only boxes with a higher score take part in a class; the others are not kept.

    Returns:
        (B, C, n) bool. Equal scores are taken in the order of the boxes.

    Raises:
        TypeError: An argument is of a wrong Python type.
        ValueError: A shape, a type, a device or a number does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> from kernels import nms_mask
        >>> boxes = torch.tensor([[[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.0], [5.0, 5.0, 9.0, 9.0]]])
        >>> nms_mask(boxes, torch.tensor([[[0.7, 0.9, 0.8], [0.7, 0.1, 0.2]]]), 0.5, score_threshold=0.15)
        tensor([[[False,  True,  True],
                 [ True, False,  True]]])
    """
    check_tensor("boxes", boxes, "(B, n, 4)", 3)
    check_tensor("scores", scores, "(B, C, n)", 3)
    check_device("scores", scores, "boxes", boxes)
    if boxes.shape[2] != 4:
        raise ValueError(f"boxes must be (B, n, 4), got shape {tuple(boxes.shape)}")
    if scores.shape[0] != boxes.shape[0] or scores.shape[2] != boxes.shape[1]:
        raise ValueError(
            f"scores must be ({boxes.shape[0]}, C, {boxes.shape[1]}), one for each class of each box, "
            f"got shape {tuple(scores.shape)}"
        )
    numbers = check_number("iou_threshold", iou_threshold), check_number("score_threshold", score_threshold)
    key = signature(boxes, scores)
    mask: Tensor = _operator(key, boxes.detach(), scores.detach(), *numbers, resolve_backend(boxes.device))
    return mask


def _mask(greedy: Any, boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float) -> Tensor:
    # Boxes of different classes or sets do not meet: each class of each set is a label of one flat call.
    part, label, box = (scores > score_threshold).nonzero(as_tuple=True)
    labels = part * scores.shape[1] + label
    kept = greedy(boxes[part, box], scores[part, label, box], labels, iou_threshold, None)
    mask = torch.zeros_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    mask[part[kept], label[kept], box[kept]] = True
    return mask


def _forward_torch(*arguments: Any) -> Tensor:
    return _mask(forward_torch, *arguments)


def _forward_triton(*arguments: Any) -> Tensor:
    return _mask(forward_triton, *arguments)


def _fake(boxes: Tensor, scores: Tensor, *others: Any) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


_operator = Operator(
    "nms_mask",
    Implementation(
        "(Tensor boxes, Tensor scores, float iou_threshold, float score_threshold, str backend) -> Tensor",
        _forward_torch,
        _forward_triton,
        _fake,
    ),
)
