"""`python -m heads.export --detector NAME --weights FILE --out MODEL.onnx`: a trained detector as a model of ONNX.

The model takes images (batch, 3, height, width), float32, RGB in 0 … 1, of any number and size, normalises and pads
them, and returns boxes in pixels, scores and labels after NMS. It holds standard operators alone, of opset 20, and in
its metadata the names of the classes. `--layout NAME` takes a released checkpoint instead of one of ours.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from heads.build import DETECTORS
from heads.detector import Detector
from heads.onnx.model import ExportedDetector, export
from heads.opened import open_detector
from heads.released.layouts import open_released
from heads.released.settings import LAYOUTS
from heads.released.weights import read_weights
from kernels.block.parameters import COARSE_OFFSETS

OK, USAGE = 0, 2
# What a detector can do and a graph cannot, by the name of the option that asks for it.
NOT_EXPORTED = {
    "paste_masks": "mask pasting is not exported: its result grows with image and detections. Without --paste-masks "
    "the model returns masks (batch, detections, 28, 28); heads.two_stage.masks.paste puts them into the image",
    "augment": "test-time augmentation is not exported: it runs a detector many times and joins what was found. Export "
    "without --augment, and call the model once for each view",
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; anything unknown ends the program with exit code 2 and the valid names."""
    parser = argparse.ArgumentParser(
        prog="python -m heads.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--detector", choices=DETECTORS, help="as heads.build_detector names it; the rest is read off")
    what.add_argument("--layout", choices=LAYOUTS, help="a released checkpoint, by whose it is")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE", help="of plain tensors or safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.onnx", help="the model; it is replaced")
    offsets = "how the detector was trained, which no weight tells (default: crop, or the layout's)"
    parser.add_argument("--coarse-offsets", choices=COARSE_OFFSETS, help=offsets)
    names = "names of the classes in their order: a file with one a line, or of COCO annotations"
    parser.add_argument("--classes", type=Path, metavar="FILE", help=names)
    parser.add_argument("--raw", action="store_true", help="what the head predicts instead of detections")
    parser.add_argument("--fp16", action="store_true", help="weights and arithmetic in float16; images stay float32")
    parser.add_argument("--paste-masks", action="store_true", help="not exported: ends with what to do instead")
    parser.add_argument("--augment", action="store_true", help="not exported: ends with what to do instead")
    return parser.parse_args(arguments)


def class_names(path: Path) -> list[str]:
    """The names in a file: one a line, or those of COCO's categories by their numbers.

    Raises:
        ValueError: The file is JSON without categories, or not text.
        OSError: It cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        categories = json.loads(text)["categories"]
        return [str(category["name"]) for category in sorted(categories, key=lambda category: category["id"])]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no names of classes: one a line, or COCO's categories in a .json") from error


def load(options: argparse.Namespace) -> Detector:
    """The detector with its weights.

    Raises:
        ValueError: Detector or layout and file do not fit.
        OSError: The file cannot be read.
    """
    weights = read_weights(options.weights)
    if options.layout is None:
        return open_detector(options.detector, weights, coarse_offsets=options.coarse_offsets or "crop")
    if options.coarse_offsets not in (None, "prefix"):
        raise ValueError("released checkpoints were trained with coarse offsets 'prefix'; leave --coarse-offsets out")
    return open_released(options.layout, weights)


def check(options: argparse.Namespace) -> str:
    """Run the written model on noise beside the detector; returns how far the two are from each other."""
    try:
        import onnxruntime
    except ImportError:
        return "not compared with PyTorch: onnxruntime is not installed"
    detector = load(options)
    images = torch.rand(1, 3, 200, 300, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = ExportedDetector(detector, raw=options.raw, half=options.fp16)(images)[0].float()
    found = onnxruntime.InferenceSession(options.out).run(None, {"images": images.numpy()})[0]
    difference = float((torch.from_numpy(found).float() - wanted).abs().max())
    what = "the first output" if options.raw else "boxes, in pixels,"
    return f"onnxruntime and PyTorch on noise of 200 x 300: {what} differ by at most {difference:.1e}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, or 2 where something cannot be exported or read."""
    options = parse(arguments)
    try:
        for name, reason in NOT_EXPORTED.items():
            if getattr(options, name):
                raise ValueError(reason)
        detector = load(options)
        names = None if options.classes is None else class_names(options.classes)
        began = time.monotonic()
        print(
            f"exporting {options.layout or options.detector}; half a minute for one block, minutes for six", flush=True
        )
        about = {"detector": options.layout or options.detector, "weights": options.weights.name}
        export(detector, options.out, class_names=names, raw=options.raw, half=options.fp16, about=about)
        difference = check(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    seconds, size = time.monotonic() - began, options.out.stat().st_size / 1e6
    print(difference)
    print(f"{options.out}: {size:.1f} MB, {seconds:.0f} s")
    return OK


if __name__ == "__main__":
    sys.exit(main())
