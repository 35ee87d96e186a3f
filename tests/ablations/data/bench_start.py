"""From the start of a worker process to its open data set, and the memory that costs, at COCO's size.

pytest tests/ablations/data/bench_start.py --benchmark-only

With the flag it writes results/loader/start.md. The set has COCO's counts of images and annotations, polygons of random
points and no pixels: what is measured is the reading of instances files, so image files pass unseen.
"""

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from ablations.data import coco
from ablations.data.cache import open_dataset
from ablations.data.image_files import ImageFiles
from ablations.data.images import Header
from ablations.rows.machine import machine_info, machine_line

RESULT = Path(__file__).parents[3] / "results" / "loader" / "start.md"
COMMAND = "pytest tests/ablations/data/bench_start.py --benchmark-only"
# Images and annotations of each part of COCO 2017.
COCO_SIZE = {"train": (118_287, 860_001), "val": (5_000, 36_781)}
SMALL_SIZE = {"train": (60, 400), "val": (10, 60)}
# Coordinates a polygon; COCO's train part has about 46 a segmentation.
COORDINATES = 46


def write(root, counts):
    """Instances files of these counts, the annotations in blocks so that they never all exist as objects."""
    (root / "annotations").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, (images, annotations) in counts.items():
        (root / f"{name}2017").mkdir()
        with open(root / "annotations" / f"instances_{name}2017.json", "w") as file:
            entries = [{"id": 3 * n, "file_name": f"{n:012}.jpg", "width": 640, "height": 480} for n in range(images)]
            categories = [{"id": n + 1, "name": f"category {n}"} for n in range(80)]
            file.write(f'{{"images": {json.dumps(entries)}, "categories": {json.dumps(categories)}, "annotations": [')
            for start in range(0, annotations, 20_000):
                count = min(20_000, annotations - start)
                sides = rng.uniform(4, 200, (count, 2)).round(2)
                corner = (rng.random((count, 2)) * (np.array([640, 480]) - sides)).round(2)
                points = rng.uniform(0, 480, (count, COORDINATES)).round(2).tolist()
                of, category = rng.integers(images, size=count).tolist(), rng.integers(80, size=count).tolist()
                boxes = np.concatenate([corner, sides], 1).round(2).tolist()
                lines = [
                    json.dumps(
                        {
                            "id": start + n,
                            "image_id": 3 * of[n],
                            "category_id": category[n] + 1,
                            "bbox": boxes[n],
                            "area": boxes[n][2] * boxes[n][3],
                            "iscrowd": 0,
                            "segmentation": [points[n]],
                        }
                    )
                    for n in range(count)
                ]
                file.write(("," if start else "") + ",".join(lines))
            file.write("]}")
    return root


def unseen(files, entries):
    """Every image file as it is declared."""
    return [Header(entry.width, entry.height, 1, 1) for entry in entries]


def memory():
    """Resident set, and the process's proportional share of it, in MB."""
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()]
    sizes = {words[0]: int(words[1]) / 1e3 for words in lines if len(words) == 3}
    return {"rss": sizes["Rss:"], "pss": sizes["Pss:"]}


def work(root, cache, pipe):
    before = memory()
    ImageFiles.check = unseen
    data = coco.read_dataset(root) if cache is None else open_dataset(root, cache=cache, checked=True)
    pipe.send((time.time(), data.fingerprint))
    # Pages are shared by those who are all there.
    pipe.recv()
    pipe.send((before, memory()))
    pipe.recv()


def start(root, cache, workers):
    """Worker processes that all open the data at once: seconds, and MB that this has added, of each."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(workers)]
    began = time.time()
    processes = [context.Process(target=work, args=(root, cache, theirs)) for _, theirs in pipes]
    for process in processes:
        process.start()
    opened = [ours.recv() for ours, _ in pipes]
    assert len({fingerprint for _, fingerprint in opened}) == 1
    for ours, _ in pipes:
        ours.send(None)
    found = [ours.recv() for ours, _ in pipes]
    for ours, _ in pipes:
        ours.send(None)
    for process in processes:
        process.join()
    return {
        "seconds": max(ended for ended, _ in opened) - began,
        "rss": [after["rss"] for _, after in found],
        "pss": [after["pss"] for _, after in found],
        "before": [before["pss"] for before, _ in found],
    }


def row(way, workers, found):
    each, share = sum(found["rss"]) / workers, sum(found["pss"]) / workers
    return (
        f"| {way} | {workers} | {found['seconds']:.1f} | {each:.0f} | {share:.0f} | {sum(found['rss']):.0f} | "
        f"{sum(found['pss']):.0f} |"
    )


@pytest.mark.benchmark
def test_start_of_workers(benchmark, tmp_path, monkeypatch):
    timed = not benchmark.disabled
    root = write(tmp_path / "data", COCO_SIZE if timed else SMALL_SIZE)
    monkeypatch.setattr(ImageFiles, "check", unseen)
    rows, cache = [], tmp_path / "cache"
    driver = []
    for _ in range(2):
        began = time.monotonic()
        open_dataset(root, cache=cache, checked=False)
        driver.append(time.monotonic() - began)
    for workers in (1, 8) if timed else (2,):
        rows.append(row("the cache", workers, start(root, cache, workers)))
        rows.append(row("JSON in each", workers, start(root, None, workers)))
    benchmark.extra_info.update(driver_first_s=driver[0], driver_second_s=driver[1])
    benchmark.pedantic(start, (root, cache, 1), rounds=1)
    if not timed:
        return
    sizes = {path.name: path.stat().st_size / 1e6 for path in (root / "annotations").iterdir()}
    stored = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / 1e6
    text = f"""# The start of worker processes at COCO's size

{machine_line([machine_info("cpu", COMMAND)])}

`{COMMAND}`

A synthetic set of {COCO_SIZE["train"][0]:,} + {COCO_SIZE["val"][0]:,} images and {COCO_SIZE["train"][1]:,} +
{COCO_SIZE["val"][1]:,} annotations with a polygon of {COORDINATES} coordinates each; instances files of
{sizes["instances_train2017.json"]:.0f} and {sizes["instances_val2017.json"]:.0f} MB, stored columns of {stored:.0f} MB.
There are no pixels, and no image file is looked at. All workers start at once on {os.cpu_count()} cores.

- seconds: from the start of the first process to the last open data set, the start of Python and PyTorch included
- MB: of the whole process, PyTorch included. RSS counts shared pages in every process, PSS divides them among those
  that share them, so the sum of PSS is what the machine has to have

| read from | workers | seconds | RSS MB each | PSS MB each | RSS MB, all | PSS MB, all |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}

The driver, which looks after the files before the workers start: {driver[0]:.1f} s the first time, parsing and storing;
{driver[1]:.1f} s when it finds them stored, of which hashing the instances files and checking every stored byte is
most. To this comes the check of every image file's header, as ever.
"""
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(text)
