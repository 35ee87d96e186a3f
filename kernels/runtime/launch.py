"""A launch of a kernel as data, so that what is compiled ahead of time is exactly what runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import INTERPRET
from kernels.runtime.compile_spec import CompileSpec, Slot

_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


def real(dtype: torch.dtype) -> torch.dtype:
    """The type of sums over tensors of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def triton_real(dtype: torch.dtype) -> tl.dtype:
    """`real` as Triton calls it."""
    return tl.float64 if real(dtype) == torch.float64 else tl.float32


def steps(total: int, block: int) -> int:
    """Blocks that cover `total`, rounded up to a power of two, so that few variants of a kernel are compiled."""
    return int(triton.next_power_of_2(triton.cdiv(total, block)))


@dataclass(frozen=True)
class Launch:
    """One run of a kernel.

    Attributes:
        kernel: The `@triton.jit` function.
        grid: Programs along up to three axes.
        arguments: Run-time arguments by name: tensors, numbers, and NamedTuples of them.
        constants: `tl.constexpr` arguments by name: values, and NamedTuples of them.
        warps: Warps of one program.
        stages: Depth of the software pipeline.
        exact: Whether no product and sum are made one operation: every result is rounded as PyTorch rounds it.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2
    exact: bool = False

    def run(self) -> None:
        """Run the kernel on the device of its tensors."""
        device = next(x for _, x in self._leaves() if isinstance(x, Tensor)).device
        with torch.cuda.device(device if device.type == "cuda" else -1):
            self.kernel[self.grid](
                **self.arguments,
                **self._constexprs(),
                num_warps=self.warps,
                num_stages=self.stages,
                enable_fp_fusion=not self.exact,
            )

    def spec(self, name: str, dtype: torch.dtype, uses_dot: bool = False) -> CompileSpec:
        """What ahead-of-time compilation needs; the launch may have tensors on the `meta` device."""
        numbers = {path: x for path, x in self._leaves() if isinstance(x, int)}
        return CompileSpec(
            name=name,
            kernel=self.kernel,
            signature={key: _types(value) for key, value in self.arguments.items()},
            constexprs=self._constexprs(),
            num_warps=self.warps,
            num_stages=self.stages,
            dtype=_NAMES[dtype],
            uses_dot=uses_dot,
            # The launcher compiles a number that is 1 into the kernel, and so must this.
            compiled_in=tuple((path, x) for path, x in numbers.items() if x == 1),
            divisible=tuple(path for path, x in numbers.items() if x % 16 == 0),
            exact=self.exact,
        )

    def _leaves(self) -> Iterator[tuple[Slot, Any]]:
        for name, value in self.arguments.items():
            if isinstance(value, tuple):
                yield from (((name, number), field) for number, field in enumerate(value))
            else:
                yield (name,), value

    def _constexprs(self) -> dict[str, Any]:
        # Interpreted, a kernel is plain Python. Compiled, a field that is no `tl.constexpr` would no longer be known.
        if INTERPRET:
            return self.constants
        return {
            name: type(value)(*map(tl.constexpr, value)) if hasattr(value, "_fields") else value
            for name, value in self.constants.items()
        }


def _types(value: Any) -> Any:
    """The type of an argument as Triton writes it, and a NamedTuple of types for a NamedTuple."""
    if isinstance(value, tuple):
        return type(value)(*map(_types, value))
    if isinstance(value, Tensor):
        return f"*{_NAMES[value.dtype]}"
    if isinstance(value, int):
        return "constexpr" if value == 1 else "i32" if value < 2**31 else "i64"
    return "fp32"
