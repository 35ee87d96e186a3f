"""A data directory of five small images in COCO layout, made from plain dicts so that a test can spoil any part."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ablations.data.coco import read_dataset
from ablations.data.problems import DataError

# A slice of the real COCO, for the few tests that want one.
REAL = Path(os.environ.get("DYHEAD_COCO", "not set"))
needs_coco = pytest.mark.skipif(
    not (REAL / "annotations").is_dir(), reason="DYHEAD_COCO names no directory in COCO layout"
)

# Sparse ids, out of order, with 0 nowhere: an id taken for an index is found out.
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 90, "name": "bird"}]


def annotation(number: int, image: int, category: int, box: list, **more) -> dict:
    x, y, w, h = box
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": w * h * 0.75,
        "iscrowd": 0,
        "segmentation": [[x, y, x + w, y, x + w, y + h]],
        **more,
    }


def documents() -> dict[str, dict]:
    """Fresh contents of the two instances files."""
    crowd = {"counts": [300, 20], "size": [16, 20]}
    return {
        "train": {
            "info": {"year": 2017},
            "licenses": [],
            "images": [
                {"id": 31, "file_name": "wide.jpg", "width": 20, "height": 16, "license": 1},
                {"id": 12, "file_name": "tall.png", "width": 10, "height": 24},
                {"id": 25, "file_name": "sub/empty.jpg", "width": 18, "height": 18},
            ],
            "annotations": [
                annotation(101, 31, 90, [2.5, 3.0, 10.0, 5.0]),
                annotation(55, 12, 3, [1, 2, 3, 4]),
                annotation(900000031, 31, 7, [0, 0, 20, 16], iscrowd=1, segmentation=crowd),
                annotation(56, 31, 7, [4, 4, 4.5, 11.25]),
            ],
            "categories": [dict(category) for category in CATEGORIES],
        },
        "val": {
            "images": [
                {"id": 8, "file_name": "b.png", "width": 16, "height": 12},
                {"id": 5, "file_name": "a.jpg", "width": 12, "height": 16},
            ],
            "annotations": [annotation(1, 8, 7, [1, 1, 8, 8]), annotation(2, 5, 90, [2, 3, 4, 5])],
            "categories": [dict(category) for category in reversed(CATEGORIES)],
        },
    }


def write(root: Path, contents: dict[str, dict] | None = None) -> Path:
    """Write a data directory, by default a sound one."""
    contents = documents() if contents is None else contents
    generator = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, content in contents.items():
        write_json(root, split, content)
        for image in documents()[split]["images"]:
            path = root / f"{split}2017" / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return root


def json_path(root: Path, split: str = "train") -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


def write_json(root: Path, split: str, content: object) -> None:
    json_path(root, split).write_text(json.dumps(content))


def edited(change: Callable[[dict], object], split: str = "train") -> dict[str, dict]:
    """Both contents after `change` was applied to that of one split."""
    contents = documents()
    change(contents[split])
    return contents


def problem(root, *fragments, split="train", **options):
    """The error that reading ends with; it names the instances file and holds the fragments."""
    with pytest.raises(DataError) as caught:
        read_dataset(root, **options)
    message = str(caught.value)
    assert f"instances_{split}2017.json" in message
    for fragment in fragments:
        assert fragment in message
    return caught.value


def set_in(*path):
    """A change that sets the value at `path[:-1]` to `path[-1]`."""
    *place, last, value = path

    def change(node):
        for step in place:
            node = node[step]
        node[last] = value

    return change
