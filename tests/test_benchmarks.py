"""The benchmarks never pass on nothing, never time a wrong operator and name what is missing."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bench_kernels
import pytest

from kernels import OPS

TESTS = Path(__file__).parent


def run(*arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)


def test_measuring_nothing_is_a_failure():
    result = run("tests/test_imports.py", "--benchmark-only")
    assert result.returncode == 1
    assert "nothing was measured" in result.stdout


def test_figures_and_missing_providers_are_printed():
    result = run("tests/bench_kernels.py", "--benchmark-only", "-k", "deform_conv2d-2x2-b8-fp32-forward")
    assert result.returncode == 0, result.stdout[-4000:]
    header = next(line for line in result.stdout.splitlines() if line.startswith("benchmark "))
    assert {"ms_p50", "GB/s", "TFLOP/s", "percent_of_roof", "error"} <= set(header.split())
    for provider in bench_kernels.PROVIDERS["deform_conv2d"]:
        if provider != "compiled":
            measured = f"test_kernel[deform_conv2d-2x2-b8-fp32-forward-{provider}]" in result.stdout
            assert measured != (f"missing provider {provider}" in result.stdout)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_wrong_operator_is_not_timed(op):
    shape = bench_kernels.CPU_SHAPES[1]
    wrong = replace(op, function=lambda **tensors: 1.0001 * op.function(**tensors))
    with pytest.raises(AssertionError, match="not timed"):
        bench_kernels.checked(wrong, "ours", shape, "fp32", "cpu")
    assert bench_kernels.checked(op, "ours", shape, "fp32", "cpu") < 1e-5


def test_our_own_operator_is_never_merely_missing():
    case = bench_kernels.cases("cpu")[0]
    error = RuntimeError("not implemented for 'Half'")
    assert bench_kernels.why_missing(replace(case, provider="torchvision"), error) == str(error)
    assert bench_kernels.why_missing(replace(case, provider="ours"), error) is None
    assert bench_kernels.why_missing(replace(case, provider="plain"), RuntimeError("illegal memory access")) is None
