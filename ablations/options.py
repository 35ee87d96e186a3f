"""The command line of `python -m ablations.run`, read once into `Options` whose fields are what the run works with."""

import argparse
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from ablations.cost.gpus import SHARE
from ablations.data.annotations import BAD_ANNOTATIONS
from ablations.data.images import MAX_PIXELS
from ablations.experiment.experiment import Reading
from ablations.experiment.logs import LOGS
from ablations.grid import GRIDS, PRESETS, SHIPPED, Backend, Exceptions, Preset
from ablations.rows.machine import device_name
from heads.backbones.resnet import BACKBONES
from heads.build import DETECTORS, WITH_MASKS
from kernels.backend import BACKENDS

RUNS = Path("runs")
EXECUTORS = ("local", "ray")
PROGRAM = "python -m ablations.run"
DESCRIPTION = """`python -m ablations.run --grid`: train, evaluate, measure and table every cell of a grid.

A cell that has a row is not run again, so the same command goes on where it was stopped.
"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for, with the preset's defaults where it says nothing.

    Attributes:
        grid: One of `GRIDS`.
        preset: The preset, with the backbone and the image sizes that training uses.
        data: A directory in COCO layout; None for the generated set of the preset.
        reading: How the data are read.
        only: Terms that the cells must match, as typed.
        detectors: Names of the detectors, each once.
        seeds: Number of seeds.
        precision: `"fp32"` or `"bf16"`; None for the preset's.
        weights: Initial backbone weights, a published name or a file; None for random ones.
        test_sizes: Shorter sides in evaluation, pixels.
        test_flip: Whether evaluation adds the mirrored image.
        out: Where rows, tables and the report go.
        device: Where to run, as PyTorch names it.
        backend: Of the operators.
        workers: Number of processes, or of cells at once on a cluster; None for the device's default.
        executor: Where cells run, one of `EXECUTORS`.
        address: Of a Ray cluster; None for one that is begun on this machine.
        gpus_per_cell: GPUs that a cell on a cluster takes; 0 for CPUs.
        log: One of `ablations.experiment.logs.LOGS`; None for none.
        dry_run: List the cells and run nothing.
        gpus: Numbers of GPUs that a dry run tells the time of.
        peak_share: What it takes for the share of a GPU's peak that is used.
        fresh: Run finished cells again.
        retry_failed: Run failed cells again.
        command: The command as it was typed.
    """

    grid: str
    preset: Preset
    data: Path | None
    reading: Reading
    only: str
    detectors: tuple[str, ...]
    seeds: int
    precision: str | None
    weights: str | None
    test_sizes: tuple[int, ...]
    test_flip: bool
    out: Path
    device: str
    backend: Backend
    workers: int | None
    executor: str
    address: str | None
    gpus_per_cell: int
    log: str | None
    dry_run: bool
    gpus: tuple[int, ...]
    peak_share: float
    fresh: bool
    retry_failed: bool
    command: str

    @property
    def data_name(self) -> str:
        """The data set's name in cells and in the default of `out`."""
        return f"generated-{self.preset.difficulty}" if self.data is None else self.data.resolve().name


def parse(arguments: Sequence[str], program: str = PROGRAM) -> Options:
    """Read the command line; anything unknown ends the program with exit code 2 and the valid names.

    Args:
        arguments: Those behind the program.
        program: How the program was started, for the rows.
    """
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    base = PRESETS[parsed.preset]
    preset = told(base, parsed)
    if preset.batch_size % preset.accumulate:
        parts = [str(n) for n in range(1, preset.batch_size + 1) if preset.batch_size % n == 0]
        message = f"--accumulate {preset.accumulate} does not divide the batch of {preset.batch_size} images"
        parser.error(f"{message}; give one of {', '.join(parts)}, or another --batch-size")
    test_sizes = parsed.test_sizes or base.image_size
    shorter = max(*preset.image_size, *test_sizes)
    if shorter > preset.max_size:
        parser.error(f"a shorter side of {shorter} pixels needs a --max-size of as many; it is {preset.max_size}")

    every = ",".join(DETECTORS) if parsed.grid == "detectors" else "atss"
    detectors = tuple(dict.fromkeys((parsed.detector or every).split(",")))
    for name in detectors:
        if name not in DETECTORS:
            parser.error(f"unknown detector {name!r}; the detectors are {', '.join(DETECTORS)}")
    masks = any(name in WITH_MASKS for name in detectors)
    if masks and (parsed.test_flip or len(test_sizes) > 1):
        named = ", ".join(WITH_MASKS)
        parser.error(f"--test-flip and several --test-sizes merge boxes, not masks: name a --detector without {named}")
    if parsed.backend == "triton" and parsed.device == "cpu" and parsed.precision == "bf16":
        parser.error("--precision bf16 cannot be interpreted on a CPU: leave --backend triton out, or take fp32")
    if parsed.backend == "triton" and parsed.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--backend triton on a CPU needs TRITON_INTERPRET=1 in the environment, and hours of patience")

    if parsed.executor != "ray" and (parsed.address or parsed.gpus_per_cell is not None):
        parser.error("--address and --gpus-per-cell are of a cluster: add --executor ray")
    if parsed.executor == "ray" and parsed.log is not None:
        parser.error("--log writes on the machine of a cell: leave it out, losses.jsonl of every cell comes to --out")
    gpus = parsed.gpus_per_cell
    if gpus is None:
        gpus = int(parsed.executor == "ray" and parsed.device != "cpu")

    data = None if parsed.data == "generated" else Path(parsed.data)
    weights = parsed.weights or default_weights(preset, data)
    return Options(
        grid=parsed.grid,
        preset=preset,
        data=data,
        reading=Reading(masks, parsed.bad_annotations, parsed.max_image_pixels),
        only=parsed.only,
        detectors=detectors,
        seeds=parsed.seeds or preset.seeds,
        precision=parsed.precision,
        weights=None if weights == "none" else weights,
        test_sizes=test_sizes,
        test_flip=parsed.test_flip,
        out=parsed.out or RUNS / (parsed.preset if data is None else f"{data.resolve().name}-{parsed.preset}"),
        device="cuda" if gpus else parsed.device,
        backend=parsed.backend,
        workers=parsed.workers,
        executor=parsed.executor,
        address=parsed.address,
        gpus_per_cell=gpus,
        log=parsed.log,
        dry_run=parsed.dry_run,
        gpus=parsed.gpus,
        peak_share=parsed.peak_share,
        fresh=parsed.fresh,
        retry_failed=parsed.retry_failed,
        command=f"{program} {shlex.join(arguments)}",
    )


def default_weights(preset: Preset, data: Path | None) -> str:
    """What the preset's backbone begins with on these data: a published name, a file, or `none`."""
    if preset.weights == "shipped":
        return str(SHIPPED[preset.backbone]) if data is None and preset.backbone in SHIPPED else "none"
    return preset.backbone if preset.weights == "published" else "none"


def told(base: Preset, parsed: argparse.Namespace) -> Preset:
    """The preset with what the command line says in its place; that counts for every detector and backbone."""
    names = ("backbone", "max_size", "steps", "batch_size", "accumulate", "lr", "depths")
    said = {name: value for name in names if (value := getattr(parsed, name)) is not None}
    exceptions = {
        name: cast(Exceptions, {field: value for field, value in changes.items() if field not in said})
        for name, changes in base.exceptions.items()
    }
    preset = replace(base, **said, image_size=parsed.train_sizes or base.image_size, exceptions=exceptions)
    # A training that is shorter than planned is not to be all warm-up.
    warmup = min(preset.warmup, preset.steps // 10) if preset.steps < base.steps else preset.warmup
    return replace(preset, warmup=warmup, one_depth=max(parsed.depths) if parsed.depths else preset.one_depth)


def build_parser() -> argparse.ArgumentParser:
    """The options with their help."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
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
    repeats = "repeat with seeds 0 … N-1, all cells of a seed before those of the next (default: the preset's)"
    what.add_argument("--seeds", type=positive, metavar="N", help=repeats)
    depths = "DyHead blocks (default: the preset's); the grids of one depth take the largest"
    what.add_argument("--depths", type=wholes, metavar="N[,N]", help=depths)
    what.add_argument("--steps", type=positive, metavar="N", help="training steps (default: the preset's)")
    what.add_argument("--batch-size", type=positive, metavar="N", help="images a step (default: the preset's)")
    parts = "train on a step's images in K equal parts, one after the other, with less memory (default: 1)"
    what.add_argument("--accumulate", type=positive, metavar="K", help=parts)
    rate = "learning rate, of every detector and backbone (default: the preset's, which knows some exceptions)"
    what.add_argument("--lr", type=rate_of_learning, metavar="X", help=rate)
    types = "of training and test (default: fp32 on a CPU, the preset's on a GPU)"
    what.add_argument("--precision", choices=("fp32", "bf16"), help=types)
    what.add_argument(
        "--weights",
        metavar="FILE|NAME|none",
        help="initial backbone weights with torchvision's names (default: the backbone's own in the paper preset)",
    )
    sides = "shorter sides in pixels (default: the preset's one)"
    what.add_argument("--train-sizes", type=wholes, metavar="N[,N]", help=f"multi-scale training: {sides}")
    what.add_argument("--test-sizes", type=wholes, metavar="N[,N]", help=f"multi-scale testing: {sides}")
    longest = "most pixels of the longer side, whatever the shorter one then is (default: the preset's)"
    what.add_argument("--max-size", type=positive, metavar="N", help=longest)
    what.add_argument("--test-flip", action="store_true", help="test on the mirrored image, too")
    how = parser.add_argument_group("how to run it")
    how.add_argument("--out", type=Path, metavar="DIR", help="rows, tables, report (default: runs/<preset>)")
    how.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    how.add_argument("--backend", choices=BACKENDS, default="auto", help="of the operators (default: auto)")
    how.add_argument("--workers", type=positive, metavar="N", help="processes (default: one per core; 1 on a GPU)")
    where = "local: processes of this machine, or of several GPUs under torchrun; ray: the machines of a Ray cluster"
    how.add_argument("--executor", choices=EXECUTORS, default="local", help=f"{where} (default: local)")
    address = "of the Ray cluster (default: one that is begun on this machine)"
    how.add_argument("--address", metavar="A", help=address)
    gpus = "GPUs of a cell on the cluster, a rank on each (default: 1 where this machine has one, else CPUs)"
    how.add_argument("--gpus-per-cell", type=positive, metavar="N", help=gpus)
    how.add_argument("--log", choices=LOGS, help="write loss curves and AP for one of these, too, if it is installed")
    how.add_argument("--dry-run", action="store_true", help="list the cells, what is done and the cost; run nothing")
    several = "numbers of GPUs whose time --dry-run tells (default: 1,8)"
    how.add_argument("--gpus", type=wholes, default=(1, 8), metavar="N[,N]", help=several)
    used = "the share of a GPU's peak that --dry-run takes to be used (default: %(default)s, an assumption)"
    how.add_argument("--peak-share", type=share, default=SHARE, metavar="X", help=used)
    how.add_argument("--fresh", action="store_true", help="run finished cells again; old rows move to cells/replaced/")
    how.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    return parser


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return value


def wholes(text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on with commas between them, for argparse."""
    return tuple(positive(part) for part in text.split(","))


def rate_of_learning(text: str) -> float:
    """A finite number above 0, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def share(text: str) -> float:
    """A number above 0 and up to 1, for argparse."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: a number above 0, up to 1")
    return value
