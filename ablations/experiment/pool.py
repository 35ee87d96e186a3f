"""Runs the cells of a grid in worker processes, and outlives any of them."""

import multiprocessing
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from ablations.experiment.work import Job, failed_row, work
from ablations.grid import Cell
from ablations.rows.store import write_row

# A worker that ends without a word was killed from outside. Its cell is tried once more before that counts as a row.
ATTEMPTS = 2


@dataclass
class Worker:
    """A process, and the cell it is at."""

    process: BaseProcess
    connection: Connection
    cell: Cell | None = None


def run_cells(cells: list[Cell], job: Job, workers: int, notice: Callable[[str, Cell, object], None]) -> None:
    """Run every cell to a row in `job.out`; a cell that fails has a row too, and the others go on.

    Args:
        cells: What to run, in this order.
        job: Where and how.
        workers: Number of processes.
        notice: Called in this process with what happens, the cell, and a detail: `"start"`; `"step"` with (step, loss);
            `"evaluate"`; `"measure"`; `"row"` with the row.
    """
    todo = deque(cells)
    lost = Counter()
    known: dict[Cell, dict] = {}
    context = multiprocessing.get_context("spawn")
    team = [hire(context, job) for _ in range(min(workers, len(cells)))]
    try:
        while todo or any(worker.cell for worker in team):
            for worker in team:
                if worker.cell is None and todo:
                    worker.cell = todo.popleft()
                    worker.connection.send(worker.cell)
                    notice("start", worker.cell, None)
            busy = {worker.connection: worker for worker in team if worker.cell}
            for connection in wait(list(busy)):
                worker = busy[connection]
                cell = worker.cell
                try:
                    kind, detail = connection.recv()
                except (EOFError, ConnectionResetError):
                    team[team.index(worker)] = hire(context, job)
                    worker.process.join()
                    lost[cell] += 1
                    if lost[cell] < ATTEMPTS:
                        todo.appendleft(cell)
                        continue
                    reason = f"its process ended {lost[cell]} times with exit code {worker.process.exitcode}"
                    kind, detail = "row", failed_row(cell, job, "crashed", f"{reason}; was memory short?")
                    detail |= known.get(cell, {})
                    write_row(job.out, detail)
                if kind == "elsewhere":
                    # Another run on this directory is at it; come back when everything else is done.
                    todo.append(cell)
                    worker.cell = None
                elif kind == "unwritten":
                    raise OSError(detail)
                elif kind == "learned":
                    # What a process that is killed later on would take with it.
                    known.setdefault(cell, {}).update(detail)
                else:
                    notice(kind, cell, detail)
                    if kind == "row":
                        worker.cell = None
    finally:
        for worker in team:
            worker.connection.close()
            worker.process.kill()
            worker.process.join()


def hire(context: multiprocessing.context.BaseContext, job: Job) -> Worker:
    """Start a worker; it ends by itself when this process does, because its pipe closes."""
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, job), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours)
