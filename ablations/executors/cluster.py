"""Cells on the machines of a Ray cluster: a task each, which Ray begins again where its machine is lost.

Nothing need be shared by the machines. This process holds the lease of every cell under way and is the only one that
writes rows. A task works in a directory of its own machine (`ablations/executors/pool.py` runs its one cell there), and
its files travel: to the `Depot`, an actor beside this process, which writes them where a run on this machine would have
left them, and from there to a task that begins again. So a cell whose machine is lost goes on from its last checkpoint,
and so does one whose driver was killed, from whatever machine it is run next.
"""

import logging
import os
import pickle
import shutil
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ablations.executors import pool
from ablations.executors.depot import Depot, whole_files
from ablations.executors.ranks import ranks_of_this_process
from ablations.executors.worker import Elsewhere, Finished, Notice, claim_both, failed_row
from ablations.experiment import trained
from ablations.experiment.experiment import Job, Learned, Saved
from ablations.experiment.room import quiet_place
from ablations.files import FileLock
from ablations.generate import generate
from ablations.grid import SHIPPED, Cell
from ablations.rows.row import Results, Row
from ablations.rows.store import read_row, write_row

# How often Ray begins a task again whose machine or process is lost.
RETRIES = 3
SECONDS_BETWEEN_LOOKS = 0.3
# Of a cluster that is begun here; files wait in it to be written, of R-50 half a gigabyte.
OBJECT_STORE_BYTES = 2 << 30
NO_RAY = "--executor ray needs Ray: pip install 'dyhead-lab[ray]'"


@dataclass(frozen=True)
class Cluster:
    """Where to run, and what a cell asks for.

    Attributes:
        address: Of a cluster, as `ray.init` takes it; None for one that begins on this machine and ends with the run.
        gpus: GPUs of a cell, each with a rank of its own; 0 for cells on CPUs.
        most: Cells at once; None for as many as the cluster holds.
        difficulty: Of the generated data, which a machine without them makes for itself; None for data of a user.
    """

    address: str | None
    gpus: int
    most: int | None
    difficulty: str | None


def run_on_cluster(cells: list[Cell], job: Job, cluster: Cluster, notice: Callable[[Cell, Notice], None]) -> None:
    """Run every cell to a row in `job.out`, as `ablations.executors.pool.run_cells` does, on the machines of a cluster.

    Args:
        cells: What to run, in this order.
        job: Where and how. `data`, and `weights` where they are a file, must be on every machine by the same path.
        cluster: The machines.
        notice: Called in this process with a cell and what happens to it, at the end `Finished` with its row.

    Raises:
        ImportError: Ray is not installed.
        ValueError: There is no such cluster, or none of its machines can hold a cell.
        OSError: A row could not be stored, or the cluster is lost.
    """
    ray = started(cluster)
    try:
        job = replace(job, out=job.out.resolve(), data=job.data.resolve())
        cpus, slots = needs(ray, cluster)
        beside = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        depot = ray.remote(Depot).options(num_cpus=0, scheduling_strategy=beside).remote(job.out)
        task = ray.remote(run_there).options(
            num_cpus=cpus, num_gpus=cluster.gpus, max_retries=RETRIES, retry_exceptions=False
        )
        Driver(ray, cells, job, notice, depot).drive(
            lambda number, cell: task.remote(number, cell, replace(job, threads=cpus), cluster, depot),
            cluster.most or slots,
        )
    except ray.exceptions.RayError as error:
        raise OSError(f"the Ray cluster is lost: {type(error).__name__}") from error
    finally:
        ray.shutdown()


class Driver:
    """Gives cells to tasks, as many at once as there is room for, and makes rows of what they tell.

    Args:
        ray: The module.
        cells, job, notice: As for `run_on_cluster`.
        depot: The actor.
    """

    def __init__(self, ray: Any, cells: list[Cell], job: Job, notice: Callable[[Cell, Notice], None], depot: Any):
        self.ray, self.cells, self.job, self.notice, self.depot = ray, cells, job, notice, depot
        self.known: defaultdict[int, Results] = defaultdict(Results)
        self.leases: dict[int, ExitStack] = {}

    def drive(self, begin: Callable[[int, Cell], Any], most: int) -> None:
        """Run all cells.

        Args:
            begin: Makes a task of a cell.
            most: Tasks at once.
        """
        todo, tasks = deque(range(len(self.cells))), dict[Any, int]()
        try:
            while todo or tasks:
                for _ in range(min(most - len(tasks), len(todo))):
                    number = todo.popleft()
                    if not self.claim(number):
                        # Come back when everything else is done.
                        todo.append(number)
                    elif not self.finished_elsewhere(number):
                        trained.clear(self.job.out, self.cells[number])
                        tasks[begin(number, self.cells[number])] = number
                ended, _ = self.ray.wait(list(tasks), timeout=SECONDS_BETWEEN_LOOKS) if tasks else ([], [])
                if not tasks:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                self.hear()
                for task in ended:
                    number = tasks.pop(task)
                    self.conclude(number, task)
        finally:
            for task in tasks:
                self.ray.cancel(task, force=True)
            for lease in self.leases.values():
                lease.close()

    def claim(self, number: int) -> bool:
        """Take the right to work on a cell; False where another run has it."""
        lease = claim_both(self.job.out, self.cells[number])
        if lease is None:
            self.notice(self.cells[number], Elsewhere())
            return False
        self.leases[number] = lease
        return True

    def finished_elsewhere(self, number: int) -> bool:
        """Whether another run has finished a cell before it was claimed; that is told, and the lease given back."""
        cell = self.cells[number]
        row = read_row(self.job.out, cell.key)
        if row is None or not trained.is_done(self.job.out, cell, row, self.job.retry_failed):
            return False
        self.leases.pop(number).close()
        self.notice(cell, Finished(row))
        return True

    def hear(self) -> None:
        """Pass on what the tasks have told; a row is written before anybody hears of it."""
        for number, pickled in self.ray.get(self.depot.take.remote()):
            event: Notice = pickle.loads(pickled)
            if isinstance(event, Learned):
                self.known[number].update(event.parts)
            if isinstance(event, Finished):
                self.finish(number, event.row)
            elif number in self.leases:
                self.notice(self.cells[number], event)

    def finish(self, number: int, row: Row) -> None:
        """Write the row of a cell and give its lease back; a task that Ray began twice makes no second row."""
        lease = self.leases.pop(number, None)
        if lease is not None:
            with lease:
                write_row(self.job.out, row)
            self.notice(self.cells[number], Finished(row))

    def conclude(self, number: int, task: Any) -> None:
        """Hear the last of a task that has ended; one that has left no row has failed."""
        reason = "it ended without a row"
        try:
            self.ray.get(task)
        except self.ray.exceptions.RayError as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        self.hear()
        if number in self.leases:
            # The machine that ran it may be gone; this one may lack what it had.
            here = self.job if torch.cuda.is_available() else replace(self.job, device="cpu")
            row = failed_row(self.cells[number], here, "crashed", reason)
            self.finish(number, {**row, **self.known[number]})


def run_there(number: int, cell: Cell, job: Job, cluster: Cluster, depot: Any) -> None:
    """The task of a cell, on whatever machine: fetch its files, run it, send its files.

    Args:
        number: Of the cell, for the depot.
        cell: What to run.
        job: As on the driver's machine.
        cluster: What the cell was given.
        depot: The actor.
    """
    import ray

    place = quiet_place(job.out)
    place.mkdir(parents=True, exist_ok=True)
    out, held = workplace(place)
    sent: dict[Path, tuple[int, int]] = {}

    def send(folder: str) -> None:
        for path in whole_files(out / "cells" / folder):
            state = path.stat().st_mtime_ns, path.stat().st_size
            if sent.get(path) != state:
                ray.get(depot.put.remote(folder, path.name, path.read_bytes()))
                sent[path] = state

    def tell(_: Cell, event: Notice) -> None:
        if isinstance(event, Saved | Finished):
            send(cell.training_key)
        if isinstance(event, Finished):
            send(cell.key)
        ray.get(depot.tell.remote(number, pickle.dumps(event)))

    try:
        for name, content in ray.get(depot.get.remote(cell.training_key)).items():
            path = out / "cells" / cell.training_key / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            sent[path] = path.stat().st_mtime_ns, path.stat().st_size
        there = replace(
            job,
            data=data_there(job, cluster, place),
            weights=weights_there(job.weights),
            out=out,
            room=place,
            cache=place / "cache",
            device="cuda:0" if cluster.gpus else "cpu",
        )
        several = ranks_of_this_process(there, cluster.gpus) if cluster.gpus > 1 else nullcontext()
        with several as ranks:
            pool.run_cells([cell], there, 1, tell, ranks)
    finally:
        shutil.rmtree(out, ignore_errors=True)
        held.release()


def workplace(place: Path) -> tuple[Path, FileLock]:
    """A new directory for a cell, and the lock that tells it from one whose task was killed: such a one is removed."""
    for left in place.glob("cell-*"):
        with FileLock(left / ".held") as lock:
            if lock.acquire(wait=False):
                shutil.rmtree(left, ignore_errors=True)
    # Under its final name nobody finds it without its lock.
    made = Path(tempfile.mkdtemp(prefix="new-", dir=place))
    held = FileLock(made / ".held")
    held.acquire()
    return made.rename(made.with_name(made.name.replace("new-", "cell-", 1))), held


def data_there(job: Job, cluster: Cluster, place: Path) -> Path:
    """The data on this machine; the generated set is made where it is absent, and checked like any other."""
    if job.data.exists() or cluster.difficulty is None:
        return job.data
    return generate(place / "data", cluster.difficulty)


def weights_there(weights: str | None) -> str | None:
    """Initial weights on this machine; those that are shipped lie where this package does."""
    shipped = {path.name: str(path) for path in SHIPPED.values()}
    return weights if weights is None or Path(weights).exists() else shipped.get(Path(weights).name, weights)


def started(cluster: Cluster) -> Any:
    """Ray, connected to the cluster, or with one begun on this machine."""
    # Nothing of a run is reported to anybody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Cells are measured as without Ray, which would have its workers of a cluster begun here wait for anything else.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ImportError(NO_RAY) from error
    own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    here: dict[str, Any] = {} if cluster.address else own
    # Without an address Ray would take any cluster that it finds on this machine.
    try:
        ray.init(address=cluster.address or "local", log_to_driver=False, logging_level=logging.ERROR, **here)
    except ConnectionError as error:
        raise ValueError(f"no Ray cluster at --address {cluster.address}: {error}") from error
    return ray


def needs(ray: Any, cluster: Cluster) -> tuple[int, int]:
    """CPUs of a cell, and how many cells the cluster holds at once.

    Raises:
        ValueError: No machine can hold a cell; the message says what there is.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    held = [(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in machines]
    # On GPUs a cell takes its part of the CPUs of a machine, which feed it.
    shares = [cpu * cluster.gpus // gpu for cpu, gpu in held if cluster.gpus and gpu >= cluster.gpus]
    cpus = max(1, min(shares)) if shares else 1
    slots = sum(min(cpu // cpus, gpu // cluster.gpus if cluster.gpus else cpu) for cpu, gpu in held)
    if not slots:
        wanted = f"{cluster.gpus} GPUs and {cpus} CPUs" if cluster.gpus else "a CPU"
        there = "; ".join(f"{cpu} CPUs, {gpu} GPUs" for cpu, gpu in held)
        raise ValueError(f"no machine of the cluster has {wanted} for a cell; there are: {there}")
    return cpus, slots
