"""Rows of dense heads and the candidates taken from them."""

import torch

from heads.boxes.rows import flatten_levels
from heads.boxes.selection import best_per_level


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


def test_rows_go_cell_by_cell_and_anchor_by_anchor():
    """Two anchors with three values each, on two levels."""
    maps = [torch.randn(2, 6, 2, 3), torch.randn(2, 6, 1, 2)]
    want = [
        m[:, 3 * anchor : 3 * anchor + 3, y, x]
        for m in maps
        for y in range(m.shape[2])
        for x in range(m.shape[3])
        for anchor in range(2)
    ]
    assert torch.equal(flatten_levels(maps, 3), torch.stack(want, 1))
