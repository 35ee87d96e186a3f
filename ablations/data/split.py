"""What reading a data directory gives: images, what there is to learn in them, and the ground truth of evaluation."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from ablations.data.annotations import Annotations, ImageEntry, id_column
from ablations.data.segments import Segmentation


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
        area: (n,) float64, square pixels, as given, or width × height of the box.
        segmentations: One for each box, None where it has none that can be used.
        crowd_boxes: (m, 4) float32, regions that training ignores.
    """

    image_id: int | str
    path: str
    width: int
    height: int
    orientation: int
    boxes: np.ndarray
    labels: np.ndarray
    area: np.ndarray
    segmentations: list[Segmentation | None]
    crowd_boxes: np.ndarray


@dataclass(frozen=True, eq=False)
class Records(Sequence[ImageRecord]):
    """The images of a split as columns of m; an `ImageRecord` is made when it is asked for.

    Attributes:
        folder: The directory that the file names are relative to.
        ids: (m,) int64, uint64 or, of text, object.
        names: uint8, the file names in UTF-8, one after the other.
        name_ends: (m + 1,) int64, where each begins and the last ends.
        sizes: (m, 2) int64, width and height in pixels.
        orientation: (m,) uint8.
        annotations: Of the split.
        rows, bounds: The annotations to train on, image by image, (k,) int64; those of image i are
            `rows[bounds[i] : bounds[i + 1]]`.
        crowd_rows, crowd_bounds: Likewise, the crowd regions.
    """

    folder: str
    ids: np.ndarray
    names: np.ndarray
    name_ends: np.ndarray
    sizes: np.ndarray
    orientation: np.ndarray
    annotations: Annotations
    rows: np.ndarray
    bounds: np.ndarray
    crowd_rows: np.ndarray
    crowd_bounds: np.ndarray

    @classmethod
    def of(cls, folder: str, entries: Sequence[ImageEntry], columns: Annotations) -> "Records":
        """The columns of these images, in id order, each as it is stored: turned by nothing."""
        names = [entry.file_name.encode() for entry in entries]
        whole = (columns.corners[:, 2:] > columns.corners[:, :2]).all(1)
        numbers = np.arange(len(entries) + 1)

        def by_image(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rows = rows[np.argsort(columns.image[rows], kind="stable")]
            return rows, np.searchsorted(columns.image[rows], numbers)

        return cls(
            folder,
            id_column([entry.image_id for entry in entries]),
            np.frombuffer(b"".join(names), np.uint8),
            np.cumsum([0, *map(len, names)]),
            np.array([(entry.width, entry.height) for entry in entries], np.int64).reshape(-1, 2),
            np.ones(len(entries), np.uint8),
            columns,
            *by_image(np.flatnonzero(columns.trained_on)),
            *by_image(np.flatnonzero(whole & columns.crowd)),
        )

    def entry(self, index: int) -> ImageEntry:
        """An image as the instances file declares it."""
        first, end = self.name_ends[index : index + 2].tolist()
        return ImageEntry(self.ids.item(index), self.names[first:end].tobytes().decode(), *self.sizes[index].tolist())

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageRecord]: ...
    def __getitem__(self, index: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        entry, columns = self.entry(index), self.annotations
        rows = self.rows[slice(*self.bounds[index : index + 2].tolist())]
        crowd_rows = self.crowd_rows[slice(*self.crowd_bounds[index : index + 2].tolist())]
        return ImageRecord(
            image_id=entry.image_id,
            path=os.path.join(self.folder, entry.file_name),
            width=entry.width,
            height=entry.height,
            orientation=self.orientation.item(index),
            boxes=columns.corners[rows],
            labels=columns.category[rows],
            area=columns.area[rows],
            segmentations=[columns.segmentation[row] for row in rows.tolist()],
            crowd_boxes=columns.corners[crowd_rows],
        )


def sizes(records: Sequence[ImageRecord]) -> np.ndarray:
    """(m, 2) int64, width and height of each image in pixels."""
    if isinstance(records, Records):
        return records.sizes
    return np.array([(record.width, record.height) for record in records], np.int64).reshape(-1, 2)


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
        digest: SHA-256 of the instances file.
        measured: Whether sizes that it does not declare were taken from the image files.
        fingerprint: Hash of the instances file and of every image's name and size in bytes.
        notes: One line for each thing that was dropped, clipped or read leniently, with the count.
        dropped: How many annotations were left out of training and ground truth, by reason; empty without any.
    """

    name: str
    path: Path
    images: Sequence[ImageRecord]
    category_ids: tuple[int | str, ...]
    category_names: tuple[str, ...]
    annotations: Annotations
    digest: str
    measured: bool
    fingerprint: str
    notes: list[str]
    dropped: dict[str, int]

    @property
    def ground_truth(self) -> dict[str, Any]:
        """A new COCO-format dict, ready to be a `pycocotools.coco.COCO().dataset`.

        Boxes, areas and crowd flags are as given, boxes of no size included, so that the result is pycocotools' own on
        the original file, less the annotations that `dropped` counts. Segmentations are there where they are usable.
        Annotation ids count from 1: an annotation of id 0 can never be found in pycocotools.
        """
        columns = self.annotations
        ids = [record.image_id for record in self.images]
        annotations: list[dict[str, Any]] = [
            {
                "id": number,
                "image_id": ids[image],
                "category_id": self.category_ids[category],
                "bbox": box,
                "area": area,
                "iscrowd": crowd,
            }
            for number, (image, category, box, area, crowd) in enumerate(
                zip(
                    columns.image.tolist(),
                    columns.category.tolist(),
                    columns.bbox.tolist(),
                    columns.area.tolist(),
                    columns.crowd.astype(int).tolist(),
                    strict=True,
                ),
                start=1,
            )
        ]
        for annotation, segmentation in zip(annotations, columns.segmentation, strict=True):
            if isinstance(segmentation, dict):
                annotation["segmentation"] = dict(segmentation)
            elif segmentation is not None:
                annotation["segmentation"] = [polygon.tolist() for polygon in segmentation]
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
    """Both parts of a data set, with the same categories, those of the training part.

    Attributes:
        root: The directory that holds `annotations`.
        train, val: The parts.
        fingerprint: Hash of both parts' fingerprints: equal for equal content wherever it lies.
        notes: What was dropped, clipped or read leniently in both, one line each, naming the file.
    """

    root: Path
    train: Split
    val: Split
    fingerprint: str
    notes: list[str]
