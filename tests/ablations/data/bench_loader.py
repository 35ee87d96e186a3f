"""Images a second of the training loader at 800x1333, by threads and by processes, beside what a GPU takes.

DYHEAD_COCO=DIR pytest tests/ablations/data/bench_loader.py --benchmark-only

With the flag it writes results/loader/images.md. DYHEAD_COCO names a directory in COCO layout; without it, images of
640x480 pixels are made.
"""

import json
import multiprocessing
import os
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_coco import CATEGORIES, REAL, annotation, write_json

from ablations.cost.gpus import DEFAULT
from ablations.data.coco import read_image, read_split
from ablations.data.loader import Loader, resized
from ablations.experiment.measure import count_gmacs
from ablations.rows.machine import machine_info, machine_line
from heads.build import build_detector

RESULT = Path(__file__).parents[3] / "results" / "loader" / "images.md"
COMMAND = "DYHEAD_COCO=DIR pytest tests/ablations/data/bench_loader.py --benchmark-only"
SHORT_SIDE, MAX_SIZE, BATCH = 800, 1333, 16
# Floating point operations a second of an H100, and the shares of them that training may reach.
H100, SHARES = DEFAULT.peak("bf16"), (0.2, 0.4)


def typical(root, count):
    """Images of COCO's typical size: smooth shapes under a little noise, about 100 kB of JPEG each."""
    rng = np.random.default_rng(0)
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, annotations = [], []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
        pixels = np.asarray(coarse).astype(np.int16) + rng.integers(-12, 13, (480, 640, 3))
        name = f"{number}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "train2017" / name, quality=90)
        images.append({"id": number, "file_name": name, "width": 640, "height": 480})
        annotations.append(annotation(number, number, 7, [10, 20, 100, 50]))
    write_json(root, "train", {"images": images, "annotations": annotations, "categories": CATEGORIES})
    return root


def loaded(root, threads, batch, batches, seed=0):
    """Images a second, of a loader that is running already."""
    loader = Loader(read_split(root, "train"), batch, seed, (SHORT_SIDE,), MAX_SIZE, threads=threads, cache_bytes=0)
    with closing(loader):
        loader.batch(0)
        began = time.perf_counter()
        for step in range(1, batches + 1):
            loader.batch(step)
        return batch * batches / (time.perf_counter() - began)


def worker(root, batch, batches, seed, start, rates):
    start.wait()
    rates.put(loaded(root, 0, batch, batches, seed))


def in_processes(root, processes, batch, batches):
    """Images a second of this many processes together, each with a loader of its own without threads."""
    context = multiprocessing.get_context("spawn")
    start, rates = context.Barrier(processes), context.Queue()
    running = [
        context.Process(target=worker, args=(root, batch, batches, seed, start, rates)) for seed in range(processes)
    ]
    for process in running:
        process.start()
    total = sum(rates.get() for _ in running)
    for process in running:
        process.join()
    return total


def held_share(make, images):
    """The share of an image's time in which the making thread holds the GIL, at least 0.

    Another thread runs Python whenever the GIL is free, and is told by its CPU time how long that was. Where it does
    not get a core of its own, the share comes out too large.
    """
    stop, spent = threading.Event(), []

    def run():
        began = time.thread_time()
        while not stop.is_set():
            pass
        spent.append(time.thread_time() - began)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        thread = threading.Thread(target=run)
        began = time.perf_counter()
        thread.start()
        for number in range(images):
            make(number)
        wall = time.perf_counter() - began
        stop.set()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    return max(0.0, 1 - spent[0] / wall)


def stages(split, images):
    """CPU milliseconds an image of what the loader does: decode, resize, and the copy with channels first."""
    spent = dict.fromkeys(("decode", "resize", "channels first, mirrored"), 0.0)
    for record in [split.images[number % len(split.images)] for number in range(images)]:
        times = [time.thread_time()]
        pixels = read_image(record)
        times.append(time.thread_time())
        size = resized(record.width, record.height, SHORT_SIDE, MAX_SIZE)
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
        times.append(time.thread_time())
        np.copyto(np.empty((3, size[1], size[0]), np.uint8), pixels.transpose(2, 0, 1)[..., ::-1])
        times.append(time.thread_time())
        for name, seconds in zip(spent, np.diff(times), strict=True):
            spent[name] += 1e3 * seconds / images
    return spent


def needs():
    """GMACs an image of ATSS with ResNet-50 and its own towers; images a second that each share of an H100 takes."""
    with torch.device("meta"):
        model = build_detector("atss", backbone="resnet50", attentions=None)
    gmacs = count_gmacs(model, [torch.empty(3, 800, 1344, device="meta")])
    return gmacs, [share * H100 / (3 * 2 * 1e9 * gmacs) for share in SHARES]


def test_images_a_second(benchmark, tmp_path):
    timed = not benchmark.disabled
    real = (REAL / "annotations").is_dir()
    sets = {"640x480": typical(tmp_path / "typical", 32 if timed else 3)}
    if real and timed:
        sets["COCO"] = REAL
    batch, batches = (4, 10) if timed else (1, 1)
    cores = os.cpu_count() if timed else 1
    found = []
    for name, root in sets.items():
        split = read_split(root, "train")
        loader = Loader(split, 1, 0, (SHORT_SIDE,), MAX_SIZE, cache_bytes=0)
        loader.batch(0)
        found.append(
            {
                "set": name,
                "threads": {n: loaded(root, n, batch, batches) for n in range(1, cores + 1)},
                "processes": {n: in_processes(root, n, batch, batches) for n in (range(1, cores + 1) if timed else ())},
                "stages": stages(split, 40 if timed else 1),
                # Whatever else runs can only add to it.
                "held": min(held_share(loader.batch, 8 if timed else 1) for _ in range(8 if timed else 1)),
            }
        )
    benchmark.extra_info["found"] = json.dumps(found)
    benchmark.pedantic(loaded, (sets["640x480"], 0, batch, 1), rounds=1)
    assert all(rate > 0 for entry in found for rate in entry["threads"].values())
    if timed:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(report(found))


def report(found):
    gmacs, taken = needs()
    rates = [
        f"| {entry['set']} | {way} | {number} | {rate:.0f} |"
        for entry in found
        for way in ("threads", "processes")
        for number, rate in entry[way].items()
    ]
    parts = [
        f"| {entry['set']} | {' | '.join(f'{ms:.1f}' for ms in entry['stages'].values())} | "
        f"{sum(entry['stages'].values()):.1f} | {100 * entry['held']:.0f} % | "
        f"{1 / entry['held'] if entry['held'] else float('inf'):.1f} |"
        for entry in found
    ]
    wanted = [f"| {100 * share:.0f} % | {rate:.0f} |" for share, rate in zip(SHARES, taken, strict=True)]
    return f"""# Images a second of the training loader

{machine_line([machine_info("cpu", COMMAND)])}

`{COMMAND}`

Images are decoded, brought to {SHORT_SIDE} pixels of the shorter and at most {MAX_SIZE} of the longer side, half of
them mirrored, and kept nowhere. When this was measured {os.getloadavg()[0]:.1f} processes wanted the {os.cpu_count()}
cores, this one among them: where that is more than there are cores, the images a second decide nothing.
"640x480" are JPEGs made for this, "COCO" is a slice of the real one.

| images | run by | number | images/s |
| --- | --- | ---: | ---: |
{chr(10).join(rates)}

## Where the time of an image goes

Milliseconds of CPU time of one thread, and the share of an image's time in which it holds Python's global lock, as a
second thread finds it: the least of eight trials.
So many threads at most can be busy at once, however many cores there are; the share is an upper bound where
the second thread does not have a core of its own, and with it the number of threads a lower one.

| images | {" | ".join(found[0]["stages"])} | all | holds the lock | threads at most |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(parts)}

## What a GPU takes: computed, not measured

ATSS with ResNet-50 and its own towers has {gmacs:.0f} GMACs an image of 800 x 1344. Forward and backward count as
three forward passes, a multiply-add as two operations, against {H100 / 1e12:.0f} TFLOP/s of dense bf16 of an H100. The
batch of {BATCH} only decides what share of that a step reaches, which is not known here.

| share of the peak | images/s |
| ---: | ---: |
{chr(10).join(wanted)}
"""
