"""Sums of consecutive rows."""

import pytest
import torch

sums = pytest.importorskip("kernels.block.sums", reason="Triton is not installed")


def test_a_wide_weight_fits_a_grid():
    partial, total = (torch.empty(n, 1024, 9, 1024, device="meta") for n in (8, 3))
    grid = sums.add_launch(partial, total, torch.empty(3, 2, dtype=torch.int32, device="meta")).grid
    # CUDA's limits: 2**31 - 1, then twice 65,535.
    assert 65_535 < max(grid) == grid[0]
