"""Tensors inside larger buffers of poison, so that what an operator reads or writes outside of them is seen.

A read outside brings NaN (or an absurd integer) into the result; a write outside changes the poison.
"""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

GUARD = 64
LAYOUTS = ("contiguous", "channels_last", "gaps")


def _poison(dtype: torch.dtype) -> float | int:
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max if dtype != torch.bool else True


def _bits(buffer: Tensor) -> Tensor:
    return buffer.view(torch.uint8)


class Buffers:
    """The buffers of one call."""

    def __init__(self):
        self._watched: list[tuple[Tensor, Tensor, Tensor]] = []

    def _watch(self, buffer: Tensor, view: Tensor) -> None:
        outside = torch.ones(buffer.numel(), dtype=torch.bool)
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        self._watched.append((buffer, buffer.clone(), outside))

    def place(self, tensor: Tensor, layout: str = "contiguous") -> Tensor:
        """A copy of `tensor` in the middle of a new buffer, a leaf of its own.

        Args:
            layout: one of `LAYOUTS`; `"channels_last"` counts for 4 dimensions, `"gaps"` has poison between elements.
        """
        if layout == "channels_last" and tensor.dim() == 4:
            like = torch.empty_like(tensor, memory_format=torch.channels_last, device="meta")
        elif layout == "gaps":
            like = torch.empty([2 * size + 1 for size in tensor.shape], device="meta")[
                (slice(1, None, 2),) * tensor.dim()
            ]
        else:
            like = torch.empty(tensor.shape, device="meta")
        return self._inside(tensor.detach(), like.stride()).requires_grad_(tensor.requires_grad)

    def _inside(self, tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
        span = 1 + sum(max(size - 1, 0) * step for size, step in zip(tensor.shape, stride, strict=True))
        buffer = torch.full((span + 2 * GUARD,), _poison(tensor.dtype), dtype=tensor.dtype)
        view = buffer.as_strided(tensor.shape, stride, GUARD)
        view.copy_(tensor)
        self._watch(buffer, view)
        return view

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What Python code allocates inside the block lies in such buffers, too, and is poison where it is `empty`."""

        def wrapped(make, empty: bool):
            @functools.wraps(make)
            def call(*arguments, **options):
                made = make(*arguments, **options)
                if made.is_meta or made.layout is not torch.strided:
                    return made
                return self._inside(made.fill_(_poison(made.dtype)) if empty else made, made.stride())

            return call

        places = [(torch, name) for name in ("empty", "empty_like", "empty_strided", "zeros", "zeros_like")]
        places += [(torch.Tensor, name) for name in ("new_empty", "new_zeros")]
        with ExitStack() as stack:
            for where, name in places:
                stack.enter_context(mock.patch.object(where, name, wrapped(getattr(where, name), "empty" in name)))
            yield

    def intact(self) -> bool:
        """Whether nothing outside of the tensors was written."""
        return all(torch.equal(_bits(now[outside]), _bits(before[outside])) for now, before, outside in self._watched)
