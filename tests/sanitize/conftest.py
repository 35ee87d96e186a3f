"""Every launch of these tests is Triton's own IR, executed on a CPU that passes for a GPU; see requirements.txt."""

from collections import defaultdict

import pytest
import torch

# How the IR writes that an atomic operation both acquires and releases.
ACQ_REL = "sem = 4 : i32"


def unordered(find):
    """A search for races that knows programs which count themselves and of which the last one goes on.

    The log lists accesses program by program. What a program did before it counted itself comes before what a later one
    does after counting itself at the same address, in every order in which they may run in which the later one gets
    there. ttsem knows no order between programs, so it is shown all pairs of accesses but these.
    """

    def search(log):
        if not log:
            return find(log)
        arrivals, of_program = defaultdict(list), defaultdict(list)
        for number, (program, kind, operation, addresses, *_) in enumerate(log):
            of_program[program].append(number)
            if kind == "a" and ACQ_REL in operation:
                for address in set(addresses.tolist()):
                    arrivals[address].append((program, number))
        after = {}
        for arrived in arrivals.values():
            before = set()
            for program, number in arrived:
                if later := {i for i in of_program[program] if i > number}:
                    after[number] = later, set(before)
                before |= {i for i in of_program[program] if i < number}
        last = set().union(*(later for later, _ in after.values()))
        first = set(range(len(log))) - last
        for chosen in (first, last, *((first - before) | later for later, before in after.values())):
            if race := find([log[i] for i in sorted(chosen)]):
                return race
        return None

    return search


@pytest.fixture(autouse=True)
def checked(monkeypatch, poison):
    """Tensors claim to be on a GPU; a launch that leaves its tensors or races raises, and no launch is too large.

    Yields:
        The session: `launches` is the number of kernels launched so far.
    """
    sanitize = pytest.importorskip("ttsem.sanitize", reason="ttsem is not installed; `make sanitize` installs it")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("is_available", "device_count", "get_device_name", "get_device_capability"):
        # The session replaces these for good.
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cuda, name))
    monkeypatch.setattr(sanitize.pidraces, "find_race", unordered(sanitize.pidraces.find_race))
    with sanitize.session() as session:
        yield session
    assert session.launches and not session.races_unchecked


@pytest.fixture(params=[False, True], ids=["atomics", "deterministic"])
def algorithms(request):
    """With atomic additions, and as `torch.use_deterministic_algorithms` wants it."""
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)
