"""Where dense detectors predict: one cell per position of every pyramid level, with a point or anchors in it.

All dense heads use this order: levels from fine to coarse, inside a level row by row, inside a cell anchor by anchor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

# (height, width) of each level's map.
Sizes = tuple[tuple[int, int], ...]
# Of each level the anchors of a cell that is centred on the origin.
Cells = tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True, eq=False)
class Grid:
    """The anchors of one pyramid of feature maps. Tensors are float32, shared by all callers, and never written to.

    Attributes:
        sizes: (height, width) of each level's feature map, in cells.
        strides: Pixels per cell, by level.
        counts: Anchors of each level; they sum to A.
        anchors: (A, 4) x1, y1, x2, y2 in pixels.
        centres: (A, 2) x, y in pixels.
        levels: (A,) int64, index of each anchor's level.
    """

    sizes: Sizes
    strides: tuple[int, ...]
    counts: tuple[int, ...]
    anchors: Tensor
    centres: Tensor
    levels: Tensor


def cell_anchors(
    sizes: Sequence[float], ratios: Sequence[float] = (1.0,), order: Literal["ratio", "size"] = "ratio"
) -> tuple[tuple[float, float, float, float], ...]:
    """The anchors of one cell, centred on the origin: each area at each ratio.

    Args:
        sizes: Roots of the areas, in pixels.
        ratios: Ratios of height to width.
        order: What varies slowest. `"ratio"` is mmdetection's order, `"size"` detectron2's; it decides which channel of
            a released checkpoint belongs to which anchor.

    Returns:
        One (x1, y1, x2, y2) in pixels for each pair of a size and a ratio.

    Example:
        >>> from heads.boxes.anchors import cell_anchors
        >>> cell_anchors([8.0], ratios=[1.0, 4.0])
        ((-4.0, -4.0, 4.0, 4.0), (-2.0, -8.0, 2.0, 8.0))
    """
    pairs = [(s, r) for r in ratios for s in sizes] if order == "ratio" else [(s, r) for s in sizes for r in ratios]
    halves = [(0.5 * size / ratio**0.5, 0.5 * size * ratio**0.5) for size, ratio in pairs]
    return tuple((-w, -h, w, h) for w, h in halves)


def anchor_grid(
    sizes: Sequence[Sequence[int]],
    strides: Sequence[int],
    cells: Sequence[Sequence[Sequence[float]]],
    offset: float,
    device: torch.device | str = "cpu",
) -> Grid:
    """Anchors on the grid of every level; the 32 grids used last are kept, so a call in a training loop is free.

    Args:
        sizes: (height, width) of each level's feature map, ints or symbols of `torch.export`.
        strides: Pixels per cell, by level.
        cells: The anchors of a cell, by level, as `cell_anchors` gives them.
        offset: Where in its cell an anchor is centred, in cells: 0.5 is the middle (official DyHead), 0 the upper left
            corner (mmdetection's default).
        device: Device of the tensors.

    Returns:
        The grid, which callers share and must not write to.
    """
    shape = tuple((h, w) for h, w in sizes)
    all_cells = tuple(tuple(tuple(anchor) for anchor in level) for level in cells)
    if torch.compiler.is_compiling():
        return _new_grid(shape, tuple(strides), all_cells, offset, torch.device(device))
    return _anchor_grid(shape, tuple(strides), all_cells, offset, torch.device(device))


@lru_cache(maxsize=32)
def _anchor_grid(sizes: Sizes, strides: tuple[int, ...], cells: Cells, offset: float, device: torch.device) -> Grid:
    # These tensors outlive the call: made in inference mode they could never be used in training, and a default device
    # that is set around one call (`meta`, say) is not every caller's.
    with torch.inference_mode(False), torch.device("cpu"):
        grid = _new_grid(sizes, strides, cells, offset, torch.device("cpu"))
        if type(grid.anchors) is not Tensor:
            # What fails is not kept, so that no other caller gets them.
            raise RuntimeError("anchors are not made of fake tensors")
        tensors = (t.to(device) for t in (grid.anchors, grid.centres, grid.levels))
        return Grid(sizes, strides, grid.counts, *tensors)


def _new_grid(sizes: Sizes, strides: tuple[int, ...], cells: Cells, offset: float, device: torch.device) -> Grid:
    anchors, centres, levels = [], [], []
    for number, (points, level) in enumerate(zip(level_points(sizes, strides, offset, device), cells, strict=True)):
        of_cell = torch.tensor(level, device=device)
        anchors.append((torch.cat([points, points], -1)[:, None] + of_cell).flatten(0, 1))
        centres.append(points[:, None].expand(-1, len(level), -1).flatten(0, 1))
        levels.append(torch.full_like(anchors[-1][:, 0], number, dtype=torch.int64))
    # Not `len`, which would be a constant to torch.export.
    counts = tuple(level.shape[0] for level in anchors)
    return Grid(sizes, strides, counts, torch.cat(anchors), torch.cat(centres), torch.cat(levels))


def point_grid(
    sizes: Sequence[Sequence[int]], strides: Sequence[int], offset: float, device: torch.device | str = "cpu"
) -> Grid:
    """One point per cell, as anchors without size; kept like the grids of `anchor_grid`.

    Args:
        sizes: (height, width) of each level's feature map.
        strides: Pixels per cell, by level.
        offset: Where in its cell a point lies, in cells: 0.5 for FCOS, 0 for RepPoints.
        device: Device of the tensors.

    Example:
        >>> from heads.boxes.anchors import point_grid
        >>> point_grid([(1, 2)], strides=[8], offset=0.5).centres
        tensor([[ 4.,  4.],
                [12.,  4.]])
    """
    empty_cell = ((0.0, 0.0, 0.0, 0.0),)
    return anchor_grid(sizes, strides, [empty_cell] * len(strides), offset, device)


def outside_padding(
    grid: Grid, image_sizes: Sequence[tuple[int, int]], divisor: int
) -> tuple[Tensor | None, Tensor | None]:
    """Which part of the grid each image of a padded batch covers, by mmdetection's rule.

    An image counts as padded to its own size rounded up to a multiple of `divisor` (`pad_shape` there), however large
    the batch is. A cell takes part if it begins within that.

    Args:
        grid: A grid whose offset is below one cell.
        image_sizes: (height, width) of each of the N images before padding.
        divisor: What sides are rounded up to a multiple of, in pixels.

    Returns:
        (N, L, 2) int64, rows and columns of each level that take part, and (N, A) bool, the anchors that do; or twice
        None when all of them do in every image.
    """
    sizes = []
    for image in image_sizes:
        padded = [-(-side // divisor) * divisor for side in image]
        sizes.append(
            tuple(
                (min(-(-padded[0] // stride), height), min(-(-padded[1] // stride), width))
                for (height, width), stride in zip(grid.sizes, grid.strides, strict=True)
            )
        )
    if all(image == grid.sizes for image in sizes):
        return None, None
    cells = torch.tensor(sizes, device=grid.anchors.device)
    # A centre lies before the end of the last cell exactly if its own cell takes part.
    limits = (cells * torch.tensor(grid.strides, device=cells.device)[:, None]).flip(-1)
    return cells, (grid.centres < limits[:, grid.levels]).all(-1)


def level_points(
    sizes: Sequence[Sequence[int]], strides: Sequence[int], offset: float, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """The points of each level, in the order of the grids, made anew by every call; arguments as in `point_grid`.

    Returns:
        (H_l * W_l, 2) x, y in pixels, by level.
    """
    points = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
        points.append((torch.stack([x, y], -1).reshape(-1, 2) + offset) * stride)
    return points
