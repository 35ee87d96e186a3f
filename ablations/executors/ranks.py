"""Cells on several GPUs: a driver for each rank, which torchrun starts, and a worker process for each driver.

The drivers do not compute; they watch. Rank 0's is the one that runs the grid: its worker takes cells as that of a run
on one device does (`ablations/executors/worker.py`), and hands each to the other ranks' workers, which follow it. A
worker that fails or dies leaves the others inside an operation that will never end, so all of them are replaced: the
next *generation* of workers meets under names of its own. What drivers tell each other goes through torchrun's store:

    job            what the cells have in common, pickled
    generation     the number of the workers that are wanted now
    failed/<n>     what the first worker that failed in generation n came to
    end            the run is over
"""

import json
import os
import pickle
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import wait
from threading import Thread
from types import FrameType
from typing import NamedTuple, NoReturn, Self

import torch.distributed as dist

from ablations.executors.worker import Failed, Place, follow
from ablations.experiment.experiment import Job

SECONDS_BETWEEN_LOOKS = 0.2
# A worker whose peer has failed often ends before the peer's driver has said why.
SECONDS_FOR_A_REASON = 3.0
INTERRUPTED, TERMINATED = 130, 143
LOST = Failed("crashed", "its process ended; was memory short?")


class Terminated(BaseException):
    """torchrun, or whoever cancelled the job, wants this process to end."""


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """The handler of the signals that end a driver, SIGTERM and Ctrl-C."""
    # torchrun sends SIGTERM behind either; it must not cut off the cleaning up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


class Address(NamedTuple):
    """Where the store is."""

    host: str
    port: int
    prefix: str

    def store(self) -> dist.Store:
        """A new connection to it, for one thread."""
        return dist.PrefixStore(self.prefix, dist.TCPStore(self.host, self.port, is_master=False))


@dataclass(frozen=True)
class Ranks:
    """The driver of one rank among those that share every cell.

    Attributes:
        address: The store of all drivers.
        rank: This driver's number, from 0.
        ranks: How many there are.
        local_rank, local_ranks: Its number, and how many there are, on this machine.
    """

    address: Address
    rank: int
    ranks: int
    local_rank: int
    local_ranks: int

    @classmethod
    def of_torchrun(cls) -> Self | None:
        """What torchrun's environment says; None where this process was not started by it."""
        names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        values = [os.environ.get(name) for name in names]
        if None in values or "TORCHELASTIC_RUN_ID" not in os.environ:
            return None
        host, port, *numbers = (value or "" for value in values)
        # A restarted group must not read what the one before it has left.
        prefix = f"dyhead/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        return cls(Address(host, int(port), prefix), *map(int, numbers))

    @property
    def program(self) -> str:
        """The command that started all ranks, up to the module's arguments."""
        nodes = self.ranks // self.local_ranks
        several = f"--nnodes {nodes} " if nodes > 1 else ""
        return f"torchrun {several}--nproc-per-node {self.local_ranks} -m ablations.run"

    def drive(self, run: Callable[[], int], arguments: Sequence[str]) -> int:
        """Run a rank's part of the program: `run` on rank 0, on the others what follows it; returns the exit code.

        Args:
            run: The program, on rank 0.
            arguments: Of the command, which is printed if a rank is lost.
        """
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        try:
            if self.rank == 0:
                try:
                    return run()
                finally:
                    self.end()
            self.follow()
            return 0
        except KeyboardInterrupt:
            return INTERRUPTED
        except (Terminated, dist.DistError):
            # The store goes with the machine that it is on; then each machine says it.
            with suppress(dist.DistError):
                if not self.first_to_say():
                    return TERMINATED
            command = f"{self.program} {shlex.join(arguments)}"
            print(
                f"\nerror: ended because a rank was lost, or because somebody ended this one; finished cells and "
                f"checkpoints are kept, go on with: {command}",
                file=sys.stderr,
            )
            return TERMINATED
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def publish(self, job: Job) -> None:
        """Tell the other drivers what the cells have in common."""
        self.address.store().set("job", pickle.dumps(job).hex())

    def device(self, device: str) -> str:
        """The device of this rank, for cells that run on this sort of device."""
        return f"cuda:{self.local_rank}" if device.startswith("cuda") else device

    def generation(self) -> "Generation":
        """The next generation of workers, on rank 0."""
        store = self.address.store()
        return Generation(self, store, store.add("generation", 1))

    def end(self) -> None:
        """Tell the other drivers that the run is over, if they can still be told."""
        with suppress(dist.DistError):
            self.address.store().set("end", "1")

    def first_to_say(self) -> bool:
        """Whether no other driver has asked this."""
        return self.address.store().add("said", 1) == 1

    def follow(self) -> None:
        """Keep a worker at the side of rank 0's, until the run is over."""
        store, context = self.address.store(), get_context("spawn")
        while not store.check(["job"]):
            if store.check(["end"]):
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)
        job: Job = pickle.loads(bytes.fromhex(store.get("job").decode()))
        job = replace(job, device=self.device(job.device))
        number, process, connection = 0, None, None
        try:
            while not store.check(["end"]):
                wanted = store.add("generation", 0)
                if wanted > number:
                    number = wanted
                    if process is not None:
                        process.kill()
                    connection, theirs = context.Pipe()
                    process = context.Process(target=follow, args=(theirs, job, self.place(number)), daemon=True)
                    process.start()
                    theirs.close()
                elif connection is not None and wait([connection], SECONDS_BETWEEN_LOOKS):
                    try:
                        failed: Failed = connection.recv()
                    except (EOFError, ConnectionResetError):
                        failed = LOST
                    # What came of it is known once; of several failures the first one counts.
                    store.compare_set(f"failed/{number}", "", json.dumps(failed))
                    connection = None
                else:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            if process is not None:
                process.kill()

    def place(self, number: int) -> Place:
        """Where this rank's worker of a generation meets the others."""
        host, port, prefix = self.address
        return Place(host, port, f"{prefix}/workers/{number}", self.rank, self.ranks)


@dataclass(frozen=True)
class Generation:
    """The workers that are together now, as rank 0's driver sees them.

    Attributes:
        ranks: The driver.
        store: The driver's connection.
        number: Of the generation.
    """

    ranks: Ranks
    store: dist.Store
    number: int

    @property
    def place(self) -> Place:
        """Where rank 0's worker meets the others."""
        return self.ranks.place(self.number)

    def failure(self, seconds: float = 0.0) -> Failed | None:
        """What the first of the others that failed came to, waited for so many seconds; None without a failure."""
        key, until = f"failed/{self.number}", time.monotonic() + seconds
        while not self.store.check([key]):
            if time.monotonic() >= until:
                return None
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return Failed(*json.loads(self.store.get(key)))


@contextmanager
def ranks_of_this_process(job: Job, count: int) -> Iterator[Ranks]:
    """As many ranks on this machine, whose drivers are threads of this process; gives that of rank 0.

    Args:
        job: What the cells have in common. On GPUs rank r takes the r-th that this process sees.
        count: Ranks.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = Address("127.0.0.1", store.port, f"dyhead/{uuid.uuid4().hex}")
    first, *others = (Ranks(address, rank, count, rank, count) for rank in range(count))
    first.publish(job)
    drivers = [Thread(target=driver.follow, daemon=True) for driver in others]
    for thread in drivers:
        thread.start()
    try:
        yield first
    finally:
        first.end()
        for thread in drivers:
            thread.join()
