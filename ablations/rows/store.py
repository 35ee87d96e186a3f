"""The result store: one JSON file per finished or failed cell, and the lease that lets one process work on a cell.

A directory DIR holds

    cells/<key>.json    a row; the only truth, from which every table and plot is regenerated
    cells/<key>.lock    the lease; empty, locked while a process works on the cell, and never deleted
    cells/replaced/     what was run again, or could not be read, by the time of its removal; nothing is ever deleted
    cells/<key>/        detections and replicates (`ablations/evaluation/`), and what a crash printed
    cells/<training key>/    checkpoints, which belong to the training loop (`ablations/experiment/trained.py`)

What a row holds stands in `ablations/rows/row.py`. It appears whole or not at all, and a process that is killed gives
its leases back at once (`ablations/files.py`).
"""

import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from ablations.files import FileLock, atomic_write_bytes
from ablations.rows.row import Row, from_json, machine_of, to_json


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


def write_row(directory: str | Path, row: Mapping[str, Any]) -> Path:
    """Write one finished or failed cell and return its file. Numbers that are not finite become null.

    Raises:
        ValueError: The row lacks something that every row has, or holds it in another type.
        OSError: The disk is full or the like; a row that stood there before is unchanged.
    """
    data = to_json(row)
    path = _cell_path(directory, row["key"], ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, data)
    return path


def warn(problem: str) -> None:
    """Tell of a problem on the standard error stream."""
    print(f"warning: {problem}", file=sys.stderr)


def read_row(directory: str | Path, key: str, report: Callable[[str], None] = warn) -> Row | None:
    """The row of one cell, or None when there is none or it cannot be read; the latter is reported by name."""
    path = _cell_path(directory, key, ".json")
    try:
        return _parse(path)
    except FileNotFoundError:
        return None
    except ValueError as problem:
        report(str(problem))
        return None


def read_rows(directory: str | Path, report: Callable[[str], None] = warn) -> list[Row]:
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


def read_all(directory: str | Path) -> tuple[list[Row], list[str]]:
    """Every row of a directory, and one sentence for each file that is not a row, which is warned of, too."""
    problems: list[str] = []
    rows = read_rows(directory, problems.append)
    for problem in problems:
        warn(problem)
    return rows, problems


def damaged_row(directory: str | Path, key: str) -> str | None:
    """What is wrong with the row of a cell: its file is no row, or what it says lies beside it has another size.

    A file that is absent is nothing wrong: detections may be deleted, and are not published.
    """
    try:
        row = _parse(_cell_path(directory, key, ".json"))
    except FileNotFoundError:
        return None
    except ValueError as problem:
        return str(problem)
    return damaged_files(directory, row)


def damaged_files(directory: str | Path, row: Row) -> str | None:
    """What is wrong with the files beside a row, as `damaged_row` says it."""
    for name, size in (row.get("files") or {}).items():
        path = Path(directory) / "cells" / row["key"] / name
        if path.is_file() and path.stat().st_size != size:
            return f"{path} is damaged: it has {path.stat().st_size} bytes, and had {size} when its row was written"
    return None


def how_to_mend(directory: str | Path, row: Row) -> str:
    """What to do about a damaged file beside a row: a run sees by itself what has another size, and nothing else."""
    again = f"make it again with: {machine_of(row).get('command') or f'python -m ablations.run --out {directory}'}"
    if damaged_row(directory, row["key"]):
        return again
    return f"move {_cell_path(directory, row['key'], '.json')} away and {again}"


def set_aside(directory: str | Path, paths: Iterable[Path]) -> Path | None:
    """Move files and folders of `cells/` to a new folder `cells/replaced/<time>/`; returns it, None without any."""
    paths = [path for path in paths if path.exists()]
    if not paths:
        return None
    folder = Path(directory) / "cells" / "replaced"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.strftime("%Y%m%dT%H%M%S")
    # Of two in one second, and with a clock that is set back, none may take the other's place.
    for number in count():
        place = folder / (f"{started}-{number}" if number else started)
        with suppress(FileExistsError):
            place.mkdir()
            break
    for path in paths:
        # Another runner may have moved it in this moment.
        with suppress(FileNotFoundError):
            path.rename(place / (path.name if path.parent.name == "cells" else f"{path.parent.name}-{path.name}"))
    return place


def _cell_path(directory: str | Path, key: str, suffix: str) -> Path:
    if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", key):
        raise ValueError(f"a cell's key is letters, digits, dots, dashes and underscores; got {key!r}")
    return Path(directory) / "cells" / f"{key}{suffix}"


def _parse(path: Path) -> Row:
    try:
        return from_json(path.read_bytes(), path.stem)
    except (ValueError, RecursionError) as error:
        problem = str(error)
    except FileNotFoundError:
        raise
    except OSError as error:
        problem = error.strerror or str(error)
    raise ValueError(f"{path} is not a row and counts as not done: {problem}")
