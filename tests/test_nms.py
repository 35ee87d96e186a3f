"""Suppression against mmcv's vectors and against the plain greedy loop."""

import numpy as np
import pytest
import torch

from heads.nms import batched_nms, nms


def plain_nms(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, threshold: float) -> list[int]:
    """The definition, box by box, in float32."""
    boxes, threshold = boxes.astype(np.float32), np.float32(threshold)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    alive, kept = np.ones(len(boxes), bool), []
    for index in np.argsort(-scores, kind="stable"):
        if not alive[index]:
            continue
        kept.append(int(index))
        sides = np.minimum(boxes[index, 2:], boxes[:, 2:]) - np.maximum(boxes[index, :2], boxes[:, :2])
        shared = sides.clip(min=0).prod(1)
        with np.errstate(invalid="ignore"):
            overlap = shared / (area[index] + area - shared)
        alive &= ~((overlap > threshold) & (labels == labels[index]))
    return kept


def random_scene(count: int, seed: int, classes: int = 1, duplicates: bool = False, ties: bool = False):
    rng = np.random.default_rng(seed)
    corner, side = rng.uniform(0, 200, (count, 2)), rng.uniform(0, 60, (count, 2))
    boxes = np.concatenate([corner, corner + side], 1).astype(np.float32)
    if duplicates:
        boxes = boxes[rng.integers(0, max(1, count // 4), count)]
    scores = rng.random(count).astype(np.float32)
    if ties:
        scores = (scores * 10).round() / 10
    return boxes, scores, rng.integers(0, classes, count)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.7])
def test_mmcv_vectors(golden, threshold):
    vectors = golden("pieces_nms")
    boxes, scores, labels = (torch.from_numpy(vectors[k]) for k in ("boxes", "scores", "labels"))
    np.testing.assert_array_equal(nms(boxes, scores, threshold).numpy(), vectors[f"nms.keep_{threshold}"])
    keep = batched_nms(boxes, scores, labels, threshold)
    np.testing.assert_array_equal(keep.numpy(), vectors[f"batched.keep_{threshold}"])
    if threshold == 0.5:
        np.testing.assert_array_equal(keep.numpy(), vectors["split.keep_0.5"])
        ten = batched_nms(boxes, scores, labels, threshold, max_output=10)
        np.testing.assert_array_equal(ten.numpy(), vectors["nms_thr0.3_max10.keep_0.5"])


@pytest.mark.parametrize("threshold", [0.5, 0.6])
def test_an_overlap_equal_to_the_threshold_is_kept(golden, threshold):
    vectors = golden("pieces_nms")
    keep = nms(torch.from_numpy(vectors["thr.boxes"]), torch.from_numpy(vectors["thr.scores"]), threshold)
    np.testing.assert_array_equal(keep.numpy(), vectors[f"thr.keep_{threshold}"])


@pytest.mark.parametrize(
    "scene",
    [
        pytest.param({"count": 1}, id="one"),
        pytest.param({"count": 128}, id="one block"),
        pytest.param({"count": 129}, id="one more than a block"),
        pytest.param({"count": 700, "duplicates": True}, id="duplicates"),
        pytest.param({"count": 700, "ties": True}, id="ties"),
        pytest.param({"count": 700, "duplicates": True, "ties": True, "classes": 3}, id="all of it"),
        pytest.param({"count": 3000}, id="3000 boxes"),
        pytest.param({"count": 3000, "classes": 20}, id="3000 boxes of 20 classes"),
    ],
)
def test_equals_the_greedy_loop(scene):
    for seed, threshold in enumerate((0.1, 0.5, 0.7)):
        boxes, scores, labels = random_scene(seed=seed, **scene)
        want = plain_nms(boxes, scores, labels, threshold)
        tensors = [torch.from_numpy(a) for a in (boxes, scores, labels)]
        assert batched_nms(*tensors, threshold).tolist() == want
        assert batched_nms(*tensors, threshold, max_output=50).tolist() == want[:50]
        if scene.get("classes", 1) == 1:
            assert nms(*tensors[:2], threshold).tolist() == want


def test_ties_go_by_index():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [30, 30, 40, 40], [0, 0, 10, 10]])
    assert nms(boxes, torch.full((4,), 0.5), 0.5).tolist() == [0, 2]
    assert nms(boxes.flip(0), torch.full((4,), 0.5), 0.5).tolist() == [0, 1]


def test_labels_do_not_move_the_boxes():
    """With class 100,000 as a shift in float32 these two boxes would become the same."""
    boxes = torch.tensor([[0.0, 0, 0.3, 0.3], [0.2, 0.2, 0.5, 0.5]])
    assert batched_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([100_000, 100_000]), 0.5).tolist() == [0, 1]


def test_boxes_without_area_stay():
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 10, 10]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 1, 2]


def test_no_box_gives_no_index():
    keep = batched_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), 0.5)
    assert keep.shape == (0,) and keep.dtype == torch.int64
    assert nms(torch.zeros(1, 4), torch.zeros(1), 0.5, max_output=0).tolist() == []


@pytest.mark.gpu
def test_gpu_gives_the_same_indices():
    boxes, scores, labels = (torch.from_numpy(a) for a in random_scene(5000, 0, classes=7, ties=True))
    want = batched_nms(boxes, scores, labels, 0.5)
    got = batched_nms(boxes.cuda(), scores.cuda(), labels.cuda(), 0.5)
    assert got.is_cuda and torch.equal(got.cpu(), want)
