"""Test-time augmentation: views are brought back to the original image and suppressed together."""

import pytest
import torch

from ablations.experiment.augment import merge, mirrored


def view(*boxes):
    boxes = torch.tensor(boxes)
    return {"boxes": boxes[:, :4], "scores": boxes[:, 4], "labels": boxes[:, 5].long()}


def test_a_mirrored_box_comes_back():
    boxes = torch.tensor([[10.0, 5.0, 30.0, 25.0]])
    assert mirrored(boxes, 100).tolist() == [[70.0, 5.0, 90.0, 25.0]]
    assert torch.equal(mirrored(mirrored(boxes, 100), 100), boxes)


def test_views_agree_on_one_detection_and_add_what_only_one_of_them_saw():
    first = view([0, 0, 10, 10, 0.6, 0], [50, 50, 60, 60, 0.5, 1])
    second = view([0, 0, 10, 10.5, 0.9, 0], [0, 0, 10, 10, 0.4, 1])
    merged = merge([first, second])
    # Best first; the other view's weaker box of the same class is gone, the one of another class is not.
    assert merged["scores"].tolist() == pytest.approx([0.9, 0.5, 0.4])
    assert merged["labels"].tolist() == [0, 1, 1]
    assert merged["boxes"][0].tolist() == [0, 0, 10, 10.5]


def test_no_more_than_a_hundred_survive_and_masks_are_refused():
    grid = [[20.0 * i, 20.0 * j, 20.0 * i + 10, 20.0 * j + 10, 0.5, 0] for i in range(12) for j in range(12)]
    assert len(merge([view(*grid[:72]), view(*grid[72:])])["scores"]) == 100
    with pytest.raises(ValueError, match="masks"):
        merge([{**view(*grid), "masks": None}] * 2)
