"""Which DyHead runs fused, and the reasons of those that do not."""

import pytest
import torch

from heads import DyHead
from kernels import use_backend

SIZES = ((7, 10), (4, 5), (2, 3), (1, 2))


def features(sizes=SIZES, device="cpu", channels=16, **kind):
    return [torch.empty(2, channels, *size, device=device, **kind) for size in sizes]


def test_a_cpu_takes_the_separate_operators():
    for backend in ("auto", "torch"):
        with use_backend(backend):
            assert "'cpu'" in DyHead(16, 1).unfused_reason(features())
    assert "'meta'" in DyHead(16, 1).unfused_reason(features(device="meta"))
    assert "paper" in DyHead(16, 1, formulation="paper").unfused_reason(features())


@pytest.fixture
def as_if_interpreted(monkeypatch):
    monkeypatch.setattr("kernels.block.dyhead_block.INTERPRET", True)
    monkeypatch.setattr("kernels.block.dyhead_block.resolve_backend", lambda device: "triton")


def test_reasons_against_fusing(as_if_interpreted):
    head = DyHead(16, 1)
    assert head.unfused_reason(features()) is None
    assert "level 1 is 3x5, half of level 0 is 4x5" in head.unfused_reason(features(((7, 10), (3, 5))))
    assert "several types" in head.unfused_reason(features(dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert head.unfused_reason(features(dtype=torch.float16)) is None
    assert "batch" in head.unfused_reason([x[:0] for x in features()])
    assert "another device" in DyHead(16, 1).to("meta").unfused_reason(features())
    gate, head.blocks[0].scale.gate = head.blocks[0].scale.gate, torch.nn.Sequential()
    assert "a Sequential and not a Linear" in head.unfused_reason(features())
    head.blocks[0].scale.gate = gate
    head.blocks[0].spatial.from_finer.norm.eps = 0
    assert "eps" in head.unfused_reason(features())
    head.blocks[0].scale = torch.nn.Identity()
    assert "SpatialAttention, Identity, TaskAttention" in head.unfused_reason(features())


def test_compilation_traces_the_separate_operators(as_if_interpreted, monkeypatch):
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    assert "torch.compile" in DyHead(16, 1).unfused_reason(features())
