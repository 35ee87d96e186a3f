"""Time of every operator beside its rivals; checked against float64 before it is timed.

    pytest tests/bench_kernels.py --benchmark-only                               on a CPU: PyTorch paths, small maps
    pytest tests/bench_kernels.py --benchmark-only -k "b8 and P3 and bf16"       on a GPU: a selection of all

Without `--benchmark-only` every CPU case runs once, untimed, so that this file cannot rot.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from kernels import OPS
from kernels.op import MODES, Op, Shape, pyramid, rounding
from kernels.roofline import (
    DTYPES,
    convolution_flops_per_second,
    copy_bytes_per_second,
    float32_products,
    synchronised_clock,
)

# What the default grid trains on: the two ends of a pyramid of 64 channels.
CPU_SHAPES = (Shape("16x16", 8, 64, 16, 16), Shape("2x2", 8, 64, 2, 2))
GPU_SHAPES = tuple(shape for batch in (1, 8, 16) for shape in pyramid(batch))
# `dense` is no rival but the bound: a channels-last 3x3 convolution of the same shape.
PROVIDERS = {
    "deform_conv2d": ("ours", "torchvision", "plain", "compiled", "dense"),
    "dynamic_relu": ("ours", "plain", "compiled"),
}
ROUNDS = 20


class Missing(Exception):
    """A provider that cannot run here, and why."""


@dataclass(frozen=True)
class Case:
    op: Op
    provider: str
    shape: Shape
    precision: str
    mode: str
    device: str

    def __str__(self) -> str:
        return f"{self.op.name}-{self.shape}-{self.precision}-{self.mode}-{self.provider}"

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        return self.op.make_inputs(self.shape, DTYPES[self.precision], self.device, seed)


def cases(device: str) -> list[Case]:
    gpu = device == "cuda"
    return [
        Case(op, provider, shape, precision, mode, device)
        for op in OPS
        for shape in (GPU_SHAPES if gpu else CPU_SHAPES)
        for precision in (DTYPES if gpu else ("fp32",))
        for mode in (MODES if gpu else ("forward", "both"))
        for provider in PROVIDERS[op.name]
        # Compiling for a CPU needs a C++ compiler, and takes minutes for figures in microseconds.
        if gpu or provider != "compiled"
        # Nothing is multiplied in an elementwise operator.
        if precision != "tf32" or op.name != "dynamic_relu"
    ]


def pytest_generate_tests(metafunc):
    timed_on_gpu = metafunc.config.getoption("benchmark_only", False) and torch.cuda.is_available()
    metafunc.parametrize("case", cases("cuda" if timed_on_gpu else "cpu"), ids=str)


@cache
def torchvision_deform_conv2d() -> Callable[..., Tensor]:
    try:
        from torchvision.ops import deform_conv2d
    except (ImportError, RuntimeError) as error:
        # Beside another build of torch it raises a RuntimeError while it is imported.
        raise Missing(f"it does not import ({str(error).splitlines()[0]})") from error
    return lambda input, offset, weight, mask: deform_conv2d(input, offset, weight, padding=(1, 1), mask=mask)


@lru_cache(maxsize=1)
def compiled(op: Op, shape: Shape, precision: str) -> Callable[..., Tensor]:
    # Anew for every shape: after some recompilations of one function, PyTorch would run it eagerly and not say so.
    torch.compiler.reset()
    # With donated buffers a backward could not be timed on its own, again and again for one forward.
    torch._functorch.config.donated_buffer = False
    return torch.compile(op.reference, dynamic=False)


def function_of(case: Case) -> Callable[..., Tensor]:
    if case.provider == "ours":
        return case.op.function
    if case.provider == "plain":
        return case.op.reference
    if case.provider == "compiled":
        return compiled(case.op, case.shape, case.precision)
    if case.provider == "torchvision":
        return torchvision_deform_conv2d()
    return lambda input, offset, weight, mask: F.conv2d(input, weight, padding=1)


@cache
def limits(op: Op, shape: Shape, precision: str, device: str) -> dict[str, float]:
    inputs = op.make_inputs(shape, DTYPES[precision], device, 0)
    products = 2.0**-10 if precision == "tf32" else 0
    terms = inputs["weight"][0].numel() if "weight" in inputs else shape.height * shape.width
    return op.limits(inputs, rounding(DTYPES[precision], terms) + products)


@cache
def checked(op: Op, provider: str, shape: Shape, precision: str, device: str) -> float | None:
    """The largest error of the output and the gradients, once for all modes; None for the dense bound."""
    if provider == "dense":
        return None
    case = Case(op, provider, shape, precision, "both", device)
    errors = op.errors(function_of(case), case.inputs())
    if provider == "ours":
        allowed = limits(op, shape, precision, device)
        wrong = {name: (error, allowed[name]) for name, error in errors.items() if not error <= allowed[name]}
        assert not wrong, f"errors beyond their limit, not timed: {wrong}"
    elif DTYPES[precision] == torch.float32:
        # Rivals may round as they like in 16 bits, where the error stands beside their time.
        assert max(errors.values()) < 0.01, f"not the same operator, not timed: {errors}"
    return max(errors.values())


@cache
def copy_roof(device: str) -> float:
    return copy_bytes_per_second(torch.device(device))


@cache
def convolution_roof(device: str, precision: str, shape: Shape) -> float:
    return convolution_flops_per_second(torch.device(device), precision, shape)


def timed_call(function: Callable[..., Tensor], inputs: dict[str, Tensor], mode: str) -> Callable[[], object]:
    """One call of a mode without arguments; everything that is not part of the mode is done here."""

    def forward():
        with torch.no_grad():
            return function(**inputs)

    def differentiate(output, **options):
        # Offsets and masks do not matter to the dense bound.
        return torch.autograd.grad(output, list(inputs.values()), cotangent, allow_unused=True, **options)

    cotangent = torch.randn_like(forward())
    if mode == "forward":
        return forward
    if mode == "both":
        return lambda: differentiate(function(**inputs))
    output = function(**inputs)
    return lambda: differentiate(output, retain_graph=True)


def rotating_calls(case: Case, function: Callable[..., Tensor]) -> Callable[[], object]:
    """Calls on one copy of the inputs after the other, so many that a GPU's L2 cache holds none from the last round."""
    inputs = case.inputs()
    copies = 1
    if case.device == "cuda":
        cache_bytes = torch.cuda.get_device_properties(case.device).L2_cache_size
        copies = min(32, 1 + math.ceil(2 * cache_bytes / sum(x.nbytes for x in inputs.values())))
    calls = itertools.cycle([timed_call(function, case.inputs(seed), case.mode) for seed in range(copies)])
    return lambda: next(calls)()


def peak_bytes(call: Callable[[], object]) -> int:
    """GPU memory one call takes beyond what is there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def describe(case: Case, seconds: list[float]) -> dict[str, object]:
    """Times, rates, and the share of the roof: copying what must move or a dense convolution, whichever is longer."""
    inputs = case.op.make_inputs(case.shape, DTYPES[case.precision], "meta", 0)
    output = case.op.function(**inputs)
    p20, p50, p80 = np.percentile(seconds, (20, 50, 80))
    flops, moved = case.op.flops(inputs, case.mode), case.op.bytes_moved(inputs, output, case.mode)
    roof = moved / copy_roof(case.device)
    if "weight" in inputs:
        roof = max(roof, flops / convolution_roof(case.device, case.precision, case.shape))
    return {
        "ms_p20": 1e3 * p20,
        "ms_p50": 1e3 * p50,
        "ms_p80": 1e3 * p80,
        "TFLOP/s": flops / p50 / 1e12,
        "GB/s": moved / p50 / 1e9,
        "percent_of_roof": 100 * roof / p50,
    }


def why_missing(case: Case, error: Exception) -> str | None:
    """Why a rival cannot run this case; None if the error is a fault, as every error of our own operator is."""
    expected = isinstance(error, (Missing, torch.OutOfMemoryError)) or "not implemented for" in str(error)
    return str(error).splitlines()[0] if expected and case.provider != "ours" else None


@pytest.mark.benchmark(timer=synchronised_clock)
def test_kernel(case, benchmark):
    benchmark.group = f"{case.op.name} {case.shape} {case.precision} {case.mode}"
    try:
        with float32_products(case.precision):
            error = checked(case.op, case.provider, case.shape, case.precision, case.device)
            measure(case, rotating_calls(case, function_of(case)), benchmark)
    except (Missing, RuntimeError) as fault:
        if reason := why_missing(case, fault):
            pytest.skip(f"missing provider {case.provider}: {reason}")
        raise
    benchmark.extra_info["error"] = error


def measure(case: Case, call: Callable[[], object], benchmark) -> None:
    if benchmark.disabled:
        benchmark.pedantic(call)
        return
    call()
    start = synchronised_clock()
    call()
    # A round of some milliseconds, so that reading the clock does not count.
    iterations = max(1, min(1000, int(5e-3 / (synchronised_clock() - start))))
    benchmark.pedantic(call, rounds=ROUNDS, iterations=iterations, warmup_rounds=2)
    benchmark.extra_info |= describe(case, benchmark.stats.stats.data)
    if case.device == "cuda":
        benchmark.extra_info["peak_MB"] = peak_bytes(call) / 1e6
