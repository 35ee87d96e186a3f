"""Kernels compiled once for all tests of a process that look at their machine code."""

from functools import cache

from kernels.bench.compile import Row, compile_spec
from kernels.bench.specs import all_specs
from kernels.runtime.compile_spec import CompileSpec


@cache
def _specs(target: str) -> list[CompileSpec]:
    return all_specs(target)


def find(name: str, dtype: str, target: str = "sm_90") -> CompileSpec:
    return next(spec for spec in _specs(target) if spec.name == name and spec.dtype == dtype)


@cache
def compiled(name: str, dtype: str, target: str) -> Row:
    """What the compiler made of a shipped kernel."""
    return compile_spec(find(name, dtype, target), target)
