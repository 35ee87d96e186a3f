"""One worker process: takes cells from its pipe and turns each into a row.

A worker trains and evaluates while others do the same, and measures speed alone (`ablations/experiment/room.py`). It
ends when the process that started it does, so nothing goes on behind the user's back.
"""

import itertools
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ablations.data.coco import DataError, Dataset, read_dataset
from ablations.data.loader import EvalLoader, Loader
from ablations.experiment import trained
from ablations.experiment.augment import merge, mirrored
from ablations.experiment.evaluate import evaluate, run_lengths
from ablations.experiment.measure import count_gmacs, count_parameters, measure_latency
from ablations.experiment.room import Room
from ablations.experiment.train import Diverged, train
from ablations.grid import Cell
from ablations.rows.machine import machine_info
from ablations.rows.store import FileLock, claim, read_row, write_row
from heads import build_detector
from heads.backbones.resnet import load_imagenet
from heads.two_stage.masks import paste
from kernels import use_backend

STEPS_PER_NOTICE = 10


@dataclass(frozen=True)
class Reading:
    """How a data directory is read; the arguments of `ablations.coco.read_dataset`."""

    masks: bool = False
    bad_annotations: str = "refuse"
    max_image_pixels: int | None = None


@dataclass(frozen=True)
class Job:
    """What all cells of one run have in common and what does not decide their results.

    `dropped`: of each split, how many annotations were left out, by reason; empty where none was.
    """

    data: Path
    reading: Reading
    dropped: dict[str, dict[str, int]]
    out: Path
    device: str
    threads: int
    weights: str | None
    command: str
    retry_failed: bool


def work(connection: Connection, job: Job) -> None:
    """Answer every cell that comes through `connection` with its row, and with notices on the way."""
    # Ctrl-C reaches the whole process group; the process that started us decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(job.threads)
    room = Room(job.out)
    try:
        while True:
            cell = connection.recv()
            lease = claim_both(job.out, cell)
            if lease is None:
                time.sleep(0.5)
                connection.send(("elsewhere", None))
                continue
            with lease:
                row = read_row(job.out, cell.key)
                if not trained.is_done(job.out, cell, row, job.retry_failed):
                    row = run_cell(cell, job, room, lambda kind, detail=None: connection.send((kind, detail)))
                    try:
                        write_row(job.out, row)
                    except OSError as error:
                        connection.send(("unwritten", str(error)))
                        continue
            connection.send(("row", row))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def claim_both(out: Path, cell: Cell) -> ExitStack | None:
    """The right to work on a cell and on its weights, which cells of another test share; None if one is taken."""
    with ExitStack() as stack:
        for key in (cell.key, cell.training_key):
            lock: FileLock | None = claim(out, key)
            if lock is None:
                return None
            stack.enter_context(lock)
        return stack.pop_all()


def run_cell(cell: Cell, job: Job, room: Room, notice: Callable) -> dict:
    """Train, evaluate and measure one cell; a failure becomes a row with its reason, never an exception.

    A failed row holds all that was known before the failure.

    Raises:
        BrokenPipeError: The process that wanted the row is gone.
    """
    started, known = now(), {}

    def learned(**parts) -> None:
        known.update(parts)
        notice("learned", parts)

    def failed(status: str, reason: str) -> dict:
        return {**failed_row(cell, job, status, reason, started), **known}

    try:
        with use_backend(cell.backend):
            outcome(cell, job, room, notice, learned)
        return {**blank_row(cell, job), **known, "started": started, "finished": now()}
    except BrokenPipeError:
        raise
    except Diverged as error:
        return failed("diverged", str(error))
    except DataError as error:
        return failed("bad_data", str(error))
    except Exception as error:
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        log = job.out / "cells" / cell.key / "error.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc())
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        relative = log.relative_to(job.out)
        return failed("oom" if memory else "crashed", f"{reason} (see {relative})")
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def outcome(cell: Cell, job: Job, room: Room, notice: Callable, learned: Callable[..., None]) -> None:
    """Measure a cell; `learned` is called with every part of its row as soon as it is known."""
    device = torch.device(job.device)
    data = dataset(job.data, job.reading)
    if (data.fingerprint, data.train.fingerprint) != (cell.data_fingerprint, cell.train_fingerprint):
        raise DataError(job.data, ["it was changed after this run had begun; start the run again"])
    model = build(cell, len(data.train.category_ids), job.weights)
    model = model.to(device, memory_format=torch.channels_last)
    # Decoding runs beside the GPU; on a CPU it would only take the trainer's core.
    threads = 0 if device.type == "cpu" else min(8, job.threads)

    record = trained.find(job.out, cell)
    if record is None:
        record = fit(cell, model, data, job, room, threads, notice)
        record |= {"commit": machine_info(job.device, job.command)["commit"]}
        trained.keep(job.out, cell, record)
    else:
        trained.load(job.out, cell, model, device)
    learned(training=record, weights=f"cells/{cell.training_key}/{trained.CHECKPOINT}")

    notice("evaluate")
    model.eval()
    predictions = detect(model, cell, data, device, threads, room)
    truth, categories = data.val.ground_truth, data.val.category_ids
    with room.busy():
        learned(metrics=evaluate(predictions, truth, categories))
        if model.needs_masks:
            learned(segm_metrics=evaluate(predictions, truth, categories, "segm"))

    notice("measure")
    images = next(iter(EvalLoader(data.val, cell.batch_size, cell.test_size[0], cell.max_size)))[0]
    with room.quiet(), autocast(device, cell.precision):
        speed = measure_latency(model, images, device)
    learned(params_M=count_parameters(model) / 1e6, GMACs=count_gmacs(model, images[:1]), **speed)


def fit(
    cell: Cell, model: torch.nn.Module, data: Dataset, job: Job, room: Room, threads: int, notice: Callable
) -> dict:
    """Train `model` in place, from a checkpoint if there is one, and return what `ablations.train.train` does."""

    def report(step: int, loss: float) -> None:
        if step % STEPS_PER_NOTICE == 0:
            notice("step", (step, loss))

    batches = Loader(
        data.train,
        cell.batch_size,
        cell.seed,
        cell.image_size,
        cell.max_size,
        threads=threads,
        masks=model.needs_masks,
    )
    try:
        device, place = torch.device(job.device), trained.folder(job.out, cell)
        return train(cell, model, batches.batch, device, place, room.busy, report)
    finally:
        batches.close()


def detect(
    model: torch.nn.Module, cell: Cell, data: Dataset, device: torch.device, threads: int, room: Room
) -> list[tuple[int, dict]]:
    """(image id, detections in pixels of the original image) for every image, merged over the cell's views of it."""
    views: dict[int, list[dict]] = {}
    for size, flip in itertools.product(cell.test_size, (False, True) if cell.test_flip else (False,)):
        batches = EvalLoader(data.val, cell.batch_size, size, cell.max_size, threads=threads)
        try:
            for images, shown in batches:
                with room.busy(), torch.inference_mode(), autocast(device, cell.precision):
                    images = [(image.flip(-1) if flip else image).to(device) for image in images]
                    for image, found, origin in zip(images, model(images), shown, strict=True):
                        boxes = found["boxes"].float()
                        boxes = origin.to_original(mirrored(boxes, image.shape[-1]) if flip else boxes)
                        if "masks" in found:
                            pasted = paste(found.pop("mask_probabilities"), boxes, (origin.height, origin.width))
                            found["masks"] = run_lengths(pasted)
                        views.setdefault(origin.image_id, []).append({**found, "boxes": boxes})
        finally:
            batches.close()
    return [(image_id, found[0] if len(found) == 1 else merge(found)) for image_id, found in views.items()]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast a precision asks for; `fp32` asks for none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@lru_cache(maxsize=1)
def dataset(directory: Path, reading: Reading) -> Dataset:
    """The data, read once per process."""
    return read_dataset(directory, **asdict(reading))


def build(cell: Cell, num_classes: int, weights: str | None) -> torch.nn.Module:
    """The cell's model with its initial weights, drawn from the cell's seed."""
    torch.manual_seed(cell.seed)
    model = build_detector(
        cell.detector,
        num_classes=num_classes,
        backbone=cell.backbone,
        attentions=None if cell.attentions == "baseline" else cell.attentions.replace("none", ""),
        depth=cell.depth or 0,
        formulation=cell.formulation or "released",
        coarse_offsets=cell.coarse_offsets or "crop",
        channels=cell.channels,
        placement=cell.placement,
    )
    if weights is not None:
        load_imagenet(model.backbone, weights)
        model.backbone.freeze(1)
    return model


def blank_row(cell: Cell, job: Job) -> dict:
    """The part of a row that is known before anything runs."""
    machine = machine_info(job.device, job.command)
    row = {"key": cell.key, "cell": asdict(cell), "status": "ok", "reason": None, "machine": machine}
    return row | ({"dropped": job.dropped} if job.dropped else {})


def failed_row(cell: Cell, job: Job, status: str, reason: str, started: str | None = None) -> dict:
    """The row of a cell without a result."""
    return {**blank_row(cell, job), "status": status, "reason": reason, "started": started, "finished": now()}


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
