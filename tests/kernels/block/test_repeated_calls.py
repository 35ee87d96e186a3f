"""A block called again on a shape prepares nothing, and runs what a new launch would run."""

from functools import lru_cache

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from launched import same, without_work

from heads import DyHead
from heads.dyhead.fused import parameters
from kernels import backend, dyhead_block, use_backend
from kernels.block import layout
from kernels.runtime import launch

pytestmark = pytest.mark.skipif(backend.INTERPRET, reason="the interpreter prepares every launch")
SIZES = [((7, 10), (4, 5), (2, 3)), ((6, 4), (3, 2)), ((5, 5),)]


@pytest.fixture
def prepared(monkeypatch):
    """Every launch that was described, and the arguments of all that ran, which must be those of a new launch."""
    described, ran, call, describe = [], [], launch.Launcher.__call__, launch.Launch.__init__
    without_work(monkeypatch, ran.append)
    # No layout that another test has left.
    monkeypatch.setattr(layout, "_layout", lru_cache(layout.Layout))

    def described_anew(self, *arguments, **named):
        described.append(self)
        describe(self, *arguments, **named)

    monkeypatch.setattr(launch.Launch, "__init__", described_anew)

    def checked(self, *arguments):
        call(self, *arguments)
        found, count = ran[-1], len(described)
        self.make(*arguments).run()
        del described[count:]
        assert same(found, ran.pop())

    monkeypatch.setattr(launch.Launcher, "__call__", checked)
    with use_backend("triton"):
        yield described, ran


def differentiate(head, sizes, dtype=torch.float32, channels=16):
    features = [torch.randn(2, channels, *size, dtype=dtype, requires_grad=True) for size in sizes]
    outputs = dyhead_block(features, parameters(head.blocks[0]))
    leaves = [*features, *head.parameters()]
    torch.autograd.grad(outputs, leaves, [torch.randn_like(y) for y in outputs], allow_unused=True)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("attentions", "mode"), [("LSC", "crop"), ("S", "prefix"), ("LC", "crop")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_repeated_shape_prepares_nothing(attentions, mode, dtype, deterministic, prepared):
    described, ran = prepared
    head = DyHead(16, 1, attentions, coarse_offsets=mode).to(dtype)
    torch.use_deterministic_algorithms(deterministic)
    try:
        for sizes in SIZES:
            differentiate(head, sizes, dtype)
            count, kernels = len(described), len(ran)
            assert count
            ran.clear()
            differentiate(head, sizes, dtype)
            assert len(described) == count and len(ran) == kernels
            ran.clear()
        # The shapes after it have not driven the first one out.
        differentiate(head, SIZES[0], dtype)
        assert len(described) == count
    finally:
        torch.use_deterministic_algorithms(False)
