"""Modulated deformable convolution in Triton: matrix products over samples that exist only in registers.

Maps are read channels last, so that the corner of a sample is one run of channels. A program owns a rectangle of output
pixels of one image. Its products run over steps, a step being a tap and a block of input channels; taps are innermost,
so that the pixels around the rectangle stay in the L1 cache while all taps visit them. The corners of the next step are
loaded before the product of this one and carried through the loop: left to itself, the compiler would copy them to
shared memory past the L1 cache.

Names in the kernels. C and OUT: input and output channels of one weight group, of which there are GROUPS. SHARE: input
channels of one offset group. SPAN: how many neighbouring input channels lie in one weight group and one offset group,
and so can share a block. PIXELS = TILE_H * TILE_W, BLOCK_C, BLOCK_O: what is worked on at a time. A point is an offset
group and a tap, numbered group * TAPS + tap. REAL: the type of coordinates, weights and sums, float32, or float64 for
float64 tensors. INDEX: the integer type of a place within one image; images are found by 64-bit pointers. GEOMETRY: the
convolution's stride, padding and dilation, in y before x.
"""

import triton
import triton.language as tl


@triton.jit
def tile_pixels(tile, HO, WO, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Output coordinates of a tile's pixels, and which of them exist."""
    across = tl.cdiv(WO, TILE_W)
    number = tl.arange(0, TILE_H * TILE_W)
    ho = (tile // across) * TILE_H + number // TILE_W
    wo = (tile % across) * TILE_W + number % TILE_W
    return ho, wo, (ho < HO) & (wo < WO)


@triton.jit
def locate_point(
    offset, mask, offset_c, mask_c, ho, wo, inside, point,
    KW: tl.constexpr, TAPS: tl.constexpr, GEOMETRY: tl.constexpr, HAS_MASK: tl.constexpr,
    REAL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Where a point samples, y and x, and its mask; `offset` and `mask` point to channel 0 of every pixel."""
    tap = point % TAPS
    channel = point.to(INDEX)
    dy = tl.load(offset + 2 * channel * offset_c, mask=inside, other=0.0).to(REAL)
    dx = tl.load(offset + (2 * channel + 1) * offset_c, mask=inside, other=0.0).to(REAL)
    y = (ho * GEOMETRY[0] - GEOMETRY[2] + tap // KW * GEOMETRY[4]).to(REAL) + dy
    x = (wo * GEOMETRY[1] - GEOMETRY[3] + tap % KW * GEOMETRY[5]).to(REAL) + dx
    if HAS_MASK:
        factor = tl.load(mask + channel * mask_c, mask=inside, other=0.0).to(REAL)
    else:
        factor = tl.where(inside, 1.0, 0.0).to(REAL)
    return y, x, factor


@triton.jit
def _neighbours(place, size):
    """The pixel at or before a coordinate; whether it and the next one are in the map; the distance from it."""
    low = tl.floor(place)
    first = low.to(tl.int32)
    return first, place >= 0, place < size - 1, place - low


@triton.jit
def find_corners(y, x, factor, inside, H, W, INDEX: tl.constexpr):
    """The four pixels around a sample, as places in the map, their weights, and which of them there are.

    A sample of a pixel that is not `inside`, outside of the map or at NaN has none.
    """
    sampled = inside & (y > -1) & (y < H) & (x > -1) & (x < W)
    # What is not sampled, and need not be a number that an integer holds, goes above the map: it has no first line.
    y0, has_y0, has_y1, fy = _neighbours(tl.where(sampled, y, -2.0), H)
    x0, has_x0, has_x1, fx = _neighbours(tl.where(sampled, x, 0.0), W)
    has_y1 &= sampled
    wy0, wy1 = (1 - fy) * factor, fy * factor
    p00 = y0.to(INDEX) * W + x0
    return (
        p00, p00 + 1, p00 + W, p00 + W + 1,
        wy0 * (1 - fx), wy0 * fx, wy1 * (1 - fx), wy1 * fx,
        has_y0 & has_x0, has_y0 & has_x1, has_y1 & has_x0, has_y1 & has_x1,
    )  # fmt: skip


@triton.jit
def load_rows(base, place, there, channels, known, STRIDE: tl.constexpr, EVEN: tl.constexpr):
    """(PIXELS, BLOCK_C): the channels of one pixel of the map for each row, zeros where there is none."""
    pointers = base + (place * STRIDE)[:, None] + channels[None, :]
    if EVEN:
        return tl.load(pointers, mask=there[:, None], other=0.0)
    return tl.load(pointers, mask=there[:, None] & known[None, :], other=0.0)


@triton.jit
def locate_step(
    step, group, x, offset, mask, offset_c, mask_c, ho, wo, inside, H, W,
    C: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, SPAN: tl.constexpr,
    KW: tl.constexpr, TAPS: tl.constexpr, GEOMETRY: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_C: tl.constexpr, REAL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The corners (PIXELS, BLOCK_C) of one step of a weight group, and their weights (PIXELS,)."""
    tap = step % TAPS
    c, known = locate_block(step // TAPS, SPAN, BLOCK_C)
    first = group * C + c
    point = (group * C + step // TAPS // tl.cdiv(SPAN, BLOCK_C) * SPAN) // SHARE * TAPS + tap
    y, xx, factor = locate_point(
        offset, mask, offset_c, mask_c, ho, wo, inside, point, KW, TAPS, GEOMETRY, HAS_MASK, REAL, INDEX
    )
    p00, p01, p10, p11, w00, w01, w10, w11, h00, h01, h10, h11 = find_corners(y, xx, factor, inside, H, W, INDEX)
    even: tl.constexpr = SPAN % BLOCK_C == 0
    v00 = load_rows(x, p00, h00, first, known, C * GROUPS, even)
    v01 = load_rows(x, p01, h01, first, known, C * GROUPS, even)
    v10 = load_rows(x, p10, h10, first, known, C * GROUPS, even)
    v11 = load_rows(x, p11, h11, first, known, C * GROUPS, even)
    return v00, v01, v10, v11, w00, w01, w10, w11


@triton.jit
def locate_block(number, SPAN: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels of a block, counted from the group's first, and which of them exist: blocks do not cross spans."""
    blocks: tl.constexpr = (SPAN + BLOCK_C - 1) // BLOCK_C
    within = (number % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return (number // blocks) * SPAN + within, within < SPAN


@triton.jit
def mix_corners(v00, v01, v10, v11, w00, w01, w10, w11, REAL: tl.constexpr):
    """The samples (PIXELS, BLOCK_C)."""
    upper = v00.to(REAL) * w00[:, None] + v01.to(REAL) * w01[:, None]
    return upper + v10.to(REAL) * w10[:, None] + v11.to(REAL) * w11[:, None]


@triton.jit
def forward_kernel(
    x, offset, mask, weight, bias, out,
    H, W, HO, WO, offset_n, offset_c, offset_h, offset_w, mask_n, mask_c, mask_h, mask_w, out_n, out_c, out_h, out_w,
    C: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, SPAN: tl.constexpr,
    KW: tl.constexpr, TAPS: tl.constexpr, GEOMETRY: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    REAL: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (images * tiles, GROUPS * blocks of OUT). `x` is (N, H, W, C*GROUPS), `weight` (GROUPS, OUT, TAPS, C)."""
    tiles = tl.cdiv(HO, TILE_H) * tl.cdiv(WO, TILE_W)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    blocks: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    group = tl.program_id(1) // blocks
    o = (tl.program_id(1) % blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    ho, wo, inside = tile_pixels(tl.program_id(0) % tiles, HO, WO, TILE_H, TILE_W)
    high, wide = ho.to(INDEX), wo.to(INDEX)
    x += image * H * W * (C * GROUPS)
    offset += image * offset_n + high * offset_h + wide * offset_w
    mask += image * mask_n + high * mask_h + wide * mask_w
    rows = weight + (group * OUT + o) * (TAPS * C)
    total = tl.zeros((TILE_H * TILE_W, BLOCK_O), dtype=REAL)
    steps: tl.constexpr = TAPS * (C // SPAN) * ((SPAN + BLOCK_C - 1) // BLOCK_C)
    v00, v01, v10, v11, w00, w01, w10, w11 = locate_step(
        0, group, x, offset, mask, offset_c, mask_c, ho, wo, inside, H, W,
        C, GROUPS, SHARE, SPAN, KW, TAPS, GEOMETRY, HAS_MASK, BLOCK_C, REAL, INDEX,
    )  # fmt: skip
    for step in range(steps):
        samples = mix_corners(v00, v01, v10, v11, w00, w01, w10, w11, REAL).to(x.dtype.element_ty)
        v00, v01, v10, v11, w00, w01, w10, w11 = locate_step(
            tl.minimum(step + 1, steps - 1), group, x, offset, mask, offset_c, mask_c, ho, wo, inside, H, W,
            C, GROUPS, SHARE, SPAN, KW, TAPS, GEOMETRY, HAS_MASK, BLOCK_C, REAL, INDEX,
        )  # fmt: skip
        c, known = locate_block(step // TAPS, SPAN, BLOCK_C)
        # Not a row of weights that is not there, whatever memory holds in its place.
        weights = tl.load(
            rows[None, :] + (step % TAPS * C + c)[:, None], mask=known[:, None] & (o < OUT)[None, :], other=0.0
        )
        total = tl.dot(samples, weights, total, input_precision=PRECISION, out_dtype=REAL)
    if HAS_BIAS:
        total += tl.load(bias + group * OUT + o, mask=o < OUT, other=0.0).to(REAL)[None, :]
    pointers = out + image * out_n + (high * out_h + wide * out_w)[:, None]
    pointers += ((group * OUT + o).to(INDEX) * out_c)[None, :]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=inside[:, None] & (o < OUT)[None, :])


@triton.jit
def backward_points_kernel(
    grad, x, offset, mask, weight, grad_x, grad_offset, grad_mask,
    H, W, HO, WO, offset_n, offset_c, offset_h, offset_w, mask_n, mask_c, mask_h, mask_w,
    grad_offset_n, grad_offset_c, grad_offset_h, grad_offset_w, grad_mask_n, grad_mask_c, grad_mask_h, grad_mask_w,
    C: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, SPAN: tl.constexpr,
    KW: tl.constexpr, TAPS: tl.constexpr, GEOMETRY: tl.constexpr,
    HAS_MASK: tl.constexpr, TO_X: tl.constexpr, TO_OFFSET: tl.constexpr, TO_MASK: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    REAL: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (images * tiles * points of a pixel,): gradients of one point's offset and mask, and its share of the map's.

    `grad` is (N, HO, WO, OUT*GROUPS), `x` (N, H, W, C*GROUPS), `weight` (GROUPS, TAPS, C, OUT). `grad_x`, of type REAL,
    is added to; every element of `grad_offset` and `grad_mask` is written by one program.
    """
    tiles = tl.cdiv(HO, TILE_H) * tl.cdiv(WO, TILE_W)
    # The points of a tile run side by side: they read the same gradients and neighbouring pixels.
    points: tl.constexpr = C * GROUPS // SHARE * TAPS
    point = tl.program_id(0) % points
    tap = point % TAPS
    tile = tl.program_id(0) // points
    image = (tile // tiles).to(tl.int64)
    ho, wo, inside = tile_pixels(tile % tiles, HO, WO, TILE_H, TILE_W)
    high, wide = ho.to(INDEX), wo.to(INDEX)
    offset += image * offset_n + high * offset_h + wide * offset_w
    mask += image * mask_n + high * mask_h + wide * mask_w
    y, xx, factor = locate_point(
        offset, mask, offset_c, mask_c, ho, wo, inside, point, KW, TAPS, GEOMETRY, HAS_MASK, REAL, INDEX
    )
    p00, p01, p10, p11, w00, w01, w10, w11, h00, h01, h10, h11 = find_corners(y, xx, factor, inside, H, W, INDEX)
    x += image * H * W * (C * GROUPS)
    grad_x += image * H * W * (C * GROUPS)
    grad += image * HO * WO * (OUT * GROUPS)
    grad_rows = grad + ((high * WO + wide) * (OUT * GROUPS))[:, None]
    # The products of the column's gradient with the four corners, over all channels of the offset group.
    s00 = tl.zeros((TILE_H * TILE_W,), dtype=REAL)
    s01 = tl.zeros((TILE_H * TILE_W,), dtype=REAL)
    s10 = tl.zeros((TILE_H * TILE_W,), dtype=REAL)
    s11 = tl.zeros((TILE_H * TILE_W,), dtype=REAL)
    even: tl.constexpr = SPAN % BLOCK_C == 0
    whole: tl.constexpr = GROUPS == 1 and BLOCK_O >= OUT
    if whole:
        o = tl.arange(0, BLOCK_O)
        gradient = load_gradient(grad_rows, o, inside, o < OUT)
    for block in range((SHARE // SPAN) * ((SPAN + BLOCK_C - 1) // BLOCK_C)):
        within, known = locate_block(block, SPAN, BLOCK_C)
        channel = point // TAPS * SHARE + within
        # All channels of a block lie in one weight group.
        group = (point // TAPS * SHARE + block // tl.cdiv(SPAN, BLOCK_C) * SPAN) // C
        column = tl.zeros((TILE_H * TILE_W, BLOCK_C), dtype=REAL)
        for start in range(0, OUT, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            if not whole:
                gradient = load_gradient(grad_rows, group * OUT + o, inside, o < OUT)
            weights = tl.load(
                weight + ((group * TAPS + tap) * C + channel - group * C)[None, :] * OUT + o[:, None],
                mask=known[None, :] & (o < OUT)[:, None],
                other=0.0,
            )
            column = tl.dot(gradient, weights, column, input_precision=PRECISION, out_dtype=REAL)
        if TO_OFFSET or TO_MASK:
            s00 += tl.sum(load_rows(x, p00, h00, channel, known, C * GROUPS, even).to(REAL) * column, 1)
            s01 += tl.sum(load_rows(x, p01, h01, channel, known, C * GROUPS, even).to(REAL) * column, 1)
            s10 += tl.sum(load_rows(x, p10, h10, channel, known, C * GROUPS, even).to(REAL) * column, 1)
            s11 += tl.sum(load_rows(x, p11, h11, channel, known, C * GROUPS, even).to(REAL) * column, 1)
        if TO_X:
            add_rows(grad_x, p00, w00, h00, column, channel, known, C * GROUPS)
            add_rows(grad_x, p01, w01, h01, column, channel, known, C * GROUPS)
            add_rows(grad_x, p10, w10, h10, column, channel, known, C * GROUPS)
            add_rows(grad_x, p11, w11, h11, column, channel, known, C * GROUPS)
    down, right, along = point_gradients(s00, s01, s10, s11, y, xx, factor, h00 | h01 | h10 | h11)
    if TO_OFFSET:
        target = grad_offset + image * grad_offset_n + high * grad_offset_h + wide * grad_offset_w
        target += (2 * point).to(INDEX) * grad_offset_c
        tl.store(target, down.to(grad_offset.dtype.element_ty), mask=inside)
        tl.store(target + grad_offset_c, right.to(grad_offset.dtype.element_ty), mask=inside)
    if TO_MASK:
        target = grad_mask + image * grad_mask_n + high * grad_mask_h + wide * grad_mask_w
        target += point.to(INDEX) * grad_mask_c
        tl.store(target, along.to(grad_mask.dtype.element_ty), mask=inside)


@triton.jit
def point_gradients(s00, s01, s10, s11, y, x, factor, sampled):
    """Gradients of dy, dx and the mask, from the products of the sample's gradient with the four corners."""
    y, x = tl.where(sampled, y, 0.0), tl.where(sampled, x, 0.0)
    fy, fx = y - tl.floor(y), x - tl.floor(x)
    across0 = s01 - s00
    across1 = s11 - s10
    along0 = s00 + fx * across0
    along1 = s10 + fx * across1
    # What is not sampled has no gradient, though the mask, or the gradient of the sample, be NaN.
    down = tl.where(sampled, factor * (along1 - along0), 0.0)
    right = tl.where(sampled, factor * (across0 + fy * (across1 - across0)), 0.0)
    return down, right, along0 + fy * (along1 - along0)


@triton.jit
def load_gradient(rows, o, inside, known):
    """(PIXELS, BLOCK_O) of the output's gradient."""
    return tl.load(rows + o[None, :], mask=inside[:, None] & known[None, :], other=0.0)


@triton.jit
def add_rows(base, place, factor, there, column, channels, known, STRIDE: tl.constexpr):
    """Add to the channels of one pixel of the map for each row; a row whose factor is zero is left out."""
    pointers = base + (place * STRIDE)[:, None] + channels[None, :]
    added = there & (factor != 0)
    tl.atomic_add(pointers, column * factor[:, None], mask=added[:, None] & known[None, :], sem="relaxed")


@triton.jit
def _tile_step(
    tile, step, group, x, offset, mask, offset_n, offset_c, offset_h, offset_w, mask_n, mask_c, mask_h, mask_w,
    H, W, HO, WO,
    C: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, SPAN: tl.constexpr,
    KW: tl.constexpr, TAPS: tl.constexpr, GEOMETRY: tl.constexpr, HAS_MASK: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr, REAL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """`locate_step` for one of the tiles of all images."""
    tiles = tl.cdiv(HO, TILE_H) * tl.cdiv(WO, TILE_W)
    image = (tile // tiles).to(tl.int64)
    ho, wo, inside = tile_pixels(tile % tiles, HO, WO, TILE_H, TILE_W)
    high, wide = ho.to(INDEX), wo.to(INDEX)
    return locate_step(
        step, group, x + image * H * W * (C * GROUPS),
        offset + image * offset_n + high * offset_h + wide * offset_w,
        mask + image * mask_n + high * mask_h + wide * mask_w,
        offset_c, mask_c, ho, wo, inside, H, W,
        C, GROUPS, SHARE, SPAN, KW, TAPS, GEOMETRY, HAS_MASK, BLOCK_C, REAL, INDEX,
    )  # fmt: skip


@triton.jit
def backward_weight_kernel(
    grad, x, offset, mask, partial,
    H, W, HO, WO, tiles,
    offset_n, offset_c, offset_h, offset_w, mask_n, mask_c, mask_h, mask_w,
    C: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, SPAN: tl.constexpr,
    KW: tl.constexpr, TAPS: tl.constexpr, GEOMETRY: tl.constexpr, HAS_MASK: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    TILES: tl.constexpr, REAL: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (steps of a weight group, GROUPS * blocks of OUT, splits): a split sums over TILES tiles of all images.

    `grad` is (N, HO, WO, OUT*GROUPS), `x` (N, H, W, C*GROUPS), `partial` (splits, GROUPS, OUT, TAPS, C) of type REAL.
    """
    step = tl.program_id(0)
    blocks: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    group = tl.program_id(1) // blocks
    o = (tl.program_id(1) % blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(2)
    per_image = tl.cdiv(HO, TILE_H) * tl.cdiv(WO, TILE_W)
    total = tl.zeros((BLOCK_O, BLOCK_C), dtype=REAL)
    v00, v01, v10, v11, w00, w01, w10, w11 = _tile_step(
        split * TILES, step, group, x, offset, mask,
        offset_n, offset_c, offset_h, offset_w, mask_n, mask_c, mask_h, mask_w,
        H, W, HO, WO, C, GROUPS, SHARE, SPAN, KW, TAPS, GEOMETRY, HAS_MASK, TILE_H, TILE_W, BLOCK_C, REAL, INDEX,
    )  # fmt: skip
    for i in range(TILES):
        tile = split * TILES + i
        samples = mix_corners(v00, v01, v10, v11, w00, w01, w10, w11, REAL).to(x.dtype.element_ty)
        v00, v01, v10, v11, w00, w01, w10, w11 = _tile_step(
            tl.minimum(tile + 1, tiles - 1), step, group, x, offset, mask,
            offset_n, offset_c, offset_h, offset_w, mask_n, mask_c, mask_h, mask_w,
            H, W, HO, WO, C, GROUPS, SHARE, SPAN, KW, TAPS, GEOMETRY, HAS_MASK, TILE_H, TILE_W, BLOCK_C, REAL, INDEX,
        )  # fmt: skip
        ho, wo, inside = tile_pixels(tile % per_image, HO, WO, TILE_H, TILE_W)
        image = (tile // per_image).to(tl.int64)
        rows = grad + (image * HO * WO + ho.to(INDEX) * WO + wo) * (OUT * GROUPS)
        # The last split may have fewer tiles: what it computes beyond them has no gradient.
        gradient = load_gradient(rows[:, None], group * OUT + o, inside & (tile < tiles), o < OUT)
        total = tl.dot(tl.trans(gradient), samples, total, input_precision=PRECISION, out_dtype=REAL)
    c, known = locate_block(step // TAPS, SPAN, BLOCK_C)
    rows = partial + ((split.to(tl.int64) * GROUPS + group) * OUT + o) * (TAPS * C)
    tl.store(rows[:, None] + (step % TAPS * C + c)[None, :], total, mask=(o < OUT)[:, None] & known[None, :])
