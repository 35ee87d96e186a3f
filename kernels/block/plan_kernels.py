"""The plan of a block's samples, of all levels and branches, and the gradient of the offsets and masks it is made of.

Offsets and masks of a level serve the maps of three branches: those of the level itself, of its finer neighbour, with
stride 2, and, in their upper left corner, of its coarser neighbour. A program has pixels of a level and finds their
samples by the table of levels; `points` (rows, 27) has 18 offsets and 9 masks of every pixel.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.block.sums import work_item
from kernels.sampling.maps import COARSER_HEIGHT, COARSER_ROW, COARSER_WIDTH, FINER_ROW, LEVEL_COLUMNS, SAME_ROW
from kernels.sampling.plan_kernels import Sample, plan_gradients, store_plan

CHANNELS = tl.constexpr(27)
MASKS = tl.constexpr(18)


class Config(NamedTuple):
    """What is known at compilation.

    Attributes:
        CROP: Whether a coarser neighbour reads the upper left corner of a level's offsets and masks.
        SIGMOID: Whether the masks are still to pass a sigmoid.
        TYPE, PACKED, REAL: As in `kernels.sampling.product_kernels.Config`.
    """

    CROP: bool
    SIGMOID: bool
    TYPE: Any
    PACKED: bool
    REAL: Any


class Branch(NamedTuple):
    """Of some pixels of a level and one of its branches.

    Attributes:
        row: (PIXELS,) rows of the map that is made, 64 bits.
        points: (PIXELS,) rows of the offsets and masks, 64 bits.
        there: (PIXELS,) which of them there are.
        H, W: Height and width of the map that is sampled.
    """

    row: Any
    points: Any
    there: Any
    H: Any
    W: Any


@triton.jit
def _branch(levels, level, image, y, x, inside, coarser_points, NUMBER: tl.constexpr, K: tl.constexpr):
    """The `Branch` of pixels (y, x) of a level, of which those `inside` exist.

    Without K.CROP the offsets and masks of a coarser neighbour have rows of their own, `coarser_points` after those of
    the map that is made.
    """
    own = levels + level * LEVEL_COLUMNS
    height, width = tl.load(own), tl.load(own + 1)
    # The maps of the levels themselves are the first of the problems, in the order of the levels.
    points = tl.load(own + SAME_ROW) + image.to(tl.int64) * height * width + y * width + x
    if NUMBER == 0:
        row, there, H, W = points, inside, height, width
    elif NUMBER == 1:
        first = tl.load(own + FINER_ROW)
        finer = tl.where(first >= 0, own - LEVEL_COLUMNS, own)
        row, there = first + image.to(tl.int64) * height * width + y * width + x, inside & (first >= 0)
        H, W = tl.load(finer), tl.load(finer + 1)
    else:
        first = tl.load(own + COARSER_ROW)
        H, W = tl.load(own + COARSER_HEIGHT), tl.load(own + COARSER_WIDTH)
        row = first + image.to(tl.int64) * H * W + y * W + x
        there = inside & (first >= 0) & (y < H) & (x < W)
        if not K.CROP:
            points = row + coarser_points
    return Branch(row, points, there, H, W)


@triton.jit
def _sample(points, branch, tap, y, x, STRIDE: tl.constexpr, K: tl.constexpr):
    """The `Sample` of a tap at pixels (y, x) of a level."""
    place = points + branch.points * CHANNELS
    dy = tl.load(place + 2 * tap, mask=branch.there, other=0.0).to(K.REAL)
    dx = tl.load(place + (2 * tap + 1), mask=branch.there, other=0.0).to(K.REAL)
    mask = tl.load(place + (MASKS + tap), mask=branch.there, other=0.0).to(K.REAL)
    if K.SIGMOID:
        mask = 1 / (1 + tl.exp(-mask))
    return Sample((y * STRIDE - 1 + tap // 3).to(K.REAL) + dy, (x * STRIDE - 1 + tap % 3).to(K.REAL) + dx, mask)


@triton.jit
def _plan_branch(
    points,
    plan,
    levels,
    level,
    image,
    y,
    x,
    inside,
    sampled_rows,
    coarser_points,
    NUMBER: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
):
    rows = tl.cast(sampled_rows, tl.int64)
    branch = _branch(levels, level, image, y, x, inside, coarser_points, NUMBER, K)
    for tap in range(9):
        sample = _sample(points, branch, tap, y, x, STRIDE, K)
        store_plan(plan, tap * rows + branch.row, 9 * rows, branch.there, sample, branch.H, branch.W, K)


@triton.jit
def plan_pixels(points, plan, levels, level, image, y, x, inside, sampled_rows, coarser_points, K: tl.constexpr):
    """Write the plan of all samples of pixels (y, x) of a level of an image."""
    _plan_branch(points, plan, levels, level, image, y, x, inside, sampled_rows, coarser_points, 0, 1, K)
    _plan_branch(points, plan, levels, level, image, y, x, inside, sampled_rows, coarser_points, 1, 2, K)
    _plan_branch(points, plan, levels, level, image, y, x, inside, sampled_rows, coarser_points, 2, 1, K)


@triton.jit
def _run(levels, work, PIXELS: tl.constexpr):
    """Level and image of a program, coordinates of its pixels, and which of them exist."""
    level, image, number = work_item(work)
    width = tl.load(levels + level * LEVEL_COLUMNS + 1)
    pixel = number * PIXELS + tl.arange(0, PIXELS)
    return level, image, pixel // width, pixel % width, pixel < tl.load(levels + level * LEVEL_COLUMNS) * width


@triton.jit(do_not_specialize=["sampled_rows", "coarser_points"])
def plan_kernel(points, plan, levels, work, sampled_rows, coarser_points, K: tl.constexpr, PIXELS: tl.constexpr):
    """Grid (runs of PIXELS pixels of levels,): `plan_pixels`."""
    level, image, y, x, inside = _run(levels, work, PIXELS)
    plan_pixels(points, plan, levels, level, image, y, x, inside, sampled_rows, coarser_points, K)


@triton.jit
def _add_gradients(products, points, branch, tap, y, x, rows, STRIDE: tl.constexpr, K: tl.constexpr):
    sample = _sample(points, branch, tap, y, x, STRIDE, K)
    grad = plan_gradients(products, tap * rows + branch.row, branch.there, sample, branch.H, branch.W)
    along = grad.mask
    if K.SIGMOID:
        along *= sample.mask * (1 - sample.mask)
    none = tl.zeros_like(along)
    there = branch.there
    return tl.where(there, grad.y, none), tl.where(there, grad.x, none), tl.where(there, along, none)


@triton.jit
def _store(target, row, tap, dy, dx, along, known):
    place = target + row * CHANNELS
    kind = target.dtype.element_ty
    tl.store(place + 2 * tap, dy.to(kind), mask=known)
    tl.store(place + (2 * tap + 1), dx.to(kind), mask=known)
    tl.store(place + (MASKS + tap), along.to(kind), mask=known)


@triton.jit(do_not_specialize=["sampled_rows", "coarser_points"])
def gradients_kernel(
    products,
    points,
    grad_points,
    levels,
    work,
    sampled_rows,
    coarser_points,
    K: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Grid (runs, 9): the gradient of `points` at one tap, from those of the plan's weights, `products` (9 * Q, 4).

    What the branches give to the same offsets and masks is added in their order.
    """
    level, image, y, x, inside = _run(levels, work, PIXELS)
    tap, rows = tl.program_id(1), tl.cast(sampled_rows, tl.int64)
    same = _branch(levels, level, image, y, x, inside, coarser_points, 0, K)
    dy, dx, along = _add_gradients(products, points, same, tap, y, x, rows, 1, K)
    finer = _branch(levels, level, image, y, x, inside, coarser_points, 1, K)
    finer_y, finer_x, finer_along = _add_gradients(products, points, finer, tap, y, x, rows, 2, K)
    coarser = _branch(levels, level, image, y, x, inside, coarser_points, 2, K)
    coarser_y, coarser_x, coarser_along = _add_gradients(products, points, coarser, tap, y, x, rows, 1, K)
    dy, dx, along = dy + finer_y, dx + finer_x, along + finer_along
    if K.CROP:
        dy, dx, along = dy + coarser_y, dx + coarser_x, along + coarser_along
    else:
        _store(grad_points, coarser.points, tap, coarser_y, coarser_x, coarser_along, coarser.there)
    _store(grad_points, same.points, tap, dy, dx, along, inside)
