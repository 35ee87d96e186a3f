"""`python -m ablations.run --grid`: train, evaluate, measure and table every cell of a grid.

A cell that has a row is not run again, so the same command goes on where it was stopped.
"""

import argparse
import hashlib
import os
import shlex
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import torch

from ablations.data.annotations import BAD_ANNOTATIONS
from ablations.data.coco import Dataset, read_dataset
from ablations.data.images import MAX_PIXELS
from ablations.experiment import trained
from ablations.experiment.pool import run_cells
from ablations.experiment.progress import TRAINING_SHARE, Progress, clock
from ablations.experiment.work import Job, Reading
from ablations.generate import generate
from ablations.grid import GRIDS, PRESETS, Cell, Preset, build_grid, only
from ablations.report import write_report
from ablations.rows.machine import device_name, machine_info
from ablations.rows.store import read_row, read_rows
from ablations.rows.tables import write_tables
from heads.backbones.resnet import BACKBONES, load_imagenet
from heads.build import DETECTORS, WITH_MASKS
from kernels.backend import BACKENDS

RUNS = Path("runs")
OK, SOME_FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; anything unknown ends the program with exit code 2 and the valid names."""
    parser = argparse.ArgumentParser(
        prog="python -m ablations.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to run")
    what.add_argument(
        "--grid",
        nargs="?",
        const="default",
        choices=GRIDS,
        required=True,
        help="default: baseline + 8 subsets × depths; combinations: baseline + 8 subsets at one depth; depth: baseline "
        "+ LSC × depths; detectors: baseline + LSC for every detector; full: baseline + 8 subsets × depths in both "
        "formulations, with every treatment of coarse offsets and every placement",
    )
    sizes = "; ".join(f"{name}: {preset.description}" for name, preset in PRESETS.items())
    what.add_argument("--preset", choices=PRESETS, default="tiny", help=f"{sizes} (default: tiny)")
    what.add_argument("--data", default="generated", metavar="generated|DIR", help="a directory in COCO layout")
    bad = "boxes outside their image, of negative size or not finite, or of an unknown category: list them and stop "
    bad += "(refuse, the default), or leave them out of both splits and say how many (drop)"
    what.add_argument("--bad-annotations", choices=BAD_ANNOTATIONS, default="refuse", help=bad)
    most = f"most pixels of an image (default: {MAX_PIXELS}, Pillow's own limit)"
    what.add_argument("--max-image-pixels", type=positive, metavar="N", help=most)
    what.add_argument("--only", default="", metavar="TERMS", help='keep matching cells, for instance "LSC,depth=1"')
    names = f"of {', '.join(DETECTORS)} (default: atss; all of them for --grid detectors)"
    what.add_argument("--detector", metavar="NAME[,NAME]", help=names)
    what.add_argument("--backbone", choices=BACKBONES, help="default: the preset's")
    what.add_argument("--seeds", type=positive, default=1, metavar="N", help="repeat with seeds 0 … N-1 (default: 1)")
    what.add_argument(
        "--weights",
        metavar="FILE|NAME|none",
        help="initial backbone weights with torchvision's names (default: the backbone's own in the paper preset)",
    )
    sides = "shorter sides in pixels (default: the preset's one)"
    what.add_argument("--train-sizes", type=pixels, metavar="N[,N]", help=f"multi-scale training: {sides}")
    what.add_argument("--test-sizes", type=pixels, metavar="N[,N]", help=f"multi-scale testing: {sides}")
    longest = "most pixels of the longer side, whatever the shorter one then is (default: the preset's)"
    what.add_argument("--max-size", type=positive, metavar="N", help=longest)
    what.add_argument("--test-flip", action="store_true", help="test on the mirrored image, too")
    how = parser.add_argument_group("how to run it")
    how.add_argument("--out", type=Path, metavar="DIR", help="rows, tables, report (default: runs/<preset>)")
    how.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    how.add_argument("--backend", choices=BACKENDS, default="auto", help="of the operators (default: auto)")
    how.add_argument("--workers", type=positive, metavar="N", help="processes (default: one per core; 1 on a GPU)")
    how.add_argument("--dry-run", action="store_true", help="list the cells, what is done and the cost; run nothing")
    how.add_argument("--fresh", action="store_true", help="run finished cells again; old rows move to cells/replaced/")
    how.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    options = parser.parse_args(arguments)
    preset = PRESETS[options.preset]
    options.backbone = options.backbone or preset.backbone
    options.weights = options.weights or ("none" if preset.weights == "none" else options.backbone)
    options.max_size = options.max_size or preset.max_size
    shorter = max(*(options.train_sizes or preset.image_size), *(options.test_sizes or preset.image_size))
    if shorter > options.max_size:
        parser.error(f"a shorter side of {shorter} pixels needs a --max-size of as many; it is {options.max_size}")
    every = ",".join(DETECTORS) if options.grid == "detectors" else "atss"
    options.detector = list(dict.fromkeys((options.detector or every).split(",")))
    for name in options.detector:
        if name not in DETECTORS:
            parser.error(f"unknown detector {name!r}; the detectors are {', '.join(DETECTORS)}")
    options.masks = any(name in WITH_MASKS for name in options.detector)
    if options.masks and (options.test_flip or len(options.test_sizes or ()) > 1):
        named = ", ".join(WITH_MASKS)
        parser.error(f"--test-flip and several --test-sizes merge boxes, not masks: name a --detector without {named}")
    if options.backend == "triton" and options.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--backend triton on a CPU needs TRITON_INTERPRET=1 in the environment, and hours of patience")
    return options


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return value


def pixels(text: str) -> tuple[int, ...]:
    """Whole numbers of pixels with commas between them, for argparse."""
    return tuple(positive(part) for part in text.split(","))


def reading(options: argparse.Namespace) -> Reading:
    """How the data are read under these options."""
    return Reading(options.masks, options.bad_annotations, options.max_image_pixels)


def open_data(options: argparse.Namespace, preset: Preset) -> Dataset:
    """The data, checked for all that the detectors need of them; the default set is made if it is not there yet.

    Raises:
        DataError: what is wrong with the data, all of it.
    """
    directory = Path(options.data)
    if options.data == "generated":
        began = time.monotonic()
        directory = generate(RUNS / "data", preset.difficulty)
        if time.monotonic() - began > 1:
            print(f"made the default data set, {directory}, in {clock(time.monotonic() - began)}")
    data = read_dataset(directory, **asdict(reading(options)))
    for note in data.notes:
        print(note)
    return data


def base_cell(options: argparse.Namespace, preset: Preset, data: Dataset) -> Cell:
    """The fields that no grid varies; the attention fields are those of the baseline."""
    device_kind = "cpu" if options.device == "cpu" else "hip" if torch.version.hip else "cuda"
    weights = options.weights
    if Path(weights).is_file():
        weights = f"{Path(weights).name}:{hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:12]}"
    return Cell(
        data=f"generated-{preset.difficulty}" if options.data == "generated" else Path(options.data).resolve().name,
        data_fingerprint=data.fingerprint,
        train_fingerprint=data.train.fingerprint,
        image_size=options.train_sizes or preset.image_size,
        max_size=options.max_size,
        test_size=options.test_sizes or preset.image_size,
        test_flip=options.test_flip,
        detector=options.detector[0],
        backbone=options.backbone,
        weights=weights,
        channels=preset.channels,
        attentions="baseline",
        depth=None,
        formulation=None,
        coarse_offsets=None,
        placement="trunk",
        steps=preset.steps,
        batch_size=preset.batch_size,
        optimizer="sgd",
        lr=preset.lr,
        backbone_lr=1.0,
        offset_lr=preset.offset_lr,
        weight_decay=preset.weight_decay,
        warmup=preset.warmup,
        seed=0,
        precision=preset.gpu_precision if device_kind != "cpu" else "fp32",
        device_kind=device_kind,
        backend=options.backend,
    )


def banner(options: argparse.Namespace, workers: int, threads: int) -> str:
    """One line on what this machine measures, and loudly what it does not."""
    if options.device == "cpu":
        return (
            f"NO GPU: training on {workers} × {threads} CPU threads through the plain PyTorch path. "
            "NOT MEASURED here: the Triton kernels' speed, GPU throughput and latency, GPU memory."
        )
    return f"training on {torch.cuda.get_device_name(options.device)}"


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = parse(arguments)
    preset = PRESETS[options.preset]
    command = "python -m ablations.run " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.weights != "none" and not options.dry_run:
            # Downloads them where they are published and absent, and finds out now whether they fit.
            load_imagenet(BACKBONES[options.backbone](), options.weights)
        data = open_data(options, preset)
        base = base_cell(options, preset, data)
        cells = only(build_grid(options.grid, preset, base, options.detector, options.seeds), options.only)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE

    out = options.out or RUNS / (options.preset if options.data == "generated" else f"{base.data}-{options.preset}")
    if not next(place for place in (out, *out.parents) if place.exists()).is_dir():
        print(f"error: --out {out} is not a directory and cannot be made one", file=sys.stderr)
        return USAGE
    rows = {cell: read_row(out, cell.key) for cell in cells}
    todo = [c for c, row in rows.items() if options.fresh or not trained.is_done(out, c, row, options.retry_failed)]
    cores = len(os.sched_getaffinity(0))
    workers = min(options.workers or (cores if options.device == "cpu" else 1), max(1, len(todo)))
    threads = max(1, cores // workers)
    print(f"{len(cells)} cells, {len(cells) - len(todo)} done, {len(todo)} to run; results in {out}")
    only_evaluated = [] if options.fresh else [cell for cell in todo if trained.find(out, cell)]
    if only_evaluated:
        names = ", ".join(cell.name for cell in only_evaluated)
        print(f"trained already, on the same training data, and now only evaluated: {names}")
        report_reuse("weights", [trained.find(out, cell) for cell in only_evaluated], options.device, command)
    if options.dry_run:
        return dry_run(rows, todo, only_evaluated, out, workers)
    done = [row["machine"] for cell, row in rows.items() if cell not in todo]
    report_reuse("rows", done, options.device, command)
    if options.fresh:
        paths = [path for cell in todo for path in (out / "cells" / f"{cell.key}.json", trained.folder(out, cell))]
        set_aside(out, paths)
    else:
        # A row of what failed on data that were mended would stand in the tables for ever.
        set_aside(out, [out / "cells" / f"{row['key']}.json" for row in trained.outdated(out, cells)])

    interrupted = False
    if todo:
        print(banner(options, workers, threads))
        weights = None if options.weights == "none" else options.weights
        dropped = {split.name: split.dropped for split in (data.train, data.val) if split.dropped}
        read = reading(options)
        job = Job(data.root, read, dropped, out, options.device, threads, weights, command, options.retry_failed)
        progress = Progress(len(todo))
        try:
            run_cells(todo, job, workers, progress.notice)
        except KeyboardInterrupt:
            interrupted = True
        except OSError as error:
            print(f"\nerror: {error}", file=sys.stderr)
            return SOME_FAILED
        finally:
            progress.close()
    if not read_rows(out):
        print(f"interrupted before the first cell ended; go on with: {command}")
        return INTERRUPTED
    write_tables(out)
    write_report(out)
    print(f"tables in {out}/table.md, .csv, .tex; report in {out}/report.html")
    if interrupted:
        print(f"interrupted; finished cells are kept, go on with: {command}")
        return INTERRUPTED
    failed = [cell.name for cell in cells if (read_row(out, cell.key) or {}).get("status") != "ok"]
    if failed:
        print(f"without a good row: {', '.join(failed)}; run again with --retry-failed", file=sys.stderr)
    return SOME_FAILED if failed else OK


def dry_run(
    rows: dict[Cell, dict | None], todo: list[Cell], only_evaluated: list[Cell], out: Path, workers: int
) -> int:
    """List the cells and what they will cost, judged by the rows that are there, of the same detector if possible."""
    for cell, row in rows.items():
        what = "to evaluate" if cell in only_evaluated else "to run" if cell in todo else row["status"]
        print(f"  {cell.name:34}  {what}")
    seconds = defaultdict(list)
    for row in read_rows(out):
        if (row.get("training") or {}).get("seconds"):
            seconds[row["cell"]["detector"]].append(row["training"]["seconds"])
    if seconds and todo:
        pace = {detector: mean(own) for detector, own in seconds.items()}
        cost = sum(
            pace.get(cell.detector, mean(pace.values())) * (1 / TRAINING_SHARE - (cell in only_evaluated))
            for cell in todo
        )
        print(f"about {clock(cost / workers)} with {workers} workers, at the pace of the cells that are done")
    elif todo:
        print("cost: not known before a first cell has run here")
    return OK


def report_reuse(what: str, records: list[dict], device: str, command: str) -> None:
    """Say in one line when rows or weights are reused that another commit made; each record has its `commit`."""
    here = machine_info(device, command)["commit"]
    others = sorted({record.get("commit") or "unknown" for record in records} - {here})
    if others:
        print(f"reusing {what} made at commit {', '.join(others)}; --fresh runs them again at {here}")


def set_aside(out: Path, paths: list[Path]) -> None:
    """Move rows and checkpoints that are about to be replaced to `cells/replaced/<time>/`."""
    place = out / "cells" / "replaced" / time.strftime("%Y%m%dT%H%M%S")
    for path in paths:
        if path.exists():
            place.mkdir(parents=True, exist_ok=True)
            path.rename(place / path.name)


if __name__ == "__main__":
    sys.exit(main())
