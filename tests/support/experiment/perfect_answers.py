"""What a detector without error would answer, and what pycocotools makes of it."""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def perfect(split):
    """For every image of a split, its ordinary boxes with a score of 0.9."""
    return [
        (record.image_id, {"boxes": record.boxes, "scores": np.full(len(record.boxes), 0.9), "labels": record.labels})
        for record in split.images
    ]


def pycocotools_on(path, split) -> list[float | None]:
    """The 12 numbers that pycocotools itself gives the split's ordinary boxes on the file as it stands."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        answers = [
            {"image_id": image, "category_id": split.category_ids[label], "bbox": [x, y, X - x, Y - y], "score": 0.9}
            for image, found in perfect(split)
            for (x, y, X, Y), label in zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True)
        ]
        evaluation = COCOeval(truth, truth.loadRes(answers), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [None if value < 0 else 100 * value for value in evaluation.stats]
