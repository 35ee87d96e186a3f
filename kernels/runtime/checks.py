"""What the public operators ask of their arguments, before either path is chosen: one text on every path.

Nothing here reads what a tensor holds, so nothing waits for a GPU. A message is built only when it is raised, and sizes
may be symbols of `torch.compile` and `torch.export`.
"""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import SymFloat, SymInt, Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


# How many answers of a check are kept; the oldest make room.
KEPT = 512

P = ParamSpec("P")
T = TypeVar("T")


class remembered(Generic[P, T]):
    """A check whose answer is a matter of a call's signature, and is kept by it; errors are not kept.

    The check is called as before, but with the signature, and what else its answer depends on, in front.
    """

    def __init__(self, check: Callable[P, T]) -> None:
        self.check = check
        self._answers: dict[Any, T] = {}

    def __call__(self, key: Any, *arguments: P.args, **named: P.kwargs) -> T:
        if key is None:
            return self.check(*arguments, **named)
        try:
            return self._answers[key]
        except KeyError:
            answer = self.check(*arguments, **named)
        if len(self._answers) >= KEPT:
            self._answers.pop(next(iter(self._answers)), None)
        self._answers[key] = answer
        return answer


def check_tensor(name: str, value: Any, shape: str, dims: int, dtypes: Sequence[torch.dtype] = FLOATING) -> None:
    """A dense tensor with so many dimensions, of one of these types.

    Args:
        name: Name of the argument.
        value: Value that was given.
        shape: Shape as the message writes it, `"(N, C, H, W)"`.
        dims: Number of dimensions of that shape.
        dtypes: `FLOATING` or `INTEGER`.

    Raises:
        TypeError: The value is no tensor.
        ValueError: The tensor has another number of dimensions, another type, or a sparse or nested layout.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {kind_of(value)}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else f"one with the layout {value.layout}"
        raise ValueError(f"{name} must be a dense tensor {shape}, got {kind}")
    if value.dim() != dims:
        raise ValueError(f"{name} must be {shape}, got shape {tuple(value.shape)}")
    if value.dtype not in dtypes:
        wanted = "floating point (16, 32 or 64 bits)" if dtypes is FLOATING else "of integers"
        raise ValueError(f"{name} must be {wanted}, got {value.dtype}")


def check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """A tensor must lie where another one lies, or it is a ValueError."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}; it is on {tensor.device}")


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number from `least` on, up to and with `most`, as an int or a symbol for one.

    Raises:
        TypeError: The value is no whole number; a bool is none, either.
        ValueError: The number is out of range.
    """
    if not isinstance(value, SymInt):
        try:
            if isinstance(value, bool | Tensor):
                raise TypeError
            # Also numpy's integers.
            value = value.__index__()
        except (AttributeError, TypeError):
            raise TypeError(f"{name} must be a whole number, got {kind_of(value)}") from None
    if value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"within {least}…{most}"
        raise ValueError(f"{name} must be {limits}, got {value}")
    return value


def check_number(name: str, value: Any) -> float:
    """A real number that is not NaN, as a float.

    Raises:
        TypeError: The value is no number.
        ValueError: The number is NaN, or an integer beyond all floats.
    """
    # Strings and arrays of one number could be read as one, too.
    if isinstance(value, bool) or not isinstance(value, int | float | SymInt | SymFloat | Real):
        raise TypeError(f"{name} must be a number, got {kind_of(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float holds, got {kind_of(value)}") from None
    if number != number:
        raise ValueError(f"{name} must be a number, got NaN")
    return number


def check_pair(name: str, value: Any, least: int, most: int | None = None) -> list[int]:
    """A whole number for both axes, or two of them for height and width; errors as in `check_integer`."""
    if isinstance(value, list | tuple | torch.Size):
        if len(value) != 2:
            raise ValueError(f"{name} must be a whole number or two of them (height, width), got {len(value)} numbers")
        return [check_integer(name, value[0], least, most), check_integer(name, value[1], least, most)]
    both = check_integer(name, value, least, most)
    return [both, both]


def check_flag(name: str, value: Any) -> bool:
    """True or False; anything else is a TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {kind_of(value)}")
    return value


def kind_of(value: Any) -> str:
    """A value as a message calls it: its type, and the value where it is short."""
    if value is None:
        return "None"
    text = type(value).__name__
    return f"{text} {value!r}" if isinstance(value, int | float | str) and len(repr(value)) < 40 else text
