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

import triton
import triton.language as tl

from kernels.deform_conv.kernels import locate_block, locate_point, tile_pixels


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
    keys, places, sample, known, y, x, factor, H, W, first_bin, no_bin, TILE_H: tl.constexpr, TILE_W: tl.constexpr
):
    """Write what the index is made of: the bins, and the places and masks, of some samples of one map.

    Args:
        keys, places: (samples,) int32 and (samples, 3) REAL, to be written; a place is y, x and the mask.
        sample, known: (B,) numbers of the samples, int64, and which of them exist.
        y, x, factor: (B,) coordinates in the map, and masks.
        first_bin: (B,) or scalar, number of the first bin of the tap and image.
        no_bin: a number above those of all bins: what lies outside comes last in the index.
    """
    sampled = known & (y > -1) & (y < H) & (x > -1) & (x < W)
    key = first_bin + _bin(y, sampled, TILE_H) * bins_along(W, TILE_W) + _bin(x, sampled, TILE_W)
    tl.store(keys + sample, tl.where(sampled, key, no_bin), mask=known)
    tl.store(places + 3 * sample, y, mask=known)
    tl.store(places + 3 * sample + 1, x, mask=known)
    tl.store(places + 3 * sample + 2, factor, mask=known)


@triton.jit
def collect(
    grad, weight, order, places, starts, bins, pitch, rows, first, i, j, c, known,
    C: tl.constexpr, OUT: tl.constexpr, STRIDE: tl.constexpr, TAPS: tl.constexpr, ROW_TAPS: tl.constexpr,
    BLOCK_O: tl.constexpr, ENTRIES: tl.constexpr, REAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The input's gradient (PIXELS, BLOCK_C), of type REAL, of one tile and block of channels of one weight group.

    Args:
        grad: (rows, STRIDE), at the first of the OUT channels of the weight group.
        weight: (TAPS, C, OUT) of the weight group.
        order, places: (samples,) int64, the sorted samples; (samples, 3) REAL, in the order of before.
        starts: integers, where in `order` a bin begins, at the tile's upper left bin for tap 0; the next tap is `bins`
            further, the next line of bins `pitch`.
        rows, first: int64 scalars; the sample of a row for a tap is number first + tap % ROW_TAPS * rows + row.
        i, j: (PIXELS,) coordinates of the pixels in the map, whether they exist or not.
        c, known: (BLOCK_C,) channels counted from the weight group's first, and which of them exist.
        TAPS, ROW_TAPS: by how many taps the map is sampled, and by how many of them for the same row of `grad`.
        ENTRIES: how many entries are multiplied at a time.
    """
    high, wide = i.to(REAL)[:, None], j.to(REAL)[:, None]
    total = tl.zeros((i.shape[0], c.shape[0]), dtype=REAL)
    steps: tl.constexpr = TAPS * ((OUT + BLOCK_O - 1) // BLOCK_O)
    begin0, begin1, begin2, upto0, upto1, count = _runs(starts, pitch)
    sample = _samples(order, 0, begin0, begin1, begin2, upto0, upto1, count, ENTRIES)
    y, x, factor, gradients = _entries(grad, places, sample, first, tl.arange(0, BLOCK_O), OUT, STRIDE)
    for step in range(steps):
        o = step // TAPS * BLOCK_O + tl.arange(0, BLOCK_O)
        # Asked for before the entries, so that they come in the meantime.
        weights = tl.load(
            weight + ((step % TAPS * C + c) * OUT)[None, :] + o[:, None],
            mask=known[None, :] & (o < OUT)[:, None],
            other=0.0,
        )
        after = tl.minimum(step + 1, steps - 1)
        next0, next1, next2, next_upto0, next_upto1, next_count = _runs(starts + after % TAPS * bins, pitch)
        gathered = tl.zeros((i.shape[0], BLOCK_O), dtype=REAL)
        done = 0
        # At least once: the entries in hand are this step's, be there any or not. Those that come next, of this step or
        # of the one after it, are looked up before the product with these and loaded while it runs.
        while done < tl.maximum(count, 1):
            shares = tl.maximum(1 - tl.abs(y[None, :] - high), 0.0) * tl.maximum(1 - tl.abs(x[None, :] - wide), 0.0)
            shares = (shares * factor[None, :]).to(grad.dtype.element_ty)
            done += ENTRIES
            more = done < count
            sample = _samples(
                order, tl.where(more, done, 0), tl.where(more, begin0, next0), tl.where(more, begin1, next1),
                tl.where(more, begin2, next2), tl.where(more, upto0, next_upto0), tl.where(more, upto1, next_upto1),
                tl.where(more, count, next_count), ENTRIES,
            )  # fmt: skip
            coming = tl.where(more, step, after)
            gathered = tl.dot(shares, gradients, gathered, input_precision=PRECISION, out_dtype=REAL)
            y, x, factor, gradients = _entries(
                grad, places, sample, first + coming % TAPS % ROW_TAPS * rows,
                coming // TAPS * BLOCK_O + tl.arange(0, BLOCK_O), OUT, STRIDE,
            )  # fmt: skip
        gathered = gathered.to(grad.dtype.element_ty)
        total = tl.dot(gathered, weights, total, input_precision=PRECISION, out_dtype=REAL)
        begin0, begin1, begin2, upto0, upto1, count = next0, next1, next2, next_upto0, next_upto1, next_count
    return total


@triton.jit
def _runs(line, pitch):
    """Where in the index a tile's three runs begin, and how many entries there are in one, two and three of them."""
    begin0, begin1, begin2 = tl.load(line), tl.load(line + pitch), tl.load(line + 2 * pitch)
    upto0 = tl.load(line + 3) - begin0
    upto1 = upto0 + tl.load(line + pitch + 3) - begin1
    return begin0, begin1, begin2, upto0, upto1, upto1 + tl.load(line + 2 * pitch + 3) - begin2


@triton.jit
def _samples(order, done, begin0, begin1, begin2, upto0, upto1, count, ENTRIES: tl.constexpr):
    """The samples (ENTRIES,) behind the first `done` entries of a tile, -1 where there are no more."""
    number = done + tl.arange(0, ENTRIES)
    place = tl.where(number < upto1, begin1 + number - upto0, begin2 + number - upto1)
    place = tl.where(number < upto0, begin0 + number, place)
    return tl.load(order + place, mask=number < count, other=-1)


@triton.jit
def _entries(grad, places, sample, origin, o, OUT: tl.constexpr, STRIDE: tl.constexpr):
    """Places, masks (ENTRIES,) and gradients (ENTRIES, BLOCK_O) of samples."""
    there = sample >= 0
    y = tl.load(places + 3 * sample, mask=there, other=0.0)
    x = tl.load(places + 3 * sample + 1, mask=there, other=0.0)
    factor = tl.load(places + 3 * sample + 2, mask=there, other=0.0)
    pointers = grad + ((sample - origin) * STRIDE)[:, None] + o[None, :]
    return y, x, factor, tl.load(pointers, mask=there[:, None] & (o < OUT)[None, :], other=0.0)


@triton.jit
def bin_kernel(
    offset, mask, keys, places, first_sample, first_bin, no_bin, images, H, W, HO, WO,
    offset_n, offset_c, offset_h, offset_w, mask_n, mask_c, mask_h, mask_w,
    KW: tl.constexpr, TAPS: tl.constexpr, GEOMETRY: tl.constexpr, HAS_MASK: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, points): `store_samples` for one map of a batch, point by point, image by image.

    The map's samples and bins begin at `first_sample` and `first_bin`.
    """
    point = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.cast(images, tl.int64) * HO * WO
    known = row < rows
    image = row // (HO * WO)
    ho, wo = (row // WO % HO).to(tl.int32), (row % WO).to(tl.int32)
    high, wide = ho.to(INDEX), wo.to(INDEX)
    offset += image * offset_n + high * offset_h + wide * offset_w
    mask += image * mask_n + high * mask_h + wide * mask_w
    y, x, factor = locate_point(
        offset, mask, offset_c, mask_c, ho, wo, known, point, KW, TAPS, GEOMETRY, HAS_MASK, REAL, INDEX
    )
    image_bins = bins_along(H, TILE_H) * bins_along(W, TILE_W)
    own = first_bin + (point * images + image.to(tl.int32)) * image_bins
    sample = first_sample + point.to(tl.int64) * rows + row
    store_samples(keys, places, sample, known, y, x, factor, H, W, own, no_bin, TILE_H, TILE_W)


@triton.jit
def gather_kernel(
    grad, weight, order, places, starts, out, first_sample, first_bin, bins, rows, H, W, out_n, out_c, out_h, out_w,
    C: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, SPAN: tl.constexpr,
    TAPS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    ENTRIES: tl.constexpr, REAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (images * tiles, blocks of C * GROUPS): `collect` for one map of a batch, written to `out` (N, ., H, W).

    `grad` is (rows, OUT*GROUPS), `weight` (GROUPS, TAPS, C, OUT). The map's samples and bins begin at `first_sample`
    and `first_bin`; `bins` are those of all its images for one point.
    """
    across = tl.cdiv(W, TILE_W)
    tiles = tl.cdiv(H, TILE_H) * across
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    i, j, inside = tile_pixels(tile, H, W, TILE_H, TILE_W)
    pitch = bins_along(W, TILE_W)
    within, known = locate_block(tl.program_id(1), SPAN, BLOCK_C)
    # All channels of a block lie in one weight group and one offset group.
    channel = tl.program_id(1) // tl.cdiv(SPAN, BLOCK_C) * SPAN
    group, point = channel // C, (channel // SHARE * TAPS).to(tl.int64)
    starts += first_bin + point * bins + image * bins_along(H, TILE_H) * pitch
    starts += tile // across * 2 * pitch + tile % across * 2
    total = collect(
        grad + group * OUT, weight + group * (TAPS * C * OUT), order, places, starts, bins, pitch,
        tl.cast(rows, tl.int64), first_sample + point * rows, i, j, within - group * C, known,
        C, OUT, OUT * GROUPS, TAPS, TAPS, BLOCK_O, ENTRIES, REAL, PRECISION,
    )  # fmt: skip
    pointers = out + image * out_n + (i.to(tl.int64) * out_h + j.to(tl.int64) * out_w)[:, None]
    pointers += (within.to(tl.int64) * out_c)[None, :]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=inside[:, None] & known[None, :])
