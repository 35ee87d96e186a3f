"""deform_conv2d on a GPU: the compiled Triton kernels against float64, determinism, streams, sizes beyond 2**31."""

import pytest
import torch
from deform_conv_cases import CASES, Case, check, gradients

from kernels import deform_conv2d, use_backend
from kernels.deform_conv import reference

pytestmark = pytest.mark.gpu
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Several tiles, several blocks of channels, and not a whole number of either.
LARGE = Case("large", "", batch=3, channels=72, outputs=80, size=(33, 47))


@pytest.fixture
def exact_products(monkeypatch):
    """Products of float32 as they are; the reference's as well."""
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, LARGE], ids=lambda case: case.id)
def test_shapes_follow_float64(case, dtype, exact_products):
    check(deform_conv2d, case, dtype, "cuda")


@pytest.mark.parametrize("case", [CASES[0], LARGE], ids=lambda case: case.id)
def test_tensor_cores_may_round_float32(case, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32")
    check(deform_conv2d, case, torch.float32, "cuda", rounding=2**-10)


@pytest.mark.parametrize("case", [CASES[0], CASES[9]], ids=lambda case: case.id)
def test_the_pytorch_path_runs_on_a_gpu_too(case):
    with use_backend("torch"):
        check(deform_conv2d, case, torch.float32, "cuda")


def test_deterministic_algorithms_give_the_same_bits():
    torch.use_deterministic_algorithms(True)
    try:
        results = [gradients(deform_conv2d, LARGE.inputs(torch.float16, device="cuda"), LARGE.geometry) for _ in "ab"]
        check(deform_conv2d, LARGE, torch.float16, "cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_another_stream():
    inputs = LARGE.inputs(torch.float16, device="cuda")
    expected = deform_conv2d(**inputs, **LARGE.geometry)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = deform_conv2d(**inputs, **LARGE.geometry)
    stream.synchronize()
    assert torch.equal(found, expected)


def test_more_elements_than_32_bits_count():
    """Two images whose tensor has more than 2**31 elements: the second is sampled like a small one at its corner."""
    x = torch.zeros(2, 64, 4200, 4100, dtype=torch.float16, device="cuda", memory_format=torch.channels_last)
    x[1, :, -6:, -6:] = torch.randn(64, 6, 6, device="cuda").half()
    offset = torch.zeros(2, 18, 4200, 4100, dtype=torch.float16, device="cuda")
    weight = torch.randn(16, 64, 3, 3, device="cuda").half()
    y = deform_conv2d(x, offset, weight, padding=1)
    corner = x[1:, :, -6:, -6:].double()
    expected = reference(corner, offset[1:, :, :6, :6].double(), weight.double(), padding=(1, 1))
    torch.testing.assert_close(y[1:, :, -5:, -5:].double(), expected[:, :, 1:, 1:], rtol=2e-3, atol=2e-2)
    assert not y[0].any()
