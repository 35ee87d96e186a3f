"""What a fused block launches: every kernel, and every operator of PyTorch that a GPU would launch something for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from heads import DyHead
from kernels import use_backend
from kernels.block import launch as block_launch
from kernels.runtime.launch import Launch

# Neither views nor work: memory, and questions about types.
FREE = {"empty", "empty_like", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "promote_types"}


class Seen(TorchDispatchMode):
    """Names of kernels, as part.kernel, and of PyTorch's operators, in the order of their launches."""

    def __init__(self):
        super().__init__()
        self.names = []

    def kernel(self, launch, run):
        part = launch.kernel.fn.__module__.split(".")[-1].split("_")[0]
        self.names.append(f"{part}.{launch.kernel.__name__.removesuffix('_kernel')}")
        # What the interpreter does to run it is none of PyTorch's launches.
        with _disable_current_modes():
            run(launch)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            self.names.append(name)
        return func(*args, **kwargs or {})


@pytest.fixture
def launches(monkeypatch):
    """A function: letters -> what a head of a block on two levels launches, forward and backward, after the first call.

    Deterministic or not; if so, PyTorch is not to fill what the kernels write.
    """

    def count(attentions, deterministic=False):
        head = DyHead(16, 1, attentions)
        features = [torch.randn(1, 16, *size).to(memory_format=torch.channels_last) for size in ((3, 2), (2, 1))]
        forward, backward, run = Seen(), Seen(), Launch.run
        # The first call makes the tables.
        block_launch._tables(features)
        with use_backend("triton"):
            monkeypatch.setattr(Launch, "run", lambda launch: forward.kernel(launch, run))
            with forward:
                outputs = head([x.requires_grad_() for x in features])
            cotangents = [torch.randn_like(x) for x in outputs]
            monkeypatch.setattr(Launch, "run", lambda launch: backward.kernel(launch, run))
            monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
            torch.use_deterministic_algorithms(deterministic)
            try:
                with backward:
                    torch.autograd.backward(outputs, cotangents)
            finally:
                torch.use_deterministic_algorithms(False)
        return forward.names, backward.names

    return count


def last_block(names):
    """What the backward of the block that is first in the forward launches."""
    return names[max(i for i, name in enumerate(names) if name == "tail.backward_sums") :]


def test_launches_of_a_block(launches):
    forward, backward = launches("LSC")
    block = ["offset.forward", "product.forward", "coefficients.forward", "tail.forward"]
    assert [name for name in forward if "." in name] == forward[-4:] == block

    assert last_block(backward) == [
        *("tail.backward_sums", "coefficients.backward", "tail.backward_maps"),
        *("zeros_like", "gradient.samples", "plan.gradients", "gradient.weight", "pack.sum"),
        *("offset.backward_weight", "offset.backward_input"),
    ]


def test_launches_of_a_deterministic_block(launches):
    _, backward = launches("LSC", deterministic=True)
    assert last_block(backward) == [
        *("tail.backward_sums", "coefficients.backward", "tail.backward_maps"),
        *("gradient.samples", "plan.gradients"),
        # A sort is some launches of its own.
        *("inverse.bins", "sort", "arange", "searchsorted", "inverse.gather"),
        *("gradient.weight", "pack.sum", "offset.backward_weight", "offset.backward_input"),
    ]


def test_launches_of_a_block_without_spatial_attention(launches):
    forward, backward = launches("C")
    tail = ["tail.statistics", "coefficients.forward", "tail.forward"]
    # Four convolutions on two levels, which PyTorch makes.
    assert forward[-8:] == [*["convolution"] * 4, "cat", *tail]
    names = [name for name in backward if "." in name]
    assert names[-3:] == ["tail.backward_sums", "coefficients.backward", "tail.backward_maps"]
