"""Ground truth and detections for tests of evaluation, random and by hand, and pycocotools' own numbers."""

import contextlib
import copy
import io
import os
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from places import ROOT
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

PLACES = [os.environ.get("DYHEAD_COCOEVAL"), ROOT.parent / "shared" / "cocoeval"]
COCOEVAL = next((Path(place) for place in PLACES if place and Path(place).is_dir()), None)
needs_cocoeval = pytest.mark.skipif(
    COCOEVAL is None, reason="COCO API's example is not here; DYHEAD_COCOEVAL may name the folder that has it"
)


def truth(boxes, *, images=1, categories=(1,), **fields):
    """An instances dict; `boxes` holds (image_id, category_id, x, y, w, h) and perhaps a dict of changes."""
    annotations = []
    for number, (image, category, *box) in enumerate(boxes, 1):
        changes = box.pop() if isinstance(box[-1], dict) else {}
        area = box[2] * box[3]
        annotation = {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": 0}
        annotations.append(annotation | fields | changes)
    return {
        "images": [{"id": number, "width": 200, "height": 200} for number in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": category, "name": str(category)} for category in categories],
    }


def found(*detections):
    """Detections of one image from (x1, y1, x2, y2, score, label)."""
    table = torch.tensor(detections, dtype=torch.float32).reshape(-1, 6)
    return {"boxes": table[:, :4], "scores": table[:, 4], "labels": table[:, 5].long()}


def random_scene(seed, images=12, categories=3, detections=40, ties=True):
    """Crowded images with crowds, equal boxes and objects of all three sizes.

    Scores are equal within images and between them; without `ties` between them alone.
    """
    rng = np.random.default_rng(seed)
    boxes, predictions = [], []
    for image in range(1, images + 1):
        count = int(rng.integers(0, 9))
        corner, size = rng.integers(0, 120, (count, 2)), rng.choice([8, 20, 40, 100, 120], (count, 2))
        kinds = rng.integers(0, categories, count)
        for (x, y), (w, h), kind in zip(corner.tolist(), size.tolist(), kinds.tolist(), strict=True):
            boxes.append((image, kind + 1, x, y, w, h, {"iscrowd": int(rng.random() < 0.15)}))
            if rng.random() < 0.2:
                boxes.append((image, kind + 1, x, y, w, h))
        rows = np.zeros((0, 6))
        if count and image % 5:
            source = rng.integers(0, count, detections)
            near = np.concatenate([corner, corner + size], axis=1)[source] + rng.integers(-4, 5, (detections, 4))
            near[:, 2:] = np.maximum(near[:, 2:], near[:, :2])
            label = np.where(rng.random(detections) < 0.7, kinds[source], rng.integers(0, categories, detections))
            score = rng.integers(1, 8, detections) / 8 if ties else rng.permutation(detections) / 256 + 0.125
            rows = np.column_stack([near, score, label])
        predictions.append((image, found(*rows.tolist())))
    return truth(boxes, images=images, categories=range(1, categories + 1)), predictions


def repeated(ground, predictions, weights):
    """A data set in which each image, with what is on it and was found on it, is there as often as it weighs."""
    copies, found = {"images": [], "annotations": [], "categories": ground["categories"]}, []
    by_id = {image: list(group) for image, group in groupby(ground["annotations"], lambda entry: entry["image_id"])}
    for (image, detections), weight in zip(predictions, weights, strict=True):
        for _ in range(weight):
            number = len(copies["images"]) + 1
            copies["images"].append({"id": number, "width": 200, "height": 200})
            for entry in by_id.get(image, ()):
                copies["annotations"].append({**entry, "id": len(copies["annotations"]) + 1, "image_id": number})
            found.append((number, detections))
    return copies, found


def by_pycocotools(ground, predictions, kind="bbox"):
    """The 12 numbers of pycocotools itself, -1 included."""
    results = [
        {"image_id": image, "category_id": int(label) + 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for image, detections in predictions
        for (x1, y1, x2, y2), score, label in zip(
            detections["boxes"].tolist(), detections["scores"].tolist(), detections["labels"].tolist(), strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(ground)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [None if value < 0 else 100 * value for value in evaluation.stats]
