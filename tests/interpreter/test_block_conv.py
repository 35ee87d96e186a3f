"""The convolutions of a block in one launch, and their gradients, against plain PyTorch convolution by convolution."""

import pytest
import torch

from kernels.block import conv as block_conv
from kernels.block.layout import COARSER, join, layout
from kernels.deform_conv.operator import reference
from kernels.runtime.launch import Launch
from kernels.sampling import launch as sampling

FORWARD = ["plan_kernel", "forward_kernel"]
POINTS, WEIGHTS = ["samples_kernel", "gradients_kernel"], ["weight_kernel", "sum_kernel"]


@pytest.fixture(autouse=True)
def poisoned(poison):
    """An element that nobody writes is NaN."""


@pytest.fixture
def launches(monkeypatch):
    found = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (found.append(self), run(self)))
    return found


def make(sizes=((5, 4), (3, 2)), channels=16, batch=1, crop=True, spread=1.5, dtype=torch.float64):
    """The layout; pyramid, predictions and three weights, all to be differentiated; the gradient of the output."""
    generator = torch.Generator().manual_seed(5)
    tables = layout(sizes, batch, torch.device("cpu"), dtype, (16, 16))
    rows = tables.rows + (0 if crop else tables.sampled_rows - tables.coarser_row)
    shapes = [(tables.rows, channels), (rows, 27), *[(channels, channels, 3, 3)] * 3, (tables.sampled_rows, channels)]
    *leaves, cotangent = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    leaves[1] *= spread
    return tables, [x.requires_grad_() for x in leaves], cotangent


def run(tables, leaves, cotangent, sigmoid, crop, to_pyramid=True, to_weights=True):
    """The sampled maps, and the gradients of pyramid, predictions and weights."""
    pyramid, predicted, *weights = (x.detach() for x in leaves)
    points = block_conv.Points(predicted, sigmoid, crop)
    plan = sampling.new_plan(pyramid, 9 * tables.sampled_rows)
    block_conv.run_plan(points, plan, tables)
    packed, transposed = (torch.stack([pack(w, 1) for w in weights]) for pack in (sampling.packed, sampling.transposed))
    sampled, _ = block_conv.forward(pyramid, plan, packed, tables)
    of_pyramid, of_predicted = block_conv.backward(cotangent, pyramid, points, plan, transposed, tables, to_pyramid)
    of_weights = [None] * 3
    if to_weights:
        of_weights = block_conv.backward_weights(cotangent, pyramid, plan, weights, tables)
    return [sampled, of_pyramid, of_predicted, *of_weights]


def rows(tables, matrix, row, size):
    """The map that begins with a row of a matrix."""
    count = tables.batch * size[0] * size[1]
    return matrix[row : row + count].unflatten(0, (tables.batch, *size)).permute(0, 3, 1, 2)


def points_of(tables, predicted, number, crop):
    """Offsets and masks of a problem: those of its level, or a coarser neighbour's rows for itself."""
    problem = tables.problems[number]
    if problem.branch == COARSER and not crop:
        first = tables.rows + tables.problem_rows[number] - tables.coarser_row
        return rows(tables, predicted, first, problem.size)
    height, width = problem.size
    return rows(tables, predicted, tables.level_rows[problem.level], problem.target)[:, :, :height, :width]


def expected(tables, leaves, cotangent, sigmoid, crop):
    pyramid, predicted, *weights = leaves
    maps = []
    for i, problem in enumerate(tables.problems):
        points = points_of(tables, predicted, i, crop)
        mask = points[:, 18:].sigmoid() if sigmoid else points[:, 18:]
        x = rows(tables, pyramid, tables.level_rows[problem.source], tables.sizes[problem.source])
        weight = weights[problem.branch]
        maps.append(reference(x, points[:, :18], weight, None, (problem.stride,) * 2, (1, 1), (1, 1), mask))
    sampled = join(maps)
    return [sampled.detach(), *torch.autograd.grad(sampled, leaves, cotangent, allow_unused=True)]


def check(case, sigmoid=True, crop=True):
    compare(run(*case, sigmoid, crop), expected(*case, sigmoid, crop))


def compare(found, right):
    names = ("sampled", "pyramid", "predicted", "same", "finer", "coarser")
    for name, ours, theirs in zip(names, found, right, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11 * float(theirs.abs().max()), msg=name)


@pytest.mark.parametrize(("crop", "sigmoid"), [(True, False), (False, True)], ids=["crop", "rows of their own"])
def test_gradients(crop, sigmoid, launches):
    check(make(crop=crop, batch=2 if crop else 1), sigmoid, crop)
    assert [x.kernel.__name__ for x in launches] == [*FORWARD, *POINTS, *WEIGHTS]


@pytest.mark.parametrize("sizes", [((1, 1),), ((4, 3),), ((1, 4), (1, 2), (1, 1))], ids=["1", "12", "4+2+1"])
def test_other_pyramids(sizes):
    check(make(sizes=sizes))


@pytest.mark.parametrize("inverse", [False, True])
def test_offsets_far_away_and_unreal(inverse):
    case = make(spread=4)
    with torch.no_grad():
        case[1][1][::3, :18] *= 1e12
        for row, unreal in ((1, torch.nan), (4, torch.inf), (7, -torch.inf), (22, torch.nan)):
            case[1][1][row, row % 18] = unreal
    torch.use_deterministic_algorithms(inverse)
    try:
        check(case)
    finally:
        torch.use_deterministic_algorithms(False)


def test_regular_samples():
    # At borders they lie at exactly -1 and exactly at the size.
    check(make(sizes=((4, 5), (2, 3)), batch=1, spread=0))


def test_a_piece_of_a_weight_gradient_spans_levels(monkeypatch, launches):
    monkeypatch.setattr(sampling, "multiprocessors", lambda device: 9)
    monkeypatch.setattr(sampling, "_WAVES", 2)
    check(make(sizes=((2, 3), (1, 2))))
    (weight,) = (x for x in launches if x.kernel.__name__ == "weight_kernel")
    assert weight.grid == (9, 1, 1 + 1 + 1) and weight.arguments["each"] == 2


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("crop", "batch", "sizes"), [(True, 1, ((3, 2), (2, 1), (1, 1))), (False, 2, ((2, 3),))])
def test_deterministic_algorithms_add_nothing_by_atomics(crop, batch, sizes, deterministic, launches):
    case = make(sizes=sizes, batch=batch, crop=crop)
    with torch.no_grad():
        case[1][1][::5, :18] *= 1e6
    compare(run(*case, True, crop), expected(*case, True, crop))
    pyramid = ["bins_kernel", "gather_kernel"]
    assert [x.kernel.__name__ for x in launches] == [*FORWARD, *POINTS, *pyramid, *WEIGHTS]
    assert launches[2].arguments["grad_x"] is None


def test_gradients_that_nobody_wants_are_not_made(launches):
    tables, leaves, cotangent = make(sizes=((3, 2), (2, 1)))
    right = expected(tables, leaves, cotangent, True, True)
    _, of_pyramid, found, *of_weights = run(tables, leaves, cotangent, True, True, to_pyramid=False, to_weights=False)
    assert of_pyramid is None and of_weights == [None] * 3
    torch.testing.assert_close(found, right[2], rtol=1e-10, atol=1e-10)
    assert [x.kernel.__name__ for x in launches] == [*FORWARD, *POINTS]
    assert launches[2].arguments["grad_x"] is None
