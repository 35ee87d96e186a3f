"""What anchors are to learn from an assignment."""

import torch

from heads.boxes.assign import BACKGROUND, IGNORED
from heads.boxes.matched import labels_of, positives_of


def test_anchors_without_a_box_have_the_label_of_background_ignored_ones_too():
    matched = torch.tensor([[2, BACKGROUND, 0], [IGNORED, 1, 2]])
    labels = [torch.tensor([4]), torch.tensor([], dtype=torch.long), torch.tensor([5, 6])]
    assert labels_of(matched, labels, background=9).tolist() == [[6, 9, 4], [9, 5, 6]]
    assert labels_of(torch.full((2, 2), IGNORED), [labels[1]] * 2, background=9).tolist() == [[9, 9], [9, 9]]


def test_positives_are_counted_through_the_batch():
    boxes = [torch.tensor([[0.0, 0, 1, 1]]), torch.zeros(0, 4), torch.tensor([[0.0, 0, 2, 2], [0, 0, 3, 3]])]
    positive, target = positives_of(torch.tensor([[2, BACKGROUND, 0], [IGNORED, 1, 2]]), boxes)
    assert positive.tolist() == [0, 2, 4, 5] and target[:, 2].tolist() == [3, 1, 2, 3]
    positive, target = positives_of(torch.full((2, 3), IGNORED), [torch.zeros(0, 4)] * 2)
    assert positive.shape == (0,) and target.shape == (0, 4)
