"""Which detection found which object: pycocotools' own decisions, for all images and categories at once.

pycocotools walks images, categories, area ranges, thresholds, detections and objects in Python. Here the pairs of a
detection and an object that overlap enough are formed once; then the first such detections of all images and categories
take their objects together, then the second ones, and so on, for all area ranges and thresholds at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ablations.evaluation.detections import Id, Predictions, columns
from ablations.evaluation.evaluate import numbered

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Those of `pycocotools.cocoeval.Params`, with its arithmetic.
THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
AREAS = ("all", "small", "medium", "large")
RANGES: Floats = np.array([[0, 1e5**2], [0, 32**2], [32**2, 96**2], [96**2, 1e5**2]])
MOST_DETECTIONS = 100
# Pairs of a detection and an object that are looked at in one go; bounds the memory.
PAIRS = 1_000_000


class Nearest(NamedTuple):
    """For each of N detections its largest IoU with an object that is no crowd, and that object, -1 where none."""

    overlap: Floats
    object: Ints


@dataclass(frozen=True, eq=False)
class Matches:
    """The detections that count, at most 100 an image and category, and the objects that they found.

    Attributes:
        images, categories: How many there are; images are numbered in the order of their ids, categories as labels.
        object_image, object_category: (G,) of each annotation.
        ignored: (4, G) whether an annotation is a crowd or outside of the area range.
        image, rank, score: (N,) of each detection: its image, its place by score within image and category from 0, and
            its score. Detections are in order of category, then of falling score, then of image.
        category: (N,), and `starts` (categories + 1,) where each category begins.
        outside: (4, N) whether the detection's own area is outside of the range.
        candidates: (C,) the detections that overlap an annotation of their category by IoU 0.5 or more.
        matched: (4, 10, C) for area ranges and thresholds the annotation that each candidate was given to, or -1.
        same, other: The objects nearest to each detection, of its category and of all others.
    """

    images: int
    categories: int
    object_image: Ints
    object_category: Ints
    ignored: Bools
    image: Ints
    rank: Ints
    score: Floats
    category: Ints
    starts: Ints
    outside: Bools
    candidates: Ints
    matched: NDArray[np.int32]
    same: Nearest
    other: Nearest

    def of(self, area: int, category: int) -> tuple[Bools, Bools]:
        """True and counted detections of a category in an area range: two of shape (10, n), by falling score.

        A detection that is counted and not true is false; one that is not counted is neither.
        """
        start, stop = self.starts[category : category + 2]
        first, last = np.searchsorted(self.candidates, (start, stop))
        matched = self.matched[area, :, first:last]
        place = self.candidates[first:last] - start
        counted = np.repeat(~self.outside[area, None, start:stop], len(THRESHOLDS), axis=0)
        right = (matched >= 0) & ~self.ignored[area, matched]
        true = np.zeros_like(counted)
        true[:, place] = right
        counted[:, place] = np.where(matched >= 0, right, counted[:, place])
        return true, counted

    def objects(self, area: int) -> Floats:
        """(categories, images) how many objects there are to be found in an area range."""
        counts = np.zeros((self.categories, self.images))
        kept = ~self.ignored[area]
        np.add.at(counts, (self.object_category[kept], self.object_image[kept]), 1)
        return counts


class _Boxes(NamedTuple):
    """Boxes (n, 4) xywh with the number of their image and their category, by rising image."""

    image: Ints
    category: Ints
    bbox: Floats


def match(ground_truth: Mapping[str, Any], detections: Predictions, category_ids: Sequence[Id]) -> Matches:
    """Match detections to annotations as pycocotools' `COCOeval.evaluateImg` does, decision for decision.

    Args:
        ground_truth: An instances file in COCO's layout, as for `ablations.evaluation.evaluate.evaluate`.
        detections: One `(image_id, detections)` for every image.
        category_ids: The category id of each label; only these categories are evaluated.

    Raises:
        ValueError: A score, box or label cannot be; the message names the image.
    """
    numbers = {image: n - 1 for image, n in numbered("image", (i["id"] for i in ground_truth["images"])).items()}
    objects, crowd, areas = _objects(ground_truth, numbers, category_ids)
    ignored = crowd | (areas < RANGES[:, :1]) | (areas > RANGES[:, 1:])
    found, rank, score = _found(detections, numbers, len(category_ids))
    sizes = found.bbox[:, 2] * found.bbox[:, 3]

    # Nearest objects and the pairs that may match, in the order of images.
    by_image = np.argsort(found.image, kind="stable")
    parts = list(_pairs(_Boxes(found.image[by_image], found.category[by_image], found.bbox[by_image]), objects, crowd))
    detection, object_, overlap = (np.concatenate(column) for column in zip(*parts, strict=True))
    detection = by_image[detection]
    own = found.category[detection] == objects.category[object_]
    real = ~crowd[object_]
    same, other = (_nearest(len(score), detection, object_, overlap, which & real) for which in (own, ~own))
    close = np.flatnonzero(own & (overlap >= THRESHOLDS[0]))
    candidates, matched = _assign(found, rank, detection[close], object_[close], overlap[close], ignored, crowd)
    return Matches(
        images=len(numbers),
        categories=len(category_ids),
        object_image=objects.image,
        object_category=objects.category,
        ignored=ignored,
        image=found.image,
        rank=rank,
        score=score,
        category=found.category,
        starts=np.searchsorted(found.category, np.arange(len(category_ids) + 1)),
        outside=(sizes < RANGES[:, :1]) | (sizes > RANGES[:, 1:]),
        candidates=candidates,
        matched=matched,
        same=same,
        other=other,
    )


def _objects(
    ground_truth: Mapping[str, Any], numbers: Mapping[Id, int], category_ids: Sequence[Id]
) -> tuple[_Boxes, Bools, Floats]:
    """The annotations of the evaluated categories by image, which of them are crowds, and their areas."""
    labels = {category: label for label, category in enumerate(category_ids)}
    entries = sorted(
        (entry for entry in ground_truth["annotations"] if entry["category_id"] in labels),
        key=lambda entry: numbers[entry["image_id"]],
    )
    bbox = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
    boxes = _Boxes(
        np.array([numbers[entry["image_id"]] for entry in entries], dtype=np.int64),
        np.array([labels[entry["category_id"]] for entry in entries], dtype=np.int64),
        bbox,
    )
    given = [entry.get("area") for entry in entries]
    areas = [w * h if area is None else area for area, (w, h) in zip(given, bbox[:, 2:].tolist(), strict=True)]
    crowd = np.array([bool(entry.get("iscrowd")) for entry in entries], dtype=bool)
    return boxes, crowd, np.array(areas, dtype=np.float64)


def _found(detections: Predictions, numbers: Mapping[Id, int], categories: int) -> tuple[_Boxes, Ints, Floats]:
    """The detections that count in the order of `Matches`, their ranks and their scores."""
    checked = {}
    for image_id, found in detections:
        image_id = image_id.item() if hasattr(image_id, "item") else image_id
        checked[numbers[image_id]] = columns(image_id, found, categories)
    images = sorted(checked)
    sizes = [len(checked[image].scores) for image in images]
    image = np.repeat(np.array(images, dtype=np.int64), sizes)
    bbox = np.concatenate([checked[image].bbox for image in images] or [np.zeros((0, 4))])
    score = np.concatenate([checked[image].scores for image in images] or [np.zeros(0)])
    label = np.concatenate([checked[image].labels for image in images] or [np.zeros(0, np.int64)])

    order = np.lexsort((-score, image, label))
    group = label[order] * len(numbers) + image[order]
    first = np.flatnonzero(np.diff(group, prepend=-1))
    rank = np.arange(len(group)) - np.repeat(first, np.diff(first, append=len(group)))
    order, rank = order[rank < MOST_DETECTIONS], rank[rank < MOST_DETECTIONS]
    # Stable: equal scores stay in the order of their images.
    by_score = np.lexsort((-score[order], label[order]))
    order, rank = order[by_score], rank[by_score]
    return _Boxes(image[order], label[order], bbox[order]), rank, score[order]


def _pairs(found: _Boxes, objects: _Boxes, crowd: Bools) -> Iterator[tuple[Ints, Ints, Floats]]:
    """Detection, annotation and IoU of the pairs within an image that overlap, by detection, then by annotation.

    The arithmetic is that of `bbIou` in pycocotools' maskApi.c: with a crowd, the union is the detection.
    """
    starts = np.searchsorted(objects.image, found.image)
    counts = np.searchsorted(objects.image, found.image, side="right") - starts
    pairs = np.cumsum(counts)
    cuts = np.searchsorted(pairs, np.arange(PAIRS, pairs[-1] if len(pairs) else 0, PAIRS))
    bounds = [0, *np.unique(cuts).tolist(), len(counts)]
    x2, y2 = (objects.bbox[:, :2] + objects.bbox[:, 2:]).T
    sizes = objects.bbox[:, 2] * objects.bbox[:, 3]
    for start, stop in pairwise(bounds):
        count = counts[start:stop]
        d = np.repeat(np.arange(start, stop), count)
        g = np.arange(len(d)) + np.repeat(starts[start:stop] - (np.cumsum(count) - count), count)
        dx, dy, dw, dh = found.bbox[start:stop].T
        d -= start
        width = np.minimum((dw + dx)[d], x2[g]) - np.maximum(dx[d], objects.bbox[g, 0])
        kept = np.flatnonzero(width > 0)
        d, g, width = d[kept], g[kept], width[kept]
        height = np.minimum((dh + dy)[d], y2[g]) - np.maximum(dy[d], objects.bbox[g, 1])
        kept = np.flatnonzero(height > 0)
        d, g, area = d[kept], g[kept], width[kept] * height[kept]
        own = (dw * dh)[d]
        yield d + start, g, area / np.where(crowd[g], own, own + sizes[g] - area)


def _nearest(count: int, detection: Ints, object_: Ints, overlap: Floats, which: Bools) -> Nearest:
    """The first of the largest overlaps of each detection among the pairs that `which` selects."""
    chosen = np.flatnonzero(which)
    order = chosen[np.lexsort((-overlap[chosen], detection[chosen]))]
    order = order[np.diff(detection[order], prepend=-1) != 0]
    nearest = Nearest(np.zeros(count), np.full(count, -1))
    nearest.overlap[detection[order]] = overlap[order]
    nearest.object[detection[order]] = object_[order]
    return nearest


def _assign(
    found: _Boxes, rank: Ints, detection: Ints, object_: Ints, overlap: Floats, ignored: Bools, crowd: Bools
) -> tuple[Ints, NDArray[np.int32]]:
    """`candidates` and `matched` of `Matches` from the pairs of one category with an IoU of 0.5 or more."""
    candidates = np.unique(detection)
    # A candidate's turn is its place among those of its image and category.
    group = found.category[candidates] * (found.image.max(initial=0) + 1) + found.image[candidates]
    order = np.lexsort((rank[candidates], group))
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    turn = np.empty(len(candidates), np.int64)
    turn[order] = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))

    # Of equal overlaps the last annotation is taken, as in pycocotools' loop.
    place = np.searchsorted(candidates, detection)
    order = np.lexsort((-object_, -overlap, place, turn[place]))
    place, object_, overlap = place[order], object_[order], overlap[order]
    ends = np.searchsorted(turn[place], np.arange(turn.max(initial=-1) + 2))

    thresholds = np.minimum(THRESHOLDS, 1 - 1e-10)
    free = np.ones((len(RANGES), len(THRESHOLDS), len(crowd)), dtype=bool)
    matched = np.full((len(RANGES), len(THRESHOLDS), len(candidates)), -1, dtype=np.int32)
    for start, stop in pairwise(ends.tolist()):
        here, g = place[start:stop], object_[start:stop]
        count = stop - start
        segment = np.flatnonzero(np.diff(here, prepend=-1))
        # The first of each candidate's pairs that can be had; an ignored annotation only where no counted one is left.
        cost = np.arange(count) + count * ignored[:, None, g]
        possible = free[:, :, g] & (overlap[start:stop] >= thresholds[:, None])
        best = np.minimum.reduceat(np.where(possible, cost, 2 * count), segment, axis=-1)
        a, t, s = np.nonzero(best < 2 * count)
        taken = g[best[a, t, s] % count]
        matched[a, t, here[segment][s]] = taken
        # Any number of detections may lie on a crowd.
        free[a, t, taken] = crowd[taken]
    return candidates, matched
