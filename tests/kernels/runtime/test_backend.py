"""Which path runs where: Triton on GPUs that it compiles for, plain PyTorch on every other device."""

import subprocess
import sys
import warnings

import pytest
import torch
from places import ROOT
from stand_in import Device

from kernels import backend, use_backend
from kernels.backend import resolve_backend
from kernels.deform_conv import operator as deform_conv
from kernels.dynamic_relu import operator as dynamic_relu
from kernels.regions import border_align, nms, nms_mask, roi_align


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(backend, "_said", set())


def test_triton_where_it_compiles_for_the_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", object())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [resolve_backend(torch.device(kind)) for kind in ("cuda", "xpu", "cpu")] == ["triton", "triton", "torch"]


@pytest.mark.parametrize("kind", ["mps", "privateuseone"])
def test_plain_pytorch_on_any_other_device_and_said_once(kind):
    with pytest.warns(UserWarning, match=f"operators on '{kind}' run in plain PyTorch: Triton compiles for cuda and"):
        assert resolve_backend(torch.device(kind)) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend(torch.device(kind)) == "torch"
        with use_backend("triton"):
            assert resolve_backend(torch.device(kind)) == "triton"


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_plain_pytorch_on_a_gpu_without_triton_and_said_once(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match=f"operators on '{kind}' run in plain PyTorch: Triton cannot be imported"):
        assert resolve_backend(torch.device(kind)) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend(torch.device(kind)) == "torch"


@pytest.mark.parametrize("kind", ["cuda", "mps", "cpu"])
def test_a_compiler_finds_the_same_without_a_break(kind):
    chosen = torch.compile(lambda x: (x + 1, resolve_backend(torch.device(kind))), fullgraph=True, backend="eager")
    assert chosen(torch.zeros(1))[1] == ("triton" if kind == "cuda" else "torch")
    assert not backend._said


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from heads import DyHead, build_detector
from kernels import batched_nms, border_align, deform_conv2d, dyhead_block, dynamic_relu, nms, roi_align
x = torch.rand(1, 16, 8, 8, requires_grad=True)
deform_conv2d(x, torch.zeros(1, 18, 8, 8), torch.rand(16, 16, 3, 3), padding=1).sum().backward()
model = build_detector("borderdet", num_classes=3, backbone="tiny", depth=1, channels=16)
boxes = torch.tensor([[8.0, 8.0, 40.0, 50.0]])
losses = model([torch.rand(3, 64, 96)], [{"boxes": boxes, "labels": torch.tensor([2])}])
sum(losses.values()).backward()
print(len(model.eval()([torch.rand(3, 64, 96)])))
"""


def test_everything_runs_where_triton_cannot_be_imported():
    """As on Windows and on a Mac."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calls():
    """Every operator with its arguments behind the checks, the backend last, and its backward where it has one."""
    x, offset, mask = numbers(2, 4, 7, 6), numbers(2, 18, 7, 6, seed=1), numbers(2, 9, 7, 6, seed=2)
    weight, bias = numbers(6, 4, 3, 3, seed=3), numbers(6, seed=4)
    settings = [[1, 1], [1, 1], [1, 1]]
    deformed = ([x], [offset], [mask], weight)
    yield deform_conv._operator, (*deformed, bias, *settings, "torch")
    yield (
        deform_conv._operator.derivative.implementation,
        (
            [numbers(2, 6, 7, 6, seed=5)],
            *deformed,
            *settings,
            [True] * 5,
            "torch",
        ),
    )
    lines = numbers(2, 4, 4, seed=6)
    yield dynamic_relu._operator, (x, lines, "torch")
    yield dynamic_relu._operator.derivative.implementation, (numbers(2, 4, 7, 6, seed=7), x, lines, "torch")
    corners = numbers(5, 2, seed=8).abs()
    boxes = torch.cat([corners, corners + 1 + numbers(5, 2, seed=9).abs()], 1)
    images = torch.tensor([0, 1, 1, 0, -1], dtype=torch.int32)
    yield roi_align._operator, (x, boxes, images, [], [2, 3], 0, True, "torch")
    yield border_align._operator, (x, boxes.expand(2, 5, 4).contiguous(), 10, "torch")
    scores = numbers(5, seed=10)
    yield nms._operator, (boxes, scores, images, 0.3, None, "torch")
    yield nms_mask._operator, (boxes[None], scores[None, None], 0.3, -1.0, "torch")


@pytest.mark.parametrize("number", range(8))
def test_the_plain_path_needs_no_cpu(number):
    """It finds the same numbers where no tensor is on the CPU by its own account, nor can be had by numpy as it is."""
    operator, arguments = list(calls())[number]
    wanted = operator.run(*arguments)
    with Device("meta") as device:
        there = torch.utils._pytree.tree_map(lambda x: device.put(x) if isinstance(x, torch.Tensor) else x, arguments)
        found = operator.run(*there)
    assert len(device.called) > 1
    for a, b in zip(torch.utils._pytree.tree_leaves(wanted), torch.utils._pytree.tree_leaves(found), strict=True):
        assert b.device.type == "meta"
        torch.testing.assert_close(b.numbers, a)
