"""The Triton kernels of a block's coefficients: from three numbers of every map's channels to the lines of the tail.

For one level and image, with branches k, groups g of C / GROUPS channels, M = mean + bias and P = pooled + bias:

    slope = scale / sqrt(mean_g(variance + (M - mean_g M)^2) + eps),    intercept = shift - slope * mean_g M
    u_k = slope * P + intercept                     the mean of the normalised, upsampled map
    w_k = share_k * hardsigmoid(relu(gate . u_k))   the weight of the map, share_k without a gate
    A_k = slope * w_k,    D = sum_k w_k (intercept + slope * bias)
    p = sum_k w_k u_k                               the mean of what is activated
    y = hardsigmoid(expand . relu(reduce . p)),     a1 = 2 y, b1 = y - 1/2, a2 = 2 y - 1, b2 = y - 1/2

A program has a level and an image, together a slot, and all channels as one vector of GROUPS * SPAN elements: SPAN is
the size of a group, rounded up to a power of two. Names: `b_` a vector of channels, `g_` gradients. KINDS is 8, or 4
without the last line.

One row of `sums` is what the gradients of the parameters are made of, from one slot: C columns each for the three
scales, shifts and biases and for the gate's weight, 4C for the gradient in front of the hard sigmoid, R for that in
front of the ReLU, and one for the gate's bias, all of which are only to be added up; then C for p and R for relu(reduce
. p), the other factors of the matrices' gradients. Without a network it ends after the gate's weight and bias.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.block.sums import is_last, merge_sums, sum_rows

BIASES = tl.constexpr(6)
GATE = tl.constexpr(9)
LINES = tl.constexpr(10)
# The derivative of PyTorch's hard sigmoid is the float32 next to 1/6, for float64 as well.
SIXTH = tl.constexpr(0.16666667163372040)


class Config(NamedTuple):
    """What is known at compilation.

    Attributes:
        HAS_BIAS, HAS_GATE: Whether the convolutions have biases, and scale attention its gate.
        KINDS: How many coefficients there are.
        EPS: Of the GroupNorms.
        C, R: Channels, and hidden units of the parameters.
        GROUPS, SPAN: Groups, and elements of the vector for each.
        BLOCK_R: Hidden units that are worked on at a time.
        BLOCK_O: 4C, rounded up to a power of two.
        TILE_H, TILE_W, BLOCK_T, BLOCK_C: Of the sums that are merged: size of a tile; tiles and channels at a time.
        REAL: Type of everything but the parameters.
    """

    HAS_BIAS: bool
    HAS_GATE: bool
    KINDS: int
    EPS: float
    C: int
    R: int
    GROUPS: int
    SPAN: int
    BLOCK_R: int
    BLOCK_O: int
    TILE_H: int
    TILE_W: int
    BLOCK_T: int
    BLOCK_C: int
    REAL: Any


class Parameters(NamedTuple):
    """Scales and shifts of the GroupNorms and biases of the convolutions, (C,), for a level itself, its finer and its

    coarser neighbour; the gate's weight (C,) and bias (1,); the network's layers, (R, C), (R,), (4C, R) and (4C,).
    """

    scale0: Any
    scale1: Any
    scale2: Any
    shift0: Any
    shift1: Any
    shift2: Any
    bias0: Any
    bias1: Any
    bias2: Any
    gate: Any
    gate_bias: Any
    reduce: Any
    reduce_bias: Any
    expand: Any
    expand_bias: Any


class Channels(NamedTuple):
    """The vector of all channels: which one each element is, and whether it is one."""

    c: Any
    known: Any


class Normal(NamedTuple):
    """The GroupNorm of one map: slope, u, intercept + slope * bias; then what leads to them.

    That is scale, one over the deviation, M, P and the bias, the last three minus the group's mean.
    """

    slope: Any
    u: Any
    low: Any
    scale: Any
    inverse: Any
    mean: Any
    pooled: Any
    bias: Any


@triton.jit
def _vector(K: tl.constexpr):
    size: tl.constexpr = K.C // K.GROUPS
    i = tl.arange(0, K.GROUPS * K.SPAN)
    return Channels(i // K.SPAN * size + i % K.SPAN, i % K.SPAN < size)


@triton.jit
def _load(pointer, i, known, REAL: tl.constexpr):
    return tl.load(pointer + i, mask=known, other=0.0).to(REAL)


@triton.jit
def _channels(pointer, at, REAL: tl.constexpr):
    return _load(pointer, at.c, at.known, REAL)


@triton.jit
def _statistic(pointer, at):
    # Other programs of the same launch may have written it.
    return tl.load(pointer + at.c, mask=at.known, other=0.0, cache_modifier=".cg")


@triton.jit
def _group_mean(b_value, K: tl.constexpr):
    """The mean of its group for every channel; `b_value` is 0 where there is no channel."""
    means = tl.sum(tl.reshape(b_value, (K.GROUPS, K.SPAN)), 1) / (K.C // K.GROUPS)
    return tl.reshape(tl.broadcast_to(means[:, None], (K.GROUPS, K.SPAN)), (K.GROUPS * K.SPAN,))


@triton.jit
def _normal(statistics, stride, parameters, branch: tl.constexpr, at, K: tl.constexpr):
    """The `Normal` of one map; mean, variance and upsampled mean are `stride` apart."""
    b_bias = tl.zeros_like(at.c).to(K.REAL)
    if K.HAS_BIAS:
        b_bias = _channels(parameters[6 + branch], at, K.REAL)
    b_mean = _statistic(statistics, at) + b_bias
    b_group = _group_mean(b_mean, K)
    b_mean = tl.where(at.known, b_mean - b_group, 0.0)
    b_variance = _statistic(statistics + stride, at) + b_mean * b_mean
    # A literal would be rounded to float32, and all there is for a map that does not exist is EPS.
    b_inverse = tl.rsqrt(_group_mean(b_variance, K) + tl.full((), K.EPS, K.REAL))
    b_pooled = _statistic(statistics + 2 * stride, at) + b_bias - b_group
    b_bias -= b_group
    b_scale = _channels(parameters[branch], at, K.REAL)
    b_slope = b_scale * b_inverse
    b_shift = _channels(parameters[3 + branch], at, K.REAL)
    b_u, b_low = b_shift + b_slope * b_pooled, b_shift + b_slope * b_bias
    return Normal(b_slope, b_u, b_low, b_scale, b_inverse, b_mean, b_pooled, b_bias)


@triton.jit
def _weigh(b_u, share, parameters, at, K: tl.constexpr):
    """The weight of a map, and its derivative by what the gate puts in front of its ReLU."""
    weight = share
    derivative = 0.0 * share
    if K.HAS_GATE:
        x = tl.sum(_channels(parameters.gate, at, K.REAL) * b_u, 0) + tl.load(parameters.gate_bias).to(K.REAL)
        opened = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        weight = tl.minimum(opened + 3, 6.0, propagate_nan=tl.PropagateNan.ALL) / 6 * share
        derivative = tl.where((x > 0) & (x < 3), share * SIXTH, 0.0)
    return weight, derivative


@triton.jit
def _matrix(pointer, i, j, known_i, known_j, COLUMNS: tl.constexpr, REAL: tl.constexpr):
    """Rows i and columns j of a matrix."""
    place = pointer + i[:, None] * COLUMNS + j[None, :]
    return tl.load(place, mask=known_i[:, None] & known_j[None, :], other=0.0).to(REAL)


@triton.jit
def _hidden(b_p, r, parameters, at, K: tl.constexpr):
    """The rows r of the first matrix, and of its product in front of the ReLU."""
    b_rows = _matrix(parameters.reduce, r, at.c, r < K.R, at.known, K.C, K.REAL)
    return b_rows, tl.sum(b_rows * b_p[None, :], 1) + _load(parameters.reduce_bias, r, r < K.R, K.REAL)


@triton.jit
def _line_scale(kind, REAL: tl.constexpr):
    """What y is multiplied with, and what is added, for a1, b1, a2, b2."""
    scale = tl.where(kind % 2 == 0, 2.0, 1.0).to(REAL)
    return scale, tl.where(kind == 0, 0.0, tl.where(kind == 2, -1.0, -0.5)).to(REAL)


@triton.jit(do_not_specialize=["batch"])
def forward_kernel(
    partial,
    statistics,
    share,
    coefficients,
    pooled,
    counters,
    problems,
    slots,
    parameters,
    batch,
    K: tl.constexpr,
):
    """Grid (maps, blocks of C): the statistics of the maps, and by the last program of a slot its coefficients.

    `partial` is (tiles, 3, C), `statistics` (3, L, 3, N, C), `share` (L, 3), `coefficients` (L, N, KINDS, C), `pooled`
    (L, N, C); `slots` has problem and image of every level, branch and image; `counters` (L, N) are zero.
    """
    merge_sums(partial, statistics, problems, slots, K.C, K.TILE_H, K.TILE_W, K.BLOCK_T, K.BLOCK_C, K.REAL)
    level, image = tl.program_id(0) // (3 * batch), tl.program_id(0) % batch
    slot = level * batch + image
    if is_last(counters + slot, 3 * tl.num_programs(1)):
        at = _vector(K)
        statistics += (level * 3 * batch + image) * K.C
        coefficients += slot * (K.KINDS * K.C)
        b_d = tl.zeros((K.GROUPS * K.SPAN,), dtype=K.REAL)
        b_p = tl.zeros((K.GROUPS * K.SPAN,), dtype=K.REAL)
        for branch in tl.static_range(3):
            n = _normal(statistics + branch * batch * K.C, tl.num_programs(0) * K.C, parameters, branch, at, K)
            weight, _slope = _weigh(n.u, tl.load(share + level * 3 + branch), parameters, at, K)
            tl.store(coefficients + branch * K.C + at.c, n.slope * weight, mask=at.known)
            b_d += n.low * weight
            b_p += tl.where(at.known, n.u * weight, 0.0)
        tl.store(coefficients + 3 * K.C + at.c, b_d, mask=at.known)
        if K.KINDS == 8:
            tl.store(pooled + slot * K.C + at.c, b_p, mask=at.known)
            i = tl.arange(0, K.BLOCK_O)
            x = _load(parameters.expand_bias, i, i < 4 * K.C, K.REAL) + 3
            for number in range((K.R + K.BLOCK_R - 1) // K.BLOCK_R):
                r = number * K.BLOCK_R + tl.arange(0, K.BLOCK_R)
                _b_rows, hidden = _hidden(b_p, r, parameters, at, K)
                hidden = tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL)
                x += tl.sum(_matrix(parameters.expand, i, r, i < 4 * K.C, r < K.R, K.R, K.REAL) * hidden[None, :], 1)
            x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
            y = tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL) / 6
            line_scale, line_shift = _line_scale(i // K.C, K.REAL)
            tl.store(coefficients + 4 * K.C + i, y * line_scale + line_shift, mask=i < 4 * K.C)


@triton.jit
def _backward_network(partial, runs, coefficients, b_p, sums, parameters, at, K: tl.constexpr):
    """The gradient of p; the network's part of a row of `sums`."""
    i = tl.arange(0, K.BLOCK_O)
    known = i < 4 * K.C
    g_line = sum_rows(partial + 4 * K.C, runs, K.KINDS * K.C, i, known, 4, K.REAL)
    # The hard sigmoid is flat where a coefficient is at an end of its range.
    line_scale, line_shift = _line_scale(i // K.C, K.REAL)
    line = _load(coefficients + 4 * K.C, i, known, K.REAL)
    g_line = tl.where((line > line_shift) & (line < line_shift + line_scale), g_line * line_scale * SIXTH, 0.0)
    tl.store(sums + LINES * K.C + i, g_line, mask=known)
    factors = sums + (LINES + 4) * K.C + K.R + 1
    tl.store(factors + at.c, b_p, mask=at.known)
    g_p = tl.zeros((K.GROUPS * K.SPAN,), dtype=K.REAL)
    for number in range((K.R + K.BLOCK_R - 1) // K.BLOCK_R):
        r = number * K.BLOCK_R + tl.arange(0, K.BLOCK_R)
        b_rows, x = _hidden(b_p, r, parameters, at, K)
        g_x = tl.sum(_matrix(parameters.expand, i, r, known, r < K.R, K.R, K.REAL) * g_line[:, None], 0)
        g_x = tl.where(x > 0, g_x, 0.0)
        g_p += tl.sum(b_rows * g_x[:, None], 0)
        tl.store(sums + (LINES + 4) * K.C + r, g_x, mask=r < K.R)
        tl.store(factors + K.C + r, tl.maximum(x, 0.0), mask=r < K.R)
    return g_p


@triton.jit(do_not_specialize=["batch", "stride"])
def backward_kernel(
    partial,
    bounds,
    coefficients,
    pooled,
    statistics,
    grad_statistics,
    share,
    sums,
    parameters,
    batch,
    stride,
    K: tl.constexpr,
):
    """Grid (slots,): the gradients of the statistics, which are `stride` apart, and a row of `sums`.

    The gradients of a slot's coefficients are the sum of some rows of `partial` (runs, KINDS, C); `bounds` (slots, 2)
    has the first of them, and how many there are.
    """
    slot = tl.program_id(0)
    level, image = slot // batch, slot % batch
    at = _vector(K)
    c, known = at
    coefficients += slot * (K.KINDS * K.C)
    sums += slot * ((LINES + K.KINDS - 4) * K.C + K.R + 1 + (K.KINDS // 8) * (K.C + K.R))
    runs = tl.load(bounds + slot * 2 + 1)
    partial += tl.load(bounds + slot * 2).to(tl.int64) * (K.KINDS * K.C)
    g_d = sum_rows(partial + 3 * K.C, runs, K.KINDS * K.C, c, known, 8, K.REAL)
    g_p = tl.zeros((K.GROUPS * K.SPAN,), dtype=K.REAL)
    if K.KINDS == 8:
        b_p = _channels(pooled + slot * K.C, at, K.REAL)
        g_p = _backward_network(partial, runs, coefficients, b_p, sums, parameters, at, K)
    g_gate_weight = tl.zeros((K.GROUPS * K.SPAN,), dtype=K.REAL)
    g_gate_bias = tl.zeros((), dtype=K.REAL)
    for branch in tl.static_range(3):
        first = ((level * 3 + branch) * batch + image) * K.C
        n = _normal(statistics + first, stride, parameters, branch, at, K)
        weight, derivative = _weigh(n.u, tl.load(share + level * 3 + branch), parameters, at, K)
        g_a = sum_rows(partial + branch * K.C, runs, K.KINDS * K.C, c, known, 8, K.REAL)
        g_gate = tl.sum(g_a * n.slope + g_d * n.low + g_p * n.u, 0) * derivative
        g_low = g_d * weight
        g_u = g_p * weight
        if K.HAS_GATE:
            g_u += g_gate * _channels(parameters.gate, at, K.REAL)
        g_gate_weight += g_gate * n.u
        g_gate_bias += g_gate
        # u and low are shift + slope * (P or bias - mean_g M).
        g_shift = g_u + g_low
        g_slope = g_a * weight + g_u * n.pooled + g_low * n.bias
        g_variance = -0.5 * n.inverse * n.inverse * n.inverse * _group_mean(g_slope * n.scale, K)
        g_mean = 2 * g_variance * n.mean - _group_mean(g_shift * n.slope, K)
        g_pooled = g_u * n.slope
        target = grad_statistics + first + c
        tl.store(target, g_mean, mask=known)
        tl.store(target + stride, g_variance, mask=known)
        tl.store(target + 2 * stride, g_pooled, mask=known)
        tl.store(sums + branch * K.C + c, g_slope * n.inverse, mask=known)
        tl.store(sums + (3 + branch) * K.C + c, g_shift, mask=known)
        tl.store(sums + (BIASES + branch) * K.C + c, g_mean + g_pooled + g_low * n.slope, mask=known)
    tl.store(sums + GATE * K.C + c, g_gate_weight, mask=known)
    tl.store(sums + (LINES + K.KINDS - 4) * K.C + K.R, g_gate_bias)


@triton.jit
def add_parameters(
    number,
    sums,
    grads,
    slots,
    C: tl.constexpr,
    R: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """One block of the gradients of the parameters: of the two matrices first, then of the columns only to be added up.

    `grads` is flat: the gradient of `expand` (4C, R), that of `reduce` (R, C), and the columns. Sums over the slots are
    taken in their order. R is 0 where there are no matrices.
    """
    columns: tl.constexpr = (LINES + KINDS - 4) * C + R + 1
    pitch: tl.constexpr = columns + KINDS // 8 * (C + R)
    lines: tl.constexpr = (4 * C + BLOCK - 1) // BLOCK
    channels: tl.constexpr = (C + BLOCK - 1) // BLOCK
    hidden: tl.constexpr = (R + BLOCK - 1) // BLOCK
    products: tl.constexpr = (lines + channels) * hidden
    if number < products:
        # Either matrix has the hidden units on one side: the row's block, then the column's.
        is_expand = number < lines * hidden
        across = tl.where(is_expand, hidden, channels)
        block = tl.where(is_expand, number, number - lines * hidden)
        height, width = tl.where(is_expand, 4 * C, R), tl.where(is_expand, R, C)
        i = block // across * BLOCK + tl.arange(0, BLOCK)
        j = block % across * BLOCK + tl.arange(0, BLOCK)
        left = tl.where(is_expand, LINES * C, (LINES + 4) * C) + i
        right = tl.where(is_expand, columns + C, columns) + j
        total = tl.zeros((BLOCK, BLOCK), dtype=REAL)
        first = 0
        while first < slots:
            slot = first + tl.arange(0, 16)
            there = slot < slots
            here = sums + slot * pitch
            b_left = tl.load(here[None, :] + left[:, None], mask=there[None, :] & (i < height)[:, None], other=0.0)
            b_right = tl.load(here[:, None] + right[None, :], mask=there[:, None] & (j < width)[None, :], other=0.0)
            total = tl.dot(b_left, b_right, total, input_precision="ieee", out_dtype=REAL)
            first += 16
        target = grads + tl.where(is_expand, 0, 4 * C * R) + i[:, None] * width + j[None, :]
        tl.store(target, total.to(grads.dtype.element_ty), mask=(i < height)[:, None] & (j < width)[None, :])
    else:
        i = (number - products) * BLOCK + tl.arange(0, BLOCK)
        added = sum_rows(sums, slots, pitch, i, i < columns, 16, REAL)
        tl.store(grads + 5 * C * R + i, added.to(grads.dtype.element_ty), mask=i < columns)
