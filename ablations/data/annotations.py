"""The annotations of a COCO instances file: each one checked, then all of them as columns with clipped corners.

Boxes that cannot be (outside their image, of negative size, not finite) and those of an unknown category are one kind
of mistake, which a user may want to go on without: they are refused or left out, as asked. All others are refused.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ablations.data.problems import ID, MAX_EXACT, MISSING, Lenient, identity, mixed, quote, wrong
from ablations.data.segments import NONE, Segmentation, Segmentations, read_segmentation

BAD_ANNOTATIONS = ("refuse", "drop")

MAX_COORDINATE = 1e9
# COCO's files give coordinates to two decimals.
COORDINATE_STEP = 0.01
# A box is said to overhang from here on; below it is the rounding of x + width in float64.
OVERHANG_PIXELS = 1e-6

OUTSIDE, NEGATIVE = "box outside its image", "box of negative width or height"
NOT_FINITE, UNKNOWN_CATEGORY = "box not finite", "unknown category"
OPTION = "; --bad-annotations drop leaves it out"

_NUMBERS = (float, int)


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One sound entry of `images`: id, file name relative to the split's folder, upright size in pixels."""

    image_id: int | str
    file_name: str
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class Annotations:
    """The annotations of a file that are read, as columns of n, in file order, with the values as given.

    Attributes:
        image: (n,) int64, index into the images in id order.
        category: (n,) int64, index into the categories in id order, which is the label.
        bbox: (n, 4) float64, x, y, width, height in pixels.
        area: (n,) float64, square pixels; width × height of the box where none is given.
        crowd: (n,) bool.
        segmentation: n, None where an annotation has none that can be used.
        corners: (n, 4) float32, the box as x1, y1, x2, y2, clipped to the image; of no size where it is not trained on.
        number: (n,) int64, position in the file's `annotations`.
        ids: (n,) int64, uint64 or, of text, object: the annotation's id.
        odd: By row, what is wrong with its segmentation, which is None here: masks cannot use it, boxes need not.
    """

    image: np.ndarray
    category: np.ndarray
    bbox: np.ndarray
    area: np.ndarray
    crowd: np.ndarray
    segmentation: Segmentations
    corners: np.ndarray
    number: np.ndarray
    ids: np.ndarray
    odd: dict[int, str]

    @property
    def trained_on(self) -> np.ndarray:
        """(n,) bool: ordinary objects of positive size."""
        return (self.corners[:, 2:] > self.corners[:, :2]).all(1) & ~self.crowd


def mask_problems(columns: Annotations, training: bool) -> list[str]:
    """Annotations that lack a segmentation which masks need, one line each.

    Training needs one of every ordinary object of positive size; evaluation compares crowd regions and boxes of no
    size too.
    """
    missing = columns.segmentation.kind == NONE
    lacking = np.flatnonzero(missing & columns.trained_on if training else missing).tolist()
    numbers, ids = columns.number[lacking].tolist(), columns.ids[lacking].tolist()
    return [
        f"{_where(number, given)}: {columns.odd.get(row, 'it has no segmentation')}; masks need polygons or run lengths"
        for row, number, given in zip(lacking, numbers, ids, strict=True)
    ]


def _where(number: int, annotation_id: int | str) -> str:
    return f"annotations[{number}] (id {quote(annotation_id)})"


def check_annotations(
    section: list[Any],
    images: dict[int | str, ImageEntry | None] | None,
    categories: dict[int | str, str] | None,
    bad: str,
    problems: list[str],
    notes: list[str],
    lenient: Lenient,
) -> tuple[Annotations, dict[str, int]]:
    """Check every annotation.

    Args:
        section: What stands under `annotations`.
        images: Entry by id, None for an entry with a problem, which is not to be blamed on its annotations; None where
            the section was unreadable, and likewise `categories`: then unknown ids are not looked for.
        categories: Name by id.
        bad: What to do with the mistakes that may be left out, of `BAD_ANNOTATIONS`.
        problems, notes, lenient: What is found is added to these.

    Returns:
        The columns, and how many annotations were left out for each reason.
    """
    image_indices = _indices(images)
    category_indices = _indices(categories)
    ids: set[int | str] = set()
    # Image, category, crowd, width and height of the image, position in the file.
    rows: list[tuple[int, int, int, int, int, int]] = []
    boxes: list[list[float]] = []
    areas: list[float] = []
    segmentations: list[Segmentation | None] = []
    kept_ids: list[int | str] = []
    odd: dict[int, str] = {}
    dropped: Counter[str] = Counter()
    short_polygons = 0
    for number, entry in enumerate(section):
        if type(entry) is not dict:
            problems.append(f"annotations[{number}] is {quote(entry)}, expected an object")
            continue
        hard: list[str] = []
        annotation_id, image_id, category_id = values = (
            entry.get("id", MISSING),
            entry.get("image_id", MISSING),
            entry.get("category_id", MISSING),
        )
        for value in values:
            if type(value) is not int or not -MAX_EXACT <= value <= MAX_EXACT:
                annotation_id, image_id, category_id = _identities(values, lenient, hard)
                break
        if annotation_id is not None:
            if annotation_id in ids:
                hard.append(f": the annotation id {quote(annotation_id)} is given twice")
            ids.add(annotation_id)
        if image_id is not None and images is not None and image_id not in images:
            hard.append(f": unknown image id {quote(image_id)}")
        crowd = entry.get("iscrowd", MISSING)
        if type(crowd) is not int or crowd not in (0, 1):
            crowd = _crowd(crowd, lenient, hard)

        mistakes: list[tuple[str, str]] = []
        if category_id is not None and categories is not None and category_id not in categories:
            mistakes.append((UNKNOWN_CATEGORY, f": unknown category id {quote(category_id)}"))
        box = entry.get("bbox", MISSING)
        if type(box) is not list or len(box) != 4 or not all([type(value) in _NUMBERS for value in box]):
            hard.append(wrong("bbox", box, "four finite numbers: x, y, width, height"))
            box = None
        # NaN and infinity fail the comparison.
        elif not all([-MAX_COORDINATE <= value <= MAX_COORDINATE for value in box]):
            mistakes.append((NOT_FINITE, wrong("bbox", box, "four finite numbers: x, y, width, height")))
            box = None
        elif box[2] < 0 or box[3] < 0:
            mistakes.append((NEGATIVE, f": the box {quote(box)} has a negative width or height"))
        area = entry.get("area", MISSING)
        if area is MISSING or area is None:
            lenient.add("area absent" if area is MISSING else "area null", "width × height")
            area = box[2] * box[3] if box else 0
        elif type(area) not in _NUMBERS or not 0 <= area <= MAX_COORDINATE**2:
            hard.append(wrong("area", area, "a number of square pixels"))

        if hard or mistakes:
            if bad == "refuse":
                hard += [text + OPTION for _, text in mistakes]
            elif not hard:
                dropped[mistakes[0][0]] += 1
            where = f"annotations[{number}]" if annotation_id is None else _where(number, annotation_id)
            problems += [where + text for text in hard]
            continue
        image = images.get(image_id) if images else None
        if image is None or not categories:
            continue
        segmentation = entry.get("segmentation")
        if segmentation is not None:
            segmentation, problem, short = read_segmentation(segmentation, image.width, image.height)
            short_polygons += short
            if problem is not None:
                odd[len(rows)] = problem
        elif "segmentation" in entry:
            odd[len(rows)] = "its segmentation is null"
        rows.append((image_indices[image_id], category_indices[category_id], crowd, image.width, image.height, number))
        boxes.append(box)
        areas.append(area)
        segmentations.append(segmentation)
        kept_ids.append(annotation_id)
    problems += mixed("annotation", ids)
    table = np.array(rows, dtype=np.int64).reshape(-1, 6)
    sizes = table[:, 3:5]
    bbox = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    corners, outside, overhang = _corners(bbox, sizes)
    columns = Annotations(
        image=table[:, 0],
        category=table[:, 1],
        bbox=bbox,
        area=np.array(areas, np.float64),
        crowd=table[:, 2].astype(bool),
        segmentation=Segmentations.of(segmentations),
        corners=corners,
        number=table[:, 5],
        ids=id_column(kept_ids),
        odd=odd,
    )
    if outside.any() and bad == "refuse":
        problems += _outside(columns, sizes, np.flatnonzero(outside).tolist())
    elif outside.any():
        dropped[OUTSIDE] += int(outside.sum())
        columns, overhang = _selected(columns, np.flatnonzero(~outside)), overhang[~outside]
    notes += _notes(columns, overhang, short_polygons, dropped)
    if not problems and not columns.trained_on.any():
        problems.append(f"has no annotation with a box that is not a crowd region{_left_out(dropped)}")
    return columns, dict(dropped)


def _outside(columns: Annotations, sizes: np.ndarray, rows: list[int]) -> list[str]:
    """The problems of boxes that lie outside their images; `sizes` (n, 2) are width, height."""
    return [
        f"{_where(int(columns.number[row]), columns.ids.item(row))}: the box {quote(columns.bbox[row].tolist())} lies "
        f"outside its image of {sizes[row, 0]}x{sizes[row, 1]} pixels{OPTION}"
        for row in rows
    ]


def _selected(columns: Annotations, rows: np.ndarray) -> Annotations:
    """These rows of the columns."""
    kept = rows.tolist()
    arrays = {name: value[rows] for name, value in vars(columns).items() if isinstance(value, np.ndarray)}
    odd = {index: columns.odd[row] for index, row in enumerate(kept) if row in columns.odd}
    segmentation = Segmentations.of(columns.segmentation[row] for row in kept)
    return Annotations(**arrays, segmentation=segmentation, odd=odd)


def _indices(entries: Mapping[int | str, object] | None) -> dict[int | str, int]:
    """The index of each id in the order of all; any order where they have none, which is a problem already."""
    ids = list(entries or ())
    return {value: index for index, value in enumerate(ids if mixed("", ids) else sorted(ids))}


def _identities(values: tuple[object, ...], lenient: Lenient, hard: list[str]) -> list[int | str | None]:
    """The ids of an annotation, its image and its category; None for one that cannot be an id."""
    ids = [identity(value, lenient) for value in values]
    for key, value, taken in zip(("id", "image_id", "category_id"), values, ids, strict=True):
        if taken is None:
            hard.append(wrong(key, value, ID))
    return ids


def _crowd(value: object, lenient: Lenient, hard: list[str]) -> int:
    """An `iscrowd` that is not written as 0 or 1."""
    if value is MISSING or value is None:
        lenient.add("iscrowd absent" if value is MISSING else "iscrowd null", "taken as 0")
        return 0
    if type(value) is bool or (type(value) is float and value in (0, 1)):
        lenient.add("iscrowd boolean" if type(value) is bool else "iscrowd written as 0.0 or 1.0", "taken as 0 or 1")
        return int(value)
    hard.append(wrong("iscrowd", value, "0 or 1"))
    return 0


def id_column(ids: Sequence[int | str]) -> np.ndarray:
    """Ids as (n,) int64, or uint64 or object where these do not hold them all; `tolist` gives them back."""
    numbers = not any(type(value) is str for value in ids)
    for kind in (np.int64, np.uint64) if numbers else ():
        limits = np.iinfo(kind)
        if limits.min <= min(ids, default=0) and max(ids, default=0) <= limits.max:  # type: ignore[operator]
            return np.array(ids, dtype=kind)
    column = np.empty(len(ids), dtype=object)
    column[:] = ids
    return column


def _corners(bbox: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The boxes clipped to their images.

    Args:
        bbox: (n, 4) float64 x, y, width, height.
        sizes: (n, 2) int64 width, height of each box's image.

    Returns:
        Corners (n, 4) float32; (n,) bool, whether a box overlaps nothing of its image; and (n,) float64, by how many
        pixels it overhangs where it is clipped, else 0.
    """
    start, end = bbox[:, :2], bbox[:, :2] + bbox[:, 2:]
    # A box without area overlaps nothing; one that lies within the image or, but for a rounding, on its edge is
    # harmless and only not trained on.
    thin = (bbox[:, 2:] <= COORDINATE_STEP).any(1)
    far = ((start > sizes + COORDINATE_STEP) | (end < -COORDINATE_STEP)).any(1)
    outside = np.where(thin, far, ((start >= sizes) | (end <= 0)).any(1))
    overhang = np.maximum(-start, end - sizes).max(1, initial=0.0)
    overhang[(overhang <= OVERHANG_PIXELS) | thin | outside] = 0
    return np.concatenate([start.clip(0, sizes), end.clip(0, sizes)], 1).astype(np.float32), outside, overhang


def _notes(columns: Annotations, overhang: np.ndarray, short_polygons: int, dropped: Counter[str]) -> list[str]:
    notes = []
    clipped = np.count_nonzero(overhang)
    if clipped:
        notes.append(f"boxes that overhang their image, clipped: {clipped} (by up to {overhang.max():.3g} px)")
    empty = np.count_nonzero((columns.corners[:, 2:] <= columns.corners[:, :2]).any(1))
    if empty:
        notes.append(f"boxes of zero width or height, dropped: {empty}")
    if short_polygons:
        notes.append(f"polygons of fewer than three points, dropped: {short_polygons}")
    if dropped:
        notes.append(f"annotations left out of training and evaluation: {_counted(dropped)}")
    return notes


def _counted(dropped: Counter[str]) -> str:
    return ", ".join(f"{reason} ({count})" for reason, count in dropped.items())


def _left_out(dropped: Counter[str]) -> str:
    return f"; left out were: {_counted(dropped)}" if dropped else ""
