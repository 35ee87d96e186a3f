"""One cell from its settings to its results: build, train, detect, evaluate, measure."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch

from ablations.data.coco import read_dataset
from ablations.data.loader import EvalLoader, Loader
from ablations.data.problems import DataError
from ablations.data.split import Dataset
from ablations.evaluation.detections import FILE as DETECTIONS
from ablations.evaluation.detections import Predictions, by_image, read_detections, write_detections
from ablations.evaluation.evaluate import evaluate
from ablations.evaluation.replicates import FILE as REPLICATES
from ablations.evaluation.replicates import summarise, write_replicates
from ablations.experiment import trained
from ablations.experiment.curve import Scalars
from ablations.experiment.detect import View, detect, loader_threads, move
from ablations.experiment.measure import count_gmacs, count_parameters, measure_latency
from ablations.experiment.precision import autocast
from ablations.experiment.room import Room
from ablations.experiment.train import train
from ablations.grid import Cell
from ablations.rows.machine import machine_info
from ablations.rows.row import Results, Training
from heads import build_detector
from heads.backbones.resnet import Backbone, load_imagenet
from heads.detector import Detector

STEPS_PER_NOTICE = 10


@dataclass(frozen=True)
class Reading:
    """How a data directory is read; the arguments of `ablations.data.coco.read_dataset`."""

    masks: bool = False
    bad_annotations: Literal["refuse", "drop"] = "refuse"
    max_image_pixels: int | None = None


@dataclass(frozen=True)
class Job:
    """What all cells of one run have in common and what does not decide their results.

    Attributes:
        data: The data directory.
        reading: How it is read.
        dropped: For each split that lacks annotations, how many were left out, by reason.
        out: Where rows and weights go.
        device: Where the cells run, as PyTorch names it.
        threads: CPU threads of a process.
        weights: Initial backbone weights, a published name or a file; None for random ones.
        command: The command line, for the rows.
        retry_failed: Whether failed cells are run again.
        log: Where scalars go beside the files of the cells, one of `ablations.experiment.logs.LOGS`; None for nowhere.
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
    log: str | None = None


class Stage(NamedTuple):
    """A cell has come to another stage."""

    name: Literal["start", "evaluate", "measure"]


class Step(NamedTuple):
    """A training step has ended."""

    step: int
    loss: float


class Line(NamedTuple):
    """The loss curve has another line."""

    step: int
    scalars: Scalars


class Learned(NamedTuple):
    """Parts of a cell's row are known, and stay known whatever happens next."""

    parts: Results


Event = Stage | Step | Line | Learned


def run(cell: Cell, job: Job, room: Room, notice: Callable[[Event], None]) -> None:
    """Train, evaluate and measure a cell.

    Args:
        cell: What to run.
        job: Where and how.
        room: The lock of the result directory; speed is measured while no other process computes.
        notice: Called with every event on the way, every result among them as soon as it is there.

    Raises:
        DataError: The data are bad, or not those that the cell is for.
        Diverged: The training has failed.
    """
    device = torch.device(job.device)
    data = dataset(job.data, job.reading)
    if (data.fingerprint, data.train.fingerprint) != (cell.data_fingerprint, cell.train_fingerprint):
        raise DataError(job.data, ["it was changed after this run had begun; start the run again"])
    model = move(build(cell, len(data.train.category_ids), job.weights), device)
    threads = loader_threads(device, job.threads)

    record = trained.find(job.out, cell)
    if record is None:
        record = fit(cell, model, data, job, room, threads, notice)
        record |= {"commit": machine_info(job.device, job.command)["commit"]}
        trained.keep(job.out, cell, record)
    else:
        trained.load(job.out, cell, model, device)
    notice(Learned({"training": record, "weights": f"cells/{cell.training_key}/{trained.CHECKPOINT}"}))

    notice(Stage("evaluate"))
    views = [View(size, flip) for size in cell.test_size for flip in ((False, True) if cell.test_flip else (False,))]
    predictions = detect(
        model,
        data.val,
        views,
        batch_size=cell.batch_size,
        max_size=cell.max_size,
        device=device,
        precision=cell.precision,
        threads=threads,
        busy=room.busy,
    )
    with room.busy():
        evaluate_cell(job.out / "cells" / cell.key, data, predictions, model.needs_masks, notice)

    notice(Stage("measure"))
    images = next(iter(EvalLoader(data.val, cell.batch_size, cell.test_size[0], cell.max_size)))[0]
    with room.quiet(), autocast(device, cell.precision):
        speed = measure_latency(model, images, device)
    size: Results = {"params_M": count_parameters(model) / 1e6, "GMACs": count_gmacs(model, images[:1])}
    notice(Learned({**size, **speed}))


def evaluate_cell(
    directory: Path, data: Dataset, predictions: Predictions, masks: bool, notice: Callable[[Event], None]
) -> None:
    """Store detections and replicates in `directory`, and give notice of what the stored detections are worth."""
    truth, categories = data.val.ground_truth, data.val.category_ids
    directory.mkdir(parents=True, exist_ok=True)
    write_detections(directory / DETECTIONS, predictions, categories)
    images = [record.image_id for record in data.val.images]
    stored = by_image(read_detections(directory / DETECTIONS), images, categories)
    notice(Learned({"metrics": evaluate(stored, truth, categories), "images": len(images)}))
    if masks:
        notice(Learned({"segm_metrics": evaluate(stored, truth, categories, "segm")}))
    summary = summarise(truth, stored, categories, data.fingerprint)
    write_replicates(directory / REPLICATES, summary.replicates)
    notice(Learned({"errors": summary.errors, "class_AP": summary.class_AP}))


def build(cell: Cell, num_classes: int, weights: str | None) -> Detector:
    """The cell's detector with its initial weights, drawn from the cell's seed or, in the backbone, read."""
    torch.manual_seed(cell.seed)
    model = build_detector(
        cell.detector,
        num_classes=num_classes,
        backbone=cell.backbone,
        attentions=cell.attentions,
        depth=cell.depth or 0,
        formulation=cell.formulation or "released",
        coarse_offsets=cell.coarse_offsets or "crop",
        channels=cell.channels,
        placement=cell.placement,
    )
    if weights is not None:
        # A detector takes any module for its backbone; this one is of `BACKBONES`.
        backbone = cast(Backbone, model.backbone)
        load_imagenet(backbone, weights)
        backbone.freeze(1)
    return model


def fit(
    cell: Cell,
    model: Detector,
    data: Dataset,
    job: Job,
    room: Room,
    threads: int,
    notice: Callable[[Event], None],
) -> Training:
    """Train `model` in place, from a checkpoint if there is one; returns what `train` does."""

    def report(step: int, loss: float) -> None:
        if step % STEPS_PER_NOTICE == 0:
            notice(Step(step, loss))

    def log(step: int, scalars: Scalars) -> None:
        notice(Line(step, scalars))

    loader = Loader(
        data.train,
        cell.batch_size,
        cell.seed,
        cell.image_size,
        cell.max_size,
        threads=threads,
        masks=model.needs_masks,
    )
    with closing(loader) as batches:
        directory = trained.folder(job.out, cell)
        return train(cell, model, batches.batch, torch.device(job.device), directory, room.busy, report, log)


@lru_cache(maxsize=1)
def dataset(directory: Path, reading: Reading) -> Dataset:
    """The data, read once per process."""
    return read_dataset(directory, **asdict(reading))
