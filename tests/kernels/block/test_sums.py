"""Sums of the parts of a weight's gradient."""

import pytest
import torch

sampling = pytest.importorskip("kernels.sampling.launch", reason="Triton is not installed")


def test_a_wide_weight_fits_a_grid():
    partial, weight = torch.empty(8, 1024, 9, 1024, device="meta"), torch.empty(1024, 1024, 3, 3, device="meta")
    grid = sampling.sum_launch(partial, (weight,) * 3, torch.empty(3, 2, dtype=torch.int32, device="meta")).grid
    # CUDA's limits: 2**31 - 1, then twice 65,535.
    assert 65_535 < max(grid) == grid[0]
