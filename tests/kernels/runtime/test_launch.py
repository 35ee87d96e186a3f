"""Launches that are kept: they run what a new one would run, and nothing is kept that could not tell memory apart."""

import weakref
from typing import Any, NamedTuple

import pytest
import torch
from launched import same
from torch import Tensor

from kernels.deform_conv import launch as deform_conv
from kernels.runtime import launch, tiles
from kernels.runtime.launch import Launch, Launcher, Owner


class Strided(NamedTuple):
    pointer: Any
    stride: Any


class Kernel:
    """In place of a `@triton.jit` function; writes down what it is run with."""

    def __init__(self):
        self.runs = []

    def __getitem__(self, grid):
        return lambda **arguments: self.runs.append((grid, arguments))


KERNEL = Kernel()


def describe(pair: tuple[Tensor, Tensor | None], out: Tensor, factor: int) -> Launch:
    x, y = pair
    arguments = {"x": Strided(x, x.stride(0)), "y": x if y is None else y, "out": out, "size": x.numel()}
    return Launch(KERNEL, (x.shape[0],), arguments, {"FACTOR": factor, "HAS_Y": y is not None}, warps=8)


@pytest.fixture
def made(monkeypatch):
    """The launches that were described, rather than taken from those that are kept."""
    monkeypatch.setattr(KERNEL, "runs", [])
    found = []

    def make(*arguments):
        found.append(describe(*arguments))
        return found[-1]

    return Launcher(make), found


def pair(rows: int = 2) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, 3), torch.zeros(rows, 3)


@pytest.mark.parametrize("with_y", [True, False])
def test_a_kept_launch_runs_with_the_new_tensors(made, with_y):
    run, descriptions = made
    for _ in range(3):
        x, y = pair()
        arguments = ((x, y if with_y else None), torch.zeros(2), 5)
        run(*arguments)
        describe(*arguments).run()
        (grid, found), (expected_grid, expected) = KERNEL.runs[-2:]
        assert grid == expected_grid and same(found, expected)
    assert len(descriptions) == 1


def test_whatever_a_launch_depends_on_makes_another_one(made, monkeypatch):
    run, descriptions = made
    out = torch.zeros(2)
    calls = [
        (pair(), out, 5),
        (pair(), out, 6),
        (pair(3), out, 5),
        ((pair()[0].double(), pair()[1]), out, 5),
        ((torch.zeros(3, 2).t(), pair()[1]), out, 5),
        ((pair()[0], None), out, 5),
    ]
    for _ in range(2):
        for call in calls:
            run(*call)
    assert len(descriptions) == len(calls)
    with tiles.on_trial("some kernel", tiles.Tiles(1, 1, 1, 1, 1, 1)):
        run(*calls[0])
    monkeypatch.setattr(tiles, "_float32_products", lambda: "another")
    run(*calls[0])
    assert len(descriptions) == len(calls) + 2


def test_one_tensor_twice_is_not_taken_for_two(made):
    run, descriptions = made
    for _ in range(2):
        x, y = pair()
        for other in (x, y):
            run((x, other), torch.zeros(2), 5)
            assert KERNEL.runs[-1][1]["x"].pointer is x and KERNEL.runs[-1][1]["y"] is other
    assert len(descriptions) == 2


def test_tuples_in_tuples(monkeypatch):
    monkeypatch.setattr(KERNEL, "runs", [])
    made = []

    def make(x, pair, number):
        made.append(number)
        return Launch(KERNEL, (1,), {"x": x, "pair": Strided(pair[1][0], pair[0])}, {})

    run = Launcher(make)
    for _ in range(2):
        x, y = pair()
        run(x, (1, (y, None)), 2)
        assert KERNEL.runs[-1][1]["x"] is x and KERNEL.runs[-1][1]["pair"].pointer is y
    run(x, (2, (y, None)), 2)
    assert KERNEL.runs[-1][1]["pair"].stride == 2 and made == [2, 2]


class Tables(Owner):
    def __init__(self):
        super().__init__()
        self.table = torch.zeros(3)


def test_an_owner_of_tables_keeps_its_launches_and_takes_them_with_it(monkeypatch):
    monkeypatch.setattr(KERNEL, "runs", [])
    monkeypatch.setattr(launch, "KEPT", 2)
    made = []

    def make(x, number, tables):
        made.append(number)
        return Launch(KERNEL, (1,), {"x": x, "table": tables.table}, {}, tables=("table",))

    run, owners = Launcher(make), [Tables(), Tables()]
    for _ in range(2):
        for owner in owners:
            run(torch.zeros(2), 1, owner)
            assert KERNEL.runs[-1][1]["table"] is owner.table
    assert made == [1, 1]
    # Another kernel of the same owner has launches of its own; the oldest make room.
    Launcher(make)(torch.zeros(2), 1, owners[0])
    run(torch.zeros(2), 2, owners[0])
    run(torch.zeros(2), 1, owners[0])
    assert made == [1, 1, 1, 2, 1] and len(owners[0].prepared) == 2
    gone, KERNEL.runs = weakref.ref(owners[1].table), []
    del owner, owners
    assert gone() is None


def test_a_launch_with_memory_of_its_own_is_not_kept(monkeypatch):
    monkeypatch.setattr(KERNEL, "runs", [])
    run = Launcher(lambda x: Launch(KERNEL, (1,), {"x": x.clone()}, {}))
    x = torch.zeros(2)
    run(x)
    run(x.fill_(7))
    assert KERNEL.runs[-1][1]["x"].tolist() == [7, 7]


def test_so_many_are_kept_and_no_more(made, monkeypatch):
    monkeypatch.setattr(launch, "KEPT", 2)
    run, descriptions = made
    for factor in (1, 2, 3, 3, 2, 1):
        run(pair(), torch.zeros(2), factor)
    assert [x.constants["FACTOR"] for x in descriptions] == [1, 2, 3, 1]


def test_tables_are_kept_with_the_launch(monkeypatch):
    monkeypatch.setattr(KERNEL, "runs", [])
    table = torch.zeros(3)
    run = Launcher(lambda x: Launch(KERNEL, (1,), {"x": x, "table": Strided(table, 1)}, {}, tables=("table",)))
    for x in (torch.zeros(2), torch.ones(2)):
        run(x)
        assert same(KERNEL.runs[-1][1] | {"x": x}, KERNEL.runs[-1][1])
    assert all(arguments["table"].pointer is table for _, arguments in KERNEL.runs)


def test_the_launches_of_a_deformable_convolution_are_kept(monkeypatch):
    """Each of their tensors is an argument, whichever is wanted; a repeated shape prepares nothing."""
    made, seen = [], []
    monkeypatch.setattr(launch.Prepared, "run", lambda self, tensors: seen.append(self))
    monkeypatch.setattr(Launch, "run", lambda self: made.append(self))
    for _ in range(2):
        x, offset, mask, weight = (torch.zeros(s) for s in ((1, 3, 5, 4), (1, 18, 3, 5), (1, 9, 3, 5), (4, 3, 3, 3)))
        settings = [1, 1], [0, 1], [1, 1]
        deform_conv.forward([torch.zeros(1, 4, 3, 5)], [x], [offset], [mask], weight, None, *settings)
        results = [[torch.zeros_like(t)] for t in (x, offset, mask, weight, weight[:, 0, 0, 0])]
        deform_conv.backward(results, [torch.zeros(1, 4, 3, 5)], [x], [offset], [mask], weight, *settings)
    again = [prepared for prepared in seen if prepared.kernel is not None]
    names = ["plan", "forward", "plan", "samples", "gradients", "weight", "sum"]
    # The plan of backward is that of forward, and is kept from the first call on.
    kernels = [made_.kernel.__name__.removesuffix("_kernel") for made_ in made]
    assert kernels == [*names[:2], *names[3:]] and len(again) == 1 + len(names)
