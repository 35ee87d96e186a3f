"""The benchmarks never pass on nothing, never time a wrong operator and name what is missing."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import bench_heads
import bench_kernels
import pytest
import torch
from places import ROOT
from timing import Missing, why_missing

from kernels import deform_conv2d
from kernels.bench.goals import GOALS, Name
from kernels.bench.op import OPS
from kernels.bench.table import main as table


def run(*arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    # A pytest that thinks it is a worker of this one would not measure.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_measuring_nothing_is_a_failure():
    result = run("tests/test_house.py", "--benchmark-only")
    assert result.returncode == 1
    assert "nothing was measured" in result.stdout


def test_rows_of_a_run_become_a_table_that_names_what_is_missing(tmp_path):
    files = ("tests/kernels/bench/bench_kernels.py", "tests/kernels/bench/bench_heads.py")
    result = run(*files, "--benchmark-only", "--benchmark-json", tmp_path / "rows.json", "-k", "2x2-b8 or c64-b8")
    assert result.returncode == 0, result.stdout[-4000:]
    header = next(line for line in result.stdout.splitlines() if line.startswith("benchmark "))
    assert {"ms_p50", "GB/s", "TFLOP/s", "percent_of_roof", "error"} <= set(header.split())
    assert table([str(tmp_path / "rows.json"), str(tmp_path / "results")]) == 0
    rows = json.loads((tmp_path / "results" / "kernels.json").read_text())
    assert rows["failed"] == [] and "--benchmark-only" in rows["machine_info"]["commands"][0]
    measured = {_name(bench["extra_info"]) for bench in rows["benchmarks"]}
    missing = {_name(row) for row in rows["missing"]}
    expected = [case for case in bench_kernels.cases("cpu", timed=True) if case.shape.name == "2x2"]
    assert {Name(**case.row) for case in [*expected, *bench_heads.CPU_CASES]} == measured | missing
    assert not measured & missing and {name.provider for name in missing} <= {"torchvision", "onnxruntime", "compiled"}
    for name in missing:
        assert f"missing provider {name.provider}" in result.stdout


def _name(row):
    return Name(**{field: row[field] for field in Name.__dataclass_fields__})


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_wrong_operator_is_not_timed(op):
    shape = bench_kernels.CPU_SHAPES[1]
    wrong = replace(op, function=lambda **tensors: 1.0001 * op.function(**tensors))
    with pytest.raises(AssertionError, match="not timed"):
        bench_kernels.checked(wrong, "ours", shape, "fp32", "cpu", False)
    assert bench_kernels.checked(op, "ours", shape, "fp32", "cpu", False) < 1e-5


@pytest.mark.parametrize("mode", ["forward", "both"])
def test_a_wrong_block_is_not_timed(mode):
    case = next(case for case in bench_heads.CPU_CASES if case.mode == mode)
    head = case.head(torch.float32, "cpu")
    reference = bench_heads.exact_and_allowed(case)
    assert bench_heads.checked(case, head, *reference) < 1e-5
    with torch.no_grad():
        head.blocks[0].scale.gate.bias += 1e-3
    with pytest.raises(AssertionError, match="not timed"):
        bench_heads.checked(case, head, *reference)


def test_a_wrong_gradient_of_a_block_is_not_timed():
    case = next(case for case in bench_heads.CPU_CASES if case.mode == "both")
    head = case.head(torch.float32, "cpu")
    head.blocks[0].spatial.offset.weight.register_hook(lambda gradient: 1.01 * gradient)
    with pytest.raises(AssertionError, match="not timed"):
        bench_heads.checked(case, head, *bench_heads.exact_and_allowed(case))


def test_our_own_operator_is_never_merely_missing():
    error = RuntimeError("not implemented for 'Half'")
    assert why_missing("torchvision", error) == str(error)
    assert why_missing("torchvision", Missing("not there")) == "not there"
    assert why_missing("ours", error) is why_missing("graph", error) is None
    assert why_missing("plain", RuntimeError("illegal memory access")) is None


def test_the_headline_has_every_row_that_a_goal_needs():
    gpu = [*bench_kernels.cases("cuda", timed=True), *bench_heads.GPU_CASES]
    headline = {Name(**case.row) for case in gpu if case.headline}
    cpu = {Name(**case.row) for case in bench_kernels.cases("cpu", timed=True)}
    for goal in GOALS:
        for quantity in goal.quantities:
            names = {quantity.row, quantity.over or quantity.row}
            assert names <= headline or names <= cpu, f"{goal.what}: {quantity.label}"
    # Compiling decides how long the headline takes.
    assert len(headline) < 150 and sum(name.provider == "compiled" for name in headline) < 15


def test_a_head_runs_on_torchvisions_operator_and_comes_back(monkeypatch):
    calls = []

    def operator(input, offset, weight, bias, mask, **settings):
        calls.append(settings["stride"])
        return deform_conv2d(input, offset, weight, bias, mask=mask, **settings)

    monkeypatch.setattr(bench_heads, "torchvision_deform_conv2d", lambda: operator)
    case = next(case for case in bench_heads.CPU_CASES if (case.provider, case.mode) == ("torchvision", "forward"))
    head = case.head(torch.float32, "cpu")
    reference = bench_heads.exact_and_allowed(case)
    assert not calls
    with bench_heads.path_of("torchvision", monkeypatch):
        assert bench_heads.checked(case, head, *reference) < 1e-5
    # Five levels sample themselves, four their finer and four their coarser neighbours.
    assert sorted(calls) == [1] * 9 + [2] * 4
    bench_heads.checked(case, head, *reference)
    assert len(calls) == 13
