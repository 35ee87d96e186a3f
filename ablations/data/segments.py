"""COCO's `segmentation` values: polygons kept as compact arrays, run lengths checked before C code reads them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, overload

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from ablations.data.problems import whole

# pycocotools takes memory in proportion to the length of an outline, and integers of 32 bits to count it.
MAX_POINT = 1_000_000
_NUMBERS: frozenset[type] = frozenset({int, float})

# `size`, [height, width], and `counts`, a list of runs or their compressed text.
RunLengths = dict[str, Any]
# Polygons of three points or more, float64 (2m,) each, or run lengths.
Segmentation = list[np.ndarray] | RunLengths

NONE, POLYGONS, RUNS, TEXT = range(4)


@dataclass(frozen=True, eq=False)
class Segmentations(Sequence[Segmentation | None]):
    """Segmentations of n annotations as flat arrays; each is made into a `Segmentation` when it is asked for.

    COCO's are millions of Python objects otherwise, which no two processes share. The values of annotation i are those
    from `start[i]` to `start[i + 1]` of what its kind names: polygons, of which number j has the values from
    `polygon[j]` to `polygon[j + 1]` of `points`; or `runs`; or the bytes of `text`.

    Attributes:
        kind: (n,) uint8: NONE, POLYGONS, RUNS or, for compressed run lengths, TEXT.
        start: (n, 2) int64, begin and end.
        size: (n, 2) int64, height and width of run lengths; 0 for all others.
        polygon: (p + 1,) int64.
        points: float64, x, y in pixels.
        runs: int64.
        text: uint8, ASCII.
    """

    kind: np.ndarray
    start: np.ndarray
    size: np.ndarray
    polygon: np.ndarray
    points: np.ndarray
    runs: np.ndarray
    text: np.ndarray

    @classmethod
    def of(cls, values: Iterable[Segmentation | None]) -> "Segmentations":
        """The columns of these."""
        kinds, starts, sizes = [], [], []
        polygons: list[np.ndarray] = []
        runs: list[int] = []
        text = bytearray()
        for value in values:
            size = (0, 0)
            if value is None:
                kind, begin, end = NONE, 0, 0
            elif isinstance(value, list):
                kind, begin = POLYGONS, len(polygons)
                polygons += value
                end = len(polygons)
            else:
                counts, size = value["counts"], tuple(value["size"])
                if isinstance(counts, str):
                    kind, begin = TEXT, len(text)
                    text += counts.encode("ascii")
                    end = len(text)
                else:
                    kind, begin = RUNS, len(runs)
                    runs += counts
                    end = len(runs)
            kinds.append(kind)
            starts.append((begin, end))
            sizes.append(size)
        lengths = np.fromiter(chain((0,), map(len, polygons)), np.int64, len(polygons) + 1)
        return cls(
            kind=np.array(kinds, np.uint8),
            start=np.array(starts, np.int64).reshape(-1, 2),
            size=np.array(sizes, np.int64).reshape(-1, 2),
            polygon=lengths.cumsum(),
            points=np.concatenate(polygons) if polygons else np.empty(0),
            runs=np.array(runs, np.int64),
            text=np.frombuffer(bytes(text), np.uint8),
        )

    def __len__(self) -> int:
        return len(self.kind)

    @overload
    def __getitem__(self, index: int) -> Segmentation | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[Segmentation | None]: ...
    def __getitem__(self, index: int | slice) -> Segmentation | list[Segmentation | None] | None:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        kind, (begin, end) = self.kind[index], self.start[index].tolist()
        if kind == NONE:
            return None
        if kind == POLYGONS:
            bounds = self.polygon[begin : end + 1].tolist()
            return [self.points[first:last] for first, last in pairwise(bounds)]
        runs = self.runs[begin:end].tolist() if kind == RUNS else self.text[begin:end].tobytes().decode("ascii")
        return {"size": self.size[index].tolist(), "counts": runs}


def compact_polygons(value: list[Any]) -> list[Any]:
    """Replace every flat list of numbers up to ±MAX_POINT by a (2n,) float64 array; whatever else is there stays.

    Called while the JSON is parsed, so that the 40 million coordinates of COCO never exist as Python objects at once.
    """
    return [_compact(polygon) for polygon in value]


def _compact(polygon: object) -> object:
    if type(polygon) is not list or not _NUMBERS.issuperset(map(type, polygon)):
        return polygon
    try:
        points = np.array(polygon, dtype=np.float64)
    except OverflowError:
        return polygon
    # NaN fails the comparison.
    return points if (np.abs(points) <= MAX_POINT).all() else polygon


def read_segmentation(value: object, width: int, height: int) -> tuple[Segmentation | None, str | None, int]:
    """A parsed segmentation of a (height, width) image, in one of two forms.

    What pycocotools' `annToRLE` reads is read: polygons, run lengths, and a list of uncompressed run lengths, of which
    the union counts. Polygons of fewer than three points are not an error, nor is an empty list: exporters write both
    for objects without a mask.

    Returns:
        The segmentation as a list of (2m,) float64 polygons of three points or more or as a run-length dict, None where
        there is none; what is wrong with it, or None; and the number of polygons that were dropped as too short.
    """
    if type(value) is dict:
        runs, problem = _read_runs(value, width, height)
        return runs, problem, 0
    if type(value) is not list:
        return None, "its segmentation is neither a list of polygons nor a run-length encoding", 0
    for number, polygon in enumerate(value):
        if type(polygon) is not np.ndarray:
            if all([type(part) is dict for part in value]):
                return *_read_union(value, width, height), 0
            problem = f"polygon {number} of its segmentation is not a flat list of finite numbers, at most {MAX_POINT}"
            return None, problem, 0
        if polygon.size % 2:
            return None, f"polygon {number} of its segmentation has {polygon.size} numbers, expected x, y pairs", 0
    kept = [polygon for polygon in value if polygon.size >= 6]
    return kept or None, None, len(value) - len(kept)


def _read_union(parts: list[RunLengths], width: int, height: int) -> tuple[RunLengths | None, str | None]:
    """One run-length encoding of a list of them; of compressed ones pycocotools reads no list."""
    read = []
    for part in parts:
        runs, problem = _read_runs(part, width, height)
        if runs is None:
            return None, problem
        if type(runs["counts"]) is str:
            return None, "its segmentation is a list of compressed run lengths"
        read.append(runs)
    if len(read) == 1:
        return read[0], None
    union = rle.merge(rle.frPyObjects(read, height, width))
    return {"size": [height, width], "counts": union["counts"].decode("ascii")}, None


def _read_runs(value: RunLengths, width: int, height: int) -> tuple[RunLengths | None, str | None]:
    """A run-length encoding with whole numbers as integers, or what is wrong with it."""
    size, counts = value.get("size"), value.get("counts")
    if type(size) is not list or [whole(side) for side in size] != [height, width]:
        return None, f"the size of its run-length encoding is not [{height}, {width}], that of the image"
    if type(counts) is list:
        # Python's integers, because a sum of hostile ones would wrap in numpy.
        counts = [run if type(run) is int else whole(run) for run in counts]
        sound = all(run is not None and run >= 0 for run in counts) and sum(counts) == width * height
    elif type(counts) is str:
        runs = run_lengths(counts)
        sound = runs is not None and bool((runs >= 0).all()) and sum(runs.tolist()) == width * height
    else:
        return None, "its run-length encoding has neither a list nor a string of counts"
    if not sound:
        return None, f"its run lengths do not add up to {width}x{height} pixels"
    return {"size": [height, width], "counts": counts}, None


def run_lengths(text: str) -> np.ndarray | None:
    """The runs of a compressed COCO run-length string, (n,) int64, or None if it is not one.

    The format (cocoapi, maskApi.c): every run is a little-endian number of 5-bit groups, each written as the character
    of code 48 + group, with bit 5 set on all but the last group and bit 4 of that one as the sign; from the fourth run
    on the number is the difference to the run before the last.

    Example:
        >>> from ablations.data.segments import run_lengths
        >>> run_lengths("321").tolist()
        [3, 2, 1]
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


def bitmap(segmentation: Segmentation, width: int, height: int, to_width: int, to_height: int) -> np.ndarray:
    """A segmentation of a (height, width) image, as it was read, drawn at another size: uint8 of 0 and 1.

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
    # Drawing takes memory in proportion to the length of an outline; what is this far outside is nonsense anyway.
    far = 20.0 * max(to_width, to_height)
    polygons = [(polygon.reshape(-1, 2) * ratio).clip(-far, far).ravel() for polygon in segmentation]
    return rle.decode([rle.merge(rle.frPyObjects(polygons, to_height, to_width))])[..., 0]
