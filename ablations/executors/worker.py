"""One worker process: takes cells from its pipe and turns each into a row.

A worker trains and evaluates while others do the same, and measures speed alone (`ablations/experiment/room.py`). It
ends when the process that started it does, so nothing goes on behind the user's back.
"""

import signal
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, cast

import torch

from ablations.data.problems import DataError
from ablations.experiment import trained
from ablations.experiment.experiment import Event, Job, Learned, Line, run
from ablations.experiment.logs import Log, open_log
from ablations.experiment.room import Room
from ablations.experiment.train import Diverged
from ablations.grid import Cell
from ablations.rows.machine import machine_info
from ablations.rows.row import Results, Row, Settings, Status
from ablations.rows.store import claim, read_row, write_row
from kernels import use_backend


class Finished(NamedTuple):
    """A cell has its row, which is in the store."""

    row: Row


class Elsewhere(NamedTuple):
    """Another run on this directory is at the cell."""


class Unwritten(NamedTuple):
    """A row could not be stored."""

    reason: str


Notice = Event | Finished | Elsewhere
Message = Notice | Unwritten


def work(connection: Connection, job: Job) -> None:
    """Answer every cell that comes through `connection` with its row, and with events on the way."""
    # Ctrl-C reaches the whole process group; the process that started us decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(job.threads)
    room = Room(job.room)

    def send(message: Message) -> None:
        connection.send(message)

    try:
        while True:
            cell: Cell = connection.recv()
            lease = claim_both(job.out, cell)
            if lease is None:
                time.sleep(0.5)
                send(Elsewhere())
                continue
            with lease:
                row = read_row(job.out, cell.key)
                if row is None or not trained.is_done(job.out, cell, row, job.retry_failed):
                    row = run_cell(cell, job, room, send)
                    try:
                        trained.copy_curve(job.out, cell)
                        write_row(job.out, row)
                    except OSError as error:
                        send(Unwritten(str(error)))
                        continue
            send(Finished(row))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def claim_both(out: Path, cell: Cell) -> ExitStack | None:
    """The right to work on a cell and on its weights, which cells of another test share; None if one is taken."""
    with ExitStack() as stack:
        for key in (cell.key, cell.training_key):
            lock = claim(out, key)
            if lock is None:
                return None
            stack.enter_context(lock)
        return stack.pop_all()


def run_cell(cell: Cell, job: Job, room: Room, notice: Callable[[Event], None]) -> Row:
    """Run one cell to its row; a failure becomes a row with its reason and all that was known before it.

    Raises:
        BrokenPipeError: The process that wanted the row is gone.
    """
    started = now()
    known: Results = {}
    trained.clear(job.out, cell)

    def heard(event: Event, log: Log) -> None:
        match event:
            case Line(step, scalars):
                log.write(step, scalars)
            case Learned(parts):
                known.update(parts)
                log.write(cell.steps, parts.get("metrics") or {})
                notice(event)
            case _:
                notice(event)

    try:
        with use_backend(cell.backend), closing(open_log(job.log, cell, job.out)) as log:
            run(cell, job, room, lambda event: heard(event, log))
        return {**blank_row(cell, job), **known, "started": started, "finished": now()}
    except BrokenPipeError:
        raise
    except Exception as error:
        status, reason = diagnosis(error, cell, job.out)
        return {**failed_row(cell, job, status, reason, started), **known}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def diagnosis(error: Exception, cell: Cell, out: Path) -> tuple[Status, str]:
    """The status and the reason of a failed row; of what nobody foresaw the traceback is kept in a file."""
    if isinstance(error, Diverged):
        return "diverged", str(error)
    if isinstance(error, DataError):
        return "bad_data", str(error)
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    log = out / "cells" / cell.key / "error.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(traceback.format_exception(error)))
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return "oom" if memory else "crashed", f"{reason} (see {log.relative_to(out)})"


def blank_row(cell: Cell, job: Job) -> Row:
    """The part of a row that is known before anything runs."""
    row: Row = {
        "key": cell.key,
        "cell": cast(Settings, cell.stored()),
        "status": "ok",
        "reason": None,
        "machine": machine_info(job.device, job.command),
    }
    if job.dropped:
        row["dropped"] = job.dropped
    return row


def failed_row(cell: Cell, job: Job, status: Status, reason: str, started: str | None = None) -> Row:
    """The row of a cell without a result."""
    return {**blank_row(cell, job), "status": status, "reason": reason, "started": started, "finished": now()}


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
