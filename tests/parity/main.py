"""`make parity`: every detector as every kind of program, against itself in PyTorch; writes results/export/.

    python tests/parity/main.py [--only WORD ...] [--out DIR]

Detectors are tiny and have random weights, scaled so that they find something. Half an hour on two cores.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import pandas as pd
import torch
from lively import enliven, lively_detector
from parity import onnx_parity, relative_error, session

from ablations.files import atomic_write_text
from ablations.rows.machine import machine_info, machine_line
from heads.backbones.resnet import BACKBONES
from heads.backbones.swin import Swin
from heads.build import DETECTORS
from heads.detector import STD, Detector
from heads.onnx.model import EXAMPLE, ExportedDetector
from heads.released.layouts import build_released
from heads.released.settings import LAYOUTS, UNSCALED

INTRODUCTION = """
What each detector computes as a program of another kind, against itself in PyTorch, float32 on a CPU. Detectors are
tiny (backbone "tiny" or a Swin of 16 channels, 32 channels, one block, 3 classes), with random weights of which the
last layers are scaled, so that they find something. Programs are made once, with batch, height and width left open,
from {example} images, and run on others: {shapes}. *raw*: largest difference of what the head predicts, by the largest
number of its tensor; *boxes*, *scores*: largest difference of a detection's side in pixels and of its score; *found*:
detections in PyTorch; *swapped*: those elsewhere in the order, by scores that are equal but for rounding; *same*:
whether number, labels and order are those of PyTorch otherwise. Of two boxes that suppress each other and score the
same but for rounding, NMS may keep either: then *same* is False for one detection. ONNX is opset 20, run by
onnxruntime {version}. Where *found* is empty, the program returns what the head predicts alone. "ONNX, float16" is
compared with PyTorch in float32.
"""
SHAPES = ((1, 3, 100, 130), (3, 3, 270, 200))
HEADS: dict[str, dict[str, Any]] = {
    "own head": {"attentions": None},
    "LSC": {},
    "LSC, prefix": {"coarse_offsets": "prefix"},
    "LSC, resize": {"coarse_offsets": "resize"},
    "LSC, paper": {"formulation": "paper"},
}


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(shape, generator=generator) for shape in SHAPES]


def released(layout: str) -> Detector:
    """A tiny detector in the layout of a release."""
    torch.manual_seed(0)
    settings = LAYOUTS[layout]
    finest = 2 if settings.kind == "faster_rcnn" else 3
    body = BACKBONES["tiny"](finest=finest)
    backbone = Swin(16, (2, 2, 2, 2), (1, 2, 4, 8), 4, finest=finest) if "swin" in layout else body
    detector = build_released(layout, 3, depth=1, channels=32, backbone=backbone).eval()
    if settings.std == UNSCALED:
        # Weights that were trained on pixels of 0 … 255 are that much smaller.
        body.conv1.weight.data *= UNSCALED[0] / STD[0]
    return enliven(detector)


def onnx(make: Callable[[], Detector], decoded: bool = True, half: bool = False) -> dict[str, Any]:
    """As a model of ONNX."""
    # With `half` the weights of the exported one are rounded for good.
    found = onnx_parity(make(), session(make(), decoded=decoded, half=half), batches())._asdict()
    return found if decoded else {"raw": found["raw"]}


def program(make: Callable[[], Detector], kind: str) -> dict[str, Any]:
    """As a program of torch.export, or compiled without a graph break."""
    model = ExportedDetector(make(), raw=True)
    auto = torch.export.Dim.AUTO
    with torch.no_grad():
        if kind == "torch.export":
            open_sizes = ({0: auto, 2: auto, 3: auto},)
            run = torch.export.export(model, (torch.rand(EXAMPLE),), dynamic_shapes=open_sizes).module()
        else:
            run = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
        # What torch.export makes is for maps of two cells or more, 129 pixels.
        errors = [relative_error(model(images), run(images)) for images in (torch.rand(EXAMPLE), *batches()[1:])]
    return {"raw": max(errors)}


def jobs() -> dict[tuple[str, str, str], Callable[[], dict[str, Any]]]:
    """(detector, head, program) -> what measures it."""
    found: dict[tuple[str, str, str], Callable[[], dict[str, Any]]] = {}
    for name in DETECTORS:
        for head, settings in HEADS.items():
            # Decoding has no part in the formulation and the offsets.
            decoded = head in ("own head", "LSC")
            found[name, head, "ONNX"] = partial(onnx, partial(lively_detector, name, **settings), decoded)
        make = partial(lively_detector, name)
        found[name, "LSC", "ONNX, float16"] = partial(onnx, make, decoded=False, half=True)
        for kind in ("torch.export", "torch.compile"):
            found[name, "LSC", kind] = partial(program, make, kind)
    for layout in LAYOUTS:
        found[layout, "released", "ONNX"] = partial(onnx, partial(released, layout))
    return found


def measure(key: tuple[str, str, str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    began = time.monotonic()
    try:
        found = jobs()[key]()
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]}
    return dict(zip(("detector", "head", "program"), key, strict=True)) | found | {"seconds": time.monotonic() - began}


def write(out: Path, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The rows as they are, and the table made of them."""
    frame = pd.DataFrame(rows).drop(columns="seconds")
    shapes = " and ".join(" × ".join(map(str, shape)) for shape in SHAPES)
    about = {"example": " × ".join(map(str, EXAMPLE)), "shapes": shapes, "version": onnxruntime.__version__}
    for column, form in (
        ("raw", "{:.1e}"),
        ("boxes", "{:.1e}"),
        ("scores", "{:.1e}"),
        ("found", "{:.0f}"),
        ("swapped", "{:.0f}"),
    ):
        if column in frame:
            frame[column] = [form.format(value) if value == value else "" for value in frame[column]]
    table = frame.fillna("").to_markdown(index=False, disable_numparse=True)
    text = ["# Parity of exported detectors", machine_line([machine]), INTRODUCTION.format(**about).strip(), table]
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / "parity.md", "\n\n".join(text) + "\n")
    atomic_write_text(out / "parity.json", json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(f"written: {out}/parity.md and parity.json")


def main() -> int:
    """Measure all and write the table; the exit code is 1 where a program failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="rows with one of these words")
    parser.add_argument("--out", type=Path, default=Path("results/export"), help="default: results/export")
    parser.add_argument(
        "--redraw", action="store_true", help="make parity.md anew from parity.json, and measure nothing"
    )
    options = parser.parse_args()
    if options.redraw:
        record = json.loads((options.out / "parity.json").read_text())
        write(options.out, record["machine"], record["rows"])
        return 0
    keys = [key for key in jobs() if any(word in " | ".join(key) for word in options.only)]
    machine = machine_info("cpu", " ".join(["python tests/parity/main.py", *sys.argv[1:]]))
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        for row in pool.imap_unordered(measure, keys):
            rows.append(row)
            print(f"{len(rows)} of {len(keys)}: {row}", flush=True)
    rows.sort(key=lambda row: keys.index((row["detector"], row["head"], row["program"])))
    write(options.out, machine, rows)
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
