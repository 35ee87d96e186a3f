"""Faults that a GPU hides, planted in a kernel of a few lines and in an operator: each of them is seen."""

import pytest
import torch
import triton
import triton.language as tl

from kernels import border_align


@triton.jit
def _sums(x, out, rows, columns, STORED: tl.constexpr, LOADED: tl.constexpr, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (cdiv(columns, BLOCK), rows): the sum of the rows; STORED, LOADED and ATOMIC are True in a right kernel."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    row = tl.load(x + tl.program_id(1) * columns + column, mask=inside | (not LOADED), other=0.0)
    if ATOMIC:
        tl.atomic_add(out + column, row, mask=inside | (not STORED), sem="relaxed")
    else:
        tl.store(out + column, row, mask=inside | (not STORED))


def sums(out, stored=True, loaded=True, atomic=True, rows=3):
    # The rows differ: programs that store what is there already do not race.
    x = torch.arange(13.0 * rows, device="cuda").view(rows, 13)
    _sums[(2, rows)](x, out, rows, 13, stored, loaded, atomic, 8)
    return out


def test_no_fault():
    assert torch.equal(sums(torch.zeros(13, device="cuda")), 3 * torch.arange(13.0) + 39)


@pytest.mark.parametrize(
    ("planted", "kind", "buffer", "statement"),
    [
        ({"stored": False, "atomic": False, "rows": 1}, "oob_write", "out", "tl.store(out"),
        # It reads before it writes.
        ({"stored": False}, "oob_read", "out", "tl.atomic_add(out"),
        ({"loaded": False}, "oob_read", "x", "row = tl.load(x"),
        ({"atomic": False}, "race", "out", "tl.store(out"),
    ],
    ids=["a store without its mask", "an addition without its mask", "a load without its mask", "a store for a sum"],
)
def test_a_fault(planted, kind, buffer, statement):
    from ttsem.sanitize import KernelFault

    with pytest.raises(KernelFault) as caught:
        sums(torch.zeros(13, device="cuda"), **planted)
    fault = caught.value.fault
    assert (fault.kind, fault.buffer) == (kind, buffer) and fault.source_text.startswith(statement)


@triton.jit
def _mean(parts, out, counter, WAITS: tl.constexpr, SEM: tl.constexpr):
    """Grid (4): every program stores a part; with WAITS the last one to do so, else everyone, adds up all of them."""
    tl.store(parts + tl.program_id(0), tl.program_id(0).to(tl.float32))
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem=SEM)
    if (arrived == 3) | (not WAITS):
        tl.store(out + (0 if WAITS else arrived), tl.sum(tl.load(parts + tl.arange(0, 4)), 0) / 4)


@pytest.mark.parametrize("planted", [None, "everyone goes on", "nothing is released"])
def test_the_last_program_to_arrive_may_read_what_all_have_written(planted):
    from ttsem.sanitize import KernelFault

    parts, out = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    settings = planted != "everyone goes on", "relaxed" if planted == "nothing is released" else "acq_rel"
    if planted:
        with pytest.raises(KernelFault) as caught:
            _mean[(4,)](parts, out, counter, *settings)
        assert (caught.value.fault.kind, caught.value.fault.buffer) == ("race", "parts")
    else:
        _mean[(4,)](parts, out, counter, *settings)
        assert out[0] == 1.5


def test_a_sum_that_does_not_begin_at_zero():
    assert sums(torch.empty(13, device="cuda")).isnan().all()


def test_an_operator_that_does_not_begin_at_zero(monkeypatch):
    features = torch.randn(1, 8, 5, 6).to("cuda").requires_grad_()
    boxes = torch.tensor([[[0.0, 1.0, 4.0, 3.0]]]).to("cuda")
    (right,) = torch.autograd.grad(border_align(features, boxes, 3).sum(), features)
    for where, name in ((torch, "zeros"), (torch, "zeros_like"), (torch.Tensor, "new_zeros")):
        monkeypatch.setattr(where, name, getattr(where, name.replace("zeros", "empty")))
    (wrong,) = torch.autograd.grad(border_align(features, boxes, 3).sum(), features)
    assert right.isfinite().all() and wrong.isnan().any()
