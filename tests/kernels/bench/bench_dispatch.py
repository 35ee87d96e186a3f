"""What a call costs besides its work: checks, dispatch and the preparation of launches, beside an empty operator.

    pytest --benchmark-only -k bench_dispatch

Inputs are tiny and repeat in shape, and on a CPU what would compute is replaced by nothing. On a GPU the same calls are
replayed from a CUDA graph. The time in a row is that of the call; `per_empty` is that time over the time of a custom
operator that does nothing, both measured in turn in this run, so it can be compared between machines.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from launched import without_work
from timing import measure
from torch import Tensor

from kernels import (
    BlockParameters,
    backend,
    deform_conv2d,
    deform_conv2d_levels,
    dyhead_block,
    dynamic_relu,
    use_backend,
)
from kernels.deform_conv import cpu, launch  # noqa: F401
from kernels.dynamic_relu import operator as relu

ROUNDS, CALLS = 30, 100
LEVELS, CHANNELS, BLOCK_OP = 5, 16, "dyhead_block"
MODES = ("forward", "forward with autograd", "both")
# What a block takes, in the order of `block_of`.
BLOCK = [*[(CHANNELS, CHANNELS, 3, 3)] * 3, *[(CHANNELS,)] * 6, (27, CHANNELS, 3, 3), (27,), (1, CHANNELS), (1,)]
BLOCK += [(4, CHANNELS), (4,), (4 * CHANNELS, 4), (4 * CHANNELS,)]
SINGLE = [(1, 4, 3, 3), (1, 18, 3, 3), (4, 4, 3, 3), (1, 9, 3, 3)]
SHAPES = {
    "deform_conv2d": SINGLE,
    "deform_conv2d_levels": SINGLE,
    "dynamic_relu": [(1, 4, 3, 3), (1, 4, 4)],
    BLOCK_OP: [*[(1, CHANNELS, size, size) for size in (16, 8, 4, 2, 1)], *BLOCK],
}

_library = torch.library.Library("dyhead_bench", "DEF")
_library.define("empty(Tensor x) -> Tensor")
_library.impl("empty", lambda x: x.new_empty(0), "CPU")
X = torch.zeros(1)


def empty_operator() -> None:
    torch.ops.dyhead_bench.empty.default(X)


def block_of(*tensors: Tensor) -> list[Tensor]:
    rest = tensors[LEVELS:]
    others = {"offset": rest[9:11], "gate": rest[11:13], "dynamic_relu": rest[13:]}
    return dyhead_block(list(tensors[:LEVELS]), BlockParameters(rest[:3], rest[3:6], rest[6:9], **others))


CALLS_OF: dict[str, Callable[..., list[Tensor]]] = {
    "deform_conv2d": lambda x, offset, weight, mask: [deform_conv2d(x, offset, weight, padding=1, mask=mask)],
    "deform_conv2d_levels": lambda x, offset, weight, mask: deform_conv2d_levels(
        [x] * LEVELS, [offset] * LEVELS, weight, padding=1, masks=[mask] * LEVELS
    ),
    "dynamic_relu": lambda x, lines: [dynamic_relu(x, lines)],
    BLOCK_OP: block_of,
}


@dataclass(frozen=True)
class Case:
    """A call of an operator on the path `backend`, in a mode; `graph` replays it from a CUDA graph."""

    op: str
    backend: str
    mode: str
    graph: bool = False

    def __str__(self) -> str:
        return f"{self.op}-{'graph' if self.graph else self.backend}-{self.mode.replace(' ', '-')}"

    @property
    def row(self) -> dict[str, str]:
        shape = "16x16 to 1x1-b1" if self.op == BLOCK_OP else "3x3-b1"
        names = {"op": f"dispatch of {self.op}", "shape": shape, "precision": "fp32", "mode": self.mode}
        provider = "graph" if self.graph else "ours" if self.backend == "torch" else "launches"
        return names | {"provider": provider, "device": "cuda" if self.graph else "cpu"}

    def call(self, device: str = "cpu") -> Callable[[], object]:
        """One call, without arguments; with autograd all tensors are to be differentiated."""
        learns = self.mode != "forward"
        tensors = [torch.zeros(shape, device=device) for shape in SHAPES[self.op]]
        if self.op == BLOCK_OP:
            tensors[:LEVELS] = [x.to(memory_format=torch.channels_last) for x in tensors[:LEVELS]]
        tensors = [x.requires_grad_(learns) for x in tensors]
        function = CALLS_OF[self.op]
        if self.mode != "both":
            return lambda: function(*tensors)
        cotangents = [torch.ones_like(y) for y in function(*tensors)]
        return lambda: torch.autograd.grad(function(*tensors), tensors, cotangents)


@pytest.fixture
def no_work(monkeypatch):
    """Nothing is computed on either path; a launch is prepared down to Triton's own door."""
    monkeypatch.setattr(cpu, "forward", lambda *arguments: None)
    monkeypatch.setattr(relu, "_write_output", lambda *arguments: None)
    without_work(monkeypatch)


def per_empty(call: Callable[[], object]) -> float:
    """The time of a call over that of the empty operator, the least of many rounds of both in turn."""

    def seconds(function: Callable[[], object]) -> float:
        if torch.cuda.is_available():
            # A full queue would make the host wait.
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        return time.perf_counter() - start

    rounds = [(seconds(call), seconds(empty_operator)) for _ in range(ROUNDS)]
    ours, empty = (min(column) for column in zip(*rounds, strict=True))
    return ours / empty


def measured(case: Case, call: Callable[[], object], benchmark) -> None:
    benchmark.group = case.row["op"]
    if seconds := measure(call, benchmark):
        times = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).mul(1e3).tolist()
        figures = dict(zip(("ms_p20", "ms_p50", "ms_p80"), times, strict=True))
        benchmark.extra_info |= case.row | figures | {"per_empty": per_empty(call)}


CASES = [
    *(Case(op, path, mode) for op in CALLS_OF for path in ("torch", "triton") for mode in MODES[:2] if op != BLOCK_OP),
    Case(BLOCK_OP, "triton", "forward"),
    *(Case(op, "triton", "both") for op in ("deform_conv2d", BLOCK_OP)),
]


@pytest.mark.skipif(backend.INTERPRET, reason="interpreted kernels are launched in another way")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dispatch(case, benchmark, no_work):
    with use_backend(case.backend):
        measured(case, case.call(), benchmark)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("op", ["deform_conv2d", BLOCK_OP])
def test_replay(op, mode, benchmark):
    case = Case(op, "triton", mode, graph=True)
    call = case.call("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # What is compiled, and the tables that are copied, cannot be captured.
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    measured(case, graph.replay, benchmark)
