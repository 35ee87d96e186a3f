"""One worker process: takes cells from its pipe and turns each into a row.

A worker trains and evaluates while others do the same, and measures speed alone (`ablations/room.py`). It ends when the
process that started it does, so nothing goes on behind the user's back.
"""

import itertools
import signal
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ablations.augment import merge, mirrored
from ablations.coco import DataError, Dataset, read_dataset
from ablations.evaluate import evaluate, run_lengths
from ablations.grid import Cell
from ablations.loader import EvalLoader, Loader, check_segmentations
from ablations.machine import machine_info
from ablations.measure import count_gmacs, count_parameters, measure_latency
from ablations.room import Room
from ablations.store import claim, read_row, write_row
from ablations.train import Diverged, train
from heads import build_detector
from heads.masks import paste
from heads.resnet import load_imagenet
from kernels import use_backend

STEPS_PER_NOTICE = 10


@dataclass(frozen=True)
class Job:
    """What all cells of one run have in common and what does not decide their results."""

    data: Path
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
            lease = claim(job.out, cell.key)
            if lease is None:
                time.sleep(0.5)
                connection.send(("elsewhere", None))
                continue
            with lease:
                row = read_row(job.out, cell.key)
                if row is None or (job.retry_failed and row["status"] != "ok"):
                    row = run_cell(cell, job, room, lambda kind, detail=None: connection.send((kind, detail)))
                    try:
                        write_row(job.out, row)
                    except OSError as error:
                        connection.send(("unwritten", str(error)))
                        continue
            connection.send(("row", row))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def run_cell(cell: Cell, job: Job, room: Room, notice) -> dict:
    """Train, evaluate and measure one cell; a failure becomes a row with its reason, never an exception.

    Raises:
        BrokenPipeError: The process that wanted the row is gone.
    """
    started = now()
    try:
        with use_backend(cell.backend):
            result = outcome(cell, job, room, notice)
        return {**blank_row(cell, job), **result, "started": started, "finished": now()}
    except BrokenPipeError:
        raise
    except Diverged as error:
        return failed_row(cell, job, "diverged", str(error), started)
    except DataError as error:
        return failed_row(cell, job, "bad_data", str(error), started)
    except Exception as error:
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        log = job.out / "cells" / cell.key / "error.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc())
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        relative = log.relative_to(job.out)
        return failed_row(cell, job, "oom" if memory else "crashed", f"{reason} (see {relative})", started)
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def outcome(cell: Cell, job: Job, room: Room, notice) -> dict:
    """The measured part of a row."""
    device = torch.device(job.device)
    data = dataset(job.data)
    model = build(cell, len(data.train.category_ids), job.weights)
    model = model.to(device, memory_format=torch.channels_last)

    def report(step: int, loss: float) -> None:
        if step % STEPS_PER_NOTICE == 0:
            notice("step", (step, loss))

    # Decoding runs beside the GPU; on a CPU it would only take the trainer's core.
    threads = 0 if device.type == "cpu" else min(8, job.threads)
    masks = getattr(model.head, "needs_masks", False)
    if masks:
        check_segmentations(data.train)
        check_segmentations(data.val)
    batches = Loader(
        data.train, cell.batch_size, cell.seed, cell.image_size, cell.max_size, threads=threads, masks=masks
    )
    try:
        training = train(cell, model, batches.batch, device, job.out / "cells" / cell.key, room.busy, report)
    finally:
        batches.close()

    notice("evaluate")
    model.eval()
    predictions = detect(model, cell, data, device, threads, room)
    with room.busy():
        truth = data.val.ground_truth
        metrics = evaluate(predictions, truth, data.val.category_ids)
        segm = {"segm_metrics": evaluate(predictions, truth, data.val.category_ids, "segm")} if masks else {}

    notice("measure")
    images = next(iter(EvalLoader(data.val, cell.batch_size, cell.test_size[0], cell.max_size)))[0]
    with room.quiet(), autocast(device, cell.precision):
        speed = measure_latency(model, images, device)
    return {
        "metrics": metrics,
        **segm,
        "training": training,
        "params_M": count_parameters(model) / 1e6,
        "GMACs": count_gmacs(model, images[:1]),
        **speed,
    }


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
def dataset(directory: Path) -> Dataset:
    """The data, read once per process."""
    return read_dataset(directory)


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
    return {"key": cell.key, "cell": asdict(cell), "status": "ok", "reason": None, "machine": machine}


def failed_row(cell: Cell, job: Job, status: str, reason: str, started: str | None = None) -> dict:
    """The row of a cell without a result."""
    return {**blank_row(cell, job), "status": status, "reason": reason, "started": started, "finished": now()}


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
