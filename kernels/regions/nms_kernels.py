"""The Triton kernels of non-maximum suppression, and what launches them.

Boxes are numbered by falling score and handled 64 at a time: one bit of a word for each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.regions.bilinear_kernels import divide
from kernels.runtime.launch import Launch, triton_real

# Words of the matrix that the walk reads at a time. More of them, or fewer warps, spill on gfx942.
_PIECE = 2048
_WARPS = 8


@triton.jit
def _load_boxes(boxes, order, number, n, REAL: tl.constexpr):
    """Indices, corners and areas of boxes; an area that is not finite is NaN, and so is the box's IoU with any."""
    index = tl.load(order + number, mask=number < n, other=0)
    x1, y1 = tl.load(boxes + index * 4).to(REAL), tl.load(boxes + index * 4 + 1).to(REAL)
    x2, y2 = tl.load(boxes + index * 4 + 2).to(REAL), tl.load(boxes + index * 4 + 3).to(REAL)
    area = (x2 - x1) * (y2 - y1)
    return index, x1, y1, x2, y2, tl.where(tl.abs(area) < float("inf"), area, float("nan"))


@triton.jit
def overlap_kernel(boxes, order, labels, matrix, threshold, n, words, HAS_LABELS: tl.constexpr, REAL: tl.constexpr):
    """Grid (words, words). Bit k of `matrix` (n, words), word w: does box i suppress box 64 * w + k?

    `boxes` is (n, 4), `labels` (n,), both as they came; `order` (n,) has their indices by falling score. IoUs are of
    type REAL; for float64 `threshold` is a tensor of one number, as numbers come in float32. Words to the left of the
    diagonal are not written; bits beyond the last box mean nothing.
    """
    row, column = tl.program_id(0), tl.program_id(1)
    if column >= row:
        bit = tl.arange(0, 64)
        i, j = row * 64 + bit, column * 64 + bit
        index_i, x1, y1, x2, y2, area_i = _load_boxes(boxes, order, i, n, REAL)
        index_j, u1, v1, u2, v2, area_j = _load_boxes(boxes, order, j, n, REAL)
        wide = tl.minimum(x2[:, None], u2[None, :]) - tl.maximum(x1[:, None], u1[None, :])
        high = tl.minimum(y2[:, None], v2[None, :]) - tl.maximum(y1[:, None], v1[None, :])
        shared = tl.maximum(wide, 0.0) * tl.maximum(high, 0.0)
        # Operation by operation what PyTorch computes.
        overlap = divide(shared, area_i[:, None] + area_j[None, :] - shared)
        if overlap.dtype == tl.float64:
            suppress = overlap > tl.load(threshold)
        else:
            suppress = overlap > threshold
        if HAS_LABELS:
            suppress &= tl.load(labels + index_i)[:, None] == tl.load(labels + index_j)[None, :]
        word = tl.sum(suppress.to(tl.int64) << bit[None, :], 1)
        tl.store(matrix + i.to(tl.int64) * words + column, word, mask=i < n)


@triton.jit
def walk_kernel(matrix, order, kept, count, n, words, limit, WORDS: tl.constexpr, ROWS: tl.constexpr):
    """Grid (1,): the greedy walk over `matrix`, 64 boxes a step. Writes up to `limit` indices and their number."""
    bit = tl.arange(0, 64).to(tl.int64)
    o_w = tl.arange(0, WORDS)
    removed = tl.zeros((WORDS,), dtype=tl.int64)
    found, step = 0, 0
    while (step < words) & (found < limit):
        box = step * 64 + bit
        rows = tl.load(matrix + box * words + step, mask=box < n, other=0)
        # What a box does to itself and to earlier boxes does not count.
        rows &= tl.full((64,), -2, tl.int64) << bit
        gone = tl.sum(tl.where(o_w == step, removed, 0), 0)
        alive = tl.sum((box < n).to(tl.int64) << bit, 0) & ~gone
        # A box stays unless one that stays suppresses it. Each pass settles at least one box more, in order.
        stay = alive
        before = ~alive
        while stay != before:
            before = stay
            stay = alive & ~tl.reduce_or(tl.where((before >> bit) & 1 != 0, rows, 0), 0)
        is_kept = ((stay >> bit) & 1).to(tl.int32)
        place = found + tl.cumsum(is_kept, 0) - 1
        tl.store(kept + place, tl.load(order + box, mask=box < n, other=0), mask=(is_kept != 0) & (place < limit))
        for start in range(0, 64, ROWS):
            row = start + tl.arange(0, ROWS).to(tl.int64)
            needed = ((stay >> row) & 1 != 0)[:, None] & ((o_w > step) & (o_w < words))[None, :]
            pointers = matrix + ((step * 64 + row) * words)[:, None] + o_w[None, :]
            removed |= tl.reduce_or(tl.load(pointers, mask=needed, other=0), 0)
        found += tl.sum(is_kept, 0)
        step += 1
    tl.store(count, tl.minimum(found, limit))


def launches(boxes: Tensor, order: Tensor, labels: Tensor | None, iou_threshold: float, limit: int) -> list[Launch]:
    """Both launches; the last one writes to its arguments `kept` and `count`."""
    n, device = len(order), order.device
    words = triton.cdiv(n, 64)
    matrix = torch.empty((n, words), dtype=torch.int64, device=device)
    kept = torch.empty(limit, dtype=torch.int64, device=device)
    count = torch.empty(1, dtype=torch.int64, device=device)
    padded = triton.next_power_of_2(words)
    threshold: float | Tensor = float(iou_threshold)
    if boxes.dtype == torch.float64:
        # Filled by a kernel: a copy from the host would wait.
        threshold = torch.full((), iou_threshold, dtype=torch.float64, device=device)
    overlap = Launch(
        overlap_kernel,
        (words, words),
        {
            "boxes": boxes.contiguous(),
            "order": order,
            "labels": order if labels is None else labels.contiguous(),
            "matrix": matrix,
            "threshold": threshold,
            "n": n,
            "words": words,
        },
        {"HAS_LABELS": labels is not None, "REAL": triton_real(boxes.dtype)},
        _WARPS,
        exact=True,
    )
    walk = Launch(
        walk_kernel,
        (1,),
        {"matrix": matrix, "order": order, "kept": kept, "count": count, "n": n, "words": words, "limit": limit},
        {"WORDS": padded, "ROWS": min(64, _PIECE // padded)},
        _WARPS,
    )
    return [overlap, walk]


def greedy(boxes: Tensor, order: Tensor, labels: Tensor | None, iou_threshold: float, limit: int) -> Tensor:
    """Indices of up to `limit` boxes that are kept, in `order` (n,) int64, which lists all of them by falling score."""
    overlap, walk = launches(boxes, order, labels, iou_threshold, limit)
    overlap.run()
    walk.run()
    # The one place where the host waits for the GPU.
    return walk.arguments["kept"][: int(walk.arguments["count"])]
