"""What kernels are run with, where none of them runs."""

from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor

from kernels import backend
from kernels.block import dyhead_block


def without_work(monkeypatch, see: Callable[[dict[str, Any]], None] = lambda arguments: None) -> None:
    """Kernels are launched on a CPU as on a GPU, but do nothing; `see` is told what each is run with."""
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda self, *_, **named: see(named))
    # Kernels that are never run do not need an interpreter on a CPU.
    for module in (backend, dyhead_block):
        monkeypatch.setattr(module, "INTERPRET", True)


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether tensors are the same and not only equal."""

    def alike(a: Any, b: Any) -> bool:
        if isinstance(a, tuple):
            return type(a) is type(b) and all(map(alike, a, b))
        return a is b if isinstance(a, Tensor) else bool(a == b)

    return found.keys() == expected.keys() and all(alike(found[name], expected[name]) for name in found)
