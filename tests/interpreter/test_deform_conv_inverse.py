"""The input's gradient without atomics, interpreted: odd shapes, crowded and empty tiles, the order of the index."""

import pytest
import torch
from deform_conv_cases import CASES, Case
from torch import Tensor
from torch.library import opcheck

from kernels.deform_conv import cpu as deform_conv_cpu
from kernels.deform_conv.operator import reference
from kernels.runtime.launch import Launch
from kernels.sampling import inverse

PLAIN = CASES[0]
NEEDS = [True, False, False, False, False]
# A batch of maps of four tiles each, whose offsets reach from tile to tile.
TILES = Case("tiles", "", batch=2, size=(17, 18), channels=2, outputs=3, kernel=(2, 1), padding=(0, 0), spread=3.0)
# As many samples for a tap as are multiplied at a time.
HEIGHT = inverse.entries(torch.float64, torch.device("cpu")) // 8
FULL = Case("full", "", batch=1, channels=2, outputs=3, size=(HEIGHT, 9), kernel=(1, 2), padding=(0, 0), spread=0.1)


@pytest.fixture(autouse=True)
def deterministic(poison):
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def cotangent(inputs: dict[str, Tensor | None], dtype: torch.dtype) -> Tensor:
    n, _, height, width = inputs["offset"].shape
    generator = torch.Generator().manual_seed(7)
    return torch.randn(n, len(inputs["weight"]), height, width, generator=generator, dtype=torch.float64).to(dtype)


def arguments(inputs: dict[str, Tensor | None], grad: Tensor, geometry: dict) -> tuple:
    """What the operator's backward takes, for the gradient of the input alone."""
    x, offset, weight = (inputs[name].detach() for name in ("input", "offset", "weight"))
    masks = [] if inputs["mask"] is None else [inputs["mask"].detach()]
    return [grad], [x], [offset], masks, weight, *map(list, geometry.values()), NEEDS, "triton"


def input_gradient(inputs: dict[str, Tensor | None], grad: Tensor, geometry: dict) -> Tensor:
    return torch.ops.dyhead.deform_conv2d_backward.default(*arguments(inputs, grad, geometry))[0]


def expected_gradient(inputs: dict[str, Tensor | None], grad: Tensor, geometry: dict) -> Tensor:
    leaves = {name: None if x is None else x.detach().to(grad.dtype) for name, x in inputs.items()}
    leaves["input"].requires_grad_()
    return torch.autograd.grad(reference(**leaves, **geometry), leaves["input"], grad)[0]


def check_input(inputs: dict[str, Tensor | None], geometry: dict) -> None:
    """As `deform_conv_cases.check`, for the gradient of the input alone."""
    dtype = inputs["input"].dtype
    grad = cotangent(inputs, dtype)
    found = input_gradient(inputs, grad, geometry)
    expected = expected_gradient(inputs, grad.double(), geometry)
    lost = (expected_gradient(inputs, grad, geometry).double() - expected).abs().max().item()
    few = 64 if dtype == torch.float64 else 4
    limit = 2 * lost + few * torch.finfo(dtype).eps * expected.abs().max().item()
    error = (found.double() - expected).abs().max().item()
    assert found.dtype == dtype and error <= limit, f"error {error:.3g}, allowed {limit:.3g}"


@pytest.mark.parametrize("case", [*CASES, TILES, FULL], ids=lambda case: case.id)
def test_odd_shapes_follow_float64(case):
    check_input(case.inputs(torch.float64), case.geometry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", [CASES[0], CASES[9]], ids=lambda case: case.id)
def test_lower_precisions(case, dtype):
    check_input(case.inputs(dtype), case.geometry)


def offsets_to(place: Tensor) -> Tensor:
    """Offsets (N, 18, Ho, Wo) that send the samples of PLAIN to (y, x) = `place` (N, 9, 2, Ho, Wo)."""
    height, width = place.shape[-2:]
    tap = torch.arange(9)
    y = torch.arange(height).view(1, -1, 1) - 1 + (tap // 3).view(-1, 1, 1)
    x = torch.arange(width).view(1, 1, -1) - 1 + (tap % 3).view(-1, 1, 1)
    start = torch.stack([y.expand(9, height, width), x.expand(9, height, width)], 1)
    return (place - start).flatten(1, 2)


def test_all_samples_on_one_pixel():
    inputs = PLAIN.inputs(torch.float64)
    place = torch.tensor([2.0, 3.0], dtype=torch.float64).view(1, 1, 2, 1, 1).expand(2, 9, 2, *PLAIN.size)
    inputs["offset"] = offsets_to(place)
    check_input(inputs, PLAIN.geometry)
    found = input_gradient(inputs, cotangent(inputs, torch.float64), PLAIN.geometry)
    assert found[:, :, 2, 3].all()
    found[:, :, 2, 3] = 0
    assert not found.any()


@pytest.mark.parametrize("far", [1e4, -1e4, torch.inf, -torch.inf, torch.nan])
def test_all_samples_outside(far):
    inputs = PLAIN.inputs(torch.float64)
    inputs["offset"] = torch.full_like(inputs["offset"], far)
    assert torch.equal(
        input_gradient(inputs, cotangent(inputs, torch.float64), PLAIN.geometry), torch.zeros_like(inputs["input"])
    )


def test_whole_numbers_and_both_ends():
    """Samples on pixels, at -1 and at the size, where nothing is sampled, and just inside of both."""
    inputs = PLAIN.inputs(torch.float64)
    generator = torch.Generator().manual_seed(3)
    places = []
    for size in PLAIN.size:
        choices = torch.tensor([-1, -1 + 2**-40, *range(size + 1), size - 2**-40], dtype=torch.float64)
        places.append(choices[torch.randint(len(choices), (2, 9, *PLAIN.size), generator=generator)])
    inputs["offset"] = offsets_to(torch.stack(places, 2))
    check_input(inputs, PLAIN.geometry)


def test_levels_share_one_index(monkeypatch):
    shapes = [(3, 4), (1, 1), (18, 2)]
    cases = [Case("", "", batch=2, channels=2, outputs=3, size=size) for size in shapes]
    inputs = [case.inputs(torch.float64, seed) for seed, case in enumerate(cases)]
    inputs[2]["input"] = inputs[2]["input"].detach().contiguous(memory_format=torch.channels_last)
    grads = [cotangent(each, torch.float64) for each in inputs]
    calls = []
    index = inverse.index
    monkeypatch.setattr(inverse, "index", lambda *given: calls.append(given) or index(*given))
    x, offset, mask = ([each[name].detach() for each in inputs] for name in ("input", "offset", "mask"))
    weight, geometry = inputs[0]["weight"].detach(), cases[0].geometry
    found = torch.ops.dyhead.deform_conv2d_backward.default(
        grads, x, offset, mask, weight, *map(list, geometry.values()), NEEDS, "triton"
    )
    assert len(calls) == 1
    for each, grad, target in zip(inputs, grads, found, strict=True):
        expected = expected_gradient(each | {"weight": weight}, grad, geometry)
        torch.testing.assert_close(target, expected, rtol=1e-13, atol=1e-13)


def test_neither_atomics_nor_the_pytorch_path(monkeypatch):
    monkeypatch.setattr(deform_conv_cpu, "backward", None)
    launched = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (launched.append(self.kernel), run(self)))
    inputs = PLAIN.inputs(torch.float32)
    grad = cotangent(inputs, torch.float32)
    first, second = (input_gradient(inputs, grad, PLAIN.geometry) for _ in range(2))
    assert torch.equal(first, second)
    assert [kernel.__name__ for kernel in launched] == ["plan_kernel", "bins_kernel", "gather_kernel"] * 2


def test_the_index_keeps_the_order_within_a_bin():
    keys = torch.tensor([4, 0, 2, 4, 2, 0, 5, 2, 5], dtype=torch.int32)
    found = inverse.index(keys, 5)
    # Of every number of 64 bits the lower half.
    assert found.order.tolist()[::2] == [1, 5, 2, 4, 7, 0, 3, 6, 8]
    assert found.starts.tolist() == [0, 2, 2, 5, 5, 7]


def test_opcheck():
    inputs = Case("", "", batch=1, channels=2, outputs=2, size=(2, 3)).inputs(torch.float32)
    settings = arguments(inputs, cotangent(inputs, torch.float32), PLAIN.geometry)
    opcheck(torch.ops.dyhead.deform_conv2d_backward.default, settings)
