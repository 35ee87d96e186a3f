"""What a run has to do, judged by the rows and the weights that are there; how it is told, and what it replaces."""

import os
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from ablations.experiment import trained
from ablations.experiment.progress import TRAINING_SHARE, clock
from ablations.grid import Cell
from ablations.options import Options
from ablations.rows.machine import machine_info
from ablations.rows.row import Machine, Row, Training, machine_of, training_of
from ablations.rows.store import read_rows


@dataclass(frozen=True)
class Plan:
    """What a run has to do, judged by the rows and the weights that are there.

    Attributes:
        cells: All cells of the grid.
        rows: The rows that were there, by key.
        todo: Cells that have to run.
        only_evaluated: For those of them whose weights are there, the record of their training.
        workers: Processes.
        threads: CPU threads of each.
    """

    cells: list[Cell]
    rows: dict[str, Row]
    todo: list[Cell]
    only_evaluated: dict[Cell, Training]
    workers: int
    threads: int


def make_plan(options: Options, cells: list[Cell]) -> Plan:
    """Judge by the rows and the weights that are there what has to run."""
    out, fresh = options.out, options.fresh
    rows = {row["key"]: row for row in read_rows(out)}
    todo = [c for c in cells if fresh or not trained.is_done(out, c, rows.get(c.key), options.retry_failed)]
    records = {} if fresh else {cell: record for cell in todo if (record := trained.find(out, cell)) is not None}
    cores = len(os.sched_getaffinity(0))
    workers = min(options.workers or (cores if options.device == "cpu" else 1), max(1, len(todo)))
    return Plan(cells, rows, todo, records, workers, max(1, cores // workers))


def announce(plan: Plan, options: Options) -> None:
    """Say what will run, what will not, and what of it another commit made."""
    done = [cell for cell in plan.cells if cell not in plan.todo]
    print(f"{len(plan.cells)} cells, {len(done)} done, {len(plan.todo)} to run; results in {options.out}")
    if plan.only_evaluated:
        names = ", ".join(cell.name for cell in plan.only_evaluated)
        print(f"trained already, on the same training data, and now only evaluated: {names}")
        report_reuse("weights", plan.only_evaluated.values(), options)
    if not options.dry_run:
        report_reuse("rows", [machine_of(plan.rows[cell.key]) for cell in done], options)


def report_reuse(what: str, records: Iterable[Machine | Training], options: Options) -> None:
    """Say in one line when rows or weights are reused that another commit made; each record has its `commit`."""
    here = machine_info(options.device, options.command)["commit"]
    others = sorted({record.get("commit") or "unknown" for record in records} - {here})
    if others:
        print(f"reusing {what} made at commit {', '.join(others)}; --fresh runs them again at {here}")


def dry_run(plan: Plan) -> None:
    """List the cells and what they will cost, judged by the rows that are there, of the same detector if possible."""
    for cell in plan.cells:
        waiting = "to evaluate" if cell in plan.only_evaluated else "to run"
        what = waiting if cell in plan.todo else plan.rows[cell.key]["status"]
        print(f"  {cell.name:34}  {what}")
    seconds = defaultdict(list)
    for row in plan.rows.values():
        if taken := training_of(row).get("seconds"):
            seconds[row["cell"]["detector"]].append(taken)
    if seconds and plan.todo:
        pace = {detector: mean(times) for detector, times in seconds.items()}
        cost = sum(
            pace.get(cell.detector, mean(pace.values())) * (1 / TRAINING_SHARE - (cell in plan.only_evaluated))
            for cell in plan.todo
        )
        print(f"about {clock(cost / plan.workers)} with {plan.workers} workers, at the pace of the cells that are done")
    elif plan.todo:
        print("cost: not known before a first cell has run here")


def replaced(plan: Plan, options: Options) -> list[Path]:
    """Rows and weights that do not belong into the results any more."""
    folder = options.out / "cells"
    if options.fresh:
        return [path for c in plan.todo for path in (folder / f"{c.key}.json", trained.folder(options.out, c))]
    # A row of what failed on data that were mended would stand in the tables for ever.
    return [folder / f"{row['key']}.json" for row in trained.outdated(plan.rows.values(), plan.cells)]


def set_aside(out: Path, paths: list[Path]) -> None:
    """Move rows and checkpoints that are about to be replaced to `cells/replaced/<time>/`."""
    directory = out / "cells" / "replaced" / time.strftime("%Y%m%dT%H%M%S")
    for path in paths:
        if path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            path.rename(directory / path.name)
