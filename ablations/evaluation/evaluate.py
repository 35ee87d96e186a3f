"""COCO average precision and recall, by pycocotools, in percent.

pycocotools defines the numbers; this file closes what it lets through silently: annotation ids of 0 or given twice
(either destroys AP without a word), empty results (an IndexError), scores and boxes that are not finite, images that
are missing or counted twice, category ids nobody knows, ids that a float64 does not hold, dicts of the caller that come
back changed, and -1 for a slice without ground truth.
"""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from ablations.evaluation.detections import Array, Id, Predictions, RunLengths, columns, run_lengths

# What is evaluated, in the order of pycocotools' statistics.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def evaluate(
    predictions: Predictions,
    ground_truth: Mapping[str, Any],
    category_ids: Sequence[Id],
    iou_type: Literal["bbox", "segm"] = "bbox",
) -> dict[str, float | None]:
    """Average precision and recall over IoU 0.50:0.95, at most 100 detections an image and category.

    Crowd regions are ignored: a detection on one is neither right nor wrong, and any number may lie on it. The order of
    the predictions does not matter: images are taken by id, and among equal scores a model's own order stands.

    Args:
        predictions: One `(image_id, detections)` for every image of the ground truth, an empty one where nothing was
            found. `detections` are as in `Detections`, of tensors on any device or arrays; for `"segm"` their `masks`
            are (K, H, W) of the original size or K compressed RLEs.
        ground_truth: An instances file in COCO's layout: `images`, `annotations`, `categories`. Not changed. Ids are
            whole numbers of any size, or all text. An absent `area` is width × height, an absent `iscrowd` 0.
        category_ids: The category id of each label; only these categories are evaluated.
        iou_type: What overlaps, boxes or masks.

    Returns:
        `AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl` in percent; None where a slice has no ground
        truth, 0.0 where it has and nothing was found.

    Raises:
        ValueError: A score, box or label cannot be (the message names the image), an image is missing, unknown or
            given twice, or a category id is not one of the ground truth.

    Example:
        >>> box = {"image_id": 7, "category_id": 3, "id": 1, "bbox": [10, 10, 40, 40]}
        >>> truth = {"images": [{"id": 7, "width": 64, "height": 64}], "annotations": [box], "categories": [{"id": 3}]}
        >>> found = {"boxes": [[10, 10, 50, 46]], "scores": [0.9], "labels": [0]}
        >>> metrics = evaluate([(7, found)], truth, [3])
        >>> round(metrics["AP"]), round(metrics["AP50"]), metrics["APl"]
        (90, 100, None)
    """
    categories = numbered("category", (category["id"] for category in ground_truth["categories"]))
    unknown = [category for category in category_ids if category not in categories]
    if unknown:
        raise ValueError(f"category ids {unknown} are not in the ground truth, which has {list(categories)}")
    if len(set(category_ids)) != len(category_ids):
        raise ValueError(f"category_ids holds an id twice: {list(category_ids)}")
    evaluated = [categories[category] for category in category_ids]
    images = numbered("image", (image["id"] for image in ground_truth["images"]))

    truth = _ground_truth(ground_truth, images, categories, iou_type)
    detections = _detections(predictions, images, truth, evaluated, iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        detections.createIndex()
        evaluation = _Evaluation(truth, detections, iou_type)
        evaluation.params.catIds = sorted(evaluated)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # pycocotools writes -1 where there is nothing to find; a percentage of -100 would be averaged by somebody.
    return {
        name: None if value < 0 else 100.0 * float(value) for name, value in zip(METRICS, evaluation.stats, strict=True)
    }


def numbered(kind: str, ids: Iterable[Id]) -> dict[Id, int]:
    """The numbers from 1 that stand for ids within pycocotools, which passes some through float64: in the ids' order.

    Raises:
        ValueError: The ids have no order.
    """
    try:
        return {value: number for number, value in enumerate(sorted(set(ids)), 1)}
    except TypeError as error:
        raise ValueError(f"{kind} ids must be whole numbers, or all text: {error}") from error


def _ground_truth(
    source: Mapping[str, Any], images: Mapping[Id, int], categories: Mapping[Id, int], iou_type: str
) -> COCO:
    """A copy of the ground truth that pycocotools may write to, its images, categories and annotations renumbered.

    COCOeval notes a match as the annotation's id and reads 0 as none, so an id of 0 is never found, and two annotations
    of one id shadow each other.
    """
    truth = COCO()
    annotations = []
    for number, annotation in enumerate(source["annotations"], 1):
        if annotation["image_id"] not in images:
            raise ValueError(f"annotation {annotation.get('id')} is on an unknown image, {annotation['image_id']}")
        if annotation["category_id"] not in categories:
            raise ValueError(
                f"annotation {annotation.get('id')} is of an unknown category, {annotation['category_id']}"
            )
        width, height = annotation["bbox"][2:]
        area = annotation.get("area")
        copy = {
            "id": number,
            "image_id": images[annotation["image_id"]],
            "category_id": categories[annotation["category_id"]],
            "bbox": list(annotation["bbox"]),
            "area": width * height if area is None else area,
            "iscrowd": int(annotation.get("iscrowd") or 0),
        }
        if iou_type == "segm":
            if not annotation.get("segmentation"):
                raise ValueError(f"annotation {annotation.get('id')} has no segmentation to evaluate masks with")
            copy["segmentation"] = annotation["segmentation"]
        annotations.append(copy)
    truth.dataset = {
        "images": [{**image, "id": images[image["id"]]} for image in source["images"]],
        "annotations": annotations,
        "categories": [{**category, "id": categories[category["id"]]} for category in source["categories"]],
    }
    return truth


def _detections(
    predictions: Predictions,
    numbers: Mapping[Id, int],
    truth: COCO,
    categories: Sequence[int],
    iou_type: str,
) -> COCO:
    """The detections, their images and categories renumbered as those of the ground truth."""
    images = {image["id"]: image for image in truth.dataset["images"]}
    by_image: dict[Id, list[dict[str, Any]]] = {}
    for image_id, detections in predictions:
        # Of a number in an array or a tensor, the number.
        image_id = image_id.item() if hasattr(image_id, "item") else image_id
        if image_id not in numbers:
            raise ValueError(f"a prediction is for image {image_id}, which the ground truth does not have")
        if image_id in by_image:
            raise ValueError(f"image {image_id} was predicted twice")
        image = images[numbers[image_id]]
        by_image[image_id] = _image_detections(image_id, image, detections, categories, iou_type)
    missing = sorted(numbers.keys() - by_image.keys())
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{len(missing)} of {len(images)} images have no prediction: {shown}")

    annotations = [annotation for detections in by_image.values() for annotation in detections]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    results = COCO()
    results.dataset = {**truth.dataset, "annotations": annotations}
    return results


def _image_detections(
    image_id: Id,
    image: Mapping[str, Any],
    detections: Mapping[str, Any],
    category_ids: Sequence[int],
    iou_type: str,
) -> list[dict[str, Any]]:
    bbox, scores, labels = columns(image_id, detections, len(category_ids))
    annotations = [
        {
            "image_id": image["id"],
            "category_id": category_ids[label],
            "bbox": box,
            "area": box[2] * box[3],
            "score": score,
            "iscrowd": 0,
        }
        for box, score, label in zip(bbox.tolist(), scores.tolist(), labels.tolist(), strict=True)
    ]
    if iou_type == "segm":
        masks = _run_lengths(image_id, image, detections["masks"], len(bbox))
        for annotation, mask, area in zip(annotations, masks, rle.area(masks) if masks else [], strict=True):
            annotation["segmentation"] = mask
            annotation["area"] = float(area)
    return annotations


def _run_lengths(
    image_id: Id,
    image: Mapping[str, Any],
    masks: list[RunLengths] | tuple[RunLengths, ...] | Array | Tensor,
    count: int,
) -> list[RunLengths]:
    if not isinstance(masks, list | tuple):
        masks = run_lengths(masks)
    if len(masks) != count:
        raise ValueError(f"image {image_id}: {count} boxes and {len(masks)} masks")
    expected = [image["height"], image["width"]]
    for mask in masks:
        if list(mask["size"]) != expected:
            raise ValueError(f"image {image_id}: a mask of size {list(mask['size'])}, the image has {expected}")
    return list(masks)


# Of one image, category and area range, by the names that COCOeval reads them with.
ImageMatches = dict[str, Any]


class _Evaluation(COCOeval):
    """COCOeval with the matching of one image written for numpy: the same matches, several times as fast.

    pycocotools walks area ranges × thresholds × detections × annotations in Python. Area ranges and thresholds do not
    see each other, and most detections overlap nothing by half; so only the others are walked, for all ranges and
    thresholds at once.
    """

    def _prepare(self) -> None:
        super()._prepare()
        self._matched: dict[tuple[int, int], dict[tuple[float, ...], ImageMatches]] = {}

    def evaluateImg(self, imgId: int, catId: int, aRng: list[float], maxDet: int) -> ImageMatches | None:
        truth, detections = self._gts[imgId, catId], self._dts[imgId, catId]
        if not truth and not detections:
            return None
        if (imgId, catId) not in self._matched:
            self._matched[imgId, catId] = self._match(truth, detections, self.ious[imgId, catId], maxDet)
        return self._matched[imgId, catId][tuple(aRng)]

    def _match(
        self, truth: list[dict[str, Any]], detections: list[dict[str, Any]], overlaps: ArrayLike, most: int
    ) -> dict[tuple[float, ...], ImageMatches]:
        """What `accumulate` reads of one image and category, for every area range."""
        ranges = np.array(self.params.areaRng, dtype=float)
        thresholds = np.minimum(self.params.iouThrs, 1 - 1e-10)
        order = np.argsort([-detection["score"] for detection in detections], kind="mergesort")
        detections = [detections[i] for i in order[:most]]
        ious = np.asarray(overlaps, dtype=float).reshape(len(detections), len(truth))
        ids = np.array([annotation["id"] for annotation in truth], dtype=float)
        crowd = np.array([annotation["iscrowd"] for annotation in truth], dtype=bool)
        areas = np.array([annotation["area"] for annotation in truth], dtype=float)
        detected_areas = np.array([detection["area"] for detection in detections], dtype=float)
        ignored = crowd | (areas < ranges[:, :1]) | (areas > ranges[:, 1:])
        outside = (detected_areas < ranges[:, :1]) | (detected_areas > ranges[:, 1:])

        shape = (len(ranges), len(thresholds))
        matches = np.zeros((*shape, len(detections)))
        matches_ignored = np.zeros((*shape, len(detections)), dtype=bool)
        if ious.size:
            free = np.ones((*shape, len(truth)), dtype=bool)
            for d in np.flatnonzero(ious.max(axis=1) >= thresholds.min()):
                overlap = np.where(free & (ious[d] >= thresholds[:, None]), ious[d], -1.0)
                # A detection takes an ignored annotation only where no counted one is left for it.
                counted = np.where(ignored[:, None], -1.0, overlap)
                overlap = np.where((counted >= 0).any(axis=2, keepdims=True), counted, overlap)
                # Of equal overlaps the last one counts, as in the loop that this replaces.
                best = len(truth) - 1 - overlap[..., ::-1].argmax(axis=2)
                a, t = np.nonzero(overlap.max(axis=2) >= 0)
                best = best[a, t]
                matches[a, t, d] = ids[best]
                matches_ignored[a, t, d] = ignored[a, best]
                # Any number of detections may lie on a crowd.
                free[a, t, best] = crowd[best]
        scores = [detection["score"] for detection in detections]
        return {
            tuple(area): {
                "dtMatches": matches[a],
                "dtScores": scores,
                "dtIgnore": matches_ignored[a] | ((matches[a] == 0) & outside[a]),
                "gtIgnore": ignored[a].astype(int),
            }
            for a, area in enumerate(self.params.areaRng)
        }
