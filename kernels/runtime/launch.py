"""A launch of a kernel as data, so that what is compiled ahead of time is exactly what runs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernels.backend import INTERPRET
from kernels.runtime.compile_spec import CompileSpec, Slot
from kernels.runtime.tiles import choices

# How many launches of a kernel are kept, and of all kernels that look up the same tables.
KEPT = 512

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


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; elsewhere 132, those of an H100 or H200, and 1 under the interpreter."""
    if INTERPRET:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@dataclass(frozen=True)
class Launch:
    """One run of a kernel.

    Attributes:
        kernel: The `@triton.jit` function.
        grid: Programs along up to three axes.
        arguments: Run-time arguments by name: tensors, numbers, NamedTuples of them, and None.
        constants: `tl.constexpr` arguments by name: values, and NamedTuples of them.
        warps: Warps of one program.
        stages: Depth of the software pipeline.
        exact: Whether no product and sum are made one operation: every result is rounded as PyTorch rounds it.
        tables: Names of arguments whose tensors are the same in every such launch: no caller hands them in.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2
    exact: bool = False
    tables: tuple[str, ...] = ()

    def run(self) -> None:
        """Run the kernel on the device of its tensors."""
        device = next(x for _, x in self._leaves() if isinstance(x, Tensor)).get_device()
        with torch.cuda.device(device):
            self.kernel[self.grid](**self.arguments, **self._settings())

    def without(self, tensors: Sequence[Tensor]) -> "Prepared | None":
        """The launch with places for these tensors; None where it has memory of its own."""
        places = {id(x): place for place, x in enumerate(tensors)}
        rest, alone, together = self._settings(), [], []
        for name, value in self.arguments.items():
            fields = value if isinstance(value, tuple) else (value,)
            if name in self.tables or not any(isinstance(x, Tensor) for x in fields):
                rest[name] = value
            elif any(isinstance(x, Tensor) and id(x) not in places for x in fields):
                return None
            elif isinstance(value, Tensor):
                alone.append((name, places[id(value)]))
            else:
                found = tuple((True, places[id(x)]) if isinstance(x, Tensor) else (False, x) for x in fields)
                together.append((name, type(value), found))
        return Prepared(self.kernel[self.grid], tuple(alone), tuple(together), rest)

    def spec(self, name: str, dtype: torch.dtype, uses_dot: bool = False) -> CompileSpec:
        """What ahead-of-time compilation needs; the launch may have tensors on the `meta` device."""
        as_they_are = {parameter.name for parameter in self.kernel.params if parameter.do_not_specialize}
        numbers = {path: x for path, x in self._leaves() if isinstance(x, int) and path[0] not in as_they_are}
        return CompileSpec(
            name=name,
            kernel=self.kernel,
            signature={
                key: _types(value, key in as_they_are) for key, value in self.arguments.items() if value is not None
            },
            constexprs=self._constexprs() | {name: None for name, value in self.arguments.items() if value is None},
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
            elif value is not None:
                yield (name,), value

    def _settings(self) -> dict[str, Any]:
        how = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": not self.exact}
        return self._constexprs() | how

    def _constexprs(self) -> dict[str, Any]:
        # Interpreted, a kernel is plain Python. Compiled, a field that is no `tl.constexpr` would no longer be known.
        if INTERPRET:
            return self.constants
        return {
            name: type(value)(*map(tl.constexpr, value)) if hasattr(value, "_fields") else value
            for name, value in self.constants.items()
        }


class Prepared(NamedTuple):
    """A launch whose tensors are still to come.

    Attributes:
        kernel: On its grid.
        alone: Arguments that are tensors: their names and which tensors they are.
        together: Arguments that are NamedTuples with tensors: their names and types, and for every field whether it is
            a tensor, and which one or else what.
        rest: All other arguments by name.
    """

    kernel: Callable[..., None]
    alone: tuple[tuple[str, int], ...]
    together: tuple[tuple[str, type, tuple[tuple[bool, Any], ...]], ...]
    rest: dict[str, Any]

    def run(self, tensors: Sequence[Tensor]) -> None:
        """Run it with tensors that differ from those it was made for in their memory alone."""
        arguments = self.rest.copy()
        for name, place in self.alone:
            arguments[name] = tensors[place]
        for name, kind, fields in self.together:
            arguments[name] = kind(*[tensors[x] if is_tensor else x for is_tensor, x in fields])
        with torch.cuda.device(tensors[0].get_device()):
            self.kernel(**arguments)


class Owner:
    """Whose tables launches look up: it keeps these launches, so that they are let go with it.

    Attributes:
        prepared: By launcher, and by all else that they depend on.
    """

    def __init__(self) -> None:
        self.prepared: dict[Any, Prepared] = {}


class Launcher:
    """Runs launches of one kernel. What does not depend on memory is worked out once and kept, the oldest make room.

    Args:
        make: Tensors, None, what has a hash, tuples of these and last, if there is one, an `Owner` -> the launch; a
            tensor comes first.
    """

    def __init__(self, make: Callable[..., Launch]) -> None:
        self.make = make
        self._kept: dict[Any, Prepared] = {}

    def __call__(self, *arguments: Any) -> None:
        if INTERPRET:
            return self.make(*arguments).run()
        kept, told = self._kept, arguments
        if isinstance(arguments[-1], Owner):
            kept, told = arguments[-1].prepared, arguments[:-1]
        tensors: list[Tensor] = []
        key: list[Any] = []
        _tell(told, tensors, key)
        places = [*map(id, tensors)]
        if len(set(places)) < len(places):
            # Which of them are one and the same.
            key += map(places.index, places)
        whole = (self, tensors[0].device, choices(tensors[0].dtype), *key)
        prepared = kept.get(whole)
        if prepared is not None:
            return prepared.run(tensors)
        launch = self.make(*arguments)
        prepared = launch.without(tensors)
        if prepared is not None:
            if len(kept) >= KEPT:
                kept.pop(next(iter(kept)), None)
            kept[whole] = prepared
        launch.run()


def _tell(values: tuple[Any, ...], tensors: list[Tensor], key: list[Any]) -> None:
    """Add all tensors to `tensors`, and to `key` what is known of them without their memory, and everything else."""
    for x in values:
        # Whether something is a tensor takes longest to say of what is none.
        if x is None or type(x) is int:
            key.append(x)
        elif isinstance(x, tuple):
            _tell(x, tensors, key)
        elif isinstance(x, Tensor):
            tensors.append(x)
            key += (x.shape, x.stride(), x.dtype)
        else:
            key.append(x)


def _types(value: Any, as_it_is: bool = False) -> Any:
    """The type of an argument as Triton writes it, and a NamedTuple of types for a NamedTuple.

    The launcher compiles a number that is 1 into the kernel, unless the kernel takes that argument as it is.
    """
    if isinstance(value, tuple):
        return type(value)(*map(_types, value))
    if isinstance(value, Tensor):
        return f"*{_NAMES[value.dtype]}"
    if isinstance(value, int):
        return "constexpr" if value == 1 and not as_it_is else "i32" if value < 2**31 else "i64"
    return "fp32"
