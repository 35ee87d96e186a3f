"""Timing a checked call: rounds, memory, roofs, and what every row of a benchmark says."""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.bench.op import Shape
from kernels.bench.roofline import convolution_flops_per_second, copy_bytes_per_second, synchronised_clock

ROUNDS = 20
SECONDS = 5.0


class Missing(Exception):
    """A provider that cannot run here, and why."""


def why_missing(provider: str, error: Exception) -> str | None:
    """Why a rival cannot run a case; None if the error is a fault, as every error of our own operators is."""
    expected = isinstance(error, (Missing, torch.OutOfMemoryError)) or "not implemented for" in str(error)
    return str(error).splitlines()[0] if expected and provider not in ("ours", "graph") else None


@contextmanager
def named_if_missing(row: dict[str, str], record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Skip the test with the reason where a rival cannot run, and leave a note for the table of results."""
    try:
        yield
    except (Missing, RuntimeError) as fault:
        reason = why_missing(row["provider"], fault)
        if reason is None:
            raise
        record_property("missing", row | {"reason": reason})
        pytest.skip(f"missing provider {row['provider']}: {reason}")


@cache
def torchvision_deform_conv2d() -> Callable[..., Tensor]:
    """torchvision's operator.

    Raises:
        Missing: It does not import; beside another build of torch it raises a RuntimeError while it is imported.
    """
    try:
        from torchvision.ops import deform_conv2d
    except (ImportError, RuntimeError) as error:
        raise Missing(f"it does not import ({str(error).splitlines()[0]})") from error
    return deform_conv2d


def copies_past_the_cache(inputs: Iterable[Tensor]) -> int:
    """So many copies of the inputs that, taken in turn, a GPU's L2 cache holds none of them when its turn comes."""
    inputs = list(inputs)
    if inputs[0].device.type != "cuda":
        return 1
    cache_bytes = torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
    return min(32, 1 + math.ceil(2 * cache_bytes / sum(x.nbytes for x in inputs)))


def in_turn(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """One call after the other, round and round."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


@cache
def _copy_roof(device: str) -> float:
    return copy_bytes_per_second(torch.device(device))


@cache
def _convolution_roof(device: str, precision: str, shape: Shape) -> float:
    return convolution_flops_per_second(torch.device(device), precision, shape)


def roof_seconds(device: str, precision: str, moved: int, flops: int, convolution: Shape | None) -> float:
    """The least time: copying the bytes that must move, or a dense `convolution`'s time for the operations."""
    seconds = moved / _copy_roof(device)
    return seconds if convolution is None else max(seconds, flops / _convolution_roof(device, precision, convolution))


def measure(call: Callable[[], object], benchmark) -> list[float] | None:
    """Seconds of a call in every round; None where benchmarks are switched off and it runs once."""
    if benchmark.disabled:
        benchmark.pedantic(call)
        return None
    call()
    start = synchronised_clock()
    call()
    once = synchronised_clock() - start
    # A round of some milliseconds, so that reading the clock does not count; few rounds of what takes seconds.
    iterations = max(1, min(1000, int(5e-3 / once)))
    rounds = max(3, min(ROUNDS, int(SECONDS / once)))
    benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=2 if once < 0.1 else 0)
    return benchmark.stats.stats.data


def rates(seconds: list[float], flops: int, moved: int, roof: float) -> dict[str, float]:
    """The figures of a row: percentiles of the time, rates at the median, and the share of the roof in seconds."""
    p20, p50, p80 = np.percentile(seconds, (20, 50, 80))
    return {
        "ms_p20": 1e3 * p20,
        "ms_p50": 1e3 * p50,
        "ms_p80": 1e3 * p80,
        "TFLOP/s": flops / p50 / 1e12,
        "GB/s": moved / p50 / 1e9,
        "percent_of_roof": 100 * roof / p50,
    }


def memory(call: Callable[[], Iterable[Tensor | None]], device: str, beside: int) -> dict[str, float]:
    """GPU memory that a call takes beyond what is there before it: all of it, and that beyond its results.

    Results are what the call returns, and `beside` bytes that it makes on the way without returning them.
    """
    if device != "cuda":
        return {}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = beside + sum(x.nbytes for x in call() if x is not None)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return {"peak_MB": peak / 1e6, "workspace_MB": (peak - results) / 1e6}


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """PyTorch's deterministic algorithms, without the filling of fresh memory that is for finding mistakes."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        # cuBLAS wants to be asked by name, too; whether it was is looked up at every call.
        with patch.dict(os.environ, CUBLAS_WORKSPACE_CONFIG=":4096:8"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
