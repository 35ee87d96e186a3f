"""What a call costs besides its work: checks, dispatch and the preparation of launches, beside an empty operator.

    pytest --benchmark-only -k bench_dispatch

Inputs are tiny and repeat in shape, and what would compute is replaced by nothing. A row's time is that of the call;
`per_empty` is that time over the time of a custom operator that does nothing, both measured in turn in this run, so it
can be compared between machines.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import triton
from timing import measure

from kernels import backend, deform_conv2d, deform_conv2d_levels, dynamic_relu, use_backend
from kernels.deform_conv import cpu, launch  # noqa: F401
from kernels.dynamic_relu import operator as relu

ROUNDS, CALLS = 30, 100

_library = torch.library.Library("dyhead_bench", "DEF")
_library.define("empty(Tensor x) -> Tensor")
_library.impl("empty", lambda x: x.new_empty(0), "CPU")


def empty_operator() -> None:
    torch.ops.dyhead_bench.empty.default(X)


X, OFFSET, MASK, WEIGHT = (torch.zeros(s) for s in ((1, 4, 3, 3), (1, 18, 3, 3), (1, 9, 3, 3), (4, 4, 3, 3)))
LINES = torch.zeros(1, 4, 4)
LEVELS = 5
CALLS_OF = {
    "deform_conv2d": lambda weight: deform_conv2d(X, OFFSET, weight, padding=1, mask=MASK),
    "deform_conv2d_levels": lambda weight: deform_conv2d_levels(
        [X] * LEVELS, [OFFSET] * LEVELS, weight, padding=1, masks=[MASK] * LEVELS
    ),
    "dynamic_relu": lambda weight: dynamic_relu(X if weight is WEIGHT else X_TO_LEARN, LINES),
}
TO_LEARN, X_TO_LEARN = WEIGHT.clone().requires_grad_(), X.clone().requires_grad_()


@dataclass(frozen=True)
class Case:
    """A call of an operator, on the path `backend`, and whether autograd takes part."""

    op: str
    backend: str
    learns: bool

    def __str__(self) -> str:
        return f"{self.op}-{self.backend}-{'autograd' if self.learns else 'forward'}"

    @property
    def row(self) -> dict[str, str]:
        mode = "forward with autograd" if self.learns else "forward"
        names = {"op": f"dispatch of {self.op}", "shape": "3x3-b1", "precision": "fp32", "mode": mode}
        return names | {"provider": "ours" if self.backend == "torch" else "launches", "device": "cpu"}

    def call(self) -> None:
        CALLS_OF[self.op](TO_LEARN if self.learns else WEIGHT)


@pytest.fixture
def no_work(monkeypatch):
    """Nothing is computed on either path; a launch is prepared down to Triton's own door."""
    monkeypatch.setattr(cpu, "forward", lambda *arguments: None)
    monkeypatch.setattr(relu, "_write_output", lambda *arguments: None)
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda *arguments, **named: None)
    # Kernels that are never run do not need an interpreter on a CPU.
    monkeypatch.setattr(backend, "INTERPRET", True)


def per_empty(call: Callable[[], object]) -> float:
    """The time of a call over that of the empty operator, the least of many rounds of both in turn."""

    def seconds(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        return time.perf_counter() - start

    rounds = [(seconds(call), seconds(empty_operator)) for _ in range(ROUNDS)]
    ours, empty = (min(column) for column in zip(*rounds, strict=True))
    return ours / empty


@pytest.mark.skipif(backend.INTERPRET, reason="interpreted kernels are launched in another way")
@pytest.mark.parametrize(
    "case",
    [Case(op, path, learns) for op in CALLS_OF for path in ("torch", "triton") for learns in (False, True)],
    ids=str,
)
def test_dispatch(case, benchmark, no_work):
    benchmark.group = case.row["op"]
    with use_backend(case.backend):
        if seconds := measure(case.call, benchmark):
            times = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).mul(1e3).tolist()
            figures = dict(zip(("ms_p20", "ms_p50", "ms_p80"), times, strict=True))
            benchmark.extra_info |= case.row | figures | {"per_empty": per_empty(case.call)}
