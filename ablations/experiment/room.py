"""Quiet for measuring: latency is taken while nothing else of the grid computes.

A readers-writer lock among the processes that share a result directory. Whoever computes holds the room *busy*, for
one training step or one batch at a time; whoever measures asks for *quiet*, waits for the steps under way to end, and
keeps new ones from starting until it is done. Two files of `flock`s make it: everybody passes the turnstile before
entering the room, and a measuring process stays in the turnstile, so a stream of steps cannot keep it waiting. A killed
process gives its locks back at once.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ablations.files import FileLock


def quiet_place(out: Path) -> Path:
    """A directory on this machine for the lock of the results in `out`.

    Several machines may share the results, and a step on one does not disturb what another measures.
    """
    name = hashlib.sha256(os.fsencode(out.resolve())).hexdigest()[:16]
    try:
        place = Path(tempfile.gettempdir()) / f"dyhead-lab-{os.getuid()}"
        place.mkdir(mode=0o700, exist_ok=True)
        # Anybody may have made a folder of that name there.
        return place / name if place.stat().st_uid == os.getuid() else out
    except OSError:
        return out


class Room:
    """The lock of one result directory. Not to be nested, and not to be shared between threads: open one for each.

    A process made by `fork` opens its own; the inherited one is closed there.
    """

    def __init__(self, directory: str | Path):
        self._turnstile = FileLock(Path(directory) / ".room.turnstile")
        self._room = FileLock(Path(directory) / ".room")
        self._inside = False

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Compute inside this block: waits while another process measures. Microseconds when nobody does."""
        self._enter(shared=True)
        try:
            self._turnstile.unlock()
            yield
        finally:
            self._leave()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Measure inside this block: no other process is inside `busy` or `quiet` of the same directory."""
        self._enter(shared=False)
        try:
            yield
        finally:
            self._leave()
            self._turnstile.unlock()

    def close(self) -> None:
        """Close both files."""
        self._turnstile.release()
        self._room.release()

    def _enter(self, shared: bool) -> None:
        # A second flock through the same file would silently turn the first one into the other kind.
        if self._inside:
            raise RuntimeError("busy() and quiet() of one Room cannot be nested")
        self._turnstile.acquire()
        try:
            self._room.acquire(shared=shared)
        except BaseException:
            self._turnstile.unlock()
            raise
        self._inside = True

    def _leave(self) -> None:
        self._inside = False
        self._room.unlock()
