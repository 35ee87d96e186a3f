"""`torchvision.ops.deform_conv2d` answered by the operator of this package, for models whose code is not one's own."""

import functools
import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from kernels.deform_conv.operator import deform_conv2d

_PLACES = ("torchvision.ops.deform_conv", "torchvision.ops")
_NAME = "deform_conv2d"
_INSTEAD = (
    "Nothing is routed, and nothing need be: kernels.deform_conv2d and kernels.DeformConv2d take the arguments of "
    "torchvision's and do not need it; import them in its place"
)


class _State:
    """How many patches are in force, and each function of torchvision's with the one that stands in for it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.open = 0
        self.routes: list[tuple[Callable[..., Any], Callable[..., Any]]] = []


_state = _State()


class TorchvisionPatch:
    """A patch in force, until `undo` is called or the `with` statement that it was given to ends."""

    def __init__(self) -> None:
        self._open = True

    def undo(self) -> None:
        """End this patch; torchvision's function is back once no other one is in force. A second call does nothing."""
        with _state.lock:
            if not self._open:
                return
            self._open = False
            _state.open -= 1
            if not _state.open:
                _exchange([(routed, original) for original, routed in _state.routes])
                _state.routes.clear()

    def __enter__(self) -> Self:
        if not self._open:
            raise RuntimeError("this patch has been undone; call patch_torchvision() for another one")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def patch_torchvision() -> TorchvisionPatch:
    """Route `torchvision.ops.deform_conv2d` to `kernels.deform_conv2d`, for this process, until it is undone.

    For a model that calls torchvision's function where its binary cannot: `Could not run 'torchvision::deform_conv2d'
    with arguments from the 'CUDA' backend`, `"deformable_im2col" not implemented for 'BFloat16'`. Called before or
    after the model is imported, by itself or in a `with` statement.

    What is routed: every global name, of any module that is imported, which holds torchvision's function. So
    `torchvision.ops.deform_conv2d` is, `torchvision.ops.DeformConv2d` and modules made from it before, whatever a model
    has got by `from torchvision.ops import deform_conv2d`, under any name, and what it gets so while a patch is in
    force.

    What is not: `torch.ops.torchvision.deform_conv2d`, called as an operator; what a class, a closure, a default
    argument or `functools.partial` took of torchvision's function before; and `torch.jit.script`, which cannot read the
    operator here (`torch.jit.trace`, `torch.compile` and `torch.export` can).

    Patches count: torchvision's function is routed while one or more are in force, in whatever order they are undone.
    With the last one, every name that holds the routed function has torchvision's again, those of modules imported
    since with it; where someone else has put another function meanwhile, that stays. A routed function that was kept
    elsewhere calls torchvision's from then on. All threads see the patch at once; a call that has begun ends as it
    began.

    Of the numbers, only the offset's gradient at the very border differs (`kernels/deform_conv/operator.py`). Under
    autocast the output has autocast's type, where torchvision's has the input's.

    Returns:
        The patch: `undo()` ends it, and so does the end of its `with` statement.

    Raises:
        ImportError: torchvision is not installed, or does not import, as one that was built for another torch.

    Example:
        >>> from kernels import patch_torchvision
        >>> try:
        ...     with patch_torchvision():
        ...         pass  # the model runs here
        ... except ImportError:
        ...     pass  # no torchvision here, or none that imports: call kernels.deform_conv2d
    """
    places = [_import(name) for name in _PLACES]
    with _state.lock:
        known = {id(function) for route in _state.routes for function in route}
        for place in places:
            function = getattr(place, _NAME)
            if id(function) not in known:
                _state.routes.append((function, _routed(function)))
                known.add(id(function))
        _exchange(_state.routes)
        _state.open += 1
    return TorchvisionPatch()


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise ImportError(f"torchvision is not installed. {_INSTEAD}") from error
        raise _broken(error) from error
    # A binary for another torch fails by RuntimeError, OSError or AttributeError, whatever it comes to first.
    except Exception as error:
        raise _broken(error) from error


def _broken(error: Exception) -> ImportError:
    return ImportError(
        f"torchvision does not import ({type(error).__name__}: {error}): often it was built for another torch than the "
        f"one here, {torch.__version__}. {_INSTEAD}"
    )


def _routed(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function like torchvision's that calls the operator here while a patch is in force.

    One of its own, not `kernels.deform_conv2d` itself: `undo` must know the names that came by it from those of whoever
    imports the operator from here.
    """

    @functools.wraps(original)
    def deform_conv2d_here(
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = (1, 1),
        padding: int | Sequence[int] = (0, 0),
        dilation: int | Sequence[int] = (1, 1),
        mask: Tensor | None = None,
    ) -> Tensor:
        function = deform_conv2d if _state.open else original
        return function(input, offset, weight, bias, stride, padding, dilation, mask)

    return deform_conv2d_here


def _exchange(pairs: Sequence[tuple[Callable[..., Any], Callable[..., Any]]]) -> None:
    """Give every global name of every imported module that holds the first of a pair the second."""
    new = {id(old): replacement for old, replacement in pairs}
    # Lists, since other threads may import meanwhile; `vars`, since a lazy module would import what it is asked for.
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            names = vars(module)
            for name, value in list(names.items()):
                if id(value) in new:
                    names[name] = new[id(value)]
