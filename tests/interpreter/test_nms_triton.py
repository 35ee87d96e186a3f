"""The Triton kernels of suppression, interpreted: the tests of its PyTorch path, and what their tiles can do wrong."""

# Imported tests run here as well, under the interpreter.
# ruff: noqa: F401

import importlib

import pytest
import torch
from test_nms import (
    check_scene,
    random_scene,
    test_an_overlap_equal_to_the_threshold_is_kept,
    test_any_strides,
    test_any_threshold,
    test_boxes_that_are_not_finite_suppress_nothing,
    test_boxes_without_area_stay,
    test_float64_is_compared_in_float64,
    test_half_precision_is_compared_in_float32,
    test_labels_do_not_move_the_boxes,
    test_mmcv_vectors,
    test_no_box_gives_no_index,
    test_opcheck,
    test_scores_that_are_not_numbers_come_first,
    test_ties_go_by_index,
)

from kernels import batched_nms, nms, use_backend


@pytest.fixture(autouse=True)
def triton_backend():
    with use_backend("triton"):
        yield


@pytest.fixture
def every_bit_set(monkeypatch):
    """Memory that nobody has written says that everything is suppressed."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(-1))


@pytest.mark.parametrize(
    ("scene", "threshold"),
    [
        pytest.param({"count": 1}, 0.5, id="one"),
        pytest.param({"count": 64}, 0.1, id="one tile"),
        pytest.param({"count": 65}, 0.5, id="one more than a tile"),
        pytest.param({"count": 300, "duplicates": True, "ties": True, "classes": 3}, 0.5, id="duplicates and ties"),
        pytest.param({"count": 1030, "classes": 3, "duplicates": True}, 0.3, id="more than 1,000 boxes"),
    ],
)
def test_equals_the_greedy_loop(scene, threshold, every_bit_set):
    check_scene(scene, 0, threshold)


def test_each_box_suppresses_only_the_next(every_bit_set):
    """The longest chain within a tile and across tiles: every second box is kept, and each depends on all before."""
    start = torch.arange(150.0)
    boxes = torch.stack([start, start * 0, start + 2.5, start * 0 + 1], 1)
    assert nms(boxes, -start, 0.3).tolist() == list(range(0, 150, 2))


def test_the_walk_in_pieces(monkeypatch, every_bit_set):
    monkeypatch.setattr(importlib.import_module("kernels.regions.nms_kernels"), "_PIECE", 32)
    check_scene({"count": 200, "duplicates": True}, 1, 0.3)


def test_more_boxes_than_the_matrix_holds(monkeypatch):
    boxes, scores, labels = (torch.from_numpy(a) for a in random_scene(90, 0, classes=2))
    want = batched_nms(boxes, scores, labels, 0.3)
    monkeypatch.setattr(importlib.import_module("kernels.nms"), "_MOST_TRITON", 89)
    monkeypatch.setattr(importlib.import_module("kernels.regions.nms_kernels"), "greedy", None)
    assert torch.equal(batched_nms(boxes, scores, labels, 0.3), want)
