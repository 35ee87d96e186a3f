"""Error types: an account of the paper's definitions in plain Python, hotcoco where it agrees, and cases by hand."""

import contextlib
import io

import numpy as np
import pytest
from evaluation_scenes import found, random_scene, repeated, truth

from ablations.evaluation.errors import ERRORS, error_types, gains
from ablations.evaluation.matches import match
from ablations.evaluation.weighted import in_blocks, precisions


def measured(ground, predictions, weights=None):
    """The gain of each type, of one weighting."""
    ids = [category["id"] for category in ground["categories"]]
    matches = match(ground, predictions, ids)
    blocks = in_blocks(matches, np.ones((1, matches.images), int) if weights is None else weights, np.float64)
    return {name: value[0] for name, value in gains(matches, blocks, precisions(matches, blocks)[0, 0]).items()}


def iou(a, b, crowd=False):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    own = a[2] * a[3]
    return width * height / (own if crowd else own + b[2] * b[3] - width * height)


def ap50(detections, objects):
    """Mean over categories of 101 precisions; detections are (category, score, right), objects a count by category."""
    values = []
    for category, count in objects.items():
        precision, recall, right = [], [], 0
        ranked = sorted((d for d in detections if d[0] == category), key=lambda d: -d[1])
        for place, (_, _, hit) in enumerate(ranked, 1):
            right += hit
            precision.append(right / place)
            recall.append(right / count if count else 0)
        best = [max(precision[i:]) for i in range(len(precision))]
        reached = [next((p for p, r in zip(best, recall, strict=True) if r >= t), 0) for t in np.linspace(0, 1, 101)]
        values.append(sum(reached) / 101 if count else 0)
    return 100 * sum(values) / len(values)


def by_definition(ground, predictions):
    """The six gains as Bolya et al. define them, section 2.2 of the paper, one detection after the other."""
    objects = [entry | {"found": False, "aimed": False} for entry in ground["annotations"]]
    everything = []
    for image, detections in predictions:
        here = [entry for entry in objects if entry["image_id"] == image]
        real = [entry for entry in here if not entry["iscrowd"]]
        rows = [
            {"box": [x1, y1, x2 - x1, y2 - y1], "score": score, "category": label + 1}
            for (x1, y1, x2, y2), score, label in zip(
                *(detections[name].tolist() for name in ("boxes", "scores", "labels")), strict=True
            )
        ]
        rows.sort(key=lambda row: -row["score"])
        for row in rows:
            own = [entry for entry in here if entry["category_id"] == row["category"]]
            free = [entry for entry in own if not entry["iscrowd"] and not entry["found"]]
            best = max(free, key=lambda entry: (iou(row["box"], entry["bbox"]), entry["id"]), default=None)
            if best and iou(row["box"], best["bbox"]) >= 0.5:
                best["found"] = True
                row["kind"] = "right"
            elif any(entry["iscrowd"] and iou(row["box"], entry["bbox"], True) >= 0.5 for entry in own):
                row["kind"] = "ignored"
            else:
                row["kind"] = "wrong"
        for row in rows:
            if row["kind"] != "wrong":
                continue
            overlaps = [(iou(row["box"], entry["bbox"]), entry) for entry in real]
            mine = [pair for pair in overlaps if pair[1]["category_id"] == row["category"]]
            others = [pair for pair in overlaps if pair[1]["category_id"] != row["category"]]
            near, row["near"] = max(mine, key=lambda pair: pair[0], default=(0, None))
            far, row["far"] = max(others, key=lambda pair: pair[0], default=(0, None))
            if 0.1 <= near <= 0.5:
                row["kind"], row["target"] = "loc", row["near"]
            elif far >= 0.5:
                row["kind"], row["target"] = "cls", row["far"]
            elif near > 0.5:
                row["kind"] = "dup"
            else:
                row["kind"] = "bkg" if far <= 0.1 else "both"
            if "target" in row:
                row["target"]["aimed"] = True
        everything += [row for row in rows if row["kind"] != "ignored"]

    real = [entry for entry in objects if not entry["iscrowd"]]
    count = {c: n for c in {entry["category_id"] for entry in real} if (n := sum(e["category_id"] == c for e in real))}
    plain = [(row["category"], row["score"], row["kind"] == "right") for row in everything]
    base = ap50(plain, count)
    result = {}
    for kind in ERRORS[:5]:
        kept = [(row["category"], row["score"], row["kind"] == "right") for row in everything if row["kind"] != kind]
        for entry in real if kind in ("cls", "loc") else ():
            aims = [row for row in everything if row["kind"] == kind and row["target"] is entry]
            if aims and not entry["found"]:
                kept.append((entry["category_id"], max(row["score"] for row in aims), True))
        result[kind] = ap50(kept, count) - base
    left = dict(count)
    for entry in real:
        left[entry["category_id"]] -= not entry["found"] and not entry["aimed"]
    return result | {"miss": ap50(plain, left) - base}


def unequal(seed, **sizes):
    """A scene in which no two detections have one score: the order of equal ones is nobody's definition."""
    ground, predictions = random_scene(seed, **sizes)
    rng = np.random.default_rng(seed)
    for _, detections in predictions:
        detections["scores"] = detections["scores"].new_tensor(rng.random(len(detections["scores"])))
    return ground, predictions


@pytest.mark.parametrize("seed", range(8))
def test_gains_are_those_of_the_definitions(seed):
    ground, predictions = unequal(seed, images=8, categories=1 + seed % 4, detections=10 + 10 * seed)
    expected = by_definition(ground, predictions)
    assert measured(ground, predictions) == pytest.approx(expected, abs=1e-9)
    assert sum(abs(value) > 0.1 for value in expected.values()) >= 3, "a scene in which little is wrong shows little"


@pytest.mark.parametrize("seed", range(4))
def test_weights_are_repetitions(seed):
    ground, predictions = unequal(seed)
    weights = np.random.default_rng(seed).poisson(1, (1, len(predictions)))
    copies, found_again = repeated(ground, predictions, weights[0])
    assert measured(ground, predictions, weights) == pytest.approx(measured(copies, found_again), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_hotcoco_sees_the_same_errors(seed):
    """Its types and what goes when mended are the paper's; not what it does with cls, loc and miss, and with crowds.

    It lets every mended detection of an object count as right, leaves it in the wrong category, and gives missed
    objects detections of the highest score instead of leaving them out. A crowd nearby is an object to it.
    """
    hotcoco = pytest.importorskip("hotcoco")
    ground, predictions = unequal(seed)
    for entry in ground["annotations"]:
        entry["iscrowd"] = 0
    results = [
        {"image_id": image, "category_id": label + 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for image, detections in predictions
        for (x1, y1, x2, y2), score, label in zip(
            *(detections[name].tolist() for name in ("boxes", "scores", "labels")), strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = hotcoco.COCO(ground)
        evaluation = hotcoco.COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        theirs = evaluation.tide_errors()
    matches = match(ground, predictions, [1, 2, 3])
    types = error_types(matches)
    counts = [np.count_nonzero(types.detection == number) for number in range(5)]
    names = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
    assert dict(zip(names, [*counts, types.missed.sum()], strict=True)) == {n: theirs["counts"][n] for n in names}
    ours = measured(ground, predictions)
    for name in ("Both", "Dupe", "Bkg"):
        assert ours[ERRORS[names.index(name)]] == pytest.approx(100 * theirs["delta_ap"][name], abs=1e-9)


BOX = (1, 1, 10, 10, 40, 40)
RIGHT = (10, 10, 50, 50, 0.5, 0)


@pytest.mark.parametrize(
    ("detections", "boxes", "expected"),
    [
        # The better detection is right, the other one comes too late to cost anything.
        ([RIGHT, (10, 10, 50, 50, 0.9, 0)], [BOX], {}),
        ([RIGHT, (100, 100, 140, 140, 0.9, 0)], [BOX], {"bkg": 50}),
        # The first lies on half of the object (IoU 0.43); the object is found by the second, so the first is gone.
        ([(26, 10, 66, 50, 0.9, 0), RIGHT], [BOX], {"loc": 50}),
        # On an object of category 2, which nothing else finds: right there, and no longer wrong here.
        ([RIGHT, (100, 100, 140, 140, 0.9, 0)], [BOX, (1, 2, 100, 100, 40, 40)], {"cls": 75}),
        # Beside an object of category 2.
        ([RIGHT, (116, 100, 156, 140, 0.9, 0)], [BOX, (1, 2, 100, 100, 40, 40)], {"both": 25, "miss": 0}),
        # Two of three objects are missed: 34 of 101 recalls are reached, then all.
        ([RIGHT], [BOX, (1, 1, 100, 100, 40, 40), (1, 1, 150, 10, 40, 40)], {"miss": 100 * (1 - 34 / 101)}),
        # Nothing found: without what is missed nothing is left, and nothing is gained.
        ([], [BOX], {}),
    ],
)
def test_errors_by_hand(detections, boxes, expected):
    ground = truth(boxes, categories=sorted({box[1] for box in boxes}))
    assert measured(ground, [(1, found(*detections))]) == pytest.approx(dict.fromkeys(ERRORS, 0) | expected, abs=1e-9)
