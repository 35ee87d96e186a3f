"""Files of several processes: a lock that a killed process gives back, and files that appear whole or not at all.

Locks are the kernel's (`flock`), so nothing has to be cleaned up after a process that was killed. A file is written
beside its final name, synced, and renamed over it.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

# Locks that this process holds. A forked child (a data loader's worker) inherits the descriptors, and a lock lives
# until its last copy is closed: without the hook below a killed parent's lease would survive in its children.
_held: set[int] = set()


def _close_inherited() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)


class FileLock:
    """A `flock` on one file, shared or exclusive, until `release`, the end of a `with`, or the end of the process.

    The file is created when it is missing and never removed: deleting a lock file that another process is about to lock
    would let two of them in.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with named(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _held.add(self._descriptor)

    def acquire(self, shared: bool = False, wait: bool = True) -> bool:
        """Take the lock; False when `wait` is off and another holder has it.

        Raises:
            OSError: The file system knows no locks.
            RuntimeError: The lock was released, or is a copy that came through a fork.
        """
        if self._descriptor not in _held:
            raise RuntimeError(f"the lock {self.path} is closed; a forked process opens its own")
        mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(self._descriptor, mode)
        except BlockingIOError:
            return False
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot lock {self.path}: {error.strerror}; choose one on a disk that knows locks",
            ) from error
        return True

    def unlock(self) -> None:
        """Give the lock back and keep the file open, so that it can be taken again cheaply."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def release(self) -> None:
        """Give the lock back and close the file. Calling it twice does nothing."""
        # The child of a fork finds its copies closed already, and their numbers may belong to other files by then.
        if self._descriptor in _held:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write to, which replaces `path`, whole and synced, when the block ends without an error.

    It is written as `.<name>.tmp` in the same directory. Writers of the same path wait for each other, and what a
    killed writer left there is overwritten by the next one.

    Raises:
        OSError: No space, no permission, or another failure of the disk; the message names `path`, which is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with named(path, "; what stood there before is unchanged"):
        with _open_locked(temporary) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException as error:
                temporary.unlink(missing_ok=True)
                if (cause := _failed_write(error)) is not None:
                    raise OSError(cause.errno, cause.strerror) from error
                raise
    _sync_directory(path.parent)


@contextmanager
def named(path: Path, more: str = "") -> Iterator[None]:
    """Give every OSError of the block the name of the file that it is about, which those of a full disk lack."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"cannot write {path}: {reason}{more}", str(path)) from error


def told(error: OSError) -> str:
    """What an OSError says in one sentence, with the file that it is about where it knows it."""
    reason = error.strerror or str(error)
    return reason if error.filename is None or str(error.filename) in reason else f"{reason}: {error.filename}"


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Replace `path` by `data`, whole or not at all. Errors as in `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, whole or not at all. Errors as in `atomic_file`."""
    atomic_write_bytes(path, text.encode())


def _failed_write(error: BaseException | None) -> OSError | None:
    """The write that failed, behind an error that hides it: torch.save ends such a file with one about its end."""
    while isinstance(error, Exception):
        # Errors of writing have no name; one with a name is about another file.
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            return error
        error = error.__context__
    return None


def _open_locked(path: Path) -> BinaryIO:
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            # The writer we waited for has renamed this file away, or given it up: ours is then another file.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
