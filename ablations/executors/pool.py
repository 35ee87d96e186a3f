"""Runs the cells of a grid in worker processes, and outlives any of them."""

import multiprocessing
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess

from ablations.executors.worker import Elsewhere, Finished, Message, Notice, Unwritten, failed_row, work
from ablations.experiment.experiment import Job, Learned, Stage
from ablations.grid import Cell
from ablations.rows.row import Results, Row
from ablations.rows.store import write_row

# A worker that ends without a word was killed from outside. Its cell is tried once more before that counts as a row.
ATTEMPTS = 2


@dataclass
class Worker:
    """A process, and the cell it is at."""

    process: BaseProcess
    connection: Connection
    cell: Cell | None = None


def run_cells(cells: list[Cell], job: Job, workers: int, notice: Callable[[Cell, Notice], None]) -> None:
    """Run every cell to a row in `job.out`; a cell that fails has a row too, and the others go on.

    Args:
        cells: What to run, in this order.
        job: Where and how.
        workers: Number of processes.
        notice: Called in this process with a cell and what happens to it, at the end `Finished` with its row.

    Raises:
        OSError: A row could not be stored.
    """
    todo = deque(cells)
    lost: Counter[Cell] = Counter()
    known: defaultdict[Cell, Results] = defaultdict(Results)
    context = multiprocessing.get_context("spawn")
    team = [hire(context, job) for _ in range(min(workers, len(cells)))]
    try:
        while todo or any(worker.cell for worker in team):
            for worker in team:
                if worker.cell is None and todo:
                    worker.cell = todo.popleft()
                    worker.connection.send(worker.cell)
                    notice(worker.cell, Stage("start"))
            busy = [(worker, worker.cell) for worker in team if worker.cell is not None]
            ready = wait([worker.connection for worker, _ in busy])
            for worker, cell in busy:
                if worker.connection not in ready:
                    continue
                try:
                    message: Message = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    team[team.index(worker)] = hire(context, job)
                    worker.process.join()
                    lost[cell] += 1
                    if lost[cell] < ATTEMPTS:
                        todo.appendleft(cell)
                        continue
                    reason = f"its process ended {lost[cell]} times with exit code {worker.process.exitcode}"
                    row: Row = {**failed_row(cell, job, "crashed", f"{reason}; was memory short?"), **known[cell]}
                    write_row(job.out, row)
                    message = Finished(row)
                if isinstance(message, Unwritten):
                    raise OSError(message.reason)
                notice(cell, message)
                if isinstance(message, Elsewhere):
                    # Come back when everything else is done.
                    todo.append(cell)
                if isinstance(message, Learned):
                    # What a process that is killed later on would take with it.
                    known[cell].update(message.parts)
                if isinstance(message, Finished | Elsewhere):
                    worker.cell = None
    finally:
        for worker in team:
            worker.connection.close()
            worker.process.kill()
            worker.process.join()


def hire(context: SpawnContext, job: Job) -> Worker:
    """Start a worker; it ends by itself when this process does, because its pipe closes."""
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, job), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours)
