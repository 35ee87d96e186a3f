"""COCO's `segmentation` values: polygons kept as compact arrays, run lengths checked before C code reads them."""

import numpy as np
from PIL import Image
from pycocotools import mask as rle

_NUMBERS = frozenset({int, float})


def compact_polygons(value: list) -> list:
    """Replace every flat list of finite numbers by a (2n,) float64 array; whatever else is in the list stays as it is.

    Called while the JSON is parsed, so that the 40 million coordinates of COCO never exist as Python objects at once.
    """
    return [_compact(polygon) for polygon in value]


def _compact(polygon):
    if type(polygon) is not list or not _NUMBERS.issuperset(map(type, polygon)):
        return polygon
    try:
        points = np.array(polygon, dtype=np.float64)
    except OverflowError:
        return polygon
    return points if np.isfinite(points).all() else polygon


def segmentation_problem(value, width: int, height: int) -> str | None:
    """What is wrong with a parsed segmentation of a (height, width) image, or None.

    Polygons of fewer than three points are not an error here, nor is an empty list: exporters write both for objects
    without a mask.
    """
    if type(value) is list:
        for number, polygon in enumerate(value):
            if type(polygon) is not np.ndarray:
                return f"polygon {number} of its segmentation is not a flat list of finite numbers"
            if polygon.size % 2:
                return f"polygon {number} of its segmentation has {polygon.size} numbers, expected x, y pairs"
        return None
    if type(value) is not dict:
        return "its segmentation is neither a list of polygons nor a run-length encoding"
    size, counts = value.get("size"), value.get("counts")
    if size != [height, width] or any(type(side) is not int for side in size):
        return f"the size of its run-length encoding is not [{height}, {width}], that of the image"
    if type(counts) is list:
        # Python's integers, because a sum of hostile ones would wrap in numpy.
        sound = all(type(run) is int and run >= 0 for run in counts) and sum(counts) == width * height
    elif type(counts) is str:
        runs = run_lengths(counts)
        sound = runs is not None and bool((runs >= 0).all()) and sum(runs.tolist()) == width * height
    else:
        return "its run-length encoding has neither a list nor a string of counts"
    return None if sound else f"its run lengths do not add up to {width}x{height} pixels"


def run_lengths(text: str) -> np.ndarray | None:
    """The runs of a compressed COCO run-length string, (n,) int64, or None if it is not one.

    The format (cocoapi, maskApi.c): every run is a little-endian number of 5-bit groups, each written as the character
    of code 48 + group, with bit 5 set on all but the last group and bit 4 of that one as the sign; from the fourth run
    on the number is the difference to the run before the last.
    """
    try:
        groups = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    last = np.flatnonzero((groups & 0x20) == 0)
    if groups.size == 0 or ((groups < 0) | (groups > 63)).any() or last.size == 0 or last[-1] != groups.size - 1:
        return None
    first = np.concatenate(([0], last[:-1] + 1))
    lengths = last - first + 1
    # Six groups hold 30 bits, more than any image that is read has pixels.
    if lengths.max() > 6:
        return None
    place = np.arange(groups.size) - np.repeat(first, lengths)
    numbers = np.add.reduceat((groups & 0x1F) << (5 * place), first)
    numbers -= np.where(groups[last] & 0x10, np.int64(1) << (5 * lengths), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def bitmap(segmentation: list | dict, width: int, height: int, to_width: int, to_height: int) -> np.ndarray:
    """A segmentation of a (height, width) image that passed the check, drawn at another size: uint8 of 0 and 1.

    Polygons are scaled and then drawn, so they lose nothing; run lengths are drawn and then interpolated.
    """
    if isinstance(segmentation, dict):
        runs = segmentation
        if isinstance(runs["counts"], list):
            runs = rle.frPyObjects(runs, height, width)
        drawn = np.asarray(rle.decode([runs])[..., 0])
        if (to_width, to_height) == (width, height):
            return drawn
        grey = Image.fromarray(255 * drawn).resize((to_width, to_height), Image.Resampling.BILINEAR)
        return (np.asarray(grey) >= 128).astype(np.uint8)
    ratio = np.array([to_width / width, to_height / height])
    polygons = [(polygon.reshape(-1, 2) * ratio).ravel() for polygon in segmentation]
    return rle.decode([rle.merge(rle.frPyObjects(polygons, to_height, to_width))])[..., 0]
