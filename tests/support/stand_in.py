"""Tensors that say they lie on a device which this machine lacks, and are computed on its CPU."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class StandIn(Tensor):
    """A tensor on `device` by its own account, with its numbers in `numbers`, on the CPU."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, real: Tensor, device: torch.device):
        made = Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=device,
        )
        made.numbers = real
        return made

    def __repr__(self):
        return f"StandIn({self.numbers})"

    def tolist(self):
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was called outside of the device")


class Literals(TorchFunctionMode):
    """Tensors of Python's numbers, which PyTorch makes on a device before any dispatcher is asked."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is Tensor.new_tensor and isinstance(args[0], StandIn):
            return StandIn(torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)), self.device)
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == self.device.type:
            return StandIn(torch.tensor(*args, **kwargs | {"device": "cpu"}), self.device)
        return function(*args, **kwargs)


class Device(TorchDispatchMode):
    """While it is entered, a device of this type exists: what is made on it, or of what lies on it, are stand-ins.

    Only "meta" can be one: of any other type, indexing asks PyTorch for a device that is there.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.device = torch.device(kind)
        self.called: set[str] = set()
        self.literals = Literals(self.device)

    def __enter__(self):
        self.literals.__enter__()
        return super().__enter__()

    def __exit__(self, *problem):
        super().__exit__(*problem)
        self.literals.__exit__(*problem)

    def put(self, x: Tensor) -> StandIn:
        return StandIn(x.detach(), self.device)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        self.called.add(str(function))
        here = False

        def numbers(value):
            nonlocal here
            here = here or isinstance(value, StandIn)
            return value.numbers if isinstance(value, StandIn) else value

        args, kwargs = tree_map(numbers, (args, kwargs))
        wanted = kwargs.get("device")
        if wanted is not None:
            here = torch.device(wanted).type == self.device.type
            kwargs["device"] = torch.device("cpu")
        found = function(*args, **kwargs)
        return tree_map(lambda x: StandIn(x, self.device) if here and isinstance(x, Tensor) else x, found)
