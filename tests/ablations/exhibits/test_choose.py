"""An image's own AP is COCO's of that image alone, and the images shown are those where it changes most."""

import numpy as np
import pytest
import torch

from ablations.evaluation.evaluate import evaluate
from ablations.exhibits.choose import Change, by_image, changes, extremes, image_ap
from ablations.exhibits.pictures import best_boxes, truth_boxes


def random_image(seed):
    """Objects, some of them crowds, and detections near them with equal scores among them."""
    draw = np.random.default_rng(seed)
    objects, found = [], []
    for number in range(1, draw.integers(2, 9)):
        x, y = draw.integers(0, 60, 2).tolist()
        width, height = draw.integers(8, 50, 2).tolist()
        category, crowd = int(draw.integers(1, 3)), int(draw.random() < 0.2)
        objects.append({"id": number, "image_id": 7, "category_id": category, "iscrowd": crowd})
        objects[-1] |= {"bbox": [x, y, width, height], "area": width * height}
        for _ in range(draw.integers(0, 4)):
            moved = [value + int(shift) for value, shift in zip((x, y), draw.integers(-6, 7, 2), strict=True)]
            size = [max(1, value + int(draw.integers(-6, 7))) for value in (width, height)]
            score = float(draw.integers(1, 6)) / 8
            found.append({"image_id": 7, "category_id": int(draw.integers(1, 4)), "bbox": moved + size, "score": score})
    return objects, found


@pytest.mark.parametrize("seed", range(40))
def test_ap_of_one_image_is_pycocotools(seed):
    objects, found = random_image(seed)
    truth = {"images": [{"id": 7, "width": 120, "height": 120}], "annotations": objects}
    truth["categories"] = [{"id": number} for number in (1, 2, 3)]
    boxes = torch.tensor([box["bbox"] for box in found], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = [box["category_id"] - 1 for box in found]
    detections = {"boxes": boxes, "scores": [box["score"] for box in found], "labels": labels}
    expected = evaluate([(7, detections)], truth, [1, 2, 3])["AP"]
    assert image_ap(objects, found) == (None if expected is None else pytest.approx(expected, abs=1e-9))


def boxes(image, *scores):
    """Detections of one category on its object or beside it: a negative score is that of one beside it."""
    return [
        {
            "image_id": image,
            "category_id": 1,
            "bbox": [0 if score > 0 else 50, 0, 10, 10],
            "score": abs(score),
        }
        for score in scores
    ]


def test_the_images_that_change_most_either_way():
    truth = by_image([box for image in "abcdef" for box in boxes(image, 1.0)])
    before = by_image([*boxes("a", -0.9, 0.8), *boxes("b", 0.5), *boxes("c", 0.5), *boxes("e", 0.5)])
    after = by_image([*boxes("a", 0.9), *boxes("b", -0.9, 0.5), *boxes("d", 0.5), *boxes("e", 0.5)])
    ordered = changes(truth, before, after)
    half = pytest.approx(50, abs=1)
    assert [change.image_id for change in ordered] == ["d", "a", "e", "f", "b", "c"]
    assert extremes(ordered, 9) == [("d", 0, 100), ("a", half, 100), ("c", 100, 0), ("b", 100, half)]
    assert [change.image_id for change in extremes(ordered, 1)] == ["d", "c"]
    assert changes(by_image([boxes("a", 1.0)[0] | {"iscrowd": 1}]), before, after) == []
    assert extremes([Change("a", 3.0, 3.0)], 2) == []


def test_as_many_boxes_as_objects_and_which_are_right():
    objects = [*boxes(1, 1.0), boxes(1, -1.0)[0], boxes(1, 1.0)[0] | {"iscrowd": 1}]
    found = boxes(1, 0.4, 0.9, 0.8, -0.1)
    names = {1: "heart"}
    assert [box["label"] for box in truth_boxes(objects, names)] == ["heart", "heart"], "crowds are left out"
    drawn = best_boxes(objects, found, names)
    assert [(box["score"], box["right"]) for box in drawn] == [(0.9, True), (0.8, False)], "an object counts once"
    wrong = [box | {"category_id": 2} for box in found]
    assert [box["right"] for box in best_boxes(objects, wrong, names)] == [False, False]
    assert best_boxes([], found, names) == []
