"""The maps of one DyHead block as rows of two matrices, and the tables by which its kernels find their rows.

A block with L levels makes 3L - 2 sampled maps; making one is a problem, as in a grouped matrix product. With one
launch for all of them, a program looks up its problem in a table. Two matrices hold all maps, one row of C channels a
pixel, image by image:

    pyramid (P, C)   the levels, finest first: the block's input, its output, and the gradients of both
    sampled (Q, C)   the problems: every level from itself, then from its finer, then from its coarser neighbour;
                     the last in the size of the neighbour, as the upsampling is left to the tail

Tables depend on shapes alone and are made once for each set of them. Making one copies it to the GPU, which a CUDA
graph cannot capture, so the first forward on some shapes makes all of them, also those that only backward looks up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from itertools import pairwise
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from kernels.block.parameters import STRIDES
from kernels.runtime.launch import Owner
from kernels.runtime.tiles import cdiv
from kernels.sampling.launch import Tiling
from kernels.sampling.maps import COARSER_HEIGHT, SAME_ROW, Levels, Sizes, Tables

SAME, FINER, COARSER = range(3)
BRANCHES = 3


@dataclass(frozen=True)
class Problem:
    """One sampled map.

    Attributes:
        branch: SAME, FINER or COARSER.
        level: The level that the map is for.
        source: The level that it samples.
        size: Height and width of the map.
        target: Height and width of `level`, to which the map is upsampled.
    """

    branch: int
    level: int
    source: int
    size: tuple[int, int]
    target: tuple[int, int]

    @property
    def stride(self) -> int:
        return STRIDES[self.branch]


_NO_SIZES = Sizes(0, 0, 0, 0)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _kept(
    make: Callable[Concatenate["Layout", _Arguments], _Result],
) -> Callable[Concatenate["Layout", _Arguments], _Result]:
    """A method whose results the layout keeps. `functools.cache` would keep them, and every layout, for ever."""

    @wraps(make)
    def method(self: "Layout", *arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
        key = make.__name__, *arguments, *named.items()
        if key not in self.kept:
            self.kept[key] = make(self, *arguments, **named)
        return cast(_Result, self.kept[key])

    return cast(Callable[Concatenate["Layout", _Arguments], _Result], method)


# Arguments of launches that a layout has, and no caller hands in.
TABLES = ("axes", "levels", "problems", "share", "slots", "work")


class Layout(Owner):
    """Rows and tables for `batch` images with levels of `sizes`, on `device`; `real` is the type of the sums.

    `tile` is the height and width of the pixels of one partial sum of the statistics.

    Attributes:
        problems: The sampled maps in the order of their rows.
        rows: P, rows of the pyramid.
        sampled_rows: Q, rows of the sampled maps.
        coarser_row: The first row of the coarser neighbours' maps.
        largest: Pixels of the largest level.
        thin: Whether a level has a single column.
        table: (problems, 16) int32, columns as in `kernels.sampling.maps`.
        levels: (L, 8) int32, columns as there.
        axes: Numbers of type `real`; for a problem, from its column AXES: the factors from a target's coordinate to the
            map's (y, x), then for each of the map's rows, then columns, the sum of its weights in the upsampling. A
            pixel's weight in the mean after upsampling is the product of its row's and its column's; all are 1 where
            sizes are equal.
        firsts: int32, at the same indices as in `axes`: the first row or column of the target that has a weight for it.
        span: The largest number of rows or columns of a target with a weight for one pixel.
        slots: (L * 3 * N, 2) int32: problem and image, or -1, of every level, branch and image.
        share: (L, 3, 1, 1) of type `real`: one divided by the level's number of maps, 0 for a map that does not exist.
        kept: The tables that methods have made, by method and arguments.
        complete: The types and channels of the pyramids for which all tables of forward and backward are among `kept`;
            see `kernels.block.launch`.
    """

    def __init__(
        self,
        sizes: tuple[tuple[int, int], ...],
        batch: int,
        device: torch.device,
        real: torch.dtype,
        tile: tuple[int, int],
    ):
        super().__init__()
        count = len(sizes)
        self.sizes, self.batch, self.device, self.real, self.tile = sizes, batch, device, real, tile
        self.kept: dict[tuple[Any, ...], Any] = {}
        self.complete: set[tuple[Any, ...]] = set()
        self.problems = [
            *(Problem(SAME, i, i, sizes[i], sizes[i]) for i in range(count)),
            *(Problem(FINER, i, i - 1, sizes[i], sizes[i]) for i in range(1, count)),
            *(Problem(COARSER, i, i + 1, sizes[i + 1], sizes[i]) for i in range(count - 1)),
        ]
        self.level_rows = _starts([batch * h * w for h, w in sizes])
        self.problem_rows = _starts([batch * p.size[0] * p.size[1] for p in self.problems])
        self.rows, self.sampled_rows = self.level_rows[-1], self.problem_rows[-1]
        self.coarser_row = self.problem_rows[2 * count - 1]
        self.largest = max(h * w for h, w in sizes)
        self.thin = any(w == 1 for _, w in sizes)
        self._make_axes()
        self._make_tables()

    def _make_axes(self) -> None:
        scales, shares, firsts, spans = [], [], [], [1]
        for problem in self.problems:
            both = [_axis(*sizes, self.real) for sizes in zip(problem.size, problem.target, strict=True)]
            scales.append([scale for scale, _, _, _ in both])
            shares.append(torch.cat([share for _, share, _, _ in both]))
            firsts.append(torch.cat([first for _, _, first, _ in both]))
            spans += [span for _, _, _, span in both]
        self.axes_starts = _starts([2 + len(share) for share in shares])
        pieces = [torch.cat([torch.tensor(s, dtype=self.real), x]) for s, x in zip(scales, shares, strict=True)]
        self.axes = torch.cat(pieces).to(self.device)
        self.firsts = torch.cat([torch.cat([x.new_zeros(2), x]) for x in firsts]).int().to(self.device)
        self.span = max(spans)

    def _make_tables(self) -> None:
        tiles = self._tile_counts(self.tile)
        first_tiles = _starts([self.batch * n for n in tiles])
        rows, slots = [], torch.full((len(self.sizes), BRANCHES, self.batch, 2), -1, dtype=torch.int32)
        levels = [[*size, self.problem_rows[i], -1, -1, 1, 1, 0] for i, size in enumerate(self.sizes)]
        for i, p in enumerate(self.problems):
            source, target = self.sizes[p.source], self.level_rows[p.level]
            places = [self.level_rows[p.source], self.problem_rows[i], *p.target, target, self.axes_starts[i]]
            rows.append([p.branch, p.level, p.stride, *source, *p.size, *places, first_tiles[i], tiles[i], p.source])
            slots[p.level, p.branch] = torch.tensor([[i, n] for n in range(self.batch)], dtype=torch.int32)
            levels[p.level][SAME_ROW.value + p.branch] = self.problem_rows[i]
            if p.branch == COARSER:
                levels[p.level][COARSER_HEIGHT.value :] = [*p.size, self.axes_starts[i]]
        present = (slots[:, :, :1, :1] >= 0).to(self.real)
        self.share = (present / present.sum(1, keepdim=True)).to(self.device)
        self.slots = slots.view(-1, 2).to(self.device)
        self.table = torch.tensor(rows, dtype=torch.int32).to(self.device)
        self.levels = torch.tensor(levels, dtype=torch.int32).to(self.device)

    @_kept
    def tiles(self, tile: tuple[int, int] | None = None) -> Tensor:
        """(tiles, 3) int32: problem, image and number of every tile of the sampled maps; by default of `self.tile`."""
        return self._work(self._tile_counts(tile)) if tile else self.tiles(self.tile)

    @_kept
    def level_tiles(self, tile: tuple[int, int]) -> Tensor:
        """(tiles, 3) int32: level, image and number of every tile of `tile` pixels of the levels."""
        return self._work([cdiv(h, tile[0]) * cdiv(w, tile[1]) for h, w in self.sizes])

    def outputs(self, size: tuple[int, int]) -> Tiling:
        """The tiles of the sampled maps, for `kernels.sampling`."""
        work = self.tiles(size)
        return Tiling(Tables(self.table, work), _NO_SIZES, len(work))

    def inputs(self, size: tuple[int, int]) -> Tiling:
        """The tiles of the levels, for `kernels.sampling`."""
        work = self.level_tiles(size)
        return Tiling(Levels(self.levels, work), _NO_SIZES, len(work))

    @_kept
    def level_starts(self, counts: tuple[int, ...]) -> Tensor:
        """(L,) int32: where each level begins, if an image of it has so many entries."""
        return torch.tensor(_starts([self.batch * n for n in counts])[:-1], dtype=torch.int32).to(self.device)

    @_kept
    def splits(self, tile: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
        """Every branch's part of `tiles(tile)` in pieces of `count` tiles.

        Returns:
            (splits, 2) int32, the first tile of every piece and the end of its branch's; (branches that have problems,
            2) int32, the first piece of every branch and how many it has.
        """
        tiles = [0] * BRANCHES
        for problem, number in zip(self.problems, self._tile_counts(tile), strict=True):
            tiles[problem.branch] += self.batch * number
        starts = _starts([n for n in tiles if n])
        counts = [cdiv(n, count) for n in tiles if n]
        pieces = [[first, end] for start, end in pairwise(starts) for first in range(start, end, count)]
        bounds = list(zip(_starts(counts), counts, strict=False))
        return (
            torch.tensor(pieces, dtype=torch.int32).to(self.device),
            torch.tensor(bounds, dtype=torch.int32).to(self.device),
        )

    @_kept
    def sampled_runs(self, pixels: int) -> Tensor:
        """(runs, 3) int32: problem, image and number of every run of `pixels` pixels of the sampled maps."""
        return self._work([cdiv(p.size[0] * p.size[1], pixels) for p in self.problems])

    @_kept
    def runs(self, pixels: int) -> Tensor:
        """(runs, 3) int32: level, image and number of every run of `pixels` pixels of the pyramid."""
        return self._work([cdiv(h * w, pixels) for h, w in self.sizes])

    @_kept
    def run_bounds(self, pixels: int) -> Tensor:
        """(L * N, 2) int32: the first run of every level and image, and how many it has."""
        counts = [cdiv(h * w, pixels) for h, w in self.sizes]
        starts = _starts([self.batch * n for n in counts])
        bounds = [[starts[i] + n * c, c] for i, c in enumerate(counts) for n in range(self.batch)]
        return torch.tensor(bounds, dtype=torch.int32).to(self.device)

    def _tile_counts(self, tile: tuple[int, int]) -> list[int]:
        return [cdiv(p.size[0], tile[0]) * cdiv(p.size[1], tile[1]) for p in self.problems]

    def _work(self, counts: list[int]) -> Tensor:
        parts = []
        for i, count in enumerate(counts):
            image = torch.arange(self.batch, dtype=torch.int32).repeat_interleave(count)
            number = torch.arange(count, dtype=torch.int32).repeat(self.batch)
            parts.append(torch.stack([torch.full_like(image, i), image, number], 1))
        return torch.cat(parts).to(self.device)

    def split(self, pyramid: Tensor) -> list[Tensor]:
        """The levels of a (P, channels) matrix as maps (N, channels, H_l, W_l), channels last, without a copy."""
        parts = pyramid.split([end - start for start, end in pairwise(self.level_rows)])
        return [
            part.view(self.batch, h, w, -1).permute(0, 3, 1, 2) for part, (h, w) in zip(parts, self.sizes, strict=True)
        ]


def join(maps: Sequence[Tensor]) -> Tensor:
    """Maps (N, C, H, W) as the rows of one matrix, in one launch where they are channels last."""
    return torch.cat([x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) for x in maps])


_captured: list[Layout] = []
_layout = lru_cache(maxsize=256)(Layout)


def layout(
    sizes: tuple[tuple[int, int], ...],
    batch: int,
    device: torch.device,
    real: torch.dtype,
    tile: tuple[int, int] = (8, 8),
) -> Layout:
    """The layout for these shapes, kept for the next call; one that a CUDA graph was captured with is never let go."""
    # A tensor made in inference mode could not be part of a graph later on.
    with torch.inference_mode(False):
        found = _layout(sizes, batch, device, real, tile)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing() and found not in _captured:
        _captured.append(found)
    return found


def _starts(counts: list[int]) -> list[int]:
    """Where each of consecutive pieces begins, and where the last one ends."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts


def _axis(size: int, target: int, real: torch.dtype) -> tuple[float, Tensor, Tensor, int]:
    """How `target` points are interpolated between `size` points, ends on ends, as `F.interpolate` does it.

    Returns:
        The factor from a target's number to its coordinate, and for each of the `size` points the sum of its weights
        and the first target that gives it one; then the largest number of targets of a point.
    """
    scale = torch.zeros((), dtype=real)
    if target > 1:
        scale = torch.tensor(size - 1, dtype=real) / torch.tensor(target - 1, dtype=real)
    place = torch.arange(target, dtype=real) * scale
    low = place.long().clamp(max=size - 1)
    weight = torch.zeros(target, size, dtype=torch.float64)
    number = torch.arange(target)
    fraction = (place - low).double()
    weight.index_put_((number, low), 1 - fraction, accumulate=True)
    weight.index_put_((number, (low + 1).clamp(max=size - 1)), fraction, accumulate=True)
    touched = torch.zeros(target, size, dtype=torch.bool)
    touched[number, low] = touched[number, (low + 1).clamp(max=size - 1)] = True
    first = torch.where(touched.any(0), touched.int().argmax(0), 0)
    last = torch.where(touched.any(0), target - 1 - touched.flip(0).int().argmax(0), 0)
    return scale.item(), weight.sum(0).to(real), first, int((last - first).max()) + 1
