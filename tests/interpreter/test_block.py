"""The fused DyHead block under the interpreter: the numbers of the separate operators, forward and every gradient."""

import numpy as np
import pytest
import torch
from torch import nn

from heads import DyHead
from heads.dyhead.dyhead import ATTENTIONS
from kernels import use_backend
from kernels.block import coefficients as block_coefficients
from kernels.block import conv as block_conv
from kernels.block import tail as block_tail
from kernels.block.layout import join, layout
from kernels.runtime.tiles import Tiles
from kernels.sampling import launch as sampling

# Odd, even and one-pixel sizes; the last two levels upsample from one row or one pixel.
SIZES = ((6, 5), (3, 3), (2, 2), (1, 1))


@pytest.fixture(autouse=True)
def triton_backend(poison):
    with use_backend("triton"):
        yield


def make(
    attentions="LSC", sizes=SIZES, dtype=torch.float64, channels=16, batch=2, depth=1, mode="crop", biases=False, seed=3
):
    """A head with no parameter at its starting value, its levels, and what the outputs are multiplied with."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    head = DyHead(channels, depth, attentions, coarse_offsets=mode)
    for branch in head.blocks[0].spatial.branches if biases else ():
        branch.bias = nn.Parameter(torch.zeros(channels))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    features = [torch.randn(batch, channels, *size, generator=generator) for size in sizes]
    cotangents = [torch.randn(x.shape, generator=generator) for x in features]
    return head.to(dtype), [x.to(dtype).requires_grad_() for x in features], [x.to(dtype) for x in cotangents]


def results(head, features, cotangents):
    """Outputs, and gradients of levels and parameters, by name."""
    outputs = head(features)
    names = [f"level {i}" for i in range(len(features))] + [name for name, _ in head.named_parameters()]
    # With a single level the neighbours' weights are not used.
    grads = torch.autograd.grad(outputs, [*features, *head.parameters()], cotangents, allow_unused=True)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)} | dict(zip(names, grads, strict=True))
    return {name: x for name, x in found.items() if x is not None}


def check(head, features, cotangents, rtol=1e-10):
    """Fused against separate: errors relative to the largest value of the same quantity, or of all where that is 0."""
    assert head.unfused_reason(features) is None
    found = results(head, features, cotangents)
    with use_backend("torch"):
        assert head.unfused_reason(features) is not None
        expected = results(head, features, cotangents)
    assert found.keys() == expected.keys()
    largest = max(x.abs().max() for x in expected.values())
    errors = {
        name: float((found[name] - x).abs().max() / max(x.abs().max(), 1e-3 * largest)) for name, x in expected.items()
    }
    assert all(error < rtol for error in errors.values()), errors


@pytest.mark.parametrize("attentions", ATTENTIONS, ids=lambda a: a or "none")
def test_every_subset(attentions):
    # Each deformable convolution is many interpreted programs, so there are fewer of them.
    sizes = ((5, 4), (3, 2), (2, 1)) if attentions == "LSC" else ((3, 4), (2, 2))
    sampled = {"sizes": sizes, "batch": 1} if "S" in attentions else {}
    check(*make(attentions, **sampled))


def test_two_images_and_more_channels_than_a_block():
    check(*make("LS", sizes=((3, 4), (2, 2)), channels=48))


@pytest.mark.parametrize("mode", ["prefix", "resize"])
def test_every_other_way_to_coarser_offsets(mode):
    check(*make("LS", sizes=((5, 7), (3, 4)), mode=mode))


def test_biases_of_the_released_layout():
    check(*make("LSC", sizes=((3, 2), (2, 1)), biases=True))


def test_a_block_without_its_activation():
    head, features, cotangents = make("L")
    head.blocks[-1].task = nn.Identity()
    check(head, features, cotangents)


def test_several_blocks_of_more_channels_than_groups():
    check(*make("LC", depth=2, channels=48, sizes=((5, 4), (3, 2))))


def test_many_runs_and_tiles(monkeypatch):
    for name in ("_FORWARD", "_SUMS", "_MAPS"):
        monkeypatch.setattr(block_tail, name, 512)
    monkeypatch.setattr(block_tail, "_SUMS_PROGRAMS", 16)
    check(*make("C", sizes=((9, 18), (5, 9)), batch=2))


def test_float32_loses_no_more_than_the_separate_operators():
    # A group of few values has a tiny variance now and then, and then any order of operations has its own error: which
    # one is nearer in one draw is luck, so both lose what they lose in the same two draws.
    lost = {backend: {} for backend in ("torch", "triton")}
    for seed in (3, 4):
        with use_backend("torch"):
            exact = results(*make(sizes=((4, 5), (2, 3)), seed=seed))
        for backend, most in lost.items():
            with use_backend(backend):
                found = results(*make(sizes=((4, 5), (2, 3)), dtype=torch.float32, seed=seed))
            for name, x in exact.items():
                most[name] = max(most.get(name, 0), float((found[name] - x).abs().max() / x.abs().max()))
    for name, error in lost["triton"].items():
        assert error <= 2 * lost["torch"][name] + 1e-6, name


@pytest.mark.parametrize("autocast", [False, True], ids=["half", "autocast"])
def test_16_bits_lose_no_more_than_the_separate_operators(autocast):
    def run(backend, dtype):
        head, features, cotangents = make(sizes=((4, 3), (2, 2)), dtype=dtype, batch=1)
        with use_backend(backend), torch.autocast("cpu", torch.float16, enabled=autocast and dtype == torch.float32):
            assert (head.unfused_reason(features) is None) == (backend == "triton")
            outputs = head(features)
        cotangents = [c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, [*features, *head.parameters()], cotangents)
        return [x.double() for x in (*outputs, *grads)]

    exact = run("torch", torch.float64)
    dtype = torch.float32 if autocast else torch.float16
    for i, (x, ours, separate) in enumerate(zip(exact, run("triton", dtype), run("torch", dtype), strict=True)):
        scale = x.abs().max()
        assert (ours - x).abs().max() <= 2 * (separate - x).abs().max() + 2e-3 * scale, i


def test_tiles_that_divide_nothing(monkeypatch):
    # As on a GPU without TF32: several blocks of input and of output channels, several tiles in both directions.
    monkeypatch.setattr(sampling, "fit", lambda *_: Tiles(4, 4, 32, 32, 4, 2))
    monkeypatch.setattr(block_conv, "_PIXELS", 8)
    monkeypatch.setattr(sampling, "_WAVES", 9 * 2 * 2 * 2)
    check(*make("S", sizes=((5, 6),), channels=48, batch=1))


def test_golden_block_of_one_level(golden):
    from golden_blocks import run_golden

    data = golden("dyhead_mmdet_c32_b1_1level")
    error = dict.fromkeys(("outputs", "grad_inputs", "grad_params_rel"), 0.0)
    count = 0
    for quantity, ours, theirs, _ in run_golden([data], error, torch.float64):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * max(1.0, np.abs(theirs).max()), err_msg=quantity)
        count += 1
    assert count > 10


def test_statistics_of_maps_far_from_zero():
    sizes = ((21, 37), (11, 19))
    tables = layout(sizes, 2, torch.device("cpu"), torch.float32)
    shapes = [p.size for p in tables.problems]
    generator = torch.Generator().manual_seed(0)
    maps = [1000 + torch.randn(2, 16, *size, generator=generator) for size in shapes]
    counters = block_tail.counters(tables).fill_(-1)
    partial = block_tail.statistics(join(maps), counters, tables)
    norms = (torch.ones(16),) * 6
    saved = block_coefficients.forward(partial, (*norms, *(None,) * 9), 16, 1e-5, counters, tables)
    mean, variance, pooled = saved.statistics
    for problem, x in zip(tables.problems, maps, strict=True):
        slot = (problem.level, problem.branch)
        exact = x.double()
        torch.testing.assert_close(mean[slot].double(), exact.mean((2, 3)), rtol=1e-6, atol=0)
        # One squared distance has the error of a number near 1000; sums of squares would have a thousand times it.
        torch.testing.assert_close(variance[slot].double(), exact.var((2, 3), correction=0), rtol=1e-4, atol=0)
        upsampled = nn.functional.interpolate(exact, size=problem.target, mode="bilinear", align_corners=True)
        torch.testing.assert_close(pooled[slot].double(), upsampled.mean((2, 3)), rtol=1e-6, atol=0)


def test_the_same_bits_twice_and_in_every_layout():
    head, features, cotangents = make("LC", sizes=((19, 35), (10, 18)), dtype=torch.float32)
    first = results(head, features, cotangents)
    last = [x.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for x in features]
    for again in (results(head, features, cotangents), results(head, last, cotangents)):
        assert all(torch.equal(x, again[name]) for name, x in first.items())


def test_ties_of_the_dynamic_relu_are_split_and_those_of_the_relu_give_nothing():
    tables = layout(((2, 2),), 1, torch.device("cpu"), torch.float32)
    sampled = torch.zeros(4, 16)
    for lines, slope in ((torch.tensor([0.0, 0, 0, 0, 2, 0, -1, 0]), 0.5), (torch.zeros(4), 0.0)):
        coefficients = lines.view(1, 1, -1, 1).repeat(1, 1, 1, 16)
        _, grad = block_tail.backward_sums(torch.ones(4, 16), sampled, coefficients, True, tables)
        torch.testing.assert_close(grad.sum(0)[3], torch.full((16,), 4 * slope))


def test_nan_reaches_the_output():
    head, features, _ = make("LC", dtype=torch.float32)
    with torch.no_grad():
        features[0][0, 3, 0, 0] = torch.nan
        assert head(features)[0][0].isnan().all()


def test_there_is_no_second_derivative():
    head, features, _ = make("LC", sizes=((2, 2),))
    (grad,) = torch.autograd.grad(head(features)[0].square().sum(), features, create_graph=True)
    with pytest.raises(NotImplementedError, match="dyhead_block has no second derivative"):
        grad.sum().backward()
