"""The input's gradient of deformable convolutions in Triton, without atomics: products over an inverse index.

Turned around, a sample's bilinear weights are two tents: pixel (i, j) has the share (1 - |y - i|) * (1 - |x - j|) in a
sample at (y, x) that is less than one pixel away on both axes, and none in any other. So the gradient of the pixels of
a tile is the sum over taps of

    shares (PIXELS, entries) @ gradients (entries, O) @ weights (O, C),

where the entries are the tap's samples around the tile, and `shares` is made in registers. Every gradient is read once
for a tile, not once for each of four corners, and a pixel that many samples hit costs no more than as many pixels.

The inverse index finds a tile's entries. A sample lies in the cell between four pixels, of which there are H+1 by W+1.
A tile needs the cells inside and those on its rim, which it shares with its neighbours. A *bin* is what is left when
the cells are cut along all rims: lines of rims have even numbers, what is between them odd ones, and a tile's cells
are three by three bins. Samples sorted by tap, then bin, are a tile's entries in three runs. Sorting is stable, sums
follow the order of the index, and the result has the same bits in every run.

A sample is a tap of a row of the output's gradient, numbered tap * rows + row. Names are otherwise those of
`kernels.deform_conv.kernels`. In 16 bits the shares and their product with the gradients are rounded to the tensors'
type, as samples are in the forward pass. A gradient or mask that is not finite spreads over the tiles it reaches.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.deform_conv.kernels import locate_block, locate_point, predictions
from kernels.sampling.kernels import Pixels, tile_pixels


class Runs(NamedTuple):
    """Where in the index a tile's three runs begin, and how many entries there are in one, two and three of them."""

    begin0: Any
    begin1: Any
    begin2: Any
    upto0: Any
    upto1: Any
    count: Any


class Entries(NamedTuple):
    """(ENTRIES,) places and masks of samples, and (ENTRIES, BLOCK_O) their gradients."""

    y: Any
    x: Any
    mask: Any
    gradients: Any


@triton.jit
def bins_along(size, TILE: tl.constexpr):
    """How many bins an axis has."""
    return 2 * tl.cdiv(size, TILE) + 1


@triton.jit
def _bin(place, sampled, TILE: tl.constexpr):
    """The bin of a coordinate on one axis; cells are counted from the one above or left of pixel 0."""
    cell = tl.floor(tl.where(sampled, place, 0.0)).to(tl.int32) + 1
    return cell // TILE * 2 + tl.where(cell % TILE > 0, 1, 0)


@triton.jit
def store_samples(
    keys, places, number, known, sample, H, W, first_bin, no_bin, TILE_H: tl.constexpr, TILE_W: tl.constexpr
):
    """Write what the index is made of: the bins, and the places and masks, of some samples of one map.

    Args:
        keys, places: (samples,) int32 and (samples, 3) REAL, to be written; a place is y, x and the mask.
        number, known: (B,) numbers of the samples, int64, and which of them exist.
        sample: `Sample` (B,): coordinates in the map, and masks.
        first_bin: (B,) or scalar, number of the first bin of the tap and image.
        no_bin: A number above those of all bins: what lies outside comes last in the index.
    """
    sampled = known & (sample.y > -1) & (sample.y < H) & (sample.x > -1) & (sample.x < W)
    key = first_bin + _bin(sample.y, sampled, TILE_H) * bins_along(W, TILE_W) + _bin(sample.x, sampled, TILE_W)
    tl.store(keys + number, tl.where(sampled, key, no_bin), mask=known)
    tl.store(places + 3 * number, sample.y, mask=known)
    tl.store(places + 3 * number + 1, sample.x, mask=known)
    tl.store(places + 3 * number + 2, sample.mask, mask=known)


@triton.jit
def collect(
    grad,
    weight,
    order,
    places,
    starts,
    bins,
    pitch,
    rows,
    first,
    pixels,
    c,
    known,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    TAPS: tl.constexpr,
    ROW_TAPS: tl.constexpr,
    ENTRIES: tl.constexpr,
    K: tl.constexpr,
):
    """The input's gradient (PIXELS, BLOCK_C), of type REAL, of one tile and block of channels of one weight group.

    Args:
        grad: (rows, STRIDE), at the first of the OUT channels of the weight group.
        weight: (TAPS, C, OUT) of the weight group.
        order, places: (samples,) int64, the sorted samples; (samples, 3) REAL, in the order of before.
        starts: integers, where in `order` a bin begins, at the tile's upper left bin for tap 0; the next tap is `bins`
            further, the next line of bins `pitch`.
        rows, first: int64 scalars; the sample of a row for a tap is number first + tap % ROW_TAPS * rows + row.
        pixels: `Pixels` of the map, whether they exist or not.
        c, known: (BLOCK_C,) channels counted from the weight group's first, and which of them exist.
        TAPS, ROW_TAPS: by how many taps the map is sampled, and by how many of them for the same row of `grad`.
        ENTRIES: how many entries are multiplied at a time.
        K: the kernel's `Config`, of which C, BLOCK_O, REAL and PRECISION count.
    """
    high, wide = pixels.y.to(K.REAL)[:, None], pixels.x.to(K.REAL)[:, None]
    total = tl.zeros((pixels.y.shape[0], c.shape[0]), dtype=K.REAL)
    steps: tl.constexpr = TAPS * ((OUT + K.BLOCK_O - 1) // K.BLOCK_O)
    runs = _runs(starts, pitch)
    sample = _samples(order, 0, runs, ENTRIES)
    entries = _entries(grad, places, sample, first, tl.arange(0, K.BLOCK_O), OUT, STRIDE)
    for step in range(steps):
        o = step // TAPS * K.BLOCK_O + tl.arange(0, K.BLOCK_O)
        # Asked for before the entries, so that they come in the meantime.
        weights = tl.load(
            weight + ((step % TAPS * K.C + c) * OUT)[None, :] + o[:, None],
            mask=known[None, :] & (o < OUT)[:, None],
            other=0.0,
        )
        after = tl.minimum(step + 1, steps - 1)
        following = _runs(starts + after % TAPS * bins, pitch)
        gathered = tl.zeros((pixels.y.shape[0], K.BLOCK_O), dtype=K.REAL)
        done = 0
        # At least once: the entries in hand are this step's, be there any or not. Those that come next, of this step or
        # of the one after it, are looked up before the product with these and loaded while it runs.
        while done < tl.maximum(runs.count, 1):
            shares = tl.maximum(1 - tl.abs(entries.y[None, :] - high), 0.0)
            shares = shares * tl.maximum(1 - tl.abs(entries.x[None, :] - wide), 0.0)
            shares = (shares * entries.mask[None, :]).to(grad.dtype.element_ty)
            done += ENTRIES
            more = done < runs.count
            sample = _samples(order, tl.where(more, done, 0), _either(more, runs, following), ENTRIES)
            coming = tl.where(more, step, after)
            gathered = tl.dot(shares, entries.gradients, gathered, input_precision=K.PRECISION, out_dtype=K.REAL)
            origin = first + coming % TAPS % ROW_TAPS * rows
            entries = _entries(
                grad, places, sample, origin, coming // TAPS * K.BLOCK_O + tl.arange(0, K.BLOCK_O), OUT, STRIDE
            )
        gathered = gathered.to(grad.dtype.element_ty)
        total = tl.dot(gathered, weights, total, input_precision=K.PRECISION, out_dtype=K.REAL)
        runs = following
    return total


@triton.jit
def _runs(line, pitch):
    begin0, begin1, begin2 = tl.load(line), tl.load(line + pitch), tl.load(line + 2 * pitch)
    upto0 = tl.load(line + 3) - begin0
    upto1 = upto0 + tl.load(line + pitch + 3) - begin1
    return Runs(begin0, begin1, begin2, upto0, upto1, upto1 + tl.load(line + 2 * pitch + 3) - begin2)


@triton.jit
def _either(first, a, b):
    """`Runs` a where `first`, else b."""
    return Runs(
        tl.where(first, a.begin0, b.begin0),
        tl.where(first, a.begin1, b.begin1),
        tl.where(first, a.begin2, b.begin2),
        tl.where(first, a.upto0, b.upto0),
        tl.where(first, a.upto1, b.upto1),
        tl.where(first, a.count, b.count),
    )


@triton.jit
def _samples(order, done, runs, ENTRIES: tl.constexpr):
    """The samples (ENTRIES,) behind the first `done` entries of a tile, -1 where there are no more."""
    number = done + tl.arange(0, ENTRIES)
    place = tl.where(number < runs.upto1, runs.begin1 + number - runs.upto0, runs.begin2 + number - runs.upto1)
    place = tl.where(number < runs.upto0, runs.begin0 + number, place)
    return tl.load(order + place, mask=number < runs.count, other=-1)


@triton.jit
def _entries(grad, places, sample, origin, o, OUT: tl.constexpr, STRIDE: tl.constexpr):
    """The `Entries` of samples."""
    there = sample >= 0
    y = tl.load(places + 3 * sample, mask=there, other=0.0)
    x = tl.load(places + 3 * sample + 1, mask=there, other=0.0)
    mask = tl.load(places + 3 * sample + 2, mask=there, other=0.0)
    pointers = grad + ((sample - origin) * STRIDE)[:, None] + o[None, :]
    return Entries(y, x, mask, tl.load(pointers, mask=there[:, None] & (o < OUT)[None, :], other=0.0))


@triton.jit
def bin_kernel(
    offset,
    mask,
    keys,
    places,
    first_sample,
    first_bin,
    no_bin,
    images,
    H,
    W,
    HO,
    WO,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of rows, points): `store_samples` for one map of a batch, point by point, image by image.

    `offset` and `mask` are `Strided`. The map's samples and bins begin at `first_sample` and `first_bin`.
    """
    point = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.cast(images, tl.int64) * HO * WO
    known = row < rows
    image = row // (HO * WO)
    pixels = Pixels((row // WO % HO).to(tl.int32), (row % WO).to(tl.int32), known)
    sample = locate_point(predictions(offset, mask, image, pixels, K), pixels, point, K)
    image_bins = bins_along(H, K.TILE_H) * bins_along(W, K.TILE_W)
    own = first_bin + (point * images + image.to(tl.int32)) * image_bins
    number = first_sample + point.to(tl.int64) * rows + row
    store_samples(keys, places, number, known, sample, H, W, own, no_bin, K.TILE_H, K.TILE_W)


@triton.jit
def gather_kernel(
    grad,
    weight,
    order,
    places,
    starts,
    out,
    first_sample,
    first_bin,
    bins,
    rows,
    H,
    W,
    K: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Grid (images * tiles, blocks of C * GROUPS): `collect` for one map of a batch, written to `out` (N, ., H, W).

    `grad` is (rows, OUT*GROUPS), `weight` (GROUPS, TAPS, C, OUT); `out` is `Strided`. The map's samples and bins begin
    at `first_sample` and `first_bin`; `bins` are those of all its images for one point.
    """
    across = tl.cdiv(W, K.TILE_W)
    tiles = tl.cdiv(H, K.TILE_H) * across
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    pixels = tile_pixels(tile, H, W, K.TILE_H, K.TILE_W)
    pitch = bins_along(W, K.TILE_W)
    within, known = locate_block(tl.program_id(1), K.SPAN, K.BLOCK_C)
    # All channels of a block lie in one weight group and one offset group.
    channel = tl.program_id(1) // tl.cdiv(K.SPAN, K.BLOCK_C) * K.SPAN
    group, point = channel // K.C, (channel // K.SHARE * K.TAPS).to(tl.int64)
    starts += first_bin + point * bins + image * bins_along(H, K.TILE_H) * pitch
    starts += tile // across * 2 * pitch + tile % across * 2
    total = collect(
        grad + group * K.OUT,
        weight + group * (K.TAPS * K.C * K.OUT),
        order,
        places,
        starts,
        bins,
        pitch,
        tl.cast(rows, tl.int64),
        first_sample + point * rows,
        pixels,
        within - group * K.C,
        known,
        K.OUT,
        K.OUT * K.GROUPS,
        K.TAPS,
        K.TAPS,
        ENTRIES,
        K,
    )
    pointers = out.pointer + image * out.n + (pixels.y.to(tl.int64) * out.h + pixels.x.to(tl.int64) * out.w)[:, None]
    pointers += (within.to(tl.int64) * out.c)[None, :]
    tl.store(pointers, total.to(out.pointer.dtype.element_ty), mask=pixels.inside[:, None] & known[None, :])
