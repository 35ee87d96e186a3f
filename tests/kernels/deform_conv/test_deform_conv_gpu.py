"""deform_conv2d on a GPU: the compiled Triton kernels against float64, determinism, streams, sizes beyond 2**31."""

import pytest
import torch
from deform_conv_cases import CASES, Case, check, check_sample, gradients

from kernels import deform_conv2d, use_backend
from kernels.bench.roofline import float32_products
from kernels.deform_conv.operator import reference

pytestmark = pytest.mark.gpu
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Several tiles, several blocks of channels, and not a whole number of either.
LARGE = Case("large", "", batch=3, channels=72, outputs=80, size=(33, 47))
# Many samples for every input pixel.
CROWDED = Case("crowded", "", batch=2, channels=32, outputs=32, size=(5, 7), padding=(30, 30), spread=30.0)
GROUPED = Case("grouped", "", batch=2, channels=64, outputs=64, size=(33, 47), groups=2, offset_groups=4)


@pytest.fixture
def exact_products():
    """Products of float32 as they are; the reference's as well."""
    with float32_products("ieee"):
        yield


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, LARGE], ids=lambda case: case.id)
def test_shapes_follow_float64(case, dtype, exact_products):
    check(deform_conv2d, case, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sample_loses_less_than_in_a_plain_chain(dtype):
    check_sample(dtype, "cuda")


@pytest.mark.parametrize("case", [CASES[0], LARGE], ids=lambda case: case.id)
def test_tensor_cores_may_round_float32(case):
    with float32_products("tf32"):
        check(deform_conv2d, case, torch.float32, "cuda", rounding=2**-10)


@pytest.mark.parametrize("case", [CASES[0], CASES[9]], ids=lambda case: case.id)
def test_the_pytorch_path_runs_on_a_gpu_too(case):
    with use_backend("torch"):
        check(deform_conv2d, case, torch.float32, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*CASES, LARGE, CROWDED, GROUPED], ids=lambda case: case.id)
def test_shapes_follow_float64_without_atomics(case, dtype, exact_products, deterministic):
    check(deform_conv2d, case, dtype, "cuda")


@pytest.mark.parametrize("case", [CASES[0], LARGE], ids=lambda case: case.id)
def test_tensor_cores_may_round_float32_without_atomics(case, deterministic):
    with float32_products("tf32"):
        check(deform_conv2d, case, torch.float32, "cuda", rounding=2**-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [LARGE, CROWDED, GROUPED], ids=lambda case: case.id)
def test_every_gradient_has_the_same_bits_in_every_run(case, dtype, deterministic):
    results = [gradients(deform_conv2d, case.inputs(dtype, device="cuda"), case.geometry) for _ in range(5)]
    for result in results[1:]:
        for name, value in result.items():
            assert torch.equal(value, results[0][name]), name


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


def test_more_elements_than_32_bits_count_backward(deterministic):
    """The gradient of the corner of the second image is that of a small one."""
    x = torch.zeros(2, 64, 4200, 4100, dtype=torch.float16, device="cuda", memory_format=torch.channels_last)
    offset = torch.zeros(2, 18, 4200, 4100, dtype=torch.float16, device="cuda")
    weight = torch.randn(16, 64, 3, 3, device="cuda").half()
    grad = torch.zeros(2, 16, 4200, 4100, dtype=torch.float16, device="cuda", memory_format=torch.channels_last)
    grad[1, :, -5:, -5:] = torch.randn(16, 5, 5, device="cuda").half()
    deform_conv2d(x.requires_grad_(), offset, weight, padding=1).backward(grad)
    corner = torch.zeros(1, 64, 6, 6, dtype=torch.float64, device="cuda", requires_grad=True)
    out = reference(corner, offset[1:, :, :6, :6].double(), weight.double(), padding=(1, 1))
    out.backward(torch.nn.functional.pad(grad[1:, :, -5:, -5:].double(), (1, 0, 1, 0)))
    torch.testing.assert_close(x.grad[1:, :, -6:, -6:].double(), corner.grad, rtol=2e-3, atol=2e-2)
    assert not x.grad[0].any()
