"""Small random heads under the interpreter, fused against separate; larger ones are in
tests/kernels/block/test_fused_gpu.py."""

from dataclasses import replace

import pytest
import torch
from random_cases import check_head, random_head

from kernels import use_backend


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_random_heads_in_float64(seed, poison):
    case = random_head(seed, largest=5)
    with use_backend("triton"):
        check_head(replace(case, channels=16, batch=1, depth=1), torch.float64, "cpu")
