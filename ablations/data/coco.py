"""A data directory in COCO layout, checked as a whole before anything trains on it.

    DIR/annotations/instances_{train,val}2017.json     (or the same below DIR/coco)
    DIR/{train,val}2017/                               the images, of any format that Pillow decodes by itself

Reading checks both instances files (`ablations/data/check.py`) and every image they name
(`ablations/data/image_files.py`): presence, header, declared size and end marker, and all pixels where that takes no
more than seconds. What cannot be used is a `DataError` that lists all problems of the file.
"""

import gc
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import numpy as np

from ablations.data.annotations import BAD_ANNOTATIONS
from ablations.data.check import read_instances
from ablations.data.image_files import ImageFiles
from ablations.data.images import ImageError, applied_orientation, decode, limit_pixels
from ablations.data.problems import DataError, quote
from ablations.data.split import Dataset, ImageRecord, Records, Split

SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")


def find_root(directory: str | os.PathLike[str]) -> Path:
    """The directory that holds `annotations`: `directory` itself or `coco` below it.

    Raises:
        DataError: There is no such directory.
    """
    directory = Path(directory)
    try:
        if not directory.exists():
            raise DataError(directory, ["no such directory"])
        if not directory.is_dir():
            raise DataError(directory, ["is not a directory"])
        for root in (directory, directory / "coco"):
            if (root / "annotations").is_dir():
                return root
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(directory, [f"cannot be read: {error}"]) from error
    raise DataError(
        directory,
        ["no COCO layout here: neither annotations/instances_train2017.json nor coco/annotations/... was found"],
    )


def read_dataset(
    directory: str | os.PathLike[str],
    *,
    masks: bool = False,
    bad_annotations: Literal["refuse", "drop"] = "drop",
    max_image_pixels: int | None = None,
) -> Dataset:
    """Read and check both parts.

    The validation part takes the categories of the training part, so that a label means the same in both. It may lack
    some of them; one that only it has is left out if nothing is annotated with it.

    Args:
        masks, bad_annotations, max_image_pixels: As in `read_split`.

    Raises:
        DataError: Lists the problems of both instances files, and categories that differ between the two.
        ValueError: An argument is out of range.
    """
    _check_arguments(bad_annotations, max_image_pixels)
    root = find_root(directory)

    def read(name: Literal["train", "val"]) -> Split:
        return read_split(root, name, masks=masks, bad_annotations=bad_annotations, max_image_pixels=max_image_pixels)

    return both(root, read)


def both(root: Path, read: Callable[[Literal["train", "val"]], Split]) -> Dataset:
    """The data set of two parts that `read` gives. Errors as in `read_dataset`."""
    parts, problems = [], []
    for name in SPLITS:
        try:
            parts.append(read(name))
        except DataError as error:
            failed = error
            problems += [f"{os.path.relpath(error.path, root)}: {problem}" for problem in error.problems]
    if len(parts) == 1:
        raise failed
    if problems:
        raise DataError(root, problems)
    train, val = parts
    val = _with_categories_of(train, val)
    fingerprint = hashlib.sha256(f"{train.fingerprint} {val.fingerprint}".encode()).hexdigest()[:32]
    notes = [f"{part.path.name}: {note}" for part in (train, val) for note in part.notes]
    return Dataset(root, train, val, fingerprint, notes)


def _check_arguments(bad_annotations: str, max_image_pixels: int | None) -> int:
    """The most pixels of an image."""
    if bad_annotations not in BAD_ANNOTATIONS:
        raise ValueError(f"bad_annotations is {bad_annotations!r}, expected {' or '.join(BAD_ANNOTATIONS)}")
    return limit_pixels(max_image_pixels)


def _with_categories_of(train: Split, val: Split) -> Split:
    """The validation part with the categories and label numbers of the training part.

    Raises:
        DataError: An id has two names, or an annotated category is unknown to the training part.
    """
    if (train.category_ids, train.category_names) == (val.category_ids, val.category_names):
        return val
    names = dict(zip(train.category_ids, train.category_names, strict=True))
    labels = {category: label for label, category in enumerate(train.category_ids)}
    annotated = np.bincount(val.annotations.category, minlength=len(val.category_ids)).tolist()
    problems, unused = [], []
    for category, name, count in zip(val.category_ids, val.category_names, annotated, strict=True):
        here = f"category id {quote(category)} is {quote(name)}"
        if category not in names:
            if count:
                problems.append(f"{here}, with {count} annotations, but absent in {train.path.name}")
            else:
                unused.append(quote(name))
        elif names[category] != name:
            problems.append(f"{here}, but {quote(names[category])} in {train.path.name}")
    if problems:
        raise DataError(val.path, problems)
    notes = list(val.notes)
    if unused:
        notes.append(f"categories without annotations that the training split lacks, left out: {', '.join(unused)}")
    lacking = len(names.keys() - set(val.category_ids))
    if lacking:
        notes.append(f"categories of the training split that this one lacks: {lacking}")
    # A category that is left out labels nothing.
    relabel = np.array([labels.get(category, -1) for category in val.category_ids], dtype=np.int64)
    annotations = replace(val.annotations, category=relabel[val.annotations.category])
    return replace(
        val,
        images=replace(cast(Records, val.images), annotations=annotations),
        category_ids=train.category_ids,
        category_names=train.category_names,
        annotations=annotations,
        notes=notes,
    )


def read_split(
    directory: str | os.PathLike[str],
    split: Literal["train", "val"],
    *,
    masks: bool = False,
    bad_annotations: Literal["refuse", "drop"] = "drop",
    max_image_pixels: int | None = None,
) -> Split:
    """Read and check one part of a data directory.

    Every image file is opened. If the declared pixels of all are at most `image_files.DECODED_PIXELS`, every one is
    decoded too, so that training on small data never meets a broken file; of more, only those that are neither JPEG
    nor PNG.

    Args:
        masks: Whether segmentations are needed. Without, odd ones are read as none; `check.check_segmentations` can
            still list them.
        bad_annotations: What becomes of boxes outside their image, of negative size or not finite, and of annotations
            of an unknown category: a problem, or left out of training and ground truth, and counted.
        max_image_pixels: The most pixels of an image; None for 178,956,970, Pillow's own limit.

    Raises:
        DataError: Lists every problem of the instances file, or, where that is sound, every problem of its images.
        ValueError: An argument is out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    most_pixels = _check_arguments(bad_annotations, max_image_pixels)
    root = find_root(directory)
    path, folder = root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017"
    files = ImageFiles(path, folder, most_pixels)
    with _no_garbage_collection():
        instances = read_instances(
            path,
            masks=masks,
            training=split == "train",
            bad_annotations=bad_annotations,
            most_pixels=most_pixels,
            measure=files.sizes,
        )
        split_read = Split(
            name=split,
            path=path,
            images=Records.of(os.fspath(folder), instances.images, instances.annotations),
            category_ids=tuple(category for category, _ in instances.categories),
            category_names=tuple(name for _, name in instances.categories),
            annotations=instances.annotations,
            digest=instances.digest,
            measured=bool(files.known),
            fingerprint="",
            notes=instances.notes,
            dropped=instances.dropped,
        )
        return check_images(split_read, files)


def check_images(split: Split, files: ImageFiles) -> Split:
    """A split whose instances file is sound, with its fingerprint and what its image files say of their orientation.

    Raises:
        DataError: Lists every problem of its images.
    """
    records = cast(Records, split.images)
    entries = [records.entry(index) for index in range(len(records))]
    headers = files.check(entries)
    hashed = hashlib.sha256(split.digest.encode())
    for entry, header in zip(entries, headers, strict=True):
        hashed.update(f"{entry.file_name}\0{header.file_bytes}\0".encode())
    orientations = [applied_orientation(h, e.width, e.height) for e, h in zip(entries, headers, strict=True)]
    # Files whose size is another one were refused.
    assert None not in orientations
    orientation = np.array(orientations, np.uint8)
    return replace(split, images=replace(records, orientation=orientation), fingerprint=hashed.hexdigest()[:32])


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Parsing makes millions of objects and no cycles; collecting among them takes as long as the parsing itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_image(record: ImageRecord) -> np.ndarray:
    """Decode an image of a split: (height, width, 3) uint8 RGB.

    Raises:
        DataError: The file does not decode, or is not as it was when the split was read.
    """
    try:
        return decode(record.path, record.width, record.height, record.orientation)
    except ImageError as error:
        raise DataError(record.path, [str(error)]) from error
