"""A whole released block through the Triton kernels, against mmdetection's numbers."""

import json

import numpy as np
import pytest
import torch
from golden_blocks import run_golden
from places import GOLDEN

from kernels import use_backend


@pytest.mark.parametrize("name", ["dyhead_mmdet_c32_b1_1level"])
def test_released_block_equals_its_authors(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        data = dict(file)
    error = json.loads(str(data["meta"]))["max_abs_diff_vs_mmcv64"]["mmcv32"]
    with use_backend("triton"):
        for quantity, ours, theirs, float32_error in run_golden([data], error, torch.float32):
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=10 * float32_error, err_msg=quantity)
