"""The one way in which an operator of this package is registered with PyTorch, differentiated and called.

An `Operator` is a name under `torch.ops.dyhead` with a schema, a path in PyTorch and one in Triton, shapes for fake
tensors, a FLOP formula, and gradients, which are an operator as well, `<name>_backward`. All operators behave alike:

- Under autocast an operator runs in the precision of its tensors, which `casts` may change to autocast's; nothing
  inside is cast.
- A second derivative is a NotImplementedError when it is asked for, the same for all.
- The dispatcher costs as much as a small kernel. Where nothing but autograd would listen to it (no transform, mode,
  subclass, tracer, profiler or autocast), a call goes straight to its path; everywhere else it is dispatched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Signature = tuple[Any, ...]
Gradient = Tensor | Sequence[Tensor] | None

_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}
# Where operators are registered, once in a process: a copy of this package needs another (`kernels.bench.hub`).
NAMESPACE = "dyhead"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _keys(*names: str) -> int:
    """A set of dispatch keys as bits."""
    bits = 0
    for name in names:
        bits |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
    return bits


_DEVICES = ("CPU", "CUDA", "XPU")
# What a dense tensor without any wrapping has, and what is switched on and off in a thread in which nobody listens.
_PLAIN = _keys(*_DEVICES, *(f"Autograd{name}" for name in _DEVICES), *_AUTOCAST.values(), "ADInplaceOrView")
_SWITCHED_ON = _keys("BackendSelect", "ADInplaceOrView")
_SWITCHED_OFF = _keys(*_AUTOCAST.values())
_AUTOGRAD = _keys("AutogradOther")


def signature(*tensors: Any) -> Signature | None:
    """What the checks of arguments look at, in an eager call that needs no dispatcher; None in any other call.

    Args:
        tensors: All tensors among the arguments, None for those left out. With anything else there is no signature.
    """
    if not _unobserved():
        return None
    parts: list[Any] = []
    for x in tensors:
        if x is None:
            parts.append(None)
        elif _is_plain(x):
            # With the place where it stands, a tuple of fewer objects has the same meaning.
            parts += (x.shape, x.dtype, x.get_device())
        else:
            return None
    return tuple(parts)


def _unobserved() -> bool:
    if torch.compiler.is_compiling() or torch._C._len_torch_function_stack() or torch.autograd._profiler_enabled():
        return False
    off = torch._C._dispatch_tls_local_exclude_set().raw_repr()
    return (
        not torch._C._dispatch_tls_local_include_set().raw_repr() & ~_SWITCHED_ON
        and off & _SWITCHED_OFF == _SWITCHED_OFF
        and not (off & _AUTOGRAD and torch.is_grad_enabled())
    )


def _is_plain(x: Any) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter) and not torch._C._dispatch_keys(x).raw_repr() & ~_PLAIN


def _no_flops(*arguments: Any) -> int:
    """Elementwise work, samples and comparisons: PyTorch counts none of these."""
    return 0


@dataclass(frozen=True)
class Implementation:
    """What an operator computes; all functions take the arguments of the schema but for the last, the backend.

    Attributes:
        schema: Arguments and results in PyTorch's language. The last argument is `str backend`.
        torch: The path in plain PyTorch.
        triton: The path in Triton.
        fake: Results of the right shapes and strides, with nothing computed. Takes the backend, too.
        flops: The floating-point operations, with a shape in place of every tensor. The default counts none.
    """

    schema: str
    torch: Callable[..., Any]
    triton: Callable[..., Any]
    fake: Callable[..., Any]
    flops: Callable[..., int] = _no_flops

    def run(self, *arguments: Any) -> Any:
        """Compute it on the path that the last argument names."""
        return (self.torch if arguments[-1] == "torch" else self.triton)(*arguments[:-1])


@dataclass(frozen=True)
class Derivative:
    """How an operator is differentiated.

    Attributes:
        implementation: Of the operator `<name>_backward`.
        save: (arguments, results) -> the tensors that the backward needs, and anything else.
        gradients: (backward, gradients of the results, saved tensors, anything else, wanted) -> one gradient for each
            argument that is a tensor or a list of tensors. `wanted` says which of those have one.
        results: How many results have a gradient, the first ones; None for all.
    """

    implementation: Implementation
    save: Callable[[Sequence[Any], Sequence[Tensor]], tuple[Sequence[Tensor | None], Any]]
    gradients: Callable[..., Sequence[Gradient]]
    results: int | None = None


class Operator:
    """An operator under `torch.ops.dyhead`, registered when it is made; see the top of this file.

    Args:
        name: Under which it is registered.
        implementation: What it computes.
        derivative: Its gradients; without them results are constants.
        casts: Autocast brings the tensors to its precision, but for float64.
    """

    def __init__(
        self,
        name: str,
        implementation: Implementation,
        derivative: Derivative | None = None,
        casts: bool = False,
    ) -> None:
        self.name = name
        self.run = implementation.run
        self.derivative = derivative
        self.op = _register(name, implementation, casts)
        # Which arguments hold tensors, alone or in lists.
        self.leaves = [i for i, x in enumerate(self.op._schema.arguments) if "Tensor" in str(x.type)]
        if derivative is not None:
            self.backward = _register(f"{name}_backward", derivative.implementation, False)
            _library.impl(name, self._autograd, "Autograd", with_keyset=True)
            _library.impl(f"{name}_backward", self._autograd_backward, "Autograd", with_keyset=True)

    def __call__(self, key: Signature | None, *arguments: Any) -> Any:
        """The results. `key` is the call's `signature`, also where the arguments were made from those that it saw."""
        if key is None:
            return self.op(*arguments)
        return self._differentiate(self.run, arguments)

    def _differentiate(self, run: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        if self.derivative is not None and torch.is_grad_enabled():
            leaves: list[Tensor] = []
            counts = []
            for i in self.leaves:
                value = arguments[i]
                tensors = [] if value is None else [value] if isinstance(value, Tensor) else value
                leaves += tensors
                counts.append(len(tensors))
            if any([x.requires_grad for x in leaves]):
                kind: list[type] = []
                results = _Once.apply(self, run, arguments, counts, kind, *leaves)
                return list(results) if kind[0] is list else results
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return run(*arguments)

    def _autograd(self, keyset: Any, *arguments: Any) -> Any:
        below = keyset & torch._C._after_autograd_keyset
        return self._differentiate(lambda *values: self.op.redispatch(below, *values), arguments)

    def _autograd_backward(self, keyset: Any, *arguments: Any) -> Any:
        below = keyset & torch._C._after_autograd_keyset

        def run() -> Any:
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return self.backward.redispatch(below, *arguments)

        return once(self.name, run, arguments)

    def run_backward(self, grads: Sequence[Any], *arguments: Any) -> Any:
        """The results of `<name>_backward`, for the gradients `grads` of a call's results."""
        assert self.derivative is not None
        if torch.is_grad_enabled() or not _unobserved() or not all([x is None or _is_plain(x) for x in grads]):
            return self.backward(*arguments)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return self.derivative.implementation.run(*arguments)


class _Once(torch.autograd.Function):
    """An operator as a step of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: Operator,
        run: Callable[..., Any],
        arguments: Sequence[Any],
        counts: list[int],
        kind: list[type],
        *leaves: Tensor,
    ) -> Any:
        assert operator.derivative is not None
        with torch._C._AutoDispatchBelowADInplaceOrView():
            found = run(*arguments)
        kind.append(type(found))
        results = (found,) if isinstance(found, Tensor) else tuple(found)
        tensors, ctx.rest = operator.derivative.save(arguments, results)
        ctx.save_for_backward(*tensors)
        ctx.operator, ctx.counts = operator, counts
        if operator.derivative.results is not None:
            ctx.mark_non_differentiable(*results[operator.derivative.results :])
            # Otherwise those have gradients of zeros.
            ctx.set_materialize_grads(False)
        return found if isinstance(found, Tensor) else results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted, start = [], 5
        for count in ctx.counts:
            wanted.append(any(ctx.needs_input_grad[start : start + count]))
            start += count
        operator = ctx.operator
        if all([x is None for x in grads]):
            return (None,) * start
        found = operator.derivative.gradients(operator.run_backward, grads, ctx.saved_tensors, ctx.rest, wanted)
        gradients: list[Tensor | None] = [None] * 5
        for gradient, count in zip(found, ctx.counts, strict=True):
            if gradient is None:
                gradients += [None] * count
            elif isinstance(gradient, Tensor):
                gradients.append(gradient)
            else:
                gradients += gradient
        return tuple(gradients)


class _Refused(torch.autograd.Function):
    """A backward as a step of the graph, which says what it cannot do instead of counting as a constant."""

    @staticmethod
    def forward(ctx: Any, name: str, run: Callable[[], Any], *tensors: Tensor) -> Any:
        ctx.name = name
        found = run()
        return found if isinstance(found, Tensor) else tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"{ctx.name} has no second derivative")


def once(name: str, run: Callable[[], Any], arguments: Sequence[Any]) -> Any:
    """The results of a backward that is not differentiable itself; differentiating them raises a NotImplementedError.

    Args:
        name: Of the operator, for the message.
        run: Computes the results, a tensor or a list or tuple of them.
        arguments: What they depend on: tensors, lists of them, and anything else.
    """
    if not torch.is_grad_enabled():
        return run()
    tensors = [x for value in arguments for x in (value if isinstance(value, list | tuple) else [value])]
    tensors = [x for x in tensors if isinstance(x, Tensor)]
    if not any([x.requires_grad for x in tensors]):
        return run()
    found = _Refused.apply(name, run, *tensors)
    return found if isinstance(found, Tensor) else list(found)


def differentiable_once(name: str) -> Callable[[Callable[..., Sequence[Any]]], Callable[..., tuple[Any, ...]]]:
    """Decorate the `backward` of an autograd function, so that differentiating it raises a NotImplementedError.

    Args:
        name: Name of the operator, for the message.
    """

    def decorate(backward: Callable[..., Sequence[Any]]) -> Callable[..., tuple[Any, ...]]:
        @wraps(backward)
        def method(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            return tuple(once(name, lambda: backward(ctx, *grads), (*grads, *ctx.saved_tensors)))

        return method

    return decorate


def _register(name: str, implementation: Implementation, casts: bool) -> Any:
    """Schema, both paths, fake results, autocast and FLOPs of an operator; what `torch.ops.dyhead` then holds."""
    _library.define(f"{name}{implementation.schema}")
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    op = packet.default

    def flops(*arguments: Any, out_shape: Any = None, **named: Any) -> int:
        return implementation.flops(*arguments[:-1])

    def autocast(device: str, key: str) -> Callable[..., Any]:
        off = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
                return value.to(torch.get_autocast_dtype(device))
            return [cast(x) for x in value] if isinstance(value, list) else value

        def call(*arguments: Any) -> Any:
            arguments = tuple(cast(x) for x in arguments) if casts else arguments
            with torch._C._ExcludeDispatchKeyGuard(off):
                return op(*arguments)

        return call

    _library.impl(name, implementation.run, "CompositeExplicitAutograd")
    for device, key in _AUTOCAST.items():
        _library.impl(name, autocast(device, key), key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", implementation.fake, lib=_library)
    register_flop_formula(packet)(flops)
    return op
