"""Assignment of ground-truth boxes to anchors. Assigners take a whole batch at once and return indices."""

from functools import lru_cache
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from heads.boxes.anchors import Grid
from heads.boxes.boxes import iou

# An anchor counts as inside a box from this many pixels off its sides.
_INSIDE = 0.01
_LOW_BITS = 0xFFFFFFFF

# Values of an assignment that are not the index of a box.
BACKGROUND, IGNORED = -1, -2

# The most pairs of a box and an anchor that are held at once: half a gigabyte of intermediate results in float32.
_PAIRS = 2**24


def stack_boxes(boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack the boxes of a batch.

    Args:
        boxes: For each of the N images (n_i, 4).

    Returns:
        (N, max n_i, 4) float32, filled up with zeros, and (N, 1) int64, the index of each image's first box in
        `torch.cat(boxes)`.
    """
    stacked = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True).float()
    counts = torch.tensor([[0], *([len(b)] for b in boxes[:-1])], device=stacked.device)
    return stacked, counts.cumsum(0)


def box_chunks(images: int, boxes: int, anchors: int) -> list[slice]:
    """Cut the boxes of an image into slices that, paired with all anchors in all images, fit in memory.

    Args:
        images: Images of the batch.
        boxes: Boxes of an image.
        anchors: Anchors of an image.
    """
    step = max(1, _PAIRS // max(1, images * anchors))
    return [slice(start, min(start + step, boxes)) for start in range(0, boxes, step)]


def assign_max_iou(
    anchors: Tensor,
    boxes: list[Tensor],
    positive: float,
    negative: float,
    least: float = 0.0,
    low_quality: Literal["moves", "keeps"] | None = "moves",
    valid: Tensor | None = None,
) -> Tensor:
    """The assignment of R-CNN (Girshick et al., 2014) and its successors, by thresholds on the IoU.

    An anchor is positive if its highest IoU with a box is at least `positive`, background if that is below `negative`,
    and ignored in between. It is assigned the box of that highest IoU, the first of several. Everything is computed in
    float32.

    With `low_quality` every box also gets the anchors of its own highest IoU, all that tie for it, if that IoU is
    at least `least` and not 0.

    Args:
        anchors: (A, 4) x1, y1, x2, y2 in pixels, or (N, A, 4), other ones for each image.
        boxes: For each of the N images (n_i, 4) x1, y1, x2, y2 in pixels; n_i may be 0.
        positive, negative: Thresholds of the IoU; positive >= negative > 0.
        least: IoU from which `low_quality` applies.
        low_quality: `"moves"`: such an anchor is assigned the box that it is best for, the last of several
            (mmdetection). `"keeps"`: it is assigned the box that is best for it (detectron2). None: there are no such
            anchors.
        valid: (N, A) bool, the anchors that take part; the others are background. None lets all take part.

    Returns:
        (N, A) int64: the index of the assigned box in `torch.cat(boxes)`, `BACKGROUND` or `IGNORED`.

    Example:
        >>> import torch
        >>> from heads.boxes.assign import assign_max_iou
        >>> anchors = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 4], [20, 20, 28, 28]])
        >>> assign_max_iou(anchors, [torch.tensor([[0.0, 0, 8, 8]])], positive=0.6, negative=0.4)
        tensor([[ 0, -2, -1]])
    """
    stacked, first = stack_boxes(boxes)
    images, count = stacked.shape[:2]
    device, num_anchors = stacked.device, anchors.shape[-2]
    best = torch.full((images, num_anchors), -1.0, device=device)
    index = torch.zeros((images, num_anchors), dtype=torch.long, device=device)
    wanted = index - 1
    for part in box_chunks(images, count, num_anchors):
        overlap = iou(anchors[..., None, :, :].float(), stacked[:, part, None])
        if valid is not None:
            overlap.masked_fill_(~valid[:, None], -1)
        # Of equal values `max` takes the first, on every device.
        value, local = overlap.max(1)
        index = torch.where(value > best, local + part.start, index)
        best = torch.maximum(best, value)
        if low_quality:
            top = overlap.amax(2, keepdim=True)
            tied = (overlap == top) & (top > 0) & (top >= least)
            number = torch.arange(part.start, part.stop, device=device)[:, None]
            wanted = torch.maximum(wanted, torch.where(tied, number, -1).amax(1))
    found = best >= positive
    if low_quality:
        found |= wanted >= 0
        if low_quality == "moves":
            index = torch.where(wanted >= 0, wanted, index)
    other = torch.where(best < negative, BACKGROUND, IGNORED)
    return torch.where(found, index + first, other)


def assign_atss(grid: Grid, boxes: list[Tensor], topk: int = 9, valid_sizes: Tensor | None = None) -> Tensor:
    """Adaptive training sample selection (Zhang et al., 2020), for grids of one anchor per cell.

    On every level the `topk` anchors whose centres are nearest to a box's centre are its candidates. A candidate is
    positive if its IoU reaches mean plus (unbiased) standard deviation over all candidates of that box and its centre
    lies inside the box. An anchor that is positive for several boxes is assigned the one of highest IoU.

    Ties are settled by order, so that every device gives the same result: among equally distant anchors the first ones
    are candidates, among boxes of equal IoU the first one wins. Everything is computed in float32.

    Args:
        grid: The anchors, A in all.
        boxes: For each of the N images (n_i, 4) x1, y1, x2, y2 in pixels; n_i may be 0.
        topk: Candidates of a box on a level; fewer where a level has fewer anchors.
        valid_sizes: (N, L, 2) int64, rows and columns of each level that take part, counted from the upper left; None
            lets all anchors take part.

    Returns:
        (N, A) int64: the index of the assigned box in `torch.cat(boxes)`, or -1.
    """
    device = grid.anchors.device
    counts = [len(b) for b in boxes]
    num_anchors, num_boxes = len(grid.anchors), sum(counts)
    if num_boxes == 0:
        return torch.full((len(boxes), num_anchors), -1, device=device)
    box = torch.cat(boxes).float()
    image = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)], device=device)

    anchor, valid = _nearest_anchors(grid, box, topk, None if valid_sizes is None else valid_sizes[image])

    box = box[:, None]
    overlap = iou(grid.anchors[anchor], box).masked_fill_(~valid, 0)
    count = valid.sum(1, keepdim=True)
    mean = overlap.sum(1, keepdim=True) / count
    variance = ((overlap - mean).masked_fill_(~valid, 0) ** 2).sum(1, keepdim=True) / (count - 1)
    centre = grid.centres[anchor]
    inside = torch.minimum(centre - box[..., :2], box[..., 2:] - centre).amin(-1) > _INSIDE
    positive = (overlap >= mean + variance.sqrt()) & inside & valid

    # Per anchor the largest key wins: highest IoU, then lowest box index. No two keys are equal, so no order matters.
    rank = torch.arange(num_boxes - 1, -1, -1, device=device)[:, None]
    key = torch.where(positive, sortable(overlap, rank), -1)
    best = torch.full((len(boxes) * num_anchors,), -1, device=device)
    best.scatter_reduce_(0, (image[:, None] * num_anchors + anchor).flatten(), key.flatten(), "amax")
    matched = torch.where(best < 0, -1, num_boxes - 1 - (best & _LOW_BITS))
    return matched.view(len(boxes), num_anchors)


def sortable(value: Tensor, tie_breaker: Tensor) -> Tensor:
    """Integers that order like a number, and among equal ones like another.

    Args:
        value: float32, not negative.
        tie_breaker: int64 in 0 … 2³² - 1, of a shape that broadcasts.

    Returns:
        int64.
    """
    return (value.contiguous().view(torch.int32).long() << 32) | tie_breaker


def _smallest(value: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest of (..., n) `value` >= 0 in rising order and their `index`, ties by index on any device."""
    key = sortable(value, index).topk(min(count, value.shape[-1]), largest=False, sorted=True).values
    return (key >> 32).int().view(torch.float32), key & _LOW_BITS


def _nearest_anchors(grid: Grid, box: Tensor, topk: int, valid_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """For every box the `topk` anchors of each level with the nearest centres, without looking at all anchors.

    Rank the columns of a level by horizontal distance from the box's centre and the rows by vertical distance. The
    anchor in the j-th column and i-th row has at least i * j - 1 others no farther away, those of no larger ranks, so
    it can only be among the `topk` if i * j <= topk: 23 anchors of a level for topk = 9.

    Returns:
        anchor: (M, L * topk) int64 indices into the grid.
        valid: (M, L * topk) bool, false where the level has too few anchors.
    """
    x, y, starts, widths = _axes(grid)
    centre = (box[:, :2] + box[:, 2:]) * 0.5
    along_x = (x - centre[:, 0, None, None]).abs_()
    along_y = (y - centre[:, 1, None, None]).abs_()
    columns = torch.arange(x.shape[1], device=box.device)
    rows = torch.arange(y.shape[1], device=box.device)
    if valid_sizes is not None:
        along_x.masked_fill_(columns >= valid_sizes[..., 1:], torch.inf)
        along_y.masked_fill_(rows >= valid_sizes[..., :1], torch.inf)
    along_x, columns = _smallest(along_x, columns, topk)
    along_y, rows = _smallest(along_y, rows, topk)

    i, j = _rank_pairs(topk, rows.shape[-1], columns.shape[-1], box.device)
    distance = along_x[..., j] ** 2 + along_y[..., i] ** 2
    anchor = rows[..., i] * widths + columns[..., j] + starts
    distance, anchor = _smallest(distance, anchor, topk)
    distance, anchor = distance.flatten(1), anchor.flatten(1)
    valid = distance.isfinite()
    return anchor.masked_fill_(~valid, 0), valid


@lru_cache(maxsize=32)
def _axes(grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centres of columns (L, W) and rows (L, H), padded by infinity, and first index and width (L, 1) of each level."""
    with torch.inference_mode(False):
        levels = [c.reshape(h, w, 2) for c, (h, w) in zip(grid.centres.split(grid.counts), grid.sizes, strict=True)]
        pad = torch.nn.utils.rnn.pad_sequence
        x = pad([level[0, :, 0] for level in levels], batch_first=True, padding_value=torch.inf)
        y = pad([level[:, 0, 1] for level in levels], batch_first=True, padding_value=torch.inf)
        counts = torch.tensor([0, *grid.counts[:-1]], device=x.device)
        widths = torch.tensor([w for _, w in grid.sizes], device=x.device)
        return x, y, counts.cumsum(0)[:, None], widths[:, None]


@lru_cache(maxsize=32)
def _rank_pairs(topk: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    pairs = [(i, j) for i, j in product(range(rows), range(columns)) if (i + 1) * (j + 1) <= topk]
    with torch.inference_mode(False):
        rows_first, columns_first = zip(*pairs, strict=True)
        return torch.tensor(rows_first, device=device), torch.tensor(columns_first, device=device)
