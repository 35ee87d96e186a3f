"""The Triton kernels of a block's coefficients: from three numbers of every map's channels to the lines of the tail.

For one level and image, with branches k, groups g of C / GROUPS channels, M = mean + bias and P = pooled + bias:

    slope = scale / sqrt(mean_g(variance + (M - mean_g M)^2) + eps),    intercept = shift - slope * mean_g M
    u_k = slope * P + intercept                     the mean of the normalised, upsampled map
    w_k = share_k * hardsigmoid(relu(gate . u_k))   the weight of the map, share_k without a gate
    A_k = slope * w_k,    D = sum_k w_k (intercept + slope * bias)
    p = sum_k w_k u_k                               the mean of what is activated
    y = hardsigmoid(expand . relu(reduce . p)),     a1 = 2 y, b1 = y - 1/2, a2 = 2 y - 1, b2 = y - 1/2

A program has a level and an image, together a slot, and all channels as one vector of GROUPS * SPAN elements: SPAN is
the size of a group, rounded up to a power of two, and `known` says which elements are channels. Names: `b_` a vector of
channels, `g_` gradients, REAL the type of everything but the parameters. KINDS is 8, or 4 without the last line.

One row of `partial` is what the gradients of the parameters are made of, from one slot: C columns each for the three
scales, shifts and biases and for the gate's weight, 4C for the gradient in front of the hard sigmoid, R for that in
front of the ReLU, and one for the gate's bias, all of which are only to be added up; then C for p and R for relu(reduce
. p), the other factors of the matrices' gradients.
"""

import triton
import triton.language as tl

SCALES = tl.constexpr(0)
SHIFTS = tl.constexpr(3)
BIASES = tl.constexpr(6)
GATE = tl.constexpr(9)
LINES = tl.constexpr(10)
# The derivative of PyTorch's hard sigmoid is the float32 next to 1/6, for float64 as well.
SIXTH = tl.constexpr(0.16666667163372040)


@triton.jit
def _vector(C: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr):
    size: tl.constexpr = C // GROUPS
    i = tl.arange(0, GROUPS * SPAN)
    return i // SPAN * size + i % SPAN, i % SPAN < size


@triton.jit
def _load(pointer, c, known, REAL: tl.constexpr):
    return tl.load(pointer + c, mask=known, other=0.0).to(REAL)


@triton.jit
def _group_mean(b_value, C: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr):
    """The mean of its group for every channel; `b_value` is 0 where there is no channel."""
    means = tl.sum(tl.reshape(b_value, (GROUPS, SPAN)), 1) / (C // GROUPS)
    return tl.reshape(tl.broadcast_to(means[:, None], (GROUPS, SPAN)), (GROUPS * SPAN,))


@triton.jit
def _normal(
    statistics, stride, scale, shift, bias, c, known,
    HAS_BIAS: tl.constexpr, EPS: tl.constexpr, C: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """The GroupNorm of one map.

    Returns:
        slope, u, intercept + slope * bias, then what leads to them: scale, one over the deviation, M, P and the bias,
        each minus the group's mean.
    """
    b_bias = tl.zeros_like(c).to(REAL)
    if HAS_BIAS:
        b_bias = _load(bias, c, known, REAL)
    b_mean = _load(statistics, c, known, REAL) + b_bias
    b_group = _group_mean(b_mean, C, GROUPS, SPAN)
    b_mean = tl.where(known, b_mean - b_group, 0.0)
    b_variance = _load(statistics + stride, c, known, REAL) + b_mean * b_mean
    # A literal would be rounded to float32, and all there is for a map that does not exist is EPS.
    b_inverse = tl.rsqrt(_group_mean(b_variance, C, GROUPS, SPAN) + tl.full((), EPS, REAL))
    b_pooled = _load(statistics + 2 * stride, c, known, REAL) + b_bias - b_group
    b_bias -= b_group
    b_scale = _load(scale, c, known, REAL)
    b_slope = b_scale * b_inverse
    b_shift = _load(shift, c, known, REAL)
    return (
        b_slope,
        b_shift + b_slope * b_pooled,
        b_shift + b_slope * b_bias,
        b_scale,
        b_inverse,
        b_mean,
        b_pooled,
        b_bias,
    )


@triton.jit
def _weigh(b_u, share, gate, gate_bias, c, known, HAS_GATE: tl.constexpr, REAL: tl.constexpr):
    """The weight of a map, and its derivative by what the gate puts in front of its ReLU."""
    weight = share
    derivative = 0.0 * share
    if HAS_GATE:
        x = tl.sum(_load(gate, c, known, REAL) * b_u, 0) + tl.load(gate_bias).to(REAL)
        opened = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        weight = tl.minimum(opened + 3, 6.0, propagate_nan=tl.PropagateNan.ALL) / 6 * share
        derivative = tl.where((x > 0) & (x < 3), share * SIXTH, 0.0)
    return weight, derivative


@triton.jit
def _branch(
    branch, statistics, stride, share, scale, shift, bias, gate, gate_bias, c, known,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, EPS: tl.constexpr,
    C: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """A branch's A, and its parts of D and p."""
    b_slope, b_u, b_low, _, _, _, _, _ = _normal(
        statistics, stride, scale, shift, bias, c, known, HAS_BIAS, EPS, C, GROUPS, SPAN, REAL
    )
    weight, _ = _weigh(b_u, tl.load(share + branch), gate, gate_bias, c, known, HAS_GATE, REAL)
    return b_slope * weight, b_low * weight, tl.where(known, b_u * weight, 0.0)


@triton.jit
def _matrix(pointer, i, j, known_i, known_j, COLUMNS: tl.constexpr, REAL: tl.constexpr):
    """Rows i and columns j of a matrix."""
    place = pointer + i[:, None] * COLUMNS + j[None, :]
    return tl.load(place, mask=known_i[:, None] & known_j[None, :], other=0.0).to(REAL)


@triton.jit
def _hidden(
    b_p, r, reduce, reduce_bias, c, known, C: tl.constexpr, R: tl.constexpr, REAL: tl.constexpr
):  # fmt: skip
    """The rows r of the first matrix, and of its product in front of the ReLU."""
    b_rows = _matrix(reduce, r, c, r < R, known, C, REAL)
    return b_rows, tl.sum(b_rows * b_p[None, :], 1) + _load(reduce_bias, r, r < R, REAL)


@triton.jit
def _line_scale(kind, REAL: tl.constexpr):
    """What y is multiplied with, and what is added, for a1, b1, a2, b2."""
    scale = tl.where(kind % 2 == 0, 2.0, 1.0).to(REAL)
    return scale, tl.where(kind == 0, 0.0, tl.where(kind == 2, -1.0, -0.5)).to(REAL)


@triton.jit
def forward_kernel(
    statistics, share, coefficients, pooled,
    scale0, scale1, scale2, shift0, shift1, shift2, bias0, bias1, bias2, gate, gate_bias,
    reduce, reduce_bias, expand, expand_bias, batch, stride,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, KINDS: tl.constexpr, EPS: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Grid (slots, blocks of the 4C lines): `statistics` is (3, L, 3, N, C), kinds `stride` apart; `share` (L, 3)."""
    slot = tl.program_id(0)
    level, image = slot // batch, slot % batch
    c, known = _vector(C, GROUPS, SPAN)
    statistics += (level * 3 * batch + image) * C
    share += level * 3
    step = batch * C
    a0, d0, p0 = _branch(
        0, statistics, stride, share, scale0, shift0, bias0, gate, gate_bias, c, known,
        HAS_BIAS, HAS_GATE, EPS, C, GROUPS, SPAN, REAL,
    )  # fmt: skip
    a1, d1, p1 = _branch(
        1, statistics + step, stride, share, scale1, shift1, bias1, gate, gate_bias, c, known,
        HAS_BIAS, HAS_GATE, EPS, C, GROUPS, SPAN, REAL,
    )  # fmt: skip
    a2, d2, p2 = _branch(
        2, statistics + 2 * step, stride, share, scale2, shift2, bias2, gate, gate_bias, c, known,
        HAS_BIAS, HAS_GATE, EPS, C, GROUPS, SPAN, REAL,
    )  # fmt: skip
    coefficients += slot * (KINDS * C)
    if tl.program_id(1) == 0:
        tl.store(coefficients + c, a0, mask=known)
        tl.store(coefficients + C + c, a1, mask=known)
        tl.store(coefficients + 2 * C + c, a2, mask=known)
        tl.store(coefficients + 3 * C + c, d0 + d1 + d2, mask=known)
    if KINDS == 8:
        b_p = p0 + p1 + p2
        tl.store(pooled + slot * C + c, b_p, mask=known & (tl.program_id(1) == 0))
        i = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        total = tl.zeros((BLOCK_O, BLOCK_R), dtype=REAL)
        for number in range((R + BLOCK_R - 1) // BLOCK_R):
            r = number * BLOCK_R + tl.arange(0, BLOCK_R)
            _, x = _hidden(b_p, r, reduce, reduce_bias, c, known, C, R, REAL)
            x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
            total += _matrix(expand, i, r, i < 4 * C, r < R, R, REAL) * x[None, :]
        x = tl.sum(total, 1) + _load(expand_bias, i, i < 4 * C, REAL) + 3
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL) / 6
        line_scale, line_shift = _line_scale(i // C, REAL)
        tl.store(coefficients + 4 * C + i, y * line_scale + line_shift, mask=i < 4 * C)


@triton.jit
def _line_gradient(grad, coefficients, i, C: tl.constexpr, REAL: tl.constexpr):
    """The gradient in front of the hard sigmoid, whose flat parts are where a coefficient is at an end of its range."""
    line_scale, line_shift = _line_scale(i // C, REAL)
    line = _load(coefficients + 4 * C, i, i < 4 * C, REAL)
    g_line = _load(grad + 4 * C, i, i < 4 * C, REAL)
    return tl.where((line > line_shift) & (line < line_shift + line_scale), g_line * line_scale * SIXTH, 0.0)


@triton.jit
def _backward_network(
    grad, coefficients, b_p, partial, reduce, reduce_bias, expand, c, known,
    C: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """The gradient of p; the network's part of a row of `partial`. BLOCK_O covers all lines."""
    i = tl.arange(0, BLOCK_O)
    g_line = _line_gradient(grad, coefficients, i, C, REAL)
    tl.store(partial + LINES * C + i, g_line, mask=i < 4 * C)
    factors = partial + (LINES + 4) * C + R + 1
    tl.store(factors + c, b_p, mask=known)
    g_p = tl.zeros((GROUPS * SPAN,), dtype=REAL)
    for number in range((R + BLOCK_R - 1) // BLOCK_R):
        r = number * BLOCK_R + tl.arange(0, BLOCK_R)
        b_rows, x = _hidden(b_p, r, reduce, reduce_bias, c, known, C, R, REAL)
        g_x = tl.sum(_matrix(expand, i, r, i < 4 * C, r < R, R, REAL) * g_line[:, None], 0)
        g_x = tl.where(x > 0, g_x, 0.0)
        g_p += tl.sum(b_rows * g_x[:, None], 0)
        tl.store(partial + (LINES + 4) * C + r, g_x, mask=r < R)
        tl.store(factors + C + r, tl.maximum(x, 0.0), mask=r < R)
    return g_p


@triton.jit
def _backward_branch(
    branch, grad, g_p, statistics, grad_statistics, stride, share, partial,
    scale, shift, bias, gate, gate_bias, c, known,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, EPS: tl.constexpr,
    C: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """The gradients of one map's statistics; the branch's part of a row of `partial`.

    Returns:
        The gradients of the gate's weight and bias.
    """
    b_slope, b_u, b_low, b_scale, b_inverse, b_mean, b_pooled, b_bias = _normal(
        statistics, stride, scale, shift, bias, c, known, HAS_BIAS, EPS, C, GROUPS, SPAN, REAL
    )
    weight, derivative = _weigh(b_u, tl.load(share + branch), gate, gate_bias, c, known, HAS_GATE, REAL)
    g_a = _load(grad + branch * C, c, known, REAL)
    g_d = _load(grad + 3 * C, c, known, REAL)
    g_gate = tl.sum(g_a * b_slope + g_d * b_low + g_p * b_u, 0) * derivative
    g_low = g_d * weight
    g_u = g_p * weight
    if HAS_GATE:
        g_u += g_gate * _load(gate, c, known, REAL)
    # u and low are shift + slope * (P or bias - mean_g M).
    g_shift = g_u + g_low
    g_slope = g_a * weight + g_u * b_pooled + g_low * b_bias
    g_variance = -0.5 * b_inverse * b_inverse * b_inverse * _group_mean(g_slope * b_scale, C, GROUPS, SPAN)
    g_mean = 2 * g_variance * b_mean - _group_mean(g_shift * b_slope, C, GROUPS, SPAN)
    g_pooled = g_u * b_slope
    tl.store(grad_statistics + c, g_mean, mask=known)
    tl.store(grad_statistics + stride + c, g_variance, mask=known)
    tl.store(grad_statistics + 2 * stride + c, g_pooled, mask=known)
    tl.store(partial + (SCALES + branch) * C + c, g_slope * b_inverse, mask=known)
    tl.store(partial + (SHIFTS + branch) * C + c, g_shift, mask=known)
    tl.store(partial + (BIASES + branch) * C + c, g_mean + g_pooled + g_low * b_slope, mask=known)
    return g_gate * b_u, g_gate


@triton.jit
def backward_kernel(
    grad, coefficients, pooled, statistics, grad_statistics, share, partial,
    scale0, scale1, scale2, shift0, shift1, shift2, bias0, bias1, bias2, gate, gate_bias,
    reduce, reduce_bias, expand, batch, stride,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, KINDS: tl.constexpr, EPS: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, COLUMNS: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Grid (slots,): the gradients of the statistics, and a row of `partial` (slots, COLUMNS)."""
    slot = tl.program_id(0)
    level, image = slot // batch, slot % batch
    c, known = _vector(C, GROUPS, SPAN)
    first = (level * 3 * batch + image) * C
    statistics += first
    grad_statistics += first
    share += level * 3
    step = batch * C
    grad += slot * (KINDS * C)
    coefficients += slot * (KINDS * C)
    partial += slot * COLUMNS
    g_p = tl.zeros((GROUPS * SPAN,), dtype=REAL)
    if KINDS == 8:
        b_p = _load(pooled + slot * C, c, known, REAL)
        g_p = _backward_network(
            grad, coefficients, b_p, partial, reduce, reduce_bias, expand, c, known,
            C, R, GROUPS, SPAN, BLOCK_R, BLOCK_O, REAL,
        )  # fmt: skip
    g_gate0, g_open0 = _backward_branch(
        0, grad, g_p, statistics, grad_statistics, stride, share, partial, scale0, shift0, bias0, gate, gate_bias,
        c, known, HAS_BIAS, HAS_GATE, EPS, C, GROUPS, SPAN, REAL,
    )  # fmt: skip
    g_gate1, g_open1 = _backward_branch(
        1, grad, g_p, statistics + step, grad_statistics + step, stride, share, partial, scale1, shift1, bias1,
        gate, gate_bias, c, known, HAS_BIAS, HAS_GATE, EPS, C, GROUPS, SPAN, REAL,
    )  # fmt: skip
    g_gate2, g_open2 = _backward_branch(
        2, grad, g_p, statistics + 2 * step, grad_statistics + 2 * step, stride, share, partial, scale2, shift2, bias2,
        gate, gate_bias, c, known, HAS_BIAS, HAS_GATE, EPS, C, GROUPS, SPAN, REAL,
    )  # fmt: skip
    tl.store(partial + GATE * C + c, g_gate0 + g_gate1 + g_gate2, mask=known)
    tl.store(partial + LINES * C + (KINDS - 4) * C + R, g_open0 + g_open1 + g_open2)


@triton.jit
def parameters_kernel(
    partial, grads, slots,
    C: tl.constexpr, R: tl.constexpr, SUMS: tl.constexpr, COLUMNS: tl.constexpr, MATRICES: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
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
