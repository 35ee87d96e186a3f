"""The deformable convolution of onnxruntime, another implementation, computes what ours does."""

import pytest
import torch
from deform_conv_cases import CASES
from onnx_deform_conv import onnxruntime_deform_conv2d

from kernels import deform_conv2d

pytest.importorskip("onnxruntime", minversion="1.25", reason="onnxruntime 1.25 is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_same_output(case):
    inputs = case.inputs(torch.float32)
    with torch.no_grad():
        ours = deform_conv2d(**inputs, **case.geometry)
    torch.testing.assert_close(onnxruntime_deform_conv2d(**inputs, **case.geometry), ours, rtol=1e-5, atol=1e-5)
