"""Matches are pycocotools' own, and the twelve numbers under image weights are those of a data set of repeated images."""

import numpy as np
import pytest
from evaluation_scenes import random_scene
from hypothesis import given, settings
from hypothesis import strategies as st

from ablations.evaluation.evaluate import METRICS, evaluate
from ablations.evaluation.matches import match
from ablations.evaluation.weighted import average_precision


def numbers(metrics, weighting=0):
    """The twelve numbers of one weighting, None for NaN."""
    return {name: None if np.isnan(values[weighting]) else values[weighting] for name, values in metrics.items()}


def close(found, expected):
    assert tuple(found) == METRICS
    for name, value in expected.items():
        assert found[name] is None if value is None else found[name] == pytest.approx(value, abs=1e-10), name


scenes = st.builds(
    random_scene,
    st.integers(0, 10**6),
    images=st.integers(1, 9),
    categories=st.integers(1, 4),
    detections=st.integers(1, 130),
)


@settings(max_examples=60, deadline=None)
@given(scenes)
def test_unit_weights_give_pycocotools_numbers(scene):
    ground, predictions = scene
    ids = [category["id"] for category in ground["categories"]]
    expected = evaluate(predictions, ground, ids)
    close(numbers(average_precision(match(ground, predictions, ids))), expected)
    # Categories that are left out take their objects with them.
    expected = evaluate(predictions_of(predictions, ids[:1]), ground, ids[:1])
    close(numbers(average_precision(match(ground, predictions_of(predictions, ids[:1]), ids[:1]))), expected)
