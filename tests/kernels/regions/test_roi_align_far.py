"""RoIAlign of boxes and maps that are not finite, and of boxes far larger than the map."""

import numpy as np
import pytest
import torch

from kernels import roi_align
from kernels.regions.roi_align_samples import cells_of, grid_of, numbers_on_map


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 3])
@pytest.mark.parametrize("side", range(4))
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_a_box_that_is_not_finite_is_0_and_harms_no_other(value, side, ratio, aligned):
    check_a_box_that_is_not_finite(value, side, ratio, aligned)


def check_a_box_that_is_not_finite(value, side, ratio, aligned):
    """3e38 makes a size that is not: the opposite side lies at -3e38."""
    box = torch.tensor([[1.0, 1.0, 3.0, 3.0]]).repeat(2, 1)
    if value == 3e38:
        box[0, side % 2], box[0, side % 2 + 2] = -3e38, 3e38
    else:
        box[0, side] = value
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = roi_align(x, [box], 2, 1.0, ratio, aligned)
    assert not out[0].any()
    cot = torch.full_like(out, torch.nan).index_fill(0, torch.tensor([1]), 1.0)
    (grad,) = torch.autograd.grad(out, x, cot)
    alone = roi_align(x, [box[1:]], 2, 1.0, ratio, aligned)
    torch.testing.assert_close(out[1:], alone)
    torch.testing.assert_close(grad, torch.autograd.grad(alone.sum(), x)[0])


@pytest.mark.both_paths
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_in_a_map_reaches_the_bins_that_read_it(value):
    """One sample a bin, at cells 0.5, 2.5 and 4.5, then at whole ones, where the cell behind has a share of 0."""
    x = torch.zeros(2, 2, 6, 6, dtype=torch.float64)
    x[1, 0, 2, 3] = value
    boxes = torch.tensor([[0.0, 0, 6, 6], [0.5, 0.5, 6.5, 6.5], [0.0, 0.0, 2.0, 2.0]], dtype=torch.float64)
    out = roi_align(x, [boxes, boxes], 3, 1.0, 1)
    spoiled = torch.zeros(6, 2, 3, 3, dtype=torch.bool)
    spoiled[3, 0, 1, 1] = True  # Cells 2 and 3, along both axes.
    # At 1, 3 and 5: y 1 reads rows 1 and 2, x 3 reads columns 3 and 4. Row 2 has a share of 0; 0 × NaN and 0 × ∞ are
    # NaN.
    spoiled[4, 0, 0, 1] = True
    assert torch.equal(~out.isfinite(), spoiled)
    assert out[4, 0, 0, 1].isnan()
    assert out[3, 0, 1, 1].isnan() if value != value else out[3, 0, 1, 1] == value


@pytest.mark.both_paths
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_gradient_that_is_not_finite_reaches_the_cells_that_were_read(value):
    x = torch.zeros(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0.0, 0, 6, 6], [0.0, 0, 6, 6]], dtype=torch.float64)
    cot = torch.ones(4, 2, 3, 3, dtype=torch.float64)
    cot[3, 1, 0, 2] = value
    (grad,) = torch.autograd.grad(roi_align(x, [boxes, boxes], 3, 1.0, 1), x, cot)
    spoiled = torch.zeros(2, 2, 6, 6, dtype=torch.bool)
    spoiled[1, 1, 0:2, 4:6] = True
    assert torch.equal(~grad.isfinite(), spoiled)
    assert torch.equal(grad[0], grad[1].where(~spoiled[1], grad[0]))


@pytest.mark.both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [0, 2])
def test_a_box_of_1e9_pixels_is_its_share_of_the_map(dtype, ratio):
    """From the first cell on, adaptive: each bin is the sum of the map over the number of samples. Of three bins."""
    x = torch.rand(1, 1, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = roi_align(x.to(dtype), [torch.tensor([[0.5, 0.5, 3e9 + 0.5, 3e9 + 0.5]], dtype=torch.float64)], 3, 1.0, ratio)
    assert not out[0, 0].flatten()[1:].any()
    if ratio:
        # Its samples lie 5e8 apart, none on the map.
        assert out[0, 0, 0, 0] == 0
        return
    # Samples at 0.5, 1.5, …, and half a cell beyond the last one: there the last cell is read.
    y, x_ = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (5, 4))
    cells = x[0, 0]
    down = (cells + cells[[1, 2, 3, 4, 4]]) / 2
    want = ((down + down[:, [1, 2, 3, 3]]) / 2).sum() / 1e9**2
    assert len(y) * len(x_) == 20
    torch.testing.assert_close(out[0, 0, 0, 0].double(), want, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [1e4, 1e6, 1.5e6, 1e9, 1e12, 1e30])
def test_boxes_of_any_size_are_finite(far, dtype):
    check_boxes_are_finite(far, dtype)


def check_boxes_are_finite(far, dtype):
    x = torch.rand(1, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=dtype, requires_grad=True)
    boxes = torch.tensor([[-far, -far, far, far], [0, 0, far, far], [far, far, 2 * far, 2 * far], [-far, 0, 1, 3]])
    for settings in ((0, True), (0, False), (2, True)):
        out = roi_align(x, [boxes], 2, 1.0, *settings)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert out.isfinite().all() and grad.isfinite().all()
        assert out.abs().max() <= 1 and not out[2].any()


def axis_samples(first: float, last: float, bins: int, length: int, ratio: int, dtype: torch.dtype):
    """The numbers visited, by bin, of a box along x."""
    box = torch.tensor([[first, 0.0, last, 1.0]], dtype=dtype)
    grid = grid_of(box, (bins, bins), (1, length), ratio, True)
    begin, count = numbers_on_map(grid)
    return grid, begin[0, 0].tolist(), count[0, 0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 17, 300])
@pytest.mark.parametrize("far", [1.0, 40.0, 1e3, 1e5])
def test_every_sample_on_the_map_is_visited_and_few_others(far, length, dtype):
    random = np.random.default_rng(int(far) + length)
    for ratio in (0, 1, 5):
        for _ in range(20):
            first, last = random.uniform(-far, far, 2) + random.choice([0, 0.5, length])
            grid, begin, count = axis_samples(first, last, 3, length, ratio, dtype)
            samples = int(grid.samples[0, 0, 0])
            for bin in range(3):
                position = grid.first[0, 0, bin] + torch.arange(samples) * grid.spacing[0, 0, 0]
                on_map = ((position >= -1) & (position <= length)).nonzero()[:, 0].tolist()
                visited = range(int(begin[bin]), int(begin[bin] + count[bin]))
                assert set(on_map) <= set(visited) <= set(range(samples))
                assert len(visited) <= len(on_map) + 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 50])
def test_visits_are_bounded_by_the_map(length, dtype):
    """However large the box; with a fixed number of samples by that number."""
    for size in (1e2, 1e4, 1.3e6, 1e7, 1e9, 1e12, 1e20, 1e30):
        for first, last in ((0, size), (-size, size), (-size, 0), (-size, 3.5), (size, 2 * size), (size, -size)):
            for ratio in (0, 2):
                grid, _, count = axis_samples(first, last, 7, length, ratio, dtype)
                assert max(count) <= (ratio or 2 * length + 8)
                assert cells_of(grid).known.shape[-1] <= max(ratio, 2 * length + 8)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("value", "side", "ratio", "aligned"),
    [
        (torch.nan, 0, 0, False),
        (torch.nan, 3, 3, True),
        (torch.inf, 2, 0, True),
        (-torch.inf, 1, 3, False),
        (3e38, 0, 0, False),
    ],
)
def test_a_box_that_is_not_finite_is_0_in_the_kernel(value, side, ratio, aligned):
    check_a_box_that_is_not_finite(value, side, ratio, aligned)


@pytest.mark.interpreter
def test_boxes_with_more_samples_than_an_integer_holds_are_finite():
    check_boxes_are_finite(1.5e6, torch.float32)
