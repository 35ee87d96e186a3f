"""Average precision: COCO's known answers, cases counted by hand, parity with pycocotools, and every trap closed."""

import copy
import json

import numpy as np
import pytest
import torch
from evaluation_scenes import COCOEVAL, by_pycocotools, found, needs_cocoeval, random_scene, truth

from ablations.evaluation.evaluate import METRICS, evaluate

BOX = (1, 1, 10, 10, 40, 40)  # a medium-sized object: 1600 pixels
RIGHT = (10, 10, 50, 50)


def test_perfect_detections_score_100():
    metrics = evaluate([(1, found((*RIGHT, 0.9, 0)))], truth([BOX]), [1])
    assert tuple(metrics) == METRICS
    for name in ("AP", "AP50", "AP75", "APm", "AR1", "AR10", "AR100", "ARm"):
        assert metrics[name] == pytest.approx(100, abs=1e-12)
    assert metrics["APs"] is metrics["APl"] is metrics["ARs"] is metrics["ARl"] is None
    assert all(type(value) in (float, type(None)) for value in metrics.values())


def test_iou_thresholds_are_counted_by_hand():
    # 40x40 shifted by 10: IoU 1200/2000 = 0.6, right at the thresholds 0.50 and 0.55 and, with equality, at 0.60.
    metrics = evaluate([(1, found((20, 10, 60, 50, 0.9, 0)))], truth([BOX]), [1])
    assert metrics["AP"] == pytest.approx(30, abs=1e-12)
    assert metrics["AP50"] == pytest.approx(100, abs=1e-12) and metrics["AP75"] == 0


def test_a_false_positive_that_scores_higher_halves_the_precision():
    detections = found((100, 100, 140, 140, 0.9, 0), (*RIGHT, 0.8, 0))
    assert evaluate([(1, detections)], truth([BOX]), [1])["AP"] == pytest.approx(50, abs=1e-12)


def test_recall_at_one_detection_an_image():
    boxes = [BOX, (1, 1, 100, 100, 40, 40)]
    detections = found((*RIGHT, 0.9, 0), (100, 100, 140, 140, 0.8, 0))
    metrics = evaluate([(1, detections)], truth(boxes), [1])
    assert metrics["AR1"] == pytest.approx(50, abs=1e-12) and metrics["AR10"] == pytest.approx(100, abs=1e-12)


def test_at_most_100_detections_an_image_count():
    wrong = [(100, 100, 140, 140, 0.9, 0)] * 100
    assert evaluate([(1, found(*wrong, (*RIGHT, 0.5, 0)))], truth([BOX]), [1])["AR100"] == 0
    assert evaluate([(1, found(*wrong[1:], (*RIGHT, 0.5, 0)))], truth([BOX]), [1])["AR100"] == pytest.approx(100)


def test_a_crowd_is_neither_right_nor_wrong():
    crowd = (1, 1, 100, 100, 80, 80, {"iscrowd": 1})
    on_crowd = [(105, 105, 145, 145, 0.95, 0), (110, 110, 150, 150, 0.94, 0), (100, 100, 180, 180, 0.93, 0)]
    detections = found(*on_crowd, (*RIGHT, 0.9, 0))
    with_crowd = evaluate([(1, detections)], truth([BOX, crowd]), [1])
    assert with_crowd["AP"] == pytest.approx(100, abs=1e-12)
    assert evaluate([(1, detections)], truth([BOX]), [1])["AP"] == pytest.approx(25, abs=1e-12)
    only = evaluate([(1, found(*on_crowd))], truth([crowd]), [1])
    assert set(only.values()) == {None}, "a crowd alone is no ground truth"


def test_area_is_the_annotations_own():
    # The area of a segmentation, smaller than its box: 1600 pixels of box, 500 of object, which makes it small.
    metrics = evaluate([(1, found((*RIGHT, 0.9, 0)))], truth([(*BOX, {"area": 500})]), [1])
    assert metrics["APs"] == pytest.approx(100, abs=1e-12) and metrics["APm"] is None


def test_an_area_on_the_border_of_two_size_classes_belongs_to_both():
    metrics = evaluate([(1, found((10, 10, 42, 42, 0.9, 0)))], truth([(1, 1, 10, 10, 32, 32)]), [1])
    assert metrics["APs"] == metrics["APm"] == pytest.approx(100, abs=1e-12) and metrics["APl"] is None


def test_of_two_equal_overlaps_the_later_annotation_is_taken():
    # The first detection lies midway between both objects; the second reaches only the first of them (IoU 0.78).
    boxes = [(1, 1, 10, 10, 40, 40), (1, 1, 20, 10, 40, 40)]
    detections = found((15, 10, 55, 50, 0.9, 0), (5, 10, 45, 50, 0.8, 0))
    assert evaluate([(1, detections)], truth(boxes), [1])["AP50"] == pytest.approx(100, abs=1e-12)
    assert evaluate([(1, detections)], truth(boxes[::-1]), [1])["AP50"] == pytest.approx(5100 / 101, abs=1e-12)


def test_only_the_given_categories_count():
    ground = truth([BOX, (1, 2, 100, 100, 40, 40)], categories=(1, 2))
    detections = found((*RIGHT, 0.9, 0))
    assert evaluate([(1, detections)], ground, [1])["AP"] == pytest.approx(100, abs=1e-12)
    assert evaluate([(1, detections)], ground, [1, 2])["AP"] == pytest.approx(50, abs=1e-12)


def test_sparse_category_ids_are_mapped_by_position():
    ground = truth([(1, 90, 10, 10, 40, 40), (1, 13, 100, 100, 40, 40)], categories=(1, 13, 90))
    detections = found((*RIGHT, 0.9, 2), (100, 100, 140, 140, 0.9, 1))
    assert evaluate([(1, detections)], ground, [1, 13, 90])["AP"] == pytest.approx(100, abs=1e-12)
    assert evaluate([(1, detections)], ground, [1, 90, 13])["AP"] == 0
    swapped = found((*RIGHT, 0.9, 1), (100, 100, 140, 140, 0.9, 2))
    assert evaluate([(1, swapped)], ground, [1, 90, 13])["AP"] == pytest.approx(100, abs=1e-12)


def test_annotation_ids_of_zero_and_twice_do_not_matter():
    boxes = [(1, 1, 10, 10, 40, 40), (1, 1, 100, 100, 40, 40)]
    detections = found((*RIGHT, 0.9, 0), (100, 100, 140, 140, 0.8, 0))
    for ids in ((0, 1), (7, 7), (-1, 0), ("a", "b")):
        ground = truth(boxes)
        for annotation, number in zip(ground["annotations"], ids, strict=True):
            annotation["id"] = number
        assert evaluate([(1, detections)], ground, [1])["AP"] == pytest.approx(100, abs=1e-12)


def test_what_is_absent_is_taken_as_usual():
    ground = truth([BOX, (1, 1, 100, 100, 20, 20)])
    detections = found((*RIGHT, 0.9, 0), (100, 100, 120, 120, 0.8, 0))
    expected = evaluate([(1, detections)], ground, [1])
    assert expected["APs"] == expected["APm"] == pytest.approx(100, abs=1e-12)
    for changes in ({"area": None}, {"iscrowd": None}, {"iscrowd": False}, {"iscrowd": 0.0}):
        assert evaluate([(1, detections)], truth([BOX, (1, 1, 100, 100, 20, 20)], **changes), [1]) == expected
    # An area of nothing is one, a small one.
    none = evaluate([(1, detections)], truth([BOX, (1, 1, 100, 100, 20, 20)], area=0), [1])
    assert none["APs"] == pytest.approx(100, abs=1e-12) and none["APm"] is None
    for key in ("area", "iscrowd"):
        spoilt = copy.deepcopy(ground)
        for annotation in spoilt["annotations"]:
            del annotation[key]
        assert evaluate([(1, detections)], spoilt, [1]) == expected


NUMBERING = {
    "text": lambda number: f"image {number:03d}",
    "64-bit": lambda number: 2**63 - 100 + number,
    "beyond-float64": lambda number: 2**53 + number,
    "negative": lambda number: number - 1000,
    "real": float,
}


@pytest.mark.parametrize("case", NUMBERING)
def test_ids_of_any_kind_give_the_same_bits(case):
    number = NUMBERING[case]
    ground, predictions = random_scene(4)
    expected = evaluate(predictions, ground, [1, 2, 3])
    other = copy.deepcopy(ground)
    for entry in [*other["images"], *other["categories"]]:
        entry["id"] = number(entry["id"])
    for annotation in other["annotations"]:
        annotation.update(image_id=number(annotation["image_id"]), category_id=number(annotation["category_id"]))
    renamed = [(number(image), detections) for image, detections in predictions]
    assert evaluate(renamed, other, [number(category) for category in (1, 2, 3)]) == expected
    assert evaluate(renamed[::-1], other, [number(category) for category in (1, 2, 3)]) == expected


def test_image_ids_from_an_array_or_a_tensor():
    for image in (np.int64(1), torch.tensor(1), 1.0):
        assert evaluate([(image, found((*RIGHT, 0.9, 0)))], truth([BOX]), [1])["AP"] == pytest.approx(100)
    with pytest.raises(ValueError, match="a prediction is for image 1, which"):
        evaluate([("1", found())], truth([BOX]), [1])


def test_ids_without_an_order_are_refused():
    ground = truth([BOX], images=2)
    ground["images"][1]["id"] = "2"
    with pytest.raises(ValueError, match="image ids must be whole numbers, or all text"):
        evaluate([(1, found()), ("2", found())], ground, [1])


def test_nothing_found_is_zero_and_nothing_there_is_none():
    nothing = evaluate([(1, found())], truth([BOX]), [1])
    assert nothing["AP"] == nothing["AR100"] == 0.0 and nothing["APs"] is None
    assert set(evaluate([(1, found((*RIGHT, 0.9, 0)))], truth([]), [1]).values()) == {None}
    assert set(evaluate([(1, found())], truth([]), [1]).values()) == {None}
    assert set(evaluate([], truth([], images=0), [1]).values()) == {None}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", ["x2", "score"])
def test_what_is_not_finite_names_its_image(value, column):
    detection = [*RIGHT, 0.9, 0]
    detection[2 if column == "x2" else 4] = value
    predictions = [(1, found((*RIGHT, 0.9, 0))), (2, found((*RIGHT, 0.8, 0), detection))]
    with pytest.raises(ValueError, match=rf"image 2: (box|score) 1 is .*{value}"):
        evaluate(predictions, truth([BOX], images=2), [1])


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([(1, found((50, 10, 10, 50, 0.9, 0)))], r"image 1: box 0"),
        ([(1, found((*RIGHT, 0.9, 1)))], r"image 1: label 1; there are 1"),
        ([(1, found((*RIGHT, 0.9, -1)))], r"image 1: label -1"),
        ([(1, found()), (1, found())], r"image 1 was predicted twice"),
        ([(1, found()), (3, found())], r"image 3, which"),
        ([], r"1 of 1 images have no prediction: 1"),
        ([(1, found((*RIGHT, 0.9, 0)) | {"scores": torch.ones(2)})], r"image 1: 1 boxes, 2 scores"),
    ],
)
def test_predictions_that_cannot_be_are_refused(predictions, message):
    with pytest.raises(ValueError, match=message):
        evaluate(predictions, truth([BOX]), [1])


def test_category_and_image_ids_that_nobody_knows_are_refused():
    with pytest.raises(ValueError, match=r"\[2\] are not in the ground truth"):
        evaluate([(1, found())], truth([BOX]), [1, 2])
    with pytest.raises(ValueError, match="twice"):
        evaluate([(1, found())], truth([BOX]), [1, 1])
    with pytest.raises(ValueError, match="unknown category, 5"):
        evaluate([(1, found())], truth([(1, 5, *BOX[2:])]), [1])
    with pytest.raises(ValueError, match="unknown image, 9"):
        evaluate([(1, found())], truth([(9, *BOX[1:])]), [1])


@pytest.mark.parametrize("seed", range(6))
def test_the_same_bits_as_pycocotools(seed):
    ground, predictions = random_scene(seed)
    assert list(evaluate(predictions, ground, [1, 2, 3]).values()) == by_pycocotools(ground, predictions)


def test_the_order_of_the_images_does_not_matter():
    ground, predictions = random_scene(1)
    ours = evaluate(predictions, ground, [1, 2, 3])
    assert evaluate(predictions[::-1], ground, [1, 2, 3]) == ours
    assert evaluate(iter(predictions[5:] + predictions[:5]), ground, [1, 2, 3]) == ours


def test_nothing_of_the_callers_changes_and_nothing_is_printed(capfd):
    ground, predictions = random_scene(2)
    before = copy.deepcopy((ground, predictions))
    evaluate(predictions, ground, [1, 2, 3])
    assert ground == before[0]
    for (_, ours), (_, old) in zip(predictions, before[1], strict=True):
        assert ours.keys() == old.keys() and all(torch.equal(ours[name], old[name]) for name in ours)
    assert capfd.readouterr() == ("", "")


def square(x1, y1, x2, y2):
    mask = np.zeros((200, 200), dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


def test_masks_are_compared_as_masks():
    # The box is right; the mask covers the upper half of the object: IoU 0.5, right at one threshold of ten.
    ground = truth([(*BOX, {"segmentation": [[10, 10, 50, 10, 50, 50, 10, 50]]})])
    detections = found((*RIGHT, 0.9, 0)) | {"masks": torch.from_numpy(square(10, 10, 50, 30)[None])}
    assert evaluate([(1, detections)], ground, [1])["AP"] == pytest.approx(100, abs=1e-12)
    metrics = evaluate([(1, detections)], ground, [1], "segm")
    assert metrics["AP"] == pytest.approx(10, abs=1e-12) and metrics["AP50"] == pytest.approx(100, abs=1e-12)
    empty = found() | {"masks": torch.zeros(0, 200, 200, dtype=torch.bool)}
    assert evaluate([(1, empty)], ground, [1], "segm")["AP"] == 0
    with pytest.raises(ValueError, match=r"image 1: a mask of size \[100, 200\]"):
        evaluate([(1, detections | {"masks": detections["masks"][:, :100]})], ground, [1], "segm")
    with pytest.raises(ValueError, match="no segmentation"):
        evaluate([(1, detections)], truth([BOX]), [1], "segm")


KNOWN = {
    "bbox": {
        "AP": 50.45806987249628,
        "AP50": 69.69727247299577,
        "AP75": 57.29816669904824,
        "AR100": 59.5352982877607,
    },
    "segm": {"AP": 31.95452758576433},
}


@needs_cocoeval
@pytest.mark.parametrize("kind", KNOWN)
def test_known_answers(kind):
    ground = json.loads((COCOEVAL / "instances_val2014_100.json").read_text())
    results = json.loads((COCOEVAL / f"instances_val2014_fake{kind}100_results.json").read_text())
    ids = sorted(category["id"] for category in ground["categories"])
    images = {image["id"]: [] for image in ground["images"]}
    for result in results:
        images[result["image_id"]].append(result)
    predictions = []
    for image, rows in images.items():
        boxes = np.array([row.get("bbox", [0, 0, 0, 0]) for row in rows]).reshape(-1, 4)
        predictions.append(
            (
                image,
                {
                    "boxes": np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
                    "scores": [row["score"] for row in rows],
                    "labels": [ids.index(row["category_id"]) for row in rows],
                    "masks": [row.get("segmentation") for row in rows],
                },
            )
        )
    metrics = evaluate(predictions, ground, ids, kind)
    for name, value in KNOWN[kind].items():
        assert metrics[name] == pytest.approx(value, rel=1e-12)
