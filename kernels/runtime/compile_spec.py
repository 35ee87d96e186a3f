"""What ahead-of-time compilation needs to know about one kernel in one shipped configuration."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CompileSpec:
    """One Triton kernel as it is launched, described without a tensor or a GPU.

    Attributes:
        name: How the table calls it, e.g. `"dynamic_relu forward"`.
        kernel: The `@triton.jit` function.
        signature: Triton type of every run-time argument by name: `"*bf16"`, `"i32"`, `"i64"`, `"fp32"`.
            Pointers are taken to be aligned to 16 bytes, as those of a PyTorch allocation are.
        constexprs: Value of every `tl.constexpr` argument by name.
        num_warps: Warps of one program.
        num_stages: Depth of the software pipeline.
        dtype: `"fp32"`, `"fp16"`, `"bf16"` or `"fp64"`: what the table shows as the precision of the tensors.
        uses_dot: The kernel multiplies matrices, so tensor-core instructions must appear in its code.
        divisible: Integer arguments that are multiples of 16 at the shapes the configuration is made for; the launcher
            finds this out by itself at run time, an ahead-of-time compilation has to be told.
        exact: Products and sums are not fused into one operation.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    dtype: str
    uses_dot: bool = False
    divisible: tuple[str, ...] = ()
    exact: bool = False
