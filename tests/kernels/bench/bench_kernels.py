"""Time of every operator beside its rivals; checked against float64 before it is timed.

    pytest --benchmark-only -k bench_kernels                           on a CPU: PyTorch paths
    pytest --benchmark-only -k "bench_kernels and P3-b8 and bf16"      on a GPU: a selection of all
    pytest --benchmark-only -k bench_kernels -m headline               on a GPU: batch 8, P3, P4, 16 bit

Without `--benchmark-only` every small CPU case runs once, untimed, so that this file cannot rot.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from onnx_deform_conv import onnxruntime_deform_conv2d
from timing import (
    Missing,
    copies_past_the_cache,
    deterministic_algorithms,
    in_turn,
    measure,
    memory,
    named_if_missing,
    rates,
    roof_seconds,
    torchvision_deform_conv2d,
)
from torch import Tensor

from kernels.bench.op import DETERMINISTIC, MODES, OPS, Op, Shape, plain_mode, pyramid, rounding
from kernels.bench.roofline import DTYPES, float32_products, synchronised_clock

# What the default grid trains on: the two ends of a pyramid of 64 channels.
CPU_SHAPES = (Shape("16x16", 8, 64, 16, 16), Shape("2x2", 8, 64, 2, 2))
GPU_SHAPES = tuple(shape for batch in (1, 8, 16) for shape in pyramid(batch))
# `dense` is no rival but the bound: a channels-last 3x3 convolution of the same shape.
PROVIDERS = {
    "deform_conv2d": ("ours", "torchvision", "onnxruntime", "plain", "compiled", "dense"),
    "dynamic_relu": ("ours", "plain", "compiled"),
}


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

    @property
    def row(self) -> dict[str, str]:
        names = {"op": self.op.name, "shape": str(self.shape), "precision": self.precision}
        return names | {"mode": self.mode, "provider": self.provider, "device": self.device}

    @property
    def headline(self) -> bool:
        """Compiling takes longest, so one type of it must do."""
        shapes = self.device == "cuda" and self.shape.batch == 8 and self.shape.name in ("P3", "P4")
        return shapes and self.precision in (("bf16",) if self.provider == "compiled" else ("fp16", "bf16"))


def cases(device: str, timed: bool) -> list[Case]:
    gpu = device == "cuda"
    # A CPU's large maps take seconds, and their checks minutes, so there are two, and only where times are wanted.
    shapes = GPU_SHAPES if gpu else CPU_SHAPES + tuple(pyramid(1)[:2] if timed else ())
    return [
        Case(op, provider, shape, precision, mode, device)
        for op in OPS.values()
        for shape in shapes
        for precision in (DTYPES if gpu else ("fp32",))
        for mode in ((*MODES, *DETERMINISTIC) if gpu else ("forward", "both"))
        for provider in PROVIDERS[op.name]
        if timed or provider != "compiled"
        # Nothing is multiplied in an elementwise operator, and no order of sums is left to chance.
        if op.name != "dynamic_relu" or (precision != "tf32" and mode in MODES)
        if mode in MODES or provider == "ours"
        # It has nothing but a forward for CPUs.
        if provider != "onnxruntime" or (mode == "forward" and not gpu)
    ]


def pytest_generate_tests(metafunc):
    timed = metafunc.config.getoption("benchmark_only", False)
    found = cases("cuda" if timed and torch.cuda.is_available() else "cpu", timed)
    marked = [pytest.param(case, marks=pytest.mark.headline) if case.headline else case for case in found]
    metafunc.parametrize("case", marked, ids=str)


@lru_cache(maxsize=1)
def compiled(op: Op, shape: Shape, precision: str) -> Callable[..., Tensor]:
    # Anew for every shape: after some recompilations of one function, PyTorch would run it eagerly and not say so.
    torch.compiler.reset()
    # With donated buffers a backward could not be timed on its own, again and again for one forward.
    torch._functorch.config.donated_buffer = False
    return torch.compile(op.reference, dynamic=False)


def torchvision_function(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return torchvision_deform_conv2d()(input, offset, weight, padding=(1, 1), mask=mask)


def function_of(case: Case) -> Callable[..., Tensor]:
    if case.provider == "ours":
        return case.op.function
    if case.provider == "plain":
        return case.op.reference
    if case.provider == "compiled":
        if case.device == "cpu":
            raise Missing("compiling for a CPU needs a C++ compiler, and takes minutes for figures in microseconds")
        return compiled(case.op, case.shape, case.precision)
    if case.provider == "torchvision":
        return torchvision_function
    if case.provider == "onnxruntime":
        return partial(onnxruntime_deform_conv2d, padding=(1, 1))
    return lambda input, offset, weight, mask: F.conv2d(input, weight, padding=1)


@cache
def limits(op: Op, shape: Shape, precision: str, device: str) -> dict[str, float]:
    inputs = op.make_inputs(shape, DTYPES[precision], device, 0)
    products = 2.0**-10 if precision == "tf32" else 0
    terms = inputs["weight"][0].numel() if "weight" in inputs else shape.height * shape.width
    return op.limits(inputs, rounding(DTYPES[precision], terms) + products)


@cache
def checked(op: Op, provider: str, shape: Shape, precision: str, device: str, deterministic: bool) -> float | None:
    """The largest error of output and gradients, once for all modes, of either determinism; None for the bound."""
    if provider == "dense":
        return None
    case = Case(op, provider, shape, precision, "both", device)
    within = deterministic_algorithms if deterministic else nullcontext
    inputs = op.make_inputs(shape, DTYPES[precision], device, 0)
    if provider == "onnxruntime":
        errors = {"output": op.output_error(function_of(case), inputs)}
    else:
        errors = op.errors(function_of(case), inputs, within)
    if provider == "ours":
        allowed = limits(op, shape, precision, device)
        wrong = {name: (error, allowed[name]) for name, error in errors.items() if not error <= allowed[name]}
        assert not wrong, f"errors beyond their limit, not timed: {wrong}"
    elif DTYPES[precision] == torch.float32:
        # Rivals may round as they like in 16 bits, where the error stands beside their time.
        assert max(errors.values()) < 0.01, f"not the same operator, not timed: {errors}"
    return max(errors.values())


@lru_cache(maxsize=1)
def input_sets(op: Op, shape: Shape, precision: str, device: str) -> list[dict[str, Tensor]]:
    first = op.make_inputs(shape, DTYPES[precision], device, 0)
    seeds = range(1, copies_past_the_cache(first.values()))
    return [first, *(op.make_inputs(shape, DTYPES[precision], device, seed) for seed in seeds)]


def timed_call(function: Callable[..., Tensor], inputs: dict[str, Tensor], mode: str) -> Callable[[], tuple[Tensor]]:
    """One call of a mode, without arguments, for its results; what is not part of the mode is done here."""

    def forward():
        with torch.no_grad():
            return (function(**inputs),)

    def differentiate(output, **options):
        # Offsets and masks do not matter to the dense bound.
        return torch.autograd.grad(output, list(inputs.values()), cotangent, allow_unused=True, **options)

    cotangent = torch.randn_like(forward()[0])
    if mode == "forward":
        return forward
    if mode == "both":
        return lambda: differentiate(function(**inputs))
    output = function(**inputs)
    return lambda: differentiate(output, retain_graph=True)


def figures(case: Case, call: Callable[[], tuple[Tensor]], seconds: list[float]) -> dict[str, float]:
    """Times, rates, the share of the roof, and memory."""
    inputs = case.op.make_inputs(case.shape, DTYPES[case.precision], "meta", 0)
    output, mode = case.op.function(**inputs), plain_mode(case.mode)
    flops, moved = case.op.flops(inputs, mode), case.op.bytes_moved(inputs, output, mode)
    convolution = case.shape if "weight" in inputs else None
    roof = roof_seconds(case.device, case.precision, moved, flops, convolution)
    beside = output.nbytes if mode == "both" else 0
    return rates(seconds, flops, moved, roof) | memory(call, case.device, beside)


@pytest.mark.benchmark(timer=synchronised_clock)
def test_kernel(case, benchmark, record_property):
    benchmark.group = f"{case.op.name} {case.shape} {case.precision} {case.mode}"
    deterministic = case.mode in DETERMINISTIC
    with named_if_missing(case.row, record_property), float32_products(case.precision):
        error = checked(case.op, case.provider, case.shape, case.precision, case.device, deterministic)
        sets = input_sets(case.op, case.shape, case.precision, case.device)
        function = function_of(case)
        if case.provider == "onnxruntime":
            # It reads no other layout, and would copy.
            sets = [{name: x.detach().contiguous() for name, x in inputs.items()} for inputs in sets]
        with deterministic_algorithms() if deterministic else nullcontext():
            call = in_turn([timed_call(function, inputs, plain_mode(case.mode)) for inputs in sets])
            if seconds := measure(call, benchmark):
                benchmark.extra_info |= case.row | figures(case, call, seconds) | {"error": error}
