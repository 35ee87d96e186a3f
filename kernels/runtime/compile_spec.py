"""What ahead-of-time compilation needs to know about one kernel in one shipped configuration."""

from dataclasses import dataclass
from typing import Any

# Where a value stands among the arguments: the argument's name, and the field's number if it is a NamedTuple.
Slot = tuple[str] | tuple[str, int]


@dataclass(frozen=True)
class CompileSpec:
    """One Triton kernel as it is launched, described without a tensor or a GPU.

    Attributes:
        name: Name in the table, e.g. `"dynamic_relu forward"`.
        kernel: The `@triton.jit` function.
        signature: Triton type of every run-time argument by name: `"*bf16"`, `"i32"`, `"i64"`, `"fp32"`, and
            `"constexpr"` for a number that the launcher compiles in; a NamedTuple of types for a NamedTuple. Pointers
            are taken to be aligned to 16 bytes, as those of a PyTorch allocation are.
        constexprs: Value of every `tl.constexpr` argument by name; the fields of a NamedTuple are `tl.constexpr`.
        num_warps: Warps of one program.
        num_stages: Depth of the software pipeline.
        dtype: `"fp32"`, `"fp16"`, `"bf16"` or `"fp64"`: what the table shows as the precision of the tensors.
        uses_dot: Whether the kernel multiplies matrices, so that tensor-core instructions must appear in its code.
        compiled_in: Values of the run-time numbers that are `"constexpr"` in the signature.
        divisible: Integers that are multiples of 16 at the shapes the configuration is made for; the launcher finds
            this out by itself at run time, an ahead-of-time compilation has to be told.
        exact: Whether products and sums are not fused into one operation.
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    dtype: str
    uses_dot: bool = False
    compiled_in: tuple[tuple[Slot, int], ...] = ()
    divisible: tuple[Slot, ...] = ()
    exact: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """All that is known at compilation, the fields of NamedTuples by their own names."""
        flat: dict[str, Any] = {}
        for name, value in self.constexprs.items():
            fields = value._asdict() if hasattr(value, "_asdict") else {name: value}
            flat |= {field: getattr(x, "value", x) for field, x in fields.items()}
        return flat
