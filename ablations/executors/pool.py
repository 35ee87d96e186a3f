"""Runs the cells of a grid in worker processes, and outlives any of them."""

import multiprocessing
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess

from ablations.executors.ranks import LOST, SECONDS_BETWEEN_LOOKS, SECONDS_FOR_A_REASON, Generation, Ranks
from ablations.executors.worker import (
    Elsewhere,
    Failed,
    Finished,
    Message,
    Notice,
    OutOfMemory,
    Unwritten,
    failed_row,
    work,
)
from ablations.experiment import trained
from ablations.experiment.experiment import Job, Learned, Stage
from ablations.grid import Cell
from ablations.rows.row import Results, Row
from ablations.rows.store import write_row

# A worker that ends without a word was killed from outside. Its cell is tried once more before that counts as a row.
ATTEMPTS = 2


@dataclass
class Worker:
    """A process, the cell it is at, and the other ranks' processes that follow it, if there are any."""

    process: BaseProcess
    connection: Connection
    followers: Generation | None = None
    cell: Cell | None = None

    def hear(self, ready: bool) -> Message | Failed | None:
        """What it has to say, `Failed` if it or one that follows it has failed; None for nothing."""
        if not ready:
            return None if self.followers is None else self.followers.failure()
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            return (self.followers and self.followers.failure(SECONDS_FOR_A_REASON)) or LOST

    def end(self) -> None:
        """Kill the process."""
        self.connection.close()
        self.process.kill()
        self.process.join()


def run_cells(
    cells: list[Cell], job: Job, workers: int, notice: Callable[[Cell, Notice], None], ranks: Ranks | None = None
) -> None:
    """Run every cell to a row in `job.out`; a cell that fails has a row too, and the others go on.

    Args:
        cells: What to run, in this order.
        job: Where and how.
        workers: Number of processes.
        notice: Called in this process with a cell and what happens to it, at the end `Finished` with its row.
        ranks: The driver of rank 0 where each cell is shared by several; there is then one worker.

    Raises:
        OSError: A row could not be stored.
    """
    todo = deque(cells)
    lost: Counter[Cell] = Counter()
    known: defaultdict[Cell, Results] = defaultdict(Results)
    context = multiprocessing.get_context("spawn")
    team = [hire(context, job, ranks) for _ in range(min(workers, len(cells)))]

    def replace(worker: Worker) -> None:
        worker.end()
        team[team.index(worker)] = hire(context, job, ranks)

    def finish(cell: Cell, row: Row) -> None:
        row = {**row, **known[cell]}
        write_row(job.out, row)
        notice(cell, Finished(row))

    try:
        while todo or any(worker.cell for worker in team):
            for worker in team:
                if worker.cell is None and todo:
                    worker.cell = todo.popleft()
                    worker.connection.send(worker.cell)
                    notice(worker.cell, Stage("start"))
            busy = [(worker, worker.cell) for worker in team if worker.cell is not None]
            ready = wait([worker.connection for worker, _ in busy], None if ranks is None else SECONDS_BETWEEN_LOOKS)
            for worker, cell in busy:
                message = worker.hear(worker.connection in ready)
                if isinstance(message, Failed) and message.status == "oom" and "training" not in known[cell]:
                    message = OutOfMemory(failed_row(cell, job, *message))
                match message:
                    case None:
                        pass
                    case Failed(status, reason):
                        replace(worker)
                        lost[cell] += message == LOST
                        if message == LOST and lost[cell] < ATTEMPTS:
                            todo.appendleft(cell)
                        else:
                            again = f" ({lost[cell]} times)" if message == LOST else ""
                            finish(cell, failed_row(cell, job, status, f"{reason}{again}"))
                    case OutOfMemory(row):
                        # What an allocator has cut up, and an error holds on to, goes with the process.
                        replace(worker)
                        if trained.halve(job.out, cell, ranks.ranks if ranks else 1):
                            todo.appendleft(cell)
                        else:
                            finish(cell, row)
                    case Unwritten(reason):
                        raise OSError(reason)
                    case Elsewhere():
                        # Come back when everything else is done.
                        todo.append(cell)
                        worker.cell = None
                        notice(cell, message)
                    case Finished(row):
                        if ranks is not None and row["status"] not in ("ok", "diverged"):
                            # The others are in the middle of something.
                            replace(worker)
                        worker.cell = None
                        notice(cell, message)
                    case _:
                        if isinstance(message, Learned):
                            # What a process that is killed later on would take with it.
                            known[cell].update(message.parts)
                        notice(cell, message)
    finally:
        for worker in team:
            worker.end()


def hire(context: SpawnContext, job: Job, ranks: Ranks | None) -> Worker:
    """Start a worker; it ends by itself when this process does."""
    followers = None if ranks is None else ranks.generation()
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, job, followers and followers.place), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours, followers)
