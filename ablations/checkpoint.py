"""`python -m ablations.checkpoint FILE --layout NAME --data DIR`: the average precision of a released detector on COCO.

FILE is a checkpoint of a detector with DyHead as the authors or mmdetection released it, DIR has COCO's layout; its val
part is evaluated. What the layouts are stands in `heads/released/settings.py`. The result is printed, and written as
JSON.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ablations.data.annotations import BAD_ANNOTATIONS
from ablations.data.coco import read_split
from ablations.data.images import MAX_PIXELS
from ablations.data.split import Split
from ablations.evaluation.detections import Detections
from ablations.evaluation.evaluate import evaluate
from ablations.experiment.detect import View, detect, loader_threads, move
from ablations.experiment.experiment import Reading
from ablations.files import atomic_write_text
from ablations.grid import Backend
from ablations.rows.machine import device_name, machine_info
from heads.detector import Detector
from heads.released.layouts import open_released
from heads.released.settings import LAYOUTS
from heads.released.weights import read_weights
from kernels import use_backend
from kernels.backend import BACKENDS

OK, USAGE = 0, 2
SECONDS_PER_NOTICE = 10


@dataclass(frozen=True)
class Options:
    """The command line, with the defaults of the layout.

    Attributes:
        file: The checkpoint.
        layout: One of `heads.released.settings.LAYOUTS`.
        data: A directory in COCO layout.
        reading: How it is read.
        short_side: Shorter side of the images in pixels.
        max_size: Most pixels of the longer side.
        batch_size: Images padded together.
        device: Where to run, as PyTorch names it.
        backend: One of `kernels.backend.BACKENDS`.
        out: The JSON file that the result goes to.
        command: The command as it was typed.
    """

    file: Path
    layout: str
    data: Path
    reading: Reading
    short_side: int
    max_size: int
    batch_size: int
    device: str
    backend: Backend
    out: Path
    command: str


def parse(arguments: list[str]) -> Options:
    """Read the command line; anything unknown ends the program with exit code 2 and the valid names."""
    parser = argparse.ArgumentParser(
        prog="python -m ablations.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="of plain tensors: .pth or .safetensors")
    parser.add_argument("--layout", choices=LAYOUTS, required=True, help="whose release the file is")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a directory in COCO layout")
    bad = "boxes that cannot be: list them and stop (refuse, the default), or leave them out and say how many (drop)"
    parser.add_argument("--bad-annotations", choices=BAD_ANNOTATIONS, default="refuse", help=bad)
    most = f"most pixels of an image (default: {MAX_PIXELS}, Pillow's own limit)"
    parser.add_argument("--max-image-pixels", type=int, metavar="N", help=most)
    shorter = "pixels of the shorter side (default: the layout's)"
    parser.add_argument("--short-side", type=int, metavar="N", help=shorter)
    parser.add_argument("--max-size", type=int, metavar="N", help="most pixels of the longer (default: the layout's)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images padded together (default: 1)")
    parser.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of the operators (default: auto)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="(default: runs/checkpoint-<file>-<layout>.json)")
    parsed = parser.parse_args(arguments)
    return Options(
        file=parsed.file,
        layout=parsed.layout,
        data=parsed.data,
        reading=Reading(bad_annotations=parsed.bad_annotations, max_image_pixels=parsed.max_image_pixels),
        short_side=parsed.short_side or LAYOUTS[parsed.layout].short_side,
        max_size=parsed.max_size or LAYOUTS[parsed.layout].max_size,
        batch_size=parsed.batch_size,
        device=parsed.device,
        backend=parsed.backend,
        out=parsed.out or Path("runs") / f"checkpoint-{parsed.file.stem}-{parsed.layout}.json",
        command="python -m ablations.checkpoint " + shlex.join(arguments),
    )


def load(options: Options) -> tuple[Detector, Split]:
    """The detector with its weights, and the val part of the data.

    Raises:
        ValueError: File, layout and data do not fit one another, or the data are bad.
        OSError: A file cannot be read.
    """
    model = open_released(options.layout, read_weights(options.file))
    split = read_split(options.data, "val", **asdict(options.reading))
    for note in split.notes:
        print(note)
    classes, categories = model.head.num_classes, len(split.category_ids)
    if classes != categories:
        raise ValueError(f"{options.file} tells {classes} classes apart, {split.path} has {categories} categories")
    return model, split


def detections(model: Detector, split: Split, options: Options) -> list[tuple[int | str, Detections]]:
    """What the detector finds on the split; every ten seconds a line says how far it is."""
    device = torch.device(options.device)
    shown_at = time.monotonic()

    def report(images: int) -> None:
        nonlocal shown_at
        if time.monotonic() - shown_at > SECONDS_PER_NOTICE:
            shown_at = time.monotonic()
            print(f"{images} of {len(split.images)} images", flush=True)

    with use_backend(options.backend):
        return detect(
            move(model, device),
            split,
            [View(options.short_side)],
            batch_size=options.batch_size,
            max_size=options.max_size,
            device=device,
            threads=loader_threads(device, os.cpu_count() or 1),
            report=report,
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, or 2 where the file, the layout and the data do not fit."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        model, split = load(options)
        found = detections(model, split, options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    metrics = evaluate(found, split.ground_truth, split.category_ids)
    published = LAYOUTS[options.layout].published_ap
    result = {
        "checkpoint": options.file.name,
        "sha256": hashlib.sha256(options.file.read_bytes()).hexdigest(),
        "layout": options.layout,
        "published_AP_on_COCO": published,
        "data_fingerprint": split.fingerprint,
        "images": len(split.images),
        "dropped": split.dropped,
        "short_side": options.short_side,
        "max_size": options.max_size,
        "batch_size": options.batch_size,
        "metrics": metrics,
        "machine": machine_info(options.device, options.command),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(options.out, json.dumps(result, indent=1) + "\n")
    print("  ".join(f"{name} {'-' if value is None else f'{value:.1f}'}" for name, value in metrics.items()))
    print(
        f"published on COCO val2017: {'nothing' if published is None else f'AP {published}'}; written to {options.out}"
    )
    return OK


if __name__ == "__main__":
    sys.exit(main())
