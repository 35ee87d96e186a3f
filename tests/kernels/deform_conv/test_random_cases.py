"""Random geometries on the CPU's path; on a GPU the same ones are in tests/kernels/block/test_fused_gpu.py."""

import pytest
import torch
from deform_conv_cases import check
from random_cases import random_convolution, random_head

from kernels import deform_conv2d


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("seed", range(24))
def test_random_convolutions(seed, dtype):
    check(deform_conv2d, random_convolution(seed, largest=16), dtype)


def test_random_cases_differ_in_everything():
    convolutions, heads = [random_convolution(seed) for seed in range(24)], [random_head(seed) for seed in range(24)]
    for cases in (convolutions, heads):
        for field in cases[0].__dataclass_fields__:
            assert len({getattr(case, field) for case in cases}) > 1 or field == "why", field
    assert max(case.spread for case in convolutions) > 100 * max(max(case.size) for case in convolutions) / 2
