"""Time of the numbers and intervals of two cells at COCO's size, and of the summary of a cell of the default grid.

pytest tests/ablations/evaluation/bench_evaluation.py --benchmark-only
"""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ablations.evaluation.matches import match
from ablations.evaluation.replicates import summarise
from ablations.evaluation.weighted import average_precision

COCO_SIZE = {"images": 5_000, "categories": 80, "objects": 36_000, "detections": 100, "size": 640}
TINY_SIZE = {"images": 600, "categories": 5, "objects": 1_800, "detections": 30, "size": 128}


def data_set(images, categories, objects, size, detections, skill, seed):
    """Ground truth whose categories are as unequal as COCO's, and `detections` an image, boxes off by a share `skill`.

    Categories and sizes of objects come from the seed 0, so that two sets of detections have one ground truth.
    """
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, categories + 1)
    share /= share.sum()
    image = np.sort(rng.integers(0, images, objects))
    category = rng.choice(categories, objects, p=share)
    # Sizes as COCO's: two of five objects are small, one of four large.
    sides = np.exp(rng.normal(np.log(size / 14), 1.1, (objects, 2))).clip(2, size * 0.95)
    corner = rng.random((objects, 2)) * (size - sides)
    crowd = rng.random(objects) < 0.01
    annotations = [
        {"id": n, "image_id": i + 1, "category_id": c + 1, "bbox": box, "area": 0.7 * box[2] * box[3], "iscrowd": k}
        for n, (i, c, box, k) in enumerate(
            zip(
                image.tolist(),
                category.tolist(),
                np.concatenate([corner, sides], axis=1).tolist(),
                crowd.astype(int).tolist(),
                strict=True,
            ),
            1,
        )
    ]
    ground = {
        "images": [{"id": i + 1, "width": size, "height": size} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": c + 1, "name": str(c + 1)} for c in range(categories)],
    }

    rng = np.random.default_rng(seed)
    bounds = np.searchsorted(image, np.arange(images + 1))
    predictions = []
    for i in range(images):
        # A quarter of the detections lies on objects, rather those that score well, the best ones most exactly; the
        # others lie anywhere.
        near = rng.integers(bounds[i], bounds[i + 1], detections // 4) if bounds[i + 1] > bounds[i] else []
        score = np.sort(rng.random(detections) ** 3)[::-1]
        side = np.exp(rng.normal(np.log(size / 14), 1.1, (detections, 2))).clip(2, size)
        place = rng.random((detections, 2)) * (size - side)
        label = rng.choice(categories, detections, p=share)
        order = np.argsort(rng.random(detections) * np.arange(1, detections + 1))[: len(near)]
        off = rng.normal(0, skill, (len(near), 4)) * (1.5 - score[order, None])
        place[order] = corner[near] + off[:, :2] * sides[near]
        side[order] = sides[near] * np.exp(off[:, 2:])
        label[order] = np.where(rng.random(len(near)) < 0.8, category[near], label[order])
        predictions.append((i + 1, {"bbox": np.concatenate([place, side], axis=1), "scores": score, "labels": label}))
    return ground, predictions, list(range(1, categories + 1))


@pytest.fixture(scope="module")
def cells(pytestconfig):
    """Two cells on one ground truth, of 500,000 detections each; of a fiftieth where nothing is timed."""
    size = COCO_SIZE if pytestconfig.getoption("benchmark_only") else COCO_SIZE | {"images": 100, "objects": 720}
    return [data_set(**size, skill=skill, seed=seed) for seed, skill in ((1, 0.08), (2, 0.085))]


def interval(cells):
    """The twelve numbers of both cells, their difference in AP, and the half-width of its 95 % interval over images."""
    numbers, drawn = [], []
    for ground, predictions, categories in cells:
        matches = match(ground, predictions, categories)
        numbers.append({name: value[0] for name, value in average_precision(matches).items()})
        drawn.append(summarise(ground, predictions, categories, "data").replicates[:, 0])
    return numbers, numbers[0]["AP"] - numbers[1]["AP"], 1.96 * (drawn[0] - drawn[1]).std()


def test_two_cells_at_the_size_of_coco(benchmark, cells):
    numbers, difference, half_width = benchmark.pedantic(interval, (cells,), rounds=1)
    benchmark.extra_info["AP"] = ", ".join(f"{cell['AP']:.2f}" for cell in numbers)
    benchmark.extra_info["delta_AP"] = f"{difference:+.2f} ± {half_width:.2f}"
    print(f"AP {numbers[0]['AP']:.2f}, {numbers[1]['AP']:.2f}; difference {difference:+.2f} ± {half_width:.2f}")
    assert half_width > 0 and difference > -half_width


def by_pycocotools(ground, predictions):
    results = [
        {"image_id": image, "category_id": int(label) + 1, "bbox": box.tolist(), "score": float(score)}
        for image, found in predictions
        for box, score, label in zip(found["bbox"], found["scores"], found["labels"], strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = ground
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats


def test_pycocotools_on_one_of_them(benchmark, cells):
    ground, predictions, categories = cells[0]
    theirs = benchmark.pedantic(by_pycocotools, (ground, predictions), rounds=1)
    ours = average_precision(match(ground, predictions, categories))
    assert [value[0] for value in ours.values()] == pytest.approx(theirs.tolist(), abs=1e-10)


def test_a_cell_of_the_default_grid(benchmark):
    ground, predictions, categories = data_set(**TINY_SIZE, skill=0.08, seed=1)
    summary = benchmark(lambda: summarise(ground, predictions, categories, "data"))
    assert np.isfinite(summary.replicates[:, 0]).all()
