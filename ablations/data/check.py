"""Is a COCO instances file what it should be? Every problem of a file is found in one pass and listed at once.

The data is somebody else's, so any value may stand anywhere in the JSON. What pycocotools and torchvision read without
harm is read, and counted in one note; whatever is wrong ends in a `DataError`.
"""

import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ablations.data.annotations import Annotations, ImageEntry, check_annotations, mask_problems
from ablations.data.images import MAX_PIXELS
from ablations.data.json_file import read_json
from ablations.data.problems import ID, MISSING, DataError, Lenient, identity, mixed, quote, whole, wrong
from ablations.data.split import Split


@dataclass(frozen=True, eq=False)
class Instances:
    """The content of one instances file that passed.

    Attributes:
        images: In id order.
        categories: Id and name, in id order.
        annotations: Those that are read.
        digest: SHA-256 of the file.
        notes: One line for each thing that was dropped, clipped or read leniently, with the count.
        dropped: How many annotations were left out, by reason.
    """

    images: list[ImageEntry]
    categories: list[tuple[int | str, str]]
    annotations: Annotations
    digest: str
    notes: list[str]
    dropped: dict[str, int]


# Sizes of image files, by name: upright width and height in pixels, or what is wrong with the file.
Measure = Callable[[list[str]], list[tuple[int, int] | str]]


def read_instances(
    path: Path,
    *,
    masks: bool = False,
    training: bool = True,
    bad_annotations: str = "drop",
    most_pixels: int = MAX_PIXELS,
    measure: Measure | None = None,
) -> Instances:
    """Read and check one COCO instances file, without its images.

    Boxes of zero width or height are kept out of training and boxes that overhang the image are clipped; `notes` counts
    both.

    Args:
        masks: Whether segmentations are needed: an unusable or missing one is then a problem.
        training: Which annotations need one: those that training looks at, or all.
        bad_annotations: `"refuse"` or `"drop"`, for the mistakes that can be left out.
        most_pixels: The largest declared size of an image.
        measure: Gives the sizes of images that declare none; without it they are a problem.

    Raises:
        DataError: Lists every problem of the file.
    """
    document, digest, problems = read_json(path)
    if type(document) is not dict:
        raise DataError(path, [*problems, f"the top level is {quote(document)}, expected an object"])
    notes: list[str] = []
    lenient = Lenient()
    images = _section(document, "images", problems)
    categories = _section(document, "categories", problems)
    annotations = _section(document, "annotations", problems)
    entries = None if images is None else _check_images(images, most_pixels, measure, problems, lenient)
    names = None if categories is None else _check_categories(categories, problems, lenient)
    columns: Annotations | None = None
    dropped: dict[str, int] = {}
    if annotations is not None:
        columns, dropped = check_annotations(annotations, entries, names, bad_annotations, problems, notes, lenient)
        if masks:
            problems += mask_problems(columns, training)
        elif columns.odd:
            lenient.add("segmentation that is no mask", "not needed for boxes", len(columns.odd))
    if problems or entries is None or names is None or columns is None:
        raise DataError(path, problems)
    # Without a problem there is an entry for each id, and ids are all numbers or all text.
    ordered = [entry for _, entry in sorted(entries.items()) if entry is not None]
    return Instances(ordered, sorted(names.items()), columns, digest, notes + lenient.note(), dropped)


def check_segmentations(split: Split) -> None:
    """Make sure that masks can be learned from, or evaluated with, a split, however it was read.

    A training split needs a segmentation of every ordinary object of positive size, the validation split of every
    annotation: crowd regions and boxes of no size are compared with detections, too.

    Raises:
        DataError: Lists the annotations whose segmentation is missing or unusable.
    """
    problems = mask_problems(split.annotations, training=split.name == "train")
    if problems:
        raise DataError(split.path, problems)


def _section(document: dict[str, Any], key: str, problems: list[str]) -> list[Any] | None:
    section = document.get(key, MISSING)
    if type(section) is list and section:
        return section
    if section is MISSING:
        problems.append(f"has no {quote(key)}")
    else:
        problems.append(f"has no {key}: the list is empty" if section == [] else f"{quote(key)} is not a list")
    return None


def _check_images(
    section: list[Any], most_pixels: int, measure: Measure | None, problems: list[str], lenient: Lenient
) -> dict[int | str, ImageEntry | None]:
    """Image id -> entry, None for an entry with a problem: its annotations are not to be blamed for it."""
    entries: dict[int | str, ImageEntry | None] = {}
    names: dict[str, int] = {}
    unmeasured: list[tuple[str, ImageEntry]] = []
    for number, entry in enumerate(section):
        where = f"images[{number}]"
        if type(entry) is not dict:
            problems.append(f"{where} is {quote(entry)}, expected an object")
            continue
        before = len(problems)
        given = entry.get("id", MISSING)
        image_id = identity(given, lenient)
        if image_id is None:
            problems.append(where + wrong("id", given, ID))
        else:
            where += f" (id {quote(image_id)})"
            if image_id in entries:
                problems.append(f"{where}: the image id {quote(image_id)} is given twice")
        width, height = (
            _side(entry, key, where, measure is not None, problems, lenient) for key in ("width", "height")
        )
        if width and height:
            problems += _size_problem(where, width, height, most_pixels)
        name = entry.get("file_name", MISSING)
        problem = _name_problem(name)
        if problem is not None:
            problems.append(where + wrong("file_name", name, problem))
        else:
            first = names.setdefault(posixpath.normpath(name), number)
            if first != number:
                problems.append(f"{where}: the file name {quote(name)} is also that of images[{first}]")
        if image_id is not None:
            sound = len(problems) == before
            entries[image_id] = None
            if sound and width is not None and height is not None:
                entries[image_id] = sized = ImageEntry(image_id, name, width, height)
                if not (width and height):
                    unmeasured.append((where, sized))
    if unmeasured and measure is not None:
        for (where, entry), size in zip(unmeasured, measure([e.file_name for _, e in unmeasured]), strict=True):
            if isinstance(size, str):
                problems.append(f"{where}: its size is not declared, and its file {quote(entry.file_name)}: {size}")
                entries[entry.image_id] = None
            else:
                # A side that is declared, and is not the file's, is found with all others when the files are checked.
                width, height = entry.width or size[0], entry.height or size[1]
                entries[entry.image_id] = replace(entry, width=width, height=height)
    problems += mixed("image", entries)
    return entries


def _side(
    entry: dict[str, Any], key: str, where: str, measured: bool, problems: list[str], lenient: Lenient
) -> int | None:
    """A declared width or height in pixels, 0 where it is to be taken from the file, None where it is a problem."""
    value = entry.get(key, MISSING)
    if (value is MISSING or value is None) and measured:
        lenient.add(f"image {key} absent" if value is MISSING else f"image {key} null", "taken from the file")
        return 0
    side = whole(value)
    if side is None:
        problems.append(where + wrong(key, value, "a whole number"))
    elif side < 1:
        problems.append(f"{where}: the declared {key} is {side} pixels")
        return None
    elif type(value) is float:
        lenient.add("image sizes written as 1.0", "taken as 1")
    return side


def _size_problem(where: str, width: int, height: int, most: int) -> list[str]:
    if width * height <= most:
        return []
    size = f"the declared size is {width}x{height}"
    return [f"{where}: {size}; at most {most} pixels are read, unless --max-image-pixels gives another number"]


def _name_problem(name: object) -> str | None:
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


def _check_categories(section: list[Any], problems: list[str], lenient: Lenient) -> dict[int | str, str]:
    names: dict[int | str, str] = {}
    for number, entry in enumerate(section):
        where = f"categories[{number}]"
        if type(entry) is not dict:
            problems.append(f"{where} is {quote(entry)}, expected an object")
            continue
        given = entry.get("id", MISSING)
        category_id = identity(given, lenient)
        if category_id is None:
            problems.append(where + wrong("id", given, ID))
        name = _category_name(entry.get("name", MISSING), category_id, lenient)
        if name is None:
            problems.append(where + wrong("name", entry["name"], "printable text"))
        if category_id is not None:
            if category_id in names:
                problems.append(f"{where}: the category id {quote(category_id)} is given twice")
            names[category_id] = name or ""
    problems += mixed("category", names)
    return names


def _category_name(given: object, category_id: int | str | None, lenient: Lenient) -> str | None:
    """The name without white space at its ends, the id where there is none, or None where it cannot be a name."""
    if type(given) is str:
        name = given.strip()
        if name != given:
            lenient.add("category names with white space at an end", "stripped")
        if name:
            return name if name.isprintable() else None
    elif given is not MISSING and given is not None:
        return None
    lenient.add("category without a name", "named by its id")
    name = str(category_id)
    return name if name.isprintable() else quote(name)
