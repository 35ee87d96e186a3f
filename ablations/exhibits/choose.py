"""Which images an exhibit shows: a rule, not a taste."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = 100

Box = Mapping[str, Any]
ByImage = dict[int | str, list[Box]]


class Change(NamedTuple):
    """An image and its AP, in percent, without and with DyHead."""

    image_id: int | str
    before: float
    after: float


def by_image(boxes: Iterable[Box]) -> ByImage:
    """Annotations or detections in COCO's layout, by their `image_id`."""
    groups: ByImage = defaultdict(list)
    for box in boxes:
        groups[box["image_id"]].append(box)
    return groups


def changes(truth: ByImage, before: ByImage, after: ByImage) -> list[Change]:
    """Every image's own AP, the largest rise first; images without objects have none, equal changes keep their order.

    Args:
        truth: Annotations.
        before, after: Detections without and with DyHead.
    """
    found = []
    for image, objects in truth.items():
        values = [image_ap(objects, boxes.get(image, [])) for boxes in (before, after)]
        if values[0] is not None and values[1] is not None:
            found.append(Change(image, values[0], values[1]))
    return sorted(found, key=lambda change: change.before - change.after)


def extremes(ordered: Sequence[Change], each: int) -> list[Change]:
    """The largest rises, then the largest falls, of either at most `each`; an image that does not change is neither."""
    rises = [change for change in ordered if change.after > change.before]
    falls = [change for change in reversed(ordered) if change.after < change.before]
    return rises[:each] + falls[:each]


def image_ap(truth: Sequence[Box], found: Sequence[Box]) -> float | None:
    """COCO's AP of one image alone, in percent: the mean over its categories and IoU 0.50:0.95; None without objects.

    Detections of categories that the image does not show do not count, as in COCO's mean over categories.
    """
    values = []
    for category in sorted({box["category_id"] for box in truth if not box.get("iscrowd")}):
        objects = [box for box in truth if box["category_id"] == category]
        ranked = sorted(
            (box for box in found if box["category_id"] == category), key=lambda box: box["score"], reverse=True
        )
        values.append(_category_ap(objects, ranked[:MOST]))
    return 100 * float(np.mean(values)) if values else None


def _category_ap(objects: list[Box], ranked: list[Box]) -> float:
    objects = sorted(objects, key=lambda box: bool(box.get("iscrowd")))
    crowd = np.array([bool(box.get("iscrowd")) for box in objects])
    overlaps = overlap(ranked, objects)
    total = 0.0
    for threshold in THRESHOLDS:
        taken = np.zeros(len(objects), bool)
        right = []
        for row in overlaps:
            free = (row >= min(threshold, 1 - 1e-10)) & (crowd | ~taken)
            if (free & ~crowd).any():
                # Of equal overlaps the last counts, as in pycocotools.
                best = len(row) - 1 - int(np.argmax(np.where(free & ~crowd, row, -1.0)[::-1]))
                taken[best] = True
                right.append(True)
            elif not free.any():
                right.append(False)
        total += _interpolated(np.array(right, bool), int((~crowd).sum()))
    return total / len(THRESHOLDS)


def _interpolated(right: NDArray[np.bool_], objects: int) -> float:
    """The 101-point average precision of a ranking."""
    hits = np.cumsum(right)
    recall = hits / objects
    precision = np.maximum.accumulate((hits / (np.arange(len(right)) + 1))[::-1])[::-1]
    reached = np.searchsorted(recall, RECALLS)
    return float(np.append(precision, 0.0)[np.minimum(reached, len(right))].mean())


def overlap(found: Sequence[Box], objects: Sequence[Box]) -> NDArray[np.float64]:
    """IoU (n, m) of boxes in COCO's layout; of a crowd region the share of the found box that lies in it."""
    a = np.array([box["bbox"] for box in found], dtype=np.float64).reshape(-1, 1, 4)
    b = np.array([box["bbox"] for box in objects], dtype=np.float64).reshape(1, -1, 4)
    crowd = np.array([bool(box.get("iscrowd")) for box in objects])
    size = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = size.clip(0).prod(-1)
    area, other = a[..., 2:].prod(-1), b[..., 2:].prod(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(shared / np.where(crowd, area, area + other - shared))
