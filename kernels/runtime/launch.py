"""A launch of a kernel as data, so that what is compiled ahead of time is exactly what runs."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.runtime.compile_spec import CompileSpec

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
    return triton.next_power_of_2(triton.cdiv(total, block))


@dataclass(frozen=True)
class Launch:
    """One run of a kernel; `arguments` and `constants` are by name.

    With `exact` no product and sum are made one operation: every result is rounded as PyTorch rounds it.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | float]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2
    exact: bool = False

    def run(self) -> None:
        device = next(x for x in self.arguments.values() if isinstance(x, Tensor)).device
        with torch.cuda.device(device if device.type == "cuda" else -1):
            self.kernel[self.grid](
                **self.arguments,
                **self.constants,
                num_warps=self.warps,
                num_stages=self.stages,
                enable_fp_fusion=not self.exact,
            )

    def spec(self, name: str, dtype: torch.dtype, uses_dot: bool = False) -> CompileSpec:
        """What ahead-of-time compilation needs; the launch may have tensors on the `meta` device."""
        tensors = {k: f"*{_NAMES[v.dtype]}" for k, v in self.arguments.items() if isinstance(v, Tensor)}
        numbers = {k: v for k, v in self.arguments.items() if isinstance(v, int)}
        reals = {k: "fp32" for k, v in self.arguments.items() if isinstance(v, float)}
        # The launcher compiles a number that is 1 into the kernel, and so must this.
        ones = {k: v for k, v in numbers.items() if v == 1}
        return CompileSpec(
            name=name,
            kernel=self.kernel,
            signature=tensors | reals | {k: "i32" if v < 2**31 else "i64" for k, v in numbers.items() if k not in ones},
            constexprs=self.constants | ones,
            num_warps=self.warps,
            num_stages=self.stages,
            dtype=_NAMES[dtype],
            uses_dot=uses_dot,
            divisible=tuple(k for k, v in numbers.items() if v % 16 == 0),
            exact=self.exact,
        )
