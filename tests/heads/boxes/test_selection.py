"""The candidates of dense heads, and the detections that are selected from them."""

import torch

from heads.boxes.selection import Candidates, Selection, best_per_level


def test_best_per_level_limits_each_level_by_itself():
    generator = torch.Generator().manual_seed(3)
    scores, rank = torch.rand(2, 30, 4, generator=generator)
    counts = (20, 9, 1)
    anchor, label = best_per_level(scores, 0.2, 10, counts, rank)
    start = 0
    for count in counts:
        part = slice(start, start + count)
        start += count
        value = torch.where(scores[part] > 0.2, rank[part], -1).flatten()
        want = value.argsort(descending=True)[: min(10, int((value >= 0).sum()))].sort().values
        got = (anchor >= part.start) & (anchor < part.stop)
        assert torch.equal((anchor[got] - part.start) * 4 + label[got], want)


def test_a_score_must_exceed_the_threshold():
    scores = torch.tensor([[0.25, 0.26], [0.24, 0.9]])
    anchor, label = best_per_level(scores, 0.25, 10, [2])
    assert anchor.tolist() == [0, 1] and label.tolist() == [1, 1]


# Three anchors on two levels, far from each other, of an image of 100 × 100.
BOXES = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [90, 90, 120, 120]])
COUNTS = (2, 1)


def selected(selection: Selection, probabilities, rank=None, scores=None, boxes=BOXES):
    """What is selected in one image, and the candidates that it was read of."""
    candidates = []

    def read(image, anchor, label):
        candidates.append((image, anchor.tolist(), label.tolist()))
        return boxes[anchor], (probabilities if scores is None else scores)[image, anchor, label]

    (found,) = selection.detections(Candidates(probabilities, COUNTS, read, rank), [(100, 100)])
    return found, candidates[0]


PROBABILITIES = torch.tensor([[[0.1, 0.9], [0.8, 0.05], [0.3, 0.7]]])


def test_candidates_exceed_the_threshold_and_detections_fall_by_score():
    found, candidates = selected(Selection(score_threshold=0.5), PROBABILITIES)
    assert candidates == (0, [0, 1, 2], [1, 0, 1])
    assert found["labels"].tolist() == [1, 0, 1]
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.8, 0.7]))
    assert found["boxes"].tolist() == [[0, 0, 10, 10], [20, 20, 30, 30], [90, 90, 100, 100]]


def test_the_best_of_a_level_are_chosen_by_rank_and_scored_by_what_is_read():
    # Of the first level's candidates only the second, by its rank; its score is another.
    rank = torch.tensor([[[0.0, 0.1], [0.9, 0.0], [0.0, 0.0]]])
    found, candidates = selected(Selection(0.5, per_level=1), PROBABILITIES, rank, scores=PROBABILITIES / 2)
    assert candidates == (0, [1, 2], [0, 1])
    torch.testing.assert_close(found["scores"], torch.tensor([0.4, 0.35]))
    assert selected(Selection(0.5, per_level=1), PROBABILITIES)[1] == (0, [0, 2], [1, 1])


def test_the_most_detections_of_an_image_are_its_best():
    assert selected(Selection(score_threshold=0.5, most=2), PROBABILITIES)[0]["labels"].tolist() == [1, 0]


def test_nms_is_within_a_class():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8]])
    for threshold, labels in ((0.79, [1, 0]), (0.81, [1, 0, 1])):
        found, _ = selected(Selection(score_threshold=0.5, iou_threshold=threshold), PROBABILITIES, boxes=boxes)
        assert found["labels"].tolist() == labels


def test_clipping_before_nms_lets_boxes_meet_that_overhang_the_image():
    # Outside the image the two have nothing in common; inside they are the same.
    boxes = torch.tensor([[80.0, 80, 100, 300], [0, 0, 1, 1], [80, 80, 300, 100]])
    first, last = (
        selected(Selection(0.5, clip_first=clip_first), PROBABILITIES, boxes=boxes)[0] for clip_first in (True, False)
    )
    assert first["labels"].tolist() == [1, 0] and last["labels"].tolist() == [1, 0, 1]
    assert last["boxes"].tolist()[0] == last["boxes"].tolist()[2] == [80, 80, 100, 100]


def test_an_image_without_candidates_has_no_detections():
    found, candidates = selected(Selection(score_threshold=0.95), PROBABILITIES)
    assert candidates == (0, [], []) and found["boxes"].shape == (0, 4) and found["scores"].shape == (0,)
