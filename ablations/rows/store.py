"""The result store: one JSON file per finished or failed cell, and the lease that lets one process work on a cell.

A directory DIR holds

    cells/<key>.json    a row; the only truth, from which every table and plot is regenerated
    cells/<key>.lock    the lease; empty, locked while a process works on the cell, and never deleted
    cells/<key>/        what a crash printed
    cells/<training key>/    checkpoints, which belong to the training loop (`ablations/experiment/trained.py`)

A row appears whole or not at all, and a process that is killed gives its leases back at once (`ablations/files.py`).
"""

import json
import math
import numbers
import re
import sys
from collections.abc import Callable
from pathlib import Path

from ablations.files import FileLock, atomic_write_text

# What a row holds as numbers beside its metrics. It is written out and not taken from what measures them: reading rows
# takes a few milliseconds, importing a detector's measurement seconds.
NUMBERS = ("params_M", "GMACs", "images_per_s", "latency_ms_p50", "latency_ms_p90", "peak_memory_MB")
STATUSES = ("ok", "diverged", "oom", "bad_data", "crashed")


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
