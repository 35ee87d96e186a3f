"""The fused DyHead on a GPU: float64, random shapes, streams, CUDA graphs, and pyramids beyond 2**31 elements."""

import pytest
import torch
from deform_conv_cases import check
from random_cases import HeadCase, check_head, random_convolution, random_head, results

from heads import DyHead
from heads.dyhead import fused
from heads.dyhead.dyhead import ATTENTIONS
from kernels import deform_conv2d
from kernels.bench.op import rounding
from kernels.bench.roofline import float32_products

layout = pytest.importorskip("kernels.block.layout", reason="Triton is not installed")

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CASES = (
    HeadCase(),
    HeadCase("LSC", coarse_offsets="prefix", depth=2),
    HeadCase("LSC", coarse_offsets="resize", channels=48),
    HeadCase("LSC", size=(50, 84), channels=256),
    HeadCase("LSC", reach=300.0),
)


@pytest.fixture
def exact_products():
    """Products of float32 as they are; the separate operators' as well."""
    with float32_products("fp32"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_fused_loses_no_more_than_the_separate_operators(case, dtype, exact_products):
    check_head(case, dtype, "cuda")


@pytest.mark.parametrize("attentions", ATTENTIONS, ids=lambda name: name or "none")
def test_every_subset_in_float64(attentions):
    check_head(HeadCase(attentions), torch.float64, "cuda")


@pytest.mark.parametrize("seed", range(24))
def test_random_heads_in_float64(seed):
    check_head(random_head(seed), torch.float64, "cuda")


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize("seed", range(24))
def test_random_convolutions(seed, dtype, exact_products):
    check(deform_conv2d, random_convolution(seed), dtype, "cuda")


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def test_another_stream(exact_products):
    case = HeadCase(depth=2)
    head, features = case.head(torch.float32, "cuda"), case.features(torch.float32, "cuda")
    expected = results(head, features)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = results(head, features)
    stream.synchronize()
    # Nothing but the order of atomic additions may differ.
    for name, value in expected.items():
        assert difference(found[name], value) < 1e-4, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cuda_graph_replays_on_new_inputs_and_new_weights(dtype, exact_products):
    case = HeadCase(depth=2, channels=256)
    head, static = case.head(dtype, "cuda"), [x.detach() for x in case.features(dtype, "cuda")]
    assert head.unfused_reason(static) is None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(side):
            head(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = head(static)
        outputs = []
        for seed in (1, 2):
            for held, new in zip(static, case.features(dtype, "cuda", seed), strict=True):
                held.copy_(new)
            for parameter in head.parameters():
                parameter.mul_(1.25)
            graph.replay()
            eager = head([x.clone() for x in static])
            for found, expected in zip(captured, eager, strict=True):
                # cuBLAS may sum in another order while it is captured.
                assert difference(found, expected) <= rounding(dtype, 9 * case.channels)
            outputs.append([y.clone() for y in captured])
    assert not torch.equal(outputs[0][0], outputs[1][0])


def test_a_training_step_in_a_cuda_graph(exact_products):
    case = HeadCase(size=(20, 28), levels=3)
    head, features = case.head(torch.float32, "cuda"), case.features(torch.float32, "cuda")

    def gradients():
        outputs = head(features)
        return torch.autograd.grad(outputs, [*features, *head.parameters()], [torch.ones_like(y) for y in outputs])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    with torch.no_grad():
        for x in features:
            x.mul_(-0.5)
    graph.replay()
    for found, expected in zip(captured, gradients(), strict=True):
        assert difference(found, expected) < 1e-4


def test_a_graph_captured_after_a_forward_alone_can_run_backward(exact_products):
    case = HeadCase(size=(20, 28), levels=3)
    head, features = case.head(torch.float32, "cuda"), case.features(torch.float32, "cuda")

    def gradients():
        outputs = head(features)
        return torch.autograd.grad(outputs, [*features, *head.parameters()], [torch.ones_like(y) for y in outputs])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # A kernel is compiled and loaded by its first launch. What the tables need is seen without them.
        gradients()
        layout._layout.cache_clear()
        with torch.no_grad():
            head(features)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    graph.replay()
    for found, expected in zip(captured, gradients(), strict=True):
        assert difference(found, expected) < 1e-4


def needs_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory, {free:.0f} are free")


@pytest.mark.parametrize("attentions", ["LC", "LSC"])
def test_more_elements_than_32_bits_count(attentions):
    """Four images whose levels have more than 2**31 elements together: the last is what it is on its own."""
    needs_memory(110)
    torch.manual_seed(0)
    head = DyHead(16, 1, attentions).to("cuda", torch.bfloat16)
    if "S" in attentions:
        torch.nn.init.normal_(head.blocks[0].spatial.offset.weight, std=0.1)
    image = [torch.randn(1, 16, 6000 >> level, 6000 >> level, device="cuda").bfloat16() for level in range(2)]
    image = [x.to(memory_format=torch.channels_last) for x in image]
    features = [torch.cat([torch.zeros_like(x).expand(3, -1, -1, -1), x]) for x in image]
    features = [x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in features]
    assert features[0].numel() > 2**31 and head.unfused_reason(features) is None
    outputs = head(features)
    found = torch.autograd.grad([y[3:].float().square().mean() for y in outputs], features)
    found = [x[3:].clone() for x in (*outputs, *found)]
    del outputs, features
    alone = [x.requires_grad_() for x in image]
    outputs = head(alone)
    expected = [*outputs, *torch.autograd.grad([y.float().square().mean() for y in outputs], alone)]
    for a, b in zip(found, expected, strict=True):
        # The gradient of the input is a sum of atomic additions, rounded to 8 bits.
        assert (a - b).abs().max() <= 2**-6 * b.abs().max()


def test_an_image_of_more_elements_than_its_places_fit_in_30_bits(monkeypatch):
    """One image of more than 2**30 elements, which 64 bits count, against the separate Triton kernels."""
    needs_memory(60)
    torch.manual_seed(0)
    head = DyHead(16, 1).to("cuda", torch.bfloat16)
    torch.nn.init.normal_(head.blocks[0].spatial.offset.weight, std=0.1)
    x = torch.randn(1, 16, 8400, 8400, device="cuda").bfloat16().to(memory_format=torch.channels_last)
    assert x.numel() > 2**30
    with torch.no_grad():
        (found,) = head([x])
        monkeypatch.setattr(fused, "reason_against", lambda *_: "the separate operators are asked for")
        (separate,) = head([x])
    assert (found - separate).abs().max() <= 2**-5 * separate.abs().max()
