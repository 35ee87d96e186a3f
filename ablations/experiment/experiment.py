"""One cell from its settings to its results: build, train, detect, evaluate, measure."""

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from ablations.data.batch import Target
from ablations.data.cache import open_dataset
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
from ablations.experiment.features import Features, is_frozen
from ablations.experiment.group import ALONE, Group, with_batch_norm_of_all_ranks
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
from heads.parameters import parameter_kinds

STEPS_PER_NOTICE = 10
# Of all cells that this process runs, one after the other.
FEATURES = Features()


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
        room: Where the lock is that keeps a machine quiet while speed is measured.
        cache: Where what is read once a machine is kept, the parsed data.
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
    room: Path
    cache: Path
    log: str | None = None


class Stage(NamedTuple):
    """A cell has come to another stage."""

    name: Literal["start", "evaluate", "measure"]


class Step(NamedTuple):
    """A training step has ended."""

    step: int
    loss: float


class Saved(NamedTuple):
    """A checkpoint has been written."""

    step: int


class Said(NamedTuple):
    """Something that a user has to know."""

    text: str


class Line(NamedTuple):
    """The loss curve has another line."""

    step: int
    scalars: Scalars


class Learned(NamedTuple):
    """Parts of a cell's row are known, and stay known whatever happens next."""

    parts: Results


Event = Stage | Step | Saved | Said | Line | Learned


def run(cell: Cell, job: Job, room: Room, notice: Callable[[Event], None], group: Group = ALONE) -> None:
    """Train, evaluate and measure a cell.

    Args:
        cell: What to run.
        job: Where and how.
        room: The lock of the result directory; speed is measured while no other process computes.
        notice: Called with every event on the way, every result among them as soon as it is there; on rank 0 alone.
        group: This process among those that work on the cell together. Rank 0 writes and measures.

    Raises:
        DataError: The data are bad, or not those that the cell is for.
        Diverged: The training has failed.
    """
    device = torch.device(job.device)
    data = dataset(job.data, job.reading, job.cache)
    if (data.fingerprint, data.train.fingerprint) != (cell.data_fingerprint, cell.train_fingerprint):
        raise DataError(job.data, ["it was changed after this run had begun; start the run again"])
    model = build(cell, len(data.train.category_ids), job.weights)
    model = move(with_batch_norm_of_all_ranks(model, group, device), device)
    threads = loader_threads(device, job.threads)

    def say(text: str) -> None:
        notice(Said(text))

    def loaded() -> Training | None:
        record = trained.find(job.out, cell)
        return record if record is not None and trained.load(job.out, cell, model, say) else None

    record = group.first(loaded)
    if record is None:
        record = fit(cell, model, data, job, room, threads, notice, group)
        record |= {"commit": machine_info(job.device, job.command)["commit"]}
        if group.rank == 0:
            trained.keep(job.out, cell, record)
    else:
        group.alike(model)
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
        share=group.share(),
    )
    found = dict(chain.from_iterable(group.gather(predictions)))
    if group.rank != 0:
        return
    predictions = [(record.image_id, found[record.image_id]) for record in data.val.images]
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
    files = {name: (directory / name).stat().st_size for name in (DETECTIONS, REPLICATES)}
    notice(Learned({"files": files, "errors": summary.errors, "class_AP": summary.class_AP}))


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
    if cell.class_std is not None:
        kinds = parameter_kinds(model)
        for name, parameter in model.named_parameters():
            if kinds[name].predicts_classes and kinds[name].decays:
                torch.nn.init.normal_(parameter, std=cell.class_std)
    if weights is not None:
        # A detector takes any module for its backbone; this one is of `BACKBONES`.
        backbone = cast(Backbone, model.backbone)
        load_imagenet(backbone, weights)
        backbone.freeze(cell.frozen)
    return model


def fit(
    cell: Cell,
    model: Detector,
    data: Dataset,
    job: Job,
    room: Room,
    threads: int,
    notice: Callable[[Event], None],
    group: Group,
) -> Training:
    """Train `model` in place, from a checkpoint if there is one; returns what `train` does, and how it was shared."""
    halved = group.first(lambda: trained.halved(job.out, cell))
    parts = cell.accumulate * 2 ** len(halved)

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
        share=group.share(parts),
        pin=torch.device(job.device).type == "cuda",
    )

    def features(images: list[Tensor], targets: list[Target], extent: tuple[int, int]) -> list[Tensor] | None:
        if not is_frozen(model):
            return None
        owner = (data.train.fingerprint, cell.weights, cell.backbone, model.backbone.channels, cell.precision)
        return FEATURES.of(owner, model, images, targets, cell.precision, extent)

    with closing(loader) as batches:
        directory = trained.folder(job.out, cell)
        device = torch.device(job.device)
        # Ranks compute in step: what holds up the first holds up all, and a lock of each could lock them together.
        record = train(
            cell,
            model,
            batches.batch,
            device,
            directory,
            busy=room.busy if group.rank == 0 else nullcontext,
            report=report,
            log=log,
            saved=lambda step: notice(Saved(step)),
            features=features,
            group=group,
            parts=parts,
            say=lambda text: notice(Said(text)),
        )
    record["ranks"] = group.ranks
    if halved:
        record["halved"] = halved
    return record


@lru_cache(maxsize=1)
def dataset(directory: Path, reading: Reading, cache: Path) -> Dataset:
    """The data, which the run has checked when it began: parsed once a machine, opened once a process."""
    return open_dataset(directory, **asdict(reading), cache=cache, checked=True)
