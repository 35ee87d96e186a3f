"""COCO's twelve numbers where each image counts a whole number of times.

Matching does not see weights: it is done once (`ablations.evaluation.matches`), and any number of weightings are
weighted cumulative sums over it. A detection, true or false, and an object count as often as their image; precision is
made monotone and read at 101 recalls as in pycocotools' `accumulate`; a category without an object in the weighted
images leaves the mean. So the numbers are those of a data set in which images are repeated, where detections of one
image and category have different scores: of equal scores the first counts w times, then the second.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch.nn.functional import embedding_bag

from ablations.evaluation.evaluate import METRICS
from ablations.evaluation.matches import AREAS, THRESHOLDS, Bools, Floats, Ints, Matches

RECALLS: Floats = np.linspace(0, 1, 101)
# Weightings that are worked on together: rows long enough for NumPy, arrays that do not fill the memory.
BLOCK = 512

# (images, B) of a block of weightings, whole numbers. Sums of them are exact, below 2^24 in float32.
Weights = NDArray[np.floating[Any]]


def average_precision(matches: Matches, weights: NDArray[np.integer] | None = None) -> dict[str, Floats]:
    """The twelve numbers of `METRICS` in percent, (B,) each, NaN where a slice has no ground truth.

    Args:
        matches: What was found.
        weights: (B, images) how often each image counts, whole numbers from 0; None for once each, B = 1.

    Raises:
        ValueError: The weights are of another number of images, or less than 0.

    Example:
        >>> import numpy as np
        >>> from ablations.evaluation.matches import match
        >>> box = {"image_id": 7, "category_id": 3, "id": 1, "bbox": [10, 10, 40, 40]}
        >>> truth = {"images": [{"id": 7}], "annotations": [box], "categories": [{"id": 3}]}
        >>> found = {"boxes": [[10, 10, 50, 46]], "scores": [0.9], "labels": [0]}
        >>> average_precision(match(truth, [(7, found)], [3]), np.array([[1], [0]]))["AP"].round()
        array([90., nan])
    """
    blocks = in_blocks(matches, np.ones((1, matches.images), int) if weights is None else weights, np.float64)
    return summary(precisions(matches, blocks)) | recalls(matches, blocks)


def in_blocks(matches: Matches, weights: NDArray[np.integer], dtype: DTypeLike) -> list[Weights]:
    """Weights (B, images) as blocks (images, up to 512); precisions come in their type.

    Raises:
        ValueError: They are of another number of images, or less than 0.
    """
    if weights.ndim != 2 or weights.shape[1] != matches.images or (weights < 0).any():
        raise ValueError(f"weights {weights.shape} of {matches.images} images are (B, images), from 0 on")
    return [np.ascontiguousarray(weights[i : i + BLOCK].T, dtype=dtype) for i in range(0, len(weights), BLOCK)]


def summary(precision: Floats) -> dict[str, Floats]:
    """The six precisions of `METRICS` from what `precisions` gives."""
    values = (precision[0], precision[0, :1], precision[0, 5:6], *precision[1:])
    return dict(zip(METRICS, (100 * over_categories(value.mean(axis=0)) for value in values), strict=False))


def over_categories(values: Floats) -> Floats:
    """The mean (B,) over the categories (K, B) that have objects; NaN where none has."""
    there = ~np.isnan(values)
    count = there.sum(axis=0)
    return np.where(count > 0, np.where(there, values, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def precisions(matches: Matches, weights: Sequence[Weights]) -> Floats:
    """Average precision (4, 10, K, B), a fraction, by area range, threshold, category and weighting; NaN as above."""
    results = np.full((len(AREAS), len(THRESHOLDS), matches.categories, sum(w.shape[1] for w in weights)), np.nan)

    def fill(area: int, category: int, positives: Ints) -> None:
        image = matches.image[matches.starts[category] : matches.starts[category + 1]]
        results[area, :, category] = interpolated(image, *matches.of(area, category), weights, positives)

    tasks = []
    for area in range(len(AREAS)):
        positives = weighted_objects(matches.objects(area), weights)
        tasks += [(area, category, positives[category]) for category in range(matches.categories)]
    in_threads(fill, tasks)
    return results


def weighted_objects(objects: Floats, weights: Sequence[Weights]) -> Ints:
    """How many objects (K, B) each weighting has, from how many (K, images) there are. Exact: whole numbers."""
    return np.concatenate([objects.astype(block.dtype) @ block for block in weights], axis=1).astype(np.int64)


def in_threads(call: Callable[..., None], tasks: Iterable[tuple[Any, ...]]) -> None:
    """Call a function with each of the tasks in as many threads as PyTorch has; NumPy lets them run side by side."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(lambda task: call(*task), tasks):
            pass


def interpolated(image: Ints, true: Bools, counted: Bools, weights: Sequence[Weights], positives: Ints) -> Floats:
    """Average precision (T, B) of one category under image weights; NaN where it has no object.

    Args:
        image: (n,) the image of each detection, by falling score.
        true: (T, n) whether it is right at each threshold.
        counted: (T, n) whether it is right or wrong, not ignored.
        weights: Blocks (images, b), B in all.
        positives: (B,) the number of objects.
    """
    result = np.zeros((len(true), len(positives)))
    # What is counted at the first threshold is nearly what is counted at the others: only differences are summed for
    # each; and precision is needed only where a detection is right.
    base = counted[0]
    marks = np.flatnonzero(true.any(axis=0))
    levels = []
    for t in range(len(true)):
        right = np.flatnonzero(true[t])
        if len(right):
            changed = np.flatnonzero(counted[t] != base)
            sign = np.where(counted[t, changed], 1, -1)[:, None]
            after = np.searchsorted(changed, right, side="right")
            levels.append((t, image[right], np.searchsorted(marks, right), image[changed], sign, after))
    if not levels:
        return np.where(positives > 0, result, np.nan)
    ends = np.cumsum(base)[marks]
    summed = torch.from_numpy(image[base][: ends[-1]])
    bags = torch.from_numpy(np.concatenate([[0], ends[:-1]]))
    reached, offset = _reached(positives)
    stop = 0
    for block in weights:
        here = slice(stop, stop := stop + block.shape[1])
        total = _scan(np.add, embedding_bag(summed, torch.from_numpy(block), bags, mode="sum").numpy())
        for t, right, mark, changed, sign, after in levels:
            hits = _scan(np.add, block[right])
            count = total[mark]
            if len(changed):
                change = _scan(np.add, block[changed] * sign.astype(block.dtype))
                count += np.where(after[:, None] > 0, change[after - 1], 0)
            precision = hits / np.maximum(count, 1, out=count)
            _scan(np.maximum, precision[::-1])
            steps = np.take(reached, np.add(hits, offset[here], dtype=np.int64, casting="unsafe"))
            steps[1:] -= steps[:-1].copy()
            result[t, here] = np.einsum("nb,nb->b", precision, steps) / len(RECALLS)
    return np.where(positives > 0, result, np.nan)


def _scan(operation: np.ufunc, rows: Weights) -> Weights:
    """Running sums or maxima down the rows of an array (n, B), in place.

    `accumulate` walks one column after the other. Long rows are faster row by row: all chunks of rows at once, then
    each chunk with the end of the one before.
    """
    count, width = rows.shape
    if width < BLOCK // 4:
        return operation.accumulate(rows, axis=0, out=rows)
    size = math.isqrt(count)
    whole = count - count % max(size, 1)
    chunks = rows[:whole].reshape(-1, max(size, 1), width)
    for i in range(1, size):
        operation(chunks[:, i - 1], chunks[:, i], out=chunks[:, i])
    for i in range(1, len(chunks)):
        operation(chunks[i - 1, -1], chunks[i], out=chunks[i])
    for i in range(whole, count):
        operation(rows[i - 1], rows[i], out=rows[i])
    return rows


def _reached(positives: Ints) -> tuple[NDArray[np.float32], Ints]:
    """How many of the 101 recalls are reached by so many hits of so many objects.

    Returns:
        A table, and for each weighting where in it the entry of 0 hits stands. The division and the comparison are
        pycocotools', in float64: 35 of 100 do not reach its recall of 0.35.
    """
    counts, inverse = np.unique(positives, return_inverse=True)
    starts = np.cumsum(counts + 1) - (counts + 1)
    hits = np.arange(starts[-1] + counts[-1] + 1) - np.repeat(starts, counts + 1)
    recall = hits / np.repeat(np.maximum(counts, 1), counts + 1)
    return np.searchsorted(RECALLS, recall, side="right").astype(np.float32), starts[inverse]


def recalls(matches: Matches, weights: Sequence[Weights]) -> dict[str, Floats]:
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
