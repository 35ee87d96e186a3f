"""The coefficients of a block's tail under the interpreter: plain PyTorch's numbers, forward and every gradient.

Maps have powers of two of pixels and are one tile each, so that their statistics become sums and back without an error.
"""

import pytest
import torch
import torch.nn.functional as F

from kernels.block import coefficients as block_coefficients
from kernels.block import tail as block_tail
from kernels.block.layout import Layout, layout

GROUPS, EPS = 16, 1e-5
SIZES = ((8, 8), (4, 4), (2, 2), (1, 1))


@pytest.fixture(autouse=True)
def poisoned(poison):
    pass


def make(levels=4, batch=2, channels=32, hidden=8, gate=True, network=True, biases=(False,) * 3, dtype=torch.float64):
    """Statistics, layout, and parameters as the functions take them; gates and hard sigmoids on both sides of kinks."""
    generator = torch.Generator().manual_seed(5)

    def new(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    tables = layout(SIZES[:levels], batch, torch.device("cpu"), torch.promote_types(dtype, torch.float32), (8, 8))
    statistics = torch.randn(3, levels, 3, batch, channels, generator=generator, dtype=torch.float64)
    statistics[1].abs_()
    statistics = (statistics * (tables.share > 0)).to(tables.real).requires_grad_()
    norms = [(new(channels), new(channels), new(channels) if biased else None) for biased in biases]
    gate = (new(1, channels, scale=2 / channels**0.5), new(1)) if gate else None
    shapes = ((hidden, channels), (hidden,), (4 * channels, hidden), (4 * channels,))
    network = tuple(new(*shape) for shape in shapes) if network else None
    return statistics, tables, norms, gate, network


def reference(statistics, tables, norms, gate, network):
    """The definition in plain PyTorch, differentiable by autograd."""

    def of_groups(x):
        return x.unflatten(-1, (GROUPS, -1))

    mean, variance, pooled = statistics.unbind()
    scale, shift = (torch.stack([norm[i] for norm in norms])[:, None].to(mean.dtype) for i in (0, 1))
    bias = torch.stack([torch.zeros_like(norm[0]) if norm[2] is None else norm[2] for norm in norms])[:, None]
    # A bias in front of the GroupNorm moves means and nothing else, so the convolution need not add it.
    mean, pooled = mean + bias, pooled + bias

    # GroupNorm as a slope and an intercept for every channel.
    group_mean = of_groups(mean).mean(-1, keepdim=True)
    group_variance = (of_groups(variance) + (of_groups(mean) - group_mean).square()).mean(-1, keepdim=True)
    slope = (of_groups(scale) * torch.rsqrt(group_variance + EPS)).flatten(-2)
    intercept = shift - (of_groups(slope) * group_mean).flatten(-2)
    pooled = slope * pooled + intercept
    intercept = intercept + slope * bias

    weight = share = tables.share
    if gate is not None:
        weight = F.hardsigmoid(F.relu(F.linear(pooled, *(x.to(mean.dtype) for x in gate)))) * share
    lines = [*(slope * weight).unbind(1), (intercept * weight).sum(1)]
    if network is not None:
        first, first_bias, second, second_bias = (x.to(mean.dtype) for x in network)
        y = F.hardsigmoid(F.linear(F.relu(F.linear((pooled * weight).sum(1), first, first_bias)), second, second_bias))
        y0, y1, y2, y3 = y.chunk(4, -1)
        lines += [2 * y0, y1 - 0.5, 2 * y2 - 1, y3 - 0.5]
    return torch.stack(lines, 2)


def flat(norms, gate, network):
    """The parameters in the kernels' order; zeros for a bias where others have one."""
    scales, shifts, biases = zip(*norms, strict=True)
    if any(bias is not None for bias in biases):
        biases = [torch.zeros_like(scale) if bias is None else bias for scale, bias in zip(scales, biases, strict=True)]
    return *scales, *shifts, *biases, *(gate or (None,) * 2), *(network or (None,) * 4)


def coefficients(statistics, tables, norms, gate, network):
    """The kernels' coefficients, differentiable by autograd."""
    return Kernels.apply(statistics, tables, *flat(norms, gate, network))


class Kernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, statistics, tables, *parameters):
        ctx.tables, counters = tables, block_tail.counters(tables).zero_()
        rows = []
        for p in tables.problems:
            pixels, target = (height * width for height, width in (p.size, p.target))
            rows.append(statistics[:, p.level, p.branch] * torch.tensor([pixels, pixels, target])[:, None, None])
        partial = torch.cat(rows, 1).transpose(0, 1).contiguous()
        ctx.saved = block_coefficients.forward(partial, parameters, GROUPS, EPS, counters, tables)
        same = (ctx.saved.statistics == statistics) | ~statistics.isfinite().all(0)
        assert same.all()
        return ctx.saved.coefficients.clone()

    @staticmethod
    def backward(ctx, grad):
        # Every level and image is one piece less than half, and the rest.
        tables, channels = ctx.tables, grad.shape[-1]
        pieces = torch.stack([0.25 * grad, 0.75 * grad], 2).flatten(0, 2)
        bounds = torch.tensor([[2 * i, 2] for i in range(len(pieces) // 2)], dtype=torch.int32)
        grad_statistics, sums = block_coefficients.backward(pieces, bounds, ctx.saved, GROUPS, EPS, tables)
        maps = (grad.new_zeros(rows, channels) for rows in (tables.rows, tables.sampled_rows))
        _, grads = block_tail.backward_maps(*maps, ctx.saved, grad_statistics, sums, tables, to_sampled=False)
        return grad_statistics, None, *grads


def results(function, arguments):
    """The coefficients and all gradients, by name; a parameter that got none is missing."""
    statistics, _, norms, gate, network = arguments
    out = function(*arguments)
    named = {"statistics": statistics}
    for prefix, tensors in (("norm 0", norms[0]), ("norm 1", norms[1]), ("norm 2", norms[2]), ("gate", gate or ())):
        named |= {f"{prefix}, {i}": x for i, x in enumerate(tensors) if x is not None}
    named |= {f"network, {i}": x for i, x in enumerate(network or ())}
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(out.dtype)
    grads = torch.autograd.grad(out, list(named.values()), cotangent, allow_unused=True)
    found = {"coefficients": out.detach()} | dict(zip(named, grads, strict=True))
    return {name: x for name, x in found.items() if x is not None}


def check(arguments, absent=()):
    found, expected = results(coefficients, arguments), results(reference, arguments)
    assert set(expected) - set(found) == set(absent)
    for name, x in found.items():
        y = expected[name]
        assert x.shape == y.shape and x.dtype == y.dtype, name
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12 * float(y.abs().max()), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("network", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "mean"])
def test_gates_and_networks(gate, network):
    check(make(gate=gate, network=network))


def test_gates_and_hard_sigmoids_are_on_both_sides_of_their_kinks():
    arguments = make()
    out = results(reference, arguments)["coefficients"]
    assert all((out[:, :, 4] == y).any() for y in (0, 2)) and ((out[:, :, 4] > 0) & (out[:, :, 4] < 2)).any()
    statistics, tables, norms, (weight, bias), network = arguments
    opened = reference(statistics, tables, norms, (weight, bias), network)[:, :, :3]
    closed = reference(statistics, tables, norms, None, network)[:, :, :3]
    weights = (opened / closed).mean(-1)
    assert (weights < 0.5 + 1e-6).any() and (weights > 1 - 1e-6).any()
    assert ((weights > 0.5 + 1e-6) & (weights < 1 - 1e-6)).any()


@pytest.mark.parametrize("biases", [(True,) * 3, (False, True, False)], ids=["all", "one"])
def test_biases_in_front_of_the_norms(biases):
    check(make(biases=biases))


def test_channels_and_hidden_units_that_are_no_powers_of_two():
    check(make(levels=2, channels=48, hidden=12))


def test_one_channel_a_group():
    check(make(levels=2, channels=16, hidden=4, batch=1))


def test_one_level_has_no_neighbours():
    check(make(levels=1), absent=[f"norm {branch}, {i}" for branch in (1, 2) for i in (0, 1)])


def test_more_of_everything_than_one_block(monkeypatch):
    monkeypatch.setattr(block_coefficients, "_ELEMENTS", 256)
    monkeypatch.setattr(block_coefficients, "_MERGED", (1, 16))
    monkeypatch.setattr(block_tail, "_ADDED", 16)
    check(make(batch=5, channels=48, hidden=24))


def double(x):
    """The same in float64: tensors, layouts, and sequences of such."""
    if isinstance(x, torch.Tensor):
        return x.detach().double().requires_grad_(x.requires_grad)
    if isinstance(x, Layout):
        return layout(x.sizes, x.batch, x.device, torch.float64, x.tile)
    return None if x is None else [double(y) for y in x]


# The interpreter does not round to bfloat16 as a GPU does.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_loses_no_more_than_plain_pytorch(dtype):
    arguments = make(levels=2, dtype=dtype)
    exact = results(reference, double(arguments))
    plain, found = results(reference, arguments), results(coefficients, arguments)
    for name, x in exact.items():
        assert found[name].dtype == plain[name].dtype, name
        allowed = 2 * (plain[name] - x).abs().max() + 1e-6 * x.abs().max()
        assert (found[name] - x).abs().max() <= allowed, name


def test_statistics_far_from_zero_do_not_cancel():
    statistics, tables, norms, gate, network = make(levels=2, dtype=torch.float32)
    with torch.no_grad():
        statistics[0] += 1000 * (tables.share > 0)
        statistics[2] += 1000 * (tables.share > 0)
    exact = coefficients(statistics.double(), double(tables), norms, gate, network)
    found = coefficients(statistics, tables, norms, gate, network)
    # D itself is about 1000 slopes; the gates and the lines see differences of numbers that are near each other.
    for kinds in (slice(0, 3), slice(4, 8)):
        torch.testing.assert_close(found[:, :, kinds].double(), exact[:, :, kinds], rtol=0, atol=2e-3)


def test_nan_reaches_the_coefficients():
    arguments = make(levels=2)
    with torch.no_grad():
        arguments[0][0, 0, 0, 1, 3] = torch.nan
        out = coefficients(*arguments)
    assert out[0, 1, 3:].isnan().any(-1).all() and out[0, 1, 4:].isnan().all()
    assert not out[0, 0].isnan().any() and not out[1].isnan().any()


def test_the_same_bits_twice():
    arguments = make(dtype=torch.float32)
    first, again = (results(coefficients, arguments) for _ in range(2))
    assert all(torch.equal(x, again[name]) for name, x in first.items())
