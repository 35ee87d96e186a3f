"""Every shipped kernel compiles for every target without a GPU, and the command that says so can say no."""

import os
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
import triton
import triton.language as tl
from compiled import compiled, find
from places import ROOT

import kernels.bench.compile
from kernels.bench.compile import TABLE, TARGETS, compile_spec
from kernels.bench.fingerprint import fingerprint
from kernels.bench.specs import all_specs
from kernels.regions import roi_align_kernels as roi_align_triton
from kernels.runtime.compile_spec import CompileSpec


@triton.jit
def too_many_values(x, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    b_x = tl.load(x + o)
    tl.store(x + o, b_x / tl.sum(b_x))


@triton.jit
def product(x, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    b_x = tl.load(x + o)
    tl.store(x + o, tl.dot(b_x, b_x, input_precision=PRECISION).to(x.dtype.element_ty))


SPILLING = CompileSpec("too many values", too_many_values, {"x": "*fp32"}, {"SIZE": 16384}, 1, 1, "fp32")
PRODUCT = CompileSpec(
    "product", product, {"x": "*fp32"}, {"SIZE": 64, "PRECISION": "tf32"}, 4, 1, "fp32", uses_dot=True
)


def run(*arguments, **environment):
    command = [sys.executable, "-m", "kernels.bench.compile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


# What differs in kind: a target of each backend, of which the second has what multiplies, in 16 bits or the type that
# there is. The committed table has all of them.
_TYPES = {spec.name: spec.dtype for spec in all_specs()} | {x.name: "bf16" for x in all_specs() if x.dtype == "bf16"}
KINDS = [(name, dtype, "sm_90") for name, dtype in _TYPES.items()]
KINDS += [(spec.name, spec.dtype, "gfx942") for spec in all_specs("gfx942") if spec.dtype == "bf16" and spec.uses_dot]


@pytest.mark.parametrize(("name", "dtype", "target"), KINDS, ids=[" ".join(kind) for kind in KINDS])
def test_every_kernel_compiles(name, dtype, target):
    row = compiled(name, dtype, target)
    assert row.problem == "" and row.spill_bytes == 0 and row.registers > 0
    assert row.tensor_core > 0 or not find(name, dtype, target).uses_dot


def test_the_command_writes_a_table(tmp_path):
    result = run("--only", "nms overlaps", "--target", "sm_80", "sm_100", "--processes", "2", "-o", str(tmp_path))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    table = pd.read_csv(tmp_path / "compile.csv", comment="#")
    overlaps = [spec for spec in all_specs() if spec.name == "nms overlaps"]
    assert len(table) == 2 * len(overlaps) and set(table.target) == {"sm_80", "sm_100"}
    assert set(table.source) == {fingerprint(spec) for spec in overlaps}
    assert "registers" in (tmp_path / "compile.md").read_text()


def test_the_committed_table_is_of_these_kernels():
    """All of them, on every target, without a spill; made from the code as it is."""
    table = pd.read_csv(ROOT / "results" / "compile" / "compile.csv", comment="#")
    found = set(zip(table.kernel, table.dtype, table.target, table.source, strict=True))
    wanted = {(spec.name, spec.dtype, target, fingerprint(spec)) for target in TABLE for spec in all_specs(target)}
    stale = sorted(f"{name} {dtype} {target}" for name, dtype, target, _ in found ^ wanted)
    assert not stale, f"run `python -m kernels.bench.compile -o results/compile`: {len(stale)} differ, {stale[:4]}"
    assert len(table) == len(wanted) and (table.spill_bytes == 0).all() and table.problem.isna().all()


def scaled(x, SCALE: tl.constexpr):
    """A kernel."""
    tl.store(x, tl.load(x) * SCALE)  # a comment


def scaled_by_a_device_function(x, SCALE: tl.constexpr):
    tl.store(x, _twice(tl.load(x)) * SCALE)


@triton.jit
def _twice(x):
    return x + x


def test_a_fingerprint_is_of_code_and_settings_alone():
    def of(function, source=None, **changes):
        kernel = triton.jit(function)
        if source is not None:
            kernel._unsafe_update_src(source)
        spec = CompileSpec("scaled", kernel, {"x": "*fp32"}, {"SCALE": 2}, 4, 1, "fp32")
        return fingerprint(replace(spec, **changes))

    plain = of(scaled)
    source = triton.jit(scaled).src
    assert of(scaled, source.replace("  # a comment", "").replace("A kernel.", "Another text.")) == plain
    assert of(scaled, source.replace("* SCALE", "+ SCALE")) != plain
    assert of(scaled, constexprs={"SCALE": 3}) != plain
    assert of(scaled, signature={"x": "*fp16"}) != plain
    assert of(scaled, num_warps=8) != plain


def test_a_fingerprint_reaches_device_functions(monkeypatch):
    spec = CompileSpec("scaled", triton.jit(scaled_by_a_device_function), {"x": "*fp32"}, {"SCALE": 2}, 4, 1, "fp32")
    before = fingerprint(spec)
    other = triton.jit(scaled)
    monkeypatch.setitem(globals(), "_twice", other)
    assert fingerprint(spec) != before


def test_16_bit_tensors_are_read_16_bytes_at_a_time():
    for spec in all_specs():
        if spec.name.startswith("dynamic_relu") and spec.dtype == "bf16":
            assert "128x" in compiled(spec.name, "bf16", "sm_90").global_loads, spec.name


def test_overlaps_of_boxes_are_rounded_as_in_pytorch(monkeypatch):
    """A product and a sum in one operation, or an approximate division, would keep other boxes at the threshold."""
    made = []
    original = triton.compile
    monkeypatch.setattr(triton, "compile", lambda *args, **kwargs: made.append(original(*args, **kwargs)) or made[-1])
    compile_spec(next(spec for spec in all_specs() if spec.name == "nms overlaps"), "sm_90")
    code = made[0].asm["ptx"]
    assert "div.rn.f32" in code
    assert "fma" not in code and "div.full" not in code


# A warp of 32 threads has 255 registers each, one of 64 has 512.
@pytest.mark.parametrize(("target", "size"), [("sm_90", 16384), ("gfx942", 32768)])
def test_a_spill_is_a_problem(target, size):
    row = compile_spec(replace(SPILLING, constexprs={"SIZE": size}), target)
    assert row.spill_bytes > 0
    assert "spills" in row.problem


def test_a_problem_is_named_and_fails_the_command(monkeypatch, capsys):
    specs = [replace(SPILLING, constexprs={"SIZE": 128}), SPILLING]
    monkeypatch.setattr(kernels.bench.compile, "all_specs", lambda *target: specs)
    assert kernels.bench.compile.main(["--target", "sm_90", "--processes", "1"]) == 1
    assert "2 compiled, 1 with a problem\ntoo many values fp32 sm_90: spills" in capsys.readouterr().out


@pytest.mark.parametrize("target", TARGETS)
def test_tensor_cores_are_seen(target):
    row = compile_spec(PRODUCT, target)
    assert row.tensor_core > 0
    assert row.problem == ""


def test_a_product_without_tensor_cores_is_a_problem():
    scalar = replace(PRODUCT, constexprs={"SIZE": 64, "PRECISION": "ieee"})
    assert "no tensor-core instruction" in compile_spec(scalar, "sm_80").problem


def test_more_shared_memory_than_the_gpu_has_is_a_problem():
    large = replace(PRODUCT, constexprs={"SIZE": 256, "PRECISION": "tf32"}, num_warps=32)
    assert "shared memory" in compile_spec(large, "gfx942").problem


def test_a_kernel_that_does_not_compile_is_a_problem():
    broken = replace(PRODUCT, constexprs={"SIZE": 63, "PRECISION": "tf32"})
    assert compile_spec(broken, "sm_80").problem.startswith("does not compile")


@pytest.mark.parametrize("launch", [roi_align_triton.forward_launch, roi_align_triton.backward_launch])
def test_roi_align_of_a_single_bin_compiles(launch):
    """The launcher compiles a number in that is 1, here every size there is: in the kernel it is no tensor then."""
    boxes, rows, x = (torch.empty(shape, device="meta") for shape in ((1, 4), (1, 1, 1, 1), (1, 1, 1, 1)))
    images = torch.empty(1, dtype=torch.int32, device="meta")
    first, second = (x, rows) if launch is roi_align_triton.forward_launch else (rows, x)
    spec = launch(first, second, boxes, images, 0, True).spec("single bin", torch.float32)
    assert compile_spec(spec, "sm_80").problem == ""


def test_a_spec_must_describe_every_argument():
    with pytest.raises(ValueError, match="the kernel takes"):
        compile_spec(replace(PRODUCT, signature={}), "sm_80")


def test_the_interpreter_is_refused():
    result = run(TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr


def test_an_unknown_kernel_lists_the_known_ones():
    result = run("--only", "nothing of the kind")
    assert result.returncode == 2
    assert "dynamic_relu forward" in result.stderr
