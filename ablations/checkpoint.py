"""`python -m ablations.checkpoint FILE --layout NAME --data DIR`: the average precision of a released detector on COCO.

FILE is a checkpoint of ATSS with DyHead as the authors or mmdetection released it, DIR has COCO's layout; its val part
is evaluated. What the layouts are stands in `heads/released/layouts.py`. The result is printed and written as JSON.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from pathlib import Path

import torch

from ablations.data.annotations import BAD_ANNOTATIONS
from ablations.data.coco import Split, read_split
from ablations.data.images import MAX_PIXELS
from ablations.data.loader import EvalLoader
from ablations.experiment.evaluate import evaluate
from ablations.rows.machine import device_name, machine_info
from ablations.rows.store import atomic_write_text
from heads.detector import Detector
from heads.released.layouts import LAYOUTS, open_released
from heads.released.weights import read_weights
from kernels import use_backend
from kernels.backend import BACKENDS

OK, USAGE = 0, 2


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; anything unknown ends the program with exit code 2 and the valid names."""
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
    parser.add_argument(
        "--short-side", type=int, metavar="N", help="pixels of the shorter side (default: the layout's)"
    )
    parser.add_argument("--max-size", type=int, metavar="N", help="most pixels of the longer (default: the layout's)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images padded together (default: 1)")
    parser.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of the operators (default: auto)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="(default: runs/checkpoint-<file>-<layout>.json)")
    options = parser.parse_args(arguments)
    options.short_side = options.short_side or LAYOUTS[options.layout].short_side
    options.max_size = options.max_size or LAYOUTS[options.layout].max_size
    options.out = options.out or Path("runs") / f"checkpoint-{options.file.stem}-{options.layout}.json"
    return options


def detections(model: Detector, split: Split, options: argparse.Namespace) -> list[tuple[int, dict]]:
    """(image id, detections in pixels of the original image) for every image of the split."""
    device = torch.device(options.device)
    model = model.eval().to(device, memory_format=torch.channels_last)
    threads = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
    batches = EvalLoader(split, options.batch_size, options.short_side, options.max_size, threads=threads)
    found, shown_at = [], time.monotonic()
    try:
        with torch.inference_mode(), use_backend(options.backend):
            for images, origins in batches:
                for result, origin in zip(model([image.to(device) for image in images]), origins, strict=True):
                    found.append((origin.image_id, {**result, "boxes": origin.to_original(result["boxes"])}))
                if time.monotonic() - shown_at > 10:
                    shown_at = time.monotonic()
                    print(f"{len(found)} of {len(split.images)} images", flush=True)
    finally:
        batches.close()
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, or 2 where the file, the layout and the data do not fit."""
    options = parse(arguments)
    try:
        model = open_released(options.layout, read_weights(options.file))
        split = read_split(
            options.data, "val", bad_annotations=options.bad_annotations, max_image_pixels=options.max_image_pixels
        )
        for note in split.notes:
            print(note)
        classes, categories = model.head.num_classes, len(split.category_ids)
        if classes != categories:
            raise ValueError(f"{options.file} tells {classes} classes apart, {split.path} has {categories} categories")
        found = detections(model, split, options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    metrics = evaluate(found, split.ground_truth, split.category_ids)
    command = "python -m ablations.checkpoint " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    result = {
        "checkpoint": options.file.name,
        "sha256": hashlib.sha256(options.file.read_bytes()).hexdigest(),
        "layout": options.layout,
        "published_AP_on_COCO": LAYOUTS[options.layout].published_ap,
        "data_fingerprint": split.fingerprint,
        "images": len(split.images),
        "dropped": split.dropped,
        "short_side": options.short_side,
        "max_size": options.max_size,
        "batch_size": options.batch_size,
        "metrics": metrics,
        "machine": machine_info(options.device, command),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(options.out, json.dumps(result, indent=1) + "\n")
    print("  ".join(f"{name} {'-' if value is None else f'{value:.1f}'}" for name, value in metrics.items()))
    print(f"published on COCO val2017: AP {LAYOUTS[options.layout].published_ap}; written to {options.out}")
    return OK


if __name__ == "__main__":
    sys.exit(main())
