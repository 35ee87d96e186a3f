"""The Triton kernels of non-maximum suppression, and what launches them.

Boxes are numbered by falling score and handled 64 at a time: one bit of a word for each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.regions.bilinear_kernels import divide
from kernels.runtime.launch import Launch, Launcher, triton_real

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


def overlap_launch(
    boxes: Tensor, order: Tensor, labels: Tensor | None, matrix: Tensor, threshold: float | Tensor
) -> Launch:
    """Tensors as in `overlap_kernel`; without labels all are the same."""
    n, words = matrix.shape
    arguments = {"boxes": boxes, "order": order, "labels": order if labels is None else labels, "matrix": matrix}
    constants = {"HAS_LABELS": labels is not None, "REAL": triton_real(boxes.dtype)}
    numbers = {"threshold": threshold, "n": n, "words": words}
    return Launch(overlap_kernel, (words, words), arguments | numbers, constants, _WARPS, exact=True)


def walk_launch(matrix: Tensor, order: Tensor, kept: Tensor, count: Tensor) -> Launch:
    """Tensors as in `walk_kernel`."""
    n, words = matrix.shape
    padded = triton.next_power_of_2(words)
    arguments = {"matrix": matrix, "order": order, "kept": kept, "count": count}
    constants = {"WORDS": padded, "ROWS": min(64, _PIECE // padded)}
    return Launch(walk_kernel, (1,), arguments | {"n": n, "words": words, "limit": len(kept)}, constants, _WARPS)


_run_overlap, _run_walk = Launcher(overlap_launch), Launcher(walk_launch)


def greedy(boxes: Tensor, order: Tensor, labels: Tensor | None, iou_threshold: float, limit: int) -> Tensor:
    """Indices of up to `limit` boxes that are kept, in `order` (n,) int64, which lists all of them by falling score."""
    n = len(order)
    matrix, kept, count = (order.new_empty(size) for size in ((n, triton.cdiv(n, 64)), (limit,), (1,)))
    threshold: float | Tensor = float(iou_threshold)
    if boxes.dtype == torch.float64:
        # Filled by a kernel: a copy from the host would wait.
        threshold = torch.full((), iou_threshold, dtype=torch.float64, device=order.device)
    _run_overlap(boxes.contiguous(), order, None if labels is None else labels.contiguous(), matrix, threshold)
    _run_walk(matrix, order, kept, count)
    # The one place where the host waits for the GPU.
    return kept[: int(count)]
