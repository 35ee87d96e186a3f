"""What reading a data directory gives: images, what there is to learn in them, and the ground truth of evaluation."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ablations.data.annotations import Annotations
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
        notes: One line for each thing that was dropped, clipped or read leniently, with the count.
        dropped: How many annotations were left out of training and ground truth, by reason; empty without any.
    """

    name: str
    path: Path
    images: list[ImageRecord]
    category_ids: tuple[int | str, ...]
    category_names: tuple[str, ...]
    annotations: Annotations
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
