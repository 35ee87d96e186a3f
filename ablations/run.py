"""`python -m ablations.run --grid`: train, evaluate, measure and table every cell of a grid.

A cell that has a row is not run again, so the same command goes on where it was stopped. The command line is read in
`ablations/options.py`; what is trained, and how, stands in `ablations/grid.py`.
"""

import hashlib
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

from ablations.data.cache import keep_dataset, open_dataset
from ablations.data.split import Dataset
from ablations.executors.cluster import Cluster, run_on_cluster
from ablations.executors.mounts import warning_of
from ablations.executors.pool import run_cells
from ablations.executors.progress import Progress, clock
from ablations.executors.ranks import Ranks
from ablations.executors.worker import Finished, Notice
from ablations.experiment import logs
from ablations.experiment.experiment import Job
from ablations.experiment.group import NO_BATCH_NORM, trained_batch_norms
from ablations.experiment.room import Room, quiet_place
from ablations.files import told
from ablations.generate import generate
from ablations.grid import Cell, build_grid, only
from ablations.options import RUNS, Options, parse
from ablations.plan import Plan, announce, dry_run, make_plan, replaced
from ablations.rows.store import read_all, read_rows, set_aside, warn
from heads.backbones.resnet import BACKBONES, load_imagenet

OK, SOME_FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Run the program, or where torchrun has started it this rank's part of it; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    ranks = Ranks.of_torchrun()
    if ranks is None:
        return run_grid(parse(arguments), None)
    return ranks.drive(lambda: run_grid(parse(arguments, ranks.program), ranks), arguments)


def run_grid(options: Options, ranks: Ranks | None) -> int:
    """Run what the command line asks for, each cell by all ranks if there are several; returns the exit code."""
    try:
        check_weights(options)
        if options.log is not None:
            logs.module(options.log)
        new = not options.out.exists()
        data = open_data(options)
        base = base_cell(options, data)
        cells = only(build_grid(options.grid, options.preset, base, options.detectors, options.seeds), options.only)
        if ranks is not None:
            check_ranks(cells, options, ranks)
        check_out(options.out, write=not options.dry_run)
        if new and not options.dry_run:
            data = keep_dataset(data, **asdict(options.reading), cache=cache(options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    interrupted = False
    try:
        plan = make_plan(options, cells, ranks.local_ranks if ranks else 0)
        announce(plan, options)
        if problem := warning_of(options.out):
            warn(problem)
        if options.dry_run:
            dry_run(plan, options, data)
            return OK
        set_aside(options.out, replaced(plan, options))
        try:
            run(plan, options, data, ranks)
        except KeyboardInterrupt:
            interrupted = True
        return conclude(cells, options, data, interrupted)
    except (ImportError, ValueError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return USAGE
    except OSError as error:
        print(
            f"\nerror: {told(error)}; finished cells are kept, go on with: {options.command}",
            file=sys.stderr,
        )
        return SOME_FAILED


def open_data(options: Options) -> Dataset:
    """The data, checked for all that the detectors need of them; the default set is made if it is not there yet.

    Raises:
        DataError: The data are bad; the message lists all problems.
    """
    began = time.monotonic()
    directory = options.data or generate(RUNS / "data", options.preset.difficulty)
    if options.data is None and time.monotonic() - began > 1:
        print(f"made the default data set, {directory}, in {clock(time.monotonic() - began)}")
    # A directory for the results is not made before all that is asked for is known to be sound, and by a dry run never.
    kept = cache(options) if options.out.is_dir() and not options.dry_run else None
    data = open_dataset(directory, **asdict(options.reading), cache=kept, checked=False)
    for note in data.notes:
        print(note)
    return data


def cache(options: Options) -> Path:
    """Where what is read once a machine is kept."""
    return options.out / ".cache"


def base_cell(options: Options, data: Dataset) -> Cell:
    """The baseline with the fields that no grid varies."""
    preset = options.preset
    device_kind = "cpu" if options.device == "cpu" else "hip" if torch.version.hip else "cuda"
    weights = options.weights or "none"
    if Path(weights).is_file():
        weights = f"{Path(weights).name}:{hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:12]}"
    # Random weights have nothing to keep.
    recipe = preset.recipe() | ({"frozen": 0} if options.weights is None else {})
    return Cell(
        **recipe,
        data=options.data_name,
        data_fingerprint=data.fingerprint,
        train_fingerprint=data.train.fingerprint,
        test_size=options.test_sizes,
        test_flip=options.test_flip,
        detector=options.detectors[0],
        weights=weights,
        precision=options.precision or (preset.gpu_precision if device_kind != "cpu" else "fp32"),
        device_kind=device_kind,
        backend=options.backend,
    )


def check_weights(options: Options) -> None:
    """Find out now whether the initial weights fit; downloads them where they are published and absent.

    Raises:
        ValueError: They are absent, or do not fit the backbone.
    """
    if options.weights is not None and not options.dry_run:
        load_imagenet(BACKBONES[options.preset.backbone](), options.weights)


def check_out(out: Path, write: bool) -> None:
    """Make sure that results can have a directory, and, before anything is trained for it, that it can be written to.

    Raises:
        ValueError: A file stands where it or one of its parents should be, or nothing can be written there, or to its
            `cells/`, which may be another user's.
    """
    if not next(path for path in (out, *out.parents) if path.exists()).is_dir():
        raise ValueError(f"--out {out} is not a directory and cannot be made one")
    if write:
        for folder in (out, out / "cells"):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.write(b"0")
                    file.flush()
            except OSError as error:
                raise ValueError(f"--out {out} cannot be written to: {folder}: {error.strerror}") from error


def check_ranks(cells: list[Cell], options: Options, ranks: Ranks) -> None:
    """Make sure that ranks can share these cells.

    Raises:
        ValueError: There are several workers, a batch that cannot be shared evenly, or a norm that cannot be shared.
    """
    if options.executor != "local":
        raise ValueError("--executor ray gives cells to machines, and torchrun shares each one: take either")
    if options.workers not in (None, 1):
        raise ValueError("--workers runs cells beside each other, and torchrun shares each one: take either")
    for cell in cells:
        if cell.batch_size % (ranks.ranks * cell.accumulate):
            parts = f" in {cell.accumulate} parts" if cell.accumulate > 1 else ""
            message = f"{ranks.ranks} ranks cannot share {cell.batch_size} images{parts} evenly"
            raise ValueError(f"{message}; choose another --batch-size or --nproc-per-node")
    if options.device == "cpu" and trains_batch_norm(cells[0]):
        raise ValueError(NO_BATCH_NORM)


def trains_batch_norm(cell: Cell) -> bool:
    """Whether a BatchNorm of the cell's backbone takes its statistics from the images that it is trained on."""
    with torch.device("meta"):
        backbone = BACKBONES[cell.backbone]()
    if cell.weights != "none":
        backbone.freeze(cell.frozen)
    return bool(trained_batch_norms(backbone))


def run(plan: Plan, options: Options, data: Dataset, ranks: Ranks | None) -> None:
    """Run the cells and show how far they are.

    Raises:
        OSError: A row could not be stored.
    """
    if not plan.todo:
        return
    print(banner(options, plan, ranks))
    job = Job(
        data=data.root,
        reading=options.reading,
        dropped={split.name: split.dropped for split in (data.train, data.val) if split.dropped},
        out=options.out,
        device=options.device if ranks is None else ranks.device(options.device),
        threads=plan.threads,
        weights=options.weights,
        command=options.command,
        retry_failed=options.retry_failed,
        room=quiet_place(options.out),
        cache=cache(options),
        log=options.log,
    )
    progress = Progress(plan.todo)
    left = Counter(cell.seed for cell in plan.todo)
    room = Room(job.room)

    def notice(cell: Cell, event: Notice) -> None:
        progress.notice(cell, event)
        if isinstance(event, Finished):
            left[cell.seed] -= 1
            if not left[cell.seed] and left.total():
                # Here for the reason in `conclude`. The last table is made of all rows, with the report.
                from ablations.rows.tables import write_tables

                with room.busy():
                    write_tables(read_rows(options.out), options.out)
                progress.line(f"seed {cell.seed} complete: table in {options.out}/table.md")

    if ranks is not None:
        ranks.publish(job)
    try:
        if options.executor == "ray":
            difficulty = options.preset.difficulty if options.data is None else None
            cluster = Cluster(options.address, options.gpus_per_cell, options.workers, difficulty)
            run_on_cluster(plan.todo, job, cluster, notice)
        else:
            run_cells(plan.todo, job, plan.workers, notice, ranks)
    finally:
        progress.close()
        room.close()


def banner(options: Options, plan: Plan, ranks: Ranks | None) -> str:
    """One line on what this machine measures, and loudly what it does not."""
    if options.executor == "ray":
        cells = f"{options.gpus_per_cell} GPUs a cell" if options.gpus_per_cell else "CPUs, a thread a cell"
        return f"training on the Ray cluster {options.address or 'of this machine'}, {cells}"
    each = f"{plan.workers} × {plan.threads} CPU threads"
    if ranks is not None:
        each = f"{ranks.ranks} ranks that share each cell, {plan.threads} CPU threads a rank,"
    if options.device == "cpu":
        return (
            f"NO GPU: training on {each} through the plain PyTorch path. "
            "NOT MEASURED here: the Triton kernels' speed, GPU throughput and latency, GPU memory."
        )
    several = "" if ranks is None else f"{ranks.ranks} ranks that share each cell, of which this is the first, on "
    return f"training on {several}{torch.cuda.get_device_name(options.device)}"


def conclude(cells: list[Cell], options: Options, data: Dataset, interrupted: bool) -> int:
    """Write exhibits, tables and report from all rows of the directory; returns the exit code."""
    # Here, since every worker imports this file: pandas, SciPy and Matplotlib would take half of its start.
    from ablations.exhibits.make import write_exhibits
    from ablations.report import write_results

    out = options.out
    rows, problems = read_all(out)
    if not rows:
        print(f"interrupted before the first cell ended; go on with: {options.command}")
        return INTERRUPTED
    if not interrupted:
        write_exhibits(rows, out, data)
    write_results(rows, out, problems)
    print(f"tables in {out}/table.md, .csv, .tex; report in {out}/report.html")
    if interrupted:
        print(f"interrupted; finished cells are kept, go on with: {options.command}")
        return INTERRUPTED
    good = {row["key"] for row in rows if row["status"] == "ok"}
    failed = [cell.name for cell in cells if cell.key not in good]
    if failed:
        print(f"without a good row: {', '.join(failed)}; run again with --retry-failed", file=sys.stderr)
    return SOME_FAILED if failed else OK


if __name__ == "__main__":
    sys.exit(main())
