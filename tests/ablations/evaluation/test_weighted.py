"""Matches are pycocotools' own; numbers under image weights are those of a data set of repeated images."""

import copy
import json

import numpy as np
import pytest
from evaluation_scenes import COCOEVAL, found, needs_cocoeval, random_scene, repeated, truth
from hypothesis import given, settings
from hypothesis import strategies as st

from ablations.evaluation import matches as matching
from ablations.evaluation.detections import by_image
from ablations.evaluation.evaluate import METRICS, evaluate
from ablations.evaluation.matches import match
from ablations.evaluation.weighted import average_precision


def check(metrics, expected, weighting=0):
    """That one weighting's twelve numbers are the expected ones, None for NaN."""
    assert tuple(metrics) == tuple(expected) == METRICS
    for name, value in expected.items():
        found = metrics[name][weighting]
        assert np.isnan(found) if value is None else found == pytest.approx(value, abs=1e-10), name


SIZES = {"images": st.integers(1, 9), "categories": st.integers(1, 4), "detections": st.integers(1, 130)}


@settings(max_examples=40, deadline=None)
@given(st.builds(random_scene, st.integers(0, 10**6), **SIZES))
def test_unit_weights_give_pycocotools_numbers(scene):
    ground, predictions = scene
    ids = [category["id"] for category in ground["categories"]]
    check(average_precision(match(ground, predictions, ids)), evaluate(predictions, ground, ids))


@needs_cocoeval
def test_unit_weights_give_pycocotools_numbers_on_coco():
    ground = json.loads((COCOEVAL / "instances_val2014_100.json").read_text())
    results = json.loads((COCOEVAL / "instances_val2014_fakebbox100_results.json").read_text())
    ids = sorted(category["id"] for category in ground["categories"])
    predictions = by_image(results, [image["id"] for image in ground["images"]], ids)
    expected = evaluate(predictions, ground, ids)
    assert expected["AP"] == pytest.approx(50.45806987249628, abs=1e-12)
    for name, value in average_precision(match(ground, predictions, ids)).items():
        assert value[0] == pytest.approx(expected[name], abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.data(), st.builds(random_scene, st.integers(0, 10**6), ties=st.just(False), **SIZES))
def test_weights_are_repetitions(data, scene):
    ground, predictions = scene
    ids = [category["id"] for category in ground["categories"]]
    draw = st.lists(st.integers(0, 4), min_size=len(predictions), max_size=len(predictions))
    weights = np.array([data.draw(draw) for _ in range(2)])
    metrics = average_precision(match(ground, predictions, ids), weights)
    for i, row in enumerate(weights):
        copies, found_again = repeated(ground, predictions, row)
        check(metrics, evaluate(found_again, copies, ids), i)


def test_many_weightings_are_those_of_each_alone():
    """Long rows are summed in chunks of rows, short ones by NumPy's own running sums."""
    ground, predictions = random_scene(3, images=30, detections=100)
    matches = match(ground, predictions, [1, 2, 3])
    weights = np.random.default_rng(0).poisson(1, (700, 30))
    together = average_precision(matches, weights)
    for i in (0, 511, 512, 699):
        alone = average_precision(matches, weights[i : i + 1])
        assert all(together[name][i] == pytest.approx(alone[name][0], abs=1e-10, nan_ok=True) for name in METRICS)


@pytest.mark.parametrize("objects", [20, 100, 200])
def test_a_recall_is_reached_as_floats_divide(objects):
    """35 of 100 objects: 0.35 is less than pycocotools' recall of 0.35000000000000003, so it is not reached."""
    boxes = [(1, 1, 10 * (i % 20), 10 * (i // 20), 8, 8) for i in range(objects)]
    rows = [(x, y, x + 8, y + 8, 1 - i / 1000, 0) for i, (_, _, x, y, _, _) in enumerate(boxes)]
    for hits in (objects * 7 // 20, objects * 7 // 10, objects * 19 // 20):
        predictions = [(1, found(*rows[: min(hits, 100)]))]
        ground = truth(boxes)
        check(average_precision(match(ground, predictions, [1])), evaluate(predictions, ground, [1]))


def test_the_order_of_images_and_annotations_given_does_not_matter_where_no_overlap_is_equal():
    ground, predictions = random_scene(5)
    other = copy.deepcopy(ground)
    other["annotations"].sort(key=lambda entry: -entry["image_id"])
    ours = average_precision(match(ground, predictions, [1, 2, 3]))
    again = average_precision(match(other, predictions[::-1], [1, 2, 3]))
    assert all(np.array_equal(ours[name], again[name], equal_nan=True) for name in METRICS)


def test_pairs_in_small_portions_are_the_same(monkeypatch):
    ground, predictions = random_scene(6)
    whole = match(ground, predictions, [1, 2, 3])
    monkeypatch.setattr(matching, "PAIRS", 7)
    parts = match(ground, predictions, [1, 2, 3])
    assert np.array_equal(whole.matched, parts.matched) and np.array_equal(whole.candidates, parts.candidates)
    assert np.array_equal(whole.other.overlap, parts.other.overlap)


def test_nothing_found_and_nothing_there():
    ground = truth([(1, 1, 10, 10, 40, 40)], images=2)
    nothing = average_precision(match(ground, [(1, found()), (2, found())], [1]), np.array([[1, 1], [0, 2]]))
    assert nothing["AP"].tolist()[0] == 0 and np.isnan(nothing["AP"][1]) and np.isnan(nothing["APs"]).all()
    empty = average_precision(match(truth([], images=0), [], [1]))
    assert all(np.isnan(value).all() for value in empty.values())


def test_weights_that_cannot_be_are_refused():
    ground, predictions = random_scene(7)
    matches = match(ground, predictions, [1, 2, 3])
    for weights in (np.ones((1, 11), int), np.ones(12, int), -np.ones((1, 12), int)):
        with pytest.raises(ValueError, match="of 12 images"):
            average_precision(matches, weights)
