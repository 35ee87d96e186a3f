"""Time of a DyHead block and of a whole DyHead; checked against float64 before it is timed.

    pytest --benchmark-only -k bench_heads                 on a CPU: one block on the default grid's maps;
                                                           on a GPU: and DyHead-6, on the levels of 800×1333
    pytest --benchmark-only -k bench_heads -m headline     on a GPU: batch 8, and DyHead-6 at batch 1, 16 bit

Providers: `eager` is the plain PyTorch path, `torchvision` the same with torchvision's operator, `ours` the path the
device gets by default, `compiled` is `torch.compile` of the plain path, `graph` is ours replayed as a CUDA graph.
Without `--benchmark-only` every CPU case runs once, untimed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import isnan

import pytest
import torch
from timing import (
    copies_past_the_cache,
    in_turn,
    measure,
    memory,
    named_if_missing,
    rates,
    roof_seconds,
    torchvision_deform_conv2d,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from heads import DyHead
from heads.dyhead import attention
from kernels import use_backend
from kernels.bench.op import Shape, pyramid
from kernels.bench.roofline import DTYPES, float32_products, synchronised_clock

CPU_SIZES = ((16, 16), (8, 8), (4, 4), (2, 2), (1, 1))
GPU_SIZES = tuple((shape.height, shape.width) for shape in pyramid(1))
# Those that run one operator after the other, in plain PyTorch or another's.
UNFUSED = ("eager", "torchvision", "compiled")


@dataclass(frozen=True)
class Case:
    depth: int
    channels: int
    batch: int
    sizes: tuple[tuple[int, int], ...]
    precision: str
    mode: str
    provider: str
    device: str

    def __str__(self) -> str:
        return "-".join(value for name, value in self.row.items() if name != "device")

    @property
    def row(self) -> dict[str, str]:
        name = "block" if self.depth == 1 else f"dyhead{self.depth}"
        names = {"op": name, "shape": f"c{self.channels}-b{self.batch}", "precision": self.precision}
        return names | {"mode": self.mode, "provider": self.provider, "device": self.device}

    @property
    def headline(self) -> bool:
        """Compiling takes longest, so one type of one block must do."""
        if self.device != "cuda" or DTYPES[self.precision] == torch.float32:
            return False
        if self.provider == "compiled":
            return self.depth == 1 and self.batch == 8 and self.precision == "bf16"
        return self.batch == 8 or (self.depth == 6 and self.mode == "forward")

    def head(self, dtype: torch.dtype, device: str) -> DyHead:
        """A head with no parameter at its starting value, the same numbers, which the precision has, in every type."""
        torch.manual_seed(0)
        head = DyHead(self.channels, self.depth)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return head.to(DTYPES[self.precision]).to(device, dtype, memory_format=torch.channels_last)

    def features(self, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
        """A pyramid, channels last, of such numbers."""
        torch.manual_seed(seed)
        features = [torch.randn(self.batch, self.channels, *size).to(DTYPES[self.precision]) for size in self.sizes]
        features = [x.to(device, dtype, memory_format=torch.channels_last) for x in features]
        return [x.requires_grad_(self.mode != "forward") for x in features]

    def cotangents(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """What the gradients are taken for; a 64th, so that sums over all pixels of a batch are fp16 numbers."""
        return [x.detach() / 64 for x in self.features(dtype, device, seed=-1)]


CPU_CASES = [
    Case(1, 64, 8, CPU_SIZES, "fp32", mode, provider, "cpu")
    for mode in ("forward", "both")
    for provider in ("ours", "torchvision")
]
GPU_CASES = [
    Case(depth, 256, batch, GPU_SIZES, precision, mode, provider, "cuda")
    for depth in (1, 6)
    for batch in (1, 8)
    for precision in DTYPES
    for mode in ("forward", "both")
    for provider in ("eager", "torchvision", "compiled", "ours", "graph")
    if provider != "graph" or mode == "forward"
]


def pytest_generate_tests(metafunc):
    timed_on_gpu = metafunc.config.getoption("benchmark_only", False) and torch.cuda.is_available()
    found = GPU_CASES if timed_on_gpu else CPU_CASES
    marked = [pytest.param(case, marks=pytest.mark.headline) if case.headline else case for case in found]
    metafunc.parametrize("case", marked, ids=str)


def torchvision_levels(inputs, offsets, weight, bias=None, stride=1, padding=0, dilation=1, masks=None):
    """`kernels.deform_conv2d_levels` with torchvision's operator."""
    operator = torchvision_deform_conv2d()
    settings = {"stride": stride, "padding": padding, "dilation": dilation}
    return [operator(x, o, weight, bias, mask=m, **settings) for x, o, m in zip(inputs, offsets, masks, strict=True)]


@contextmanager
def path_of(provider: str, monkeypatch) -> Iterator[None]:
    """Inside the `with` block a DyHead runs as the provider's name says."""
    with monkeypatch.context() as patch, use_backend("torch" if provider in UNFUSED else "auto"):
        if provider == "torchvision":
            patch.setattr(attention, "deform_conv2d_levels", torchvision_levels)
        yield


def run(
    head: DyHead, features: list[Tensor], cotangents: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of a head; and where there are cotangents, the gradients of features and parameters for them."""
    if cotangents is None:
        with torch.no_grad():
            return head(features), []
    outputs = head(features)
    return outputs, list(torch.autograd.grad(outputs, [*features, *head.parameters()], cotangents))


def replay(head: DyHead, features: list[Tensor]) -> Callable[[], list[Tensor]]:
    """A call on these features as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(head, features)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, _ = run(head, features)

    def call() -> list[Tensor]:
        graph.replay()
        return outputs

    return call


def timed_call(case: Case, head: DyHead, features: list[Tensor]) -> Callable[[], list[Tensor]]:
    """A call without arguments that returns the outputs, or the gradients."""
    if case.provider == "graph":
        return replay(head, features)
    if case.mode == "forward":
        return lambda: run(head, features)[0]
    cotangents = case.cotangents(DTYPES[case.precision], case.device)
    return lambda: run(head, features, cotangents)[1]


def errors(found: tuple[list[Tensor], ...], exact: tuple[list[Tensor], ...]) -> list[float]:
    """Of the outputs the largest difference over the largest value; of the gradients the worst relative norm.

    A gradient has single wild elements where rounding has moved a sample across a pixel, see `exact_and_allowed`.
    """
    scale = max(e.abs().max() for e in exact[0])
    outputs = [(f.double() - e).abs().max() / scale for f, e in zip(found[0], exact[0], strict=True)]
    gradients = [(f.double() - e).norm() / e.norm() for f, e in zip(found[1], exact[1], strict=True) if e.any()]
    return [float(torch.stack(kind).max()) for kind in (outputs, gradients) if kind]


def results(case: Case, head: DyHead, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and in the mode `both` the gradients, of a case as it is checked."""
    features = case.features(dtype, case.device)
    if case.provider == "graph":
        return replay(head, features)(), []
    outputs, gradients = run(head, features, case.cotangents(dtype, case.device) if case.mode == "both" else None)
    return [y.detach() for y in outputs], gradients


@lru_cache(maxsize=1)
def exact_and_allowed(case: Case) -> tuple[tuple[list[Tensor], ...], list[float]]:
    """The numbers in float64, and twice the error of plain PyTorch in the case's precision.

    The gradient of an offset jumps where a sample crosses a pixel. Float32 knows a coordinate to some roundings of the
    longest side, so of all samples about that share crosses, by chance, and its root is what the norm changes by.
    """
    with use_backend("torch"):
        exact = results(case, case.head(torch.float64, case.device), torch.float64)
        plain = results(case, case.head(DTYPES[case.precision], case.device), DTYPES[case.precision])
    crossing = (2 * max(map(max, case.sizes)) * torch.finfo(torch.float32).eps) ** 0.5
    return exact, [2 * error + floor for error, floor in zip(errors(plain, exact), (1e-6, crossing), strict=False)]


def checked(case: Case, head: DyHead, exact: tuple, allowed: list[float]) -> float:
    """The largest error of what the case computes; the last two arguments are from `exact_and_allowed`."""
    measured = errors(results(case, head, DTYPES[case.precision]), exact)
    if case.provider in UNFUSED:
        # Rivals may round as they like in 16 bits, where the error stands beside their time.
        allowed = [0.01 if DTYPES[case.precision] == torch.float32 else float("inf")] * len(measured)
    beyond = [(error, limit) for error, limit in zip(measured, allowed, strict=True) if error > limit or isnan(error)]
    assert not beyond, f"errors beyond what this precision allows, not timed: {beyond}"
    return max(measured)


@cache
def cost(case: Case) -> tuple[int, int, int]:
    """Operations, bytes that must move at least (see `kernels.bench.op.Op.bytes_moved`), and bytes of the outputs."""
    # Counted on the separate operators: what is computed does not depend on how many launches compute it.
    head, features = case.head(DTYPES[case.precision], "meta"), case.features(DTYPES[case.precision], "meta")
    with use_backend("torch"), FlopCounterMode(display=False) as counter:
        outputs = head(features)
        if case.mode == "both":
            torch.autograd.backward(outputs, outputs)
    read, written = (sum(x.nbytes for x in tensors) for tensors in ((*features, *head.parameters()), outputs))
    moved = read + written if case.mode == "forward" else 3 * read + 2 * written
    return counter.get_total_flops(), moved, written


def figures(case: Case, call: Callable[[], list[Tensor]], seconds: list[float]) -> dict[str, float]:
    """Times, rates, the share of the roof, and memory, which a graph has taken before it runs."""
    flops, moved, outputs = cost(replace(case, provider="eager"))
    convolution = Shape("finest", case.batch, case.channels, *case.sizes[0])
    numbers = rates(seconds, flops, moved, roof_seconds(case.device, case.precision, moved, flops, convolution))
    if case.provider == "graph":
        return numbers
    return numbers | memory(call, case.device, outputs if case.mode == "both" else 0)


@pytest.mark.benchmark(timer=synchronised_clock)
def test_head(case, benchmark, record_property, monkeypatch):
    benchmark.group = f"{case.row['op']} {case.row['shape']} {case.precision} {case.mode}"
    dtype, device = DTYPES[case.precision], case.device
    with named_if_missing(case.row, record_property), float32_products(case.precision):
        reference = exact_and_allowed(replace(case, provider="eager"))
        head = case.head(dtype, device)
        if case.provider == "compiled":
            torch.compiler.reset()
            head.compile(fullgraph=True)
        with path_of(case.provider, monkeypatch):
            error = checked(case, head, *reference)
            first = case.features(dtype, device)
            sets = [first, *(case.features(dtype, device, seed) for seed in range(1, copies_past_the_cache(first)))]
            call = in_turn([timed_call(case, head, features) for features in sets])
            if seconds := measure(call, benchmark):
                benchmark.extra_info |= case.row | figures(case, call, seconds) | {"error": error}
