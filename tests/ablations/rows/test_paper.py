"""The paper's formulation against its formulas, written out level by level and tap by tap in float64."""

import pytest
import torch
import torch.nn.functional as F

from heads.dyhead.blocks import PaperBlock
from heads.dyhead.dyhead import DyHead
from heads.dyhead.paper import from_median, to_median

LEVELS, CHANNELS, HEIGHT, WIDTH = 3, 16, 4, 5


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = PaperBlock(CHANNELS, "LSC", levels=LEVELS).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block


def stacked(batch=2):
    return torch.randn(batch, LEVELS, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64, generator=torch.manual_seed(1))


def sigma(x):
    return torch.clamp((x + 1) / 2, 0, 1)


def bilinear(image, y, x):
    """Value (C,) of a map (C, H, W) at a position, zero outside."""
    total = torch.zeros(len(image), dtype=image.dtype)
    top, left = int(torch.floor(y)), int(torch.floor(x))
    for row, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
        for column, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                total = total + weight_y * weight_x * image[:, row, column]
    return total


def test_scale_attention_is_the_formula(block):
    x = stacked()
    pooled = x.mean((2, 3, 4))
    gates = sigma(F.relu(pooled @ block.scale.mix.weight.T + block.scale.mix.bias))
    assert (gates > 0.5).any()
    torch.testing.assert_close(block.scale(x), x * gates[:, :, None, None, None], rtol=0, atol=1e-12)


def test_spatial_attention_is_the_formula(block):
    x = stacked(batch=1)
    predicted = F.conv2d(x[:, LEVELS // 2], block.spatial.offset.weight, block.spatial.offset.bias, padding=1)[0]
    weight = block.spatial.weight.view(LEVELS, CHANNELS, CHANNELS, 3, 3)
    expected = torch.zeros(LEVELS, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    for level in range(LEVELS):
        for i in range(HEIGHT):
            for j in range(WIDTH):
                for tap in range(9):
                    y = i - 1 + tap // 3 + predicted[2 * tap, i, j]
                    z = j - 1 + tap % 3 + predicted[2 * tap + 1, i, j]
                    sample = bilinear(x[0, level], y, z) * predicted[18 + tap, i, j].sigmoid()
                    expected[level, :, i, j] += weight[level, :, :, tap // 3, tap % 3] @ sample
    norm = block.spatial.norm
    expected = torch.stack(
        [
            F.group_norm(e[None], 16, w, b)[0]
            for e, w, b in zip(expected, norm.weight.chunk(LEVELS), norm.bias.chunk(LEVELS), strict=True)
        ]
    )
    torch.testing.assert_close(block.spatial(x)[0], expected, rtol=0, atol=1e-11)


def test_task_attention_is_the_formula(block):
    x = stacked()
    task = block.task
    hidden = F.relu(x.mean((1, 3, 4)) @ task.reduce.weight.T + task.reduce.bias)
    y = F.relu6(hidden @ task.expand.weight.T + task.expand.bias + 3) / 6
    a1, b1, a2, b2 = (c[:, None, :, None, None] for c in y.chunk(4, dim=1))
    expected = torch.maximum(2 * a1 * x + b1 - 0.5, (2 * a2 - 1) * x + b2 - 0.5)
    torch.testing.assert_close(task(x), expected, rtol=0, atol=1e-12)


def test_the_block_applies_them_in_the_papers_order(block):
    x = stacked()
    torch.testing.assert_close(block(x), block.task(block.spatial(block.scale(x))), rtol=0, atol=0)


def test_levels_go_to_the_median_size_and_back():
    sizes = [(8, 10), (4, 5), (2, 3)]
    features = [torch.full((1, 16, *size), float(i)) for i, size in enumerate(sizes)]
    features[0][:, :, :2, :2] = 4.0
    middle = to_median(features)
    assert middle.shape == (1, 3, 16, 4, 5)
    # A finer level is averaged, a coarser one interpolated, the median one untouched.
    assert (middle[0, 0, :, 0, 0] == 4).all() and (middle[0, 0, :, 1:, 1:] == 0).all()
    assert (middle[0, 1] == 1).all() and (middle[0, 2] == 2).all()
    back = from_median(middle, [torch.Size(size) for size in sizes])
    assert [tuple(x.shape[-2:]) for x in back] == sizes


def test_the_head_resizes_once_around_all_blocks():
    torch.manual_seed(0)
    head = DyHead(16, 2, formulation="paper", levels=3).double()
    features = [torch.randn(1, 16, *size, dtype=torch.float64) for size in ((8, 10), (4, 5), (2, 3))]
    x = head.blocks[1](head.blocks[0](to_median(features)))
    for ours, theirs in zip(head(features), from_median(x, [f.shape[-2:] for f in features]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
