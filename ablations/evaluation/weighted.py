"""COCO's twelve numbers where each image counts a whole number of times.

Matching does not see weights: it is done once (`ablations.evaluation.matches`), and any number of weightings are
weighted cumulative sums over it. A detection, true or false, and an object count as often as their image; precision is
made monotone and read at 101 recalls as in pycocotools' `accumulate`; a category without an object in the weighted
images leaves the mean. So the numbers are those of a data set in which images are repeated, where detections of one
image and category have different scores: of equal scores the first counts w times, then the second.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ablations.evaluation.evaluate import METRICS
from ablations.evaluation.matches import AREAS, THRESHOLDS, Bools, Floats, Ints, Matches

RECALLS: Floats = np.linspace(0, 1, 101)
# Numbers in a block of replicates: what a core's cache holds.
BLOCK = 1 << 18

Weights = NDArray[np.int32]


def average_precision(matches: Matches, weights: NDArray[np.integer] | None = None) -> dict[str, Floats]:
    """The twelve numbers of `METRICS` in percent, (B,) each, NaN where a slice has no ground truth.

    Args:
        matches: What was found.
        weights: (B, images) how often each image counts, whole numbers from 0; None for once each, B = 1.

    Example:
        >>> import numpy as np
        >>> from ablations.evaluation.matches import match
        >>> box = {"image_id": 7, "category_id": 3, "id": 1, "bbox": [10, 10, 40, 40]}
        >>> truth = {"images": [{"id": 7}], "annotations": [box], "categories": [{"id": 3}]}
        >>> found = {"boxes": [[10, 10, 50, 46]], "scores": [0.9], "labels": [0]}
        >>> average_precision(match(truth, [(7, found)], [3]), np.array([[1], [0]]))["AP"].round()
        array([90., nan])
    """
    weights = image_counts(matches, weights)
    return summary(precisions(matches, weights)) | recalls(matches, weights)


def image_counts(matches: Matches, weights: NDArray[np.integer] | None) -> Weights:
    """Weights (B, images) as int32; once each where none are given.

    Raises:
        ValueError: They are not of this many images, or less than 0.
    """
    if weights is None:
        return np.ones((1, matches.images), np.int32)
    if weights.ndim != 2 or weights.shape[1] != matches.images or (weights < 0).any():
        raise ValueError(f"weights {weights.shape} of {matches.images} images are (B, images), from 0 on")
    return np.ascontiguousarray(weights, dtype=np.int32)


def summary(precision: Floats) -> dict[str, Floats]:
    """The six precisions of `METRICS` from what `precisions` gives."""
    values = (precision[0], precision[0, :1], precision[0, 5:6], *precision[1:])
    return dict(zip(METRICS, (100 * over_categories(value.mean(axis=0)) for value in values), strict=False))


def over_categories(values: Floats) -> Floats:
    """The mean (B,) over the categories (K, B) that have objects; NaN where none has."""
    there = ~np.isnan(values)
    count = there.sum(axis=0)
    return np.where(count > 0, np.where(there, values, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def precisions(matches: Matches, weights: Weights) -> Floats:
    """Average precision (4, 10, K, B), a fraction, by area range, threshold, category and weighting; NaN as above."""
    results = np.full((len(AREAS), len(THRESHOLDS), matches.categories, len(weights)), np.nan)

    def fill(area: int, category: int, positives: Ints) -> None:
        image = matches.image[matches.starts[category] : matches.starts[category + 1]]
        true, counted = matches.of(area, category)
        results[area, :, category] = interpolated(image, true, counted, weights, positives)

    tasks = []
    for area in range(len(AREAS)):
        positives = weighted_objects(matches.objects(area), weights)
        tasks += [(area, category, positives[category]) for category in range(matches.categories)]
    in_threads(fill, tasks)
    return results


def weighted_objects(objects: Floats, weights: Weights) -> Ints:
    """How many objects (K, B) each weighting has, from how many (K, images) there are. Exact: whole numbers."""
    return (objects @ weights.T.astype(np.float64)).astype(np.int64)


def in_threads(call: Callable[..., None], tasks: Iterable[tuple[Any, ...]]) -> None:
    """Call a function with each of the tasks in as many threads as PyTorch has; NumPy lets them run side by side."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(lambda task: call(*task), tasks):
            pass


def interpolated(image: Ints, true: Bools, counted: Bools, weights: Weights, positives: Ints) -> Floats:
    """Average precision (T, B) of one category under image weights; NaN where it has no object.

    Args:
        image: (n,) the image of each detection, by falling score.
        true: (T, n) whether it is right at each threshold.
        counted: (T, n) whether it is right or wrong, not ignored.
        weights: (B, images).
        positives: (B,) the number of objects.
    """
    result = np.zeros((len(true), len(weights)))
    reached, offset = _reached(positives)
    # What is counted at the first threshold is nearly what is counted at the others: only the differences are summed.
    base = counted[0]
    base_image = image[base]
    before = np.cumsum(base)
    levels = []
    for t in range(len(true)):
        right = np.flatnonzero(true[t])
        if len(right):
            changed = np.flatnonzero(counted[t] != base)
            sign = np.where(counted[t, changed], 1, -1).astype(np.int32)
            levels.append(
                (t, image[right], before[right], image[changed], sign, np.searchsorted(changed, right, side="right"))
            )
    if levels:
        step = max(16, BLOCK // max(1, len(base_image)))
        for start in range(0, len(weights), step):
            block = slice(start, start + step)
            part = weights[block]
            total = _sums(part, base_image)
            for t, right_image, place, changed_image, sign, changed_place in levels:
                hits = np.cumsum(np.take(part, right_image, axis=1), axis=1, dtype=np.int64)
                count = np.take(total, place, axis=1)
                if len(sign):
                    count += np.take(_sums(part, changed_image, sign), changed_place, axis=1)
                precision = hits / np.maximum(count, 1)
                precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
                hits += offset[block, None]
                result[t, block] = _area(precision, np.take(reached, hits))
    return np.where(positives > 0, result, np.nan)


def _sums(weights: Weights, image: Ints, sign: NDArray[np.int32] | None = None) -> NDArray[np.int32]:
    """(B, n + 1) the sum of the first 0 ... n weights of a list of images, perhaps signed."""
    sums = np.zeros((len(weights), len(image) + 1), np.int32)
    values = np.take(weights, image, axis=1)
    np.cumsum(values if sign is None else values * sign, axis=1, out=sums[:, 1:])
    return sums


def _area(precision: Floats, reached: Floats) -> Floats:
    """The mean of 101 precisions (B,) where after each hit (B, n) so many of the recalls are reached."""
    return (
        np.einsum("bn,bn->b", precision[:, :-1] - precision[:, 1:], reached[:, :-1]) + precision[:, -1] * reached[:, -1]
    ) / len(RECALLS)


def _reached(positives: Ints) -> tuple[Floats, Ints]:
    """How many of the 101 recalls are reached by so many hits of so many objects.

    Returns:
        A table, and for each weighting where in it the entry of 0 hits stands. The division and the comparison are
        pycocotools', in float64: 35 of 100 do not reach its recall of 0.35.
    """
    counts, inverse = np.unique(positives, return_inverse=True)
    starts = np.cumsum(counts + 1) - (counts + 1)
    hits = np.arange(starts[-1] + counts[-1] + 1) - np.repeat(starts, counts + 1)
    recall = hits / np.repeat(np.maximum(counts, 1), counts + 1)
    return np.searchsorted(RECALLS, recall, side="right").astype(np.float64), starts[inverse]


def recalls(matches: Matches, weights: Weights) -> dict[str, Floats]:
    """The six recalls of `METRICS` in percent, (B,) each."""
    results = {}
    names = METRICS[len(METRICS) // 2 :]
    for name, area, most in zip(names, (0, 0, 0, 1, 2, 3), (1, 10, 100, 100, 100, 100), strict=True):
        hits = np.zeros((matches.categories, matches.images))
        for category in range(matches.categories):
            start, stop = matches.starts[category : category + 2]
            true = matches.of(area, category)[0].sum(axis=0) * (matches.rank[start:stop] < most)
            hits[category] = np.bincount(matches.image[start:stop], true, matches.images)
        positives = weighted_objects(matches.objects(area), weights)
        share = weighted_objects(hits, weights) / np.maximum(positives, 1) / len(THRESHOLDS)
        results[name] = 100 * over_categories(np.where(positives > 0, share, np.nan))
    return results
