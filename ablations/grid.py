"""What is run: a cell is everything that decides one result, a grid is a Python product of cells."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypedDict

from heads.build import TWO_STAGE
from heads.dyhead.dyhead import ATTENTIONS, FORMULATIONS
from heads.two_stage.faster_rcnn import PLACEMENTS
from kernels.block.parameters import COARSE_OFFSETS

Backend = Literal["auto", "triton", "torch"]

GRIDS = ("default", "combinations", "depth", "detectors", "full")

# Fields of a cell that say which data it reads; the first decides neither its weights nor its result.
DATA = ("data", "data_fingerprint", "train_fingerprint")
# Fields that decide a result and not the weights that it is measured on.
EVALUATION = ("data", "data_fingerprint", "test_size", "test_flip")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a preset gives to its cells as it is: the size of images and model, and the schedule.

    Attributes:
        image_size: Shorter sides in pixels, of which training draws one for every image.
        max_size: Cap of the longer side in pixels.
        backbone: One of `heads.BACKBONES`.
        channels: Channels of the pyramid.
        steps: Training steps.
        batch_size: Images a step, in evaluation images a batch.
        accumulate: Equal parts that a step's images are trained on one after the other, to need less memory.
        optimizer: `"sgd"` or `"adamw"`.
        lr: Learning rate for a batch of `batch_size`.
        schedule: `"step"`, a tenth after each of the paper's milestones, or `"cosine"`, half a cosine down to 0.
        backbone_lr: Learning rate of the backbone, as a share of `lr`.
        frozen: Stages of a pretrained backbone that are not trained, the stem with them; 4 for all of them.
        class_std: Standard deviation of the initial weights of class logits under a focal loss; None for the published
            0.01, which takes hundreds of steps to grow apart.
        offset_lr: That of layers that predict offsets and masks of samples, as a share of the rate around them.
        weight_decay: Of weights; biases, norms and scales have none.
        warmup: Steps of the linear warm-up.
    """

    image_size: tuple[int, ...]
    max_size: int
    backbone: str
    channels: int
    steps: int
    batch_size: int
    accumulate: int = 1
    optimizer: str = "sgd"
    lr: float
    schedule: str = "step"
    backbone_lr: float = 1.0
    frozen: int = 0
    class_std: float | None = None
    offset_lr: float
    weight_decay: float
    warmup: int


@dataclass(frozen=True, kw_only=True)
class Cell(Recipe):
    """Everything that decides a result. Two cells with equal fields are the same experiment and share one row.

    Attributes:
        data: Name of the data set.
        data_fingerprint: Hash of both parts, train and val.
        train_fingerprint: Hash of the train part.
        test_size: Shorter sides in evaluation; with more than one, detections are merged.
        test_flip: Whether evaluation adds the mirrored image.
        detector: One of `heads.DETECTORS`.
        weights: Initial backbone weights: `"none"`, a published name, or a file's name and hash.
        attentions: Subset of the letters LSC, in this order; None for the detector's own towers, its baseline.
        depth: DyHead blocks; None for the baseline.
        formulation, coarse_offsets: As for `DyHead`; None where nothing reads them.
        placement: Where the DyHead sits, one of `heads.two_stage.faster_rcnn.PLACEMENTS`.
        seed: Decides the initial weights and every draw of the training.
        precision: `"fp32"` or `"bf16"`.
        device_kind: `"cpu"`, `"cuda"` or `"hip"`.
        backend: One of `kernels.backend.BACKENDS`.
    """

    data: str
    data_fingerprint: str
    train_fingerprint: str
    test_size: tuple[int, ...]
    test_flip: bool
    detector: str
    weights: str
    attentions: str | None = None
    depth: int | None = None
    formulation: str | None = None
    coarse_offsets: str | None = None
    placement: str = PLACEMENTS[0]
    seed: int = 0
    precision: str
    device_kind: str
    backend: Backend

    def stored(self) -> dict[str, Any]:
        """All fields as rows hold them and keys hash them: `attentions` is a word there, as it is printed."""
        return asdict(self) | {"attentions": word(self.attentions)}

    @property
    def key(self) -> str:
        """Content hash of all fields, the name of the cell's files."""
        return _hash(self.stored())

    @property
    def training_key(self) -> str:
        """Content hash of the fields that decide the trained weights, the name of the folder that holds them."""
        return _hash({name: value for name, value in self.stored().items() if name not in EVALUATION})

    @property
    def name(self) -> str:
        """Short readable name, unique among the cells of one preset and data set."""
        parts = [self.detector, word(self.attentions)]
        if self.depth is not None:
            parts.append(f"depth {self.depth}")
        if self.formulation == "paper":
            parts.append("paper")
        if self.coarse_offsets not in (None, "crop"):
            parts.append(str(self.coarse_offsets))
        if self.placement != PLACEMENTS[0]:
            parts.append(self.placement)
        if self.seed:
            parts.append(f"seed {self.seed}")
        return " ".join(parts)


def word(attentions: str | None) -> str:
    """A cell's `attentions` as it is printed, stored and asked for by --only.

    Example:
        >>> word(None), word(""), word("LS")
        ('baseline', 'none', 'LS')
    """
    return "baseline" if attentions is None else attentions or "none"


def _hash(stored: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()[:16]


class Exceptions(TypedDict, total=False):
    """Fields of a recipe in which a detector or a backbone may differ from its preset."""

    optimizer: str
    lr: float
    backbone_lr: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class Preset(Recipe):
    """The size of an experiment.

    Attributes:
        description: One line for the help of the command line.
        difficulty: Of the generated data.
        weights: What the backbone begins with unless the command line says: `"none"`; `"published"`, its ImageNet
            weights; or `"shipped"`, those of `SHIPPED`, on the generated set.
        depths: DyHead blocks of the grids that vary them.
        one_depth: DyHead blocks of the grids that vary something else.
        seeds: How often each cell is trained unless the command line says.
        gpu_precision: Precision on a GPU; on a CPU it is fp32.
        exceptions: Fields in which cells differ from the recipe, by the detector's name or by the beginning of the
            backbone's. Where two entries fit, the later one counts.
    """

    description: str
    difficulty: str
    weights: Literal["none", "published", "shipped"] = "none"
    depths: tuple[int, ...]
    one_depth: int
    seeds: int
    gpu_precision: str
    exceptions: dict[str, Exceptions] = field(default_factory=dict)

    def recipe(self) -> dict[str, Any]:
        """The fields that the cells take as they are."""
        return {field.name: getattr(self, field.name) for field in fields(Recipe)}

    def exceptions_for(self, detector: str, backbone: str) -> Exceptions:
        """Fields in which a cell with this detector and backbone differs from the recipe."""
        merged: Exceptions = {}
        for name, changes in self.exceptions.items():
            if name == detector or backbone.startswith(name):
                merged |= changes
        return merged


ADAMW: Exceptions = {"optimizer": "adamw"}
# RetinaNet's towers have no norm. At 0.02 its gradients burst again and again and it learns half as much; 0.01 is its
# published rate.
WITHOUT_NORM: Exceptions = {"lr": 0.01}
# As in Deformable ConvNets v2 (Zhu et al., CVPR 2019). With the whole rate of a short schedule, offsets wander off by
# several cells within 200 steps, and whatever samples with them learns less. DyHead's released configurations, which
# are slower, have no such factor.
SLOW_OFFSETS = 0.1
# Of a short schedule that begins with random weights.
SHORT: dict[str, Exceptions] = {
    "retinanet": WITHOUT_NORM,
    "swin": ADAMW | {"lr": 5e-4, "weight_decay": 0.05},
    "detr": ADAMW | {"lr": 5e-4},
}

# Weights of backbones that were trained on objects of the generated kind, by `ablations.pretrain`.
SHIPPED = {"tiny": Path(__file__).parent / "generated" / "tiny.safetensors"}

PRESETS = {
    "tiny": Preset(
        description="2 CPU cores, a pretrained backbone, three seeds: a quarter of an hour for the default grid",
        difficulty="tiny",
        seeds=3,
        image_size=(128,),
        max_size=128,
        backbone="tiny",
        weights="shipped",
        channels=64,
        depths=(1, 2),
        one_depth=1,
        steps=250,
        batch_size=8,
        optimizer="adamw",
        lr=2e-3,
        schedule="cosine",
        frozen=4,
        class_std=0.1,
        offset_lr=SLOW_OFFSETS,
        weight_decay=1e-4,
        warmup=20,
        gpu_precision="fp32",
        exceptions={
            "swin": {"lr": 5e-4, "weight_decay": 0.05},
            "detr": {"lr": 5e-4},
            "reppoints": {"lr": 1e-3},
        },
    ),
    "small": Preset(
        description="one GPU, under a minute a cell",
        difficulty="small",
        seeds=3,
        image_size=(256,),
        max_size=320,
        backbone="tiny",
        frozen=1,
        channels=128,
        depths=(1, 2, 4, 6),
        one_depth=6,
        steps=800,
        batch_size=16,
        lr=0.02,
        offset_lr=SLOW_OFFSETS,
        weight_decay=1e-4,
        warmup=50,
        gpu_precision="bf16",
        exceptions=SHORT,
    ),
    # The paper's ablation: 1x of 90,000 steps, batch 16; lr as in the released ATSS configuration.
    "paper": Preset(
        description="R-50, 800×1333, 1x schedule, batch 16: days on one GPU",
        difficulty="paper",
        seeds=1,
        image_size=(800,),
        max_size=1333,
        backbone="resnet50",
        weights="published",
        frozen=1,
        channels=256,
        depths=(1, 2, 4, 6, 8, 10),
        one_depth=6,
        steps=90_000,
        batch_size=16,
        lr=0.01,
        offset_lr=1.0,
        weight_decay=1e-4,
        warmup=1000,
        gpu_precision="bf16",
        # As published, for batch 16: R-CNN and Swin as in DyHead's released configurations, DETR's rates as in
        # mmdetection's, which also clips its gradients at 0.1 where all of ours are clipped at 10.
        exceptions={
            **dict.fromkeys(TWO_STAGE, Exceptions(lr=0.02)),
            "swin": ADAMW | {"lr": 5e-5, "weight_decay": 0.05},
            "detr": ADAMW | {"lr": 1e-4, "backbone_lr": 0.1},
        },
    ),
}


def with_dyhead(cell: Cell, attentions: str, depth: int, formulation: str, coarse_offsets: str) -> Cell:
    """A baseline's cell with a DyHead. Fields that the DyHead does not read are None, so equal experiments stay equal.

    Args:
        cell: Supplies all other fields.
        attentions: Subset of the letters LSC, in this order.
        depth: Number of blocks.
        formulation, coarse_offsets: As for `DyHead`; coarse offsets exist where levels are neighbours and S is on.
    """
    reads_coarse = formulation == "released" and "S" in attentions
    return replace(
        cell,
        attentions=attentions,
        depth=depth,
        formulation=formulation,
        coarse_offsets=coarse_offsets if reads_coarse else None,
    )


def build_grid(name: str, preset: Preset, base: Cell, detectors: Iterable[str], seeds: int) -> list[Cell]:
    """The cells of a named grid, each once: all of the first seed, then all of the next, a detector's baseline first.

    Args:
        name: One of `GRIDS`.
        preset: Supplies the depths, and the fields in which a detector or a backbone differs.
        base: A baseline; supplies every field that the grid does not vary.
        detectors: Names of the detectors to run it for.
        seeds: Number of seeds, 0 … seeds - 1.

    Raises:
        ValueError: The name is not one of `GRIDS`.
    """
    if name not in GRIDS:
        raise ValueError(f"unknown grid {name!r}; the grids are {', '.join(GRIDS)}")
    cells: list[Cell] = []
    for seed, detector in product(range(seeds), detectors):
        baseline = replace(base, detector=detector, seed=seed, **preset.exceptions_for(detector, base.backbone))
        cells += [baseline, *variants(name, preset, baseline)]
    return list(dict.fromkeys(cells))


def variants(name: str, preset: Preset, baseline: Cell) -> Iterator[Cell]:
    """The cells of a grid that have a DyHead in place of the baseline's towers."""
    attentions = ("LSC",) if name in ("depth", "detectors") else ATTENTIONS
    depths = (preset.one_depth,) if name in ("combinations", "detectors") else preset.depths
    everything = name == "full"
    formulations = FORMULATIONS if everything else ("released",)
    offsets = COARSE_OFFSETS if everything else ("crop",)
    placements = PLACEMENTS if everything and baseline.detector in TWO_STAGE else ("trunk",)
    for placement, formulation, offset, depth, subset in product(placements, formulations, offsets, depths, attentions):
        yield with_dyhead(replace(baseline, placement=placement), subset, depth, formulation, offset)


def only(cells: list[Cell], expression: str) -> list[Cell]:
    """Keep the cells that match every comma-separated term: attentions, or column=value, all as rows store them.

    Raises:
        ValueError: A term names no column or value of these cells; the possible ones are listed.
    """
    columns = {field.name for field in fields(Cell)}
    for term in filter(None, (part.strip() for part in expression.split(","))):
        column, equals, value = term.partition("=")
        if not equals:
            column, value = "attentions", term
        if column not in columns:
            raise ValueError(f"--only: unknown column {column!r}; the columns are {', '.join(sorted(columns))}")
        cells = matching(cells, column, value)
    return cells


def matching(cells: list[Cell], column: str, value: str) -> list[Cell]:
    """The cells whose `column` reads `value`; an empty value matches cells without one."""
    stored = [cell.stored()[column] for cell in cells]
    values = ["" if value is None else str(value) for value in stored]
    if value not in values:
        present = ", ".join(v or "(empty)" for v in dict.fromkeys(values))
        raise ValueError(f"--only: no cell has {column}={value}; here it is one of {present}")
    return [cell for cell, present in zip(cells, values, strict=True) if present == value]
