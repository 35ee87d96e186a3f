"""Which implementation an operator runs: Triton where it compiles, plain PyTorch elsewhere, or the one asked for."""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch

Backend = Literal["auto", "triton", "torch"]
BACKENDS = ("auto", "triton", "torch")

# Where Triton compiles for: NVIDIA's and AMD's GPUs, both of which PyTorch calls cuda, and Intel's.
TRITON_DEVICES = ("cuda", "xpu")

# Triton reads the variable when a kernel is decorated, so its value at import is the one that counts.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

_INSTALLED = importlib.util.find_spec("triton") is not None

_selected: Backend = "auto"
# What has been said of a device that runs plain PyTorch; once is enough.
_said: set[str] = set()


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Select the implementation of every operator called inside the `with` block.

    The choice is made in the forward call and kept for its backward. It belongs to the process, not to a thread.

    Args:
        name: `"auto"` takes Triton for tensors on a GPU of NVIDIA, AMD or Intel where Triton can be imported, and plain
            PyTorch for all others, which it says once where that is not a CPU. `"triton"` and `"torch"` take one for
            all. `"triton"` on CPU tensors works only under `TRITON_INTERPRET=1`.

    Raises:
        ValueError: `name` is no backend.

    Example:
        >>> import torch
        >>> from kernels import dynamic_relu, use_backend
        >>> with use_backend("torch"):
        ...     dynamic_relu(torch.tensor([[[[-2.0, 3.0]]]]), torch.tensor([[[1.0], [0.0], [0.5], [0.0]]]))
        tensor([[[[-1.,  3.]]]])
    """
    global _selected
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; the backends are {', '.join(BACKENDS)}")
    previous, _selected = _selected, name
    try:
        yield
    finally:
        _selected = previous


def resolve_backend(device: torch.device) -> Literal["triton", "torch"]:
    """The implementation that runs for tensors on `device` under the current selection.

    Raises:
        RuntimeError: Triton was asked for on a CPU without its interpreter.
    """
    if _selected == "auto":
        if device.type in ("cpu", "meta"):
            return "torch"
        reason = reason_against_triton(device.type)
        if reason is None:
            return "triton"
        if device.type not in _said and not torch.compiler.is_compiling():
            _said.add(device.type)
            warnings.warn(f"operators on {device.type!r} run in plain PyTorch: {reason}", stacklevel=3)
        return "torch"
    if _selected == "triton" and device.type == "cpu" and not INTERPRET:
        raise RuntimeError("the Triton kernels run on CPU tensors only under TRITON_INTERPRET=1, set before the import")
    return _selected


def reason_against_triton(device_type: str) -> str | None:
    """Why Triton cannot run on a type of device, "cuda" or another; None if it can."""
    if device_type not in TRITON_DEVICES:
        return f"Triton compiles for {' and '.join(TRITON_DEVICES)}"
    if torch.compiler.is_compiling():
        # A compiler does not follow imports; what it makes for these devices needs Triton itself.
        return None if _INSTALLED else "Triton is not installed"
    try:
        importlib.import_module("triton")
    # A wheel for another system fails in other ways than a missing one.
    except Exception as error:
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    return None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off for the operators inside; the meta device has none to switch off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
