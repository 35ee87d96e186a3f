"""The tables of a block: what its kernels look up, and how long they are kept."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

layouts = pytest.importorskip("kernels.block.layout", reason="Triton is not installed")
SIZES = ((7, 10), (4, 5), (2, 3), (1, 2))


def made(sizes=SIZES, batch=2, real=torch.float64):
    return layouts.layout(sizes, batch, torch.device("cpu"), real, (8, 16))


def test_rows_of_the_matrices_follow_each_other():
    tables = made()
    assert [(p.branch, p.level, p.source) for p in tables.problems] == [
        *((0, i, i) for i in range(4)),
        *((1, i, i - 1) for i in range(1, 4)),
        *((2, i, i + 1) for i in range(3)),
    ]
    assert tables.rows == 2 * sum(h * w for h, w in SIZES)
    assert tables.sampled_rows == 3 * tables.rows - 2 * 2 * 70
    maps = [torch.randn(2, 3, *size) for size in SIZES]
    for x, y in zip(maps, tables.split(layouts.join(maps)), strict=True):
        assert torch.equal(x, y) and y.is_contiguous(memory_format=torch.channels_last)
    assert tables.share[:, :, 0, 0].tolist() == [[1 / 2, 0, 1 / 2], *[[1 / 3] * 3] * 2, [1 / 2, 1 / 2, 0]]


def test_every_pixel_is_in_one_tile_and_one_run():
    tables = made(((19, 35), (10, 18)), batch=3)
    assert len(tables.tiles()) == 3 * (3 * 3 + 2 * 2 + 2 * 2 + 2 * 2)
    for work, sizes in ((tables.runs(8), tables.sizes), (tables.sampled_runs(8), [p.size for p in tables.problems])):
        expected = [(i, n, k) for i, (h, w) in enumerate(sizes) for n in range(3) for k in range(-(-h * w // 8))]
        assert list(map(tuple, work.tolist())) == expected
    first, count = tables.run_bounds(8).T.tolist()
    assert count == [84] * 3 + [23] * 3 and first == [0, 84, 168, 252, 275, 298]


def test_tiles_of_the_levels():
    tables = made(((19, 35), (10, 18), (5, 9)), batch=2)
    expected = [
        (level, n, k) for level, count in enumerate((7 * 5, 4 * 3, 2 * 2)) for n in range(2) for k in range(count)
    ]
    assert list(map(tuple, tables.level_tiles((3, 8)).tolist())) == expected
    assert tables.level_starts((7, 5, 3)).tolist() == [0, 14, 24]


def test_pieces_of_a_branch_s_tiles():
    tables = made(((19, 35), (10, 18), (5, 9)), batch=2)
    # Tiles of 8 x 16 pixels: 9, 4 and 1 an image for the levels themselves, 4 and 1 for either kind of neighbour.
    pieces, bounds = tables.splits((8, 16), 4)
    work = tables.tiles((8, 16))
    covered = [tile for first, end in pieces.tolist() for tile in range(first, min(first + 4, end))]
    assert covered == list(range(len(work))) and len(work) == 2 * (14 + 5 + 5)
    assert bounds.tolist() == [[0, 7], [7, 3], [10, 3]]
    for branch, (first, count) in enumerate(bounds.tolist()):
        for begin, end in pieces[first : first + count].tolist():
            assert {tables.problems[i].branch for i in work[begin:end, 0].tolist()} == {branch}
    assert made(((5, 9),)).splits((8, 16), 4)[1].tolist() == [[0, 1]]


@pytest.mark.parametrize(("size", "target"), [(4, 7), (4, 8), (1, 2), (1, 1), (2, 3), (2, 4), (3, 3), (5, 2)])
def test_interpolation_of_an_axis_is_pytorchs(size, target):
    _, share, first, span = layouts._axis(size, target, torch.float64)
    line = torch.eye(size, dtype=torch.float64)[:, None, :, None]
    weights = F.interpolate(line, size=(target, 1), mode="bilinear", align_corners=True)[:, 0, :, 0]
    torch.testing.assert_close(share, weights.sum(1))
    for pixel, row in enumerate(weights):
        taking = row.nonzero()[:, 0]
        if len(taking):
            assert first[pixel] <= taking[0] and taking[-1] < first[pixel] + span


def test_tables_are_made_once():
    assert made() is made() and made().runs(8) is made().runs(8)
    with torch.inference_mode():
        assert not layouts.layout(((3, 3),), 1, torch.device("cpu"), torch.float32).share.is_inference()


def test_a_layout_that_nobody_uses_is_let_go():
    tables = layouts.Layout(SIZES, 2, torch.device("cpu"), torch.float32, (8, 16))
    assert tables.tiles() is tables.tiles((8, 16))
    tables.runs(8), tables.splits((8, 16), 4)
    tables = weakref.ref(tables)
    gc.collect()
    assert tables() is None
