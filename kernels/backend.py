"""Which implementation an operator runs: Triton on a GPU, plain PyTorch on a CPU, or the one the caller names."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch

Backend = Literal["auto", "triton", "torch"]
BACKENDS = ("auto", "triton", "torch")

# Triton reads the variable when a kernel is decorated, so its value at import is the one that counts.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

_selected: Backend = "auto"


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Select the implementation of every operator called inside the `with` block.

    The choice is made in the forward call and kept for its backward. It belongs to the process, not to a thread.

    Args:
        name: `"auto"` takes Triton for tensors on a GPU and plain PyTorch for tensors on a CPU; `"triton"` and
            `"torch"` take one for all. `"triton"` on CPU tensors works only under `TRITON_INTERPRET=1`.

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
        return "torch" if device.type == "cpu" else "triton"
    if _selected == "triton" and device.type == "cpu" and not INTERPRET:
        raise RuntimeError("the Triton kernels run on CPU tensors only under TRITON_INTERPRET=1, set before the import")
    return _selected


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off for the operators inside; the meta device has none to switch off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
