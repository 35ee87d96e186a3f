"""The detections of a detector, and their file in COCO's results format, which anyone's tools read.

A file holds boxes to 0.01 pixel and scores to six significant digits. What is evaluated is what is stored: pycocotools,
given the file and the ground truth, finds the row's numbers bit for bit.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
from numpy.typing import ArrayLike, DTypeLike
from pycocotools import mask as rle
from torch import Tensor

from ablations.files import atomic_file

Array = np.ndarray[Any, Any]

FILE = "detections.json.gz"

Id = int | str
# A compressed mask as pycocotools has it: `size` (height, width) and `counts`.
RunLengths = dict[str, Any]


class Detections(TypedDict):
    """The detections of one image.

    Attributes:
        boxes: (K, 4) float32 xyxy in pixels of the original image.
        scores: (K,).
        labels: (K,) int64, 0-based and contiguous.
        masks: K masks of the original image's size, where the detector has them.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: NotRequired[list[RunLengths]]


# One `(image_id, detections)` for every image. `detections` are as in `Detections`, of tensors on any device or arrays;
# in place of `boxes` they may hold `bbox`, (K, 4) xywh, which results files have.
Predictions = Iterable[tuple[Id, Mapping[str, Any]]]


class Columns(NamedTuple):
    """The detections of one image as arrays: bbox (K, 4) xywh, scores (K,), both float64, and labels (K,) int64."""

    bbox: Array
    scores: Array
    labels: Array


def columns(image_id: Id, detections: Mapping[str, Any], categories: int) -> Columns:
    """The detections of one image, checked.

    Raises:
        ValueError: A score, box or label cannot be; the message names the image.
    """
    name = "bbox" if "bbox" in detections else "boxes"
    boxes = array(detections[name], np.float64).reshape(-1, 4)
    scores = array(detections["scores"], np.float64)
    labels = array(detections["labels"], np.int64)
    if not len(boxes) == len(scores) == len(labels):
        raise ValueError(f"image {image_id}: {len(boxes)} boxes, {len(scores)} scores and {len(labels)} labels")
    for what, values, finite in (
        ("box", boxes, np.isfinite(boxes).all(axis=1)),
        ("score", scores, np.isfinite(scores)),
    ):
        bad = np.flatnonzero(~finite)
        if len(bad):
            raise ValueError(f"image {image_id}: {what} {bad[0]} is {values[bad[0]].tolist()}, not a finite number")
    sizes = boxes[:, 2:] if name == "bbox" else boxes[:, 2:] - boxes[:, :2]
    bad = np.flatnonzero((sizes < 0).any(axis=1))
    if len(bad):
        raise ValueError(f"image {image_id}: box {bad[0]} is {boxes[bad[0]].tolist()}; x2 and y2 must not be less")
    bad = np.flatnonzero((labels < 0) | (labels >= categories))
    if len(bad):
        raise ValueError(f"image {image_id}: label {labels[bad[0]]}; there are {categories} categories")
    return Columns(np.concatenate([boxes[:, :2], sizes], axis=1), scores, labels)


def array(values: ArrayLike | Tensor, dtype: DTypeLike) -> Array:
    """A tensor on any device, or anything that NumPy takes, as an array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=dtype)


def run_lengths(masks: ArrayLike | Tensor) -> list[RunLengths]:
    """Masks (K, H, W), a tensor on any device or an array, as K compressed RLEs: a hundredth of the memory."""
    pixels = array(masks, np.uint8)
    return rle.encode(np.asfortranarray(pixels.transpose(1, 2, 0))) if len(pixels) else []


def write_detections(path: str | Path, predictions: Predictions, category_ids: Sequence[Id]) -> None:
    """Write detections in COCO's results format, gzip'd JSON, whole or not at all; equal detections give equal bytes.

    Args:
        path: The file.
        predictions: One `(image_id, detections)` for every image.
        category_ids: The category id of each label.

    Raises:
        ValueError: A score, box or label cannot be; the message names the image.
        OSError: The file cannot be written; what stood there is unchanged.
    """
    categories = [json.dumps(category) for category in category_ids]
    # No time and no name in the header: the bytes depend on the detections alone.
    with atomic_file(path) as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as stream:
        before = "[\n"
        for image_id, detections in predictions:
            bbox, scores, labels = columns(image_id, detections, len(category_ids))
            image = json.dumps(image_id)
            # Rounding adds 0 so that no box begins at -0.0.
            lines = [
                f'{{"image_id":{image},"category_id":{categories[label]},"bbox":{box},"score":{score:.6g}'
                for box, score, label in zip(
                    (np.round(bbox, 2) + 0.0).tolist(), scores.tolist(), labels.tolist(), strict=True
                )
            ]
            if "masks" in detections:
                masks = detections["masks"]
                masks = masks if isinstance(masks, list | tuple) else run_lengths(masks)
                lines = [f'{line},"segmentation":{_text(mask)}' for line, mask in zip(lines, masks, strict=True)]
            if lines:
                stream.write((before + "},\n".join(lines) + "}").encode())
                before = ",\n"
        stream.write(b"\n]\n" if before == ",\n" else b"[]\n")


def _text(mask: RunLengths) -> str:
    counts = mask["counts"]
    text = counts.decode() if isinstance(counts, bytes) else counts
    return json.dumps({"size": list(mask["size"]), "counts": text})


def read_detections(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a results file: `image_id`, `category_id`, `bbox` xywh, `score`, perhaps `segmentation`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged: no gzip'd JSON, or cut off.
    """
    try:
        with gzip.open(path, "rb") as file:
            return json.loads(file.read())
    except (gzip.BadGzipFile, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def by_image(
    results: Iterable[Mapping[str, Any]], images: Iterable[Id], category_ids: Sequence[Id]
) -> list[tuple[Id, dict[str, Any]]]:
    """Entries of a results file as one `(image_id, detections)` for every image, in `images`' order, `bbox` xywh.

    Raises:
        ValueError: An entry is of an image or a category that is not among the given ones.
    """
    labels = {category: label for label, category in enumerate(category_ids)}
    entries: dict[Id, list[Mapping[str, Any]]] = {image: [] for image in images}
    for entry in results:
        if entry["image_id"] not in entries or entry["category_id"] not in labels:
            raise ValueError(f"a detection is of image {entry['image_id']} and category {entry['category_id']}")
        entries[entry["image_id"]].append(entry)
    grouped = []
    for image, found in entries.items():
        detections: dict[str, Any] = {
            "bbox": np.array([entry["bbox"] for entry in found], dtype=np.float64).reshape(-1, 4),
            "scores": np.array([entry["score"] for entry in found], dtype=np.float64),
            "labels": np.array([labels[entry["category_id"]] for entry in found], dtype=np.int64),
        }
        if all("segmentation" in entry for entry in found):
            detections["masks"] = [entry["segmentation"] for entry in found]
        grouped.append((image, detections))
    return grouped
