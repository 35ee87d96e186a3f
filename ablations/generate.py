"""The generated data set: deformed shapes over clutter, written once in COCO layout, the same for the same seed.

`python -m ablations.generate DIR --difficulty tiny --preview sheet.png` makes it and draws a contact sheet of it.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ablations.files import FileLock
from ablations.generated.outlines import SHAPES
from ablations.generated.scenes import Difficulty, draw_scene

# Any change of what is drawn or written raises it: the directory and the JSON carry it, and so does a data fingerprint.
VERSION = 3

DIFFICULTIES = {
    "tiny": Difficulty(
        train=600,
        val=600,
        sizes=((128, 128), (128, 112), (112, 128)),
        classes=5,
        objects=(2, 5),
        scale=(18, 88),
        close_ups=0.1,
        close_up=(0.55, 0.75),
        crowds=0.0,
        deform=0.5,
        clutter=(0, 3),
        occluders=(0, 1),
        hollow=0.0,
        colour_bias=0.8,
        contrast=(80, 230),
        texture=(4, 22),
        noise=(1, 7),
        visible=0.75,
        supersample=3,
        jpeg=False,
    ),
    "small": Difficulty(
        train=4000,
        val=500,
        sizes=((320, 320), (320, 256), (256, 320), (288, 288)),
        classes=12,
        objects=(2, 9),
        scale=(12, 170),
        close_ups=0.1,
        close_up=(0.8, 1.1),
        crowds=0.05,
        deform=0.9,
        clutter=(3, 9),
        occluders=(0, 3),
        hollow=0.35,
        colour_bias=0.0,
        contrast=(45, 220),
        texture=(6, 34),
        noise=(2, 12),
        visible=0.5,
        supersample=2,
        jpeg=True,
    ),
    "paper": Difficulty(
        train=2000,
        val=500,
        sizes=((960, 640), (640, 960), (800, 640), (960, 720)),
        classes=20,
        objects=(3, 16),
        scale=(12, 420),
        close_ups=0.08,
        close_up=(0.8, 1.1),
        crowds=0.08,
        deform=1.0,
        clutter=(5, 16),
        occluders=(0, 5),
        hollow=0.4,
        colour_bias=0.0,
        contrast=(40, 220),
        texture=(6, 38),
        noise=(2, 14),
        visible=0.45,
        supersample=2,
        jpeg=True,
    ),
}

_SPLITS = ("train", "val")
_CARD = "DATASET.md"


def generate(
    root: Path,
    difficulty: str,
    seed: int = 0,
    *,
    train: int | None = None,
    val: int | None = None,
    processes: int | None = None,
) -> Path:
    """Make the generated set under `root` unless it is there already.

    The set appears whole or not at all: it is written to a temporary folder and renamed. Processes that ask
    for the same set at once wait for the first. What a killed process left behind is removed by the next call.

    Args:
        root: Folder that holds generated sets; made if missing.
        difficulty: `"tiny"`, `"small"` or `"paper"`.
        seed: 0 or more; every value gives another set.
        train, val: Number of images; by default the difficulty's.
        processes: How many draw; by default one for `tiny` and at most two else. The result does not depend on it.

    Returns:
        The folder with `annotations/instances_{train,val}2017.json`, `train2017/`, `val2017/` and `DATASET.md`.

    Raises:
        ValueError: The difficulty is unknown, the seed negative, or a number of images below one.
        OSError: `root` cannot be written or the disk is full; nothing is left behind.
    """
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"unknown difficulty {difficulty!r}; the difficulties are {', '.join(DIFFICULTIES)}")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more")
    preset = DIFFICULTIES[difficulty]
    counts = (preset.train if train is None else train, preset.val if val is None else val)
    if min(counts) < 1:
        raise ValueError(f"train and val are {counts[0]} and {counts[1]}; each must be 1 or more")
    name = f"{difficulty}-seed{seed}-v{VERSION}"
    if counts != (preset.train, preset.val):
        name += f"-{counts[0]}+{counts[1]}"
    directory = Path(root) / name
    if _whole(directory, counts):
        return directory
    if processes is None:
        processes = 1 if difficulty == "tiny" else min(2, os.cpu_count() or 1)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.parent / f".{name}.lock") as lock:
        lock.acquire()
        if _whole(directory, counts):
            return directory
        for leftover in directory.parent.glob(f".{name}.partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial_dir = Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=directory.parent))
        try:
            fresh = partial_dir / "new"
            _write(fresh, difficulty, replace(preset, train=counts[0], val=counts[1]), seed, processes)
            if directory.exists():
                os.rename(directory, partial_dir / "damaged")
            os.rename(fresh, directory)
        finally:
            shutil.rmtree(partial_dir, ignore_errors=True)
    return directory


def _whole(directory: Path, counts: tuple[int, int]) -> bool:
    """Is the set there, with as many images as it should have? A few milliseconds at most."""
    if not (directory / _CARD).is_file():
        return False
    for split, count in zip(_SPLITS, counts, strict=True):
        images = directory / f"{split}2017"
        if not (directory / "annotations" / f"instances_{split}2017.json").is_file() or not images.is_dir():
            return False
        if sum(1 for _ in os.scandir(images)) < count:
            return False
    return True


def _write(directory: Path, difficulty: str, preset: Difficulty, seed: int, processes: int) -> None:
    for folder in ("annotations", *(f"{split}2017" for split in _SPLITS)):
        (directory / folder).mkdir(parents=True)
    jobs = [(split, index) for split, count in enumerate((preset.train, preset.val)) for index in range(count)]
    draw = partial(_draw, directory, preset, seed)
    # A daemonic process, such as a worker of a pool, may not have children.
    if processes > 1 and not multiprocessing.current_process().daemon:
        # Not forked: the caller may have threads, and a fork of a process with threads can hang.
        context = multiprocessing.get_context("spawn")
        # Ctrl-C reaches every process of the group; the parent alone answers it, and ends the others.
        with context.Pool(processes, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
            records = pool.map(draw, jobs, chunksize=16)
    else:
        records = [draw(job) for job in jobs]
    categories = [{"id": s.category_id, "name": s.name, "supercategory": "shape"} for s in SHAPES[: preset.classes]]
    info = {
        "description": f"Generated shapes, difficulty {difficulty}",
        "difficulty": difficulty,
        "seed": seed,
        "version": str(VERSION),
        "generator": "ablations.generate",
    }
    annotation_id = 0
    summary = []
    for number, split in enumerate(_SPLITS):
        images, annotations = [], []
        for image, found in (record for job, record in zip(jobs, records, strict=True) if job[0] == number):
            images.append(image)
            for annotation in found:
                annotation_id += 1
                annotations.append({"id": annotation_id, "image_id": image["id"], **annotation})
        content = {
            "info": info,
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        with open(directory / "annotations" / f"instances_{split}2017.json", "w") as file:
            json.dump(content, file, separators=(",", ":"))
        summary.append(f"- `{split}2017`: {len(images)} images, {len(annotations)} annotations")
    names = ", ".join(f"{c['name']} ({c['id']})" for c in categories)
    card = [
        f"# Generated shapes: {difficulty}",
        "",
        f"Written by `ablations.generate`, version {VERSION}, seed {seed}; the same seed gives the same pixels.",
        "COCO layout; boxes, areas and polygons are those of the visible part of each object.",
        "",
        *summary,
        f"- categories (id): {names}",
        "",
    ]
    (directory / _CARD).write_text("\n".join(card))


def _draw(
    directory: Path, preset: Difficulty, seed: int, job: tuple[int, int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draw and store one image; its record for the JSON and its annotations."""
    split, index = job
    pixels, annotations = draw_scene(preset, seed, split, index)
    # Ids with gaps and an offset: an image id is not an index either.
    image_id = split * 1_000_000 + 7 * index + 1
    name = f"{image_id:012d}.{'jpg' if preset.jpeg else 'png'}"
    options: dict[str, Any] = {"quality": 92} if preset.jpeg else {"compress_level": 1}
    Image.fromarray(pixels).save(directory / f"{_SPLITS[split]}2017" / name, **options)
    height, width = pixels.shape[:2]
    return {"id": image_id, "file_name": name, "width": width, "height": height}, annotations


def preview(directory: Path, file: Path, split: str = "val", count: int = 24, columns: int = 6) -> None:
    """Draw a contact sheet of the first images of a COCO-layout set, with boxes, polygons and class names."""
    content = json.loads((directory / "annotations" / f"instances_{split}2017.json").read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    colours = {c: f"hsl({360 * i // len(names)}, 100%, 60%)" for i, c in enumerate(names)}
    images = content["images"][:count]
    longest = max(max(image["width"], image["height"]) for image in images)
    zoom = max(1, round(320 / longest))
    tile = longest * zoom + 6
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * tile, rows * tile), "white")
    font = ImageFont.load_default(12)
    for i, image in enumerate(images):
        with Image.open(directory / f"{split}2017" / image["file_name"]) as picture:
            view = picture.convert("RGB").resize((image["width"] * zoom, image["height"] * zoom), 0)
        pen = ImageDraw.Draw(view)
        for annotation in content["annotations"]:
            if annotation["image_id"] != image["id"]:
                continue
            x, y, w, h = (v * zoom for v in annotation["bbox"])
            colour = colours[annotation["category_id"]]
            pen.rectangle((x, y, x + w, y + h), outline=colour)
            if not annotation["iscrowd"]:
                for points in annotation["segmentation"]:
                    pen.polygon([v * zoom for v in points], outline=colour)
            name = names[annotation["category_id"]] + (" crowd" if annotation["iscrowd"] else "")
            pen.text((x + 2, max(y - 13, 0)), name, fill=colour, font=font, stroke_width=1, stroke_fill="black")
        sheet.paste(view, (i % columns * tile, i // columns * tile))
    sheet.save(file)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ablations.generate", description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, metavar="DIR", help="folder that holds generated sets")
    parser.add_argument("--difficulty", choices=tuple(DIFFICULTIES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, help="how many processes draw (default: 1 for tiny, else up to 2)")
    parser.add_argument("--preview", type=Path, metavar="FILE.png", help="also draw a contact sheet")
    options = parser.parse_args(arguments)
    try:
        directory = generate(options.root, options.difficulty, options.seed, processes=options.processes)
        if options.preview:
            preview(directory, options.preview)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
