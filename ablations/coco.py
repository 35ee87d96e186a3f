"""A data directory in COCO layout, checked as a whole before anything trains on it.

    DIR/annotations/instances_{train,val}2017.json     (or the same below DIR/coco)
    DIR/{train,val}2017/                               the images, JPEG or PNG

Reading checks both instances files (`ablations/check.py`) and every image they name: presence, header, declared size
and end marker, without decoding. What cannot be used is a `DataError` that lists all problems of the file.
"""

import errno
import gc
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ablations.check import Annotations, DataError, ImageEntry, quote, read_instances
from ablations.images import Header, ImageError, applied_orientation, decode, read_header

__all__ = ["DataError", "Dataset", "ImageRecord", "Split", "find_root", "read_dataset", "read_image", "read_split"]

SPLITS = ("train", "val")


@dataclass(frozen=True, slots=True, eq=False)
class ImageRecord:
    """One image and what there is to learn in it.

    Attributes:
        image_id: COCO's id.
        path: The file.
        width, height: Size in pixels of the upright image, as declared and as checked.
        orientation: EXIF orientation, 1..8, that the decoder applies.
        boxes: (n, 4) float32, x1, y1, x2, y2 in pixels, clipped to the image, of positive size, without the crowd
            regions; n may be 0.
        labels: (n,) int64, 0-based and contiguous.
        area: (n,) float64, square pixels, as given.
        segmentations: n values: a list of polygons, (2m,) float64 each, a run-length dict, or None.
        crowd_boxes: (m, 4) float32, regions that training ignores.
    """

    image_id: int
    path: str
    width: int
    height: int
    orientation: int
    boxes: np.ndarray
    labels: np.ndarray
    area: np.ndarray
    segmentations: list
    crowd_boxes: np.ndarray


@dataclass(frozen=True, eq=False)
class Split:
    """One part, train or val, of a data set.

    Attributes:
        name: `"train"` or `"val"`.
        path: The instances file.
        images: The images in id order.
        category_ids: COCO's id of each label.
        category_names: The name of each label.
        annotations: The columns that `ground_truth` is made of.
        fingerprint: Hash of the instances file and of every image's name and size in bytes.
        notes: One line for each thing that was dropped or clipped, with the count.
    """

    name: str
    path: Path
    images: list[ImageRecord]
    category_ids: tuple[int, ...]
    category_names: tuple[str, ...]
    annotations: Annotations
    fingerprint: str
    notes: list[str]

    @property
    def ground_truth(self) -> dict:
        """A new COCO-format dict, ready to be a `pycocotools.coco.COCO().dataset`.

        Boxes, areas and crowd flags are as given, boxes of no size included, so that the result is pycocotools' own on
        the original file. Annotation ids count from 1: an annotation of id 0 can never be found in pycocotools.
        """
        columns = self.annotations
        ids = [record.image_id for record in self.images]
        annotations = [
            {"id": number, "image_id": ids[image], "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
            for number, (image, category, box, area, crowd) in enumerate(
                zip(
                    columns.image.tolist(),
                    columns.category_id.tolist(),
                    columns.bbox.tolist(),
                    columns.area.tolist(),
                    columns.crowd.astype(int).tolist(),
                    strict=True,
                ),
                start=1,
            )
        ]
        for annotation, segmentation in zip(annotations, columns.segmentation, strict=True):
            if type(segmentation) is list:
                annotation["segmentation"] = [polygon.tolist() for polygon in segmentation]
            elif segmentation is not None:
                annotation["segmentation"] = dict(segmentation)
        names = zip(self.category_ids, self.category_names, strict=True)
        folder = os.path.join(self.path.parent.parent, f"{self.name}2017", "")
        return {
            "info": {},
            "licenses": [],
            "images": [
                {"id": r.image_id, "file_name": r.path.removeprefix(folder), "width": r.width, "height": r.height}
                for r in self.images
            ],
            "annotations": annotations,
            "categories": [{"id": category, "name": name} for category, name in names],
        }


@dataclass(frozen=True, eq=False)
class Dataset:
    """Both parts of a data set, with the same categories.

    Attributes:
        root: The directory that holds `annotations`.
        train, val: The parts.
        fingerprint: Hash of both parts' fingerprints: equal for equal content wherever it lies.
        notes: What was dropped or clipped in both, one line each, naming the file.
    """

    root: Path
    train: Split
    val: Split
    fingerprint: str
    notes: list[str]


def find_root(directory: str | os.PathLike) -> Path:
    """The directory that holds `annotations`: `directory` itself or `coco` below it.

    Raises:
        DataError: there is no such directory.
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


def read_dataset(directory: str | os.PathLike) -> Dataset:
    """Read and check both parts.

    Raises:
        DataError: lists the problems of both instances files, and categories that differ between the two.
    """
    root = find_root(directory)
    parts, problems = [], []
    for name in SPLITS:
        try:
            parts.append(read_split(root, name))
        except DataError as error:
            failed = error
            problems += [f"{os.path.relpath(error.path, root)}: {problem}" for problem in error.problems]
    if len(parts) == 1:
        raise failed
    if problems:
        raise DataError(root, problems)
    train, val = parts
    _check_same_categories(train, val)
    fingerprint = hashlib.sha256(f"{train.fingerprint} {val.fingerprint}".encode()).hexdigest()[:32]
    notes = [f"{part.path.name}: {note}" for part in parts for note in part.notes]
    return Dataset(root, train, val, fingerprint, notes)


def _check_same_categories(train: Split, val: Split) -> None:
    ours, theirs = (dict(zip(part.category_ids, part.category_names, strict=True)) for part in (train, val))
    problems = []
    for category in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(category), theirs.get(category)
        if a != b:
            here, there = ("absent" if name is None else quote(name) for name in (b, a))
            problems.append(f"category id {category} is {here}, but {there} in {train.path.name}")
    if problems:
        raise DataError(val.path, problems)


def read_split(directory: str | os.PathLike, split: Literal["train", "val"]) -> Split:
    """Read and check one part of a data directory.

    Raises:
        DataError: lists every problem of the instances file, or, where that is sound, every problem of its images.
        ValueError: `split` is neither train nor val.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    root = find_root(directory)
    path = root / "annotations" / f"instances_{split}2017.json"
    with _no_garbage_collection():
        instances = read_instances(path)
        headers = _check_files(path, root, root / f"{split}2017", instances.images)
        category_ids = tuple(category for category, _ in instances.categories)
        hashed = hashlib.sha256(instances.digest.encode())
        for entry, header in zip(instances.images, headers, strict=True):
            hashed.update(f"{entry.file_name}\0{header.file_bytes}\0".encode())
        return Split(
            name=split,
            path=path,
            images=list(
                _records(root / f"{split}2017", instances.images, headers, instances.annotations, category_ids)
            ),
            category_ids=category_ids,
            category_names=tuple(name for _, name in instances.categories),
            annotations=instances.annotations,
            fingerprint=hashed.hexdigest()[:32],
            notes=instances.notes,
        )


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


def _records(
    folder: Path, entries: list[ImageEntry], headers: list[Header], columns: Annotations, category_ids: tuple[int, ...]
) -> Iterator[ImageRecord]:
    labels = np.searchsorted(np.array(category_ids, dtype=np.int64), columns.category_id)
    whole = (columns.corners[:, 2:] > columns.corners[:, :2]).all(1)
    places = np.arange(len(entries) + 1)

    def by_image(rows: np.ndarray) -> tuple[np.ndarray, list[int]]:
        rows = rows[np.argsort(columns.image[rows], kind="stable")]
        return rows, np.searchsorted(columns.image[rows], places).tolist()

    rows, bounds = by_image(np.flatnonzero(whole & ~columns.crowd))
    boxes, labels, area = columns.corners[rows], labels[rows], columns.area[rows]
    segmentations = [columns.segmentation[row] for row in rows.tolist()]
    crowd_rows, crowd_bounds = by_image(np.flatnonzero(whole & columns.crowd))
    crowd_boxes = columns.corners[crowd_rows]
    for place, (entry, header) in enumerate(zip(entries, headers, strict=True)):
        own = slice(bounds[place], bounds[place + 1])
        yield ImageRecord(
            image_id=entry.image_id,
            path=os.path.join(folder, entry.file_name),
            width=entry.width,
            height=entry.height,
            orientation=applied_orientation(header, entry.width, entry.height),
            boxes=boxes[own],
            labels=labels[own],
            area=area[own],
            segmentations=segmentations[own],
            crowd_boxes=crowd_boxes[crowd_bounds[place] : crowd_bounds[place + 1]],
        )


def _check_files(path: Path, root: Path, folder: Path, entries: list[ImageEntry]) -> list[Header]:
    """The header of every image.

    Raises:
        DataError: the folder is missing, or lists each image that is absent, damaged, of another size, or elsewhere.
    """
    if not os.path.isdir(folder):
        raise DataError(folder, [f"no such directory, but {path.name} names {len(entries)} images in it"])
    # The folder itself may be a link to where the user keeps the images; a file in it may not lead anywhere else.
    allowed = (os.path.realpath(root), os.path.realpath(folder))

    def check(chunk: list[ImageEntry]) -> list[Header | str]:
        return [_check_file(os.fspath(folder), allowed, entry) for entry in chunk]

    # Threads are for cold or remote disks, where a check waits. From the page cache it takes about 13 µs an image with
    # one thread as with sixteen.
    with ThreadPoolExecutor(16) as pool:
        chunks = [entries[start : start + 512] for start in range(0, len(entries), 512)]
        results = [result for chunk in pool.map(check, chunks) for result in chunk]
    problems = [
        f"image {quote(entry.file_name)} (id {entry.image_id}): {result}"
        for entry, result in zip(entries, results, strict=True)
        if type(result) is str
    ]
    if problems:
        raise DataError(path, problems)
    return results


def _check_file(folder: str, allowed: tuple[str, ...], entry: ImageEntry) -> Header | str:
    """The header of one image, or what is wrong with it."""
    path = os.path.join(folder, entry.file_name)
    try:
        if "/" in entry.file_name and not _inside(os.path.dirname(path), allowed):
            return "it lies behind a symbolic link that leaves the data directory"
        try:
            header = read_header(path, follow_links=False)
        except OSError as error:
            # FreeBSD says EMLINK.
            if error.errno not in (errno.ELOOP, errno.EMLINK):
                raise
            if not _inside(path, allowed):
                return "it is a symbolic link that leaves the data directory"
            header = read_header(path)
    except ImageError as error:
        return str(error)
    except (FileNotFoundError, NotADirectoryError):
        return f"absent: there is no such file in {quote(folder)}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if applied_orientation(header, entry.width, entry.height) is None:
        return f"it has {header.width}x{header.height} pixels, but {entry.width}x{entry.height} are declared"
    return header


def _inside(path: str, allowed: tuple[str, ...]) -> bool:
    real = os.path.realpath(path)
    return any(os.path.commonpath((real, directory)) == directory for directory in allowed)


def read_image(record: ImageRecord) -> np.ndarray:
    """Decode an image of a split: (height, width, 3) uint8 RGB.

    Raises:
        DataError: the file does not decode, or is not as it was when the split was read.
    """
    try:
        return decode(record.path, record.width, record.height, record.orientation)
    except ImageError as error:
        raise DataError(record.path, [str(error)]) from error
