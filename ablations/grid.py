"""What is run: a cell is everything that decides one result, a grid is a Python product of cells."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product

from heads.build import TWO_STAGE
from heads.dyhead.attention import COARSE_OFFSETS
from heads.dyhead.dyhead import ATTENTIONS, FORMULATIONS, canonical
from heads.two_stage.faster_rcnn import PLACEMENTS

GRIDS = ("default", "combinations", "depth", "detectors", "full")

# Fields of a cell that say which data it reads; the first decides neither its weights nor its result.
DATA = ("data", "data_fingerprint", "train_fingerprint")
# Fields that decide a result and not the weights that it is measured on.
EVALUATION = ("data", "data_fingerprint", "test_size", "test_flip")


@dataclass(frozen=True)
class Cell:
    """Everything that decides a result. Two cells with equal fields are the same experiment and share one row."""

    # data
    data: str
    data_fingerprint: str  # of both parts, train and val
    train_fingerprint: str
    image_size: tuple[int, ...]  # shorter sides in pixels, of which training draws one for every image
    max_size: int  # cap of the longer side
    test_size: tuple[int, ...]  # shorter sides in evaluation; with more than one, detections are merged
    test_flip: bool  # whether evaluation adds the mirrored image
    # model
    detector: str
    backbone: str
    weights: str  # initial backbone weights: "none", a published name, or a file's name and hash
    channels: int
    attentions: str  # "baseline" (the detector's own towers), "none", or a subset of LSC
    depth: int | None  # DyHead blocks; None for the baseline
    formulation: str | None
    coarse_offsets: str | None
    placement: str
    # schedule
    steps: int
    batch_size: int
    optimizer: str  # "sgd" or "adamw"
    lr: float
    backbone_lr: float  # of the backbone, as a share of lr
    offset_lr: float  # of layers that predict offsets and masks of samples, as a share of the rate around them
    weight_decay: float
    warmup: int
    seed: int
    # execution
    precision: str
    device_kind: str
    backend: str

    @property
    def key(self) -> str:
        """Content hash of all fields, the name of the cell's files."""
        return _hash(asdict(self))

    @property
    def training_key(self) -> str:
        """Content hash of the fields that decide the trained weights, the name of the folder that holds them."""
        return _hash({name: value for name, value in asdict(self).items() if name not in EVALUATION})

    @property
    def name(self) -> str:
        """Short readable name, unique among the cells of one preset and data set."""
        parts = [self.detector, self.attentions]
        if self.depth is not None:
            parts.append(f"depth {self.depth}")
        if self.formulation == "paper":
            parts.append("paper")
        if self.coarse_offsets not in (None, "crop"):
            parts.append(self.coarse_offsets)
        if self.placement != PLACEMENTS[0]:
            parts.append(self.placement)
        if self.seed:
            parts.append(f"seed {self.seed}")
        return " ".join(parts)


def _hash(fields: dict) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Preset:
    """The size of an experiment. Learning rates are per batch of the given size.

    `own` has the fields of the cell in which a detector, or a family of backbones, differs from the preset: by the
    detector's name, or by what the backbones' names begin with. Where two entries fit, the later one counts.
    """

    description: str
    difficulty: str  # of the generated data
    image_size: tuple[int, ...]
    max_size: int
    backbone: str
    weights: str
    channels: int
    depths: tuple[int, ...]
    one_depth: int  # for the grids that vary something else
    steps: int
    batch_size: int
    lr: float
    offset_lr: float
    weight_decay: float
    warmup: int
    gpu_precision: str
    own: dict[str, dict[str, str | float]] = field(default_factory=dict)

    def own_fields(self, detector: str, backbone: str) -> dict[str, str | float]:
        """What a cell with this detector and backbone has otherwise than the preset."""
        found = {}
        for name, changes in self.own.items():
            if name == detector or backbone.startswith(name):
                found |= changes
        return found


ADAMW = {"optimizer": "adamw"}
# RetinaNet's towers have no norm. At 0.02 its gradients burst again and again and it learns half as much; 0.01 is its
# published rate.
WITHOUT_NORM = {"lr": 0.01}
# As in Deformable ConvNets v2 (Zhu et al., CVPR 2019). With the whole rate of a short schedule, offsets wander off by
# several cells within 200 steps, and whatever samples with them learns less. DyHead's released configurations, which
# are slower, have no such factor.
SLOW_OFFSETS = 0.1

PRESETS = {
    "tiny": Preset(
        description="2 CPU cores, about half a minute a cell",
        difficulty="tiny",
        image_size=(128,),
        max_size=160,
        backbone="tiny",
        weights="none",
        channels=64,
        depths=(1, 2),
        one_depth=1,
        steps=500,
        batch_size=8,
        lr=0.02,
        offset_lr=SLOW_OFFSETS,
        weight_decay=1e-4,
        warmup=20,
        gpu_precision="fp32",
        own={
            "retinanet": WITHOUT_NORM,
            "swin": ADAMW | {"lr": 5e-4, "weight_decay": 0.05},
            "detr": ADAMW | {"lr": 5e-4},
        },
    ),
    "small": Preset(
        description="one GPU, under a minute a cell",
        difficulty="small",
        image_size=(256,),
        max_size=320,
        backbone="tiny",
        weights="none",
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
        own={
            "retinanet": WITHOUT_NORM,
            "swin": ADAMW | {"lr": 5e-4, "weight_decay": 0.05},
            "detr": ADAMW | {"lr": 5e-4},
        },
    ),
    # The paper's ablation: 1x of 90,000 steps, batch 16; lr as in the released ATSS configuration.
    "paper": Preset(
        description="R-50, 800×1333, 1x schedule, batch 16: days on one GPU",
        difficulty="paper",
        image_size=(800,),
        max_size=1333,
        backbone="resnet50",
        weights="resnet50",
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
        own={
            **{name: {"lr": 0.02} for name in TWO_STAGE},
            "swin": ADAMW | {"lr": 5e-5, "weight_decay": 0.05},
            "detr": ADAMW | {"lr": 1e-4, "backbone_lr": 0.1},
        },
    ),
}


def with_attentions(
    cell: Cell, attentions: str | None, depth: int | None, formulation: str = "released", coarse_offsets: str = "crop"
) -> Cell:
    """`cell` with another trunk. Fields that the trunk does not read are None, so equal experiments stay equal.

    Args:
        cell: Supplies all other fields.
        attentions: Subset of LSC, or None for the baseline.
        depth, formulation, coarse_offsets: Of the DyHead; ignored for the baseline.
    """
    if attentions is None:
        return replace(cell, attentions="baseline", depth=None, formulation=None, coarse_offsets=None)
    reads_coarse = formulation == "released" and "S" in attentions
    return replace(
        cell,
        attentions=canonical(attentions) or "none",
        depth=depth,
        formulation=formulation,
        coarse_offsets=coarse_offsets if reads_coarse else None,
    )


def build_grid(name: str, preset: Preset, base: Cell, detectors: Iterable[str], seeds: int) -> list[Cell]:
    """The cells of a named grid, each once, baseline first.

    Args:
        name: One of `GRIDS`.
        preset: Supplies the depths, and what detector and backbone have for themselves.
        base: Supplies every field that the grid does not vary.
        detectors: Detectors to run it for.
        seeds: Number of seeds, 0 … seeds - 1.

    Raises:
        ValueError: `name` is no grid.
    """
    if name not in GRIDS:
        raise ValueError(f"unknown grid {name!r}; the grids are {', '.join(GRIDS)}")
    cells = []
    for detector in detectors:
        for seed in range(seeds):
            start = replace(base, detector=detector, seed=seed, **preset.own_fields(detector, base.backbone))
            cells.append(with_attentions(start, None, None))
            cells += variants(name, preset, start)
    return list(dict.fromkeys(cells))


def variants(name: str, preset: Preset, start: Cell) -> Iterator[Cell]:
    """The cells with a DyHead of one grid, detector and seed."""
    attentions = ("LSC",) if name in ("depth", "detectors") else ATTENTIONS
    depths = (preset.one_depth,) if name in ("combinations", "detectors") else preset.depths
    everything = name == "full"
    formulations = FORMULATIONS if everything else ("released",)
    offsets = COARSE_OFFSETS if everything else ("crop",)
    placements = PLACEMENTS if everything and start.detector in TWO_STAGE else ("trunk",)
    for placement, formulation, offset, depth, subset in product(placements, formulations, offsets, depths, attentions):
        yield with_attentions(replace(start, placement=placement), subset, depth, formulation, offset)


def only(cells: list[Cell], expression: str) -> list[Cell]:
    """Keep the cells that match every comma-separated term: an `attentions` value, or column=value.

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
    values = ["" if getattr(cell, column) is None else str(getattr(cell, column)) for cell in cells]
    if value not in values:
        present = ", ".join(v or "(empty)" for v in dict.fromkeys(values))
        raise ValueError(f"--only: no cell has {column}={value}; here it is one of {present}")
    return [cell for cell, own in zip(cells, values, strict=True) if own == value]
