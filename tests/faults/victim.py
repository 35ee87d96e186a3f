"""A small grid that faults are done to, in processes that are forked from this one and so begin at once.

Everything that writes, locks, waits and resumes is the program's own. Only the sizes are small, speed is measured for a
moment, and workers are forked where the program spawns them.
"""

import ctypes
import multiprocessing
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from types import SimpleNamespace

import torch

# Whatever trains imports it, and takes longer for that than for all its steps: here once for all that are forked.
import torch._dynamo

from ablations import grid, report, run
from ablations.evaluation.detections import FILE, read_detections
from ablations.executors import pool, worker
from ablations.exhibits import make
from ablations.exhibits.make import write_exhibits
from ablations.experiment import experiment, train
from ablations.experiment.experiment import Stage
from ablations.grid import SHIPPED
from ablations.report import write_results
from ablations.rows.machine import machine_info
from ablations.rows.row import Row
from ablations.rows.store import read_row, read_rows
from ablations.rows.tables import write_tables

SMALL = {"steps": 20, "batch_size": 2, "warmup": 2, "channels": 16, "seeds": 1}
# The later one counts where several processes are killed at once.
DOING = ("starting or waiting", "measuring", "evaluating", "training", "writing")
# What each process is doing, by its number modulo the length; the last two count trainings and rows written twice.
_doing = RawArray("i", 4096 + 2)
_TRAININGS, _DOUBLED = 4096, 4097
_count = multiprocessing.Lock()


def prepare() -> None:
    """Make the program small, and watched; once, before anything is forked."""
    # Tensors are so small that a second thread only waits; the more so where other programs run.
    torch.set_num_threads(1)
    torch.set_num_threads = lambda _: None
    # The commit is asked for once, and not by every process that is forked.
    machine_info("cpu", "")
    grid.PRESETS["tiny"] = replace(grid.PRESETS["tiny"], **SMALL)
    # What writes nothing need not take its time.
    experiment.measure_latency = partial(experiment.measure_latency, seconds=0.02)
    experiment.count_gmacs = lambda *_: 1.0
    pool.multiprocessing = SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))
    whole, written, trained, atomic = worker.run, worker.write_row, experiment.train, train.atomic_file

    def watched(cell, job, room, notice, group):
        def heard(event):
            if isinstance(event, Stage):
                do({"evaluate": "evaluating", "measure": "measuring"}[event.name])
            notice(event)

        do("training")
        try:
            return whole(cell, job, room, heard, group)
        finally:
            do("starting or waiting")

    def counted(out, row):
        # A good row that is there already must not be written again.
        there = read_row(out, row["key"], report=lambda _: None)
        if there is not None and there["status"] == "ok":
            add(_DOUBLED)
        with writing(lambda: None)():
            return written(out, row)

    def training(*arguments, **named):
        add(_TRAININGS)
        return trained(*arguments, **named)

    worker.run, worker.write_row, pool.write_row, experiment.train = watched, counted, counted, training
    train.atomic_file = writing(atomic)


def show(everything: bool) -> None:
    """Whether a run ends with exhibits, pictures and a report, which take long, or with tables alone."""
    make.write_exhibits = write_exhibits if everything else lambda *_: None
    report.write_results = write_results if everything else lambda rows, out, problems: write_tables(rows, out)


def writing(manager: Callable) -> Callable:
    """A context manager that is said to write."""

    @contextmanager
    def watched(*arguments):
        before = doing(os.getpid())
        do("writing")
        inner = manager(*arguments)
        try:
            if inner is None:
                yield
            else:
                with inner as file:
                    yield file
        finally:
            do(before)

    return watched


def do(what: str) -> None:
    _doing[os.getpid() % 4096] = DOING.index(what)


def add(counter: int) -> None:
    with _count:
        _doing[counter] += 1


def doing(pid: int) -> str:
    """What a process is at."""
    return DOING[_doing[pid % 4096]]


def take(counter: str) -> int:
    """How often something was done since it was last asked: `trainings`, or `doubled` rows."""
    index = {"trainings": _TRAININGS, "doubled": _DOUBLED}[counter]
    with _count:
        value, _doing[index] = _doing[index], 0
    return value


def say(text: str) -> None:
    """Show how far a long fault is."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


class Run:
    """The program under way in a process of its own, and what it printed.

    Args:
        data, out: Directories.
        only: Which cells.
        more: Further options.
        log: Where it prints.
        plain: Without root's right to write where permissions forbid it.
    """

    def __init__(self, data: Path, out: Path, only: str, *more: str, log: Path, plain: bool = False):
        arguments = ["--grid", "--data", str(data), "--out", str(out), "--only", only, "--workers", "2", *more]
        arguments += ["--weights", str(SHIPPED["tiny"])]
        self.log, self.code = log, None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(arguments, plain)

    def _become(self, arguments: list[str], plain: bool) -> None:
        code = 70
        try:
            if plain:
                give_up_capabilities()
            os.setsid()
            file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = run.main(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def ended(self) -> bool:
        """Whether it is over."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, seconds: float = 120) -> int:
        """Its exit code, when it has ended."""
        until = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > until:
                os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutError(f"still there after {seconds} s: {self.printed()}")
            time.sleep(0.02)
        return self.code

    def workers(self) -> list[int]:
        """Its child processes."""
        try:
            return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            return []

    def printed(self) -> str:
        """What it printed."""
        return self.log.read_text() if self.log.exists() else ""

    def complaints(self) -> list[str]:
        """The lines that say what went wrong."""
        lines = self.printed().splitlines()
        return [line for line in lines if line.startswith(("error:", "warning:")) or "Traceback" in line]


def give_up_capabilities() -> None:
    """Make this process one whose file permissions count, whoever's it is."""
    header = struct.pack("Ii", 0x20080522, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")


def rows_of(out: Path) -> dict[str, Row]:
    """The good rows by key."""
    return {row["key"]: row for row in read_rows(out, report=lambda _: None) if row["status"] == "ok"}


def differences(out: Path, whole: Path) -> list[str]:
    """In what the results of one directory differ from those of another, which nothing was done to."""
    found, expected = rows_of(out), rows_of(whole)
    wrong = [f"{key} is in one alone" for key in found.keys() ^ expected.keys()]
    for key in found.keys() & expected.keys():
        here, there = found[key], expected[key]
        if here["metrics"] != there["metrics"] or here["training"]["loss"] != there["training"]["loss"]:
            wrong.append(f"numbers of {key}")
        if read_detections(out / "cells" / key / FILE) != read_detections(whole / "cells" / key / FILE):
            wrong.append(f"detections of {key}")
        weights, others = (
            torch.load(place / row["weights"], weights_only=True)["model"]
            for place, row in ((out, here), (whole, there))
        )
        if not all(torch.equal(weights[name], value) for name, value in others.items()):
            wrong.append(f"weights of {key}")
    return wrong
