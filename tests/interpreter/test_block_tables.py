"""`kernels.dyhead_block` under the interpreter: both paths agree, and the first forward makes all tables."""

import pytest
import torch

from heads import DyHead
from heads.dyhead.fused import parameters
from kernels import dyhead_block, use_backend
from kernels.block import launch
from kernels.block.layout import Layout


def make(attentions="LSC", sizes=((4, 3), (2, 2)), channels=16, dtype=torch.float64):
    torch.manual_seed(5)
    head = DyHead(channels, 1, attentions)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    head = head.to(dtype)
    features = [torch.randn(1, channels, *size, dtype=dtype, requires_grad=True) for size in sizes]
    return features, parameters(head.blocks[0]), [*features, *head.parameters()]


def test_both_paths_give_the_same_numbers(poison):
    features, block, leaves = make()
    cotangents = [torch.randn_like(x) for x in features]
    found = []
    for backend in ("triton", "torch"):
        with use_backend(backend):
            outputs = dyhead_block(features, block)
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, cotangents)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10 * max(1.0, float(y.detach().abs().max())))


def test_arguments_are_checked_on_this_path_as_well():
    features, block, _ = make()
    with use_backend("triton"), pytest.raises(ValueError, match=r"features must halve"):
        dyhead_block(features[::-1], block)


@pytest.fixture
def new_layouts(monkeypatch):
    """The layouts that a test makes, none of which an earlier one has left."""
    layouts = []

    def new(*arguments):
        layouts.append(Layout(*arguments))
        return layouts[-1]

    monkeypatch.setattr(launch, "layout", new)
    return layouts


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sizes", [((3, 4), (2, 2)), ((3, 2),)], ids=["two levels", "one level"])
def test_backward_makes_no_table(sizes, deterministic, new_layouts):
    features, block, leaves = make(sizes=sizes, dtype=torch.float32)
    with use_backend("triton"):
        outputs = dyhead_block(features, block)
    (tables,) = new_layouts
    made = dict(tables.kept)
    torch.use_deterministic_algorithms(deterministic)
    try:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs], allow_unused=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert tables.kept.keys() == made.keys()


def test_a_forward_without_gradients_makes_the_same_tables(new_layouts):
    features, block, _ = make("LC", dtype=torch.float32)
    with use_backend("triton"):
        dyhead_block(features, block)
        with torch.inference_mode():
            dyhead_block(features, block)
    trained, inferred = new_layouts
    assert trained.kept.keys() == inferred.kept.keys()
    tables = [x for made in inferred.kept.values() for x in (made if isinstance(made, tuple) else (made,))]
    assert tables and not any(table.is_inference() for table in tables)


def test_tables_are_completed_once_for_each_type(new_layouts, monkeypatch):
    features, block, _ = make("LC", dtype=torch.float32)
    calls, make_all = [], launch.conv.launches
    monkeypatch.setattr(launch.conv, "launches", lambda *a: calls.append(a) or make_all(*a))
    kept = Layout(((4, 3), (2, 2)), 1, torch.device("cpu"), torch.float32, (16, 16))
    monkeypatch.setattr(launch, "layout", lambda *_: kept)
    with use_backend("triton"), torch.no_grad():
        for dtype in (torch.float32, torch.float32, torch.float16, torch.float32):
            with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
                dyhead_block(features, block)
    assert [pyramid.dtype for pyramid, *_ in calls] == [torch.float32, torch.float16]
