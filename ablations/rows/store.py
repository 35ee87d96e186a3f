"""The result store: one JSON file per finished or failed cell, and the lease that lets one process work on a cell.

A directory DIR holds

    cells/<key>.json    a row; the only truth, from which every table and plot is regenerated
    cells/<key>.lock    the lease; empty, locked while a process works on the cell, and never deleted
    cells/<key>/        what a crash printed
    cells/<training key>/    checkpoints, which belong to the training loop (`ablations/experiment/trained.py`)

A row appears whole or not at all: it is written beside its place, synced, and renamed over it. Locks are the kernel's
(`flock`), so a process that is killed gives them back at once and nothing has to be cleaned up after it.
"""

import fcntl
import json
import math
import numbers
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# What a row holds as numbers beside its metrics. It is written out and not taken from what measures them: reading rows
# takes a few milliseconds, importing a detector's measurement seconds.
NUMBERS = ("params_M", "GMACs", "images_per_s", "latency_ms_p50", "latency_ms_p90", "peak_memory_MB")
STATUSES = ("ok", "diverged", "oom", "bad_data", "crashed")

# Locks that this process holds. A forked child (a data loader's worker) inherits the descriptors, and a lock lives
# until its last copy is closed: without the hook below a killed parent's lease would survive in its children.
_held: set[int] = set()


def _close_inherited() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)


class FileLock:
    """A `flock` on one file, shared or exclusive. Released by `release`, by leaving a `with`, or by the process's end.

    The file is created when it is missing and never removed: deleting a lock file that another process is about to lock
    would let two of them in.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _held.add(self._descriptor)

    def acquire(self, shared: bool = False, wait: bool = True) -> bool:
        """Take the lock; False when `wait` is off and another holder has it.

        Raises:
            OSError: the file system knows no locks.
            RuntimeError: the lock was released, or is a copy that came through a fork.
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
                error.errno, f"cannot lock {self.path}: {error.strerror}; choose a directory on a local disk"
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

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *_) -> None:
        self.release()


def claim(directory: str | Path, key: str) -> FileLock | None:
    """The right to work on one cell, or None while another process (or another claim of this one) has it.

    Look for a finished row again after the claim: its former holder may have written one in between.

        if (lease := claim(directory, key)) is not None:
            with lease:
                if read_row(directory, key) is None:
                    ...
    """
    lock = FileLock(_cell_path(directory, key, ".lock"))
    if lock.acquire(wait=False):
        return lock
    lock.release()
    return None


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write to that takes the place of `path`, whole and synced, when the block ends without an error.

    It is written as `.<name>.tmp` in the same directory. Writers of the same path wait for each other, and what a
    killed writer left there is overwritten by the next one.

    Raises:
        OSError: no space, no permission, or another failure of the disk; the message names `path`, which is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with _open_locked(temporary) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno, f"cannot write {path}: {reason}; what stood there before is unchanged", str(path)
        ) from error
    _sync_directory(path.parent)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Replace `path` by `data`, whole or not at all. Errors as in `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, whole or not at all. Errors as in `atomic_file`."""
    atomic_write_bytes(path, text.encode())


def write_row(directory: str | Path, row: dict) -> Path:
    """Write one finished or failed cell and return its file. Numbers that are not finite become null.

    Raises:
        ValueError: the row lacks something that every row has, or holds it in another type.
        OSError: the disk is full or the like; a row that stood there before is unchanged.
    """
    row = _plain(row)
    problem = _problem(row, row.get("key"))
    if problem:
        raise ValueError(f"not a row: {problem}")
    path = _cell_path(directory, row["key"], ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(row, indent=1, allow_nan=False) + "\n")
    return path


def warn(problem: str) -> None:
    """Tell of a problem on the standard error stream."""
    print(f"warning: {problem}", file=sys.stderr)


def read_row(directory: str | Path, key: str, report: Callable[[str], None] = warn) -> dict | None:
    """The row of one cell, or None when there is none or it cannot be read; the latter is reported by name."""
    path = _cell_path(directory, key, ".json")
    try:
        return _parse(path)
    except FileNotFoundError:
        return None
    except ValueError as problem:
        report(str(problem))
        return None


def read_rows(directory: str | Path, report: Callable[[str], None] = warn) -> list[dict]:
    """Every row of a directory, sorted by key.

    A file that is not a row is handed to `report` as one sentence that names it, and its cell counts as not done.
    """
    rows = []
    for path in sorted((Path(directory) / "cells").glob("*.json")):
        try:
            rows.append(_parse(path))
        except FileNotFoundError:
            continue
        except ValueError as problem:
            report(str(problem))
    return rows


def read_all(directory: str | Path) -> tuple[list[dict], list[str]]:
    """Every row of a directory, and one sentence for each file that is not a row, which is warned of, too."""
    problems: list[str] = []
    rows = read_rows(directory, problems.append)
    for problem in problems:
        warn(problem)
    return rows, problems


def _cell_path(directory: str | Path, key: str, suffix: str) -> Path:
    if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", key):
        raise ValueError(f"a cell's key is letters, digits, dots, dashes and underscores; got {key!r}")
    return Path(directory) / "cells" / f"{key}{suffix}"


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


def _plain(value):
    """`value` as JSON can hold it: numpy's numbers as Python's, tuples as lists, non-finite numbers as None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    raise ValueError(f"a row holds numbers, text, lists and dicts, not {type(value).__name__}")


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a number")


def _parse(path: Path) -> dict:
    try:
        row = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
        problem = _problem(row, path.stem)
    except (ValueError, RecursionError) as error:
        problem = str(error)
    except FileNotFoundError:
        raise
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise ValueError(f"{path} is not a row and counts as not done: {problem}")
    return row


def _is_number(value) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _problem(row, key) -> str | None:
    """What keeps `row` from being the row of the cell `key`, or None."""
    if not isinstance(row, dict):
        return "it is not a JSON object"
    if row.get("key") != key:
        return f"its key is {row.get('key')!r}, its file is named {key!r}"
    if row.get("status") not in STATUSES:
        return f"its status is {row.get('status')!r}; the statuses are {', '.join(STATUSES)}"
    cell = row.get("cell")
    if not isinstance(cell, dict):
        return "it has no cell"
    for name in ("detector", "attentions"):
        if not isinstance(cell.get(name), str):
            return f"cell.{name} is {cell.get(name)!r}, not text"
    depth, seed = cell.get("depth"), cell.get("seed")
    if not isinstance(depth, int | None) or not isinstance(seed, int):
        return f"cell.depth is {depth!r} and cell.seed is {seed!r}; both are whole numbers, depth may be null"
    for name in ("metrics", "machine", "training", "dropped"):
        if not isinstance(row.get(name), dict | None):
            return f"{name} is {row[name]!r}, not an object"
    metrics = row.get("metrics") or {}
    for name, value in (*metrics.items(), *((name, row.get(name)) for name in NUMBERS)):
        if not _is_number(value):
            return f"{name} is {value!r}, not a number"
    if row["status"] == "ok" and "AP" not in metrics:
        return "its status is ok and it has no metrics.AP"
    return None
