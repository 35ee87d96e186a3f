"""What a run has to do, judged by the rows and the weights that are there; how it is told, and what it replaces."""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, cast

from ablations.cost.estimate import estimate
from ablations.cost.gpus import SHARE, Gpu, gpu, makespan, span
from ablations.data.split import Dataset
from ablations.executors.progress import TRAINING_SHARE, clock
from ablations.experiment import logs, trained
from ablations.grid import Cell
from ablations.options import Options
from ablations.rows.machine import machine_info
from ablations.rows.row import Machine, Row, Training, machine_of, training_of
from ablations.rows.store import claim, damaged_files, damaged_row, read_row, read_rows, set_aside, warn


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


def make_plan(options: Options, cells: list[Cell], local_ranks: int = 0) -> Plan:
    """Judge by the rows and the weights that are there what has to run.

    Args:
        options, cells: What is asked for.
        local_ranks: Processes on this machine that share each cell; 0 where none is shared.
    """
    out, fresh = options.out, options.fresh
    # What cannot be read is said where it is mended, and with the tables.
    rows = {row["key"]: row for row in read_rows(out, report=lambda problem: None)}
    mend(out, cells, rows, change=not options.dry_run)
    todo = [c for c in cells if fresh or not trained.is_done(out, c, rows.get(c.key), options.retry_failed)]
    records = {} if fresh else {cell: record for cell in todo if (record := trained.find(out, cell)) is not None}
    cores = len(os.sched_getaffinity(0))
    most = min(options.workers or (cores if options.device == "cpu" else 1), max(1, len(cells)))
    if local_ranks:
        most = 1
    # Not of the cells that are left: on another number of threads a cell that goes on would add in another order.
    threads = max(1, cores // max(most, local_ranks))
    return Plan(cells, rows, todo, records, min(most, max(1, len(todo))), threads)


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
    here = machine_info("cpu", options.command)["commit"]
    others = sorted({record.get("commit") or "unknown" for record in records} - {here})
    if others:
        print(f"reusing {what} made at commit {', '.join(others)}; --fresh runs them again at {here}")


def dry_run(plan: Plan, options: Options, data: Dataset) -> None:
    """List the cells and what they will cost: time where one of the kind has run, size and time of a GPU elsewhere."""
    device = gpu(options.device)
    known: list[float] = []
    others: dict[Cell, float] = {}
    large = 0
    for cell in plan.cells:
        if cell not in plan.todo:
            print(f"  {cell.name:34}  {plan.rows[cell.key]['status']}")
            continue
        evaluated = cell in plan.only_evaluated
        taken = training_seconds(cell, plan.rows.values())
        if taken is None:
            # Where there is no GPU, what is told is what the cell would be on one.
            cell = replace(cell, precision=options.precision or options.preset.gpu_precision)
            cost = estimate(cell, data)
            operations = cost.evaluation + (0 if evaluated else cost.training)
            others[cell] = operations / (options.peak_share * device.peak(cell.precision))
            what = f"{cost.params_M:.2f} M parameters, {cost.GMACs:.3f} GMACs, "
            if not evaluated:
                fits = 1e6 * cost.memory_MB <= device.memory
                large += not fits
                what += f"about {cost.memory_MB:.0f} MB to train{'' if fits else ' (too much)'}, "
            what += f"{others[cell] / 3600:.2f} GPU hours"
        else:
            known.append(taken * (1 / TRAINING_SHARE - evaluated))
            what = f"about {clock(known[-1])}"
        print(f"  {cell.name:34}  {'to evaluate' if evaluated else 'to run':11}  {what}")
    if known:
        print(
            f"about {clock(sum(known) / plan.workers)} with {plan.workers} workers for {len(known)} cells, as rows say"
        )
    if others:
        print(f"time not known: {len(others)} cells of whose kind none has run here")
        for line in gpu_time(list(others.values()), next(iter(others)).precision, device, options):
            print(f"  {line}")
        room = f"{device.memory / 1e9:.0f} GB of memory"
        print(
            f"  {f'{large} need more than' if large else 'all fit into'} {room}, by an estimate without workspaces and"
        )
        print("  what an allocator adds; one that runs out halves what it trains on at once, up to three times")


def gpu_time(seconds: list[float], precision: str, device: Gpu, options: Options) -> list[str]:
    """What cells take that take so many seconds each on one GPU, alone and on several, and what that rests on."""
    rate = (
        f"{100 * options.peak_share:g} % of {device.peak(precision) / 1e12:g} TFLOP/s, {device.name}'s in {precision}"
    )
    basis = (
        "the share is an assumption, nothing has measured it" if options.peak_share == SHARE else "the share is yours"
    )
    if device.assumed:
        basis = f"{device.name} stands here for {device.assumed}; {basis}"
    several = "; ".join(f"{span(makespan(seconds, count))} on {count} GPU{'s' * (count > 1)}" for count in options.gpus)
    return [
        f"{sum(seconds) / 3600:.1f} GPU hours at {rate}",
        f"{several}; cells side by side, each on one GPU",
        basis,
        "not in it: losses, loading of images, NMS, metrics, and the measurement of speed",
    ]


def training_seconds(cell: Cell, rows: Iterable[Row]) -> float | None:
    """How long a cell will train at the pace of the rows that are most like it; None where none is of its kind.

    Of the kind are rows of the same detector on the same sort of device, of the same size and precision, both with a
    DyHead or both without. Of those the nearest depth counts, then the attentions that differ least.
    """
    fields = ("detector", "device_kind", "precision", "backbone", "channels", "image_size", "max_size", "accumulate")
    wanted = json.loads(json.dumps(cell.stored()))
    paces: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for row in rows:
        training, stored = training_of(row), cast(dict[str, Any], row["cell"])
        same = all(stored.get(name) == wanted[name] for name in fields)
        same = same and (stored["attentions"] == "baseline") == (cell.attentions is None)
        if same and training.get("seconds") and training.get("images"):
            letters = {*stored["attentions"].replace("none", "")} ^ {*(cell.attentions or "")}
            far = abs((stored["depth"] or 0) - (cell.depth or 0)), len(letters)
            paces[far].append(training["seconds"] / training["images"])
    return mean(paces[min(paces)]) * cell.steps * cell.batch_size if paces else None


def replaced(plan: Plan, options: Options) -> list[Path]:
    """Rows, what lies beside them, and weights that do not belong into the results any more."""
    folder = options.out / "cells"
    if options.fresh:
        weights = [path for c in plan.todo for path in (trained.folder(options.out, c), logs.folder(options.out, c))]
        return [*weights, *(path for c in plan.todo for path in (folder / f"{c.key}.json", folder / c.key))]
    # A row of what failed on data that were mended would stand in the tables for ever.
    keys = [row["key"] for row in trained.outdated(plan.rows.values(), plan.cells)]
    return [path for key in keys for path in (folder / f"{key}.json", folder / key)]


def mend(out: Path, cells: Iterable[Cell], rows: dict[str, Row], change: bool) -> None:
    """Say what of these cells is damaged, and set it aside if it may be changed; without a row a cell is run again.

    Args:
        out, cells: The results, and the cells that are looked at.
        rows: Those that could be read, by key; brought up to date.
        change: Whether files may be moved.
    """
    for cell in cells:
        file = out / "cells" / f"{cell.key}.json"
        record = trained.folder(out, cell) / trained.RECORD
        row = rows.pop(cell.key, None)
        if row is not None and damaged_files(out, row) is None:
            rows[cell.key] = row
        elif row is not None or file.exists():
            set_aside_if(out, cell.key, partial(damaged_row, out, cell.key), [file, file.with_suffix("")], change)
            # Another runner may have made it anew.
            if change and (row := read_row(out, cell.key)) is not None:
                rows[cell.key] = row
        set_aside_if(out, cell.training_key, partial(trained.damaged_record, out, cell), [record], change)


def set_aside_if(out: Path, key: str, problem: Callable[[], str | None], paths: Iterable[Path], change: bool) -> None:
    """Say a problem and set aside the files that have it, unless another runner has the lease of `key`.

    That runner is making them again: what lies there belongs partly to the old row and partly to the new one.
    """
    if problem() is None:
        return
    if not change:
        warn(f"{problem()}; it will be set aside")
    elif (lease := claim(out, key)) is not None:
        with lease:
            # It may be whole by now.
            if found := problem():
                warn(f"{found}; set aside in {set_aside(out, paths)}")
