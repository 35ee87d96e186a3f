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

One row of `partial` is what the gradients of the parameters are made of, from one slot: C columns each for the three
scales, shifts and biases and for the gate's weight, 4C for the gradient in front of the hard sigmoid, R for that in
front of the ReLU, and one for the gate's bias, all of which are only to be added up; then C for p and R for relu(reduce
. p), the other factors of the matrices' gradients.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

SCALES = tl.constexpr(0)
SHIFTS = tl.constexpr(3)
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
        C, R: Channels, and hidden units of the network.
        GROUPS, SPAN: Groups, and elements of the vector for each.
        BLOCK_R, BLOCK_O: Hidden units and lines that are worked on at a time.
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
    REAL: Any


class Norm(NamedTuple):
    """(C,) parameters of a branch: scale and shift of its GroupNorm, and the bias of its convolution."""

    scale: Any
    shift: Any
    bias: Any


class Gate(NamedTuple):
    """Weight (C,) and bias (1,) of the gate of scale attention."""

    weight: Any
    bias: Any


class Network(NamedTuple):
    """The layers of dynamic ReLU: (R, C), (R,) and (4C, R); the second one's bias is asked for by the forward alone."""

    reduce: Any
    reduce_bias: Any
    expand: Any


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
def _group_mean(b_value, K: tl.constexpr):
    """The mean of its group for every channel; `b_value` is 0 where there is no channel."""
    means = tl.sum(tl.reshape(b_value, (K.GROUPS, K.SPAN)), 1) / (K.C // K.GROUPS)
    return tl.reshape(tl.broadcast_to(means[:, None], (K.GROUPS, K.SPAN)), (K.GROUPS * K.SPAN,))


@triton.jit
def _normal(statistics, stride, norm, at, K: tl.constexpr):
    """The `Normal` of one map."""
    b_bias = tl.zeros_like(at.c).to(K.REAL)
    if K.HAS_BIAS:
        b_bias = _channels(norm.bias, at, K.REAL)
    b_mean = _channels(statistics, at, K.REAL) + b_bias
    b_group = _group_mean(b_mean, K)
    b_mean = tl.where(at.known, b_mean - b_group, 0.0)
    b_variance = _channels(statistics + stride, at, K.REAL) + b_mean * b_mean
    # A literal would be rounded to float32, and all there is for a map that does not exist is EPS.
    b_inverse = tl.rsqrt(_group_mean(b_variance, K) + tl.full((), K.EPS, K.REAL))
    b_pooled = _channels(statistics + 2 * stride, at, K.REAL) + b_bias - b_group
    b_bias -= b_group
    b_scale = _channels(norm.scale, at, K.REAL)
    b_slope = b_scale * b_inverse
    b_shift = _channels(norm.shift, at, K.REAL)
    b_u, b_low = b_shift + b_slope * b_pooled, b_shift + b_slope * b_bias
    return Normal(b_slope, b_u, b_low, b_scale, b_inverse, b_mean, b_pooled, b_bias)


@triton.jit
def _weigh(b_u, share, gate, at, K: tl.constexpr):
    """The weight of a map, and its derivative by what the gate puts in front of its ReLU."""
    weight = share
    derivative = 0.0 * share
    if K.HAS_GATE:
        x = tl.sum(_channels(gate.weight, at, K.REAL) * b_u, 0) + tl.load(gate.bias).to(K.REAL)
        opened = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        weight = tl.minimum(opened + 3, 6.0, propagate_nan=tl.PropagateNan.ALL) / 6 * share
        derivative = tl.where((x > 0) & (x < 3), share * SIXTH, 0.0)
    return weight, derivative


@triton.jit
def _branch(branch, statistics, stride, share, norm, gate, at, K: tl.constexpr):
    """A branch's A, and its parts of D and p."""
    n = _normal(statistics, stride, norm, at, K)
    weight, _ = _weigh(n.u, tl.load(share + branch), gate, at, K)
    return n.slope * weight, n.low * weight, tl.where(at.known, n.u * weight, 0.0)


@triton.jit
def _matrix(pointer, i, j, known_i, known_j, COLUMNS: tl.constexpr, REAL: tl.constexpr):
    """Rows i and columns j of a matrix."""
    place = pointer + i[:, None] * COLUMNS + j[None, :]
    return tl.load(place, mask=known_i[:, None] & known_j[None, :], other=0.0).to(REAL)


@triton.jit
def _hidden(b_p, r, network, at, K: tl.constexpr):
    """The rows r of the first matrix, and of its product in front of the ReLU."""
    b_rows = _matrix(network.reduce, r, at.c, r < K.R, at.known, K.C, K.REAL)
    return b_rows, tl.sum(b_rows * b_p[None, :], 1) + _load(network.reduce_bias, r, r < K.R, K.REAL)


@triton.jit
def _line_scale(kind, REAL: tl.constexpr):
    """What y is multiplied with, and what is added, for a1, b1, a2, b2."""
    scale = tl.where(kind % 2 == 0, 2.0, 1.0).to(REAL)
    return scale, tl.where(kind == 0, 0.0, tl.where(kind == 2, -1.0, -0.5)).to(REAL)


@triton.jit
def forward_kernel(
    statistics, share, coefficients, pooled, same, finer, coarser, gate, network, bias, batch, stride, K: tl.constexpr
):
    """Grid (slots, blocks of the 4C lines): `statistics` is (3, L, 3, N, C), kinds `stride` apart; `share` (L, 3).

    `same`, `finer` and `coarser` are the `Norm` of a level itself, its finer and its coarser neighbour,
    `bias` (4C,) that of the last layer.
    """
    slot = tl.program_id(0)
    level, image = slot // batch, slot % batch
    at = _vector(K)
    statistics += (level * 3 * batch + image) * K.C
    share += level * 3
    step = batch * K.C
    a0, d0, p0 = _branch(0, statistics, stride, share, same, gate, at, K)
    a1, d1, p1 = _branch(1, statistics + step, stride, share, finer, gate, at, K)
    a2, d2, p2 = _branch(2, statistics + 2 * step, stride, share, coarser, gate, at, K)
    coefficients += slot * (K.KINDS * K.C)
    if tl.program_id(1) == 0:
        tl.store(coefficients + at.c, a0, mask=at.known)
        tl.store(coefficients + K.C + at.c, a1, mask=at.known)
        tl.store(coefficients + 2 * K.C + at.c, a2, mask=at.known)
        tl.store(coefficients + 3 * K.C + at.c, d0 + d1 + d2, mask=at.known)
    if K.KINDS == 8:
        b_p = p0 + p1 + p2
        tl.store(pooled + slot * K.C + at.c, b_p, mask=at.known & (tl.program_id(1) == 0))
        i = tl.program_id(1) * K.BLOCK_O + tl.arange(0, K.BLOCK_O)
        total = tl.zeros((K.BLOCK_O, K.BLOCK_R), dtype=K.REAL)
        for number in range((K.R + K.BLOCK_R - 1) // K.BLOCK_R):
            r = number * K.BLOCK_R + tl.arange(0, K.BLOCK_R)
            _, x = _hidden(b_p, r, network, at, K)
            x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
            total += _matrix(network.expand, i, r, i < 4 * K.C, r < K.R, K.R, K.REAL) * x[None, :]
        x = tl.sum(total, 1) + _load(bias, i, i < 4 * K.C, K.REAL) + 3
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL) / 6
        line_scale, line_shift = _line_scale(i // K.C, K.REAL)
        tl.store(coefficients + 4 * K.C + i, y * line_scale + line_shift, mask=i < 4 * K.C)


@triton.jit
def _line_gradient(grad, coefficients, i, K: tl.constexpr):
    """The gradient in front of the hard sigmoid, whose flat parts are where a coefficient is at an end of its range."""
    line_scale, line_shift = _line_scale(i // K.C, K.REAL)
    line = _load(coefficients + 4 * K.C, i, i < 4 * K.C, K.REAL)
    g_line = _load(grad + 4 * K.C, i, i < 4 * K.C, K.REAL)
    return tl.where((line > line_shift) & (line < line_shift + line_scale), g_line * line_scale * SIXTH, 0.0)


@triton.jit
def _backward_network(grad, coefficients, b_p, partial, network, at, K: tl.constexpr):
    """The gradient of p; the network's part of a row of `partial`. BLOCK_O covers all lines."""
    i = tl.arange(0, K.BLOCK_O)
    g_line = _line_gradient(grad, coefficients, i, K)
    tl.store(partial + LINES * K.C + i, g_line, mask=i < 4 * K.C)
    factors = partial + (LINES + 4) * K.C + K.R + 1
    tl.store(factors + at.c, b_p, mask=at.known)
    g_p = tl.zeros((K.GROUPS * K.SPAN,), dtype=K.REAL)
    for number in range((K.R + K.BLOCK_R - 1) // K.BLOCK_R):
        r = number * K.BLOCK_R + tl.arange(0, K.BLOCK_R)
        b_rows, x = _hidden(b_p, r, network, at, K)
        g_x = tl.sum(_matrix(network.expand, i, r, i < 4 * K.C, r < K.R, K.R, K.REAL) * g_line[:, None], 0)
        g_x = tl.where(x > 0, g_x, 0.0)
        g_p += tl.sum(b_rows * g_x[:, None], 0)
        tl.store(partial + (LINES + 4) * K.C + r, g_x, mask=r < K.R)
        tl.store(factors + K.C + r, tl.maximum(x, 0.0), mask=r < K.R)
    return g_p


@triton.jit
def _backward_branch(
    branch, grad, g_p, statistics, grad_statistics, stride, share, partial, norm, gate, at, K: tl.constexpr
):
    """The gradients of one map's statistics; the branch's part of a row of `partial`.

    Returns:
        The gradients of the gate's weight and bias.
    """
    n = _normal(statistics, stride, norm, at, K)
    weight, derivative = _weigh(n.u, tl.load(share + branch), gate, at, K)
    g_a = _channels(grad + branch * K.C, at, K.REAL)
    g_d = _channels(grad + 3 * K.C, at, K.REAL)
    g_gate = tl.sum(g_a * n.slope + g_d * n.low + g_p * n.u, 0) * derivative
    g_low = g_d * weight
    g_u = g_p * weight
    if K.HAS_GATE:
        g_u += g_gate * _channels(gate.weight, at, K.REAL)
    # u and low are shift + slope * (P or bias - mean_g M).
    g_shift = g_u + g_low
    g_slope = g_a * weight + g_u * n.pooled + g_low * n.bias
    g_variance = -0.5 * n.inverse * n.inverse * n.inverse * _group_mean(g_slope * n.scale, K)
    g_mean = 2 * g_variance * n.mean - _group_mean(g_shift * n.slope, K)
    g_pooled = g_u * n.slope
    c, known = at.c, at.known
    tl.store(grad_statistics + c, g_mean, mask=known)
    tl.store(grad_statistics + stride + c, g_variance, mask=known)
    tl.store(grad_statistics + 2 * stride + c, g_pooled, mask=known)
    tl.store(partial + (SCALES + branch) * K.C + c, g_slope * n.inverse, mask=known)
    tl.store(partial + (SHIFTS + branch) * K.C + c, g_shift, mask=known)
    tl.store(partial + (BIASES + branch) * K.C + c, g_mean + g_pooled + g_low * n.slope, mask=known)
    return g_gate * n.u, g_gate


@triton.jit
def backward_kernel(
    grad,
    coefficients,
    pooled,
    statistics,
    grad_statistics,
    share,
    partial,
    same,
    finer,
    coarser,
    gate,
    network,
    batch,
    stride,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (slots,): the gradients of the statistics, and a row of `partial` (slots, COLUMNS)."""
    slot = tl.program_id(0)
    level, image = slot // batch, slot % batch
    at = _vector(K)
    first = (level * 3 * batch + image) * K.C
    source, target = statistics + first, grad_statistics + first
    share += level * 3
    step = batch * K.C
    grad += slot * (K.KINDS * K.C)
    coefficients += slot * (K.KINDS * K.C)
    partial += slot * COLUMNS
    g_p = tl.zeros((K.GROUPS * K.SPAN,), dtype=K.REAL)
    if K.KINDS == 8:
        b_p = _channels(pooled + slot * K.C, at, K.REAL)
        g_p = _backward_network(grad, coefficients, b_p, partial, network, at, K)
    g_gate0, g_open0 = _backward_branch(0, grad, g_p, source, target, stride, share, partial, same, gate, at, K)
    source, target = source + step, target + step
    g_gate1, g_open1 = _backward_branch(1, grad, g_p, source, target, stride, share, partial, finer, gate, at, K)
    source, target = source + step, target + step
    g_gate2, g_open2 = _backward_branch(2, grad, g_p, source, target, stride, share, partial, coarser, gate, at, K)
    tl.store(partial + GATE * K.C + at.c, g_gate0 + g_gate1 + g_gate2, mask=at.known)
    tl.store(partial + LINES * K.C + (K.KINDS - 4) * K.C + K.R, g_open0 + g_open1 + g_open2)


@triton.jit
def parameters_kernel(
    partial,
    grads,
    slots,
    C: tl.constexpr,
    R: tl.constexpr,
    SUMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MATRICES: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """Grid (blocks of the two matrices, then of the SUMS columns): the sums over all slots, in order.

    `grads` is flat: the gradient of `expand` (4C, R), that of `reduce` (R, C), MATRICES elements, and the sums. R is 0
    where there are no matrices.
    """
    number = tl.program_id(0)
    lines: tl.constexpr = (4 * C + BLOCK - 1) // BLOCK
    channels: tl.constexpr = (C + BLOCK - 1) // BLOCK
    hidden: tl.constexpr = (R + BLOCK - 1) // BLOCK
    products: tl.constexpr = (lines + channels) * hidden
    if number < products:
        # Either matrix has the hidden units on one side: the row's block, then the column's.
        is_expand = number < lines * hidden
        across = tl.where(is_expand, hidden, channels)
        block = tl.where(is_expand, number, number - lines * hidden)
        rows, columns = tl.where(is_expand, 4 * C, R), tl.where(is_expand, R, C)
        i = block // across * BLOCK + tl.arange(0, BLOCK)
        j = block % across * BLOCK + tl.arange(0, BLOCK)
        left = tl.where(is_expand, LINES * C, (LINES + 4) * C) + i
        right = tl.where(is_expand, SUMS + C, SUMS) + j
        total = tl.zeros((BLOCK, BLOCK), dtype=REAL)
        for step in range(STEPS):
            slot = step * BLOCK_T + tl.arange(0, BLOCK_T)
            there = (slot < slots)[None, :]
            here = partial + slot * COLUMNS
            b_left = tl.load(here[None, :] + left[:, None], mask=there & (i < rows)[:, None], other=0.0)
            b_right = tl.load(
                here[:, None] + right[None, :], mask=(slot < slots)[:, None] & (j < columns)[None, :], other=0.0
            )
            total = tl.dot(b_left, b_right, total, input_precision="ieee", out_dtype=REAL)
        target = grads + tl.where(is_expand, 0, 4 * C * R) + i[:, None] * columns + j[None, :]
        tl.store(target, total.to(grads.dtype.element_ty), mask=(i < rows)[:, None] & (j < columns)[None, :])
    else:
        i = (number - products) * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK_T, BLOCK), dtype=REAL)
        for step in range(STEPS):
            slot = step * BLOCK_T + tl.arange(0, BLOCK_T)
            there = (slot < slots)[:, None] & (i < SUMS)[None, :]
            sums += tl.load(partial + slot[:, None] * COLUMNS + i[None, :], mask=there, other=0.0)
        tl.store(grads + MATRICES + i, tl.sum(sums, 0).to(grads.dtype.element_ty), mask=i < SUMS)
