"""One worker process: takes cells from its pipe and turns each into a row.

A worker trains and evaluates while others do the same, and measures speed alone (`ablations/experiment/room.py`). It
ends when the process that started it does, so nothing goes on behind the user's back. Where several ranks share a cell
(`ablations/executors/ranks.py`), rank 0's worker is the one that takes cells and makes rows; the others follow it.
"""

import ctypes
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.distributed as dist

from ablations.data.problems import DataError
from ablations.experiment import trained
from ablations.experiment.experiment import Event, Job, Learned, Line, run
from ablations.experiment.group import ALONE, Group, lost_peer
from ablations.experiment.logs import Log, open_log
from ablations.experiment.room import Room
from ablations.experiment.train import Diverged
from ablations.files import atomic_write_text, told
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


class OutOfMemory(NamedTuple):
    """Memory was short in training; the row is what the cell came to if it is not tried again with less."""

    row: Row


class Failed(NamedTuple):
    """A worker that follows rank 0's has failed."""

    status: Status
    reason: str


Notice = Event | Finished | Elsewhere
Message = Notice | Unwritten | OutOfMemory

PR_SET_PDEATHSIG = 1
# Drivers see a rank that is lost; a rank that only waits, while rank 0 measures, must not be taken for one.
FOR_EVER = timedelta(days=30)


class Place(NamedTuple):
    """Where the workers that share cells meet.

    Attributes:
        host, port, prefix: Of a `torch.distributed.TCPStore`, and of its keys.
        rank, ranks: The number of this worker, and how many there are.
    """

    host: str
    port: int
    prefix: str
    rank: int
    ranks: int

    def join(self) -> Group:
        """Wait for all others; tensors on the CPU then go by gloo, those of GPUs by NCCL."""
        store = dist.PrefixStore(self.prefix, dist.TCPStore(self.host, self.port, is_master=False))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.ranks, timeout=FOR_EVER)
        return Group(self.rank, self.ranks)


def work(connection: Connection, job: Job, place: Place | None = None) -> None:
    """Answer every cell that comes through `connection` with its row, and with events on the way.

    Args:
        connection: To the process that started this one.
        job: What the cells have in common.
        place: Where the ranks meet that share the cells with this one, the first of them; None without any.
    """
    prepare(job)
    room = Room(job.room)
    group = ALONE if place is None else place.join()

    def send(message: Message) -> None:
        connection.send(message)

    try:
        while True:
            cell: Cell = connection.recv()
            try:
                lease = claim_both(job.out, cell)
            except OSError as error:
                send(Unwritten(told(error)))
                continue
            if lease is None:
                time.sleep(0.5)
                send(Elsewhere())
                continue
            with lease:
                row = read_row(job.out, cell.key)
                if row is None or not trained.is_done(job.out, cell, row, job.retry_failed):
                    try:
                        row = run_cell(group.send(cell), job, room, send, group)
                        if row["status"] == "oom" and "training" not in row:
                            send(OutOfMemory(row))
                            continue
                        trained.copy_curve(job.out, cell)
                        write_row(job.out, row)
                    except BrokenPipeError:
                        raise
                    except OSError as error:
                        send(Unwritten(told(error)))
                        continue
            send(Finished(row))
    except (EOFError, BrokenPipeError, ConnectionResetError, LostPeer):
        return


def follow(connection: Connection, job: Job, place: Place) -> None:
    """Do a rank's part of every cell that rank 0's worker begins; what fails here alone goes through `connection`."""
    prepare(job)
    room = Room(job.room)
    group = place.join()
    while True:
        cell = None
        try:
            cell = group.receive()
            with use_backend(cell.backend):
                run(cell, job, room, lambda event: None, group)
        except Diverged:
            # So it has on every rank.
            continue
        except Exception as error:
            if cell is not None and not lost_peer(error):
                connection.send(Failed(*diagnosis(error, cell, job.out)))
            return


def prepare(job: Job) -> None:
    """Make this process a worker."""
    # Ctrl-C reaches the whole process group; the process that started us decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Linux alone knows this; elsewhere the end of the pipe is noticed, at the next event.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(job.threads)


class LostPeer(Exception):
    """Another rank is gone, and this one cannot go on."""


def claim_both(out: Path, cell: Cell) -> ExitStack | None:
    """The right to work on a cell and on its weights, which cells of another test share; None if one is taken."""
    with ExitStack() as stack:
        for key in (cell.key, cell.training_key):
            lock = claim(out, key)
            if lock is None:
                return None
            stack.enter_context(lock)
        return stack.pop_all()


def run_cell(cell: Cell, job: Job, room: Room, notice: Callable[[Event], None], group: Group = ALONE) -> Row:
    """Run one cell to its row; a failure becomes a row with its reason and all that was known before it.

    Raises:
        BrokenPipeError: The process that wanted the row is gone.
        LostPeer: Another rank of the group is gone.
        OSError: Something could not be written below `job.out`, for which the cell is not to blame.
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
            run(cell, job, room, lambda event: heard(event, log), group)
        return {**blank_row(cell, job), **known, "started": started, "finished": now()}
    except BrokenPipeError:
        raise
    except Exception as error:
        if is_of_the_disk(error, job.out):
            raise
        if group.ranks > 1 and lost_peer(error):
            raise LostPeer from error
        status, reason = diagnosis(error, cell, job.out)
        return {**failed_row(cell, job, status, reason, started), **known}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_of_the_disk(error: Exception, out: Path) -> bool:
    """Whether an error is that of a disk that is full, read-only or broken, met while writing below `out`."""
    name = getattr(error, "filename", None)
    return isinstance(error, OSError) and isinstance(name, str) and Path(name).is_relative_to(out)


def diagnosis(error: Exception, cell: Cell, out: Path) -> tuple[Status, str]:
    """The status and the reason of a failed row; of what nobody foresaw the traceback is kept in a file."""
    if isinstance(error, Diverged):
        return "diverged", str(error)
    if isinstance(error, DataError):
        return "bad_data", str(error)
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    log = out / "cells" / cell.key / "error.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(log, "".join(traceback.format_exception(error)))
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
