"""Time of a DyHead block and of a whole DyHead; checked against float64 before it is timed.

    pytest tests/bench_heads.py --benchmark-only      on a CPU: one block on the default grid's maps;
                                                      on a GPU: also DyHead-6 on FPN levels of 800×1333

Providers: `eager` is the plain PyTorch path, `ours` the path the device gets by default, `compiled` is `torch.compile`
of the plain path, `graph` is ours replayed as a CUDA graph. Without `--benchmark-only` every CPU case runs once,
untimed.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from heads import DyHead
from kernels import use_backend
from kernels.roofline import synchronised_clock

CPU_SIZES = ((16, 16), (8, 8), (4, 4), (2, 2), (1, 1))
GPU_SIZES = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDS = 10


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
        name = "block" if self.depth == 1 else f"dyhead{self.depth}"
        return f"{name}-c{self.channels}-b{self.batch}-{self.precision}-{self.mode}-{self.provider}-{self.device}"

    def make(self, dtype: torch.dtype) -> tuple[DyHead, list[Tensor]]:
        """A head with no parameter at its starting value, and a pyramid, the same numbers in every type."""
        torch.manual_seed(0)
        head = DyHead(self.channels, self.depth)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        features = [torch.randn(self.batch, self.channels, *size) for size in self.sizes]
        stored = DTYPES[self.precision]
        layout = {"device": self.device, "memory_format": torch.channels_last}
        features = [x.to(stored).to(dtype=dtype, **layout).requires_grad_(self.mode != "forward") for x in features]
        return head.to(stored).to(dtype=dtype, **layout), features


CPU_CASES = [Case(1, 64, 8, CPU_SIZES, "fp32", mode, "ours", "cpu") for mode in ("forward", "forward+backward")]
GPU_CASES = [
    Case(depth, 256, batch, GPU_SIZES, precision, mode, provider, "cuda")
    for depth, batch, precision, mode, provider in itertools.product(
        (1, 6), (1, 8), DTYPES, ("forward", "forward+backward"), ("eager", "compiled", "ours", "graph")
    )
    if provider != "graph" or mode == "forward"
]


def runner(case: Case, head: DyHead, features: list[Tensor]) -> Callable[[], list[Tensor]]:
    """What is timed: returns the outputs, and in `forward+backward` leaves gradients in `features`."""

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(case.mode != "forward"):
            outputs = head(features)
            if case.mode != "forward":
                torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        return outputs

    if case.provider == "compiled":
        head.compile(fullgraph=True)
    if case.provider != "graph":
        return call
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> list[Tensor]:
        graph.replay()
        return outputs

    return replay


def error(outputs: list[Tensor], exact: list[Tensor]) -> float:
    """Largest difference over largest value."""
    scale = max(y.abs().max() for y in exact)
    return max(float((y.double() - e).abs().max() / scale) for y, e in zip(outputs, exact, strict=True))


@pytest.mark.benchmark(timer=synchronised_clock)
@pytest.mark.parametrize(
    "case", [*CPU_CASES, *(pytest.param(case, marks=pytest.mark.gpu) for case in GPU_CASES)], ids=str
)
def test_head(case, benchmark):
    backend = "torch" if case.provider in ("eager", "compiled") else "auto"
    with use_backend("torch"), torch.no_grad():
        exact_head, exact_features = case.make(torch.float64)
        exact = exact_head(exact_features)
        plain_head, plain_features = case.make(DTYPES[case.precision])
        allowed = 2 * error(plain_head(plain_features), exact) + 1e-6
    with use_backend(backend):
        run = runner(case, *case.make(DTYPES[case.precision]))
        found = error([y.detach() for y in run()], exact)
        assert found <= allowed, f"error {found:.2e}, plain PyTorch's in this precision allows {allowed:.2e}"
        benchmark.extra_info |= {"error": found, "plain PyTorch allows": allowed}
        benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=2)
