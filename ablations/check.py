"""Is a COCO instances file what it should be? Every problem of a file is found in one pass and listed at once.

The data is somebody else's, so any value may stand anywhere in the JSON. Whatever is wrong ends in a `DataError`.
"""

import hashlib
import json
import os
import posixpath
import reprlib
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ablations.images import MAX_PIXELS
from ablations.segments import compact_polygons, segmentation_problem

# The largest official file, instances_train2017.json, has 0.45 GB.
MAX_JSON_BYTES = 4 << 30
# Integers up to here survive a trip through a float64, which pycocotools makes with some of them.
MAX_INTEGER = 1 << 53
MAX_COORDINATE = 1e9
SHOWN_PROBLEMS = 50
# COCO's files give coordinates to two decimals.
COORDINATE_STEP = 0.01
# A box is said to overhang from here on; below it is the rounding of x + width in float64.
OVERHANG_PIXELS = 1e-6

_MISSING = object()
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring, _REPR.maxother = 3, 8, 8, 120, 120


class DataError(ValueError):
    """The data cannot be used. `str()` is one message that names the file and lists its problems.

    Attributes:
        path: The file or directory at fault.
        problems: Every problem found, one line each.
    """

    def __init__(self, path: str | os.PathLike, problems: list[str]):
        # Exactly the arguments, so that the exception survives pickling between processes.
        super().__init__(path, problems)
        self.path = Path(path)
        self.problems = list(problems)

    def __str__(self) -> str:
        name = _printable(self.path)
        if len(self.problems) == 1:
            return f"{name}: {self.problems[0]}"
        lines = [f"{name}: {len(self.problems)} problems"]
        lines += [f"  - {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"  - and {len(self.problems) - SHOWN_PROBLEMS} more")
        return "\n".join(lines)


def quote(value) -> str:
    """A short, printable form of any value of a JSON file: nothing in it can reach the terminal as a control code."""
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    return _REPR.repr(value)


def _printable(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() else repr(text)


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One sound entry of `images`: id, file name relative to the split's folder, declared size in pixels."""

    image_id: int
    file_name: str
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class Annotations:
    """The sound annotations of a file as columns of n, in file order, with the values as given.

    Attributes:
        image: (n,) int64, index into the images in id order.
        category_id: (n,) int64, COCO's id.
        bbox: (n, 4) float64, x, y, width, height in pixels.
        area: (n,) float64, square pixels.
        crowd: (n,) bool.
        segmentation: n values: a list of (2m,) float64 polygons, a run-length dict, or None.
        corners: (n, 4) float32, the box as x1, y1, x2, y2, clipped to the image; of no size where it is dropped.
    """

    image: np.ndarray
    category_id: np.ndarray
    bbox: np.ndarray
    area: np.ndarray
    crowd: np.ndarray
    segmentation: list
    corners: np.ndarray


@dataclass(frozen=True, eq=False)
class Instances:
    """The content of one instances file that passed: images in id order, categories (id, name) in id order."""

    images: list[ImageEntry]
    categories: list[tuple[int, str]]
    annotations: Annotations
    digest: str
    notes: list[str]


def read_json(path: Path) -> tuple[object, str, list[str]]:
    """Parse a JSON file that nobody vouches for.

    Returns:
        The document, with polygons compacted; the SHA-256 of the file; and the keys that objects hold twice.

    Raises:
        DataError: the file is absent, unreadable, too large, not UTF-8, not JSON (with line and column) or too deep.
    """
    repeated = []

    def build(pairs: list[tuple[str, object]]) -> dict:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1}) if len(keys) < 1000 else ["one of very many"]
            of = f" (id {quote(value['id'])})" if "id" in value else ""
            repeated.extend(f"an object{of} has the key {quote(key)} more than once" for key in twice)
        segmentation = value.get("segmentation")
        if type(segmentation) is list:
            value["segmentation"] = compact_polygons(segmentation)
        return value

    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(path, ["is not a regular file"])
        if status.st_size > MAX_JSON_BYTES:
            raise DataError(path, [f"has {status.st_size} bytes; at most {MAX_JSON_BYTES} are read"])
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(path, ["no such file"]) from error
    except OSError as error:
        raise DataError(path, [f"cannot be read: {error.strerror}"]) from error
    digest = hashlib.sha256(content).hexdigest()
    try:
        text = content.decode(json.detect_encoding(content))
        del content
        document = json.loads(text, object_pairs_hook=build)
    except json.JSONDecodeError as error:
        raise DataError(path, [f"broken JSON at line {error.lineno} column {error.colno}: {error.msg}"]) from error
    except UnicodeDecodeError as error:
        raise DataError(path, [f"broken JSON: not UTF-8 text at byte {error.start}"]) from error
    except RecursionError as error:
        raise DataError(path, ["broken JSON: nested too deeply"]) from error
    except ValueError as error:
        # An integer of more digits than Python converts.
        raise DataError(path, [f"broken JSON: {error}"]) from error
    return document, digest, repeated


def read_instances(path: Path) -> Instances:
    """Read and check one COCO instances file, without its images.

    Boxes of zero width or height are marked as dropped and boxes that overhang the image are clipped; `notes` counts
    both.

    Raises:
        DataError: lists every problem of the file.
    """
    document, digest, problems = read_json(path)
    if type(document) is not dict:
        raise DataError(path, [*problems, f"the top level is {quote(document)}, expected an object"])
    notes: list[str] = []
    images = _section(document, "images", problems)
    categories = _section(document, "categories", problems)
    annotations = _section(document, "annotations", problems)
    entries = None if images is None else _check_images(images, problems)
    names = None if categories is None else _check_categories(categories, problems)
    columns = None if annotations is None else _check_annotations(annotations, entries, names, problems, notes)
    if problems:
        raise DataError(path, problems)
    ordered = [entries[image_id] for image_id in sorted(entries)]
    return Instances(ordered, sorted(names.items()), columns, digest, notes)


def _section(document: dict, key: str, problems: list[str]) -> list | None:
    section = document.get(key, _MISSING)
    if type(section) is list and section:
        return section
    if section is _MISSING:
        problems.append(f"has no {quote(key)}")
    else:
        problems.append(f"has no {key}: the list is empty" if section == [] else f"{quote(key)} is not a list")
    return None


def _whole(entry: dict, key: str, where: str, problems: list[str]) -> int | None:
    value = entry.get(key, _MISSING)
    if type(value) is int and -MAX_INTEGER <= value <= MAX_INTEGER:
        return value
    problems.append(_wrong(where, key, value, "a whole number"))
    return None


def _wrong(where: str, key: str, value, expected: str) -> str:
    if value is _MISSING:
        return f"{where} has no {quote(key)}"
    return f"{where}: {quote(key)} is {quote(value)}, expected {expected}"


def _is_number(value) -> bool:
    # NaN and infinity fail the comparison; bool is a type of its own here.
    return (type(value) is float or type(value) is int) and -MAX_COORDINATE <= value <= MAX_COORDINATE


def _check_images(section: list, problems: list[str]) -> dict[int, ImageEntry | None]:
    """Image id -> entry, None for an entry with a problem: its annotations are not to be blamed for it."""
    entries: dict[int, ImageEntry | None] = {}
    names: dict[str, int] = {}
    for number, entry in enumerate(section):
        where = f"images[{number}]"
        if type(entry) is not dict:
            problems.append(f"{where} is {quote(entry)}, expected an object")
            continue
        before = len(problems)
        image_id = _whole(entry, "id", where, problems)
        if image_id is not None:
            where += f" (id {image_id})"
            if image_id in entries:
                problems.append(f"{where}: the image id {image_id} is given twice")
        width, height = (_whole(entry, key, where, problems) for key in ("width", "height"))
        if width is not None and height is not None:
            if width < 1 or height < 1:
                problems.append(f"{where}: the declared size is {width}x{height} pixels")
            elif width * height > MAX_PIXELS:
                problems.append(f"{where}: the declared size is {width}x{height}; at most {MAX_PIXELS} pixels are read")
        name = entry.get("file_name", _MISSING)
        problem = _name_problem(name)
        if problem is not None:
            problems.append(_wrong(where, "file_name", name, problem))
        else:
            first = names.setdefault(posixpath.normpath(name), number)
            if first != number:
                problems.append(f"{where}: the file name {quote(name)} is also that of images[{first}]")
        if image_id is not None:
            sound = len(problems) == before
            entries[image_id] = ImageEntry(image_id, name, width, height) if sound else None
    return entries


def _name_problem(name) -> str | None:
    """What a file name must be where `name` is not it: a relative path below the split's folder."""
    if type(name) is not str or not name:
        return "a file name"
    if "\0" in name or not _encodable(name):
        return "a name that the file system can hold"
    if "\\" in name:
        return "a file name with forward slashes only"
    if name.startswith("/") or (name[0].isalpha() and name[1:2] == ":") or ".." in name.split("/"):
        return "a path that does not leave the data directory"
    return None


def _encodable(text: str) -> bool:
    try:
        os.fsencode(text)
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_categories(section: list, problems: list[str]) -> dict[int, str]:
    names: dict[int, str] = {}
    for number, entry in enumerate(section):
        where = f"categories[{number}]"
        if type(entry) is not dict:
            problems.append(f"{where} is {quote(entry)}, expected an object")
            continue
        category_id = _whole(entry, "id", where, problems)
        name = entry.get("name", _MISSING)
        if type(name) is not str or not name or not name.isprintable():
            problems.append(_wrong(where, "name", name, "printable text"))
        if category_id is not None:
            if category_id in names:
                problems.append(f"{where}: the category id {category_id} is given twice")
            names[category_id] = name if type(name) is str else ""
    return names


def _check_annotations(
    section: list,
    images: dict[int, ImageEntry | None] | None,
    categories: dict[int, str] | None,
    problems: list[str],
    notes: list[str],
) -> Annotations:
    """Check every annotation; unknown ids are looked for only where the section that defines them was readable."""
    positions = {image_id: place for place, image_id in enumerate(sorted(images or ()))}
    ids: set[int] = set()
    rows, boxes, areas, segmentations, numbers = [], [], [], [], []
    short_polygons = 0
    for number, entry in enumerate(section):
        where = f"annotations[{number}]"
        if type(entry) is not dict:
            problems.append(f"{where} is {quote(entry)}, expected an object")
            continue
        before = len(problems)
        identity = _whole(entry, "id", where, problems)
        if identity is not None:
            where += f" (id {identity})"
            if identity in ids:
                problems.append(f"{where}: the annotation id {identity} is given twice")
            ids.add(identity)
        image_id = _whole(entry, "image_id", where, problems)
        if image_id is not None and images is not None and image_id not in images:
            problems.append(f"{where}: unknown image id {image_id}")
        category_id = _whole(entry, "category_id", where, problems)
        if category_id is not None and categories is not None and category_id not in categories:
            problems.append(f"{where}: unknown category id {category_id}")
        crowd = entry.get("iscrowd", _MISSING)
        if type(crowd) is not int or crowd not in (0, 1):
            problems.append(_wrong(where, "iscrowd", crowd, "0 or 1"))
        area = entry.get("area", _MISSING)
        if not (type(area) is float or type(area) is int) or not 0 <= area <= MAX_COORDINATE**2:
            problems.append(_wrong(where, "area", area, "a number of square pixels"))
        box = entry.get("bbox", _MISSING)
        if type(box) is not list or len(box) != 4 or not all(map(_is_number, box)):
            problems.append(_wrong(where, "bbox", box, "four finite numbers: x, y, width, height"))
        elif box[2] < 0 or box[3] < 0:
            problems.append(f"{where}: the box {quote(box)} has a negative width or height")
        image = images.get(image_id) if images else None
        segmentation = entry.get("segmentation", _MISSING)
        if segmentation is _MISSING:
            segmentation = None
        elif image is not None:
            problem = segmentation_problem(segmentation, image.width, image.height)
            if problem is not None:
                problems.append(f"{where}: {problem}")
            elif type(segmentation) is list:
                kept = [polygon for polygon in segmentation if polygon.size >= 6]
                short_polygons += len(segmentation) - len(kept)
                segmentation = kept
        if len(problems) == before and image is not None:
            rows.append((positions[image_id], category_id, crowd, image.width, image.height))
            boxes.append(box)
            areas.append(area)
            segmentations.append(segmentation)
            numbers.append(number)
    table = np.array(rows, dtype=np.int64).reshape(-1, 5)
    bbox = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    corners = _corners(bbox, table[:, 3:], [section[number] for number in numbers], numbers, problems, notes)
    if short_polygons:
        notes.append(f"polygons of fewer than three points, dropped: {short_polygons}")
    crowd = table[:, 2].astype(bool)
    if not problems and not ((corners[:, 2:] > corners[:, :2]).all(1) & ~crowd).any():
        problems.append("has no annotation with a box that is not a crowd region")
    return Annotations(table[:, 0], table[:, 1], bbox, np.array(areas, np.float64), crowd, segmentations, corners)


def _corners(
    bbox: np.ndarray, sizes: np.ndarray, entries: list[dict], numbers: list[int], problems: list[str], notes: list[str]
) -> np.ndarray:
    """Corners of the boxes clipped to their images, (n, 4) float32; a box without overlap is a problem.

    Args:
        bbox: (n, 4) float64 x, y, width, height.
        sizes: (n, 2) int64 width, height of each box's image.
        entries, numbers: the annotations and their positions in the file, for the messages.
    """
    start, end = bbox[:, :2], bbox[:, :2] + bbox[:, 2:]
    # A box without area overlaps nothing; one that lies within the image or, but for a rounding, on its edge is
    # harmless and only dropped.
    thin = (bbox[:, 2:] <= COORDINATE_STEP).any(1)
    far = ((start > sizes + COORDINATE_STEP) | (end < -COORDINATE_STEP)).any(1)
    outside = np.where(thin, far, ((start >= sizes) | (end <= 0)).any(1))
    for place in np.flatnonzero(outside):
        width, height = sizes[place].tolist()
        problems.append(
            f"annotations[{numbers[place]}] (id {entries[place]['id']}): the box {quote(bbox[place].tolist())} lies "
            f"outside its image of {width}x{height} pixels"
        )
    overhang = np.maximum(-start, end - sizes).max(1, initial=0.0)
    clipped = (overhang > OVERHANG_PIXELS) & ~thin & ~outside
    if clipped.any():
        most = overhang[clipped].max()
        notes.append(f"boxes that overhang their image, clipped: {clipped.sum()} (by up to {most:.3g} px)")
    corners = np.concatenate([start.clip(0, sizes), end.clip(0, sizes)], 1).astype(np.float32)
    dropped = (corners[:, 2:] <= corners[:, :2]).any(1)
    if dropped.any():
        notes.append(f"boxes of zero width or height, dropped: {dropped.sum()}")
    return corners
