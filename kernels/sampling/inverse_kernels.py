"""The input's gradient of deformable convolutions in Triton, without atomics: products over an inverse index.

A plan says for every sample which four pixels of the map have a share in it, and how much. So the gradient of the
pixels of a tile of the map is the sum over taps of

    weights (C, O) @ gradients (O, entries) @ shares (entries, PIXELS),

where the entries are the tap's samples around the tile, and `shares` is made in registers. Every gradient is read once
for a tile, not once for each of four corners, and a pixel that many samples hit costs no more than as many pixels.

The inverse index finds a tile's entries. The four pixels of a sample are two neighbouring ones on either axis: it lies
in the cell between them. A tile needs the cells inside and those on its rim, which it shares with its neighbours. A
*bin* is what is left when the cells are cut along all rims: lines of rims have even numbers, what is between them odd
ones, and a tile's cells are three by three bins. Samples sorted by tap, then bin, are a tile's entries in three runs.
Sorting is stable, sums follow the order of the index, and the result has the same bits in every run.

A gradient or mask that is not finite spreads over the tiles it reaches.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.sampling.maps import Sizes, divided, locate_map, locate_tile
from kernels.sampling.plan_kernels import load_pairs, load_weights, select_line
from kernels.sampling.product_kernels import all_samples, at_point, output_pixels


class Index(NamedTuple):
    """Samples by bin.

    Attributes:
        order: (2 * samples,) int32: their numbers, and zeros between them.
        starts: (bins + 1,) int32, where among the samples every bin begins.
    """

    order: Any
    starts: Any


class Runs(NamedTuple):
    """Where in the index a tile's three runs begin, and how many entries there are in one, two and three of them."""

    begin0: Any
    begin1: Any
    begin2: Any
    upto0: Any
    upto1: Any
    count: Any


class Entries(NamedTuple):
    """(ENTRIES,) the upper left pixel of samples, counted from the tile's, their weights, and their gradients' rows."""

    y: Any
    x: Any
    weights: Any
    row: Any


@triton.jit
def bins_along(size, TILE: tl.constexpr):
    """How many bins an axis has."""
    return 2 * tl.cdiv(size, TILE) + 1


@triton.jit
def _bin(line, TILE: tl.constexpr):
    """The bin of the cell behind a line on one axis; cells are counted from the one in front of line 0."""
    cell = line + 1
    return cell // TILE * 2 + tl.where(cell % TILE > 0, 1, 0)


@triton.jit(do_not_specialize=["H", "W", "HO", "WO", "rows", "first_sample", "first_bin", "bins", "no_bin"])
def bins_kernel(
    plan,
    keys,
    tables,
    first_bins,
    H,
    W,
    HO,
    WO,
    rows,
    first_sample,
    first_bin,
    bins,
    no_bin,
    K: tl.constexpr,
    BIN_H: tl.constexpr,
    BIN_W: tl.constexpr,
):
    """Grid (tiles, points): the bin of every sample.

    `keys` int32 are written from `first_sample` on; what samples nothing gets `no_bin`, a number above those of all
    bins. Bins begin at `first_bin`; a tap has `bins`, of which those of a map begin at its number in `first_bins`.
    """
    point = tl.program_id(1)
    tile = locate_tile(tl.program_id(0), tables, Sizes(H, W, HO, WO), K)
    pixel, inside = output_pixels(tile, tl.arange(0, K.TILE_H * K.TILE_W), K)
    at = at_point(plan, point, rows, tile)
    place = tl.load(at.pixels + pixel)
    w = load_weights(at, pixel, all_samples(rows, K), None, K)
    sampled = (w.w00 != 0) | (w.w01 != 0) | (w.w10 != 0) | (w.w11 != 0)
    first = first_bin + (tile.branch * K.TAPS + point) * bins
    if K.TABLED:
        first += tl.load(first_bins + tile.level)
    across = bins_along(tile.W, BIN_W)
    first += tile.image.to(tl.int32) * bins_along(tile.H, BIN_H) * across
    key = first + _bin(place // tile.W, BIN_H) * across + _bin(place % tile.W, BIN_W)
    target = keys + first_sample + tl.cast(point, tl.int64) * rows + tile.first + pixel
    tl.store(target, tl.where(sampled, key, no_bin), mask=inside)


@triton.jit
def _runs(line, pitch):
    begin0, begin1, begin2 = tl.load(line), tl.load(line + pitch), tl.load(line + 2 * pitch)
    upto0 = tl.load(line + 3) - begin0
    upto1 = upto0 + tl.load(line + pitch + 3) - begin1
    return Runs(begin0, begin1, begin2, upto0, upto1, upto1 + tl.load(line + 2 * pitch + 3) - begin2)


@triton.jit
def _samples(order, first_sample, done, runs, ENTRIES: tl.constexpr):
    """The samples (ENTRIES,) behind the first `done` entries of a tile, below 0 where there are no more."""
    number = done + tl.arange(0, ENTRIES)
    place = tl.where(number < runs.upto1, runs.begin1 + number - runs.upto0, runs.begin2 + number - runs.upto1)
    place = tl.where(number < runs.upto0, runs.begin0 + number, place)
    there = number < runs.count
    return tl.where(there, tl.load(order + 2 * place, mask=there, other=0) - first_sample, -1)


@triton.jit
def _entries(plan, sample, origin, samples, m, K: tl.constexpr):
    """The `Entries` of samples, of which number `origin` is that of row 0."""
    there = sample >= 0
    place = tl.load(plan.pixels + sample, mask=there, other=0)
    y = divided(place, m.W, m.reciprocal)
    weights = load_pairs(plan, sample, samples, there, K)
    return Entries(y - m.top, place - y * m.W - m.left, weights, (sample - origin).to(tl.int32))


@triton.jit
def _gradients(grad, entries, o, begin, K: tl.constexpr):
    """(ENTRIES, BLOCK_O): outputs begin + o of the rows of entries, of any row where there is no entry."""
    rows = grad + begin + (tl.maximum(entries.row, 0).to(K.INDEX) * (K.OUT * K.GROUPS))[:, None] + o[None, :]
    if K.OUT % K.BLOCK_O == 0:
        gradients = tl.load(rows)
    else:
        gradients = tl.load(rows, mask=(begin + o < K.OUT)[None, :], other=0.0)
    return gradients


@triton.jit
def _nothing(x, W, ENTRIES: tl.constexpr, K: tl.constexpr):
    """Zeros (1, ENTRIES, TILE_W / 8, 8), of which a lane has an entry and eight neighbouring pixels of a line.

    Nothing is loaded: a load is what the compiler derives the distribution over lanes from.
    """
    entry, octet = tl.arange(0, ENTRIES)[None, :, None, None], tl.arange(0, K.TILE_W // 8)[None, None, :, None]
    place = entry * K.TILE_W + octet * 8 + tl.arange(0, 8)[None, None, None, :]
    return tl.load(x + place, mask=W < 0, other=0.0, volatile=True).to(K.TYPE)


@triton.jit
def _shares(entries, nothing, ENTRIES: tl.constexpr, K: tl.constexpr):
    """(ENTRIES, PIXELS): how much of the pixels of a tile is in samples; `nothing` is what `_nothing` returns."""
    y = tl.arange(0, K.TILE_H)[:, None, None, None]
    x = tl.arange(0, K.TILE_W // 8)[None, None, :, None] * 8 + tl.arange(0, 8)[None, None, None, :]
    y0, x0 = entries.y[None, :, None, None], entries.x[None, :, None, None]
    west, east = select_line(entries.weights, y == y0, y == y0 + 1, K)
    at_west, at_east = (x == x0).to(K.TYPE), (x == x0 + 1).to(K.TYPE)
    shares = at_east * east + (at_west * west + nothing)
    return tl.reshape(tl.permute(shares, (1, 0, 2, 3)), (ENTRIES, K.TILE_H * K.TILE_W))


@triton.jit
def _add(total, gathered, weight, c, channels, o, outputs, K: tl.constexpr):
    """`total` (BLOCK_C, PIXELS), and what a tap's weight, of so many channels and outputs, makes of `gathered`."""
    pointers = weight + (c * K.OUT)[:, None] + o[None, :]
    if K.SPAN % K.BLOCK_C == 0 and K.OUT % K.BLOCK_O == 0:
        weights = tl.load(pointers)
    else:
        weights = tl.load(pointers, mask=(c < channels)[:, None] & (o < outputs)[None, :], other=0.0)
    return tl.dot(weights, gathered, total, input_precision=K.PRECISION, out_dtype=K.REAL)


@triton.jit(do_not_specialize=["H", "W", "rows", "first_sample", "first_bin", "bins", "taps"])
def gather_kernel(
    grad,
    weight,
    plan,
    index,
    out,
    tables,
    first_bins,
    H,
    W,
    rows,
    first_sample,
    first_bin,
    bins,
    taps,
    K: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Grid (tiles of the maps, groups * blocks of twice BLOCK_C channels): the gradient `out` (pixels, C*GROUPS).

    `grad` is (rows, OUT*GROUPS), `weight` (branches, GROUPS, TAPS, C, OUT), `index` an `Index`, in which
    the samples of `plan` are numbered from `first_sample` on. A map is sampled by `taps` taps; bins are as in
    `bins_kernel`. A step is a tap and twice BLOCK_O outputs: shares are made once for both halves.
    """
    WIDE: tl.constexpr = K.SPAN > K.BLOCK_C
    TWO: tl.constexpr = K.OUT > K.BLOCK_O
    wide: tl.constexpr = 2 * K.BLOCK_C if WIDE else K.BLOCK_C
    pair: tl.constexpr = 2 * K.BLOCK_O if TWO else K.BLOCK_O
    blocks: tl.constexpr = (K.SPAN + wide - 1) // wide
    PIXELS: tl.constexpr = K.TILE_H * K.TILE_W
    m = locate_map(tl.program_id(0), tables, Sizes(H, W, 0, 0), K)
    # All channels of a block lie in one weight group and one offset group.
    first = tl.program_id(1) // blocks * K.SPAN + tl.program_id(1) % blocks * wide
    left = K.SPAN - tl.program_id(1) % blocks * wide
    group, point = first // K.C, first // K.SHARE * K.TAPS
    starts = index.starts + first_bin + tl.cast(point, tl.int64) * bins
    if K.TABLED:
        # No finer level samples the finest one.
        taps = tl.where(m.level == 0, tl.minimum(taps, 2 * K.TAPS), taps)
        starts += tl.load(first_bins + m.level)
    pitch = bins_along(m.W, K.TILE_W)
    starts += m.image * bins_along(m.H, K.TILE_H) * pitch
    starts += m.top // K.TILE_H * 2 * pitch + m.left // K.TILE_W * 2
    grad += group * K.OUT
    weight += (group * (K.TAPS - 1) * K.C + first) * K.OUT
    samples = all_samples(rows, K)
    rows = tl.cast(rows, tl.int64)
    c, o = tl.arange(0, K.BLOCK_C), tl.arange(0, K.BLOCK_O)
    total = tl.zeros((K.BLOCK_C, PIXELS), dtype=K.REAL)
    total2 = total
    runs = _runs(starts, pitch)
    ahead = runs.count
    entries = _entries(plan, _samples(index.order, first_sample, 0, runs, ENTRIES), point * rows, samples, m, K)
    tap, begin = taps * 0, 0
    while begin < K.OUT:
        last = tap == taps - 1
        tap_after, begin_after = tl.where(last, 0, tap + 1), tl.where(last, begin + pair, begin)
        gathered = tl.zeros((K.BLOCK_O, PIXELS), dtype=K.REAL)
        gathered2 = gathered
        done, count = 0, ahead
        # At least once: the entries in hand are this step's, be there any or not. Those that come next, of this step or
        # of the one after it, are looked up while these are multiplied.
        while done < tl.maximum(count, 1):
            gradients = _gradients(grad, entries, o, begin, K)
            shares = _shares(entries, _nothing(grad, m.W, ENTRIES, K), ENTRIES, K)
            done += ENTRIES
            more = done < count
            coming = tl.where(more, tap, tap_after)
            runs = _runs(starts + tl.cast(coming, tl.int64) * bins, pitch)
            ahead = runs.count
            sample = _samples(index.order, first_sample, tl.where(more, done, 0), runs, ENTRIES)
            gathered = tl.dot(tl.trans(gradients), shares, gathered, input_precision=K.PRECISION, out_dtype=K.REAL)
            if TWO:
                gradients = _gradients(grad, entries, o, begin + K.BLOCK_O, K)
                gathered2 = tl.dot(
                    tl.trans(gradients), shares, gathered2, input_precision=K.PRECISION, out_dtype=K.REAL
                )
            entries = _entries(plan, sample, (point + coming % K.TAPS) * rows, samples, m, K)
        w = weight + (tap // K.TAPS * (K.GROUPS - 1) * K.TAPS + tap) * (K.C * K.OUT) + begin
        total = _add(total, gathered.to(K.TYPE), w, c, left, o, K.OUT - begin, K)
        if WIDE:
            w2 = w + K.BLOCK_C * K.OUT
            total2 = _add(total2, gathered.to(K.TYPE), w2, c, left - K.BLOCK_C, o, K.OUT - begin, K)
        if TWO:
            outputs = K.OUT - begin - K.BLOCK_O
            total = _add(total, gathered2.to(K.TYPE), w + K.BLOCK_O, c, left, o, outputs, K)
            if WIDE:
                total2 = _add(total2, gathered2.to(K.TYPE), w2 + K.BLOCK_O, c, left - K.BLOCK_C, o, outputs, K)
        tap, begin = tap_after, begin_after
    y, x = m.top + tl.arange(0, PIXELS) // K.TILE_W, m.left + tl.arange(0, PIXELS) % K.TILE_W
    inside = (y < m.H) & (x < m.W)
    target = out + (m.first + y.to(K.INDEX) * m.W + x) * (K.C * K.GROUPS)
    target = target[:, None] + (first + c)[None, :]
    tl.store(target, tl.trans(total).to(out.dtype.element_ty), mask=inside[:, None] & (c < left)[None, :])
    if WIDE:
        there = inside[:, None] & (c < left - K.BLOCK_C)[None, :]
        tl.store(target + K.BLOCK_C, tl.trans(total2).to(out.dtype.element_ty), mask=there)
